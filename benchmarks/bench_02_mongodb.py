"""Benchmark of 02_mongodb_advanced.py on MongoDB: its ways against limits and peers.

Run:
  python servers.py run --only mongo -- python benchmarks/bench_02_mongodb.py

Every way's answer is checked in every round: loads and look-ups against the generated documents,
finds against a selection of those in Python, pipelines against the folds of tests/02/folds02.py
over what was generated, which never was in the database.
"""

from __future__ import annotations

import asyncio
import heapq
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument
from harness import (
    ROOT,
    CountLine,
    Line,
    Side,
    Tally,
    check,
    counted,
    faster,
    measure,
    run_bench,
    slower,
)
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, IndexModel, InsertOne, MongoClient

import config

sys.path.append(str(ROOT / "tests" / "02"))
folds = importlib.import_module("folds02")
script = importlib.import_module("02_mongodb_advanced")

Document = dict[str, Any]

BULK_MEASUREMENTS = 50_000  # of 38 bytes: a quarter of a second, so that one flush weighs little
LOOP_DOCUMENTS = 500  # one flush to disk each: all would take a minute; compared per document
ASKED_CUSTOMERS = range(10)  # finds a round; together they last milliseconds, not microseconds
KEYS_A_DOCUMENT = 3  # the goal: a range that takes half of a customer's needs about two
BIN_HOURS = 6  # as in the script's demo
KEPT = timedelta(days=3_650)  # no measurement expires under the benchmark
LOAD_ROUNDS = 9  # for what waits for the disk, whose times scatter
QUICK_ROUNDS = 15  # for what takes milliseconds, or hangs on how threads are scheduled

# ── Bulk ────────────────────────────────────────────────────────────────────────────


def bulk(workspace: Any, kind: str, documents: Sequence[Document]) -> Iterator[Line]:
    """Five ways to load `documents`, the loop LOOP_DOCUMENTS of them; with one write concern."""
    database, sizes = workspace.database(), {"insert_one": LOOP_DOCUMENTS}
    target = database.load
    ready = [RawBSONDocument(bson.encode(d, codec_options=script.CODEC)) for d in documents]

    def insert_one_by_one() -> None:
        for document in documents[:LOOP_DOCUMENTS]:
            target.insert_one(document)

    def empty() -> None:
        database.drop_collection("load")
        database.create_collection("load")

    def verify(name: str, _answer: object) -> None:
        expected = documents[: sizes.get(name, len(documents))]
        check(name, list(target.find().sort("_id")), expected)

    ways: dict[str, Callable[[], object]] = {
        "insert_one": insert_one_by_one,
        "insert_many": lambda: target.insert_many(documents, ordered=False),
        "bulk_write": lambda: target.bulk_write([*map(InsertOne, documents)], ordered=False),
        "BulkManager.load": lambda: script.BulkManager(target).load(documents),
        "ready BSON": lambda: target.insert_many(ready, ordered=False),
    }
    seconds = measure(ways, before=empty, after=verify, rounds=LOAD_ROUNDS)
    loop, many, bulk_write, load, limit = (
        Side(name, samples, sizes.get(name, len(documents)), "docs")
        for name, samples in seconds.items()
    )
    yield faster(f"bulk, {kind}", many, loop, at_least=20)
    yield slower(f"bulk, {kind}", bulk_write, many, at_most=1.5)
    yield slower(f"bulk, {kind}", load, many)
    yield slower(f"bulk, {kind}, limit", many, limit)
    yield slower(f"bulk, {kind}, limit", load, limit)


# ── Indexes ─────────────────────────────────────────────────────────────────────────

NO_INDEX = {"$natural": 1}
HINTS: dict[str, str | Document] = {
    "E-S-R": "equality_sort_range",
    "E-R-S": "equality_range_sort",
    "E": "equality",
    "no index": NO_INDEX,
}


def indexed_events(workspace: Any, stored: Sequence[Document]) -> Any:
    collection = workspace.database().events
    check("the load of the events", script.BulkManager(collection).load(stored).stored, len(stored))
    for model in (script.ESR, script.ERS, script.EQUALITY, IndexModel("status", name="status")):
        script.IndexManager(collection).ensure(model)
    return collection


