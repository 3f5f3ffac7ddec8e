"""Script 02 while its server is killed (SIGKILL), stays away, comes back; and when it is stopped.

The mongod is these tests' own. "In the middle" is a point that the test controls: documents that
are only drawn while a load runs, a handler that waits for the kill, a process that is paused when
it has shown a line. Whether something was acknowledged is what the server answered.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo.database import Database
from pymongo.errors import PyMongoError
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)
from running import WAIT_S, databases, until
from script02 import Child, Run, open_workspace, started
from services import ROOT, load_script, mongo_client

import servers

pytestmark = pytest.mark.slow

app: Any = load_script("02_mongodb_advanced")

OUTAGE_TIMEOUT_S = 4.0  # of an operation that is not to outlast an outage: ample before it

Document = dict[str, Any]


class Victim(servers.Mongo):
    """To be killed; what is past its time goes each second, not each minute."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--setParameter", "ttlMonitorSleepSecs=1"]


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
def workspace(victim: Any) -> Iterator[Any]:
    with open_workspace(app, victim.url) as made:
        yield made


@pytest.fixture
def database(workspace: Any) -> Database[Document]:
    """Empty, with durable writes, and money as Decimal."""
    made: Database[Document] = workspace.database()
    return made


def wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S)


def stored(server: servers.Mongo, database: str, collection: str) -> list[Document]:
    """As another client reads them, in order of `n`."""
    with mongo_client(server.url) as client:
        return list(client[database][collection].find(sort=[("n", 1)]))


# ── Bulk: what was acknowledged is there, once ──────────────────────────────────────


class Supply:
    """Documents for as long as the server lives, and three batches more: whatever loads them is
    under way when it is killed. `with_id` tells whether they bring an `_id` of their own."""

    def __init__(self, with_id: bool = True) -> None:
        self.under_way, self.killed, self.drawn, self._with_id = (
            threading.Event(), threading.Event(), 0, with_id,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Document]:
        more = 3 * app.BATCH_DOCUMENTS
        while more:
            more -= self.killed.is_set()
            yield self.document(self.drawn)
            self.drawn += 1
            if self.drawn == 5 * app.BATCH_DOCUMENTS:
                self.under_way.set()

    def document(self, n: int) -> Document:
        return {"n": n, "square": n * n} | ({"_id": f"number {n}"} if self._with_id else {})

    def first(self, count: int) -> list[Document]:
        return [self.document(n) for n in range(count)]


class Acknowledged(CommandListener):
    """Counts the documents whose insertion the server has answered for."""

    def __init__(self) -> None:
        self.count = 0

    def started(self, event: CommandStartedEvent) -> None: ...
    def failed(self, event: CommandFailedEvent) -> None: ...

    def succeeded(self, event: CommandSucceededEvent) -> None:
        if event.command_name == "insert":
            assert "writeErrors" not in event.reply
            self.count += int(event.reply["n"])


class Loader:
    """`numbers` of a database through the manager of one kind, by a client of its own."""

    def __init__(self, kind: str, uri: str, database: str) -> None:
        self.kind, self._uri, self._database, self.acknowledged = kind, uri, database, 0

    def __call__(self, documents: Any, timeout_s: float = 20.0) -> Any:
        heard = Acknowledged()
        load = self._load if self.kind == "sync" else self._load_async
        try:
            return load(documents, timeout_s, heard)
        finally:
            self.acknowledged = heard.count

    def _options(self, heard: Acknowledged) -> Document:
        return {**app.client_options(self._uri, 20.0), "event_listeners": [heard]}

    def _load(self, documents: Any, timeout_s: float, heard: Acknowledged) -> Any:
        with pymongo.MongoClient[Document](self._uri, **self._options(heard)) as client:
            found = client.get_database(self._database, app.CODEC, write_concern=app.DURABLE)
            return app.BulkManager(found.numbers, timeout_s=timeout_s).load(documents)

    def _load_async(self, documents: Any, timeout_s: float, heard: Acknowledged) -> Any:
        async def load() -> Any:
            options = self._options(heard)
            async with pymongo.AsyncMongoClient[Document](self._uri, **options) as client:
                found = client.get_database(self._database, app.CODEC, write_concern=app.DURABLE)
                return await app.AsyncManager(found, timeout_s).load("numbers", documents)

        return asyncio.run(load())


