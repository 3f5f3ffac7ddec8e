"""Benchmark of 05_realworld_data_science.py: fits, RFM, recommender and files against peers.

Run:
  python benchmarks/bench_05_data_science.py

No server is needed. Each answer is checked in every round: fits against published parameters, or
against the peer's on the same rows; RFM against plain numpy; recommenders by their recall.
- CPU is the time of all threads of the process; other times are those of the clock. BLAS has one
  thread. DuckDB, polars and implicit have as many as there are cores, which is their default.
- group and fit: customers of BG/NBD, in whole days of two years. Ours groups them by (x, t_x, T),
  and fits; lifetimes gets groups that are ready, where it says so. Both compute standard errors.
- RFM: from ids that are text, days and cents in memory, 1.8 lines an order, to a row a customer,
  sorted by id. Ours ends as numpy arrays with strings of Python's; polars keeps its own.
- recommender: from the matrix of who bought what to the 50 items most alike to each. Equal recall
  is no more than 0.005 below.
- CSV: one line in 250 has no customer, no date, or a date or an amount that is none. Ours finds out
  the encoding and the format of dates, and lists the bad lines with reasons; the others are told
  the format, and drop what they cannot read. An empty database is open, as pandas is imported.
- peak memory: of a process that imports, reads and computes; and of the whole script, on
  transactions with items, without a server.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # as numpy starts

import importlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import data_peers as peers
import harness
import numpy as np
import pandas as pd
import polars as pl
from harness import CountLine, Counts, Line, Side, Tally, check, counted, faster, measure, slower
from lifetimes.datasets import load_cdnow_summary

import config

script = importlib.import_module("05_realworld_data_science")

CUSTOMERS = 1_000_000
FEWER = {"lifetimes": 100_000, "lifetimes, spend": 200_000}  # it takes 10 s, and 5 s, for all
SPEND = (6.25, 3.74, 15.44)  # p, q, v: about those of CDNOW
EVENTS, LINES = 10_000_000, 1_000_000
SHOPPERS, EVERY = 100_000, 1_000  # in the CSV of LINES; so many have four bad ones
SHOP = 64_000  # customers of the script's own generator: a million lines
LARGER = 100_000, 5_000, 2_000_000  # customers, items and purchases of a larger one
JUDGED = 2_000  # customers by whom recall is taken
SLOW_ROUNDS, QUICK_ROUNDS = 2, 7  # of what takes 10 s, or milliseconds
TIMEOUT_S = 300  # of a process

# Small, since the kernel counts the memory of whoever starts a program as that program's own.
LAUNCHER = """import resource, subprocess, sys, time
started_s = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
elapsed_s = time.perf_counter() - started_s
print(elapsed_s, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
IMPORTS = "import importlib, sys; script = importlib.import_module('05_realworld_data_science')"
OURS = f"""{IMPORTS}; from pathlib import Path
with script.connected() as db:
    script.read_transactions(db, sys.argv[1], Path())
    script.rfm(db, int(sys.argv[2]))
"""
PANDAS = "import sys, data_peers as p; p.pandas_rfm(p.pandas_read(sys.argv[1]), int(sys.argv[2]))"


def near(name: str, found: Any, expected: Any, tolerance: float) -> None:
    """Raises ValueError where one is further off than `tolerance`, relative."""
    off = np.abs(np.asarray(found) / np.asarray(expected) - 1).max()
    check(f"{name}, off by {off:.2g}", bool(off <= tolerance), True)


def within(line: Line, at_most_s: float) -> Line:
    """The same line, with a goal for our own seconds as well."""
    bound = f"≤ {at_most_s:g} s" if at_most_s >= 1 else f"≤ {at_most_s * 1e3:g} ms"
    met = median(line.ours.samples) <= at_most_s and line.met is not False
    return replace(line, goal=f"{bound}, {line.goal}".removesuffix(", -"), met=met)


# ── Fits ────────────────────────────────────────────────────────────────────────────


def fit(x: Any, t_x: Any, age: Any) -> Any:
    return script.fit_bg_nbd(*script.grouped(x, t_x, age)).parameters


def cdnow() -> Line:
    sample = load_cdnow_summary(index_col=[0])
    x, *weeks = (sample[name].to_numpy() for name in ("frequency", "recency", "T"))
    days = [(column * 7).round().astype(np.int64) for column in weeks]
    ways = {
        "grouped and fitted": partial(fit, x, *days),
        "lifetimes": partial(peers.lifetimes_purchases, x, *weeks),
    }

    def verify(name: str, found: Any) -> None:
        near(name, found, script.PUBLISHED, 5e-4)

    samples = measure(ways, after=verify, rounds=QUICK_ROUNDS, clock=time.process_time)
    ours, other = (Side(name, seconds) for name, seconds in samples.items())
    return within(faster(f"CDNOW, {len(x):,} customers, CPU", ours, other), 0.010)


def compared(ways: Mapping[str, Any], truth: Any, expected: Any) -> list[Side]:
    """Ways to fit CUSTOMERS, or FEWER, whose parameters are `expected`, near the `truth`."""
    near("recovered", expected, truth, 0.03)  # days are rounded up

    def verify(name: str, found: Any) -> None:
        near(name, found, expected, 0.1 if name in FEWER else 1e-3)

    samples = measure(ways, after=verify, clock=time.process_time)
    return [Side(name, seconds, FEWER.get(name, CUSTOMERS)) for name, seconds in samples.items()]


def million(rng: Any) -> Iterator[Line]:
    x, t_x, age = peers.buyers(script.PUBLISHED, CUSTOMERS, rng)
    few, groups = slice(FEWER["lifetimes"]), script.grouped(x, t_x, age)
    of_groups = f"lifetimes on {len(groups[0]):,} groups"
    ways: dict[str, Any] = {
        "grouped and fitted": partial(fit, x, t_x, age),
        "lifetimes": partial(peers.lifetimes_purchases, x[few], t_x[few] / 7, age[few] / 7),
        of_groups: partial(peers.lifetimes_purchases, *groups),
    }
    ours, single, grouped = compared(ways, script.PUBLISHED, peers.lifetimes_purchases(*groups))
    name = "1M customers, group and fit, CPU"
    yield within(faster(name, ours, single, 10), 1)
    yield faster(name, ours, grouped, 3)

    x = np.resize(x[x > 0], CUSTOMERS).astype(float)
    mean, few = peers.mean_spends(x, SPEND, rng), slice(FEWER["lifetimes, spend"])
    ways = {
        "fit_gamma_gamma": lambda: script.fit_gamma_gamma(x, mean).parameters,
        "lifetimes, spend": partial(peers.lifetimes_spend, x[few], mean[few]),
    }
    ours, single = compared(ways, SPEND, peers.lifetimes_spend(x, mean))
    yield faster("Gamma-Gamma, 1M who bought again, CPU", ours, single, 20)


# ── RFM ─────────────────────────────────────────────────────────────────────────────


def same(expected: Sequence[Any], name: str, found: Any) -> None:
    """Raises ValueError unless these are the `expected` columns, row by row."""
    columns = [found[column] for column in peers.COLUMNS] if name != "ours" else [
        found.ids, found.x, found.t_x, found.T, found.first_cents, found.cents
    ]  # fmt: skip
    for label, column, wanted in zip(peers.COLUMNS, columns, expected, strict=True):
        check(f"{name}: {label}", np.array_equal(np.asarray(column), wanted), True)


def rfm(rng: Any) -> Iterator[Line]:
    rows = peers.orders(CUSTOMERS, EVENTS, rng)
    cutoff = int(rows["day"][-1]) - 1
    verify = partial(same, peers.rfm_by_numpy(**rows, cutoff=cutoff))
    names, who = peers.text_ids(range(CUSTOMERS)), rows["who"]
    others = {"day": rows["day"], "cents": rows["cents"]}
    with closing(script.connected()) as db:
        select = "SELECT printf('c%07d', who) AS customer_id, day, cents, NULL AS item FROM rows"
        db.execute(f"CREATE TABLE transactions AS {select}")
        ways: dict[str, Any] = {"ours": partial(script.rfm, db, cutoff)}

        def compared_with(peer: str, way: Any, goal: float, rounds: int) -> Line:
            samples = measure({**ways, peer: way}, after=verify, rounds=rounds)
            ours, other = (Side(n, seconds, EVENTS, "events") for n, seconds in samples.items())
            return faster("RFM over 10M events", ours, other, goal)

        ids: Any = pl.Series(names, dtype=pl.String).gather(who)
        events: Any = pl.DataFrame({"customer_id": ids, **others}).lazy()
        yield compared_with("polars", partial(peers.polars_rfm, events, cutoff), 1, 5)
        ids = pd.Series(names, dtype="str").take(who).array
        events = pd.DataFrame({"customer_id": ids, **others}, copy=False)
        way = partial(peers.pandas_rfm, events, cutoff)
        yield compared_with(f"pandas, {SLOW_ROUNDS} rounds", way, 4, SLOW_ROUNDS)


# ── Recommender ─────────────────────────────────────────────────────────────────────


def recommending(bought: Any, later: Any) -> Line:
    later.eliminate_zeros()
    rows = np.flatnonzero((bought.getnnz(1) > 0) & (later.getnnz(1) > 0))[:JUDGED]
    recalls = dict[str, float]()

    def verify(name: str, answer: Any) -> None:
        if name == "alike":
            scores = (bought[rows] @ answer).toarray()
            scores[bought[rows].nonzero()] = -np.inf
            best = np.argsort(-scores, axis=1, kind="stable")[:, : script.TOP]
        else:
            best, _ = answer.recommend(rows, bought[rows], N=script.TOP)
        recalls[name] = peers.recall(best, later[rows])

    ways = {
        "alike": partial(script.alike, bought),
        "implicit": partial(peers.implicit_model, bought, script.NEIGHBOURS),
    }
    samples = measure(ways, after=verify, rounds=QUICK_ROUNDS)
    check(f"equal recall, {recalls}", recalls["alike"] > recalls["implicit"] - 0.005, True)
    ours, other = (Side(f"{n}, recall {recalls[n]:.4f}", s) for n, s in samples.items())
    size = f"{bought.shape[0]:,} customers, {bought.shape[1]:,} items"
    return slower(f"recommender, {size}", ours, other, 2)


def recommenders(rng: Any) -> Iterator[Line]:
    with closing(script.connected()) as db:
        today = script.open_shop(db, SHOP, rng)
        before = script.recommender(db, today - script.HORIZON * 7).bought
        by_now = script.recommender(db, today).bought
    yield recommending(before, by_now - before)
    yield recommending(*peers.shelves(*LARGER, rng))


# ── Files ───────────────────────────────────────────────────────────────────────────


def write_log(path: Path, rng: Any) -> tuple[list[Any], int]:
    """A CSV of orders; the features of its customers by its last day, and that day."""
    log = peers.orders(SHOPPERS, LINES, rng)
    number, second = np.arange(LINES) % EVERY, rng.integers(0, 86_400, LINES)
    rows = {**log, "number": number, "second": second}  # noqa: F841
    with closing(script.connected()) as db:
        db.execute(
            f"""COPY (SELECT
            CASE number WHEN 1 THEN NULL ELSE printf('c%07d', who) END AS customer_id,
            CASE number WHEN 2 THEN NULL WHEN 3 THEN '2023-02-30 10:00:00' ELSE
            strftime(make_timestamp((day * 86400 + second) * 1000000), '{peers.WHEN}')
            END AS timestamp,
            CASE number WHEN 4 THEN 'many' ELSE printf('%.2f', cents / 100) END AS amount
            FROM rows) TO {script.quoted(path)} (HEADER)"""
        )
    good, cutoff = (number < 1) | (number > 4), int(log["day"][-1])
    kept = {name: column[good] for name, column in log.items()}
    return peers.rfm_by_numpy(**kept, cutoff=cutoff), cutoff


def write_shop(path: Path, rng: Any) -> None:
    with closing(script.connected()) as db:
        script.open_shop(db, SHOP, rng)
        db.execute(
            f"""COPY (SELECT customer_id, DATE '1970-01-01' + day::INT AS date,
            printf('%.2f', cents / 100) AS amount, item FROM transactions
            ORDER BY day DESC LIMIT {LINES}) TO {script.quoted(path)} (HEADER)"""
        )


def reading(path: Path, home: Path, expected: Sequence[Any], cutoff: int) -> Iterator[Line]:
    with ExitStack() as stack:
        runs = range(harness.WARM_UPS + harness.ROUNDS)
        empty = [stack.enter_context(closing(script.connected())) for _ in runs]

        def ours() -> Any:
            db = empty.pop()
            quality = script.read_transactions(db, str(path), home)
            counts = set(quality.counts.values())  # of faulty lines, of those without a customer
            check(f"bad lines in {counts}", counts >= {3 * LINES // EVERY, LINES // EVERY}, True)
            return script.rfm(db, cutoff)

        ways = {
            "ours": ours,
            "pandas": lambda: peers.pandas_rfm(peers.pandas_read(path), cutoff),
            "polars": lambda: peers.polars_rfm(peers.polars_read(path), cutoff),
        }
        samples = measure(ways, after=partial(same, expected))
    mine, slow, fast = (Side(name, seconds) for name, seconds in samples.items())
    yield faster("CSV of 1M lines → RFM table", mine, slow, 3)
    yield faster("CSV of 1M lines → RFM table", mine, fast)


def process(home: Path, *command: object) -> Counts:
    """What a Python of its own took, imports included."""
    paths = os.pathsep.join(map(str, (harness.ROOT, harness.ROOT / "benchmarks")))
    environment = {n: value for n, value in os.environ.items() if n not in config.SCHEMES}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, command)],
        cwd=home, env={**environment, "PYTHONPATH": paths}, check=True, stdout=subprocess.PIPE,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    elapsed_s, peak = map(float, done.stdout.split())
    megabyte = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB on Linux
    return {"ms": round(elapsed_s * 1e3), "MB": round(peak / megabyte)}


def processes(log: Path, cutoff: int, shop: Path, home: Path) -> Iterator[CountLine]:
    page = home / "report.html"
    whole = [harness.ROOT / "05_realworld_data_science.py", "--transactions", shop]
    commands: dict[str, Any] = {
        "ours": ["-c", OURS, log, cutoff],
        "pandas": ["-c", PANDAS, log, cutoff],
        "the script": [*whole, "--report", page],
        "its imports alone": ["-c", IMPORTS],
    }
    seen: dict[str, list[Counts]] = {name: [] for name in commands}
    for _ in range(SLOW_ROUNDS):
        for name, command in commands.items():
            seen[name].append(process(home, *command))
        check("a picture on the page", "<svg" in page.read_text("utf-8"), True)
        page.unlink()
    ours, by_pandas, report, imports = (Tally(name, rounds) for name, rounds in seen.items())
    yield counted("CSV → RFM, a process", ours, by_pandas, at_most={"MB": 500})
    yield counted("CSV of 1M lines → report", report, imports, at_most={"MB": 1_500})


def files(home: Path, rng: Any) -> Iterator[Line | CountLine]:
    log, shop = home / "log.csv", home / "shop.csv"
    expected, cutoff = write_log(log, rng)
    yield from reading(log, home, expected, cutoff)
    write_shop(shop, rng)
    yield from processes(log, cutoff, shop, home)


# ── Main ────────────────────────────────────────────────────────────────────────────


def measures(_: config.Settings) -> tuple[dict[str, str], list[Line | CountLine]]:
    fewer = ", ".join(f"{name} {count:,}" for name, count in FEWER.items())
    facts = {
        "threads": "BLAS 1, lifetimes and pandas 1, DuckDB, polars and implicit all",
        "fewer customers": f"{fewer}; compared by each",
        "fewer rounds": f"{SLOW_ROUNDS} of pandas over 10M events, and of the processes",
    }
    rng = np.random.default_rng(5)
    with tempfile.TemporaryDirectory(prefix="bench05-") as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lifetimes, about the numpy and pandas of today
        lines: list[Line | CountLine] = [cdnow(), *million(rng), *rfm(rng), *recommenders(rng)]
        lines += files(Path(home), rng)
    return facts, lines


def main() -> int:
    packages = "duckdb numpy scipy lifetimes pandas polars implicit".split()
    return harness.run_bench(__doc__ or "", (), packages, measures)


if __name__ == "__main__":
    raise SystemExit(main())
