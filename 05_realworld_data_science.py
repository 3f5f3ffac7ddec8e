"""From transactions to decisions in money: who buys again, who is leaving, who gets an offer.

You will learn to
  - read files as they are, and compute the same features by one SQL text on three engines
  - fit BG/NBD and Gamma-Gamma, and know how far to trust them
  - score churn by a strict split in time, and give offers where they pay
  - recommend, keep profiles live, and write a page on which somebody decides

Run:
  python 05_realworld_data_science.py                    # generated customers, and CDNOW's
  python 05_realworld_data_science.py --transactions orders.csv --report out.html
  python servers.py run -- python 05_realworld_data_science.py

DuckDB analyses, in this process. Where they are configured, PostgreSQL and MongoDB compute the
same features, Redis keeps profiles, RabbitMQ carries events; no figure depends on them.

Glossary:
  frequency, x       days with a purchase, after the first; monetary value: their mean amount
  recency, t_x       time from the first purchase to the last; T: to the cutoff
  P(alive)           that a customer has not left for good, under BG/NBD
  residual value     margin expected within the horizon (the weeks ahead), discounted

Guide: docs/05-data-science.md
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import re
import secrets
import shutil
import sqlite3
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import duckdb
import matplotlib
import numpy as np
import numpy.typing as npt
import pika
import pymongo
import redis
from jinja2 import Environment
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPConnectionError, AMQPError
from pymongo.errors import PyMongoError
from redis.backoff import NoBackoff
from redis.retry import Retry
from scipy import optimize, sparse
from scipy.special import expit, gammaln, hyp2f1, psi
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError
from threadpoolctl import threadpool_limits

import config
from config import ConfigError, ServiceUnavailable, conclude, fact, note, table

logger = logging.getLogger(__name__)

Db = duckdb.DuckDBPyConnection
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.object_]
Rng = np.random.Generator

EPOCH = date(1970, 1, 1)  # day 0
FIELDS = ("customer_id", "date", "amount", "item")
SAMPLE, FAULTY_SHOWN = 1_000, 5  # lines
FAULTY_SHARE = 0.1  # of lines: with more, the file is misread
DATE_FORMATS = ["", "%Y%m%d", "%Y-%m-%d %H:%M:%S %z"] + [
    form.format(mark) + hours
    for form in ("%d{0}%m{0}%Y", "%m{0}%d{0}%Y", "%d{0}%m{0}%y", "%m{0}%d{0}%y")
    for mark in "/.-"
    for hours in ("", " %H:%M", " %H:%M:%S", " %I:%M %p")
]
BOUGHT = "SUM(cents) > 0 OR MIN(cents) >= 0"  # on a day: unless refunds took all of it
MONGO_BATCH = 20_000  # documents
BOUND = 6.0  # of a parameter's logarithm, from its start
STEP = 1e-4  # for second derivatives
TINY = 1e-12
FEW_REPEATS = 100  # customers: below, the errors are uncertain
RELATED = 0.3  # correlation of frequency and amount
DISCOUNT, STEP_WEEKS = 0.10, 4.0  # a year; how finely
DRAWN = 4_000_000
VALUABLE, ACTIVE = 0.25, 0.5
SEGMENTS = ("champions", "growing", "at risk but valuable", "dormant")
CHAMPIONS, GROWING, AT_RISK, DORMANT = SEGMENTS
SIGNALS = ("days silent", "age", "spent", "expected purchases")
OPENED, SHOP_WEEKS = date(2023, 1, 2), 156
HORIZON, MARGIN, COST = 13, 0.3, 2.0  # weeks; of sales; of an offer, money
FORGOTTEN_DAYS = 240  # of silence, by which an offer wins half as many
SEASON, CHRISTMAS = 0.3, 350  # amplitude; day of the year
GOODS = ["tea", "coffee", "cocoa", "cups", "pots", "sweets", "spices"]
NEIGHBOURS, SHRINKAGE, TOP = 50, 10.0, 10  # items; customers; recommendations
PROFILE_TTL_S = 300
REDIS_PAUSE_S = 30
QUORUM = {"x-queue-type": "quorum"}
LOST = (AMQPError, AMQPConnectorException, OSError)
NOWHERE = pika.ConnectionParameters("127.0.0.1", 1)
TENTHS, ID_SHOWN = range(1, 11), 24  # of customers; characters
INK = "#010203"  # becomes the page's
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
CUSTOMERS, SEED = 20_000, 5
LIVE = 200  # profiles


def quoted(text: object) -> str:
    return "'" + str(text).replace("'", "''") + "'"


def connected() -> Db:
    """DuckDB in memory, whose days are those of UTC."""
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    return db


def only_row(db: Db, query: str) -> dict[str, Any]:
    rows = db.execute(query)
    return dict(zip([column[0] for column in rows.description], rows.fetchall()[0], strict=True))


# ── 1. Input: files as they are ──


class Quality(NamedTuple):
    """What a file held, and what of it was not used."""

    reading: str  # how it was understood
    counts: dict[str, float]
    faulty: list[tuple[int, str, str]]  # line, reason, text: the first that could not be read


def as_csv(db: Db, path: str, home: Path) -> tuple[Path, str]:
    """`path`, or a copy in UTF-8 of stdin, Parquet, or what is packed or encoded."""
    source, plain = Path(path), home / "plain.csv"
    if path == "-":
        source = home / "stdin"
        with source.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
    with source.open("rb") as raw:
        start = raw.read(4)
    if start == b"PAR1":
        db.execute(f"COPY (FROM read_parquet({quoted(source)})) TO {quoted(plain)}")
        return plain, "Parquet"
    if start[:2] == b"\x1f\x8b":
        with gzip.open(source) as packed, plain.open("wb") as copy:
            shutil.copyfileobj(packed, copy)
        source = plain
    try:
        with source.open(encoding="utf-8") as text:
            while text.read(1 << 20):
                pass
        return source, "UTF-8"
    except UnicodeDecodeError:
        plain.write_text(source.read_text("cp1252", "replace"), "utf-8")
        return plain, "Windows-1252"  # Latin-1 and €


def chosen_columns(columns: Mapping[str, str], headings: Sequence[str]) -> dict[str, list[str]]:
    """Field → names c0, c1, … of its columns; amount=Quantity*UnitPrice has two."""
    names = [heading.strip().lower() for heading in headings]
    wanted = {name: name for name in FIELDS if name in names or name != "item"}
    if "date" not in names:
        wanted["date"] = "timestamp"
    chosen = {}
    for field, heading in {**wanted, **columns}.items():
        parts = [part.strip().lower() for part in heading.split("*")]
        if field not in FIELDS or any(names.count(part) != 1 for part in parts):
            raise ConfigError(
                f"{field}={heading} is no column of {', '.join(headings) or 'nothing'}. "
                "Say --columns customer_id=HEADING,date=HEADING,…"
            )
        chosen[field] = [f"c{names.index(part)}" for part in parts]
    return chosen


def date_format_of(db: Db, dates: str) -> str:
    """The strptime format of the texts `d` of the query `dates`; "" for ISO 8601.

    Raises ConfigError where none fits, or day-first and month-first fit equally well."""

    def best_of(forms: Iterable[str], rows: str) -> list[str]:
        iso = "try_cast(d AS TIMESTAMPTZ)"
        readings = [f"try_strptime(d, {quoted(form)})" if form else iso for form in forms]
        counts = (f"count(*) FILTER (year({r}) BETWEEN 1900 AND 2200)" for r in readings)
        found = db.execute(f"SELECT {', '.join(counts)} FROM ({rows})").fetchall()[0]
        return [form for form, n in zip(forms, found, strict=True) if n == max(1, *found)]

    best = best_of(DATE_FORMATS, f"{dates} LIMIT 100")
    if len(best) > 1 and best[0]:  # the sample leaves it open
        best = best_of(best, dates)
    if best and (not best[0] or len(best) == 1):
        return best[0]
    example = db.execute(dates).fetchone() or ("",)
    fitting = f"fits {' and '.join(best)}" if best else "is none that we know"
    raise ConfigError(f"the date {example[0]!r} {fitting}: say --date-format FORMAT")


def csv_reading(db: Db, path: Path, columns: Mapping[str, str], form: str) -> tuple[Any, ...]:
    """How to read `path`: headings, fields, a table function, and all that in words."""
    with path.open(encoding="utf-8-sig", newline="") as text:
        first = text.readline(1 << 16)
    separator = max(",;\t|", key=first.count)
    headings = next(csv.reader([first], delimiter=separator), [])
    fields = chosen_columns(columns, headings)
    (when,), amounts = fields["date"], fields["amount"]
    types = {f"c{n}": "VARCHAR" for n in range(len(headings))}
    read = f"read_csv({quoted(path)}, auto_detect=false, header=true, quote='\"', "
    read += f"delim='{separator}', columns="
    texts = f"{read}{types}, ignore_errors=true)"
    form = form or date_format_of(db, f"SELECT {when} AS d FROM {texts} WHERE {when} <> ''")
    sample = str(db.execute(f"SELECT {amounts[-1]} FROM {texts} LIMIT {SAMPLE}").fetchall())
    commas, points = (len(re.findall(rf"\d{sign}\d\d?\b", sample)) for sign in (",", r"\."))
    mark = "," if commas > points or (separator == ";" and not points) else "."
    types |= {when: "TIMESTAMP" if form else "TIMESTAMPTZ"}  # only ISO dates bring their offset
    types |= dict.fromkeys(amounts, "DECIMAL(18, 4)")
    read += f"{types}, store_rejects=true, nullstr='\\0'"
    read += f", decimal_separator='{mark}'" + f", timestampformat={quoted(form)}" * bool(form)
    words = f"separator {separator!r}, decimal {mark!r}, dates {form or 'ISO 8601'}"
    return headings, fields, f"{read})", words


def read_transactions(
    db: Db, path: str, home: Path, columns: Mapping[str, str] = {}, form: str = ""
) -> Quality:
    """Make the view `transactions` (customer_id, day, cents, item) of `db` from a file.

    A day counts from 1970-01-01, in UTC. Raises ConfigError for a file that cannot be read."""
    try:
        plain, encoding = as_csv(db, path, home)
        headings, fields, source, words = csv_reading(db, plain, columns, form)
        name, when, item = (fields.get(key, ["''"])[0] for key in ("customer_id", "date", "item"))
        db.execute(
            f"""CREATE TABLE loaded AS SELECT trim({name}) AS customer_id,
            floor(epoch({when}) / 86400)::BIGINT AS day, {item} AS item,
            CAST(round({" * ".join(fields["amount"])} * 100) AS BIGINT) AS cents FROM {source}"""
        )
        rejects = db.execute(
            """SELECT line, first(column_name), first(error_message), first(csv_line)
            FROM reject_errors GROUP BY line ORDER BY line"""
        ).fetchall()
    except (OSError, EOFError, zlib.error, duckdb.Error) as error:
        raise ConfigError(f"--transactions {path}: {str(error).splitlines()[0]}") from error
    faulty = []
    for line, column, reason, text in rejects:
        if reason.startswith("Error when converting"):
            value = re.search(r'string "(.*)" to', reason, re.DOTALL)
            reason = f"{headings[int(column[1:])]} is {value[1] if value else ''!r}"
        faulty.append((line, reason, text.strip()[:40]))
    lost = sum(1 + text.strip().count("\n") for *_, text in rejects)
    quality = Quality(f"{encoding}, {words}", counts_of(db, lost), faulty[:FAULTY_SHOWN])
    is_open = any(len(text) >= 10_000 for *_, text in rejects)  # an open quote
    if is_open or lost > FAULTY_SHARE * quality.counts["lines"]:
        line, reason, text = faulty[0]
        raise ConfigError(
            f"--transactions {path}: {lost:,} of {quality.counts['lines']:,} lines were not "
            f"read; line {line}: {reason}, in {text}"
        )
    return quality


def counts_of(db: Db, faulty: int) -> dict[str, float]:
    """Of the table `loaded`; makes the view `transactions` of what of it can be used."""
    today = (datetime.now(UTC).date() - EPOCH).days
    usable = f"customer_id <> '' AND day <= {today}"
    db.execute(f"CREATE VIEW transactions AS FROM loaded WHERE {usable}")
    return only_row(
        db,
        f"""WITH taken AS (SELECT sum(cents) AS net FROM transactions
        GROUP BY customer_id, day HAVING NOT ({BOUGHT}))
        SELECT count(*) + {faulty} AS lines, {faulty} AS faulty,
        count(*) FILTER (customer_id = '') AS "without customer",
        count(*) FILTER (day > {today}) AS "in the future",
        count(*) FILTER (cents = 0) AS "of amount 0", count(*) FILTER (cents < 0) AS refunds,
        coalesce(sum(cents) FILTER (cents < 0), 0) / 100 AS refunded,
        (SELECT count(*) FROM taken) AS "days that refunds took",
        (SELECT coalesce(sum(net), 0) / 100 FROM taken) AS "refunded beyond them" FROM loaded""",
    )


# ── 2. RFM: one SQL text for three engines, a pipeline for the fourth ──


def rfm_sql(cutoff: int, source: str = "transactions") -> str:
    """For DuckDB, PostgreSQL and Spark. The first day and its amount are carried in one integer: a
    MIN costs less than a window or a join."""
    return f"""
