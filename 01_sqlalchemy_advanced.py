"""SQLAlchemy 2.1: a schema that refuses bad data, queries that scale, and nothing lost.

You will learn to
  - keep the rules in the schema, change it by migration, and load it in bulk
  - reach it through a repository, and cure N+1 queries
  - answer cohort, ranking and recursive questions in SQL; page and stream large results
  - survive concurrency: savepoints, versions, SERIALIZABLE with retry, a job queue
  - bound a pool, outlive a killed connection, and move SQLite to PostgreSQL

Run:
  python 01_sqlalchemy_advanced.py                           # SQLite, nothing to configure
  python servers.py run -- python 01_sqlalchemy_advanced.py  # a PostgreSQL of its own
  DATABASE_URL=postgresql://user:password@host/db python 01_sqlalchemy_advanced.py
  python 01_sqlalchemy_advanced.py --only n_plus_one --scale 5000

Without a server every demo runs on SQLite, and says what it could not show there.

Glossary:
  session        a unit of work: loaded objects, their pending changes, one transaction
  identity map   the session's one object for each primary key
  N+1            one query for the parents, then one more for each parent
  keyset         paging by "after this key" instead of "skip so many rows"
  SQLSTATE       the five-character error code of the SQL standard

Guide: docs/01-sqlalchemy.md
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import random
import re
import secrets
import sqlite3
import tempfile
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import psycopg2
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from argon2 import PasswordHasher
from psycopg2.extensions import make_dsn
from sqlalchemy import exc, orm
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import config
from config import conclude, fact, note, table

logger = logging.getLogger(__name__)

SEED = 8  # the data are the same in every run
DEFAULT_USERS = 500  # enough for N+1 to hurt, few enough for every demo to end in seconds
FIRST_DAY, LAST_DAY = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
BATCH_ROWS = 2_000  # users or rows in memory at once while seeding and moving, a few MB
PAGE_ROWS = 20  # what one screen shows
STATEMENT_TIMEOUT_MS = 60_000  # no demo's statement comes near; a runaway one ends
MAX_ATTEMPTS = 3  # at a job, before it is given up
# serialization_failure, deadlock_detected; and SQLite, which has names instead of SQLSTATEs
RETRYABLE = frozenset({"40001", "40P01", "SQLITE_BUSY", "SQLITE_BUSY_SNAPSHOT"})

PLACES = """
AR Argentina: Buenos Aires, Córdoba, Rosario, Mendoza, La Plata
BR Brazil: São Paulo, Rio de Janeiro, Belo Horizonte, Salvador, Recife
CA Canada: Toronto, Montréal, Calgary, Ottawa, Halifax
DE Germany: Berlin, Hamburg, Munich, Cologne, Leipzig
ES Spain: Madrid, Barcelona, Valencia, Sevilla, Bilbao
FR France: Paris, Marseille, Lyon, Toulouse, Nantes
IN India: Mumbai, Delhi, Bengaluru, Chennai, Kolkata
JP Japan: Tokyo, Yokohama, Osaka, Sapporo, Kyoto
KE Kenya: Nairobi, Mombasa, Nakuru, Kisumu, Eldoret
US United States: New York City, Los Angeles, Chicago, Houston, Boston
"""
FIRST_NAMES = "Ada Alan Barbara Edgar Frances Grace Hedy Jim Katherine Leslie Margaret Tony".split()
LAST_NAMES = "Allen Bachman Codd Date Gray Hopper Kay Lamport Liskov Perlman Ritchie Wing".split()

# ── Domain: types and models ──────────────────────────────────────────────────────────

Row = dict[str, Any]
T = TypeVar("T")


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Timezone-aware UTC; SQLite stores it without the zone, and cannot add a timedelta.

    Raises ValueError for a time without a zone.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is not None and getattr(value, "tzinfo", None) is None:
            raise ValueError(f"no time with a zone: {value!r}")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value and (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)


class Money(sa.types.TypeDecorator[Decimal]):
    """NUMERIC(12, 2). SQLite reckons in floats: round what SQL computes before it is compared or
    stored (CHECKs ask for it); a sum of millions of rows may leave the cent.

    Raises TypeError for anything but a Decimal, ValueError for what 12 digits do not hold.
    """

    impl = sa.Numeric(12, 2)
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: sa.Dialect) -> Decimal | None:
        if value is None:
            return None
        if not isinstance(value, Decimal):
            raise TypeError(f"money must be a Decimal, not {type(value).__name__}")
        if not (value.is_finite() and abs(value) < 10**10 and value == round(value, 2)):
            raise ValueError(f"not ten digits and two decimals: {value}")
        return value

    def coerce_compared_value(self, operator: Any, value: Any) -> Any:
        """A factor or a limit, as in `amount * Decimal("0.125")`, is a number and no money."""
        return sa.Numeric()


# SQLite numbers rows by itself only in a column of type INTEGER.
BIG_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
BigId = Annotated[int, mapped_column(BIG_INTEGER, sa.Identity(), primary_key=True)]
UserId = Annotated[int, mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"))]


class Base(DeclarativeBase):
    """Every constraint has a name: a migration can drop it, and an error can name it."""

    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {Decimal: Money(), datetime: UtcDateTime(), int: BIG_INTEGER}


class Country(Base):
    __tablename__ = "countries"
    __table_args__ = (sa.CheckConstraint("length(code) = 2", name="iso_code"),)

    code: Mapped[str] = mapped_column(sa.String(2), primary_key=True)  # ISO 3166-1 alpha-2
    name: Mapped[str] = mapped_column(sa.String(60), unique=True)


class City(Base):
    __tablename__ = "cities"
    __table_args__ = (sa.UniqueConstraint("country_code", "name"),)

    id: Mapped[BigId]
    country_code: Mapped[str] = mapped_column(sa.ForeignKey("countries.code"))
    name: Mapped[str] = mapped_column(sa.String(60))
    country: Mapped[Country] = relationship()


class Address(Base):
    __tablename__ = "addresses"
    __table_args__ = (
        sa.UniqueConstraint("user_id", "kind"),
        sa.CheckConstraint("kind IN ('home', 'billing')", name="kind"),
    )

    id: Mapped[BigId]
    user_id: Mapped[UserId]
    city_id: Mapped[int] = mapped_column(sa.ForeignKey("cities.id"), index=True)
    kind: Mapped[str] = mapped_column(sa.String(8))
    street: Mapped[str] = mapped_column(sa.String(80))
    city: Mapped[City] = relationship()


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = (
        sa.CheckConstraint("amount > 0 AND amount = round(amount, 2)", name="amount"),
        sa.Index(None, "placed_at", "id"),  # the key that demo_large_results pages by
    )

    id: Mapped[BigId]
    user_id: Mapped[UserId] = mapped_column(index=True)
    placed_at: Mapped[datetime]
    amount: Mapped[Decimal]


class User(Base):
    __tablename__ = "users"
    __table_args__ = (
        sa.CheckConstraint("email = lower(email) AND email LIKE '%_@_%'", name="email"),
        # Whoever refers was there before: no cycles, and rows can be moved in order of their id.
        sa.CheckConstraint("referred_by_id < id", name="referrer_is_older"),
        sa.CheckConstraint("credit >= 0 AND credit = round(credit, 2)", name="credit"),
    )

    id: Mapped[BigId]
    email: Mapped[str] = mapped_column(sa.String(254), unique=True)  # RFC 5321: 256, less < and >
    full_name: Mapped[str] = mapped_column(sa.String(80))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    referred_by_id: Mapped[int | None] = mapped_column(
        sa.ForeignKey("users.id", ondelete="SET NULL"), index=True
    )
    credit: Mapped[Decimal] = mapped_column(server_default="0")
    version: Mapped[int] = mapped_column(server_default="1")
    addresses: Mapped[list[Address]] = relationship(
        cascade="all, delete-orphan",  # an address without its user is none
        passive_deletes=True,  # ON DELETE CASCADE removes those that are not loaded
    )
    __mapper_args__ = {"version_id_col": version}


READY = sa.text("state = 'ready'")


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        sa.CheckConstraint("state IN ('ready', 'done', 'failed')", name="state"),
        # A claim reads no job that is done.
        sa.Index("ix_jobs_ready", "attempts", "id", postgresql_where=READY, sqlite_where=READY),
    )

    id: Mapped[BigId]
    user_id: Mapped[UserId] = mapped_column(index=True)
    state: Mapped[str] = mapped_column(sa.String(8), server_default="ready")
    attempts: Mapped[int] = mapped_column(server_default="0")


MODELS: tuple[type[Base], ...] = (Country, City, User, Address, Order, Job)  # parents first

# ── Domain: the data ──────────────────────────────────────────────────────────────────


def places() -> tuple[list[Row], list[Row]]:
    """The countries and their cities, as rows for `Country` and `City`."""
    countries: list[Row] = []
    cities: list[Row] = []
    for line in PLACES.strip().splitlines():
        country, listed = line.split(": ")
        code, name = country.split(" ", 1)
        countries.append({"code": code, "name": name})
        for city in listed.split(", "):
            cities.append({"id": len(cities) + 1, "country_code": code, "name": city})
    return countries, cities


def people(count: int, seed: int = SEED) -> Iterator[tuple[Row, list[Row], list[Row]]]:
    """`count` users in order of their signing up, each with its addresses and orders, as rows.

    In every month after the first an eighth fewer of them buy; amounts are log-normal.
    """
    rng = random.Random(seed)
    city_count = len(places()[1])
    address_id = order_id = 0
    for user_id in range(1, count + 1):
        joined = FIRST_DAY + (LAST_DAY - FIRST_DAY) * ((user_id - rng.random()) / count)
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        referred = user_id > 1 and rng.random() < 0.4
        user = {
            "id": user_id,
            "email": f"{name.lower().replace(' ', '.')}.{user_id}@example.com",
            "full_name": name,
            "created_at": joined,
            "referred_by_id": rng.randrange(1, user_id) if referred else None,
        }
        addresses: list[Row] = []
        for kind in ("home", "billing")[: 1 + (rng.random() < 0.3)]:
            address_id += 1
            city_id = user_id % city_count + 1 if kind == "home" else rng.randint(1, city_count)
            street = f"{rng.randint(1, 99)} {rng.choice(LAST_NAMES)} Street"
            row = {"id": address_id, "user_id": user_id, "city_id": city_id, "kind": kind}
            addresses.append({**row, "street": street})
        orders: list[Row] = []
        for month in range((LAST_DAY - joined).days // 30 + 1):
            placed_at = joined + timedelta(days=30 * (month + rng.random()))
            if placed_at <= LAST_DAY and rng.random() < 0.9 * 0.875**month:
                order_id += 1
                amount = Decimal(max(1, round(100 * rng.lognormvariate(3.5, 0.9)))) / 100
                row = {"id": order_id, "user_id": user_id, "placed_at": placed_at}
                orders.append({**row, "amount": amount})
        yield user, addresses, orders


# ── Engines: an honest SQLite, a bounded PostgreSQL, a workspace of one's own ─────────


def sqlite_engine(path: Path, **options: Any) -> sa.Engine:
    """SQLite that enforces foreign keys and whose savepoints mean what they say.

    Left alone, the driver begins no transaction before a SAVEPOINT, and a row survives the
    rollback around it (SQLAlchemy's SQLite dialect, "Enabling Non-Legacy SQLite Transactional
    Modes").
    """
    url = sa.URL.create("sqlite", database=str(path))
    engine = sa.create_engine(url, hide_parameters=True, **options)

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not block the writer

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        driver = cast(sqlite3.Connection, connection.connection.driver_connection)
        if driver.isolation_level is not None:  # None is SQLAlchemy's AUTOCOMMIT
            driver.execute("BEGIN")

    return engine


def postgres_engine(url: str, schema: str, timeout_s: float, **options: Any) -> sa.Engine:
    """PostgreSQL in a schema of its own, in UTC, bounded; `engine.url` opens the same again."""
    parsed = sa.make_url(url)
    session = f"search_path={schema}", "TimeZone=UTC", f"statement_timeout={STATEMENT_TIMEOUT_MS}"
    own = str(parsed.query.get("options", ""))  # ours come after, and win
    settings = {
        "connect_timeout": str(math.ceil(timeout_s)),
        "tcp_user_timeout": str(STATEMENT_TIMEOUT_MS),  # of a network that swallows packets
        "options": " ".join([own, *(f"-c {setting}" for setting in session)]),
        "fallback_application_name": "module8-01",
    }
    return sa.create_engine(parsed.update_query_dict(settings), hide_parameters=True, **options)


class Workspace:
    """Throw-away databases beside whatever is there: PostgreSQL schemas, or SQLite files."""

    def __init__(self, directory: Path, url: str | None, timeout_s: float) -> None:
        self._directory, self._url, self._timeout_s = directory, url, timeout_s
        self._engines: dict[str, sa.Engine] = {}

    def create(self, users: int = 0, **options: Any) -> sa.Engine:
        """An engine on a new database at today's schema, with the data of `users` users."""
        name = f"module8_{secrets.token_hex(6)}"
        if self._url is None:
            engine = sqlite_engine(self._directory / name, **options)
        else:
            engine = postgres_engine(self._url, name, self._timeout_s, **options)
        self._engines[name] = engine  # first: what close() is to drop, if interrupted next
        if self._url is not None:
            with engine.begin() as connection:
                connection.execute(sa.schema.CreateSchema(name))
                if connection.scalar(sa.select(sa.func.current_schema())) != name:
                    raise config.ConfigError("DATABASE_URL: its pooler drops the search_path")
        migrate(engine)
        if users:
            seed(engine, users)
        return engine

    def close(self) -> None:
        """Drop what was created. The directory is the caller's."""
        for name, engine in self._engines.items():
            engine.dispose()  # of connections that may be dead
            try:
                if self._url is not None:
                    with engine.begin() as connection:
                        connection.execute(sa.schema.DropSchema(name, cascade=True, if_exists=True))
            except exc.DBAPIError as error:
                logger.warning(
                    "schema %s may stay behind: %s", name, str(error.orig).split("\n")[0]
                )
            engine.dispose()


def seed(engine: sa.Engine, users: int) -> None:
    """Fill an empty, migrated database, in one transaction; memory stays bounded at any size."""
    countries, cities = places()
    generated = people(users)
    with engine.begin() as connection:
        insert_rows(connection, Country, countries)
        insert_rows(connection, City, cities)
        while batch := list(islice(generated, BATCH_ROWS)):
            insert_rows(connection, User, [user for user, _, _ in batch])
            insert_rows(connection, Address, [row for _, rows, _ in batch for row in rows])
            insert_rows(connection, Order, [row for _, _, rows in batch for row in rows])
        reset_sequences(connection)
    # The planner must know the new rows, and the index-only scan that no old versions are about.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE" if is_sqlite(engine) else "VACUUM ANALYZE")


def is_sqlite(engine: sa.Engine | sa.Connection) -> bool:
    """Whether this is the embedded engine, whose limits the demos name."""
    return engine.dialect.name == "sqlite"


def count_rows(engine: sa.Engine, model: type[Base]) -> int:
    """The committed rows of a model's table."""
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(model)) or 0


