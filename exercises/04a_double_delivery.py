"""The wallet that is credited twice when a consumer is restarted.

Deposits come as messages; RabbitMQ delivers at least once, so the consumer remembers the ids that
it has seen. In the tests no deposit counts twice. In production one did in each of the last three
deployments, and once when a producer, whose confirm was lost, published its message again, and
the second came to another consumer. Customers do not complain about that; the auditors do.

Change `Wallets`. It may keep in the database what it likes. A deposit has its own `message_id`,
and keeps it when it is published again.

Judged: the consumer is killed before and after each call of the database, and before its ack, and
a new one goes on; a second consumer may handle the same message at any step, and a call of the
database may fail. Then each deposit counts once: none twice, and none is missing. Two deposits of
the same amount to the same wallet are two.
"""

from __future__ import annotations

import importlib
import sqlite3
from typing import Any

messaging: Any = importlib.import_module("04_rabbitmq_messaging")

CREDIT = """INSERT INTO wallets (id, cents) VALUES (?, ?)
    ON CONFLICT (id) DO UPDATE SET cents = cents + excluded.cents"""


class Wallets:
    """A handler: what it returns from is acked, what it raises from comes again."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._seen: set[str] = set()
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS wallets (id TEXT PRIMARY KEY, cents INTEGER NOT NULL)"
            )

    def __call__(self, delivery: Any) -> None:
        message = messaging.Message.decode(delivery.body)
        if message.message_id in self._seen:
            return
        deposit = message.payload
        with self._database:
            self._database.execute(CREDIT, (deposit["wallet"], deposit["cents"]))
        self._seen.add(message.message_id)
