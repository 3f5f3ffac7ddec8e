"""The wallet that is credited once, however often a message comes.

A set in memory is empty after a restart, which is when messages come again. The note that a
message was handled is in the database, and in the transaction of its effect: a kill leaves both
or neither. INSERT OR IGNORE asks and notes in one step, so two consumers cannot both find it new.
`redelivered` would not do: it is false for what a producer has published again, and true for what
never took effect.

Guide: docs/04-rabbitmq.md, chapter 7, The pipeline.
"""

from __future__ import annotations

import importlib
import sqlite3
from typing import Any

messaging: Any = importlib.import_module("04_rabbitmq_messaging")

CREDIT = """INSERT INTO wallets (id, cents) VALUES (?, ?)
    ON CONFLICT (id) DO UPDATE SET cents = cents + excluded.cents"""
NOTE = "INSERT OR IGNORE INTO handled (message_id) VALUES (?)"


class Wallets:
    """A handler: what it returns from is acked, what it raises from comes again."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS wallets (id TEXT PRIMARY KEY, cents INTEGER NOT NULL)"
            )
            database.execute("CREATE TABLE IF NOT EXISTS handled (message_id TEXT PRIMARY KEY)")

    def __call__(self, delivery: Any) -> None:
        message = messaging.Message.decode(delivery.body)
        deposit = message.payload
        with self._database:
            is_new = self._database.execute(NOTE, (message.message_id,)).rowcount == 1
            if is_new:
                self._database.execute(CREDIT, (deposit["wallet"], deposit["cents"]))