WITH days AS (
  SELECT customer_id, day, SUM(cents)::BIGINT AS cents FROM {source}
  WHERE day <= {cutoff} GROUP BY customer_id, day HAVING {BOUGHT}
)
SELECT customer_id, COUNT(*) - 1 AS frequency, MAX(day) - MIN(day) AS recency,
  {cutoff} - MIN(day) AS age, SUM(cents)::BIGINT AS cents,
  MIN(day * 1099511627776 + cents) - MIN(day) * 1099511627776 AS first_cents
FROM days GROUP BY customer_id
"""


class Rfm(NamedTuple):
    """A row a customer, in the order of the ids; lengths in days, money in cents."""

    ids: Texts
    x: Ints  # repeat days
    t_x: Ints  # first to last purchase
    T: Ints  # first purchase to the cutoff
    cents: Ints  # of all days
    first_cents: Ints  # of the first day

    @classmethod
    def of(cls, rows: Iterable[Any]) -> Rfm:
        columns = list(zip(*sorted(rows), strict=True)) or [()] * len(cls._fields)
        numbers = (np.array(column, np.int64) for column in columns[1:])
        return cls(np.array(columns[0], object), *numbers)

    def mean_money(self) -> Floats:
        """Mean amount of the repeat days; 0 where there is none."""
        return (self.cents - self.first_cents) / 100 / np.maximum(self.x, 1)


def rfm(db: Db, cutoff: int, source: str = "transactions") -> Rfm:
    """The features of the customers in `source` by the end of day `cutoff`."""
    columns = db.execute(f"{rfm_sql(cutoff, source)} ORDER BY customer_id").fetchnumpy()
    ids, *numbers = columns.values()
    return Rfm(np.asarray(ids, object), *(np.asarray(column, np.int64) for column in numbers))


def rfm_postgresql(engine: Engine, transactions: Path, cutoff: int) -> Rfm:
    """From a CSV of customer_id, day, cents, in a temporary table."""
    with engine.connect() as connection, transactions.open("rb") as text:
        columns = "customer_id text, day bigint, cents bigint"
        connection.exec_driver_sql(f"CREATE TEMPORARY TABLE transactions ({columns})")
        with closing(connection.connection.cursor()) as cursor:
            cursor.copy_expert("COPY transactions FROM STDIN (FORMAT csv)", text)
        return Rfm.of(map(tuple, connection.exec_driver_sql(rfm_sql(cutoff))))


def rfm_mongodb(database: Any, transactions: Path, cutoff: int) -> Rfm:
    """Through a collection, filled anew; days are sorted before $first sees them."""
    collection = database["transactions"]
    collection.drop()
    with transactions.open(encoding="utf-8") as text:
        lines = csv.reader(text)
        while batch := list(itertools.islice(lines, MONGO_BATCH)):
            collection.insert_many(
                {"customer_id": name, "day": int(day), "cents": int(cents)}
                for name, day, cents in batch
            )
    day = {"c": "$customer_id", "d": "$day"}
    pipeline = [
        {"$match": {"day": {"$lte": cutoff}}},
        {"$group": {"_id": day, "cents": {"$sum": "$cents"}, "least": {"$min": "$cents"}}},
        {"$match": {"$or": [{"cents": {"$gt": 0}}, {"least": {"$gte": 0}}]}},
        {"$sort": {"_id.c": 1, "_id.d": 1}},
        {
            "$group": {
                "_id": "$_id.c", "days": {"$sum": 1}, "from": {"$first": "$_id.d"},
                "to": {"$last": "$_id.d"}, "sum": {"$sum": "$cents"},
                "first": {"$first": "$cents"},
            }
        },
    ]  # fmt: skip
    found = collection.aggregate(pipeline, allowDiskUse=True)
    return Rfm.of(
        (f["_id"], f["days"] - 1, f["to"] - f["from"], cutoff - f["from"], f["sum"], f["first"])
        for f in found
    )


# ── 3. BG/NBD: how often customers buy again, and whether they still do ──


class Estimate(NamedTuple):
    """A maximum of a log-likelihood over positive parameters."""

    parameters: Floats
    log_likelihood: float
    covariance: Floats  # of the parameters' logarithms

    def errors(self) -> Floats:
        """Standard errors of the parameters' logarithms."""
        return np.sqrt(np.diag(self.covariance))


Likelihood = Callable[[Floats], tuple[float, Floats]]  # parameters → value, gradient


