"""Fixtures for the tests of 01_sqlalchemy_advanced.py.

Whatever uses `workspace` or `shop` runs twice, on SQLite and on PostgreSQL. On PostgreSQL the
throw-away schemas lie in one database, made for this run and dropped at its end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from services import load_script, postgres_engine

SHOP_USERS = 60  # each of the 50 cities is the home of one of them
TIMEOUT_S = 5.0  # a connection over loopback or to a container


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return load_script("01_sqlalchemy_advanced")


@pytest.fixture(scope="session")
def schemas_url(postgres_url: str) -> Iterator[str]:
    """PostgreSQL alone: the database in which workspaces make their schemas."""
    name = f"test_01_{secrets.token_hex(6)}"
    engine = postgres_engine(postgres_url)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield engine.url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def workspace_url(request: pytest.FixtureRequest) -> str | None:
    """What `Workspace` takes: None for SQLite."""
    return None if request.param == "sqlite" else request.getfixturevalue("schemas_url")


@pytest.fixture
def workspace(script: ModuleType, tmp_path: Path, workspace_url: str | None) -> Iterator[Any]:
    """A `Workspace` on each engine, without databases; what it creates is dropped afterwards."""
    with closing(script.Workspace(tmp_path, workspace_url, TIMEOUT_S)) as made:
        yield made


@pytest.fixture
def sqlite_workspace(script: ModuleType, tmp_path: Path) -> Iterator[Any]:
    with closing(script.Workspace(tmp_path, None, TIMEOUT_S)) as made:
        yield made


@pytest.fixture
def postgres_workspace(script: ModuleType, tmp_path: Path, schemas_url: str) -> Iterator[Any]:
    with closing(script.Workspace(tmp_path, schemas_url, TIMEOUT_S)) as made:
        yield made


@pytest.fixture(scope="session")
def shop(
    script: ModuleType, tmp_path_factory: pytest.TempPathFactory, workspace_url: str | None
) -> Iterator[sa.Engine]:
    """An engine on a database of SHOP_USERS users, one for all tests: only for reading, or for
    writing in a transaction that is rolled back."""
    home = tmp_path_factory.mktemp("shop")
    with closing(script.Workspace(home, workspace_url, TIMEOUT_S)) as made:
        yield made.create(SHOP_USERS)