@pytest.fixture(params=["sync", "async"])
def load(request: pytest.FixtureRequest, victim: Any, database: Database[Document]) -> Loader:
    return Loader(request.param, victim.url, database.name)


def kill_in_the_middle(victim: Any, supply: Supply) -> None:
    try:
        wait(supply.under_way)
        victim.kill()
    finally:
        supply.killed.set()


def test_a_load_outlasts_a_kill(victim: Any, database: Database[Document], load: Loader) -> None:
    supply = Supply()
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, supply)
        kill_in_the_middle(victim, supply)
        victim.start()
        report = loading.result(WAIT_S)
    assert (report.stored + report.already_there, report.rejected) == (supply.drawn, [])
    assert load.acknowledged <= supply.drawn
    documents = supply.first(supply.drawn)
    assert stored(victim, database.name, "numbers") == documents
    again = load(documents)
    assert (again.stored, again.already_there, again.rejected) == (0, supply.drawn, [])
    assert stored(victim, database.name, "numbers") == documents


def test_no_document_is_stored_twice_that_has_no_id_to_tell_it_by(
    victim: Any, database: Database[Document], load: Loader
) -> None:
    supply = Supply(with_id=False)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, supply)
        kill_in_the_middle(victim, supply)
        victim.start()
        report = loading.result(WAIT_S)
    assert (report.stored + report.already_there, report.rejected) == (supply.drawn, [])
    found = stored(victim, database.name, "numbers")
    assert [document["n"] for document in found] == list(range(supply.drawn))


def test_a_load_whose_server_stays_away_says_so_and_can_be_repeated(
    victim: Any, database: Database[Document], load: Loader
) -> None:
    supply = Supply()
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, supply, OUTAGE_TIMEOUT_S)
        kill_in_the_middle(victim, supply)
        with pytest.raises((app.Unreachable, app.TimedOut)) as caught:
            loading.result(WAIT_S)
    assert victim.password not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert load.acknowledged >= 3 * app.BATCH_DOCUMENTS
    victim.start()
    found = stored(victim, database.name, "numbers")
    assert [document["n"] for document in found][: load.acknowledged] == list(
        range(load.acknowledged)
    )
    assert found == [supply.document(document["n"]) for document in found]
    documents = supply.first(supply.drawn + 2_500)
    again = load(documents)
    assert (again.stored, again.already_there) == (len(documents) - len(found), len(found))
    assert again.rejected == []
    assert stored(victim, database.name, "numbers") == documents


# ── Durable writes ──────────────────────────────────────────────────────────────────


def test_what_was_acknowledged_right_before_the_kill_is_there_after_it(
    victim: Any, database: Database[Document]
) -> None:
    writers, acknowledged, enough = 4, list[int](), threading.Event()
    numbers = itertools.count()

    def write() -> None:
        while True:
            n = next(numbers)
            with pymongo.timeout(OUTAGE_TIMEOUT_S):
                database.durable.insert_one({"n": n})
            acknowledged.append(n)
            if len(acknowledged) > 100:
                enough.set()

    with ThreadPoolExecutor(writers) as threads:
        writing = [threads.submit(write) for _ in range(writers)]
        try:
            wait(enough)
        finally:
            victim.kill()
        failures = [future.exception(WAIT_S) for future in writing]
    assert all(isinstance(failure, PyMongoError) for failure in failures), failures
    victim.start()
    found = [document["n"] for document in stored(victim, database.name, "durable")]
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert len(set(found) - set(acknowledged)) <= writers  # those that were under way