def error_code(error: exc.DBAPIError) -> str:
    """PostgreSQL's SQLSTATE, or the name that SQLite gives its error; "" where there is none."""
    code = getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlite_errorname", None)
    return str(code or "")


def best_seconds(ways: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """The best time of each way. Rounds are interleaved: a busy moment hits every way."""
    best = dict.fromkeys(ways, math.inf)
    for _round in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


# ── 1. Schema: constraints and migrations ─────────────────────────────────────────────


def _add_nickname() -> None:
    with op.batch_alter_table("users") as users:  # SQLite alters a table by copying it
        users.add_column(sa.Column("nickname", sa.String(40)))
        users.create_check_constraint("nickname", "nickname <> ''")


def _drop_nickname() -> None:
    with op.batch_alter_table("users") as users:
        users.drop_constraint(op.f("ck_users_nickname"), type_="check")
        users.drop_column("nickname")


# Revision → the steps up and down; a project keeps each in a file of Alembic's `versions/`.
MIGRATIONS: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "0001_shop": (  # today's models: only the first revision may be made from them
        lambda: Base.metadata.create_all(op.get_bind()),
        lambda: Base.metadata.drop_all(op.get_bind()),
    ),
    "0002_nickname": (_add_nickname, _drop_nickname),  # the models do not know it yet
}
VERSION = sa.Table(  # where Alembic keeps the revision of a database
    "alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True)
)


