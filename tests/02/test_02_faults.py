"""Script 02 while answers are late or lost, and while its server, or a load itself, is killed.

The mongod is these tests' own. "In the middle" is a point that the test controls: documents that
are only drawn while a load runs, a handler that waits for the kill.
"""

from __future__ import annotations

import itertools
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from pymongo.database import Database
from pymongo.errors import (
    AutoReconnect,
    DuplicateKeyError,
    NetworkTimeout,
    PyMongoError,
)
from running import WAIT_S, until
from script02 import open_workspace, started
from services import ROOT, load_script, mongo_client

import servers

pytestmark = pytest.mark.slow

app: Any = load_script("02_mongodb_advanced")

Document = dict[str, Any]
Db = Database[Document]


class Victim(servers.Mongo):
    """To be killed, and to fail on demand."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--setParameter", "enableTestCommands=1"]


@pytest.fixture(scope="module")
def module_victim() -> Iterator[Any]:
    with started(Victim) as server:
        yield server


@pytest.fixture
def victim(module_victim: Any) -> Iterator[Any]:
    """Runs when a test begins, and when it ends."""
    module_victim.start()
    yield module_victim
    module_victim.start()


@pytest.fixture
def database(victim: Any) -> Iterator[Db]:
    """Empty, with durable writes, and money as Decimal."""
    with open_workspace(app, victim.url) as workspace:
        yield workspace.database()


def count_effect(change: Any, session: Any, database: Db) -> None:
    key = f"{change['operationType']} {change['documentKey']['_id']}"
    one = {"$inc": {"times": 1}}
    session.client[database.name].effects.update_one({"_id": key}, one, True, session=session)


def effects(database: Db) -> dict[Any, int]:
    return {one["_id"]: one["times"] for one in database.effects.find()}


def balances(database: Db) -> dict[Any, Decimal]:
    return {row["_id"]: row["balance"] for row in database.accounts.find()}


def current(server: servers.Mongo, idle: str, condition: Document) -> list[Document]:
    pipeline = [{"$currentOp": {idle: True, "allUsers": True}}, {"$match": condition}]
    with mongo_client(server.url) as client:
        return list(client.admin.aggregate(pipeline))


def open_transactions(server: servers.Mongo) -> list[Document]:
    return current(server, "idleSessions", {"transaction.parameters.autocommit": False})


def connections(server: servers.Mongo, of: str) -> list[Document]:
    return current(server, "idleConnections", {"appName": of})


# ── Answers that are late, or lost ──

LATE_S = 6.0  # above timeoutMS=5000, which a busy machine does not use up


class Proxy:
    """Before a mongod. `faults` has what to do with the next answer to a command: it is "late" by
    LATE_S, or "lost", with its connection, once the server has given it."""

    def __init__(self, server: servers.Mongo) -> None:
        self.faults, self._upstream = dict[str, str](), server.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        url = server.url.replace(f":{server.port}/", f":{self._listener.getsockname()[1]}/")
        self.url = f"{url.replace('replicaSet=rs0', 'directConnection=true')}&timeoutMS=5000"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
                sent: list[str] = []
                for pump in (self._commands, self._answers):
                    threading.Thread(target=pump, args=(client, server, sent), daemon=True).start()

    def _commands(self, client: socket.socket, server: socket.socket, sent: list[str]) -> None:
        with suppress(OSError):
            while message := receive(client):
                sent.append(message[26:].partition(b"\0")[0].decode(errors="replace"))
                server.sendall(message)
            server.shutdown(socket.SHUT_RDWR)

    def _answers(self, client: socket.socket, server: socket.socket, sent: list[str]) -> None:
        with client, server, suppress(OSError):
            while message := receive(server):
                fault = self.faults.pop(sent[-1], "")
                time.sleep(LATE_S if fault == "late" else 0)
                if fault == "lost":
                    break
                client.sendall(message)
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def receive(source: socket.socket) -> bytes:
    """A message of MongoDB's wire protocol: its length is in its first four bytes."""
    if len(head := source.recv(4, socket.MSG_WAITALL)) < 4:
        return b""
    return head + source.recv(struct.unpack("<i", head)[0] - 4, socket.MSG_WAITALL)


