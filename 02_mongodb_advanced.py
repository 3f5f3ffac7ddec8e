"""MongoDB from Python: documents shaped by their queries, and nothing acknowledged is lost.

You will learn to
  - shape documents, bound what grows, and have the server refuse what is malformed
  - answer a data team's questions in aggregation pipelines, and keep one answer up to date
  - choose an index by what its plan examines
  - load in bulk with every bad document named, and move money in transactions
  - follow changes across a crash, and go from Motor to PyMongo's asyncio client

Run:
  python 02_mongodb_advanced.py                           # without a server: what a client knows
  python servers.py run -- python 02_mongodb_advanced.py  # a replica set of its own
  MONGODB_URI='mongodb+srv://user:password@cluster.mongodb.net/' python 02_mongodb_advanced.py
  python 02_mongodb_advanced.py --only aggregation --scale 250000  # a million orders

Without a server the last demo shows what the client alone can know; nothing emulates MongoDB.

Glossary:
  plan            the stages by which the server answers; COLLSCAN reads the whole collection
  keys, docs      index entries and documents that a plan examined
  error label     what the server or driver says about retrying, such as TransientTransactionError
  resume token    the position of a change in the oplog, the replica set's log of writes
  write concern   how many members must have a write, and on disk, before it is acknowledged

Guide: docs/02-mongodb.md
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import random
import re
import secrets
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial, wraps
from typing import Any, cast

import bson
import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion, TypeCodec, TypeRegistry
from bson.decimal128 import Decimal128
from bson.errors import BSONError
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, IndexModel, MongoClient, ReadPreference, UpdateOne
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    WriteError,
)
from pymongo.monitoring import CommandListener, CommandStartedEvent
from pymongo.read_concern import ReadConcern
from pymongo.server_api import ServerApi
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

import config
from config import ConfigError, ServiceUnavailable, conclude, fact, note, table

logger = logging.getLogger(__name__)
Document = dict[str, Any]

SEED = 8  # the data are the same in every run
CUSTOMERS = 5_000  # with four orders each: every demo ends in seconds
FIRST_DAY, LAST_DAY = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
DAY = timedelta(days=1)
PAGE_LOADS = 20_000  # measurements of thirty days
OPERATION_TIMEOUT_S = 20.0  # outlasts the restart of a server; a runaway operation ends
BATCH_DOCUMENTS = 1_000  # a batch that is refused as a whole costs little to take apart
BATCH_BYTES = 2**20  # a reply has 16 MB, and repeats a value for each rule that it broke
MOST_LISTED = 100_000  # rejected documents; whoever has more has a wrong schema
INDEX_DOCUMENTS = 100_000  # the size at which the guide's plans were read
DURABLE = WriteConcern(w="majority", j=True)  # acknowledged once a crash cannot undo it
SNAPSHOT = ReadConcern("snapshot")  # a transaction sees one moment
DUPLICATE_KEY, UNAUTHORIZED, ATLAS_ERROR = 11000, 13, 8000
UNREADABLE = {15: "nested too deeply", 22: "invalid BSON", 10334: "too large"}

CITIES = """DE Berlin, DE Hamburg, DE Munich, FR Paris, FR Lyon, FR Marseille, GB London, GB Leeds,
GB Glasgow, ES Madrid, ES Valencia, ES Barcelona, US Chicago, US Los Angeles"""
CATEGORIES = "books games garden kitchen music tools".split()
NAMES = "Ada Alan Barbara Edgar Frances Grace Hedy Jim Katherine Leslie Margaret Tony".split()
PAGES = ("/", "/search", "/product", "/checkout")


# ── The data, seeded ──


class DecimalCodec(TypeCodec):
    """Money: Python's Decimal as BSON's decimal128, both ways. Raises decimal.Inexact beyond 34
    digits."""

    python_type = Decimal
    bson_type = Decimal128

    def transform_python(self, value: Decimal) -> Decimal128:
        return Decimal128(value)

    def transform_bson(self, value: Decimal128) -> Decimal:
        return value.to_decimal()


AUTO = DatetimeConversion.DATETIME_AUTO  # a year that Python has not comes as DatetimeMS
CODEC: CodecOptions[Document] = CodecOptions(
    tz_aware=True,
    datetime_conversion=AUTO,
    type_registry=TypeRegistry([DecimalCodec()]),
)
RAW: CodecOptions[RawBSONDocument] = CodecOptions(RawBSONDocument, datetime_conversion=AUTO)


def whole_ms(when: datetime) -> datetime:
    """As BSON keeps times: what is finer would not come back."""
    return when.replace(microsecond=when.microsecond // 1000 * 1000)


def customers(count: int, seed: int = SEED) -> Iterator[Document]:
    """In order of their signing up, with embedded addresses."""
    rng, cities = random.Random(seed), [c.strip().split(" ", 1) for c in CITIES.split(",")]
    for number in range(1, count + 1):
        name = rng.choice(NAMES)
        homes = rng.sample(cities, 1 + (rng.random() < 0.3))
        yield {
            "_id": number,
            "email": f"{name.lower()}.{number}@example.com",
            "name": name,
            "tier": "gold" if rng.random() < 0.1 else "basic",
            "signed_up": whole_ms(FIRST_DAY + (LAST_DAY - FIRST_DAY) * ((number - 1) / count)),
            "addresses": [
                {"kind": kind, "city": city, "country": country}
                for kind, (country, city) in zip(("home", "billing"), homes, strict=False)
            ],
        }


def orders(count: int, seed: int = SEED) -> Iterator[Document]:
    """Those of `count` customers; a twentieth was refunded."""
    rng, number = random.Random(seed + 1), 0
    for customer in customers(count, seed):
        for _ in range(rng.randint(0, 8)):
            number += 1
            when = customer["signed_up"] + (LAST_DAY - customer["signed_up"]) * rng.random()
            lines: list[Document] = [
                {"category": CATEGORIES[product % 6], "quantity": rng.randint(1, 3),
                 "price": Decimal(350 + 500 * product).scaleb(-2)}
                for product in rng.sample(range(40), rng.randint(1, 3))
            ]  # fmt: skip
            yield {
                "_id": number,
                "customer": {"_id": customer["_id"], "name": customer["name"]},
                "country": customer["addresses"][0]["country"],
                "placed_at": whole_ms(when),
                "status": "refunded" if rng.random() < 0.05 else "paid",
                "lines": lines,
                "total": sum((line["price"] * line["quantity"] for line in lines), Decimal(0)),
            }


def page_loads(count: int = PAGE_LOADS, seed: int = SEED) -> Iterator[Document]:
    """Page-load times over thirty days, the nights quiet: log-normal milliseconds."""
    rng = random.Random(seed + 2)
    for number in range(count):
        at = LAST_DAY - 30 * DAY + 30 * DAY * (number / count)
        if not 1 <= at.hour < 4 or rng.random() > 0.97:
            meta = {"page": PAGES[rng.randrange(len(PAGES))]}
            yield {"at": whole_ms(at), "meta": meta, "ms": round(rng.lognormvariate(5.0, 0.5), 1)}


# ── The connection: one client a process, every operation bounded ──


def client_options(uri: str, timeout_s: float) -> Document:
    """For any of the three clients; what `uri` itself sets is left out. `timeoutMS` bounds each
    operation as a whole: choosing a server, connecting, and retries."""
    own = {part.partition("=")[0].lower() for part in re.split("[&;]", uri.partition("?")[2])}
    defaults = {
        "appname": "module8-02",
        "w": "majority",
        "timeoutMS": round(timeout_s * 1000),
        "serverSelectionTimeoutMS": round(timeout_s * 1000),
        "connectTimeoutMS": round(min(timeout_s, 5) * 1000),
    }
    options = {name: value for name, value in defaults.items() if name.lower() not in own}
    # The commands of API version 1 stay as they are, whatever the server's version (Stable API).
    return {**options, "server_api": ServerApi("1"), "tz_aware": True}


class CommandLog(CommandListener):
    """What the client sends: every command is one round trip."""

    def __init__(self) -> None:
        self._open: list[list[CommandStartedEvent]] = []

    @contextmanager
    def record(self) -> Iterator[list[CommandStartedEvent]]:
        """Collects what is sent, by any thread, inside the block."""
        commands: list[CommandStartedEvent] = []
        self._open.append(commands)
        try:
            yield commands
        finally:
            self._open = [other for other in self._open if other is not commands]

    def started(self, event: CommandStartedEvent) -> None:
        for commands in tuple(self._open):
            commands.append(event)

    def succeeded(self, event: object) -> None: ...
    def failed(self, event: object) -> None: ...


def absence(uri: str, timeout_s: float, errors: Sequence[Exception | None]) -> Exception:
    """What to raise by each server's error: nobody is there, or one is and refuses this client."""
    words = "; ".join(dict.fromkeys(str(error).partition(" (")[0] for error in errors if error))
    absent = ServiceUnavailable("MongoDB", words or "no answer, or no primary", uri)
    if None in errors or any(isinstance(error, NetworkTimeout) for error in errors):
        return absent  # silent, or without a primary
    try:
        seeds = parse_uri(uri, connect_timeout=timeout_s)["nodelist"]
        config.require_reachable("MongoDB", uri, seeds, timeout_s)
    except ServiceUnavailable:
        return absent
    return ConfigError(
        f"MONGODB_URI: {config.redact(uri)} accepts connections and refuses this client: "
        f"{words or 'no such set'}. Do tls and replicaSet fit the server, and is this address on "
        "Atlas's list?"
    )


