"""docs/BENCHMARKS.md and its charts, from the records of the benchmarks.

Run:
  make bench                     # measures, then writes the page
  python benchmarks/report.py    # writes the page again, from the records that are there

A record is benchmarks/records/bench_0N_*.json, as harness.py writes it. The page and the charts
hold nothing but what the records say: the same records give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from harness import OUTCOMES, ROOT, times
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

DOCS = ROOT / "docs"
RECORDS = ROOT / "benchmarks" / "records"
PAGE = "BENCHMARKS.md"

Record = dict[str, Any]

# ── Records ─────────────────────────────────────────────────────────────────────────


def benchmarks() -> list[str]:
    """Those that `make bench` runs, in that order."""
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


def read_records(directory: Path) -> dict[str, Record]:
    """By name, in the order of the scripts."""
    found = (json.loads(path.read_text("utf-8")) for path in sorted(directory.glob("bench_*.json")))
    return {record["benchmark"]: record for record in found}


def number_of(benchmark: str) -> str:
    return benchmark.split("_")[1]


def goals(record: Record) -> list[Record]:
    return [line for line in record["lines"] if line["met"] is not None]


def missed(record: Record) -> list[Record]:
    return [line for line in goals(record) if not line["met"]]


def comparison(line: Record) -> str:
    return f"{line['measure']}: {line['ours_name']} / {line['other_name']}"


# ── The page ────────────────────────────────────────────────────────────────────────

HEAD = """\
# Benchmarks

<!-- written by `make bench`; an edit here is lost -->

