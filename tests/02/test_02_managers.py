"""Script 02: pipelines against plain Python, schemas, plans, time series, and encoding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from itertools import islice, product
from typing import Any
from zoneinfo import ZoneInfo

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from folds02 import FOLDS, Rows, fold_daily_revenue, fold_down_sampled, same
from pymongo.database import Database
from pymongo.errors import OperationFailure, WriteError
from script02 import Document
from services import load_script

app: Any = load_script("02_mongodb_advanced")

MIB = 2**20
DAY = timedelta(days=1)
SECRET = "horse battery"  # a value of a document, which no error may show


def rows_of(database: Database[Document]) -> Rows:
    return lambda name: database[name].find()


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc, arg-type]


# ── Pipelines ───────────────────────────────────────────────────────────────────────


def order(key: int, who: int, country: str, at: datetime, total: str, **other: Any) -> Document:
    line = {"category": "books", "quantity": 1, "price": Decimal(total)}
    return {
        "_id": key, "customer": {"_id": who}, "country": country, "placed_at": at,
        "status": "paid", "lines": [line], "total": Decimal(total), **other,
    }  # fmt: skip


def ties() -> dict[str, list[Document]]:
    """Equal sums, stored in reverse; an order on the bound; averages of half a cent; gaps."""
    gold = [{"_id": n, "name": f"c{n}", "tier": "gold"} for n in (4, 3, 2, 1)]
    placed = [order(n, n, "DE", utc(2025, 8, 9 - n), "10.01") for n in (4, 3, 2, 1)]
    placed += [order(5, 5, "JP", utc(2025, 8, 5, 12), "20.02"),
               order(6, 1, "DE", utc(2025, 6, 30, 23, 59, 59, 999000), "10.00"),
               order(7, 1, "FR", utc(2025, 9, 1), "99.99", status="refunded"),
               order(8, 2, "IT", utc(2025, 7, 1), "20.02"),
               *(order(9 + n, 9 + n, country, utc(2025, 8, 20 + n % 2), "20.02")
                 for n, country in enumerate("ES SE PT NO FI DK".split()))]  # fmt: skip
    hours = {"/checkout": (10, 10, 13, 20), "/": (11, 15)}
    loads = [{"at": utc(2025, 7, 1, hour, n), "meta": {"page": page}, "ms": 100.0 * hour + n}
             for page, at in hours.items() for n, hour in enumerate(at)]  # fmt: skip
    return {"customers": gold, "orders": placed, "page_loads": loads}


def answer_of(database: Database[Document], question: str) -> list[Document]:
    collection, pipeline = app.RECIPES[question]
    return list(database[collection].aggregate(pipeline))


@pytest.mark.parametrize("question", app.RECIPES)
def test_a_recipe_answers_as_its_fold(seeded: Database[Document], question: str) -> None:
    answer = answer_of(seeded, question)
    assert answer
    assert same(answer, FOLDS[question](rows_of(seeded)))


@pytest.mark.parametrize("question", app.RECIPES)
def test_equal_ones_come_by_their_key(database: Database[Document], question: str) -> None:
    for name, documents in ties().items():
        database[name].insert_many(documents)
    assert same(answer_of(database, question), FOLDS[question](ties().__getitem__))


@pytest.mark.parametrize("hours", [1, 5, 6, 24])
def test_down_sampling_a_series_is_as_in_python(
    seeded: Database[Document], database: Database[Document], hours: int
) -> None:
    expected = fold_down_sampled(rows_of(seeded), hours)
    assert same(list(seeded.page_loads.aggregate(app.down_sampled(hours))), expected)
    app.create_series(database, "series", 3_650 * DAY)
    assert app.BulkManager(database.series).load(ties()["page_loads"]).stored == 6
    few = list(database.series.aggregate(app.down_sampled(hours)))
    assert same(few, fold_down_sampled(ties().__getitem__, hours))


# ── The materialised view ───────────────────────────────────────────────────────────

NOON = utc(2025, 7, 10, 12)
BERLIN = ZoneInfo("Europe/Berlin")


def view_of(database: Database[Document]) -> list[Document]:
    return list(database.daily_revenue.find(sort={"_id": 1}))


def truth(database: Database[Document]) -> list[Document]:
    return fold_daily_revenue(rows_of(database))


@pytest.fixture
def shop(database: Database[Document]) -> Database[Document]:
    """Four days, two countries, and a view of them."""
    database.orders.insert_many(
        [order(n, n, "DE" if n % 3 else "FR", NOON + (n // 4) * DAY + (n % 4) * timedelta(hours=3),
               f"{n}.50") for n in range(1, 16)]
    )  # fmt: skip
    app.refresh_daily_revenue(database, NOON, NOON + 4 * DAY)
    assert view_of(database) == truth(database) != []
    return database


NIGHT = NOON.replace(hour=22, minute=30)  # the next day in Berlin
CORRECTIONS: dict[str, tuple[Callable[[Any], object], datetime, datetime]] = {
    "moved to another day": (
        lambda o: o.update_one({"_id": 1}, {"$set": {"placed_at": NOON + 2 * DAY}}),
        NOON, NOON + 2 * DAY),
    "moved to a new country": (
        lambda o: o.update_many({"_id": {"$in": [3, 6]}}, {"$set": {"country": "XX"}}),
        NOON, NOON + DAY),
    "a group deleted": (
        lambda o: o.delete_many({"country": "FR", "placed_at": {"$lt": NOON + DAY}}), NOON, NOON),
    "refunded": (
        lambda o: o.update_many({}, {"$set": {"status": "refunded"}}), NOON, NOON + 4 * DAY),
    "late, a new day": (
        lambda o: o.insert_one(order(90, 9, "IT", NOON - 3 * DAY, "7.25")), NOON - 3 * DAY, NOON),
    "the day's ends": (
        lambda o: o.insert_many([
            order(90, 9, "IT", NOON.replace(hour=0), "1.00"),
            order(91, 9, "IT", NOON.replace(hour=23, minute=59, second=59, microsecond=999000),
                  "2.00"),
        ]), NOON, NOON),
    "told in another zone": (
        lambda o: o.insert_one(order(90, 9, "DE", NIGHT, "7.25")),
        NIGHT.astimezone(BERLIN), NIGHT.astimezone(BERLIN)),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_view_equals_the_truth_after(shop: Database[Document], name: str) -> None:
    correct, since, until = CORRECTIONS[name]
    before = {str(row["_id"]) for row in view_of(shop)}
    correct(shop.orders)
    gone = app.refresh_daily_revenue(shop, since, until)
    assert view_of(shop) == truth(shop)
    assert gone == len(before - {str(row["_id"]) for row in view_of(shop)})
    assert app.refresh_daily_revenue(shop, since, until) == 0
    assert view_of(shop) == truth(shop)


def test_other_days_are_left_alone(shop: Database[Document]) -> None:
    old = view_of(shop)
    shop.orders.update_many({}, {"$set": {"country": "XX"}})
    app.refresh_daily_revenue(shop, NOON + DAY, NOON + 2 * DAY)
    days = {NOON.replace(hour=0) + n * DAY for n in (1, 2)}
    kept = [row for row in old if row["_id"]["day"] not in days]
    new = [row for row in truth(shop) if row["_id"]["day"] in days]
    assert view_of(shop) == sorted(kept + new, key=lambda row: [*row["_id"].values()])


def test_two_refreshes_at_once_agree(
    shop: Database[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second whole between the two steps of the first."""
    delete, once = type(shop.orders).delete_many, iter([True])

    def late(*args: Any, **options: Any) -> Any:
        if next(once, False):
            app.refresh_daily_revenue(shop, NOON, NOON + 4 * DAY)
        return delete(*args, **options)

    monkeypatch.setattr(type(shop.orders), "delete_many", late)
    app.refresh_daily_revenue(shop, NOON, NOON + 4 * DAY)
    assert view_of(shop) == truth(shop) != []