def connect(uri: str, timeout_s: float, log: CommandLog) -> tuple[MongoClient[Document], Document]:
    """The client, once its server has answered within `timeout_s`, and its `hello`.

    Raises ServiceUnavailable where nothing answers, ConfigError where `uri` is malformed or the
    server refuses.
    """
    try:
        with warnings.catch_warnings():  # by which the driver tells of options that it ignores
            warnings.simplefilter("error", UserWarning)
            options = client_options(uri, OPERATION_TIMEOUT_S)
            client = MongoClient[Document](uri, event_listeners=[log], **options)
    except (ConfigurationError, ValueError, UserWarning, OSError) as error:
        resolving = error.__cause__  # of mongodb+srv, dnspython's
        if type(resolving).__module__.startswith("dns."):
            reason = f"{type(resolving).__name__}: {resolving}".rstrip(".")
            raise ServiceUnavailable("MongoDB", reason, uri) from error
        raise ConfigError(f"MONGODB_URI: {config.redact(str(error))}") from error
    try:
        with pymongo.timeout(timeout_s):
            hello = client.admin.command("hello")
            client.list_database_names()  # unlike `hello`, refused without a login
            return client, {**hello, "version": client.server_info()["version"]}
    except (OperationFailure, ConfigurationError) as error:
        client.close()
        reason = (getattr(error, "details", None) or {}).get("errmsg") or str(error)
        where = f"MONGODB_URI: {config.redact(uri)}"
        raise ConfigError(f"{where} refuses: {config.redact(reason)}") from error
    except ConnectionFailure as error:
        described = client.topology_description.server_descriptions().values()
        client.close()
        raise absence(uri, timeout_s, [server.error for server in described]) from error


@dataclass
class Workspace:
    """Throw-away databases, `module8_…`, beside whatever the server holds."""

    uri: str = field(repr=False)  # with the password
    client: MongoClient[Document]
    hello: Document
    log: CommandLog
    names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kind = "a standalone server"
        if self.has_oplog:
            kind = f"replica set {self.hello.get('setName')}"
        if self.hello.get("msg") == "isdbgrid":
            kind = "a sharded cluster"
        return f"MongoDB {self.hello['version']}, {kind}"

    @property
    def has_oplog(self) -> bool:
        """Without one there are neither transactions nor change streams."""
        return "setName" in self.hello or self.hello.get("msg") == "isdbgrid"

    def database(self) -> Database[Document]:
        """A new, empty one; durable writes, money as Decimal."""
        self.names.append(f"module8_{secrets.token_hex(6)}")
        return self.client.get_database(self.names[-1], CODEC, ReadPreference.PRIMARY, DURABLE)

    def close(self) -> None:
        """Drop what was made, and close the client."""
        try:
            for name in self.names:
                with pymongo.timeout(5):
                    self.client.drop_database(name)
        except PyMongoError as error:
            logger.warning("may stay: %s: %s", ", ".join(self.names), type(error).__name__)
        with pymongo.timeout(1):  # the sessions and cursors of a dead server are dead, too
            self.client.close()


def needs_server(demo: Callable[..., Any]) -> Callable[..., Any]:
    """Say so where there is none."""

    @wraps(demo)
    def run(workspace: Workspace | None, **others: Any) -> Any:
        if workspace is None:
            note("no MongoDB: not shown")
            return None
        return demo(workspace, **others)

    return run


# ── 1. Document design ──


def push_bounded(name: str, value: object, newest: int) -> Document:
    """An update that appends and keeps only the `newest` entries: the array cannot grow."""
    return {"$push": {name: {"$each": [value], "$slice": -newest}}}


def bytes_of(collection: Collection[Document], key: object) -> int:
    """Of a stored document, as the server reckons them."""
    stages: list[Document] = [
        {"$match": {"_id": key}},
        {"$project": {"n": {"$bsonSize": "$$ROOT"}}},
    ]
    return int(next(iter(collection.aggregate(stages)))["n"])


@dataclass(frozen=True)
class DesignResult:
    round_trips: dict[str, int]  # for a customer's page with three orders
    array_bytes: tuple[int, int]  # after a thousand pushes: unbounded, with $slice


@needs_server
def demo_design(workspace: Workspace) -> DesignResult:
    """1. Document design: embed or refer, and arrays that must not grow.

    Prediction: what is read together costs one round trip where it is stored together.

    Trade-off: a copy (the customer's name on an order) is right only where it may be old.
    """
    database, customer = workspace.database(), next(customers(1))
    placed = [{"_id": n, "customer": {"_id": 1, "name": customer["name"]}} for n in range(3)]
    database.embedded.insert_one({**customer, "recent_orders": placed})
    database.addresses.insert_many([{"customer": 1, **a} for a in customer.pop("addresses")])
    database.customers.insert_one(customer)
    database.orders.insert_many(placed)
    reads: dict[str, Callable[[], object]] = {
        "embedded": lambda: database.embedded.find_one({"_id": 1}),
        "referenced": lambda: [
            database.customers.find_one({"_id": 1}),
            *database.addresses.find({"customer": 1}),
            *database.orders.find({"customer._id": 1}),
        ],
    }
    trips = {}
    for label, read in reads.items():
        with workspace.log.record() as commands:
            read()
        trips[label] = len(commands)
        fact(f"round trips, {label}", trips[label])
    database.pushed.insert_many([{"_id": "all"}, {"_id": "newest"}])
    entry = {"page": "/product", "ms": 123.4}
    updates = [UpdateOne({"_id": "all"}, {"$push": {"events": entry}}),
               UpdateOne({"_id": "newest"}, push_bounded("events", entry, 20))]  # fmt: skip
    database.pushed.bulk_write(updates * 1_000)
    sizes = bytes_of(database.pushed, "all"), bytes_of(database.pushed, "newest")
    fact("after 1,000 pushes", "{:,} bytes; bounded by $slice {:,}".format(*sizes))
    conclude(f"{trips['referenced']} round trips → {trips['embedded']}")
    return DesignResult(trips, sizes)


# ── 2. Validation ──

CUSTOMER_SCHEMA: Document = {
    "bsonType": "object",
    "required": ["email", "signed_up", "addresses"],
    "properties": {
        "email": {"bsonType": "string", "pattern": "^[^@A-Z]+@[^@A-Z]+$"},
        "signed_up": {"bsonType": "date"},
        "tier": {"enum": ["basic", "gold"]},
        "addresses": {
            "bsonType": "array", "minItems": 1, "maxItems": 5,
            "items": {"bsonType": "object", "required": ["kind", "city"]},
        },
    },
}  # fmt: skip
BAD_CUSTOMERS: dict[str, Document] = {
    "no address": {"addresses": []},
    "e-mail in capitals": {"email": "ADA@EXAMPLE.COM"},
    "signed up as text": {"signed_up": "2024-01-01"},
    "half an address": {"addresses": [{"kind": "home"}]},
}


def broken_rules(error: WriteError | Mapping[str, Any]) -> list[str]:
    """What code 121 says, as sentences: path, rule, and what was required; no values."""
    details = error if isinstance(error, Mapping) else (error.details or {})
    rules: list[str] = []

    def walk(detail: Mapping[str, Any], path: str) -> None:
        found, where = len(rules), path or "document"
        for prop in detail.get("propertiesNotSatisfied", ()):
            for inner in prop.get("details", ()):
                walk(inner, f"{path}.{prop['propertyName']}".lstrip("."))
        for rule in detail.get("schemaRulesNotSatisfied", ()):
            walk(rule, path)
        for clause in detail.get("clausesNotSatisfied", ()):  # of $and
            walk(clause["details"], path)
        for schema in detail.get("schemasNotSatisfied", ()):  # of anyOf and its kin
            for inner in schema.get("details", ()):
                walk(inner, path)
        if "missingProperties" in detail:
            rules.append(f"{where}: lacks {', '.join(detail['missingProperties'])}")
        elif "itemIndex" in detail:
            for inner in detail.get("details", ()):
                walk(inner, f"{path}[{detail['itemIndex']}]")
        elif isinstance(detail.get("additionalProperties"), list):
            rules.append(f"{where}: has also {', '.join(detail['additionalProperties'])}")
        elif "specifiedAs" in detail:
            (rule, wanted), *_ = detail["specifiedAs"].items()
            rules.append(f"{where}: {rule} {wanted}")
        if len(rules) == found and "operatorName" in detail:
            rules.append(f"{where}: {detail['operatorName']}")

    walk(details.get("errInfo", {}).get("details", {}), "")
    return rules


