"""docs/COMPLETION_REPORT.md: each promise, what was delivered, and what proves it.

Run:
  make test test-slow    # leave the outcome of each test in .outcomes/
  make bench             # leaves the figures in benchmarks/records/
  make report            # this module, over both

The promises are promises.toml, whose head says how one is written. What is typed there is what was
asked, and where to look; every count, size, version, outcome and figure is measured here. A promise
is *proven* where all that it names is there and every test that it names passed. Where a pattern
finds no test, one was not run or skipped, or a file, a name or a figure is missing, it is NOT
PROVEN.
"""

from __future__ import annotations

import ast
import importlib
import json
import platform
import re
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from documents import BLOCK

ROOT = Path(__file__).resolve().parent.parent
PROMISES = ROOT / "tests" / "promises.toml"
OUTCOMES = ROOT / ".outcomes"
RECORDS = ROOT / "benchmarks" / "records"
PAGE = ROOT / "docs" / "COMPLETION_REPORT.md"
RUNS = ("test", "test-slow")  # the targets of make that leave OUTCOMES/*.xml
WORST_FIRST = ("error", "failed", "skipped", "passed")

sys.path.append(str(ROOT / "benchmarks"))
harness = importlib.import_module("harness")

# ── What was promised ───────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)  # each is itself, whatever it says
class Promise:
    asked: str
    delivered: tuple[str, ...] = ()  # a path, or a path and what is in it: "config.py: redact"
    tests: tuple[str, ...] = ()  # patterns of node ids, without parameters
    figures: tuple[str, ...] = ()  # patterns of "bench_0N measure: ours / peer"
    at_most_s: Mapping[str, float] = field(default_factory=dict)  # a run of RUNS → seconds


@dataclass(frozen=True, eq=False)
class Part:
    title: str
    promises: tuple[Promise, ...]


def read_promises(path: Path = PROMISES) -> list[Part]:
    """Raises TypeError where a promise has a word that means nothing here."""

    def promise(given: Mapping[str, Any]) -> Promise:
        lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        return Promise(**{**given, **lists})

    parts = tomllib.loads(path.read_text("utf-8"))["part"]
    return [Part(part["title"], tuple(map(promise, part["promise"]))) for part in parts]


# ── What the tests said ─────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Test:
    id: str  # tests/01/test_01_cli.py::test_name, without parameters
    outcome: str
    reason: str = ""  # of a skip

    __test__ = False  # for pytest, which would collect it


@dataclass(frozen=True)
class TestRun:
    name: str
    began: str
    seconds: float
    tests: tuple[Test, ...]

    __test__ = False


def read_run(path: Path) -> TestRun:
    """One JUnit XML, as pytest writes it."""
    suite = next(ElementTree.parse(path).iter("testsuite"))  # noqa: S314
    found: dict[str, tuple[Test, ...]] = defaultdict(tuple)
    for case in suite.iter("testcase"):  # one that fails at its end comes twice
        found[f"{case.get('classname')}[{case.get('name')}]"] += (read_test(case),)
    worst = (min(tests, key=lambda t: WORST_FIRST.index(t.outcome)) for tests in found.values())
    began = datetime.fromisoformat(suite.attrib["timestamp"]).astimezone(UTC)
    return TestRun(path.stem, f"{began:%Y-%m-%d %H:%M} UTC", float(suite.attrib["time"]), (*worst,))


def read_test(case: ElementTree.Element) -> Test:
    file = case.attrib["classname"].replace(".", "/")
    test_id = f"{file}.py::{case.attrib['name'].partition('[')[0]}"
    if not file:  # a file that could not be imported
        test_id = case.attrib["name"].replace(".", "/") + ".py"
    for tag, outcome in ("error", "error"), ("failure", "failed"), ("skipped", "skipped"):
        if (said := case.find(tag)) is not None:
            return Test(test_id, outcome, said.get("message", ""))
    return Test(test_id, "passed")