def top_finds(collection: Any, stored: Sequence[Document]) -> Iterator[Line | CountLine]:
    """The dearest of each asked customer's second half, by each index."""
    top, plan = script.BY_AMOUNT["limit"], script.IndexManager(collection).plan
    asked = [{**script.IN_RANGE, "customer": customer} for customer in ASKED_CUSTOMERS]
    late = [d for d in stored if d["at"] >= script.MID_YEAR]
    wanted = [{d["reference"]: d for d in late if d["customer"] == c} for c in ASKED_CUSTOMERS]
    amounts = [heapq.nlargest(top, (d["amount"] for d in mine.values())) for mine in wanted]

    def examined(name: str) -> Tally:
        plans = [plan(c, hint=HINTS[name], **script.BY_AMOUNT) for c in asked]
        check(name, {p.returned for p in plans}, {top})
        return Tally(name, [{"keys": p.keys, "SORT": p.stages.count("SORT")} for p in plans])

    def ask(hint: str | Document) -> list[list[Document]]:
        bare = partial(collection.find, projection={"_id": False}, hint=hint, **script.BY_AMOUNT)
        return [list(bare(conditions)) for conditions in asked]

    def verify(name: str, answer: list[list[Document]]) -> None:
        check(name, [[d["amount"] for d in found] for found in answer], amounts)
        for found, mine in zip(answer, wanted, strict=True):
            by_reference = {d["reference"]: d for d in found}  # equal amounts come in any order
            check(name, len(by_reference), top)
            check(
                name, by_reference, {reference: mine.get(reference) for reference in by_reference}
            )

    goal = {"keys": KEYS_A_DOCUMENT * top}
    yield counted(
        f"top {top}, a find", examined("E-S-R"), examined("E-R-S"), {"SORT": 0}, at_most=goal
    )
    ways = {name: partial(ask, hint) for name, hint in HINTS.items()}
    seconds = measure(ways, after=verify, rounds=QUICK_ROUNDS)
    ours, *others = (Side(n, s, len(asked), "finds") for n, s in seconds.items())
    for other in others:
        yield faster(f"top {top} of a customer", ours, other)


def low_cardinality(collection: Any, stored: Sequence[Document]) -> Iterator[Line]:
    """Nine in ten documents by an index on a field of three values. One field comes back, not
    decoded: the server's work is what differs."""
    expected = sorted(d["amount"] for d in stored if d["status"] == "paid")

    def ask(hint: str | Document) -> list[bytes]:
        projection = {"_id": False, "amount": True}
        return list(collection.find_raw_batches({"status": "paid"}, projection, hint=hint))

    def verify(name: str, answer: list[bytes]) -> None:
        found = (d["amount"] for batch in answer for d in bson.decode_all(batch))
        check(name, sorted(found), expected)

    ways = {"index": partial(ask, "status"), "scan": partial(ask, NO_INDEX)}
    ours, other = (Side(n, samples) for n, samples in measure(ways, after=verify).items())
    yield slower("90 % by status", ours, other)


# ── Aggregation ─────────────────────────────────────────────────────────────────────

PAID = {"status": "paid"}
# What a fold needs, the least that can be fetched: question → collection → conditions, fields
FETCHED: dict[str, dict[str, tuple[Document, str]]] = {
    "revenue, two ways": {
        "orders": (PAID, "status country total lines.category lines.price lines.quantity")
    },
    "gold since July": {
        "customers": ({"tier": "gold"}, "_id name tier"),
        "orders": (
            {**PAID, "placed_at": {"$gte": script.RECENT}},
            "status customer._id placed_at total",
        ),
    },
    "days, average, rank": {"orders": (PAID, "status placed_at total")},
    "checkout by hour": {"page_loads": ({"meta.page": "/checkout"}, "at meta.page ms")},
    "top 3 of a country": {"orders": (PAID, "status country customer._id total")},
}


def fetch(found: Any, conditions: Document, fields: str) -> Iterator[Document]:
    yield from found.find(conditions, {"_id": False, **dict.fromkeys(fields.split(), True)})


def alike(expected: object, name: str, answer: object) -> None:
    """As `check`, but floats to nine digits: their sums depend on the order."""
    if not folds.same(answer, expected):
        check(name, answer, expected)


def answered(collection: Any, pipeline: Sequence[Document]) -> list[Document]:
    return list(collection.aggregate(pipeline))


def aggregation(database: Any, generated: Mapping[str, Sequence[Document]]) -> Iterator[Line]:
    for question, (collection, pipeline) in script.RECIPES.items():
        fold, needed = folds.FOLDS[question], FETCHED[question]
        expected = fold(generated.__getitem__)
        ways: dict[str, Callable[[], object]] = {
            "server": partial(answered, database[collection], pipeline),
            "fetch and fold": partial(
                fold, lambda name, needed=needed: fetch(database[name], *needed[name])
            ),
        }
        seconds = measure(ways, after=partial(alike, expected))
        ours, other = (Side(name, samples) for name, samples in seconds.items())
        yield faster(question, ours, other)


# ── Look-ups ────────────────────────────────────────────────────────────────────────


