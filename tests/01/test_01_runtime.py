"""Script 01 at run time: transactions, large results, the pool, the transfer, security.

What uses `workspace` or `engine` runs on SQLite and on PostgreSQL, unless it is ON_POSTGRES.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from running import until
from services import ROOT, load_script, postgres_engine
from sqlalchemy import exc, orm
from sqlalchemy.orm import Session

app: Any = load_script("01_sqlalchemy_advanced")
User, Order, Job = app.User, app.Order, app.Job

Row = dict[str, Any]
ON_POSTGRES = pytest.mark.parametrize("workspace_url", ["postgresql"], indirect=True)
TIMEOUT_S = 30.0  # for what ends in milliseconds, on a busy machine
T0 = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
NAME = sa.select(User.full_name).where(User.id == 1)


@pytest.fixture
def engine(workspace: Any) -> Any:  # on a database of three users
    return workspace.create(users=3)


def ask(engine: sa.Engine, query: Any) -> Any:  # the first column of the first row
    with engine.connect() as connection:
        return connection.scalar(sa.text(query) if isinstance(query, str) else query)


def do(engine: sa.Engine, statement: Any, rows: list[Row] | None = None) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(statement) if isinstance(statement, str) else statement, rows)


def kill(engine: sa.Engine, session: Any) -> None:
    """End the server's side of a session or connection."""
    pid = session.scalar(sa.select(sa.func.pg_backend_pid()))
    assert ask(engine, sa.select(sa.func.pg_terminate_backend(pid, 10_000)))


def in_threads(count: int, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(work) for _ in range(count)]:
            future.result(TIMEOUT_S)


# ── 6. Transactions, 7. Job queue ────────────────────────────────────────────────────


@pytest.mark.parametrize(("times", "attempts"), [(3, 5), (9, 3)])
def test_who_is_overtaken_tries_again_with_jitter_that_doubles(
    engine: Any, monkeypatch: pytest.MonkeyPatch, times: int, attempts: int
) -> None:
    """By one that writes what we have read, and reads what we write: PostgreSQL sees at COMMIT."""
    read, waits = list[Any](), list[Any]()
    second, is_sqlite = User.id == 2, app.is_sqlite(engine)

    def rival(session: Session) -> None:
        session.scalar(NAME)
        session.execute(sa.update(User).where(second).values(credit=Decimal(len(read))))

    def work(session: Session) -> Any:
        user, steps = session.get_one(User, 1), [session.flush]
        read.append(session.scalar(sa.select(User.credit).where(second)))
        user.full_name = f"read {read[-1]}"
        if len(read) <= times:
            steps.insert(not is_sqlite, partial(app.in_transaction, engine, rival))
        for step in steps:
            step()
        return user

    wait = SimpleNamespace(sleep=lambda bounds: waits.append((*bounds, engine.pool.checkedout())))
    monkeypatch.setattr(app, "random", SimpleNamespace(uniform=lambda *bounds: bounds))
    monkeypatch.setattr(app, "time", wait)
    try:
        met = app.in_transaction(engine, work, attempts=attempts).full_name
    except exc.OperationalError as error:
        met = app.error_code(error)
    code = "SQLITE_BUSY_SNAPSHOT" if is_sqlite else "40001"
    assert met == ("read 3.00" if times < attempts else code)
    assert read == list(range(min(times + 1, attempts)))
    assert waits == [(0, 0.02, 0), (0, 0.04, 0), (0, 0.08, 0)][: len(read) - 1]


@ON_POSTGRES
def test_a_deadlock_of_two_threads_is_retried(engine: sa.Engine) -> None:
    both_hold_a_lock, attempts, first_users = threading.Barrier(2), list[int](), iter((1, 2))

    def deposit_for_both() -> None:
        mine = next(first_users)

        def work(session: Session) -> None:
            is_first = mine not in attempts
            attempts.append(mine)
            for user in (mine, 3 - mine):
                deposit = sa.update(User).where(User.id == user)
                session.execute(deposit.values(credit=app.PLUS_TEN))
                if is_first and user == mine:
                    both_hold_a_lock.wait(TIMEOUT_S)

        app.in_transaction(engine, work, isolation_level="READ COMMITTED")

    in_threads(2, deposit_for_both)
    assert len(attempts) >= 3
    assert ask(engine, "SELECT string_agg(credit::text, ' ') FROM users") == "0.00 20.00 20.00"


