"""The exercises: each stub fails and says why, each solution passes, wrong solutions do not.

tests/exercises/wrong_NNx.py holds `WRONG`: what somebody may try → the replacements, each of a text
that the model solution holds once, that make it of that solution. Some hold `RIGHT`, too: other
ways that are as right, and pass.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import ROOT

import check
from check import Exercise, judge

HOME = ROOT / "exercises"
WRONG = ROOT / "tests" / "exercises"
EVERY = check.exercises()
A_SCRIPT = 3
LAYERS = 3

each = pytest.mark.parametrize("exercise", EVERY, ids=lambda exercise: exercise.number)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HOME / "check.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


# ── The files ──


def test_there_are_three_exercises_a_script() -> None:
    numbers = [f"{script:02}{letter}" for script in range(1, 6) for letter in "abc"]
    assert [exercise.number for exercise in EVERY] == numbers


@pytest.mark.parametrize(
    ("folder", "pattern", "name"),
    [
        (HOME / "solutions", "*.py", "{0.stem}.py"),
        (HOME / "checks", "check_*.py", "check_{0.number}.py"),
        (HOME / "hints", "*.md", "{0.number}.md"),
        (WRONG, "*.py", "wrong_{0.number}.py"),
    ],
)
def test_each_has_its_files_and_no_file_is_of_none(folder: Path, pattern: str, name: str) -> None:
    found = {file.name for file in folder.glob(pattern)}
    assert found == {name.format(exercise) for exercise in EVERY}


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


@each
def test_a_stub_has_its_story_and_a_solution_its_reasons(exercise: Exercise) -> None:
    assert len(docstring(exercise.file).splitlines()) >= 5
    reasons = docstring(exercise.solution)
    guides = re.findall(r"docs/[\w-]+\.md", reasons)
    assert len(reasons.splitlines()) >= 3
    assert guides, f"{exercise.solution.name} names no guide"
    assert all((ROOT / guide).exists() for guide in guides), guides


@each
def test_hints_come_in_three_layers(exercise: Exercise) -> None:
    hints = exercise.hints()
    assert len(hints) == LAYERS
    assert len(set(hints)) == LAYERS
    assert all(hints)


# ── What a check says ──


@each
def test_a_stub_fails_and_is_told_call_expected_actual(exercise: Exercise) -> None:
    wrong = judge(exercise.number, exercise.file).wrong
    assert re.fullmatch(r"call: +\S.*\nexpected: +\S.*\nactual: +\S.*", wrong), wrong


@each
def test_a_solution_passes(exercise: Exercise) -> None:
    assert judge(exercise.number, exercise.solution).wrong == ""


Patches = list[tuple[str, str]]


def others(name: str) -> Iterator[object]:
    """`WRONG` or `RIGHT` of each exercise."""
    for exercise in EVERY:
        held = runpy.run_path(str(WRONG / f"wrong_{exercise.number}.py"))
        for what, patches in held.get(name, {}).items():
            yield pytest.param(exercise, patches, id=f"{exercise.number}-{what}")


def wrong_with(exercise: Exercise, patches: Patches, home: Path) -> str:
    """What is wrong with the solution that the patches make."""
    source = exercise.solution.read_text(encoding="utf-8")
    for old, new in patches:
        assert source.count(old) == 1, f"the solution holds {old!r} {source.count(old)} times"
        source = source.replace(old, new)
    file = home / exercise.file.name
    file.write_text(source, encoding="utf-8")
    return judge(exercise.number, file).wrong


@pytest.mark.slow
@pytest.mark.parametrize(("exercise", "patches"), list(others("WRONG")))
def test_a_wrong_solution_fails(exercise: Exercise, patches: Patches, tmp_path: Path) -> None:
    assert "expected:" in wrong_with(exercise, patches, tmp_path)


@pytest.mark.parametrize(
    ("number", "line"),
    [("03a", "        mine: Future"), ("03b", "        lease ="), ("04b", "        order =")],
)
def test_a_bug_in_a_thread_or_a_consumer_is_told_with_its_line(
    number: str, line: str, tmp_path: Path
) -> None:
    exercise = next(exercise for exercise in EVERY if exercise.number == number)
    wrong = wrong_with(exercise, [(line, f"        nobody()\n{line}")], tmp_path)
    assert re.search(rf"{exercise.stem}\.py\", line \d+, in .*\n +nobody\(\)\n", wrong), wrong


@pytest.mark.slow
@pytest.mark.parametrize(("exercise", "patches"), list(others("RIGHT")))
def test_another_right_solution_passes(
    exercise: Exercise, patches: Patches, tmp_path: Path
) -> None:
    assert wrong_with(exercise, patches, tmp_path) == ""


# ── The command ──


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A place for a file that stands for the first exercise."""
    return tmp_path / EVERY[0].file.name