def maximum(likelihood: Likelihood, start: Sequence[float], rows: float) -> Estimate:
    """L-BFGS on the logarithms; covariance by differences of the gradient. Raises ValueError."""

    def loss(logs: Floats) -> tuple[float, Floats]:
        value, gradient = likelihood(np.exp(logs))
        return -value / rows, -gradient * np.exp(logs) / rows

    centre, options = np.log(start), {"ftol": 1e-12, "gtol": 1e-6, "maxiter": 500}
    bounds: Any = centre[:, None] + [-BOUND, BOUND]
    found = optimize.minimize(
        loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    steps = STEP * np.eye(len(start))
    hessian = np.array([loss(found.x + step)[1] - loss(found.x - step)[1] for step in steps])
    hessian = (hessian + hessian.T) * rows / (4 * STEP)
    # One that nothing tells (nobody leaves), or at its bound, is taken as known.
    free = (np.abs(found.x - centre) < BOUND - STEP) & (np.diag(hessian) > BOUND**-2)
    among, covariance = np.ix_(free, free), np.zeros_like(hessian)
    covariance[among] = np.linalg.inv(hessian[among])
    if np.any(np.diag(covariance) < 0):
        raise ValueError("the data tell no maximum")
    return Estimate(np.exp(found.x), -float(found.fun) * rows, covariance)


def bg_nbd_likelihood(x: Floats, t_x: Floats, T: Floats, n: Floats) -> Likelihood:
    """Log-likelihood of `n` customers at each (x, t_x, T), with its gradient.

    Source: Fader, Hardie, Lee, "Counting Your Customers" the Easy Way, Marketing Science 2005."""
    counts = np.bincount(x.astype(np.int64), weights=n)
    xs = np.flatnonzero(counts)
    c, total, once = counts[xs], n.sum(), x == 0
    T_0, n_0 = T[once], n[once]
    x, t_x, T, n = x[~once], t_x[~once], T[~once], n[~once]

    def value_and_gradient(parameters: Floats) -> tuple[float, Floats]:
        r, alpha, a, b = parameters
        log_alpha, log_0 = np.log(alpha), np.log(alpha + T_0)
        log_T, log_t = np.log(alpha + T), np.log(alpha + t_x)
        alive, left = -(r + x) * log_T, np.log(a / (b + x - 1)) - (r + x) * log_t
        both = np.logaddexp(alive, left)
        n_left = n * np.exp(left - both)
        n_alive = n - n_left
        value = (
            c @ (gammaln(r + xs) - gammaln(r) + r * log_alpha)
            + c @ (gammaln(a + b) + gammaln(b + xs) - gammaln(b) - gammaln(a + b + xs))
            - r * (n_0 @ log_0)
            + n @ both
        )
        d_ab = psi(a + b) - psi(a + b + xs)
        gradient = [
            c @ (psi(r + xs) - psi(r) + log_alpha) - n_0 @ log_0 - n_alive @ log_T - n_left @ log_t,
            r * (total / alpha - n_0 @ (1 / (alpha + T_0)))
            - n_alive @ ((r + x) / (alpha + T))
            - n_left @ ((r + x) / (alpha + t_x)),
            c @ d_ab + n_left.sum() / a,
            c @ (d_ab + psi(b + xs) - psi(b)) - n_left @ (1 / (b + x - 1)),
        ]
        return float(value), np.array(gradient)

    return value_and_gradient


class BgNbd(NamedTuple):
    """Purchases at a rate from Gamma(r, alpha) a week; after each, leaving with a probability from
    Beta(a, b). Times in weeks."""

    r: float
    alpha: float
    a: float
    b: float

    def p_alive(self, x: Floats, t_x: Floats, T: Floats) -> Floats:
        r, alpha, a, b = self
        odds = (r + x) * np.log((alpha + T) / (alpha + t_x))
        odds += np.log(a / np.maximum(b + x - 1, TINY))
        return np.where(x > 0, expit(-odds), 1.0)  # one leaves after a repeat purchase only

    def if_alive(self, x: Floats, T: Floats, weeks: float) -> Floats:
        """Purchases within `weeks` after T of who is alive at T.

        2F1 by Euler's transformation: its parameters stay small for any x."""
        r, alpha, a, b = self
        a, b = min(a, 99.0), b / max(1.0, a / 99)  # else even this overflows
        a += 1e-9 * (a == 1)  # the limit
        distinct, at = np.unique(x + 1j * T, return_inverse=True)  # far fewer pairs than customers
        x, z = distinct.real, weeks / (alpha + distinct.imag + weeks)
        series = hyp2f1(a + b - 1 - r, a - 1, a + b + x - 1, z)
        return np.asarray((a + b + x - 1) / (a - 1) * (1 - (1 - z) ** (a - 1) * series))[at]

    def expected(self, x: Floats, t_x: Floats, T: Floats, weeks: float) -> Floats:
        """Purchases within `weeks` after T. Source: equation 10 of the paper."""
        return self.p_alive(x, t_x, T) * self.if_alive(x, T, weeks)

    def draw_future(self, x: Floats, t_x: Floats, T: Floats, weeks: float, rng: Rng) -> Any:
        """Purchases within `weeks` after T, drawn given what is known of each customer."""
        alive = rng.random(len(x)) < self.p_alive(x, t_x, T)
        rate, p = rng.gamma(self.r + x, 1 / (self.alpha + T)), rng.beta(self.a, self.b + x)
        return alive * np.minimum(rng.poisson(rate * weeks), rng.geometric(np.maximum(p, TINY)))


def grouped(x: Ints, t_x: Ints, T: Ints) -> tuple[Floats, Floats, Floats, Floats]:
    """Distinct (x, t_x, T) in weeks, and how many customers are at each."""
    span = int(max(T.max(initial=0), x.max(initial=0))) + 1
    keys, n = np.unique((x * span + t_x) * span + T, return_counts=True)
    x_t, T = np.divmod(keys, span)
    x, t_x = np.divmod(x_t, span)
    return x.astype(float), t_x / 7, T / 7, n.astype(float)


def fit_bg_nbd(x: Floats, t_x: Floats, T: Floats, n: Floats) -> Estimate:
    """Of grouped rows. Raises ValueError."""
    if not np.any(x > 0):
        raise ValueError("nobody bought on a second day")
    likelihood = bg_nbd_likelihood(x, t_x, T, n)
    return maximum(likelihood, (1.0, np.average(T, weights=n) / 10, 1.0, 3.0), n.sum())


# ── 4. Gamma-Gamma, and the value of a customer ──


def gamma_gamma_likelihood(x: Floats, mean: Floats) -> Likelihood:
    """Log-likelihood of the `mean` amounts of `x` > 0 purchases each, with its gradient.

    Source: Fader, Hardie, The Gamma-Gamma Model of Monetary Value, 2013, equation 1a."""
    counts = np.bincount(x.astype(np.int64))
    xs = np.flatnonzero(counts)
    c, total = counts[xs], x * mean
    fixed, logs = x @ np.log(total), np.log(mean).sum()

    def value_and_gradient(parameters: Floats) -> tuple[float, Floats]:
        p, q, v = parameters
        scale = v + total
        log_v, inverse = np.log(scale), 1 / scale
        x_log, log_sum, shape = x @ log_v, log_v.sum(), p * xs + q
        value = (
            c @ (gammaln(shape) - gammaln(p * xs) - gammaln(q) + q * np.log(v))
            + p * (fixed - x_log) - logs - q * log_sum
        )  # fmt: skip
        gradient = [
            c @ (xs * (psi(shape) - psi(p * xs))) + fixed - x_log,
            c @ (psi(shape) - psi(q) + np.log(v)) - log_sum,
            q / v * len(x) - p * (x @ inverse) - q * inverse.sum(),
        ]
        return float(value), np.array(gradient)

    return value_and_gradient


class GammaGamma(NamedTuple):
    """Amounts from Gamma(p, nu), nu of a customer from Gamma(q, v). Amounts in money."""

    p: float
    q: float
    v: float

    def expected(self, x: Floats, mean: Floats) -> Floats:
        """Mean amount of a customer's purchases to come; infinite where p x + q <= 1."""
        p, q, v = self
        return np.where(p * x + q > 1, p * (v + x * mean) / np.maximum(p * x + q - 1, TINY), np.inf)


def fit_gamma_gamma(x: Floats, mean: Floats) -> Estimate:
    """Of customers with x > 0. Raises ValueError."""
    if len(x) < 2 or np.ptp(mean) == 0:
        raise ValueError("all amounts are the same")
    return maximum(gamma_gamma_likelihood(x, mean), (2.0, 3.0, mean.mean()), len(x))


class Models(NamedTuple):
    purchases: Estimate  # BG/NBD
    spend: Estimate | None  # Gamma-Gamma; None: everybody is valued at `observed`
    observed: float  # mean amount of a purchase
    warnings: list[str]  # where the data deny what the models assume


def fit_models(base: Rfm) -> Models:
    """Raises ValueError where BG/NBD cannot be fitted."""
    purchases = fit_bg_nbd(*grouped(base.x, base.t_x, base.T))
    observed = float(base.cents.sum() / 100 / (base.x + 1).sum())
    mean, spend, said = base.mean_money(), None, []
    some = (base.x > 0) & (mean > 0)
    x, mean = base.x[some].astype(float), mean[some]
    if len(x) < FEW_REPEATS:
        said.append(f"only {len(x)} bought again: intervals are too narrow")
    try:
        spend = fit_gamma_gamma(x, mean)
        if (q := spend.parameters[1]) <= 1:
            raise ValueError(f"q = {q:.2f} ≤ 1, so that mean spend has no finite expectation")
    except ValueError as error:
        spend = None
        said.append(f"Gamma-Gamma: {error}; everybody is valued at {observed:,.2f} a purchase")
    related = np.corrcoef(x, mean)[0, 1] if len(x) > 1 and np.ptp(x) * np.ptp(mean) else 0
    if abs(related) > RELATED:
        wrong = "low" if related > 0 else "high"
        said.append(f"frequency and amount correlate ({related:+.2f}): values are too {wrong}")
    return Models(purchases, spend, observed, said)


class Customers(NamedTuple):
    rfm: Rfm
    models: Models
    p_alive: Floats
    purchases: Floats  # expected within the horizon
    mean_money: Floats  # expected of a purchase
    value: Floats  # residual


def valued(base: Rfm, models: Models, weeks: float, margin: float) -> Customers:
    x, t_x, T = base.x.astype(float), base.t_x / 7, base.T / 7
    model, money = BgNbd(*models.purchases.parameters), np.full(len(x), models.observed)
    if models.spend:
        money = GammaGamma(*models.spend.parameters).expected(x, base.mean_money())
    steps = np.append(np.arange(0, weeks, STEP_WEEKS), weeks)
    by_then = np.array([model.expected(x, t_x, T, week) for week in steps])
    discounts = (1 + DISCOUNT) ** (-(steps[1:] + steps[:-1]) / 2 / 52)
    value = margin * money * (discounts @ np.diff(by_then, axis=0))
    if not np.isfinite(value).all():
        raise ValueError("the values are not finite")
    return Customers(base, models, model.p_alive(x, t_x, T), by_then[-1], money, value)


def valued_at(db: Db, cutoff: int, weeks: float, margin: float) -> Customers:
    base = rfm(db, cutoff)
    return valued(base, fit_models(base), weeks, margin)


def value_interval(base: Customers, weeks: float, rng: Rng) -> tuple[float, float]:
    """95 %, for the sum of the residual values: by drawing futures, parameters first."""
    x, t_x, T = base.rfm.x.astype(float), base.rfm.t_x / 7, base.rfm.T / 7
    sums, fits = [], base.models
    for _ in range(int(np.clip(DRAWN / len(x), 20, 200))):
        count = BgNbd(*drawn(fits.purchases, rng)).draw_future(x, t_x, T, weeks, rng)
        money = base.mean_money
        if fits.spend:
            p, q, v = drawn(fits.spend, rng)
            scale = (v + x * base.rfm.mean_money()) / rng.gamma(p * x + q)
            money = rng.gamma(p * np.maximum(count, 1)) * scale / np.maximum(count, 1)
        sums.append(count @ money)
    total = float(base.value.sum())
    spread = 1.96 * float(np.std(sums)) * total / max(float(base.purchases @ base.mean_money), TINY)
    return max(0.0, total - spread), total + spread


def drawn(fit: Estimate, rng: Rng) -> Floats:
    """Parameters as the fit leaves them open: normal in their logarithms."""
    return np.exp(rng.multivariate_normal(np.log(fit.parameters), fit.covariance))


# ── 5. A shop whose truth is known ──


# Share, purchases a week, weeks that one stays, price, chance that an offer wins one back.
KINDS = [
    (0.25, 0.50, 200, 1.2, 0.02),  # loyal
    (0.30, 0.15, 50, 2.5, 0.60),  # wavering
    (0.25, 0.12, 60, 0.6, 0.15),  # bargain hunters
    (0.20, 0.03, 15, 0.5, 0.01),  # passing by
]


def open_shop(db: Db, customers: int, rng: Rng) -> int:
    """Fill `transactions`, and `offers` (customer_id, treated, uplift), which a random half of the
    customers got HORIZON weeks before the end. Returns the last day."""
    end = (OPENED - EPOCH).days + SHOP_WEEKS * 7
    pilot = end - HORIZON * 7
    kind = rng.choice(len(KINDS), customers, p=[share for share, *_ in KINDS])
    _, rate, stays, price, uplift = np.array(KINDS)[kind].T
    first = end - rng.integers(1, SHOP_WEEKS * 7 - 28, customers)
    alive_days = np.minimum(7 * rng.exponential(stays), end - first)
    orders = rng.poisson(rate * rng.gamma(3, 1 / 3, customers) * alive_days / 7 * (1 + SEASON))
    who = np.repeat(np.arange(customers), orders)
    day = (first[who] + 1 + rng.random(len(who)) * alive_days[who]).astype(np.int64)
    season = 1 + SEASON * np.cos(2 * np.pi * (day - CHRISTMAS) / 365.25)
    kept = (rng.random(len(who)) * (1 + SEASON) < season) & (day <= end)
    last = np.zeros(customers)
    np.maximum.at(last, who, np.where(kept & (day <= pilot), day, 0))
    uplift = uplift * 0.5 ** ((pilot - np.maximum(last, first)) / FORGOTTEN_DAYS)
    treated = rng.random(customers) < 0.5
    uplift = np.where(np.isin(np.arange(customers), who[kept & (day > pilot)]), 0.0, uplift)
    (won,) = np.nonzero((first <= pilot) & treated & (rng.random(customers) < uplift))
    who = np.concatenate([np.arange(customers), who[kept], won])
    day = np.concatenate([first, day[kept], pilot + 1 + rng.integers(0, HORIZON * 7, len(won))])

    lines = 1 + rng.poisson(0.8, len(who))
    who, day = np.repeat(who, lines), np.repeat(day, lines)
    tastes = rng.integers(0, len(GOODS), (customers, 2))
    sort = tastes[who, rng.integers(0, 2, len(who))]
    sort = np.where(rng.random(len(who)) < 0.2, rng.integers(0, len(GOODS), len(who)), sort)
    number = rng.zipf(1.6, len(who)) % 40
    cents = rng.lognormal(np.log(2500 * price[who]), 0.5).astype(np.int64) + 1
    cents[rng.random(len(who)) < 0.02] *= -1
    (old,), name = np.nonzero(first <= pilot), "printf('c%06d', who) AS customer_id"
    item = f"printf('%s %02d', {GOODS}[sort + 1], number) AS item"
    rows = {"who": who, "day": day, "cents": cents, "sort": sort, "number": number}  # noqa: F841
    tests = {"who": old, "treated": treated[old], "uplift": uplift[old]}  # noqa: F841
    db.execute(f"CREATE TABLE transactions AS SELECT {name}, day, cents, {item} FROM rows")
    db.execute(f"CREATE TABLE offers AS SELECT {name}, treated, uplift FROM tests")
    return end


# ── 6. Segments ──


def segments(base: Customers, among: Customers | None = None) -> Texts:
    """Valuable: who spent as the quarter that spent most. Active: who is expected to buy."""
    valuable = base.rfm.cents >= np.quantile((among or base).rfm.cents, 1 - VALUABLE)
    active = base.purchases >= ACTIVE
    names = [CHAMPIONS, AT_RISK, GROWING]
    return np.select([valuable & active, valuable, active], names, DORMANT).astype(object)


def changed(before: Customers, now: Customers) -> float:
    """Share of those in both whose segment differs."""
    was = dict(zip(before.rfm.ids, segments(before), strict=True))
    names = zip(now.rfm.ids, segments(now), strict=True)
    return float(np.mean([was[name] != segment for name, segment in names if name in was] or [0]))


# ── 7. Churn: no purchase within the horizon ──


def churn_features(customers: Customers) -> Floats:
    """(customers, 4), in the order of SIGNALS, each on a logarithmic scale."""
    base, expected = customers.rfm, customers.purchases + 0.01
    logs = base.T - base.t_x + 1, base.T + 1, np.maximum(base.cents, 0) + 1, expected
    return np.asarray(np.log(np.column_stack(logs)))


def purchase_days(db: Db, base: Customers, after: int, until: int) -> Ints:
    """Of each customer of `base`, in (after, until]."""
    rows = db.execute(
        f"""SELECT customer_id FROM transactions WHERE day > $1 AND day <= $2
        GROUP BY customer_id, day HAVING {BOUGHT}""",
        [after, until],
    ).fetchall()
    days = Counter(name for (name,) in rows)
    return np.array([days[name] for name in base.rfm.ids])


class ChurnModel(NamedTuple):
    """Fitted on features that end before its labels begin; recalibrated on the span after."""

    regression: Pipeline
    calibrated: CalibratedClassifierCV

    @classmethod
    def fit(cls, first: Customers, left: Bools, later: Customers, later_left: Bools) -> ChurnModel:
        """Raises ValueError where everybody left, or nobody."""
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=10.0, max_iter=1000))
        regression.fit(churn_features(first), left)
        level = CalibratedClassifierCV(FrozenEstimator(regression), method="sigmoid")
        return cls(regression, level.fit(churn_features(later), later_left))

    def predict(self, base: Customers) -> Floats:
        return np.asarray(self.calibrated.predict_proba(churn_features(base))[:, 1])

    def reasons(self, base: Customers, row: int) -> str:
        """What moved this score most beside the average, in log odds before calibration."""
        scaler, linear = self.regression
        moved = linear.coef_[0] * scaler.transform(churn_features(base)[[row]])[0]
        return ", ".join(f"{SIGNALS[n]} {moved[n]:+.1f}" for n in np.argsort(-np.abs(moved))[:3])


