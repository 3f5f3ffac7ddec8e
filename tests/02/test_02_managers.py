"""Script 02: its manager classes, on the server.

What is expected comes from the server's own catalogue and answers, or from plain arithmetic. The
contract tests at the end run through the synchronous managers and through `AsyncManager`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import bson
import pymongo
import pytest
from bson.objectid import ObjectId
from pymongo import IndexModel, InsertOne, UpdateOne
from pymongo.database import Database
from pymongo.errors import AutoReconnect, DuplicateKeyError, OperationFailure
from pymongo.write_concern import WriteConcern
from services import load_script, mongo_client

if TYPE_CHECKING:  # pytest imports it as a plugin, and would not rewrite its asserts after this
    from script02 import MakeManagers, Managers

app: Any = load_script("02_mongodb_advanced")

Document = dict[str, Any]
MIB = 2**20
SECRET = "horse battery"  # a value of a document, which no error may show
SCHEMA: Document = {
    "required": ["n"],
    "properties": {"n": {"bsonType": "int", "minimum": 0}, "name": {"maxLength": 20}},
}
DAY = timedelta(days=1)
POLL_TIMEOUT_S = 20.0  # for what takes milliseconds, on a busy machine
POLL_S = 0.01


def poll(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition()` is true; fails after POLL_TIMEOUT_S."""
    deadline = time.monotonic() + POLL_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {POLL_TIMEOUT_S:g} s"
        time.sleep(POLL_S)


def told(error: BaseException) -> str:
    """All that a log would show of an error."""
    return repr(error) + "".join(traceback.format_exception(error))


def nested(levels: int) -> Document:
    document: Document = {}
    for _ in range(levels):
        document = {"a": document}
    return document


def ids(collection: Any) -> list[Any]:
    return [document["_id"] for document in collection.find({}, {"_id": 1}).sort({"_id": 1})]


# ── Connection ──────────────────────────────────────────────────────────────────────


def test_connecting_tells_version_and_kind_as_the_server_does(workspace: Any) -> None:
    info, hello = workspace.client.server_info(), workspace.client.admin.command("hello")
    assert workspace.server.version == tuple(info["versionArray"])
    assert workspace.server.kind == f"replica set {hello['setName']}"
    assert not workspace.server.on_atlas
    assert str(workspace.server).startswith(f"MongoDB {info['version']}, replica set")


def test_the_client_uses_api_version_1_and_waits_for_a_majority(workspace: Any) -> None:
    database = workspace.database()
    database.command("ping")  # a connection that has logged in
    with workspace.log.record() as commands:
        database.things.insert_one({"price": Decimal("3.50")})
        assert database.things.find_one({}, {"_id": 0}) == {"price": Decimal("3.50")}
    insert, find = commands
    assert (insert.command_name, find.command_name) == ("insert", "find")
    assert insert.command["writeConcern"] == {"w": "majority", "j": True}
    assert insert.command["apiVersion"] == find.command["apiVersion"] == "1"
    assert 0 < find.command["maxTimeMS"] <= 20_000  # the operation's deadline


def test_the_log_collects_inside_the_block_alone_and_from_any_thread(workspace: Any) -> None:
    ping = workspace.client.admin.command
    ping("ping")
    with workspace.log.record() as commands, ThreadPoolExecutor(1) as threads:
        ping("ping")
        threads.submit(ping, "ping").result()
    ping("ping")
    assert [event.command_name for event in commands] == ["ping", "ping"]


def test_a_closed_workspace_leaves_no_database_and_no_client(
    workspace: Any, mongo_uri: str
) -> None:
    first, second = workspace.database(), workspace.database()
    assert first.name != second.name
    for database in (first, second):
        database.things.insert_one({})
    with mongo_client(mongo_uri) as other:
        assert {first.name, second.name} <= set(other.list_database_names())
        workspace.close()
        assert not {first.name, second.name} & set(other.list_database_names())
    with pytest.raises(pymongo.errors.InvalidOperation):
        first.things.find_one()


