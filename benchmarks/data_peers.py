"""What bench_05_data_science.py compares: the peers, each as its manual writes it, and the data.

Days count from 1970-01-01, money is in cents. A function imports the peer that it needs, so that a
process that runs it holds nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = "customer_id frequency recency age first_cents cents".split()
WHEN = "%Y-%m-%d %H:%M:%S"
FIRST, DAYS = 19_000, 730  # the first day of all data, and how many
SPAN = 100_000  # days: more than there are

# ── Peers ───────────────────────────────────────────────────────────────────────────


def lifetimes_purchases(x: Any, t_x: Any, age: Any, n: Any = None) -> Any:
    """Parameters of BG/NBD; times in weeks, of customers or of groups of `n`."""
    from lifetimes import BetaGeoFitter

    fitter = BetaGeoFitter()
    fitter.fit(x, t_x, age, weights=n)
    return fitter.params_.to_numpy()


def lifetimes_spend(x: Any, mean: Any) -> Any:
    from lifetimes import GammaGammaFitter

    fitter = GammaGammaFitter()
    fitter.fit(x, mean)
    return fitter.params_.to_numpy()


def implicit_model(bought: Any, neighbours: int) -> Any:
    from implicit.nearest_neighbours import CosineRecommender

    model = CosineRecommender(K=neighbours)
    model.fit(bought, show_progress=False)
    return model


def pandas_read(path: Path) -> Any:
    """customer_id, day and cents of the good lines."""
    import pandas as pd

    events = pd.read_csv(path, dtype={"customer_id": str})
    stamps = pd.to_datetime(events["timestamp"], format=WHEN, errors="coerce")
    events["day"] = (stamps - pd.Timestamp(0)).dt.days
    events["cents"] = (pd.to_numeric(events["amount"], errors="coerce") * 100).round()
    events = events.dropna(subset=["customer_id", "day", "cents"])
    return events.astype({"day": "int64", "cents": "int64"})


def pandas_rfm(events: Any, cutoff: int) -> Any:
    """A row a customer, in the order of the ids; a day that refunds took whole does not count."""
    kept = events[events["day"] <= cutoff]
    days = kept.groupby(["customer_id", "day"])["cents"].agg(["sum", "min"]).reset_index()
    days = days[(days["sum"] > 0) | (days["min"] >= 0)]
    found = days.groupby("customer_id").agg(
        bought=("day", "size"),
        first=("day", "min"),
        last=("day", "max"),
        first_cents=("sum", "first"),
        cents=("sum", "sum"),
    )
    found["frequency"] = found["bought"] - 1
    found["recency"] = found["last"] - found["first"]
    found["age"] = cutoff - found["first"]
    return found.reset_index()[COLUMNS]


def polars_read(path: Path) -> Any:
    """As `pandas_read`; nothing is read before somebody collects it."""
    import polars as pl

    stamp = pl.col("timestamp").str.to_datetime(WHEN, strict=False)
    amount = pl.col("amount").cast(pl.Float64, strict=False)
    return (
        pl.scan_csv(path, infer_schema=False)
        .with_columns(
            day=stamp.dt.date().cast(pl.Int32).cast(pl.Int64),
            cents=(amount * 100).round().cast(pl.Int64),
        )
        .drop_nulls(["customer_id", "day", "cents"])
    )


def polars_rfm(events: Any, cutoff: int) -> Any:
    """As `pandas_rfm`, on the streaming engine, which is the faster one here."""
    import polars as pl

    day, net = pl.col("day"), pl.col("net")
    days = (
        events.filter(day <= cutoff)
        .group_by("customer_id", "day")
        .agg(net=pl.col("cents").sum(), least=pl.col("cents").min())
        .filter((net > 0) | (pl.col("least") >= 0))
    )
    found = days.group_by("customer_id").agg(
        frequency=pl.len().cast(pl.Int64) - 1,
        recency=day.max() - day.min(),
        age=cutoff - day.min(),
        first_cents=net.min_by("day"),
        cents=net.sum(),
    )
    return found.sort("customer_id").collect(engine="streaming")


def recall(best: Any, later: Any) -> float:
    """Share of what was bought `later` (rows, items), as far as there is room in `best`, in it."""
    found = np.take_along_axis(later.toarray() > 0, best, axis=1).sum(1)
    return float((found / np.minimum(later.getnnz(1), best.shape[1])).mean())


# ── Data ────────────────────────────────────────────────────────────────────────────


def buyers(parameters: tuple[float, ...], count: int, rng: Any) -> tuple[Any, Any, Any]:
    """x, and t_x and T in whole days, of customers exactly as BG/NBD has them, but for t_x, which
    is rounded up."""
    r, alpha, a, b = parameters
    age = rng.integers(7, DAYS, count)
    arrivals = rng.poisson(rng.gamma(r, 1 / alpha, count) * age / 7)
    x = np.minimum(arrivals, rng.geometric(np.maximum(rng.beta(a, b, count), 1e-12)))
    # the x-th of so many uniform times
    share = rng.beta(np.maximum(x, 1), np.maximum(arrivals - x, 0) + 1)
    return x, np.where(x > 0, np.ceil(share * age), 0).astype(np.int64), age


def mean_spends(x: Any, parameters: tuple[float, ...], rng: Any) -> Any:
    """Of x purchases each, as Gamma-Gamma has them; their sums are whole cents."""
    p, q, v = parameters
    sums = rng.gamma(p * x, 1 / rng.gamma(q, 1 / v, len(x)))
    return np.maximum(1, np.rint(sums * 100)) / 100 / x


def orders(customers: int, lines: int, rng: Any) -> dict[str, Any]:
    """Who, on which day, for how many cents, in the order of the days; 3 % are refunds."""
    first = rng.integers(0, DAYS, customers)
    stays = np.minimum(rng.exponential(200, customers), DAYS - first)
    weight = rng.gamma(0.5, size=customers) * stays
    count = 1 + rng.multinomial(int(lines / 1.75) - customers, weight / weight.sum())
    who = np.repeat(np.arange(customers), count)
    day = FIRST + (first[who] + rng.random(len(who)) * stays[who]).astype(np.int64)
    in_time, each = np.argsort(day, kind="stable"), 1 + rng.poisson(0.8, len(who))
    who, day = (np.repeat(column[in_time], each)[:lines] for column in (who, day))
    cents = np.maximum(1, rng.lognormal(np.log(2_000), 0.5, lines)).astype(np.int64)
    cents[rng.random(lines) < 0.03] *= -1
    return {"who": who, "day": day, "cents": cents}


def text_ids(numbers: Any) -> Any:
    """As SQL's printf('c%07d') makes them."""
    return np.array([f"c{number:07}" for number in numbers], object)


