"""Script 01, demos 1-5: types, data, schema, migration, loading, repository, N+1, analytics.

On both engines; the oracles are plain Python over the generated rows, and answers by hand.
"""

from __future__ import annotations

import importlib
import math
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import exc
from sqlalchemy.orm import Session

app: Any = importlib.import_module("01_sqlalchemy_advanced")

SHOP_USERS = 60  # of the fixture `shop`
CHECKS = [HealthCheck.function_scoped_fixture]  # each example rolls back what it wrote
PROPERTY = settings(deadline=None, max_examples=50, database=None, suppress_health_check=CHECKS)
TYPE = "a column's type"
ASPECTS = ("columns", "foreign_keys", "unique_constraints", "check_constraints", "indexes")
JOB, ORPHAN = (sa.insert(app.Job).values(user_id=user) for user in (1, 999))
Rows = list[dict[str, Any]]
at = partial(datetime, tzinfo=UTC)


def generated(users: int) -> tuple[Rows, Rows, Rows]:
    people, addresses, orders = zip(*app.people(users), strict=True)
    return list(people), [*chain(*addresses)], [*chain(*orders)]


# ── Types, data, an honest SQLite ───────────────────────────────────────────────────

FIRST, LAST = datetime(2, 1, 1), datetime(9998, 12, 31)  # noqa: DTZ001 (MOMENTS gives the zone)
ZONES = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
MOMENTS = st.datetimes(FIRST, LAST, timezones=ZONES).map(lambda m: m.replace(fold=0))
LARGEST = Decimal("9999999999.99")  # of NUMERIC(12, 2)
CENTS = st.decimals(-LARGEST, LARGEST, places=2) | st.just(Decimal("-0.00"))


@contextmanager
def scratch_table(engine: sa.Engine, *rows: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The columns of a table with one of each type of the script's own, gone afterwards."""
    columns = sa.Column("at", app.UtcDateTime()), sa.Column("amount", app.Money())
    id_ = sa.Column("id", sa.Integer, primary_key=True)
    scratch = sa.Table("scratch", sa.MetaData(), id_, *columns, prefixes=["TEMPORARY"])
    with engine.connect() as connection:
        scratch.create(connection)
        if not app.is_sqlite(engine):
            connection.execute(sa.text("SET LOCAL TimeZone = 'Asia/Kathmandu'"))
        connection.execute(scratch.insert(), [{"at": at, "amount": amount} for at, amount in rows])
        yield connection, scratch.c


@PROPERTY
@given(st.lists(st.tuples(MOMENTS, CENTS), min_size=1, max_size=9))
def test_a_moment_comes_back_in_utc_and_money_to_the_cent(shop: sa.Engine, rows: list[Any]) -> None:
    moments, amounts = zip(*rows, strict=True)
    with scratch_table(shop, *rows, (None, None)) as (connection, c):
        stored = connection.execute(sa.select(c.at, c.amount).order_by(c.id)).all()
        later = connection.scalars(sa.select(c.at).where(c.at > moments[0]).order_by(c.at)).all()
        sums = [each(c.amount) for each in (sa.func.sum, sa.func.min, sa.func.max)]
        totals = connection.execute(sa.select(*sums)).one()
    utc = [(moment.astimezone(UTC), round(amount, 2) + 0) for moment, amount in rows]  # no -0.00
    assert repr(stored) == repr([*utc, (None, None)])
    assert later == sorted(moment for moment in moments if moment > moments[0])
    assert tuple(totals) == (sum(amounts), min(amounts), max(amounts))


def test_a_timedelta_is_added_in_python(shop: sa.Engine) -> None:  # SQLite has none
    later = app.Order.placed_at + timedelta(days=30)
    with Session(shop) as session, pytest.raises(exc.StatementError):
        session.scalar(sa.select(app.Order.id).where(later > at(2024, 3, 1)))


def test_money_reckons_as_money_in_sql(shop: sa.Engine) -> None:
    with scratch_table(shop, (None, Decimal("10.00")), (None, Decimal("0.10"))) as (connection, c):
        a, of, count = c.amount, sa.func, lambda condition: sa.func.count().filter(condition)
        answers = [
            (of.avg(a), 5.05), (of.sum(of.abs(-a)), 10.1), (of.sum(a * 3 - a + 1), 22.2),
            (of.sum(a * Decimal(2)), 20.2), (of.sum(Decimal(2) * a), 20.2),
            (of.sum(a / Decimal(4)), 2.525), (of.sum(a) * Decimal("0.125"), 1.2625),
            (of.max(a - Decimal("0.5")), 9.5), (of.max(of.coalesce(a, Decimal(0))), 10),
            (count(a > Decimal("1.005")), 1), (count(a.between(Decimal("0.099"), 10)), 2),
            (count(a == 10), 1), (count(a > Decimal("10.00")), 0),
            (count(a.in_([Decimal("0.1"), Decimal(7)])), 1),
        ]  # fmt: skip
        for expression, expected in answers:
            answer = connection.scalar(sa.select(expression))
            assert float(answer) == pytest.approx(expected, abs=1e-9), str(expression)


ORDER = {"user_id": 1, "placed_at": at(2024, 5, 1), "amount": Decimal("1.00")}
NAIVE = datetime(2024, 1, 1)  # noqa: DTZ001 (that is the point)
TOO_LATE = datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))  # year 10000 in UTC
SHARES = map(Decimal, "1.005 0.001 NaN sNaN Infinity 1E+30 10000000000.00".split())
UNFIT = {
    "placed_at": [NAIVE, TOO_LATE, date(2024, 1, 1), "2024-01-01T00:00:00Z", 1_700_000_000],
    "amount": [9.99, 10, "9.99", True, math.nan, *SHARES],
}


