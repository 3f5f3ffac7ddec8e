"""Kills the consumer at each of its calls, over script 04's broker in memory, and starts another.

Refused: `redelivered` taken for "handled before"; the note in a transaction of its own, before
the credit (a kill between the two loses it) or behind it (a kill doubles it); a note that is looked
up first and written later, between which another consumer comes; deposits known by wallet and
amount, of which two may be equal; the last id of a wallet alone; an id in memory, or an error that
is swallowed, where the database fails once.
"""

import importlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from checks import Wrong

T = TypeVar("T")

DEPOSITS = [("a1", "ann", 100), ("b1", "bob", 250), ("a2", "ann", 100), ("a1", "ann", 100)]
BALANCES = {"ann": 200, "bob": 250}


class Killed(BaseException):
    """Stands for SIGKILL: what is not committed is gone."""


class Steps:
    """Counts calls; one of them is the last of this consumer."""

    def __init__(self, kill_at: int) -> None:
        self._kill_at, self.count, self.what = kill_at, 0, "never killed"
        self.happens_at = -1
        self.happens: Callable[[], object] | None = None

    def step(self, what: str, effect: Callable[[], T]) -> T:
        self._kill(f"before {what}")
        done = effect()
        self._kill(f"after {what}")
        return done

    def _kill(self, what: str) -> None:
        self.count += 1
        if self.happens and self.count - 1 == self.happens_at:
            self.what = what
            self.happens()
        if self.count - 1 == self._kill_at:
            self.what = f"killed {what}, then another one"
            raise Killed


class Database:
    """A connection, or a cursor of it, whose every call is a step."""

    def __init__(self, connection: Any, steps: Steps) -> None:
        self.__dict__.update(_connection=connection, _steps=steps)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._connection, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._connection)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if not callable(found):
            return found

        def called(*args: Any, **options: Any) -> Any:
            text = " ".join(str(args[0]).split()[:3]) if args else ""
            done = self._steps.step(f"{name}({text})", lambda: found(*args, **options))
            return Database(done, self._steps) if name == "cursor" else done

        return called

    def __enter__(self) -> "Database":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._steps.step("commit()", self._connection.commit)
        elif not issubclass(kind, Killed):  # who was killed rolls nothing back
            self._connection.rollback()


def consume(exercise: ModuleType, link: Any, queue: str, path: Path, steps: Steps) -> None:
    """As a consumer does: handle, then ack, until the queue is empty."""
    get_up_to = importlib.import_module("04_rabbitmq_messaging").get_up_to
    with closing(sqlite3.connect(path)) as connection:  # uncommitted work ends with it
        connection.execute("PRAGMA synchronous = OFF")  # no power fails here
        handler = exercise.Wallets(Database(connection, steps))
        while deliveries := get_up_to(1, link, queue):
            handler(deliveries[0])
            steps.step("basic_ack()", partial(link.basic_ack, deliveries[0].tag))


def balances(path: Path) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT id, cents FROM wallets ORDER BY id"))


def run(exercise: ModuleType, kill_at: int) -> tuple[Steps, dict[str, int]]:
    """All deposits by a consumer that is killed once, and by the next."""
    script = importlib.import_module("04_rabbitmq_messaging")
    broker, steps = script.InMemoryBroker(), Steps(kill_at)
    with script.declared(broker, "exercise.") as (link, contract):
        producer = script.Producer(link)
        for message_id, wallet, cents in DEPOSITS:
            payload = {"wallet": wallet, "cents": cents}
            message = script.Message("deposit", payload, message_id=message_id)
            producer.publish(script.Outgoing.of(message, contract.queue))
        with tempfile.TemporaryDirectory() as home:
            path = Path(home) / "wallets.sqlite"
            for life in (steps, Steps(-1)):
                with closing(broker.connect()) as consumer:  # its end gives back what is unacked
                    try:
                        consume(exercise, consumer, contract.queue, path, life)
                    except Killed:
                        continue
                break
            return steps, balances(path)


def run_one(exercise: ModuleType, at: int, fails: bool) -> tuple[Steps, dict[str, int]]:
    """One deposit. At a step of its consumer the database fails, or another consumer has it."""
    script = importlib.import_module("04_rabbitmq_messaging")
    message = script.Message("deposit", {"wallet": "ann", "cents": 100}, message_id="a1")
    delivery = script.Delivery(1, message.encode(), None, redelivered=False, channel=None)
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "wallets.sqlite"
        with (
            closing(sqlite3.connect(path, timeout=0.01)) as first,
            closing(sqlite3.connect(path, timeout=0.01)) as second,
        ):
            rival = exercise.Wallets(second)
            steps = Steps(-1)
            handler = exercise.Wallets(Database(first, steps))
            steps.count, steps.happens_at = 0, at

            def come() -> None:
                try:
                    rival(delivery)
                except sqlite3.OperationalError:  # locked: it comes again, after the first
                    second.rollback()

            def fail() -> None:
                raise sqlite3.OperationalError("disk I/O error")

            steps.happens = fail if fails else come
            try:
                handler(delivery)
            except sqlite3.Error:  # not acked: it comes again
                first.rollback()
                handler(delivery)
            if not fails:
                rival(delivery)
        return steps, balances(path)


def check(exercise: ModuleType) -> None:
    kill_at, count = -1, 0
    while kill_at < count:
        steps, found = run(exercise, kill_at)
        count = max(count, steps.count)
        if found != BALANCES:
            call = f"Wallets, given (message_id, wallet, cents) {DEPOSITS}, {steps.what}"
            raise Wrong(call, f"cents by wallet: {BALANCES}", found)
        kill_at += 1
    for fails in (False, True):
        step, count = 0, 1
        while step < count:
            steps, found = run_one(exercise, step, fails)
            count = max(count, steps.count)
            if found != {"ann": 100}:
                comes = "the database fails once," if fails else "a second Wallets handles it, too,"
                call = f"one deposit of 100; {comes} {steps.what}"
                raise Wrong(call, "cents by wallet: {'ann': 100}", found)
            step += 1
