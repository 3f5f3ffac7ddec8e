"""The retry that stops all others.

The tax service answers one order in a thousand with 503, mostly for some seconds. The handler
waits and tries again, with back-off, as everybody advises. Since then each such order holds the
consumer for up to 15 s; at noon 9,000 orders were waiting, and the tax service had no trouble
with any of them. More consumers help in proportion to their number. Twice RabbitMQ closed the
connection, since no heartbeat came, and all that was prefetched came again.

Change `TaxHandler`. The consumer of script 04 runs it over a topology with a delay queue for each
step of `RETRY`, and a dead-letter queue.

Judged, by a clock that only waiting moves on: orders behind a failing one are handled before its
second attempt; its attempts come at the steps of `RETRY`, one delivery each; after the last one, it
is a dead letter, and at once where the order itself is bad, or the tax service answers anything
else; and no thread of the handler's is left running.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

messaging: Any = importlib.import_module("04_rabbitmq_messaging")

RETRY = messaging.RetryPolicy(first_s=1.0, cap_s=8.0, attempts=5)  # waits 1, 2, 4 and 8 s


class Unavailable(Exception):
    """The tax service answers 503: later it may be well."""


class TaxHandler:
    """What it returns from is acked."""

    def __init__(self, tax_cents: Callable[[int], int], book: Callable[[int, int], None]) -> None:
        self._tax_cents, self._book = tax_cents, book

    def __call__(self, delivery: Any) -> None:
        order = messaging.Message.decode(delivery.body).payload
        if order["cents"] <= 0:
            raise messaging.PoisonMessage("cents: no amount")
        self._book(order["number"], self._with_retry(order["number"]))

    def _with_retry(self, number: int) -> int:
        for wait_s in RETRY.steps_s():
            try:
                return self._tax_cents(number)
            except Unavailable:
                time.sleep(wait_s)
        return self._tax_cents(number)
