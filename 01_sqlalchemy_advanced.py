"""SQLAlchemy 2.1: a schema that refuses bad data, queries that scale, and nothing lost.

You will learn to
  - build a schema by migration, load it in bulk, and reach it through a repository
  - see and cure N+1 queries, page and stream through large results
  - answer cohort, geographic and recursive questions in SQL, checked in plain Python
  - survive concurrency: savepoints, optimistic locking, SERIALIZABLE with retry, job queues
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

import base64
import hashlib
import hmac
import io
import logging
import math
import os
import random
import re
import secrets
import sqlite3
import tempfile
import threading
import time
import tracemalloc
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import Script
from alembic.script.revision import RevisionMap
from psycopg2.extensions import make_dsn
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
)
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import config
from config import conclude, fact, note, table

logger = logging.getLogger(__name__)

SEED = 8  # the data are the same in every run
DEFAULT_USERS = 500  # enough for N+1 to hurt, few enough for every demo to end in seconds
FIRST_DAY, LAST_DAY = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
BATCH_ROWS = 2_000  # users or rows in memory at once while seeding and moving, a few MB
PAGE_ROWS = 20  # what one screen shows
LARGE_ORDER = Decimal("100.00")  # in the currency of the shop
EARTH_RADIUS_KM = 6371.0088  # mean radius (IUGG)
STATEMENT_TIMEOUT_MS = 60_000  # no demo's statement comes near; a runaway one ends
INSUFFICIENT_PRIVILEGE = "42501"  # SQLSTATE: the role may not create a schema
RETRYABLE = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected
SCRYPT = {"n": 2**14, "r": 8, "p": 5}  # OWASP Password Storage Cheat Sheet: 16 MiB
SCRYPT_MAX_WORK = 2**28  # bytes, 128·n·r·p: twice OWASP's costliest; a stored hash gets no more
STORED_HASH = re.compile(  # 16 bytes of salt and 64 of digest, in base64
    r"scrypt\$([0-9]{1,9})\$([0-9]{1,9})\$([0-9]{1,9})\$([A-Za-z0-9+/]{22}==)\$([A-Za-z0-9+/]{86}==)"
)

# Three cities of each of twenty countries: latitude, longitude (GeoNames, CC BY 4.0).
PLACES = """
AR Argentina: Buenos Aires -34.61 -58.38, Córdoba -31.41 -64.19, Rosario -32.95 -60.64
AU Australia: Sydney -33.87 151.21, Melbourne -37.81 144.96, Brisbane -27.47 153.03
BR Brazil: São Paulo -23.55 -46.64, Rio de Janeiro -22.91 -43.18, Belo Horizonte -19.92 -43.94
CA Canada: Toronto 43.71 -79.40, Montréal 45.51 -73.59, Calgary 51.05 -114.09
CN China: Shanghai 31.22 121.46, Beijing 39.91 116.40, Shenzhen 22.55 114.07
DE Germany: Berlin 52.52 13.41, Hamburg 53.55 9.99, Munich 48.14 11.58
EG Egypt: Cairo 30.06 31.25, Alexandria 31.20 29.92, Port Said 31.27 32.30
ES Spain: Madrid 40.42 -3.70, Barcelona 41.39 2.16, Valencia 39.47 -0.38
FR France: Paris 48.85 2.35, Marseille 43.30 5.38, Lyon 45.75 4.85
GB United Kingdom: London 51.51 -0.13, Birmingham 52.48 -1.90, Glasgow 55.87 -4.26
IN India: Mumbai 19.07 72.88, Delhi 28.65 77.23, Bengaluru 12.97 77.59
IT Italy: Rome 41.89 12.51, Milan 45.46 9.19, Naples 40.85 14.27
JP Japan: Tokyo 35.69 139.69, Yokohama 35.43 139.65, Osaka 34.69 135.50
KE Kenya: Nairobi -1.28 36.82, Mombasa -4.05 39.66, Nakuru -0.31 36.07
MX Mexico: Mexico City 19.43 -99.13, Tijuana 32.50 -117.00, Puebla 19.05 -98.21
NG Nigeria: Lagos 6.45 3.39, Kano 12.00 8.52, Ibadan 7.38 3.91
PL Poland: Warsaw 52.23 21.01, Kraków 50.06 19.94, Wrocław 51.10 17.03
TR Turkey: Istanbul 41.01 28.95, Ankara 39.92 32.85, Bursa 40.20 29.06
US United States: New York City 40.71 -74.01, Los Angeles 34.05 -118.24, Chicago 41.85 -87.65
ZA South Africa: Johannesburg -26.20 28.04, Cape Town -33.93 18.42, Durban -29.86 31.03
"""
FIRST_NAMES = "Ada Alan Barbara Edgar Frances Grace Hedy Jim Katherine Leslie Margaret Tony".split()
LAST_NAMES = "Allen Bachman Codd Date Gray Hopper Kay Lamport Liskov Perlman Ritchie Wing".split()

# ── Domain: types and models ────────────────────────────────────────────────────────

Row = dict[str, Any]
T = TypeVar("T")


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Timezone-aware UTC on every engine. SQLite knows no zones: it stores UTC without one.

    Raises ValueError for a time without a zone.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value!r}")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if dialect.name == "sqlite":
            return value and value.replace(tzinfo=UTC)
        return value and value.astimezone(UTC)


class Money(sa.types.TypeDecorator[Decimal]):
    """Exact money: NUMERIC(12, 2), and whole cents on SQLite, whose only fraction is a float.

    Raises TypeError for anything but a Decimal, ValueError for a fraction of a cent,
    NaN or infinity.
    """

    impl = sa.Numeric(12, 2)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(sa.BigInteger() if dialect.name == "sqlite" else self.impl)

    def process_bind_param(self, value: Decimal | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        if not isinstance(value, Decimal):
            raise TypeError(f"money must be a Decimal, not {type(value).__name__}")
        if not value.is_finite() or value * 100 != (value * 100).to_integral_value():
            raise ValueError(f"a fraction of a cent: {value}")
        return int(value * 100) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Decimal | None:
        if value is None:
            return None
        return round(Decimal(value) / 100 if dialect.name == "sqlite" else value, 2)


# SQLite numbers rows by itself only in a column of type INTEGER.
BIG_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
BigId = Annotated[int, mapped_column(BIG_INTEGER, sa.Identity(), primary_key=True)]
UserId = Annotated[int, mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"))]


READY = sa.text("state = 'ready'")


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
    __table_args__ = (
        sa.CheckConstraint("length(code) = 2 AND code = upper(code)", name="iso_code"),
    )

    code: Mapped[str] = mapped_column(sa.String(2), primary_key=True)  # ISO 3166-1 alpha-2
    name: Mapped[str] = mapped_column(sa.String(60), unique=True)


class City(Base):
    __tablename__ = "cities"
    __table_args__ = (
        sa.UniqueConstraint("country_code", "name"),
        sa.CheckConstraint("latitude BETWEEN -90 AND 90", name="latitude"),
        sa.CheckConstraint("longitude BETWEEN -180 AND 180", name="longitude"),
    )

    id: Mapped[BigId]
    country_code: Mapped[str] = mapped_column(sa.ForeignKey("countries.code"))
    name: Mapped[str] = mapped_column(sa.String(60))
    latitude: Mapped[float] = mapped_column(sa.Double())  # degrees, WGS 84
    longitude: Mapped[float] = mapped_column(sa.Double())
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
        sa.CheckConstraint("amount > 0", name="amount"),
        sa.Index(None, "placed_at", "id"),  # the key that demo_large_results pages by
    )

    id: Mapped[BigId]
    user_id: Mapped[UserId] = mapped_column(index=True)
    placed_at: Mapped[datetime]
    amount: Mapped[Decimal]

    @hybrid_property
    def is_large(self) -> bool:
        """One rule for both sides: a bool on an order, a condition in SQL on the class."""
        return self.amount >= LARGE_ORDER


class User(Base):
    __tablename__ = "users"
    __table_args__ = (
        sa.CheckConstraint("email = lower(email) AND email LIKE '%_@_%'", name="email"),
        # Whoever refers was there before: no cycles, and rows can be moved in order of their id.
        sa.CheckConstraint("referred_by_id < id", name="referrer_is_older"),
        sa.CheckConstraint("credit >= 0", name="credit"),
    )

    id: Mapped[BigId]
    email: Mapped[str] = mapped_column(
        sa.String(254), unique=True
    )  # RFC 5321: a path of 256, less < and >
    full_name: Mapped[str] = mapped_column(sa.String(80))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    referred_by_id: Mapped[int | None] = mapped_column(
        sa.ForeignKey("users.id", ondelete="SET NULL"), index=True
    )
    credit: Mapped[Decimal] = mapped_column(server_default="0")
    version: Mapped[int] = mapped_column(server_default="1")
    addresses: Mapped[list[Address]] = relationship(passive_deletes=True)
    orders: orm.WriteOnlyMapped[Order] = relationship(passive_deletes=True)
    cities: AssociationProxy[list[City]] = association_proxy("addresses", "city")
    __mapper_args__ = {"version_id_col": version}


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        sa.CheckConstraint("state IN ('ready', 'done')", name="state"),
        sa.Index(
            "ix_jobs_ready", "id", postgresql_where=READY, sqlite_where=READY
        ),  # a claim reads no job that is done
    )

    id: Mapped[BigId]
    user_id: Mapped[UserId] = mapped_column(index=True)
    state: Mapped[str] = mapped_column(sa.String(8), server_default="ready")


CORE_TABLES = [model.__tablename__ for model in (Country, City, Address, User)]
MODELS: tuple[type[Base], ...] = (Country, City, User, Address, Order, Job)  # parents first

# ── Domain: the data ────────────────────────────────────────────────────────────────


def places() -> tuple[list[Row], list[Row]]:
    """The countries and their cities, as rows for `Country` and `City`."""
    countries: list[Row] = []
    cities: list[Row] = []
    for line in PLACES.strip().splitlines():
        country, listed = line.split(": ")
        code, name = country.split(" ", 1)
        countries.append({"code": code, "name": name})
        for city in listed.split(", "):
            label, latitude, longitude = city.rsplit(" ", 2)
            row = {"id": len(cities) + 1, "country_code": code, "name": label}
            cities.append({**row, "latitude": float(latitude), "longitude": float(longitude)})
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


# ── Engines: an honest SQLite, a bounded PostgreSQL, a workspace of one's own ───────


def sqlite_engine(path: Path, **options: Any) -> sa.Engine:
    """SQLite that enforces foreign keys and whose savepoints mean what they say.

    The driver's own transaction control lets a row survive the rollback of the transaction around
    its savepoint; so it is switched off, and SQLAlchemy sends BEGIN (SQLAlchemy's documentation
    of the dialect, "Enabling Non-Legacy SQLite Transactional Modes").
    """
    engine = sa.create_engine(f"sqlite:///{path}", **{"hide_parameters": True, **options})

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA busy_timeout = 5000")  # ms to wait for another writer
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not block the writer

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        # Past exec_driver_sql, so that count_queries counts only what was asked for.
        connection.connection.cursor().execute("BEGIN")

    return engine


def postgres_engine(url: str, schema: str, timeout_s: float, **options: Any) -> sa.Engine:
    """PostgreSQL in a schema of its own, times in UTC, with a bound on connecting and asking."""
    session = f"search_path={schema}", "TimeZone=UTC", f"statement_timeout={STATEMENT_TIMEOUT_MS}"
    own = str(sa.make_url(url).query.get("options", ""))  # ours come after, and win
    connect_args = {
        "connect_timeout": math.ceil(timeout_s),
        "tcp_user_timeout": STATEMENT_TIMEOUT_MS,  # of a network that swallows packets
        "options": " ".join([own, *(f"-c {setting}" for setting in session)]),
        "fallback_application_name": "module8-01",
    }
    defaults = {"hide_parameters": True, "connect_args": connect_args}
    return sa.create_engine(url, **{**defaults, **options})


class Workspace:
    """Throw-away databases beside whatever is there: PostgreSQL schemas, or SQLite files."""

    def __init__(self, directory: Path, url: str | None, timeout_s: float) -> None:
        self._directory, self._url, self._timeout_s = directory, url, timeout_s
        self._names: dict[sa.Engine, str] = {}

    def create(self, users: int = 0, **options: Any) -> sa.Engine:
        """An engine on a new database at the newest migration, with the data of `users` users."""
        name = f"module8_{secrets.token_hex(6)}"
        engine = self._open(name, options)  # first: what close() is to drop, if interrupted next
        if self._url is not None:
            self._execute(sa.schema.CreateSchema(name))
        migrate(engine)
        if users:
            seed(engine, users)
        return engine

    def reopen(self, engine: sa.Engine, **options: Any) -> sa.Engine:
        """One more engine, with options of its own, on the database of `engine`."""
        return self._open(self._names[engine], options)

    def close(self) -> None:
        """Drop what was created. The directory is the caller's."""
        for engine in self._names:
            engine.dispose()
        left: list[str] = []
        reason = ""
        for name in sorted(set(self._names.values())) if self._url is not None else ():
            try:
                self._execute(sa.schema.DropSchema(name, cascade=True, if_exists=True))
            except DBAPIError as error:
                left, reason = [*left, name], str(error.orig).partition("\n")[0]
        if left:
            logger.warning("these may stay behind: %s (%s)", ", ".join(left), reason)

    def _open(self, name: str, options: Row) -> sa.Engine:
        if self._url is None:
            engine = sqlite_engine(self._directory / name, **options)
        else:
            engine = postgres_engine(self._url, name, self._timeout_s, **options)
        self._names[engine] = name
        return engine

    def _execute(self, statement: sa.Executable) -> None:
        engine = postgres_engine(self._url or "", "public", self._timeout_s, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(statement)


def seed(engine: sa.Engine, users: int) -> None:
    """Fill an empty, migrated database, in one transaction; memory stays bounded at any size."""
    countries, cities = places()
    generated = people(users)
    with engine.begin() as connection, config.progress() as bar:
        task = bar.add_task("seeding users", total=users)
        insert_rows(connection, Country, countries)
        insert_rows(connection, City, cities)
        while batch := list(islice(generated, BATCH_ROWS)):
            insert_rows(connection, User, [user for user, _, _ in batch])
            insert_rows(connection, Address, [row for _, rows, _ in batch for row in rows])
            insert_rows(connection, Order, [row for _, _, rows in batch for row in rows])
            bar.advance(task, len(batch))
        reset_sequences(connection)
    # The planner must know the new rows, and the index-only scan that no old versions are about.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE" if is_sqlite(engine) else "VACUUM ANALYZE")
        connection.commit()  # what sqlite_engine began, here too: else its ANALYZE is rolled back


def is_sqlite(engine: sa.Engine | sa.Connection) -> bool:
    """Whether this is the embedded engine, whose limits the demos name."""
    return engine.dialect.name == "sqlite"


def count_rows(engine: sa.Engine, model: type[Base]) -> int:
    """The committed rows of a model's table."""
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(model)) or 0


