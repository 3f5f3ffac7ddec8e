"""A churn model that knows the future.

In the notebook the model is nearly always right, on customers that it has never seen. In production
it is hardly better than a coin. Nobody changed the model in between. What changed is the table: the
notebook built it today, of a day in spring; production builds it today, of today.

Change `training_rows` so that its features hold only what was known at the end of the day `cutoff`.
`left` is the label, the future that the model is to learn: no order in the `horizon_days` after it.
At a cutoff of today nobody can know it yet: it is True for all, and production does not read it.

A customer is known by his first order. An order counts whatever becomes of it. `spent_cents` is the
sum of his orders, less those that were refunded. `silent_days` goes from the last order to the
cutoff.

Judged: row by row against a count by hand of random orders, for several cutoffs, one of them today.
"""

from datetime import date, timedelta
from typing import NamedTuple

import duckdb

# orders: customer_id, day, cents, and refunded_on, a later day or NULL
QUERY = """
SELECT customer_id, count(*) AS orders,
    coalesce(sum(cents) FILTER (WHERE refunded_on IS NULL), 0)::BIGINT AS spent_cents,
    (SELECT max(day) FROM orders) - max(day) AS silent_days,
    customer_id NOT IN (
        SELECT customer_id FROM orders WHERE day > $cutoff AND day <= $until
    ) AS has_left
FROM orders
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
