"""Fixtures for the tests of 02_mongodb_advanced.py.

`managers` runs a test twice: through the synchronous managers and through `AsyncManager`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from pymongo.database import Database
from script02 import AsyncManagers, Document, MakeManagers, Managers, SyncManagers, open_workspace
from services import load_script

SHOP_CUSTOMERS = 300  # about 1,200 orders: seeded in half a second


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return load_script("02_mongodb_advanced")


@pytest.fixture(scope="session")
def shared_workspace(script: ModuleType, mongo_uri: str) -> Iterator[Any]:
    """One for all tests: whoever asks it for a database has that for itself."""
    with open_workspace(script, mongo_uri) as made:
        yield made


@pytest.fixture
def workspace(script: ModuleType, mongo_uri: str) -> Iterator[Any]:
    with open_workspace(script, mongo_uri) as made:
        yield made


@pytest.fixture
def database(workspace: Any) -> Database[Document]:
    """Empty, with durable writes, and money as Decimal."""
    made: Database[Document] = workspace.database()
    return made


@pytest.fixture(scope="session")
def shop(script: ModuleType, shared_workspace: Any) -> Any:
    """A seeded `Shop` of SHOP_CUSTOMERS customers, one for all tests: only for reading."""
    seeded = script.Shop(SHOP_CUSTOMERS, shared_workspace.database())
    script.seed(seeded, seeded.database)
    return seeded


@pytest.fixture(params=["sync", "async"])
def make_managers(
    request: pytest.FixtureRequest, script: ModuleType, workspace: Any, database: Any
) -> Iterator[MakeManagers]:
    """`make_managers(timeout_s)`: managers of one kind on `database`."""
    made: list[AsyncManagers] = []

    def make(timeout_s: float) -> Managers:
        if request.param == "sync":
            return SyncManagers(script, database, timeout_s)
        made.append(AsyncManagers(script, database, workspace.uri, timeout_s))
        return made[-1]

    yield make
    for managers in made:
        managers.close()


@pytest.fixture
def managers(make_managers: MakeManagers) -> Managers:
    return make_managers(20.0)