@pytest.fixture
def proxy(victim: Any) -> Iterator[Proxy]:
    with closing(Proxy(victim)) as made:
        yield made


@contextmanager
def by(proxy: Proxy, database: Db, options: str = "") -> Iterator[Any]:
    """The same database by way of the proxy, where a command has five seconds."""
    with open_workspace(app, proxy.url + options) as workspace:
        yield workspace.client.get_database(database.name, app.CODEC, write_concern=app.DURABLE)


FAULTS = list(itertools.product(("late", "lost"), ("insert", "update", "commitTransaction")))


@pytest.mark.parametrize(("fault", "command"), FAULTS)
def test_a_transfer_whose_answers_fail_is_booked_once_and_nothing_stays_open(
    victim: Any, database: Db, proxy: Proxy, fault: str, command: str
) -> None:
    database.accounts.insert_many([{"_id": n, "balance": Decimal(10)} for n in range(2)])
    with by(proxy, database) as slow:
        proxy.faults[command] = fault
        app.Ledger(slow.accounts).transfer(0, 1, Decimal(1), key="k")
    assert (proxy.faults, open_transactions(victim)) == ({}, [])
    with pytest.raises(DuplicateKeyError):  # at once, not when the server has given up waiting
        app.Ledger(database.accounts).transfer(0, 1, Decimal(1), key="k")
    assert balances(database) == {0: 9, 1: 11}


CONSUMING = [("lost", command) for command in ("find", "aggregate", "getMore")]


@pytest.mark.parametrize(("fault", "command"), FAULTS[1:3] + FAULTS[4:] + CONSUMING)
def test_a_consumer_whose_answers_fail_gives_each_change_its_effect_once(
    victim: Any, database: Db, proxy: Proxy, fault: str, command: str
) -> None:
    with by(proxy, database) as slow:
        consumer = app.ChangeConsumer(slow.orders, slow.tokens, "test")
        consumer.start()
        database.orders.insert_many([{"_id": n} for n in range(3)])
        proxy.faults[command] = fault
        handle = partial(count_effect, database=database)
        assert consumer.run(handle, lambda handled: handled >= 3 and not proxy.faults) == 3
    assert open_transactions(victim) == []
    assert effects(database) == {f"insert {n}": 1 for n in range(3)}


@pytest.mark.parametrize(("fault", "options", "error"), [
    ("lost", "", None), ("lost", "&retryWrites=false", AutoReconnect), ("late", "", NetworkTimeout),
])  # fmt: skip
def test_a_load_whose_answer_fails(
    database: Db, proxy: Proxy, fault: str, options: str, error: type[Exception] | None
) -> None:
    documents, report = [{"_id": n} for n in range(30)], app.LoadReport()
    with by(proxy, database, options) as slow:
        manager = app.BulkManager(slow.things, 10)
        proxy.faults["insert"] = fault
        with pytest.raises(error) if error else nullcontext():
            manager.load(documents, report)
        assert (proxy.faults, report.stored) == ({}, 0 if error else 30)  # or nobody knows
        again, stored = manager.load(documents), 20 if error else 0
    assert again == app.LoadReport(stored=stored, already_there=30 - stored)


# ── Commands that the server fails ──

HOW: dict[str, Document] = {
    "closed": {"closeConnection": True},
    "transient": {"errorCode": 251, "errorLabels": ["TransientTransactionError"]},
    "not primary": {"errorCode": 10107, "errorLabels": ["RetryableWriteError"]},
    "unknown": {"writeConcernError": {"code": 64, "errmsg": "timed out"}},
}
IN_TRANSACTION = [
    *itertools.product(("insert", "update"), ("closed", "transient")),
    *itertools.product(["commitTransaction"], HOW),
]