# ── Transactions: the money stays the same, each transfer happens once ──────────────

ACCOUNTS, OPENING = 6, Decimal(1000)
Transfer = tuple[int, int, Decimal]


class Payer:
    """Transfers until `restarted`, and ten more; each has a key, and an outcome."""

    def __init__(self, number: int, ledger: Any, restarted: threading.Event) -> None:
        self.asked: dict[str, Transfer] = {}
        self.acknowledged, self.unknown = set[str](), set[str]()
        self._number, self._ledger, self._restarted = number, ledger, restarted

    def run(self) -> None:
        rng, more = random.Random(self._number), 10
        while more:
            more -= self._restarted.is_set()
            key = f"{self._number}-{len(self.asked)}"
            source, target = rng.sample(range(ACCOUNTS), 2)
            self.asked[key] = source, target, Decimal(rng.randrange(1, 300)) / 100
            try:
                self._ledger.transfer(*self.asked[key], key=key)
                self.acknowledged.add(key)
            except (app.TimedOut, app.Unreachable):
                self.unknown.add(key)


def booked(database: Database[Document]) -> dict[str, Transfer]:
    return {t["_id"]: (t["source"], t["target"], t["amount"]) for t in database.transfers.find()}


def balances_after(transfers: dict[str, Transfer]) -> dict[int, Decimal]:
    balances = dict.fromkeys(range(ACCOUNTS), OPENING)
    for source, target, amount in transfers.values():
        balances[source] -= amount
        balances[target] += amount
    return balances


def balances(database: Database[Document]) -> dict[int, Decimal]:
    return {account["_id"]: account["balance"] for account in database.accounts.find()}


def test_every_acknowledged_transfer_happened_once_and_no_money_is_lost(
    victim: Any, database: Database[Document]
) -> None:
    database.accounts.insert_many([{"_id": n, "balance": OPENING} for n in range(ACCOUNTS)])
    restarted = threading.Event()
    # Two kinds: those that outlast the outage, and those whose deadline falls into it.
    payers = [
        Payer(n, app.Ledger(database.accounts, timeout_s), restarted)
        for n, timeout_s in enumerate([20.0, 20.0, OUTAGE_TIMEOUT_S, OUTAGE_TIMEOUT_S])
    ]
    with ThreadPoolExecutor(len(payers)) as threads:
        paying = [threads.submit(payer.run) for payer in payers]
        try:
            until(lambda: all(len(p.acknowledged) > 5 for p in payers), "transfers")
            before = sum(len(payer.unknown) for payer in payers)
            victim.kill()
            until(lambda: sum(len(p.unknown) for p in payers) > before, "a transfer in the outage")
            victim.start()
        finally:
            restarted.set()
        for future in paying:
            future.result(WAIT_S)
    asked = {key: transfer for payer in payers for key, transfer in payer.asked.items()}
    acknowledged = {key for payer in payers for key in payer.acknowledged}
    unknown = {key for payer in payers for key in payer.unknown}
    assert acknowledged | unknown == asked.keys()
    assert payers[0].unknown | payers[1].unknown == set()
    done = booked(database)
    assert acknowledged <= done.keys()
    assert done == {key: asked[key] for key in done}
    assert balances(database) == balances_after(done)
    assert app.Ledger(database.accounts).total() == ACCOUNTS * OPENING
    for key in unknown:  # nobody knows; so again, by the same key
        try:
            app.Ledger(database.accounts).transfer(*asked[key], key=key)
        except app.DuplicateKey:
            assert key in done
        else:
            assert key not in done
    assert booked(database) == asked
    assert balances(database) == balances_after(asked)


# ── Change streams: each write has its effect once ──────────────────────────────────


class Crashed(Exception):
    """Of the consumer's process."""


