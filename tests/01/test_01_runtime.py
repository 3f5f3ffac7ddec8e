"""Script 01 at run time: transactions, large results, the pool, the transfer, security.

Each test runs on SQLite and on PostgreSQL, unless it carries ON_POSTGRES: then SQLite lacks the
mechanism. What is expected comes from elsewhere than the script: the server's own tables, plain
Python, an RFC.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from services import postgres_engine
from sqlalchemy import orm
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.orm import Session

import config

Row = dict[str, Any]
ON_POSTGRES = pytest.mark.parametrize("workspace_url", ["postgresql"], indirect=True)
THREAD_TIMEOUT_S = 30.0  # for what ends in milliseconds, on a busy machine

# ── Helpers ─────────────────────────────────────────────────────────────────────────


def ask(engine: sa.Engine, query: str, **parameters: object) -> Any:
    """The first column of the first row."""
    with engine.connect() as connection:
        return connection.scalar(sa.text(query), parameters)


def name_of(engine: sa.Engine, user: int) -> Any:
    return ask(engine, "SELECT full_name FROM users WHERE id = :id", id=user)


def set_name(engine: sa.Engine, user: int, name: str) -> None:
    with engine.begin() as connection:
        statement = sa.text("UPDATE users SET full_name = :name WHERE id = :id")
        connection.execute(statement, {"id": user, "name": name})


def credit_of(script: ModuleType, engine: sa.Engine, user: int = 1) -> Decimal:
    with Session(engine) as session:
        return session.scalars(sa.select(script.User.credit).where(script.User.id == user)).one()


@contextmanager
def watching(url: str) -> Iterator[Callable[[str], Any]]:
    """Ask the server of `url` from outside the script's own pools."""
    engine = postgres_engine(url)
    yield partial(ask, engine)
    engine.dispose()


BACKENDS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name = 'module8-01' AND datname = current_database()
"""
SCHEMAS = r"SELECT count(*) FROM information_schema.schemata WHERE schema_name LIKE 'module8\_%'"


# ── 7. Transactions: optimistic locking ─────────────────────────────────────────────


def test_second_editor_is_told_and_the_first_ones_name_stays(
    script: ModuleType, workspace: Any
) -> None:
    engine = workspace.create(users=2)
    assert script.edit_conflict(engine) == (
        "StaleDataError: UPDATE statement on table 'users' expected to update 1 row(s)"
    )
    assert name_of(engine, 1) == "Editor 1"
    assert ask(engine, "SELECT version FROM users WHERE id = 1") == 2


def test_without_a_version_column_the_second_editor_overwrites_the_first(
    script: ModuleType, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unversioned:
        """The same table, mapped without `version_id_col`."""

    orm.registry().map_imperatively(Unversioned, script.User.__table__)
    engine = workspace.create(users=2)
    monkeypatch.setattr(script, "User", Unversioned)
    assert script.edit_conflict(engine) == "no conflict: the first edit is lost"
    assert name_of(engine, 1) == "Editor 2"


def test_no_editor_holds_a_transaction_while_a_person_thinks(
    script: ModuleType, workspace: Any
) -> None:
    """Between loading and saving, both connections are back in the pool."""
    engine = workspace.create(users=2)
    idle: list[int] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def on_statement(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("UPDATE"):
            idle.append(engine.pool.checkedout())

    script.edit_conflict(engine)
    assert idle == [1, 1]  # the one that is saving, and no other
    assert engine.pool.checkedout() == 0


# ── 7. Transactions: savepoints, and what is lost without them ──────────────────────


def job_rows(*users: int) -> list[Row]:
    return [{"user_id": user} for user in users]


def test_a_bad_row_in_one_go_costs_every_row_on_postgresql(
    script: ModuleType, workspace: Any
) -> None:
    engine = workspace.create(users=4)
    add_jobs(script, engine, 2)  # what was there before is not counted
    if not script.is_sqlite(engine):
        with engine.begin() as connection:
            script.reset_sequences(connection)
    outcome = script.insert_in_one_go(engine, script.Job, job_rows(1, 2, 999, 3, 4))
    if script.is_sqlite(engine):  # where an error ends its statement only
        assert outcome == (4, "SQLITE_CONSTRAINT_FOREIGNKEY")
    else:
        assert outcome == (0, "25P02")  # in_failed_sql_transaction
    assert script.count_rows(engine, script.Job) == 2 + outcome[0]


@pytest.mark.parametrize(("users", "sqlite_saves"), [((999,), 0), ((1, 999), 1)])
def test_in_one_go_the_last_bad_row_is_told_by_its_own_code(
    script: ModuleType, workspace: Any, users: tuple[int, ...], sqlite_saves: int
) -> None:
    engine = workspace.create(users=1)
    expected = {
        "sqlite": (sqlite_saves, "SQLITE_CONSTRAINT_FOREIGNKEY"),
        "postgresql": (0, "23503"),
    }
    outcome = script.insert_in_one_go(engine, script.Job, job_rows(*users))
    assert outcome == expected[engine.dialect.name]


def test_good_rows_in_one_go_are_all_saved(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=3)
    assert script.insert_in_one_go(engine, script.Job, job_rows(1, 2, 3)) == (3, "none")
    assert script.insert_in_one_go(engine, script.Job, []) == (0, "none")
    assert script.count_rows(engine, script.Job) == 3


def test_what_a_savepoint_kept_goes_with_the_rollback_around_it(
    script: ModuleType, workspace: Any
) -> None:
    """On SQLite only because `sqlite_engine` takes the driver's transaction control away."""
    engine = workspace.create(users=1)
    assert script.survivors_of_rollback(engine) == 0
    assert script.count_rows(engine, script.Job) == 0
    as_it_comes = sa.create_engine(engine.url)
    if script.is_sqlite(engine):
        assert script.survivors_of_rollback(as_it_comes) == 1
        assert script.count_rows(engine, script.Job) == 1
    as_it_comes.dispose()


# ── 7. Transactions: the lost update and its cures ──────────────────────────────────


@ON_POSTGRES
@pytest.mark.parametrize(
    ("deposit", "isolation_level", "outcome"),
    [
        ("deposit_blindly", "READ COMMITTED", (Decimal("10.00"), 2)),
        ("deposit_locked", "READ COMMITTED", (Decimal("20.00"), 2)),
        ("deposit_in_place", "READ COMMITTED", (Decimal("20.00"), 2)),
        ("deposit_blindly", "REPEATABLE READ", (Decimal("20.00"), 3)),
        ("deposit_blindly", "SERIALIZABLE", (Decimal("20.00"), 3)),
    ],
)
def test_race_of_two_deposits(
    script: ModuleType,
    workspace: Any,
    deposit: str,
    isolation_level: str,
    outcome: tuple[Decimal, int],
) -> None:
    engine = workspace.create(users=1)
    assert script.race(engine, getattr(script, deposit), isolation_level) == outcome
    assert credit_of(script, engine) == outcome[0]


@pytest.mark.parametrize(
    ("deposit", "retried"),
    [("deposit_blindly", True), ("deposit_locked", True), ("deposit_in_place", False)],
)
def test_race_of_two_deposits_on_sqlite_loses_nothing(
    script: ModuleType, sqlite_workspace: Any, deposit: str, retried: bool
) -> None:
    """It knows no FOR UPDATE: who has read before another wrote may not write, and is retried."""
    engine = sqlite_workspace.create(users=1)
    credit, tries = script.race(engine, getattr(script, deposit), "SERIALIZABLE")
    assert credit == credit_of(script, engine) == Decimal("20.00")
    # How often depends on how long the other one's commit takes.
    assert 3 <= tries <= 6 if retried else tries == 2


@pytest.mark.parametrize("deposit", ["deposit_blindly", "deposit_locked", "deposit_in_place"])
def test_deposits_one_after_the_other_lose_nothing(
    script: ModuleType, workspace: Any, deposit: str
) -> None:
    engine = workspace.create(users=2)
    for amount in (Decimal("10.00"), Decimal("0.01")):
        work = partial(getattr(script, deposit), user=1, amount=amount, between=lambda: None)
        script.in_transaction(engine, work)
    assert credit_of(script, engine, 1) == Decimal("10.01")
    assert credit_of(script, engine, 2) == 0


# ── 7. Transactions: retry ──────────────────────────────────────────────────────────