def test_a_database_that_cannot_be_dropped_is_named_in_a_warning(
    workspace: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = workspace.database().name
    refused = OperationFailure("not you", 13)

    def refuse(_name: str) -> None:
        raise refused

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(workspace.client, "drop_database", refuse)
        workspace.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert name in caplog.text


# ── Documents that do not outgrow themselves ────────────────────────────────────────


def test_a_bounded_push_keeps_the_newest(database: Database[Document]) -> None:
    database.logs.insert_one({"_id": 1, "events": []})
    for n in range(30):
        database.logs.update_one({"_id": 1}, app.push_bounded("events", n, 5))
    assert database.logs.find_one({"_id": 1}) == {"_id": 1, "events": [25, 26, 27, 28, 29]}


def test_a_bucket_holds_a_page_and_minute_with_its_count_and_sum(
    database: Database[Document],
) -> None:
    start = datetime(2025, 1, 1, 12, 0, 59, tzinfo=UTC)
    seen = [("/", 0, 1.5), ("/", 1, 2.5), ("/cart", 0, 4.0), ("/", 30, 8.0)]  # page, seconds, ms
    for page, seconds, ms in seen:
        load = {"at": start + timedelta(seconds=seconds), "meta": {"page": page}, "ms": ms}
        database.buckets.update_one(*app.minute_bucket(load), upsert=True)
    stored = database.buckets.find({}, {"_id": 0}).sort({"page": 1, "minute": 1})
    noon = start.replace(second=0)
    next_ = noon + timedelta(minutes=1)
    assert list(stored) == [
        {"page": "/", "minute": noon, "loads": [{"s": 59, "ms": 1.5}], "count": 1, "sum_ms": 1.5},
        {"page": "/", "minute": next_, "loads": [{"s": 0, "ms": 2.5}, {"s": 29, "ms": 8.0}],
         "count": 2, "sum_ms": 10.5},
        {"page": "/cart", "minute": noon, "loads": [{"s": 59, "ms": 4.0}], "count": 1,
         "sum_ms": 4.0},
    ]  # fmt: skip


def test_a_documents_size_is_that_of_its_bson(database: Database[Document]) -> None:
    document = {"_id": 1, "name": "Gdańsk", "list": list(range(100))}
    database.things.insert_one(document)
    assert app.document_size(database.things, 1) == len(bson.encode(document))


# ── CollectionManager ───────────────────────────────────────────────────────────────


@pytest.fixture
def manager(database: Database[Document]) -> Any:
    """With a collection `things` of SCHEMA."""
    made = app.CollectionManager(database)
    made.create("things", SCHEMA)
    return made


def options_of(database: Database[Document], name: str) -> Any:
    """As the server's catalogue has them."""
    return next(iter(database.list_collections(filter={"name": name})))["options"]


REFUSED: dict[str, tuple[Document, str]] = {
    "missing": ({"name": SECRET}, "document: lacks n"),
    "type": ({"n": SECRET}, "n: bsonType int"),
    "minimum": ({"n": -1}, "n: minimum 0"),
    "two at once": ({"name": SECRET * 3}, "document: lacks n"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_refused_document_is_told_by_its_rules_with_code_121(
    manager: Any, database: Database[Document], case: tuple[Document, str]
) -> None:
    document, words = case
    with pytest.raises(app.RefusedBySchema) as caught:
        manager.insert("things", dict(document))
    assert caught.value.code == 121
    assert words in str(caught.value)
    assert SECRET not in told(caught.value)
    assert database.things.count_documents({}) == 0


def test_a_valid_document_is_stored_and_its_id_returned(
    manager: Any, database: Database[Document]
) -> None:
    assert manager.insert("things", {"_id": 5, "n": 1}) == 5
    made = manager.insert("things", {"n": 2})
    assert isinstance(made, ObjectId)
    assert database.things.find_one({"_id": made}) == {"_id": made, "n": 2}


def test_a_second_document_of_the_same_key_is_a_duplicate_that_names_no_value(
    manager: Any, database: Database[Document]
) -> None:
    database.things.create_index("name", unique=True)
    manager.insert("things", {"_id": 1, "n": 1, "name": SECRET})
    for document, field in (({"_id": 1, "n": 2}, "_id"), ({"n": 2, "name": SECRET}, "name")):
        with pytest.raises(app.DuplicateKey, match=f"taken: {field} ") as caught:
            manager.insert("things", document)
        assert caught.value.code == 11000
        assert SECRET not in told(caught.value)
    assert ids(database.things) == [1]


def test_creating_twice_is_an_error_that_keeps_the_first(
    manager: Any, database: Database[Document]
) -> None:
    with pytest.raises(app.DatabaseError):
        manager.create("things", {"required": ["other"]})
    assert options_of(database, "things")["validator"] == {"$jsonSchema": SCHEMA}


def test_warn_stores_and_error_refuses(manager: Any, database: Database[Document]) -> None:
    manager.tighten("things", SCHEMA, action="warn")
    assert manager.insert("things", {"_id": 1, "n": -1}) == 1
    manager.tighten("things", SCHEMA)
    with pytest.raises(app.RefusedBySchema):
        manager.insert("things", {"_id": 2, "n": -1})
    assert ids(database.things) == [1]


def test_tightening_checks_no_stored_document_and_the_count_says_how_many_break_it(
    manager: Any, database: Database[Document]
) -> None:
    database.things.insert_many([{"_id": n, "n": n} for n in range(10)])
    tighter = {"required": ["n"], "properties": {"n": {"minimum": 7}}}
    assert manager.violations("things", tighter) == 7
    manager.tighten("things", tighter)
    assert database.things.count_documents({}) == 10
    assert options_of(database, "things")["validator"] == {"$jsonSchema": tighter}


@pytest.mark.parametrize(("level", "allowed"), [("moderate", True), ("strict", False)])
def test_moderate_spares_updates_of_what_was_invalid_before(
    manager: Any, database: Database[Document], level: str, allowed: bool
) -> None:
    database.things.insert_many([{"_id": 1, "n": 1}, {"_id": 2, "n": 8}])
    tighter = {"required": ["n"], "properties": {"n": {"minimum": 7}}}
    manager.tighten("things", tighter, level=level)
    update = {"_id": 1}, {"$set": {"name": "old"}}
    if allowed:
        assert database.things.update_one(*update).modified_count == 1
    else:
        with pytest.raises(OperationFailure, match="failed validation"):
            database.things.update_one(*update)
    with pytest.raises(app.RefusedBySchema), app.domain_errors():  # it was valid: either refuses
        database.things.update_one({"_id": 2}, {"$set": {"n": 1}})
    with pytest.raises(app.RefusedBySchema):
        manager.insert("things", {"n": 1})


def test_every_seeded_customer_fits_the_schema_and_every_bad_one_breaks_it(
    shop: Any, database: Database[Document]
) -> None:
    manager = app.CollectionManager(shop.database)
    assert manager.violations("customers", app.CUSTOMER_SCHEMA) == 0
    good = next(shop.generate("customers"))
    database.customers.insert_many(
        [{**good, "_id": n, **bad} for n, bad in enumerate(app.BAD_CUSTOMERS.values())]
    )
    count = app.CollectionManager(database).violations("customers", app.CUSTOMER_SCHEMA)
    assert count == len(app.BAD_CUSTOMERS) == 4


# ── BulkManager ─────────────────────────────────────────────────────────────────────


def test_an_ordered_write_stops_at_a_refusal_and_an_unordered_one_goes_on(
    database: Database[Document],
) -> None:
    inserts = [InsertOne({"_id": n, "name": SECRET}) for n in (1, 2, 1, 3, 2, 4)]
    counts, refused = app.BulkManager(database.ordered).write(inserts, ordered=True)
    assert counts["nInserted"] == 2
    assert [(r.index, r.code) for r in refused] == [(2, 11000)]
    assert ids(database.ordered) == [1, 2]
    counts, refused = app.BulkManager(database.free).write(inserts, ordered=False)
    assert counts["nInserted"] == 4
    assert [(r.index, r.code, r.reason) for r in refused] == [
        (2, 11000, "taken: _id (code 11000)"), (4, 11000, "taken: _id (code 11000)"),
    ]  # fmt: skip
    assert ids(database.free) == [1, 2, 3, 4]
    assert SECRET not in repr(refused)


def test_upserts_may_be_repeated(database: Database[Document]) -> None:
    writes = [UpdateOne({"_id": n}, {"$set": {"price": Decimal(n)}}, upsert=True) for n in range(5)]
    manager = app.BulkManager(database.things)
    (first, _), (second, refused) = (manager.write(writes, ordered=False) for _ in range(2))
    assert (first["nUpserted"], first["nMatched"]) == (5, 0)
    assert (second["nUpserted"], second["nMatched"], second["nModified"]) == (0, 5, 0)
    assert refused == []
    assert [row["price"] for row in database.things.find().sort({"_id": 1})] == list(range(5))


def test_a_write_refused_by_the_schema_says_which_rule(
    manager: Any, database: Database[Document]
) -> None:
    writes = [InsertOne({"_id": 1, "n": 1}), InsertOne({"_id": 2, "n": -1, "name": SECRET})]
    counts, refused = app.BulkManager(database.things).write(writes, ordered=False)
    assert counts["nInserted"] == 1
    assert refused == [app.Rejected(1, 121, "n: minimum 0 (code 121)")]


def test_an_operation_that_is_refused_as_a_whole_is_a_domain_error(
    database: Database[Document],
) -> None:
    inserts = [InsertOne({"name": SECRET})]
    with pytest.raises(app.DatabaseError) as caught:
        app.BulkManager(database["system.views"]).write(inserts, ordered=True)
    assert isinstance(caught.value.code, int)
    assert SECRET not in told(caught.value)


UNMET: dict[str, Callable[[Any], object]] = {
    "write": lambda manager: manager.write([InsertOne({"_id": 1})], ordered=False),
    "load": lambda manager: manager.load([{"_id": 1}]),
}


@pytest.mark.parametrize("work", UNMET.values(), ids=UNMET)
def test_an_unmet_write_concern_is_an_error_and_no_success(
    database: Database[Document], work: Callable[[Any], object]
) -> None:
    fussy = database.get_collection("things", write_concern=WriteConcern(w=50, wtimeout=200))
    with pytest.raises(app.DatabaseError) as caught:
        work(app.BulkManager(fussy))
    assert caught.value.code in (64, 100)  # WriteConcernFailed, UnsatisfiableWriteConcern


def test_batches_are_sent_one_by_one_and_told(workspace: Any) -> None:
    database, seen = workspace.database(), list[int]()
    database.command("ping")  # a connection that has logged in
    with workspace.log.record() as commands:
        report = app.BulkManager(database.things, most=40).load(
            ({"_id": n} for n in range(100)), on_batch=seen.append
        )
    assert (report.stored, seen) == (100, [40, 40, 20])
    assert [event.command_name for event in commands] == ["insert"] * 3
    assert all(event.command["ordered"] is False for event in commands)


# ── IndexManager ────────────────────────────────────────────────────────────────────


@pytest.fixture
def people(database: Database[Document]) -> Any:
    """An IndexManager over a thousand people, ten of each age."""
    database.people.insert_many(
        [{"_id": n, "age": n % 100, "name": f"p{n}", "email": f"{n // 2}@x"} for n in range(1_000)]
    )
    return app.IndexManager(database.people)


def test_a_plan_counts_what_was_examined_and_names_the_index(people: Any) -> None:
    before = people.plan({"age": 7})
    assert (before.words, before.index) == ("COLLSCAN", None)
    assert (before.keys, before.docs, before.returned) == (0, 1_000, 10)
    assert people.ensure(IndexModel("age", name="by_age")) == "by_age"
    after = people.plan({"age": 7})
    assert (after.words, after.index) == ("FETCH ← IXSCAN", "by_age")
    assert (after.keys, after.docs, after.returned) == (10, 10, 10)
    covered = people.plan({"age": 7}, projection={"_id": 0, "age": 1})
    assert (covered.stages[0], covered.docs) == ("PROJECTION_COVERED", 0)
    scan = people.plan({"age": 7}, hint={"$natural": 1}, sort={"name": 1}, limit=3)
    assert (scan.words, scan.docs, scan.returned) == ("SORT ← COLLSCAN", 1_000, 3)


def test_each_branch_of_an_or_has_its_index(people: Any) -> None:
    people.ensure(IndexModel("age", name="by_age"))
    plan = people.plan({"$or": [{"age": 7}, {"_id": 500}]})
    assert plan.stages.count("IXSCAN") == 2
    assert (plan.keys, plan.docs, plan.returned) == (11, 11, 11)


def test_a_hidden_index_is_not_used_and_comes_back_unharmed(people: Any) -> None:
    people.ensure(IndexModel("age", name="by_age"))
    people.hide("by_age", True)
    assert people.plan({"age": 7}).words == "COLLSCAN"
    people.hide("by_age", False)
    assert people.plan({"age": 7}).index == "by_age"


def test_usage_counts_the_queries_that_an_index_served(
    people: Any, database: Database[Document]
) -> None:
    for name in ("age", "name"):
        people.ensure(IndexModel(name, name=name))
    for age in range(5):
        list(database.people.find({"age": age}))
    assert people.usage() == {"_id_": 0, "age": 5, "name": 0}


def test_ensuring_again_changes_nothing_and_dropping_drops(
    people: Any, database: Database[Document]
) -> None:
    model = IndexModel("age", name="by_age")
    assert people.ensure(model) == people.ensure(model) == "by_age"
    assert database.people.index_information().keys() == {"_id_", "by_age"}
    people.drop("by_age")
    assert database.people.index_information().keys() == {"_id_"}
    with pytest.raises(app.DatabaseError, match="IndexNotFound") as caught:
        people.drop("by_age")
    assert caught.value.code == 27
    with pytest.raises(app.DatabaseError):
        people.hide("by_age", True)


CONFLICTS = {
    "other key": IndexModel("name", name="by_age"),
    "other options": IndexModel("age", name="by_age", sparse=True),
    "other name": IndexModel("age", name="by_years"),
}


@pytest.mark.parametrize("model", CONFLICTS.values(), ids=CONFLICTS)
def test_an_index_that_conflicts_is_an_error_that_keeps_the_first(
    people: Any, database: Database[Document], model: IndexModel
) -> None:
    people.ensure(IndexModel("age", name="by_age"))
    before = database.people.index_information()
    with pytest.raises(app.DatabaseError, match="Conflict") as caught:
        people.ensure(model)
    assert caught.value.code in (85, 86)  # IndexOptionsConflict, IndexKeySpecsConflict
    assert database.people.index_information() == before


def test_a_unique_index_over_duplicates_is_refused_without_a_value(people: Any) -> None:
    with pytest.raises(app.DuplicateKey, match="taken: email") as caught:
        people.ensure(IndexModel("email", unique=True))
    assert caught.value.code == 11000
    assert "@x" not in told(caught.value)


def test_a_plan_of_a_query_that_the_server_refuses_is_a_domain_error(people: Any) -> None:
    with pytest.raises(app.DatabaseError) as caught:
        people.plan({"$text": {"$search": SECRET}})
    assert caught.value.code == 27  # IndexNotFound: no text index
    assert SECRET not in told(caught.value)


# ── AggregationManager ──────────────────────────────────────────────────────────────


def test_the_bytes_of_an_answer_are_those_of_its_documents(database: Database[Document]) -> None:
    stored = [{"_id": n, "price": Decimal(n) / 4, "text": "x" * n} for n in range(250)]
    database.things.insert_many(stored)
    manager = app.AggregationManager(database)
    answer = manager.run("things", [{"$match": {"_id": {"$lt": 200}}}, {"$sort": {"_id": 1}}])
    assert answer == stored[:200]  # more than the first batch of 101
    size = sum(len(bson.encode(each, codec_options=app.CODEC)) for each in stored[:200])
    assert manager.bytes_moved == size
    fetched = list(manager.fetch("things", ["price"]))
    expected = [{"price": each["price"]} for each in stored]
    assert sorted(fetched, key=lambda each: each["price"]) == expected
    size += sum(len(bson.encode(each, codec_options=app.CODEC)) for each in fetched)
    assert manager.bytes_moved == size


# ── TimeSeriesManager ───────────────────────────────────────────────────────────────


def test_a_series_has_the_options_that_were_asked_for(database: Database[Document]) -> None:
    manager = app.TimeSeriesManager(database)
    manager.create("series", granularity="hours", expire_after=timedelta(days=2, seconds=5))
    options = options_of(database, "series")
    assert options["expireAfterSeconds"] == 2 * 86_400 + 5
    made = {k: options["timeseries"][k] for k in ("timeField", "metaField", "granularity")}
    assert made == {"timeField": "at", "metaField": "meta", "granularity": "hours"}
    with pytest.raises(app.DatabaseError):
        manager.create("series", granularity="minutes", expire_after=DAY)
    assert options_of(database, "series") == options
    with pytest.raises(app.DatabaseError):
        manager.create("other", granularity="weeks", expire_after=DAY)


def test_an_index_spares_the_buckets_of_other_pages(database: Database[Document]) -> None:
    manager = app.TimeSeriesManager(database)
    manager.create("series", granularity="minutes", expire_after=3_650 * DAY)
    start = datetime(2025, 1, 1, tzinfo=UTC)
    database.series.insert_many([
        {"at": start + day * DAY, "meta": {"page": page}, "ms": 1.0}
        for day in range(10) for page in "abcde"
    ])  # fmt: skip
    of_one_page = {"meta.page": "c"}
    buckets = database["system.buckets.series"].count_documents({})
    of_page = database["system.buckets.series"].count_documents({"meta.page": "c"})
    assert 0 < of_page < buckets
    assert manager.buckets_examined("series", of_one_page) == buckets
    database.series.create_index({"meta.page": 1, "at": 1})
    assert manager.buckets_examined("series", of_one_page) == of_page


def test_stored_bytes_are_those_of_the_catalogue(database: Database[Document]) -> None:
    database.things.insert_many([{"x": "y" * 500} for _ in range(500)])
    database.things.create_index("x")
    database.client.admin.command("fsync")  # a checkpoint now, so that none comes in between
    stats = next(iter(database.things.aggregate([{"$collStats": {"storageStats": {}}}])))
    storage = stats["storageStats"]
    expected = storage["storageSize"], storage["totalIndexSize"]
    assert app.TimeSeriesManager(database).stored_bytes("things") == expected


# ── Ledger ──────────────────────────────────────────────────────────────────────────


def balances(database: Database[Document]) -> dict[Any, Decimal]:
    return {row["_id"]: row["balance"] for row in database.accounts.find()}


def open_accounts(database: Database[Document], **opening: int) -> None:
    database.accounts.insert_many(
        [{"_id": name, "balance": Decimal(balance)} for name, balance in opening.items()]
    )


@contextmanager
def holding(database: Database[Document], account: str) -> Iterator[Callable[[], None]]:
    """Another transaction has written `account`; the function commits it."""
    with database.client.start_session() as session:
        session.start_transaction()
        database.accounts.update_one({"_id": account}, {"$set": {"held": True}}, session=session)
        yield session.commit_transaction
        if session.in_transaction:
            session.abort_transaction()


def test_the_total_is_read_from_one_snapshot(workspace: Any) -> None:
    database = workspace.database()
    ledger = app.Ledger(database.accounts)
    assert ledger.total() == 0
    open_accounts(database, ada=10, bob=5)
    database.accounts.update_one({"_id": "ada"}, {"$inc": {"balance": Decimal("0.05")}})
    with workspace.log.record() as commands:
        assert ledger.total() == Decimal("15.05")
    assert [event.command_name for event in commands] == ["aggregate"]
    assert commands[0].command["readConcern"]["level"] == "snapshot"


def test_a_transfer_is_one_majority_transaction_on_a_snapshot(workspace: Any) -> None:
    database = workspace.database()
    open_accounts(database, ada=10, bob=5)
    with workspace.log.record() as commands:
        assert app.Ledger(database.accounts).transfer("ada", "bob", Decimal(1)) == 1
    assert [event.command_name for event in commands] == ["update", "update", "commitTransaction"]
    first, second, commit = (event.command for event in commands)
    assert first["startTransaction"] is True
    assert first["readConcern"]["level"] == "snapshot"
    assert first["txnNumber"] == second["txnNumber"] == commit["txnNumber"]
    assert commit["writeConcern"]["w"] == "majority"
    assert commit["writeConcern"]["j"] is True


def test_a_transfer_that_meets_another_transaction_is_repeated_until_it_goes_through(
    workspace: Any,
) -> None:
    database = workspace.database()
    open_accounts(database, ada=10, bob=5)
    ledger = app.Ledger(database.accounts)
    with (
        ThreadPoolExecutor(1) as threads,
        holding(database, "ada") as commit,
        workspace.log.record() as commands,
    ):
        future = threads.submit(ledger.transfer, "ada", "bob", Decimal(3))
        # The driver ends each attempt that met a write conflict, and begins another.
        poll(
            lambda: sum("startTransaction" in event.command for event in tuple(commands)) >= 2,
            "a second attempt",
        )
        commit()
        assert future.result() >= 2
    assert balances(database) == {"ada": 7, "bob": 8}


def test_money_stays_the_same_under_concurrent_transfers(database: Database[Document]) -> None:
    names = ["ada", "bob", "cid"]
    open_accounts(database, ada=100, bob=100, cid=100)
    ledger = app.Ledger(database.accounts)
    barrier = threading.Barrier(3, timeout=20)

    def move(n: int) -> None:
        barrier.wait()
        for step in range(10):
            ledger.transfer(names[n], names[(n + 1 + step % 2) % 3], Decimal("0.10") * (n + 1))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(move, range(3)))
    # Each pays ten times, five to either of the others.
    assert balances(database) == {
        "ada": 100 - Decimal("1.00") + Decimal("1.00") + Decimal("1.50"),
        "bob": 100 - Decimal("2.00") + Decimal("0.50") + Decimal("1.50"),
        "cid": 100 - Decimal("3.00") + Decimal("0.50") + Decimal("1.00"),
    }


def test_two_naive_transfers_lose_one_update(database: Database[Document]) -> None:
    open_accounts(database, ada=100, bob=100, cid=0)

    def the_other() -> None:  # reads and writes between the reading and writing of the first
        app.transfer_naively(database.accounts, "bob", "cid", Decimal(10), lambda: None)

    app.transfer_naively(database.accounts, "ada", "cid", Decimal(10), the_other)
    assert balances(database) == {"ada": 90, "bob": 90, "cid": 10}


def test_a_conflict_is_labelled_and_leaves_both_without_effect(
    database: Database[Document],
) -> None:
    database.accounts.insert_one({"_id": 1, "balance": Decimal(5)})
    error = app.provoke_conflict(database.accounts)
    assert error.code == 112  # WriteConflict
    assert "TransientTransactionError" in error.labels
    assert balances(database) == {1: 5}


# ── ChangeConsumer ──────────────────────────────────────────────────────────────────


@pytest.fixture
def consumer(database: Database[Document]) -> Any:
    """Of `orders`, started."""
    made = app.ChangeConsumer(database.orders, database.tokens, "test")
    made.start()
    return made


def again(database: Database[Document]) -> Any:
    """The consumer in a new process: only what is stored is known."""
    return app.ChangeConsumer(database.orders, database.tokens, "test")


class Effects:
    """A handler whose effect is in the database, and that says what it was given."""

    def __init__(self, database: Database[Document], *failures: Exception) -> None:
        self._effects, self._failures = database.effects, list(failures)
        self.given: list[tuple[str, Any]] = []

    def __call__(self, change: Any, session: Any) -> None:
        self.given.append((change["operationType"], change["documentKey"]["_id"]))
        self._effects.insert_one({"of": change["documentKey"]["_id"]}, session=session)
        if self._failures:
            raise self._failures.pop(0)

    def stored(self) -> list[Any]:
        return [effect["of"] for effect in self._effects.find().sort({"_id": 1})]


def test_changes_since_the_start_come_in_order_whenever_it_runs(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(3)])
    database.orders.update_one({"_id": 1}, {"$set": {"x": 1}})
    database.others.insert_one({"_id": "of another collection"})
    database.orders.delete_one({"_id": 0})
    database.orders.replace_one({"_id": 2}, {"y": 2})
    handle = Effects(database)
    assert app.consume(consumer, handle, 6) == 6
    assert handle.given == [
        ("insert", 0), ("insert", 1), ("insert", 2), ("update", 1), ("delete", 0), ("replace", 2),
    ]  # fmt: skip


def test_a_stopped_consumer_goes_on_where_it_was_and_misses_nothing(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(10)])
    handle = Effects(database)
    assert app.consume(consumer, handle, 4) == 4
    database.orders.insert_many([{"_id": n} for n in range(10, 15)])  # while it is away
    assert app.consume(again(database), handle, 11) == 11
    assert handle.stored() == list(range(15))