class CollectionManager:
    """Collections whose documents the server checks. Raises PyMongo's errors."""

    def __init__(self, database: Database[Document]) -> None:
        self._database = database

    def create(self, name: str, schema: Document, **options: Any) -> Collection[Document]:
        validator = {"$jsonSchema": schema}
        return self._database.create_collection(name, validator=validator, **options)

    def violations(self, name: str, schema: Document) -> int:
        """How many stored documents `schema` would refuse: ask before tightening."""
        return self._database[name].count_documents({"$nor": [{"$jsonSchema": schema}]})

    def tighten(self, name: str, schema: Document, level: str = "strict") -> None:
        """Replace the schema under the data, which checks no stored document. `level` "moderate"
        spares updates of those that were invalid before."""
        change = {"collMod": name, "validator": {"$jsonSchema": schema}, "validationLevel": level}
        self._database.command(change, codec_options=CODEC)


@dataclass(frozen=True)
class ValidationResult:
    refused: dict[str, str]  # bad document → the broken rules
    violations: int
    updates: dict[str, bool]  # validationLevel → whether an old invalid document may be updated


@needs_server
def demo_validation(workspace: Workspace) -> ValidationResult:
    """2. Validation: a schema in the server, and one tightened under the data.

    Prediction: code 121 says which rule of which field was broken.

    Trade-off: a validator sees one document. What holds between documents is for unique indexes
    and transactions.
    """
    database, customer = workspace.database(), next(customers(1))
    manager = CollectionManager(database)
    stored = manager.create("customers", CUSTOMER_SCHEMA)
    stored.insert_one(customer)
    refused = {}
    for number, (label, change) in enumerate(BAD_CUSTOMERS.items(), start=2):
        try:
            stored.insert_one({**customer, "_id": number, **change})
        except WriteError as error:
            refused[label] = "; ".join(broken_rules(error))
    table(["bad document", "refused because"], list(refused.items()))
    stored.insert_one({**customer, "_id": 90, "phone": 1})
    tighter = {**CUSTOMER_SCHEMA, "not": {"required": ["phone"]}}
    violations = manager.violations("customers", tighter)
    fact("before tightening", f"{violations} of {stored.count_documents({})} documents break it")
    updates = {}
    for level in ("moderate", "strict"):
        manager.tighten("customers", tighter, level)
        with suppress(WriteError):
            updates[level] = stored.update_one({"_id": 90}, {"$inc": {"n": 1}}).modified_count > 0
        fact(f"an old one, {level}", "updated" if updates.setdefault(level, False) else "refused")
    conclude(f"{len(refused)} of {len(BAD_CUSTOMERS)} bad documents refused by the server")
    return ValidationResult(refused, violations, updates)


# ── 3. Aggregation ──

PAID: Document = {"$match": {"status": "paid"}}
SUM_TOTAL, COUNT = {"$sum": "$total"}, {"$sum": 1}
RECENT = datetime(2025, 7, 1, tzinfo=UTC)


def truncated(path: str, unit: str) -> Document:
    """The beginning of the day, hour or month that the date at `path` lies in, in UTC."""
    return {"$dateTrunc": {"date": path, "unit": unit}}


# question → the collection, and the pipeline that answers
RECIPES: dict[str, tuple[str, list[Document]]] = {
    "revenue, two ways": ("orders", [
        PAID,  # first, so that an index can serve it
        {"$facet": {  # two answers from one pass
            "by_country": [
                {"$group": {"_id": "$country", "revenue": SUM_TOTAL}},
                {"$sort": {"revenue": -1, "_id": 1}}, {"$limit": 3},
            ],
            "by_category": [
                {"$unwind": "$lines"},
                {"$group": {"_id": "$lines.category", "revenue": {
                    "$sum": {"$multiply": ["$lines.price", "$lines.quantity"]},
                }}},
                {"$sort": {"revenue": -1, "_id": 1}}, {"$limit": 3},
            ],
        }},
    ]),
    "gold since July": ("customers", [
        {"$match": {"tier": "gold"}},  # few customers
        {"$lookup": {  # joined by an index, summed inside the join
            "from": "orders", "localField": "_id", "foreignField": "customer._id",
            "pipeline": [
                {"$match": {"placed_at": {"$gte": RECENT}, **PAID["$match"]}},
                {"$group": {"_id": None, "spent": SUM_TOTAL, "orders": COUNT}},
            ],
            "as": "recent",
        }},
        {"$unwind": "$recent"},  # drops who bought nothing
        {"$sort": {"recent.spent": -1, "_id": 1}},  # equal ones by key
        {"$limit": 5},  # with the sort: five kept in memory
        {"$project": {"name": 1, "spent": "$recent.spent", "orders": "$recent.orders"}},
    ]),
    "days, average, rank": ("orders", [
        PAID,
        {"$group": {"_id": truncated("$placed_at", "day"), "revenue": SUM_TOTAL}},
        {"$setWindowFields": {  # by date, not by position: a day without orders is a day
            "sortBy": {"_id": 1},
            "output": {"average": {
                "$avg": "$revenue", "window": {"range": [-6, 0], "unit": "day"},
            }},
        }},
        {"$setWindowFields": {  # another order, so another stage
            "sortBy": {"revenue": -1}, "output": {"rank": {"$rank": {}}},
        }},
        {"$set": {"average": {"$round": ["$average", 2]}}},  # to cents, half to even
        {"$sort": {"rank": 1, "_id": 1}}, {"$limit": 5},
    ]),
    "checkout by hour": ("page_loads", [
        {"$match": {"meta.page": "/checkout"}},
        {"$group": {"_id": truncated("$at", "hour"), "loads": COUNT, "ms": {"$avg": "$ms"}}},
        {"$densify": {  # the hours in which nothing happened
            "field": "_id", "range": {"step": 1, "unit": "hour", "bounds": "full"},
        }},
        {"$fill": {  # a count of nothing is 0; a gauge is interpolated
            "sortBy": {"_id": 1},
            "output": {"loads": {"value": 0}, "ms": {"method": "linear"}},
        }},
        {"$sort": {"loads": 1, "_id": 1}},  # the quiet hours first
    ]),
    "top 3 of a country": ("orders", [
        PAID,
        {"$group": {
            "_id": {"country": "$country", "customer": "$customer._id"}, "spent": SUM_TOTAL,
        }},
        {"$group": {  # three kept a country, never all sorted
            "_id": "$_id.country",
            "top": {"$topN": {
                "n": 3, "sortBy": {"spent": -1, "_id.customer": 1},
                "output": {"customer": "$_id.customer", "spent": "$spent"},
            }},
        }},
        {"$sort": {"_id": 1}},
    ]),
}  # fmt: skip


def refresh_daily_revenue(database: Database[Document], since: datetime, until: datetime) -> int:
    """The materialised view `daily_revenue`, anew for the whole days in UTC from `since` to
    `until`, which are aware; the rows that went. Idempotent. An order that moves from one day to
    another is in both: refresh both."""
    first, last = (
        when.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        for when in (since, until)
    )
    days = {"$gte": first, "$lt": last + DAY}
    nothing = {"orders": {"$literal": 0}, "revenue": {"$literal": 0}}
    database.orders.aggregate([
        {"$match": {"placed_at": days, **PAID["$match"]}},
        {"$group": {
            "_id": {"day": truncated("$placed_at", "day"), "country": "$country"},
            "orders": COUNT, "revenue": SUM_TOTAL,
        }},
        {"$unionWith": {  # with the rows that are there, at nothing: some have no order any more
            "coll": "daily_revenue",
            "pipeline": [{"$match": {"_id.day": days}}, {"$project": nothing}],
        }},
        {"$group": {"_id": "$_id", "orders": {"$sum": "$orders"}, "revenue": {"$sum": "$revenue"}}},
        {"$merge": {"into": "daily_revenue", "whenMatched": "replace"}},
    ])  # fmt: skip
    return database.daily_revenue.delete_many({"_id.day": days, "orders": 0}).deleted_count