class Interfering:
    """Work whose transaction another one overtakes in its first `times` attempts."""

    def __init__(self, script: ModuleType, engine: sa.Engine, times: int) -> None:
        self._user, self._engine, self._times = script.User, engine, times
        self.attempts = 0

    def __call__(self, session: Session) -> str:
        self.attempts += 1
        one = self._user.id == 1
        before = session.scalar(sa.select(self._user.credit).where(one))
        if self.attempts <= self._times:
            with self._engine.begin() as other:
                other.execute(
                    sa.update(self._user).where(one).values(credit=self.attempts * Decimal(1))
                )
        session.execute(sa.update(self._user).where(one).values(full_name=f"read {before}"))
        return f"attempt {self.attempts}"


def test_serialization_failures_are_retried_with_jitter_that_doubles(
    script: ModuleType, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, waits = workspace.create(users=1), []
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    monkeypatch.setattr(script.random, "uniform", uniform)
    work = Interfering(script, engine, times=3)
    assert script.in_transaction(engine, work, sleep=waits.append) == "attempt 4"
    assert work.attempts == 4
    assert bounds == [(0, 0.02), (0, 0.04), (0, 0.08)]
    assert waits == [0.02, 0.04, 0.08]
    assert name_of(engine, 1) == "read 3.00"


def test_retrying_ends_with_the_last_error(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    waits: list[float] = []
    work = Interfering(script, engine, times=99)
    with pytest.raises(OperationalError) as caught:
        script.in_transaction(engine, work, attempts=3, sleep=waits.append)
    if script.is_sqlite(engine):
        assert script.sqlstate(caught.value) is None
        assert getattr(caught.value.orig, "sqlite_errorname", "") == "SQLITE_BUSY_SNAPSHOT"
    else:
        assert script.sqlstate(caught.value) == "40001"
    assert script.asks_for_retry(caught.value) is True
    assert work.attempts == 3
    assert len(waits) == 2
    assert all(0 <= wait <= 0.01 * 2**attempt for attempt, wait in enumerate(waits, 1))
    assert name_of(engine, 1) != "read 2.00"


@ON_POSTGRES
def test_a_real_deadlock_is_retried_and_both_transactions_are_done(
    script: ModuleType, workspace: Any
) -> None:
    engine = workspace.create(users=2)
    both_hold_a_lock, other_is_done = threading.Barrier(2), threading.Event()
    first_users = iter((1, 2))
    attempts: list[int] = []
    retries: list[float] = []

    def transfer_credit() -> None:
        mine = next(first_users)

        def work(session: Session) -> None:
            is_first = mine not in attempts
            attempts.append(mine)
            for user in (mine, 3 - mine):
                script.deposit_in_place(session, user, Decimal(1), lambda: None)
                if is_first and user == mine:
                    both_hold_a_lock.wait(THREAD_TIMEOUT_S)

        def wait(seconds: float) -> None:  # else it may take the row that the other waits for
            retries.append(seconds)
            assert other_is_done.wait(THREAD_TIMEOUT_S)

        script.in_transaction(engine, work, isolation_level="READ COMMITTED", sleep=wait)
        other_is_done.set()

    script.in_threads(2, transfer_credit)
    assert sorted(Counter(attempts).values()) == [1, 2]
    assert len(retries) == 1
    assert [credit_of(script, engine, user) for user in (1, 2)] == [2, 2]


class FromDriver(Exception):
    """A driver's error, with the SQLSTATE where psycopg2 has it."""

    def __init__(self, message: str, pgcode: str | None) -> None:
        super().__init__(message)
        self.pgcode = pgcode


class FromSqlite(Exception):
    """A driver's error, with the name of its code where sqlite3 has it."""

    def __init__(self, message: str, sqlite_errorname: str) -> None:
        super().__init__(message)
        self.sqlite_errorname = sqlite_errorname


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (FromDriver("no word of it", "40001"), 5),
        (FromDriver("no word of it", "40P01"), 5),
        (FromDriver("could not serialize access, deadlock detected, 40001", None), 1),
        (FromDriver("could not serialize access", "57014"), 1),
        (FromDriver("transaction aborted", "25P02"), 1),
        (FromDriver("SQLITE_BUSY, database is locked", None), 1),
        (FromSqlite("no word of it", "SQLITE_BUSY"), 5),
        (FromSqlite("no word of it", "SQLITE_BUSY_SNAPSHOT"), 5),
        (FromSqlite("no word of it", "SQLITE_BUSY_RECOVERY"), 5),
        (FromSqlite("database table is locked", "SQLITE_LOCKED"), 1),
        (FromSqlite("database is locked, SQLITE_BUSY", "SQLITE_CONSTRAINT_UNIQUE"), 1),
        (FromSqlite("database is locked", "SQLITE_READONLY"), 1),
    ],
    ids=lambda value: str(getattr(value, "args", value)),
)
def test_the_code_decides_and_not_the_message(
    script: ModuleType, shop: sa.Engine, error: Exception, attempts: int
) -> None:
    calls = []

    def work(_session: Session) -> None:
        calls.append(1)
        raise DBAPIError("SELECT 1", None, error)

    with pytest.raises(DBAPIError, match=str(error)):
        script.in_transaction(shop, work, sleep=lambda _s: None)
    assert len(calls) == attempts


def test_a_locked_file_is_retried_until_the_other_writer_ends(
    script: ModuleType, sqlite_workspace: Any
) -> None:
    """The real error: another transaction holds SQLite's one write lock."""
    engine = sqlite_workspace.create(users=1)
    other = engine.connect()
    calls: list[int] = []

    def work(session: Session) -> None:
        calls.append(1)
        session.connection().exec_driver_sql("PRAGMA busy_timeout = 0")
        session.execute(sa.update(script.User).values(full_name="ours"))

    with closing(other):
        other.execute(sa.update(script.User).values(full_name="the other's"))
        script.in_transaction(engine, work, sleep=lambda _s: other.commit())
    assert len(calls) == 2
    assert name_of(engine, 1) == "ours"


@ON_POSTGRES
def test_copy_tells_the_sqlstate_by_which_a_retry_is_decided(
    script: ModuleType, workspace: Any
) -> None:
    """COPY goes past SQLAlchemy, and its errors must not: first a key that another writer holds,
    then a deadlock with it."""
    engine = workspace.create(users=1)
    user = {"id": 1, "email": "new@example.com", "full_name": "New", "created_at": T0}
    calls: list[int] = []

    def duplicate(session: Session) -> None:
        calls.append(1)
        script.copy_rows(session.connection(), script.User, [user])

    with pytest.raises(IntegrityError) as caught:
        script.in_transaction(engine, duplicate, sleep=pytest.fail)
    assert (script.sqlstate(caught.value), len(calls)) == ("23505", 1)
    assert script.violated_constraint(caught.value) == "pk_users"

    both_hold_a_key, other_is_done = threading.Barrier(2), threading.Event()
    keys = iter((10, 20))
    attempts: list[int] = []

    def copy_both() -> None:
        mine = next(keys)

        def work(session: Session) -> None:
            is_first = mine not in attempts
            attempts.append(mine)
            for id_ in (mine, 30 - mine):  # each key is taken by the other until it ends
                row = {**user, "id": id_, "email": f"u{id_}@example.com"}
                if session.get(script.User, id_) is None:
                    script.copy_rows(session.connection(), script.User, [row])
                if is_first and id_ == mine:
                    both_hold_a_key.wait(THREAD_TIMEOUT_S)

        def wait(_s: float) -> None:  # else the other's rows, uncommitted, are in the way unseen
            assert other_is_done.wait(THREAD_TIMEOUT_S)

        script.in_transaction(engine, work, isolation_level="READ COMMITTED", sleep=wait)
        other_is_done.set()

    script.in_threads(2, copy_both)
    assert sorted(Counter(attempts).values()) == [1, 2]
    assert script.count_rows(engine, script.User) == 3


def test_a_taken_email_raises_at_once(script: ModuleType, workspace: Any) -> None:
    engine, calls = workspace.create(users=1), []
    ada, *_ = next(script.people(1))

    def work(session: Session) -> None:
        calls.append(1)
        session.execute(sa.insert(script.User).values(email=ada["email"], full_name="x"))

    with pytest.raises(IntegrityError):
        script.in_transaction(engine, work, sleep=pytest.fail)
    assert len(calls) == 1