def test_starting_again_keeps_the_stored_position(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_one({"_id": 1})
    second = again(database)
    second.start()
    handle = Effects(database)
    app.consume(second, handle, 1)
    assert handle.stored() == [1]


def test_a_handler_that_raises_has_no_effect_and_its_change_comes_again(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(3)])
    handle = Effects(database, LookupError("mine"))
    with pytest.raises(LookupError, match="mine"):
        app.consume(consumer, handle, 3)
    assert handle.stored() == []
    app.consume(again(database), handle, 3)
    assert handle.given == [("insert", n) for n in (0, 0, 1, 2)]
    assert handle.stored() == [0, 1, 2]


def test_an_effect_and_its_position_are_one_transaction(
    consumer: Any, database: Database[Document], workspace: Any
) -> None:
    database.orders.insert_one({"_id": 1})
    with workspace.log.record() as commands:
        app.consume(consumer, Effects(database), 1)
    written = [e.command for e in commands if e.command_name in ("insert", "update")]
    effect, position = written
    assert (effect["insert"], position["update"]) == ("effects", "tokens")
    assert effect["startTransaction"] is True
    assert effect["autocommit"] is position["autocommit"] is False
    assert effect["txnNumber"] == position["txnNumber"]
    (commit,) = (e.command for e in commands if e.command_name == "commitTransaction")
    assert commit["txnNumber"] == position["txnNumber"]
    assert commit["writeConcern"] == {"w": "majority", "j": True}


