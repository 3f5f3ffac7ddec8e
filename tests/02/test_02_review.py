"""What reviews found in 02_mongodb_advanced.py, each mended; on the test server."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import bson
import pytest
from pymongo import InsertOne
from pymongo.write_concern import WriteConcern
from services import load_script

import config

app: Any = load_script("02_mongodb_advanced")
MIB = 2**20
SECRET = "horse battery"


def test_insert_above_16_mib_is_too_large(database: Any) -> None:
    with pytest.raises(app.TooLarge):
        app.CollectionManager(database).insert("things", {"_id": 1, "x": b"\0" * (17 * MIB)})


def test_insert_of_what_is_not_bson_shows_no_value(database: Any) -> None:
    with pytest.raises((ValueError, app.DatabaseError)) as caught:
        app.CollectionManager(database).insert("things", {"x": {SECRET}})
    assert SECRET not in str(caught.value)


def test_write_of_what_is_not_bson_shows_no_value(database: Any) -> None:
    inserts = [InsertOne({"_id": 1}), InsertOne({"x": {SECRET}})]
    with pytest.raises((ValueError, app.DatabaseError)) as caught:
        app.BulkManager(database.things).write(inserts, ordered=False)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("schema", "document"), [
    ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {}),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {}),
    ({"not": {"required": ["a"]}}, {"a": 1}),
    ({"allOf": [{"required": ["q"]}]}, {}),
    ({"dependencies": {"a": ["b"]}}, {"a": 1}),
    ({"patternProperties": {"^a": {"bsonType": "int"}}}, {"a1": "x"}),
    ({"properties": {"a": {"items": [{"bsonType": "int"}]}}}, {"a": ["x"]}),
    ({"properties": {"a": {"additionalProperties": {"bsonType": "int"}}}}, {"a": {"k": "x"}}),
], ids=lambda v: next(iter(v), "empty"))  # fmt: skip
def test_every_refusal_by_a_schema_says_a_rule(database: Any, schema: Any, document: Any) -> None:
    manager = app.CollectionManager(database)
    manager.create("things", schema)
    with pytest.raises(app.RefusedBySchema) as caught:
        manager.insert("things", document)
    assert str(caught.value).removesuffix("(code 121)").strip()


def test_a_rule_of_the_whole_document_names_the_document(database: Any) -> None:
    manager = app.CollectionManager(database)
    manager.create("things", {"minProperties": 5})
    with pytest.raises(app.RefusedBySchema, match=r"^document: minProperties 5"):
        manager.insert("things", {"a": 1})


@pytest.mark.parametrize("way", ["load", "write"])
def test_an_unmet_write_concern_is_not_hidden_by_a_duplicate(database: Any, way: str) -> None:
    database.things.insert_one({"_id": 1, "old": True})
    fussy = database.get_collection("things", write_concern=WriteConcern(w=50, wtimeout=200))
    manager = app.BulkManager(fussy)
    inserts = [InsertOne({"_id": 1}), InsertOne({"_id": 2})]
    ways = {
        "load": lambda: manager.load([{"_id": 1}, {"_id": 2}]),
        "write": lambda: manager.write(inserts, ordered=False),
    }
    with pytest.raises(app.DatabaseError) as caught:
        ways[way]()
    assert caught.value.code in (64, 100)


def test_crossing_the_antipode_is_not_crossing(database: Any) -> None:
    polygon = app.box(175, -5, 179, 5)
    route = {"type": "LineString", "coordinates": [[-10, -1], [10, 1]]}
    database.zones.insert_one({"area": polygon})
    meets = {"area": {"$geoIntersects": {"$geometry": route}}}
    assert database.zones.count_documents(meets) == app.crosses(route, polygon)


def test_an_amount_too_large_to_round_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not an amount"):
        app.check_amount(Decimal("1E+30"))


@pytest.mark.parametrize("pipeline", [
    [{"$unionWith": "refunds"}], [{"$addFields": {"a": 1}}], [{"$unset": "a"}],
    [{"$replaceRoot": {"newRoot": "$$ROOT"}}], [{"$sample": {"size": 1}}], [{"$sortByCount": "$a"}],
], ids=lambda p: next(iter(p[0])))  # fmt: skip
def test_a_pipeline_that_the_server_takes_is_not_refused(database: Any, pipeline: Any) -> None:
    database.things.insert_one({"_id": 1, "a": 1})
    assert list(database.things.aggregate(pipeline)) != []
    app.check_pipeline(pipeline)


@pytest.mark.parametrize("inner", [
    {"$facet": {"b": []}},
    {"$geoNear": {"near": {"type": "Point", "coordinates": [0, 0]}, "distanceField": "d"}},
], ids=lambda i: next(iter(i)))  # fmt: skip
def test_what_the_server_refuses_inside_facet_is_refused(inner: Any) -> None:
    with pytest.raises(ValueError, match="not allowed here"):
        app.check_pipeline([{"$facet": {"a": [inner]}}])


def test_recordings_may_be_nested(workspace: Any) -> None:
    workspace.client.admin.command("ping")  # logs in
    with workspace.log.record() as outer:
        with workspace.log.record() as inner:
            workspace.client.admin.command("ping")
        workspace.client.admin.command("ping")
    assert (len(inner), len(outer)) == (1, 2)


def test_a_customer_comes_back_from_bson_as_generated_at_any_scale() -> None:
    for customer in app.customers(7):
        encoded = bson.encode(customer, codec_options=app.CODEC)
        assert bson.decode(encoded, codec_options=app.CODEC) == customer


@pytest.mark.parametrize(("name", "password"), [("ada", "\ud800"), ("\ud800", "x")])
def test_half_a_surrogate_logs_nobody_in(database: Any, name: str, password: str) -> None:
    with pytest.raises(TypeError, match="surrogate"):
        app.log_in(database.users, name, password)


def test_a_refusal_says_more_than_operation_failure(database: Any) -> None:
    report = app.BulkManager(database.things).load([{"_id": [1]}])
    assert "OperationFailure" not in report.rejected[0].reason


def test_offline_lines_fit_88_columns(capsys: Any) -> None:
    for demo in (app.demo_aggregation, app.demo_geospatial, app.demo_design):
        demo(None, app.Shop(50))
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 88] == []


def test_an_operator_as_an_account_is_a_value(database: Any) -> None:
    balances = {"victim": Decimal(100), "me": Decimal(0)}
    database.accounts.insert_many([{"_id": k, "balance": v} for k, v in balances.items()])
    with pytest.raises(app.UnknownAccount):
        app.Ledger(database.accounts).transfer({"$gt": ""}, "me", Decimal(60))
    with pytest.raises(app.UnknownAccount):
        app.Ledger(database.accounts).transfer("victim", {"$gt": "m"}, Decimal(60))
    assert {a["_id"]: a["balance"] for a in database.accounts.find()} == balances


def test_of_two_consumers_with_one_name_each_change_has_one_effect(database: Any) -> None:
    first, second = (app.ChangeConsumer(database.o, database.tokens, "one") for _ in range(2))
    first.start()
    database.o.insert_many([{"_id": n} for n in range(10)])

    def count(change: Any, session: Any) -> None:
        update = {"$inc": {"effects": 1}}
        database.effects.update_one(change["documentKey"], update, upsert=True, session=session)

    def stop(handled: int) -> bool:
        if handled == 3:  # the other takes over, before the first goes on
            app.consume(second, count, 10 - 3)
        return handled > 3

    with pytest.raises(app.Superseded):
        first.run(count, stop)
    assert [(e["_id"], e["effects"]) for e in database.effects.find(sort={"_id": 1})] == [
        (n, 1) for n in range(10)
    ]


def test_a_consumer_that_was_never_started_loses_nothing_between_runs(database: Any) -> None:
    consumer = app.ChangeConsumer(database.o, database.tokens, "late")
    assert consumer.run(lambda change, session: None, lambda handled: True) == 0
    database.o.insert_one({"_id": 1})
    given: list[Any] = []
    app.consume(consumer, lambda change, session: given.append(change["documentKey"]), 1)
    assert given == [{"_id": 1}]


def test_a_write_concern_that_cannot_be_met_rejects_no_document(database: Any) -> None:
    fussy = database.get_collection("things", write_concern=WriteConcern(w="no such tag"))
    with pytest.raises(app.DatabaseError):
        app.BulkManager(fussy).load([{"_id": n} for n in range(10)])


def test_a_report_of_ones_own_survives_the_error(database: Any) -> None:
    def documents() -> Any:
        yield from ({"_id": n} for n in range(1_001))
        raise LookupError

    report = app.LoadReport()
    with pytest.raises(LookupError):
        app.BulkManager(database.things).load(documents(), report=report)
    assert report.stored == 1_000


def test_what_is_no_document_costs_only_itself(database: Any) -> None:
    report = app.BulkManager(database.things).load([{"_id": 1}, None, {"_id": 2}])
    assert (report.stored, [r.index for r in report.rejected]) == (2, [1])


def test_rejections_beyond_the_bound_are_counted() -> None:
    report = app.LoadReport()
    for index in range(app.MOST_LISTED + 5):
        report.reject(index, None, "bad")
    assert (len(report.rejected), report.unlisted) == (app.MOST_LISTED, 5)


def test_the_first_failure_ends_the_other_workers() -> None:
    worked: list[int] = []

    async def work(key: int) -> int:
        worked.append(key)
        await asyncio.sleep(0)
        if key == 20:
            raise LookupError
        return key

    assert asyncio.run(app.bounded(range(20), work, 4)) == list(range(20))
    worked.clear()
    with pytest.raises(ExceptionGroup):
        asyncio.run(app.bounded(range(10_000), work, 4))
    assert len(worked) < 30


def test_options_behind_an_unescaped_hash_are_the_users() -> None:
    options = app.client_options("mongodb://u:p#w@h/?w=1&timeoutMS=5", 2)
    assert not {"w", "timeoutMS"} & options.keys()


def test_a_session_token_is_masked() -> None:
    uri = "mongodb://k:s@h/?authMechanismProperties=AWS_SESSION_TOKEN:hunter2&w=1"
    assert "hunter2" not in config.redact(uri)
