"""Benchmark of 02_mongodb_advanced.py on MongoDB: its ways against limits and peers.

Run:
  python servers.py run --only mongo -- python benchmarks/bench_02_mongodb.py

Every way's answer is checked in every round: loads and look-ups against the generated documents,
finds against a selection of those in Python, pipelines and folds against folds over what was
generated, which never was in the database.
"""

from __future__ import annotations

import asyncio
import heapq
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument
from harness import Line, Side, check, faster, measure, run_bench, slower
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, IndexModel, InsertOne, MongoClient

import config

script = importlib.import_module("02_mongodb_advanced")

Document = dict[str, Any]

BULK_MEASUREMENTS = 50_000  # of 38 bytes: a quarter of a second, so that one flush weighs little
LOOP_DOCUMENTS = 500  # one flush to disk each: all would take a minute; compared per document
TOP = 20  # documents a find returns, a page of them
ASKED_CUSTOMERS = range(10)  # finds a round; together they last milliseconds, not microseconds
KEYS_A_DOCUMENT = 3  # the goal: a range that takes half of a customer's needs about two
BIN_HOURS = 6  # as in the script's demo
KEPT = timedelta(days=3_650)  # no measurement expires under the benchmark
LOAD_ROUNDS = 9  # for what waits for the disk, whose times scatter
QUICK_ROUNDS = 15  # for what takes milliseconds, or hangs on how threads are scheduled

# ── Bulk ────────────────────────────────────────────────────────────────────────────


def insert_one_by_one(target: Any, documents: Sequence[Document]) -> None:
    for document in documents:
        target.insert_one(document)


def bulk_ways(target: Any, documents: Sequence[Document]) -> dict[str, Callable[[], object]]:
    """Each loads `documents`, the loop LOOP_DOCUMENTS of them; all with the same write concern."""
    ready = [RawBSONDocument(bson.encode(d, codec_options=script.CODEC)) for d in documents]
    return {
        "insert_one": partial(insert_one_by_one, target, documents[:LOOP_DOCUMENTS]),
        "insert_many": lambda: target.insert_many(documents, ordered=False),
        "bulk_write": lambda: target.bulk_write([*map(InsertOne, documents)], ordered=False),
        "BulkManager.load": lambda: script.BulkManager(target).load(documents),
        "ready BSON": lambda: target.insert_many(ready, ordered=False),
    }


def bulk(workspace: Any, kind: str, documents: Sequence[Document]) -> Iterator[Line]:
    database = workspace.database()
    sizes = {"insert_one": LOOP_DOCUMENTS}

    def empty() -> None:
        database.drop_collection("load")
        database.create_collection("load")

    def verify(name: str, _answer: object) -> None:
        expected = documents[: sizes.get(name, len(documents))]
        check(name, list(database.load.find().sort("_id")), expected)

    ways = bulk_ways(database.load, documents)
    seconds = measure(ways, before=empty, after=verify, rounds=LOAD_ROUNDS)
    loop, many, bulk_write, load, ready = (
        Side(name, samples, sizes.get(name, len(documents)), "docs")
        for name, samples in seconds.items()
    )
    yield faster(f"bulk, {kind}", many, loop, at_least=20)
    yield slower(f"bulk, {kind}", bulk_write, many, at_most=1.5)
    yield slower(f"bulk, {kind}", load, many)
    yield slower(f"bulk, {kind}, limit", many, ready)
    yield slower(f"bulk, {kind}, limit", load, ready)


# ── Indexes ─────────────────────────────────────────────────────────────────────────

HINTS: Mapping[str, str | Document] = {
    "E-S-R": "equality_sort_range",
    "E-R-S": "equality_range_sort",
    "E": "equality",
    "no index": {"$natural": 1},
}
INDEXES = (
    script.ESR,
    script.ERS,
    IndexModel("customer", name="equality"),
    IndexModel("status", name="status"),
)


def conditions(customer: int) -> Document:
    return {**script.IN_RANGE, "customer": customer}


def indexed_events(workspace: Any, stored: Sequence[Document]) -> Any:
    """A collection of `stored` with INDEXES."""
    collection = workspace.database().events
    report = script.BulkManager(collection).load(stored)
    check("the load of the events", report.stored, len(stored))
    manager = script.IndexManager(collection)
    for model in INDEXES:
        manager.ensure(model)
    return collection


