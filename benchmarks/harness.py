"""What the benchmarks share: interleaved rounds, ratios, one table, a record, and the exit code.

A benchmark is a file `bench_*.py` whose `main` hands `run_bench` a function that measures. Each
time is taken in rounds: every way once, then every way again, so that a busy moment of the machine
hits all of them. A ratio is formed inside each round; reported are its median and its range.

Where BENCH_RECORDS names a directory, the benchmark also writes its record there, as JSON, from
which report.py makes docs/BENCHMARKS.md.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts and config are in the folder above

import config  # noqa: E402

ROUNDS = 5  # the fewest whose median survives two disturbed rounds
WARM_UPS = 1  # fills the server's and SQLAlchemy's caches; not counted

RECORDS = "BENCH_RECORDS"  # the variable that names the directory of the records

Samples = list[float]  # seconds, one for each round
Counts = Mapping[str, int]  # of what happened in a round
NONE: Counts = MappingProxyType({})
OUTCOMES = {True: "met", False: "NOT MET", None: "-"}

# ── Measuring ───────────────────────────────────────────────────────────────────────


def measure(
    ways: Mapping[str, Callable[[], Any]],
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[str, Any], object] = lambda name, answer: None,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """The seconds that each way took in each round, after warm-up, the rounds interleaved.

    `before()` runs ahead of every way and `after(name, answer)` behind it, both untimed: to set the
    same scene for all, and to raise where an answer is wrong. With `time.process_time` as `clock`
    the seconds are those of the CPU.
    """
    samples: dict[str, Samples] = {name: [] for name in ways}
    gc.collect()
    gc.freeze()  # the benchmark's own data: no collection walks through them meanwhile
    for number in range(WARM_UPS + rounds):
        for name, run in ways.items():
            before()
            gc.collect()  # so that no way pays for the garbage of the one before
            started = clock()
            answer = run()
            elapsed_s = clock() - started
            after(name, answer)
            if number >= WARM_UPS:
                samples[name].append(elapsed_s)
    gc.unfreeze()
    return samples


def check(name: str, answer: object, expected: object) -> None:
    """Correct first: raises ValueError for a way that answers something else."""
    if answer != expected:
        raise ValueError(f"{name}: expected {expected!r:.300}, got {answer!r:.300}")


# ── Reporting ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its name, its seconds in each round, the items done in them."""

    name: str
    samples: Samples
    items: int = 1
    unit: str = ""

    def __str__(self) -> str:
        median_s = statistics.median(self.samples)
        if self.unit:
            return f"{self.name} {self.items / median_s:,.0f} {self.unit}/s"
        return f"{self.name} {median_s * 1e3:,.{1 if median_s < 0.1 else 0}f} ms"


@dataclass(frozen=True)
class Line:
    """A line of the table. `ratios` has one entry a round; `met` is None without a goal."""

    measure: str
    ours: Side
    other: Side
    ratios: Samples
    word: str
    goal: str = "-"
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
        ratio = f"{times(middle)}× {self.word} ({times(low)}–{times(high)})"
        return self.measure, str(self.ours), str(self.other), ratio, self.goal, OUTCOMES[self.met]

    def record(self) -> dict[str, object]:
        names = {"ours_name": self.ours.name, "other_name": self.other.name}
        ratios = [float(f"{ratio:.6g}") for ratio in self.ratios]
        return {**_cells_recorded(self), **names, "ratios": ratios, "word": self.word}