Ratios, not times: both sides of each were measured in one run, on one machine, in turns.
[How to read a table](../benchmarks/README.md#read), and the
[rules](../benchmarks/README.md#rules), stand beside the benchmarks. The tables are here as they
were printed, lines that look bad included.
"""
REPEAT = """\
## How to repeat it

<!-- not run: it took {minutes} minutes; tests assert no time -->
```sh
make bench
```

It starts the servers, runs every benchmark, and writes this page with its charts. One alone:

<!-- not run: the same, for one -->
```sh
export BENCH_RECORDS=benchmarks/records
.venv/bin/python servers.py run -- .venv/bin/python benchmarks/{first}.py
.venv/bin/python benchmarks/report.py
```

The records, with the ratio of each round, are in `benchmarks/records/`.
"""


def escaped(text: object) -> str:
    """Plain text in a cell or a line of Markdown."""
    return re.sub(r"([\\|`*<\[\]])", r"\\\1", str(text))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([escaped(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(records: Mapping[str, Record], expected: Sequence[str]) -> str:
    """The whole of it; what is `expected` and has no record is named."""
    parts = [HEAD, overview(records, expected), goals_missed(records), machines(records)]
    parts += [chapter(record) for record in records.values()]
    minutes = round(sum(record["elapsed_s"] for record in records.values()) / 60)
    parts.append(REPEAT.format(first=next(iter([*records, *expected])), minutes=minutes))
    return "\n".join(parts)


def overview(records: Mapping[str, Record], expected: Sequence[str]) -> str:
    rows = [
        (
            number_of(name),
            record["title"],
            f"{len(goals(record)) - len(missed(record))} of {len(goals(record))}",
            len(record["lines"]),
            record["started_at"][:10],
            f"{record['elapsed_s']} s",
        )
        for name, record in records.items()
    ]
    absent = ", ".join(f"`{name}`" for name in expected if name not in records)
    text = table(["script", "benchmark", "goals met", "lines", "date", "took"], rows)
    return f"{text}\nNot measured: {absent}.\n" if absent else text


def goals_missed(records: Mapping[str, Record]) -> str:
    rows = [
        (number_of(name), comparison(line), line["goal"], line["ratio"])
        for name, record in records.items()
        for line in missed(record)
    ]
    if not rows:
        return f"No goal was missed, of {sum(len(goals(r)) for r in records.values())}.\n"
    return "Goals that were missed:\n\n" + table(["script", "measure", "goal", "ratio"], rows)


def machines(records: Mapping[str, Record]) -> str:
    """One row for each that measured; usually that is one."""
    ran: dict[tuple[str, ...], list[str]] = {}
    for name, record in records.items():
        machine, versions = record["machine"], record["versions"]
        memory = f"{machine['memory_bytes'] / 2**30:.1f} GiB"
        key = (machine["cpu"], machine["cores"], memory, machine["system"], versions["Python"])
        ran.setdefault(key, []).append(number_of(name))
    columns = ["CPU", "cores", "memory", "system", "Python", "benchmarks"]
    return "## Machine\n\n" + table(columns, [(*key, ", ".join(of)) for key, of in ran.items()])


def chapter(record: Record) -> str:
    name, number = record["benchmark"], number_of(record["benchmark"])
    before, after = record["load"]
    packages = (f"{name} {of}" for name, of in record["versions"].items() if name != "Python")
    facts = {
        "date": record["started_at"].replace("T", " ").replace("Z", " UTC"),
        "load": f"{before} before it began, {after} at its end (processes that ran or waited)",
        "packages": ", ".join(packages),
        "script": f"SHA-256 {record['script_sha256'][:12]}…",
        **record["facts"],
    }
    columns = ["measure", "ours", "peer or limit", "ratio (range)", "goal", "outcome"]
    keys = ["measure", "ours", "other", "ratio", "goal"]
    rows = [[*(line[key] for key in keys), OUTCOMES[line["met"]]] for line in record["lines"]]
    parts = [f"## {number}. {record['title']}\n", f"From `benchmarks/{name}.py`:\n"]
    parts.append("".join(f"- {escaped(k)}: {escaped(v)}\n" for k, v in facts.items()))
    if with_ratio(record):
        parts.append(f"![{summary(record)}](img/{picture(record)})\n")
    return "\n".join([*parts, table(columns, rows)])


# ── The charts ──────────────────────────────────────────────────────────────────────

ROW_INCHES = 0.27  # of 9 points, with air
LETTER_INCHES = 0.066  # of a label, on average
AXIS_INCHES = 3.6  # beside the labels, however long they are
PAPER, INK = "#fdfcfb", "#010203"  # stand for the two colours that the style below decides
# A picture in a page does not see the page's colours: it brings its own paper, light or dark.
STYLE = """<style>
:root { --paper: #ffffff; --ink: #1f2328 }
@media (prefers-color-scheme: dark) { :root { --paper: #151b23; --ink: #e6edf3 } }
</style>"""
MARKS = {  # outcome → marker, colour; the colours are seen on both papers
    True: ("o", "#2f81d8", "goal met"),
    False: ("X", "#d9660d", "goal missed"),
    None: ("D", "#858d97", "no goal"),
}
PANELS = {
    "speed": "times the speed of the peer: more is better",
    "time": "times the time of the peer or limit: less is better",
}


def with_ratio(record: Record) -> list[Record]:
    return [line for line in record["lines"] if line["ratios"]]


def picture(record: Record) -> str:
    return f"bench-{number_of(record['benchmark'])}.svg"


def summary(record: Record) -> str:
    """For who does not see the picture; the table below it has every figure."""
    return (
        f"{escaped(record['title'])}: {len(with_ratio(record))} ratios with their ranges on a "
        "logarithmic axis; the figures are in the table below"
    )


def chart(record: Record) -> str:
    """The ratios as SVG: a mark at each median, a bar over the rounds' range, a line at a goal."""
    groups = {
        word: lines
        for word in PANELS
        if (lines := [line for line in with_ratio(record) if line["word"] == word])
    }
    style = {
        "svg.fonttype": "none", "svg.hashsalt": record["benchmark"], "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK,
    }  # fmt: skip
    with matplotlib.style.context(["default", style]):
        heights = [ROW_INCHES * (len(lines) + 2) for lines in groups.values()]
        width = AXIS_INCHES + LETTER_INCHES * max(map(len, map(comparison, with_ratio(record))))
        figure = Figure((width, sum(heights)), layout="constrained", facecolor=PAPER)
        all_axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (word, lines) in zip(all_axes, groups.items(), strict=True):
            panel(axes, word, lines)
        seen = [met for met in MARKS if any(line["met"] is met for line in with_ratio(record))]
        handles = [
            Line2D([], [], color=MARKS[met][1], marker=MARKS[met][0], label=MARKS[met][2])
            for met in seen
        ]
        if any(bound(line) for line in with_ratio(record)):
            handles.append(Line2D([], [], color=INK, marker="|", ls="", ms=10, label="goal"))
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
        text = io.StringIO()
        # Neither date nor version: the same record gives the same bytes.
        metadata = {"Date": None, "Creator": None, "Title": f"{record['title']}: ratios"}
        figure.savefig(text, format="svg", bbox_inches="tight", metadata=metadata)
    head, root, body = text.getvalue().partition("<svg ")
    before, end, after = body.partition(">\n")
    coloured = (before + end + STYLE + "\n" + after).replace(PAPER, "var(--paper)")
    return head + root + coloured.replace(INK, "var(--ink)")


def panel(axes: Axes, word: str, lines: Sequence[Record]) -> None:
    axes.set_facecolor(PAPER)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    ends = [1.0]
    for row, line in enumerate(lines):
        low, middle, high = (of(line["ratios"]) for of in (min, statistics.median, max))
        marker, colour, _ = MARKS[line["met"]]
        axes.plot([low, high], [row, row], color=colour, linewidth=2.5, alpha=0.55)
        axes.plot(middle, row, marker=marker, color=colour, markersize=6)
        note = (1.01, row)
        at_right = axes.get_yaxis_transform()
        axes.text(*note, f"{times(middle)}×", transform=at_right, va="center", color=INK)
        if goal := bound(line):
            axes.plot([goal, goal], [row - 0.38, row + 0.38], color=INK, linewidth=1.4)
        ends += [low, high, goal or 1.0]
    left, right = min(ends) / 1.25, max(ends) * 1.25
    axes.set_xlim(left, right)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [comparison(line) for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
    steps = (1.0, 2.0, 5.0) if math.log10(right / left) < 2.5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:,g}×"))
    axes.set_title(PANELS[word], fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)


def bound(line: Record) -> float | None:
    """The ratio that a goal such as `≥ 20×` asks for."""
    found = re.fullmatch(r"[≤≥] ([\d.e+]+)×", line["goal"])
    return float(found[1]) if found else None


# ── Main ────────────────────────────────────────────────────────────────────────────


def files(records: Mapping[str, Record], expected: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Everything that is written, below docs/."""
    yield Path(PAGE), page(records, expected)
    for record in records.values():
        if with_ratio(record):
            yield Path("img") / picture(record), chart(record)


def main() -> int:
    records = read_records(RECORDS)
    if not records:
        print(f"error: no record in {RECORDS.relative_to(ROOT)}: run make bench")
        return 2
    for path, text in files(records, benchmarks()):
        (DOCS / path).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")
        print(f"wrote docs/{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