def keys_examined(collection: Any) -> str:
    """The issue's goal by the server's own counts, at the worst of the finds that are timed."""
    manager = script.IndexManager(collection)
    options = {"sort": {"amount": -1}, "limit": TOP, "hint": HINTS["E-S-R"]}
    plans = [manager.plan(conditions(customer), **options) for customer in ASKED_CUSTOMERS]
    worst = max(plans, key=lambda plan: plan.keys / plan.returned)
    sorts = any("SORT" in plan.stages for plan in plans)
    met = not sorts and worst.keys <= KEYS_A_DOCUMENT * worst.returned
    return (
        f"{worst.keys} keys for {worst.returned} documents at worst of {len(plans)} finds, "
        f"{'with a' if sorts else 'no'} SORT: goal ≤ {KEYS_A_DOCUMENT} each: "
        f"{'met' if met else 'NOT MET'}"
    )


def top_finds(collection: Any, stored: Sequence[Document]) -> Iterator[Line]:
    """The TOP dearest of each asked customer's second half, by each index."""
    by_reference = {document["reference"]: document for document in stored}
    wanted = {
        customer: [d for d in stored if d["customer"] == customer and d["at"] >= script.MID_YEAR]
        for customer in ASKED_CUSTOMERS
    }
    amounts = {c: heapq.nlargest(TOP, (d["amount"] for d in ds)) for c, ds in wanted.items()}

    def ask(hint: str | Document) -> list[list[Document]]:
        return [
            list(collection.find(conditions(c), hint=hint).sort("amount", -1).limit(TOP))
            for c in ASKED_CUSTOMERS
        ]

    def verify(name: str, answer: list[list[Document]]) -> None:
        for customer, found in zip(ASKED_CUSTOMERS, answer, strict=True):
            check(name, [d["amount"] for d in found], amounts[customer])
            for document in found:  # equal amounts come in any order: each is what was stored
                bare = {k: v for k, v in document.items() if k != "_id"}
                check(name, bare, by_reference[document["reference"]])
                check(name, bare["customer"] == customer and bare["at"] >= script.MID_YEAR, True)
            check(name, len({d["reference"] for d in found}), TOP)

    ways = {name: partial(ask, hint) for name, hint in HINTS.items()}
    seconds = measure(ways, after=verify, rounds=QUICK_ROUNDS)
    ours, *others = (Side(n, s, len(ASKED_CUSTOMERS), "finds") for n, s in seconds.items())
    for other in others:
        yield faster(f"top {TOP} of a customer", ours, other)


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

    ways = {"index": partial(ask, "status"), "scan": partial(ask, HINTS["no index"])}
    seconds = measure(ways, after=verify)
    ours, other = (Side(name, samples) for name, samples in seconds.items())
    yield slower("90 % by status", ours, other)


# ── Aggregation ─────────────────────────────────────────────────────────────────────


def aggregation(shop: Any, generated: Mapping[str, Sequence[Document]]) -> Iterator[Line]:
    manager = script.AggregationManager(shop.database)

    def fetch(recipe: Any, name: str) -> Iterator[Document]:
        yield from manager.fetch(name, recipe.fields[name], recipe.where.get(name))

    for recipe in script.RECIPES:
        expected = recipe.fold(generated.__getitem__)

        def verify(name: str, answer: object, expected: object = expected) -> None:
            if not script.same(answer, expected):  # floats to nine digits
                check(name, answer, expected)

        ways: dict[str, Callable[[], object]] = {
            "server": partial(manager.run, recipe.collection, recipe.pipeline),
            "fetch and fold": partial(recipe.fold, partial(fetch, recipe)),
        }
        seconds = measure(ways, after=verify)
        ours, other = (Side(name, seconds[name]) for name in ways)
        yield faster(recipe.question, ours, other)


# ── Async ───────────────────────────────────────────────────────────────────────────


def look_ups(
    workspace: Any, shop: Any, generated: Mapping[str, Sequence[Document]]
) -> Iterator[Line]:
    """The script's three ways, on clients that are connected, in one event loop."""
    stored, name = generated["orders"], shop.database.name
    step = len(stored) // script.LOOKUPS
    keys = [1 + number * step for number in range(script.LOOKUPS)]
    expected = [stored[key - 1] for key in keys]  # `_id` counts from 1
    uri, options = workspace.uri, script.client_options(workspace.uri, script.OPERATION_TIMEOUT_S)

    def verify(way: str, answer: object) -> None:
        check(way, answer, expected)

    with asyncio.Runner() as runner, MongoClient[Document](uri, **options) as blocking:
        database = blocking.get_database(name, codec_options=script.CODEC)
        by_pymongo = AsyncMongoClient[Document](uri, **options)
        by_motor: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **options)
        ways: dict[str, Callable[[], object]] = {
            "AsyncMongoClient": lambda: runner.run(
                script.look_up_by_pymongo(by_pymongo, name, keys)
            ),
            "threads": lambda: script.look_up_by_threads(database, keys),
            "Motor": lambda: runner.run(script.look_up_by_motor(by_motor, name, keys)),
        }
        seconds = measure(ways, after=verify, rounds=QUICK_ROUNDS)
        by_motor.close()
        runner.run(by_pymongo.close())
    sides = (Side(way, seconds[way], len(keys), "look-ups") for way in ways)
    for ours, other in itertools.combinations(sides, 2):
        yield faster(f"look-ups, {script.CONCURRENCY} at once", ours, other)


