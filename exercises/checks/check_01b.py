"""Imports a list with bad rows, and compares table and report after a commit and after a rollback.

One bad row is of a price that the table held before, which the list alone does not tell; one is
refused by a trigger, which no look at list and table tells.

Refused: a commit after each row, which takes the decision from the caller; one savepoint around
all rows; none at all, which SQLite forgives and PostgreSQL does not; `except Exception`, which
makes a lost connection a bad row.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InternalError, OperationalError
from sqlalchemy.orm import Session

from checks import Wrong

EARLIER = {"pipe": 690}
ROWS = [
    ("pipe", Decimal("7.20")),  # refused: PRIMARY KEY, of an earlier night
    ("tap", Decimal("19.90")),
    ("sink", Decimal("129.00")),
    ("boiler", Decimal("890.00")),  # refused: TRIGGER
    ("bath", Decimal("-1.00")),  # refused: CHECK
    ("hose", Decimal("7.50")),
    ("tap", Decimal("18.90")),  # refused: PRIMARY KEY
    ("plug", Decimal("2.10")),
]
GOOD = {"tap": 1_990, "sink": 12_900, "hose": 750, "plug": 210}  # cents, in the order of ROWS
ALL = dict(sorted((EARLIER | GOOD).items()))
BAD = {1: "pipe", 4: "boiler", 5: "bath", 7: "tap"}
TRIGGER = """CREATE TRIGGER boilers BEFORE INSERT ON prices WHEN NEW.sku = 'boiler'
BEGIN SELECT RAISE(ABORT, 'no longer sold'); END"""
CALL = f"import_prices(session, rows), with bad rows at lines {', '.join(map(str, BAD))}"


@contextmanager
def database(exercise: ModuleType) -> Iterator[sa.Engine]:
    """Of script 01: with the driver's own BEGIN, savepoints of SQLite mean less."""
    script = importlib.import_module("01_sqlalchemy_advanced")
    with tempfile.TemporaryDirectory() as home:
        engine = script.sqlite_engine(Path(home) / "prices.sqlite")
        exercise.Base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql(TRIGGER)
        aborts_as_postgresql(engine)
        try:
            yield engine
        finally:
            engine.dispose()


def imported(
    exercise: ModuleType, engine: sa.Engine, end: Callable[[Session], None]
) -> tuple[Any, dict[str, int], int]:
    """The report, the cents by SKU in the table, and the rows in `imports`, after `end`."""
    with Session(engine) as session, session.begin():
        session.add_all(exercise.Price(sku=sku, cents=cents) for sku, cents in EARLIER.items())
    with Session(engine) as session:
        session.add(exercise.Import(id=1, supplier="Watertight Ltd"))
        session.flush()
        report = exercise.import_prices(session, iter(ROWS))
        end(session)
    with Session(engine) as session:
        prices = session.scalars(sa.select(exercise.Price).order_by(exercise.Price.sku)).all()
        runs = session.scalars(sa.select(sa.func.count()).select_from(exercise.Import)).one()
        return report, {price.sku: price.cents for price in prices}, runs


def aborts_as_postgresql(engine: sa.Engine) -> None:
    """After an error nothing is done until a rollback, to a savepoint or of all."""
    aborted = False

    def set_to(value: bool) -> Callable[..., None]:
        def change(*_: object) -> None:
            nonlocal aborted
            aborted = value

        return change

    def refuse(_link: object, _cursor: object, statement: str, *_: object) -> None:
        if aborted and not statement.startswith("ROLLBACK"):
            raise InternalError(statement, {}, Exception("current transaction is aborted"))

    sa.event.listen(engine, "handle_error", set_to(True))
    sa.event.listen(engine, "rollback_savepoint", set_to(False))
    sa.event.listen(engine, "rollback", set_to(False))
    sa.event.listen(engine, "before_cursor_execute", refuse)


def fails_at(engine: sa.Engine, sku: str) -> None:
    """From now on the statement for this SKU meets a full disk."""

    @sa.event.listens_for(engine, "before_cursor_execute")
    def fail(_link: object, _cursor: object, statement: str, values: object, *_: object) -> None:
        if sku in str(values):
            raise OperationalError(statement, {}, Exception("database or disk is full"))


def check(exercise: ModuleType) -> None:
    with database(exercise) as engine:
        try:
            report, stored, runs = imported(exercise, engine, Session.commit)
        except (IntegrityError, InternalError) as error:
            expected = "a row's error caught, a rollback, then the next row"
            raise Wrong(CALL, expected, f"{error.orig}: {error.statement}") from None
    if stored != ALL:
        raise Wrong(f"{CALL}; commit", f"{ALL} in prices", f"{stored} in prices")
    if (report.stored, dict(report.rejected)) != (list(GOOD), BAD):
        raise Wrong(CALL, f"stored {list(GOOD)}, rejected {BAD}", report)
    if runs != 1:
        raise Wrong(f"{CALL}; commit", "1 row in imports, the caller's", f"{runs} rows")
    with database(exercise) as engine:
        _, stored, runs = imported(exercise, engine, Session.rollback)
    if stored != EARLIER or runs:
        actual = f"{stored} in prices, {runs} rows in imports"
        expected = f"{EARLIER} in prices, as before, 0 rows in imports"
        raise Wrong(f"{CALL}; rollback by the caller", expected, actual)
    with database(exercise) as engine, suppress(OperationalError):
        fails_at(engine, "plug")
        report, *_ = imported(exercise, engine, Session.commit)
        call = f"import_prices(session, rows), and the disk is full at line {len(ROWS)}"
        raise Wrong(call, "OperationalError", report)