def best_seconds(ways: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """The best time of each way. Rounds are interleaved: a busy moment hits every way."""
    best = dict.fromkeys(ways, math.inf)
    for _round in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


# ── 1. Schema, by migration ─────────────────────────────────────────────────────────
# A migration is frozen: it repeats the columns of its day and never imports the models.


def _id() -> sa.Column[int]:
    return sa.Column("id", BIG_INTEGER, sa.Identity(), primary_key=True)


def _user_id(**options: Any) -> sa.Column[int]:
    cascade = sa.ForeignKey("users.id", ondelete="CASCADE")
    return sa.Column("user_id", BIG_INTEGER, cascade, nullable=False, **options)


def _create_shop() -> None:
    op.create_table(
        "countries",
        sa.Column("code", sa.String(2), primary_key=True),
        sa.Column("name", sa.String(60), nullable=False, unique=True),
        sa.CheckConstraint("length(code) = 2 AND code = upper(code)", name="iso_code"),
    )
    op.create_table(
        "cities",
        _id(),
        sa.Column("country_code", sa.String(2), sa.ForeignKey("countries.code"), nullable=False),
        sa.Column("name", sa.String(60), nullable=False),
        sa.Column("latitude", sa.Double(), nullable=False),
        sa.Column("longitude", sa.Double(), nullable=False),
        sa.UniqueConstraint("country_code", "name"),
        sa.CheckConstraint("latitude BETWEEN -90 AND 90", name="latitude"),
        sa.CheckConstraint("longitude BETWEEN -180 AND 180", name="longitude"),
    )
    op.create_table(
        "users",
        _id(),
        sa.Column("email", sa.String(254), nullable=False, unique=True),
        sa.Column("full_name", sa.String(80), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column(
            "referred_by_id",
            BIG_INTEGER,
            sa.ForeignKey("users.id", ondelete="SET NULL"),
            index=True,
        ),
        sa.Column("version", BIG_INTEGER, nullable=False, server_default="1"),
        sa.CheckConstraint("email = lower(email) AND email LIKE '%_@_%'", name="email"),
        sa.CheckConstraint("referred_by_id < id", name="referrer_is_older"),
    )
    op.create_table(
        "addresses",
        _id(),
        _user_id(),
        sa.Column("city_id", BIG_INTEGER, sa.ForeignKey("cities.id"), nullable=False, index=True),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("street", sa.String(80), nullable=False),
        sa.UniqueConstraint("user_id", "kind"),
        sa.CheckConstraint("kind IN ('home', 'billing')", name="kind"),
    )
    op.create_table(
        "orders",
        _id(),
        _user_id(index=True),
        sa.Column("placed_at", UtcDateTime(), nullable=False),
        sa.Column("amount", Money(), nullable=False),
        sa.CheckConstraint("amount > 0", name="amount"),
        sa.Index(None, "placed_at", "id"),
    )


def _drop_shop() -> None:
    for name in ("orders", "addresses", "users", "cities", "countries"):
        op.drop_table(name)


def _add_credit_and_jobs() -> None:
    with op.batch_alter_table("users") as users:  # SQLite alters a table by copying it
        users.add_column(sa.Column("credit", Money(), nullable=False, server_default="0"))
        users.create_check_constraint("credit", "credit >= 0")
    op.create_table(
        "jobs",
        _id(),
        _user_id(index=True),
        sa.Column("state", sa.String(8), nullable=False, server_default="ready"),
        sa.CheckConstraint("state IN ('ready', 'done')", name="state"),
        sa.Index("ix_jobs_ready", "id", postgresql_where=READY, sqlite_where=READY),
    )


def _drop_credit_and_jobs() -> None:
    op.drop_table("jobs")
    with op.batch_alter_table("users") as users:
        users.drop_constraint(op.f("ck_users_credit"), type_="check")
        users.drop_column("credit")


@dataclass(frozen=True)
class Migration:
    """What Alembic reads from a file in `versions/`."""

    revision: str
    down_revision: str | None
    upgrade: Callable[[], None]
    downgrade: Callable[[], None]


MIGRATIONS = (
    Migration("0001_shop", None, _create_shop, _drop_shop),
    Migration("0002_credit", "0001_shop", _add_credit_and_jobs, _drop_credit_and_jobs),
)


def migrate(engine: sa.Engine, target: str = "head") -> list[str]:
    """Bring the database to `target`: "head", "base" or a revision. Returns the steps taken.

    All of it is one transaction, on SQLite too. Its foreign keys are off meanwhile, so that
    replacing a table by its altered copy deletes no row that refers to it, and are checked
    before the commit. Raises ValueError for an unknown target.
    """
    revisions = RevisionMap(
        lambda: [Script(cast(types.ModuleType, m), m.revision, m.revision) for m in MIGRATIONS]
    )
    scripts = [cast(Script, revisions.get_revision(m.revision)) for m in MIGRATIONS]
    order = ["base", *(script.revision for script in scripts)]
    goal = order[-1] if target == "head" else target
    if goal not in order:
        raise ValueError(f"no revision {target!r}; there are: {', '.join(order)}")
    taken: list[str] = []

    def steps(heads: tuple[str, ...], _context: MigrationContext) -> Iterator[MigrationStep]:
        start, end = order.index(heads[0] if heads else "base"), order.index(goal)
        for script in scripts[start:end]:
            taken.append(f"up to {script.revision}")
            yield MigrationStep.upgrade_from_script(revisions, script)
        for script in reversed(scripts[end:start]):
            taken.append(f"down from {script.revision}")
            yield MigrationStep.downgrade_from_script(revisions, script)

    with engine.connect() as connection, _foreign_keys_off(connection):
        context = _migration_context(connection, fn=steps)
        with Operations.context(context):
            context.run_migrations()
    return taken


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
                raise RuntimeError("the migration would leave rows that refer to nothing")
    finally:
        if file:
            file.execute("PRAGMA foreign_keys = ON")


def schema_differences(engine: sa.Engine) -> list[Any]:
    """What Alembic's autogenerate would change to make the database match the models."""
    with engine.connect() as connection:
        return list(compare_metadata(_migration_context(connection), Base.metadata))


def _migration_context(connection: sa.Connection, **options: Any) -> MigrationContext:
    checks = "alembic.ext.checkconstraint_byname"  # else autogenerate is blind to CHECK
    options |= {"target_metadata": Base.metadata, "transactional_ddl": True}
    options["autogenerate_plugins"] = ["alembic.autogenerate.*", checks]
    return MigrationContext.configure(connection, opts=options)


def violated_constraint(error: IntegrityError) -> str | None:
    """The name of the constraint that refused a row; None for NOT NULL, which has no name.

    PostgreSQL reports the name. SQLite names a CHECK, tells a UNIQUE by its columns, and a
    foreign key not at all: None too.
    """
    if not isinstance(error.orig, sqlite3.Error):
        return cast("str | None", cast(Any, error.orig).diag.constraint_name)
    kind = error.orig.sqlite_errorname.removeprefix("SQLITE_CONSTRAINT_")
    subject = str(error.orig).partition(" failed: ")[2]
    if kind == "CHECK":
        return subject
    if kind not in ("UNIQUE", "PRIMARYKEY"):
        return None
    table_name = subject.partition(".")[0]
    columns = {name.partition(".")[2] for name in subject.split(", ")}
    for constraint in Base.metadata.tables[table_name].constraints:
        if isinstance(constraint, sa.UniqueConstraint | sa.PrimaryKeyConstraint):
            if columns == set(constraint.columns.keys()):
                return str(constraint.name)
    return None


def insert_each(session: Session, model: type[Base], rows: Sequence[Row]) -> dict[int, str | None]:
    """Insert `rows`, a savepoint each; returns index → violated constraint of those refused."""
    refused = {}
    for index, row in enumerate(rows):
        try:
            with session.begin_nested():
                session.execute(sa.insert(model), [row])
        except IntegrityError as error:
            refused[index] = violated_constraint(error)
    return refused


@dataclass(frozen=True)
class SchemaResult:
    version: str
    checks: dict[str, int]  # core table → CHECK constraints that the database has
    refused_by: dict[str, str | None]


def demo_schema(workspace: Workspace) -> SchemaResult:
    """1. Schema: constraints that refuse bad data, created by migration.

    Prediction: each bad row is refused by the database, whatever the application forgot.

    Trade-off: a CHECK added later scans the table (PostgreSQL: NOT VALID, then VALIDATE); rules
    that change every month belong in the application.
    """
    engine = workspace.create()
    ada, *_ = next(people(1))
    with engine.begin() as connection:
        insert_rows(connection, Country, places()[0])
        insert_rows(connection, User, [ada])
        version = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    when, city = FIRST_DAY, {"country_code": "DE", "name": "Nowhere", "longitude": 0.0}
    bad: dict[str, tuple[type[Base], Row]] = {
        "e-mail in capitals": (User, {**ada, "id": 2, "email": "ADA@EXAMPLE.COM"}),
        "e-mail taken": (User, {**ada, "id": 2}),
        "amount of 0.00": (Order, {"user_id": 1, "placed_at": when, "amount": Decimal(0)}),
        "order of nobody": (Order, {"user_id": 99, "placed_at": when, "amount": Decimal(1)}),
        "91° north": (City, {**city, "latitude": 91.0}),
    }
    refused: dict[str, str | None] = {}
    with Session(engine) as session:
        for label, (model, row) in bad.items():
            for constraint in insert_each(session, model, [row]).values():
                refused[label] = constraint
    config.listing(str(sa.schema.CreateTable(cast(sa.Table, City.__table__)).compile(engine)))
    checks = {name: len(sa.inspect(engine).get_check_constraints(name)) for name in CORE_TABLES}
    fact("alembic_version", version)
    fact("CHECK constraints", ", ".join(f"{name}: {n}" for name, n in checks.items()))
    table(
        ["bad row", "refused by"], [(k, v or "a foreign key (unnamed)") for k, v in refused.items()]
    )
    conclude(f"{len(refused)} of {len(bad)} bad rows refused by the database itself")
    return SchemaResult(str(version), checks, refused)


# ── 2. Bulk load ────────────────────────────────────────────────────────────────────


def copy_rows(connection: sa.Connection, model: type[Base], rows: Sequence[Row]) -> None:
    """Load `rows`, dicts of equal keys, by PostgreSQL's COPY in the connection's transaction.

    Values go as text (PostgreSQL's manual, COPY, "Text Format"), past the Python side of the
    column types; the database's types and constraints hold. Raises DBAPIError, as SQLAlchemy does.
    """
    columns = list(rows[0])
    lines = ("\t".join(_copy_text(row[column]) for column in columns) for row in rows)
    statement = f"COPY {model.__tablename__} ({', '.join(columns)}) FROM STDIN"
    text = io.StringIO("".join(f"{line}\n" for line in lines))
    driver = cast(Any, connection.dialect).dbapi
    try:
        with cast(Any, connection.connection).cursor() as cursor:
            cursor.copy_expert(statement, text)
    except driver.Error as error:
        raise DBAPIError.instance(
            statement, None, error, driver.Error, hide_parameters=True, dialect=connection.dialect
        ) from error


_COPY_SPECIAL = re.compile(r"[\\\t\n\r]")
_COPY_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _copy_text(value: object) -> str:
    if value is None:
        return r"\N"
    text = str(value)
    # Few values hold anything to escape, and looking is cheaper than translating.
    return text.translate(_COPY_ESCAPES) if _COPY_SPECIAL.search(text) else text


def insert_rows(connection: sa.Connection, model: type[Base], rows: Sequence[Row]) -> None:
    """Load `rows`, dicts of equal keys, in the fastest way that the engine has."""
    if rows and is_sqlite(connection):
        connection.execute(sa.insert(model), rows)
    elif rows:
        copy_rows(connection, model, rows)


def _add_all(session: Session, rows: Sequence[Row]) -> None:
    session.add_all([Order(**row) for row in rows])
    session.flush()


Loader = Callable[[Session, Sequence[Row]], object]
LOADERS: dict[str, Loader] = {  # the last one is the fastest
    "session.add_all": _add_all,
    "ORM insert(Order)": lambda s, rows: s.execute(sa.insert(Order), rows),
    "Core insert(Order)": lambda s, rows: s.connection().execute(sa.insert(Order), rows),
    "COPY": lambda s, rows: copy_rows(s.connection(), Order, rows),
}


@dataclass(frozen=True)
class BulkResult:
    rows: int
    seconds: dict[str, float]
    same_rows: bool


def demo_bulk_load(workspace: Workspace, users: int) -> BulkResult:
    """2. Bulk load: the same orders, inserted in four ways.

    Prediction: add_all pays for an object and a key each; COPY sends one stream.

    Trade-off: Core and COPY skip the session: no model defaults, no events, no objects.
    """
    size, users = min(10 * users, 50_000), min(users, DEFAULT_USERS)
    engine = workspace.create(users)  # its own: what is rolled back leaves dead rows behind
    ways = [name for name in LOADERS if name != "COPY" or not is_sqlite(engine)]
    moments = [FIRST_DAY + timedelta(minutes=i) for i in range(size)]
    rows = [
        {"user_id": i % users + 1, "placed_at": moment, "amount": Decimal(i + 1) / 100}
        for i, moment in enumerate(moments)
    ]
    totals = set()
    for way in ways:
        with Session(engine) as session:  # never committed
            LOADERS[way](session, rows)
            query = sa.select(sa.func.count(), sa.func.sum(Order.amount))
            totals.add(tuple(session.execute(query).one()))

    def load(way: str) -> None:
        with Session(engine) as session:
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
    same = len(totals) == 1
    fact("count and sum", f"the same after each way: {same}")
    conclude(f"{size:,} rows, not committed: add_all takes {ratio:.1f} times as long")
    return BulkResult(size, seconds, same)


# ── 3. Repository and unit of work ──────────────────────────────────────────────────


class EmailTaken(Exception):
    """Another user has this e-mail address."""


class UserNotFound(Exception):
    """No user has this e-mail address."""


class InvalidUser(Exception):
    """The database refuses these values; says by which constraint, and not the values."""


@dataclass(frozen=True)
class Person:
    """A user as the domain sees it: values, and no session behind them."""

    email: str
    full_name: str


class UserRepository:
    """The users as a collection, by e-mail address. A refusal is an error of the domain."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, person: Person) -> None:
        """Raises EmailTaken or InvalidUser; what the unit of work did before stays."""
        with self._domain_errors(person):
            self._session.execute(sa.insert(User).values(vars(person)))

    def save(self, person: Person) -> bool:
        """Insert, or rename whom the address belongs to, in one statement; True if inserted.

        Raises InvalidUser.
        """
        dialect = self._session.get_bind().dialect.name
        insert = sqlite.insert(User) if dialect == "sqlite" else postgresql.insert(User)
        renamed = {"full_name": person.full_name, "version": User.version + 1}
        upsert = insert.values(vars(person)).on_conflict_do_update(
            index_elements=[User.email], set_=renamed
        )
        with self._domain_errors(person):
            return self._session.scalar(upsert.returning(User.version)) == 1

    @contextmanager
    def _domain_errors(self, person: Person) -> Iterator[None]:
        """A savepoint: a refused statement costs itself only."""
        try:
            if "\0" in f"{person.email}{person.full_name}":
                raise ValueError("a NUL byte")  # as psycopg2 does; SQLite would store it
            with self._session.begin_nested():
                yield
        except (IntegrityError, sa.exc.DataError, ValueError) as error:  # ValueError: a NUL byte
            name = violated_constraint(error) if isinstance(error, IntegrityError) else None
            if name == "uq_users_email":
                raise EmailTaken(person.email) from None  # the driver's text holds the row
            raise InvalidUser(f"refused by {name or 'a column type'}") from None

    def get(self, email: str) -> Person:
        """Raises UserNotFound."""
        query = sa.select(User.email, User.full_name).where(User.email == email)
        row = self._session.execute(query).one_or_none()
        if row is None:
            raise UserNotFound(email)
        return Person(*row)

    def remove(self, email: str) -> None:
        """Removes addresses and orders too. Raises UserNotFound."""
        deletion = sa.delete(User).where(User.email == email).returning(User.id)
        if self._session.scalar(deletion) is None:
            raise UserNotFound(email)


class UnitOfWork:
    """One transaction a `with` block: what was not committed at its end is rolled back."""

    def __init__(self, engine: sa.Engine) -> None:
        self._session = Session(engine)
        self.users = UserRepository(self._session)

    def __enter__(self) -> UnitOfWork:
        return self

    def __exit__(self, *_error: object) -> None:
        self._session.close()

    def commit(self) -> None:
        self._session.commit()


@dataclass(frozen=True)
class RepositoryResult:
    users_after: tuple[int, int]  # a forgotten commit, a commit
    errors: tuple[str, ...]
    inserted: tuple[bool, bool]


def demo_repository(workspace: Workspace) -> RepositoryResult:
    """3. Repository and unit of work: rollback unless committed, domain errors only.

    Prediction: without commit() nothing stays; a taken address costs itself only.

    Trade-off: a repository hides the query language: for reports, query the session.
    """
    engine = workspace.create()
    ada, alan = Person("ada@example.com", "Ada King"), Person("alan@example.com", "Alan Turing")
    errors = []
    with UnitOfWork(engine) as work:
        work.users.add(ada)
    forgotten = count_rows(engine, User)
    with UnitOfWork(engine) as work:
        work.users.add(ada)
        try:
            work.users.add(Person(ada.email, "An Impostor"))
        except EmailTaken as error:
            errors.append(f"EmailTaken: {error}")
        with count_queries(engine) as queries:
            inserted = work.users.save(alan), work.users.save(Person(alan.email, "A. M. Turing"))
        try:
            work.users.get("nobody@example.com")
        except UserNotFound as error:
            errors.append(f"UserNotFound: {error}")
        work.commit()
    committed = count_rows(engine, User)
    with UnitOfWork(engine) as work:
        saved = work.users.get(alan.email)
    fact("users, commit forgotten", forgotten)
    fact("users, committed", committed)
    fact("the caller caught", "; ".join(errors))
    upserts = [query for query in queries if query.startswith("INSERT")]
    fact("upsert", f"{len(upserts)} statements; inserted: {inserted}")
    config.listing("ON" + upserts[0].partition(" ON")[2])
    kind = type(saved).__name__
    conclude(f"a forgotten commit left {forgotten} rows; the caller holds a {kind}, no session")
    return RepositoryResult((forgotten, committed), tuple(errors), inserted)


# ── 4. N+1 ──────────────────────────────────────────────────────────────────────────


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


UserQuery = sa.Select[User]
STRATEGIES: dict[str, Callable[[UserQuery], UserQuery]] = {
    "lazy": lambda users: users,
    "joined": lambda users: users.options(
        orm.joinedload(User.addresses).joinedload(Address.city).joinedload(City.country)
    ),
    "selectin": lambda users: users.options(
        orm.selectinload(User.addresses).selectinload(Address.city).selectinload(City.country)
    ),
    "subquery": lambda users: users.options(
        orm.subqueryload(User.addresses).subqueryload(Address.city).subqueryload(City.country)
    ),
    "contains_eager": lambda users: (
        users.outerjoin(User.addresses).outerjoin(Address.city).outerjoin(City.country)
        .options(orm.contains_eager(User.addresses, Address.city, City.country))
    ),
    "raiseload": lambda users: users.options(orm.raiseload("*")),
}  # fmt: skip


def address_book(session: Session, strategy: str, users: int) -> list[tuple[Any, ...]]:
    """The first `users` users, each with kind, city and country of its addresses, as values."""
    query = STRATEGIES[strategy](sa.select(User).where(User.id <= users).order_by(User.id))
    return [
        (user.email, *sorted((a.kind, a.city.name, a.city.country.name) for a in user.addresses))
        for user in session.scalars(query).unique()
    ]


@dataclass(frozen=True)
class NPlusOneResult:
    queries: dict[str, tuple[int, int]]  # strategy → for half the users, for all
    times_faster: dict[str, float]  # than lazy
    distinct: tuple[int, int, int]  # users, cities, countries
    same_answer: bool


def demo_n_plus_one(engine: sa.Engine, users: int) -> NPlusOneResult:
    """4. N+1: user → address → city → country, loaded in five ways, or not at all.

    Prediction: lazy asks once a user, once a city and once a country, not three times a user.

    Trade-off: joined suits many-to-one; on a collection it repeats the parent in each row.
    selectin suits collections: one query more for each 500 parents. LIMIT on contains_eager
    counts joined rows, not users.
    """
    users = min(users, 2_000)  # more would show the same, and lazy would take long
    strategies = [name for name in STRATEGIES if name != "raiseload"]
    queries, answers = {}, []
    for strategy in strategies:
        counts = []
        for size in (users // 2, users):
            with Session(engine) as session, count_queries(engine) as statements:
                answer = address_book(session, strategy, size)
            counts.append(len(statements))
        queries[strategy] = (counts[0], counts[1])
        answers.append(answer)

    def load(strategy: str) -> None:
        with Session(engine) as session:
            address_book(session, strategy, users)

    best = best_seconds({strategy: partial(load, strategy) for strategy in strategies})
    faster = {strategy: best["lazy"] / best[strategy] for strategy in strategies}
    cities = {(city, country) for _, *homes in answers[0] for _, city, country in homes}
    distinct = len(answers[0]), len(cities), len({country for _, country in cities})
    table(
        ["strategy", f"queries: {users // 2} users", f"{users} users", "ms", "times faster"],
        [(s, *queries[s], f"{best[s] * 1e3:.0f}", f"{faster[s]:.1f}") for s in strategies],
    )
    fact("lazy asks", "1 + {} users + {} cities + {} countries".format(*distinct))
    fact("and not 3 × users", "the identity map holds a city once it is loaded")
    with Session(engine) as session, count_queries(engine) as statements:
        try:
            address_book(session, "raiseload", users)
        except InvalidRequestError as error:
            fact("raiseload", f"{len(statements)} query, then {error}")
    same = all(answer == answers[0] for answer in answers)
    conclude(f"{queries['lazy'][1]} queries → {queries['selectin'][1]}; the same answer: {same}")
    return NPlusOneResult(queries, faster, distinct, same)


# ── 5. Toolbox ──────────────────────────────────────────────────────────────────────


def revenue_view() -> sa.sql.ddl.CreateView:
    """CREATE VIEW monthly_revenue (new in SQLAlchemy 2.1); query its `.table`."""
    month = month_number(Order.placed_at)
    query = sa.select(month.label("month"), sa.func.sum(Order.amount).label("revenue"))
    return sa.sql.ddl.CreateView(query.group_by(month), "monthly_revenue")


def rolling_revenue(view: sa.Table, months: int) -> sa.Select[Any]:
    """(month, revenue, revenue of the last `months`), by a FrameClause (new in 2.1).

    RANGE, not ROWS: a month without orders has no row, and is a month all the same.
    """
    preceding, current = sa.FrameClauseType.PRECEDING, sa.FrameClauseType.CURRENT
    frame = sa.FrameClause(months - 1, None, preceding, current)
    rolling = sa.func.sum(view.c.revenue).over(order_by=view.c.month, range_=frame)
    return sa.select(view.c.month, view.c.revenue, rolling).order_by(view.c.month)


@dataclass(frozen=True)
class ToolboxResult:
    large_orders: tuple[int, int]  # in SQL, in Python
    selects_to_append: int
    rolling_agrees: bool


def demo_toolbox(engine: sa.Engine) -> ToolboxResult:
    """5. Toolbox: hybrid, association proxy, write-only collection, two things new in 2.1.

    Prediction: one rule serves SQL and Python; appending to a collection reads none of it.

    Trade-off: a write-only collection can neither be iterated by accident nor loaded eagerly.
    """
    with Session(engine) as session:
        large = sa.select(sa.func.count()).select_from(Order).where(Order.is_large)
        orders = session.scalars(sa.select(Order).execution_options(yield_per=500))
        large_orders = session.scalar(large) or 0, sum(order.is_large for order in orders)
        user = session.get_one(User, 1)
        with count_queries(engine) as statements:
            user.orders.add(Order(placed_at=LAST_DAY, amount=LARGE_ORDER))
            session.flush()
        selects = sum(statement.startswith("SELECT") for statement in statements)
        in_berlin = sa.select(sa.func.count()).where(User.cities.any(City.name == "Berlin"))
        berliners = session.scalar(in_berlin.select_from(User))
        view = revenue_view()
        session.execute(view)
        months = session.execute(rolling_revenue(view.table, 3)).all()
        session.rollback()  # the order, and the view: DDL is transactional on both engines
    revenue = {month: amount for month, amount, _rolling in months}
    agrees = all(
        rolling == sum(revenue.get(month - back, 0) for back in range(3))
        for month, _amount, rolling in months
    )
    fact("hybrid Order.is_large", "{} orders in SQL, {} in Python".format(*large_orders))
    fact("association proxy", f"User.cities.any(Berlin): {berliners} users, no join written")
    fact("write-only orders.add()", f"{len(statements)} statement, {selects} of them a SELECT")
    fact("2.1 CreateView", f"monthly_revenue: {len(months)} months")
    fact("2.1 FrameClause", f"3-month sums agree with plain Python: {agrees}")
    same = large_orders[0] == large_orders[1]
    conclude(f"one rule on both sides: {same}; {selects} SELECTs to append")
    return ToolboxResult(large_orders, selects, agrees)


# ── 6. Analytics ────────────────────────────────────────────────────────────────────
# Each question twice: in SQL, and folded over all rows in plain Python as an independent check.

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
    ordered = (
        sa.select(Order.user_id, month_number(Order.placed_at).label("month")).distinct().cte()
    )
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


def retention_by_age(cohorts: Answer) -> dict[int, float]:
    """Months since signing up → the share of users who ordered then, of all the cohorts old enough
    to show it: also of those in which nobody did, which have no row of that age."""
    sizes = {month: size for month, _age, _users, size in cohorts}
    last = max((month + age for month, age, *_ in cohorts), default=0)
    answer = {}
    for age in (1, 3, 6, 12):
        size = sum(size for month, size in sizes.items() if month + age <= last)
        if size:
            answer[age] = sum(users for _, then, users, _ in cohorts if then == age) / size
    return answer


def revenue_by_place(session: Session) -> Answer:
    """(country, city, revenue), and subtotals: city None, then country None too."""
    revenue = sa.func.sum(Order.amount).label("revenue")
    sales = _at_home(sa.select(City.country_code, City.name, revenue))
    country, city = City.country_code, City.name
    if session.get_bind().dialect.name == "postgresql":  # one pass over the orders
        levels = sa.tuple_(country, city), sa.tuple_(country), sa.tuple_()
        return _by_place(_ask(session, sales.group_by(sa.func.grouping_sets(*levels))))
    cities = sales.group_by(country, city).cte()
    total, none = sa.func.sum(cities.c.revenue), sa.null()
    countries = sa.select(cities.c.country_code, none, total).group_by(cities.c.country_code)
    query = sa.union_all(sa.select(cities), countries, sa.select(none, none, total))
    return _by_place(_ask(session, query))


def top_customers(session: Session) -> Answer:
    """(country, rank, user id, revenue) of the best three customers of each country."""
    country, revenue = City.country_code, sa.func.sum(Order.amount)
    best_first = (revenue.desc(), Order.user_id)
    rank = sa.func.row_number().over(partition_by=country, order_by=best_first).label("rank")
    sales = _at_home(sa.select(country, rank, Order.user_id, revenue))
    ranked = sales.group_by(country, Order.user_id).subquery()
    return sorted(_ask(session, sa.select(ranked).where(ranked.c.rank <= 3)))


def nearest_cities(session: Session, name: str = "Berlin") -> Answer:
    """(city, km) of the three cities nearest to `name` on the great circle, by the haversine
    formula (R. W. Sinnott, Virtues of the Haversine, Sky and Telescope 68, 1984)."""
    here, sql = orm.aliased(City), sa.func
    lat1, lat2 = sql.radians(here.latitude), sql.radians(City.latitude)
    north = sql.sin((lat2 - lat1) / 2)
    east = sql.sin(sql.radians(City.longitude - here.longitude) / 2)
    root = sql.sqrt(north * north + sql.cos(lat1) * sql.cos(lat2) * east * east)
    km = (2 * EARTH_RADIUS_KM * sql.asin(root)).label("km")
    query = sa.select(City.name, km).join(here, here.id != City.id).where(here.name == name)
    return _ask(session, query.order_by(km, City.id).limit(3))


def referral_trees(session: Session) -> Answer:
    """(founder's user id, people below, depth) of the five largest trees, by a recursive CTE."""
    founders = sa.select(
        User.id.label("root"), User.id.label("member"), sa.literal(0).label("depth")
    )
    tree = founders.where(User.referred_by_id.is_(None)).cte(recursive=True)
    referred = sa.select(tree.c.root, User.id, tree.c.depth + 1)
    tree = tree.union_all(referred.join(tree, User.referred_by_id == tree.c.member))
    below = sa.func.count() - 1
    query = sa.select(tree.c.root, below, sa.func.max(tree.c.depth)).group_by(tree.c.root)
    return _ask(session, query.order_by(below.desc(), tree.c.root).limit(5))


def _at_home(query: Select) -> Select:
    """Orders, with the city of the home address of whoever ordered."""
    home = sa.and_(Address.user_id == Order.user_id, Address.kind == "home")
    return query.select_from(Order).join(Address, home).join(City)


def _by_place(rows: Answer) -> Answer:
    sold = [row for row in rows if row[2] is not None]  # the grand total of nothing is no row
    return sorted(sold, key=lambda row: [(cell is None, cell or "") for cell in row[:2]])


def _ask(session: Session, query: sa.Executable) -> Answer:
    return [tuple(row) for row in session.execute(query)]


def fold_cohorts(session: Session) -> Answer:
    users = _ask(session, sa.select(User.id, User.created_at))
    month = {user: at.year * 12 + at.month - 1 for user, at in users}
    sizes = Counter(month.values())
    active = defaultdict(set)
    for user, at in _ask(session, sa.select(Order.user_id, Order.placed_at)):
        active[month[user], at.year * 12 + at.month - 1 - month[user]].add(user)
    return sorted((*key, len(users), sizes[key[0]]) for key, users in active.items())


def fold_revenue(session: Session) -> Answer:
    totals: dict[tuple[str | None, str | None], Decimal] = defaultdict(Decimal)
    sales = _at_home(sa.select(City.country_code, City.name, Order.amount))
    for country, city, amount in _ask(session, sales):
        for place in ((country, city), (country, None), (None, None)):
            totals[place] += amount
    return _by_place([(*place, total) for place, total in totals.items()])


def fold_customers(session: Session) -> Answer:
    spent: dict[str, dict[int, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    sales = _at_home(sa.select(City.country_code, Order.user_id, Order.amount))
    for country, user, amount in _ask(session, sales):
        spent[country][user] += amount
    answer = []
    for country, customers in sorted(spent.items()):
        best = sorted(customers, key=lambda user: (-customers[user], user))[:3]
        answer += [(country, rank, user, customers[user]) for rank, user in enumerate(best, 1)]
    return answer


def fold_distances(session: Session, name: str = "Berlin") -> Answer:
    """By the angle between two vectors from the centre of the earth (W. Kahan), which is not the
    formula of the SQL and is exact for near cities and for antipodes too."""
    query = sa.select(City.id, City.name, City.latitude, City.longitude).order_by(City.id)
    vectors = {}
    for id_, city, latitude, longitude in _ask(session, query):
        lat, lon = math.radians(latitude), math.radians(longitude)
        across = math.cos(lat)
        vectors[id_, city] = across * math.cos(lon), across * math.sin(lon), math.sin(lat)
    answer = []
    for here in (key for key in vectors if key[1] == name):
        a, behind = vectors[here], [-x for x in vectors[here]]
        for there, b in vectors.items():
            angle = 2 * math.atan2(math.dist(a, b), math.dist(behind, b))
            if there != here:
                answer.append((there[1], EARTH_RADIUS_KM * angle))
    return sorted(answer, key=lambda pair: pair[1])[:3]


def fold_referrals(session: Session) -> Answer:
    referrer: dict[int, Any] = dict(_ask(session, sa.select(User.id, User.referred_by_id)))
    below, depth = Counter[int](), Counter[int]()
    for user in referrer:
        root, steps = user, 0
        while referrer[root] is not None:
            root, steps = referrer[root], steps + 1
        below[root] += steps > 0
        depth[root] = max(depth[root], steps)
    largest = sorted(depth, key=lambda root: (-below[root], root))[:5]
    return [(root, below[root], depth[root]) for root in largest]


QUESTIONS: dict[str, tuple[Callable[[Session], Answer], Callable[[Session], Answer]]] = {
    "cohort retention": (cohort_retention, fold_cohorts),
    "revenue with subtotals": (revenue_by_place, fold_revenue),
    "top 3 customers a country": (top_customers, fold_customers),
    "cities nearest to Berlin": (nearest_cities, fold_distances),
    "referral trees": (referral_trees, fold_referrals),
}


def show_cohorts(cohorts: Answer, retention: Mapping[int, float]) -> None:
    """Print the cohorts of January and July, and all of them together, by months since."""
    active = {(month, age): users for month, age, users, _size in cohorts}
    sizes = {month: size for month, _age, _users, size in cohorts}
    lines = [
        (
            f"{month // 12}-{month % 12 + 1:02}",
            size,
            *(f"{active.get((month, age), 0) / size:.0%}" for age in retention),
        )
        for month, size in sorted(sizes.items())
        if month % 6 == 0 and month + max(retention, default=0) <= max(sizes)
    ]
    everyone = "all", sum(sizes.values()), *(f"{share:.0%}" for share in retention.values())
    table(["cohort", "users", *(f"month {age}" for age in retention)], [*lines, everyone])


@dataclass(frozen=True)
class AnalyticsResult:
    answers: dict[str, Answer]
    agree: dict[str, bool]
    retention: dict[int, float]  # months since signing up → share of users who ordered


def demo_analytics(engine: sa.Engine) -> AnalyticsResult:
    """6. Analytics: five questions in SQL, each checked by plain Python.

    Prediction: the answers agree. SQL moves the answer, Python moves all the rows: on few rows
    that is as fast, and the gap grows with the orders.

    Trade-off: beyond some tens of millions of orders these belong in a column store or a
    materialised view, not in the database that takes the orders.
    """
    answers, agree, lines = {}, {}, []
    with Session(engine) as session:
        for question, (ask, fold) in QUESTIONS.items():
            answers[question] = ask(session)
            agree[question] = _agree(answers[question], fold(session))
            ways = {"sql": partial(ask, session), "python": partial(fold, session)}
            best = best_seconds(ways)
            timing = f"{best['sql'] * 1e3:.1f}", f"{best['python'] * 1e3:.1f}"
            ratio = f"{best['python'] / best['sql']:.1f}"
            lines.append((question, len(answers[question]), *timing, ratio, agree[question]))
    table(["question", "rows", "SQL, ms", "fetch + fold, ms", "ratio", "agree"], lines)
    retention = retention_by_age(answers["cohort retention"])
    show_cohorts(answers["cohort retention"], retention)
    if answers["revenue with subtotals"]:
        *places_, (_, _, total) = answers["revenue with subtotals"]
        country, _, most = max((row for row in places_ if row[1] is None), key=lambda row: row[2])
        fact("revenue", f"{total:,} in all, {most:,} of it in country {country}")
    for city, km in answers["cities nearest to Berlin"][:1]:
        fact("nearest to Berlin", f"{city}, {km:.0f} km")
    if is_sqlite(engine):
        note("GROUPING SETS needs PostgreSQL; here it is a UNION ALL of three groupings")
    conclude(f"{sum(agree.values())} of {len(agree)} answers agree with plain Python")
    return AnalyticsResult(answers, agree, retention)


def _agree(left: Answer, right: Answer) -> bool:
    """Equal; floats to a millimetre, since they are distances in km by two formulas."""
    rounded = [[round(c, 6) if isinstance(c, float) else c for row in a for c in row]
               for a in (left, right)]  # fmt: skip
    return rounded[0] == rounded[1]


# ── 7. Transactions ─────────────────────────────────────────────────────────────────

Deposit = Callable[[Session, int, Decimal, Callable[[], None]], None]


def deposit_blindly(db: Session, user: int, amount: Decimal, between: Callable[[], None]) -> None:
    """Read, compute, write: at READ COMMITTED two of these at once lose one deposit."""
    credit = db.scalars(sa.select(User.credit).where(User.id == user)).one()
    between()  # a test's or a demo's foot in the door; leave it out of a copy
    db.execute(sa.update(User).where(User.id == user).values(credit=credit + amount))


def deposit_locked(db: Session, user: int, amount: Decimal, between: Callable[[], None]) -> None:
    """Reading takes the row's lock: the second waits, and reads what the first wrote."""
    query = sa.select(User.credit).where(User.id == user).with_for_update()
    credit = db.scalars(query).one()
    between()
    db.execute(sa.update(User).where(User.id == user).values(credit=credit + amount))


def deposit_in_place(db: Session, user: int, amount: Decimal, between: Callable[[], None]) -> None:
    """The database computes, nothing is between: the first choice where SQL can say it."""
    between()
    db.execute(sa.update(User).where(User.id == user).values(credit=User.credit + amount))


def sqlstate(error: DBAPIError) -> str | None:
    """The SQLSTATE of a driver's error; None from SQLite, which has none."""
    return getattr(error.orig, "pgcode", None)


def asks_for_retry(error: DBAPIError) -> bool:
    """Whether the transaction failed only because of others at the same time. By code, not text:
    SQLite's is for a transaction that wants to write after another wrote what it had read."""
    busy = str(getattr(error.orig, "sqlite_errorname", "")).startswith("SQLITE_BUSY")
    return busy or sqlstate(error) in RETRYABLE


def in_transaction(
    engine: sa.Engine,
    work: Callable[[Session], T],
    *,
    isolation_level: str = "SERIALIZABLE",
    attempts: int = 5,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Run `work` in a transaction, and again where the database's error code asks for it.

    Between attempts it waits up to 20 ms, 40 ms, … with full jitter (M. Brooker, Exponential
    Backoff And Jitter, AWS Architecture Blog, 2015). `work` may run several times: it must do
    nothing that a rollback does not undo. Raises the last error after `attempts`.
    """
    for attempt in range(1, attempts + 1):
        with Session(engine.execution_options(isolation_level=isolation_level)) as session:
            try:
                result = work(session)
                session.commit()
                return result
            except DBAPIError as error:
                if not asks_for_retry(error) or attempt == attempts:
                    raise
                logger.info("attempt %d ended: %s", attempt, error.orig)
        sleep(random.uniform(0, 0.01 * 2**attempt))
    raise ValueError("attempts must be at least 1")


def race(engine: sa.Engine, deposit: Deposit, isolation_level: str) -> tuple[Decimal, int]:
    """Two deposits of 10.00 for user 1 at once; returns the credit and how many were tried.

    Between reading and writing, each waits until the other has read too or waits for a lock: the
    interleaving that loses an update is certain, not a matter of luck.
    """
    backends: list[int] = []
    reads: list[None] = []

    def between() -> None:
        reads.append(None)
        with engine.connect() as watch:
            wait_until(lambda: len(reads) > 1 or blocked(watch, backends))

    def work(session: Session) -> None:
        backends.append(0 if is_sqlite(engine) else backend_pid(session.connection()))
        deposit(session, 1, Decimal(10), between)

    with Session(engine) as session:
        session.execute(sa.update(User).values(credit=Decimal(0)))
        session.commit()
        in_threads(2, lambda: in_transaction(engine, work, isolation_level=isolation_level))
        credit = session.scalars(sa.select(User.credit).where(User.id == 1)).one()
    return credit, len(backends)


def backend_pid(connection: sa.Connection) -> int:
    """The process that serves a connection of PostgreSQL's."""
    return connection.scalar(sa.select(sa.func.pg_backend_pid())) or 0


def blocked(connection: sa.Connection, backends: Sequence[int]) -> bool:
    """Whether any of PostgreSQL's `backends` waits for a lock; never so on SQLite."""
    if is_sqlite(connection):
        return False
    query = "SELECT count(*) FROM unnest(:pids) AS pid WHERE pg_blocking_pids(pid) <> '{}'"
    return bool(connection.scalar(sa.text(query), {"pids": list(backends)}))


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Poll `condition`; raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still not so after {timeout_s:g} s")
        time.sleep(0.002)


def in_threads(count: int, work: Callable[[], object]) -> None:
    """Run `work` in `count` threads to the end; raises the first error."""
    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(work) for _ in range(count)]:
            future.result()


READY_JOB = sa.select(Job).where(Job.state == "ready").order_by(Job.id).limit(1)
CLAIM_JOB = READY_JOB.with_for_update(skip_locked=True)


def run_worker(engine: sa.Engine, handle: Callable[[Job], None]) -> None:
    """Handle ready jobs until there is none that no other worker holds.

    A job is done when its transaction commits: if `handle` raises or the worker dies, its lock
    goes with the connection and the job is ready again. So `handle` may see a job twice, and must
    be idempotent in whatever it does outside this database.
    """
    while True:
        with Session(engine) as session, session.begin():
            job = session.scalar(CLAIM_JOB)
            if job is None:
                return
            handle(job)
            job.state = "done"


def edit_conflict(engine: sa.Engine) -> str:
    """Two sessions load a user, then both save it; returns what the second one is told.

    Each gives its transaction back after reading: nobody holds one while a person thinks.
    """
    with (
        Session(engine, expire_on_commit=False) as first,
        Session(engine, expire_on_commit=False) as second,
    ):
        forms = {editor: editor.get_one(User, 1) for editor in (first, second)}
        first.commit()
        second.commit()
        try:
            for number, (editor, form) in enumerate(forms.items(), start=1):
                form.full_name = f"Editor {number}"
                editor.commit()
        except orm.exc.StaleDataError as error:
            return f"{type(error).__name__}: {str(error).partition(';')[0]}"
    return "no conflict: the first edit is lost"


def insert_in_one_go(engine: sa.Engine, model: type[Base], rows: Sequence[Row]) -> tuple[int, str]:
    """`insert_each` without its savepoints: (rows saved, code of the last error)."""
    before, code = count_rows(engine, model), "none"
    with Session(engine) as session:
        for row in rows:
            try:
                session.execute(sa.insert(model), [row])
            except DBAPIError as error:
                code = sqlstate(error) or cast(Any, error.orig).sqlite_errorname
        session.commit()
    return count_rows(engine, model) - before, code


def survivors_of_rollback(engine: sa.Engine) -> int:
    """Rows left when a savepoint is released and the transaction around it rolled back."""
    before = count_rows(engine, Job)
    with Session(engine) as session:
        with session.begin_nested():
            session.execute(sa.insert(Job).values(user_id=1))
        session.rollback()
    return count_rows(engine, Job) - before


@dataclass(frozen=True)
class TransactionsResult:
    """What each mechanism did; `naive_saved` and `survivors` belong to the ways without it."""

    naive_saved: int
    saved: int
    refused: dict[int, str | None]
    survivors: tuple[int, int]  # of a rollback: here, and on an engine left as it comes
    conflict: str
    races: dict[str, tuple[Decimal, int]]  # way → credit, attempts
    handled: list[int]  # ids of jobs


def demo_transactions(workspace: Workspace) -> TransactionsResult:
    """7. Transactions: savepoints, optimistic locking, lost updates, retries, a job queue.

    Prediction: two deposits of 10.00 at once leave 10.00 if reading and writing are apart and
    nobody locks or retries.

    Trade-off: locks wait, SERIALIZABLE retries, version numbers leave it to the caller.
    """
    engine = workspace.create(users=20, pool_size=8)
    rows = [{"user_id": user} for user in (*range(1, 11), 999, *range(11, 21))]
    naive_saved, code = insert_in_one_go(engine, Job, rows)
    with Session(engine) as session:
        session.execute(sa.delete(Job))
        refused = insert_each(session, Job, rows)
        session.commit()
    saved = count_rows(engine, Job)
    fact("one bad row in 21", f"{naive_saved} saved; the last error was {code}")
    numbers = ", ".join(str(index + 1) for index in refused)
    fact("a savepoint each", f"{saved} saved; refused: row {numbers}")
    as_it_comes = sa.create_engine(engine.url) if is_sqlite(engine) else engine
    survivors = survivors_of_rollback(engine), survivors_of_rollback(as_it_comes)
    if is_sqlite(engine):
        fact("rows after a rollback", "{}; with the driver as it comes: {}".format(*survivors))
    conflict = edit_conflict(engine)
    fact("second editor", conflict)
    ways: dict[str, tuple[Deposit, str]] = {
        "read, then write": (deposit_blindly, "READ COMMITTED"),
        "SELECT … FOR UPDATE": (deposit_locked, "READ COMMITTED"),
        "SET credit = credit + 10": (deposit_in_place, "READ COMMITTED"),
        "read, then write, retry": (deposit_blindly, "SERIALIZABLE"),
    }
    if is_sqlite(engine):  # has this level only
        ways = {name: way for name, way in ways.items() if way[1] == "SERIALIZABLE"}
    races = {name: race(engine, deposit, level) for name, (deposit, level) in ways.items()}
    table(
        ["2 × 10.00 at once", "isolation level", "credit", "retried"],
        [(name, ways[name][1], credit, tries > 2) for name, (credit, tries) in races.items()],
    )
    lost = [name for name, (credit, _tries) in races.items() if credit != 20]
    summary = f"{saved} of {len(rows)} rows saved; an update lost by: {', '.join(lost) or 'none'}"
    if is_sqlite(engine):
        note("SQLite has no READ COMMITTED, FOR UPDATE or SKIP LOCKED; on PostgreSQL,")
        note("a worker claims a job by")
        config.listing(str(CLAIM_JOB.compile(sa.create_engine("postgresql+psycopg2://"))))
        conclude(summary)
        return TransactionsResult(naive_saved, saved, refused, survivors, conflict, races, [])
    handled = share_jobs(engine, workers=4)
    conclude(f"{summary}; jobs done twice: {len(handled) - len(set(handled))}")
    return TransactionsResult(naive_saved, saved, refused, survivors, conflict, races, handled)


def share_jobs(engine: sa.Engine, workers: int) -> list[int]:
    """Let `workers` do all jobs, and see to it that each of them holds one at the same moment."""
    with Session(engine) as one, Session(engine) as other:
        claimed = {one.scalars(READY_JOB).one().id, other.scalars(READY_JOB).one().id}
    fact("claimed without a lock", f"2 workers, {len(claimed)} job")
    handled: list[int] = []
    together = threading.Barrier(workers, timeout=5)  # s; broken if they have to queue up

    def handle(job: Job) -> None:
        handled.append(job.id)
        if len(handled) <= workers:
            together.wait()

    in_threads(workers, lambda: run_worker(engine, handle))
    fact("claimed by SKIP LOCKED", f"{workers} workers at the same moment, {len(handled)} jobs")
    return sorted(handled)


# ── 8. Large results ────────────────────────────────────────────────────────────────

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


class explain(sa.Executable, sa.ClauseElement):  # noqa: N801 (lower case, as sa.select)
    """EXPLAIN of a statement; on PostgreSQL with the rows that each step really read."""

    inherit_cache = False

    def __init__(self, statement: Select) -> None:
        self.statement = statement


@compiles(explain)
def _explain(element: explain, compiler: Any, **kw: Any) -> str:
    on_sqlite = compiler.dialect.name == "sqlite"
    prefix = "EXPLAIN QUERY PLAN" if on_sqlite else "EXPLAIN (ANALYZE, FORMAT JSON)"
    return f"{prefix} {compiler.process(element.statement, **kw)}"


def scan_of(session: Session, statement: Select) -> tuple[str, int | None]:
    """How a statement reads its table, and how many rows of it (None on SQLite)."""
    result = session.execute(explain(statement)).all()
    if session.get_bind().dialect.name == "sqlite":
        return str(result[0][3]).partition(" (")[0], None
    node = result[0][0][0]["Plan"]
    while "Plans" in node:
        node = node["Plans"][0]
    index = f" using {node['Index Name']}" if "Index Name" in node else ""
    return node["Node Type"] + index, int(node["Actual Rows"])


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python objects took at once in `work`; the driver's own is not seen."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@dataclass(frozen=True)
class LargeResultsResult:
    same_page: bool
    scans: dict[str, tuple[str, int | None]]
    peak_bytes: dict[str, int]


def demo_large_results(engine: sa.Engine) -> LargeResultsResult:
    """8. Large results: keyset against OFFSET at depth, a stream against a list.

    Prediction: OFFSET reads all that it skips; keyset reads one page at any depth.

    Trade-off: keyset knows no "page 731"; for the first few pages an offset is fine.
    """
    orders = count_rows(engine, Order)
    size = min(PAGE_ROWS, orders // 10 + 1)  # of few orders, smaller pages
    number = max(1, orders * 9 // 10 // size)
    with Session(engine) as session:
        last = session.execute(offset_page(number * size - 1, 1)).one()
        ways = {
            "OFFSET": offset_page(number, size),
            "keyset": keyset_page((last.placed_at, last.id), size),
        }
        pages = [_ask(session, statement) for statement in ways.values()]
        best = best_seconds({name: partial(_ask, session, page) for name, page in ways.items()})
        scans = {name: scan_of(session, page) for name, page in ways.items()}
        lines = [
            (name, f"{best[name] * 1e3:.2f}", "-" if read is None else read, scan)
            for name, (scan, read) in scans.items()
        ]
        table([f"page {number:,}", "ms", "rows read", "by"], lines)
        query = sa.select(Order).limit(50_000)  # the list of more would only be larger
        stream = query.execution_options(yield_per=100)
        peak = {
            ".all()": peak_bytes(lambda: session.scalars(query).all()),
            "yield_per(100)": peak_bytes(lambda: sum(o.is_large for o in session.scalars(stream))),
        }
    for name, size_bytes in peak.items():
        fact(f"peak of {name}", f"{size_bytes / 1e6:.1f} MB, {min(orders, 50_000):,} orders")
    if is_sqlite(engine):
        note("only PostgreSQL's EXPLAIN tells how many rows were read")
    ratio, same = peak[".all()"] / peak["yield_per(100)"], pages[0] == pages[1]
    conclude(f"the same page: {same}; a stream takes {ratio:.0f} times less memory in Python")
    return LargeResultsResult(same, scans, peak)


# ── 9. Pool ─────────────────────────────────────────────────────────────────────────


def kill_backend(engine: sa.Engine, pid: int) -> None:
    """End a connection from the server's side, as a failover does. Raises TimeoutError."""
    with engine.connect() as connection:
        gone = connection.scalar(sa.select(sa.func.pg_terminate_backend(pid, 5_000)))  # ms
    if not gone:
        raise TimeoutError(f"backend {pid} was not ended within 5 s, or was not there")


def after_kill(workspace: Workspace, engine: sa.Engine, *, pre_ping: bool) -> str:
    """What the next caller of a pool meets, after the server ended the pool's one connection."""
    pool = workspace.reopen(engine, pool_size=1, max_overflow=0, pool_pre_ping=pre_ping)
    with pool.connect() as connection:
        pid = backend_pid(connection)
    kill_backend(engine, pid)
    try:
        with pool.connect() as connection:
            return "a new connection" if backend_pid(connection) != pid else "the old one"
    except OperationalError:
        return "OperationalError"


@dataclass(frozen=True)
class PoolResult:
    checked_out: int
    fourth_caller: str
    reused: tuple[bool, bool]  # at once, after pool_recycle
    after_kill: dict[str, str]
    timeout_sqlstate: str | None


def demo_pool(workspace: Workspace) -> PoolResult:
    """9. Pool: bounded, pinged, recycled; a killed connection survived.

    Prediction: the fourth caller of a pool of 2 + 1 fails in time; with pool_pre_ping the caller
    after a kill notices nothing.

    Trade-off: a ping is a round trip a checkout. All pools together must stay below the server's
    max_connections; for hundreds of clients put PgBouncer before it.
    """
    engine = workspace.create(pool_size=2, max_overflow=1, pool_timeout=0.2, pool_recycle=600)
    fourth = "served"
    with ExitStack() as held:
        for _caller in range(3):
            held.enter_context(engine.connect())
        checked_out = cast(sa.QueuePool, engine.pool).checkedout()
        config.listing(engine.pool.status())
        started = time.perf_counter()
        try:
            engine.connect()
        except sa.exc.TimeoutError as error:
            fourth = type(error).__name__
        fact("the fourth caller", f"{fourth} after {time.perf_counter() - started:.2f} s")
    recycling = workspace.reopen(engine, pool_size=1, pool_recycle=0.5)
    seen = []
    for idle_s in (0.0, 0.0, 0.6):
        time.sleep(idle_s)
        with recycling.connect() as connection:
            seen.append(connection.connection.driver_connection)
    reused = seen[0] is seen[1], seen[1] is seen[2]
    fact("pool_recycle 0.5 s", "reused at once: {}, after 0.6 s: {}".format(*reused))
    if is_sqlite(engine):
        note("killed connections and statement_timeout need a server: PostgreSQL")
        conclude(f"exhausted: {fourth}, instead of waiting for ever")
        return PoolResult(checked_out, fourth, reused, {}, None)
    pings = {"no pre_ping": False, "pool_pre_ping": True}
    met = {name: after_kill(workspace, engine, pre_ping=ping) for name, ping in pings.items()}
    for name, outcome in met.items():
        fact(f"killed, {name}", outcome)
    state = None
    with engine.connect() as connection:
        connection.execute(sa.text("SET LOCAL statement_timeout = '50ms'"))
        try:
            connection.execute(sa.select(sa.func.pg_sleep(10)))
        except OperationalError as error:
            state = sqlstate(error)
    fact("statement_timeout 50 ms", f"pg_sleep(10) ends with SQLSTATE {state}")
    conclude(f"exhausted: {fourth}; after a kill, with a ping: {met['pool_pre_ping']}")
    return PoolResult(checked_out, fourth, reused, met, state)


# ── 10. Migration: to another version, to another engine ────────────────────────────

TRANSFER = sa.Table(
    "transfer",
    sa.MetaData(),
    sa.Column("table_name", sa.String(63), primary_key=True),
    sa.Column("last_key", sa.JSON(), nullable=False),
)


class TransferError(Exception):
    """The target is not fit for a transfer, or differs from the source after it."""


def transfer(
    source: sa.Engine,
    target: sa.Engine,
    batch_rows: int = BATCH_ROWS,
    on_batch: Callable[[int], object] = lambda rows: None,
) -> int:
    """Copy all rows between two databases at the newest migration; returns how many it copied.

    A batch and the key that it ends with are one transaction in the target: interrupted anywhere
    and called again, it goes on after the last whole batch. `on_batch(rows)` is called before a
    batch is committed, and undoes it by raising. Tables go in order of their foreign
    keys, rows in order of their primary key. At the end the checksums are compared and the
    sequences set. The source must not change meanwhile. Raises TransferError, before it writes
    anything where the target holds rows that no transfer brought.
    """
    if not sa.inspect(target).has_table(TRANSFER.name):
        for model in MODELS:
            if count_rows(target, model):
                raise TransferError(
                    f"{model.__tablename__}: the target holds rows that no transfer brought"
                )
        TRANSFER.create(target)
    copied = sum(_transfer_table(model, source, target, batch_rows, on_batch) for model in MODELS)
    for model in MODELS:
        expected, actual = checksum(source, model), checksum(target, model)
        if expected != actual:
            raise TransferError(f"{model.__tablename__}: source {expected}, target {actual}")
    with target.begin() as connection:
        reset_sequences(connection)
        TRANSFER.drop(connection)
    return copied


def _transfer_table(
    model: type[Base],
    source: sa.Engine,
    target: sa.Engine,
    batch_rows: int,
    on_batch: Callable[[int], object],
) -> int:
    name, copied = model.__tablename__, 0
    key = sa.inspect(model).primary_key[0]
    with target.connect() as connection:
        query = sa.select(TRANSFER.c.last_key).where(TRANSFER.c.table_name == name)
        last = connection.scalar(query)
    page = sa.select(model.__table__).order_by(key).limit(batch_rows)
    while True:
        with source.connect() as connection:
            result = connection.execute(page if last is None else page.where(key > last))
            rows = [dict(row) for row in result.mappings()]
        if not rows:
            return copied
        last = rows[-1][key.name]
        with target.begin() as connection:
            try:
                insert_rows(connection, model, rows)
            except (IntegrityError, sa.exc.DataError) as error:  # SQLite checks no VARCHAR(n)
                reason = sqlstate(error) or type(error).__name__
                raise TransferError(f"{name}: the target refuses a row ({reason})") from error
            connection.execute(sa.delete(TRANSFER).where(TRANSFER.c.table_name == name))
            connection.execute(sa.insert(TRANSFER).values(table_name=name, last_key=last))
            on_batch(len(rows))
        copied += len(rows)


def checksum(engine: sa.Engine, model: type[Base]) -> tuple[int, str]:
    """(rows, SHA-256 of their values in order of the primary key): the same on every engine."""
    digest, count = hashlib.sha256(), 0
    query = sa.select(model.__table__).order_by(*sa.inspect(model).primary_key)
    with engine.connect().execution_options(yield_per=BATCH_ROWS) as connection:
        for row in connection.execute(query):
            digest.update(repr(tuple(row)).encode())
            count += 1
    return count, digest.hexdigest()


def reset_sequences(connection: sa.Connection) -> None:
    """Let PostgreSQL number on after the highest id: rows that brought theirs left it behind."""
    if is_sqlite(connection):
        return  # numbers on by itself
    for model in MODELS:
        id_ = model.__table__.c.get("id")
        if id_ is not None:
            highest = sa.select(sa.func.coalesce(sa.func.max(id_), 0) + 1).scalar_subquery()
            sequence = sa.func.pg_get_serial_sequence(model.__tablename__, "id")
            connection.execute(sa.select(sa.func.setval(sequence, highest, False)))


@dataclass(frozen=True)
class MigrationResult:
    steps: list[str]
    differences: int
    moved: tuple[int, int, int]  # before the interruption, after it, in all
    next_id: int


class PowerCut(Exception):
    """The interruption that demo_migration provokes."""


def demo_migration(workspace: Workspace, directory: Path, users: int) -> MigrationResult:
    """10. Migration: down and up again, then from SQLite to another database.

    Prediction: a transfer that is cut off goes on where it was; every row arrives once.

    Trade-off: for hundreds of GB, use the engines' own tools (pgloader, logical replication).
    """
    target = workspace.create()
    steps = migrate(target, "0001_shop") + migrate(target)
    differences = len(schema_differences(target))
    fact("alembic", ", ".join(steps))
    fact("autogenerate finds", f"{differences} differences between database and models")
    source = Workspace(directory, None, 0).create(users=min(users, 5_000))
    total = sum(count_rows(source, model) for model in MODELS)
    sent: list[int] = []

    def cut_off(rows: int) -> None:
        sent.append(rows)
        if sum(sent) > total / 2:
            raise PowerCut

    try:
        transfer(source, target, batch_rows=200, on_batch=cut_off)
    except PowerCut:
        before = sum(count_rows(target, model) for model in MODELS)
        fact("power cut", f"in batch {len(sent)}: {sum(sent):,} rows sent, {before:,} are there")
    with config.progress() as bar:
        task = bar.add_task("moving rows", total=total, completed=before)
        after = transfer(source, target, on_batch=lambda rows: bar.advance(task, rows))
    arrived = sum(count_rows(target, model) for model in MODELS)
    fact("resumed", f"{after:,} rows more; count and SHA-256 of {len(MODELS)} tables are equal")
    with Session(target) as session:
        user = User(email="next@example.com", full_name="Next")
        session.add(user)
        session.flush()
        next_id = user.id
    fact("next user's id", f"{next_id}, after {count_rows(source, User)} users moved with theirs")
    source.dispose()
    if is_sqlite(target):
        note("the target is a second SQLite file; with DATABASE_URL it is PostgreSQL")
    conclude(f"{arrived:,} of {total:,} rows arrived across a power cut")
    return MigrationResult(steps, differences, (before, after, total), next_id)


# ── 11. Security ────────────────────────────────────────────────────────────────────


def count_by_email_unsafely(session: Session, email: str) -> int:
    """SQL pasted together: what `email` says is executed. Only here to be defeated."""
    query = f"SELECT count(*) FROM users WHERE email = '{email}'"  # noqa: S608
    return session.scalar(sa.text(query)) or 0


def count_by_email(session: Session, email: str) -> int:
    """A bound parameter: the driver keeps the value a value; it is never read as SQL."""
    query = sa.select(sa.func.count()).select_from(User).where(User.email == email)
    return session.scalar(query) or 0


def hash_password(password: str, cost: dict[str, int] = SCRYPT) -> str:
    """scrypt (RFC 7914) with a random salt; the parameters are part of the result."""
    salt = secrets.token_bytes(16)
    parts = [str(cost[name]) for name in ("n", "r", "p")]
    parts += [base64.b64encode(raw).decode() for raw in (salt, _scrypt(password, salt, cost))]
    return "$".join(["scrypt", *parts])


def verify_password(password: str, stored: str) -> bool:
    """Whether `stored` was made from `password`, compared in constant time.

    Raises ValueError where `stored` is no result of `hash_password`.
    """
    cost, salt, digest = _parse_hash(stored)
    return hmac.compare_digest(_scrypt(password, salt, cost), digest)


def needs_rehash(stored: str) -> bool:
    """Whether `stored` has other parameters than today's: then hash anew at the next login."""
    return _parse_hash(stored)[0] != SCRYPT


def _parse_hash(stored: str) -> tuple[dict[str, int], bytes, bytes]:
    match = STORED_HASH.fullmatch(stored)
    n, r, p = map(int, match.groups()[:3]) if match else (0, 0, 0)
    if match is None or n & (n - 1) or not 0 < 128 * n * r * p <= SCRYPT_MAX_WORK or n == 1:
        raise ValueError("not a hash made by hash_password")  # without quoting it
    salt, digest = map(base64.b64decode, match.groups()[3:])
    return {"n": n, "r": r, "p": p}, salt, digest


def _scrypt(password: str, salt: bytes, cost: dict[str, int]) -> bytes:
    needed = 128 * cost["r"] * (cost["n"] + cost["p"] + 2)  # bytes, as OpenSSL reckons
    return hashlib.scrypt(password.encode(), salt=salt, maxmem=needed, **cost)


@dataclass(frozen=True)
class SecurityResult:
    matches: tuple[int, int]  # pasted, bound
    verified: tuple[bool, bool]  # the right password, a wrong one
    weak_needs_rehash: bool
    shows_name: dict[str, bool]  # error message → whether it holds the refused user's name


def demo_security(workspace: Workspace) -> SecurityResult:
    """11. Security: injection, passwords, and what an error keeps to itself.

    Prediction: the same input matches every user as SQL, and nobody as a value.

    Trade-off: a hash that is slow for an attacker is slow for you: bound the logins at once.
    """
    engine = workspace.create(users=20)
    attack = "' OR '1'='1"
    with Session(engine) as session:
        matches = count_by_email_unsafely(session, attack), count_by_email(session, attack)
    fact(f"input {attack}", "pasted into SQL: {} of 20 users; bound: {}".format(*matches))
    started = time.perf_counter()
    stored = hash_password("correct horse")
    elapsed_ms = (time.perf_counter() - started) * 1e3
    verified = verify_password("correct horse", stored), verify_password("Correct horse", stored)
    fact(
        "scrypt", f"{stored[:17]}…, {elapsed_ms:.0f} ms; right: {verified[0]}, wrong: {verified[1]}"
    )
    weak = needs_rehash(hash_password("correct horse", {**SCRYPT, "n": 2**10}))
    fact("made at a lower cost", f"needs_rehash: {weak}")
    person = Person("CAPITALS@EXAMPLE.COM", "Secret Name")
    shows = {}
    for label, hide in (("SQLAlchemy's error", False), ("with hide_parameters", True)):
        with Session(workspace.reopen(engine, hide_parameters=hide)) as session:
            try:
                session.execute(sa.insert(User).values(vars(person)))
            except IntegrityError as error:
                shows[label] = person.full_name in str(error)
    with UnitOfWork(engine) as work:
        try:
            work.users.add(person)
        except InvalidUser as error:
            shows["InvalidUser"] = person.full_name in str(error)
    fact("the refused row is in", ", ".join(f"{name}: {shown}" for name, shown in shows.items()))
    if not is_sqlite(engine):
        note("PostgreSQL's own DETAIL repeats the row, past hide_parameters")
    shown = shows["InvalidUser"]
    conclude(f"bound, the attack matches {matches[1]}; the domain error shows the row: {shown}")
    return SecurityResult(matches, verified, weak, shows)


# ── Main ────────────────────────────────────────────────────────────────────────────

DEMOS = (
    demo_schema,
    demo_bulk_load,
    demo_repository,
    demo_n_plus_one,
    demo_toolbox,
    demo_analytics,
    demo_transactions,
    demo_large_results,
    demo_pool,
    demo_migration,
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
    except (
        ValueError,
        ArgumentError,
        TypeError,
        psycopg2.ProgrammingError,
    ):  # may quote a password
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
    except DBAPIError as error:
        lines = [line for line in str(error.orig).strip().split("\n") if line[:1] != "\t"]
        if not all(re.search(ABSENT, line) for line in lines):
            raise refused(url, error) from error
        silent = any("timeout expired" in line for line in lines)
        reason = "it accepts, and says nothing" if silent else lines[0]
        raise config.ServiceUnavailable("PostgreSQL", reason, url) from error
    if standby:
        raise config.ConfigError(f"DATABASE_URL: {config.redact(url)} is a read-only standby")
    return version


def refused(url: str, error: DBAPIError) -> config.ConfigError:
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
        except sa.exc.ProgrammingError as error:
            if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
                raise
            raise refused(url or "", error) from error
        yield {"engine": engine, "workspace": workspace, "directory": directory, "users": run.scale}


def main(argv: Sequence[str] | None = None) -> int:
    return config.run_script(
        __doc__ or "", DEMOS, open_resources, argv, scale=DEFAULT_USERS, scale_unit="users"
    )


if __name__ == "__main__":
    raise SystemExit(main())
