"""Counts the queries of a page at two sizes, and compares it with plain Python.

Refused: lines in one query more, but their products one by one; a JOIN of one's own, whose LIMIT
counts lines, or which drops an order that has none; all orders loaded, and the page cut in Python;
all products loaded, of which a few are on the page.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from decimal import Decimal
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from checks import Wrong

ORDERS, SMALL, LARGE, MOST_QUERIES = 60, 5, 25, 6


def rows() -> Iterator[dict[str, Any]]:
    """Three lines an order, or none, and no product twice: no identity map saves a query."""
    for order in range(1, ORDERS + 1):
        products = [3 * order + n for n in (2, 0, 1)] if order % 10 else []
        yield {
            "order": order,
            "placed_on": date(2026, 1, 1) + timedelta(days=order * 7 % 30),
            "products": products,
            "quantity": order % 4 + 1,
        }


def price(product: int) -> Decimal:
    return Decimal(product * 7 % 100 + 1) / 4


def filled(exercise: ModuleType) -> sa.Engine:
    engine = sa.create_engine("sqlite://")
    exercise.Base.metadata.create_all(engine)
    with Session(engine) as session:
        for row in rows():
            order = row["order"]
            session.add(exercise.Customer(id=order, name=f"customer {order}"))
            session.add(exercise.Order(id=order, customer_id=order, placed_on=row["placed_on"]))
            for place, product in enumerate(row["products"]):
                name = f"product {product}"
                session.add(exercise.Product(id=product, name=name, price=price(product)))
                line = {"order_id": order, "product_id": product, "quantity": row["quantity"]}
                session.add(exercise.Line(id=3 * order + place, **line))
        session.commit()
    return engine


def page_by_hand(limit: int) -> list[dict[str, Any]]:
    newest = sorted(rows(), key=lambda row: (row["placed_on"], row["order"]), reverse=True)
    return [
        {
            "id": row["order"],
            "customer": f"customer {row['order']}",
            "products": [f"product {product}" for product in row["products"]],
            "total": f"{sum(map(price, row['products'])) * row['quantity']:.2f}",
        }
        for row in newest[:limit]
    ]


@contextmanager
def loads(model: type) -> Iterator[list[object]]:
    """The objects of `model` and its subclasses that are made from rows inside the block."""
    loaded: list[object] = []

    def record(target: object, _context: object) -> None:
        loaded.append(target)

    sa.event.listen(model, "load", record, propagate=True)
    try:
        yield loaded
    finally:
        sa.event.remove(model, "load", record)


def check(exercise: ModuleType) -> None:
    count_queries = importlib.import_module("01_sqlalchemy_advanced").count_queries
    engine = filled(exercise)
    counts = []
    for limit in (SMALL, LARGE):
        counting = count_queries(engine), loads(exercise.Base)
        with Session(engine) as session, counting[0] as sent, counting[1] as loaded:
            found = exercise.page(session, limit)
        counts.append(len(sent))
        call = f"page(session, {limit})"
        right = page_by_hand(limit)
        for place, (got, expected) in enumerate(zip(found, right, strict=False)):
            if got != expected:
                raise Wrong(f"{call}[{place}]", expected, got)
        if len(found) != limit:
            raise Wrong(call, f"{limit} orders", f"{len(found)} orders")
        on_it = sum(2 + 2 * len(order["products"]) for order in right)  # customers, lines, too
        if len(loaded) > on_it:
            raise Wrong(call, f"{on_it} objects loaded at most", f"{len(loaded)} objects loaded")
    call = f"page(session, {SMALL}), then page(session, {LARGE})"
    if counts[0] != counts[1] or counts[1] > MOST_QUERIES:
        same = f"the same number of queries, {MOST_QUERIES} at most"
        raise Wrong(call, same, f"{counts[0]} queries, then {counts[1]}")
