"""What docs/COMPREHENSIVE_GUIDE.md says of acknowledgements, on more than one server: what was
acknowledged is there after the primary was killed, or is not.

A replica that is away is one that lags: so what is lost is certain, not likely. (One that is only
paused would find in its socket's buffer what the primary had sent.) All servers are of this file's
own, on one machine: of networks and of disks nothing is shown.
"""

from __future__ import annotations

import itertools
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import pika
import psycopg2
import pymongo
import pytest
import redis
from pika.exceptions import AMQPError
from pymongo import WriteConcern
from pymongo.errors import PyMongoError
from redis.backoff import NoBackoff
from redis.retry import Retry
from running import missing, until

import servers

pytestmark = pytest.mark.slow
WRITES = 50
SOON_MS = 1_000


@contextmanager
def run_directory() -> Iterator[servers.RunDirectory]:
    with closing(servers.RunDirectory()) as run:
        try:
            yield run
        except servers.ServerUnavailable as unavailable:
            missing(unavailable)


def made(run: servers.RunDirectory, kind: Any, names: Sequence[str]) -> list[Any]:
    """Servers of one kind that share a password, not started yet."""
    found = [type(name, (kind,), {"name": name})(run, kind.find()) for name in names]
    for server in found:
        server.password = found[0].password
    return found


# ── MongoDB: three members ──────────────────────────────────────────────────────────


class Member(servers.Mongo):
    def _log_in(self) -> None:
        with pymongo.MongoClient("127.0.0.1", self.port, directConnection=True) as client:
            client.admin.command("hello")


@pytest.fixture
def members() -> Iterator[list[Any]]:
    """The first is the primary."""
    with run_directory() as run:
        three = made(run, Member, ("mongo1", "mongo2", "mongo3"))
        for member in three:
            member.start()
        hosts = [
            {"_id": n, "host": f"127.0.0.1:{member.port}", "priority": 2 if n == 0 else 1}
            for n, member in enumerate(three)
        ]
        first = pymongo.MongoClient("127.0.0.1", three[0].port, directConnection=True)
        with first:
            config = {"_id": "rs0", "members": hosts}
            first.admin.command("replSetInitiate", config)
            until(lambda: first.admin.command("hello")["isWritablePrimary"])
            first.admin.command("createUser", "app", pwd=three[0].password, roles=["root"])
        yield three


def of_set(members: Sequence[Any]) -> Any:
    hosts = ",".join(f"127.0.0.1:{member.port}" for member in members)
    login = f"app:{members[0].password}"
    return pymongo.MongoClient(
        f"mongodb://{login}@{hosts}/?replicaSet=rs0&authSource=admin",
        serverSelectionTimeoutMS=60_000,
    )


def test_mongodb_loses_what_only_the_primary_acknowledged(members: list[Any]) -> None:
    with of_set(members) as client:
        replicated = client.app.get_collection(
            "kept", write_concern=WriteConcern("majority", j=True)
        )
        replicated.insert_many({"n": n} for n in range(WRITES))
        durable = client.app.get_collection("lost", write_concern=WriteConcern(3, j=True))
        durable.insert_one({"n": -1})
        for member in members[1:]:
            member.kill()
        alone = client.app.get_collection("lost", write_concern=WriteConcern(1))
        acknowledged = sum(alone.insert_one({"n": n}).acknowledged for n in range(WRITES))
        never = WriteConcern("majority", wtimeout=SOON_MS)
        with pytest.raises(PyMongoError) as unmet:
            client.app.get_collection("kept", write_concern=never).insert_one({"n": -1})
        members[0].kill()
        for member in members[1:]:
            member.start()
        assert acknowledged == WRITES
        assert "waiting for replication timed out" in str(unmet.value)
        with of_set(members) as after:  # without the old primary's time, which it alone had signed
            assert after.app.kept.count_documents({"n": {"$gte": 0}}) == WRITES
            assert after.app.lost.count_documents({}) == 1


# ── PostgreSQL: a primary and a standby ─────────────────────────────────────────────