def test_a_busy_file_is_retried(sqlite_workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sqlite_workspace.create(users=1)

    def work(session: Session) -> None:
        session.connection().exec_driver_sql("PRAGMA busy_timeout = 0")
        session.execute(sa.update(User).values(full_name="ours"))

    with closing(engine.connect()) as other:
        monkeypatch.setattr(app, "time", SimpleNamespace(sleep=lambda _s: other.commit()))
        other.execute(sa.update(User).values(full_name="the other's"))
        app.in_transaction(engine, work)
    assert ask(engine, NAME) == "ours"


@pytest.mark.parametrize(
    ("attribute", "code", "attempts"),
    [
        ("pgcode", "40001", 5), ("pgcode", "40P01", 5), ("sqlite_errorname", "SQLITE_BUSY", 5),
        ("pgcode", "57014", 1), ("sqlite_errorname", "SQLITE_FULL", 1), ("other", "40001", 1),
    ],
)  # fmt: skip
def test_the_code_decides_and_not_the_message(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, attribute: str, code: str, attempts: int
) -> None:
    before, calls = ask(engine, NAME), []

    def work(session: Session) -> None:
        calls.append(1)
        session.execute(sa.update(User).values(full_name="half done"))
        error = Exception("could not serialize access, deadlock detected, 40001, SQLITE_BUSY")
        setattr(error, attribute, code)
        raise exc.DBAPIError("SELECT 1", None, error) if attribute != "other" else error

    monkeypatch.setattr(app, "time", SimpleNamespace(sleep=lambda _s: None))
    with pytest.raises(Exception, match="40001, SQLITE_BUSY"):
        app.in_transaction(engine, work)
    assert (len(calls), ask(engine, NAME)) == (attempts, before)
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        app.in_transaction(engine, work, attempts=0)


@ON_POSTGRES
def test_an_isolation_level_holds_for_one_transaction(workspace: Any) -> None:
    engine, show = workspace.create(pool_size=1, max_overflow=0), "SHOW transaction_isolation"
    for level in ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"):
        shown = app.in_transaction(engine, lambda s: s.scalar(sa.text(show)), isolation_level=level)
        assert (shown, ask(engine, show)) == (level.lower(), "read committed")


@pytest.mark.parametrize(
    ("workspace_url", "way"),
    [("sqlite", "read, then write, retried"), *(("postgresql", way) for way in app.DEPOSITS)],
    indirect=["workspace_url"],
)
def test_deposits_of_two_threads_at_once(engine: sa.Engine, way: str) -> None:
    """Ten each. Where the reading takes no lock, both have read before either writes."""
    (new_credit, level), both_have_read, attempts = app.DEPOSITS[way], threading.Barrier(2), []

    def deposit() -> None:
        todo = [both_have_read.wait] if way.startswith("read") else []

        def work(session: Session) -> None:
            attempts.append(1)
            credit = new_credit(session)
            while todo:
                todo.pop()(TIMEOUT_S)
            session.execute(app.SET_CREDIT.values(credit=credit))

        app.in_transaction(engine, work, isolation_level=level, attempts=20)

    in_threads(2, lambda: [deposit() for _ in range(10)])
    assert ask(engine, app.CREDIT) == (100 if way == "read, then write" else 200)
    assert len(attempts) >= 30 if "retried" in way else len(attempts) == 20


def test_without_a_version_the_first_edit_is_lost(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    unversioned = type("Unversioned", (), {})
    orm.registry().map_imperatively(unversioned, User.__table__)
    monkeypatch.setattr(app, "User", unversioned)
    assert app.edit_conflict(engine) == "no conflict: the first edit is lost"
    assert ask(engine, NAME) == "Editor 2"


def test_what_a_savepoint_kept_goes_with_the_rollback_around_it(workspace: Any) -> None:
    """On SQLite only because `sqlite_engine` sends BEGIN; also after another isolation level."""
    engine = workspace.create(users=1, pool_size=1, max_overflow=0)
    app.in_transaction(engine, lambda session: session.scalar(app.CREDIT))
    without_begin = sa.create_engine(engine.url)
    for each, kept in ((engine, 0), (without_begin, int(app.is_sqlite(engine)))):
        with Session(each) as session:
            assert app.insert_each(session, Job, [{"user_id": 1}]) == {}
            session.rollback()
        assert app.count_rows(engine, Job) == kept
    without_begin.dispose()


def add_jobs(engine: sa.Engine, ids: range, state: str = "ready") -> None:
    do(engine, sa.insert(Job), [{"id": i, "user_id": 1, "state": state} for i in ids])


def jobs(engine: sa.Engine) -> dict[tuple[str, int], int]:  # (state, attempts) → how many
    with Session(engine) as session:
        return Counter((job.state, job.attempts) for job in session.scalars(sa.select(Job)))


@ON_POSTGRES
def test_four_threads_do_each_of_200_jobs_once(engine: sa.Engine) -> None:
    add_jobs(engine, range(200))
    handled, each_has_one = list[tuple[int, int]](), threading.Barrier(4)

    def handle(_session: Session, job: Any) -> None:
        me = threading.get_ident()
        if me not in [worker for _, worker in handled]:
            each_has_one.wait(TIMEOUT_S)
        handled.append((job.id, me))

    in_threads(4, lambda: app.run_worker(engine, handle))
    assert sorted(job for job, _ in handled) == list(range(200))
    assert jobs(engine) == {("done", 0): 200}


WORKER = """
import importlib, sys, time
import sqlalchemy as sa
app = importlib.import_module("01_sqlalchemy_advanced")

def handle(session, job):
    session.execute(app.SET_CREDIT.values(full_name=f"by job {job.id}"))
    if job.id == 7:
        print("in the middle", flush=True)
        time.sleep(600)  # until it is killed

app.run_worker(sa.create_engine(sys.argv[1]), handle)
"""


@ON_POSTGRES
def test_a_worker_killed_in_the_middle_of_a_job_loses_none(engine: sa.Engine) -> None:
    add_jobs(engine, range(1, 21))
    url, handled = engine.url.render_as_string(hide_password=False), list[int]()
    command = [sys.executable, "-c", WORKER, url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        said = worker.stdout.readline()
        worker.kill()
    assert (said, ask(engine, NAME)) == (b"in the middle\n", "by job 6")
    assert jobs(engine) == {("done", 0): 6, ("ready", 0): 14}
    free = "SELECT 1 FROM jobs WHERE state = 'ready' FOR UPDATE SKIP LOCKED"
    until(lambda: ask(engine, f"SELECT count(*) FROM ({free}) AS f") == 14, "its lock to go")
    app.run_worker(engine, lambda _session, job: handled.append(job.id))
    assert (handled, jobs(engine)) == (list(range(7, 21)), {("done", 0): 20})


def test_a_job_that_raises_waits_and_is_given_up(engine: sa.Engine) -> None:
    """The second one always; another worker does the third; the fourth's connection dies."""
    add_jobs(engine, range(1, 6))
    handled: list[int] = []

    def handle(session: Session, job: Any) -> None:
        handled.append(job.id)
        session.execute(app.SET_CREDIT.values(credit=app.PLUS_TEN))
        if job.id == 2:
            session.execute(app.SET_CREDIT.values(email="IN CAPITALS"))  # refused
        if handled[-2:] == [2, 3]:
            session.rollback()
            do(engine, "UPDATE jobs SET state = 'done' WHERE id = 3")
        if handled[-2:] == [3, 4] and not app.is_sqlite(engine):
            kill(engine, session)
            session.scalar(app.CREDIT)
        if len(handled) in (3, 4):
            raise LookupError

    app.run_worker(engine, handle)
    assert handled == [1, 2, 3, 4, 5, 2, 4, 2]
    assert jobs(engine) == {("done", 0): 3, ("done", 1): 1, ("failed", 3): 1}
    assert ask(engine, app.CREDIT) == 30  # what they wrote who raised is rolled back


@ON_POSTGRES
def test_a_claim_skips_what_is_held_and_reads_nothing_done(engine: sa.Engine) -> None:
    add_jobs(engine, range(20_000), state="done")
    add_jobs(engine, range(20_000, 20_003))
    do(engine, "ANALYZE jobs")
    with Session(engine) as one, Session(engine) as other:
        for claim, claimed in ((app.READY_JOB, [20_000] * 2), (app.CLAIM_JOB, [20_000, 20_001])):
            assert [session.scalars(claim).one().id for session in (one, other)] == claimed
        scan = app.scan_of(one, app.CLAIM_JOB)
    assert re.match(r"Index Scan using ix_jobs_ready on jobs \(actual rows=1[. ]", scan), scan
    indexes = "SELECT string_agg(indexdef, ' ') FROM pg_indexes WHERE indexname = 'ix_jobs_ready'"
    assert "(attempts, id) WHERE " in ask(engine, indexes)


# ── 8. Large results ────────────────────────────────────────────────────────────────


def orders_at(engine: sa.Engine, moments: list[datetime]) -> list[tuple[datetime, int]]:
    """Replace all orders by one at each of `moments`; returns their keys in reading order."""
    keys = [(moment, number) for number, moment in enumerate(moments, 1)]
    rows = [{"id": i, "user_id": 1, "placed_at": at, "amount": Decimal(i)} for at, i in keys]
    do(engine, sa.delete(Order))
    do(engine, sa.insert(Order), rows)
    do(engine, "ANALYZE")
    return sorted(keys)


@pytest.mark.parametrize("of", [lambda i: i, lambda i: 0, lambda i: -i // 5, lambda i: i * 37 % 13])
def test_keyset_pages_give_every_order_once_and_in_order(engine: sa.Engine, of: Any) -> None:
    """Without ties, all tied, tied across pages, in no order."""
    expected = orders_at(engine, [T0 + timedelta(minutes=of(i)) for i in range(61)])
    with Session(engine) as session:
        for size in (2, 7, 61):
            after, pages = (datetime(1970, 1, 1, tzinfo=UTC), 0), list[Any]()
            while page := list(map(tuple, session.execute(app.keyset_page(after, size)))):
                by_offset = session.execute(app.offset_page(len(pages), size))
                assert page == list(map(tuple, by_offset))
                pages.append(page)
                after = page[-1]
            assert [key for page in pages for key in page] == expected


@pytest.mark.parametrize("text", ["100%", ":name", "%(name)s", "%%", "it's", "\\", "Seq Scan on x"])
def test_the_plan_of_a_query_for_any_text(engine: sa.Engine, text: str) -> None:
    do(engine, sa.update(User).values(full_name=text).where(User.id == 2))
    with Session(engine) as session:
        scan = app.scan_of(session, sa.select(User.id).where(User.full_name == text))
    plan = "SCAN users$" if app.is_sqlite(engine) else r"Seq Scan on users \(actual rows=1[. ]"
    assert re.match(plan, scan), scan


def test_a_stream_holds_a_fraction_of_what_a_list_holds(engine: sa.Engine) -> None:
    orders_at(engine, [T0] * 4_000)

    def fold(**options: int) -> None:
        with Session(engine) as session:
            orders = session.scalars(sa.select(Order).execution_options(**options))
            total = sum(order.amount for order in (orders if options else orders.all()))
        assert total == sum(range(1, 4_001))

    fold()  # else the first one's caches count
    assert app.peak_bytes(lambda: fold(yield_per=100)) * 3 < app.peak_bytes(fold)  # by far
    peak = app.peak_bytes(lambda: [len(bytes(1_000_000)) for _ in range(5)])
    assert 1_000_000 <= peak < 2_000_000  # of what lived at once
    with pytest.raises(ZeroDivisionError):
        app.peak_bytes(lambda: 1 // 0)
    assert not tracemalloc.is_tracing()


# ── 9. Pool ─────────────────────────────────────────────────────────────────────────

OWN = "-c work_mem=1234kB -c statement_timeout=1 -c search_path=public -c TimeZone=Asia/Tokyo"


@pytest.mark.parametrize("own", [{}, {"options": OWN, "application_name": "mine"}])
def test_every_connection_is_bounded_named_and_in_utc(
    schemas_url: str, tmp_path: Path, own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the engine's URL alone; what the user's URL asks for stays, where it is not ours."""
    url = sa.make_url(schemas_url).update_query_dict(own).render_as_string(hide_password=False)
    with closing(app.Workspace(tmp_path, url, 5.0)) as place:
        engine = place.create()
        for each in (engine, sa.create_engine(engine.url)):
            names = "statement_timeout", "TimeZone", "application_name"
            shown = [*(ask(each, f"SHOW {name}") for name in names), app.count_rows(each, User)]
            assert shown == ["1min", "UTC", own.get("application_name", "module8-01"), 0]
            assert (ask(each, "SHOW work_mem") == "1234kB") is bool(own)
            each.dispose()
    monkeypatch.setattr(app, "STATEMENT_TIMEOUT_MS", 250)
    engine = app.postgres_engine(url, "public", 5.0)
    with pytest.raises(exc.OperationalError) as caught:
        ask(sa.create_engine(engine.url, poolclass=sa.NullPool), "SELECT pg_sleep(60)")
    assert app.error_code(caught.value) == "57014"


# ── 10. Transfer ────────────────────────────────────────────────────────────────────

NASTY = "tab\t, newline\n, return\r\n, back\\slash, \\N, \\., 'quotes\", é, 🐘"
BATCH_ROWS = 20
TABLES = [model.__table__ for model in app.MODELS]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[sa.Engine]:
    """SQLite with 25 users, some of them odd, and jobs."""
    with closing(app.Workspace(tmp_path, None, 0)) as place:
        engine = place.create(users=25)
        add_jobs(engine, range(3, 6))
        do(engine, sa.update(User).values(full_name=NASTY, created_at=T0).where(User.id == 4))
        do(engine, app.SET_CREDIT.values(credit=Decimal("9999999999.99"), version=7))
        do(engine, sa.update(User).values(credit=Decimal("-0.00")).where(User.id == 2))
        do(engine, sa.delete(User).where(User.id.in_([5, 6])))  # and what is theirs
        yield engine


def rows_in(engine: sa.Engine) -> dict[str, list[Row]]:
    """Everything in the database, in the order of a transfer."""
    queries = {table: sa.select(table).order_by(*table.primary_key) for table in TABLES}
    with engine.connect() as connection:
        found = {table: connection.execute(query) for table, query in queries.items()}
        return {table.name: [dict(row) for row in found[table].mappings()] for table in TABLES}


def first_batches(count: int, rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The part of `rows` that is in the first `count` batches of a transfer."""
    batches = [(t, i) for t in rows for i in range(0, len(rows[t]), BATCH_ROWS)]
    done = {table: start + BATCH_ROWS for table, start in batches[:count]}
    return {table: rows[table][: done.get(table, 0)] for table in rows}


def assert_arrived(target: sa.Engine, rows: dict[str, list[Row]]) -> None:
    assert rows_in(target) == rows
    assert app.schema_differences(target) == []


@pytest.mark.parametrize("way", ["raised in the hook", "raised at the commit", "killed"])
def test_a_transfer_interrupted_in_each_batch_keeps_those_before(
    engine: sa.Engine, workspace: Any, source: sa.Engine, way: str
) -> None:
    target, rows, seen = workspace.create(), rows_in(source), list[object]()

    def reach(connection: Any = None) -> None:
        seen.append(connection)
        if len(seen) == 2 and way == "killed" and not app.is_sqlite(target):
            kill(engine, connection)
        elif len(seen) == 2:
            raise EOFError

    if "hook" not in way:
        sa.event.listen(target, "commit", reach)
    on_batch = (lambda _rows: reach()) if "hook" in way else (lambda _rows: None)
    for batch in range(sum(-(-len(of_table) // BATCH_ROWS) for of_table in rows.values())):
        seen[:] = [None] * (batch == 0)  # the first one at once, then one more each time
        with pytest.raises((EOFError, exc.OperationalError)):
            app.transfer(source, target, BATCH_ROWS, on_batch)
        assert rows_in(target) == first_batches(batch, rows)
    seen[:] = [None, None]
    left = [app.transfer(source, target, BATCH_ROWS) for _again in range(2)]
    assert left == [len(rows["jobs"]), 0]
    assert_arrived(target, rows)


def test_transfers_in_both_directions_and_of_nothing(
    workspace: Any, sqlite_workspace: Any, source: sa.Engine
) -> None:
    rows, server, file = rows_in(source), workspace.create(), sqlite_workspace.create()
    assert app.transfer(source, server) == sum(map(len, rows.values()))
    do(server, "UPDATE users SET version = version WHERE id = 1")  # it lies after whom it referred
    assert app.transfer(server, file) == sum(map(len, rows.values()))
    assert_arrived(file, rows)
    assert app.transfer(workspace.create(), workspace.create()) == 0
    do(server, "DELETE FROM users WHERE id < 25")  # with what is theirs
    before = rows_in(server)
    with pytest.raises(app.TransferError, match=r"^users: source \(1, .*, target \(1, "):
        app.transfer(file, server)
    assert rows_in(server) == before


def test_a_text_that_only_sqlite_holds(workspace: Any, source: sa.Engine) -> None:
    target, change = workspace.create(), sa.update(User).where(User.id == 25)
    do(source, change.values(email=f"{'x' * 250}@example.com"))
    if not app.is_sqlite(target):
        for _ in range(2):
            with pytest.raises(app.TransferError) as caught:
                app.transfer(source, target, BATCH_ROWS)
            assert str(caught.value) == "users: the target refuses a row (22001)"
            assert (caught.value.__cause__, caught.value.__suppress_context__) == (None, True)
            assert rows_in(target) == first_batches(5, rows_in(source))
        do(source, change.values(email="short@example.com"))
    app.transfer(source, target, BATCH_ROWS)
    assert_arrived(target, rows_in(source))


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("change", [sa.update(User).values(version=9), sa.delete(Order)])
def test_a_row_changed_or_lost_meanwhile_is_found(
    workspace: Any, source: sa.Engine, monkeypatch: pytest.MonkeyPatch, side: str, change: Any
) -> None:
    target, checksum, model = workspace.create(), app.checksum, change.entity_description["entity"]

    def after_tampering(each: sa.Engine, of: Any, rows: int | None = None) -> object:
        if of is model and each is source and rows is None:
            do(source if side == "source" else target, change.where(model.id == 3))
        return checksum(each, of, rows)

    monkeypatch.setattr(app, "checksum", after_tampering)
    for _ in range(2):
        with pytest.raises(app.TransferError, match=rf"^{model.__tablename__}: source .*, target"):
            app.transfer(source, target, BATCH_ROWS)


def test_a_transfer_between_files_that_sort_differently(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = workspace.create()
    monkeypatch.setattr(app.Country.__table__.c.code.type, "collation", "NOCASE")
    there_and_back(plain, tmp_path, None)


def test_a_transfer_to_each_kind_of_sorting_that_the_server_has(
    workspace: Any, tmp_path: Path, postgres_database: str, postgres_url: str
) -> None:
    """Debian's PostgreSQL has ICU; that of the wheel has not, and sorts by code points alone."""
    server, name = postgres_engine(postgres_url), sa.make_url(postgres_database).database
    has_icu = ask(server, "SELECT count(*) FROM pg_collation WHERE collname = 'en-US-x-icu'")
    do(server, f"DROP DATABASE {name}")
    icu = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'" if has_icu else "LC_COLLATE 'C'"
    do(server, f"CREATE DATABASE {name} TEMPLATE template0 {icu}")
    there_and_back(workspace.create(), tmp_path, postgres_database, bool(has_icu))


def there_and_back(plain: Any, directory: Path, url: str | None, linguistic: bool = True) -> None:
    """From a database that sorts in its own way into `plain`, and from there into another."""
    rows = [{"code": code, "name": code} for code in ("A-", "A1", "ZA", "_A", "aB", "ÅL")]
    with closing(app.Workspace(directory, url, 5.0)) as other:
        source, target = other.create(), other.create()
        do(source, sa.insert(app.Country), rows)
        assert (rows_in(source)["countries"] != rows) == linguistic  # in order of code points
        assert [app.transfer(source, plain, 2), app.transfer(plain, target, 2)] == [6, 6]
        assert (rows_in(plain)["countries"], rows_in(target)) == (rows, rows_in(source))


def test_every_table_numbers_on(
    workspace: Any, source: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a transfer; a table whose name needs quotes, and an empty one, too."""
    target, base = workspace.create(), type("Odd", (orm.DeclarativeBase,), {})
    id_ = sa.Column(app.BIG_INTEGER, sa.Identity(), primary_key=True)
    odd: Any = type("OddOrder", (base,), {"__tablename__": "Order", "id": id_})
    for engine in (source, target):
        odd.metadata.create_all(engine)
    do(source, sa.insert(odd).values(id=7))
    do(source, "DELETE FROM jobs")
    monkeypatch.setattr(app, "MODELS", (*app.MODELS, odd))
    app.transfer(source, target)
    city = sa.insert(app.City).values(country_code="DE", name="Bonn")
    user = sa.insert(User).values(email="new@example.com", full_name="New")
    for insert in (city, user, sa.insert(Job).values(user_id=1), sa.insert(odd).values()):
        do(target, insert)
    assert [ask(target, sa.func.max(m.id)) for m in (app.City, User, Job, odd)] == [51, 26, 1, 8]
