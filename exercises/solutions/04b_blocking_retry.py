"""The retry that waits in a queue, and holds nobody.

A consumer handles a message at a time; who sleeps in a handler makes all wait that are behind it,
and keeps the prefetched ones unacked. The handler says only that another attempt is worth while:
`Transient`. The consumer publishes the message to the delay queue of its step, has that
confirmed, and acks. All other errors are no reason to wait: Transient for those would retry bugs,
and bad orders.

Guide: docs/04-rabbitmq.md, chapter 4, Retry.
"""

from __future__ import annotations

import importlib
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
        try:
            tax_cents = self._tax_cents(order["number"])
        except Unavailable as error:
            raise messaging.Transient("the tax service is unavailable") from error
        self._book(order["number"], tax_cents)
