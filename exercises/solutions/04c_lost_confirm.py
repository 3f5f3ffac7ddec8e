"""The relay that deletes what the broker has, and nothing else.

`basic_publish` returns when the bytes are in a buffer. On a channel with confirms it returns when
the broker has the message, or raises; `mandatory` makes it raise, too, where no queue took it.
The row is deleted after that, so a kill between the two sends one message again, with the
`message_id` it was stored with. What is raised ends this relay: to go on with the next row would
let it overtake.

Guide: docs/04-rabbitmq.md, chapters 2, Confirms, and 8, Outbox.
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
        channel.confirm_delivery()
        for row_id, body in rows:
            message = messaging.Message.decode(body)
            properties = messaging.Outgoing.of(message, QUEUE).properties
            channel.basic_publish("", QUEUE, body, properties, mandatory=True)
            with self._database:
                self._database.execute("DELETE FROM outbox WHERE id = ?", (row_id,))
        return len(rows)