def loaders(engine: sa.Engine) -> dict[str, Any]:
    ways = {**app.LOADERS, "rows": lambda s, r: app.insert_rows(s.connection(), app.Order, r)}
    return {way: ways[way] for way in ways if way != "COPY" or not app.is_sqlite(engine)}


@pytest.mark.parametrize(("column", "value"), [(c, value) for c in UNFIT for value in UNFIT[c]])
def test_one_rule_refuses_what_loses_its_meaning(shop: sa.Engine, column: str, value: Any) -> None:
    rows = [ORDER, {**ORDER, column: value}]
    for way, load in loaders(shop).items():
        with Session(shop) as session, pytest.raises(exc.StatementError) as refused:
            load(session, rows)
        assert type(refused.value) is exc.StatementError, way
        assert isinstance(refused.value.orig, TypeError | ValueError | OverflowError), way
        assert "[parameters" not in str(refused.value)
    with Session(shop) as session:
        assert app.insert_each(session, app.Order, rows) == {1: TYPE}


@pytest.mark.parametrize("count", [1, 2, 300])
def test_people_are_seeded_refer_to_older_ones_and_order_in_time(count: int) -> None:
    users, addresses, orders = generated(count)
    assert [*app.people(count)] == [*app.people(count)] != [*app.people(count, seed=1)]
    joined, last = {user["id"]: user["created_at"] for user in users}, at(2025, 12, 31)
    assert (moments := [at(2024, 1, 1), *joined.values(), last]) == sorted(moments)
    assert all((user["referred_by_id"] or 0) < user["id"] for user in users)
    for rows in (users, addresses, orders):
        assert [row["id"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["user_id"] for row in addresses if row["kind"] == "home"] == list(joined)
    assert all(joined[row["user_id"]] <= row["placed_at"] <= last for row in orders)
    if count == 300:  # a log-normal has the mean exp(μ + σ² / 2)
        mean = sum(row["amount"] for row in orders) / len(orders)
        assert float(mean) == pytest.approx(math.exp(3.5 + 0.9**2 / 2), rel=0.15)


def test_seeding_stores_the_generated_rows(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BATCH_ROWS", 7)  # users at once
    countries, cities = app.places()
    assert Counter(city["country_code"] for city in cities) == {row["code"]: 5 for row in countries}
    engine = workspace.create(users=20)
    with Session(engine) as session:
        for model, rows in zip(app.MODELS, (countries, cities, *generated(20)), strict=False):
            columns = [model.__table__.c[name] for name in rows[0]]
            stored = session.execute(sa.select(*columns).order_by(columns[0])).mappings()
            assert [dict(row) for row in stored] == rows
        statistics = "pg_stats WHERE schemaname = current_schema()"
        statistics = "sqlite_stat1" if app.is_sqlite(engine) else statistics
        assert session.scalar(sa.text(f"SELECT count(*) FROM {statistics}"))  # for the planner


def test_sqlite_is_honest_and_comes_otherwise(sqlite_workspace: Any) -> None:
    """As it comes is why `sqlite_engine` is needed; that half fails once the driver is mended."""
    engine = sqlite_workspace.create(users=1)
    for each, is_honest in ((engine, True), (sa.create_engine(engine.url), False)):
        with Session(each) as session:
            with session.begin_nested():
                session.execute(JOB)
            session.rollback()
        assert app.count_rows(engine, app.Job) == (not is_honest)
        with each.connect() as one, each.connect() as other:
            for connection in (one, other):
                with pytest.raises(exc.IntegrityError) if is_honest else nullcontext():
                    connection.execute(ORPHAN)
                connection.rollback()
        each.dispose()
    for column in (app.User.credit, app.Order.amount):
        odd = sa.update(column.class_).values({column: column + Decimal("0.105")})
        with engine.connect() as connection, pytest.raises(exc.IntegrityError, match=column.name):
            connection.execute(odd)


def test_what_is_inserted_under_autocommit_stays(sqlite_workspace: Any) -> None:
    engine, level = sqlite_workspace.create(users=1), {"isolation_level": "AUTOCOMMIT"}
    created, option = app.sqlite_engine(engine.url.database, **level), engine.execution_options
    ways: list[Any] = [created.connect, option(**level).connect]
    ways += [lambda: Session(created), lambda: Session(option(**level))]
    ways += [lambda: engine.connect().execution_options(**level)]
    for expected, way in enumerate(ways, 1):
        with way() as unit:
            unit.execute(JOB)
        with engine.connect() as connection:  # of the same pool: in a transaction again
            connection.execute(JOB)
        assert app.count_rows(engine, app.Job) == expected
    created.dispose()


@pytest.mark.parametrize("name", ["a?b", "a b#c%20d", "é"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    (home := tmp_path / name).mkdir()
    with closing(app.Workspace(home, None, 0)) as workspace:
        assert [app.count_rows(workspace.create(users=n), app.User) for n in (1, 2)] == [1, 2]
    assert [each.name for each in tmp_path.iterdir()] == [name]


# ── 1. Schema and its migrations ────────────────────────────────────────────────────


def snapshot(engine: sa.Engine) -> dict[str, str]:
    """All that the database itself tells of its tables, and what the tables hold."""
    inspector, tables = sa.inspect(engine), {}
    with engine.connect() as connection:
        for name in inspector.get_table_names():
            told: list[Any] = [inspector.get_pk_constraint(name)]
            for each in chain(*(getattr(inspector, f"get_{ask}")(name) for ask in ASPECTS)):
                options = {key: str(v) for key, v in each.pop("dialect_options", {}).items()}
                told.append({**each, **options})
            rows = sorted(map(str, connection.execute(sa.text(f'SELECT * FROM "{name}"'))))
            tables[name] = str((sorted(map(str, told)), rows))
    return tables


def test_down_and_up_again_is_the_identity_and_keeps_every_row(workspace: Any) -> None:
    first = snapshot(engine := workspace.create(users=20))
    assert app.schema_differences(engine) == []
    app.migrate(engine, "0002_nickname")
    second, differences = snapshot(engine), app.schema_differences(engine)
    assert {each[0] for each in differences} == {"remove_column", "remove_constraint"}
    assert {each for each in first if first[each] != second[each]} == {"users", "alembic_version"}
    app.migrate(engine)
    assert snapshot(engine) == first
    for target in ("0002_nickname", "base"):
        app.migrate(engine, target)
    assert set(snapshot(engine)) == {"alembic_version"}
    app.migrate(engine, "0002_nickname")
    assert snapshot(engine)["alembic_version"] == second["alembic_version"]


def test_an_unknown_revision_is_told_with_the_known_ones(workspace: Any) -> None:
    engine = workspace.create()
    with pytest.raises(CommandError, match=r"no revision '0009_no'.*0001_shop, 0002_nickname"):
        app.migrate(engine, "0009_no")
    with engine.begin() as connection:
        connection.execute(sa.update(app.VERSION).values(version_num="0003_future"))
    before = snapshot(engine)
    for target in ("0001_shop", "0002_nickname", "base"):
        with pytest.raises(CommandError, match=r"'0003_future'.*the release of the code"):
            app.migrate(engine, target)
    assert snapshot(engine) == before


@pytest.mark.parametrize("start", ["base", "0001_shop", "0002_nickname"])
@pytest.mark.parametrize("has_orphans", [False, True])
def test_an_interrupted_migration_leaves_everything_as_it_was(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, start: str, has_orphans: bool
) -> None:
    def breaks() -> None:
        op.create_table("left_behind", sa.Column("id", sa.Integer, primary_key=True))
        op.execute("UPDATE users SET full_name = 'changed'")
        if not has_orphans:
            raise KeyboardInterrupt
        op.execute("INSERT INTO jobs (user_id) VALUES (999)")  # PostgreSQL refuses it at once

    monkeypatch.setitem(app.MIGRATIONS, "0003_bad", (breaks, breaks))
    app.migrate(engine := workspace.create(users=3), start)
    before = snapshot(engine)
    with pytest.raises((KeyboardInterrupt, RuntimeError, exc.IntegrityError)):
        app.migrate(engine, "0003_bad")
    assert snapshot(engine) == before
    app.migrate(engine)  # the connection is as good as ever, and foreign keys are on again
    with Session(engine) as session, pytest.raises(exc.IntegrityError):
        session.execute(ORPHAN)


def test_autogenerate_finds_what_was_dropped(workspace: Any, monkeypatch: Any) -> None:
    def by_hand() -> None:
        with op.batch_alter_table("orders") as orders:
            orders.drop_constraint(op.f("ck_orders_amount"), type_="check")
        op.execute("ALTER TABLE users DROP COLUMN version")
        op.execute("DROP INDEX ix_jobs_ready")

    engine = workspace.create()
    monkeypatch.setattr(app, "MIGRATIONS", dict.fromkeys(["0001_shop", "by hand"], [by_hand] * 2))
    app.migrate(engine, "by hand")
    found = {difference[0] for difference in app.schema_differences(engine)}
    assert found == {"add_constraint", "add_column", "add_index"}


USER = {"email": "new@example.com", "full_name": "New", "created_at": at(2024, 5, 1)}
ADDRESS = {"user_id": 1, "city_id": 1, "kind": "home", "street": "1 Main Street"}
BILLING = {**ADDRESS, "kind": "billing"}
FIRST_EMAIL = next(app.people(1))[0]["email"]
HOME_ONLY = next(u["id"] for u, addresses, _ in app.people(SHOP_USERS) if len(addresses) == 1)
FK = "FOREIGN KEY"
# Model, row, PostgreSQL's word for what refused it, SQLite's where it is another.
REFUSED: list[tuple[Any, ...]] = [
    (app.Country, {"code": "DE", "name": "Another"}, "pk_countries"),
    (app.Country, {"code": "XX", "name": "Germany"}, "uq_countries_name"),
    (app.Country, {"code": "X", "name": "Short"}, "ck_countries_iso_code"),
    (app.City, {"country_code": "DE", "name": "Berlin"}, "uq_cities_country_code_name"),
    (app.City, {"country_code": "XX", "name": "X"}, "fk_cities_country_code", FK),
    (app.City, {"id": 1, "country_code": "DE", "name": "X"}, "pk_cities"),
    (app.User, {**USER, "email": FIRST_EMAIL}, "uq_users_email"),
    (app.User, {**USER, "email": "NEW@example.com"}, "ck_users_email"),
    (app.User, {**USER, "credit": Decimal("-0.01")}, "ck_users_credit"),
    (app.User, {**USER, "id": 900, "referred_by_id": 900}, "ck_users_referrer_is_older"),
    (app.User, {**USER, "id": 901, "referred_by_id": 900}, "fk_users_referred_by_id", FK),
    (app.User, {**USER, "full_name": None}, "NOT NULL: users.full_name"),
    (app.User, {**USER, "full_name": "x" * 81}, TYPE, None),  # SQLite checks no length,
    (app.User, {**USER, "email": "nul@x", "full_name": "\0"}, TYPE, None),  # and stores a NUL byte
    (app.User, {**USER, "full_name": "\ud800"}, TYPE),
    (app.User, {**USER, "referred_by_id": -(10**30)}, TYPE),
    (app.Address, ADDRESS, "uq_addresses_user_id_kind"),
    (app.Address, {**ADDRESS, "kind": "work"}, "ck_addresses_kind"),
    (app.Address, {**ADDRESS, "user_id": 900}, "fk_addresses_user_id", FK),
    (app.Address, {**BILLING, "user_id": HOME_ONLY, "city_id": 900}, "fk_addresses_city_id", FK),
    (app.Order, {**ORDER, "amount": Decimal("0.00")}, "ck_orders_amount"),
    (app.Order, {**ORDER, "user_id": 900}, "fk_orders_user_id", FK),
    (app.Job, {"user_id": 2**63}, TYPE),
    (app.Job, {"user_id": 1, "state": "lost"}, "ck_jobs_state"),
    (app.Job, {"user_id": 900}, "fk_jobs_user_id", FK),
]  # fmt: skip
BAD = [("BAD@x", "secret"), ("b@x", "secret\0"), ("b@x", "secret\ud800"), ("\ud800@x", "secret")]


def test_a_bad_row_is_refused_by_what_is_meant_and_costs_itself_only(shop: sa.Engine) -> None:
    with Session(shop) as session:
        for model, row, *names in REFUSED:
            name = names[-1] if app.is_sqlite(shop) else names[0]
            assert app.insert_each(session, model, [row]) == ({0: name} if name else {})
            if name and row.get("full_name") != "\ud800":
                with pytest.raises(app.RowRefused) as refused, app.savepoint(session):
                    app.insert_rows(session.connection(), model, [row])
                assert str(refused.value) == name
                assert (refused.value.__cause__, refused.value.__suppress_context__) == (None, True)
        jobs = [{"user_id": user} for user in (1, 2**63, 2, {}, 3)]
        assert app.insert_each(session, app.Job, jobs) == {1: TYPE, 3: TYPE}
        assert [*session.scalars(sa.select(app.Job.user_id).order_by(app.Job.id))] == [1, 2, 3]
    tables = app.Base.metadata.tables.values()
    named = {str(each.name) for table in tables for each in table.constraints}
    assert {name for name in named if name[:3] != "pk_"} <= {names[0] for _, _, *names in REFUSED}


MADE = {
    "UNIQUE INDEX uq_made ON jobs (user_id)": "jobs.user_id",
    "UNIQUE INDEX uq_made ON jobs (user_id) WHERE attempts = 0": "jobs.user_id",
    "UNIQUE INDEX uq_made ON jobs (user_id, (attempts + 1))": "uq_made",
    "TABLE made (user_id INT, CONSTRAINT uq_made UNIQUE (user_id))": "made.user_id",
}


@pytest.mark.parametrize("made", MADE)
def test_what_the_models_do_not_know_is_told_as_it_comes(shop: sa.Engine, made: str) -> None:
    twice = f"INSERT INTO {'made' if 'TABLE' in made else 'jobs'} (user_id) VALUES (1), (1)"
    with shop.connect() as connection:
        connection.exec_driver_sql(f"CREATE {made}")
        with pytest.raises(exc.IntegrityError) as refused:
            connection.exec_driver_sql(twice)
    expected = MADE[made] if app.is_sqlite(shop) else "uq_made"
    assert app.violated_constraint(refused.value) == expected


def test_what_is_no_fault_of_the_row_is_no_refusal(workspace: Any) -> None:
    engine = workspace.create(users=1)
    with Session(engine) as session:
        session.add(app.Job(user_id=999))
        with pytest.raises(exc.IntegrityError):
            app.insert_each(session, app.Job, [{"user_id": 1}])
    with Session(engine) as session:
        if app.is_sqlite(engine):
            session.execute(sa.text("DROP TABLE jobs"))
        else:
            pid = session.scalar(sa.select(sa.func.pg_backend_pid()))
            with engine.connect() as other:
                other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5_000)))
        with pytest.raises(exc.DBAPIError):
            app.insert_each(session, app.Job, [{"user_id": 1}])


@pytest.mark.parametrize("is_loaded", [True, False])
def test_with_a_user_go_addresses_and_orders(workspace: Any, is_loaded: bool) -> None:
    engine = workspace.create(users=20)
    users, addresses, orders = generated(20)
    gone = next(user["referred_by_id"] for user in users if user["referred_by_id"])
    with app.count_queries(engine) as statements, Session(engine) as session, session.begin():
        user = session.get_one(app.User, gone)
        assert not is_loaded or user.addresses
        session.delete(user)
    assert is_loaded or not any("addresses" in each for each in statements)  # the database does it
    for model, rows in ((app.Address, addresses), (app.Order, orders)):
        assert app.count_rows(engine, model) == sum(row["user_id"] != gone for row in rows)
    with Session(engine) as session, session.begin():
        orphans = sa.select(app.User.id).where(app.User.referred_by_id.is_(None))
        expected = [u["id"] for u in users if u["referred_by_id"] in (None, gone)]
        assert {gone, *session.scalars(orphans)} == {gone, *expected}
        owner = session.get_one(app.User, addresses[-1]["user_id"])
        owner.addresses.remove(owner.addresses[0])
    assert app.count_rows(engine, app.Address) == sum(r["user_id"] != gone for r in addresses) - 1


# ── 2. Bulk load, 3. Repository ─────────────────────────────────────────────────────

AWKWARD = ["", "\\N", "\\.", "\\", "\t", "a\tb", "\n", "\r", "\r\n", "\\n", '"', "'", "NULL", "💡é"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.none() | TEXTS | st.sampled_from(AWKWARD)
WIDTHS = st.integers(1, 2)  # an empty text alone on a line is a row too
TABLES = WIDTHS.flatmap(lambda n: st.lists(st.tuples(*[VALUES] * n), min_size=1, max_size=8))


def test_copy_brings_any_text_unchanged(postgres_workspace: Any) -> None:
    """To names that need quotes, in another schema, from dicts in any order."""

    @PROPERTY
    @given(TABLES)
    def brings(rows: list[tuple[Any, ...]]) -> None:
        columns = [sa.Column(name, sa.Text) for name in ("createdAt", "user")[: len(rows[0])]]
        number = sa.Column("n", sa.Integer, sa.Identity())
        table = sa.Table("order", sa.MetaData(), number, *columns, schema="Another One")
        cells = [[(c.name, text) for c, text in zip(columns, row, strict=True)] for row in rows]
        given = [dict(each[:: -1 if i % 2 else 1]) for i, each in enumerate(cells)]
        with engine.connect() as connection:
            connection.execute(sa.schema.CreateSchema("Another One"))
            table.create(connection)
            app.copy_rows(connection, SimpleNamespace(__table__=table), given)
            assert connection.execute(sa.select(*columns).order_by(table.c.n)).all() == rows

    engine = postgres_workspace.create()
    brings()


def test_all_loaders_store_the_same_rows(shop: sa.Engine) -> None:
    zones = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-9))]
    moments = [datetime(2024, 2, 29, 23, 59, 59, i, tzinfo=zones[i % 3]) for i in range(99)]
    rows = [{**ORDER, "placed_at": m, "amount": Decimal(m.microsecond + 1)} for m in moments]
    before = app.count_rows(shop, app.Order)
    columns = app.Order.user_id, app.Order.placed_at, app.Order.amount
    for way, load in loaders(shop).items():
        with Session(shop) as session:
            load(session, rows)
            stored = session.execute(sa.select(*columns).order_by(app.Order.id).offset(before))
            assert [dict(row) for row in stored.mappings()] == rows, way


