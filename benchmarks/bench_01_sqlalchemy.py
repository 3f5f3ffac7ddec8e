"""Benchmark of 01_sqlalchemy_advanced.py on PostgreSQL: its ways against limits and peers.

Run:
  python servers.py run -- python benchmarks/bench_01_sqlalchemy.py

Every way's answer is checked in every round: loads, transfer, pages, address books and the
repository against the generated values, SQL analytics against a fold in Python.
"""

from __future__ import annotations

import importlib
import io
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from decimal import Decimal
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from harness import Line, Side, check, faster, measure, run_bench, slower
from psycopg2.extras import execute_values
from sqlalchemy.orm import Session

import config

script = importlib.import_module("01_sqlalchemy_advanced")

Row = dict[str, Any]
Answer = list[tuple[Any, ...]]

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

# ── Data ────────────────────────────────────────────────────────────────────────────


def sample_orders(count: int, users: int) -> list[Row]:
    """Orders whose times have microseconds and whose amounts have cents."""
    start, step = script.FIRST_DAY, timedelta(seconds=60, microseconds=1)
    return [
        {"user_id": i % users + 1, "placed_at": start + i * step, "amount": Decimal(i + 1) / 100}
        for i in range(count)
    ]


def copy_buffer(rows: Sequence[Row]) -> str:
    """What COPY reads. The data hold nothing to escape, so this is the shortest way."""
    cells = ("\t".join(r"\N" if v is None else str(v) for v in row.values()) for row in rows)
    return "\n".join(cells)


def bare_copy(connection: sa.Connection, table: str, columns: Sequence[str], text: str) -> None:
    cursor: Any = connection.connection.cursor()
    cursor.copy_expert(f"COPY {table} ({', '.join(columns)}) FROM STDIN", io.StringIO(text))


def empty(engine: sa.Engine, tables: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(f"TRUNCATE {tables} RESTART IDENTITY CASCADE"))


def fetch(session: Session, query: sa.Executable) -> Answer:
    return [tuple(row) for row in session.execute(query)]


def check_table(name: str, connection: sa.Connection, table: str, rows: Sequence[Row]) -> None:
    """That a table holds `rows`, as the driver reads it, past the script's column types."""
    stored = connection.execute(sa.text(f"SELECT {', '.join(rows[0])} FROM {table}"))
    expected = sorted(tuple(row.values()) for row in rows)
    check(f"{name}: {table}", sorted(tuple(row) for row in stored), expected)


# ── Bulk load ───────────────────────────────────────────────────────────────────────


def bulk_load(workspace: Any) -> Iterator[Line]:
    users = script.DEFAULT_USERS
    engine = workspace.create(users)
    rows = sample_orders(BULK_ROWS, users)
    values = [tuple(row.values()) for row in rows]
    buffer = copy_buffer(rows)
    session = Session(engine)

    def size(name: str) -> int:
        return FEWER_ROWS.get(name, BULK_ROWS)

    def verify(name: str, _answer: object) -> None:
        check_table(name, session.connection(), "orders", rows[: size(name)])
        session.rollback()

    def cursor() -> Any:
        return session.connection().connection.cursor()

    ways: dict[str, Callable[[], object]] = {
        name: partial(load, session, rows[: size(name)]) for name, load in script.LOADERS.items()
    }
    ways["bare COPY"] = lambda: bare_copy(session.connection(), "orders", list(rows[0]), buffer)
    ways["execute_values"] = lambda: execute_values(
        cursor(), INSERT_ORDER + "%s", values, page_size=EXECUTE_VALUES_PAGE
    )
    ways["executemany"] = lambda: cursor().executemany(
        INSERT_ORDER + "(%s, %s, %s)", values[: size("executemany")]
    )
    with session:
        seconds = measure(ways, before=partial(empty, engine, "orders"), after=verify)

    def side(name: str, label: str) -> Side:
        return Side(label, seconds[name], size(name), "rows")

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


def expected_address_book(users: int) -> Answer:
    """`address_book`, from the generator instead of the database."""
    countries, cities = script.places()
    country = {row["code"]: row["name"] for row in countries}
    place = {row["id"]: (row["name"], country[row["country_code"]]) for row in cities}
    return [
        (user["email"], *sorted((row["kind"], *place[row["city_id"]]) for row in addresses))
        for user, addresses, _orders in script.people(users)
    ]


def address_book(engine: sa.Engine, strategy: str, users: int) -> Answer:
    with Session(engine) as session:  # a new one: its identity map is empty
        return list(script.address_book(session, strategy, users))


def n_plus_one(workspace: Any) -> Iterator[Line]:
    strategies = [name for name in script.STRATEGIES if name != "raiseload"]
    for users in N_PLUS_ONE_USERS:
        engine = workspace.create(users)
        ways = {name: partial(address_book, engine, name, users) for name in strategies}
        expected = expected_address_book(users)
        seconds = measure(ways, after=partial(check, expected=expected))
        lazy = Side("lazy", seconds.pop("lazy"))
        for name, samples in seconds.items():
            yield faster(f"N+1: {users:,} users", Side(name, samples), lazy, at_least=6)


# ── Paging ──────────────────────────────────────────────────────────────────────────


