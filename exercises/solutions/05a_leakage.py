"""A churn model that knew the future: a cutoff in each feature.

Four leaks. Orders after the cutoff were counted: who has some did not leave. Silence was counted to
the end of the data, and who came after the cutoff had a row. The fourth hides in a column that is
written later: an order of before the cutoff that was refunded after it. At the cutoff nobody knew.
Ask of each column when its value was known, not of which day the row is.
Chapter: docs/05-data-science.md#4-churn.
"""

from datetime import date, timedelta
from typing import NamedTuple

import duckdb

# orders: customer_id, day, cents, and refunded_on, a later day or NULL
QUERY = """
SELECT customer_id, count(*) AS orders,
    coalesce(sum(cents) FILTER (
        WHERE refunded_on IS NULL OR refunded_on > $cutoff
    ), 0)::BIGINT AS spent_cents,
    $cutoff - max(day) AS silent_days,
    customer_id NOT IN (
        SELECT customer_id FROM orders WHERE day > $cutoff AND day <= $until
    ) AS has_left
FROM orders
WHERE day <= $cutoff
GROUP BY customer_id
ORDER BY customer_id"""


class Row(NamedTuple):
    customer_id: str
    orders: int
    spent_cents: int
    silent_days: int
    left: bool


def training_rows(db: duckdb.DuckDBPyConnection, cutoff: date, horizon_days: int = 90) -> list[Row]:
    """One for each customer, by customer_id."""
    days = {"cutoff": cutoff, "until": cutoff + timedelta(days=horizon_days)}
    return [Row(*row) for row in db.execute(QUERY, days).fetchall()]