def stored_users(engine: sa.Engine) -> dict[str, tuple[str, int]]:  # e-mail → name, version
    query = sa.select(app.User.email, app.User.full_name, app.User.version)
    with engine.connect() as connection:
        return {email: (name, version) for email, name, version in connection.execute(query)}


def test_the_repository_is_a_dict_that_is_committed_as_a_whole(workspace: Any) -> None:
    """Random operations, against a dict of what is committed and one of what is pending."""
    engine, rng, committed = workspace.create(), random.Random(1), dict[str, tuple[str, int]]()
    for _unit in range(40):
        pending = dict(committed)
        with Session(engine) as session:
            users = app.UserRepository(session)
            for _step in range(8):
                email = rng.choice(["ada@x", "bob@x", "o'hara@x"])
                person = app.Person(email, rng.choice(["", "Ł 日本", "'); DROP TABLE users;--"]))
                what, known = rng.choice(["add", "save", "get", "remove"]), pending.get(email)
                ask = partial(getattr(users, what), person if what in ("add", "save") else email)
                with pytest.raises((app.RowRefused, ValueError)) as refused:
                    getattr(users, rng.choice(["add", "save"]))(app.Person(*rng.choice(BAD)))
                assert "secret" not in "".join(traceback.format_exception(refused.value))
                with pytest.raises(app.UserNotFound):
                    rng.choice([users.get, users.remove])(rng.choice(["\0", "\ud800"]))
                if what != "save" and (what == "add") == (known is not None):
                    taken_or_not_found = app.EmailTaken if known else app.UserNotFound
                    with pytest.raises(taken_or_not_found, match=f"^{email}$"):
                        ask()
                    continue
                with app.count_queries(engine) as statements:
                    answer = ask()
                # One statement: no rival comes between a look and an INSERT.
                assert sum("SAVEPOINT" not in each for each in statements) == 1
                if what == "remove":
                    del pending[email]
                elif what == "get":
                    assert (answer.email, answer.full_name) == (email, pending[email][0])
                else:
                    assert answer in (None, known is None)
                    pending[email] = person.full_name, known[1] + 1 if known else 1
            if rng.random() < 0.5:
                session.commit()
                committed = pending
        assert stored_users(engine) == committed