@pytest.mark.parametrize(("command", "how"), IN_TRANSACTION)
def test_a_transaction_of_which_a_command_fails_twice(
    victim: Any, database: Db, command: str, how: str
) -> None:
    database.accounts.insert_many([{"_id": n, "balance": Decimal(10)} for n in range(2)])
    point = {"configureFailPoint": "failCommand", "mode": {"times": 2}}
    with mongo_client(victim.url) as client:
        client.admin.command({**point, "data": {"failCommands": [command], **HOW[how]}})
    attempts = app.Ledger(database.accounts).transfer(0, 1, Decimal(1), key="k")
    assert attempts == (3 if command != "commitTransaction" or how == "transient" else 1)
    assert open_transactions(victim) == []
    assert balances(database) == {0: 9, 1: 11}


# ── The server is killed, and comes back ──


class Supply:
    """Documents for as long as the server lives, and three batches more: whatever loads them is
    under way when it is killed."""

    def __init__(self, with_id: bool) -> None:
        self.under_way, self.killed, self.drawn = threading.Event(), threading.Event(), 0
        self._with_id = with_id

    def __iter__(self) -> Iterator[Document]:
        more = 3 * app.BATCH_DOCUMENTS
        while more:
            more -= self.killed.is_set()
            yield self.document(self.drawn)
            self.drawn += 1
            if self.drawn == 5 * app.BATCH_DOCUMENTS:
                self.under_way.set()

    def document(self, n: int) -> Document:
        return {"n": n} | ({"_id": f"number {n}"} if self._with_id else {})


def numbers(database: Db) -> list[int]:
    return [one["n"] for one in database.numbers.find(sort=[("n", 1)])]


@pytest.mark.parametrize("with_id", [True, False])
def test_a_load_outlasts_a_kill_and_stores_each_document_once(
    victim: Any, database: Db, with_id: bool
) -> None:
    supply, manager = Supply(with_id), app.BulkManager(database.numbers)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(manager.load, supply)
        try:
            assert supply.under_way.wait(WAIT_S)
            victim.kill()
        finally:
            supply.killed.set()
        victim.start()
        report = loading.result(WAIT_S)
    assert (report.stored + report.already_there, report.rejected) == (supply.drawn, [])
    assert numbers(database) == list(range(supply.drawn))
    if with_id:
        again = manager.load(map(supply.document, range(supply.drawn)))
        assert again == app.LoadReport(already_there=supply.drawn)


LOAD_WITHOUT_END = """
import importlib, itertools, sys
app = importlib.import_module("02_mongodb_advanced")
client, _ = app.connect(sys.argv[1], 5, app.CommandLog())
target = client.get_database(sys.argv[2], write_concern=app.DURABLE).numbers
app.BulkManager(target).load({"_id": f"number {n}", "n": n} for n in itertools.count())
"""


def test_a_loading_process_is_killed_and_the_load_repeated(victim: Any, database: Db) -> None:
    args = [sys.executable, "-c", LOAD_WITHOUT_END, f"{victim.url}&appName=loader", database.name]
    with subprocess.Popen(args, cwd=ROOT) as process:
        try:
            until(lambda: database.numbers.estimated_document_count() > 5_000, "a load")
        finally:
            process.send_signal(signal.SIGKILL)
    until(lambda: connections(victim, "loader") == [], "the server to store what it was sent")
    stored = numbers(database)
    assert stored == list(range(len(stored)))
    documents = map(Supply(True).document, range(len(stored) + 2_500))
    again = app.BulkManager(database.numbers).load(documents)
    assert again == app.LoadReport(stored=2_500, already_there=len(stored))


ACCOUNTS, OPENING = 6, Decimal(1000)
Transfer = tuple[int, int, Decimal]


def pay(number: int, ledger: Any, restarted: threading.Event, asked: dict[str, Transfer]) -> None:
    """Transfer until `restarted`, and ten times more; what failed is asked for again by its key."""
    rng, more = random.Random(number), 10
    for n in itertools.count():
        more -= restarted.is_set()
        source, target = rng.sample(range(ACCOUNTS), 2)
        transfer = asked[f"{number}-{n}"] = source, target, Decimal(rng.randrange(1, 300)) / 100
        while True:
            try:
                ledger.transfer(*transfer, key=f"{number}-{n}")
            except DuplicateKeyError:
                break
            except PyMongoError:
                continue
            break
        if not more:
            return


