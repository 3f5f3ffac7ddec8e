"""The two reports: docs/BENCHMARKS.md from records of benchmarks, docs/COMPLETION_REPORT.md from
those and from outcomes of tests. Both are made here, by harness.py and by pytest themselves.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
harness = importlib.import_module("harness")
report = importlib.import_module("report")
completion = importlib.import_module("completion")
WRITTEN = completion.written_tests()

SVG = "{http://www.w3.org/2000/svg}"
# A benchmark of script 02 that takes no time: one line of each kind, and one that misses its goal.
BENCHMARK = '''
"""Benchmark of nothing | on no server."""

from harness import Side, Tally, counted, faster, run_bench, slower

fast, slow = Side("fast", [1.0, 1.0, 2.0], 10, "docs"), Side("slow", [5.0, 4.0, 6.0], 10, "docs")

def measures(settings):
    load = counted("kills", Tally("ours", [{"lost": 0}]), Tally("sent", [{"n": 9}]), {"lost": 0})
    return {"server": "none <at all>"}, [
        faster("bulk", fast, slow, at_least=2), slower("limit", slow, fast, at_most=3),
        slower("free", slow, fast), load,
    ]

def main():
    return run_bench(__doc__.strip(), (), ["pytest"], measures)
'''


@pytest.fixture
def as_before() -> Iterator[None]:
    """run_bench answers SIGTERM in its own way, for its process ends with it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None) -> dict[str, Any]:
    """Of BENCHMARK, as its run writes it."""
    source = tmp_path / "bench_02_small.py"
    source.write_text(BENCHMARK, "utf-8")
    monkeypatch.chdir(tmp_path)  # where no .env is
    monkeypatch.setenv("BENCH_RECORDS", str(tmp_path / "records"))
    assert runpy.run_path(str(source))["main"]() == 0
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["bench_02_small.json"]
    records: dict[str, dict[str, Any]] = report.read_records(tmp_path / "records")
    return records["bench_02_small"]


def rows(markdown: str) -> list[list[str]]:
    """The cells of all tables."""
    lines = re.findall(r"^\| (.*) \|$", markdown, flags=re.MULTILINE)
    return [re.split(r" (?<!\\)\| ", line) for line in lines]


def test_a_record_holds_what_was_measured(record: dict[str, Any]) -> None:
    bulk, limit, free, kills = record["lines"]
    assert (bulk["ratios"], bulk["met"], bulk["goal"]) == ([5, 4, 3], True, "≥ 2×")
    assert (limit["ratios"], limit["met"], limit["goal"]) == ([5, 4, 3], False, "≤ 3×")
    assert (free["ratios"], free["met"], free["goal"]) == ([5, 4, 3], None, "-")
    assert (kills["ratios"], kills["met"], kills["ours"]) == ([], True, "ours: lost 0")
    assert record["versions"] == {
        "Python": ".".join(map(str, sys.version_info[:3])),
        "pytest": pytest.__version__,
    }
    assert record["machine"]["cores"] >= 1
    assert len(record["load"]) == 2
    assert record["machine"]["memory_bytes"] > 2**28


def test_without_the_variable_nothing_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None
) -> None:
    source = tmp_path / "bench_02_small.py"
    source.write_text(BENCHMARK, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENCH_RECORDS", raising=False)
    assert runpy.run_path(str(source))["main"]() == 0
    assert list(tmp_path.iterdir()) == [source]


def test_the_page_has_each_line_the_machine_and_what_was_missed(record: dict[str, Any]) -> None:
    page = report.page({"bench_02_small": record}, ["bench_02_small", "bench_04_rabbitmq"])
    cells = rows(page)
    assert ["02", r"Benchmark of nothing \| on no server", "2 of 3", "4"] in [
        row[:4] for row in cells
    ]
    for line in record["lines"]:
        outcome = {True: "met", False: "NOT MET", None: "-"}[line["met"]]
        assert [
            line["measure"], line["ours"], line["other"], line["ratio"], line["goal"], outcome
        ] in cells  # fmt: skip
    assert ["02", "limit: slow / fast", "≤ 3×", "4.0× time (3.0–5.0)"] in cells
    memory = f"{record['machine']['memory_bytes'] / 2**30:.1f} GiB"
    assert [record["machine"]["cpu"], memory] in [[row[0], row[2]] for row in cells if len(row) > 2]
    assert "Not measured: `bench_04_rabbitmq`" in page
    assert "server: 3 ratios with their ranges" in page  # the fourth line counts
    assert r"- server: none \<at all>" in page


def test_where_no_goal_was_missed_the_page_says_of_how_many(record: dict[str, Any]) -> None:
    record["lines"] = [line for line in record["lines"] if line["met"] is not False]
    page = report.page({"bench_02_small": record}, [])
    assert "No goal was missed, of 2." in page
    assert "NOT MET" not in page


def test_a_chart_has_each_ratio_and_both_colour_schemes(record: dict[str, Any]) -> None:
    svg = report.chart(record)
    tree = ElementTree.fromstring(svg)  # noqa: S314
    words = ["".join(text.itertext()).strip() for text in tree.iter(f"{SVG}text")]
    ratios = [line for line in record["lines"] if line["ratios"]]
    for line in ratios:
        assert f"{line['measure']}: {line['ours_name']} / {line['other_name']}" in words
    assert words.count("4.0×") == len(ratios)
    assert "kills" not in svg  # counts have no ratio
    assert {"goal met", "goal missed", "no goal", "goal"} <= set(words)
    assert "prefers-color-scheme: dark" in svg
    # Every colour but those of the marks is the style's to decide.
    marks = {colour for _, colour, _ in report.MARKS.values()}
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg.replace(report.STYLE, ""))) <= marks
    assert not re.search(r"\b(href|src)=\"(?!#)", svg)