class Effects:
    """A handler that counts each change in the database; it waits for the kill once, at the tenth
    change, `before` or after its write, and goes on or crashes too."""

    def __init__(self, database: Database[Document], before: bool, crashes: bool) -> None:
        self._database, self._before, self._crashes = database.name, before, crashes
        self._calls, self.reached, self.killed = 0, threading.Event(), threading.Event()

    def __call__(self, change: Any, session: Any) -> None:
        self._calls += 1
        if self._before:
            self._wait()
        key = f"{change['operationType']} {change['documentKey']['_id']}"
        effects = session.client[self._database].effects  # of whichever process handles it
        effects.update_one({"_id": key}, {"$inc": {"times": 1}}, upsert=True, session=session)
        if not self._before:
            self._wait()

    def _wait(self) -> None:
        if self._calls == 10:
            self.reached.set()
            wait(self.killed)
            if self._crashes:
                raise Crashed


@pytest.mark.parametrize("crashes", [False, True], ids=["outlasts it", "crashes too"])
@pytest.mark.parametrize("before", [True, False], ids=["before its write", "after its write"])
def test_a_kill_in_the_middle_of_a_handler(
    victim: Any, database: Database[Document], before: bool, crashes: bool
) -> None:
    consumer = app.ChangeConsumer(database.orders, database.tokens, "test")
    consumer.start()
    database.orders.insert_many([{"_id": n} for n in range(20)])
    handle, written = Effects(database, before, crashes), 20 + 20 + 5
    with ThreadPoolExecutor(1) as threads:
        consuming = threads.submit(app.consume, consumer, handle, written, WAIT_S)
        try:
            wait(handle.reached)
            victim.kill()
        finally:
            handle.killed.set()
        victim.start()
        database.orders.update_many({}, {"$set": {"changed": True}})
        database.orders.delete_many({"_id": {"$lt": 5}})
        if crashes:
            with pytest.raises(Crashed):
                consuming.result(WAIT_S)
            with open_workspace(app, victim.url) as another:  # process
                found = another.client.get_database(database.name, app.CODEC)
                resumed = app.ChangeConsumer(found.orders, found.tokens, "test")
                assert app.consume(resumed, handle, written - 9, WAIT_S) == written - 9
        else:
            assert consuming.result(WAIT_S) == written
    effects = {e["_id"]: e["times"] for e in stored(victim, database.name, "effects")}
    assert effects == (
        {f"insert {n}": 1 for n in range(20)}
        | {f"update {n}": 1 for n in range(20)}
        | {f"delete {n}": 1 for n in range(5)}
    )


def test_every_write_around_a_kill_has_its_effect_once(
    victim: Any, database: Database[Document]
) -> None:
    consumer = app.ChangeConsumer(database.orders, database.tokens, "test")
    consumer.start()
    killed, written, handled = threading.Event(), list[int](), list[int]()

    def write() -> None:
        more = 30
        for n in itertools.count():
            if not more:
                return
            more -= killed.is_set()
            database.orders.insert_one({"_id": n})  # acknowledged, or the test fails
            written.append(n)

    def handle(change: Any, session: Any) -> None:
        key = {"_id": change["documentKey"]["_id"]}
        database.effects.update_one(key, {"$inc": {"times": 1}}, upsert=True, session=session)
        handled.append(key["_id"])

    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(write)
        deadline = time.monotonic() + WAIT_S
        consuming = threads.submit(
            consumer.run,
            handle,
            lambda count: (writing.done() and count >= len(written)) or time.monotonic() > deadline,
        )
        try:
            until(lambda: len(handled) > 20, "changes")
            victim.kill()
        finally:
            killed.set()
        victim.start()
        writing.result(WAIT_S)
        assert consuming.result(WAIT_S + 10) == len(written)
    effects = {e["_id"]: e["times"] for e in stored(victim, database.name, "effects")}
    assert effects == dict.fromkeys(written, 1)