def test_the_demos_show_what_they_claim(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "DEFAULT_USERS", 3)
    seconds, (engine,) = app.demo_bulk_load(workspace, 9), workspace._engines.values()
    assert list(seconds) == list(app.LOADERS)[: 3 if app.is_sqlite(engine) else 4]
    assert app.count_rows(engine, app.Order) == len(generated(3)[2])  # it stores nothing
    assert app.demo_repository(workspace) == {"commit forgotten": 0, "committed": 2}
    assert app.demo_schema(workspace) == {
        "e-mail in capitals": "ck_users_email", "e-mail taken": "uq_users_email",
        "amount of 0.00": "ck_orders_amount", "amount of 1.005": TYPE,
        "order of nobody": FK if app.is_sqlite(engine) else "fk_orders_user_id",
    }  # fmt: skip


# ── 4. N+1, 5. Analytics ────────────────────────────────────────────────────────────


def expected_book(users: int) -> list[tuple[Any, ...]]:
    countries, cities = app.places()
    country = {row["code"]: row["name"] for row in countries}
    place = {row["id"]: (row["name"], country[row["country_code"]]) for row in cities}
    return [
        (user["email"], *sorted((row["kind"], *place[row["city_id"]]) for row in addresses))
        for user, addresses, _ in app.people(users)
    ]