def test_an_error_of_the_work_itself_rolls_back(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    before = name_of(engine, 1)

    def work(session: Session) -> None:
        session.execute(sa.update(script.User).values(full_name="half done"))
        raise LookupError("of the application")

    with pytest.raises(LookupError):
        script.in_transaction(engine, work, sleep=pytest.fail)
    assert name_of(engine, 1) == before


def test_a_result_is_returned_once_and_committed(script: ModuleType, workspace: Any) -> None:
    engine, calls, result = workspace.create(users=1), [], object()

    def work(session: Session) -> object:
        calls.append(1)
        session.execute(sa.update(script.User).values(full_name="done"))
        return result

    assert script.in_transaction(engine, work, attempts=1) is result
    assert len(calls) == 1
    assert name_of(engine, 1) == "done"


@pytest.mark.parametrize("attempts", [0, -1])
def test_no_attempts_are_refused(script: ModuleType, shop: sa.Engine, attempts: int) -> None:
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        script.in_transaction(shop, pytest.fail, attempts=attempts)


@ON_POSTGRES
@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"])
def test_isolation_level_holds_for_this_transaction_only(
    script: ModuleType, workspace: Any, level: str
) -> None:
    engine = workspace.create(pool_size=1, max_overflow=0)
    show = sa.text("SHOW transaction_isolation")
    shown = script.in_transaction(engine, lambda s: s.scalar(show), isolation_level=level)
    assert shown == level.lower()
    assert ask(engine, "SHOW transaction_isolation") == "read committed"


def test_sqlite_stays_honest_after_serializable(script: ModuleType, sqlite_workspace: Any) -> None:
    """The driver's own transaction control, which breaks savepoints, must not come back."""
    engine = sqlite_workspace.create(users=1, pool_size=1, max_overflow=0)
    script.in_transaction(engine, lambda session: session.execute(sa.text("SELECT 1")).all())
    with Session(engine) as session:
        with session.begin_nested():
            session.execute(sa.insert(script.Job).values(user_id=1))
        session.rollback()
    assert script.count_rows(engine, script.Job) == 0


# ── 7. Transactions: a job queue ────────────────────────────────────────────────────


def add_jobs(script: ModuleType, engine: sa.Engine, count: int) -> list[int]:
    ids = list(range(1, count + 1))
    with engine.begin() as connection:
        connection.execute(sa.insert(script.Job), [{"id": id_, "user_id": 1} for id_ in ids])
    return ids


def jobs_done(engine: sa.Engine) -> Any:
    return ask(engine, "SELECT count(*) FROM jobs WHERE state = 'done'")


@ON_POSTGRES
def test_four_workers_handle_each_of_200_jobs_once(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 200)
    handled: list[tuple[int, int]] = []
    each_has_one = threading.Barrier(4)

    def handle(job: Any) -> None:
        me = threading.get_ident()
        if me not in [worker for _, worker in handled]:
            each_has_one.wait(THREAD_TIMEOUT_S)
        handled.append((job.id, me))

    script.in_threads(4, lambda: script.run_worker(engine, handle))
    assert sorted(job for job, _ in handled) == ids
    assert len({worker for _, worker in handled}) == 4
    assert jobs_done(engine) == 200


def test_a_job_whose_handler_raises_stays_ready_for_another_worker(
    script: ModuleType, workspace: Any
) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 3)

    def handle_badly(job: Any) -> None:
        if job.id == 2:
            raise LookupError("no such thing")

    with pytest.raises(LookupError):
        script.run_worker(engine, handle_badly)
    assert jobs_done(engine) == 1
    handled: list[int] = []
    script.run_worker(engine, lambda job: handled.append(job.id))
    assert handled == ids[1:]
    assert jobs_done(engine) == 3


@ON_POSTGRES
def test_a_worker_killed_in_the_middle_of_a_job_loses_none(
    script: ModuleType, workspace: Any
) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 20)
    handled: list[int] = []
    killed: list[int] = []

    def handle(job: Any) -> None:
        handled.append(job.id)
        if job.id == 7:
            session = orm.object_session(job)
            assert session is not None
            killed.append(job.id)
            script.kill_backend(engine, session.scalar(sa.select(sa.func.pg_backend_pid())))

    with pytest.raises(OperationalError):
        script.run_worker(engine, handle)
    assert killed == [7]
    assert jobs_done(engine) == 6
    script.run_worker(engine, lambda job: handled.append(job.id))
    assert jobs_done(engine) == 20
    assert sorted(handled) == sorted([*ids, 7])  # the killed one twice, as the docstring says


def nested_workers(script: ModuleType, engine: sa.Engine) -> list[int]:
    """Jobs handled by a worker, in whose first job a second worker does all that it can get."""
    handled: list[int] = []

    def handle(job: Any) -> None:
        handled.append(job.id)
        if len(handled) == 1:
            script.run_worker(engine, lambda other: handled.append(other.id))

    script.run_worker(engine, handle)
    return handled


@ON_POSTGRES
def test_skip_locked_leaves_a_held_job_to_its_worker(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 5)
    assert nested_workers(script, engine) == ids


@ON_POSTGRES
def test_without_the_lock_a_job_is_handled_twice(
    script: ModuleType, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 5)
    monkeypatch.setattr(script, "CLAIM_JOB", script.READY_JOB)
    assert nested_workers(script, engine) == [1, *ids]


@ON_POSTGRES
def test_four_workers_share_the_jobs_at_the_same_moment(
    script: ModuleType, workspace: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 9)
    assert script.share_jobs(engine, workers=4) == ids
    assert jobs_done(engine) == 9
    words = " ".join(capsys.readouterr().out.split())
    assert "claimed without a lock: 2 workers, 1 job" in words
    assert "claimed by SKIP LOCKED: 4 workers at the same moment, 9 jobs" in words