def look_ups(uri: str, name: str, placed: Sequence[Document]) -> Iterator[Line]:
    """By the script's two asyncio clients, in one event loop, and by threads; no client listens to
    its commands, and all are connected."""
    expected = placed[:: len(placed) // script.LOOKUPS][: script.LOOKUPS]
    keys = [order["_id"] for order in expected]
    options = script.client_options(uri, script.OPERATION_TIMEOUT_S)

    with asyncio.Runner() as runner, MongoClient[Document](uri, **options) as client:
        orders = client.get_database(name, codec_options=script.CODEC).orders

        def by_threads() -> list[object]:
            with ThreadPoolExecutor(script.CONCURRENCY) as threads:
                return list(threads.map(lambda key: orders.find_one({"_id": key}), keys))

        by_pymongo = AsyncMongoClient[Document](uri, **options)
        by_motor: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **options)
        ways: dict[str, Callable[[], object]] = {
            "AsyncMongoClient": lambda: runner.run(script.look_up(by_pymongo, name, keys)),
            "threads": by_threads,
            "Motor": lambda: runner.run(script.look_up(by_motor, name, keys)),
        }
        seconds = measure(ways, after=partial(alike, expected), rounds=QUICK_ROUNDS)
        by_motor.close()
        runner.run(by_pymongo.close())
    sides = (Side(way, samples, len(keys), "look-ups") for way, samples in seconds.items())
    for ours, other in itertools.combinations(sides, 2):
        yield faster(f"look-ups, {script.CONCURRENCY} at once", ours, other)


# ── Time series ─────────────────────────────────────────────────────────────────────


def in_order(loads: Sequence[Document]) -> list[Document]:
    bare = ({name: load[name] for name in ("at", "meta", "ms")} for load in loads)
    return sorted(bare, key=lambda load: (load["at"], load["meta"]["page"], load["ms"]))


def time_series(workspace: Any, loads: Sequence[Document]) -> Iterator[Line]:
    """A series against a plain collection with the index by page and time that a series has from
    the start: the insert, then six-hour means."""
    database, stored = workspace.database(), in_order(loads)
    series, plain = database.series, database.plain

    def empty() -> None:
        series.drop()
        plain.drop()
        script.create_series(database, "series", KEPT)
        plain.create_index({"meta.page": 1, "at": 1})

    def verify(name: str, _answer: object) -> None:
        check(name, in_order(list(database[name].find())), stored)

    inserts = {to.name: partial(script.BulkManager(to).load, loads) for to in (series, plain)}
    seconds = measure(inserts, before=empty, after=verify, rounds=LOAD_ROUNDS)
    ours, other = (Side(name, samples, len(loads), "docs") for name, samples in seconds.items())
    yield slower("time series, insert", ours, other)

    inserts["series"]()  # emptied before the last load of `plain`
    pipeline = script.down_sampled(BIN_HOURS)
    means: dict[str, Callable[[], object]] = {
        "series": partial(answered, series, pipeline),
        "fetch and fold": lambda: folds.fold_down_sampled(
            lambda _: fetch(series, {}, "at meta.page ms"), BIN_HOURS
        ),
        "plain": partial(answered, plain, pipeline),
    }
    expected = folds.fold_down_sampled(lambda _: loads, BIN_HOURS)
    seconds = measure(means, after=partial(alike, expected), rounds=QUICK_ROUNDS)
    ours, *others = (Side(name, samples) for name, samples in seconds.items())
    for other in others:
        yield faster("time series, 6-hour means", ours, other)


# ── Main ────────────────────────────────────────────────────────────────────────────


def measures(settings: config.Settings) -> tuple[dict[str, str], list[Line | CountLine]]:
    """All lines, in throw-away databases that are dropped at the end, also after an error."""
    uri, log, count = settings.mongodb_uri, script.CommandLog(), script.CUSTOMERS
    client, hello = script.connect(uri, settings.connect_timeout_s, log)
    with closing(script.Workspace(uri, client, hello, log)) as workspace:
        database = workspace.database()
        script.seed(database, count)
        placed, loads = list(script.orders(count)), list(script.page_loads())
        generated = {"customers": [*script.customers(count)], "orders": placed, "page_loads": loads}
        stored = list(script.events(script.INDEX_DOCUMENTS))
        collection = indexed_events(workspace, stored)
        lines = [
            *bulk(workspace, "measurements", script.measurements(BULK_MEASUREMENTS)),
            *bulk(workspace, "orders", placed),
            *top_finds(collection, stored),
            *low_cardinality(collection, stored),
            *aggregation(database, generated),
            *look_ups(workspace.uri, database.name, placed),
            *time_series(workspace, loads),
        ]
    return {
        "server": str(workspace),
        "bulk": f"{BULK_MEASUREMENTS:,} measurements, {len(placed):,} orders; "
        f"insert_one {LOOP_DOCUMENTS}; w=majority, j=true",
        "indexes": f"{len(stored):,} documents, {len(ASKED_CUSTOMERS)} finds a round",
        "aggregation": f"{count:,} customers, {len(placed):,} orders",
        "look-ups": f"{script.LOOKUPS:,} orders by _id",
        "time series": f"{len(loads):,} measurements; w=majority, j=true",
    }, lines


def main() -> int:
    return run_bench(__doc__ or "", ("MONGODB_URI",), ("pymongo", "motor"), measures)


if __name__ == "__main__":
    raise SystemExit(main())