# ── Documents and schemas ───────────────────────────────────────────────────────────


A, B = {"required": ["a"]}, {"required": ["b"]}
INT = {"bsonType": "int"}
# schema, a document that it refuses, the broken rules
BROKEN: list[tuple[Document, Document, str]] = [
    ({"required": ["n"]}, {"name": SECRET}, "document: lacks n"),
    ({"properties": {"n": {"minimum": 0}}}, {"n": -17}, "n: minimum 0"),
    ({**A, "properties": {"b": INT}}, {"b": SECRET}, "b: bsonType int; document: lacks a"),
    ({"anyOf": [A, B]}, {}, "document: lacks a; document: lacks b"),
    ({"oneOf": [A, B]}, {"a": SECRET, "b": 1}, "document: oneOf"),
    ({"allOf": [B, {"properties": {"a": INT}}]}, {"a": 1.5}, "document: lacks b; a: bsonType int"),
    ({"additionalProperties": False, "properties": {"_id": {}}}, {"b": 1}, "document: has also b"),
    ({"properties": {"a": {"additionalProperties": INT}}}, {"a": {"k": SECRET}},
     "a: additionalProperties"),
    ({"properties": {"a": {"items": {"properties": {"b": {"items": INT}}}}}},
     {"a": [{"b": [1]}, {"b": [1, SECRET]}]}, "a[1].b[1]: bsonType int"),
]  # fmt: skip