def rfm_by_numpy(who: Any, day: Any, cents: Any, cutoff: int) -> list[Any]:
    """In the order of COLUMNS: sorted, and cut where a day or a customer begins."""
    keys, cents = (who * SPAN + day)[day <= cutoff], cents[day <= cutoff]
    in_order = np.argsort(keys, kind="stable")
    keys, cents = keys[in_order], cents[in_order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    net, least = np.add.reduceat(cents, starts), np.minimum.reduceat(cents, starts)
    bought = (net > 0) | (least >= 0)
    net, (who, day) = net[bought], np.divmod(keys[starts[bought]], SPAN)
    starts = np.flatnonzero(np.diff(who, prepend=-1))
    ends = np.append(starts[1:], len(who))
    first, last = day[starts], day[ends - 1]
    ids, total = text_ids(who[starts]), np.add.reduceat(net, starts)
    return [ids, ends - starts - 1, last - first, cutoff - first, net[starts], total]


def shelves(customers: int, items: int, count: int, rng: Any) -> tuple[Any, Any]:
    """Who bought what (customers, items), and what else later; half from a shelf that one likes."""
    from scipy import sparse

    who, shelf = rng.integers(0, customers, count), rng.integers(0, items // 100, customers)
    liked = shelf[who] * 100 + np.minimum(rng.zipf(1.5, count), 100) - 1
    any_item = np.minimum(rng.zipf(1.3, count), items) - 1
    what, is_later = np.where(rng.random(count) < 0.5, liked, any_item), rng.random(count) < 0.1

    def matrix(rows: Any) -> Any:
        pairs = np.ones(rows.sum(), np.float32), (who[rows], what[rows])
        bought = sparse.csr_matrix(pairs, (customers, items))
        bought.data[:] = 1
        return bought

    before = matrix(~is_later)
    return before, matrix(np.ones(count, bool)) - before