def test_a_token_that_is_too_old_and_the_way_back(
    victim: Any, database: Database[Document]
) -> None:
    consumer = app.ChangeConsumer(database.orders, database.tokens, "test")
    consumer.start()

    def handle(change: Any, session: Any) -> None:
        app.copy_change(database["copy"], change, session)

    database.orders.insert_many([{"_id": n} for n in range(3)])
    assert app.consume(consumer, handle, 1) == 1
    with mongo_client(victim.url) as client:
        oplog, filler = client.local["oplog.rs"], client[database.name].filler
        newest = oplog.find_one(sort=[("$natural", -1)])
        assert newest is not None

        def cut() -> bool:
            filler.insert_one({"x": b"\0" * (4 * 2**20)})
            oldest = oplog.find_one(sort=[("$natural", 1)])
            return bool(oldest and oldest["ts"] > newest["ts"])

        until(cut, "the oplog to be cut")
        filler.drop()
    database.orders.delete_one({"_id": 0})
    for _attempt in range(2):  # it does not go away by itself
        with pytest.raises(app.HistoryLost) as caught:
            app.consume(consumer, handle, 1)
        assert caught.value.code == 286
    assert stored(victim, database.name, "copy") == [{"_id": 0}]
    app.resynchronise(consumer, database.orders, database["copy"])
    database.orders.insert_one({"_id": 3})
    assert app.consume(consumer, handle, 1) == 1
    found = stored(victim, database.name, "copy")
    assert sorted(document["_id"] for document in found) == [1, 2, 3]


# ── Expiry ──────────────────────────────────────────────────────────────────────────


def test_what_is_past_its_time_goes_and_nothing_else(
    victim: Any, database: Database[Document]
) -> None:
    (ttl,) = (case.model for case in app.INDEX_CASES if case.kind == "TTL")
    app.IndexManager(database.sessions).ensure(ttl)
    now, hour = datetime.now(UTC), timedelta(hours=1)
    database.sessions.insert_many(
        [
            {"_id": "past", "expires_at": now - hour},
            {"_id": "to come", "expires_at": now + hour},
            {"_id": "never"},
        ]
    )
    until(lambda: not database.sessions.count_documents({"_id": "past"}), "the monitor")
    assert {document["_id"] for document in database.sessions.find()} == {"to come", "never"}


# ── The script, whose server is killed ──────────────────────────────────────────────


def has_collection(server: servers.Mongo, database: set[str], prefix: str) -> bool:
    with mongo_client(server.url) as client:
        names = [n for name in database for n in client[name].list_collection_names()]
    return any(name.startswith(prefix) for name in names)


SHOWN = {  # demo → the line by which it is in its middle
    "bulk": "── 7. ",
    "transactions": "two naive transfers:",
    "change_streams": "stopped:",
}


@pytest.fixture
def in_the_middle(tmp_path: Path, victim: Any) -> Iterator[dict[str, Child]]:
    """A process for each demo of SHOWN, paused in its middle."""
    children: dict[str, Child] = {}
    with ExitStack() as stack:
        for name, line in SHOWN.items():
            args = ("--only", name, "--scale", "5")
            before = databases(victim.url)
            child = children[name] = Run(tmp_path / name).start(
                *args, MONGODB_URI=victim.url, PAUSE_AT=line
            )
            stack.callback(child.process.kill)
            child.paused()
            if name == "bulk":
                child.go_on()
                until(
                    lambda before=before: has_collection(
                        victim, databases(victim.url) - before, "load_"
                    ),
                    "a load",
                )
                child.process.send_signal(signal.SIGSTOP)
        yield children


def check_end(name: str, child: Child, victim: Any) -> tuple[int, set[str]]:
    """(exit code, the databases that it says may stay behind)"""
    ended = child.ended()  # no traceback
    output = ended.stdout + ended.stderr
    assert victim.password not in output
    assert ended.returncode in (0, 1), output
    outcome = f"failed: {name}" if ended.returncode else "none failed"
    assert re.search(rf"^Demos: 1 in [\d.]+ s; {outcome}\.$", ended.stdout, re.MULTILINE), output
    reasons = re.findall(r"^failed: (.*)", ended.stdout, re.MULTILINE)
    assert len(reasons) == ended.returncode
    for reason in reasons:
        assert re.match(r"(TimedOut|Unreachable|DatabaseError): ", reason), reason
    warned = " ".join(ended.stderr.split())
    assert not warned or "these databases may stay behind: module8_" in warned, warned
    return ended.returncode, set(re.findall(r"module8_\w+", warned))