class Standby(servers.Postgres):
    primary: Any

    def _prepare(self) -> None:
        super()._prepare() if (self.home / "data").exists() else self._copy()

    def _copy(self) -> None:
        (self.home / "data").mkdir(0o700)
        (self.home / "data" / "made").touch()
        super()._prepare()  # finds where its programs are, and makes no database
        (self.home / "data" / "made").unlink()
        (self.home / "data").rmdir()
        source = f"host=127.0.0.1 port={self.primary.port} user=app password={self.password}"
        # By default it would wait minutes for a checkpoint.
        options = ["-d", source, "-D", self.home / "data", "--write-recovery-conf", "-c", "fast"]
        command = [self._bin / "pg_basebackup", *options]
        subprocess.run(command, check=True, capture_output=True, **self._user)

    def _log_in(self) -> None:
        with closing(sql(self)) as connection:
            connection.cursor().execute("SELECT 1")


def sql(server: Any, **options: Any) -> Any:
    login = {"host": "127.0.0.1", "port": server.port, "dbname": "app", "user": "app"}
    connection = psycopg2.connect(**login, password=server.password, connect_timeout=5, **options)
    connection.autocommit = True
    return connection


def count(server: Any) -> int:
    with closing(sql(server)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM written")
        return int(cursor.fetchone()[0])


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    """A primary that allows replication from 127.0.0.1, as initdb's pg_hba.conf does."""
    with run_directory() as run, run_directory() as other:  # each may hold a copy of its programs
        primary, standby = made(run, servers.Postgres, ["one"]) + made(other, Standby, ["two"])
        standby.password, standby.primary = primary.password, primary
        primary.start()
        with closing(sql(primary)) as connection:
            connection.cursor().execute("CREATE TABLE written (n int)")
        standby.start()
        yield primary, standby


def test_postgresql_loses_what_no_standby_has(pair: tuple[Any, Any]) -> None:
    primary, standby = pair
    with closing(sql(primary)) as connection, connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO written SELECT generate_series(1, {WRITES})")
        until(lambda: count(standby) == WRITES, "the standby")
        standby.stop()
        for _each in range(WRITES):
            cursor.execute("INSERT INTO written VALUES (0)")  # and commits
        primary.kill()
    standby.start()
    with closing(sql(standby)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_promote()")
    assert count(standby) == WRITES


def cancel_waiting(primary: Any, cancelled: list[int]) -> None:
    """Whoever waits for a standby, once his timeout is over."""
    waiting = (
        "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        f" AND now() - query_start > interval '{2 * SOON_MS} ms'"
    )
    with closing(sql(primary)) as connection, connection.cursor() as cursor:
        until(lambda: cursor.execute(f"SELECT {waiting}") or cursor.rowcount == 1, "the wait")
        cursor.execute(f"SELECT pg_cancel_backend(pid) {waiting}")
        cancelled.append(cursor.rowcount)


def test_postgresql_waits_for_a_synchronous_standby(pair: tuple[Any, Any]) -> None:
    primary, standby = pair
    with closing(sql(primary)) as connection, connection.cursor() as cursor:
        cursor.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        cursor.execute("SELECT pg_reload_conf()")
        in_step = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'"
        until(lambda: cursor.execute(in_step) or cursor.rowcount == 1, "a synchronous standby")
        standby.pause()
        cursor.execute(f"SET statement_timeout = {SOON_MS}")  # which does not end this wait
        cancelled: list[int] = []
        canceller = threading.Thread(target=cancel_waiting, args=(primary, cancelled))
        canceller.start()
        cursor.execute("INSERT INTO written VALUES (1)")
        canceller.join()
        assert cancelled == [1]
        assert "canceling wait for synchronous replication" in connection.notices[-1]
        assert count(primary) == 1  # committed here, and there not yet
    standby.resume()
    until(lambda: count(standby) == 1, "the standby")


# ── Redis: a primary and a replica ──────────────────────────────────────────────────


def test_redis_loses_what_no_replica_has() -> None:
    with run_directory() as run:
        primary, replica = made(run, servers.Redis, ("redis1", "redis2"))
        primary.start()
        replica.start()
        options: dict[str, Any] = {"socket_timeout": 5, "retry": Retry(NoBackoff(), 0)}
        one, two = (redis.Redis.from_url(server.url, **options) for server in (primary, replica))
        with one, two:
            two.config_set("masterauth", primary.password)
            two.replicaof("127.0.0.1", primary.port)
            until(lambda: two.info("replication")["master_link_status"] == "up")
            one.set("kept", "1")
            until(lambda: one.wait(1, SOON_MS) == 1, "the replica")
            two.config_set("masterauth", "wrong")
            one.client_kill_filter(_type="replica")
            until(lambda: two.info("replication")["master_link_status"] == "down")
            assert all(one.set(f"lost:{n}", "1") for n in range(WRITES))
            assert one.wait(1, SOON_MS) == 0
            primary.kill()
            two.replicaof("NO", "ONE")
            assert two.keys("*") == [b"kept"]


# ── RabbitMQ: three nodes ───────────────────────────────────────────────────────────


class Node(servers.RabbitMQ):
    """Of a cluster whose members know each other by the first one's epmd."""

    first: Any = None

    def _prepare(self) -> None:
        if self is self.first:
            super()._prepare()
        elif self._process is None:
            (self.home / "fetched").symlink_to(servers.FETCHED / "rabbitmq")

    def _environment(self) -> dict[str, str]:
        arguments = "+S 1:1 -setcookie module8"
        return super()._environment() | {
            "ERL_EPMD_PORT": str(self.first.ports[2]),
            "RABBITMQ_NODENAME": f"{self.name}@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": arguments,
        }

    def _command(self) -> list[str]:
        command = super()._command()
        names = [f"node{n}@localhost" for n in (1, 2, 3)]
        listed = "cluster_formation.peer_discovery_backend = classic_config\n" + "".join(
            f"cluster_formation.classic_config.nodes.{n} = {name}\n"
            for n, name in enumerate(names, 1)
        )
        with (self.home / "rabbitmq.conf").open("a") as settings:
            settings.write(listed)
        return command


def publish(node: Any, batch: str, confirmed: set[bytes]) -> None:
    """WRITES messages; each joins `confirmed` as soon as it is."""
    parameters = pika.URLParameters(node.url)
    parameters.socket_timeout = parameters.stack_timeout = 5
    with closing(pika.BlockingConnection(parameters)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        persistent = pika.BasicProperties(delivery_mode=2)
        for n in range(WRITES):
            body = f"{batch}: {n}".encode()
            channel.basic_publish("", "work", body, persistent, mandatory=True)
            confirmed.add(body)


def test_a_quorum_queue_keeps_what_it_confirmed_while_two_of_three_nodes_live() -> None:
    with run_directory() as run:
        nodes = made(run, Node, ("node1", "node2", "node3"))
        for node in nodes:
            node.first = nodes[0]
            node.start()
        with closing(pika.BlockingConnection(pika.URLParameters(nodes[0].url))) as connection:
            arguments = {"x-queue-type": "quorum", "x-quorum-initial-group-size": 3}
            channel = connection.channel()
            channel.queue_declare("work", durable=True, arguments=arguments)
        confirmed, found = set[bytes](), set[bytes]()
        publish(nodes[0], "before", confirmed)
        nodes[0].kill()  # the leader
        attempts = itertools.count()

        def is_published() -> bool:
            with suppress(AMQPError, OSError):
                publish(nodes[1], f"attempt {next(attempts)}", confirmed)
                return True
            return False

        until(is_published, "a leader")
        with closing(pika.BlockingConnection(pika.URLParameters(nodes[1].url))) as connection:
            channel = connection.channel()

            def is_all_there() -> bool:
                while (body := channel.basic_get("work")[2]) is not None:
                    found.add(body)
                return confirmed <= found

            until(is_all_there, "all that was confirmed")