def expected_queries(book: list[tuple[Any, ...]]) -> dict[str, int]:
    cities = {(city, country) for _, *homes in book for _, city, country in homes}
    lazy = 1 + len(book) + len(cities) + len({country for _, country in cities})
    more = (len(book) - 1) // 500  # selectin takes 500 parents at once
    return {"lazy": lazy, "joined": 1, "selectin": 4 + more, "selectin + joined": 2 + more}


def test_each_strategy_has_the_same_answer_and_its_own_queries(workspace: Any) -> None:
    engine, book = workspace.create(users=501), expected_book(501)
    book[1] = book[1][:1]
    with engine.begin() as connection:
        connection.execute(sa.delete(app.Address).where(app.Address.user_id == 2))
    for users in (1, 2, 500, 501):
        for strategy, queries in expected_queries(book[:users]).items():
            with Session(engine) as session, app.count_queries(engine) as statements:
                assert app.address_book(session, strategy, users) == book[:users]
            assert len(statements) == queries
    with Session(engine) as session, pytest.raises(exc.InvalidRequestError, match="raise"):
        app.address_book(session, "raiseload", 5)


def answers(cohorts: Any, revenue: Any, customers: Any, trees: Any) -> dict[str, Any]:
    return dict(zip(app.QUESTIONS, (cohorts, cohorts, revenue, customers, trees), strict=True))