def test_an_endless_loop_is_told_with_its_line(changed: Path) -> None:
    changed.write_text("def spin():\n    while True:\n        pass\n\nspin()\n")
    wrong = judge(EVERY[0].number, changed, limit_s=5.0).wrong
    assert wrong.startswith("not ended after 5 s: an endless loop")
    assert re.search(rf'File ".*{changed.name}", line [23] in spin', wrong), wrong


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise SystemExit(0)", "it ended Python, with exit code 0"),
        ("import os\nos._exit(0)", "it ended Python, with exit code 0"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: invalid syntax"),
        ("", "AttributeError"),
        ('while True:\n    print("x" * 1000)', "more than 1,000,000 characters"),
    ],
)
def test_what_is_no_answer_does_not_pass(changed: Path, source: str, told: str) -> None:
    changed.write_text(source)
    wrong = judge(EVERY[0].number, changed).wrong
    assert told in wrong
    assert "<frozen" not in wrong  # no line of Python's own


def test_threads_that_are_left_do_not_hold_it(changed: Path) -> None:
    changed.write_text("import threading\nthreading.Thread(target=threading.Event().wait).start()")
    assert "AttributeError" in judge(EVERY[0].number, changed).wrong


def test_of_much_output_the_end_is_shown(changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed.write_text(f'print("begin" + "x" * {check.SHOWN} + "end")')
    assert check.one(EVERY[0], changed, check.LIMIT_S) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"it prints, the last {check.SHOWN:,} characters:\n")
    assert ("begin" in told, "xend\n" in told) == (False, True)


def test_one_exercise_tells_what_is_wrong_and_where_a_hint_is() -> None:
    number = EVERY[0].number
    ended = run(number)
    assert ended.returncode == 1
    assert ended.stdout.startswith(f"{number}  {EVERY[0].title}: open\n  call: ")
    assert f"check.py {number} --hint\n" in ended.stdout


def test_one_solution_passes() -> None:
    ended = run(EVERY[0].number, "--solutions")
    assert (ended.returncode, ended.stdout) == (0, f"{EVERY[0].number}  {EVERY[0].title}: done\n")


def test_progress_has_a_line_an_exercise_and_the_next_one() -> None:
    script = EVERY[0].number[:2]
    ended = run(script)
    *lines, done, following = ended.stdout.splitlines()
    assert ended.returncode == 1
    assert [line.split() for line in lines] == [
        [one.number, one.title, "open"] for one in EVERY[:A_SCRIPT]
    ]
    assert done == f"0 of {A_SCRIPT} done"
    assert EVERY[0].file.name in following


def test_progress_of_the_solutions_passes() -> None:
    ended = run(EVERY[0].number[:2], "--solutions")
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-1] == f"{A_SCRIPT} of {A_SCRIPT} done"


def test_no_name_means_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(check, "progress", lambda chosen, *_: asked.append(list(chosen)) or 0)
    assert check.main([]) == 0
    assert asked == [EVERY]


def test_the_name_of_a_file_is_one_of_its_exercise(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(EVERY[0].file), "--hint"]) == 0
    assert EVERY[0].hints()[0] in capsys.readouterr().out


def test_a_file_elsewhere_is_refused_and_not_taken_for_the_stub(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main([str(EVERY[0].solution)])
    assert ended.value.code == 2
    assert f"{EVERY[0].solution} is not judged" in capsys.readouterr().err


def test_the_command_that_it_prints_runs_from_where_it_was_printed(tmp_path: Path) -> None:
    told = []
    for where in (ROOT, HOME, tmp_path):
        command = [sys.executable, str(HOME / "check.py"), EVERY[0].number, "--hint"]
        for _ in range(LAYERS - 1):
            ended = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
            command = shlex.split(ended.stdout.rpartition("more: ")[2])
        told.append(ended.stdout.partition("\n\nmore: ")[0])
    assert told == [EVERY[0].hints()[1]] * len(told)


def test_a_narrow_encoding_costs_an_arrow_and_not_the_answer() -> None:
    command = [sys.executable, str(HOME / "check.py"), "02a"]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "FETCH ? IXSCAN" in ended.stdout


def test_without_the_packages_it_says_so_and_judges_nothing() -> None:
    command = [sys.executable, "-S", str(HOME / "check.py"), EVERY[0].number]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "lacks the packages" in ended.stderr


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    ended = run("09z")
    assert ended.returncode == 2
    assert "no exercise 09z; there are 01a 01b" in " ".join(ended.stderr.split())


def test_hints_one_layer_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    exercise = EVERY[0]
    for args, layer in ((["--hint"], 1), (["--hint", "2"], 2), (["--hint", "3"], 3)):
        assert check.main([exercise.number, *args]) == 0
        told, hints = capsys.readouterr().out, exercise.hints()
        assert [hint in told for hint in hints] == [n == layer for n in range(1, 1 + LAYERS)]
        assert (f"--hint {layer + 1}" in told) == (layer < LAYERS)


@pytest.mark.parametrize("args", [["--hint"], ["01", "--hint"], ["01a", "--hint", "4"]])
def test_a_hint_that_does_not_exist(args: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main(args)
    assert ended.value.code == 2
