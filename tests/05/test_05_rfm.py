"""Script 05's features: DuckDB against plain Python; the other engines against DuckDB."""

from __future__ import annotations

import importlib.util
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import missing
from script05 import Row, db_of, ds
from services import postgres_engine

Features = dict[str, tuple[int, ...]]  # customer → frequency, recency, T, cents of day one, cents
CUTOFF = 20_000


def oracle(rows: Iterable[Row], cutoff: int) -> Features:
    """A day is a purchase unless refunds took all of it."""
    orders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, day, cents, *_ in rows:
        if day <= cutoff:
            orders[name][day].append(cents)
    found = {}
    for name, days in orders.items():
        bought = {day: sum(all_) for day, all_ in days.items() if sum(all_) > 0 or min(all_) >= 0}
        if bought:
            first, last, money = min(bought), max(bought), sum(bought.values())
            found[name] = (len(bought) - 1, last - first, cutoff - first, bought[first], money)
    return found


def features(found: Any) -> Features:
    names = ("x", "t_x", "T", "first_cents", "cents")
    ids, *columns = (getattr(found, name).tolist() for name in ("ids", *names))
    assert ids == sorted(ids)
    return dict(zip(ids, zip(*columns, strict=True), strict=True))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(10, 100), (10, 200)], (0, 0, 20, 300, 300)),  # lifetimes #91
        ([(20, 5), (10, 3), (15, 4)], (2, 10, 20, 3, 12)),  # lifetimes #85
        ([(10, 1), (10, 2), (10, 4), (12, 8)], (1, 2, 20, 7, 15)),  # lifetimes #56, #344
        ([(10, 1), (12, 2), (12, 4), (12, 8)], (1, 2, 20, 1, 15)),  # lifetimes #208, #447
        ([(10, 0)], (0, 0, 20, 0, 0)), ([(10, 5), (12, 0)], (1, 2, 20, 5, 5)),
        ([(10, 5), (12, 9), (12, -9)], (0, 0, 20, 5, 5)),
        ([(10, 5), (12, 9), (12, -4)], (1, 2, 20, 5, 10)),
        ([(10, 5), (10, -6), (12, 9)], (0, 0, 18, 9, 9)), ([(10, 5), (31, 9)], (0, 0, 20, 5, 5)),
        ([(10, 5), (30, 9)], (1, 20, 20, 5, 14)), ([(-9, 7), (-2, 8)], (1, 7, 39, 7, 15)),
    ],
    ids=repr,
)  # fmt: skip
def test_features_of_one_customer(rows: list[tuple[int, int]], expected: tuple[int, ...]) -> None:
    with db_of([("a", *row) for row in rows]) as db:
        found = ds.rfm(db, 30)
    assert features(found) == {"a": expected}
    repeated = (expected[4] - expected[3]) / 100
    assert found.mean_money() == pytest.approx([repeated / max(1, expected[0])])


days, amounts = st.integers(0, 9), st.integers(-9, 9)


@settings(deadline=None, database=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["a", "b", "B", "é"]), days, amounts), max_size=25),
    cutoff=days,
)
def test_features_equal_those_in_plain_python(rows: list[Row], cutoff: int) -> None:
    with db_of(rows) as db:
        assert features(ds.rfm(db, cutoff)) == oracle(rows, cutoff)


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, Features]:
    """A file as the script gives it to the engines, and the features in it."""
    draw, path = random.Random(5), tmp_path / "transactions.csv"
    names = ["007", "7", "é", "O'Neil", 'say "hi"', "a,b", "a;b", "back\\slash", "=cmd()", "NULL"]
    names += [f"c{n}" for n in range(400)]
    rows = [
        (draw.choice(names), CUTOFF + draw.randint(-60, 20), draw.randint(-20, 60) * 50)
        for _ in range(6000)
    ]
    select = "SELECT customer_id, day, cents FROM transactions"
    with db_of(rows) as db:
        db.execute(f"COPY ({select}) TO '{path}' (HEADER false)")
        found = features(ds.rfm(db, CUTOFF))
    assert found == oracle(rows, CUTOFF)
    return path, found


@pytest.mark.parametrize("engine", ["postgres", "mongo"])
def test_other_engines_compute_the_same(
    engine: str, shared: tuple[Path, Features], request: pytest.FixtureRequest
) -> None:
    compute, fixture = {
        "postgres": (
            lambda url, *args: ds.rfm_postgresql(postgres_engine(url), *args),
            "postgres_url",
        ),
        "mongo": (ds.rfm_mongodb, "mongo_database"),
    }[engine]
    server, (path, expected) = request.getfixturevalue(fixture), shared
    for _ in range(2):  # nothing is left of the first time
        assert features(compute(server, path, CUTOFF)) == expected


@pytest.mark.slow
def test_spark_computes_the_same(shared: tuple[Path, Features], tmp_path: Path) -> None:
    if not (importlib.util.find_spec("pyspark") and shutil.which("java")):
        missing("requirements/spark.txt is not installed, or no java")
    from pyspark.sql import SparkSession

    options = {"spark.ui.enabled": "false", "spark.sql.warehouse.dir": str(tmp_path)}
    options |= {"spark.driver.host": "127.0.0.1", "spark.sql.shuffle.partitions": "1"}
    path, expected = shared
    with SparkSession.builder.master("local[1]").config(map=options).getOrCreate() as spark:
        table = spark.read.csv(
            str(path), "customer_id string, day bigint, cents bigint", escape='"'
        )
        table.createOrReplaceTempView("transactions")
        rows = map(tuple, spark.sql(ds.rfm_sql(CUTOFF)).collect())
        assert features(ds.Rfm.of(rows)) == expected
