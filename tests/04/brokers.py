"""A broker under test, in memory or real, and what goes with it for tests of script 04."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from running import until
from services import load_script

app: Any = load_script("04_rabbitmq_messaging")

TICK_S = 0.02  # how far the clock that is moved by hand goes at each look


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class UnderTest:
    """A broker, and names of a test's own; what it declares and opens is gone at the end."""

    def __init__(self, made: Any, prefix: str, clock: ManualClock | None = None) -> None:
        self.made, self.prefix, self.clock = made, prefix, clock
        self.at_end = ExitStack()

    def connect(self) -> Any:
        connection = self.made.connect()
        self.at_end.callback(lambda: connection.is_open and connection.close())
        return connection

    def channel(self) -> Any:
        """Of a connection of its own, with confirms."""
        channel = self.connect().channel()
        channel.confirm_delivery()
        return channel

    def topology(self, *bindings: tuple[str, str, str], **options: Any) -> Any:
        """Of one work queue that nothing is bound to, unless told otherwise."""
        bindings = bindings or (("work", "", ""),)
        topology = app.Topology(bindings=bindings, prefix=self.prefix, **options)
        if self.clock is None:
            self.at_end.callback(lambda: topology.delete(self.connect().channel()))
        topology.declare(self.channel())
        return topology

    def contract(self, **options: Any) -> Any:
        """Of one work queue, with one delay queue unless told otherwise."""
        options = {"retry": app.RetryPolicy(0.02, attempts=2), **options}
        return self.topology(**options).contract("work")

    def dead_letters(self, contract: Any) -> Any:
        return app.DeadLetterQueue(self.connect(), contract)

    def consumer(self, contract: Any, handler: Callable[[Any], object], **options: Any) -> Any:
        """In a thread, as a context manager."""
        kind = app.InMemoryConsumer if self.clock else app.WorkerPoolConsumer
        return app.consuming(kind(self.made, contract, handler, **options))

    def until(self, is_so: Callable[[], object], what: str = "it") -> None:
        def looks() -> object:
            if self.clock:
                self.clock.now_s += TICK_S
            return is_so()

        until(looks, what)


def in_memory(prefix: str = "test.") -> UnderTest:
    clock = ManualClock()
    return UnderTest(app.InMemoryBroker(clock), prefix, clock)


def relay_and_die(path: str, url: str, alive: int) -> None:
    """Relay an outbox; SIGKILL after `alive` messages and a publish, before its delete."""
    producer, published = app.Producer(app.RabbitMQ(url).connect()), list[Any]()

    def publish(message: Any) -> None:
        producer.publish(message)
        published.append(message)
        if len(published) > alive:
            os.kill(os.getpid(), signal.SIGKILL)

    app.Outbox(sqlite3.connect(path)).relay(publish)