def expected_answers(users: int) -> dict[str, Any]:
    people, addresses, orders = generated(users)
    city = {row["id"]: (row["country_code"], row["name"]) for row in app.places()[1]}
    home = {row["user_id"]: city[row["city_id"]] for row in addresses if row["kind"] == "home"}
    month = {u["id"]: u["created_at"].year * 12 + u["created_at"].month - 1 for u in people}
    sizes, referrer = Counter(month.values()), {u["id"]: u["referred_by_id"] for u in people}
    active, trees, best = defaultdict(set), defaultdict(list), []
    revenue, spent = Counter[tuple[str, str]](), defaultdict[str, Counter[int]](Counter)
    for row in orders:
        user, then, (country, name) = row["user_id"], row["placed_at"], home[row["user_id"]]
        active[month[user], then.year * 12 + then.month - 1 - month[user]].add(user)
        for level in ((country, name), (country, ""), ("", "")):
            revenue[level] += row["amount"]
        spent[country][user] += row["amount"]
    for country, by_user in sorted(spent.items()):
        ranked = sorted(by_user, key=lambda user: (-by_user[user], user))[:3]
        best += [(country, rank, user, by_user[user]) for rank, user in enumerate(ranked, 1)]
    for user in referrer:
        line = [user]
        while above := referrer[line[-1]]:
            line.append(above)
        trees[line[-1]].append(len(line) - 1)
    levels = sorted(revenue, key=lambda level: [name or "~" for name in level])
    largest = sorted((1 - len(depths), root, max(depths)) for root, depths in trees.items())
    return answers(
        sorted((m, age, len(ids), sizes[m]) for (m, age), ids in active.items()),
        [(country or None, name or None, revenue[country, name]) for country, name in levels],
        best,
        [(root, -below, depth) for below, root, depth in largest[:5]],
    )


