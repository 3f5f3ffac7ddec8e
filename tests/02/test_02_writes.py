"""Script 02: bulk loads, the ledger and the change consumer, on a server that stays up.

What is expected comes from a model in plain Python, or from the server's own answers.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import reduce
from typing import Any

import bson
import pytest
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo.database import Database
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    DuplicateKeyError,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    WriteError,
)
from pymongo.write_concern import WriteConcern
from running import until
from services import load_script

app: Any = load_script("02_mongodb_advanced")

Document = dict[str, Any]
Db = Database[Document]
MIB = 2**20
SECRET = "horse battery"  # a value of a document, which no report may show
SCHEMA: Document = {
    "required": ["n"],
    "properties": {"n": {"bsonType": "int", "minimum": 0}, "name": {"maxLength": 20}},
}
# Too deep for the server, which refuses the whole command; the client encodes it.
NESTED: Document = reduce(lambda inner, _: {"a": inner}, range(250), {})


def ids(collection: Any) -> list[Any]:
    return [document["_id"] for document in collection.find().sort("_id")]


def counts(report: Any) -> tuple[int, int, list[int]]:
    return report.stored, report.already_there, [one.index for one in report.rejected]


# ── Bulk ──

BAD_UTF_8 = bson.encode({"_id": 7_000, "n": 1, "name": SECRET}).replace(b"h", b"\xff")
BAD: list[tuple[Any, int | None, str]] = [  # what is refused, the code, the reason
    ({"n": -1, "name": SECRET}, 121, "n: minimum 0"),
    ({"name": SECRET}, 121, "document: lacks n"),
    ({"n": 1, "tags": {SECRET}}, None, "not BSON: tags is set, InvalidDocument"),
    ({"n": 2**70, "name": SECRET}, None, "not BSON: n is int, OverflowError"),
    ({"n": 1, "a\0b": SECRET}, None, "not BSON: a\0b is str, InvalidDocument"),
    ({"_id": 0, "n": 1, "name": SECRET}, 11000, "taken: _id, by another document"),
    ({"n": 1, "email": f"{SECRET}@x"}, 11000, "taken: email"),
    ({"n": 1, "x": b"\0" * (16 * MIB)}, None, r"[\d,]+ bytes are above 16 MiB"),
    ({"n": 1, "deep": NESTED, "name": SECRET}, 15, "nested too deeply"),
    ({"n": 2, "deep": NESTED, "name": SECRET}, 15, "nested too deeply"),
    ({"_id": [1], "n": 1, "name": SECRET}, 53, ".+"),  # an array is no _id
    ([SECRET], None, "no document: list"),
    (RawBSONDocument(BAD_UTF_8), None, "not BSON: .*InvalidBSON"),
]  # fmt: skip


@pytest.mark.parametrize("most", [7, 1_000])
def test_a_bad_document_costs_only_itself(database: Db, most: int) -> None:
    things = app.CollectionManager(database).create("things", SCHEMA)
    things.create_index("email", unique=True, sparse=True)
    things.insert_one({"_id": "first", "n": 1, "email": f"{SECRET}@x"})
    documents: list[Any] = [{"_id": n, "n": n} for n in range(150)]
    places = [1 + 11 * place - (place > 8) * 10 for place in range(len(BAD))]  # two neighbours
    for at, (bad, *_) in zip(places, BAD, strict=True):
        documents.insert(at, bad)
    manager = app.BulkManager(things, most)
    report, again = (manager.load(iter(documents)) for _ in range(2))
    assert (counts(report), counts(again)) == ((150, 0, places), (0, 150, places))
    for rejected, (_, code, reason) in zip(report.rejected, BAD, strict=True):
        assert rejected.code == code
        assert re.fullmatch(reason, rejected.reason), rejected
    assert (again.rejected, SECRET in repr(report)) == (report.rejected, False)
    assert things.count_documents({"_id": {"$type": "int"}}) == 150


@pytest.mark.parametrize("seed", range(8))
def test_a_load_agrees_with_its_model(database: Db, seed: int) -> None:
    rng = random.Random(seed)
    documents = [{"_id": rng.randrange(40), "n": rng.choice([0, 1, 1, 2, -1])} for _ in range(80)]
    stored, rejected = dict[int, int](), dict[int, int]()
    for index, one in enumerate(documents):
        if one["n"] < 0:
            rejected[index] = 121
        elif stored.setdefault(one["_id"], one["n"]) != one["n"]:
            rejected[index] = 11000
    already = len(documents) - len(stored) - len(rejected)
    things = app.CollectionManager(database).create("things", SCHEMA)
    report = app.BulkManager(things, rng.choice([1, 3, 10, 100])).load(documents)
    assert {one["_id"]: one["n"] for one in things.find()} == stored
    assert counts(report) == (len(stored), already, list(rejected))
    assert [one.code for one in report.rejected] == list(rejected.values())


def test_keys_that_look_alike_are_told_apart(database: Db) -> None:
    keys = [1, "1", True, {"a": 1, "b": [2]}, {"a": "1"}, None, "", 1_000, ObjectId()]
    documents = [{"_id": key, "place": place} for place, key in enumerate(keys)]
    load = app.BulkManager(database.things).load
    assert counts(load([*documents, documents[3]])) == (len(keys), 1, [])
    assert counts(load([{"place": 0, "_id": 1}, {"_id": 1, "place": 1}])) == (0, 1, [1])
    raw = [RawBSONDocument(bson.encode(one)) for one in documents]
    assert counts(load(raw)) == (0, len(keys), [])
    without = [{"n": 1}]  # gets an `_id`, and so is stored again
    assert counts(load(without)) == counts(load(without)) == (1, 0, [])
    assert (counts(load([])), without) == ((0, 0, []), [{"n": 1}])


def test_batches_end_by_count_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BATCH_BYTES", 2_000)
    documents = [{"_id": n, "x": b"\0" * (5_000 if n == 20 else 7 * n)} for n in range(60)]
    batches = list(app.batches(documents, app.LoadReport(), 12))
    assert [index for batch in batches for index, _ in batch] == list(range(60))
    sizes = [sum(len(raw.raw) for _, raw in batch) for batch in batches]
    assert all(len(batch) == 1 or size <= 2_000 for batch, size in zip(batches, sizes, strict=True))
    for batch, size, after in zip(batches, sizes, batches[1:], strict=False):
        assert len(batch) == 12 or size + len(after[0][1].raw) > 2_000


def test_the_report_has_what_was_acknowledged_and_a_limit(
    database: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [{"_id": n, "price": Decimal(n)} for n in range(50)]

    def cut_off() -> Iterator[Document]:
        yield from documents[:25]
        raise LookupError

    manager, report = app.BulkManager(database.things, 10), app.LoadReport()
    with pytest.raises(LookupError):
        manager.load(cut_off(), report)
    assert counts(report) == (20, 0, [])
    assert ids(database.things) == list(range(20))
    assert counts(manager.load(documents)) == (30, 20, [])
    assert database.things.find_one({"_id": 7}) == documents[7]
    monkeypatch.setattr(app, "MOST_LISTED", 2)
    report = manager.load([{"_id": [n]} for n in range(5)])
    assert (counts(report), report.unlisted) == ((0, 0, [0, 1]), 3)


@pytest.mark.parametrize("documents", [[{"_id": 1}], [{"_id": 1}, {"_id": 1, "n": 2}]])
def test_an_unmet_write_concern_is_no_success(database: Db, documents: list[Document]) -> None:
    fussy = database.get_collection("things", write_concern=WriteConcern(w=50))
    report = app.LoadReport()
    with pytest.raises(BulkWriteError) as caught:
        app.BulkManager(fussy).load(documents, report)
    assert caught.value.details["writeConcernErrors"]
    assert report == app.LoadReport()


# ── Ledger ──


def balances(database: Db) -> dict[Any, Decimal]:
    return {row["_id"]: row["balance"] for row in database.accounts.find()}


@pytest.fixture
def ledger(database: Db) -> Any:
    """Of ada, who has 10, and bob, who has 5."""
    for name, balance in {"ada": 10, "bob": 5}.items():
        database.accounts.insert_one({"_id": name, "balance": Decimal(balance)})
    return app.Ledger(database.accounts)


AMOUNTS: list[Any] = [1.5, *map(Decimal, "0 -0 -1 NaN sNaN Infinity 0.001 1E+16 1E+30".split())]


@pytest.mark.parametrize(("source", "target", "amount", "error"), [
    *(("ada", "bob", amount, ValueError) for amount in AMOUNTS),
    ("ada", "bob", Decimal("10.01"), app.InsufficientFunds),
    *((*pair, Decimal(1), app.UnknownAccount) for pair in (
        ("ada", "nobody"), ("nobody", "ada"), ("ada", {"$ne": "ada"}), ({"$ne": None}, "ada"),
    )),
])  # fmt: skip
def test_a_refused_transfer_moves_and_books_nothing(
    database: Db, ledger: Any, source: Any, target: Any, amount: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ledger.transfer(source, target, amount, key=1)
    assert (balances(database), ids(database.transfers)) == ({"ada": 10, "bob": 5}, [])
    ledger.transfer("ada", "bob", Decimal("10.00"), key=1)  # the key is free, and all may be spent
    assert balances(database) == {"ada": 0, "bob": 15}


def test_a_key_is_booked_once(database: Db, ledger: Any) -> None:
    for key in ("a", "b"):
        assert ledger.transfer("ada", "bob", Decimal("0.10"), key=key) == 1
    for _ in range(2):
        with pytest.raises(DuplicateKeyError):
            ledger.transfer("ada", "bob", Decimal("0.10"), key="a")
    with pytest.raises(WriteError):
        ledger.transfer("ada", "bob", Decimal(1), key={"$ne": 1})
    assert balances(database) == {"ada": Decimal("9.80"), "bob": Decimal("5.20")}
    assert ledger.transfer("ada", "ada", Decimal(9)) == 1
    assert (ids(database.transfers), ledger.total()) == (["a", "b"], 15)


def test_a_transfer_is_one_transaction_and_the_total_a_snapshot(workspace: Any) -> None:
    database = workspace.database()
    ledger = app.Ledger(database.accounts)
    assert ledger.total() == 0
    database.accounts.insert_many([{"_id": n, "balance": Decimal("1.10")} for n in range(2)])
    with workspace.log.record() as sent:
        ledger.transfer(0, 1, Decimal(1), key="k")
        assert ledger.total() == Decimal("2.20")
    *changes, commit, total = (event.command for event in sent)
    assert [next(iter(one)) for one in changes] == ["insert", "update", "update"]
    assert changes[0]["readConcern"]["level"] == total["readConcern"]["level"] == "snapshot"
    assert len({one["txnNumber"] for one in (*changes, commit)}) == 1
    assert commit["writeConcern"] == {"w": "majority", "j": True}


def test_a_conflict_is_repeated_until_it_goes_through(workspace: Any) -> None:
    accounts = workspace.database().accounts
    accounts.insert_many([{"_id": n, "balance": Decimal(9)} for n in range(2)])
    with (
        ThreadPoolExecutor(1) as threads,
        accounts.database.client.start_session() as session,
        session.start_transaction(),
        workspace.log.record() as sent,
    ):
        accounts.update_one({"_id": 0}, {"$inc": {"balance": Decimal(1)}}, session=session)
        moving = threads.submit(app.Ledger(accounts).transfer, 0, 1, Decimal(3))
        until(lambda: sum("startTransaction" in e.command for e in tuple(sent)) >= 3, "a retry")
        session.commit_transaction()
        assert moving.result() >= 2
    assert balances(accounts.database) == {0: 7, 1: 12}


def test_ctrl_c_when_the_watcher_has_just_started_ends_the_demo(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ThreadPoolExecutor.submit

    def interrupted(*args: Any) -> None:
        submit(*args)
        raise KeyboardInterrupt

    def demo() -> None:
        with suppress(KeyboardInterrupt):
            app.demo_transactions(workspace)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    running = threading.Thread(target=demo, daemon=True)
    running.start()
    until(lambda: not running.is_alive(), "its end")


# ── ChangeConsumer ──


def consumer_of(database: Db) -> Any:
    """A consumer of `orders`; another one of the same is it in a new process."""
    return app.ChangeConsumer(database.orders, database.tokens, "test")


@pytest.fixture
def consumer(database: Db) -> Any:
    made = consumer_of(database)
    made.start()
    return made


class Effects:
    """A handler that inserts what it is given, and then raises `errors`, one a call; a second
    effect of one change is an error."""

    def __init__(self, database: Db, *errors: Exception | None) -> None:
        self._effects, self._errors = database.effects, list(errors)
        self.given: list[tuple[str, Any]] = []

    def __call__(self, change: Any, session: Any) -> None:
        assert set(change) == {"_id", "operationType", "ns", "documentKey"}
        self.given.append((change["operationType"], change["documentKey"]["_id"]))
        self._effects.insert_one({"of": self.given[-1]}, session=session)
        if self._errors and (error := self._errors.pop(0)):
            raise error

    def stored(self) -> list[tuple[str, Any]]:
        return [tuple(one["of"]) for one in self._effects.find()]


def test_changes_come_in_order_and_resume(consumer: Any, database: Db) -> None:
    database.orders.insert_many([{"_id": n} for n in range(4)])
    handle = Effects(database)
    assert consumer.run(handle, app.enough(3)) == 3
    database.orders.update_one({"_id": 0}, {"$set": {"x": 1}})
    database.orders.replace_one({"_id": 1}, {"x": 1})
    database.orders.delete_one({"_id": 2})
    resumed = consumer_of(database)
    resumed.start()  # keeps the stored position
    assert resumed.run(handle, app.enough(4)) == 4
    kinds = "insert insert insert insert update replace delete".split()
    assert handle.given == list(zip(kinds, [0, 1, 2, 3, 0, 1, 2], strict=True)) == handle.stored()


@pytest.mark.parametrize("error", [LookupError(), DuplicateKeyError("x", 11000, {})])
def test_a_handler_that_raises_has_no_effect_and_its_change_comes_again(
    consumer: Any, database: Db, error: Exception
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(3)])
    handle = Effects(database, error)
    with pytest.raises(type(error)):
        consumer.run(handle, app.enough(3))
    assert handle.stored() == []
    consumer_of(database).run(handle, app.enough(3))
    assert handle.given == [("insert", n) for n in (0, 0, 1, 2)]
    assert handle.stored() == [("insert", n) for n in range(3)]


def test_a_lost_connection_is_ridden_out_until_it_is_lost_too_often(
    consumer: Any, database: Db
) -> None:
    database.orders.insert_many([{"_id": n} for n in range(2)])
    gone = [AutoReconnect("gone")] * app.MOST_FAILURES
    handle = Effects(database, *gone, *gone[1:], None, *gone[1:])  # three; two for either change
    with pytest.raises(AutoReconnect):
        consumer.run(handle, app.enough(2))
    assert (handle.given, handle.stored()) == ([("insert", 0)] * app.MOST_FAILURES, [])
    assert consumer.run(handle, app.enough(2)) == 2
    assert handle.stored() == [("insert", n) for n in range(2)]


def test_of_two_with_one_name_the_second_is_superseded(consumer: Any, database: Db) -> None:
    database.orders.insert_many([{"_id": n} for n in range(3)])
    handle, other, taken = Effects(database), consumer_of(database), list[int]()

    def overtaken(change: Any, session: Any) -> None:
        if not taken:
            taken.append(other.run(handle, app.enough(1)))
        handle(change, session)

    with pytest.raises(app.Superseded, match="test"):
        consumer.run(overtaken, app.enough(3))
    assert handle.stored() == [("insert", 0)]
    assert consumer.run(handle, app.enough(2)) == 2  # from where the other one is
    assert handle.stored() == [("insert", n) for n in range(3)]


@pytest.mark.parametrize("ending", ["drop", "rename"])
def test_the_end_of_the_collection_is_lost_history_until_a_restart(
    consumer: Any, database: Db, ending: str
) -> None:
    database.orders.insert_one({"_id": 1})
    database.orders.drop() if ending == "drop" else database.orders.rename("elsewhere")
    handle = Effects(database)
    with pytest.raises(app.HistoryLost, match=ending):
        consumer.run(handle, app.enough(2))
    again = consumer_of(database)
    with pytest.raises(app.HistoryLost):  # also for the next process
        again.run(handle, app.enough(2))
    database.orders.insert_one({"_id": "before the restart"})
    again.restart()
    database.orders.insert_one({"_id": "after"})
    again.run(handle, app.enough(1))
    assert handle.stored() == [("insert", 1), ("insert", "after")]


def test_a_token_of_another_collection_is_lost_history(consumer: Any, database: Db) -> None:
    with database.others.watch() as stream:
        database.others.insert_one({"_id": 1})
        token = {"token": next(stream)["_id"]}
    database.orders.insert_one({"_id": 1})
    database.tokens.update_one({"_id": "test"}, {"$set": token})
    with pytest.raises(app.HistoryLost, match="280"):
        consumer.run(Effects(database), app.enough(1))


def test_an_update_of_what_became_too_large_for_one_event(consumer: Any, database: Db) -> None:
    database.orders.insert_one({"_id": 1, "x": b"\0" * (9 * MIB)})
    database.orders.update_one({"_id": 1}, {"$unset": {"x": 1}})
    database.orders.update_one({"_id": 1}, {"$set": {"y": b"\0" * (9 * MIB)}})
    database.orders.insert_many([{"_id": n} for n in (2, 3)])
    database.orders.delete_one({"_id": 2})  # before its insert is handled
    copy = app.copy_change(database.orders, database["copy"])
    assert consumer.run(copy, app.enough(6)) == 6
    database.orders.delete_one({"_id": 3})
    assert consumer.run(copy, app.enough(1)) == 1
    copied = list(database["copy"].find().sort("_id"))
    assert copied == list(database.orders.find().sort("_id")) != []
    assert list(database.counts.find()) == [{"_id": "copy", "events": 7}]


def test_a_quiet_collection_keeps_its_place_as_others_write(
    consumer: Any, database: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(_handled: int = 0) -> Any:
        seen.append(database.tokens.find_one({"_id": "test"})["token"]["_data"])
        return len(seen) > 5 if app.KEEP_UP_S else len(set(seen)) > 2 or len(seen) > 50

    seen = list[str]()
    stored()
    first, handle = seen[0], Effects(database)
    database.others.insert_many([{"_id": n} for n in range(10)])
    consumer.run(handle, stored)
    assert set(seen) == {first}  # KEEP_UP_S is not over
    monkeypatch.setattr(app, "KEEP_UP_S", 0.0)
    consumer.run(handle, stored)
    assert seen[-1] > first
    database.orders.insert_one({"_id": 1})
    consumer_of(database).run(handle, app.enough(1))
    assert handle.stored() == [("insert", 1)]


def test_what_decides_is_read_from_the_primary_whatever_the_uri_prefers(
    workspace: Any, mongo_uri: str
) -> None:
    uri = f"{mongo_uri}{'&' if '?' in mongo_uri else '/?'}readPreference=secondaryPreferred"
    log, name = app.CommandLog(), workspace.database().name
    client, _ = app.connect(uri, 5.0, log)
    with client, log.record() as commands:
        database = client.get_database(name, app.CODEC)
        loads = [app.BulkManager(database.things).load([{"_id": 1}]) for _ in range(2)]
        consumer_of(database).start()
    assert [counts(load) for load in loads] == [(1, 0, []), (0, 1, [])]
    finds = [one.command for one in commands if one.command_name == "find"]
    asked = [(find["find"], "$readPreference" in find) for find in finds]
    assert asked == [("things", False), ("tokens", False)]


LABELLED = {name: OperationFailure("x", 1, {"errorLabels": [name]}) for name in (
    "TransientTransactionError", "RetryableWriteError", "UnknownTransactionCommitResult",
    "ResumableChangeStreamError", "NoWritesPerformed", "",
)}  # fmt: skip


@pytest.mark.parametrize(("error", "may"), [
    (AutoReconnect("x"), True), (NetworkTimeout("x"), True),
    *((error, name not in ("NoWritesPerformed", "")) for name, error in LABELLED.items()),
    (OperationFailure("not master, TransientTransactionError", 1), False),
])  # fmt: skip
def test_a_label_says_what_may_be_tried_again(error: PyMongoError, may: bool) -> None:
    assert app.may_retry(error) is may