def refusal(collection: Any, document: Document) -> list[str]:
    with pytest.raises(WriteError) as caught:
        collection.insert_one({"_id": 1, **document})
    assert caught.value.code == 121
    rules: list[str] = app.broken_rules(caught.value)
    assert SECRET not in repr(rules)
    return rules


@pytest.mark.parametrize(("schema", "document", "rules"), BROKEN)
def test_a_refusal_says_path_rule_and_what_was_wanted(
    database: Database[Document], schema: Document, document: Document, rules: str
) -> None:
    things = app.CollectionManager(database).create("things", schema)
    assert refusal(things, document) == rules.split("; ")


CUSTOMER_RULES = {
    "no address": ["addresses: minItems 1"],
    "e-mail in capitals": ["email: pattern ^[^@A-Z]+@[^@A-Z]+$"],
    "signed up as text": ["signed_up: bsonType date"],
    "half an address": ["addresses[0]: lacks city"],
}


@pytest.mark.parametrize("label", app.BAD_CUSTOMERS)
def test_each_bad_customer_breaks_its_rule_and_no_generated_one_breaks_any(
    seeded: Database[Document], database: Database[Document], label: str
) -> None:
    assert app.CollectionManager(seeded).violations("customers", app.CUSTOMER_SCHEMA) == 0
    bad = {**next(app.customers(1)), **app.BAD_CUSTOMERS[label]}
    stored = app.CollectionManager(database).create("customers", app.CUSTOMER_SCHEMA)
    assert refusal(stored, bad) == CUSTOMER_RULES[label]


TIGHTER: Document = {"required": ["n"], "properties": {"n": {"minimum": Decimal("6.5")}}}


@pytest.mark.parametrize(("level", "spared"), [("moderate", True), ("strict", False)])
def test_violations_are_those_that_tightening_then_refuses(
    database: Database[Document], level: str, spared: bool
) -> None:
    manager = app.CollectionManager(database)
    things = manager.create("things", {})
    things.insert_many([{"_id": n, "n": n} for n in range(10)] + [{"_id": 10}])
    expected = manager.violations("things", TIGHTER)
    manager.tighten("things", TIGHTER, level)
    assert things.count_documents({}) == 11  # it checks no stored document
    writes: dict[str, Callable[[Document], object]] = {
        "update": lambda one: things.update_one({"_id": one["_id"]}, {"$set": {"note": SECRET}}),
        "insert": lambda one: things.insert_one({**one, "_id": ObjectId()}),
    }
    refused = Counter[str]()
    for document, (way, write) in product(list(things.find()), writes.items()):
        try:
            write(document)
        except WriteError:
            refused[way] += 1
    assert (refused["update"], refused["insert"]) == (0 if spared else expected, expected)
    assert expected == 8
    with pytest.raises(WriteError):  # it was valid: no level spares it
        things.update_one({"_id": 9}, {"$set": {"n": 1}})


# ── Plans ───────────────────────────────────────────────────────────────────────────


def stats(keys: int, docs: int, returned: int, **more: Any) -> Document:
    counts = {"nReturned": returned, "totalKeysExamined": keys, "totalDocsExamined": docs}
    return {"executionStats": {"executionSuccess": True, **counts, **more}}


IXSCAN = {"stage": "IXSCAN", "keyPattern": {"a": 1}, "indexName": "by_a"}
FETCH = {"stage": "FETCH", "inputStage": IXSCAN}
SLOTS = {"queryPlan": {**FETCH, "planNodeId": 2}, "slotBasedPlan": {"stages": "[2] nlj"}}
COUNT = {"stage": "COUNT", "inputStage": {**IXSCAN, "stage": "COUNT_SCAN"}}