@ON_POSTGRES
def test_with_a_lock_that_waits_the_workers_queue_up_and_that_is_an_error(
    script: ModuleType, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FOR UPDATE without SKIP LOCKED: the second worker waits for the first one's job."""
    engine = workspace.create(users=1)
    add_jobs(script, engine, 9)
    timeouts: list[float] = []

    def barrier(parties: int, *, timeout: float) -> threading.Barrier:
        timeouts.append(timeout)
        return threading.Barrier(parties, timeout=0.3)  # in vain: longer would prove no more

    monkeypatch.setattr(script, "threading", SimpleNamespace(Barrier=barrier))
    monkeypatch.setattr(script, "CLAIM_JOB", script.READY_JOB.with_for_update())
    with pytest.raises(threading.BrokenBarrierError):
        script.share_jobs(engine, workers=4)
    assert timeouts == [5]
    assert jobs_done(engine) == 0  # each transaction was rolled back with its error


@ON_POSTGRES
def test_without_a_lock_every_worker_does_the_same_job(
    script: ModuleType, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = workspace.create(users=1)
    ids = add_jobs(script, engine, 9)
    monkeypatch.setattr(script, "CLAIM_JOB", script.READY_JOB)
    handled = script.share_jobs(engine, workers=4)
    assert handled[:4] == [1, 1, 1, 1]
    assert set(handled) == set(ids)


@ON_POSTGRES
def test_a_claim_reads_no_job_that_is_done(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    states = ["done"] * 20_000 + ["ready"] * 3
    jobs = [{"id": i, "user_id": 1, "state": state} for i, state in enumerate(states, 1)]
    with engine.begin() as connection:
        script.copy_rows(connection, script.Job, jobs)
        connection.execute(sa.text("ANALYZE jobs"))
    with Session(engine) as session:

        def rows_dropped() -> Any:
            """Read by the scan, and then dropped because they are not ready."""
            node = session.execute(script.explain(script.CLAIM_JOB)).scalar_one()[0]["Plan"]
            while "Plans" in node:
                (node,) = node["Plans"]
            return node["Rows Removed by Filter"]

        job = session.scalars(script.CLAIM_JOB).one()
        assert job.id == 20_001
        session.rollback()
        assert script.scan_of(session, script.CLAIM_JOB) == ("Index Scan using ix_jobs_ready", 1)
        assert rows_dropped() == 0
        session.execute(sa.text("DROP INDEX ix_jobs_ready"))  # and rolled back
        assert rows_dropped() == 20_000


def test_errors_of_threads_reach_the_caller(script: ModuleType) -> None:
    ended: list[int] = []

    def work() -> None:
        ended.append(1)
        if len(ended) == 2:
            raise LookupError

    with pytest.raises(LookupError):
        script.in_threads(3, work)
    assert len(ended) == 3


def test_waiting_ends(script: ModuleType) -> None:
    answers = iter((0, "", 5))
    script.wait_until(lambda: next(answers))
    with pytest.raises(TimeoutError, match=r"still not so after 0\.01 s"):
        script.wait_until(lambda: False, timeout_s=0.01)


# ── 8. Large results ────────────────────────────────────────────────────────────────


def orders_at(script: ModuleType, engine: sa.Engine, moments: Sequence[datetime]) -> list[Any]:
    """Replace all orders by one at each of `moments`; returns their keys in reading order."""
    rows = [
        {"id": id_, "user_id": 1, "placed_at": moment, "amount": Decimal(id_)}
        for id_, moment in enumerate(moments, 1)
    ]
    with engine.begin() as connection:
        connection.execute(sa.delete(script.Order))
        script.insert_rows(connection, script.Order, rows)
    with engine.begin() as connection:
        connection.execute(sa.text("ANALYZE"))
    return sorted((row["placed_at"], row["id"]) for row in rows)


MIDNIGHT = datetime(2025, 3, 1, tzinfo=UTC)
MOMENTS = {
    "all different": [MIDNIGHT + timedelta(microseconds=i) for i in range(61)],
    "all the same": [MIDNIGHT] * 61,
    "ties across borders": [MIDNIGHT - timedelta(hours=i // 5) for i in range(61)],
    "out of order": [MIDNIGHT + timedelta(minutes=i * 37 % 13) for i in range(61)],
}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("size", [2, 7, 61])
def test_keyset_pages_give_every_order_once_and_in_order(
    script: ModuleType, workspace: Any, moments: Sequence[datetime], size: int
) -> None:
    engine = workspace.create(users=1)
    expected = orders_at(script, engine, moments)
    after, pages = (datetime(1970, 1, 1, tzinfo=UTC), 0), []
    with Session(engine) as session:
        while page := [tuple(row) for row in session.execute(script.keyset_page(after, size))]:
            by_offset = session.execute(script.offset_page(len(pages), size))
            assert page == [tuple(row) for row in by_offset]
            pages.append(page)
            after = page[-1]
    assert [key for page in pages for key in page] == expected
    assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)


def test_keyset_page_seeks_by_the_index(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    keys = orders_at(script, engine, [MIDNIGHT + timedelta(minutes=i // 3) for i in range(3_000)])
    with Session(engine) as session:
        scan, read = script.scan_of(session, script.keyset_page(keys[2_499], 20))
        _, skipped_and_read = script.scan_of(session, script.offset_page(125, 20))
    assert "ix_orders_placed_at_id" in scan
    if script.is_sqlite(engine):
        assert scan.startswith("SEARCH orders USING COVERING INDEX")
        assert read is None
    else:
        assert scan.startswith(("Index Only Scan using", "Index Scan using"))
        assert read == 20
        assert skipped_and_read >= 2_520


def test_scan_of_a_query_that_no_index_serves(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    orders_at(script, engine, [MIDNIGHT] * 50)
    query = sa.select(script.Order.id).where(script.Order.amount <= Decimal(8))
    with Session(engine) as session:
        scan = script.scan_of(session, query)
    expected = {"sqlite": ("SCAN orders", None), "postgresql": ("Seq Scan", 8)}
    assert scan == expected[engine.dialect.name]


def test_a_stream_holds_a_fraction_of_what_a_list_holds(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create(users=1)
    orders_at(script, engine, [MIDNIGHT] * 4_000)
    query = sa.select(script.Order)
    totals: dict[str, int] = {}
    with Session(engine) as session:

        def fold(name: str, **options: int) -> None:
            orders = session.scalars(query.execution_options(**options))
            totals[name] = sum(order.amount for order in (orders if options else orders.all()))

        fold("warm-up")
        session.expunge_all()
        whole = script.peak_bytes(lambda: fold("list"))
        session.expunge_all()
        stream = script.peak_bytes(lambda: fold("stream", yield_per=100))
    assert stream * 3 < whole  # measured: a thirteenth and less
    assert set(totals.values()) == {sum(range(1, 4_001))}


def test_peak_counts_what_lived_at_once(script: ModuleType) -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            bytes(1_000_000)

    assert 1_000_000 <= script.peak_bytes(one_after_the_other) < 2_000_000


def test_tracing_stops_also_after_an_error(script: ModuleType) -> None:
    def fail() -> None:
        assert tracemalloc.is_tracing()
        raise LookupError

    with pytest.raises(LookupError):
        script.peak_bytes(fail)
    assert not tracemalloc.is_tracing()


# ── 9. Pool ─────────────────────────────────────────────────────────────────────────


def test_exhausted_pool_fails_and_serves_again(workspace: Any) -> None:
    engine = workspace.create(pool_size=1, max_overflow=1, pool_timeout=0.01)
    first, second = engine.connect(), engine.connect()
    with closing(first), closing(second):
        with pytest.raises(sa.exc.TimeoutError, match="size 1 overflow 1 reached"):
            engine.connect()
        second.close()
        with engine.connect() as third:
            assert third.scalar(sa.text("SELECT 1")) == 1


@ON_POSTGRES
@pytest.mark.parametrize(
    ("pre_ping", "met"), [(False, "OperationalError"), (True, "a new connection")]
)
def test_the_caller_after_a_kill(
    script: ModuleType, workspace: Any, pre_ping: bool, met: str
) -> None:
    engine = workspace.create()
    assert script.after_kill(workspace, engine, pre_ping=pre_ping) == met


@ON_POSTGRES
def test_kill_returns_when_the_backend_is_gone(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create()
    with workspace.reopen(engine).connect() as victim:
        pid = victim.scalar(sa.select(sa.func.pg_backend_pid()))
        script.kill_backend(engine, pid)
        assert ask(engine, "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid", pid=pid) == 0
        with pytest.raises(OperationalError):
            victim.execute(sa.text("SELECT 1"))


@ON_POSTGRES
def test_a_backend_that_does_not_end_in_time_is_an_error(
    script: ModuleType, workspace: Any
) -> None:
    """The server's own answer is replaced: a function of this name, found before the real one."""
    engine = workspace.create()
    schema = ask(engine, "SELECT current_schema()")
    with engine.begin() as connection:
        connection.execute(
            sa.text("""
                CREATE FUNCTION pg_terminate_backend(int, bigint) RETURNS boolean
                LANGUAGE sql AS 'SELECT false'""")
        )
    options = f"-c search_path={schema},pg_catalog"
    stubborn = workspace.reopen(engine, connect_args={"options": options})
    with pytest.raises(TimeoutError, match="backend 4711 was not ended within 5 s"):
        script.kill_backend(stubborn, 4711)
    with script.count_queries(stubborn) as statements, pytest.raises(TimeoutError):
        script.kill_backend(stubborn, 4711)
    assert [each.partition("(")[0] for each in statements] == ["SELECT pg_terminate_backend"]


@ON_POSTGRES
def test_every_connection_is_bounded_named_and_in_utc(
    script: ModuleType, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = workspace.create()
    assert ask(engine, "SHOW statement_timeout") == "1min"
    monkeypatch.setattr(script, "STATEMENT_TIMEOUT_MS", 250)
    engine = workspace.reopen(engine)
    assert ask(engine, "SHOW statement_timeout") == "250ms"
    assert ask(engine, "SHOW timezone") == "UTC"
    assert ask(engine, "SHOW application_name") == "module8-01"
    assert ask(engine, "SELECT current_schema()").startswith("module8_")
    with pytest.raises(OperationalError) as caught:
        ask(engine, "SELECT pg_sleep(60)")
    assert script.sqlstate(caught.value) == "57014"


def test_what_the_users_own_url_asks_for_survives_and_ours_wins(
    script: ModuleType, schemas_url: str, tmp_path: Path
) -> None:
    own = {
        "options": "-c work_mem=1234kB -c statement_timeout=1 -c search_path=public",
        "application_name": "mine",
    }
    url = sa.make_url(schemas_url).update_query_dict(own).render_as_string(hide_password=False)
    place = script.Workspace(tmp_path, url, 5.0)
    engine = place.create(users=1)
    for each in (engine, place.reopen(engine)):
        assert ask(each, "SHOW work_mem") == "1234kB"
        assert ask(each, "SHOW application_name") == "mine"
        assert ask(each, "SHOW statement_timeout") == "1min"
        assert ask(each, "SHOW timezone") == "UTC"
        assert ask(each, "SELECT current_schema()").startswith("module8_")
    place.close()
    assert script.server_version(url, 5.0) == script.server_version(schemas_url, 5.0)


def test_a_failure_at_start_up_that_no_right_would_mend_is_no_error_of_configuration(
    script: ModuleType, postgres_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a schema of that name, which is there already: 42P06."""
    with postgres_engine(postgres_database).connect() as connection:
        connection.execute(sa.text("CREATE SCHEMA module8_taken"))
    monkeypatch.setattr(script.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(script.secrets, "token_hex", lambda _bytes: "taken")
    run = config.Run(config.Settings(database_url=postgres_database), False, False, 1)
    with pytest.raises(ProgrammingError) as caught, script.open_resources(run):
        pytest.fail("opened")
    assert script.sqlstate(caught.value) == "42P06"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "error"), [("42501", config.ConfigError), ("42601", ProgrammingError)]
)
def test_only_a_missing_right_is_an_error_of_configuration(
    script: ModuleType,
    postgres_database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    error: type[Exception],
) -> None:
    def refuse(_statement: object) -> None:
        raise ProgrammingError("CREATE SCHEMA", None, FromDriver("of the server", state))

    monkeypatch.setattr(script.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(script.Workspace, "_execute", lambda _self, statement: refuse(statement))
    run = config.Run(config.Settings(database_url=postgres_database), False, False, 1)
    with pytest.raises(error, match="of the server"), script.open_resources(run):
        pytest.fail("opened")
    assert list(tmp_path.iterdir()) == []


def test_connecting_to_a_server_that_never_answers_ends(script: ModuleType) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = "postgresql+psycopg2://app:x@127.0.0.1:{1}/app".format(*silent.getsockname())
        with pytest.raises(config.ServiceUnavailable, match="it accepts, and says nothing"):
            script.server_version(url, 0.1)


def test_a_refusal_that_comes_late_is_a_refusal(script: ModuleType) -> None:
    """libpq waits for at least 2 s, so a refusal may come after CONNECT_TIMEOUT_S."""
    message = b"SFATAL\0C28P01\0Mpassword authentication failed\0\0"
    released = threading.Event()

    def refuse(server: socket.socket) -> None:
        server.accept()[0].close()  # the probe of require_reachable
        client = server.accept()[0]
        with closing(client):
            request = client.recv(1024)
            if request[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):  # SSL, GSS: no
                client.sendall(b"N")
                client.recv(1024)
            released.wait(0.3)  # never set: this is the delay of the network
            client.sendall(b"E" + (len(message) + 4).to_bytes(4) + message)

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        thread = threading.Thread(target=refuse, args=(server,), daemon=True)
        thread.start()
        url = "postgresql+psycopg2://app:x@127.0.0.1:{1}/app".format(*server.getsockname())
        with pytest.raises(config.ConfigError, match=r"DATABASE_URL.*authentication failed"):
            script.server_version(url, 0.2)
        thread.join(THREAD_TIMEOUT_S)


# ── 10. Migration: the transfer ─────────────────────────────────────────────────────

T0 = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
NASTY = "tab\t, newline\n, return\r\n, back\\slash, \\N, \\., 'quotes\", é, 🐘"
ROWS: dict[str, list[Row]] = {  # 36 rows: nine batches of at most seven
    "countries": [{"code": "DE", "name": "Germany"}, {"code": "FR", "name": "France"}],
    "cities": [
        {"id": id_, "country_code": code, "name": name, "latitude": lat, "longitude": lon}
        for id_, code, name, lat, lon in (
            (10, "DE", "Berlin", 52.52, 13.41),
            (20, "FR", "Paris", 0.1 + 0.2, -1e-9),
            (30, "FR", "Nowhere", -90.0, 180.0),
        )
    ],
    "users": [
        {
            "id": 3 * i,
            "email": f"u{i}@example.com",
            "full_name": NASTY if i == 4 else f"User {i}",
            "created_at": T0 + timedelta(days=i, microseconds=i),
            "referred_by_id": 3 * (i - 1) if i % 2 == 0 else None,
            "credit": Decimal("9999999999.99") if i == 5 else Decimal(i) / 100,
            "version": i,
        }
        for i in range(1, 10)
    ],
    "addresses": [
        {"id": i, "user_id": 3 * i, "city_id": 10, "kind": "home", "street": "Way" * (i - 1)}
        for i in range(1, 10)
    ],
    "orders": [
        {"id": i**2, "user_id": 3, "placed_at": T0, "amount": Decimal("0.01") * i}
        for i in range(1, 11)
    ],
    "jobs": [{"id": i, "user_id": 3, "state": "done" if i == 2 else "ready"} for i in range(1, 4)],
}  # fmt: skip
TOTAL, BATCHES, BATCH_ROWS = 36, 9, 7
SIZES = [2, 3, 7, 2, 7, 2, 7, 3, 3]  # of the batches: no batch crosses a table's end


class PowerCut(Exception):
    """Interrupts a transfer."""


@pytest.fixture
def source(script: ModuleType, tmp_path: Path) -> Iterator[sa.Engine]:
    """SQLite with ROWS."""
    home = tmp_path / "source"
    home.mkdir()
    place = script.Workspace(home, None, 0)
    engine = place.create()
    fill(script, engine)
    yield engine
    place.close()


def fill(script: ModuleType, engine: sa.Engine) -> None:
    """Through SQLAlchemy's own insert, not through what the transfer uses."""
    with engine.begin() as connection:
        for model in script.MODELS:
            connection.execute(sa.insert(model), ROWS[model.__tablename__])


def rows_in(script: ModuleType, engine: sa.Engine) -> dict[str, list[Row]]:
    """Everything in the database, in the shape of ROWS."""
    with engine.connect() as connection:
        return {
            model.__tablename__: [
                dict(row)
                for row in connection.execute(
                    sa.select(model.__table__).order_by(sa.inspect(model).primary_key[0])
                ).mappings()
            ]
            for model in script.MODELS
        }


def cut_in(batch: int) -> Callable[[int], None]:
    """A hook that raises in the given batch of a transfer, from 1: after its rows were sent."""
    sent: list[int] = []

    def on_batch(rows: int) -> None:
        sent.append(rows)
        if len(sent) == batch:
            raise PowerCut

    return on_batch


def first_rows(count: int) -> dict[str, list[Row]]:
    """The first `count` of ROWS, in the order of a transfer."""
    left, answer = count, {}
    for name in ("countries", "cities", "users", "addresses", "orders", "jobs"):
        answer[name] = ROWS[name][:left]
        left -= len(answer[name])
    return answer


def assert_arrived(script: ModuleType, target: sa.Engine) -> None:
    assert rows_in(script, target) == ROWS
    assert "transfer" not in sa.inspect(target).get_table_names()
    assert script.schema_differences(target) == []


@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
def test_transfer_interrupted_in_a_batch_keeps_exactly_the_batches_before_it(
    script: ModuleType, workspace: Any, source: sa.Engine, batch: int
) -> None:
    target = workspace.create()
    with pytest.raises(PowerCut):
        script.transfer(source, target, BATCH_ROWS, cut_in(batch))
    before = sum(SIZES[: batch - 1])
    assert rows_in(script, target) == first_rows(before)
    after: list[int] = []
    assert script.transfer(source, target, BATCH_ROWS, after.append) == TOTAL - before
    assert after == SIZES[batch - 1 :]
    assert_arrived(script, target)


def test_transfer_tells_of_each_batch_before_it_is_committed(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    target, sent = workspace.create(), list[int]()

    def look(rows: int) -> None:
        assert rows_in(script, target) == first_rows(sum(sent))  # what others see
        sent.append(rows)

    assert script.transfer(source, target, BATCH_ROWS, look) == TOTAL
    assert sent == SIZES
    assert_arrived(script, target)


def test_transfer_interrupted_at_every_batch_in_turn(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    target = workspace.create()
    for done in range(BATCHES):
        with pytest.raises(PowerCut):
            script.transfer(source, target, BATCH_ROWS, cut_in(1))
        assert rows_in(script, target) == first_rows(sum(SIZES[:done]))  # no batch further
        if done < BATCHES - 1:
            with pytest.raises(PowerCut):
                script.transfer(source, target, BATCH_ROWS, cut_in(2))
    assert script.transfer(source, target, BATCH_ROWS, cut_in(2)) == SIZES[-1]
    assert_arrived(script, target)


@pytest.mark.parametrize("batch", [1, 3, BATCHES])
@pytest.mark.parametrize("step", ["DELETE FROM transfer", "INSERT INTO transfer", "COMMIT"])
def test_transfer_interrupted_inside_a_batch_repeats_it(
    script: ModuleType, workspace: Any, source: sa.Engine, step: str, batch: int
) -> None:
    """After the batch's rows were sent: before its key is, and before both are committed."""
    target = workspace.create()
    sent: list[int] = []
    steps: list[str] = []

    def die_at(statement: str) -> None:
        if statement.startswith(step):
            steps.append(statement)
            if len(steps) == batch:
                raise PowerCut

    @sa.event.listens_for(target, "before_cursor_execute")
    def on_statement(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        die_at(statement)

    @sa.event.listens_for(target, "commit")
    def on_commit(connection: sa.Connection) -> None:
        if connection.scalar(sa.select(sa.func.count()).select_from(script.Country)):
            die_at("COMMIT")  # of a batch, not of the making of the table of keys

    with pytest.raises(PowerCut):
        script.transfer(source, target, BATCH_ROWS, sent.append)
    assert sent == SIZES[: batch if step == "COMMIT" else batch - 1]
    before = sum(SIZES[: batch - 1])
    assert rows_in(script, target) == first_rows(before)
    assert script.transfer(source, target, BATCH_ROWS) == TOTAL - before
    assert_arrived(script, target)


LONG_EMAIL = "secret." * 42 + "@example.com"  # 306 characters


@ON_POSTGRES
def test_transfer_of_a_row_that_only_sqlite_holds_is_a_transfer_error(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    """SQLite checks no VARCHAR(254); the ninth user is in the fourth batch."""
    target = workspace.create()
    rename = sa.update(script.User).where(script.User.id == 27)
    with source.begin() as connection:
        connection.execute(rename.values(email=LONG_EMAIL))
    for _ in range(2):
        with pytest.raises(script.TransferError) as caught:
            script.transfer(source, target, BATCH_ROWS)
        assert str(caught.value) == "users: the target refuses a row (22001)"
        assert type(caught.value.__cause__) is DataError
        assert rows_in(script, target) == first_rows(sum(SIZES[:3]))
    with source.begin() as connection:
        connection.execute(rename.values(email="u9@example.com"))
    assert script.transfer(source, target, BATCH_ROWS) == TOTAL - sum(SIZES[:3])
    assert_arrived(script, target)


def test_transfer_between_sqlite_files_keeps_a_long_email(
    script: ModuleType, sqlite_workspace: Any, source: sa.Engine
) -> None:
    target = sqlite_workspace.create()
    with source.begin() as connection:
        connection.execute(
            sa.update(script.User).where(script.User.id == 27).values(email=LONG_EMAIL)
        )
    assert script.transfer(source, target, BATCH_ROWS) == TOTAL
    assert ask(target, "SELECT email FROM users WHERE id = 27") == LONG_EMAIL


def test_transfer_into_a_target_that_took_a_row_meanwhile_is_a_transfer_error(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    """Its e-mail is that of the fourth user, in the third batch."""
    target = workspace.create()
    with pytest.raises(PowerCut):
        script.transfer(source, target, BATCH_ROWS, cut_in(3))
    meanwhile = sa.insert(script.User).values(id=99, email="u4@example.com", full_name="x")
    with target.begin() as connection:
        connection.execute(meanwhile)
    with pytest.raises(script.TransferError) as caught:
        script.transfer(source, target, BATCH_ROWS)
    reason = {"sqlite": "IntegrityError", "postgresql": "23505"}[target.dialect.name]
    assert str(caught.value) == f"users: the target refuses a row ({reason})"
    assert isinstance(caught.value.__cause__, IntegrityError)
    with target.begin() as connection:
        connection.execute(sa.delete(script.User).where(script.User.id == 99))
    assert rows_in(script, target) == first_rows(sum(SIZES[:2]))
    assert script.transfer(source, target, BATCH_ROWS) == TOTAL - sum(SIZES[:2])
    assert_arrived(script, target)


@ON_POSTGRES
def test_transfer_resumes_after_its_connection_was_killed(
    script: ModuleType, workspace: Any, source: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = workspace.create()
    insert, killed = script.insert_rows, []

    def insert_and_be_killed(connection: sa.Connection, model: Any, rows: Sequence[Row]) -> None:
        insert(connection, model, rows)
        if model is script.Address and not killed:
            killed.append(connection.scalar(sa.select(sa.func.pg_backend_pid())))
            script.kill_backend(target, killed[0])

    monkeypatch.setattr(script, "insert_rows", insert_and_be_killed)
    with pytest.raises(OperationalError):
        script.transfer(source, target, BATCH_ROWS)
    assert script.count_rows(target, script.Address) == 0
    assert script.count_rows(target, script.User) == 9
    assert script.transfer(source, target, BATCH_ROWS) == 9 + 10 + 3
    assert_arrived(script, target)


@ON_POSTGRES
def test_transfer_from_postgresql_to_sqlite_and_back(
    script: ModuleType, workspace: Any, tmp_path: Path
) -> None:
    server, copy = workspace.create(), workspace.create()
    fill(script, server)
    files = script.Workspace(tmp_path, None, 0)
    file = files.create()
    assert script.transfer(server, file, BATCH_ROWS) == TOTAL
    assert_arrived(script, file)
    assert script.transfer(file, copy) == TOTAL
    assert_arrived(script, copy)
    files.close()


def test_transfer_of_an_empty_database(script: ModuleType, workspace: Any) -> None:
    assert script.transfer(workspace.create(), workspace.create()) == 0


@pytest.mark.parametrize("table", ["countries", "jobs"])
def test_transfer_into_a_target_that_is_not_empty_changes_nothing(
    script: ModuleType, workspace: Any, source: sa.Engine, table: str
) -> None:
    target = workspace.create()
    with target.begin() as connection:
        connection.execute(sa.insert(script.Country), [{"code": "DE", "name": "Deutschland"}])
        if table == "jobs":
            ada = {"id": 1, "email": "ada@example.com", "full_name": "Ada", "created_at": T0}
            connection.execute(sa.insert(script.User), [ada])
            connection.execute(sa.insert(script.Job), [{"id": 1, "user_id": 1}])
            connection.execute(sa.delete(script.Country))
    before = rows_in(script, target)
    with pytest.raises(script.TransferError, match="holds rows that no transfer brought"):
        script.transfer(source, target, BATCH_ROWS)
    assert rows_in(script, target) == before
    assert script.schema_differences(target) == []


def test_transfer_twice_refuses_the_second_time_and_leaves_the_target(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    target = workspace.create()
    script.transfer(source, target)
    for _ in range(2):
        with pytest.raises(script.TransferError, match="countries"):
            script.transfer(source, target)
        assert_arrived(script, target)


def before_the_comparison(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[], object]
) -> None:
    """Have `tamper` called once: when all batches are committed and nothing is compared yet."""
    checksum, pending = script.checksum, [tamper]

    def after_tampering(engine: sa.Engine, model: Any) -> object:
        while pending:
            pending.pop()()
        return checksum(engine, model)

    monkeypatch.setattr(script, "checksum", after_tampering)


def test_a_row_changed_meanwhile_is_found_and_a_repaired_target_is_accepted(
    script: ModuleType, workspace: Any, source: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, copied = workspace.create(), list[int]()
    before_the_comparison(script, monkeypatch, lambda: set_name(target, 6, "Mallory"))
    with pytest.raises(script.TransferError, match="users: source ") as caught:
        script.transfer(source, target, BATCH_ROWS, copied.append)
    assert sum(copied) == TOTAL
    assert "Mallory" not in str(caught.value)
    with pytest.raises(script.TransferError, match="users: source "):
        script.transfer(source, target, BATCH_ROWS)
    set_name(target, 6, ROWS["users"][1]["full_name"])
    assert script.transfer(source, target, BATCH_ROWS) == 0
    assert_arrived(script, target)


def test_a_row_lost_meanwhile_is_found(
    script: ModuleType, workspace: Any, source: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = workspace.create()

    def lose() -> None:
        with target.begin() as connection:
            connection.execute(sa.delete(script.Order).where(script.Order.id == 4))

    before_the_comparison(script, monkeypatch, lose)
    with pytest.raises(script.TransferError, match=r"orders: source \(10, .*target \(9, "):
        script.transfer(source, target, BATCH_ROWS)


def test_a_source_that_changes_behind_the_transfer_is_found(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    target, copied = workspace.create(), list[int]()

    def change(rows: int) -> None:
        copied.append(rows)
        if sum(copied) == TOTAL:
            set_name(source, 6, "Renamed")

    with pytest.raises(script.TransferError, match=r"users: source \(9, .*target \(9, "):
        script.transfer(source, target, BATCH_ROWS, change)


def test_after_a_transfer_every_table_numbers_on(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    target = workspace.create()
    script.transfer(source, target)
    new: dict[Any, Row] = {
        script.City: {"country_code": "DE", "name": "Bonn", "latitude": 0.0, "longitude": 0.0},
        script.User: {"email": "next@example.com", "full_name": "Next"},
        script.Address: {"user_id": 3, "city_id": 10, "kind": "billing", "street": "1"},
        script.Order: {"user_id": 3, "placed_at": T0, "amount": Decimal(1)},
        script.Job: {"user_id": 3},
    }
    with target.begin() as connection:
        for model, row in new.items():
            highest = max(old["id"] for old in ROWS[model.__tablename__])
            id_ = connection.scalar(sa.insert(model).values(row).returning(model.id))
            assert id_ == highest + 1, model.__tablename__


def test_sequences_of_empty_tables_begin_at_one(script: ModuleType, workspace: Any) -> None:
    engine = workspace.create()
    with engine.begin() as connection:
        script.reset_sequences(connection)
        user = {"email": "ada@example.com", "full_name": "Ada"}
        assert connection.scalar(sa.insert(script.User).values(user).returning(script.User.id)) == 1


# ── 10. Migration: the checksum ─────────────────────────────────────────────────────


def test_checksum_is_the_same_on_both_engines(
    script: ModuleType, workspace: Any, source: sa.Engine
) -> None:
    engine = workspace.create()
    fill(script, engine)
    for model in script.MODELS:
        rows = ROWS[model.__tablename__]
        columns = model.__table__.columns.keys()
        text = "".join(repr(tuple(row[column] for column in columns)) for row in rows)
        expected = len(rows), hashlib.sha256(text.encode()).hexdigest()
        assert script.checksum(engine, model) == script.checksum(source, model) == expected


@pytest.mark.parametrize(
    ("model", "column", "value"),
    [
        ("Country", "name", "germany"),
        ("City", "latitude", 0.3),  # and not 0.1 + 0.2
        ("User", "full_name", NASTY + " "),
        ("User", "created_at", T0),
        ("User", "referred_by_id", None),
        ("User", "credit", Decimal("0.02")),
        ("User", "version", 100),
        ("Address", "street", "NULL"),
        ("Order", "placed_at", T0 + timedelta(microseconds=1)),
        ("Job", "state", "done"),
    ],
)
def test_checksum_differs_when_one_cell_differs(
    script: ModuleType, workspace: Any, model: str, column: str, value: object
) -> None:
    engine, changed = workspace.create(), getattr(script, model)
    fill(script, engine)
    before = {m: script.checksum(engine, m) for m in script.MODELS}
    key = sa.inspect(changed).primary_key[0]
    index = {"latitude": 1, "full_name": 3, "referred_by_id": 3, "credit": 2}.get(column, 0)
    row = ROWS[changed.__tablename__][index]
    if column == "credit":
        value = row["credit"] + Decimal("0.01")
    with engine.begin() as connection:
        where = changed.__table__.c[key.name] == row[key.name]
        update = sa.update(changed.__table__).where(where).values({column: value})
        assert connection.execute(update).rowcount == 1
    after = {m: script.checksum(engine, m) for m in script.MODELS}
    assert after[changed][0] == before[changed][0]
    assert [m for m in script.MODELS if after[m] != before[m]] == [changed]


# ── 11. Security: injection ─────────────────────────────────────────────────────────

INJECTIONS = (
    "' OR '1'='1",
    "' OR 1=1 --",
    "' OR 1=1 #",
    "' OR ''='",
    "x' OR email LIKE '%",
    "'; DROP TABLE users; --",
    "'; DELETE FROM users WHERE 'a'='a",
    "' UNION SELECT count(*) FROM users --",
    "\\' OR 1=1 --",
    "%' OR 'x' LIKE '%",
    "%",
    "admin'/*",
)


@pytest.mark.parametrize("attack", INJECTIONS)
def test_a_bound_injection_matches_nobody_and_changes_nothing(
    script: ModuleType, shop: sa.Engine, attack: str
) -> None:
    with Session(shop) as session:
        emails = session.scalars(sa.select(script.User.email)).all()
        assert script.count_by_email(session, attack) == 0
        assert session.scalars(sa.select(script.User.email)).all() == emails
        assert [script.count_by_email(session, email) for email in emails[:3]] == [1, 1, 1]


@pytest.mark.parametrize("attack", INJECTIONS[:2])
def test_the_same_input_pasted_into_sql_matches_everybody(
    script: ModuleType, shop: sa.Engine, attack: str
) -> None:
    with Session(shop) as session:
        everybody = session.scalar(sa.select(sa.func.count()).select_from(script.User))
        assert script.count_by_email_unsafely(session, attack) == everybody > 1


# ── 11. Security: passwords ─────────────────────────────────────────────────────────

CHEAP = {"n": 2, "r": 1, "p": 1}  # for tests of anything but the cost


@pytest.mark.parametrize(
    "password",
    ["correct horse", "", " ", "pässwörd 🐘", "\0", "a$b$c", "x" * 100_000, "日本語"],
    ids=["plain", "empty", "blank", "unicode", "nul", "dollars", "long", "japanese"],
)
def test_a_password_verifies_and_no_other_does(script: ModuleType, password: str) -> None:
    stored = script.hash_password(password, CHEAP)
    assert script.verify_password(password, stored)
    for other in (password + "x", password + " ", password[1:] + "y", password.upper() + "Z"):
        assert not script.verify_password(other, stored)
    assert not password.strip() or len(password) < 3 or password not in stored


def test_the_same_password_twice_is_stored_differently(script: ModuleType) -> None:
    stored = [script.hash_password("correct horse", CHEAP) for _ in range(20)]
    assert len({hash_.split("$")[4] for hash_ in stored}) == 20  # the salts
    assert len({hash_.split("$")[5] for hash_ in stored}) == 20


def test_what_is_stored_is_scrypt_as_another_program_would_reckon(script: ModuleType) -> None:
    name, n, r, p, salt, digest = script.hash_password("correct horse").split("$")
    assert (name, int(n), int(r), int(p)) == ("scrypt", 16_384, 8, 5)  # OWASP's cheat sheet
    raw = base64.b64decode(salt)
    assert len(raw) == 16
    options = {"salt": raw, "n": 16_384, "r": 8, "p": 5, "maxmem": 2**26, "dklen": 64}
    assert base64.b64decode(digest) == hashlib.scrypt(b"correct horse", **options)


@pytest.mark.parametrize(
    ("password", "salt", "cost", "expected"),
    [
        (
            "", b"", {"n": 16, "r": 1, "p": 1},
            "77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442"
            "fcd0069ded0948f8326a753a0fc81f17e8d3e0fb2e0d3628cf35e20c38d18906",
        ),
        (
            "password", b"NaCl", {"n": 1024, "r": 8, "p": 16},
            "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
            "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640",
        ),
        (
            "pleaseletmein", b"SodiumChloride", {"n": 16384, "r": 8, "p": 1},
            "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
            "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887",
        ),
    ],
)  # fmt: skip
def test_vectors_of_rfc_7914_section_12(
    script: ModuleType, password: str, salt: bytes, cost: dict[str, int], expected: str
) -> None:
    assert script._scrypt(password, salt, cost).hex() == expected


@pytest.mark.parametrize("cost", [CHEAP, {"n": 2**10, "r": 4, "p": 3}, {"n": 4, "r": 9, "p": 1}])
def test_a_hash_verifies_by_its_own_parameters_and_asks_for_better_ones(
    script: ModuleType, cost: dict[str, int]
) -> None:
    stored = script.hash_password("correct horse", cost)
    assert stored.startswith("scrypt${n}${r}${p}$".format(**cost))
    assert script.verify_password("correct horse", stored)
    assert not script.verify_password("Correct horse", stored)
    assert script.needs_rehash(stored)
    tampered = stored.replace(f"${cost['r']}$", f"${cost['r'] + 1}$", 1)
    assert not script.verify_password("correct horse", tampered)


def test_todays_parameters_need_no_rehash(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = script.hash_password("x")
    assert not script.needs_rehash(stored)
    monkeypatch.setattr(script, "SCRYPT", {**script.SCRYPT, "n": 2**15})
    assert script.needs_rehash(stored)


SALT = base64.b64encode(b"s" * 16).decode()
DIGEST = base64.b64encode(b"SECRET" + b"d" * 58).decode()
MALFORMED = {
    "empty": "",
    "plain text": "SECRET",
    "another scheme": f"bcrypt$16$8$1${SALT}${DIGEST}",
    "no digest": f"scrypt$16$8$1${SALT}$",
    "digest cut off": f"scrypt$16$8$1${SALT}${DIGEST[:20]}",
    "salt of bad base64": f"scrypt$16$8$1$SECRE${DIGEST}",
    "padding only": "scrypt$16$8$1$====$====",
    "newline": f"scrypt$16$8$1${SALT}${DIGEST}\n",
    "negative": f"scrypt$-16$8$1${SALT}${DIGEST}",
    "other digits": f"scrypt$١٦$8$1${SALT}${DIGEST}",
    "n of 0": f"scrypt$0$8$1${SALT}${DIGEST}",
    "n of 1": f"scrypt$1$8$1${SALT}${DIGEST}",
    "n no power of two": f"scrypt$17$8$1${SALT}${DIGEST}",
    "r of 0": f"scrypt$16$0$1${SALT}${DIGEST}",
    "p of 0": f"scrypt$16$8$0${SALT}${DIGEST}",
    "a GiB": f"scrypt${2**20}$8$1${SALT}${DIGEST}",
    "2**40": f"scrypt${2**40}$8$1${SALT}${DIGEST}",
    "years": f"scrypt$16$8${2**28}${SALT}${DIGEST}",
    "5,000 digits": f"scrypt${'9' * 5_000}$8$1${SALT}${DIGEST}",
}


@pytest.mark.parametrize("stored", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_hash_is_refused_before_any_work_and_not_quoted(
    script: ModuleType, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.hashlib, "scrypt", lambda *_a, **_k: pytest.fail("worked on it"))
    for check in (partial(script.verify_password, "x"), script.needs_rehash):
        with pytest.raises(ValueError, match="not a hash made by hash_password") as caught:
            check(stored)
        assert "SECR" not in str(caught.value)
        assert not isinstance(caught.value, binascii.Error)


def test_digests_are_compared_in_constant_time(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    stored = script.hash_password("right", CHEAP)
    digest = base64.b64decode(stored.split("$")[5])

    def compare(left: bytes, right: bytes) -> object:
        compared.append((left, right))
        return verdict

    monkeypatch.setattr(script.hmac, "compare_digest", compare)
    for verdict in (object(), object()):
        assert script.verify_password("wrong", stored) is verdict
    assert all(digest in pair for pair in compared)
    assert len(compared) == 2


# ── The demos ───────────────────────────────────────────────────────────────────────

USERS = 500  # the default: with fewer orders PostgreSQL would read them all


def check_transactions(result: Row, on_sqlite: bool) -> None:
    assert result["naive_saved"] == (20 if on_sqlite else 0)
    assert result["saved"] == 20
    assert result["refused"] == {10: None if on_sqlite else "fk_jobs_user_id"}
    assert result["survivors"] == ((0, 1) if on_sqlite else (0, 0))
    assert result["conflict"].startswith("StaleDataError")
    races = {name: (str(credit), tries) for name, (credit, tries) in result["races"].items()}
    if on_sqlite:
        ((name, (credit, tries)),) = races.items()
        assert (name, credit) == ("read, then write, retry", "20.00")
        assert 3 <= tries <= 6
        assert result["handled"] == []
        return
    assert races == {
        "read, then write": ("10.00", 2),
        "SELECT … FOR UPDATE": ("20.00", 2),
        "SET credit = credit + 10": ("20.00", 2),
        "read, then write, retry": ("20.00", 3),
    }
    # PostgreSQL's sequence gave 11 numbers to the rows in one go, and one to the refused row.
    assert result["handled"] == [id_ for id_ in range(12, 33) if id_ != 22]


def check_large_results(result: Row, on_sqlite: bool) -> None:
    assert result["same_page"] is True
    scan, read = result["scans"]["keyset"]
    assert "ix_orders_placed_at_id" in scan
    assert read is None if on_sqlite else 0 < read <= 20
    assert result["peak_bytes"]["yield_per(100)"] < result["peak_bytes"][".all()"]


def check_pool(result: Row, on_sqlite: bool) -> None:
    met = {"no pre_ping": "OperationalError", "pool_pre_ping": "a new connection"}
    assert result == {
        "checked_out": 3,
        "fourth_caller": "TimeoutError",
        "reused": (True, False),
        "after_kill": {} if on_sqlite else met,
        "timeout_sqlstate": None if on_sqlite else "57014",
    }


def moved_by_hand(users: int) -> tuple[int, int, int]:
    """Batches of 200 are sent until they are over half of all the rows; the last one is undone."""
    script = importlib.import_module("01_sqlalchemy_advanced")
    people = list(script.people(users))
    tables = 20, 60, users, sum(len(a) for _, a, _ in people), sum(len(o) for _, _, o in people)
    sizes = [min(200, rows - start) for rows in tables for start in range(0, rows, 200)]
    sent = list(accumulate(sizes))
    total = sum(tables)
    cut = next(i for i, rows in enumerate(sent) if rows > total / 2)
    return sent[cut - 1], total - sent[cut - 1], total


def check_migration(result: Row, on_sqlite: bool) -> None:
    assert result["steps"] == ["down from 0002_credit", "up to 0002_credit"]
    assert result["differences"] == 0
    assert result["moved"] == moved_by_hand(USERS)
    assert result["next_id"] == USERS + 1


def check_security(result: Row, on_sqlite: bool) -> None:
    assert result == {
        "matches": (20, 0),
        "verified": (True, False),
        "weak_needs_rehash": True,
        "shows_name": {
            "SQLAlchemy's error": True,
            "with hide_parameters": not on_sqlite,  # PostgreSQL: "Failing row contains (…)"
            "InvalidUser": False,
        },
    }


CHECKS = {
    "transactions": check_transactions,
    "large_results": check_large_results,
    "pool": check_pool,
    "migration": check_migration,
    "security": check_security,
}


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue("postgres_database")
    return url


@pytest.mark.parametrize("name", CHECKS)
def test_demo_twice_in_a_row_and_nothing_left(
    script: ModuleType,
    database_url: str | None,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script.tempfile, "tempdir", str(tmp_path))
    demo = getattr(script, f"demo_{name}")
    run = config.Run(config.Settings(database_url=database_url), False, False, USERS)
    with script.open_resources(run) as resources:
        assert run.services["database"].startswith("PostgreSQL" if database_url else "SQLite")
        wanted = demo.__code__.co_varnames[: demo.__code__.co_argcount]
        for _ in range(2):
            result = demo(**{parameter: resources[parameter] for parameter in wanted})
            CHECKS[name](result.__dict__, database_url is None)
            engines = list(resources["workspace"]._names)
            assert [engine.pool.checkedout() for engine in engines] == [0] * len(engines)
    assert list(tmp_path.iterdir()) == []
    if database_url:
        with watching(database_url) as ask_server:
            assert ask_server(SCHEMAS) == 0
            script.wait_until(lambda: ask_server(BACKENDS) == 0, THREAD_TIMEOUT_S)


@pytest.mark.parametrize("users", [1, 2, 3])
def test_large_results_of_few_orders(script: ModuleType, workspace: Any, users: int) -> None:
    result = script.demo_large_results(workspace.create(users=users))
    assert result.same_page
