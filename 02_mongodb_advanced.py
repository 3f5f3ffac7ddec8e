"""MongoDB from Python: documents shaped by their queries, and nothing acknowledged is lost.

You will learn to
  - shape documents, bound what grows, and have the server refuse what is malformed
  - answer a data team's questions in aggregation pipelines, each checked in plain Python
  - choose an index by what its plan examines, on places and on time series too
  - load in bulk with every bad document named, and move money in transactions
  - follow changes across a crash, and go from Motor to PyMongo's asyncio client

Run:
  python 02_mongodb_advanced.py                           # without a server: what a client knows
  python servers.py run -- python 02_mongodb_advanced.py  # a replica set of its own
  MONGODB_URI='mongodb+srv://user:password@cluster.mongodb.net/' python 02_mongodb_advanced.py
  python 02_mongodb_advanced.py --only aggregation --scale 250000  # a million orders

Without a server each demo shows what the client can truthfully do (encode, check and explain
pipelines, answer in Python), says so, and names what is missing. Nothing emulates MongoDB.

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
import hashlib
import hmac
import importlib.util
import itertools
import json
import logging
import math
import random
import secrets
import socket
import threading
import time
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import bson
import pymongo
from bson import json_util
from bson.codec_options import CodecOptions, TypeCodec, TypeRegistry
from bson.decimal128 import Decimal128, create_decimal128_context
from bson.errors import BSONError
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, IndexModel, InsertOne, MongoClient, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DocumentTooLarge,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)
from pymongo.read_concern import ReadConcern
from pymongo.server_api import ServerApi
from pymongo.topology_description import TopologyDescription
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

import config
from config import conclude, fact, note, table

logger = logging.getLogger(__name__)

SEED = 8  # the data are the same in every run
DEFAULT_CUSTOMERS = 5_000  # with four orders each: every demo ends in seconds
MOST_ORDERS = 8  # of a customer; four on average
FIRST_DAY, LAST_DAY = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
PAGE_LOADS = 20_000  # measurements, about one in fifty minutes for each page
OPERATION_TIMEOUT_S = 20.0  # outlasts the restart of a server; a runaway operation ends
MAX_POOL_SIZE = 50  # connections a process; the driver's 100 is more than two cores can feed
BATCH_DOCUMENTS = 1_000  # a batch that is refused as a whole costs little to take apart
BATCH_BYTES = 8 * 2**20  # well below the 48 MB of a message
INDEX_DOCUMENTS = 100_000  # the size at which the guide's plans were read
EARTH_RADIUS_KM = 6378.1  # the equatorial radius that MongoDB computes with, not the mean one
DURABLE = WriteConcern(w="majority", j=True)  # acknowledged once a crash cannot undo it

DUPLICATE_KEY, REFUSED_BY_SCHEMA, UNAUTHORIZED, HISTORY_LOST = 11000, 121, 13, 286
ATLAS_ERROR, TIME_LIMIT_EXCEEDED = 8000, 50
TOO_LARGE = frozenset({10334, 17419, 17420})  # BSONObjectTooLarge, and after an update
UNREADABLE = frozenset({15, 22}) | TOO_LARGE  # Overflow (too deeply nested), InvalidBSON
CODE_NAMES = {
    2: "BadValue",
    52: "DollarPrefixedFieldName",
    53: "InvalidIdField",
}  # in bulk: no name
RETRY_LABELS = (
    "TransientTransactionError",
    "RetryableWriteError",
    "UnknownTransactionCommitResult",
    "ResumableChangeStreamError",
)
LABELS = (*RETRY_LABELS, "NonResumableChangeStreamError")

# Longitude first, as GeoJSON has it (GeoNames, CC BY 4.0).
PLACES = """
DE: Berlin 13.41 52.52, Hamburg 9.99 53.55, Munich 11.58 48.14, Cologne 6.95 50.93
FR: Paris 2.35 48.85, Marseille 5.38 43.30, Lyon 4.85 45.75, Toulouse 1.44 43.60
GB: London -0.13 51.51, Birmingham -1.90 52.48, Glasgow -4.26 55.87, Leeds -1.55 53.80
ES: Madrid -3.70 40.42, Barcelona 2.16 41.39, Valencia -0.38 39.47, Zaragoza -0.88 41.66
IT: Rome 12.51 41.89, Milan 9.19 45.46, Naples 14.27 40.85, Turin 7.69 45.07
PL: Warsaw 21.01 52.23, Wrocław 17.03 51.10, Gdańsk 18.65 54.35
US: Chicago -87.65 41.85, Los Angeles -118.24 34.05
JP: Tokyo 139.69 35.69, Osaka 135.50 34.69
KE: Nairobi 36.82 -1.28, Mombasa 39.66 -4.05
"""
CATEGORIES = "books games garden kitchen music tools".split()
FIRST_NAMES = "Ada Alan Barbara Edgar Frances Grace Hedy Jim Katherine Leslie Margaret Tony".split()
LAST_NAMES = "Allen Bachman Codd Date Gray Hopper Kay Lamport Liskov Perlman Ritchie Wing".split()
PAGES = ("/", "/search", "/product", "/checkout")

Document = dict[str, Any]
T = TypeVar("T")

# ── Domain: the data, seeded ────────────────────────────────────────────────────────


class DecimalCodec(TypeCodec):
    """Money: Python's Decimal as BSON's decimal128, both ways. Raises decimal.Inexact beyond 34
    digits (BSON specification, Decimal128)."""

    python_type = Decimal
    bson_type = Decimal128

    def transform_python(self, value: Decimal) -> Decimal128:
        return Decimal128(value)

    def transform_bson(self, value: Decimal128) -> Decimal:
        return value.to_decimal()


CODEC: CodecOptions[Document] = CodecOptions(
    tz_aware=True, type_registry=TypeRegistry([DecimalCodec()])
)


def point(longitude: float, latitude: float) -> Document:
    """A GeoJSON point (RFC 7946): degrees, longitude first."""
    return {"type": "Point", "coordinates": [longitude, latitude]}


def in_milliseconds(when: datetime) -> datetime:
    """As BSON keeps times: what is finer would not come back."""
    return when.replace(microsecond=when.microsecond // 1000 * 1000)


def cities() -> list[Document]:
    """The cities: `_id` is the name."""
    found = []
    for line in PLACES.strip().splitlines():
        country, listed = line.split(": ")
        for city in listed.split(", "):
            name, longitude, latitude = city.rsplit(" ", 2)
            location = point(float(longitude), float(latitude))
            found.append({"_id": name, "country": country, "location": location})
    return found


def products() -> list[Document]:
    """Forty products at prices from 3.50 to 198.50."""
    return [
        {
            "_id": n,
            "category": CATEGORIES[n % 6],
            "price": (Decimal(350 + 500 * (n - 1)) / 100).quantize(Decimal("0.01")),
        }
        for n in range(1, 41)
    ]


def customers(count: int, seed: int = SEED) -> Iterator[Document]:
    """`count` customers in order of their signing up, with embedded addresses. Whoever referred
    somebody was there before: no cycles."""
    rng, places = random.Random(seed), cities()
    for number in range(1, count + 1):
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        homes = rng.sample(places, 1 + (rng.random() < 0.3))
        yield {
            "_id": number,
            "email": f"{name.lower().replace(' ', '.')}.{number}@example.com",
            "name": name,
            "tier": "gold" if rng.random() < 0.1 else "basic",
            "signed_up": in_milliseconds(
                FIRST_DAY + (LAST_DAY - FIRST_DAY) * ((number - 1) / count)
            ),
            "referred_by": rng.randrange(1, number) if number > 1 and rng.random() < 0.4 else None,
            "addresses": [
                {
                    "kind": kind,
                    "street": f"{rng.randint(1, 99)} {rng.choice(LAST_NAMES)} Street",
                    "city": city["_id"],
                    "country": city["country"],
                    "location": city["location"],
                }
                for kind, city in zip(("home", "billing"), homes, strict=False)
            ],
        }


def orders(count: int, seed: int = SEED) -> Iterator[Document]:
    """The orders of `count` customers; a twentieth of them was refunded."""
    rng, number, catalogue = random.Random(seed + 1), 0, products()
    for customer in customers(count, seed):
        home = customer["addresses"][0]
        for _ in range(rng.randint(0, MOST_ORDERS)):
            number += 1
            when = customer["signed_up"] + (LAST_DAY - customer["signed_up"]) * rng.random()
            lines = [
                {"product": p["_id"], "category": p["category"], "quantity": rng.randint(1, 3),
                 "price": p["price"]}
                for p in rng.sample(catalogue, rng.randint(1, 3))
            ]  # fmt: skip
            yield {
                "_id": number,
                "customer": {"_id": customer["_id"], "name": customer["name"]},
                "country": home["country"],
                "placed_at": in_milliseconds(when),
                "status": "refunded" if rng.random() < 0.05 else "paid",
                "lines": lines,
                "total": sum((line["price"] * line["quantity"] for line in lines), Decimal(0)),
            }


def refunds(placed: Iterable[Document]) -> Iterator[Document]:
    """One a refunded order, ten days later."""
    for order in placed:
        if order["status"] == "refunded":
            at = order["placed_at"] + timedelta(days=10)
            yield {"_id": order["_id"], "at": at, "amount": order["total"]}


def page_loads(count: int = PAGE_LOADS, seed: int = SEED) -> Iterator[Document]:
    """A stream of page-load times over thirty days, its nights quiet: log-normal milliseconds."""
    rng = random.Random(seed + 2)
    for number in range(count):
        at = LAST_DAY - timedelta(days=30) + timedelta(days=30) * (number / count)
        if 1 <= at.hour < 4 and rng.random() < 0.97:
            continue
        page = PAGES[rng.randrange(len(PAGES))]
        ms = round(rng.lognormvariate(5.0, 0.5), 1)
        yield {"at": in_milliseconds(at), "meta": {"page": page}, "ms": ms}


# ── Errors: the domain's, with the server's code; labels decide on retries ──────────


class DatabaseError(Exception):
    """What MongoDB or its driver refused. `code` and `labels` are the server's."""

    def __init__(self, message: str, code: int | None = None, labels: Iterable[str] = ()) -> None:
        super().__init__(f"{message} (code {code})" if code else message)
        self.code, self.labels = code, frozenset(labels)


class DuplicateKey(DatabaseError):
    """A unique index has this key already."""


class RefusedBySchema(DatabaseError):
    """The collection's validator refuses the document; the message says which rules."""


class TooLarge(DatabaseError):
    """A document above the 16 MiB that BSON documents may have in MongoDB."""


class TimedOut(DatabaseError):
    """No answer before the deadline; whether a write was done is unknown."""


class Unreachable(DatabaseError):
    """The connection failed, and retrying did not help."""


class HistoryLost(DatabaseError):
    """The oplog no longer reaches back to the resume token, or the collection is gone: read it
    anew."""


def translate(error: PyMongoError | BSONError) -> DatabaseError:
    """The domain's error for the driver's. It holds no value of any document."""
    if isinstance(error, DocumentTooLarge):  # of the driver, and no PyMongoError
        return TooLarge("above 16 MiB")
    if isinstance(error, BSONError):
        return DatabaseError(f"not BSON: {type(error).__name__}")
    details = getattr(error, "details", None) or {}
    of_bulk = details.get("writeConcernErrors") or details.get("writeErrors")
    first = of_bulk[0] if of_bulk else details
    code = first.get("code", getattr(error, "code", None))
    labels = filter(error.has_error_label, LABELS)
    if isinstance(error, ServerSelectionTimeoutError):
        return Unreachable("no server to be had before the deadline", code, labels)
    if error.timeout or code == TIME_LIMIT_EXCEEDED:
        return TimedOut(f"no answer before the deadline: {type(error).__name__}", code, labels)
    if code == DUPLICATE_KEY:
        return DuplicateKey(f"taken: {', '.join(first.get('keyPattern', {}))}", code, labels)
    if code == REFUSED_BY_SCHEMA:
        return RefusedBySchema("; ".join(broken_rules(first.get("errInfo", {}))), code, labels)
    if code in TOO_LARGE:
        return TooLarge("above 16 MiB", code, labels)
    if code == HISTORY_LOST:
        return HistoryLost("the oplog no longer reaches back to it", code, labels)
    if isinstance(error, ConnectionFailure):
        return Unreachable(f"connection failed: {type(error).__name__}", code, labels)
    name = first.get("codeName") or CODE_NAMES.get(code or 0) or type(error).__name__
    return DatabaseError(name, code, labels)


@contextmanager
def domain_errors() -> Iterator[None]:
    """The driver's errors inside the block leave it as the domain's; around `await` too.

    Without the driver's as the cause: its text quotes keys and documents.
    """
    try:
        yield
    except (PyMongoError, BSONError) as error:
        logger.debug("from the driver", exc_info=True)
        raise translate(error) from None


def broken_rules(err_info: Mapping[str, Any]) -> list[str]:
    """The `errInfo` of code 121 as sentences: path, rule, and what was required."""
    rules: list[str] = []

    def walk(detail: Mapping[str, Any], path: str) -> None:
        found, where = len(rules), path or "document"
        for prop in detail.get("propertiesNotSatisfied", ()):
            for inner in prop.get("details", ()):
                walk(inner, f"{path}.{prop['propertyName']}".lstrip("."))
        for rule in detail.get("schemaRulesNotSatisfied", ()):
            walk(rule, path)
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

    walk(err_info.get("details", {}), "")
    return rules


def may_retry(error: PyMongoError) -> bool:
    """Whether a label, or a lost connection, says that trying again may help."""
    return isinstance(error, ConnectionFailure) or any(map(error.has_error_label, RETRY_LABELS))


# ── Connection: one client a process, every operation bounded ───────────────────────


def client_options(uri: str, timeout_s: float) -> dict[str, Any]:
    """Options for any of the three clients; those that `uri` itself sets are left out.

    `timeoutMS` bounds each operation as a whole: choosing a server, connecting, and retries.
    """
    own = {name.lower() for name, _ in parse_qsl(uri.partition("?")[2], keep_blank_values=True)}
    defaults = {
        "appname": "module8-02",
        "retryWrites": True,
        "w": "majority",
        "maxPoolSize": MAX_POOL_SIZE,
        "timeoutMS": round(timeout_s * 1000),
        "serverSelectionTimeoutMS": round(timeout_s * 1000),
        "connectTimeoutMS": round(min(timeout_s, 5) * 1000),
    }
    options = {name: value for name, value in defaults.items() if name.lower() not in own}
    # The commands of API version 1 stay as they are whatever the server's version (Stable API).
    return {**options, "server_api": ServerApi("1"), "tz_aware": True}


class CommandLog(CommandListener):
    """What the client sends: every command is one round trip."""

    def __init__(self) -> None:
        self._open: list[list[CommandStartedEvent]] = []

    @contextmanager
    def record(self) -> Iterator[list[CommandStartedEvent]]:
        """Collects the commands that are sent, by any thread, inside the block."""
        commands: list[CommandStartedEvent] = []
        self._open.append(commands)
        try:
            yield commands
        finally:
            self._open = [other for other in self._open if other is not commands]

    def started(self, event: CommandStartedEvent) -> None:
        for commands in tuple(self._open):
            commands.append(event)

    def succeeded(self, event: CommandSucceededEvent) -> None: ...
    def failed(self, event: CommandFailedEvent) -> None: ...


@dataclass(frozen=True)
class Server:
    """What the server says of itself, asked once."""

    version: tuple[int, ...]
    kind: str  # "replica set rs0", "sharded cluster" or STANDALONE
    on_atlas: bool

    def __str__(self) -> str:
        return f"MongoDB {'.'.join(map(str, self.version[:3]))}, {self.kind}"


STANDALONE = "a standalone server"  # has no oplog: no transactions, no change streams


def connect(uri: str, timeout_s: float, log: CommandLog) -> tuple[MongoClient[Document], Server]:
    """A client whose server answers, and what that server is.

    Raises ServiceUnavailable where nothing answers within `timeout_s`, ConfigError where `uri` is
    malformed or the server refuses.
    """
    with _client(uri, timeout_s) as probe:
        try:
            info, hello = probe.server_info(), probe.admin.command("hello")
            probe.list_database_names()  # unlike the two before, refused without a login
        except (OperationFailure, ConnectionFailure, ConfigurationError) as error:
            raise _refusal(uri, probe, error, timeout_s) from error
    host = str(urlsplit(uri.split(",")[0]).hostname)
    kind = f"replica set {hello['setName']}" if "setName" in hello else STANDALONE
    if hello.get("msg") == "isdbgrid":  # a mongos says so, and nothing else
        kind = "sharded cluster"
    server = Server(tuple(info["versionArray"]), kind, host.endswith(".mongodb.net"))
    return _client(uri, OPERATION_TIMEOUT_S, log), server


def _client(uri: str, timeout_s: float, *listeners: CommandLog) -> MongoClient[Document]:
    try:
        with warnings.catch_warnings():  # by which the driver tells of options that it ignores
            warnings.simplefilter("error", UserWarning)
            options = client_options(uri, timeout_s)
            return MongoClient(uri, event_listeners=listeners, **options)
    except (ConfigurationError, ValueError, UserWarning, OSError) as error:
        resolving = error.__cause__  # of mongodb+srv, dnspython's
        if resolving is not None and type(resolving).__module__.startswith("dns."):
            reason = f"{type(resolving).__name__}: {resolving}".rstrip(".")
            raise config.ServiceUnavailable("MongoDB", reason, uri) from error
        raise config.ConfigError(f"MONGODB_URI: {config.redact(str(error))}") from error