def judged(left: Bools, score: Floats) -> tuple[float, float, float]:
    """Brier score (less is better), PR-AUC, and lift of the decile that scores highest."""
    top = np.argsort(-score, kind="stable")[: max(1, len(score) // 10)]
    lift = float(left[top].mean() / left.mean())
    return float(brier_score_loss(left, score)), float(average_precision_score(left, score)), lift


class Split(NamedTuple):
    """A history cut a horizon apart; a model is fitted on one span, calibrated on the next."""

    then: Customers  # a horizon ago
    left: Bools  # of them, by today
    rate: float  # of those before them who left
    tested: ChurnModel  # knows nothing of the last horizon
    current: ChurnModel  # for today's


def split_history(db: Db, today: int, weeks: int, margin: float) -> Split:
    """Raises ValueError where the history is too short."""
    cutoffs = [today - back * weeks * 7 for back in (3, 2, 1, 0)]
    bases = [valued_at(db, cutoff, weeks, margin) for cutoff in cutoffs[:3]]
    spans = zip(bases, cutoffs, cutoffs[1:], strict=False)
    left = [purchase_days(db, base, after, until) == 0 for base, after, until in spans]
    models = [ChurnModel.fit(bases[n], left[n], bases[n + 1], left[n + 1]) for n in (0, 1)]
    return Split(bases[2], left[2], float(left[1].mean()), *models)


@dataclass
class Shop:
    """Transactions, terms, and what is computed of both on demand."""

    db: Db
    today: int  # the cutoff
    weeks: int  # the horizon
    margin: float  # share of sales
    cost: float  # of an offer, money
    quality: Quality | None = None  # of a file; one that is generated has a pilot

    @cached_property
    def base(self) -> Customers:
        return valued_at(self.db, self.today, self.weeks, self.margin)

    @cached_property
    def split(self) -> Split:
        return split_history(self.db, self.today, self.weeks, self.margin)

    @cached_property
    def treated(self) -> Bools:
        """Who of `split.then` got the pilot's offer, which went to a random half."""
        rows = self.db.execute("FROM offers ORDER BY customer_id").fetchnumpy()
        names = self.split.then.rfm.ids
        return np.asarray(rows["treated"][np.searchsorted(rows["customer_id"], names)])

    def at_risk(self) -> Ints:
        """Rows of the at risk but valuable, by what is still expected of them."""
        (rows,) = np.nonzero(segments(self.base) == AT_RISK)
        return rows[np.argsort(-self.base.value[rows], kind="stable")]

    def profile(self, source: str, customer_id: str) -> dict[str, Any]:
        """With the latest events in the table `source`."""
        one = f"(SELECT * FROM {source} WHERE customer_id = {quoted(customer_id)})"
        customer = valued(rfm(self.db, self.today, one), self.base.models, self.weeks, self.margin)
        (segment,) = segments(customer, self.base)
        return {"segment": segment, "value": float(customer.value[0])}


# ── 8. Offers: what they bring back, and to whom ──

Uplift = Callable[[Customers], Floats]


def uplift_model(base: Customers, treated: Bools, bought: Bools, seen: Bools) -> Uplift:
    """Chance of a purchase with an offer, less that without: a regression for each.

    Source: Künzel et al., Metalearners for heterogeneous treatment effects, PNAS 2019."""
    features, models = churn_features(base), []
    for half in (treated & seen, ~treated & seen):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        models.append(model.fit(features[half], bought[half]))

    def uplift(base: Customers) -> Floats:
        with_it, without = (model.predict_proba(churn_features(base))[:, 1] for model in models)
        return np.asarray(with_it - without)

    return uplift


class Policy(NamedTuple):
    name: str
    chosen: Bools
    gain: float  # money: treated beside untreated, less the cost
    error: float  # its standard error


def policies(shop: Shop) -> list[Policy]:
    """On the half that no model has seen: to all, to the riskiest, and where uplift × margin is
    above the cost; the last two to equally many."""
    base, left, *_ = shop.split
    churn, treated, bought = shop.split.tested.predict(base), shop.treated, ~left
    seen = np.random.default_rng(SEED).random(len(churn)) < 0.5
    worth = shop.margin * base.mean_money
    uplift = uplift_model(base, treated, bought, seen)(base)
    pays = (uplift * worth > shop.cost) & ~seen
    riskiest = np.zeros_like(pays)
    riskiest[np.argsort(2 * seen - churn, kind="stable")[: pays.sum()]] = True
    found, surprise = [], worth * (bought - (1 - churn))  # less noise
    for name, who in (("all", ~seen), ("the riskiest", riskiest), ("where it pays", pays)):
        got, rest = surprise[who & treated], surprise[who & ~treated]
        if min(len(got), len(rest)) < 2:
            got = rest = np.zeros(2)
        each = got.mean() - rest.mean() - shop.cost
        error = np.sqrt(got.var(ddof=1) / len(got) + rest.var(ddof=1) / len(rest))
        found.append(Policy(name, who, float(each * who.sum()), float(error * who.sum())))
    return found


# ── 9. Recommendations: item by item ──


class Recommender(NamedTuple):
    customers: Texts
    items: Texts
    bought: sparse.csr_matrix  # (customers, items), 1 where bought
    alike: sparse.csr_matrix  # (items, items), as the same customers bought both

    def scores(self, rows: Any) -> Floats:
        """(rows, items); minus infinity for what is bought already."""
        dense = (self.bought[rows] @ self.alike).toarray()
        dense[self.bought[rows].nonzero()] = -np.inf
        return np.asarray(dense)

    def because(self, row: Any, item: int) -> str:
        """The bought item that speaks most for `item`."""
        weights = self.bought[[row]].multiply(self.alike[:, [item]].T).toarray()[0]
        return str(self.items[weights.argmax()])


def alike(bought: sparse.csr_matrix) -> sparse.csr_matrix:
    """Cosine of items, shrunk for rare ones; the NEIGHBOURS nearest of each.

    Source: Sarwar et al., Item-based collaborative filtering, WWW 2001."""
    together = (bought.T @ bought).tocsr()
    sizes, columns = together.diagonal(), together.indices
    rows = np.repeat(np.arange(len(sizes)), np.diff(together.indptr))
    cosine = together.data / (np.sqrt(sizes[rows] * sizes[columns]) + SHRINKAGE)
    cosine[rows == columns] = 0
    nearest = np.concatenate([
        np.arange(0), *(
            a + np.argpartition(-cosine[a:z], min(NEIGHBOURS, z - a - 1))[:NEIGHBOURS]
            for a, z in itertools.pairwise(together.indptr) if z > a
        ),
    ])  # fmt: skip
    pairs = rows[nearest], columns[nearest]
    return sparse.csr_matrix((cosine[nearest], pairs), together.shape, dtype=np.float32)


def baskets(db: Db, after: int, until: int) -> tuple[Texts, Texts, sparse.csr_matrix]:
    """Customers, items, and (customers, items) the cents spent on days in (after, until]."""
    rows = db.execute(
        """SELECT customer_id, item, sum(CASE WHEN day > $1 AND day <= $2 THEN cents ELSE 0 END)
        AS cents FROM transactions WHERE cents > 0 AND item <> '' GROUP BY ALL ORDER BY ALL""",
        [after, until],
    ).fetchnumpy()
    customers, row = np.unique(rows["customer_id"], return_inverse=True)
    items, column = np.unique(rows["item"], return_inverse=True)
    shape = len(customers), len(items)
    cents = sparse.csr_matrix((rows["cents"].astype(np.float64), (row, column)), shape)
    cents.eliminate_zeros()
    return customers, items, cents


def recommender(db: Db, until: int) -> Recommender:
    """From what was bought by the end of day `until`."""
    customers, items, cents = baskets(db, 0, until)
    bought = (cents > 0).astype(np.float32)
    return Recommender(customers, items, bought, alike(bought))


def hits(scores: Floats, later: sparse.csr_matrix) -> tuple[float, float, float]:
    """Recall and NDCG of the TOP best scores, averaged over customers, and the cents in them."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    cents = np.take_along_axis(later.toarray(), best, axis=1)
    found, count = cents > 0, np.minimum(later.getnnz(1), TOP)
    gains = 1 / np.log2(np.arange(2, best.shape[1] + 2))
    ndcg = (found @ gains / np.cumsum(gains)[count - 1]).mean()
    return float((found.sum(1) / count).mean()), float(ndcg), float(cents.sum())


# ── 10. Live: profiles that follow events, events that survive an outage ──


Cache = redis.Redis | None  # None: not there
Broker = Any  # pika.ConnectionParameters, or None


class ProfileService:
    """Profiles by Redis, or computed. An event meanwhile may leave an old one (script 03)."""

    def __init__(self, client: Cache, prefix: str, compute: Callable[[str], Any]) -> None:
        self._client, self._prefix, self._compute = client, prefix, compute
        self._away_until_s, self.computed = 0.0, 0

    def get(self, customer_id: str) -> dict[str, Any]:
        if cached := self._ask("get", customer_id):
            return dict(json.loads(cached))
        self.computed += 1
        profile: dict[str, Any] = self._compute(customer_id)
        self._ask("set", customer_id, json.dumps(profile), ex=PROFILE_TTL_S)
        return profile

    def forget(self, customer_id: str) -> None:
        """After its event is stored."""
        self._ask("delete", customer_id)

    def _ask(self, command: str, customer_id: str, *args: Any, **options: Any) -> Any:
        if self._client and time.monotonic() >= self._away_until_s:
            try:
                key = f"{self._prefix}:{customer_id}"
                return getattr(self._client, command)(key, *args, **options)
            except redis.RedisError:
                self._away_until_s = time.monotonic() + REDIS_PAUSE_S
        return None


class InsightPublisher:
    """Events on disk first, then in a queue, again and again until they are confirmed; by their
    ids a consumer knows a repetition."""

    def __init__(self, spool: Path, queue: str, broker: Broker) -> None:
        self._queue, self._broker, self._spool = queue, broker, sqlite3.connect(spool, timeout=10)
        columns = "id TEXT PRIMARY KEY, body TEXT, confirmed INTEGER DEFAULT 0"
        self._spool.execute(f"CREATE TABLE IF NOT EXISTS events ({columns})")

    def add(self, day: date, at_stake: Mapping[str, float]) -> None:
        """An event a customer at risk; the same day and customer is there once."""
        rows = []
        for customer_id, money in at_stake.items():
            event = {"kind": "at-risk", "day": day.isoformat(), "customer_id": customer_id}
            name = hashlib.sha256(json.dumps(event).encode()).hexdigest()
            rows.append((name, json.dumps({**event, "at_stake": money})))
        with self._spool:
            self._spool.executemany("INSERT OR IGNORE INTO events (id, body) VALUES (?, ?)", rows)

    def waiting(self) -> list[tuple[str, str]]:
        return self._spool.execute("SELECT id, body FROM events WHERE NOT confirmed").fetchall()

    def publish(self) -> int:
        """How many of those that wait were confirmed; the others wait for the next call."""
        confirmed: list[tuple[str]] = []
        try:
            if self._broker:
                with closing(pika.BlockingConnection(self._broker)) as connection:
                    channel = connection.channel()
                    channel.queue_declare(self._queue, durable=True, arguments=QUORUM)
                    channel.confirm_delivery()
                    for name, body in self.waiting():
                        about = pika.BasicProperties(message_id=name, delivery_mode=2)
                        channel.basic_publish("", self._queue, body.encode(), about, mandatory=True)
                        confirmed.append((name,))
        except LOST as error:
            level = logging.INFO if isinstance(error, AMQPConnectionError) else logging.WARNING
            logger.log(level, "events wait in the spool: %r", error)
        with self._spool:
            self._spool.executemany("UPDATE events SET confirmed = 1 WHERE id = ?", confirmed)
        return len(confirmed)

    def close(self) -> None:
        self._spool.close()


def announce(publisher: InsightPublisher, shop: Shop) -> None:
    """An event a customer at risk but valuable, dated by the cutoff."""
    rows = shop.at_risk()
    names, values = shop.base.rfm.ids[rows].tolist(), shop.base.value[rows].tolist()
    publisher.add(EPOCH + timedelta(shop.today), dict(zip(names, values, strict=True)))


# ── 11. The report ──

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Customers on {{ day }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: auto; padding: 1rem }
h2 { margin-top: 2.5rem } div { overflow-x: auto } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8886; text-align: right }
th:first-child, td:first-child, .text { text-align: left }
.text { min-width: 9rem }
@media print { body { max-width: none } svg, tr, li { break-inside: avoid } }
</style>
{% macro grid(caption, columns, rows) %}
<div><table><caption>{{ caption }}</caption>
<tr>{% for name in columns %}<th scope="col">{{ name }}{% endfor %}
{% for row in rows %}<tr>{% for cell in row %}
<td{% if cell is string %} class="text">{{ cell }}{% else %}>{{ cell | number }}{% endif %}
{% endfor %}{% endfor %}
</table></div>
{% endmacro %}
<h1>Customers on {{ day }}</h1>
<h2>Decisions</h2>
<ol>{% for what, money, why in decisions %}
<li><p><b>{{ what }}</b><br>{{ money }}<br>{{ why }}{% endfor %}
</ol>
<h2>Value</h2>
<p>{{ values | length | number }} customers will bring a margin of {{ values.sum() | number }}
within {{ shop.weeks }} weeks (95 %: {{ low | number }} to {{ high | number }}).
{{ grid("% of that by tenth of the customers, best first", range(1, 11), [shares]) }}
<h2>Segments</h2>
<p>Valuable is the quarter that spent most, active who will buy half a time or more, on average.
Champions are both, the growing active, the dormant neither.
{% if then %}{{ changed }} have changed their segment within {{ shop.weeks }} weeks.{% endif %}
{{ grid("Today", ["", "Customers", "Spent", "Residual value"], segments) }}
{% if then %}<h2>Churn</h2>
<p>In {{ shop.weeks }} weeks that the model had not seen, {{ rate }} made no purchase. Brier score
{{ scores[0] }}, PR-AUC {{ scores[1] }}, lift of the riskiest tenth {{ scores[2] }}.
{{ reliability }}
{{ grid("At risk but valuable: of whom most is expected", ["Customer", "Spent", "Days silent",
    "Residual value", "Churn, and why in log odds"], worst) }}{% endif %}
<h2>Offers</h2>
{% if tried %}{{ grid("Gain, an order at its expected amount, in the half that no model had seen",
    ["Offer to", "Customers", "Gain", "95 %"], tried) }}
{% else %}<p>None was given at random: what one brings is unknown.{% endif %}
{% if next %}<h2>Recommendations</h2>
{{ grid("The most valuable", ["Customer", "Offer next", "Because they bought"], next) }}{% endif %}
<h2>Data and models</h2>
<p>Margin {{ shop.margin }}, offer {{ shop.cost }}, discount 10 % a year.
{% for text in trust %}<p>{{ text }}{% endfor %}
{% if shop.quality %}{{ grid("The file: " ~ shop.quality.reading, ["", "Number"],
    shop.quality.counts.items()) }}
{{ grid("Faulty lines", ["Line", "Why", "Text"], shop.quality.faulty) }}{% endif %}
"""
Decision = tuple[str, str, str]  # what to do, its money, why


def number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.2f}"


def reliability(said: Floats, came: Floats, rate: float) -> Markup:
    """Inline SVG."""
    alt = f"Reliability, at most {np.abs(said - came).max():.2f} off, and lift by tenth"
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": alt, **dict.fromkeys(INKED, INK)}
    with matplotlib.rc_context(style):
        figure, text = Figure(figsize=(7, 2.8), layout="constrained"), io.StringIO()
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color="gray", linestyle="--")
        left.plot(said, came, marker="o", color="steelblue")
        left.set(xlabel="predicted share that leaves", ylabel="observed share")
        right.bar(TENTHS, came / rate, color="steelblue")
        right.set(xlabel="tenth, riskiest first", ylabel="lift", xticks=TENTHS)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().partition("<svg ")[2].replace(INK, "currentColor")
    return Markup(f'<svg role="img" aria-label="{escape(alt)}" {svg}')  # noqa: S704