def test_the_same_record_gives_the_same_bytes_in_another_process(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "records" / "bench_02_small.json"
    code = "import json, report, sys; print(report.chart(json.load(open(sys.argv[1]))), end='')"
    for seed in "1", "2":
        done = subprocess.run(
            [sys.executable, "-c", code, path],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "benchmarks"), "HOME": "/none"},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.stdout == report.chart(json.loads(path.read_text("utf-8"))), done.stderr


def test_what_is_committed_is_what_the_records_give() -> None:
    records = report.read_records(report.RECORDS)
    if not records:
        assert not (report.DOCS / report.PAGE).exists(), "no records: run make bench"
        return
    for path, text in report.files(records, report.benchmarks()):
        assert (report.DOCS / path).read_text("utf-8") == text, f"{path}: run benchmarks/report.py"


# ── The completion report ───────────────────────────────────────────────────────────

# What pytest makes of it is read from its own JUnit XML.
OUTCOMES = """
import pytest

@pytest.fixture
def breaks_at_the_end():
    yield
    raise OSError

@pytest.mark.parametrize("text", ["a.b::c", "[x]", "ok"])
def test_passes(text): pass

def test_fails(): assert 1 == 2

def test_skips(): pytest.skip("no server, said so")

@pytest.mark.parametrize("n", [1, 2])
def test_skips_once(n):
    if n == 1:
        pytest.skip("one")

def test_breaks(breaks_at_the_end): pass

def test_fails_and_breaks(breaks_at_the_end): assert 1 == 2  # pytest tells both
"""
FILE = "tests/01/test_small.py"


@pytest.fixture(scope="module")
def junit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("junit")
    path = home / FILE
    path.parent.mkdir(parents=True)
    path.write_text(OUTCOMES, "utf-8")
    path.with_name("test_broken.py").write_text("import nothing_of_that_name", "utf-8")
    (home / "pytest.ini").write_text("[pytest]\n", "utf-8")
    options = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--junitxml=test.xml"]
    options.append("--continue-on-collection-errors")
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=home, capture_output=True)
    assert done.returncode == 1, done.stdout
    return home / "test.xml"


@pytest.fixture
def evidence(junit: Path, record: dict[str, Any]) -> Any:
    return completion.Evidence([completion.read_run(junit)], {record["benchmark"]: record})


def judged(evidence: Any, **said: Any) -> Any:
    given = {"delivered": ("README.md",), "tests": (f"{FILE}::test_passes",), **said}
    return completion.judged(completion.Promise("It works.", **given), evidence)


def test_outcomes_are_those_that_pytest_tells(junit: Path) -> None:
    run = completion.read_run(junit)
    seen = Counter((test.id.partition("::")[2], test.outcome) for test in run.tests)
    assert seen == {
        ("test_passes", "passed"): 3,
        ("test_fails", "failed"): 1,
        ("test_skips", "skipped"): 1,
        ("test_skips_once", "skipped"): 1,
        ("test_skips_once", "passed"): 1,
        ("test_breaks", "error"): 1,
        ("test_fails_and_breaks", "error"): 1,
        ("", "error"): 1,
    }
    broken = "tests/01/test_broken.py"
    assert {test.id.partition("::")[0] for test in run.tests} == {FILE, broken}
    assert [t.reason for t in run.tests if t.id.endswith("skips")] == ["no server, said so"]
    assert (run.name, run.seconds > 0) == ("test", True)