def shown(document: object) -> str:
    """On one line, money and times as one reads them."""
    return json.dumps(document, default="{0!s:.16}".format).replace('"', "")


@dataclass(frozen=True)
class AggregationResult:
    answers: dict[str, list[Document]]
    view: tuple[int, int]  # rows when built, rows that went after a correction


@needs_server
def demo_aggregation(workspace: Workspace, database: Database[Document]) -> AggregationResult:
    """3. Aggregation: five pipelines, and a sixth that keeps its answer up to date.

    Prediction: only answers leave the server; the view is corrected by a day alone.

    Trade-off: a pipeline runs where the orders are taken. What is asked every minute belongs in a
    materialised view, what scans years in a column store.
    """
    answers = {}
    for question, (collection, pipeline) in RECIPES.items():
        started = time.perf_counter()
        rows = list(database[collection].aggregate(pipeline, allowDiskUse=True))
        took_ms = 1e3 * (time.perf_counter() - started)
        answers[question] = rows
        fact(question, f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} in {took_ms:.0f} ms")
        for row in rows[:1]:
            config.listing(shown({k: v[:1] if isinstance(v, list) else v for k, v in row.items()}))
    refresh_daily_revenue(database, FIRST_DAY, LAST_DAY)
    built = database.daily_revenue.count_documents({})
    gone = 0
    for row in database.daily_revenue.find({"orders": 1}).sort("_id", 1).limit(1):
        day, country = row["_id"]["day"], row["_id"]["country"]
        alone = {"placed_at": {"$gte": day, "$lt": day + DAY}, "country": country, "status": "paid"}
        database.orders.update_one(alone, {"$set": {"country": "XX"}})
        gone = refresh_daily_revenue(database, day, day)
        fact("materialised view", f"{built:,} rows; an order moved to XX: {gone} row went")
        config.listing(shown(row))
    conclude(
        f"{len(RECIPES)} questions answered on the server; a view corrected by one of its days"
    )
    return AggregationResult(answers, (built, gone))


# ── 4. Indexes ──


@dataclass(frozen=True)
class Plan:
    """How the server answered: stages from the last back to the first, each named once; the first
    index; what they read, with $lookup and $unionWith at the top; what they gave on."""

    stages: tuple[str, ...]
    index: str | None
    keys: int
    docs: int
    returned: int

    def __str__(self) -> str:
        return " ← ".join(dict.fromkeys(s for s in self.stages if not s.startswith("PROJECTION")))


NESTED = ("queryPlanner", "winningPlan", "queryPlan", "inputStage", "inputStages", "shards",
          "stages", "$cursor", "$geoNearCursor", "$unionWith", "pipeline")  # fmt: skip


def parse_plan(explained: Mapping[str, Any]) -> Plan:
    """The plan in an `explain` at verbosity executionStats: of a find or a pipeline, of either
    query engine, of a time series, of shards (whose counts are added)."""
    stages, indexes, counts = list[str](), list[str](), Counter[str]()

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        if not isinstance(node, Mapping):
            return
        stages.extend([node["stage"]] if "stage" in node else ())
        indexes.extend([node["indexName"]] if "indexName" in node else node.get("indexesUsed", ()))
        stats = node.get("executionStats", node)  # beside a $lookup, they are its own
        if "totalDocsExamined" in stats:
            counts["keys"] += stats["totalKeysExamined"]
            counts["docs"] += stats["totalDocsExamined"]
            counts["returned"] += 0 if stats is node else stats["nReturned"]
        for name, inner in node.items():
            if name in NESTED:
                walk([*inner.values()] if name == "shards" and isinstance(inner, dict) else inner)

    walk(explained)
    index = indexes[0] if indexes else None
    return Plan(tuple(stages), index, counts["keys"], counts["docs"], counts["returned"])


class IndexManager:
    """The indexes of one collection, and what they are good for. Raises PyMongo's errors."""

    def __init__(self, collection: Collection[Document]) -> None:
        self._collection = collection

    def ensure(self, model: IndexModel) -> str:
        """Create the index unless it is there; returns its name."""
        return self._collection.create_indexes([model])[0]

    def plan(self, question: Document | Sequence[Document], **options: Any) -> Plan:
        """Of a find by these conditions, or of a pipeline, which is run for it; `options` are those
        of the command, `sort` and `hint` also as PyMongo takes them."""
        name, database = self._collection.name, self._collection.database
        for option, value in options.items():
            if isinstance(value, list):
                options[option] = dict(v if isinstance(v, tuple) else (v, 1) for v in value)
        command: Document = {"find": name, "filter": question, **options}
        if not isinstance(question, Mapping):
            command = {"aggregate": name, "pipeline": question, "cursor": {}, **options}
        explained = database.command(
            "explain", command, verbosity="executionStats", codec_options=CODEC
        )
        return parse_plan(explained)