def churn_part(shop: Shop) -> dict[str, Any]:
    left, model, known = shop.split.left, shop.split.current, shop.base.rfm
    score, rate = shop.split.tested.predict(shop.split.then), float(left.mean())
    order = np.array_split(np.argsort(-score, kind="stable"), 10)
    said, came = (np.array([v[rows].mean() for rows in order]) for v in (score, left))
    worst, now = [], model.predict(shop.base)
    for row in shop.at_risk()[:TOP]:
        why = f"{now[row]:.0%}: {model.reasons(shop.base, row)}"
        silent, name = int(known.T[row] - known.t_x[row]), str(known.ids[row])[:ID_SHOWN]
        worst.append([name, known.cents[row] / 100, silent, shop.base.value[row], why])
    scores = [f"{score:.3f}" for score in judged(left, score)]
    drawing = reliability(said, came, rate)
    return {"scores": scores, "rate": f"{rate:.0%}", "reliability": drawing, "worst": worst}


def offers_part(shop: Shop) -> tuple[dict[str, Any], Decision]:
    """And the decision; where no offer was given at random, it is to find out."""
    worth = shop.margin * shop.base.mean_money
    if shop.quality:
        needed = shop.cost / worth[shop.at_risk()]
        pays = np.median(needed) if len(needed) else 1.0
        return {}, (
            f"Pilot the offer on a random half of the {len(needed):,} at risk but valuable",
            f"Offers pay where they add {pays:.1%} to the chance of a purchase. The pilot costs "
            f"{number(shop.cost * len(needed) / 2)}.",
            "Without a random half, those who would have bought anyway look won.",
        )
    tried = policies(shop)
    rows = [[p.name, int(p.chosen.sum()), p.gain, f"± {number(1.96 * p.error)}"] for p in tried]
    then, left, *_ = shop.split
    uplift = uplift_model(then, shop.treated, ~left, np.ones_like(left))(shop.base)
    gain, (_, risky, best) = uplift * worth - shop.cost, tried
    n = max(1, best.chosen.sum())
    return {"tried": rows}, (
        f"Send the offer to {(gain > 0).sum():,} customers, not to all {len(gain):,}",
        f"Expected gain: {number(gain[gain > 0].sum())} within {shop.weeks} weeks.",
        f"In the pilot, those chosen so brought {best.gain / n:.2f} ± {1.96 * best.error / n:.2f} "
        f"each after its cost, as many of the riskiest {risky.gain / n:+.2f}.",
    )


