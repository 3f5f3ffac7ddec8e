"""Each row against a count by hand: a feature that knows the future differs somewhere."""

import random
from datetime import date, timedelta
from types import ModuleType
from typing import Any, NamedTuple

import duckdb

from checks import Wrong

OPENED, TODAY = date(2024, 1, 1), date(2024, 12, 31)
PAST = date(2024, 6, 30), date(2024, 9, 1)  # cutoffs whose horizon is over
HORIZON_DAYS, CUSTOMERS, SEED = 60, 60, 5  # not the default of the horizon

Order = tuple[str, date, int, date | None]  # customer, day, cents, refunded on


class Row(NamedTuple):
    customer_id: str
    orders: int
    spent_cents: int
    silent_days: int
    left: bool


def random_orders() -> list[Order]:
    """Each customer comes some day, and orders now and then until he leaves."""
    rng, orders = random.Random(SEED), list[Order]()
    for number in range(CUSTOMERS):
        day = OPENED + timedelta(days=rng.randrange(300))
        end = day + timedelta(days=rng.randrange(1, 300))
        while day <= min(end, TODAY):
            refund = day + timedelta(days=rng.randrange(1, 60))
            known = rng.random() < 0.3 and refund <= TODAY
            orders.append(
                (f"c{number:02}", day, rng.randrange(500, 20_000), refund if known else None)
            )
            day += timedelta(days=rng.randrange(5, 200))  # some come back after the horizon
    return orders


def orders_at(cutoff: date) -> list[Order]:
    """On the last day of each span and the first after it, and refunded on either."""
    early, until = OPENED, cutoff + timedelta(days=HORIZON_DAYS)
    next_day, too_late = cutoff + timedelta(days=1), until + timedelta(days=1)
    return [
        order
        for day in (cutoff, next_day, until, too_late)
        for order in (
            (f"ordered {day}", early, 1_000, None),
            (f"ordered {day}", day, 2_000, None),
            (f"refunded {day}", early, 1_000, day),
        )
    ]


def by_hand(orders: list[Order], cutoff: date) -> dict[str, Row]:
    until, rows = cutoff + timedelta(days=HORIZON_DAYS), {}
    for name in sorted({name for name, day, *_ in orders if day <= cutoff}):
        his = [order for order in orders if order[0] == name]
        known = [order for order in his if order[1] <= cutoff]
        kept = [cents for *_, cents, refund in known if refund is None or refund > cutoff]
        silent = (cutoff - max(day for _, day, *_ in known)).days
        left = not any(cutoff < day <= until for _, day, *_ in his)
        rows[name] = Row(name, len(known), sum(kept), silent, left)
    return rows


def check(exercise: ModuleType) -> None:
    # Refuses `day <= cutoff` alone: refunds after the cutoff are still known.
    orders = random_orders() + [order for cutoff in PAST for order in orders_at(cutoff)]
    with duckdb.connect() as db:
        db.execute(
            "CREATE TABLE orders (customer_id TEXT, day DATE, cents BIGINT, refunded_on DATE)"
        )
        db.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", orders)
        for cutoff in (*PAST, TODAY):
            call = f"training_rows(db, {cutoff!r}, {HORIZON_DAYS})"
            rows = list(exercise.training_rows(db, cutoff, HORIZON_DAYS))
            compare(call, by_hand(orders, cutoff), rows)


def compare(call: str, expected: dict[str, Row], rows: list[Any]) -> None:
    actual = {row[0]: row for row in rows}
    for name in sorted(expected.keys() | actual.keys()):
        right, found = expected.get(name, "no row"), actual.get(name, "no row")
        if right != found:
            raise Wrong(f"{call}, the row of {name}", right, found)
    if [row[0] for row in rows] != list(expected):
        raise Wrong(call, "one row a customer, by customer_id", [row[0] for row in rows])
