"""The index that fits its query: equality, sort, range.

A partial index is used where the query repeats its predicate. `$ne: "closed"` finds the same
orders, but only people know that. After the equality (`customer`) entries lie in the order of the
sort (`at`), so the twentieth that fits ends the walk; the range (`amount`) is last, and is
checked in the key, before a document is fetched. With the range in between they lie in order of
amount, and all that fit have to be sorted.

Guide: docs/02-mongodb.md, chapter 4, Indexes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.collection import Collection

Document = dict[str, Any]

OPEN_ORDERS = IndexModel(
    [("customer", ASCENDING), ("at", DESCENDING), ("amount", DESCENDING)],
    name="open_orders",
    partialFilterExpression={"status": "open"},
)


def ensure_indexes(orders: Collection[Document]) -> None:
    orders.create_indexes([OPEN_ORDERS])


def place(orders: Collection[Document], customer: int, cents: int, at: datetime) -> None:
    orders.insert_one({"customer": customer, "amount": cents, "at": at, "status": "open"})


def close(orders: Collection[Document], number: object) -> None:
    orders.update_one({"_id": number}, {"$set": {"status": "closed"}})


def large_open_orders(
    orders: Collection[Document], customer: int, at_least: int, limit: int = 20
) -> list[Document]:
    """Open orders of `at_least` cents or more, newest first."""
    query = {
        "customer": customer,
        "status": "open",
        "amount": {"$gte": at_least},
    }
    return list(orders.find(query).sort("at", DESCENDING).limit(limit))