def test_an_error_of_the_driver_in_a_handler_leaves_as_the_domains(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_one({"_id": 1})
    details = {"code": 11000, "keyPattern": {"email": 1}, "keyValue": {"email": SECRET}}
    handle = Effects(database, DuplicateKeyError(SECRET, 11000, details))
    with pytest.raises(app.DuplicateKey, match="taken: email") as caught:
        app.consume(consumer, handle, 1)
    assert SECRET not in told(caught.value)
    assert handle.stored() == []


def test_a_lost_connection_is_ridden_out_and_the_effect_is_there_once(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(2)])
    handle = Effects(database, AutoReconnect("gone"))
    assert app.consume(consumer, handle, 2) == 2
    assert handle.given == [("insert", n) for n in (0, 0, 1)]
    assert handle.stored() == [0, 1]


def test_a_connection_lost_again_and_again_is_given_up(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_one({"_id": 1})
    lost = [AutoReconnect("gone") for _ in range(app.MOST_FAILURES)]
    handle = Effects(database, *lost)
    with pytest.raises(app.Unreachable):
        app.consume(consumer, handle, 1)
    assert len(handle.given) == app.MOST_FAILURES
    assert handle.stored() == []


@pytest.mark.parametrize("ending", ["drop", "rename"])
def test_the_end_of_the_collection_is_lost_history_until_a_restart(
    consumer: Any, database: Database[Document], ending: str
) -> None:
    database.orders.insert_one({"_id": 1})
    if ending == "drop":
        database.orders.drop()
    else:
        database.orders.rename("elsewhere")
    handle = Effects(database)
    with pytest.raises(app.HistoryLost, match=ending):
        app.consume(consumer, handle, 2)
    assert handle.stored() == [1]
    with pytest.raises(app.HistoryLost):  # also for the next process
        app.consume(again(database), handle, 1)
    database.orders.insert_one({"_id": "before the restart"})
    restarted = again(database)
    restarted.restart()
    database.orders.insert_one({"_id": "after"})
    app.consume(restarted, handle, 1)
    assert handle.stored() == [1, "after"]


def test_a_quiet_collection_keeps_its_place_as_others_write(
    consumer: Any, database: Database[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "KEEP_UP_S", 0.0)

    def stored() -> Any:
        return (database.tokens.find_one({"_id": "test"}) or {})["token"]

    first = stored()
    database.others.insert_many([{"_id": n} for n in range(10)])
    handle = Effects(database)
    seen: list[Any] = []

    def stop(_handled: int) -> bool:
        seen.append(stored())
        return seen[-1] != first or len(seen) > 200

    assert consumer.run(handle, stop) == 0
    assert seen[-1]["_data"] > first["_data"]
    database.orders.insert_one({"_id": 1})
    app.consume(again(database), handle, 1)
    assert handle.stored() == [1]


def test_a_change_that_does_not_come_is_a_timeout(consumer: Any) -> None:
    with pytest.raises(app.TimedOut, match="0 of 1 changes"):
        app.consume(consumer, lambda change, session: None, 1, timeout_s=0.3)


def test_the_copying_handler_keeps_a_copy(consumer: Any, database: Database[Document]) -> None:
    database.orders.insert_many([{"_id": n, "n": 0} for n in range(5)])
    database.orders.update_many({}, {"$inc": {"n": 1}})
    database.orders.delete_one({"_id": 0})  # its update finds no document any more
    database.orders.insert_one({"_id": 9})

    def handle(change: Any, session: Any) -> None:
        app.copy_change(database["copy"], change, session)

    app.consume(consumer, handle, 12)
    assert list(database["copy"].find().sort({"_id": 1})) == list(
        database.orders.find().sort({"_id": 1})
    )
    assert list(database.counts.find()) == [{"_id": "copy", "events": 12}]


def test_resynchronising_copies_what_is_there_and_goes_on_from_there(
    consumer: Any, database: Database[Document]
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(3)])
    database["copy"].insert_one({"_id": "stale"})
    app.resynchronise(consumer, database.orders, database["copy"])
    assert ids(database["copy"]) == [0, 1, 2]
    database.orders.delete_one({"_id": 1})
    handle = Effects(database)
    app.consume(consumer, handle, 1)
    assert handle.given == [("delete", 1)]


# ── The contract: through the synchronous managers and through AsyncManager ─────────

TOO_DEEP = 250  # levels: the server refuses the whole command, the client encodes it


def bad_documents() -> list[tuple[Document, int | None, str]]:
    """(document, code, reason): each is refused for a reason of its own."""
    return [
        ({"n": -1, "name": SECRET}, 121, "n: minimum 0"),
        ({"name": SECRET}, 121, "document: lacks n"),
        ({"n": 1, "tags": {SECRET}}, None, "not BSON"),
        ({"n": 2**70, "name": SECRET}, None, "not BSON"),
        ({"_id": 0, "n": 1, "name": SECRET}, 11000, "taken: _id, by another document"),
        ({"n": 1, "email": f"{SECRET}@x"}, 11000, "taken: email"),
        ({"n": 1, "x": b"\0" * (16 * MIB)}, None, "above 16 MiB"),
        ({"n": 1, "deep": nested(TOO_DEEP), "name": SECRET}, 15, ""),
        ({"_id": [1], "n": 1, "name": SECRET}, 53, ""),  # an array is no _id
    ]


def test_a_bad_document_costs_only_itself(managers: Managers) -> None:
    app.CollectionManager(managers.database).create("things", SCHEMA)
    managers.database.things.create_index("email", unique=True, sparse=True)
    managers.database.things.insert_one({"_id": "first", "n": 1, "email": f"{SECRET}@x"})
    documents: list[Document] = [{"_id": n, "n": n} for n in range(100)]
    expected = {}
    for place, (bad, code, reason) in enumerate(bad_documents()):
        documents.insert(1 + 11 * place, bad)  # between good ones, and two next to each other
        expected[1 + 11 * place] = code, reason
    report = managers.load("things", iter(documents))
    assert (report.stored, report.already_there) == (100, 0)
    assert [rejected.index for rejected in report.rejected] == list(expected)
    for rejected in report.rejected:
        code, reason = expected[rejected.index]
        assert rejected.code == code
        assert reason in rejected.reason
    assert SECRET not in repr(report)
    assert managers.database.things.count_documents({"_id": {"$type": "int"}}) == 100
    # What was good is there, and loading it all again stores nothing twice.
    repeated = managers.load("things", iter(documents))
    assert (repeated.stored, repeated.already_there) == (0, 100)
    assert repeated.rejected == report.rejected


def test_neighbours_that_are_too_deep_are_each_found(managers: Managers) -> None:
    deep = {2, 3, 9}
    documents = [{"_id": n, "d": nested(TOO_DEEP) if n in deep else 1} for n in range(10)]
    report = managers.load("things", documents)
    assert report.stored == 7
    assert [(r.index, r.code) for r in report.rejected] == [(n, 15) for n in sorted(deep)]
    assert ids(managers.database.things) == [n for n in range(10) if n not in deep]


def test_a_document_of_16_mib_is_stored_and_one_byte_more_is_not(managers: Managers) -> None:
    around = len(bson.encode({"_id": 1, "x": b""}))
    largest, larger = (
        {"_id": n, "x": b"\0" * (16 * MIB - around + extra)} for n, extra in ((1, 0), (2, 1))
    )
    report = managers.load("things", [largest, larger])
    assert report.stored == 1
    assert [(r.index, r.code) for r in report.rejected] == [(1, None)]
    assert app.document_size(managers.database.things, 1) == 16 * MIB


def test_a_load_that_was_cut_off_can_be_repeated_whole(managers: Managers) -> None:
    documents = [{"_id": n, "price": Decimal(n)} for n in range(50)]

    def cut_off() -> Iterator[Document]:
        yield from documents[:20]
        raise ConnectionResetError

    assert managers.load("things", documents[:20]).stored == 20
    with pytest.raises(ConnectionResetError):
        managers.load("others", cut_off())
    report = managers.load("things", documents)
    assert (report.stored, report.already_there, report.rejected) == (30, 20, [])
    assert managers.database.things.find_one({"_id": 7}) == documents[7]


def test_a_document_twice_in_one_load_is_stored_once(managers: Managers) -> None:
    twice = {"_id": {"a": 1, "b": [2]}, "n": 1}  # an _id that cannot be hashed
    report = managers.load("things", [twice, {"_id": 2}, twice, {**twice, "n": 2}])
    assert (report.stored, report.already_there) == (2, 1)
    assert [(r.index, r.code) for r in report.rejected] == [(3, 11000)]


def test_keys_that_look_alike_are_told_apart(managers: Managers) -> None:
    keys = [1, "1", True, {"a": 1}, {"a": "1"}, None, "", 1_000, 1_001]
    documents = [{"_id": key, "place": place} for place, key in enumerate(keys)]
    assert managers.load("things", documents).stored == len(keys)
    again = managers.load("things", documents)
    assert (again.stored, again.already_there, again.rejected) == (0, len(keys), [])


def test_documents_without_an_id_get_one(managers: Managers) -> None:
    documents = [{"n": n} for n in range(3)]
    assert managers.load("things", documents).stored == 3
    assert managers.load("things", documents).stored == 3  # and so are stored again
    assert all(isinstance(key, ObjectId) for key in ids(managers.database.things))
    assert managers.database.things.count_documents({}) == 6


def test_nothing_to_load_is_no_error(managers: Managers) -> None:
    assert managers.load("things", []) == app.LoadReport()


def test_an_unmet_deadline_of_a_load_is_an_error_of_the_domain(make_managers: MakeManagers) -> None:
    hurried = make_managers(0.001)  # less than a round trip with encoding and a flush
    documents = [{"_id": n, "x": b"\0" * MIB} for n in range(20)]
    with pytest.raises((app.TimedOut, app.Unreachable)):  # the second: while choosing a server
        hurried.load("things", documents)


def test_a_pipeline_answers_with_decimals_and_aware_times(managers: Managers) -> None:
    at = datetime(2025, 1, 1, tzinfo=UTC)
    managers.load("things", [{"_id": n, "price": Decimal("0.10"), "at": at} for n in range(300)])
    total = {"$group": {"_id": "$at", "total": {"$sum": "$price"}}}
    assert managers.run("things", [total]) == [{"_id": at, "total": Decimal("30.00")}]
    whole = managers.run("things", [{"$sort": {"_id": 1}}, {"$project": {"_id": 1}}])
    assert whole == [{"_id": n} for n in range(300)]  # past the first batch


def test_a_pipeline_may_write_what_it_computes(managers: Managers) -> None:
    managers.load("things", [{"_id": n, "kind": n % 2, "price": Decimal(n)} for n in range(5)])
    group = {"$group": {"_id": "$kind", "total": {"$sum": "$price"}}}
    merge = {"$merge": {"into": "totals", "whenMatched": "replace"}}
    for _ in range(2):
        assert managers.run("things", [group, merge]) == []
        rows = list(managers.database.totals.find().sort({"_id": 1}))
        assert rows == [{"_id": 0, "total": Decimal(6)}, {"_id": 1, "total": Decimal(4)}]


def test_a_malformed_pipeline_is_refused(managers: Managers) -> None:
    with pytest.raises(app.DatabaseError) as caught:
        managers.run("things", [{"$typo": 1}])
    assert caught.value.code == 40324  # unrecognized pipeline stage name


def test_a_pipeline_that_the_server_refuses_keeps_its_code(managers: Managers) -> None:
    managers.load("things", [{"_id": 1, "name": SECRET}])
    divide = {"$project": {"x": {"$add": ["$name", 1]}}}
    with pytest.raises(app.DatabaseError) as caught:
        managers.run("things", [divide])
    assert caught.value.code in (14, 16554)  # TypeMismatch, as versions differ
    assert SECRET not in told(caught.value)


def test_a_transfer_moves_money(managers: Managers) -> None:
    open_accounts(managers.database, ada=10, bob=5)
    assert managers.transfer("ada", "bob", Decimal("2.50")) == 1
    assert balances(managers.database) == {"ada": Decimal("7.50"), "bob": Decimal("7.50")}
    managers.transfer("ada", "bob", Decimal("7.50"))  # to the last cent
    assert balances(managers.database) == {"ada": 0, "bob": 15}
    managers.transfer("bob", "bob", Decimal(1))  # to oneself
    assert balances(managers.database) == {"ada": 0, "bob": 15}


def test_what_an_account_does_not_hold_is_not_moved(managers: Managers) -> None:
    open_accounts(managers.database, ada=10, bob=5)
    with pytest.raises(app.InsufficientFunds, match="ada"):
        managers.transfer("ada", "bob", Decimal("10.01"))
    assert balances(managers.database) == {"ada": 10, "bob": 5}


@pytest.mark.parametrize(("source", "target"), [("ada", "nobody"), ("nobody", "ada")])
def test_an_unknown_account_rolls_back_what_was_taken(
    managers: Managers, source: str, target: str
) -> None:
    open_accounts(managers.database, ada=10)
    with pytest.raises(app.UnknownAccount, match="nobody"):
        managers.transfer(source, target, Decimal(1))
    assert balances(managers.database) == {"ada": 10}


BAD_AMOUNTS = ["0", "-1", "0.001", "10.005", "NaN", "sNaN", "Infinity", "-Infinity", "1E-30"]


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_what_is_no_amount_of_money_is_not_moved(managers: Managers, amount: str) -> None:
    open_accounts(managers.database, ada=10, bob=5)
    with pytest.raises(ValueError, match="not an amount of money"):
        managers.transfer("ada", "bob", Decimal(amount))
    assert balances(managers.database) == {"ada": 10, "bob": 5}


def test_a_transfer_of_the_same_key_is_booked_once(managers: Managers) -> None:
    open_accounts(managers.database, ada=10, bob=5)
    managers.transfer("ada", "bob", Decimal(1), key=SECRET)
    with pytest.raises(app.DuplicateKey, match="taken: _id") as caught:
        managers.transfer("ada", "bob", Decimal(1), key=SECRET)
    assert SECRET not in told(caught.value)
    assert balances(managers.database) == {"ada": 9, "bob": 6}
    booked = {"_id": SECRET, "source": "ada", "target": "bob", "amount": Decimal(1)}
    assert list(managers.database.transfers.find()) == [booked]
    managers.transfer("ada", "bob", Decimal(1), key="another")
    assert balances(managers.database) == {"ada": 8, "bob": 7}


def test_a_transfer_that_failed_is_not_booked_and_its_key_can_be_used(managers: Managers) -> None:
    open_accounts(managers.database, ada=1, bob=0)
    with pytest.raises(app.InsufficientFunds):
        managers.transfer("ada", "bob", Decimal(2), key=1)
    assert managers.database.transfers.count_documents({}) == 0
    managers.database.accounts.update_one({"_id": "ada"}, {"$inc": {"balance": Decimal(1)}})
    managers.transfer("ada", "bob", Decimal(2), key=1)
    assert balances(managers.database) == {"ada": 0, "bob": 2}


def end_idle_transactions(client: pymongo.MongoClient[Any]) -> None:
    """A deadline leaves no time to abort: the server would do so after a minute, hold the locks,
    and keep in its cache what has changed since."""
    idle = client.admin.aggregate(
        [
            {"$currentOp": {"idleSessions": True, "allUsers": True}},
            {"$match": {"transaction.timeInactiveMicros": {"$gt": 0}, "type": "idleSession"}},
        ]
    )
    if sessions := [{"id": session["lsid"]["id"]} for session in idle]:
        client.admin.command("killSessions", sessions)


def test_a_transfer_that_another_holds_up_ends_with_its_deadline(
    make_managers: MakeManagers,
) -> None:
    managers = make_managers(0.5)
    database = managers.database
    open_accounts(database, ada=10, bob=5)
    with holding(database, "bob"), pytest.raises(app.TimedOut):
        managers.transfer("ada", "bob", Decimal(1))
    assert balances(database) == {"ada": 10, "bob": 5}
    end_idle_transactions(database.client)


# ── asyncio's own ───────────────────────────────────────────────────────────────────


def test_bounded_work_keeps_its_order_and_its_limit() -> None:
    running, most = 0, 0

    async def work(key: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running -= 1
        return key * key

    assert asyncio.run(app.bounded(range(50), work, 7)) == [n * n for n in range(50)]
    assert most == 7


def test_motor_and_pymongo_answer_the_same_function_alike(
    script: Any, shop: Any, mongo_uri: str
) -> None:
    expected = sum(
        (o["total"] for o in script.orders(shop.count)
         if o["country"] == "FR" and o["status"] == "paid"), Decimal(0),
    )  # fmt: skip
    name = shop.database.name
    assert asyncio.run(script.spent_in_motor(mongo_uri, name, "FR")) == expected > 0
    assert asyncio.run(script.spent_in_pymongo(mongo_uri, name, "FR")) == expected
    for ask in (script.spent_in_motor, script.spent_in_pymongo):
        assert asyncio.run(ask(mongo_uri, name, "XX")) == 0