def paging(workspace: Any) -> Iterator[Line]:
    users = script.DEFAULT_USERS
    engine = workspace.create(users)
    rows = sample_orders(PAGED_ORDERS, users)
    empty(engine, "orders")
    with engine.begin() as connection:
        script.copy_rows(connection, script.Order, rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE orders"))  # as autovacuum does in time
    keys = [(row["placed_at"], number) for number, row in enumerate(rows, 1)]
    with Session(engine) as session:
        for percent in (10, 50, 90):
            start = PAGED_ORDERS * percent // 100
            keyset = script.keyset_page(keys[start - 1], PAGE_ROWS)
            offset = script.offset_page(start // PAGE_ROWS, PAGE_ROWS)
            pages = {"keyset": keyset, "OFFSET": offset}
            ways = {name: partial(fetch, session, page) for name, page in pages.items()}
            verify = partial(check, expected=keys[start : start + PAGE_ROWS])
            seconds = measure(ways, after=verify, rounds=QUICK_ROUNDS)
            ours, other = (Side(name, seconds[name]) for name in ways)
            yield faster(f"page at {percent} % depth", ours, other)


# ── Transfer ────────────────────────────────────────────────────────────────────────


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

    def copy_all() -> int:
        with target.begin() as connection:
            for name, (columns, text) in buffers.items():
                bare_copy(connection, name, columns, text)
        return total

    def verify(name: str, answer: object) -> None:
        check(name, answer, total)
        with target.connect() as connection:
            for table, rows in tables.items():
                check_table(name, connection, table, rows)

    ways: dict[str, Callable[[], object]] = {
        "transfer": lambda: script.transfer(source, target),
        "bare COPY": copy_all,
    }
    seconds = measure(ways, before=partial(empty, target, "countries, users"), after=verify)
    source.dispose()
    ours, limit = (Side(name, seconds[name], total, "rows") for name in ways)
    yield slower("SQLite → PostgreSQL, limit", ours, limit)


# ── Repository ──────────────────────────────────────────────────────────────────────


def repository(workspace: Any) -> Iterator[Line]:
    engine = workspace.create()
    persons = [script.Person(f"p{i}@example.com", f"Person {i}") for i in range(REPOSITORY_USERS)]

    def verify(name: str, _answer: object) -> None:
        with engine.connect() as connection:
            check_table(name, connection, "users", [vars(person) for person in persons])

    def by_repository(method: str) -> None:
        with Session(engine) as session, session.begin():
            write = getattr(script.UserRepository(session), method)
            for person in persons:
                write(person)

    def by_core(guard: Callable[[sa.Connection], AbstractContextManager[object]]) -> None:
        with engine.begin() as connection:
            for person in persons:
                with guard(connection):
                    connection.execute(sa.insert(script.User), vars(person))

    ways: dict[str, Callable[[], object]] = {
        "add": partial(by_repository, "add"),
        "save": partial(by_repository, "save"),
        "Core": partial(by_core, nullcontext),
        "Core, savepoints": partial(by_core, sa.Connection.begin_nested),
    }
    seconds = measure(ways, before=partial(empty, engine, "users"), after=verify)
    add, save, core, nested = (Side(name, seconds[name], len(persons), "users") for name in ways)
    for ours in (add, save):
        yield slower("repository, limit", ours, core)
        yield slower("repository, same safety", ours, nested)


# ── Analytics ───────────────────────────────────────────────────────────────────────


def sales(session: Session, *columns: Any) -> Answer:
    """`columns` of every order, with the city of the home address of whoever ordered."""
    home, city = script.Address, script.City
    query = sa.select(*columns, script.Order.amount).where(
        home.user_id == script.Order.user_id, home.kind == "home", city.id == home.city_id
    )
    return fetch(session, query)


def fold_revenue(session: Session) -> Answer:
    totals: dict[tuple[str | None, str | None], Decimal] = defaultdict(Decimal)
    for country, city, amount in sales(session, script.City.country_code, script.City.name):
        for place in ((country, city), (country, None), (None, None)):
            totals[place] += amount
    rows = [(*place, total) for place, total in totals.items()]
    return sorted(rows, key=lambda row: [(cell is None, cell or "") for cell in row[:2]])


def fold_customers(session: Session) -> Answer:
    spent: dict[tuple[str, int], Decimal] = defaultdict(Decimal)
    for country, user, amount in sales(session, script.City.country_code, script.Order.user_id):
        spent[country, user] += amount
    best_first = sorted(spent, key=lambda key: (key[0], -spent[key], key[1]))
    answer = []
    for country, customers in groupby(best_first, key=itemgetter(0)):
        best = enumerate(islice(customers, 3), start=1)
        answer += [(country, rank, user, spent[country, user]) for rank, (_, user) in best]
    return answer


def fold_referrals(session: Session) -> Answer:
    users = sa.select(script.User.id, script.User.referred_by_id)
    referrer: dict[int, Any] = dict(fetch(session, users))
    below, depth = Counter[int](), Counter[int]()
    for user in referrer:
        root, steps = user, 0
        while referrer[root] is not None:
            root, steps = referrer[root], steps + 1
        below[root] += steps > 0
        depth[root] = max(depth[root], steps)
    largest = sorted(depth, key=lambda root: (-below[root], root))[:5]
    return [(root, below[root], depth[root]) for root in largest]


FOLDS: dict[str, Callable[[Session], Answer]] = {
    "cohort retention": script.fold_cohorts,
    "revenue with subtotals": fold_revenue,
    "top 3 customers a country": fold_customers,
    "referral trees": fold_referrals,
}


def analytics(workspace: Any) -> Iterator[Line]:
    engine = workspace.create(ANALYTICS_USERS)
    with Session(engine) as session:
        for question, fold in FOLDS.items():
            ask = script.QUESTIONS[question]
            ways = {"SQL": partial(ask, session), "Python": partial(fold, session)}
            seconds = measure(ways, after=partial(check, expected=fold(session)))
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
