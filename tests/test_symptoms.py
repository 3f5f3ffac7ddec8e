"""The texts of docs/COMPREHENSIVE_GUIDE.md, "Troubleshooting", are what servers and drivers say.

Each row that is not marked † is provoked here, on servers of this file's own. `…` in a row stands
for what differs from run to run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pika
import psycopg2
import pymongo
import pytest
import redis
import sqlalchemy as sa
from pika.exceptions import AMQPError
from pymongo.errors import PyMongoError
from redis.backoff import NoBackoff
from redis.retry import Retry
from running import missing, until
from services import load_script, redis_client
from sqlalchemy import orm

import servers

pytestmark = pytest.mark.slow
GUIDE = Path(__file__).resolve().parent.parent / "docs/COMPREHENSIVE_GUIDE.md"
TABLE = GUIDE.read_text(encoding="utf-8").partition("\n## Troubleshooting")[2]
ROWS = re.findall(r"^\| `([^`]+)` ?(†?) \|", TABLE, flags=re.MULTILINE)
ERRORS = (psycopg2.Error, sa.exc.SQLAlchemyError, PyMongoError, redis.RedisError, AMQPError,
          OSError, ValueError)  # fmt: skip
WAIT_S = 5  # for an answer over loopback

Own = dict[str, Any]
Provocation = Callable[[Own], object]
PROVOKED: dict[str, Provocation] = {}


def says(text: str) -> Callable[[Provocation], Provocation]:
    def keep(provocation: Provocation) -> Provocation:
        PROVOKED[text] = provocation
        return provocation

    return keep


class ClusterNode(servers.Redis):
    name = "cluster"
    port_count = 2  # the second for its bus: by default port + 10000, which a client may have

    def _command(self) -> list[str]:
        bus = ["--cluster-port", str(self.ports[1])]
        return [*super()._command(), "--cluster-enabled", "yes", *bus]


class Standalone(servers.Mongo):
    """Of no replica set, and without users."""

    name = "standalone"
    url_form = "mongodb://127.0.0.1:{port}/?directConnection=true"
    _has_user = True

    def _command(self) -> list[str]:
        command = super()._command()
        at = command.index("--replSet")  # rs0 --keyFile FILE
        return command[:at] + command[at + 4 :]


class ShortOfMemory(servers.RabbitMQ):
    """By its own measure: its alarm is on from the start."""

    name = "short"

    def _command(self) -> list[str]:
        command = super()._command()
        with (self.home / "rabbitmq.conf").open("a") as settings:
            settings.write("vm_memory_high_watermark.absolute = 1MB\n")
        return command


@pytest.fixture(scope="module")
def own() -> Iterator[Own]:
    """One server of each kind, and one of each that is set up in a way of its own."""
    try:
        with servers.running("postgres", "mongo", "redis", "rabbitmq") as started:
            run = servers.RunDirectory()
            with closing(run):
                kinds = (ClusterNode, Standalone, ShortOfMemory)
                set_up = {kind.name: kind(run, kind.find()) for kind in kinds}
                for node in set_up.values():
                    node.start()
                with redis_client(set_up["cluster"].url) as client:
                    client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                yield {**started, **set_up}
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


def pattern_of(text: str) -> str:
    return ".*".join(map(re.escape, text.split("…")))


@pytest.mark.parametrize("text", [text for text, mark in ROWS if not mark])
def test_the_text_of_a_symptom_is_what_one_sees(own: Own, text: str) -> None:
    for server in own.values():
        server.start()
    with pytest.raises(ERRORS) as caught:
        PROVOKED[text](own)
    seen = " ".join(f"{type(caught.value).__name__}: {caught.value}".split())
    assert re.search(pattern_of(text), seen), seen


def test_nothing_is_provoked_that_is_in_no_row() -> None:
    assert set(PROVOKED) == {text for text, mark in ROWS if not mark}


# ── PostgreSQL, SQLAlchemy ──────────────────────────────────────────────────────────


def postgres(own: Own, *statements: str, **options: Any) -> Any:
    """A connection on which these were carried out, and are not committed."""
    server = own["postgres"]
    login = {"host": "127.0.0.1", "port": server.port, "dbname": "app", "user": "app"}
    login |= {"password": server.password, "connect_timeout": WAIT_S}
    connection = psycopg2.connect(**(login | options))
    for statement in statements:
        connection.cursor().execute(statement)
    return connection


def account(own: Own) -> None:
    drop, make = "DROP TABLE IF EXISTS account", "CREATE TABLE account (id int PRIMARY KEY, n int)"
    with closing(postgres(own, drop, make, "INSERT INTO account VALUES (1, 0), (2, 0)")) as made:
        made.commit()


def add_one(number: int) -> str:
    return f"UPDATE account SET n = n + 1 WHERE id = {number}"


@says("current transaction is aborted, commands ignored until end of transaction block")
def _(own: Own) -> None:
    with closing(postgres(own)) as connection:
        cursor = connection.cursor()
        with suppress(psycopg2.Error):
            cursor.execute("SELECT 1 / 0")
        cursor.execute("SELECT 1")


@says("could not serialize access due to concurrent update")
def _(own: Own) -> None:
    account(own)
    level = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
    with closing(postgres(own, level, "SELECT n FROM account")) as ours:
        with closing(postgres(own, add_one(1))) as rival:
            rival.commit()
        ours.cursor().execute(add_one(1))


@says("deadlock detected")
def _(own: Own) -> None:
    account(own)
    errors: list[Exception] = []

    def second_lock(connection: Any, number: int) -> None:
        try:
            connection.cursor().execute(add_one(number))
        except psycopg2.Error as error:
            errors.append(error)
        connection.rollback()

    with closing(postgres(own, add_one(1))) as one, closing(postgres(own, add_one(2))) as two:
        threads = [threading.Thread(target=second_lock, args=a) for a in ((one, 2), (two, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    raise errors[0]


@says("canceling statement due to lock timeout")
def _(own: Own) -> None:
    account(own)
    with closing(postgres(own, "SELECT n FROM account")):
        postgres(own, "SET lock_timeout = '100ms'", "ALTER TABLE account ADD x int")


@says("canceling statement due to statement timeout")
def _(own: Own) -> None:
    postgres(own, "SET statement_timeout = '100ms'", "SELECT pg_sleep(5)")


@says("server closed the connection unexpectedly")
def _(own: Own) -> None:
    settings = "SET idle_in_transaction_session_timeout = '50ms'"
    with closing(postgres(own, settings)) as idle, closing(postgres(own)) as other:
        other.autocommit, cursor = True, other.cursor()

        def is_gone() -> bool:
            ours = "SELECT FROM pg_stat_activity WHERE pid = %s"
            cursor.execute(ours, [idle.get_backend_pid()])
            return bool(cursor.rowcount == 0)

        until(is_gone)
        idle.cursor().execute("SELECT 1")


@says("duplicate key value violates unique constraint")
def _(own: Own) -> None:
    account(own)
    postgres(own, "INSERT INTO account VALUES (1, 0)")


@says("cannot execute … in a read-only transaction")
def _(own: Own) -> None:
    account(own)
    postgres(own, "SET TRANSACTION READ ONLY", add_one(1))


@says("permission denied for table …")
def _(own: Own) -> None:
    account(own)
    postgres(own, "CREATE ROLE reader", "SET ROLE reader", "SELECT FROM account")


@says("CREATE INDEX CONCURRENTLY cannot run inside a transaction block")
def _(own: Own) -> None:
    account(own)
    postgres(own, "SELECT 1", "CREATE INDEX CONCURRENTLY ON account (n)")


@says("remaining connection slots are reserved for …")
def _(own: Own) -> None:
    login = {"user": "plain", "password": "plain"}
    few = "ALTER SYSTEM SET max_connections = 8"
    create = "CREATE ROLE plain LOGIN PASSWORD 'plain'"
    with closing(postgres(own)) as connection:
        connection.autocommit = True
        for statement in (few, "DROP ROLE IF EXISTS plain", create):
            connection.cursor().execute(statement)
    own["postgres"].stop()
    own["postgres"].start()
    try:
        with ExitStack() as stack:
            for _each in range(8):
                stack.enter_context(closing(postgres(own, **login)))
    finally:
        with closing(postgres(own)) as connection:
            connection.autocommit = True
            connection.cursor().execute("ALTER SYSTEM RESET max_connections")
        own["postgres"].stop()


@says("QueuePool limit of size … overflow … reached, connection timed out, timeout …")
def _(own: Own) -> None:
    engine = sa.create_engine(own["postgres"].url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with engine.connect():
        engine.connect()


@says("DetachedInstanceError: … lazy load operation of attribute …")
def _(own: Own) -> None:
    script = load_script("01_sqlalchemy_advanced")
    engine = sa.create_engine("sqlite://")
    script.Base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(script.User(email="ada@example.com", full_name="Ada"))
        session.commit()
        user = session.scalars(sa.select(script.User)).one()
    _ = user.addresses


# ── MongoDB ─────────────────────────────────────────────────────────────────────────


def mongo(own: Own, name: str = "mongo", **options: Any) -> Any:
    """A collection with one document."""
    patience: dict[str, Any] = {"serverSelectionTimeoutMS": WAIT_S * 1000}
    client: Any = pymongo.MongoClient(own[name].url, **(patience | options))
    client.app.drop_collection("account")
    client.app.account.insert_one({"_id": 1, "n": 0})
    return client.app.account


@says("E11000 duplicate key error collection: …")
def _(own: Own) -> None:
    mongo(own).insert_one({"_id": 1})


@says("Please retry your operation or multi-document transaction.")
def _(own: Own) -> None:
    found = mongo(own)
    with found.database.client.start_session() as ours, ours.start_transaction():
        found.find_one({"_id": 1}, session=ours)
        found.update_one({"_id": 1}, {"$inc": {"n": 1}})
        found.update_one({"_id": 1}, {"$inc": {"n": 1}}, session=ours)


@says("Transaction numbers are only allowed on a replica set member or mongos")
def _(own: Own) -> None:
    found = mongo(own, "standalone")
    with found.database.client.start_session() as session, session.start_transaction():
        found.find_one({}, session=session)


@says("Document failed validation")
def _(own: Own) -> None:
    found = mongo(own)
    found.database.command("collMod", "account", validator={"n": {"$type": "int"}})
    found.insert_one({"n": "many"})


@says("ServerSelectionTimeoutError: … Connection refused …")
def _(own: Own) -> None:
    with pymongo.MongoClient("mongodb://127.0.0.1:1/", serverSelectionTimeoutMS=300) as client:
        client.admin.command("ping")


@says("not authorized on … to execute command …")
def _(own: Own) -> None:
    database = mongo(own).database
    with suppress(PyMongoError):
        database.command("createUser", "nobody", pwd="nobody", roles=[])
    nobody = {"username": "nobody", "password": "nobody", "authSource": "app"}
    with pymongo.MongoClient("127.0.0.1", own["mongo"].port, **nobody) as client:
        client.app.account.find_one()


@says("Sort exceeded memory limit of … bytes")
def _(own: Own) -> None:
    found = mongo(own)
    name = "internalQueryMaxBlockingSortMemoryUsageBytes"
    set_it = found.database.client.admin.command
    before = set_it("setParameter", 1, **{name: 1_000})["was"]
    try:
        found.insert_many({"n": -n, "text": "x" * 100} for n in range(100))
        found.find(allow_disk_use=False).sort("n").to_list()
    finally:
        set_it("setParameter", 1, **{name: before})


@says("operation exceeded time limit")
def _(own: Own) -> None:
    found = mongo(own)
    found.find_one({"$where": "sleep(2000) || true"}, max_time_ms=100)


@says("not primary")
def _(own: Own) -> None:
    found = mongo(own)
    address: dict[str, Any] = {"directConnection": True, "retryWrites": False}
    login = {"username": "app", "password": own["mongo"].password}
    own_url = f"mongodb://127.0.0.1:{own['mongo'].port}/?authSource=admin"
    with pymongo.MongoClient(own_url, **address, **login) as client:
        client.admin.command("replSetStepDown", 60, force=True)
        try:
            client.app.account.insert_one({})
        finally:
            client.admin.command("replSetFreeze", 0)  # it may stand for election again
            until(lambda: client.admin.command("hello")["isWritablePrimary"])
    found.database.client.close()


# ── Redis ───────────────────────────────────────────────────────────────────────────


def root(own: Own, name: str = "redis", **options: Any) -> redis.Redis:
    once = Retry(NoBackoff(), 0)
    client = redis.Redis.from_url(own[name].url, socket_timeout=WAIT_S, retry=once, **options)
    client.flushall()
    return client


@says("command not allowed when used memory > 'maxmemory'.")
def _(own: Own) -> None:
    client = root(own)
    client.config_set("maxmemory", 1)
    try:
        client.set("key", "value")
    finally:
        client.config_set("maxmemory", 0)


@says("You can't write against a read only replica.")
def _(own: Own) -> None:
    client = root(own)
    client.replicaof("::1", 1)
    try:
        client.set("key", "value")
    finally:
        client.replicaof("NO", "ONE")


@says("no permissions to run the '…' command")
def _(own: Own) -> None:
    root(own).acl_setuser("reader", enabled=True, nopass=True, commands=["+get"], keys=["*"])
    address = {"host": "127.0.0.1", "port": own["redis"].port}
    redis.Redis(**address, username="reader", password="x").flushall()


@says("invalid username-password pair or user is disabled.")
def _(own: Own) -> None:
    redis.Redis("127.0.0.1", own["redis"].port, password="wrong").ping()


@says("WRONGTYPE Operation against a key holding the wrong kind of value")
def _(own: Own) -> None:
    client = root(own)
    client.set("key", "value")
    client.lpush("key", 1)


@says("MISCONF … is configured to save RDB snapshots")
def _(own: Own) -> None:
    client = root(own)
    in_the_way = own["redis"].home / "dump.rdb"
    in_the_way.mkdir()
    client.config_set("save", "3600 1")
    try:
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        client.set("key", "value")
    finally:
        in_the_way.rmdir()
        client.config_set("save", "")


@says("Timeout reading from …")
def _(own: Own) -> None:
    client = redis.Redis.from_url(own["redis"].url, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
    client.ping()
    own["redis"].pause()
    try:
        client.ping()
    finally:
        own["redis"].resume()


@says("No connection available.")
def _(own: Own) -> None:
    pool = redis.BlockingConnectionPool.from_url(own["redis"].url, max_connections=1, timeout=0.1)
    pool.get_connection()
    redis.Redis.from_pool(pool).ping()


@says("Keys in request don't hash to the same slot")
def _(own: Own) -> None:
    client = root(own, "cluster")
    until(lambda: "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")))
    client.mget("one", "two")


# ── RabbitMQ ────────────────────────────────────────────────────────────────────────


def channel_of(own: Own, **options: Any) -> Any:
    """A channel with confirms, on which the queue `work` is new and empty."""
    connection = pika.BlockingConnection(pika.URLParameters(own["rabbitmq"].url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_delete("work")
    channel.queue_declare("work", durable=True, arguments=options)
    return channel


@says("PRECONDITION_FAILED - inequivalent arg '…' for queue '…' in vhost '…'")
def _(own: Own) -> None:
    channel_of(own).queue_declare("work", durable=True, arguments={"x-message-ttl": 1})


@says("NOT_FOUND - no queue '…' in vhost '…'")
def _(own: Own) -> None:
    channel_of(own).queue_declare("nowhere", passive=True)


@says("NOT_FOUND - no exchange '…' in vhost '…'")
def _(own: Own) -> None:
    channel_of(own).basic_publish("nowhere", "", b"")


@says("PRECONDITION_FAILED - unknown delivery tag …")
def _(own: Own) -> None:
    channel = channel_of(own)
    channel.basic_ack(1)
    channel.queue_declare("work", passive=True)


@says("unroutable message(s) returned")
def _(own: Own) -> None:
    channel_of(own).basic_publish("", "nowhere", b"", mandatory=True)


@says("message(s) NACKed")
def _(own: Own) -> None:
    channel = channel_of(own, **{"x-max-length": 1, "x-overflow": "reject-publish"})
    for _each in range(3):
        channel.basic_publish("", "work", b"")


@says("ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.")
def _(own: Own) -> None:
    login = pika.PlainCredentials("app", "wrong")
    address = pika.ConnectionParameters("127.0.0.1", own["rabbitmq"].port, credentials=login)
    pika.BlockingConnection(address)


@says("CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'")
def _(own: Own) -> None:
    channel = channel_of(own)
    own["rabbitmq"].stop()
    channel.connection.process_data_events(WAIT_S)


@says("Blocked connection timeout expired.")
def _(own: Own) -> None:
    parameters = pika.URLParameters(own["short"].url)
    parameters.blocked_connection_timeout = 0.2
    connection = pika.BlockingConnection(parameters)
    connection.channel().basic_publish("", "nowhere", b"")
    connection.process_data_events(WAIT_S)


@says("Stream connection lost: …")
def _(own: Own) -> None:
    channel = channel_of(own)
    own["rabbitmq"].kill()
    channel.queue_declare("work", passive=True)