def planned(winning: Document) -> Document:
    rejected = [{"stage": "SORT", "inputStage": {"stage": "IXSCAN", "indexName": "other"}}]
    return {"queryPlanner": {"namespace": "d.c", "winningPlan": winning, "rejectedPlans": rejected}}


def routed(stage: str, *winning: Document) -> Document:
    """A find on shards, as mongos explains it."""
    shards = [
        {"shardName": f"shard{n}", "connectionString": f"s{n}/h:1", "namespace": "d.c",
         **planned(plan)["queryPlanner"]} for n, plan in enumerate(winning)
    ]  # fmt: skip
    done = [
        {"shardName": one["shardName"], "executionSuccess": True, "nReturned": 2,
         "totalKeysExamined": 2, "totalDocsExamined": 2, "executionStages": one["winningPlan"]}
        for one in shards
    ]  # fmt: skip
    plan = {"mongosPlannerVersion": 1, "winningPlan": {"stage": stage, "shards": shards}}
    stages = {"stage": stage, "nReturned": 2 * len(winning), "shards": done}
    return {"queryPlanner": plan, **stats(*[2 * len(winning)] * 3, executionStages=stages)}


CURSOR = {"$cursor": {**planned(FETCH), **stats(3, 2, 2)}}
BY_SHARDS = {
    "mergeType": "mongos", "splitPipeline": {"shardsPart": [{"$match": {"a": 1}}]},
    "shards": {
        "shard0": {"host": "h:1", "stages": [CURSOR, {"$group": {"_id": "$stage"}}]},
        "shard1": {"host": "h:2", **planned({"stage": "COLLSCAN"}), **stats(0, 9, 4)},
    },
}  # fmt: skip
# explained → stages, index, keys, docs, returned
EXPLAINED: dict[str, tuple[Document, str, str | None, tuple[int, int, int]]] = {
    "classic": ({**planned(FETCH), **stats(3, 2, 1)}, "FETCH IXSCAN", "by_a", (3, 2, 1)),
    "slot-based": ({**planned(SLOTS), **stats(3, 2, 1)}, "FETCH IXSCAN", "by_a", (3, 2, 1)),
    "COUNT": ({**planned(COUNT), **stats(3, 0, 0)}, "COUNT COUNT_SCAN", "by_a", (3, 0, 0)),
    "one shard": (
        routed("SINGLE_SHARD", FETCH), "SINGLE_SHARD FETCH IXSCAN", "by_a", (2, 2, 2)),
    "shards": (
        routed("SHARD_MERGE", SLOTS, FETCH), "SHARD_MERGE FETCH IXSCAN FETCH IXSCAN", "by_a",
        (4, 4, 4)),
    "a pipeline on shards": (BY_SHARDS, "FETCH IXSCAN COLLSCAN", "by_a", (3, 11, 6)),
}  # fmt: skip


@pytest.mark.parametrize("shape", EXPLAINED)
def test_a_plan_is_read_in_each_shape_of_explain(shape: str) -> None:
    explained, stages, index, counts = EXPLAINED[shape]
    plan = app.parse_plan(explained)
    assert (" ".join(plan.stages), plan.index) == (stages, index)
    assert (plan.keys, plan.docs, plan.returned) == counts


@pytest.fixture
def people(database: Database[Document]) -> Any:
    """A thousand people, ten of each age, of which one each has a badge."""
    database.people.insert_many([
        {"_id": n, "age": n % 100, "name": f"p{n}", "paid": Decimal(n)} for n in range(1_000)
    ])  # fmt: skip
    database.badges.insert_many([{"_id": n, "owner": n} for n in range(100)])
    database.people.create_index({"age": 1, "name": 1}, name="by_age")
    return database.people