def recommendations(shop: Shop) -> list[list[str]]:
    found, rows = recommender(shop.db, shop.today), []
    best = shop.base.rfm.ids[np.argsort(-shop.base.value, kind="stable")[:TOP]]
    for row in np.flatnonzero(np.isin(found.customers, best)):
        scores = found.scores([row])[0]
        if scores.max() > 0:
            item, name = int(scores.argmax()), str(found.customers[row])[:ID_SHOWN]
            rows.append([name, str(found.items[item]), found.because(row, item)])
    return rows


def report(shop: Shop) -> tuple[list[Decision], str]:
    """Decisions, and a self-contained HTML page; what the data do not carry is left out."""
    models, then, trust = shop.base.models, None, list(shop.base.models.warnings)
    try:
        then, start = shop.split.then, shop.today - shop.weeks * 7
        came = purchase_days(shop.db, then, start, shop.today).sum()
        expected = f"{then.purchases.sum():,.0f} purchases were expected, {came:,} came"
        trust.append(f"{shop.weeks} weeks ago, {expected}: an interval knows no season.")
    except ValueError as error:
        trust.append(f"No churn model: {error}.")
    for kind, fit in ((BgNbd, models.purchases), (GammaGamma, models.spend)):
        if fit:
            found = zip(kind._fields, fit.parameters, fit.errors(), strict=True)
            words = (f"{name} {value:.4g} ± {error:.1%}" for name, value, error in found)
            trust.append(f"{kind.__name__}: {', '.join(words)} (a standard error).")
    (offers, offer), rows = offers_part(shop), shop.at_risk()
    worth = number(shop.base.value[rows].sum())
    call = (
        f"Call the {len(rows):,} customers at risk but valuable, those below first",
        f"Spend no more than {worth}, the margin still expected of them.",
        "They spent much, and may not come back.",
    )
    page = Environment(autoescape=True, trim_blocks=True)
    page.filters["number"] = number
    values = np.sort(shop.base.value)[::-1]
    low, high = value_interval(shop.base, shop.weeks, np.random.default_rng(SEED))
    shares = [100 * tenth.sum() / values.sum() for tenth in np.array_split(values, 10)]
    names, spent, today = segments(shop.base), shop.base.rfm.cents / 100, []
    for name in SEGMENTS:
        of = names == name
        today.append([name, int(of.sum()), spent[of].sum(), shop.base.value[of].sum()])
    parts = {**offers, **(churn_part(shop) if then else {}), "then": then}
    text = page.from_string(TEMPLATE).render(
        shop=shop, day=EPOCH + timedelta(shop.today), decisions=[offer, call], trust=trust,
        segments=today, changed=f"{changed(then, shop.base):.0%}" if then else "",
        next=recommendations(shop), values=values, low=low, high=high, shares=shares, **parts,
    )  # fmt: skip
    return [offer, call], text