def _refusal(
    uri: str, client: MongoClient[Document], error: PyMongoError, timeout_s: float
) -> Exception:
    """Absent, silent, or there and unwilling? Only the last is the user's to mend."""
    shown = config.redact(uri)
    if isinstance(error, ConfigurationError):  # such as a server too old for the driver
        return config.ConfigError(f"MONGODB_URI: {shown}: {config.redact(str(error))}")
    if isinstance(error, OperationFailure):
        reason = (error.details or {}).get("errmsg", type(error).__name__)
        return config.ConfigError(f"MONGODB_URI: {shown} refuses: {reason}")
    topology = client.topology_description
    errors = [server.error for server in topology.server_descriptions().values()]
    words = in_words(topology)
    absent = config.ServiceUnavailable("MongoDB", words, uri)
    silent = any(isinstance(e, NetworkTimeout) for e in errors)
    leaderless = any(e is None for e in errors)  # a member answers, but the set has no primary
    if silent or leaderless:
        return absent
    seeds = parse_uri(uri, connect_timeout=timeout_s)["nodelist"]
    try:
        config.require_reachable("MongoDB", uri, seeds, timeout_s)
    except config.ServiceUnavailable:
        return absent
    return config.ConfigError(
        f"MONGODB_URI: {shown} accepts connections and refuses this client: {words}. "
        "Do tls and replicaSet in the URI fit the server, and is this address on Atlas's list?"
    )


def in_words(topology: TopologyDescription) -> str:
    """A topology as one sentence: its type, and each server with its type or error."""
    servers = []
    for (host, port), server in sorted(topology.server_descriptions().items(), key=str):
        reason = str(server.error or "").partition(" (configured")[0]
        reason = reason.removeprefix(f"{host}:{port}: ")
        if not reason:
            reason = "answers" if server.is_server_type_known else "no answer"
        servers.append(f"{host}:{port} is {server.server_type_name} ({reason})")
    return f"topology {topology.topology_type_name}: {', '.join(servers) or 'no member that fits'}"


class Workspace:
    """Throw-away databases, `module8_…`, beside whatever the server holds."""

    def __init__(
        self, uri: str, client: MongoClient[Document], server: Server, log: CommandLog
    ) -> None:
        self.uri, self.client, self.server, self.log = uri, client, server, log
        self._names: list[str] = []

    def database(self) -> Database[Document]:
        """A new, empty database; durable writes, money as Decimal."""
        name = f"module8_{secrets.token_hex(6)}"
        self._names.append(name)
        return self.client.get_database(name, codec_options=CODEC, write_concern=DURABLE)

    def close(self) -> None:
        """Drop what was made, and close the client."""
        left = []
        for name in self._names:
            try:
                with pymongo.timeout(5):
                    self.client.drop_database(name)
            except PyMongoError as error:
                logger.debug("%s stays", name, exc_info=True)
                left.append(name)
                if isinstance(error, ConnectionFailure):  # the others would wait as long
                    left = self._names
                    break
        if left:
            logger.warning("these databases may stay behind: %s", ", ".join(left))
        with pymongo.timeout(1):  # the sessions and cursors of a dead server are dead, too
            self.client.close()


Rows = Callable[[str], Iterable[Document]]  # collection → its documents


@dataclass(frozen=True)
class Shop:
    """The data that the reading demos share: generated, and in a database where there is one."""

    count: int  # customers
    database: Database[Document] | None = None

    def generate(self, name: str) -> Iterator[Document]:
        """The documents of one collection, from the seed."""
        sources: dict[str, Callable[[], Iterable[Document]]] = {
            "cities": cities,
            "products": products,
            "customers": partial(customers, self.count),
            "orders": partial(orders, self.count),
            "refunds": lambda: refunds(orders(self.count)),
            "page_loads": page_loads,
        }
        yield from sources[name]()


@dataclass(frozen=True)
class Offline:
    """What a demo found out without a server."""

    found: Mapping[str, object]


SHOP_COLLECTIONS = ("cities", "products", "customers", "orders", "refunds", "page_loads")


