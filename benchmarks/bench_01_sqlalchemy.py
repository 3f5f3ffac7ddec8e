"""Benchmark of 01_sqlalchemy_advanced.py on PostgreSQL: its ways against limits and peers.

Run:
  python servers.py run -- python benchmarks/bench_01_sqlalchemy.py

Every way's answer is checked in every round: loads, pages, address books and the repository
against the generated values, the transfer against a bare COPY of them, SQL analytics against the
fold in Python.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from harness import Line, Side, check, faster, measure, run_bench, slower
from psycopg2.extras import execute_values
from sqlalchemy.orm import Session

import config

script = importlib.import_module("01_sqlalchemy_advanced")

Row = dict[str, Any]

BULK_ROWS = 50_000  # the size
FEWER_ROWS = {  # all of BULK_ROWS would take these ways minutes; times are compared per row
    "session.add_all": 10_000,
    "executemany": 2_000,  # one round trip a row
}
EXECUTE_VALUES_PAGE = 1_000  # rows a statement, as many as SQLAlchemy sends
N_PLUS_ONE_USERS = (500, 2_000)
PAGED_ORDERS, PAGE_ROWS = 200_000, 20
TRANSFER_USERS = 5_000  # some 40,000 rows
REPOSITORY_USERS = 300  # added in one unit of work
ANALYTICS_USERS = 20_000
QUICK_ROUNDS = 15  # for what takes milliseconds, where one disturbance weighs more

INSERT_ORDER = "INSERT INTO orders (user_id, placed_at, amount) VALUES "

# ── Data and their fingerprints ─────────────────────────────────────────────────────


def sample_orders(count: int, users: int) -> list[Row]:
    """Orders whose times have microseconds and whose amounts have cents."""
    step = timedelta(seconds=60, microseconds=1)
    return [
        {
            "user_id": i % users + 1,
            "placed_at": script.FIRST_DAY + i * step,
            "amount": Decimal(i + 1) / 100,
        }
        for i in range(count)
    ]


def copy_buffer(rows: Sequence[Row]) -> str:
    """What COPY reads. The data hold nothing to escape, so this is the shortest way."""
    cells = ("\t".join(r"\N" if v is None else str(v) for v in row.values()) for row in rows)
    return "\n".join(cells)


def bare_copy(connection: sa.Connection, table: str, columns: Sequence[str], text: str) -> None:
    cursor: Any = connection.connection.cursor()
    cursor.copy_expert(f"COPY {table} ({', '.join(columns)}) FROM STDIN", io.StringIO(text))


def orders_fingerprint(rows: Sequence[Row]) -> tuple[int, str]:
    """(rows, MD5 of user, microsecond and cents), to compare with `ORDERS_FINGERPRINT`."""
    epoch = datetime.fromtimestamp(0, script.UTC)
    parts = [
        f"{row['user_id']} {(row['placed_at'] - epoch) // timedelta(microseconds=1)} "
        f"{int(row['amount'] * 100)}"
        for row in rows
    ]
    return len(rows), hashlib.md5(",".join(parts).encode(), usedforsecurity=False).hexdigest()


ORDERS_FINGERPRINT = sa.text("""
    SELECT count(*), md5(string_agg(user_id || ' ' ||
        (extract(epoch FROM placed_at) * 1000000)::bigint || ' ' || (amount * 100)::bigint,
        ',' ORDER BY placed_at))
    FROM orders""")

# ── Bulk load ───────────────────────────────────────────────────────────────────────


def bulk_load(workspace: Any) -> Iterator[Line]:
    users = script.DEFAULT_USERS
    engine = workspace.create(users)
    rows = sample_orders(BULK_ROWS, users)
    values = [tuple(row.values()) for row in rows]
    buffer = copy_buffer(rows)
    expected = {size: orders_fingerprint(rows[:size]) for size in (BULK_ROWS, *FEWER_ROWS.values())}
    session = Session(engine)

    def empty() -> None:
        session.execute(sa.text("TRUNCATE orders"))

    def verify(name: str, _answer: object) -> None:
        found = tuple(session.execute(ORDERS_FINGERPRINT).one())
        check(name, found, expected[FEWER_ROWS.get(name, BULK_ROWS)])
        session.rollback()  # of the TRUNCATE too: every run finds a new, empty table

    def cursor() -> Any:
        return session.connection().connection.cursor()

    ways: dict[str, Callable[[], object]] = {
        name: partial(load, session, rows[: FEWER_ROWS.get(name, BULK_ROWS)])
        for name, load in script.LOADERS.items()
    }
    ways["bare COPY"] = lambda: bare_copy(session.connection(), "orders", list(rows[0]), buffer)
    ways["execute_values"] = lambda: execute_values(
        cursor(), INSERT_ORDER + "%s", values, page_size=EXECUTE_VALUES_PAGE
    )
    ways["executemany"] = lambda: cursor().executemany(
        INSERT_ORDER + "(%s, %s, %s)", values[: FEWER_ROWS["executemany"]]
    )
    with session:
        seconds = measure(ways, before=empty, after=verify)

    def side(name: str, label: str) -> Side:
        return Side(label, seconds[name], FEWER_ROWS.get(name, BULK_ROWS), "rows")

    copy = side("COPY", "copy_rows")
    core = side("Core insert(Order)", "Core insert()")
    execute_values_ = side("execute_values", "execute_values")
    yield slower("bulk load", core, copy, at_most=5)
    yield slower("bulk load", side("ORM insert(Order)", "ORM insert()"), copy, at_most=8)
    yield slower("bulk load", side("session.add_all", "add_all"), copy)
    yield slower("bulk load, limit", copy, side("bare COPY", "bare COPY"))
    yield faster("bulk load, peer", copy, execute_values_)
    yield faster("bulk load, peer", copy, side("executemany", "executemany"))
    yield faster("bulk load, peer", core, execute_values_)


# ── N+1 ─────────────────────────────────────────────────────────────────────────────


def expected_address_book(users: int) -> list[tuple[Any, ...]]:
    """`address_book`, from the generator instead of the database."""
    countries, cities = script.places()
    country = {row["code"]: row["name"] for row in countries}
    place = {row["id"]: (row["name"], country[row["country_code"]]) for row in cities}
    return [
        (user["email"], *sorted((row["kind"], *place[row["city_id"]]) for row in addresses))
        for user, addresses, _orders in script.people(users)
    ]


def n_plus_one(workspace: Any) -> Iterator[Line]:
    for users in N_PLUS_ONE_USERS:
        engine = workspace.create(users)
        expected = expected_address_book(users)

        def load(strategy: str, engine: sa.Engine = engine, users: int = users) -> object:
            with Session(engine) as session:
                return script.address_book(session, strategy, users)

        def verify(name: str, answer: object, expected: object = expected) -> None:
            check(name, answer, expected)

        strategies = [name for name in script.STRATEGIES if name != "raiseload"]
        seconds = measure({name: partial(load, name) for name in strategies}, after=verify)
        lazy = Side("lazy", seconds.pop("lazy"))
        for name, samples in seconds.items():
            yield faster(f"N+1: {users:,} users", Side(name, samples), lazy, at_least=6)


# ── Paging ──────────────────────────────────────────────────────────────────────────


def paging(workspace: Any) -> Iterator[Line]:
    users = script.DEFAULT_USERS
    engine = workspace.create(users)
    rows = sample_orders(PAGED_ORDERS, users)
    with engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE orders RESTART IDENTITY"))
        script.copy_rows(connection, script.Order, rows)
        connection.execute(sa.text("ANALYZE orders"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM orders"))  # as on any table that is not brand-new
    keys = [(row["placed_at"], number) for number, row in enumerate(rows, 1)]
    with Session(engine) as session:
        for percent in (10, 50, 90):
            start = PAGED_ORDERS * percent // 100
            statements = {
                "keyset": script.keyset_page(keys[start - 1], PAGE_ROWS),
                "OFFSET": script.offset_page(start // PAGE_ROWS, PAGE_ROWS),
            }

            def page(statement: Any) -> list[tuple[Any, ...]]:
                return [tuple(row) for row in session.execute(statement)]

            def verify(name: str, answer: object, start: int = start) -> None:
                check(name, answer, keys[start : start + PAGE_ROWS])

            ways = {name: partial(page, statement) for name, statement in statements.items()}
            seconds = measure(ways, after=verify, rounds=QUICK_ROUNDS)
            ours, other = (Side(name, seconds[name]) for name in ways)
            yield faster(f"page at {percent} % depth", ours, other)


# ── Transfer ────────────────────────────────────────────────────────────────────────


def fingerprints(engine: sa.Engine) -> dict[str, tuple[Any, ...]]:
    """(rows, MD5 of them all as PostgreSQL writes them) of each table."""
    with engine.connect() as connection:
        return {
            model.__tablename__: tuple(
                connection.execute(
                    sa.text(
                        "SELECT count(*), md5(string_agg(t::text, ',' ORDER BY t))"
                        f" FROM {model.__tablename__} t"
                    )
                ).one()
            )
            for model in script.MODELS
        }


def transfer(workspace: Any, directory: Path) -> Iterator[Line]:
    source = script.Workspace(directory, None, 0).create(TRANSFER_USERS)
    target = workspace.create()
    countries, cities = script.places()
    people = list(script.people(TRANSFER_USERS))
    tables: dict[str, list[Row]] = {
        "countries": countries,
        "cities": cities,
        "users": [user for user, _, _ in people],
        "addresses": [row for _, rows, _ in people for row in rows],
        "orders": [row for _, _, rows in people for row in rows],
    }
    buffers = {name: (list(rows[0]), copy_buffer(rows)) for name, rows in tables.items()}
    total = sum(map(len, tables.values()))

    def empty() -> None:
        with target.begin() as connection:
            connection.execute(sa.text("TRUNCATE countries, users CASCADE"))

    def copy_all() -> int:
        with target.begin() as connection:
            for name, (columns, text) in buffers.items():
                bare_copy(connection, name, columns, text)
        return total

    empty()
    copy_all()
    expected = fingerprints(target)

    def verify(name: str, answer: object) -> None:
        check(name, (answer, fingerprints(target)), (total, expected))

    ways: dict[str, Callable[[], object]] = {
        "transfer": lambda: script.transfer(source, target),
        "bare COPY": copy_all,
    }
    seconds = measure(ways, before=empty, after=verify)
    source.dispose()
    ours, limit = (Side(name, seconds[name], total, "rows") for name in ways)
    yield slower("SQLite → PostgreSQL, limit", ours, limit)


# ── Repository ──────────────────────────────────────────────────────────────────────


def repository(workspace: Any) -> Iterator[Line]:
    engine = workspace.create()
    persons = [script.Person(f"p{i}@example.com", f"Person {i}") for i in range(REPOSITORY_USERS)]
    expected = sorted((person.email, person.full_name) for person in persons)

    def empty() -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE users CASCADE"))

    def verify(name: str, _answer: object) -> None:
        with engine.connect() as connection:
            users = connection.execute(sa.text("SELECT email, full_name FROM users"))
            check(name, sorted(tuple(user) for user in users), expected)

    def by_repository(method: str) -> None:
        with script.UnitOfWork(engine) as work:
            for person in persons:
                getattr(work.users, method)(person)
            work.commit()

    def by_core() -> None:
        with engine.begin() as connection:
            for person in persons:
                connection.execute(sa.insert(script.User), vars(person))

    def by_core_in_savepoints() -> None:
        with engine.begin() as connection:
            for person in persons:
                with connection.begin_nested():
                    connection.execute(sa.insert(script.User), vars(person))

    ways: dict[str, Callable[[], object]] = {
        "add": partial(by_repository, "add"),
        "save": partial(by_repository, "save"),
        "Core": by_core,
        "Core, savepoints": by_core_in_savepoints,
    }
    seconds = measure(ways, before=empty, after=verify)
    add, save, core, nested = (Side(name, seconds[name], len(persons), "users") for name in ways)
    for ours in (add, save):
        yield slower("repository, limit", ours, core)
        yield slower("repository, same safety", ours, nested)


# ── Analytics ───────────────────────────────────────────────────────────────────────


def rounded(answer: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Kilometres to the millimetre, since the two ways compute them by different formulas."""
    return [[round(c, 6) if isinstance(c, float) else c for c in row] for row in answer]


