"""The answers of script 02's pipelines, folded over the documents in plain Python.

Each fold takes `rows`, by which `rows("orders")` gives the documents of a collection.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

from bson.decimal128 import create_decimal128_context

Document = dict[str, Any]
Rows = Callable[[str], Iterable[Document]]
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
RECENT = datetime(2025, 7, 1, tzinfo=UTC)
ORIGIN = datetime(2000, 1, 1, tzinfo=UTC)  # where $dateTrunc counts its bins from


def day_of(when: datetime) -> datetime:
    return when.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def paid(rows: Rows) -> Iterator[Document]:
    return (order for order in rows("orders") if order["status"] == "paid")


def summed(pairs: Iterable[tuple[Any, Decimal]]) -> dict[Any, Decimal]:
    totals: dict[Any, Decimal] = defaultdict(Decimal)
    for key, amount in pairs:
        totals[key] += amount
    return totals


def fold_revenue(rows: Rows) -> list[Document]:
    orders = list(paid(rows))
    lines = [line for order in orders for line in order["lines"]]
    by_country = summed((order["country"], order["total"]) for order in orders)
    by_category = summed((line["category"], line["price"] * line["quantity"]) for line in lines)

    def best(revenue: dict[str, Decimal]) -> list[Document]:
        pairs = sorted(revenue.items(), key=lambda pair: (-pair[1], pair[0]))
        return [{"_id": key, "revenue": amount} for key, amount in pairs[:3]]

    return [{"by_country": best(by_country), "by_category": best(by_category)}]


def fold_gold(rows: Rows) -> list[Document]:
    gold = {c["_id"]: c["name"] for c in rows("customers") if c["tier"] == "gold"}
    placed = [o for o in paid(rows) if o["placed_at"] >= RECENT and o["customer"]["_id"] in gold]
    spent = summed((o["customer"]["_id"], o["total"]) for o in placed)
    count = Counter(o["customer"]["_id"] for o in placed)
    best = sorted(spent, key=lambda key: (-spent[key], key))[:5]
    return [{"_id": k, "name": gold[k], "spent": spent[k], "orders": count[k]} for k in best]


def fold_days(rows: Rows) -> list[Document]:
    revenue = summed((day_of(o["placed_at"]), o["total"]) for o in paid(rows))
    above = Counter(revenue.values())
    answer = []
    with localcontext(create_decimal128_context()):
        for day, amount in revenue.items():
            week = [revenue[d] for d in (day - n * DAY for n in range(7)) if d in revenue]
            rank = 1 + sum(n for other, n in above.items() if other > amount)
            average = round(sum(week, Decimal(0)) / len(week), 2)
            answer.append({"_id": day, "revenue": amount, "average": average, "rank": rank})
    return sorted(answer, key=lambda row: (row["rank"], row["_id"]))[:5]


def fold_checkout(rows: Rows) -> list[Document]:
    hours: dict[datetime, list[float]] = defaultdict(list)
    for load in rows("page_loads"):
        if load["meta"]["page"] == "/checkout":
            hours[load["at"].replace(minute=0, second=0, microsecond=0)].append(load["ms"])
    mean = {hour: sum(values) / len(values) for hour, values in hours.items()}
    answer = {hour: {"_id": hour, "loads": len(hours[hour]), "ms": mean[hour]} for hour in hours}
    for start, end in itertools.pairwise(sorted(hours)):
        gap = (end - start) // HOUR
        for step in range(1, gap):
            ms = mean[start] + (mean[end] - mean[start]) * step / gap
            answer[start + step * HOUR] = {"_id": start + step * HOUR, "loads": 0, "ms": ms}
    return sorted(answer.values(), key=lambda row: (row["loads"], row["_id"]))


def fold_top(rows: Rows) -> list[Document]:
    spent = summed(((o["country"], o["customer"]["_id"]), o["total"]) for o in paid(rows))
    countries: dict[str, list[Document]] = defaultdict(list)
    for (country, key), amount in sorted(spent.items(), key=lambda item: (-item[1], item[0][1])):
        countries[country].append({"customer": key, "spent": amount})
    return [{"_id": country, "top": top[:3]} for country, top in sorted(countries.items())]


# The questions of the script's RECIPES
FOLDS: dict[str, Callable[[Rows], list[Document]]] = {
    "revenue, two ways": fold_revenue,
    "gold since July": fold_gold,
    "days, average, rank": fold_days,
    "checkout by hour": fold_checkout,
    "top 3 of a country": fold_top,
}


def fold_daily_revenue(rows: Rows) -> list[Document]:
    """The whole view `daily_revenue`, sorted, without the `run` of its rows."""
    orders = list(paid(rows))
    keys = [(day_of(order["placed_at"]), order["country"]) for order in orders]
    count, revenue = Counter(keys), summed(zip(keys, (o["total"] for o in orders), strict=True))
    return [
        {"_id": {"day": day, "country": country}, "orders": count[day, country],
         "revenue": revenue[day, country]}
        for day, country in sorted(count)
    ]  # fmt: skip


def fold_down_sampled(rows: Rows, hours: int) -> list[Document]:
    """Of the collection `page_loads`, as `down_sampled(hours)` sorts them."""
    size, bins = hours * HOUR, defaultdict[Any, list[float]](list)
    for load in rows("page_loads"):
        bins[load["meta"]["page"], ORIGIN + (load["at"] - ORIGIN) // size * size].append(load["ms"])
    mean = {key: sum(values) / len(values) for key, values in bins.items()}
    answer = []
    for (page, at), values in sorted(bins.items()):
        near = [mean[page, at - n * size] for n in range(3) if (page, at - n * size) in mean]
        answer.append({
            "_id": {"page": page, "at": at}, "loads": len(values), "mean_ms": mean[page, at],
            "max_ms": max(values), "smooth_ms": sum(near) / len(near),
        })  # fmt: skip
    return answer


def same(left: Any, right: Any) -> bool:
    """Equal; floats to nine digits, since sums of floats depend on their order."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)
    return bool(left == right)