@cache
def written_tests() -> frozenset[str]:
    """The ids of all that the files hold, run or not."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("test_"):
                    found.add(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return frozenset(found)


# ── What is there ───────────────────────────────────────────────────────────────────


def size_of(place: str) -> str | None:
    """How large a file, a folder, or a name in a file is; None where it is not there."""
    file, _, name = place.partition(": ")
    path = ROOT / file
    if not path.exists():
        return None
    if path.is_dir():
        files = [found for found in path.rglob("*.*") if "__pycache__" not in found.parts]
        return f"{sum(map(Path.is_file, files)):,} files"
    lines = path.read_text("utf-8").splitlines()
    if not name:
        return f"{len(lines):,} lines, {path.stat().st_size:,} bytes"
    if path.suffix == ".py":
        return python_size(path, name)
    # A chapter of a page, or a target of the Makefile.
    start = rf"#+ .*{re.escape(name)}" if path.suffix == ".md" else rf"{re.escape(name)}:"
    return "there" if any(re.match(start, line) for line in lines) else None


def python_size(path: Path, name: str) -> str | None:
    scope: list[ast.stmt] = ast.parse(path.read_text("utf-8")).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((node for node in scope if getattr(node, "name", None) == part), None)
        if node is None:
            return None
        scope = getattr(node, "body", [])
    assert node is not None
    assert node.end_lineno is not None
    return f"{node.end_lineno - node.lineno + 1:,} lines"


# ── The evidence ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Evidence:
    """All that can be known; `figures` are the lines of the benchmarks, by their names."""

    runs: Sequence[TestRun]
    records: Mapping[str, Mapping[str, Any]]

    @cached_property
    def tests(self) -> list[Test]:
        return [test for run in self.runs for test in run.tests]

    @cached_property
    def figures(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [
            (f"{name[:8]} {line['measure']}: {line['ours_name']} / {line['other_name']}", line)
            for name, record in self.records.items()
            for line in record["lines"]
        ]


@dataclass(frozen=True)
class Verdict:
    """`gaps` are why it is not proven, `faults` what was tried and did not hold."""

    places: list[tuple[str, str | None]]
    tests: list[Test]
    figures: list[tuple[str, Mapping[str, Any]]]
    gaps: list[str]
    faults: list[str]

    @property
    def word(self) -> str:
        return "NOT MET" if self.faults else "NOT PROVEN" if self.gaps else "proven"


def judged(promise: Promise, evidence: Evidence) -> Verdict:
    places = [(place, size_of(place)) for place in promise.delivered]
    gaps = [f"`{place}` is not there" for place, size in places if size is None]
    faults = []
    tests: dict[int, Test] = {}
    for pattern in promise.tests:
        found = {id(t): t for t in evidence.tests if fnmatchcase(t.id, pattern)}
        named = {test.id for test in found.values()}
        ran = named - {test.id for test in found.values() if test.outcome == "skipped"}
        named |= {test_id for test_id in written_tests() if fnmatchcase(test_id, pattern)}
        if not named:
            gaps.append(f"tests: none matches `{pattern}`")
        if named - ran:
            listed = ", ".join(f"`{test_id}`" for test_id in sorted(named - ran))
            gaps.append(f"tests: not run, or skipped: {listed}")
        tests |= found
    if not (promise.tests or promise.at_most_s):  # such a run is a test
        gaps.append("no test is named for it")
    for test in tests.values():
        if test.outcome in ("failed", "error"):
            faults.append(f"`{test.id}` {test.outcome}")
    figures = []
    for pattern in promise.figures:
        lines = [(name, line) for name, line in evidence.figures if fnmatchcase(name, pattern)]
        figures += lines
        if not lines:
            gaps.append(f"benchmarks: no recorded line matches `{pattern}`")
        faults += [f"goal {line['goal']} missed: {name}" for name, line in lines if is_missed(line)]
    for run, limit in promise.at_most_s.items():
        took = [found.seconds for found in evidence.runs if found.name == run]
        if not took:
            gaps.append(f"`make {run}` left no outcome")
        faults += [f"`make {run}` took {s:,.0f} s, not {limit:,.0f}" for s in took if s > limit]
    return Verdict(places, list(tests.values()), figures, gaps, list(dict.fromkeys(faults)))


def is_missed(line: Mapping[str, Any]) -> bool:
    return line["met"] is False


# ── The report ──────────────────────────────────────────────────────────────────────

HEAD = """\
# Completion report

<!-- written by `make report`; an edit here is lost -->

