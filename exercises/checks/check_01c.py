"""Lets a rival reserve and commit right before the first UPDATE: the interleaving is certain.

Refused: reading again just before the write, which makes the window smaller; `SELECT … FOR
UPDATE`, which SQLite does not know; arithmetic in SQL without the condition, which goes below
zero; a commit between the stock and the promise; an UPDATE of all products.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from checks import Wrong

OTHER = 5  # in stock of product 2, of which nobody reserves


@contextmanager
def database(exercise: ModuleType, stock: int) -> Iterator[sa.Engine]:
    """Two products. The driver begins no transaction before a SELECT: READ COMMITTED, in effect."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "shop.sqlite"
        # Who begins by a lock makes the rival wait: not for long, it is the same thread.
        engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0.05})
        exercise.Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(exercise.Product(id=1, stock=stock))
            session.add(exercise.Product(id=2, stock=OTHER))
            session.commit()
        try:
            yield engine
        finally:
            engine.dispose()


def reserve_both(exercise: ModuleType, engine: sa.Engine, quantities: dict[str, int]) -> list[bool]:
    """What Ann is told, and her rival Bob, who comes between her reading and her writing."""
    told: dict[str, bool] = {}
    came = False

    def bob() -> None:
        with Session(engine) as session:
            told["Bob"] = exercise.reserve(session, 1, "Bob", quantities["Bob"])

    def intrude(_link: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal came
        if statement.lstrip().upper().startswith("UPDATE") and not came:
            came = True
            with suppress(OperationalError):  # Ann has locked first
                bob()

    sa.event.listen(engine, "before_cursor_execute", intrude)
    with Session(engine) as session:
        told["Ann"] = exercise.reserve(session, 1, "Ann", quantities["Ann"])
    if "Bob" not in told:
        bob()
    return [told["Ann"], told["Bob"]]


def outcome(exercise: ModuleType, engine: sa.Engine) -> tuple[int, dict[str, int]]:
    """The stock, and what is promised to whom."""
    with Session(engine) as session:
        stock = session.get_one(exercise.Product, 1).stock
        rows = session.scalars(sa.select(exercise.Reservation)).all()
        promised: Counter[str] = Counter()
        for row in rows:
            promised[row.customer] += row.quantity
        return stock, dict(promised)


def if_killed(exercise: ModuleType, engine: sa.Engine) -> list[tuple[int, dict[str, int]]]:
    """The outcomes, had the process been killed before one of the statements from now on."""
    beside = sa.create_engine(engine.url, connect_args={"timeout": 0.05}, poolclass=sa.NullPool)
    found: list[tuple[int, dict[str, int]]] = []

    def look(*_: object) -> None:
        with suppress(OperationalError):  # all is locked
            found.append(outcome(exercise, beside))

    sa.event.listen(engine, "before_cursor_execute", look)
    return found


def check(exercise: ModuleType) -> None:
    with database(exercise, stock=10) as engine:
        on_the_way = if_killed(exercise, engine)
        told = reserve_both(exercise, engine, {"Ann": 3, "Bob": 4})
        found = outcome(exercise, engine)
        with Session(engine) as session:
            other = session.get_one(exercise.Product, 2).stock
    expected = 3, {"Ann": 3, "Bob": 4}
    call = "10 in stock: Ann reserves 3, and before her UPDATE Bob reserves 4"
    if told != [True, True] or found != expected:
        raise Wrong(call, says([True, True], *expected), says(told, *found))
    for stock, promised in on_the_way:
        if stock + sum(promised.values()) != 10:
            left = f"{stock} left, promised {promised}"
            raise Wrong(f"{call}; the process is killed", "10 in all, left or promised", left)
    if other != OTHER:
        raise Wrong(call, f"{OTHER} left of product 2, as before", f"{other} left of it")
    call = "1 in stock: Ann reserves it, and before her UPDATE so does Bob"
    with database(exercise, stock=1) as engine:
        try:
            told = reserve_both(exercise, engine, {"Ann": 1, "Bob": 1})
        except sa.exc.IntegrityError as error:
            raise Wrong(call, "True for one, False for the other", error.orig) from None
        stock, promised = outcome(exercise, engine)
    if sorted(told) != [False, True] or (stock, sum(promised.values())) != (0, 1):
        raise Wrong(call, "True for one, 0 left, 1 promised", says(told, stock, promised))
    with database(exercise, stock=2) as engine, Session(engine) as session:
        answer = exercise.reserve(session, 1, "Ann", 3)
        session.rollback()
        stock, promised = outcome(exercise, engine)
    if (answer, stock, promised) != (False, 2, {}):
        actual = f"{answer}, {stock} left, promised {promised}"
        raise Wrong("2 in stock: Ann reserves 3", "False, 2 left, promised {}", actual)


def says(told: list[bool], stock: int, promised: dict[str, int]) -> str:
    return f"told {told}, {stock} left, promised {dict(sorted(promised.items()))}"