def test_the_demos_agree_with_plain_python(shop: sa.Engine) -> None:
    half, whole = (expected_queries(expected_book(SHOP_USERS)[:n]) for n in (30, SHOP_USERS))
    expected = {strategy: (half[strategy], whole[strategy]) for strategy in half}
    assert app.demo_n_plus_one(shop, SHOP_USERS) == expected
    assert app.demo_analytics(shop) == expected_answers(SHOP_USERS)


BERLIN, HAMBURG, PARIS = 16, 17, 26
JAN_24, FEB_24, DEC_24, JAN_25 = 24288, 24289, 24299, 24300  # year × 12 + month - 1
NEW_YEAR = datetime(2025, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))
TINY: list[tuple[Any, ...]] = [  # joined, referrer, home, orders
    (at(2024, 1, 10), None, BERLIN, {
        at(2024, 1, 10): "10.00", at(2024, 1, 20): "5.00",  # one active user in that month
        at(2024, 2, 5): "20.00", at(2025, 1, 1): "1.00",  # and in the twelfth month after
    }),
    (at(2024, 1, 31, 23, 59, 59), None, BERLIN, {at(2024, 2, 29): "7.50"}),
    (at(2024, 2, 1), 1, HAMBURG, {at(2024, 2, 1): "0.30"}),
    (at(2024, 12, 15), 3, PARIS, {at(2024, 12, 31, 23, 59, 59): "9.99", NEW_YEAR: "0.01"}),
    (at(2025, 1, 1), None, PARIS, {at(2025, 3, 1): "10.00"}),  # as much as the one before
    (at(2025, 1, 5), 1, HAMBURG, {}),
    (at(2025, 1, 6), None, None, {at(2025, 1, 7): "1000.00"}),
    (at(2025, 1, 7), None, BERLIN, {at(2025, 1, 8): "0.10", at(2025, 1, 9): "0.20"}),  # as 3
]  # fmt: skip


