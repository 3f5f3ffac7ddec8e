"""Fixtures for the tests of 02_mongodb_advanced.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from pymongo.database import Database
from script02 import SEEDED_CUSTOMERS, Document, open_workspace
from services import load_script


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return load_script("02_mongodb_advanced")


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
def seeded(script: ModuleType, mongo_uri: str) -> Iterator[Database[Document]]:
    """A database with SEEDED_CUSTOMERS customers, their orders, and the page loads: one for all
    tests, only for reading."""
    with open_workspace(script, mongo_uri) as made:
        database: Database[Document] = made.database()
        script.seed(database, SEEDED_CUSTOMERS)
        yield database