# ── Demos ──


def shown(conclusion: str, **counts: Any) -> Any:
    for name, count in counts.items():
        fact(name.replace("_", " "), f"{count:,}")
    conclude(conclusion)
    return counts


def tell(quality: Quality) -> None:
    fact("read as", quality.reading)
    table(["line", "reason", "text"], quality.faulty)


def listed(found: Mapping[str, Any], form: str = ".3f") -> list[list[str]]:
    return [[name, *(format(figure, form) for figure in row)] for name, row in found.items()]


DIRTY = """\
CustomerID;InvoiceDate;Quantity;UnitPrice;Description
007;31/12/2023 23:30;2;1234,50;"desk; oak"
007;31/12/2023 09:00;1;12,00;lamp
007;31/12/2023 09:30;-1;12,00;lamp
0042;14/01/2024 12:00;;9,99;chair
;14/01/2024 12:00;1;5,00;pen
0042;30/02/2024 12:00;1;9,99;chair
9;01/02/2024 10:15;1;0,00;sample
9;03/02/2024 10:15;1;many;chair
9;05/02/2024 10:15;-1;25,00;chair
9;06/02/2099 10:15;1;25,00;chair
"""


def demo_dirty(home: Path) -> Any:
    """1. Dirty input: what is read, what is not, and why.

    Prediction: three lines cannot be read; a date that can mean two days is not guessed."""
    path, clean = home / "dirty.csv", "8;17/03/2024 08:00;1;2,00;café\n" * 20
    path.write_text(DIRTY + clean, "cp1252")
    columns = {"customer_id": "CustomerID", "date": "InvoiceDate", "amount": "Quantity*UnitPrice"}
    with connected() as db:
        quality = read_transactions(db, str(path), home, columns)
    tell(quality)
    path.write_text("customer_id,date,amount\n1,03/04/2024,5\n2,11/12/2024,6\n")
    try:
        with connected() as db:
            read_transactions(db, str(path), home)
    except ConfigError as error:
        fact("another file is refused", error)
    return shown("nothing was guessed, nothing left out unsaid", **quality.counts)


def demo_rfm(shop: Shop, engines: Mapping[str, Any], home: Path) -> dict[str, bool]:
    """2. RFM: the same features on every engine.

    Prediction: the same integers for every customer."""
    path, found, rows = home / "rfm.csv", {}, "SELECT customer_id, day, cents FROM transactions"
    shop.db.execute(f"COPY ({rows}) TO {quoted(path)} (HEADER false)")
    for name, compute in engines.items():
        try:
            pairs = zip(compute(path, shop.today), shop.base.rfm, strict=True)
            found[name] = all(itertools.starmap(np.array_equal, pairs))
        except (SQLAlchemyError, PyMongoError) as error:
            note(f"{name} was lost on the way: {type(error).__name__}")
    for name, is_same in found.items():
        fact(name, f"{len(shop.base.value):,} customers, {'the same' if is_same else 'DIFFERENT'}")
    conclude(f"{sum(found.values())} of {len(engines)} other engines agree with DuckDB")
    return found


PUBLISHED = (0.2426, 4.4136, 0.7929, 2.4259)  # Fader, Hardie, Lee 2005: weeks 1 to 39


def read_cdnow(db: Db, home: Path) -> int:
    """CDNOW's customers, of the package lifetimes; returns the day before the first purchase."""
    if not (package := importlib.util.find_spec("lifetimes")):
        raise ImportError("CDNOW's data come with requirements/dev.txt")
    text = Path(str(package.origin)).with_name("datasets").joinpath("CDNOW_sample.txt").read_text()
    rows = [",".join(line.split()[0::2][:3]) for line in text.splitlines()]
    path = home / "cdnow.csv"
    path.write_text("\n".join(["customer_id,date,amount", *rows]))
    read_transactions(db, str(path), home)
    return int(only_row(db, "SELECT min(day) - 1 AS day FROM transactions")["day"])


def demo_fits(home: Path) -> Any:
    """3. The fit of BG/NBD: CDNOW's customers, beside what is published.

    Prediction: four parameters agree to four decimals; a forecast of 39 weeks is 12 % low."""
    with connected() as db:
        try:
            cutoff = read_cdnow(db, home) + 39 * 7
        except ImportError as error:
            note(str(error))
            return {}
        base = valued_at(db, cutoff, 39, 1.0)
        came = int(purchase_days(db, base, cutoff, cutoff + 39 * 7).sum())
    fit, expected = base.models.purchases, float(base.purchases.sum())
    found: Any = {"published": PUBLISHED, "fitted": fit.parameters, "log error": fit.errors()}
    table(["", *BgNbd._fields], listed(found, ".4f"))
    fact("log-likelihood", f"{fit.log_likelihood:,.3f} (published: -9,582.4)")
    fact("weeks 40 to 78", f"{expected:,.0f} purchases expected, {came:,} came")
    conclude("the fit is right; no fit knows what will change")
    return {"fitted": fit.parameters.tolist(), "expected": expected, "came": came}


def demo_churn(shop: Shop) -> dict[str, list[float]]:
    """4. Churn: a calibrated model and its rivals, on weeks that none of them saw.

    Prediction: 1 - P(alive) has a worse Brier score than the base rate."""
    base, left, rate, model, _ = shop.split
    silent = base.rfm.T - base.rfm.t_x > shop.weeks * 7
    rivals = {
        "base rate, weeks before": np.full(len(left), rate),
        f"silent for {shop.weeks} weeks": silent.astype(float),
        "1 - P(alive)": 1 - base.p_alive,
        "the model": model.predict(base),
    }
    scores = {name: list(judged(left, score)) for name, score in rivals.items()}
    table(["score", "Brier", "PR-AUC", "lift of the top tenth"], listed(scores))
    conclude(f"{left.mean():.0%} of {len(left):,} left; the model says who")
    return scores


def demo_campaign(shop: Shop) -> dict[str, list[float]]:
    """5. A retention campaign: offers to all, to the riskiest, or where they pay.

    Prediction: the riskiest do not bring back their cost: they have left."""
    found = policies(shop)
    result = {p.name: [int(p.chosen.sum()), p.gain, 1.96 * p.error] for p in found}
    table(["offer to", "customers", "gain", "± (95 %)"], listed(result, ",.0f"))
    more = found[2].gain - found[1].gain
    conclude(f"decision: offers where they pay; {more:,.0f} more than for the riskiest")
    return result


def demo_recommend(shop: Shop) -> dict[str, list[float]]:
    """6. Recommendations: what goes with what, against what sells best.

    Prediction: a quarter more hits than best-sellers have."""
    cutoff = shop.today - shop.weeks * 7
    known, later = recommender(shop.db, cutoff), baskets(shop.db, cutoff, shop.today)[2]
    later = sparse.csr_matrix(later - later.multiply(known.bought))
    later.eliminate_zeros()
    (rows,) = np.nonzero((later.getnnz(1) > 0) & (known.bought.getnnz(1) > 0))
    sold = np.asarray(known.bought.sum(axis=0))
    popular = np.where(known.bought[rows].toarray() > 0, -np.inf, sold)
    found, money = {}, {}
    for name, scores in {"best-sellers": popular, "item by item": known.scores(rows)}.items():
        *found[name], cents = hits(scores, later[rows])
        money[name] = cents / 100 * shop.margin
    table([f"{len(rows):,} customers", f"recall@{TOP}", f"NDCG@{TOP}"], listed(found))
    less, more = money.values()
    conclude(f"decision: item by item; it foresaw a margin of {more:,.0f}, not {less:,.0f}")
    return found


