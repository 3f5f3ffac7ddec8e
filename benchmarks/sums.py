"""The figures behind docs/COMPREHENSIVE_GUIDE.md, "Scaling": what a write waits for, and how big
a row, a document, a cached value and an index are.

Run:
  python servers.py run -- python benchmarks/sums.py > benchmarks/records/sums.txt 2>&1

One writer, one write at a time: what a caller waits for, not what a server can take. It starts a
Redis of its own, which writes to disk; the others come from the environment.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pika
import redis
import sqlalchemy as sa
from harness import measure
from pymongo import WriteConcern

import config
import servers

alchemy = importlib.import_module("01_sqlalchemy_advanced")
mongo = importlib.import_module("02_mongodb_advanced")
caching = importlib.import_module("03_caching_strategies")

WRITES = 200  # a round: a quarter of a second where each is flushed
USERS = 20_000
CUSTOMERS = 5_000
PAGES = 1_000
BODY = b"x" * 200

Ways = dict[str, Callable[[], object]]

# ── What a write waits for ──────────────────────────────────────────────────────────


def commits(engine: sa.Engine, flush: str) -> Callable[[], object]:
    def run() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"SET synchronous_commit = {flush}")
            connection.commit()
            for _each in range(WRITES):
                connection.exec_driver_sql("INSERT INTO written VALUES (1)")
                connection.commit()

    return run


def inserts(database: Any, concern: WriteConcern) -> Callable[[], object]:
    target = database.get_collection("written", write_concern=concern)
    return lambda: [target.insert_one({"n": 1}) for _each in range(WRITES)]


def sets(client: redis.Redis, flush: str) -> Callable[[], object]:
    def run() -> None:
        client.config_set("appendfsync", flush)
        for number in range(WRITES):
            client.set("written", number)

    return run


def publishes(channel: Any) -> Callable[[], object]:
    persistent = pika.BasicProperties(delivery_mode=2)
    return lambda: [
        channel.basic_publish("", "module8-sums", BODY, persistent) for _each in range(WRITES)
    ]


class DurableRedis(servers.Redis):
    def _command(self) -> list[str]:
        return [*super()._command(), "--appendonly", "yes"]


@contextmanager
def durable_redis() -> Iterator[redis.Redis]:
    with closing(servers.RunDirectory()) as run:
        server = DurableRedis(run, DurableRedis.find())
        server.start()
        with caching.connect(server.url, 5.0) as client:
            yield client


@contextmanager
def channels(url: str) -> Iterator[tuple[Any, Any]]:
    """One without confirms and one with, and an empty quorum queue."""
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        plain, confirmed = connection.channel(), connection.channel()
        confirmed.confirm_delivery()
        arguments = {"x-queue-type": "quorum"}
        plain.queue_declare("module8-sums", durable=True, arguments=arguments)
        try:
            yield plain, confirmed
        finally:
            plain.queue_delete("module8-sums")


def waits(settings: config.Settings, engine: sa.Engine, database: Any) -> Iterator[list[str]]:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE written (n int)")
    with ExitStack() as stack:
        client = stack.enter_context(durable_redis())
        plain, confirmed = stack.enter_context(channels(settings.rabbitmq_url or ""))
        ways: Ways = {
            "PostgreSQL, synchronous_commit off": commits(engine, "off"),
            "PostgreSQL, COMMIT": commits(engine, "on"),
            "MongoDB, w=1": inserts(database, WriteConcern(1, j=False)),
            "MongoDB, w=majority, j": inserts(database, mongo.DURABLE),
            "Redis, appendfsync no": sets(client, "no"),
            "Redis, appendfsync everysec": sets(client, "everysec"),
            "Redis, appendfsync always": sets(client, "always"),
            "RabbitMQ, no confirm": publishes(plain),
            "RabbitMQ, confirm": publishes(confirmed),
        }
        for way, samples in measure(ways).items():
            low, middle, high = min(samples), statistics.median(samples), max(samples)
            each = [f"{WRITES / seconds:,.0f}" for seconds in (middle, high, low)]
            yield [way, each[0], f"{each[1]}–{each[2]}", f"{middle / WRITES * 1e3:.2f}"]


# ── How big ─────────────────────────────────────────────────────────────────────────


def sizes(engine: sa.Engine, database: Any, cache_client: redis.Redis) -> Iterator[list[str]]:
    rows = alchemy.count_rows(engine, alchemy.Order)
    with engine.connect() as connection:
        for what, size in {
            "PostgreSQL, an order: table": "pg_table_size('orders')",
            "PostgreSQL, an order: its indexes": "pg_indexes_size('orders')",
        }.items():
            total = connection.exec_driver_sql(f"SELECT {size}").scalar_one()
            yield [what, f"{rows:,}", f"{total / rows:.0f}"]
    database.client.admin.command("fsync")
    stats = database.command("collStats", "orders")
    for what, name in {
        "MongoDB, an order: BSON": "size",
        "MongoDB, an order: data on disk": "storageSize",
        "MongoDB, an order: its indexes": "totalIndexSize",
    }.items():
        yield [what, f"{stats['count']:,}", f"{stats[name] / stats['count']:.0f}"]
    before = cache_client.info("memory")["used_memory"]
    cache = caching.TieredCache("module8-sums", cache_client)
    for number in range(PAGES):
        cache.get_or_load(f"page:{number}", lambda n=number: {"id": n, "text": "x" * 400})
    held = cache_client.info("memory")["used_memory"] - before
    yield ["Redis, a value of 400 characters", f"{PAGES:,}", f"{held / PAGES:.0f}"]


def main() -> int:
    settings = config.load_settings()
    if not (settings.database_url and settings.mongodb_uri and settings.rabbitmq_url):
        raise SystemExit("DATABASE_URL, MONGODB_URI, RABBITMQ_URL: see benchmarks/README.md")
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workspace = alchemy.Workspace(home, settings.database_url, 5.0)
        engine = stack.enter_context(closing(workspace)).create(USERS)
        log = mongo.CommandLog()
        client = mongo.connect(settings.mongodb_uri, 5.0, log)
        documents = mongo.Workspace(settings.mongodb_uri, *client, log)
        database = stack.enter_context(closing(documents)).database()
        mongo.seed(database, CUSTOMERS)
        held = list(sizes(engine, database, stack.enter_context(durable_redis())))
        config.table(["bytes of one", "counted over", "bytes"], held)
        found = list(waits(settings, engine, database))
        config.table(["one writer", "writes/s", "range", "ms each"], found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
