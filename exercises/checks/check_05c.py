"""Each column of each line against a count by hand, the averages first."""

import random
from types import ModuleType
from typing import Any

import duckdb

from checks import Wrong

KINDS = {  # orders, cents of one at most
    "at risk": (40, 9_000), "champions": (15, 20_000), "dormant": (160, 3_000),
    None: (60, 6_000),  # without a segment
}  # fmt: skip
CUSTOMERS, SEED = 50, 8

Order = tuple[str, str | None, int]  # customer, segment, cents


def random_orders() -> list[Order]:
    """Many a customer is in several segments, one after the other."""
    rng = random.Random(SEED)
    return [
        (f"c{rng.randrange(CUSTOMERS):02}", segment, rng.randrange(1, most))
        for segment, (orders, most) in KINDS.items()
        for _ in range(orders)
    ]


def check(exercise: ModuleType) -> None:
    # Refuses a weighted mean of the averages beside the segments' customers added up, one of the
    # rounded averages (a cent off with this SEED), and a line of a ROLLUP that is told by its NULL:
    # orders without a segment have one, too.
    orders = random_orders()
    with duckdb.connect() as db:
        db.execute("CREATE TABLE orders (customer_id TEXT, segment TEXT, cents BIGINT)")
        db.executemany("INSERT INTO orders VALUES (?, ?, ?)", orders)
        lines = list(exercise.report(db))
    expected = [*sorted(segment or "none" for segment in KINDS), "all"]
    if (names := [line.segment for line in lines]) != expected:
        raise Wrong("[line.segment for line in report(db)]", expected, names)
    for line in reversed(lines):
        his = [order for order in orders if line.segment in ("all", order[1] or "none")]
        one(line, his)


def one(line: Any, orders: list[Order]) -> None:
    call, sales = f"report(db), the line {line.segment!r}", sum(cents for *_, cents in orders)
    off = abs(line.average_cents * len(orders) - sales)
    if off * 2 > len(orders) or line.average_cents != int(line.average_cents):
        raise Wrong(f"{call}: average_cents", round(sales / len(orders)), line.average_cents)
    columns = {
        "customers": len({name for name, *_ in orders}),
        "orders": len(orders),
        "sales_cents": sales,
    }
    for column, expected in columns.items():
        if (actual := getattr(line, column)) != expected:
            raise Wrong(f"{call}: {column}", expected, actual)