# ── Time series ─────────────────────────────────────────────────────────────────────


def in_order(loads: Sequence[Document]) -> list[tuple[datetime, str, float]]:
    return sorted((load["at"], load["meta"]["page"], load["ms"]) for load in loads)


def series_insert(workspace: Any, loads: Sequence[Document]) -> Iterator[Line]:
    """The plain collection has the index by page and time that a series has from the start."""
    database = workspace.database()
    expected = in_order(loads)

    def empty() -> None:
        database.drop_collection("series")
        database.drop_collection("plain")
        script.TimeSeriesManager(database).create(
            "series", granularity="minutes", expire_after=KEPT
        )
        database.plain.create_index({"meta.page": 1, "at": 1})

    def verify(name: str, _answer: object) -> None:
        check(name, in_order(list(database[name].find())), expected)

    ways = {n: partial(script.BulkManager(database[n]).load, loads) for n in ("series", "plain")}
    seconds = measure(ways, before=empty, after=verify, rounds=LOAD_ROUNDS)
    ours, other = (Side(name, seconds[name], len(loads), "docs") for name in ways)
    yield slower("time series, insert", ours, other)


def series_down_sampling(workspace: Any, loads: Sequence[Document]) -> Iterator[Line]:
    database = workspace.database()
    series, manager = script.TimeSeriesManager(database), script.AggregationManager(database)
    series.create("series", granularity="minutes", expire_after=KEPT)
    for name in ("series", "plain"):
        script.BulkManager(database[name]).load(loads)
    expected = script.fold_down_sampled(loads, BIN_HOURS * script.HOUR)

    def fold() -> object:
        fetched = manager.fetch("series", ("at", "meta.page", "ms"))
        return script.fold_down_sampled(fetched, BIN_HOURS * script.HOUR)

    def verify(name: str, answer: object) -> None:
        if not script.same(answer, expected):  # floats to nine digits
            check(name, answer, expected)

    ways: dict[str, Callable[[], object]] = {
        "series": partial(series.down_sample, "series", "hour", BIN_HOURS),
        "fetch and fold": fold,
        "plain": partial(series.down_sample, "plain", "hour", BIN_HOURS),
    }
    seconds = measure(ways, after=verify, rounds=QUICK_ROUNDS)
    ours, *others = (Side(name, seconds[name]) for name in ways)
    for other in others:
        yield faster("time series, 6-hour means", ours, other)


# ── Main ────────────────────────────────────────────────────────────────────────────


def measures(settings: config.Settings) -> tuple[dict[str, str], list[Line]]:
    """All lines, in throw-away databases that are dropped at the end, also after an error."""
    uri, log = settings.mongodb_uri, script.CommandLog()
    client, server = script.connect(uri, settings.connect_timeout_s, log)
    with ExitStack() as stack:
        workspace = script.Workspace(uri, client, server, log)
        stack.callback(workspace.close)
        shop = script.Shop(script.DEFAULT_CUSTOMERS, workspace.database())
        script.seed(shop, shop.database)
        generated = {name: list(shop.generate(name)) for name in script.SHOP_COLLECTIONS}
        loads, placed = generated["page_loads"], generated["orders"]
        stored = list(script.events(script.INDEX_DOCUMENTS))
        collection = indexed_events(workspace, stored)
        keys = keys_examined(collection)
        lines = [
            *bulk(workspace, "measurements", script.measurements(BULK_MEASUREMENTS)),
            *bulk(workspace, "orders", placed),
            *top_finds(collection, stored),
            *low_cardinality(collection, stored),
            *aggregation(shop, generated),
            *look_ups(workspace, shop, generated),
            *series_insert(workspace, loads),
            *series_down_sampling(workspace, loads),
        ]
    sizes = {
        "bulk": f"{BULK_MEASUREMENTS:,} measurements, {len(placed):,} orders; "
        f"insert_one {LOOP_DOCUMENTS}; w=majority, j=true",
        "indexes": f"{len(stored):,} documents, {len(ASKED_CUSTOMERS)} finds a round",
        "E-S-R index": keys,
        "aggregation": f"{shop.count:,} customers, {len(placed):,} orders",
        "look-ups": f"{script.LOOKUPS:,} orders by _id",
        "time series": f"{len(loads):,} measurements; w=majority, j=true",
    }
    return {"server": str(server), **sizes}, lines


def main() -> int:
    return run_bench(__doc__ or "", ("MONGODB_URI",), ("pymongo", "motor"), measures)


if __name__ == "__main__":
    raise SystemExit(main())