What was asked, what was delivered, what proves it, and what is not done. The promises are data, in
`tests/promises.toml`. All counts, sizes, versions, outcomes and figures were measured when this was
written. A promise is *proven* where every test that it names passed and nothing is missing,
*NOT PROVEN* where there is a gap, *NOT MET* where a test failed or a goal was missed.
"""


def report(parts: Sequence[Part], evidence: Evidence) -> str:
    verdicts = {p: judged(p, evidence) for part in parts for p in part.promises}
    chapters = [
        HEAD,
        summary(parts, verdicts),
        "## What is not done\n\n" + not_done(verdicts, evidence),
        "## What was run\n\n" + what_was_run(evidence),
        "## What is there\n\n" + what_is_there(evidence),
    ]
    for number, part in enumerate(parts, 1):
        chapters.append(f"## {number}. {part.title}\n")
        chapters += [
            section(f"{number}.{nth}", promise, verdicts[promise])
            for nth, promise in enumerate(part.promises, 1)
        ]
    return "\n".join(chapters)


def escaped(text: object) -> str:
    """One line that may hold `code`, and no other Markdown."""
    parts = re.split("(`[^`]*`)", " ".join(str(text).split()))
    return "".join(p if p[:1] == "`" else re.sub(r"([\\|*<\[\]])", r"\\\1", p) for p in parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([escaped(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bullets(items: Iterable[str]) -> str:
    return "".join(f"- {escaped(item)}\n" for item in items)


def summary(parts: Sequence[Part], verdicts: Mapping[Promise, Verdict]) -> str:
    words = ("proven", "NOT PROVEN", "NOT MET")

    def counted(promises: Iterable[Promise]) -> list[int]:
        seen = Counter(verdicts[promise].word for promise in promises)
        return [seen[word] for word in words]

    rows = [(n, part.title, *counted(part.promises)) for n, part in enumerate(parts, 1)]
    return table(["part", "", *words], [*rows, ("", "all", *counted(verdicts))])


def not_done(verdicts: Mapping[Promise, Verdict], evidence: Evidence) -> str:
    """Whatever did not hold, promised or not; one line each."""
    lines = [
        f"{verdict.word}: {promise.asked} {'; '.join([*verdict.faults, *verdict.gaps])}."
        for promise, verdict in verdicts.items()
        if verdict.word != "proven"
    ]
    told = {fault for verdict in verdicts.values() for fault in verdict.faults}
    for name, line in evidence.figures:
        if is_missed(line) and f"goal {line['goal']} missed: {name}" not in told:
            lines.append(f"Goal {line['goal']} missed: {name}: {line['ratio']}.")
    for test in evidence.tests:
        if test.outcome in ("failed", "error") and f"`{test.id}` {test.outcome}" not in told:
            lines.append(f"`{test.id}` {test.outcome}.")
    skips = Counter((t.id, t.reason) for t in evidence.tests if t.outcome == "skipped")
    for (test_id, reason), count in skips.items():
        lines.append(f"Skipped, {count}×: `{test_id}`: {reason}.")
    never = sorted(written_tests() - {test.id for test in evidence.tests})
    if never:
        shown = ", ".join(f"`{test_id}`" for test_id in never[:20])
        more = f", and {len(never) - 20} more" if len(never) > 20 else ""
        lines.append(f"Written and not run: {shown}{more}.")
    for name, record in evidence.records.items():
        if record["script_sha256"] != harness.script_digest(name):
            lines.append(f"The script was changed after `{name}` had measured it.")
    for name in sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")):
        if name not in evidence.records:
            lines.append(f"Not measured: `{name}`.")
    return bullets(lines) or "Nothing.\n"


def what_was_run(evidence: Evidence) -> str:
    rows = []
    for run in evidence.runs:
        seen = Counter(test.outcome for test in run.tests)
        counts = [seen[outcome] for outcome in reversed(WORST_FIRST)]
        rows.append((f"make {run.name}", run.began, f"{run.seconds:,.0f} s", *counts))
    parts = [table(["tests", "began", "took", *reversed(WORST_FIRST)], rows)]
    absent = [name for name in RUNS if name not in {run.name for run in evidence.runs}]
    parts += [f"\n`make {name}` left no outcome.\n" for name in absent]
    rows = [
        (
            name,
            record["started_at"].replace("T", " ").replace("Z", " UTC"),
            f"{record['elapsed_s']} s",
            f"{sum(line['met'] is True for line in record['lines'])}"
            f" of {sum(line['met'] is not None for line in record['lines'])}",
            record["facts"].get("server", "-"),
        )
        for name, record in evidence.records.items()
    ]
    parts.append("\n" + table(["benchmark", "began", "took", "goals met", "server"], rows))
    parts.append("\nAll lines are in [BENCHMARKS.md](BENCHMARKS.md).\n" if rows else "")
    return "".join(parts)


def what_is_there(evidence: Evidence) -> str:
    rows = []
    for script in sorted(ROOT.glob("0?_*.py")):
        number = script.name[:2]
        own = [t for t in evidence.tests if t.id.startswith(f"tests/{number}/")]
        test_files = list((ROOT / "tests" / number).glob("*.py"))
        guides = list((ROOT / "docs").glob(f"{number}-*.md"))
        rows.append(
            (
                f"`{script.name}`",
                lines_of([script]),
                f"{script.stat().st_size:,}",
                demos(script),
                lines_of(guides),
                f"{sum(t.outcome == 'passed' for t in own):,}",
                lines_of(test_files),
                sum(1 for _ in (ROOT / "exercises").glob(f"{number}?_*.py")),
            )
        )
    columns = "script lines bytes demos guide tests,passed test,lines exercises".split()
    scripts = table([column.replace(",", " ") for column in columns], rows)
    pages = [
        (f"`{path.relative_to(ROOT)}`", lines_of([path]), f"{path.stat().st_size:,}")
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.*"))]
        if path != PAGE  # its size would depend on itself
    ]
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    counts = blocks("\n".join(path.read_text("utf-8") for path in paths))
    fences = table(
        ["blocks of", "all", "quoted", "recorded", "run", "compared", "not run, and says why"],
        [(language, seen.total(), *map(seen.__getitem__, USES)) for language, seen in counts],
    )
    versions = ", ".join(f"{name} {number}" for name, number in installed())
    used = f"Counted on {datetime.now(UTC):%Y-%m-%d}, on {platform.system()} {platform.machine()}"
    used += f", Python {platform.python_version()}"
    return f"{scripts}\n{table(['page', 'lines', 'bytes'], pages)}\n{fences}\n{used}, {versions}.\n"


USES = ("from", "output of", "run", "compared", "not run")
# Of a block without a comment; "run" where nothing is said.
USE = {"text": "output of", "powershell": "compared"}  # the latter: with the commands of sh


def blocks(text: str) -> list[tuple[str, Counter[str]]]:
    """Of each language, how many blocks of each use."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for block in BLOCK.finditer(text):
        use = block["kind"] or USE.get(block["language"], "run")
        seen[block["language"]][use] += 1
    return sorted(seen.items())