def migrate(engine: sa.Engine, target: str = "0001_shop") -> None:
    """Bring the database to the revision `target`, or to "base", which is none.

    All of it is one transaction, on SQLite too. Its foreign keys are off meanwhile, so that
    replacing a table by its altered copy deletes no row that refers to it, and are checked
    before the commit. Raises CommandError for a revision that MIGRATIONS does not have.
    """
    revisions = ["base", *MIGRATIONS]
    with engine.connect() as connection, _foreign_keys_off(connection):
        context = _migration_context(connection)
        current = context.get_current_revision() or "base"
        for revision in {current, target} - set(revisions):
            raise CommandError(
                f"no revision {revision!r}, there are {', '.join(revisions)}: a database that is"
                " ahead needs the release of the code that made it"
            )
        start, end = revisions.index(current), revisions.index(target)
        steps = list(MIGRATIONS.values())
        with Operations.context(context):
            for upgrade, _ in steps[start:end]:
                upgrade()
            for _, downgrade in reversed(steps[end:start]):
                downgrade()
        VERSION.create(connection, checkfirst=True)
        connection.execute(sa.delete(VERSION))
        if target != "base":
            connection.execute(sa.insert(VERSION).values(version_num=target))


@contextmanager
def _foreign_keys_off(connection: sa.Connection) -> Iterator[None]:
    """A transaction at whose end, on SQLite, the foreign keys are checked for all tables."""
    file = connection.connection.driver_connection if is_sqlite(connection) else None
    if file:
        file.execute("PRAGMA foreign_keys = OFF")  # has no effect inside a transaction
    try:
        with connection.begin():
            yield
            if file and file.execute("PRAGMA foreign_key_check").fetchall():
                raise RuntimeError("rows refer to nothing")
    finally:
        if file:
            file.execute("PRAGMA foreign_keys = ON")


def schema_differences(engine: sa.Engine) -> list[Any]:
    """What Alembic's autogenerate would change to make the database match the models."""
    with engine.connect() as connection:
        return list(compare_metadata(_migration_context(connection), Base.metadata))


def _migration_context(connection: sa.Connection) -> MigrationContext:
    plugins = ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"]  # else no CHECKs
    options = {"transactional_ddl": True, "autogenerate_plugins": plugins}
    return MigrationContext.configure(
        connection, opts={"target_metadata": Base.metadata, **options}
    )


class RowRefused(Exception):
    """The database, or a column's type, refuses these values: says by what, and never a value."""


@contextmanager
def savepoint(session: Session) -> Iterator[None]:
    """Around one statement: if its row is refused, it costs itself only. Raises RowRefused."""
    nested = session.begin_nested()  # flushes what is pending: if that is refused, it is not ours
    try:
        with nested:
            yield
    except exc.IntegrityError as error:
        raise RowRefused(violated_constraint(error)) from None  # the driver's text has the row
    except (exc.StatementError, ValueError, OverflowError) as error:  # the last two: drivers'
        odd_type = isinstance(error, exc.ProgrammingError) and not error_code(error)
        if isinstance(error, exc.DBAPIError) and not (isinstance(error, exc.DataError) or odd_type):
            raise  # no fault of the row
        raise RowRefused("a column's type") from None


def violated_constraint(error: exc.IntegrityError) -> str:
    """The name of the constraint that refused a row, or what else the database says of it.

    SQLite tells a UNIQUE by its columns, NOT NULL by its column, and of a foreign key nothing.
    """
    if not isinstance(error.orig, sqlite3.Error):
        told = cast(Any, error.orig).diag
        not_null = f"NOT NULL: {told.table_name}.{told.column_name}"
        return str(told.constraint_name or (not_null if told.column_name else told.message_primary))
    kind, _, subject = str(error.orig).partition(" constraint failed")
    subject = subject.removeprefix(": ")
    if kind != "UNIQUE":
        return subject if kind == "CHECK" else f"{kind}: {subject}".rstrip(": ")
    model = Base.metadata.tables.get(subject.partition(".")[0])
    for key in model.constraints if model is not None else ():
        if isinstance(key, sa.UniqueConstraint | sa.PrimaryKeyConstraint):
            if subject == ", ".join(f"{column.table}.{column.name}" for column in key.columns):
                return str(key.name)
    return subject.removeprefix("index ").strip("'")  # of an expression


def insert_each(session: Session, model: type[Base], rows: Sequence[Row]) -> dict[int, str]:
    """Insert `rows`, a savepoint each; returns index → what refused it, of those refused."""
    refused = {}
    for index, row in enumerate(rows):
        try:
            with savepoint(session):
                session.execute(sa.insert(model), [row])
        except RowRefused as error:
            refused[index] = str(error)
    return refused


def demo_schema(workspace: Workspace) -> dict[str, str]:  # bad row → what refused it
    """1. Schema: constraints that refuse bad data, changed by migration.

    Prediction: each bad row is refused, whatever the application forgot; a migration up and down
    leaves no difference and every row.

    Trade-off: a CHECK added later scans the table (PostgreSQL: NOT VALID, then VALIDATE); rules
    that change every month belong in the application.
    """
    engine = workspace.create(users=20)
    ada = next(people(1))[0]
    order = {"user_id": 1, "placed_at": FIRST_DAY, "amount": Decimal(1)}
    bad: dict[str, tuple[type[Base], Row]] = {
        "e-mail in capitals": (User, {**ada, "id": 21, "email": "ADA@EXAMPLE.COM"}),
        "e-mail taken": (User, {**ada, "id": 21}),
        "amount of 0.00": (Order, {**order, "amount": Decimal(0)}),
        "amount of 1.005": (Order, {**order, "amount": Decimal("1.005")}),
        "order of nobody": (Order, {**order, "user_id": 99}),
    }
    refused = {}
    with Session(engine) as session:
        for label, (model, row) in bad.items():
            refused[label] = insert_each(session, model, [row]).get(0, "nothing")
    table(["bad row", "refused by"], refused.items())
    for revision in ("0002_nickname", "0001_shop"):
        migrate(engine, revision)
        found = [str(difference[0]) for difference in schema_differences(engine)]
        fact(f"at {revision}", f"autogenerate would {' and '.join(found) or 'change nothing'}")
    fact("users", f"{count_rows(engine, User)} of 20")
    conclude(f"{len(bad) - list(refused.values()).count('nothing')} of {len(bad)} bad rows refused")
    return refused


# ── 2. Bulk load ──────────────────────────────────────────────────────────────────────


def copy_rows(connection: sa.Connection, model: type[Base], rows: Sequence[Row]) -> None:
    """Load `rows`, dicts of equal keys, by PostgreSQL's COPY in the connection's transaction.

    The columns' types check and convert the values as in an INSERT; then they go as text
    (PostgreSQL's manual, COPY, "Text Format"), so no column may hold bytes or an array. Raises
    StatementError, as SQLAlchemy does.
    """
    model_table, dialect = cast(sa.Table, model.__table__), connection.dialect
    columns = [model_table.c[key] for key in rows[0]]
    quote, driver = dialect.identifier_preparer, cast(Any, dialect).dbapi
    names = ", ".join(quote.format_column(column) for column in columns)
    statement = f"COPY {quote.format_table(model_table)} ({names}) FROM STDIN"
    try:
        lines = zip(*(_copy_cells(column, rows, dialect) for column in columns), strict=True)
        text = io.StringIO("".join(["\t".join(cells) + "\n" for cells in lines]))
        with cast(Any, connection.connection).cursor() as cursor:
            cursor.copy_expert(statement, text)
    except Exception as error:  # of the driver, or of a type's check
        raise exc.DBAPIError.instance(
            statement, None, error, driver.Error, hide_parameters=True, dialect=dialect
        ) from error


_COPY_SPECIAL = re.compile(r"[\\\t\n\r]")
_COPY_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _copy_cells(column: sa.Column[Any], rows: Sequence[Row], dialect: sa.Dialect) -> Iterator[str]:
    convert = cast(Any, column.type.dialect_impl(dialect)).bind_processor(dialect)
    for row in rows:
        value = convert(row[column.key]) if convert else row[column.key]
        text = r"\N" if value is None else str(value)
        # Few values hold anything to escape, and looking is cheaper than translating.
        escape = value is not None and _COPY_SPECIAL.search(text)
        yield text.translate(_COPY_ESCAPES) if escape else text