def test_a_promise_is_proven_by_what_passed_and_what_is_there(evidence: Any) -> None:
    verdict = judged(
        evidence,
        delivered=("config.py: Run.url", "benchmarks", "README.md: Two commands", "Makefile: demo"),
        tests=(f"{FILE}::test_passes",),
        figures=("bench_02 bulk: fast / *",),
        at_most_s={"test": 600},
    )
    assert (verdict.word, verdict.gaps, verdict.faults) == ("proven", [], [])
    assert len(verdict.tests) == 3
    assert all(size for _, size in verdict.places)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"tests": (f"{FILE}::test_passed",)}, f"none matches `{FILE}::test_passed`"),
        ({"tests": (f"{FILE}::test_passes", "tests/x.py::*")}, "matches `tests/x.py::*`"),
        ({"tests": (f"{FILE}::test_skips",)}, f"not run, or skipped: `{FILE}::test_skips`"),
        ({"tests": (f"{FILE}::test_skips*",)}, f"not run, or skipped: `{FILE}::test_skips`"),
        ({"tests": (f"{FILE}::*once",)}, f"not run, or skipped: `{FILE}::test_skips_once`"),
        ({"tests": ()}, "no test is named for it"),
        ({"delivered": ("docs/nothing.md",)}, "`docs/nothing.md` is not there"),
        ({"delivered": ("config.py: Run.nothing",)}, "`config.py: Run.nothing` is not there"),
        ({"delivered": ("README.md: Nothing",)}, "`README.md: Nothing` is not there"),
        ({"delivered": ("Makefile: nothing",)}, "`Makefile: nothing` is not there"),
        ({"figures": ("bench_04 *",)}, "no recorded line matches `bench_04 *`"),
        ({"at_most_s": {"test-slow": 9}}, "`make test-slow` left no outcome"),
    ],
)
def test_a_promise_with_a_gap_is_not_proven(evidence: Any, said: Any, told: str) -> None:
    verdict = judged(evidence, **said)
    assert verdict.word == "NOT PROVEN"
    assert [gap for gap in verdict.gaps if told in gap] == verdict.gaps != []


def test_a_promise_of_how_long_a_run_takes_needs_no_other_test(evidence: Any) -> None:
    assert judged(evidence, tests=(), at_most_s={"test": 600}).word == "proven"


def test_a_promise_is_not_proven_by_a_part_of_its_tests(evidence: Any) -> None:
    ran, never, *_ = sorted(WRITTEN)
    evidence.runs.append(completion.TestRun("one", "", 1.0, (completion.Test(ran, "passed"),)))
    assert judged(evidence, tests=(ran,)).word == "proven"
    verdict = judged(evidence, tests=(f"{ran.partition('::')[0]}::*",))
    assert verdict.word == "NOT PROVEN"
    (gap,) = verdict.gaps
    assert gap.startswith(f"tests: not run, or skipped: `{never}`")
    assert f"`{ran}`" not in gap


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"tests": (f"{FILE}::test_*s",)}, f"`{FILE}::test_fails` failed"),
        ({"tests": (f"{FILE}::test_breaks",)}, f"`{FILE}::test_breaks` error"),
        ({"figures": ("bench_02 limit*",)}, "goal ≤ 3× missed: bench_02 limit: slow / fast"),
        ({"at_most_s": {"test": 0}}, "`make test` took"),
    ],
)
def test_a_promise_that_was_tried_and_failed_is_not_met(
    evidence: Any, said: Any, told: str
) -> None:
    verdict = judged(evidence, **said)
    assert verdict.word == "NOT MET"
    assert any(told in fault for fault in verdict.faults)


def test_a_promise_is_read_and_its_words_are_known(tmp_path: Path) -> None:
    path = tmp_path / "promises.toml"
    text = '[[part]]\ntitle = "P"\n[[part.promise]]\nasked = "It works."\n'
    path.write_text(text + 'tests = ["a::b"]\nat_most_s = { test = 3 }', "utf-8")
    (part,) = completion.read_promises(path)
    (promise,) = part.promises
    assert (part.title, promise.tests, promise.at_most_s) == ("P", ("a::b",), {"test": 3})
    path.write_text(text + 'test = ["a::b"]', "utf-8")
    with pytest.raises(TypeError, match="'test'"):
        completion.read_promises(path)