def fill(engine: sa.Engine, *tables: Rows) -> None:
    with engine.begin() as connection:
        for model, rows in zip(app.MODELS, tables, strict=False):
            app.insert_rows(connection, model, rows)


def test_the_answers_are_those_worked_out_by_hand(workspace: Any) -> None:
    users, addresses, orders = list[Any](), list[Any](), list[Any]()
    for user, (joined, referrer, home, placed) in enumerate(TINY, 1):
        row = {"id": user, "email": f"{user}@x", "full_name": "", "created_at": joined}
        users.append({**row, "referred_by_id": referrer})
        addresses.append({**BILLING, "user_id": user, "city_id": BERLIN})
        addresses += [{**ADDRESS, "user_id": user, "city_id": home}] if home else []
        for moment, amount in placed.items():
            orders.append({"user_id": user, "placed_at": moment, "amount": Decimal(amount)})
    engine, trees = workspace.create(), [(1, 3, 2), (2, 0, 0), (5, 0, 0), (7, 0, 0), (8, 0, 0)]
    assert app.demo_analytics(engine) == answers([], [], [], [])
    fill(engine, *app.places(), users, addresses)
    assert app.demo_analytics(engine) == answers([], [], [], trees)
    fill(engine, [], [], [], [], orders)
    assert app.demo_analytics(engine) == answers(
        [
            (JAN_24, 0, 1, 2), (JAN_24, 1, 2, 2), (JAN_24, 12, 1, 2), (FEB_24, 0, 1, 1),
            (DEC_24, 0, 1, 1), (DEC_24, 1, 1, 1), (JAN_25, 0, 2, 4), (JAN_25, 2, 1, 4),
        ],
        [
            ("DE", "Berlin", Decimal("43.80")), ("DE", "Hamburg", Decimal("0.30")),
            ("DE", None, Decimal("44.10")), ("FR", "Paris", Decimal("20.00")),
            ("FR", None, Decimal("20.00")), (None, None, Decimal("64.10")),
        ],
        [  # ties go to the lower id
            ("DE", 1, 1, Decimal("36.00")), ("DE", 2, 2, Decimal("7.50")),
            ("DE", 3, 3, Decimal("0.30")), ("FR", 1, 4, Decimal("10.00")),
            ("FR", 2, 5, Decimal("10.00")),
        ],
        trees,
    )  # fmt: skip