def seed(shop: Shop, database: Database[Document]) -> None:
    """Fill an empty database; memory stays bounded at any size."""
    totals = {"customers": shop.count, "orders": shop.count * MOST_ORDERS // 2}  # about
    with config.progress() as bar:
        for name in SHOP_COLLECTIONS:
            task = bar.add_task(f"seeding {name}", total=totals.get(name))
            collection = database.get_collection(name, write_concern=WriteConcern(w=1))
            documents = shop.generate(name)
            report = BulkManager(collection).load(documents, on_batch=partial(bar.advance, task))
            if report.rejected:
                raise DatabaseError(f"seeding {name}: {report.rejected[0]}")
    for name, key in (("orders", "customer._id"), ("customers", "referred_by")):
        database[name].create_index(key)  # for $lookup and $graphLookup


def best_seconds(ways: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """The best time of each way. Rounds are interleaved: a busy moment hits every way."""
    best = dict.fromkeys(ways, math.inf)
    for _round in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Poll `condition`; whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def document_size(collection: Collection[Document], key: object) -> int:
    """The bytes of a stored document, as the server reckons them ($bsonSize)."""
    size = {"$project": {"size": {"$bsonSize": "$$ROOT"}}}
    return int(next(iter(collection.aggregate([{"$match": {"_id": key}}, size])))["size"])


# ── 1. Document design ──────────────────────────────────────────────────────────────


def push_bounded(field_name: str, value: object, newest: int) -> Document:
    """An update that appends and keeps only the `newest` entries: the array cannot grow."""
    return {"$push": {field_name: {"$each": [value], "$slice": -newest}}}


def minute_bucket(load: Document) -> tuple[Document, Document]:
    """The bucket pattern: (filter, update) that puts a measurement into the one document of its
    page and minute, made when its first comes."""
    minute = load["at"].replace(second=0, microsecond=0)
    entry = {"s": load["at"].second, "ms": load["ms"]}
    update = {"$push": {"loads": entry}, "$inc": {"count": 1, "sum_ms": load["ms"]}}
    return {"page": load["meta"]["page"], "minute": minute}, update


def push_until_refused(collection: Collection[Document], chunk_bytes: int) -> tuple[int, TooLarge]:
    """Append chunks to one document until the server refuses: (chunks that it took, the error)."""
    collection.insert_one({"_id": "big", "chunks": []})
    for taken in range(16 * 2**20 // chunk_bytes + 1):
        try:
            with domain_errors():
                update = {"$push": {"chunks": b"\0" * chunk_bytes}}
                collection.update_one({"_id": "big"}, update)
        except TooLarge as error:
            return taken, error
    raise AssertionError("more than 16 MiB were accepted")


@dataclass(frozen=True)
class DesignResult:
    round_trips: dict[str, int]  # for a customer's page with three orders
    growth: dict[int, tuple[int, int]]  # pushes → bytes of the document unbounded, with $slice
    buckets: tuple[int, int, int, int]  # measurements, their bytes, buckets, their bytes
    subset: tuple[int, int]  # bytes of a product with all its reviews, with the newest three
    limit: tuple[int, int | None, bool]  # MiB accepted, code, document still whole


@domain_errors()
def demo_design(workspace: Workspace | None, shop: Shop) -> DesignResult | Offline:
    """1. Document design: embed, refer, bucket, subset, and arrays that must not grow.

    Prediction: what is read together costs one round trip where it is stored together.

    Trade-off: a copy (extended reference) is only right for what does not change, or may be old:
    the name on an order is the name at the time.
    """
    if workspace is None:
        return _design_offline(shop)
    database = workspace.database()
    customer = next(customers(1))
    addresses = [{**a, "customer": 1} for a in customer["addresses"]]
    placed = [{"_id": n, "customer": {"_id": 1, "name": customer["name"]}} for n in range(3)]
    database.embedded.insert_one({**customer, "recent_orders": placed})
    database.customers.insert_one({k: v for k, v in customer.items() if k != "addresses"})
    database.addresses.insert_many([{**a, "_id": n} for n, a in enumerate(addresses)])
    database.orders.insert_many(placed)
    trips = {
        label: _round_trips(workspace, read)
        for label, read in {
            "embedded": lambda: database.embedded.find_one({"_id": 1}),
            "referenced": lambda: [
                database.customers.find_one({"_id": 1}),
                *database.addresses.find({"customer": 1}),
                *database.orders.find({"customer._id": 1}),
            ],
            "name of 3 orders' customers, referenced": lambda: [
                database.customers.find_one({"_id": order["customer"]["_id"]})
                for order in database.orders.find()
            ],
            "the same, extended reference": lambda: [
                order["customer"]["name"] for order in database.orders.find()
            ],
        }.items()
    }
    table(["read", "round trips"], list(trips.items()))
    growth = _measure_growth(database.growth)
    table(
        ["pushes", "bytes, unbounded", "bytes, $slice: -20"],
        [[f"{n:,}" for n in (pushes, *sizes)] for pushes, sizes in growth.items()],
    )
    buckets = _measure_buckets(database)
    fact("bucket by minute", "{:,} documents, {:,} bytes → {:,}, {:,} bytes".format(*buckets))
    subset = _measure_subset(database)
    fact("subset of reviews", "{:,} bytes with all 500, {:,} with the newest 3".format(*subset))
    taken, error = push_until_refused(database.limit, 2**20)
    whole = document_size(database.limit, "big") > taken * 2**20
    fact("16 MiB", f"{taken} MiB accepted, then {type(error).__name__}: {error}")
    fact("the refused document", f"still there with all {taken} MiB: {whole}")
    pushes, (unbounded, sliced) = list(growth.items())[-1]
    conclude(
        f"{trips['referenced']} round trips → {trips['embedded']}; after {pushes:,} pushes "
        f"{unbounded / sliced:.0f} times the bytes of the bounded array"
    )
    return DesignResult(trips, growth, buckets, subset, (taken, error.code, whole))


def _round_trips(workspace: Workspace, read: Callable[[], object]) -> int:
    with workspace.log.record() as commands:
        read()
    return len(commands)


def _measure_growth(collection: Collection[Document]) -> dict[int, tuple[int, int]]:
    collection.insert_many([{"_id": "all", "events": []}, {"_id": "newest", "events": []}])
    sizes, entry = {}, {"page": "/product", "ms": 123.4}
    for done, pushes in itertools.pairwise((0, 10, 100, 1_000)):
        bounded = push_bounded("events", entry, 20)
        updates = [UpdateOne({"_id": "all"}, {"$push": {"events": entry}})] * (pushes - done)
        updates += [UpdateOne({"_id": "newest"}, bounded)] * (pushes - done)
        collection.bulk_write(updates)
        sizes[pushes] = document_size(collection, "all"), document_size(collection, "newest")
    return sizes


def _measure_buckets(database: Database[Document]) -> tuple[int, int, int, int]:
    """A thousand measurements of one page within ten minutes, each way."""
    rng = random.Random(SEED)
    loads = [
        {"at": FIRST_DAY + timedelta(seconds=0.6 * n), "meta": {"page": "/"}, "ms": rng.random()}
        for n in range(1_000)
    ]
    database.loads.insert_many([dict(load) for load in loads])
    # Else two writers at once may each make the bucket of a minute.
    database.buckets.create_index({"page": 1, "minute": 1}, unique=True)
    updates = [UpdateOne(*minute_bucket(load), upsert=True) for load in loads]
    database.buckets.bulk_write(updates)
    sizes = [int(database.command("collStats", name)["size"]) for name in ("loads", "buckets")]
    return len(loads), sizes[0], database.buckets.count_documents({}), sizes[1]


def _measure_subset(database: Database[Document]) -> tuple[int, int]:
    reviews = [{"by": n, "stars": n % 5 + 1, "text": "as described " * 8} for n in range(500)]
    database.products.insert_many(
        [{"_id": "all", "reviews": reviews}, {"_id": "subset", "reviews": reviews[-3:]}]
    )
    return document_size(database.products, "all"), document_size(database.products, "subset")


def _design_offline(shop: Shop) -> Offline:
    customer = next(shop.generate("customers"))
    encoded = bson.encode(customer, codec_options=CODEC)
    bare = len(
        bson.encode({k: v for k, v in customer.items() if k != "addresses"}, codec_options=CODEC)
    )
    fact("BSON of a customer", f"{len(encoded)} bytes, {len(encoded) - bare} of them addresses")
    fact("and back", f"equal: {bson.decode(encoded, codec_options=CODEC) == customer}")
    price = bson.encode({"price": Decimal("3.50")}, codec_options=CODEC)
    fact("Extended JSON", json_util.dumps(bson.decode(price)))
    when = ObjectId.from_datetime(FIRST_DAY).generation_time
    fact("an ObjectId's time", f"{when.isoformat()}: seconds are its first 4 bytes")
    entry = {"page": "/product", "ms": 123.4}
    for pushes in (10, 100, 1_000):
        size = len(bson.encode({"_id": "all", "events": [entry] * pushes}))
        fact(f"with {pushes:,} entries", f"{size:,} bytes; 16 MiB is the server's limit")
    note("round trips, growth by $push and the refusal at 16 MiB need a server")
    conclude("encoded, measured and decoded by the client")
    return Offline({"bytes": len(encoded), "decoded": bson.decode(encoded, codec_options=CODEC)})


# ── 2. Validation ───────────────────────────────────────────────────────────────────

ADDRESS_SCHEMA: Document = {
    "bsonType": "object",
    "required": ["kind", "city", "location"],
    "properties": {
        "kind": {"enum": ["home", "billing"]},
        "location": {
            "bsonType": "object",
            "required": ["type", "coordinates"],
            "properties": {"coordinates": {"bsonType": "array", "minItems": 2, "maxItems": 2}},
        },
    },
}
CUSTOMER_SCHEMA: Document = {
    "bsonType": "object",
    "required": ["email", "signed_up", "addresses"],
    "properties": {
        "email": {"bsonType": "string", "pattern": "^[^@A-Z]+@[^@A-Z]+$"},
        "signed_up": {"bsonType": "date"},
        "tier": {"enum": ["basic", "gold"]},
        "addresses": {"bsonType": "array", "minItems": 1, "maxItems": 5, "items": ADDRESS_SCHEMA},
    },
}


class CollectionManager:
    """Collections whose documents the server checks."""

    def __init__(self, database: Database[Document]) -> None:
        self._database = database

    def create(self, name: str, schema: Document, **options: Any) -> Collection[Document]:
        """A new collection with a `$jsonSchema`. Raises DatabaseError where it exists."""
        with domain_errors():
            return self._database.create_collection(
                name, validator={"$jsonSchema": schema}, validationAction="error", **options
            )

    def insert(self, name: str, document: Document) -> Any:
        """Store one document; returns its `_id`. Raises RefusedBySchema, DuplicateKey, TooLarge."""
        with domain_errors():
            return self._database[name].insert_one(document).inserted_id

    def violations(self, name: str, schema: Document) -> int:
        """How many stored documents `schema` would refuse: ask before tightening."""
        with domain_errors():
            return self._database[name].count_documents({"$nor": [{"$jsonSchema": schema}]})

    def tighten(
        self, name: str, schema: Document, *, action: str = "error", level: str = "strict"
    ) -> None:
        """Replace the schema under the data (collMod), which checks no stored document.

        `action` "warn" stores and logs; `level` "moderate" spares updates of documents that were
        invalid before.
        """
        with domain_errors():
            self._database.command(
                "collMod", name, validator={"$jsonSchema": schema},
                validationAction=action, validationLevel=level,
            )  # fmt: skip


def hash_password(password: str, salt: bytes) -> bytes:
    """scrypt (RFC 7914) at the cost of OWASP's Password Storage Cheat Sheet."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=5, maxmem=2**26)


def log_in_unsafely(users: Collection[Document], name: Any, password: Any) -> bool:
    """A filter made of what the request brought: an object in it is an operator. Only here to be
    defeated."""
    return users.find_one({"name": name, "password": password}) is not None


def equals(value: object) -> Document:
    """A condition that can only ever mean equality. Raises TypeError for anything but a string:
    the JSON of a request can hold an object where a string was meant."""
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise TypeError("half a surrogate pair, which JSON can hold, is no text")
    return {"$eq": value}


def log_in(users: Collection[Document], name: object, password: object) -> bool:
    """Look up by the name alone, then compare hashes in constant time. Raises TypeError."""
    condition, given = {"name": equals(name)}, equals(password)["$eq"]
    user = users.find_one(condition) or {"salt": b"nobody", "hash": b""}
    return hmac.compare_digest(hash_password(given, user["salt"]), user["hash"])


@dataclass(frozen=True)
class ValidationResult:
    refused: dict[str, str]  # bad document → the broken rules
    codes: tuple[int | None, ...]  # of the refusals
    warned: bool  # whether validationAction "warn" stored a bad document
    violations: int
    updates: dict[str, bool]  # validationLevel → whether an old invalid document may be updated
    logins: dict[str, bool]  # attack or password → let in


BAD_CUSTOMERS: dict[str, Document] = {
    "no address": {"addresses": []},
    "e-mail in capitals": {"email": "ADA@EXAMPLE.COM"},
    "signed up as text": {"signed_up": "2024-01-01"},
    "half a location": {
        "addresses": [
            {"kind": "home", "city": "Berlin", "location": {"type": "Point", "coordinates": [13.4]}}
        ]
    },
}
INJECTION = {"$ne": None}  # as the JSON of a request brings it


@domain_errors()
def demo_validation(workspace: Workspace | None, shop: Shop) -> ValidationResult | Offline:
    """2. Validation: a schema in the server, tightened under the data; injection defeated.

    Prediction: code 121 says which rule of which field was broken.

    Trade-off: a validator sees one document. What holds between documents is for unique indexes
    and transactions.
    """
    customer = next(shop.generate("customers"))
    if workspace is None:
        return _validation_offline()
    database = workspace.database()
    manager = CollectionManager(database)
    stored = manager.create("customers", CUSTOMER_SCHEMA)
    manager.insert("customers", dict(customer))
    refused, codes = {}, set()
    for number, (label, change) in enumerate(BAD_CUSTOMERS.items(), start=2):
        try:
            manager.insert("customers", {**customer, "_id": number, **change})
        except RefusedBySchema as error:
            refused[label] = str(error)
            codes.add(error.code)
    table(["bad document", "refused because"], list(refused.items()))
    manager.tighten("customers", CUSTOMER_SCHEMA, action="warn")
    warned = manager.insert("customers", {"_id": 90, "email": "old"}) == 90
    fact('validationAction "warn"', f"stored the document without addresses: {warned}")
    tighter = {**CUSTOMER_SCHEMA, "required": [*CUSTOMER_SCHEMA["required"], "tier"]}
    violations = manager.violations("customers", tighter)
    fact("before tightening", f"{violations} of {stored.count_documents({})} documents break it")
    updates = {}
    for level in ("moderate", "strict"):
        manager.tighten("customers", tighter, level=level)
        try:
            with domain_errors():
                updates[level] = (
                    stored.update_one({"_id": 90}, {"$inc": {"n": 1}}).modified_count > 0
                )
        except RefusedBySchema:
            updates[level] = False
    fact("the old one updated", ", ".join(f"{level}: {done}" for level, done in updates.items()))
    logins = _attack(database.users)
    fact("log in, unguarded", f"password {json.dumps(INJECTION)}: let in: {logins['unguarded']}")
    fact(
        "log in, guarded",
        f"the same: let in: {logins['guarded']}; the right one: {logins['right']}",
    )
    conclude(f"{len(refused)} of {len(BAD_CUSTOMERS)} bad documents refused by the server")
    return ValidationResult(refused, tuple(codes), warned, violations, updates, logins)


def _attack(users: Collection[Document]) -> dict[str, bool]:
    salt = secrets.token_bytes(16)
    users.insert_one(
        {"name": "ada", "password": "horse", "salt": salt, "hash": hash_password("horse", salt)}
    )
    logins = {"unguarded": log_in_unsafely(users, "ada", INJECTION)}
    try:
        logins["guarded"] = log_in(users, "ada", INJECTION)
    except TypeError:
        logins["guarded"] = False
    logins |= {"wrong": log_in(users, "ada", "mule"), "right": log_in(users, "ada", "horse")}
    return logins


def _validation_offline() -> Offline:
    fact("$jsonSchema", f"{len(bson.encode(CUSTOMER_SCHEMA))} bytes of BSON, sent with collMod")
    for name, rule in CUSTOMER_SCHEMA["properties"].items():
        fact(name, json.dumps({k: v for k, v in rule.items() if k != "items"}))
    fact("unguarded filter", json.dumps({"name": "ada", "password": INJECTION}))
    refused = ""
    try:
        equals(INJECTION)
    except TypeError as error:
        refused = str(error)
    fact("guarded", f"TypeError: {refused}; no filter is built")
    note("the server's refusals (code 121) and collMod need a server")
    conclude("the guard against injection is the client's and works here too")
    return Offline({"refused": refused})


# ── 3. Aggregation ──────────────────────────────────────────────────────────────────
# Each question twice: as a pipeline, and folded over the documents in plain Python as a check.


@dataclass(frozen=True)
class Recipe:
    """A question of the data team: its pipeline, stage by stage with what each is for, and the
    fold that answers it from all documents."""

    question: str
    collection: str
    stages: tuple[tuple[str, Document], ...]
    fields: Mapping[str, tuple[str, ...]]  # collection → fields that the fold reads
    fold: Callable[[Rows], list[Document]]
    where: Mapping[str, Document] = field(default_factory=dict)  # collection → what it may skip

    @property
    def pipeline(self) -> list[Document]:
        return [stage for _why, stage in self.stages]


BANDS = [Decimal(n) for n in (0, 50, 100, 200, 400)]
RECENT = datetime(2025, 7, 1, tzinfo=UTC)
FIRST_MONTH = FIRST_DAY + timedelta(days=30)
DAY, WEEK = timedelta(days=1), timedelta(days=7)
HOUR = timedelta(hours=1)
PAID: Document = {"$match": {"status": "paid"}}
SUM_TOTAL, COUNT = {"$sum": "$total"}, {"$sum": 1}


def truncated(path: str, unit: str) -> Document:
    """The beginning of the day, hour or month that the date at `path` lies in, in UTC."""
    return {"$dateTrunc": {"date": path, "unit": unit}}


def month_of(when: datetime) -> datetime:
    return when.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def day_of(when: datetime) -> datetime:
    return when.replace(hour=0, minute=0, second=0, microsecond=0)


def paid(rows: Rows) -> Iterator[Document]:
    return (order for order in rows("orders") if order["status"] == "paid")


def summed(pairs: Iterable[tuple[Any, Decimal]]) -> dict[Any, Decimal]:
    totals: dict[Any, Decimal] = defaultdict(Decimal)
    for key, amount in pairs:
        totals[key] += amount
    return totals


def fold_revenue(rows: Rows) -> list[Document]:
    by_country, by_month, by_category = (defaultdict[Any, Decimal](Decimal) for _ in range(3))
    for order in paid(rows):
        by_country[order["country"]] += order["total"]
        by_month[month_of(order["placed_at"])] += order["total"]
        for line in order["lines"]:
            by_category[line["category"]] += line["price"] * line["quantity"]
    best = sorted(by_country.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    answer = {"by_country": best, "by_month": sorted(by_month.items()),
              "by_category": sorted(by_category.items())}  # fmt: skip
    return [{k: [{"_id": i, "revenue": r} for i, r in pairs] for k, pairs in answer.items()}]


def fold_sizes(rows: Rows) -> list[Document]:
    totals = sorted(order["total"] for order in paid(rows))
    bands: dict[Any, list[Decimal]] = defaultdict(list)
    for total in totals:
        place = bisect_right(BANDS, total)
        bands[BANDS[place - 1] if place < len(BANDS) else "more"].append(total)
    # As the server does: n / 4 each, rounded half up; equal values stay in one bucket.
    quarters, size = list[list[Decimal]](), max(1, int(len(totals) / 4 + 0.5))
    position = 0
    while position < len(totals):
        end = position + size if len(quarters) < 3 else len(totals)
        while 0 < end < len(totals) and totals[end] == totals[end - 1]:
            end += 1
        quarters.append(totals[position:end])
        position = end
    upper = [q[0] for q in quarters[1:]] + [q[-1] for q in quarters[-1:]]
    return [
        {
            "bands": [{"_id": b, "orders": len(t), "revenue": sum(t)} for b, t in bands.items()],
            "quarters": [
                {"_id": {"min": q[0], "max": high}, "orders": len(q)}
                for q, high in zip(quarters, upper, strict=True)
            ],
        }
    ]


def fold_gold(rows: Rows) -> list[Document]:
    gold = {c["_id"]: c["name"] for c in rows("customers") if c["tier"] == "gold"}
    placed = [o for o in paid(rows) if o["placed_at"] >= RECENT and o["customer"]["_id"] in gold]
    spent = summed((o["customer"]["_id"], o["total"]) for o in placed)
    count = Counter(o["customer"]["_id"] for o in placed)
    best = sorted(spent, key=lambda key: (-spent[key], key))[:5]
    return [{"_id": k, "name": gold[k], "spent": spent[k], "orders": count[k]} for k in best]


def fold_best_days(rows: Rows) -> list[Document]:
    revenue = summed((day_of(o["placed_at"]), o["total"]) for o in paid(rows))
    above = Counter(revenue.values())
    answer = []
    with localcontext(create_decimal128_context()):
        for day, amount in revenue.items():
            week = [revenue[d] for d in (day - n * DAY for n in range(7)) if d in revenue]
            rank = 1 + sum(n for other, n in above.items() if other > amount)
            average = round(sum(week, Decimal(0)) / len(week), 2)
            answer.append({"_id": day, "revenue": amount, "average": average, "rank": rank})
    return sorted(answer, key=lambda row: (row["rank"], row["_id"]))[:10]


def fold_referrals(rows: Rows) -> list[Document]:
    referrer = {c["_id"]: c for c in rows("customers")}
    below, depth = Counter[int](), Counter[int]()
    for customer in referrer:
        root, steps = customer, 0
        while referrer[root]["referred_by"] is not None:
            root, steps = referrer[root]["referred_by"], steps + 1
        if steps and referrer[root]["signed_up"] < FIRST_MONTH:
            below[root] += 1
            depth[root] = max(depth[root], steps)
    best = sorted(below, key=lambda root: (-below[root], root))[:5]
    return [{"_id": root, "people": below[root], "depth": depth[root]} for root in best]


def fold_net(rows: Rows) -> list[Document]:
    sold = summed((month_of(o["placed_at"]), o["total"]) for o in rows("orders"))
    back = summed((month_of(r["at"]), r["amount"]) for r in rows("refunds"))
    months = {m: (sold.get(m, Decimal(0)), back.get(m, Decimal(0))) for m in {*sold, *back}}
    return [
        {"_id": month, "sold": s, "refunded": r, "net": s - r}
        for month, (s, r) in sorted(months.items())
    ]


def fold_checkout(rows: Rows) -> list[Document]:
    hours: dict[datetime, list[float]] = defaultdict(list)
    for load in rows("page_loads"):
        if load["meta"]["page"] == "/checkout":
            hours[load["at"].replace(minute=0, second=0, microsecond=0)].append(load["ms"])
    mean = {hour: sum(values) / len(values) for hour, values in hours.items()}
    answer = [{"_id": hour, "loads": len(hours[hour]), "ms": mean[hour]} for hour in hours]
    for start, end in itertools.pairwise(sorted(hours)):
        gap = (end - start) // HOUR
        for step in range(1, gap):
            ms = mean[start] + (mean[end] - mean[start]) * step / gap
            answer.append({"_id": start + step * HOUR, "loads": 0, "ms": ms})
    return sorted(answer, key=lambda row: cast(datetime, row["_id"]))


def fold_top(rows: Rows) -> list[Document]:
    spent = summed(((o["country"], o["customer"]["_id"]), o["total"]) for o in paid(rows))
    countries: dict[str, list[Document]] = defaultdict(list)
    for (country, key), amount in sorted(spent.items(), key=lambda item: (-item[1], item[0][1])):
        countries[country].append({"customer": key, "spent": amount})
    return [{"_id": country, "top": top[:3]} for country, top in sorted(countries.items())]


def fold_daily(rows: Rows) -> list[Document]:
    orders_, revenue = Counter[Any](), defaultdict[Any, Decimal](Decimal)
    for order in rows("orders"):
        key = day_of(order["placed_at"]), order["country"]
        is_paid = order["status"] == "paid"
        orders_[key] += is_paid
        revenue[key] += order["total"] if is_paid else 0
    return [
        {"_id": {"day": day, "country": country}, "orders": orders_[day, country],
         "revenue": revenue[day, country]}
        for day, country in sorted(revenue)
    ]  # fmt: skip


def by_id(group_by: object, total: object = SUM_TOTAL) -> list[Document]:
    """Revenue for each value of `group_by`, in its order."""
    return [{"$group": {"_id": group_by, "revenue": total}}, {"$sort": {"_id": 1}}]


RECIPES = (
    Recipe(
        "revenue, three ways",
        "orders",
        (
            ("first, so that an index can serve it", PAID),
            ("three answers from one pass", {"$facet": {
                "by_country": [
                    {"$group": {"_id": "$country", "revenue": SUM_TOTAL}},
                    {"$sort": {"revenue": -1, "_id": 1}}, {"$limit": 5},
                ],
                "by_month": by_id(truncated("$placed_at", "month")),
                "by_category": [
                    {"$unwind": "$lines"},
                    *by_id(
                        "$lines.category",
                        {"$sum": {"$multiply": ["$lines.price", "$lines.quantity"]}},
                    ),
                ],
            }}),
        ),
        {"orders": ("status", "country", "placed_at", "total", "lines")},
        fold_revenue,
        {"orders": PAID["$match"]},
    ),
    Recipe(
        "sizes of orders",
        "orders",
        (
            ("what was paid", PAID),
            ("bounds that were given, and bounds that quarter the orders", {"$facet": {
                "bands": [
                    {"$bucket": {"groupBy": "$total", "boundaries": BANDS, "default": "more",
                                 "output": {"orders": COUNT, "revenue": SUM_TOTAL}}},
                ],
                "quarters": [
                    {"$bucketAuto": {"groupBy": "$total", "buckets": 4,
                                     "output": {"orders": COUNT}}},
                ],
            }}),
        ),
        {"orders": ("status", "total")},
        fold_sizes,
        {"orders": PAID["$match"]},
    ),
    Recipe(
        "gold customers since July",
        "customers",
        (
            ("few customers", {"$match": {"tier": "gold"}}),
            ("joined by an index, summed inside the join", {"$lookup": {
                "from": "orders", "localField": "_id", "foreignField": "customer._id",
                "pipeline": [
                    {"$match": {"placed_at": {"$gte": RECENT}, **PAID["$match"]}},
                    {"$group": {"_id": None, "spent": SUM_TOTAL, "orders": COUNT}},
                ],
                "as": "recent",
            }}),
            ("drops who bought nothing", {"$unwind": "$recent"}),
            ("best first, equal ones by key", {"$sort": {"recent.spent": -1, "_id": 1}}),
            ("with the sort: five kept in memory", {"$limit": 5}),
            ("only what is read", {"$project": {
                "name": 1, "spent": "$recent.spent", "orders": "$recent.orders",
            }}),
        ),
        {"customers": ("_id", "tier", "name"),
         "orders": ("status", "customer._id", "placed_at", "total")},
        fold_gold,
        {"customers": {"tier": "gold"},
         "orders": {"placed_at": {"$gte": RECENT}, **PAID["$match"]}},
    ),
    Recipe(
        "days: 7-day average, rank",
        "orders",
        (
            ("what was paid", PAID),
            ("one document a day", by_id(truncated("$placed_at", "day"))[0]),
            ("by date, not by position: a day without orders is a day", {"$setWindowFields": {
                "sortBy": {"_id": 1},
                "output": {"average": {
                    "$avg": "$revenue", "window": {"range": [-6, 0], "unit": "day"},
                }},
            }}),
            ("another order, so another stage", {"$setWindowFields": {
                "sortBy": {"revenue": -1}, "output": {"rank": {"$rank": {}}},
            }}),
            ("to cents, half to even", {"$set": {"average": {"$round": ["$average", 2]}}}),
            ("equal days by date", {"$sort": {"rank": 1, "_id": 1}}),
            ("the best ten", {"$limit": 10}),
        ),
        {"orders": ("status", "placed_at", "total")},
        fold_best_days,
        {"orders": PAID["$match"]},
    ),
    Recipe(
        "referral trees",
        "customers",
        (
            ("founders of the first month", {"$match": {
                "referred_by": None, "signed_up": {"$lt": FIRST_MONTH},
            }}),
            ("everybody below, by the index on referred_by", {"$graphLookup": {
                "from": "customers", "startWith": "$_id", "connectFromField": "_id",
                "connectToField": "referred_by", "depthField": "depth", "as": "below",
            }}),
            ("numbers, not the people", {"$project": {
                "people": {"$size": "$below"}, "depth": {"$add": [{"$max": "$below.depth"}, 1]},
            }}),
            ("trees of more than one", {"$match": {"people": {"$gt": 0}}}),
            ("largest first", {"$sort": {"people": -1, "_id": 1}}),
            ("five of them", {"$limit": 5}),
        ),
        {"customers": ("_id", "referred_by", "signed_up")},
        fold_referrals,
    ),
    Recipe(
        "sold and refunded",
        "orders",
        (
            ("a common form", {"$project": {
                "month": truncated("$placed_at", "month"), "sold": "$total",
            }}),
            ("the other collection in that form", {"$unionWith": {"coll": "refunds", "pipeline": [
                {"$project": {"month": truncated("$at", "month"), "refunded": "$amount"}},
            ]}}),
            ("a missing field adds nothing", {"$group": {
                "_id": "$month", "sold": {"$sum": "$sold"}, "refunded": {"$sum": "$refunded"},
            }}),
            ("both in one row", {"$set": {"net": {"$subtract": ["$sold", "$refunded"]}}}),
            ("by month", {"$sort": {"_id": 1}}),
        ),
        {"orders": ("placed_at", "total"), "refunds": ("at", "amount")},
        fold_net,
    ),
    Recipe(
        "checkout by hour, no gaps",
        "page_loads",
        (
            ("one series", {"$match": {"meta.page": "/checkout"}}),
            ("one document an hour", {"$group": {
                "_id": truncated("$at", "hour"), "loads": COUNT, "ms": {"$avg": "$ms"},
            }}),
            ("the hours in which nothing happened", {"$densify": {
                "field": "_id", "range": {"step": 1, "unit": "hour", "bounds": "full"},
            }}),
            ("a count of nothing is 0; a gauge is interpolated", {"$fill": {
                "sortBy": {"_id": 1},
                "output": {"loads": {"value": 0}, "ms": {"method": "linear"}},
            }}),
            ("by hour", {"$sort": {"_id": 1}}),
        ),
        {"page_loads": ("at", "meta.page", "ms")},
        fold_checkout,
        {"page_loads": {"meta.page": "/checkout"}},
    ),
    Recipe(
        "top 3 customers a country",
        "orders",
        (
            ("what was paid", PAID),
            ("each customer in a country", {"$group": {
                "_id": {"country": "$country", "customer": "$customer._id"}, "spent": SUM_TOTAL,
            }}),
            ("three kept a country, never all sorted", {"$group": {
                "_id": "$_id.country",
                "top": {"$topN": {
                    "n": 3, "sortBy": {"spent": -1, "_id.customer": 1},
                    "output": {"customer": "$_id.customer", "spent": "$spent"},
                }},
            }}),
            ("by country", {"$sort": {"_id": 1}}),
        ),
        {"orders": ("status", "country", "customer._id", "total")},
        fold_top,
        {"orders": PAID["$match"]},
    ),
)  # fmt: skip


def daily_revenue(since: datetime, until: datetime = LAST_DAY) -> list[tuple[str, Document]]:
    """The materialised view `daily_revenue`, anew for the days of `since` to `until`.

    Idempotent: a day is computed whole and replaces itself. Days stay when their last paid order
    goes, at 0: what $merge does not write it does not remove either. So mark orders, and delete
    none: a day whose last order is deleted would keep its old row.
    """
    whole_days = {"$gte": day_of(since), "$lt": day_of(until) + DAY}
    is_paid = {"$eq": ["$status", "paid"]}
    grouped = {
        "_id": {"day": truncated("$placed_at", "day"), "country": "$country"},
        "orders": {"$sum": {"$cond": [is_paid, 1, 0]}},
        "revenue": {"$sum": {"$cond": [is_paid, "$total", Decimal(0)]}},
    }
    merge = {"into": "daily_revenue", "whenMatched": "replace", "whenNotMatched": "insert"}
    return [
        ("whole days, and only the corrected ones", {"$match": {"placed_at": whole_days}}),
        ("refunded orders too, at nothing", {"$group": grouped}),
        ("replaces a day, never adds to it", {"$merge": merge}),
    ]


KNOWN_STAGES = frozenset(
    "$match $group $facet $sort $limit $unwind $bucket $bucketAuto $lookup $project $set $unset "
    "$addFields $replaceRoot $sample $sortByCount $merge $setWindowFields $graphLookup $unionWith "
    "$densify $fill $geoNear $skip $count $out".split()
)
NOT_IN_FACET = frozenset({"$facet", "$geoNear", "$merge", "$out"})
NOT_INSIDE = frozenset({"$merge", "$out"})  # a $lookup or $unionWith


def check_pipeline(pipeline: Sequence[Document], forbidden: frozenset[str] = frozenset()) -> int:
    """What a client can know of a pipeline: returns its bytes of BSON.

    Raises ValueError for a stage that is not one, is unknown to this script, is `forbidden` or
    stands where the server refuses it; bson.errors.InvalidDocument for what BSON cannot hold.
    """
    for position, stage in enumerate(pipeline):
        if len(stage) != 1 or next(iter(stage)) not in KNOWN_STAGES:
            raise ValueError(f"stage {position} is none that this script knows: {list(stage)}")
        ((name, value),) = stage.items()
        if name in forbidden or (name in NOT_INSIDE and position < len(pipeline) - 1):
            raise ValueError(f"{name} is not allowed here")
        if name == "$geoNear" and position:
            raise ValueError("$geoNear is only allowed as the first stage")
        if name == "$facet":
            for sub in value.values():
                check_pipeline(sub, NOT_IN_FACET)
        elif name in ("$lookup", "$unionWith") and isinstance(value, dict):
            check_pipeline(value.get("pipeline", []), NOT_INSIDE)
    return len(bson.encode({"pipeline": list(pipeline)}, codec_options=CODEC))


class AggregationManager:
    """Pipelines on one database, with the bytes that their answers take on the wire."""

    def __init__(self, database: Database[Document]) -> None:
        self._database = database
        self.bytes_moved = 0

    def run(self, collection: str, pipeline: Sequence[Document]) -> list[Document]:
        """The whole answer: bound it by `$limit`. Raises DatabaseError."""
        with domain_errors():
            batches = self._database[collection].aggregate_raw_batches(pipeline, allowDiskUse=True)
            return list(self._decoded(batches))

    def fetch(
        self, collection: str, fields: Sequence[str], where: Document | None = None
    ) -> Iterator[Document]:
        """Those fields of the documents that match: what folding on the client has to move."""
        projection = {"_id": False, **dict.fromkeys(fields, True)}
        with domain_errors():
            found = self._database[collection].find_raw_batches(where or {}, projection)
            yield from self._decoded(found)

    def _decoded(self, raw_batches: Any) -> Iterator[Document]:
        for batch in raw_batches:
            self.bytes_moved += len(batch)
            yield from bson.decode_all(batch, codec_options=CODEC)


def same(left: Any, right: Any) -> bool:
    """Equal; floats to nine digits, since sums of floats depend on their order."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)
    return bool(left == right)


@dataclass(frozen=True)
class ViewResult:
    rows: int
    agrees: tuple[bool, bool, bool]  # when built, after the late correction, after a repetition
    rewritten: int  # rows that the refresh after the correction wrote


@dataclass(frozen=True)
class AggregationResult:
    rows: dict[str, int]
    agree: dict[str, bool]
    bytes_moved: dict[str, tuple[int, int]]  # question → the pipeline's answer, the fold's input
    view: ViewResult


@domain_errors()
def demo_aggregation(workspace: Workspace | None, shop: Shop) -> AggregationResult | Offline:
    """3. Aggregation: nine pipelines, each checked by plain Python.

    Prediction: the answers agree. The server moves kilobytes, folding on the client megabytes.

    Trade-off: a pipeline runs where the orders are taken. What is asked every minute belongs in a
    materialised view, what scans years in a column store.
    """
    if workspace is None or shop.database is None:
        return _aggregation_offline(shop)
    rounds = 3 if shop.count <= DEFAULT_CUSTOMERS else 1  # folding a million orders takes a while
    rows, agree, moved, lines = {}, {}, {}, []
    for recipe in RECIPES:
        name, (server, client) = recipe.question, _ask_both(shop.database, recipe, rounds)
        rows[name] = len(server.answer)
        agree[name] = same(server.answer, client.answer)
        moved[name] = server.bytes_moved, client.bytes_moved
        lines.append((
            name, rows[name], f"{server.best_s * 1e3:.0f}", f"{client.best_s * 1e3:.0f}",
            f"{client.best_s / server.best_s:.1f}", *(f"{b / 1024:,.1f}" for b in moved[name]),
            agree[name],
        ))  # fmt: skip
    columns = ["question", "rows", "ms", "fold, ms", "ratio", "KiB", "fold, KiB", "agree"]
    table(columns, lines)
    view = _materialise(workspace.database())
    fact("$merge", f"a view of {view.rows} rows; a late correction rewrote {view.rewritten}")
    fact(
        "view = plain Python", "built: {}, corrected: {}, corrected again: {}".format(*view.agrees)
    )
    answers = sum(agree.values()) + all(view.agrees)
    server_kib, fold_kib = (sum(m[side] for m in moved.values()) / 1024 for side in (0, 1))
    conclude(
        f"{answers} of {len(RECIPES) + 1} agree with plain Python; "
        f"{server_kib:,.0f} KiB moved where folding moves {fold_kib:,.0f}"
    )
    return AggregationResult(rows, agree, moved, view)


@dataclass(frozen=True)
class _Asked:
    answer: list[Document]
    best_s: float
    bytes_moved: int


def _ask_both(database: Database[Document], recipe: Recipe, rounds: int) -> tuple[_Asked, _Asked]:
    """The pipeline on the server, and the fold over what it needs, each with its bytes."""
    managers = {side: AggregationManager(database) for side in ("server", "client")}
    answers: dict[str, list[Document]] = {}

    def ask() -> None:
        answers["server"] = managers["server"].run(recipe.collection, recipe.pipeline)

    def fold() -> None:
        fetch = managers["client"].fetch
        answers["client"] = recipe.fold(
            lambda name: fetch(name, recipe.fields[name], recipe.where.get(name))
        )

    best = best_seconds({"server": ask, "client": fold}, rounds)
    server, client = (
        _Asked(answers[side], best[side], manager.bytes_moved // rounds)
        for side, manager in managers.items()
    )
    return server, client


def _materialise(database: Database[Document]) -> ViewResult:
    """A view over 200 customers' orders; then an old order turns out to have been refunded."""
    stored = list(orders(200))
    database.orders.insert_many(stored)
    manager = AggregationManager(database)

    def refresh(since: datetime, until: datetime) -> bool:
        manager.run("orders", [stage for _why, stage in daily_revenue(since, until)])
        view = list(database.daily_revenue.find().sort({"_id.day": 1, "_id.country": 1}))
        return same(view, fold_daily(lambda name: database[name].find()))

    built = refresh(FIRST_DAY, LAST_DAY)
    paid_orders = sorted((o for o in stored if o["status"] == "paid"), key=lambda o: o["placed_at"])
    late = paid_orders[len(paid_orders) // 2]
    database.orders.update_one({"_id": late["_id"]}, {"$set": {"status": "refunded"}})
    view = database.daily_revenue
    view.update_many({}, {"$set": {"untouched": True}})  # a row that is replaced loses the mark
    manager.run(
        "orders", [stage for _why, stage in daily_revenue(late["placed_at"], late["placed_at"])]
    )
    rewritten = view.count_documents({"untouched": {"$exists": False}})
    view.update_many({}, {"$unset": {"untouched": ""}})
    corrected, again = (refresh(late["placed_at"], late["placed_at"]) for _ in range(2))
    return ViewResult(view.count_documents({}), (built, corrected, again), rewritten)


def _aggregation_offline(shop: Shop) -> Offline:
    answers: dict[str, object] = {}
    for recipe in RECIPES:
        answers[recipe.question] = answer = recipe.fold(shop.generate)
        size = check_pipeline(recipe.pipeline)
        fact(recipe.question, f"{recipe.collection}: {len(recipe.pipeline)} stages, {size} bytes")
        _explain(recipe.stages)
        fact("  computed in Python", json.dumps(answer, default=str)[:150] + " …")
    fact("materialised view", "refreshed for some days, by $merge")
    _explain(daily_revenue(FIRST_DAY))
    note("no pipeline was run: those answers are plain Python's, of generated documents")
    conclude(f"{len(RECIPES) + 1} pipelines built and checked for structure")
    return Offline(answers)


def _explain(stages: Iterable[tuple[str, Document]]) -> None:
    for why, stage in stages:
        config.listing(f"{next(iter(stage))}: {why}")


# ── 4. Indexes ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    """How the server answered: stages from the last one back to the first, and what they read."""

    stages: tuple[str, ...]
    index: str | None
    keys: int
    docs: int
    returned: int

    @property
    def words(self) -> str:
        return " ← ".join(stage for stage in self.stages if stage not in ("PROJECTION_SIMPLE",))


def parse_plan(explained: Mapping[str, Any]) -> Plan:
    """The plan in an `explain` at verbosity executionStats, from either query engine."""
    winning = explained["queryPlanner"]["winningPlan"]
    names, index = list[str](), None
    pending = [winning.get("queryPlan", winning)]
    while pending:
        stage = pending.pop(0)
        names.append(stage["stage"])
        index = index or stage.get("indexName")
        pending += [stage["inputStage"]] if "inputStage" in stage else stage.get("inputStages", [])
    stats = explained["executionStats"]
    examined = stats["totalKeysExamined"], stats["totalDocsExamined"]
    return Plan(tuple(names), index, *examined, stats["nReturned"])


class IndexManager:
    """The indexes of one collection, and what they are good for."""

    def __init__(self, collection: Collection[Document]) -> None:
        self._collection = collection

    def ensure(self, model: IndexModel) -> str:
        """Create the index unless it is there; returns its name.

        Raises DuplicateKey where a unique one would be broken, DatabaseError where an index of
        that name has other options.
        """
        with domain_errors():
            return self._collection.create_indexes([model])[0]

    def drop(self, name: str) -> None:
        with domain_errors():
            self._collection.drop_index(name)

    def hide(self, name: str, hidden: bool) -> None:
        """Withhold an index from the planner, or give it back: dropping it, on probation."""
        with domain_errors():
            index = {"name": name, "hidden": hidden}
            self._collection.database.command("collMod", self._collection.name, index=index)

    def plan(self, conditions: Document, **options: Any) -> Plan:
        """The plan of a `find`, which is run for it; `options` are those of the command, such as
        `sort`, `limit`, `hint`."""
        find = {"find": self._collection.name, "filter": conditions, **options}
        with domain_errors():
            database = self._collection.database
            return parse_plan(database.command("explain", find, verbosity="executionStats"))

    def usage(self) -> dict[str, int]:
        """How often each index was used since it was made or the server began ($indexStats)."""
        with domain_errors():
            stats = self._collection.aggregate([{"$indexStats": {}}])
            return {index["name"]: int(index["accesses"]["ops"]) for index in stats}


@dataclass(frozen=True)
class IndexCase:
    """A kind of index, a query that it is for, and why."""

    kind: str
    model: IndexModel
    why: str
    conditions: Document
    options: Document = field(default_factory=dict)


MID_YEAR = FIRST_DAY + timedelta(minutes=INDEX_DOCUMENTS // 2)
IN_RANGE = {"customer": 7, "at": {"$gte": MID_YEAR}}  # equality, range; sorted by amount
BY_AMOUNT = {"sort": {"amount": -1}, "limit": 20}
ESR = IndexModel({"customer": 1, "amount": -1, "at": 1}, name="equality_sort_range")
ERS = IndexModel({"customer": 1, "at": 1, "amount": -1}, name="equality_range_sort")
BERLIN_AREA = {"$geoWithin": {"$centerSphere": [[13.41, 52.52], 20 / EARTH_RADIUS_KM]}}
INDEX_CASES = (
    IndexCase("single", IndexModel("customer", name="single"), "one field, many values",
              {"customer": 7}),
    IndexCase("compound", ESR, "equality, sort, range: sorted by the index", IN_RANGE, BY_AMOUNT),
    IndexCase("multikey", IndexModel("tags", name="multikey"), "a key for each array entry",
              {"tags": "t77"}),
    IndexCase("partial", IndexModel("at", name="partial",
                                    partialFilterExpression={"status": "failed"}),
              "only what is looked for", {"status": "failed", "at": {"$gte": MID_YEAR}}),
    IndexCase("sparse", IndexModel("coupon", name="sparse", sparse=True),
              "no key where the field is missing", {"coupon": "C500"}),
    IndexCase("unique", IndexModel("reference", name="unique", unique=True),
              "a rule that also serves a query", {"reference": "R500"}),
    IndexCase("TTL", IndexModel("expires_at", name="ttl", expireAfterSeconds=0),
              "a monitor deletes each minute what is past", {"expires_at": {"$lt": FIRST_DAY}}),
    IndexCase("text", IndexModel([("title", "text")], name="text"),
              "words, stemmed; one a collection", {"$text": {"$search": "word500"}}),
    IndexCase("2dsphere", IndexModel([("location", "2dsphere")], name="sphere"),
              "cells of the globe", {"location": BERLIN_AREA}),
    IndexCase("wildcard", IndexModel({"attributes.$**": 1}, name="wildcard"),
              "fields that nobody knows yet", {"attributes.a3": 33}),
)  # fmt: skip


def events(count: int = INDEX_DOCUMENTS) -> Iterator[Document]:
    """What the indexes are made on: fifty customers, nine in ten paid, one a minute."""
    rng = random.Random(SEED)
    for number in range(count):
        at = FIRST_DAY + timedelta(minutes=number)
        share = rng.random()
        document = {
            "customer": rng.randrange(50),
            "amount": rng.randrange(1, 100_000),  # cents
            "at": at,
            "status": "paid" if share < 0.9 else "open" if share < 0.99 else "failed",
            "tags": [f"t{rng.randrange(1_000)}", f"t{rng.randrange(1_000)}"],
            "reference": f"R{number}",
            "expires_at": at + timedelta(days=36_500),  # none expires under the demo
            "title": f"order of word{rng.randrange(2_000)}",
            "location": point(rng.uniform(-10, 30), rng.uniform(36, 60)),
            "attributes": {f"a{rng.randrange(20)}": rng.randrange(100)},
        }
        if rng.random() < 0.01:
            document["coupon"] = f"C{number // 100}"
        yield document


@dataclass(frozen=True)
class IndexResult:
    documents: int
    before: dict[str, Plan | None]  # kind → plan without the index; None: the server refuses
    after: dict[str, Plan]
    esr: dict[str, Plan]  # "no index", "E", "E-R-S", "E-S-R"
    low_cardinality: dict[str, Plan]  # "COLLSCAN", "index"
    without_predicate: Plan
    hidden: tuple[Plan, Plan]  # hidden, given back
    usage: dict[str, int] | None  # index → how often it served; None: may not be asked


@domain_errors()
def demo_indexes(workspace: Workspace | None, index_documents: int) -> IndexResult | Offline:
    """4. Indexes: eleven kinds, the plan before and after each.

    Prediction: by equality, sort, range the server reads about two keys a document and never sorts.

    Trade-off: each index is written on every insert and wants to be in memory. Make those that a
    measured query needs, and drop those that $indexStats finds unused.
    """
    if workspace is None:
        return _indexes_offline()
    database = workspace.database()
    BulkManager(database.events).load(events(index_documents))
    manager = IndexManager(database.events)
    before: dict[str, Plan | None] = {}
    after: dict[str, Plan] = {}
    for case in INDEX_CASES:
        try:
            before[case.kind] = manager.plan(case.conditions, **case.options)
        except DatabaseError as error:  # $text without its index
            before[case.kind] = None
            logger.debug("%s: %s", case.kind, error)
        name = manager.ensure(case.model)
        after[case.kind] = manager.plan(case.conditions, **case.options)
        manager.drop(name)
    before["clustered"], after["clustered"] = None, _cluster(database)
    table(
        ["index", "docs before", *PLAN_COLUMNS],
        [
            (kind, f"{was.docs:,}" if (was := before[kind]) else "-", *_cells(plan))
            for kind, plan in after.items()
        ],
    )
    note("$text is refused without its index; a clustered collection is born with it")
    fact("unique, a second R500", _refused_duplicate(manager, database.events))
    esr = _compare_esr(manager)
    table(
        ["20 of a customer", *PLAN_COLUMNS], [(name, *_cells(plan)) for name, plan in esr.items()]
    )
    low = _low_cardinality(manager)
    manager.ensure(INDEX_CASES[3].model)
    without = manager.plan({"at": {"$gte": MID_YEAR}})
    fact("partial, no predicate", f"{without.words}: {without.docs:,} documents examined")
    hidden = _probation(manager)
    fact("hidden, given back", f"{hidden[0].words}; {hidden[1].words}")
    for _ in range(3):  # for real: what is only explained does not count as use
        database.events.find_one(IN_RANGE, sort=BY_AMOUNT["sort"])
    usage = _usage(manager)
    best = esr["E-S-R"]
    conclude(
        f"{best.keys / max(1, best.returned):.1f} keys a document, sorted by the index; "
        f"without one {esr['no index'].docs:,} documents read"
    )
    return IndexResult(index_documents, before, after, esr, low, without, hidden, usage)


def _usage(manager: IndexManager) -> dict[str, int] | None:
    try:
        usage = {name: used for name, used in sorted(manager.usage().items()) if name != "_id_"}
    except DatabaseError as error:
        if error.code != UNAUTHORIZED:
            raise
        note(f"$indexStats needs the role clusterMonitor: {error}")
        return None
    fact("$indexStats", ", ".join(f"{name}: {used} uses" for name, used in usage.items()))
    return usage


PLAN_COLUMNS = ("plan", "keys", "docs", "returned")


def _cells(plan: Plan) -> tuple[str, ...]:
    return plan.words, f"{plan.keys:,}", f"{plan.docs:,}", f"{plan.returned:,}"


def _refused_duplicate(manager: IndexManager, events_: Collection[Document]) -> str:
    name = manager.ensure(next(case.model for case in INDEX_CASES if case.kind == "unique"))
    try:
        with domain_errors():
            events_.insert_one({"reference": "R500"})
    except DuplicateKey as error:
        return f"DuplicateKey: {error}"
    finally:
        manager.drop(name)
    return "stored"


def _compare_esr(manager: IndexManager) -> dict[str, Plan]:
    plans = {"no index": manager.plan(IN_RANGE, **BY_AMOUNT)}
    models = {"E": IndexModel("customer", name="equality"), "E-R-S": ERS, "E-S-R": ESR}
    for name, model in models.items():
        made = manager.ensure(model)
        plans[name] = manager.plan(IN_RANGE, hint=made, **BY_AMOUNT)
        if name != "E-S-R":
            manager.drop(made)
    return plans


def _low_cardinality(manager: IndexManager) -> dict[str, Plan]:
    """An index on a field with three values, asked for the commonest: each key is followed by a
    document, in random order, where a scan would read them in a row."""
    name = manager.ensure(IndexModel("status", name="low_cardinality"))
    hints = {"COLLSCAN": {"$natural": 1}, "index": name}
    ways = {k: partial(manager.plan, {"status": "paid"}, hint=h) for k, h in hints.items()}
    best = best_seconds(ways)
    plans = {way: run() for way, run in ways.items()}
    fact(
        "status = paid, 9 in 10",
        f"index {best['index'] * 1e3:.0f} ms, {plans['index'].keys:,} keys and "
        f"{plans['index'].docs:,} documents; scan {best['COLLSCAN'] * 1e3:.0f} ms, "
        f"{plans['COLLSCAN'].docs:,} documents",
    )
    manager.drop(name)
    return plans


def _probation(manager: IndexManager) -> tuple[Plan, Plan]:
    """The plan of a query while its index is hidden, and when it is given back."""
    manager.hide("equality_sort_range", True)
    hidden = manager.plan(IN_RANGE, **BY_AMOUNT)
    manager.hide("equality_sort_range", False)
    return hidden, manager.plan(IN_RANGE, **BY_AMOUNT)


def _cluster(database: Database[Document]) -> Plan:
    """A clustered collection keeps its documents in the order of `_id`: there is no index to go
    through, and a range of keys is a range of documents."""
    clustered = database.create_collection(
        "clustered", clusteredIndex={"key": {"_id": 1}, "unique": True}
    )
    clustered.insert_many([{"_id": n} for n in range(5_000)])
    return IndexManager(clustered).plan({"_id": {"$gte": 100, "$lt": 120}})


def _indexes_offline() -> Offline:
    for case in INDEX_CASES:
        definition = {k: v for k, v in case.model.document.items() if k not in ("name", "v")}
        definition["key"] = dict(definition["key"])
        fact(case.kind, f"{json.dumps(definition)}: {case.why}")
    fact("clustered", 'create(clusteredIndex={"key": {"_id": 1}, "unique": true}): no second tree')
    fact("equality, sort, range", f"{dict(ESR.document['key'])}")
    note("a plan is the server's: none is shown without one")
    conclude(f"{len(INDEX_CASES) + 1} definitions")
    return Offline({case.kind: case.model.document for case in INDEX_CASES})


# ── 5. Geospatial ───────────────────────────────────────────────────────────────────

Vector = tuple[float, float, float]


def unit_vector(location: Document) -> Vector:
    longitude, latitude = map(math.radians, location["coordinates"])
    across = math.cos(latitude)
    return across * math.cos(longitude), across * math.sin(longitude), math.sin(latitude)


def great_circle_km(here: Document, there: Document) -> float:
    """The angle between two points by W. Kahan's formula, exact for near and far ones, times the
    radius that MongoDB uses."""
    a, b = unit_vector(here), unit_vector(there)
    opposite = tuple(-x for x in a)
    return EARTH_RADIUS_KM * 2 * math.atan2(math.dist(a, b), math.dist(opposite, b))


def _normal(a: Vector, b: Vector) -> Vector:
    """The cross product: at right angles to the great circle through both."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _side(a: Vector, b: Vector, point_: Vector) -> float:
    """Above 0 where the point lies to the left of the great circle from a to b."""
    return sum(n * p for n, p in zip(_normal(a, b), point_, strict=True))


def _edges(polygon: Document) -> list[tuple[Vector, Vector]]:
    ring = [unit_vector(point(*corner)) for corner in polygon["coordinates"][0]]
    return list(itertools.pairwise(ring))


def inside(location: Document, polygon: Document) -> bool:
    """Whether a convex polygon, its ring counter-clockwise, holds a point: left of every edge.
    Edges are great circles, as MongoDB's are, not lines on a flat map."""
    place = unit_vector(location)
    return all(_side(a, b, place) >= 0 for a, b in _edges(polygon))


def crosses(line: Document, polygon: Document) -> bool:
    """Whether a great-circle line of two points, less than half around, meets a convex polygon."""
    start, end = (unit_vector(point(*corner)) for corner in line["coordinates"])
    return any(inside(point(*corner), polygon) for corner in line["coordinates"]) or any(
        _side(start, end, a) * _side(start, end, b) < 0
        and _side(a, b, start) * _side(a, b, end) < 0
        and _same_half(start, end, a, b)
        for a, b in _edges(polygon)
    )


def _same_half(start: Vector, end: Vector, a: Vector, b: Vector) -> bool:
    """Whether two crossing arcs meet at one point, rather than one of them at its antipode."""
    meeting = _normal(_normal(start, end), _normal(a, b))
    along = [sum(m * (p + q) for m, p, q in zip(meeting, *arc, strict=True))
             for arc in ((start, end), (a, b))]  # fmt: skip
    return along[0] * along[1] > 0


def box(west: float, south: float, east: float, north: float) -> Document:
    """A polygon of four great circles, counter-clockwise (RFC 7946)."""
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


ZONES = {
    "north": box(-6, 52, 25, 57), "west": box(-5, 42, 6, 52),
    "centre": box(6, 45, 20, 52), "south": box(-10, 36, 20, 45),
}  # fmt: skip


@dataclass(frozen=True)
class GeoResult:
    nearest: dict[str, float]  # city → km from Berlin, by the server
    worst_m: float  # largest difference from the great circle in Python
    within: dict[str, tuple[list[str], list[str]]]  # area → cities by the server, in Python
    crossed: tuple[list[str], list[str]]  # zones on the way from Berlin to Madrid


def nearest(database: Database[Document], origin: Document, limit: int) -> list[Document]:
    """The cities nearest to `origin`, with `km`. Wants a 2dsphere index on `location`."""
    near = {"near": origin, "distanceField": "km", "distanceMultiplier": 1e-3, "key": "location"}
    pipeline: list[Document] = [{"$geoNear": near}, {"$limit": limit}]
    return AggregationManager(database).run("cities", pipeline)


@domain_errors()
def demo_geospatial(workspace: Workspace | None, shop: Shop) -> GeoResult | Offline:
    """5. Geospatial: the nearest, what lies within, what a route crosses.

    Prediction: the server's distances are great circles on a sphere of 6,378.1 km.

    Trade-off: an ellipsoid differs from this sphere by up to 0.7 %: for surveying, use PostGIS.
    """
    found = {city["_id"]: city for city in shop.generate("cities")}
    origin, madrid = found["Berlin"]["location"], found["Madrid"]["location"]
    distance = {name: great_circle_km(origin, c["location"]) for name, c in found.items()}
    route = {"type": "LineString", "coordinates": [o["coordinates"] for o in (origin, madrid)]}
    expected = {
        "within 600 km": sorted(name for name, km in distance.items() if km <= 600),
        **{f"zone {zone}": sorted(n for n, c in found.items() if inside(c["location"], polygon))
           for zone, polygon in ZONES.items()},
    }  # fmt: skip
    crossed = sorted(zone for zone, polygon in ZONES.items() if crosses(route, polygon))
    if workspace is None:
        closest = sorted(distance, key=lambda name: distance[name])[1:4]
        fact("computed in Python", ", ".join(f"{n} {distance[n]:.1f} km" for n in closest))
        for area, names in expected.items():
            fact(f"computed in Python, {area}", ", ".join(names) or "none")
        note("$geoNear, $geoWithin and $geoIntersects need a server")
        conclude(f"{len(found)} cities measured from Berlin in Python")
        return Offline({"km": distance, "within": expected, "crossed": crossed})
    database = workspace.database()
    database.cities.insert_many(list(found.values()))
    IndexManager(database.cities).ensure(IndexModel([("location", "2dsphere")], name="sphere"))
    by_server = {city["_id"]: city["km"] for city in nearest(database, origin, len(found))}
    worst_m = max(abs(km - distance[name]) for name, km in by_server.items()) * 1e3
    table(
        ["city", "$geoNear, km", "great circle, km"],
        [(n, f"{by_server[n]:.3f}", f"{distance[n]:.3f}") for n in list(by_server)[1:4]],
    )
    areas: Document = {
        "within 600 km": {"$centerSphere": [origin["coordinates"], 600 / EARTH_RADIUS_KM]}
    }
    areas |= {f"zone {zone}": {"$geometry": polygon} for zone, polygon in ZONES.items()}
    within = {}
    for area, shape in areas.items():
        cursor = database.cities.find({"location": {"$geoWithin": shape}})
        within[area] = sorted(city["_id"] for city in cursor), expected[area]
    table(
        ["$geoWithin", "cities", "as in Python"],
        [(area, len(answer), answer == python) for area, (answer, python) in within.items()],
    )
    database.zones.insert_many([{"_id": z, "area": polygon} for z, polygon in ZONES.items()])
    meets = {"area": {"$geoIntersects": {"$geometry": route}}}
    by_route = sorted(zone["_id"] for zone in database.zones.find(meets))
    fact("$geoIntersects", f"Berlin to Madrid crosses {', '.join(by_route)}; "
                           f"as in Python: {by_route == crossed}")  # fmt: skip
    agree = sum(a == b for a, b in [*within.values(), (by_route, crossed)])
    conclude(
        f"{len(by_server)} distances within {worst_m:.0e} m of the great circle; "
        f"{agree} of {len(within) + 1} sets as in Python"
    )
    return GeoResult(by_server, worst_m, within, (by_route, crossed))


# ── 6. Time series ──────────────────────────────────────────────────────────────────


def down_sampled(unit: str, size: int) -> list[Document]:
    """Loads, mean and maximum for each page and `size` units, and the mean of three such
    intervals by the clock (a gap is a gap)."""
    start = {"$dateTrunc": {"date": "$at", "unit": unit, "binSize": size}}
    window = {"range": [-2 * size, 0], "unit": unit}
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


def fold_down_sampled(loads: Iterable[Document], bin_size: timedelta) -> list[Document]:
    """The same in Python."""
    bins: dict[tuple[str, datetime], list[float]] = defaultdict(list)
    origin = datetime(2000, 1, 1, tzinfo=UTC)  # where $dateTrunc counts its bins from
    for load in loads:
        at = origin + (load["at"] - origin) // bin_size * bin_size
        bins[load["meta"]["page"], at].append(load["ms"])
    mean = {key: sum(values) / len(values) for key, values in bins.items()}
    answer = []
    for (page, at), values in sorted(bins.items()):
        near = [
            mean[page, at - n * bin_size] for n in range(3) if (page, at - n * bin_size) in mean
        ]
        answer.append({
            "_id": {"page": page, "at": at}, "loads": len(values), "mean_ms": mean[page, at],
            "max_ms": max(values), "smooth_ms": sum(near) / len(near),
        })  # fmt: skip
    return answer


class TimeSeriesManager:
    """Time-series collections: the server keeps them in compressed buckets by `meta`."""

    def __init__(self, database: Database[Document]) -> None:
        self._database = database

    def create(self, name: str, *, granularity: str, expire_after: timedelta) -> None:
        """`granularity` is about the time between two measurements of one `meta`: "seconds",
        "minutes" or "hours". Raises DatabaseError where the collection exists."""
        series = {"timeField": "at", "metaField": "meta", "granularity": granularity}
        with domain_errors():
            self._database.create_collection(
                name, timeseries=series, expireAfterSeconds=round(expire_after.total_seconds())
            )

    def down_sample(self, name: str, unit: str, size: int) -> list[Document]:
        return AggregationManager(self._database).run(name, down_sampled(unit, size))

    def stored_bytes(self, name: str) -> tuple[int, int]:
        """(bytes on disk, bytes of its indexes), as of the last checkpoint."""
        with domain_errors():
            stats = self._database.command("collStats", name)
            return int(stats["storageSize"]), int(stats["totalIndexSize"])

    def buckets_examined(self, name: str, conditions: Document) -> int:
        """The buckets that the server reads for a `find`."""
        with domain_errors():
            explained = self._database.command(
                "explain", {"find": name, "filter": conditions}, verbosity="executionStats"
            )
        return int(_find_key(explained, "totalDocsExamined") or 0)


def _find_key(value: Any, key: str) -> Any:
    """The first value of `key` anywhere in nested documents: versions nest explain differently."""
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((v for v in (_find_key(item, key) for item in value) if v is not None), None)
    return None


@dataclass(frozen=True)
class TimeSeriesResult:
    measurements: int
    bytes_on_disk: dict[str, tuple[int, int] | None]  # kind → data, indexes
    buckets_examined: tuple[int, int]  # without, with the secondary index
    expire_after_s: int
    agrees: bool


@domain_errors()
def demo_time_series(workspace: Workspace | None, shop: Shop) -> TimeSeriesResult | Offline:
    """6. Time series: buckets that the server makes, down-sampled, and smaller on disk.

    Prediction: measurements of one page lie together, so they compress to a fraction.

    Trade-off: only `meta` can be updated, and there is no unique index: not for records that
    change.
    """
    loads = list(shop.generate("page_loads"))
    expected = fold_down_sampled(loads, 6 * HOUR)
    if workspace is None:
        for row in expected[:3]:
            page, at = row["_id"].values()
            fact("computed in Python", f"{page} {at:%d %b %H:%M}: {row['mean_ms']:.1f} ms")
        options = {"timeField": "at", "metaField": "meta", "granularity": "minutes"}
        fact("create(timeseries=…)", json.dumps(options))
        note("storage and expiry are the server's: not shown")
        conclude(f"{len(loads):,} measurements → {len(expected)} rows, in Python")
        return Offline({"rows": expected})
    database = workspace.database()
    manager = TimeSeriesManager(database)
    kept = timedelta(days=3_650)
    manager.create("series", granularity="minutes", expire_after=kept)
    for name in ("series", "plain"):
        BulkManager(database[name]).load(loads)
    database.plain.create_index({"meta.page": 1, "at": 1})
    checkout = {"meta.page": "/checkout"}
    before = manager.buckets_examined("series", checkout)
    database.series.create_index({"meta.page": 1, "at": 1})
    examined = before, manager.buckets_examined("series", checkout)
    sizes = _sizes_on_disk(workspace, manager)
    if any(sizes.values()):
        table(
            ["collection", "KiB on disk", "KiB of indexes"],
            [(k, *(f"{b / 1024:,.0f}" for b in size)) for k, size in sizes.items() if size],
        )
    fact("loads of one page", "{} buckets read; with a secondary index {}".format(*examined))
    info = next(iter(database.list_collections(filter={"name": "series"})))
    expiry = int(info["options"]["expireAfterSeconds"])
    fact("expiry", f"{expiry // 86_400:,} days, for whole buckets")
    answer = manager.down_sample("series", "hour", 6)
    agrees = same(answer, expected)
    fact("6-hour means, smoothed", f"{len(answer)} rows; equal to plain Python: {agrees}")
    if sizes["plain"] and sizes["series"]:
        ratio = sum(sizes["plain"]) / sum(sizes["series"])
        conclude(f"{len(loads):,} measurements take {ratio:.1f} times less on disk")
    else:
        conclude(f"{len(loads):,} measurements → {len(answer)} rows")
    return TimeSeriesResult(len(loads), sizes, examined, expiry, agrees)


def _sizes_on_disk(
    workspace: Workspace, manager: TimeSeriesManager
) -> dict[str, tuple[int, int] | None]:
    try:
        with domain_errors():
            workspace.client.admin.command("fsync")  # a checkpoint: sizes are as of the last one
    except DatabaseError as error:
        note(f"no checkpoint, so no size on disk: {error}")
        return {"series": None, "plain": None}
    return {name: manager.stored_bytes(name) for name in ("series", "plain")}


# ── 7. Bulk ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rejected:
    """A document that was not stored: its position in the input, and why. No values of it."""

    index: int
    code: int | None  # the server's; None where the client could not encode it
    reason: str


@dataclass
class LoadReport:
    """What became of every document: stored now, stored before, or rejected."""

    stored: int = 0
    already_there: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    unlisted: int = 0  # rejected beyond MOST_LISTED: counted only

    def reject(self, index: int, code: int | None, reason: str) -> None:
        if len(self.rejected) < MOST_LISTED:
            self.rejected.append(Rejected(index, code, reason))
        else:
            self.unlisted += 1


MOST_LISTED = 100_000  # a few MB; whoever has more has a wrong schema, not bad documents


@dataclass
class Batch:
    """Encoded documents, each with its position in the input."""

    documents: list[RawBSONDocument] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    size: int = 0

    def halves(self) -> tuple[Batch, Batch]:
        middle = len(self.documents) // 2
        cut = slice(None, middle), slice(middle, None)
        first, second = (Batch(self.documents[c], self.indexes[c]) for c in cut)
        return first, second


UNFIT = (BSONError, ArithmeticError, TypeError, ValueError, RecursionError)  # what encoding raises


def encode(document: Document) -> RawBSONDocument:
    """The document as BSON, with an `_id`. Raises TypeError or ValueError for what BSON cannot
    hold, which in a batch would take its neighbours with it."""
    if not isinstance(document, Mapping):
        raise TypeError(f"no document: {type(document).__name__}")
    try:
        keyed = document if "_id" in document else {"_id": ObjectId(), **document}
        raw = bson.encode(keyed, codec_options=CODEC)  # puts `_id` first
    except UNFIT as error:
        raise ValueError(f"not BSON: {_unfit_field(document)}, {type(error).__name__}") from None
    if len(raw) > 16 * 2**20:
        raise ValueError(f"{len(raw):,} bytes are above 16 MiB")
    return RawBSONDocument(raw)


def _unfit_field(document: Document) -> str:
    """The first field that BSON cannot hold, and its type; not its value."""
    for name, value in document.items():
        try:
            bson.encode({name: value}, codec_options=CODEC)
        except UNFIT:
            return f"{name} is {type(value).__name__}"
    return "the whole"


def batches(
    documents: Iterable[Document], report: LoadReport, most: int = BATCH_DOCUMENTS
) -> Iterator[Batch]:
    """Batches of at most `most` documents and BATCH_BYTES; what cannot be encoded goes into
    `report`."""
    batch = Batch()
    for index, document in enumerate(documents):
        try:
            raw = encode(document)
        except (TypeError, ValueError) as error:
            report.reject(index, None, str(error))
            continue
        if batch.documents and (
            len(batch.documents) == most or batch.size + len(raw.raw) > BATCH_BYTES
        ):
            yield batch
            batch = Batch()
        batch.documents.append(raw)
        batch.indexes.append(index)
        batch.size += len(raw.raw)
    if batch.documents:
        yield batch


def settle(batch: Batch, error: BulkWriteError, report: LoadReport) -> list[RawBSONDocument]:
    """Book an unordered insert of which some were refused; returns those whose `_id` was taken:
    perhaps by themselves, in an attempt whose answer was lost.

    Raises `error` where the write concern was not met: stored, perhaps, but not for good.
    """
    if error.details["writeConcernErrors"]:
        raise error
    taken = []
    for failure in error.details["writeErrors"]:
        position = failure["index"]
        if failure["code"] == DUPLICATE_KEY and list(failure.get("keyPattern", ())) == ["_id"]:
            taken.append(batch.documents[position])
            continue
        refusal = translate(OperationFailure("", failure["code"], failure))
        report.reject(batch.indexes[position], failure["code"], str(refusal))
    report.stored += error.details["nInserted"]
    return taken


def settle_taken(
    batch: Batch, taken: Sequence[RawBSONDocument], stored: Iterable[RawBSONDocument],
    report: LoadReport,
) -> None:  # fmt: skip
    """Those of the same `_id` that are stored byte for byte are no loss; others are rejected."""
    there = {_key(document): document.raw for document in stored}
    index_of = {id(d): i for d, i in zip(batch.documents, batch.indexes, strict=True)}
    for document in taken:
        if there.get(_key(document)) == document.raw:
            report.already_there += 1
        else:
            reason = "taken: _id, by another document"
            report.reject(index_of[id(document)], DUPLICATE_KEY, reason)


def _key(document: RawBSONDocument) -> bytes:
    return bson.encode({"_id": document["_id"]})  # an `_id` may be a document: not hashable


RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)


def isolate(batch: Batch, error: OperationFailure, report: LoadReport) -> tuple[Batch, ...]:
    """What to try after the server refused a whole command for what one document holds, such as
    nesting beyond its depth: the halves, until that document is alone, and is booked.

    Raises other errors.
    """
    if error.code not in UNREADABLE:
        raise error
    if len(batch.documents) > 1:
        return batch.halves()
    report.reject(batch.indexes[0], error.code, str(translate(error)))
    return ()


class BulkManager:
    """Loads documents so that a bad one costs only itself, and loading again costs nothing.

    Give documents an `_id` of their own: then a load that was cut off can be repeated whole. A
    document that was changed since is reported as taken by another. Not so in a time series, which
    has no unique `_id`: there each load adds.
    """

    def __init__(
        self, collection: Collection[Any], most: int = BATCH_DOCUMENTS,
        timeout_s: float = OPERATION_TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._collection = collection.with_options(codec_options=RAW)
        self._most, self._timeout_s = most, timeout_s

    def load(
        self,
        documents: Iterable[Document],
        on_batch: Callable[[int], object] = lambda n: None,
        report: LoadReport | None = None,
    ) -> LoadReport:
        """Insert all of them, unordered; memory holds one batch. `on_batch(documents)` is called
        after each.

        Raises Unreachable or TimedOut where the server stays away: what was acknowledged is
        stored, and booked in a `report` of yours; `load` of the same documents goes on from there.
        """
        report = LoadReport() if report is None else report
        with domain_errors():
            for batch in batches(documents, report, self._most):
                with pymongo.timeout(self._timeout_s):
                    self._insert(batch, report)
                on_batch(len(batch.documents))
        report.rejected.sort(key=lambda rejected: rejected.index)
        return report

    def _insert(self, batch: Batch, report: LoadReport) -> None:
        try:
            self._collection.insert_many(batch.documents, ordered=False)
            report.stored += len(batch.documents)
        except BulkWriteError as error:
            if taken := settle(batch, error, report):
                found = self._collection.find({"_id": {"$in": [d["_id"] for d in taken]}})
                settle_taken(batch, taken, found, report)
        except OperationFailure as error:
            for half in isolate(batch, error, report):
                self._insert(half, report)

    def write(
        self, operations: Sequence[InsertOne[Document] | UpdateOne], *, ordered: bool
    ) -> tuple[Document, list[Rejected]]:
        """Several operations in one round trip: (counts, those refused).

        Ordered stops at the first refusal; unordered does all that it can.
        """
        try:
            with pymongo.timeout(self._timeout_s):
                target: Collection[Document] = self._collection.with_options(CODEC)
                return dict(target.bulk_write(operations, ordered=ordered).bulk_api_result), []
        except BulkWriteError as error:
            if error.details["writeConcernErrors"]:
                raise translate(error) from None
            refused = [
                Rejected(f["index"], f["code"], str(translate(OperationFailure("", f["code"], f))))
                for f in error.details["writeErrors"]
            ]
            return dict(error.details), refused
        except (PyMongoError, BSONError) as error:
            raise translate(error) from None


def measurements(count: int) -> list[Document]:
    return [{"_id": n, "page": PAGES[n % 4], "ms": n % 977 / 10} for n in range(count)]


READING_SCHEMA: Document = {"properties": {"ms": {"bsonType": "double", "minimum": 0}}}
BULK_DOCUMENTS = 10_000
LOOP_DOCUMENTS = 500  # one round trip each


@dataclass(frozen=True)
class BulkResult:
    seconds_each: dict[str, float]  # way → seconds a document
    round_trips: dict[str, int]
    batch_sizes: dict[int, float]  # documents a batch → documents a second
    ordered: dict[bool, tuple[int, int]]  # ordered? → inserted, refused
    upserts: tuple[int, int]  # inserted, modified by the second run
    report: LoadReport
    count: int  # documents in the collection after the load
    again: LoadReport


@domain_errors()
def demo_bulk(workspace: Workspace | None) -> BulkResult | Offline:
    """7. Bulk: one round trip for many, and the one bad document in a thousand.

    Prediction: a loop pays a round trip and a flush to disk a document, a batch one for all.

    Trade-off: unordered is faster and goes on after a refusal, but the order of writes is lost.
    """
    documents = measurements(BULK_DOCUMENTS)
    if workspace is None:
        return _bulk_offline(documents)
    database = workspace.database()
    seconds, trips = _compare_loads(workspace, database, documents)
    loop = seconds["insert_one, a loop"]
    table(
        ["way", "round trips", "documents/s", "times faster"],
        [(w, trips[w], f"{1 / s:,.0f}", f"{loop / s:.1f}") for w, s in seconds.items()],
    )
    rates = {}
    for size in (10, 100, 1_000, 10_000):
        target = database[f"batch_{size}"]
        took = best_seconds({"": partial(BulkManager(target, size).load, documents)}, rounds=1)
        rates[size] = len(documents) / took[""]
    table(["batches of", "documents/s"], [(f"{n:,}", f"{r:,.0f}") for n, r in rates.items()])
    ordered, upserts = _bulk_writes(database)
    for way, counts in ordered.items():
        fact(
            f"bulk_write, ordered={way}",
            "5 inserts, the 2nd a duplicate: {} in, {} refused".format(*counts),
        )
    fact("upserts, run twice", "{} inserted, then {} modified".format(*upserts))
    manager = CollectionManager(database)
    bad = BulkManager(manager.create("readings", READING_SCHEMA))
    mixed: list[Document] = [dict(document) for document in documents]
    for index in range(500, len(mixed), 1_000):  # one in a thousand
        mixed[index] |= _spoilt(index)
    report, again = bad.load(mixed), bad.load(mixed)
    for reason, count in Counter(r.reason for r in report.rejected).items():
        fact(f"{count} rejected", reason)
    count = database.readings.count_documents({})
    fact(
        "stored",
        f"{report.stored:,}, and {len(report.rejected)} rejected, of {len(mixed):,}; "
        f"{count:,} counted",
    )
    fact("the same load again", f"{again.stored} stored, {again.already_there:,} already there")
    lost = len(mixed) - count - len(report.rejected)
    conclude(
        f"insert_many takes {loop / seconds['insert_many']:.0f} times less a document; {lost} lost"
    )
    return BulkResult(seconds, trips, rates, ordered, upserts, report, count, again)


def _spoilt(index: int) -> Document:
    """In turn what the schema refuses, what BSON cannot hold, and an `_id` that is taken."""
    changes: list[Document] = [
        {"ms": -1.0},
        {"ms": "slow"},
        {"ms": 1.0, "tags": {"a set"}},
        {"_id": 0},
    ]
    return changes[index // 1_000 % len(changes)]


def _compare_loads(
    workspace: Workspace, database: Database[Document], documents: list[Document]
) -> tuple[dict[str, float], dict[str, int]]:
    few = documents[:LOOP_DOCUMENTS]

    def loop(target: Collection[Document]) -> None:
        for document in few:
            target.insert_one(document)

    ways: dict[str, Callable[[Collection[Document]], object]] = {
        "insert_one, a loop": loop,
        "insert_many": lambda target: target.insert_many(documents, ordered=False),
        "bulk_write": lambda target: target.bulk_write(
            [InsertOne(document) for document in documents], ordered=False
        ),
        "BulkManager.load": lambda target: BulkManager(target).load(documents),
    }  # fmt: skip
    best, trips = dict.fromkeys(ways, math.inf), {}
    for _round in range(3):  # interleaved
        for way, load in ways.items():
            target = database.create_collection(f"load_{secrets.token_hex(4)}")
            with workspace.log.record() as commands:
                started = time.perf_counter()
                load(target)
                elapsed_s = time.perf_counter() - started
            trips[way] = len(commands)
            size = len(few) if load is loop else len(documents)
            best[way] = min(best[way], elapsed_s / size)
            target.drop()
    return best, trips


def _bulk_writes(
    database: Database[Document],
) -> tuple[dict[bool, tuple[int, int]], tuple[int, int]]:
    counts = {}
    inserts = [InsertOne({"_id": n}) for n in (1, 1, 2, 3, 4)]
    for ordered in (True, False):
        details, refused = BulkManager(database[f"o_{ordered}"]).write(inserts, ordered=ordered)
        counts[ordered] = details["nInserted"], len(refused)
    upsert = [UpdateOne({"_id": n}, {"$inc": {"seen": 1}}, upsert=True) for n in range(100)]
    manager = BulkManager(database.upserts)
    first, second = (manager.write(upsert, ordered=False)[0] for _ in range(2))
    return counts, (first["nUpserted"], second["nModified"])


def _bulk_offline(documents: list[Document]) -> Offline:
    report = LoadReport()
    bad: list[Document] = [{"tags": {"a set"}}, {"n": 2**70}, {"x": b"\0" * 2**24}]
    ready = [len(batch.documents) for batch in batches([*documents, *bad], report)]
    bounds = f"{BATCH_DOCUMENTS:,} documents and {BATCH_BYTES // 2**20} MiB"
    fact("batches", f"{len(ready)} of at most {bounds}")
    for rejected in report.rejected:
        fact("rejected by the client", rejected.reason)
    note("storing, refusals by the server and speed need a server")
    conclude(f"{sum(ready):,} ready to be sent, {len(report.rejected)} not")
    return Offline({"batches": ready, "rejected": report.rejected})


# ── 8. Transactions and concerns ────────────────────────────────────────────────────


class InsufficientFunds(Exception):
    """The account has less than that."""


class UnknownAccount(Exception):
    """No such account; nothing was moved."""


MOST_MONEY = Decimal(10**15)  # of one transfer: far below the 34 digits of decimal128


def check_amount(amount: Decimal) -> None:
    """Raises ValueError unless 0 < amount <= MOST_MONEY, in whole cents."""
    whole = isinstance(amount, Decimal) and amount.is_finite() and 0 < amount <= MOST_MONEY
    if not whole or amount != round(amount, 2):
        raise ValueError(f"not an amount of money: {amount}")


def debit(account: object, amount: Decimal) -> tuple[Document, Document]:
    """(filter, update) that takes `amount`, and matches nothing where there is less. With `$eq`, so
    that an operator in `account` is a value."""
    return {"_id": {"$eq": account}, "balance": {"$gte": amount}}, {"$inc": {"balance": -amount}}


def credit(account: object, amount: Decimal) -> tuple[Document, Document]:
    return {"_id": {"$eq": account}}, {"$inc": {"balance": amount}}


class Ledger:
    """Accounts between which money moves, and never disappears."""

    def __init__(
        self, accounts: Collection[Document], timeout_s: float = OPERATION_TIMEOUT_S
    ) -> None:
        self._accounts, self._timeout_s = accounts, timeout_s

    def transfer(self, source: object, target: object, amount: Decimal, key: object = None) -> int:
        """Move `amount` in one transaction; returns how many attempts it took.

        The driver repeats the whole where a label says TransientTransactionError, and the commit
        where it says UnknownTransactionCommitResult, until the timeout. Raises InsufficientFunds,
        UnknownAccount (both: nothing was moved), ValueError unless 0 < amount, and TimedOut or
        Unreachable, after which it is unknown. Then repeat it with the same `key`: it is booked in
        `transfers` together with the money, and a second time raises DuplicateKey (also for another
        amount: the booking tells).
        """
        check_amount(amount)
        attempts = itertools.count()

        def work(session: ClientSession) -> None:
            next(attempts)
            if key is not None:
                booked = {"_id": key, "source": source, "target": target, "amount": amount}
                self._accounts.database.transfers.insert_one(booked, session=session)
            changed = self._accounts.update_one(*debit(source, amount), session=session)
            if not changed.modified_count:
                known = self._accounts.find_one({"_id": {"$eq": source}}, session=session)
                raise InsufficientFunds(source) if known else UnknownAccount(source)
            changed = self._accounts.update_one(*credit(target, amount), session=session)
            if not changed.modified_count:
                raise UnknownAccount(target)

        client = self._accounts.database.client
        with domain_errors(), pymongo.timeout(self._timeout_s), client.start_session() as session:
            session.with_transaction(work, ReadConcern("snapshot"), DURABLE)
        return next(attempts)

    def total(self) -> Decimal:
        """The money in all accounts at one moment: a snapshot, not a scan through moving money."""
        client = self._accounts.database.client
        pipeline = [{"$group": {"_id": None, "total": {"$sum": "$balance"}}}]
        snapshot = client.start_session(snapshot=True)
        with domain_errors(), pymongo.timeout(self._timeout_s), snapshot as session:
            for row in self._accounts.aggregate(pipeline, session=session):
                return cast(Decimal, row["total"])
        return Decimal(0)


def transfer_naively(
    accounts: Collection[Document], source: object, target: object, amount: Decimal,
    between: Callable[[], object],
) -> None:  # fmt: skip
    """Read, compute, write: two at once lose one of the updates. Only here to be defeated."""
    balances = {key: accounts.find_one({"_id": key}) or {} for key in (source, target)}
    between()  # where the other one reads, too
    for key, change in ((source, -amount), (target, amount)):
        accounts.update_one({"_id": key}, {"$set": {"balance": balances[key]["balance"] + change}})


def provoke_conflict(accounts: Collection[Document]) -> DatabaseError:
    """What the second of two transactions is told that write the same document."""
    client = accounts.database.client
    change = {"_id": 1}, {"$inc": {"balance": 0, "touched": 1}}
    with (
        client.start_session() as first, client.start_session() as second,
        first.start_transaction(),
    ):  # fmt: skip
        accounts.update_one(*change, session=first)
        try:
            with domain_errors(), second.start_transaction():
                accounts.update_one(*change, session=second)
        except DatabaseError as error:
            return error
    raise AssertionError("no conflict")


@dataclass(frozen=True)
class TransactionResult:
    naive_total: tuple[Decimal, Decimal]  # before, after
    totals: tuple[Decimal, Decimal, int]  # before, after, snapshots read meanwhile that differ
    transfers: int
    attempts: int
    snapshots: int
    conflict: tuple[int | None, tuple[str, ...]]  # code, labels
    sent: dict[str, str]  # what the command carried for a concern
    unmet: int | None  # the code of a write concern that the set cannot satisfy
    scanned: tuple[Decimal, ...]  # total while money moves: read one by one, in a snapshot
    repeated: tuple[str, Decimal]  # what repeating a transfer's key raised, what was moved


OPENING = Decimal("1000.00")
ACCOUNTS, WRITERS, TRANSFERS_EACH = 10, 8, 25


@domain_errors()
def demo_transactions(workspace: Workspace | None) -> TransactionResult | Offline:
    """8. Transactions and concerns: money moves under eight writers, and none is lost.

    Prediction: naive transfers change the total; in transactions it stays, at the price of retries.

    Trade-off: a transaction holds its snapshot and its conflicts abort. What one document can
    hold needs none: its update is atomic.
    """
    if workspace is None:
        return _transactions_offline()
    if workspace.server.kind == STANDALONE:
        note("transactions need a replica set; this is a standalone server: not shown")
        return _transactions_offline()
    database = workspace.database()
    database.accounts.insert_many([{"_id": n, "balance": OPENING} for n in range(ACCOUNTS)])
    ledger = Ledger(database.accounts)
    before = ledger.total()
    naive = before, _race_naively(database.accounts, ledger)
    database.accounts.update_many({}, {"$set": {"balance": OPENING}})
    fact("two naive transfers", f"total {naive[0]:,} → {naive[1]:,}")
    scanned = [_add_up(database.accounts, ledger, snapshot) for snapshot in (False, True)]
    attempts, snapshots, differing = _race(ledger, before)
    repeated = _transfer_twice(ledger, database.accounts)
    after, transfers = ledger.total(), WRITERS * TRANSFERS_EACH
    fact(
        f"{WRITERS} writers",
        f"{transfers} transfers in {attempts} attempts, total {before:,} → {after:,}",
    )
    fact("100 moved while adding up", "total {:,}; in a snapshot {:,}".format(*scanned))
    fact("read meanwhile", f"{snapshots} snapshots, {differing} with another total")
    fact("1.00, sent twice", "{}; moved: {}".format(*repeated))
    conflict = provoke_conflict(database.accounts)
    fact("a conflict", f"{conflict}, labelled {', '.join(sorted(conflict.labels))}")
    sent = _concerns(workspace, database)
    for label, value in sent.items():
        fact(label, value)
    unmet = None
    try:
        with domain_errors():
            fussy = database.accounts.with_options(write_concern=WriteConcern(w=50))
            fussy.update_one({"_id": 1}, {"$set": {"fussy": True}})
    except DatabaseError as error:
        unmet = error.code
        written = (database.accounts.find_one({"_id": 1}) or {}).get("fussy", False)
        fact("w=50", f"{error}; the write is there all the same: {written}")
    conclude(
        f"naive: {naive[1] - naive[0]:+,.2f} of {before:,.2f}; in transactions: {after - before:+}"
    )
    return TransactionResult(
        naive, (before, after, differing), transfers, attempts, snapshots,
        (conflict.code, tuple(sorted(conflict.labels))), sent, unmet, tuple(scanned), repeated,
    )  # fmt: skip


def _transfer_twice(ledger: Ledger, accounts: Collection[Document]) -> tuple[str, Decimal]:
    """As after a timeout, when nobody knows: (what the second one is told, what was moved)."""
    before, told = (accounts.find_one({"_id": 0}) or {})["balance"], ""
    for _attempt in range(2):
        try:
            ledger.transfer(0, 1, Decimal(1), key="invoice 17")
        except DuplicateKey as error:
            told = f"DuplicateKey: {error}"
    return told, before - (accounts.find_one({"_id": 0}) or {})["balance"]


def _add_up(accounts: Collection[Document], ledger: Ledger, snapshot: bool) -> Decimal:
    """All balances read one after the other, with a transfer from the last account to the first
    when half of them are read."""
    total = Decimal(0)
    with accounts.database.client.start_session(snapshot=snapshot) as session:
        for key in range(ACCOUNTS):
            if key == ACCOUNTS // 2:
                ledger.transfer(ACCOUNTS - 1, 0, Decimal(100))
            total += (accounts.find_one({"_id": key}, session=session) or {})["balance"]
    return total


def _race_naively(accounts: Collection[Document], ledger: Ledger) -> Decimal:
    """Both pay into account 0, and each reads before the other writes: certain, not likely."""
    barrier = threading.Barrier(2, timeout=OPERATION_TIMEOUT_S)
    with ThreadPoolExecutor(2) as threads:
        futures = [
            threads.submit(transfer_naively, accounts, source, 0, Decimal(100), barrier.wait)
            for source in (1, 2)
        ]
        for future in futures:
            future.result()
    return ledger.total()


def _race(ledger: Ledger, expected: Decimal) -> tuple[int, int, int]:
    """Random transfers by several writers, while another thread adds up all accounts: attempts,
    snapshots, and how many of them did not add up to `expected`."""
    done, totals = threading.Event(), list[Decimal]()

    def write(number: int) -> int:
        rng = random.Random(SEED + number)
        tried = 0
        for _ in range(TRANSFERS_EACH):
            source, target = rng.sample(range(ACCOUNTS), 2)
            tried += ledger.transfer(source, target, Decimal(rng.randrange(1, 500)) / 100)
        return tried

    def watch() -> None:
        while not done.is_set():
            totals.append(ledger.total())

    with ThreadPoolExecutor(WRITERS + 1) as threads:
        watcher = threads.submit(watch)
        try:
            attempts = sum(threads.map(write, range(WRITERS)))
        finally:
            done.set()
        watcher.result()
    return attempts, len(totals), sum(total != expected for total in totals)


def _concerns(workspace: Workspace, database: Database[Document]) -> dict[str, str]:
    """What is sent for each concern, and what it costs here."""
    sent = {}
    for label, concern in {"w=1": WriteConcern(w=1), "w=majority, j": DURABLE}.items():
        target = database.get_collection("notes", write_concern=concern)
        with workspace.log.record() as commands:
            best = best_seconds({label: partial(_insert_empty, target)}, rounds=20)
        concern_sent = json.dumps(commands[-1].command.get("writeConcern"))
        sent[label] = f"{concern_sent}: {best[label] * 1e3:.2f} ms at best"
    with workspace.client.start_session(causal_consistency=True) as session:
        database.notes.insert_one({"_id": "mine"}, session=session)
        with workspace.log.record() as commands:
            majority = database.notes.with_options(read_concern=ReadConcern("majority"))
            majority.find_one({"_id": "mine"}, session=session)
        read_concern = commands[0].command["readConcern"]
    sent["causal session"] = f"its next read carries {', '.join(sorted(read_concern))}"
    return sent


def _insert_empty(target: Collection[Document]) -> None:
    target.insert_one({})


def _transactions_offline() -> Offline:
    retried: dict[str, object] = {}
    for labels in (["TransientTransactionError"], ["RetryableWriteError"], []):
        error = OperationFailure("please try again", 112, {"errorLabels": labels})
        name = ", ".join(labels) or "no label"
        retried[name] = may_retry(error)
        fact(name, f"retry: {retried[name]}")
    note("simulated: those three errors were made here, all with the same text")
    note("money, snapshots and concerns need a server: not shown")
    conclude("a label decides, never the text of a message")
    return Offline(retried)


# ── 9. Change streams ───────────────────────────────────────────────────────────────

Change = Mapping[str, Any]
Handle = Callable[[Change, ClientSession], object]
ENDINGS = ("drop", "dropDatabase", "rename", "invalidate")  # after which no change comes
KEEP_UP_S = 10.0  # between two tokens stored without a change: well within any oplog
MOST_FAILURES = 3  # in a row without a change between: each has waited for the server's return


class Superseded(DatabaseError):
    """Another consumer of this name has moved its position."""


class ChangeConsumer:
    """Hands each change of a collection to a handler, in order, once in effect: what the handler
    writes in the session it gets, and the resume token, are committed together or not at all.
    """

    def __init__(
        self, source: Collection[Document], tokens: Collection[Document], name: str
    ) -> None:
        self._source, self._tokens, self._name = source, tokens, name
        self._at: Any = None  # the token last seen in `tokens`
        self._kept_up = time.monotonic()

    def start(self) -> None:
        """Begin at this moment, unless a position is stored. Changes from here on are not missed,
        whenever `run` comes."""
        with domain_errors():
            if self._position() is None:
                self._begin()

    def restart(self) -> None:
        """Forget the stored position and begin at this moment: after HistoryLost, and before the
        collection is read anew."""
        with domain_errors():
            self._begin()

    def _begin(self) -> None:
        with self._source.watch() as stream:
            update = {"$set": {"token": stream.resume_token}}
            self._tokens.update_one({"_id": self._name}, update, upsert=True)

    def run(self, handle: Handle, stop: Callable[[int], bool]) -> int:
        """Handle changes until `stop(handled so far)`, asked ten times a second while the server
        answers; returns how many. Calls `start` first.

        Rides out the restart of a server. Raises HistoryLost where the oplog no longer reaches
        back to the position, Superseded where another consumer of this name is at work, Unreachable
        or TimedOut after MOST_FAILURES in a row, DatabaseError for an error that no label or lost
        connection explains, and what `handle` raises: its change comes again.
        """
        self.start()
        handled = failures = 0
        while not stop(handled):
            try:
                with self._open() as stream:
                    while not stop(handled):
                        if (change := stream.try_next()) is None:
                            self._keep_up(stream.resume_token)
                            failures = 0  # the server answers
                            continue
                        if change["operationType"] in ENDINGS:
                            raise HistoryLost(f"the collection's {change['operationType']}")
                        self._apply(change, handle)
                        handled, failures = handled + 1, 0
            except PyMongoError as error:
                failures += 1
                if failures >= MOST_FAILURES or not may_retry(error):
                    raise translate(error) from None
                logger.info("reopening after %s", type(error).__name__)
                time.sleep(0.1 * 2**failures)
        return handled

    def _open(self) -> Any:
        self._at = self._position()
        return self._source.watch(
            full_document="updateLookup", max_await_time_ms=100, resume_after=self._at
        )

    def _apply(self, change: Change, handle: Handle) -> None:
        def work(session: ClientSession) -> None:
            handle(change, session)
            self._store(change["_id"], session)

        client = self._source.database.client
        with pymongo.timeout(OPERATION_TIMEOUT_S), client.start_session() as session:
            session.with_transaction(work, write_concern=DURABLE)
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


def copy_change(target: Collection[Document], change: Change, session: ClientSession) -> None:
    """A handler that keeps `target` a copy of the collection, and counts what it was given."""
    key = change["documentKey"]
    if change["operationType"] == "delete":
        target.delete_one(key, session=session)
    elif change["fullDocument"] is not None:  # None: deleted since, which is a later change
        target.replace_one(key, change["fullDocument"], upsert=True, session=session)
    count = {"_id": target.name, "events": 1}
    target.database.counts.update_one(
        {"_id": count["_id"]}, {"$inc": {"events": 1}}, upsert=True, session=session
    )


@dataclass(frozen=True)
class ChangeStreamResult:
    written: int
    handled: tuple[int, int]  # before it was stopped, after it was resumed
    equal: bool
    failed_handler_came_again: bool
    too_old: int | None  # code; None where this server's oplog is too large to be filled here
    resynchronised: bool | None


OPLOG_TO_FILL = 128 * 2**20  # bytes; a larger oplog is not filled for a demo


@domain_errors()
def demo_change_streams(workspace: Workspace | None) -> ChangeStreamResult | Offline:
    """9. Change streams: a consumer that is stopped and resumed, and misses nothing.

    Prediction: with the token in the handler's transaction each change has its effect once.

    Trade-off: a transaction a change bounds the rate to some hundreds a second; where effects are
    idempotent, store the token once for many.
    """
    if workspace is None or workspace.server.kind == STANDALONE:
        note("a change stream reads the oplog of a replica set: not shown without one")
        conclude("nothing was shown")
        return Offline({})
    database = workspace.database()
    consumer = ChangeConsumer(database.orders, database.tokens, "copy")
    consumer.start()
    handle: Handle = partial(copy_change, database["copy"])
    written = 60
    database.orders.insert_many([{"_id": n, "total": n} for n in range(40)])
    first = consume(consumer, handle, 20)
    fact("stopped", f"after {first} of 40 changes; the others and what follows wait in the oplog")
    database.orders.bulk_write([UpdateOne({"_id": n}, {"$inc": {"total": 100}}) for n in range(10)])
    database.orders.delete_many({"_id": {"$lt": 10}})
    resumed = ChangeConsumer(database.orders, database.tokens, "copy")
    came_again = _fail_once(resumed, handle)
    second = 1 + consume(resumed, handle, written - first - 1)
    equal = list(database.orders.find(sort={"_id": 1})) == list(
        database["copy"].find(sort={"_id": 1})
    )
    events_ = (database.counts.find_one() or {}).get("events")
    fact(
        "resumed",
        f"{second} changes; {events_} of {written} had their effect, the copy equals: {equal}",
    )
    fact("a handler that raises", f"its change came again: {came_again}")
    code, resynchronised = _lose_history(workspace, database, resumed, handle)
    conclude(f"{first} + {second} = {first + second} changes for {written} writes")
    return ChangeStreamResult(written, (first, second), equal, came_again, code, resynchronised)


def consume(
    consumer: ChangeConsumer, handle: Handle, count: int, timeout_s: float = OPERATION_TIMEOUT_S
) -> int:
    """Handle `count` changes; raises TimedOut where they do not come."""
    deadline = time.monotonic() + timeout_s
    handled = consumer.run(handle, lambda n: n >= count or time.monotonic() > deadline)
    if handled < count:
        raise TimedOut(f"{handled} of {count} changes came in {timeout_s:g} s")
    return handled


def _fail_once(consumer: ChangeConsumer, handle: Handle) -> bool:
    """Whether the change whose handler raised is the next one to come. Handles that one."""
    given: list[Any] = []

    def note_and(change: Change, session: ClientSession) -> None:
        given.append(change["_id"])
        handle(change, session)
        if len(given) == 1:
            raise LookupError  # after the handler's writes, which must not stay

    for _attempt in range(2):
        try:
            consume(consumer, note_and, 1)
        except LookupError:
            logger.debug("the handler raised, as it was to")
    return bool(given[0] == given[1])


def resynchronise(
    consumer: ChangeConsumer, source: Collection[Document], target: Collection[Document]
) -> None:
    """Begin anew after HistoryLost: first the position, then the copy, so that what changes
    meanwhile is handled again and not missed."""
    consumer.restart()
    with domain_errors():
        source.aggregate([{"$out": target.name}])


def _lose_history(
    workspace: Workspace, database: Database[Document], consumer: ChangeConsumer, handle: Handle
) -> tuple[int | None, bool | None]:
    """Fill the oplog until the stored token has fallen out of it, where it is small enough."""
    try:
        with domain_errors():
            stats = workspace.client.local.command("collStats", "oplog.rs")
    except DatabaseError as error:
        note(f"the oplog may not be read, nor be filled here: {error}")
        return None, None
    if stats["maxSize"] > OPLOG_TO_FILL:
        note(f"an oplog of {stats['maxSize'] / 2**20:,.0f} MiB is not filled here (code 286 then)")
        return None, None
    filled = _fill_oplog(workspace, database, stats["maxSize"])
    database.orders.insert_one({"_id": "late"})
    if filled is None:
        note("the token was still in the oplog after 30 s of writes")
        return None, None
    code: int | None = None
    try:
        consume(consumer, handle, 1)
    except HistoryLost as error:
        code = error.code
        fact("token too old", error)
        fact("written meanwhile", f"{filled / 2**20:.0f} MiB")
    resynchronise(consumer, database.orders, database["copy"])
    database.orders.insert_one({"_id": "after"})
    consume(consumer, handle, 1)
    whole = database["copy"].count_documents({}) == database.orders.count_documents({})
    fact("read anew", f"position first, then the copy: nothing is missing: {whole}")
    return code, whole


def _fill_oplog(workspace: Workspace, database: Database[Document], oplog_bytes: int) -> int | None:
    """Write until the oldest entry is younger than now; returns the bytes written, None where that
    takes more than 30 s."""
    oplog, written = workspace.client.local["oplog.rs"], 0
    mark = oplog.find_one(sort=[("$natural", -1)])

    def rolled_over() -> bool:
        nonlocal written
        if written > oplog_bytes:
            time.sleep(0.2)  # it is cut behind a checkpoint, and as further writes come
        database.filler.insert_one({"x": b"\0" * 2**22})
        written += 2**22
        oldest = oplog.find_one(sort=[("$natural", 1)])
        return bool(oldest and mark and oldest["ts"] > mark["ts"])

    cut = wait_until(rolled_over, 30)
    database.filler.drop()
    return written if cut else None


# ── 10. Async ───────────────────────────────────────────────────────────────────────


class AsyncManager:
    """Load, ask and transfer on asyncio: the same rules, the same pure functions, other I/O.

    Make the client inside the running loop, one for each, and close it there (`async with`).
    """

    def __init__(
        self, database: AsyncDatabase[Document], timeout_s: float = OPERATION_TIMEOUT_S
    ) -> None:
        self._database, self._timeout_s = database, timeout_s

    async def load(self, collection: str, documents: Iterable[Document]) -> LoadReport:
        """As BulkManager.load."""
        report = LoadReport()
        with domain_errors():
            for batch in batches(documents, report):
                with pymongo.timeout(self._timeout_s):
                    await self._insert(collection, batch, report)
        report.rejected.sort(key=lambda rejected: rejected.index)
        return report

    async def _insert(self, name: str, batch: Batch, report: LoadReport) -> None:
        collection = self._database.get_collection(name, codec_options=cast(Any, RAW))
        try:
            await collection.insert_many(batch.documents, ordered=False)
            report.stored += len(batch.documents)
        except BulkWriteError as error:
            if taken := settle(batch, error, report):
                found = collection.find({"_id": {"$in": [d["_id"] for d in taken]}})
                settle_taken(batch, taken, cast(Any, await found.to_list()), report)
        except OperationFailure as error:
            for half in isolate(batch, error, report):
                await self._insert(name, half, report)

    async def run(self, collection: str, pipeline: Sequence[Document]) -> list[Document]:
        """As AggregationManager.run."""
        with domain_errors(), pymongo.timeout(self._timeout_s):
            cursor = await self._database[collection].aggregate(pipeline, allowDiskUse=True)
            return [document async for document in cursor]

    async def transfer(
        self, source: object, target: object, amount: Decimal, key: object = None
    ) -> int:
        """As Ledger.transfer, in the collection `accounts`."""
        check_amount(amount)
        accounts, attempts = self._database.accounts, itertools.count()

        async def work(session: AsyncClientSession) -> None:
            next(attempts)
            if key is not None:
                booked = {"_id": key, "source": source, "target": target, "amount": amount}
                await self._database.transfers.insert_one(booked, session=session)
            changed = await accounts.update_one(*debit(source, amount), session=session)
            if not changed.modified_count:
                known = await accounts.find_one({"_id": {"$eq": source}}, session=session)
                raise InsufficientFunds(source) if known else UnknownAccount(source)
            changed = await accounts.update_one(*credit(target, amount), session=session)
            if not changed.modified_count:
                raise UnknownAccount(target)

        client = self._database.client
        with domain_errors(), pymongo.timeout(self._timeout_s):
            async with client.start_session() as session:
                await session.with_transaction(work, ReadConcern("snapshot"), DURABLE)
        return next(attempts)


async def spent_in_motor(uri: str, database: str, country: str) -> Decimal:
    """What one migrates from. Motor: deprecated since 14 May 2025, end of life 14 May 2026,
    critical fixes until 14 May 2027 (MongoDB's documentation, "Motor")."""
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **client_options(uri, 10))
    try:
        orders_ = client.get_database(database, codec_options=CODEC).orders
        cursor = orders_.aggregate(by_country(country))  # no await
        async for row in cursor:
            return cast(Decimal, row["spent"])
        return Decimal(0)
    finally:
        client.close()  # no await


async def spent_in_pymongo(uri: str, database: str, country: str) -> Decimal:
    """What one migrates to: in this function, `aggregate` and `close` are awaited, too."""
    client: AsyncMongoClient[Document] = AsyncMongoClient(uri, **client_options(uri, 10))
    try:
        orders_ = client.get_database(database, codec_options=CODEC).orders
        cursor = await orders_.aggregate(by_country(country))
        async for row in cursor:
            return cast(Decimal, row["spent"])
        return Decimal(0)
    finally:
        await client.close()


def by_country(country: str) -> list[Document]:
    return [
        {"$match": {"country": country, **PAID["$match"]}},
        {"$group": {"_id": None, "spent": SUM_TOTAL}},
    ]


async def bounded(
    keys: Sequence[T], work: Callable[[T], Awaitable[object]], limit: int
) -> list[object]:
    """`work(key)` for every key by `limit` workers; results in the order of the keys. The first
    error ends the others (as an ExceptionGroup)."""
    results: list[object] = [None] * len(keys)
    pending = iter(enumerate(keys))  # shared: each worker takes the next

    async def worker() -> None:
        for index, key in pending:
            results[index] = await work(key)

    async with asyncio.TaskGroup() as group:
        for _ in range(limit):
            group.create_task(worker())
    return results


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run that heeds a Ctrl-C: `asyncio.wait_for`, by which PyMongo waits for a server,
    forgets a cancellation that comes in the moment its wait is over (Python 3.11)."""

    async def heeding() -> T:
        result = await work
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        return result

    return asyncio.run(heeding())


LOOKUPS, CONCURRENCY = 1_000, 16


def look_up_by_threads(database: Database[Document], keys: Sequence[int]) -> list[object]:
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        return list(threads.map(lambda key: database.orders.find_one({"_id": key}), keys))


async def look_up_by_pymongo(
    client: AsyncMongoClient[Document], database: str, keys: Sequence[int]
) -> list[object]:
    found = client.get_database(database, codec_options=CODEC).orders
    return await bounded(keys, lambda key: found.find_one({"_id": key}), CONCURRENCY)


async def look_up_by_motor(
    client: AsyncIOMotorClient[Document], database: str, keys: Sequence[int]
) -> list[object]:
    found = client.get_database(database, codec_options=CODEC).orders
    return await bounded(keys, lambda key: found.find_one({"_id": key}), CONCURRENCY)


@dataclass(frozen=True)
class AsyncResult:
    seconds: dict[str, float]
    same_answers: bool
    spent: tuple[Decimal, Decimal]  # Motor, PyMongo
    report: LoadReport  # of AsyncManager.load


@domain_errors()
def demo_async(workspace: Workspace | None, shop: Shop) -> AsyncResult | Offline:
    """10. Async: a thousand look-ups by threads, by PyMongo's asyncio and by Motor.

    Prediction: on a server this near, waiting is short; the driver's own work decides.

    Trade-off: asyncio is for thousands of connections that wait, threads are for code that is
    written already. Either way the pool and the number of workers bound what is under way.
    """
    if workspace is None or shop.database is None:
        return _async_offline()
    uri, name = workspace.uri, shop.database.name
    spent = (
        run_async(spent_in_motor(uri, name, "DE")),
        run_async(spent_in_pymongo(uri, name, "DE")),
    )
    fact("the same function", f"Motor: {spent[0]:,}, PyMongo: {spent[1]:,}")
    report = run_async(_load_on_asyncio(uri, workspace.database().name))
    fact("AsyncManager.load", f"{report.stored:,} stored, {len(report.rejected)} rejected")
    most = shop.database.orders.estimated_document_count()
    keys = [1 + n * max(1, most // LOOKUPS) % max(1, most) for n in range(LOOKUPS)]
    seconds, answers = run_async(_look_up_all_ways(workspace, shop.database, keys))
    table(
        ["way", "look-ups/s", "ms each, of 16 at once"],
        [
            (w, f"{LOOKUPS / s:,.0f}", f"{s / LOOKUPS * CONCURRENCY * 1e3:.2f}")
            for w, s in seconds.items()
        ],
    )
    equal = all(answer == answers[0] for answer in answers)
    fact("Motor (MongoDB's docs)", "end of life 14 May 2026, critical fixes to 14 May 2027")
    conclude(f"{LOOKUPS:,} look-ups, {CONCURRENCY} at once; the same documents each way: {equal}")
    return AsyncResult(seconds, equal, spent, report)


async def _load_on_asyncio(uri: str, database: str) -> LoadReport:
    options = client_options(uri, OPERATION_TIMEOUT_S)
    async with AsyncMongoClient[Document](uri, **options) as client:
        target = client.get_database(database, codec_options=CODEC, write_concern=DURABLE)
        return await AsyncManager(target).load("loads", [*measurements(1_000), {"tags": {"a set"}}])


async def _look_up_all_ways(
    workspace: Workspace, database: Database[Document], keys: Sequence[int]
) -> tuple[dict[str, float], list[list[object]]]:
    uri, options = workspace.uri, client_options(workspace.uri, OPERATION_TIMEOUT_S)
    motor: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **options)
    blocking = MongoClient[Document](uri, **options)  # like the others, without a CommandLog
    by_threads = blocking.get_database(database.name, codec_options=CODEC)
    async with AsyncMongoClient[Document](uri, **options) as client:
        ways: dict[str, Callable[[], Awaitable[list[object]]]] = {
            "threads": lambda: asyncio.to_thread(look_up_by_threads, by_threads, keys),
            "PyMongo asyncio": lambda: look_up_by_pymongo(client, database.name, keys),
            "Motor": lambda: look_up_by_motor(motor, database.name, keys),
        }
        best, answers = dict.fromkeys(ways, math.inf), []
        for number in range(3):  # interleaved
            for way, look_up in ways.items():
                started = time.perf_counter()
                found = await look_up()
                best[way] = min(best[way], time.perf_counter() - started)
                if number == 0:
                    answers.append(found)
    motor.close()
    blocking.close()
    return best, answers


def _async_offline() -> Offline:
    with socket.socket() as unserved:  # bound, but nothing listens: refused for certain
        unserved.bind(("127.0.0.1", 0))
        uri = f"mongodb://127.0.0.1:{unserved.getsockname()[1]}/"
        options = client_options(uri, 0.5)
        started = time.perf_counter()
        with MongoClient[Document](uri, **options) as client:
            told = {"MongoClient": _failure(client.admin.command, "ping")}
            words = in_words(client.topology_description).replace(uri[10:-1], "127.0.0.1:PORT")
        given_up_s = time.perf_counter() - started
        told["AsyncMongoClient"], told["Motor"] = run_async(_async_failures(uri, options))
    for name, error in told.items():
        fact(name, type(error).__name__)
    fact("topology, in words", words)
    note("that was a port at which nothing listens; look-ups need a server")
    conclude(f"given up after {given_up_s:.1f} s; the driver's default is 30 s")
    return Offline({**told, "topology": words})


def _failure(work: Callable[..., object], *args: object) -> Exception | None:
    try:
        work(*args)
    except PyMongoError as error:
        return error
    return None


async def _async_failures(uri: str, options: Document) -> list[Exception | None]:
    motor: AsyncIOMotorClient[Document] = AsyncIOMotorClient(uri, **options)
    async with AsyncMongoClient[Document](uri, **options) as client:
        pings = client.admin.command("ping"), motor.admin.command("ping")
        answers = await asyncio.gather(*pings, return_exceptions=True)
    motor.close()
    return [answer if isinstance(answer, Exception) else None for answer in answers]


# ── 11. Server features ─────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Feature:
    """What only some servers have, and a use of it that returns evidence."""

    name: str
    since: tuple[int, ...]
    use: Callable[[Workspace, Database[Document]], str] | None
    needs: str = ""  # beside the version

    def missing(self, server: Server) -> str | None:
        """Why `server` lacks it, or None."""
        if server.version < self.since:
            return f"needs {'.'.join(map(str, self.since))}"
        if self.needs == "Atlas" and not server.on_atlas:
            return "needs Atlas"
        if self.needs == "pymongocrypt" and importlib.util.find_spec("pymongocrypt") is None:
            return "needs the package pymongocrypt, which is not installed"
        return None


def _client_bulk_write(workspace: Workspace, database: Database[Document]) -> str:
    inserts = [
        InsertOne({"n": 1}, namespace=f"{database.name}.{name}") for name in ("first", "second")
    ]
    with workspace.log.record() as commands:
        done = workspace.client.bulk_write(inserts)
    return f"{done.inserted_count} documents into 2 collections, {len(commands)} round trip"


def _compound_wildcard(workspace: Workspace, database: Database[Document]) -> str:
    model = IndexModel([("country", 1), ("attributes.$**", 1)], name="compound_wildcard")
    database.wild.insert_many([{"country": "DE", "attributes": {"a": n}} for n in range(100)])
    manager = IndexManager(database.wild)
    manager.ensure(model)
    plan = manager.plan({"country": "DE", "attributes.a": 7})
    return f"{plan.keys} keys for {plan.returned} of 100 documents"


def _percentile(workspace: Workspace, database: Database[Document]) -> str:
    database.loads.insert_many([{"ms": n} for n in range(1, 101)])
    quantile = {"input": "$ms", "p": [0.5, 0.95], "method": "approximate"}
    group = {"$group": {"_id": None, "ms": {"$percentile": quantile}}}
    (row,) = database.loads.aggregate([group])
    return f"median and 95th percentile of 1 to 100: {row['ms']}"


def _search(workspace: Workspace, database: Database[Document]) -> str:
    indexes = len(list(database.create_collection("texts").list_search_indexes()))
    return f"search indexes can be listed: {indexes}"


FEATURES = (
    Feature("client bulk write", (8, 0), _client_bulk_write),
    Feature("compound wildcard index", (7, 0), _compound_wildcard),
    Feature("$percentile", (7, 0), _percentile),
    Feature("$search", (4, 2), _search, "Atlas"),
    Feature("Queryable Encryption", (7, 0), None, "pymongocrypt"),
)


@dataclass(frozen=True)
class FeaturesResult:
    version: str
    used: dict[str, str]
    skipped: dict[str, str]


@domain_errors()
def demo_features(workspace: Workspace | None) -> FeaturesResult | Offline:
    """11. Server features: what this version has is used, what it lacks is named.

    Prediction: one buildInfo, asked when connecting, decides for all of them.

    Trade-off: features by version are branches to test. Raise the lowest version you support
    rather than keep many.
    """
    if workspace is None:
        for feature in FEATURES:
            needs = ", ".join(filter(None, [".".join(map(str, feature.since)), feature.needs]))
            fact(feature.name, f"needs {needs}")
        note("no server was asked")
        conclude(f"{len(FEATURES)} features, none of them tried")
        return Offline({feature.name: feature.since for feature in FEATURES})
    database = workspace.database()
    used, skipped = {}, {}
    for feature in FEATURES:
        if reason := feature.missing(workspace.server):
            skipped[feature.name] = f"{reason}"
        elif feature.use is None:
            skipped[feature.name] = "available; keys need a management of their own: not shown"
        else:
            with domain_errors():
                used[feature.name] = feature.use(workspace, database)
    version = ".".join(map(str, workspace.server.version[:3]))
    for name, evidence in used.items():
        fact(name, evidence)
    for name, reason in skipped.items():
        fact(f"skipped: {name}", reason)
    conclude(f"MongoDB {version}: {len(used)} used, {len(skipped)} skipped by name")
    return FeaturesResult(version, used, skipped)


# ── Main ────────────────────────────────────────────────────────────────────────────

DEMOS = (
    demo_design,
    demo_validation,
    demo_aggregation,
    demo_indexes,
    demo_geospatial,
    demo_time_series,
    demo_bulk,
    demo_transactions,
    demo_change_streams,
    demo_async,
    demo_features,
)


@contextmanager
def open_resources(run: config.Run) -> Iterator[dict[str, object]]:
    """A seeded shop in a workspace on the server, or neither where there is none."""
    resources: dict[str, object] = {"index_documents": INDEX_DOCUMENTS}
    log = CommandLog()
    if logger.getEffectiveLevel() > logging.DEBUG:
        # Else each cursor that dies with its server is a traceback of the driver's housekeeping.
        logging.getLogger("pymongo.client").setLevel(logging.CRITICAL)
    try:
        uri = run.url("MongoDB", "MONGODB_URI")
        client, server = connect(uri, run.settings.connect_timeout_s, log)
    except config.ServiceUnavailable as error:
        run.fall_back("mongodb", error, "no MongoDB: what the client can do without one")
        yield {**resources, "workspace": None, "shop": Shop(run.scale)}
        return
    run.services["mongodb"] = str(server)
    workspace = Workspace(uri, client, server, log)
    try:
        database = workspace.database()
        shop = Shop(run.scale, database)
        try:
            with domain_errors():
                seed(shop, database)
        except DatabaseError as error:
            if error.code in (UNAUTHORIZED, ATLAS_ERROR):
                shown = config.redact(uri)
                raise config.ConfigError(f"MONGODB_URI: {shown} may not write: {error}") from error
            raise
        yield {**resources, "workspace": workspace, "shop": shop}
    finally:
        workspace.close()


def main(argv: Sequence[str] | None = None) -> int:
    return config.run_script(
        __doc__ or "", DEMOS, open_resources, argv, scale=DEFAULT_CUSTOMERS, scale_unit="customers"
    )


if __name__ == "__main__":
    raise SystemExit(main())