def lines_of(paths: Iterable[Path]) -> str:
    return f"{sum(len(path.read_text('utf-8').splitlines()) for path in paths):,}"


def demos(script: Path) -> int:
    return len(importlib.import_module(script.stem).DEMOS)


def installed() -> Iterator[tuple[str, str]]:
    """The requirements of the scripts, in the versions that this interpreter has."""
    text = (ROOT / "requirements.txt").read_text("utf-8")
    for name in re.findall(r"^([\w.-]+)", text, flags=re.MULTILINE):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "missing"


def section(number: str, promise: Promise, verdict: Verdict) -> str:
    lines = [f"delivered: {place_text(place, size)}" for place, size in verdict.places]
    lines += tests_text(promise, verdict.tests)
    for name, line in verdict.figures:
        outcome = (
            "" if line["met"] is None else f"; {line['goal']}: {harness.OUTCOMES[line['met']]}"
        )
        lines.append(
            f"measured: {name}: {line['ratio'] if line['ratios'] else line['ours']}{outcome}"
        )
    lines += [f"NOT MET: {fault}" for fault in verdict.faults]
    lines += [f"NOT PROVEN: {gap}" for gap in verdict.gaps]
    return f"**{number} {verdict.word}.** {escaped(promise.asked)}\n\n{bullets(lines)}"


def place_text(place: str, size: str | None) -> str:
    file, _, name = place.partition(": ")
    return f"`{file}`{f', `{name}`' if name else ''} ({size or 'missing'})"


def tests_text(promise: Promise, tests: Sequence[Test]) -> Iterator[str]:
    """A line a file: how its tests ended, and their names unless the whole file is meant."""
    by_file: dict[str, list[Test]] = defaultdict(list)
    for test in tests:
        by_file[test.id.partition("::")[0]].append(test)
    for file, mine in by_file.items():
        text = f"tests: `{file}`: {ends(mine)}"
        if f"{file}::*" not in promise.tests:
            names: dict[str, list[Test]] = defaultdict(list)
            for test in mine:
                names[test.id.partition("::")[2]].append(test)
            text += ": " + ", ".join(
                f"`{name}`" + (f" ({ends(of)})" if len(of) > 1 or of[0].outcome != "passed" else "")
                for name, of in names.items()
            )
        yield text


def ends(tests: Sequence[Test]) -> str:
    seen = Counter(test.outcome for test in tests)
    return ", ".join(f"{seen[word]} {word}" for word in reversed(WORST_FIRST) if seen[word])


# ── Main ────────────────────────────────────────────────────────────────────────────


def read_evidence(outcomes: Path = OUTCOMES, records: Path = RECORDS) -> Evidence:
    runs = [read_run(path) for name in RUNS if (path := outcomes / f"{name}.xml").exists()]
    found = (json.loads(path.read_text("utf-8")) for path in sorted(records.glob("bench_*.json")))
    return Evidence(runs, {record["benchmark"]: record for record in found})


def main() -> int:
    parts, evidence = read_promises(), read_evidence()
    PAGE.write_text(report(parts, evidence), encoding="utf-8")
    words = Counter(judged(p, evidence).word for part in parts for p in part.promises)
    counts = ", ".join(f"{count} {word}" for word, count in words.items())
    print(f"wrote {PAGE.relative_to(ROOT)}: {counts}")
    return 0


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    raise SystemExit(main())
