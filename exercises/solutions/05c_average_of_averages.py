"""A report whose last line is true: counted from the orders, not from the lines above it.

Sums and counts of orders add up. Averages do not, nor do distinct customers, medians, shares. So
the last line is computed of all rows: a grouping set of nothing, beside that of the segments, in
one query. `grouping(segment)` tells it from the orders whose segment is NULL, which look the same.
Chapter: docs/05-data-science.md#how-to-read-the-page, point 4: why a customer changes segments.
"""

from typing import NamedTuple

import duckdb

# orders: customer_id, segment at the time of the order, or NULL, and cents
QUERY = """
SELECT CASE WHEN grouping(segment) = 1 THEN 'all' ELSE coalesce(segment, 'none') END AS line,
    count(DISTINCT customer_id) AS customers,
    count(*) AS orders, sum(cents)::BIGINT AS sales_cents,
    round(avg(cents))::BIGINT AS average_cents
FROM orders
GROUP BY GROUPING SETS ((segment), ())
ORDER BY grouping(segment), line"""


class Line(NamedTuple):
    segment: str
    customers: int
    orders: int
    sales_cents: int
    average_cents: int  # of an order


def report(db: duckdb.DuckDBPyConnection) -> list[Line]:
    """One for each segment, in the order of their names, and one for all."""
    return [Line(*row) for row in db.execute(QUERY).fetchall()]