MID_YEAR = FIRST_DAY + timedelta(minutes=INDEX_DOCUMENTS // 2)
IN_RANGE = {"customer": 7, "at": {"$gte": MID_YEAR}}  # equality, range; sorted by amount
BY_AMOUNT: Document = {"sort": {"amount": -1}, "limit": 20}
EQUALITY = IndexModel("customer", name="equality")
ERS = IndexModel({"customer": 1, "at": 1, "amount": -1}, name="equality_range_sort")
ESR = IndexModel({"customer": 1, "amount": -1, "at": 1}, name="equality_sort_range")
BERLIN = {"type": "Point", "coordinates": [13.41, 52.52]}
NEAR_BERLIN: Document = {"$geoNear": {
    "near": BERLIN, "distanceField": "km", "distanceMultiplier": 1e-3, "maxDistance": 20_000,
    "key": "location",
}}  # fmt: skip
# kind → the index, and a question that it is for
INDEX_CASES: dict[str, tuple[IndexModel, Document | list[Document]]] = {
    "partial": (
        IndexModel("at", name="partial", partialFilterExpression={"status": "failed"}),
        {"status": "failed", "at": {"$gte": MID_YEAR}},
    ),
    "unique": (IndexModel("reference", name="unique", unique=True), {"reference": "R500"}),
    "TTL": (
        IndexModel("expires_at", name="ttl", expireAfterSeconds=0),
        {"expires_at": {"$lt": FIRST_DAY + 36_501 * DAY}},
    ),
    "text": (IndexModel([("title", "text")], name="text"), {"$text": {"$search": "word500"}}),
    "2dsphere": (IndexModel([("location", "2dsphere")], name="sphere"), [NEAR_BERLIN]),
}


def events(count: int = INDEX_DOCUMENTS) -> Iterator[Document]:
    """What the indexes are made on: fifty customers, nine in ten paid, one a minute."""
    rng = random.Random(SEED)
    for number in range(count):
        at, share = FIRST_DAY + timedelta(minutes=number), rng.random()
        place = [rng.uniform(-10, 30), rng.uniform(36, 60)]
        yield {
            "customer": rng.randrange(50),
            "amount": rng.randrange(1, 100_000),  # cents
            "at": at,
            "status": "paid" if share < 0.9 else "open" if share < 0.99 else "failed",
            "reference": f"R{number}",
            "expires_at": at + 36_500 * DAY,  # none expires under the demo
            "title": f"order of word{rng.randrange(2_000)}",
            "location": {"type": "Point", "coordinates": place},
        }


def cells(plan: Plan) -> list[str]:
    return [str(plan), *(f"{count:,}" for count in (plan.keys, plan.docs, plan.returned))]


@dataclass(frozen=True)
class IndexResult:
    cases: dict[str, tuple[Plan | None, Plan]]  # kind → without the index, with it
    esr: dict[str, Plan]
    low_cardinality_s: dict[str, float]


@needs_server
def demo_indexes(workspace: Workspace, index_documents: int) -> IndexResult:
    """4. Indexes: plans before and after, equality-sort-range, and an index that loses.

    Prediction: by equality, sort, range it reads some two keys a document, and never sorts.

    Trade-off: each index is written on every insert and wants to be in memory. Make those that a
    measured query needs, and drop those that $indexStats finds unused.
    """
    collection = workspace.database().events
    collection.insert_many(events(index_documents))
    manager, cases, esr = IndexManager(collection), {}, {}
    for kind, (model, question) in INDEX_CASES.items():
        before = None
        with suppress(OperationFailure):  # $text and $geoNear are refused without their index
            before = manager.plan(question)
        name = manager.ensure(model)
        cases[kind] = before, manager.plan(question)
        collection.drop_index(name)
    columns = ["plan", "keys", "docs", "returned"]
    rows = [
        [kind, f"{before.docs:,}" if before else "refused", *cells(after)]
        for kind, (before, after) in cases.items()
    ]
    table(["index", "docs before", *columns], rows)
    esr["no index"] = manager.plan(IN_RANGE, **BY_AMOUNT)
    for label, model in {"E": EQUALITY, "E-R-S": ERS, "E-S-R": ESR}.items():
        esr[label] = manager.plan(IN_RANGE, hint=manager.ensure(model), **BY_AMOUNT)
    table(["20 of a customer", *columns], [[label, *cells(plan)] for label, plan in esr.items()])
    hints = {"scan": {"$natural": 1}, "index": manager.ensure(IndexModel("status", name="status"))}
    paid = {k: partial(manager.plan, {"status": "paid"}, hint=h) for k, h in hints.items()}
    best = {way: min(timeit.repeat(ask, number=1, repeat=3)) for way, ask in paid.items()}
    times = ", ".join(f"{way} {1e3 * seconds:.0f} ms" for way, seconds in best.items())
    fact("status = paid, 9 in 10", times)

    found = esr["E-S-R"]
    conclude(f"{found.keys / max(1, found.returned):.1f} keys a document, sorted by the index")
    return IndexResult(cases, esr, best)


# ── 5. Time series ──


def down_sampled(hours: int) -> list[Document]:
    """Loads, mean and maximum for each page and `hours`, and the mean of three such intervals by
    the clock (a gap is a gap)."""
    start = {"$dateTrunc": {"date": "$at", "unit": "hour", "binSize": hours}}
    window = {"range": [-2 * hours, 0], "unit": "hour"}
    return [
        {"$group": {
            "_id": {"page": "$meta.page", "at": start}, "loads": COUNT, "mean_ms": {"$avg": "$ms"},
            "max_ms": {"$max": "$ms"},
        }},
        {"$setWindowFields": {
            "partitionBy": "$_id.page", "sortBy": {"_id.at": 1},
            "output": {"smooth_ms": {"$avg": "$mean_ms", "window": window}},
        }},
        {"$sort": {"_id.page": 1, "_id.at": 1}},
    ]  # fmt: skip


def create_series(database: Database[Document], name: str, expire_after: timedelta) -> None:
    """A time-series collection: the server keeps it in compressed buckets by `meta`."""
    series = {"timeField": "at", "metaField": "meta", "granularity": "minutes"}
    expiry = round(expire_after.total_seconds())
    database.create_collection(name, timeseries=series, expireAfterSeconds=expiry)


@dataclass(frozen=True)
class TimeSeriesResult:
    kib_on_disk: dict[str, int] | None  # data and indexes; None: no checkpoint allowed
    buckets: tuple[int, int]  # read for one page of four, all
    rows: list[Document]


@needs_server
def demo_time_series(workspace: Workspace) -> TimeSeriesResult:
    """5. Time series: buckets that the server makes, down-sampled, and smaller on disk.

    Prediction: measurements of one page lie together, so they compress to a fraction.

    Trade-off: only `meta` can be updated, and there is no unique index: not for records that
    change.
    """
    database, loads, sizes = workspace.database(), list(page_loads()), None
    create_series(database, "series", 3_650 * DAY)
    for name in ("series", "plain"):
        database[name].insert_many(loads)
        database[name].create_index({"meta.page": 1, "at": 1})
    manager = IndexManager(database.series)
    read, buckets = (manager.plan(where).docs for where in ({"meta.page": "/checkout"}, {}))
    fact("one page of four", f"{read} of {buckets} buckets read, of {len(loads):,} measurements")
    try:
        workspace.client.admin.command("fsync")  # sizes are as of the last checkpoint
        stats = {name: database.command("collStats", name) for name in ("plain", "series")}
        sizes = {n: (s["storageSize"] + s["totalIndexSize"]) // 1024 for n, s in stats.items()}
        fact("KiB on disk", ", ".join(f"{name} {kib:,}" for name, kib in sizes.items()))
    except OperationFailure as error:
        note(f"no checkpoint, so no size on disk (code {error.code})")
    rows = list(database.series.aggregate(down_sampled(6)))
    fact(
        "six-hour means",
        "{} rows; first {loads} loads, {mean_ms:.1f} ms".format(len(rows), **rows[0]),
    )
    conclude(f"{len(loads):,} measurements → {len(rows)} rows on the server")
    return TimeSeriesResult(sizes, (read, buckets), rows)


# ── 6. Bulk ──


@dataclass(frozen=True)
class Rejected:
    """A document that was not stored: its position in the input, and why. No values of it."""

    index: int
    code: int | None  # the server's; None where the client could not encode it
    reason: str  # the code alone where the server's words hold values


@dataclass
class LoadReport:
    """What became of every document: stored now, stored before, or rejected."""

    stored: int = 0
    already_there: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    unlisted: int = 0  # rejected beyond MOST_LISTED: counted only

    def reject(self, index: int, code: int | None, reason: str) -> None:
        if len(self.rejected) < MOST_LISTED:
            self.rejected.append(Rejected(index, code, reason[:300]))
        else:
            self.unlisted += 1


Batch = list[tuple[int, RawBSONDocument]]  # position in the input, and the document encoded
UNFIT = (BSONError, ArithmeticError, TypeError, ValueError, RecursionError)  # what encoding raises


def encode(document: Mapping[str, Any], codec: CodecOptions[Any] = CODEC) -> RawBSONDocument:
    """As BSON, with an `_id`. Raises ValueError for what BSON cannot hold, which in a batch would
    take its neighbours with it; also for raw BSON that cannot be read (inside another it is
    not looked at)."""
    if not isinstance(document, Mapping):
        raise ValueError(f"no document: {type(document).__name__}")
    try:
        if isinstance(document, RawBSONDocument):
            codec = CODEC
            document = bson.decode(document.raw, cast(Any, codec))  # bad UTF-8 shows here
        keyed = document if "_id" in document else {"_id": ObjectId(), **document}
        raw = bson.encode(keyed, codec_options=codec)  # puts `_id` first
    except UNFIT as error:
        raise ValueError(
            f"not BSON: {unfit_field(document, codec)}, {type(error).__name__}"
        ) from None
    if len(raw) > 16 * 2**20:
        raise ValueError(f"{len(raw):,} bytes are above 16 MiB")
    return RawBSONDocument(raw, RAW)


def unfit_field(document: Mapping[str, Any], codec: CodecOptions[Any]) -> str:
    """The first field that BSON cannot hold, and its type; not its value."""
    with suppress(*UNFIT):
        for name, value in document.items():
            try:
                bson.encode({name: value}, codec_options=codec)
            except UNFIT:
                return f"{name} is {type(value).__name__}"
    return "the whole"


def batches(
    documents: Iterable[Mapping[str, Any]],
    report: LoadReport,
    most: int = BATCH_DOCUMENTS,
    codec: CodecOptions[Any] = CODEC,
) -> Iterator[Batch]:
    """At most `most` documents and BATCH_BYTES each; what cannot be encoded goes into `report`."""
    batch, size = Batch(), 0
    for index, document in enumerate(documents):
        try:
            raw = encode(document, codec)
        except ValueError as error:
            report.reject(index, None, str(error))
            continue
        if batch and (len(batch) == most or size + len(raw.raw) > BATCH_BYTES):
            yield batch
            batch, size = Batch(), 0
        batch.append((index, raw))
        size += len(raw.raw)
    if batch:
        yield batch


class BulkManager:
    """Loads documents so that a bad one costs only itself, and loading again costs nothing.

    Give documents an `_id` of their own: then a load that was cut off can be repeated whole. Not so
    in a time series, which has no unique `_id`: there each load adds.
    """

    def __init__(self, collection: Collection[Any], most: int = BATCH_DOCUMENTS) -> None:
        self._collection = collection.with_options(RAW, ReadPreference.PRIMARY)
        self._most, self._codec = most, collection.codec_options

    def load(
        self, documents: Iterable[Mapping[str, Any]], report: LoadReport | None = None
    ) -> LoadReport:
        """Insert all, unordered; memory holds one batch. Refusals repeat rules and values: where
        those are long, take a smaller `most`. Raises PyMongo's errors where the server stays away:
        what was acknowledged is booked in a `report` of yours; `load` of the same documents goes on
        from there."""
        report = LoadReport() if report is None else report
        for batch in batches(documents, report, self._most, self._codec):
            self._insert(batch, report)
        report.rejected.sort(key=lambda rejected: rejected.index)
        return report

    def _insert(self, batch: Batch, report: LoadReport) -> None:
        try:
            self._collection.insert_many([document for _, document in batch], ordered=False)
            report.stored += len(batch)
        except BulkWriteError as error:
            self._settle(batch, error, report)
        except OperationFailure as error:  # for the whole command, for what one document holds
            if error.code not in UNREADABLE:
                raise
            if len(batch) == 1:
                report.reject(batch[0][0], error.code, UNREADABLE[error.code])
            else:  # the halves, until that document is alone
                self._insert(batch[: len(batch) // 2], report)
                self._insert(batch[len(batch) // 2 :], report)

    def _settle(self, batch: Batch, error: BulkWriteError, report: LoadReport) -> None:
        """Book an unordered insert of which some were refused. Raises `error` where the write
        concern was not met: stored, perhaps, but not for good."""
        if error.details["writeConcernErrors"]:
            raise error
        report.stored += error.details["nInserted"]
        taken = Batch()  # an `_id`: perhaps by itself, in an attempt whose answer was lost
        for failed in error.details["writeErrors"]:
            index, document = batch[failed["index"]]
            code, fields = failed["code"], ", ".join(failed.get("keyPattern", ()))
            if code == DUPLICATE_KEY and fields == "_id":
                taken.append((index, document))
                continue
            reason = (
                f"taken: {fields}" if code == DUPLICATE_KEY else "; ".join(broken_rules(failed))
            )
            report.reject(index, code, reason or UNREADABLE.get(code) or f"code {code}")
        wanted = {"_id": {"$in": [document["_id"] for _, document in taken]}}
        stored = {one.raw for one in self._collection.find(wanted)} if taken else set()
        for index, document in taken:
            if document.raw in stored:
                report.already_there += 1
            else:
                report.reject(index, DUPLICATE_KEY, "taken: _id, by another document")


def measurements(count: int) -> list[Document]:
    return [{"_id": n, "page": PAGES[n % 4], "ms": n % 977 / 10} for n in range(count)]


BULK_DOCUMENTS, LOOP_DOCUMENTS = 10_000, 500  # the loop takes a round trip each
READING_SCHEMA: Document = {"properties": {"ms": {"bsonType": "double", "minimum": 0}}}
SPOILT: list[Document] = [  # what the schema refuses, what BSON cannot hold, an `_id` that is taken
    {"ms": -1.0}, {"ms": "slow"}, {"ms": 1.0, "tags": {"a set"}}, {"_id": 0},
]  # fmt: skip


@dataclass(frozen=True)
class BulkResult:
    per_second: dict[str, float]
    round_trips: dict[str, int]
    report: LoadReport
    count: int  # documents in the collection after the load
    again: LoadReport


@needs_server
def demo_bulk(workspace: Workspace) -> BulkResult:
    """6. Bulk: one round trip for many, and the one bad document in a thousand.

    Prediction: a loop pays a round trip and a flush to disk a document, a batch but one.

    Trade-off: unordered is faster and goes on after a refusal, but the order of writes is lost.
    """
    database, documents, trips, rates = workspace.database(), measurements(BULK_DOCUMENTS), {}, {}
    loops = documents[:LOOP_DOCUMENTS]
    ways: dict[str, tuple[int, Callable[[Collection[Document]], object]]] = {
        "insert_one, a loop": (len(loops), lambda to: [to.insert_one(one) for one in loops]),
        "insert_many": (len(documents), lambda to: to.insert_many(documents, ordered=False)),
        "BulkManager.load": (len(documents), lambda to: BulkManager(to).load(documents)),
    }  # fmt: skip
    for number, (way, (size, load)) in enumerate(ways.items()):
        target = database.create_collection(f"load{number}")
        with workspace.log.record() as commands:
            started = time.perf_counter()
            load(target)
            rates[way] = size / (time.perf_counter() - started)
        trips[way] = len(commands)
    table(
        ["way", "round trips", "documents/s"],
        [[way, trips[way], f"{rate:,.0f}"] for way, rate in rates.items()],
    )
    readings = CollectionManager(database).create("readings", READING_SCHEMA)
    for index in range(500, len(documents), 1_000):  # one in a thousand
        documents[index] = {**documents[index], **SPOILT[index // 1_000 % len(SPOILT)]}
    report, again = (BulkManager(readings).load(documents) for _ in range(2))
    for reason, number in Counter(rejected.reason for rejected in report.rejected).items():
        fact(f"{number} rejected", reason)
    count = readings.count_documents({})
    fact("stored", f"{report.stored:,} of {len(documents):,}; {count:,} counted")
    fact("the same load again", f"{again.stored} stored, {again.already_there:,} already there")
    lost = len(documents) - count - len(report.rejected)
    conclude(f"one bad document in a thousand cost itself: {lost} lost")
    return BulkResult(rates, trips, report, count, again)


# ── 7. Transactions ──


class InsufficientFunds(Exception):
    """The account has less than that."""


class UnknownAccount(Exception):
    """No such account; nothing was moved."""


class Ledger:
    """Accounts between which money moves, and never disappears."""

    def __init__(self, accounts: Collection[Document]) -> None:
        self._accounts = accounts

    def transfer(self, source: object, target: object, amount: Decimal, key: object = None) -> int:
        """Move `amount` in one transaction; returns how many attempts it took.

        The driver repeats the whole, or the commit, for 120 s at most, where an error's label says
        so. The client's `timeoutMS` bounds each step, the abort too: a deadline around the whole
        would leave no time for that, and the transaction open on the server.

        Raises InsufficientFunds, UnknownAccount (nothing was moved), ValueError unless `amount` is
        whole cents above 0, and PyMongo's errors, after which it is unknown. Then repeat it with
        the same `key`, booked together with the money: a second time raises DuplicateKeyError.
        """
        is_money = isinstance(amount, Decimal) and amount.is_finite() and 0 < amount <= 10**15
        if not is_money or amount != round(amount, 2):
            raise ValueError(f"not an amount of money: {amount}")
        attempts = itertools.count()

        def work(session: ClientSession) -> None:
            next(attempts)
            if key is not None:
                booked = {"_id": key, "source": source, "target": target, "amount": amount}
                self._accounts.database.transfers.insert_one(booked, session=session)
            rich = {"_id": {"$eq": source}, "balance": {"$gte": amount}}  # $eq: no operator
            paid = self._accounts.update_one(rich, {"$inc": {"balance": -amount}}, session=session)
            if not paid.modified_count:
                known = self._accounts.find_one({"_id": {"$eq": source}}, session=session)
                raise InsufficientFunds(source) if known else UnknownAccount(source)
            credit = {"$inc": {"balance": amount}}
            got = self._accounts.update_one({"_id": {"$eq": target}}, credit, session=session)
            if not got.modified_count:
                raise UnknownAccount(target)

        with self._accounts.database.client.start_session() as session:
            session.with_transaction(work, SNAPSHOT, DURABLE, ReadPreference.PRIMARY)
        return next(attempts)

    def total(self) -> Decimal:
        """The money at one moment: a snapshot, not a scan through moving money."""
        pipeline = [{"$group": {"_id": None, "total": {"$sum": "$balance"}}}]
        with self._accounts.database.client.start_session(snapshot=True) as session:
            found = list(self._accounts.aggregate(pipeline, session=session))
        return cast(Decimal, found[0]["total"]) if found else Decimal(0)


def transfer_naively(
    accounts: Collection[Document], source: int, target: int, between: Callable[[], object]
) -> None:
    """Read, compute, write 100: two at once lose one of the updates. Only here to be defeated."""
    balances = {key: (accounts.find_one({"_id": key}) or {})["balance"] for key in (source, target)}
    between()  # where the other one reads, too
    for key, change in ((source, -100), (target, 100)):
        accounts.update_one({"_id": key}, {"$set": {"balance": balances[key] + change}})


def transfer_often(ledger: Ledger, number: int) -> int:
    """A writer's transfers, and how many attempts they took."""
    rng, tried = random.Random(SEED + number), 0
    for _ in range(TRANSFERS_EACH):
        source, target = rng.sample(range(ACCOUNTS), 2)
        tried += ledger.transfer(source, target, Decimal(rng.randrange(1, 500)) / 100)
    return tried


@dataclass(frozen=True)
class TransactionResult:
    totals: tuple[Decimal, Decimal, Decimal]  # before; after naive transfers; after the others
    transfers: int
    attempts: int
    snapshots: tuple[int, int]  # read meanwhile; with another total
    repeated: bool  # whether a key's second transfer was refused


def failure(work: Callable[[], object]) -> PyMongoError | None:
    try:
        work()
    except PyMongoError as error:
        return error
    return None


OPENING = Decimal("1000.00")
ACCOUNTS, WRITERS, TRANSFERS_EACH = 10, 8, 25


@needs_server
def demo_transactions(workspace: Workspace) -> TransactionResult | None:
    """7. Transactions: money moves under eight writers, and none is lost.

    Prediction: naive transfers change the total; transactions keep it, and pay in retries.

    Trade-off: a transaction holds its snapshot and its conflicts abort. What one document can
    hold needs none: its update is atomic.
    """
    if not workspace.has_oplog:
        note("a standalone server has no transactions: not shown")
        return None
    accounts = workspace.database().accounts
    accounts.insert_many([{"_id": n, "balance": OPENING} for n in range(ACCOUNTS)])
    ledger, done = Ledger(accounts), False
    before = ledger.total()
    transfer_naively(accounts, 1, 0, lambda: transfer_naively(accounts, 2, 0, lambda: None))
    naive = ledger.total()
    fact("two naive transfers", f"total {before:,} → {naive:,}")
    accounts.update_many({}, {"$set": {"balance": OPENING}})

    with ThreadPoolExecutor(WRITERS + 1) as threads:
        try:
            watcher = threads.submit(list, iter(lambda: None if done else ledger.total(), None))
            attempts = sum(threads.map(partial(transfer_often, ledger), range(WRITERS)))
        finally:
            done = True
    seen, transfers = watcher.result(), WRITERS * TRANSFERS_EACH
    snapshots = len(seen), sum(total != before for total in seen)
    fact(f"{WRITERS} writers", f"{transfers} transfers in {attempts} attempts")
    fact("read meanwhile", "{} snapshots, {} with another total".format(*snapshots))
    ledger.transfer(0, 1, Decimal(1), key="invoice 17")
    repeated = isinstance(
        failure(lambda: ledger.transfer(0, 1, Decimal(1), key="invoice 17")), DuplicateKeyError
    )
    fact("the same key again", "refused: DuplicateKeyError" if repeated else "moved twice")
    after = ledger.total()
    conclude(f"naive: {naive - before:+,.2f} of {before:,.2f}; in transactions: {after - before:+}")
    return TransactionResult((before, naive, after), transfers, attempts, snapshots, repeated)


# ── 8. Change streams ──

Change = Mapping[str, Any]
Handle = Callable[[Change, ClientSession], object]
ENDINGS = ("drop", "dropDatabase", "rename", "invalidate")  # after which no change comes
KEEP_UP_S = 10.0  # between two tokens stored without a change: well within any oplog
MOST_FAILURES = 3  # in a row without an answer between: each has waited for the server's return
# Without the document: an event that carried an update and the whole could pass 16 MB.
SLIM: Document = {"$project": {"operationType": 1, "documentKey": 1, "ns": 1}}


class HistoryLost(Exception):
    """The position is no longer to be resumed from, or the collection is gone: read it anew."""


class Superseded(Exception):
    """Another consumer of this name has moved its position."""


class ChangeConsumer:
    """Hands each change of a collection to a handler, in order, once in effect: what the handler
    writes in the session it gets, and the resume token, are committed together or not at all. A
    handler must not swallow a server's error: that has aborted the transaction."""

    def __init__(
        self, source: Collection[Document], tokens: Collection[Document], name: str
    ) -> None:
        self._source, self._name = source, name
        self._tokens = tokens.with_options(read_preference=ReadPreference.PRIMARY)
        self._at: Any = None  # the token last seen in `tokens`
        self._kept_up = time.monotonic()

    def start(self) -> None:
        """Begin at this moment, unless a position is stored: changes from here on are not missed,
        whenever `run` comes."""
        if self._position() is None:
            self.restart("$setOnInsert")  # another may start now, too

    def restart(self, how: str = "$set") -> None:
        """Begin at this moment: after HistoryLost, and before the collection is read anew."""
        with self._source.watch([SLIM]) as stream:
            update = {how: {"token": stream.resume_token}}
            self._tokens.update_one({"_id": self._name}, update, upsert=True)

    def run(self, handle: Handle, stop: Callable[[int], bool]) -> int:
        """Handle changes until `stop(handled so far)`, asked ten times a second; how many.

        Rides out the restart of a server. Raises HistoryLost, Superseded, PyMongo's errors after
        MOST_FAILURES in a row or where no label speaks of trying again, and what `handle` raises:
        its change comes again.
        """
        self.start()
        handled = failures = 0
        while not stop(handled):
            try:
                self._at = self._position()
                options: Document = {"max_await_time_ms": 100, "resume_after": self._at}
                with self._source.watch([SLIM], **options) as stream:
                    while not stop(handled):
                        change = stream.try_next()
                        if change is None:
                            self._keep_up(stream.resume_token)
                        elif change["operationType"] in ENDINGS:
                            raise HistoryLost(f"the collection's {change['operationType']}")
                        else:
                            self._apply(change, handle)
                            handled += 1
                        failures = 0
            except PyMongoError as error:
                if error.has_error_label("NonResumableChangeStreamError"):
                    raise HistoryLost(f"code {getattr(error, 'code', None)}") from error
                failures += 1
                if failures >= MOST_FAILURES or not may_retry(error):
                    raise
                logger.info("reopening after %s", type(error).__name__)
                time.sleep(0.1 * 2**failures)
        return handled

    def _apply(self, change: Change, handle: Handle) -> None:
        def work(session: ClientSession) -> None:
            handle(change, session)
            self._store(change["_id"], session)

        with self._source.database.client.start_session() as session:
            session.with_transaction(work, SNAPSHOT, DURABLE, ReadPreference.PRIMARY)
        self._at = change["_id"]

    def _keep_up(self, token: Any) -> None:
        """Move on past the changes of others: the position of a quiet collection would else fall
        out of a busy oplog."""
        if time.monotonic() - self._kept_up >= KEEP_UP_S:
            self._store(token)
            self._at, self._kept_up = token, time.monotonic()

    def _position(self) -> Any:
        return (self._tokens.find_one({"_id": self._name}) or {}).get("token")

    def _store(self, token: Any, session: ClientSession | None = None) -> None:
        """Only from the position that this consumer is at: of two with one name the second fails,
        and its handler's writes are rolled back."""
        here = {"_id": self._name, "token": self._at}
        moved = self._tokens.update_one(here, {"$set": {"token": token}}, session=session)
        if not moved.matched_count:
            raise Superseded(self._name)


def may_retry(error: PyMongoError) -> bool:
    """A label, or a lost connection, says that trying again may help; never a message."""
    labels = "TransientTransactionError RetryableWriteError UnknownTransactionCommitResult".split()
    labels.append("ResumableChangeStreamError")
    return isinstance(error, ConnectionFailure) or any(map(error.has_error_label, labels))


def copy_change(source: Collection[Document], target: Collection[Document]) -> Handle:
    """A handler that keeps `target` a copy of `source`, and counts what it was given."""

    def handle(change: Change, session: ClientSession) -> None:
        key = change["documentKey"]
        now = source.find_one(key, session=session)  # deleted since: a later change says so
        if now is None:
            target.delete_one(key, session=session)
        else:
            target.replace_one(key, now, upsert=True, session=session)
        counts, one = target.database.counts, {"$inc": {"events": 1}}
        counts.update_one({"_id": target.name}, one, upsert=True, session=session)

    return handle


def enough(count: int) -> Callable[[int], bool]:
    """For `run`: after `count` changes, or where they do not come."""
    end = time.monotonic() + OPERATION_TIMEOUT_S
    return lambda handled: handled >= count or time.monotonic() > end


@dataclass(frozen=True)
class ChangeStreamResult:
    written: int
    handled: tuple[int, int]  # before it was stopped, after it was resumed
    events: int  # that had their effect
    equal: bool
    came_again: bool  # the change whose handler raised


@needs_server
def demo_change_streams(workspace: Workspace) -> ChangeStreamResult | None:
    """8. Change streams: a consumer that is stopped and resumed, and misses nothing.

    Prediction: with the token in the handler's transaction each change has its effect once.

    Trade-off: a transaction a change bounds the rate to some hundreds a second; where effects are
    idempotent, store the token once for many.
    """
    if not workspace.has_oplog:
        note("a change stream reads the oplog of a replica set: not shown without one")
        return None
    database, written, given = workspace.database(), 60, list[Any]()
    copy = copy_change(database.orders, database["copy"])
    consumer = ChangeConsumer(database.orders, database.tokens, "copy")
    consumer.start()
    database.orders.insert_many([{"_id": n, "total": n} for n in range(40)])
    first = consumer.run(copy, enough(20))
    fact("stopped", f"after {first} of 40 changes; the others and what follows wait in the oplog")
    database.orders.bulk_write([UpdateOne({"_id": n}, {"$inc": {"total": 100}}) for n in range(10)])
    database.orders.delete_many({"_id": {"$lt": 10}})

    def fail_once(change: Change, session: ClientSession) -> None:
        given.append(change["_id"])
        copy(change, session)
        if len(given) == 1:
            raise LookupError  # after the handler's writes, which must not stay

    resumed, second = ChangeConsumer(database.orders, database.tokens, "copy"), 0
    for _attempt in range(2):
        with suppress(LookupError):
            second += resumed.run(fail_once, enough(1))
    came_again = given[0] == given[1]
    second += resumed.run(copy, enough(written - first - second))
    stored, copied = ([*c.find().sort("_id")] for c in (database.orders, database["copy"]))
    events_ = (database.counts.find_one() or {}).get("events", 0)
    fact("resumed", f"{second} changes; {events_} of {written} had their effect")
    fact("a handler that raises", f"its change came again: {came_again}")
    conclude(f"{first} + {second} changes for {written} writes; equal: {stored == copied}")
    return ChangeStreamResult(written, (first, second), events_, stored == copied, came_again)


# ── 9. Async ──


SPENT: list[Document] = [PAID, {"$group": {"_id": None, "spent": SUM_TOTAL}}]


async def spent_in_motor(uri: str, database: str) -> Decimal:
    """What one migrates from."""
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **client_options(uri, 10))
    try:
        cursor = client.get_database(database, codec_options=CODEC).orders.aggregate(SPENT)
        async for row in cursor:
            return cast(Decimal, row["spent"])
        return Decimal(0)
    finally:
        client.close()


async def spent_in_pymongo(uri: str, database: str) -> Decimal:
    """What one migrates to: `aggregate` and `close` are awaited, too."""
    client: AsyncMongoClient[Document] = AsyncMongoClient(uri, **client_options(uri, 10))
    try:
        cursor = await client.get_database(database, codec_options=CODEC).orders.aggregate(SPENT)
        async for row in cursor:
            return cast(Decimal, row["spent"])
        return Decimal(0)
    finally:
        await client.close()


LOOKUPS, CONCURRENCY = 1_000, 16


async def look_up(client: Any, database: str, keys: Sequence[int]) -> list[object]:
    """By CONCURRENCY workers, on either asyncio client; in the order of `keys`."""
    found = client.get_database(database, codec_options=CODEC).orders
    results: list[object] = [None] * len(keys)
    pending = iter(enumerate(keys))  # shared: each worker takes the next

    async def worker() -> None:
        for index, key in pending:
            results[index] = await found.find_one({"_id": key})

    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(worker())
    return results


async def race(
    uri: str, database: str, keys: Sequence[int]
) -> dict[str, tuple[float, list[object]]]:
    """Client → seconds (the best of three, interleaved) and the documents. Make an asyncio client
    inside the running loop, one for each, and close it there."""
    options, answers = client_options(uri, OPERATION_TIMEOUT_S), dict[str, Any]()
    motor: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **options)
    async with AsyncMongoClient[Document](uri, **options) as client:
        for way, one in [("PyMongo asyncio", client), ("Motor", motor)] * 3:
            started = time.perf_counter()
            found = await look_up(one, database, keys)
            seconds = time.perf_counter() - started
            answers[way] = min(seconds, answers.get(way, (math.inf,))[0]), found
    motor.close()
    return answers


@dataclass(frozen=True)
class AsyncResult:
    per_second: dict[str, float]
    same_answers: bool
    spent: tuple[Decimal, Decimal]  # Motor, PyMongo


@needs_server
def demo_async(workspace: Workspace, database: Database[Document]) -> AsyncResult:
    """9. Async: from Motor to PyMongo's asyncio client, and a thousand look-ups by each.

    Prediction: only `aggregate` and `close` are awaited anew; the documents are the same.

    Trade-off: asyncio is for thousands of connections that wait, threads for code that is written
    already. Either way the pool and the number of workers bound what is under way.
    """
    uri, name = workspace.uri, database.name
    spent = asyncio.run(spent_in_motor(uri, name)), asyncio.run(spent_in_pymongo(uri, name))
    fact("the same function", f"Motor: {spent[0]:,}, PyMongo: {spent[1]:,}")
    ids = [order["_id"] for order in database.orders.find({}, {"_id": 1}).sort("_id")]
    keys = ids[:: max(1, len(ids) // LOOKUPS)][:LOOKUPS]
    answers = asyncio.run(race(uri, name, keys))
    rates = {way: len(keys) / seconds for way, (seconds, _) in answers.items()}
    for way, rate in rates.items():
        fact(way, f"{rate:,.0f} look-ups a second, {CONCURRENCY} at once")
    expected = list(database.orders.find({"_id": {"$in": keys}}).sort("_id"))
    same = all(found == expected for _, found in answers.values())
    fact("Motor (MongoDB's docs)", "end of life 14 May 2026, critical fixes to 14 May 2027")
    conclude(f"the same {len(keys):,} documents by both: {same}")
    return AsyncResult(rates, same, spent)


# ── 10. Without a server ──


@dataclass(frozen=True)
class ClientResult:
    bytes: int  # of a customer
    rejected: list[Rejected]
    error: str
    seconds: float  # until it gave up


def demo_client(workspace: Workspace | None) -> ClientResult:
    """10. Without a server: what the client alone knows, and how long it waits.

    Prediction: it gives up after the 0.5 s that it was given, not after the driver's 30.

    Trade-off: a short timeout turns a slow election into an error.
    """
    customer = next(customers(1))
    encoded = bson.encode(customer, codec_options=CODEC)
    back = bson.decode(encoded, codec_options=CODEC) == customer
    fact("BSON of a customer", f"{len(encoded)} bytes; decoded, equal: {back}")
    report = LoadReport()
    bad: list[Document] = [{"tags": {"a set"}}, {"n": 2**70}, {"x": b"\0" * 2**24}]
    ready = sum(map(len, batches([*measurements(10), *bad], report)))
    for rejected in report.rejected:
        fact("refused by the client", rejected.reason)
    uri = "mongodb://127.0.0.1:1/"  # where nothing listens
    with MongoClient[Document](uri, **client_options(uri, 0.5)) as client:
        started = time.perf_counter()
        error = failure(lambda: client.admin.command("ping"))
        seconds = time.perf_counter() - started
    fact("no server", f"{type(error).__name__} after {seconds:.1f} s")
    conclude(f"{ready} documents ready to be sent, {len(report.rejected)} refused unsent")
    return ClientResult(len(encoded), report.rejected, type(error).__name__, seconds)


# ── Main ──

DEMOS = (
    *(demo_design, demo_validation, demo_aggregation, demo_indexes, demo_time_series),
    *(demo_bulk, demo_transactions, demo_change_streams, demo_async, demo_client),
)


def seed(database: Database[Document], count: int) -> None:
    """The data that demos share; memory stays bounded at any size."""
    sources = {"customers": customers(count), "orders": orders(count), "page_loads": page_loads()}
    for name, documents in sources.items():
        target = database.get_collection(name, write_concern=WriteConcern(w=1))
        report = BulkManager(target).load(documents)
        if report.rejected:
            raise RuntimeError(f"seeding {name}: {report.rejected[0]}")
    database.orders.create_index("customer._id")  # for $lookup


@contextmanager
def open_resources(run: config.Run) -> Iterator[dict[str, object]]:
    """A workspace on the server with a seeded database, or None where there is none."""
    resources: dict[str, object] = {"workspace": None, "database": None}
    resources["index_documents"] = INDEX_DOCUMENTS
    if logger.getEffectiveLevel() > logging.DEBUG:
        # Else each cursor that dies with its server is a traceback of the driver's housekeeping.
        logging.getLogger("pymongo.client").setLevel(logging.CRITICAL)
    try:
        uri, log = run.url("MongoDB", "MONGODB_URI"), CommandLog()
        client, hello = connect(uri, run.settings.connect_timeout_s, log)
    except ServiceUnavailable as error:
        run.fall_back("mongodb", error, "no MongoDB: what the client can do without one")
        yield resources
        return
    workspace = Workspace(uri, client, hello, log)
    run.services["mongodb"] = str(workspace)
    try:
        database = workspace.database()
        try:
            seed(database, run.scale)
        except OperationFailure as error:
            if error.code in (UNAUTHORIZED, ATLAS_ERROR):
                where = f"MONGODB_URI: {config.redact(uri)}"
                raise ConfigError(f"{where} may not write: code {error.code}") from error
            raise
        yield {**resources, "workspace": workspace, "database": database}
    finally:
        workspace.close()


def main(argv: Sequence[str] | None = None) -> int:
    return config.run_script(
        __doc__ or "", DEMOS, open_resources, argv, scale=CUSTOMERS, scale_unit="customers"
    )


if __name__ == "__main__":
    raise SystemExit(main())