def test_the_script_whose_server_is_killed_and_comes_back(
    victim: Any, in_the_middle: dict[str, Child]
) -> None:
    victim.kill()
    for child in in_the_middle.values():
        child.go_on()
    victim.start()
    named = set[str]()
    for name, child in in_the_middle.items():
        named |= check_end(name, child, victim)[1]
    assert databases(victim.url) <= named


def test_the_script_whose_server_is_killed_and_stays_away(
    victim: Any, in_the_middle: dict[str, Child]
) -> None:
    made = databases(victim.url)
    victim.kill()
    for child in in_the_middle.values():
        child.go_on()
    named = set[str]()
    for name, child in in_the_middle.items():
        code, left = check_end(name, child, victim)
        assert code == 1
        named |= left
    victim.start()
    with mongo_client(victim.url) as client:
        for name in made:
            client.drop_database(name)
    assert made
    assert made <= named


# ── The script, interrupted ─────────────────────────────────────────────────────────

INTERRUPTIONS = {  # demo → the line by which it is in its middle, and the signal
    "bulk": ("documents/s", signal.SIGINT),
    "transactions": ("two naive transfers:", signal.SIGTERM),
    "change_streams": ("stopped:", signal.SIGINT),
    "async": ("the same function:", signal.SIGINT),
    "indexes": ("── 4. ", signal.SIGTERM),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_interrupted_in_the_middle(tmp_path: Path, victim: Any, name: str) -> None:
    line, signum = INTERRUPTIONS[name]
    before = databases(victim.url)
    child = Run(tmp_path).start(
        "--only", name, "--scale", "5", MONGODB_URI=victim.url, PAUSE_AT=line
    )
    child.paused()
    assert databases(victim.url) - before
    child.process.send_signal(signum)
    child.go_on()
    ended = child.ended()
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n"), ended.stdout
    assert "\nDemos: " not in ended.stdout
    assert databases(victim.url) <= before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_seeding(tmp_path: Path, victim: Any, signum: signal.Signals) -> None:
    before = databases(victim.url)
    child = Run(tmp_path).start("--scale", "100000", MONGODB_URI=victim.url)
    until(lambda: has_collection(victim, databases(victim.url) - before, "orders"), "orders")
    child.process.send_signal(signum)
    ended = child.ended()
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")
    assert databases(victim.url) <= before


# Ctrl-C in the very moment in which the server is found that the client waits for. Python 3.11's
# `asyncio.wait_for` then returns what it has and forgets that it was cancelled (fixed in 3.12).
AT_THE_WRONG_MOMENT = """
import asyncio, importlib, os, signal, sys
import pymongo.lock

async def wait_for(future, timeout):
    pymongo.lock.wait_for = asyncio.wait_for  # once
    waiting = asyncio.ensure_future(future)
    waiting.add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGINT))
    return await asyncio.wait_for(waiting, timeout)

signal.signal(signal.SIGINT, signal.default_int_handler)
pymongo.lock.wait_for = wait_for
script = importlib.import_module("02_mongodb_advanced")
sys.exit(script.main(["--only", "async", "--scale", "5"]))
"""


def test_an_interruption_that_asyncio_forgets(tmp_path: Path, victim: Any) -> None:
    before = databases(victim.url)
    ended = subprocess.run(
        [sys.executable, "-c", AT_THE_WRONG_MOMENT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MONGODB_URI": victim.url},
        capture_output=True,
        encoding="utf-8",
        timeout=WAIT_S,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n"), ended.stdout
    assert databases(victim.url) <= before
