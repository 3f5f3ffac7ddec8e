"""Exercises: failures of real systems, to be mended. Start anywhere.

    .venv/bin/python exercises/check.py               what is done, what is open, and the next one
    .venv/bin/python exercises/check.py 03b           one of them; 03 for the three of script 03
    .venv/bin/python exercises/check.py 03b --hint    where to look; 2: what is wrong; 3: the mend
    .venv/bin/python exercises/check.py --solutions   the model solutions instead

Each is a file in exercises/ that runs, and does the wrong thing: its docstring says what was seen
in production, what to change, and how it is judged. Mend the file, and ask again. No server is
needed. On Windows it is .venv\\Scripts\\python.

The exit code is 0 where all that was asked for passes, 1 where something fails, 2 for a name that
does not exist, or a Python without the packages.
"""

import argparse
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

HOME = Path(__file__).resolve().parent
LIMIT_S = 30.0  # a check takes less than 5; a busy machine is slower
DUMP_S = 1.0  # before the limit the threads are shown
AT_ONCE = 2  # judged together: each is a process that uses a core
SHOWN = 2_000  # characters of what an exercise prints


@dataclass(frozen=True)
class Exercise:
    number: str
    title: str

    @property
    def stem(self) -> str:
        return f"{self.number}_{self.title}"

    @property
    def file(self) -> Path:
        return HOME / f"{self.stem}.py"

    @property
    def solution(self) -> Path:
        return HOME / "solutions" / f"{self.stem}.py"

    @property
    def command(self) -> str:
        """That judges it, as one types it here: with the Python that runs now."""
        return f"{typed(sys.executable)} {typed(HOME / 'check.py')} {self.number}"

    def hints(self) -> list[str]:
        """Where to look; what is wrong; how to mend it."""
        text = (HOME / "hints" / f"{self.number}.md").read_text(encoding="utf-8")
        return [layer.strip() for layer in text.split("\n---\n")]


def typed(file: str | Path) -> str:
    """Its path from the working directory, where that is the shorter one."""
    try:
        path = min(os.path.relpath(file), str(file), key=len)
    except ValueError:  # on another drive of Windows
        path = str(file)
    return f'"{path}"' if " " in path else path


def exercises() -> list[Exercise]:
    """Of the directory, in the order of their numbers."""
    stems = sorted(file.stem for file in HOME.glob("[0-9][0-9][a-z]_*.py"))
    return [Exercise(*stem.split("_", 1)) for stem in stems]


@dataclass(frozen=True)
class Judged:
    wrong: str  # nothing where it passes
    printed: str  # by the exercise


def judge(number: str, file: Path, limit_s: float = LIMIT_S) -> Judged:
    """`file` by the check of that number, in a process of its own: it may hang, or end Python."""
    with tempfile.TemporaryDirectory(prefix="exercise-") as home:
        told = Path(home) / "verdict"
        paths = [str(HOME), str(HOME.parent), os.environ.get("PYTHONPATH", "")]
        # No bytecode is left: of a file changed twice in a second it would be the old one.
        command = [sys.executable, "-B", "-m", "checks", number, str(file), str(told)]
        try:
            ended = subprocess.run(
                [*command, str(time.monotonic() + limit_s - DUMP_S)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                    "PYTHONUTF8": "1",
                },
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Judged(hanging(error, file, limit_s), text_of(error.stdout))
        if told.exists():
            return Judged(told.read_text(encoding="utf-8"), ended.stdout)
        wrong = f"it ended Python, with exit code {ended.returncode}\n{ended.stderr}".rstrip()
        return Judged(wrong, ended.stdout)


def hanging(error: subprocess.TimeoutExpired, file: Path, limit_s: float) -> str:
    """With the lines of `file` at which a thread was, the innermost first."""
    lines = [line.strip() for line in text_of(error.stderr).splitlines() if file.name in line]
    where = "".join(f"\n{line}" for line in dict.fromkeys(lines))
    return f"not ended after {limit_s:g} s: an endless loop, or a wait for what never comes{where}"


def text_of(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def progress(chosen: Sequence[Exercise], solutions: bool, limit_s: float) -> int:
    """One line an exercise, and the next one."""

    def judged(exercise: Exercise) -> Judged:
        file = exercise.solution if solutions else exercise.file
        return judge(exercise.number, file, limit_s)

    still_open = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for exercise, found in zip(chosen, pool.map(judged, chosen), strict=True):
            print(f"{exercise.number}  {exercise.title:<20}  {'open' if found.wrong else 'done'}")
            if found.wrong:
                still_open.append(exercise)
            if found.wrong and solutions:
                print(indented(found.wrong))
    print(f"{len(chosen) - len(still_open)} of {len(chosen)} done")
    if still_open and not solutions:
        print(f"next: {typed(still_open[0].file)}, then {still_open[0].command}")
    return 1 if still_open else 0


def one(exercise: Exercise, file: Path, limit_s: float) -> int:
    """What is wrong with it, if anything, and what it has printed."""
    found = judge(exercise.number, file, limit_s)
    if found.printed:
        cut = f", the last {SHOWN:,} characters" if len(found.printed) > SHOWN else ""
        print(f"it prints{cut}:\n{indented(found.printed[-SHOWN:])}")
    print(f"{exercise.number}  {exercise.title}: {'open' if found.wrong else 'done'}")
    if not found.wrong:
        return 0
    print(indented(found.wrong))
    print(f"hint: {exercise.command} --hint")
    return 1


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def hint(exercise: Exercise, layer: int) -> int:
    hints = exercise.hints()
    print(hints[layer - 1])
    if layer < len(hints):
        print(f"\nmore: {exercise.command} --hint {layer + 1}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [NAME ...] [--hint [LAYER]] [--solutions] [--limit SECONDS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="03b, its file, or 03 for three of them")  # fmt: skip
    parser.add_argument("--hint", nargs="?", type=int, const=1, choices=(1, 2, 3), metavar="LAYER",
                        help="1 (where to look), 2, or 3 (how to mend it)")  # fmt: skip
    parser.add_argument("--solutions", action="store_true", help="judge the model solutions")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS",
                        help=f"for one exercise (default: {LIMIT_S:g})")  # fmt: skip
    options = parser.parse_args(argv)
    if importlib.util.find_spec("sqlalchemy") is None:  # then nothing would ever be done
        where = "that of .venv has them, once it is made: README.md"
        parser.error(f"{sys.executable} lacks the packages; {where}")
    for name in options.names:
        if Path(name).is_file() and Path(name).resolve().parent != HOME:
            parser.error(f"{name} is not judged: only the files in {HOME} are")
    every = exercises()
    asked = [Path(name).stem for name in options.names]
    for name in asked:
        if not any(exercise.stem.startswith(name) for exercise in every):
            known = " ".join(exercise.number for exercise in every)
            parser.error(f"no exercise {name}; there are {known}")
    names = tuple(asked) or ""  # with which every stem begins
    chosen = [exercise for exercise in every if exercise.stem.startswith(names)]
    if options.hint and len(chosen) != 1:
        parser.error(f"--hint is of one exercise: {every[0].command} --hint")
    if options.hint:
        return hint(chosen[0], options.hint)
    if len(chosen) == 1:
        file = chosen[0].solution if options.solutions else chosen[0].file
        return one(chosen[0], file, options.limit)
    return progress(chosen, options.solutions, options.limit)


if __name__ == "__main__":
    # An arrow is not in each encoding that a redirected output has, on Windows.
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="replace")
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell counts it
