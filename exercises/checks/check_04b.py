"""Runs script 04's consumer and broker in memory by a clock that nothing but `time.sleep` moves on.

Refused: shorter waits in the handler; the error raised as it is, which is a dead letter at once;
Transient for each error, which retries a bad order, or one that the service does not know; a timer
in a thread, whose order is acked before it is handled, and lost by a kill.
"""

import importlib
import itertools
import threading
import time
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

from checks import Wrong

BAD, ILL, DEAD, LATE, WELL, UNKNOWN = 1, 2, 3, 4, (5, 6, 7), 8  # numbers, as published
FAILURES = {ILL: 2, DEAD: 99, LATE: 4}  # answers of 503, before one that is well
WAITS_S = {ILL: [1.0, 2.0], DEAD: [1.0, 2.0, 4.0, 8.0], LATE: [1.0, 2.0, 4.0, 8.0]}
END_S, CLOSE_S = 60.0, 0.1  # the consumer looks 500 times a second


class NoSuchOrder(Exception):
    """The tax service answers 404, and always will."""


class Clock:
    """Seconds; sleeping takes no time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class World:
    """The tax service and the books, which write down what happens, and when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.tried: dict[int, list[float]] = {}
        self.booked: list[tuple[int, int]] = []  # numbers and taxes
        self.events: list[str] = []
        self.errors: list[Exception] = []  # of the handler, which are no answer to a delivery

    def tax_cents(self, unavailable: type[Exception], number: int) -> int:
        self.tried.setdefault(number, []).append(self._clock.now_s)
        attempt = len(self.tried[number])
        self.events.append(f"attempt {attempt} of order {number}")
        if number == UNKNOWN:
            raise NoSuchOrder(number)
        if attempt <= FAILURES.get(number, 0):
            raise unavailable("503 Service Unavailable")
        return 19 * number

    def book(self, number: int, tax_cents: int) -> None:
        self.events.append(f"order {number} booked")
        self.booked.append((number, tax_cents))


def played(exercise: ModuleType) -> tuple[World, dict[int, int]]:
    """What happened in END_S seconds; and of each dead letter the retries before."""
    script = importlib.import_module("04_rabbitmq_messaging")
    clock = Clock()
    world, broker = World(clock), script.InMemoryBroker(clock)
    tax_handler = exercise.TaxHandler(
        lambda number: world.tax_cents(exercise.Unavailable, number), world.book
    )

    def handler(delivery: Any) -> None:
        try:
            tax_handler(delivery)
        except (exercise.Unavailable, script.Transient, script.PoisonMessage, NoSuchOrder):
            raise
        except Exception as error:
            world.errors.append(error)
            raise

    with ExitStack() as stack:
        link, contract = stack.enter_context(
            script.declared(broker, "exercise.", retry=exercise.RETRY)
        )
        for number in (BAD, ILL, DEAD, LATE, *WELL, UNKNOWN):
            payload = {"number": number, "cents": 0 if number == BAD else 1_000}
            message = script.Message("order", payload)
            script.Producer(link).publish(script.Outgoing.of(message, contract.queue))
        consumer = script.InMemoryConsumer(broker, contract, handler)

        def sleep(seconds: float) -> None:
            clock.sleep(seconds)
            if clock.now_s > END_S:
                consumer.stop()

        stack.enter_context(mock.patch.object(time, "sleep", sleep))
        consumer.run()
        retries = {}
        for letter, _reason in script.DeadLetterQueue(link, contract).peek():
            number = script.Message.decode(letter.body).payload["number"]
            retries[number] = letter.properties.headers.get(script.ATTEMPT_HEADER, 0)
        return world, dict(sorted(retries.items()))


def check(exercise: ModuleType) -> None:
    threads = threading.active_count()
    world, dead = played(exercise)
    try:
        judge(world, dead)
    except Wrong:
        if world.errors:  # the consumer makes dead letters of them, and nobody sees why
            raise world.errors[0] from None
        raise
    if threading.active_count() > threads:
        left = f"{threading.active_count() - threads} threads"
        raise Wrong("TaxHandler, after its last order", "no thread left", left)


def judge(world: World, dead: dict[int, int]) -> None:
    orders = f"orders {BAD} to {UNKNOWN}"
    service = f"the tax service fails for {ILL}, {DEAD} and {LATE}, and does not know {UNKNOWN}"
    call = f"TaxHandler, given {orders}; {service}"
    late = [event for event in world.events if event.startswith("attempt 2")]
    if late:
        before = world.events[: world.events.index(late[0])]
        waiting = [number for number in WELL if f"order {number} booked" not in before]
        if waiting:
            expected = f"orders {list(WELL)} booked before any second attempt"
            raise Wrong(call, expected, f"{waiting} still wait at {late[0]}")
    for number, expected_s in WAITS_S.items():
        tried = world.tried.get(number, [])
        waits_s = [b - a for a, b in itertools.pairwise(tried)]
        if len(waits_s) != len(expected_s) or any(
            abs(a - b) > CLOSE_S for a, b in zip(waits_s, expected_s, strict=True)
        ):
            actual = ", ".join(f"{wait_s:.1f}" for wait_s in waits_s) or "no second attempt"
            told = ", ".join(f"{wait_s:.1f}" for wait_s in expected_s)
            raise Wrong(call, f"seconds between attempts of order {number}: {told}", actual)
    booked = [(number, 19 * number) for number in (ILL, LATE, *WELL)]
    if sorted(world.booked) != booked:
        raise Wrong(call, f"booked, with their taxes: {booked}", sorted(world.booked))
    if dead != (right := {BAD: 0, DEAD: 4, UNKNOWN: 0}):
        raise Wrong(call, f"dead letters, and retries before: {right}", dead)