def insert_rows(connection: sa.Connection, model: type[Base], rows: Sequence[Row]) -> None:
    """Load `rows`, dicts of equal keys, in the engine's fastest way.

    COPY knows no defaults of Python's: give those columns, too. Raises StatementError; SQLite's
    driver an OverflowError of its own.
    """
    if rows and is_sqlite(connection):
        connection.execute(sa.insert(model), rows)
    elif rows:
        copy_rows(connection, model, rows)


def _add_all(session: Session, rows: Sequence[Row]) -> None:
    session.add_all([Order(**row) for row in rows])
    session.flush()


LOADERS: dict[str, Callable[[Session, Sequence[Row]], object]] = {  # the last is the fastest
    "session.add_all": _add_all,
    "ORM insert(Order)": lambda s, rows: s.execute(sa.insert(Order), rows),
    "Core insert(Order)": lambda s, rows: s.connection().execute(sa.insert(Order), rows),
    "COPY": lambda s, rows: copy_rows(s.connection(), Order, rows),
}


def demo_bulk_load(workspace: Workspace, users: int) -> dict[str, float]:  # way → seconds
    """2. Bulk load: the same orders, inserted in four ways.

    Prediction: add_all pays for an object and a key each; COPY sends one stream.

    Trade-off: Core and COPY skip the session: no events, no objects; COPY skips defaults in
    Python too.
    """
    size, users = min(max(10 * users, 1_000), 50_000), min(users, DEFAULT_USERS)
    engine = workspace.create(users)  # its own: what is rolled back leaves dead rows behind
    ways = [name for name in LOADERS if name != "COPY" or not is_sqlite(engine)]
    moments = [FIRST_DAY + timedelta(minutes=i) for i in range(size)]
    rows = [
        {"user_id": i % users + 1, "placed_at": moment, "amount": Decimal(i + 1) / 100}
        for i, moment in enumerate(moments)
    ]

    def load(way: str) -> None:
        with Session(engine) as session:  # never committed
            LOADERS[way](session, rows)

    seconds = best_seconds({way: partial(load, way) for way in ways})
    fastest = seconds[ways[-1]]
    table(
        ["way", "rows/s", f"time / {ways[-1]}'s"],
        [(name, f"{size / s:,.0f}", f"{s / fastest:.1f}") for name, s in seconds.items()],
    )
    if is_sqlite(engine):
        note("COPY needs PostgreSQL")
    ratio = seconds["session.add_all"] / fastest
    conclude(f"{size:,} rows, rolled back: add_all takes {ratio:.1f} times as long")
    return seconds


# ── 3. Repository and unit of work ────────────────────────────────────────────────────


class EmailTaken(Exception):
    """Another user has this e-mail address."""


class UserNotFound(Exception):
    """No user has this e-mail address."""


@dataclass(frozen=True)
class Person:
    """A user as the domain sees it: values, and no session. ValueError for a NUL byte in them."""

    email: str
    full_name: str

    def __post_init__(self) -> None:
        if "\0" in self.email + self.full_name:
            raise ValueError("a NUL byte in a text, which SQLite would store")