TO_BADGES = {"from": "badges", "localField": "_id", "foreignField": "owner", "as": "badges"}
# question and options → the plan in words, its first index, documents examined
ASKED: dict[str, tuple[Any, Document, str, str | None, int]] = {
    "money": ({"age": 7, "paid": {"$gte": Decimal("500.5")}}, {}, "FETCH ← IXSCAN", "by_age", 10),
    "covered": ({"age": 7}, {"projection": {"_id": 0, "age": 1}}, "IXSCAN", "by_age", 0),
    "fields by name": ({"age": 7}, {"projection": ["age"]}, "FETCH ← IXSCAN", "by_age", 10),
    "sort as PyMongo's": ({"age": 7}, {"sort": [("name", -1)]}, "FETCH ← IXSCAN", "by_age", 10),
    "hint": ({"age": 7}, {"hint": {"$natural": 1}}, "COLLSCAN", None, 1_000),
    "hint as PyMongo's": (
        {"_id": 7}, {"hint": [("age", 1), ("name", 1)]}, "FETCH ← IXSCAN", "by_age", 1_000),
    "$or": ({"$or": [{"age": 7}, {"_id": 500}]}, {}, ".*← OR ← IXSCAN", "_id_ by_age", 11),
    "$group": (
        [{"$match": {"age": 7}}, {"$group": {"_id": "$paid"}}], {}, "(GROUP ← )?FETCH ← IXSCAN",
        "by_age", 10),
    "$facet": (
        [{"$match": {"age": 7}}, {"$facet": {"a": [{"$count": "n"}], "b": [{"$limit": 1}]}}], {},
        "FETCH ← IXSCAN", "by_age", 10),
    "$unionWith": (
        [{"$match": {"age": 7}}, {"$unionWith": "badges"}], {}, "FETCH ← IXSCAN ← COLLSCAN",
        "by_age", 110),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_a_plan_names_its_index_and_counts_what_it_read(people: Any, name: str) -> None:
    question, options, words, index, docs = ASKED[name]
    plan = app.IndexManager(people).plan(question, **options)
    assert re.fullmatch(words, str(plan)), plan
    assert plan.docs == docs
    assert str(plan.index) in str(index).split()
    if isinstance(question, dict):
        assert plan.returned == people.count_documents(question)


@pytest.mark.parametrize("pipeline", [{}, {"pipeline": [{"$match": {"_id": {"$gte": 0}}}]}])
def test_the_plan_of_a_join_counts_what_it_read_of_the_other_collection(
    people: Any, database: Database[Document], pipeline: Document
) -> None:
    """In the slot-based engine, and by a stage of its own."""
    manager = app.IndexManager(people)
    question = [{"$match": {"age": 7}}, {"$lookup": {**TO_BADGES, **pipeline}}]
    assert manager.plan(question).docs >= 10 + 100  # at least once through all badges
    database.badges.create_index("owner")
    plan = manager.plan(question)
    assert (plan.docs, plan.returned) == (10 + 1, 10)


def test_the_plan_of_a_series_counts_buckets(database: Database[Document]) -> None:
    app.create_series(database, "series", 3_650 * DAY)
    database.series.insert_many([
        {"at": NOON + n * DAY, "meta": {"page": p}, "ms": 1.0} for n in range(9) for p in "abc"
    ])  # fmt: skip
    manager, buckets = app.IndexManager(database.series), database["system.buckets.series"]
    assert manager.plan({}).docs == buckets.count_documents({}) > 3
    database.series.create_index({"meta.page": 1, "at": 1})
    for question in ({"meta.page": "b"}, [{"$match": {"meta.page": "b"}}]):
        plan = manager.plan(question)
        assert plan.docs == buckets.count_documents({"meta.page": "b"})
        assert plan.index == "meta.page_1_at_1"


@cache
def some_events() -> list[Document]:
    """Of the first day, around MID_YEAR, and one in Berlin."""
    some = [one for n, one in enumerate(islice(app.events(), 54_000)) if n < 1_000 or n > 48_000]
    return [*some, {**some[0], "reference": "B", "location": app.BERLIN}]


@pytest.fixture
def events(database: Database[Document]) -> Any:
    app.BulkManager(database.events).load(some_events())
    return database.events


OPTIONS: dict[str, Document] = {
    "partial": {"partialFilterExpression": {"status": "failed"}},
    "unique": {"unique": True},
    "TTL": {"expireAfterSeconds": 0},
}


@pytest.mark.parametrize("kind", app.INDEX_CASES)
def test_each_index_serves_the_question_that_it_is_for(events: Any, kind: str) -> None:
    model, question = app.INDEX_CASES[kind]
    manager = app.IndexManager(events)
    if kind in ("text", "2dsphere"):
        with pytest.raises(OperationFailure):
            manager.plan(question)
    else:
        before = manager.plan(question)
        assert (before.index, before.docs) == (None, 7_000)
    name = manager.ensure(model)
    assert manager.ensure(model) == name  # again: no error
    plan, pipeline = manager.plan(question), question if isinstance(question, list) else None
    found = list(events.aggregate(pipeline or [{"$match": question}]))
    assert plan.index == name
    assert 0 < len(found) == plan.returned <= plan.docs < 7_000
    assert plan.docs == plan.returned or pipeline
    assert OPTIONS.get(kind, {}).items() <= events.index_information()[name].items()


def test_by_equality_sort_range_at_most_three_keys_a_document_are_read(events: Any) -> None:
    manager, plans = app.IndexManager(events), {}
    for name in ("EQUALITY", "ERS", "ESR"):
        hint = manager.ensure(getattr(app, name))
        plans[name] = manager.plan(app.IN_RANGE, hint=hint, **app.BY_AMOUNT)
    assert [plan.returned for plan in plans.values()] == [20] * 3
    assert [name for name, plan in plans.items() if "SORT" not in plan.stages] == ["ESR"]
    assert plans["ESR"].docs == 20 <= plans["ESR"].keys <= 3 * 20
    assert min(plans["EQUALITY"].keys, plans["ERS"].keys) > 3 * 20


# ── Encoding ────────────────────────────────────────────────────────────────────────


def nested(levels: int) -> Document:
    document: Document = {}
    for _ in range(levels):
        document = {"a": document}
    return document


def raw(document: Document, old: bytes = b"", new: bytes = b"") -> RawBSONDocument:
    return RawBSONDocument(bson.encode(document).replace(old, new))


SELF: Document = {"_id": 1}
SELF["me"] = SELF
NOT_BSON: dict[str, tuple[Any, str]] = {
    "a set": ({"tags": {SECRET}}, "tags is set, InvalidDocument"),
    "beyond 64 bits": ({"a": 1, "n": 2**63}, "n is int, OverflowError"),
    "beyond 34 digits": ({"n": Decimal("1" * 35)}, "n is Decimal, Inexact"),
    "a key that is no string": ({1: SECRET}, "1 is str, InvalidDocument"),
    "a key with NUL": ({"a\0b": SECRET}, "is str, InvalidDocument"),
    "half a surrogate": ({"name": f"{SECRET}\ud800"}, "name is str, UnicodeEncodeError"),
    "too deep": ({"d": nested(5_000)}, "d is dict, RecursionError"),
    "in itself": (SELF, "me is dict, RecursionError"),
    "bad UTF-8": (raw({"_id": 1, "x": "abc"}, b"abc", b"\xff\xfe\xfd"), "InvalidBSON"),
    "no mapping": ([("_id", SECRET)], "no document: list"),
}


@pytest.mark.parametrize("name", NOT_BSON)
def test_what_bson_cannot_hold_is_a_value_error_that_names_the_field_and_no_value(
    name: str,
) -> None:
    document, words = NOT_BSON[name]
    for given in (document, *([{"_id": 1, **document}] if type(document) is dict else [])):
        with pytest.raises(ValueError, match=words) as caught:
            app.encode(given)
        assert type(caught.value) is ValueError
        assert SECRET not in repr(caught.value)


def test_an_encoded_document_begins_with_its_id_and_has_one_if_it_had_none() -> None:
    for given in ({"a": Decimal("1.50"), "_id": 7}, raw({"a": 1, "_id": 7})):
        made = app.encode(given)
        assert next(iter(made)) == "_id"
        assert bson.decode(made.raw, codec_options=app.CODEC) == dict(given)
    keys = [bson.decode(app.encode({"a": 1}).raw)["_id"] for _ in range(2)]
    assert isinstance(keys[0], ObjectId)
    assert keys[0] != keys[1]
    given = {"a": 1}
    app.encode(given)
    assert given == {"a": 1}  # unlike PyMongo's insert
    far = raw({"_id": 1, "x": DatetimeMS(10**15)})  # beyond Python's years
    assert app.encode(far).raw == far.raw


def test_the_limit_of_16_mib_is_kept_to_the_byte() -> None:
    around = len(bson.encode({"_id": 1, "x": b""}))
    assert len(app.encode({"_id": 1, "x": b"\0" * (16 * MIB - around)}).raw) == 16 * MIB
    with pytest.raises(ValueError, match=r"^16,777,217 bytes are above 16 MiB"):
        app.encode({"_id": 1, "x": b"\0" * (16 * MIB - around + 1)})
