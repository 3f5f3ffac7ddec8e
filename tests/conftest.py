"""Fixtures: servers, a namespace of its own for each test, and the scripts as a user runs them.

Where a server comes from, and what happens without one, is decided in services.py. A server is
started when the first test asks for it and stopped when the tests end, however they end.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import sqlalchemy
from pymongo.database import Database
from running import SCRIPT_TIMEOUT_S, RunScript
from services import (
    NOT_CONFIGURED,
    ROOT,
    Ladder,
    Missing,
    mongo_client,
    postgres_engine,
    redis_client,
)

LADDER = pytest.StashKey[Ladder]()


def pytest_configure(config: pytest.Config) -> None:
    try:
        ladder = Ladder(os.environ)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[LADDER] = ladder
    config.add_cleanup(ladder.close)
    # A terminated run, such as a cancelled CI job, stops its servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.write_line(config.stash[LADDER].summary())


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


# ── The scripts, as a user runs them ────────────────────────────────────────────────


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run a script, such as `01_sqlalchemy_advanced`, in an empty directory.

    No server is configured but by `env`, which is added to this process's environment.
    """

    def run(
        name: str,
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = SCRIPT_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / f"{name}.py"), *args],
            cwd=tmp_path,
            env={**os.environ, **NOT_CONFIGURED, **(env or {})},
            capture_output=True,
            encoding="utf-8",
            timeout=timeout_s,
            check=False,
        )

    return run
