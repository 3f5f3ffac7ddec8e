"""The invoices that were sent and never came.

An order and the message about it are written by one transaction: an outbox. A relay publishes
what is in it, every second. Yet of 40,000 orders of a month 31 had no invoice. Their rows are
gone from the outbox, no call has failed, and no queue has them. On the 3rd the broker was
restarted; on the 9th the queue was at its limit for a minute; on the 17th a new one was declared
two minutes late.

Change `Shop.relay`. Its connection is one of pika's, a BlockingConnection.

Judged: whatever the broker refuses, does not route, or loses before it has confirmed it, comes with
a later relay; so does what a relay killed at any of its calls left behind. Messages keep their
order and their `message_id`, also where one comes twice; at a kill one may, no more. A number that
`relay` gives is right; it may raise instead.
"""

from __future__ import annotations

import importlib
import sqlite3
from typing import Any

messaging: Any = importlib.import_module("04_rabbitmq_messaging")

QUEUE = "invoices"
TABLES = (
    "CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY, cents INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL)",
)


class Shop:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        with database:
            for table in TABLES:
                database.execute(table)

    def place(self, number: int, cents: int) -> None:
        message = messaging.Message("order", {"number": number, "cents": cents})
        with self._database:
            self._database.execute("INSERT INTO orders VALUES (?, ?)", (number, cents))
            self._database.execute("INSERT INTO outbox (body) VALUES (?)", (message.encode(),))

    def relay(self, connection: Any) -> int:
        """Publishes what is in the outbox, oldest first. Gives how many were confirmed."""
        rows = self._database.execute("SELECT id, body FROM outbox ORDER BY id").fetchall()
        channel = connection.channel()
        for row_id, body in rows:
            message = messaging.Message.decode(body)
            properties = messaging.Outgoing.of(message, QUEUE).properties
            channel.basic_publish("", QUEUE, body, properties)
            with self._database:
                self._database.execute("DELETE FROM outbox WHERE id = ?", (row_id,))
        return len(rows)
