"""A report whose last line belongs to no shop.

The board's page has a line a segment and one for all. Two champions' orders average 120.00, eight
dormant ones 20.00, and the last line says 70.00. Accounting divides 400.00 by 10 orders, gets
40.00, and no longer believes the page. Next month somebody notes that the last line has more
customers than the shop: who was dormant in spring and at risk in summer is in two segments.

Change `report` so that the last line is true of all orders together, and the lines above stay.

Judged: each column of each line against a count by hand, averages to the nearest cent. The last
line is "all". Orders without a segment are a line of their own, "none", and belong to all.
"""

from statistics import mean
from typing import NamedTuple

import duckdb

# orders: customer_id, segment at the time of the order, or NULL, and cents
QUERY = """
SELECT coalesce(segment, 'none') AS line, count(DISTINCT customer_id) AS customers,
    count(*) AS orders, sum(cents)::BIGINT AS sales_cents,
    round(avg(cents))::BIGINT AS average_cents
FROM orders
GROUP BY line
ORDER BY line"""


class Line(NamedTuple):
    segment: str
    customers: int
    orders: int
    sales_cents: int
    average_cents: int  # of an order


def report(db: duckdb.DuckDBPyConnection) -> list[Line]:
    """One for each segment, in the order of their names, and one for all."""
    lines = [Line(*row) for row in db.execute(QUERY).fetchall()]
    everybody = Line(
        "all",
        customers=sum(line.customers for line in lines),
        orders=sum(line.orders for line in lines),
        sales_cents=sum(line.sales_cents for line in lines),
        average_cents=round(mean(line.average_cents for line in lines)),
    )
    return [*lines, everybody]