class UserRepository:
    """The users as a collection, by e-mail address.

    The session is the unit of work: all that was done with it is committed together, or not at
    all. A person that is refused costs itself only.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, person: Person) -> None:
        """Raises EmailTaken or RowRefused."""
        try:
            with savepoint(self._session):
                self._session.execute(sa.insert(User).values(vars(person)))
        except RowRefused as refusal:
            if str(refusal) == "uq_users_email":
                raise EmailTaken(person.email) from None
            raise

    def save(self, person: Person) -> bool:
        """Insert, or rename whom the address belongs to, in one statement; True if inserted.

        Raises RowRefused.
        """
        dialect = self._session.get_bind().dialect.name
        insert = sqlite.insert(User) if dialect == "sqlite" else postgresql.insert(User)
        renamed = {"full_name": person.full_name, "version": User.version + 1}
        upsert = insert.values(vars(person)).on_conflict_do_update(
            index_elements=[User.email], set_=renamed
        )
        with savepoint(self._session):
            saved = self._session.scalars(
                upsert.returning(User), execution_options={"populate_existing": True}
            )
            return saved.one().version == 1

    def get(self, email: str) -> Person:
        """Raises UserNotFound."""
        found = self._one(sa.select(User.email, User.full_name), email)
        return Person(found.email, found.full_name)

    def remove(self, email: str) -> None:
        """Removes addresses and orders too. Raises UserNotFound."""
        self._one(sa.delete(User).returning(User.id), email)

    def _one(self, statement: Any, email: str) -> sa.Row[Any]:
        try:
            row = self._session.execute(statement.where(User.email == email)).one_or_none()
        except ValueError:  # psycopg2, of a NUL byte or a lone surrogate, which no address has
            row = None
        if row is None:
            raise UserNotFound(email)
        return row


def demo_repository(workspace: Workspace) -> dict[str, int]:  # way → users afterwards
    """3. Repository and unit of work: rollback unless committed, domain errors only.

    Prediction: without commit() nothing stays; a taken address costs itself only.

    Trade-off: a repository hides the query language: for reports, query the session.
    """
    engine, users_after = workspace.create(), {}
    ada, alan = Person("ada@example.com", "Ada King"), Person("alan@example.com", "Alan Turing")
    refused = []
    with Session(engine) as work:
        UserRepository(work).add(ada)
    users_after["commit forgotten"] = count_rows(engine, User)
    with Session(engine) as work:
        users = UserRepository(work)
        users.add(ada)
        for other in (Person(ada.email, "An Impostor"), Person("ADA@EXAMPLE.COM", "In Capitals")):
            try:
                users.add(other)
            except (EmailTaken, RowRefused) as error:
                refused.append(f"{type(error).__name__}: {error}")
        inserted = users.save(alan), users.save(Person(alan.email, "A. M. Turing"))
        work.commit()
    users_after["committed"] = count_rows(engine, User)
    for way, count in users_after.items():
        fact(f"users, {way}", count)
    fact("the caller caught", "; ".join(refused))
    fact("saved twice", "inserted: {}, then {}".format(*inserted))
    with Session(engine) as work:
        fact("and read", UserRepository(work).get(alan.email))
    conclude(f"beside {len(refused)} refusals, {users_after['committed']} users were committed")
    return users_after


# ── 4. N+1 ────────────────────────────────────────────────────────────────────────────


@contextmanager
def count_queries(engine: sa.Engine) -> Iterator[list[str]]:
    """Collects the statements that `engine` sends inside the block."""
    statements: list[str] = []

    def record(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)

    sa.event.listen(engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        sa.event.remove(engine, "before_cursor_execute", record)


# City and country are many-to-one: there a join repeats nothing.
CITY = orm.joinedload(Address.city).joinedload(City.country)
STRATEGIES: dict[str, Any] = {
    "lazy": orm.lazyload("*"),
    "joined": orm.joinedload(User.addresses).options(CITY),
    "selectin": (
        orm.selectinload(User.addresses).selectinload(Address.city).selectinload(City.country)
    ),
    "selectin + joined": orm.selectinload(User.addresses).options(CITY),
    "raiseload": orm.raiseload("*"),
}


def address_book(session: Session, strategy: str, users: int) -> list[tuple[Any, ...]]:
    """The first `users` users, each with kind, city and country of its addresses, as values."""
    query = sa.select(User).where(User.id <= users).order_by(User.id)
    return [
        (user.email, *sorted((a.kind, a.city.name, a.city.country.name) for a in user.addresses))
        for user in session.scalars(query.options(STRATEGIES[strategy])).unique()
    ]


def demo_n_plus_one(engine: sa.Engine, users: int) -> dict[str, tuple[int, int]]:
    """4. N+1: user → address → city → country, loaded in four ways, or not at all.

    Prediction: lazy asks once a user, once a city and once a country, not three times a user.

    Trade-off: joined suits many-to-one; on a collection it repeats the parent in each row.
    selectin suits collections: one query more for each 500 parents.
    """
    users = min(users, 2_000)  # more would show the same, and lazy would take long

    def load(strategy: str, size: int = users) -> int:
        with Session(engine) as session, count_queries(engine) as statements:
            address_book(session, strategy, size)
        return len(statements)

    strategies = [name for name in STRATEGIES if name != "raiseload"]
    queries = {name: (load(name, users // 2), load(name)) for name in strategies}
    best = best_seconds({name: partial(load, name) for name in strategies})
    table(
        ["strategy", f"queries: {users // 2} users", f"{users} users", "ms", "times faster"],
        [
            (name, *queries[name], f"{s * 1e3:.0f}", f"{best['lazy'] / s:.1f}")
            for name, s in best.items()
        ],
    )
    with Session(engine) as session:
        book = address_book(session, "selectin", users)
        cities = {(city, country) for _, *homes in book for _, city, country in homes}
        countries = {country for _, country in cities}
        fact("lazy asks", f"1 + {users} users + {len(cities)} cities + {len(countries)} countries")
        try:
            address_book(session, "raiseload", 1)
        except exc.InvalidRequestError as error:
            fact("raiseload", error)
    conclude(f"{queries['lazy'][1]} queries → {queries['selectin + joined'][1]}")
    return queries


# ── 5. Analytics ──────────────────────────────────────────────────────────────────────

Answer = list[tuple[Any, ...]]
Select = sa.Select[*tuple[Any, ...]]


def month_number(column: Any) -> sa.ColumnElement[int]:
    """Year × 12 + month - 1: months that can be subtracted."""
    # As integers at once: PostgreSQL extracts a numeric, whose arithmetic is slow.
    year, month = (sa.cast(sa.extract(part, column), sa.Integer) for part in ("year", "month"))
    return year * 12 + month - 1


def cohort_retention(session: Session) -> Answer:
    """(month of signing up, months since, users who ordered then, users in the cohort)."""
    joined = sa.select(User.id, month_number(User.created_at).label("month")).cte()
    moment = month_number(Order.placed_at).label("month")
    ordered = sa.select(Order.user_id, moment).distinct().cte()
    users, age = sa.func.count().label("users"), ordered.c.month - joined.c.month
    sizes = sa.select(joined.c.month, users).group_by(joined.c.month).cte()
    active = (
        sa.select(joined.c.month, age.label("age"), users)
        .join(ordered, ordered.c.user_id == joined.c.id)
        .group_by(joined.c.month, age)
        .cte()
    )
    query = sa.select(active, sizes.c.users).join(sizes, sizes.c.month == active.c.month)
    return sorted(_ask(session, query))


def fold_cohorts(session: Session) -> Answer:
    """`cohort_retention` in plain Python: all rows are fetched, and folded here."""
    users = _ask(session, sa.select(User.id, User.created_at))
    month = {user: at.year * 12 + at.month - 1 for user, at in users}
    sizes = Counter(month.values())
    active = defaultdict(set)
    for user, at in _ask(session, sa.select(Order.user_id, Order.placed_at)):
        active[month[user], at.year * 12 + at.month - 1 - month[user]].add(user)
    return sorted((*key, len(users), sizes[key[0]]) for key, users in active.items())


def revenue_by_place(session: Session) -> Answer:
    """(country, city, revenue), and subtotals: city None, then country None too."""
    revenue = sa.func.sum(Order.amount).label("revenue")
    country, city = City.country_code, City.name
    sales = _at_home(sa.select(country, city, revenue))
    if session.get_bind().dialect.name == "postgresql":  # one pass over the orders
        levels = sa.tuple_(country, city), sa.tuple_(country), sa.tuple_()
        rows = _ask(session, sales.group_by(sa.func.grouping_sets(*levels)))
    else:
        cities = sales.group_by(country, city).cte()
        total, none = sa.func.sum(cities.c.revenue), sa.null()
        countries = sa.select(cities.c.country_code, none, total).group_by(cities.c.country_code)
        everywhere = sa.select(none, none, total)
        rows = _ask(session, sa.union_all(sa.select(cities), countries, everywhere))
    sold = [row for row in rows if row[2] is not None]  # the grand total of nothing is no row
    return sorted(sold, key=lambda row: [(cell is None, cell or "") for cell in row[:2]])


def top_customers(session: Session) -> Answer:
    """(country, rank, user id, revenue) of the best three customers of each country."""
    country, revenue = City.country_code, sa.func.sum(Order.amount)
    best_first = (sa.func.round(revenue, 2).desc(), Order.user_id)
    rank = sa.func.row_number().over(partition_by=country, order_by=best_first).label("rank")
    sales = _at_home(sa.select(country, rank, Order.user_id, revenue))
    ranked = sales.group_by(country, Order.user_id).subquery()
    return sorted(_ask(session, sa.select(ranked).where(ranked.c.rank <= 3)))


def referral_trees(session: Session) -> Answer:
    """(founder's user id, people below, depth) of the five largest trees, by a recursive CTE."""
    root, depth = User.id.label("root"), sa.literal(0).label("depth")
    founders = sa.select(root, User.id.label("member"), depth).where(User.referred_by_id.is_(None))
    tree = founders.cte(recursive=True)
    referred = sa.select(tree.c.root, User.id, tree.c.depth + 1)
    tree = tree.union_all(referred.join(tree, User.referred_by_id == tree.c.member))
    below = sa.func.count() - 1
    query = sa.select(tree.c.root, below, sa.func.max(tree.c.depth)).group_by(tree.c.root)
    return _ask(session, query.order_by(below.desc(), tree.c.root).limit(5))


def _at_home(query: Select) -> Select:
    """Orders, with the city of the home address of whoever ordered."""
    home = sa.and_(Address.user_id == Order.user_id, Address.kind == "home")
    return query.select_from(Order).join(Address, home).join(City)


def _ask(session: Session, query: sa.Executable) -> Answer:
    return [tuple(row) for row in session.execute(query)]


QUESTIONS: dict[str, Callable[[Session], Answer]] = {
    "cohort retention": cohort_retention,
    "the same, fetched and folded": fold_cohorts,
    "revenue with subtotals": revenue_by_place,
    "top 3 customers a country": top_customers,
    "referral trees": referral_trees,
}


def demo_analytics(engine: sa.Engine) -> dict[str, Answer]:  # question → answer
    """5. Analytics: four questions in SQL, one of them folded in plain Python too.

    Prediction: both ways give the same cohorts; SQL moves the answer, Python moves all the rows.

    Trade-off: beyond some tens of millions of orders these belong in a column store or a
    materialised view, not in the database that takes the orders.
    """
    with Session(engine) as session:
        answers = {question: ask(session) for question, ask in QUESTIONS.items()}
        seconds = best_seconds({name: partial(ask, session) for name, ask in QUESTIONS.items()})
    table(
        ["question", "rows", "ms"],
        [(name, len(rows), f"{seconds[name] * 1e3:.1f}") for name, rows in answers.items()],
    )
    cohorts, folded = answers["cohort retention"], answers["the same, fetched and folded"]
    first = [row for row in cohorts if row[0] == cohorts[0][0]]
    shares = (
        f"month {age}: {users / size:.0%}" for _, age, users, size in first if age in (1, 3, 6)
    )
    fact("first cohort", ", ".join(shares))
    for *_, total in answers["revenue with subtotals"][-1:]:
        fact("revenue in all", f"{total:,}")
    if is_sqlite(engine):
        note("GROUPING SETS needs PostgreSQL; here it is a UNION ALL of three groupings")
    conclude(f"SQL and plain Python give the same {len(cohorts)} rows: {cohorts == folded}")
    return answers


# ── 6. Transactions ───────────────────────────────────────────────────────────────────


def in_transaction(
    engine: sa.Engine,
    work: Callable[[Session], T],
    *,
    isolation_level: str = "SERIALIZABLE",
    attempts: int = 5,
) -> T:
    """Run `work` in a transaction, and again where the database's error code asks for it: it
    failed only because of others at the same time.

    Between attempts it waits up to 20 ms, 40 ms, … with full jitter (M. Brooker, Exponential
    Backoff And Jitter, AWS Architecture Blog, 2015). `work` may run several times: it must do
    nothing that a rollback does not undo. Raises the last error after `attempts`.
    """
    for attempt in range(1, attempts + 1):
        bind = engine.execution_options(isolation_level=isolation_level)
        with Session(bind, expire_on_commit=False) as session:
            try:
                result = work(session)
                session.commit()
                return result
            except exc.DBAPIError as error:
                if error_code(error) not in RETRYABLE or attempt == attempts:
                    raise
                logger.info("attempt %d ended: %s", attempt, error.orig)
        time.sleep(random.uniform(0, 0.01 * 2**attempt))
    raise ValueError("attempts must be at least 1")


def edit_conflict(engine: sa.Engine) -> str:
    """Two editors load a user, then both save it; returns what the second one is told.

    No transaction is open while they think: each form holds a detached object and its version.
    """
    forms = []
    for _editor in range(2):
        with Session(engine) as session:
            forms.append(session.get_one(User, 1))
    for number, form in enumerate(forms, start=1):
        form.full_name = f"Editor {number}"
        try:
            with Session(engine) as session, session.begin():
                session.add(form)
        except orm.exc.StaleDataError as error:
            return f"{type(error).__name__}: {str(error).partition(';')[0]}"
    return "no conflict: the first edit is lost"


TEN = Decimal(10)
CREDIT = sa.select(User.credit).where(User.id == 1)
SET_CREDIT = sa.update(User).where(User.id == 1).values(version=User.version + 1)
PLUS_TEN = sa.func.round(User.credit + TEN, 2)
# What the new credit is to be, a value or an expression in SQL; and the isolation level.
DEPOSITS: dict[str, tuple[Callable[[Session], Any], str]] = {
    "read, then write": (lambda s: s.scalars(CREDIT).one() + TEN, "READ COMMITTED"),
    "FOR UPDATE": (lambda s: s.scalars(CREDIT.with_for_update()).one() + TEN, "READ COMMITTED"),
    "SET credit = credit + 10": (lambda s: PLUS_TEN, "READ COMMITTED"),
    "read, then write, retried": (lambda s: s.scalars(CREDIT).one() + TEN, "SERIALIZABLE"),
}


def deposit_beside_a_rival(engine: sa.Engine, way: str) -> tuple[Decimal, int, str]:
    """Deposit 10.00 for user 1 while a rival does so, after our first read and before our write.

    Returns the credit at the end, our attempts, and what the rival met: where it would have to
    wait for our lock, it comes again after us.
    """
    new_credit, level = DEPOSITS[way]
    attempts, met = 0, ""

    def rival(session: Session) -> None:
        session.execute(CREDIT.with_for_update(nowait=True))  # rather than wait for us
        session.execute(SET_CREDIT.values(credit=PLUS_TEN))

    def work(session: Session) -> None:
        nonlocal attempts, met
        attempts += 1
        credit = new_credit(session)
        if not met:
            try:
                in_transaction(engine, rival, isolation_level=level)
                met = "goes first"
            except exc.OperationalError as error:
                met = f"has to wait ({error_code(error)})"
        session.execute(SET_CREDIT.values(credit=credit))

    with engine.begin() as connection:
        connection.execute(SET_CREDIT.values(credit=Decimal(0)))
    in_transaction(engine, work, isolation_level=level)
    if met != "goes first":
        in_transaction(engine, rival)
    with Session(engine) as session:
        return session.scalars(CREDIT).one(), attempts, met


def demo_transactions(workspace: Workspace) -> dict[str, object]:
    """6. Transactions: savepoints, versions, lost updates, retries.

    Prediction: two deposits of 10.00 at once leave 10.00 if reading and writing are apart and
    nobody locks or retries.

    Trade-off: locks wait, SERIALIZABLE retries, version numbers leave it to the caller.
    """
    engine = workspace.create(users=20)
    rows = [{"user_id": user} for user in (*range(1, 11), 999, *range(11, 21))]
    saved = []
    with Session(engine) as session:
        for row in rows:
            with suppress(exc.DBAPIError):
                session.execute(sa.insert(Job), [row])
        session.commit()  # PostgreSQL answers with a rollback
    saved.append(count_rows(engine, Job))
    with Session(engine) as session, session.begin():
        session.execute(sa.delete(Job))
        refused = insert_each(session, Job, rows)
    saved.append(count_rows(engine, Job))
    fact("one bad row in 21", "{} saved; with a savepoint each, {}".format(*saved))
    fact("refused", ", ".join(f"row {index}: {by}" for index, by in refused.items()))
    conflict = edit_conflict(engine)
    fact("second editor", conflict)
    ways = [way for way in DEPOSITS if not is_sqlite(engine) or "retried" in way]
    deposits = {way: deposit_beside_a_rival(engine, way) for way in ways}
    table(
        ["10.00 + a rival's 10.00", "isolation level", "credit", "attempts", "the rival"],
        [(way, DEPOSITS[way][1], *deposit) for way, deposit in deposits.items()],
    )
    if is_sqlite(engine):
        note("SQLite has no READ COMMITTED, or FOR UPDATE: one writer at a time")
    lost = [way for way, (credit, *_) in deposits.items() if credit != 2 * TEN]
    conclude(f"{saved[1]} of 21 rows saved; an update lost by: {', '.join(lost) or 'none'}")
    return {"saved": saved, "conflict": conflict, "deposits": deposits}


# ── 7. Job queue ──────────────────────────────────────────────────────────────────────

READY_JOB = sa.select(Job).where(Job.state == "ready").order_by(Job.attempts, Job.id).limit(1)
CLAIM_JOB = READY_JOB.with_for_update(skip_locked=True)
FAILED_OR_READY = sa.case((Job.attempts + 1 >= MAX_ATTEMPTS, "failed"), else_="ready")


def run_worker(engine: sa.Engine, handle: Callable[[Session, Job], None]) -> None:
    """Handle ready jobs until there is none that no other worker holds.

    Job and result are one transaction: if the worker dies, its lock goes with the connection and
    the job is ready again. So `handle` must be idempotent in whatever it does outside this
    database. A job whose handling raised waits behind the others, and has failed after
    MAX_ATTEMPTS. A death is not counted: jobs that can kill a worker, or take minutes, need a
    lease in the row. On SQLite one worker at a time.
    """
    while True:
        with Session(engine) as session:
            job = session.scalar(CLAIM_JOB)
            if job is None:
                return
            job_id = job.id  # it outlives the rollback
            this_job = sa.update(Job).where(Job.id == job_id, Job.state == "ready")
            try:
                handle(session, job)
                session.execute(this_job.values(state="done"))
                session.commit()
            except Exception:  # a worker must outlive a bad job
                logger.info("job %d failed", job_id, exc_info=True)
                session.rollback()
                failure = {"attempts": Job.attempts + 1, "state": FAILED_OR_READY}
                session.execute(this_job.values(failure))
                session.commit()


def demo_job_queue(workspace: Workspace) -> dict[str, int]:  # what → how many jobs
    """7. Job queue: claimed with SKIP LOCKED, and a bad job holds nobody up.

    Prediction: without a lock two workers claim the same job; the one that always raises ends as
    failed, the other nineteen as done.

    Trade-off: for jobs that belong to the data beside them; else take a broker (script 04).
    """
    engine = workspace.create(users=20)
    with Session(engine) as session, session.begin():
        session.execute(sa.insert(Job), [{"user_id": user} for user in range(1, 21)])
    jobs = {}
    for name, claim in {"no lock": READY_JOB, "SKIP LOCKED": CLAIM_JOB}.items():
        if not is_sqlite(engine):
            with Session(engine) as one, Session(engine) as other:
                claimed = {session.scalars(claim).one().id for session in (one, other)}
            jobs[f"two claims, {name}"] = len(claimed)

    def handle(_session: Session, job: Job) -> None:
        if job.user_id == 1:
            raise ValueError("a bad job")

    run_worker(engine, handle)
    with Session(engine) as session:
        jobs |= dict(sorted(Counter(session.scalars(sa.select(Job.state))).items()))
    for what, count in jobs.items():
        fact(what, count)
    if is_sqlite(engine):
        note("SQLite has no SKIP LOCKED: one worker at a time")
    conclude(f"{jobs['done']} of 20 jobs done, {jobs['failed']} failed")
    return jobs


# ── 8. Large results ──────────────────────────────────────────────────────────────────

ORDERS_BY_TIME = sa.select(Order.placed_at, Order.id).order_by(Order.placed_at, Order.id)


def offset_page(number: int, size: int) -> sa.Select[datetime, int]:
    """Page `number`, from 0: the database reads and drops every row before it."""
    return ORDERS_BY_TIME.limit(size).offset(number * size)


def keyset_page(after: tuple[datetime, int], size: int) -> sa.Select[datetime, int]:
    """The page after the key (placed_at, id): the index leads straight there.

    The id makes the key unique; without it, orders of the same moment are lost or repeated.
    """
    placed_at, id_ = sa.literal(after[0], UtcDateTime()), sa.literal(after[1], BIG_INTEGER)
    key = sa.tuple_(Order.placed_at, Order.id)
    return ORDERS_BY_TIME.where(key > sa.tuple_(placed_at, id_)).limit(size)


def scan_of(session: Session, statement: Select) -> str:
    """The step of a statement's plan that reads its table; on PostgreSQL, as it was carried out."""
    connection = session.connection()
    sqlite_way, postgres_way = "EXPLAIN QUERY PLAN", "EXPLAIN (ANALYZE, COSTS off, TIMING off)"
    prefix = sqlite_way if is_sqlite(connection) else postgres_way
    sql = statement.compile(connection, compile_kwargs={"literal_binds": True})
    steps = [str(row[-1]) for row in connection.exec_driver_sql(f"{prefix} {sql}")]
    return next(step.strip(" ->") for step in steps if re.search("scan|search", step, re.I))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python objects took at once in `work`; the driver's own is not seen."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def demo_large_results(engine: sa.Engine) -> dict[str, str]:
    """8. Large results: keyset against OFFSET at depth, a stream against a list.

    Prediction: OFFSET reads all that it skips; keyset reads one page at any depth.

    Trade-off: keyset knows no "page 731"; for the first few pages an offset is fine.
    """
    orders = count_rows(engine, Order)
    size = min(PAGE_ROWS, orders // 10 + 1)  # of few orders, smaller pages
    number = max(1, orders * 9 // 10 // size)
    with Session(engine) as session:
        last = session.execute(offset_page(number * size - 1, 1)).one()
        keyset = keyset_page((last.placed_at, last.id), size)
        ways = {"OFFSET": offset_page(number, size), "keyset": keyset}
        pages = [_ask(session, page) for page in ways.values()]
        best = best_seconds({name: partial(_ask, session, page) for name, page in ways.items()})
        scans = {name: scan_of(session, page) for name, page in ways.items()}
        for name, scan in scans.items():
            fact(f"page {number:,}, {name}", f"{best[name] * 1e3:.2f} ms, {scan}")
        query = sa.select(Order).limit(50_000)  # the list of more would only be larger
        stream = query.execution_options(yield_per=100)
        peak = {
            ".all()": peak_bytes(lambda: session.scalars(query).all()),
            "yield_per(100)": peak_bytes(lambda: sum(o.amount for o in session.scalars(stream))),
        }
    for name, size_bytes in peak.items():
        fact(f"peak of {name}", f"{size_bytes / 1e6:.1f} MB, {min(orders, 50_000):,} orders")
    if is_sqlite(engine):
        note("only PostgreSQL's EXPLAIN tells how many rows were read")
    ratio, same = peak[".all()"] / peak["yield_per(100)"], pages[0] == pages[1]
    conclude(f"the same page: {same}; a stream takes {ratio:.0f} times less memory in Python")
    return scans


# ── 9. Pool ───────────────────────────────────────────────────────────────────────────


def after_kill(engine: sa.Engine, *, pre_ping: bool) -> str:
    """What the next caller of a pool meets, after the server ended its only connection, as a
    failover does."""
    pool = sa.create_engine(engine.url, pool_size=1, max_overflow=0, pool_pre_ping=pre_ping)
    pid = sa.select(sa.func.pg_backend_pid())
    with pool.connect() as connection:
        before = connection.scalar(pid)
    with engine.connect() as connection:
        connection.scalar(sa.select(sa.func.pg_terminate_backend(before, 5_000)))  # ms
    try:
        with pool.connect() as connection:
            return "a new connection" if connection.scalar(pid) != before else "the old one"
    except exc.OperationalError:
        return "OperationalError"
    finally:
        pool.dispose()


def demo_pool(workspace: Workspace) -> dict[str, str]:  # event → what the caller met
    """9. Pool: bounded and pinged; a killed connection survived.

    Prediction: the fourth caller of a pool of 2 + 1 fails in time; with pool_pre_ping the caller
    after a kill notices nothing.

    Trade-off: a ping is a round trip a checkout. All pools together must stay below the server's
    max_connections; for hundreds of clients put PgBouncer before it.
    """
    engine = workspace.create(pool_size=2, max_overflow=1, pool_timeout=0.2)
    met = {"the fourth caller": "served"}
    with ExitStack() as held:
        for _caller in range(3):
            held.enter_context(engine.connect())
        started = time.perf_counter()
        try:
            engine.connect()
        except exc.TimeoutError as error:
            met["the fourth caller"] = type(error).__name__
        waited_s = time.perf_counter() - started
    if not is_sqlite(engine):
        met["after a kill"] = after_kill(engine, pre_ping=False)
        met["after a kill, pre_ping"] = after_kill(engine, pre_ping=True)
    for event, outcome in met.items():
        fact(event, outcome)
    if is_sqlite(engine):
        note("a killed connection needs a server: PostgreSQL")
    conclude(f"exhausted: {met['the fourth caller']} after {waited_s:.2f} s, not for ever")
    return met


# ── 10. Transfer to another engine ────────────────────────────────────────────────────


class TransferError(Exception):
    """The target is not fit for a transfer, or differs from the source after it."""


def transfer(
    source: sa.Engine,
    target: sa.Engine,
    batch_rows: int = BATCH_ROWS,
    on_batch: Callable[[int], object] = lambda rows: None,
) -> int:
    """Copy all rows between two databases of the same schema; returns how many it copied.

    A batch is one transaction in the target: interrupted anywhere and called again, it goes on
    after the last whole one. `on_batch(rows)` is called before a batch is committed, and undoes
    it by raising. Tables go in order of their foreign keys, rows in order of their primary key.
    The source must not change meanwhile. Raises TransferError, before it writes anything where
    the target's rows are not the first ones of the source.
    """
    for model in MODELS:
        _compare(source, target, model, count_rows(target, model))
    copied = 0
    for model in MODELS:
        query = _in_order(model).offset(count_rows(target, model))
        with source.connect().execution_options(yield_per=batch_rows) as reader:
            for batch in reader.execute(query).mappings().partitions():
                try:
                    with target.begin() as writer:
                        insert_rows(writer, model, [dict(row) for row in batch])
                        on_batch(len(batch))
                except (exc.IntegrityError, exc.DataError) as error:  # a rule of the target only
                    why = f"the target refuses a row ({error_code(error)})"
                    raise TransferError(f"{model.__tablename__}: {why}") from None  # it has the row
                copied += len(batch)
        _compare(source, target, model)
    with target.begin() as writer:
        reset_sequences(writer)
    return copied


def _compare(
    source: sa.Engine, target: sa.Engine, model: type[Base], rows: int | None = None
) -> None:
    expected, actual = checksum(source, model, rows), checksum(target, model)
    if expected != actual:
        raise TransferError(f"{model.__tablename__}: source {expected}, target {actual}")


def _in_order(model: type[Base]) -> Select:
    return sa.select(model.__table__).order_by(*sa.inspect(model).primary_key)


def checksum(engine: sa.Engine, model: type[Base], rows: int | None = None) -> tuple[int, str]:
    """(rows, sum of the SHA-256 of each) of the first `rows`: the same on every engine, in
    whatever order it sorts."""
    count = total = 0
    with engine.connect().execution_options(yield_per=BATCH_ROWS) as connection:
        for row in connection.execute(_in_order(model).limit(rows)):
            digest = hashlib.sha256(repr(tuple(row)).encode()).digest()
            total = (total + int.from_bytes(digest)) % 2**256
            count += 1
    return count, f"{total:064x}"


def reset_sequences(connection: sa.Connection) -> None:
    """Let PostgreSQL number on after the highest id: rows that brought theirs left it behind."""
    for model in MODELS if not is_sqlite(connection) else ():  # SQLite does so by itself
        table_ = cast(sa.Table, model.__table__)
        if "id" in table_.c:
            name = connection.dialect.identifier_preparer.format_table(table_)
            highest = sa.select(sa.func.greatest(sa.func.max(table_.c.id), 0) + 1)
            sequence = sa.func.pg_get_serial_sequence(name, "id")
            next_id = sa.func.setval(sequence, highest.scalar_subquery(), False)
            connection.execute(sa.select(next_id))


def demo_transfer(workspace: Workspace, directory: Path, users: int) -> dict[str, int]:
    """10. Transfer: from SQLite to another database, across an interruption.

    Prediction: a transfer that is cut off goes on where it was; every row arrives once.

    Trade-off: for hundreds of GB, use the engines' own tools (pgloader, logical replication).
    """
    target = workspace.create()
    source = Workspace(directory, None, 0).create(users=min(users, 5_000))
    total = sum(count_rows(source, model) for model in MODELS)
    sent: list[int] = []

    def cut_off(rows: int) -> None:
        sent.append(rows)
        if sum(sent) > total / 2:
            raise ConnectionError("a power cut")

    try:
        transfer(source, target, batch_rows=200, on_batch=cut_off)
    except ConnectionError:
        there = sum(count_rows(target, model) for model in MODELS)
        fact("power cut", f"in batch {len(sent)}: {sum(sent):,} rows sent, {there:,} are there")
    resumed = transfer(source, target)
    arrived = sum(count_rows(target, model) for model in MODELS)
    fact("resumed", f"{resumed:,} rows more; count and SHA-256 of {len(MODELS)} tables are equal")
    with target.connect() as connection:
        newcomer = sa.insert(User).values(email="next@example.com", full_name="Next")
        next_id = connection.scalar(newcomer.returning(User.id)) or 0
    fact("next user's id", f"{next_id}, after {count_rows(source, User)} users moved with theirs")
    source.dispose()
    if is_sqlite(target):
        note("the target is a second SQLite file; with DATABASE_URL it is PostgreSQL")
    conclude(f"{arrived:,} of {total:,} rows arrived across a power cut")
    return {"power cut": there, "resumed": arrived, "source": total, "next id": next_id}


# ── 11. Security ──────────────────────────────────────────────────────────────────────


def demo_security(workspace: Workspace) -> dict[str, int]:  # way → users that the attack matched
    """11. Security: injection, and passwords.

    Prediction: the same input matches every user as SQL, and nobody as a value.

    Trade-off: a hash that is slow for an attacker is slow for you: bound the logins at once.
    """
    engine = workspace.create(users=20)
    attack = "' OR '1'='1"
    ways: dict[str, sa.Executable] = {
        "pasted into SQL": sa.text(f"SELECT id FROM users WHERE email = '{attack}'"),  # noqa: S608
        "bound": sa.select(User.id).where(User.email == attack),
    }
    with engine.connect() as connection:
        matches = {way: len(connection.execute(query).all()) for way, query in ways.items()}
    fact(f"input {attack}", ", ".join(f"{way}: {n} of 20 users" for way, n in matches.items()))
    hasher = PasswordHasher()  # Argon2id, at the cost of RFC 9106's second recommendation
    stored = hasher.hash("correct horse")
    fact("password", f"{stored[:30]}…, verified: {hasher.verify(stored, 'correct horse')}")
    weak = PasswordHasher(time_cost=1).hash("correct horse")
    fact("rehash at the next login", f"{hasher.check_needs_rehash(weak)}, of one at a lower cost")
    conclude(f"bound, the attack matches {matches['bound']} users")
    return matches


# ── Main ──────────────────────────────────────────────────────────────────────────────

DEMOS = (
    demo_schema,
    demo_bulk_load,
    demo_repository,
    demo_n_plus_one,
    demo_analytics,
    demo_transactions,
    demo_job_queue,
    demo_large_results,
    demo_pool,
    demo_transfer,
    demo_security,
)


def libpq_addresses(url: str) -> config.Addresses:
    """Where libpq looks for the server of `url`; none where it decides by itself: without a host it
    takes PGHOST or its default socket. Raises ConfigError where SQLAlchemy misreads `url`."""
    try:
        parsed = sa.make_url(url)
        _, options = parsed.get_dialect()().create_connect_args(parsed)
        hosts = str(options.get("hostaddr") or options.get("host") or "").split(",")
        ports = str(options.get("port", os.environ.get("PGPORT", ""))).split(",")
        numbers = [int(port or 5432) for port in ports] * (len(hosts) if len(ports) == 1 else 1)
        pairs = [pair for pair in zip(hosts, numbers, strict=True) if pair[0]]
        make_dsn(**options)  # libpq knows the names of its options
        if "[" in hosts:  # of an IPv6 address in a list, which SQLAlchemy cuts at its first colon
            raise ValueError
        if not all(0 < number < 65536 for number in numbers):
            raise ValueError
    except (ValueError, TypeError, exc.ArgumentError, psycopg2.ProgrammingError):
        # The error may quote a password.
        problem = "malformed URL; is an option after the ? wrong?"
        raise config.ConfigError(f"DATABASE_URL: {problem}") from None
    return [(f"{h}/.s.PGSQL.{port}", None) if h[0] == "/" else (h, port) for h, port in pairs]


# libpq says one line for each host, and a second one behind a tab. Any other line is an answer.
ABSENT = r"failed: (timeout expired|Connection refused|No such file)|could not translate host name"


def server_version(url: str, timeout_s: float) -> str:
    """The version of the PostgreSQL at `url`.

    Raises ServiceUnavailable where nothing answers, ConfigError where it refuses.
    """
    config.require_reachable("PostgreSQL", url, libpq_addresses(url), timeout_s)
    # A login takes up to six round trips: a refusal that comes late must not count as silence.
    engine = postgres_engine(url, "public", 3 * timeout_s, poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            version = str(connection.scalar(sa.text("SHOW server_version"))).split()[0]
            standby = connection.scalar(sa.text("SELECT pg_is_in_recovery()"))
    except exc.DBAPIError as error:
        lines = [line for line in str(error.orig).strip().split("\n") if line[:1] != "\t"]
        if not all(re.search(ABSENT, line) for line in lines):
            raise refused(url, error) from error
        silent = any("timeout expired" in line for line in lines)
        reason = "it accepts, and says nothing" if silent else lines[0]
        raise config.ServiceUnavailable("PostgreSQL", reason, url) from error
    if standby:
        raise config.ConfigError(f"DATABASE_URL: {config.redact(url)} is a read-only standby")
    return version


def refused(url: str, error: exc.DBAPIError) -> config.ConfigError:
    reason = config.redact(str(error.orig).strip())
    return config.ConfigError(f"DATABASE_URL: {config.redact(url)} refuses: {reason}")


@contextmanager
def open_resources(run: config.Run) -> Iterator[dict[str, object]]:
    """A seeded database in a workspace: on PostgreSQL, or on SQLite where there is none."""
    url, timeout_s = None, run.settings.connect_timeout_s
    try:
        configured = run.url("PostgreSQL", "DATABASE_URL")
        run.services["database"] = f"PostgreSQL {server_version(configured, timeout_s)}"
        url = configured
    except config.ServiceUnavailable as error:
        run.fall_back("database", error, f"SQLite {sqlite3.sqlite_version}")
    with tempfile.TemporaryDirectory(prefix="module8-") as name, ExitStack() as stack:
        directory = Path(name)
        workspace = Workspace(directory, url, timeout_s)
        stack.callback(workspace.close)
        try:
            engine = workspace.create(run.scale)
        except exc.ProgrammingError as error:
            if error_code(error) != "42501":  # insufficient_privilege: to create a schema
                raise
            raise refused(url or "", error) from error
        yield {"engine": engine, "workspace": workspace, "directory": directory, "users": run.scale}


def main(argv: Sequence[str] | None = None) -> int:
    return config.run_script(
        __doc__ or "", DEMOS, open_resources, argv, scale=DEFAULT_USERS, scale_unit="users"
    )


if __name__ == "__main__":
    raise SystemExit(main())