def demo_live(shop: Shop, cache: Cache, broker: Broker, name: str, home: Path) -> Any:
    """7. Live: purchases arrive, profiles follow, and at-risk events outlive an outage.

    Prediction: no profile is older than its last purchase; no event is lost, or sent twice."""
    rows = shop.at_risk()
    names = shop.base.rfm.ids[rows[:LIVE]].tolist()
    shop.db.execute("CREATE OR REPLACE TABLE live AS FROM transactions")
    compute = partial(shop.profile, "live")
    service = ProfileService(cache, name, compute)
    for who in names * 2:
        service.get(who)
    cold = service.computed
    for buyer in names[::2]:
        shop.db.execute("INSERT INTO live VALUES (?, ?, 5000, 'tea 01')", [buyer, shop.today])
        service.forget(buyer)
    stale = sum(service.get(who) != compute(who) for who in names)
    outage = []
    for place in (NOWHERE, broker):
        with closing(InsightPublisher(home / "spool", name, place)) as publisher:
            announce(publisher, shop)
            outage += [publisher.publish(), publisher.publish(), len(publisher.waiting())]
    if not (cache and broker):
        note("without Redis nothing is cached, without RabbitMQ nothing sent")
    worth = number(shop.base.value[rows].sum())
    return shown(
        f"decision: call these {len(rows):,}, of whom {worth} of margin is expected",
        profiles_read_twice=len(names), computed=cold, then_purchases=len(names[::2]),
        computed_again=service.computed - cold, stale=stale, waiting_in_an_outage=outage[2],
        sent_after_it=outage[3], sent_again=outage[4],
    )  # fmt: skip


def demo_report(shop: Shop, broker: Broker, name: str, spool: Path | None, page: Path) -> Any:
    """8. The report: a page on which somebody decides.

    Prediction: it opens with what to do, and the money."""
    if shop.quality:
        tell(shop.quality)
    decisions, text = report(shop)
    page.write_text(text, "utf-8")
    for what, money, _ in decisions:
        fact(what, money)
    sent = waiting = 0
    if spool:
        with closing(InsightPublisher(spool, name, broker)) as spooled:
            announce(spooled, shop)
            sent, waiting = spooled.publish(), len(spooled.waiting())
    return shown(f"the page: {page}", events_confirmed=sent, events_waiting=waiting)


# ── Main ──

DEMOS = (
    demo_dirty, demo_rfm, demo_fits, demo_churn, demo_campaign, demo_recommend, demo_live,
    demo_report,
)  # fmt: skip


def open_postgresql(url: str, timeout_s: float) -> tuple[Engine, str]:
    options = {"connect_timeout": max(2, round(timeout_s)), "options": "-c statement_timeout=60s"}
    engine = create_engine(url, connect_args=options)
    with engine.connect() as connection:
        return engine, connection.exec_driver_sql("SHOW server_version").scalar_one().split()[0]


def open_mongodb(url: str, timeout_s: float) -> tuple[pymongo.MongoClient[Any], str]:
    patience: Any = {"serverSelectionTimeoutMS": timeout_s * 1000, "socketTimeoutMS": 60_000}
    client = pymongo.MongoClient[Any](url, **patience)
    with pymongo.timeout(timeout_s):
        client.admin.command("listDatabases", nameOnly=True)
        return client, client.server_info()["version"]


def open_redis(url: str, timeout_s: float) -> tuple[redis.Redis, str]:
    patience: Any = {"socket_timeout": timeout_s, "retry": Retry(NoBackoff(), 0)}
    client: Any = redis.Redis.from_url(url, **patience)
    if client.info("cluster")["cluster_enabled"]:
        raise ValueError("a node of a Redis Cluster")
    return client, client.info("server")["redis_version"]


def open_rabbitmq(url: str, timeout_s: float) -> tuple[pika.URLParameters, str]:
    broker = pika.URLParameters(url)
    broker.socket_timeout, broker.stack_timeout = timeout_s, timeout_s
    broker.blocked_connection_timeout = 30
    with closing(pika.BlockingConnection(broker)) as connection:
        return broker, connection._impl.server_properties["version"]  # shown nowhere else


SERVICES = {
    "PostgreSQL": ("DATABASE_URL", 5432, open_postgresql),
    "MongoDB": ("MONGODB_URI", 27017, open_mongodb),
    "Redis": ("REDIS_URL", 6379, open_redis),
    "RabbitMQ": ("RABBITMQ_URL", 5672, open_rabbitmq),
}
REFUSALS = (SQLAlchemyError, PyMongoError, redis.RedisError, *LOST, ValueError, TypeError)
ABSENT = "onnection refused|No servers|No such file|not known|timeout exp|timed out|StackT|^Timeout"


def opened(run: config.Run, name: str) -> Any:
    """A service, or None where nobody answers. Raises ConfigError for a refusal."""
    variable, port, opener = SERVICES[name]
    timeout_s = run.settings.connect_timeout_s
    try:
        url = run.url(name, variable)
        try:
            at = urlsplit(url)
            if at.hostname and not re.search(r"\+srv:|,|[?&]host=", url):
                config.require_reachable(name, url, [(at.hostname, at.port or port)], timeout_s)
            client, version = opener(url, timeout_s)
        except (*REFUSALS, KeyError, SyntaxError) as error:
            reason = re.split(", Timeout:|, full error|\n", str(error).strip())[0] or repr(error)
            if re.search(ABSENT, reason) and not url.startswith("rediss:"):  # which may lack TLS
                raise ServiceUnavailable(name, reason, url) from error
            raise ConfigError(config.redact(f"{variable}: {url}: {reason}")) from error
    except ServiceUnavailable as error:
        run.fall_back(name.lower(), error, f"no {name}")
        return None
    run.services[name.lower()] = f"{name} {version}"
    return client


@contextmanager
def open_resources(run: config.Run, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A shop, of a file or generated, and the services."""
    token = f"module8-{secrets.token_hex(4)}"
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs what it raises as well
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="module8-")))
        db = stack.enter_context(connected())
        stack.enter_context(threadpool_limits(1))  # threads cost more than a dot product
        run.services["duckdb"] = f"DuckDB {duckdb.__version__}"
        postgresql, mongodb, cache, broker = (opened(run, name) for name in SERVICES)
        shop = opened_shop(db, options, home, run.scale)
        engines = {}
        if postgresql:
            engines["PostgreSQL"] = partial(rfm_postgresql, postgresql)
        if mongodb:
            database = stack.enter_context(mongodb)[token.replace("-", "_")]
            stack.push(suppress(PyMongoError))
            stack.callback(mongodb.drop_database, database)
            engines["MongoDB"] = partial(rfm_mongodb, database)
        name, place = ("module8-customers", Path()) if options.transactions else (token, home)
        is_asked = run.settings.rabbitmq_url and not run.offline
        if name == token:
            stack.callback(clean, cache, broker, name)
        yield {
            "shop": shop, "engines": engines, "home": home, "cache": cache, "broker": broker,
            "name": name, "spool": place / "at-risk.spool" if is_asked else None,
            "page": Path(options.report),
        }  # fmt: skip


def clean(cache: Cache, broker: Broker, name: str) -> None:
    """Take what the demos left from the servers."""
    with suppress(redis.RedisError):
        if cache and (keys := [*cache.scan_iter(f"{name}*")]):
            cache.unlink(*keys)
    with suppress(*LOST):
        if broker:
            with closing(pika.BlockingConnection(broker)) as connection:
                connection.channel().queue_delete(name)


def opened_shop(db: Db, options: argparse.Namespace, home: Path, customers: int) -> Shop:
    terms, path = (options.horizon_weeks, options.margin, options.offer_cost), options.transactions
    if not path:
        return Shop(db, open_shop(db, customers, np.random.default_rng(SEED)), *terms)
    quality = read_transactions(db, path, home, options.columns, options.date_format)
    last = only_row(db, "SELECT coalesce(max(day), 0) AS day FROM transactions")["day"]
    shop = Shop(db, (options.cutoff - EPOCH).days if options.cutoff else last, *terms, quality)
    try:
        return shop.base and shop
    except ValueError as error:
        raise ConfigError(f"--transactions {path}: {error}") from error


def own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("options of an analysis").add_argument
    add("--transactions", metavar="FILE", help="CSV (also .gz), Parquet, or - for stdin")
    add("--columns", type=pairs, default={}, metavar="FIELD=…,…", help=" ".join(FIELDS))
    add("--date-format", default="", metavar="FORMAT", help="such as %%d/%%m/%%Y")
    add("--cutoff", type=date.fromisoformat, metavar="DATE", help="default: the last day")
    add("--horizon-weeks", type=int, default=HORIZON, metavar="N")
    add("--margin", type=float, default=MARGIN, metavar="SHARE")
    add("--offer-cost", type=float, default=COST, metavar="MONEY")
    add("--report", default="report.html", metavar="FILE")
    return parser


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(","))  # argparse reports a ValueError


def main(argv: Sequence[str] | None = None) -> int:
    parser = own_options()
    options, others = parser.parse_known_args(argv)
    weeks, margin, cost = options.horizon_weeks, options.margin, options.offer_cost
    if not (0 < weeks <= 520 and 0 < margin <= 1 and 0 <= cost < np.inf):
        parser.error("--horizon-weeks: 1 to 520; --margin: up to 1; --offer-cost: from 0")
    demos = (demo_rfm, demo_report) if options.transactions else DEMOS
    doc, opener = f"{__doc__}\n{parser.format_help()}", partial(open_resources, options=options)
    return config.run_script(doc, demos, opener, others, scale=CUSTOMERS, scale_unit="customers")


if __name__ == "__main__":
    raise SystemExit(main())