def analytics(workspace: Any) -> Iterator[Line]:
    engine = workspace.create(ANALYTICS_USERS)
    with Session(engine) as session:
        for question, (ask, fold) in script.QUESTIONS.items():
            expected = rounded(fold(session))

            def verify(name: str, answer: Any, expected: object = expected) -> None:
                check(name, rounded(answer), expected)

            ways = {"SQL": partial(ask, session), "Python": partial(fold, session)}
            seconds = measure(ways, after=verify)
            ours, other = (Side(name, seconds[name]) for name in ways)
            yield faster(question, ours, other)


# ── Main ────────────────────────────────────────────────────────────────────────────


def measures(settings: config.Settings) -> tuple[dict[str, str], list[Line]]:
    """All lines, in throw-away schemas that are dropped at the end, also after an error."""
    url, timeout_s = settings.database_url, settings.connect_timeout_s
    server = f"PostgreSQL {script.server_version(url, timeout_s)}"
    with tempfile.TemporaryDirectory(prefix="bench-01-") as name, ExitStack() as stack:
        workspace = script.Workspace(Path(name), url, timeout_s)
        stack.callback(workspace.close)
        lines = [
            *bulk_load(workspace),
            *n_plus_one(workspace),
            *paging(workspace),
            *transfer(workspace, Path(name)),
            *repository(workspace),
            *analytics(workspace),
        ]
    sizes = {
        "bulk load": f"{BULK_ROWS:,} orders; "
        + ", ".join(f"{name} {rows:,}" for name, rows in FEWER_ROWS.items()),
        "paging": f"pages of {PAGE_ROWS} in {PAGED_ORDERS:,} orders",
        "repository": f"{REPOSITORY_USERS} users in one transaction",
        "transfer": f"{TRANSFER_USERS:,} users and what belongs to them",
        "analytics": f"{ANALYTICS_USERS:,} users",
    }
    return {"server": server, **sizes}, lines


def main() -> int:
    packages = ("sqlalchemy", "psycopg2-binary")
    return run_bench(__doc__ or "", ("DATABASE_URL",), packages, measures)


if __name__ == "__main__":
    raise SystemExit(main())