def test_the_report_tells_what_is_not_done_and_measures_what_is_there(evidence: Any) -> None:
    ran, never, *_ = sorted(WRITTEN)
    evidence.runs.append(completion.TestRun("one", "", 1.0, (completion.Test(ran, "passed"),)))
    promise = completion.Promise("It works.", ("README.md",), (f"{FILE}::test_passes",))
    gap = completion.Promise("It flies.", ("README.md",), (f"{FILE}::test_flies",))
    text = completion.report([completion.Part("P", (promise, gap))], evidence)
    assert ["1", "P", "1", "1", "0"] in rows(text)
    assert "**1.1 proven.** It works.\n" in text
    assert f"- tests: `{FILE}`: 3 passed: `test_passes` (3 passed)\n" in text
    missing = text.partition("## What is not done\n")[2].partition("## What was run")[0]
    reason = f"tests: none matches `{FILE}::test_flies`"
    assert f"- NOT PROVEN: It flies. {reason}" in missing
    assert "- Goal ≤ 3× missed: bench_02 limit: slow / fast: 4.0× time (3.0–5.0)." in missing
    assert f"- `{FILE}::test_fails` failed." in missing
    assert f"- Skipped, 1×: `{FILE}::test_skips`: no server, said so." in missing
    assert f"Written and not run: `{never}`, " in missing
    assert f", and {len(WRITTEN) - 21} more." in missing
    assert "Not measured: `bench_04_rabbitmq`." in missing
    assert "Not measured: `bench_02" not in missing.replace("`bench_02_mongodb`", "")
    for script in ROOT.glob("0?_*.py"):
        source = script.read_text("utf-8")
        (row,) = [row for row in rows(text) if row[0] == f"`{script.name}`"]
        assert row[1:3] == [f"{len(source.splitlines()):,}", f"{script.stat().st_size:,}"]
    (run,) = [row for row in rows(text) if row[0] == "make test"]
    assert run[3:] == ["4", "2", "1", "3"]


def test_what_a_promise_names_is_told_with_it_and_not_again(evidence: Any) -> None:
    promise = completion.Promise("It flies.", (), (f"{FILE}::test_fails",), ("bench_02 limit*",))
    told = completion.not_done({promise: completion.judged(promise, evidence)}, evidence)
    for fault in f"`{FILE}::test_fails` failed", "goal ≤ 3× missed: bench_02 limit: slow / fast":
        assert told.lower().count(fault) == 1, fault


def test_blocks_are_counted_by_language_and_remark() -> None:
    python = "```python\nx = '```sql'\n```\n"
    text = (
        f"<!-- from a.py: x -->\n{python}\n{python}\n<!-- not run: no Atlas -->\n```sql\n1\n```\n"
        "```text\n1\n```\n<!-- output of: b -->\n```text\n2\n```\n```powershell\nb\n```\n"
    )
    assert completion.blocks(text) == [
        ("powershell", {"compared": 1}),
        ("python", {"from": 1, "run": 1}),
        ("sql", {"not run": 1}),
        ("text", {"output of": 2}),
    ]


def test_a_script_that_was_changed_after_its_benchmark_is_told(evidence: Any) -> None:
    said = "- The script was changed after `bench_02_small` had measured it.\n"
    assert said not in completion.report([], evidence)
    evidence.records["bench_02_small"]["script_sha256"] = "0" * 64
    assert said in completion.report([], evidence)


def patterns() -> Iterator[object]:
    for part in completion.read_promises():
        for promise in part.promises:
            for pattern in promise.tests:
                yield pytest.param(pattern, id=f"{promise.asked[:30]}: {pattern}")


@pytest.mark.parametrize("pattern", list(patterns()))
def test_each_promise_names_tests_that_are_written(pattern: str) -> None:
    assert fnmatch.filter(WRITTEN, pattern), f"tests/promises.toml: no test is called {pattern}"


def test_each_promise_names_what_is_there() -> None:
    promises = [promise for part in completion.read_promises() for promise in part.promises]
    missing = {
        place for p in promises for place in p.delivered if completion.size_of(place) is None
    }
    assert missing <= {"docs/BENCHMARKS.md"}, missing  # that one `make bench` writes


def test_each_promise_names_what_benchmarks_measure() -> None:
    """Of the benchmarks that have a record."""
    evidence = completion.read_evidence()
    names = [name for name, _ in evidence.figures]
    for part in completion.read_promises():
        for pattern in (pattern for promise in part.promises for pattern in promise.figures):
            if any(name.startswith(pattern[:8]) for name in evidence.records):
                assert fnmatch.filter(names, pattern), pattern


@pytest.mark.skipif(not completion.PAGE.exists(), reason="nobody has run make report yet")
def test_the_committed_report_has_each_promise_in_order() -> None:
    told = re.findall(
        r"^\*\*\S+ [\w ]+\.\*\* (.+)$", completion.PAGE.read_text("utf-8"), re.MULTILINE
    )
    asked = [p.asked for part in completion.read_promises() for p in part.promises]
    assert told == [completion.escaped(text) for text in asked], "run make report"
