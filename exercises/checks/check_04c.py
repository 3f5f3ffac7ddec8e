"""Relays over script 04's broker in memory, through a channel that fails as RabbitMQ's does.

Refused: confirms without `mandatory`, where no queue is a confirm, too; the error caught, if only
that of a lost connection, and the row deleted all the same; the error caught and the row kept, but
the next one sent, which overtakes; messages counted that were not sent; the row deleted before it
is published; a new `message_id` for each attempt.
"""

import importlib
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pika import exceptions as amqp

from checks import Wrong

ORDERS = [1, 2, 3, 4]
FAILING = 2  # the publish at which things happen, from 0
RELAYS = 3  # after the one that went wrong


class Killed(BaseException):
    """Stands for SIGKILL."""


class Channel:
    """Of pika's BlockingChannel what a relay uses. Publish number `fails_at` is nacked, or lost
    where nobody asked for confirms; number `killed_at` ends the process, before it (even) or behind
    it (odd, halved)."""

    def __init__(
        self, link: Any, fails_at: int = -1, killed_at: int = -1, lost: bool = False
    ) -> None:
        self._lost = lost
        self._link, self._fails_at, self._killed_at = link, fails_at, killed_at
        self._confirms, self._published, self.is_open = False, -1, True

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
            raise Killed
        if self._published == self._fails_at and self._lost:
            raise amqp.StreamLostError("the broker was restarted")
        if self._published == self._fails_at:
            if self._confirms:
                raise amqp.NackError([])
            return
        try:
            self._link.basic_publish(exchange, routing_key, body, properties, mandatory)
        except amqp.UnroutableError:
            if self._confirms:  # else the message comes back by a callback that nobody has set
                raise
        if 2 * self._published + 1 == self._killed_at:
            raise Killed


class Relayed(NamedTuple):
    numbers: list[int]  # of orders, as they came
    ids: list[str]  # of their messages
    left: int  # rows in the outbox
    told: int | str  # by the first relay


def relayed(exercise: ModuleType, is_declared: bool, first: Callable[[Any], Channel]) -> Relayed:
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
                        told = shop.relay(first(link))
                    link.queue_declare(exercise.QUEUE)
                else:
                    shop.relay(Channel(link))
        with closing(sqlite3.connect(path)) as database:
            left = database.execute("SELECT COUNT(*) FROM outbox").fetchone()[0]
        messages = script.take_all(link, exercise.QUEUE)
    ids = [message.message_id for message in messages]
    return Relayed([message.payload["number"] for message in messages], ids, left, told)


def check(exercise: ModuleType) -> None:
    call = f"place() orders {ORDERS}, relay() ({{}}), relay() again"
    expected = f"orders {ORDERS} in the queue"
    nacked, lost = (partial(Channel, fails_at=FAILING, lost=lost) for lost in (False, True))
    cases: dict[str, tuple[bool, Callable[[Any], Channel], int]] = {
        "all well": (True, Channel, len(ORDERS)),
        "a nack for its third message": (True, nacked, FAILING),
        "the connection lost at its third message": (True, lost, FAILING),
        "the queue declared only afterwards": (False, Channel, 0),
    }
    for what, (is_declared, first, confirmed) in cases.items():
        found, _, left, told = relayed(exercise, is_declared, first)
        if found != ORDERS:
            raise Wrong(call.format(what), expected, f"orders {found}")
        if left:
            raise Wrong(call.format(what), "0 rows left in the outbox", f"{left} rows")
        if told not in (confirmed, "an error"):
            raise Wrong(call.format(what), f"{confirmed} from the first, or an error", told)
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
