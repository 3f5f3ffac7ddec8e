"""What the tests of script 05 share: tables of transactions, what it reads of a file, CDNOW."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from services import load_script

ds = load_script("05_realworld_data_science")
threadpoolctl.threadpool_limits(1)  # two workers of pytest have two cores to share

Row = tuple[Any, ...]  # customer, day from 1970-01-01, cents, and, it may be, an item


def day(year: int, month: int, of_month: int) -> int:
    return (date(year, month, of_month) - date(1970, 1, 1)).days


def db_of(rows: Iterable[Row]) -> Any:
    """A database whose table `transactions` holds `rows`."""
    db = ds.connected()
    db.execute("CREATE TABLE transactions (customer_id TEXT, day BIGINT, cents BIGINT, item TEXT)")
    if columns := list(zip(*((*row, None)[:4] for row in rows), strict=True)):
        kinds = (object, np.int64, np.int64, object)
        held = {f"c{n}": np.array(columns[n], kind) for n, kind in enumerate(kinds)}  # noqa: F841
        db.execute("INSERT INTO transactions FROM held")
    return db


def load(path: Path | str, columns: Mapping[str, str] = {}, form: str = "") -> tuple[Any, Any]:
    """The rows that the script reads of a file, sorted, and their quality."""
    with ds.connected() as db, tempfile.TemporaryDirectory() as home:
        quality = ds.read_transactions(db, str(path), Path(home), columns, form)
        rows = db.execute("SELECT customer_id, day, cents, item FROM transactions").fetchall()
        return sorted(rows), quality


def cdnow(name: str = "CDNOW_sample.txt") -> list[Row]:
    """CDNOW's customers of 1997, a tenth or all, in the package lifetimes; not imported."""
    package = importlib.util.find_spec("lifetimes")
    assert package
    text = Path(str(package.origin)).with_name("datasets").joinpath(name).read_text()
    rows = (line.split()[-4:] for line in text.splitlines() if line.rstrip()[-1].isdigit())
    return [
        (name, day(int(at[:4]), int(at[4:6]), int(at[6:])), round(float(amount) * 100))
        for name, at, _, amount in rows
    ]