def times(ratio: float) -> str:
    """A ratio to three digits or so."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


@dataclass(frozen=True)
class Tally:
    """One side of a comparison of what happened: its name, and what each round counted."""

    name: str
    rounds: Sequence[Counts]

    def __str__(self) -> str:
        labels = dict.fromkeys(label for counts in self.rounds for label in counts)
        return f"{self.name}: " + ", ".join(f"{label} {self._range(label)}" for label in labels)

    def _range(self, label: str) -> str:
        low, high = min(self.of(label)), max(self.of(label))
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"

    def of(self, label: str) -> list[int]:
        return [counts.get(label, 0) for counts in self.rounds]


@dataclass(frozen=True)
class CountLine:
    """A line of counts instead of seconds; a range stands for rounds that differ."""

    measure: str
    ours: Tally
    other: Tally
    goal: str = "-"
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        return self.measure, str(self.ours), str(self.other), "-", self.goal, OUTCOMES[self.met]

    def record(self) -> dict[str, object]:
        names = {"ours_name": self.ours.name, "other_name": self.other.name}
        return {**_cells_recorded(self), **names, "ratios": [], "word": ""}


def _cells_recorded(line: Line | CountLine) -> dict[str, object]:
    columns = ("measure", "ours", "other", "ratio", "goal")
    return {**dict(zip(columns, line.cells(), strict=False)), "met": line.met}


def counted(
    measure: str, ours: Tally, other: Tally, exactly: Counts = NONE, at_most: Counts = NONE
) -> CountLine:
    """Ours beside a peer. The goal holds in every round: these counts, and no more than those."""
    if not exactly and not at_most:
        return CountLine(measure, ours, other)
    goals = [f"{label} {n:,}" for label, n in exactly.items()]
    goals += [f"{label} ≤ {n:,}" for label, n in at_most.items()]
    met = all(n == seen for label, n in exactly.items() for seen in ours.of(label))
    met &= all(n >= seen for label, n in at_most.items() for seen in ours.of(label))
    return CountLine(measure, ours, other, ", ".join(goals), met)


def slower(measure: str, ours: Side, other: Side, at_most: float | None = None) -> Line:
    """Ours against a limit: the multiple of its time per item; the goal is an upper bound."""
    ratios = _ratios(ours, other)
    if at_most is None:
        return Line(measure, ours, other, ratios, "time")
    met = statistics.median(ratios) <= at_most
    return Line(measure, ours, other, ratios, "time", f"≤ {at_most:g}×", met)


def faster(measure: str, ours: Side, other: Side, at_least: float | None = None) -> Line:
    """Ours against a peer: the multiple of its speed per item; the goal is a lower bound."""
    ratios = _ratios(other, ours)
    if at_least is None:
        return Line(measure, ours, other, ratios, "speed")
    met = statistics.median(ratios) >= at_least
    return Line(measure, ours, other, ratios, "speed", f"≥ {at_least:g}×", met)


def _ratios(above: Side, below: Side) -> Samples:
    pairs = zip(above.samples, below.samples, strict=True)
    return [a / above.items / (b / below.items) for a, b in pairs]


# ── The runner ──────────────────────────────────────────────────────────────────────


def run_bench(
    doc: str,
    needs: Sequence[str],
    packages: Sequence[str],
    measures: Callable[[config.Settings], tuple[Mapping[str, str], Iterable[Line | CountLine]]],
) -> int:
    """Print the table of one benchmark; returns the exit code.

    `needs` names the variables that must be set, `packages` those whose versions count.
    `measures(settings)` returns what else was used (server, sizes) and the lines. A goal that is
    not met is a line of the table: the code is 0. It is 2 where a variable or its server is
    missing, 130 after Ctrl-C; an error while measuring, such as a wrong answer, is raised.
    """
    title, started, load = doc.splitlines()[0].rstrip("."), time.perf_counter(), os.getloadavg()[0]
    started_at = datetime.now(UTC)
    # Cleans up as Ctrl-C does, also where asyncio.Runner has a handler of its own for that.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        settings = config.load_settings()
        missing = [name for name in needs if not getattr(settings, name.lower())]
        if missing:
            raise config.ConfigError(f"{', '.join(missing)} not set; see benchmarks/README.md")
        print(f"{title}: measuring, for a minute or more", file=sys.stderr)
        facts, lines = measures(settings)
        lines = list(lines)
    except (config.ConfigError, config.ServiceUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    versions = {name: version(name) for name in packages}
    config.console.print(f"\n── {title} ".ljust(config.WIDTH + 1, "─"))
    config.fact("Python", f"{platform.python_version()}, {_cores()} cores")
    config.fact("packages", ", ".join(f"{name} {number}" for name, number in versions.items()))
    for label, value in facts.items():
        config.fact(label, value)
    columns = ["measure", "ours", "peer or limit", "ratio (range)", "goal", "outcome"]
    config.table(columns, [line.cells() for line in lines])
    verdicts = [line.met for line in lines if line.met is not None]
    elapsed_s = time.perf_counter() - started
    config.conclude(
        f"{sum(verdicts)} of {len(verdicts)} goals met; "
        f"medians of {ROUNDS} or more interleaved rounds; {elapsed_s:.0f} s in all"
    )
    if os.environ.get(RECORDS):
        benchmark = Path(inspect.getfile(measures)).stem
        record = {
            "benchmark": benchmark,
            "title": title,
            "started_at": f"{started_at:%Y-%m-%dT%H:%M:%SZ}",
            "elapsed_s": round(elapsed_s),
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],  # before it, and at its end
            "script_sha256": script_digest(benchmark),
            "machine": machine(),
            "versions": {"Python": platform.python_version(), **versions},
            "facts": facts,
            "lines": [line.record() for line in lines],
        }
        write_record(Path(os.environ[RECORDS]), benchmark, record)
    return 0


# ── The record ──────────────────────────────────────────────────────────────────────


def write_record(directory: Path, benchmark: str, record: Mapping[str, object]) -> None:
    """Whole, or not at all: a reader never sees half of one."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    unfinished = directory / f".{benchmark}.json.new"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(directory / f"{benchmark}.json")


def script_digest(benchmark: str) -> str:
    """Of the script that bench_0N measures: a figure belongs to one version of it."""
    (script,) = ROOT.glob(f"{benchmark.split('_')[1]}_*.py")
    return hashlib.sha256(script.read_bytes()).hexdigest()


def machine() -> dict[str, object]:
    """What a time depends on, without what tells whose machine it is."""
    kernel = re.match(r"[\d.]*\d", platform.release())
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {kernel[0] if kernel else '?'} {platform.machine()}",
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
