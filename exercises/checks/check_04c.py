"""Relays over script 04's broker in memory, through a channel that fails as RabbitMQ's does.

Refused: confirms without `mandatory`, where no queue is a confirm, too, also if one was there at
the start; the error caught, if only that of a lost connection, and the row deleted all the same;
the error caught and the row kept, but the next one sent, which overtakes; messages counted that
were not sent; the row deleted before it is published, or by a `finally`, which a kill leaves out;
a new `message_id` for each attempt.
"""

import importlib
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from pika import exceptions as amqp

from checks import Wrong

ORDERS = [1, 2, 3, 4, 5, 6]
FAILING = 2  # the publish at which things happen, from 0
RELAYS = 3  # after the one that went wrong


class Killed(BaseException):
    """Stands for SIGKILL."""


class Channel:
    """Of pika's BlockingChannel what a relay uses. Publish number FAILING has the `failure`, if
    any, which is told to who asked for it; number `killed_at` ends the process, and its connection
    to the database, before it (even) or behind it (odd, halved)."""

    def __init__(
        self, link: Any, database: Any, failure: Exception | None = None, killed_at: int = -1
    ) -> None:
        self._link, self._database, self._failure = link, database, failure
        self._confirms, self._published, self._killed_at = False, -1, killed_at
        self.is_open = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def _kill(self) -> NoReturn:
        self._database.close()  # no `finally` of the relay writes any more
        raise Killed

    def channel(self) -> "Channel":
        return self

    def confirm_delivery(self) -> None:
        self._confirms = True

    def close(self) -> None: ...

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None: ...

    def basic_publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: Any = None,
        mandatory: bool = False,
    ) -> None:
        self._published += 1
        if 2 * self._published == self._killed_at:
            self._kill()
        if self._published == FAILING and (failure := self._failure):
            asked = self._confirms and (mandatory or isinstance(failure, amqp.NackError))
            if asked or isinstance(failure, amqp.StreamLostError):
                raise failure
            return
        try:
            self._link.basic_publish(exchange, routing_key, body, properties, mandatory)
        except amqp.UnroutableError:
            if self._confirms:  # else the message comes back by a callback that nobody has set
                raise
        if 2 * self._published + 1 == self._killed_at:
            self._kill()


class Relayed(NamedTuple):
    numbers: list[int]  # of orders, as they came
    ids: list[str]  # of their messages
    left: int  # rows in the outbox
    came: int  # by the first relay
    told: int | str  # by it


def relayed(
    exercise: ModuleType, is_declared: bool, first: Callable[[Any, Any], Channel]
) -> Relayed:
    """By a relay over the channel that `first` gives, and some more, whose broker is well."""
    script = importlib.import_module("04_rabbitmq_messaging")
    broker, told = script.InMemoryBroker(), "an error"
    with tempfile.TemporaryDirectory() as home, closing(broker.connect()) as link:
        path = Path(home) / "shop.sqlite"
        if is_declared:
            link.queue_declare(exercise.QUEUE)
        for life in range(1 + RELAYS):
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA synchronous = OFF")  # no power fails here
                shop = exercise.Shop(database)
                if life == 0:
                    for number in ORDERS:
                        shop.place(number, 100 * number)
                    with suppress(Killed, Exception):  # left to the next relay
                        told = shop.relay(first(link, database))
                    came = link.queue_declare(exercise.QUEUE).method.message_count
                else:
                    shop.relay(Channel(link, database))
        with closing(sqlite3.connect(path)) as database:
            left = database.execute("SELECT COUNT(*) FROM outbox").fetchone()[0]
        messages = script.take_all(link, exercise.QUEUE)
    ids = [message.message_id for message in messages]
    return Relayed([message.payload["number"] for message in messages], ids, left, came, told)


def check(exercise: ModuleType) -> None:
    call = f"place() orders {ORDERS}, relay() ({{}}), relay() again"
    expected = f"orders {ORDERS} in the queue"
    cases: dict[str, tuple[bool, Exception | None]] = {
        "all well": (True, None),
        "a nack for its third message": (True, amqp.NackError([])),
        "the connection lost at its third message": (True, amqp.StreamLostError("restarted")),
        "no queue for its third message": (True, amqp.UnroutableError([])),
        "the queue declared only afterwards": (False, None),
    }
    for what, (is_declared, failure) in cases.items():
        first = partial(Channel, failure=failure)
        found, _, left, came, told = relayed(exercise, is_declared, first)
        if found != ORDERS:
            raise Wrong(call.format(what), expected, f"orders {found}")
        if left:
            raise Wrong(call.format(what), "0 rows left in the outbox", f"{left} rows")
        if told not in (came, "an error"):
            raise Wrong(call.format(what), f"{came} from the first, or an error", told)
    for killed_at in range(2 * len(ORDERS)):
        moment = "before" if killed_at % 2 == 0 else "right after"
        what = f"killed {moment} basic_publish of order {ORDERS[killed_at // 2]}"
        found, ids, *_ = relayed(exercise, True, partial(Channel, killed_at=killed_at))
        if sorted(set(found)) != ORDERS or found != sorted(found):
            raise Wrong(call.format(what), f"{expected}, in this order", f"orders {found}")
        if len(found) > len(ORDERS) + 1:
            raise Wrong(call.format(what), "one message twice at most", f"orders {found}")
        if len(set(ids)) != len(ORDERS):
            distinct = f"{len(ORDERS)} different message ids"
            raise Wrong(call.format(what), distinct, f"{len(set(ids))}, of orders {found}")
