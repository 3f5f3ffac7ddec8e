"""Fixtures: servers, a namespace of its own for each test, and the scripts as a user runs them.

Where a server comes from, and what happens without one, is decided in services.py. A server is
started when the first test asks for it and stopped when the tests end, however they end.
"""

from __future__ import annotations

import fcntl
import functools
import os
import pickle
import secrets
import shutil
import signal
from collections.abc import Iterator
from typing import Any, cast

import pytest
import sqlalchemy
from pymongo.database import Database
from running import SCRIPTS, Recorded, Whole, missing, whole_run
from services import (
    NOT_CONFIGURED,
    Ladder,
    Missing,
    mongo_client,
    postgres_engine,
    redis_client,
    summary,
)

LADDER = pytest.StashKey[Ladder]()
TOLD = pytest.StashKey[list[dict[str, str]]]()  # by the workers


def pytest_configure(config: pytest.Config) -> None:
    try:
        ladder = Ladder(os.environ)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[LADDER] = ladder
    config.stash[TOLD] = []
    config.add_cleanup(ladder.close)
    # A terminated run, such as a cancelled CI job, stops its servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Two workers: a file with fixtures of its own, such as a server to kill, stays on one of them;
    the tests of the other files follow one by one, and keep both busy to the end."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def has_fixtures_of_its_own(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text(encoding="utf-8")

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if has_fixtures_of_its_own(file) else nodeid

    return Scheduling(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist has a ladder, and so servers, of its own, and no terminal."""
    if output := getattr(session.config, "workeroutput", None):
        output["services"] = session.config.stash[LADDER].told()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {}).get("services")  # nothing of a worker that crashed
    node.config.stash[TOLD].append(told or {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    told = [config.stash[LADDER].told(), *config.stash[TOLD]]
    terminalreporter.write_line(summary(told))


@pytest.fixture(scope="session", autouse=True)
def _user_data_out_of_reach() -> Iterator[None]:
    """Nothing tested in this process can reach the servers that the user's environment or .env
    file names."""
    with pytest.MonkeyPatch.context() as environment:
        for variable, empty in NOT_CONFIGURED.items():
            environment.setenv(variable, empty)
        yield


# ── Servers, one each for all tests ─────────────────────────────────────────────────


def _url(config: pytest.Config, service: str) -> str:
    try:
        return config.stash[LADDER].url(service)
    except Missing as missing:
        if missing.is_failure:
            pytest.fail(f"{service}: {missing}", pytrace=False)
        pytest.skip(f"{service}: {missing}")


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> str:
    """Of a role that may create databases, as `postgresql+psycopg2://`."""
    return _url(pytestconfig, "postgres")


@pytest.fixture(scope="session")
def mongo_uri(pytestconfig: pytest.Config) -> str:
    """Of a replica set: transactions and change streams run."""
    return _url(pytestconfig, "mongo")


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> str:
    return _url(pytestconfig, "redis")


@pytest.fixture(scope="session")
def rabbitmq_url(pytestconfig: pytest.Config) -> str:
    return _url(pytestconfig, "rabbitmq")


# ── A namespace of its own for each test ────────────────────────────────────────────


def _unique_name() -> str:
    return f"test_{secrets.token_hex(6)}"


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """The URL of an empty database, dropped afterwards with whoever is still connected to it."""
    name = _unique_name()
    engine = postgres_engine(postgres_url)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    try:
        yield engine.url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def mongo_database(mongo_uri: str) -> Iterator[Database[dict[str, object]]]:
    """An empty database, dropped afterwards; `.name` and `.client` are its name and client."""
    with mongo_client(mongo_uri) as client:
        database = client[_unique_name()]
        try:
            yield database
        finally:
            client.drop_database(database)


@pytest.fixture
def redis_prefix(redis_url: str) -> Iterator[str]:
    """What the keys of a test begin with; afterwards they are deleted."""
    prefix = f"{_unique_name()}:"
    yield prefix
    with redis_client(redis_url) as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            client.unlink(key)


@pytest.fixture
def rabbitmq_prefix(rabbitmq_url: str) -> str:
    """What the names of a test's queues and exchanges begin with.

    AMQP can neither list nor wipe them, so the test deletes what it declares.
    """
    return f"{_unique_name()}."


# ── Whole runs of the scripts ───────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One whole run a script and tier, made by the worker that first asks for it, for all tests
    that read it."""
    home = tmp_path_factory.getbasetemp()
    shared = home.parent if hasattr(request.config, "workerinput") else home

    def recorded(number: str, on_server: bool) -> Whole:
        script, file = SCRIPTS[number], shared / f"{number} {'online' if on_server else 'offline'}"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                fixtures = [service.fixture for service in script.services if on_server]
                urls = map(request.getfixturevalue, fixtures)
                file.write_bytes(
                    pickle.dumps(whole_run(script, tmp_path_factory.mktemp("run"), *urls))
                )
            return cast(Whole, pickle.loads(file.read_bytes()))

    return recorded


# ── A browser ───────────────────────────────────────────────────────────────────────

CHROMIUM = shutil.which("chromium") or "chromium"
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic", "--disable-gpu")  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    args = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        except Error as error:
            missing(f"apt-get install chromium: {error}")
        yield started
        started.close()