@pytest.mark.parametrize("options", ["", "&timeoutMS=1000"], ids=["outlasts it", "times out"])
def test_every_transfer_around_a_kill_happens_once_and_no_money_is_lost(
    victim: Any, database: Db, options: str
) -> None:
    database.accounts.insert_many([{"_id": n, "balance": OPENING} for n in range(ACCOUNTS)])
    restarted, asked = threading.Event(), dict[str, Transfer]()
    with open_workspace(app, victim.url + options) as workspace, ThreadPoolExecutor(4) as threads:
        found = workspace.client.get_database(database.name, app.CODEC, write_concern=app.DURABLE)
        ledger = app.Ledger(found.accounts)
        paying = [threads.submit(pay, number, ledger, restarted, asked) for number in range(4)]
        try:
            until(lambda: len(asked) > 30, "transfers")
            victim.kill()
            time.sleep(1.5 if options else 0)  # the outage
            victim.start()
        finally:
            restarted.set()
        for future in paying:
            future.result(WAIT_S)
    expected = dict.fromkeys(range(ACCOUNTS), OPENING)
    for source, target, amount in asked.values():
        expected[source] -= amount
        expected[target] += amount
    booked = {t["_id"]: (t["source"], t["target"], t["amount"]) for t in database.transfers.find()}
    assert (booked, balances(database)) == (asked, expected)
    assert app.Ledger(database.accounts).total() == ACCOUNTS * OPENING


@pytest.mark.parametrize("before", [True, False], ids=["before its write", "after its write"])
def test_a_kill_in_the_middle_of_a_handler(victim: Any, database: Db, before: bool) -> None:
    consumer = app.ChangeConsumer(database.orders, database.tokens, "test")
    consumer.start()
    database.orders.insert_many([{"_id": n} for n in range(20)])
    reached, killed, calls = threading.Event(), threading.Event(), itertools.count(1)

    def handle(change: Any, session: Any) -> None:
        if not before:
            count_effect(change, session, database)
        if next(calls) == 10:
            reached.set()
            assert killed.wait(WAIT_S)
        if before:
            count_effect(change, session, database)

    with ThreadPoolExecutor(1) as threads:
        consuming = threads.submit(consumer.run, handle, lambda handled: handled >= 25)
        try:
            assert reached.wait(WAIT_S)
            victim.kill()
        finally:
            killed.set()
        victim.start()
        database.orders.delete_many({"_id": {"$lt": 5}})
        assert consuming.result(WAIT_S) == 25
    inserts, deletes = (f"insert {n}" for n in range(20)), (f"delete {n}" for n in range(5))
    assert effects(database) == dict.fromkeys([*inserts, *deletes], 1)


# ── History that the oplog has lost ──


def test_a_token_that_is_too_old_and_the_way_back(victim: Any, database: Db) -> None:
    consumer = app.ChangeConsumer(database.orders, database.tokens, "test")
    consumer.start()
    database.orders.insert_many([{"_id": n} for n in range(3)])
    copy = app.copy_change(database.orders, database["copy"])
    assert consumer.run(copy, app.enough(1)) == 1
    with mongo_client(victim.url) as client:
        oplog, filler = client.local["oplog.rs"], client[database.name].filler
        newest = oplog.find_one(sort=[("$natural", -1)])
        assert newest is not None

        def cut() -> bool:
            filler.insert_one({"x": b"\0" * (4 * 2**20)})
            oldest = oplog.find_one(sort=[("$natural", 1)])
            return bool(oldest and oldest["ts"] > newest["ts"])

        until(cut, "the oplog to be cut")
    for _attempt in range(2):  # it does not go away by itself
        with pytest.raises(app.HistoryLost, match="286"):
            consumer.run(copy, app.enough(1))
    consumer.restart()
    database.orders.insert_one({"_id": 3})
    assert consumer.run(copy, app.enough(1)) == 1
    assert {one["_id"] for one in database["copy"].find()} == {0, 3}
