"""What several tests of 02_mongodb_advanced.py share, besides the fixtures of conftest.py."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pymongo
import running
from pymongo.database import Database
from running import SCRIPTS, missing

import servers

PROBE_TIMEOUT_S = 5.0  # a connection over loopback or to a container

Document = dict[str, Any]


@contextmanager
def open_workspace(script: ModuleType, uri: str) -> Iterator[Any]:
    """A `Workspace` as main makes it; what it made is dropped afterwards."""
    log = script.CommandLog()
    client, server = script.connect(uri, PROBE_TIMEOUT_S, log)
    made = script.Workspace(uri, client, server, log)
    try:
        yield made
    finally:
        made.close()


# ── The same work through either kind of manager ────────────────────────────────────


class Managers(Protocol):
    """What the contract tests ask for; `database` looks at the result past the managers."""

    database: Database[Document]

    def load(self, collection: str, documents: Iterable[Document]) -> Any: ...
    def run(self, collection: str, pipeline: Sequence[Document]) -> list[Document]: ...
    def transfer(
        self, source: object, target: object, amount: Decimal, key: object = None
    ) -> int: ...


class SyncManagers:
    def __init__(self, script: ModuleType, database: Database[Document], timeout_s: float) -> None:
        self._script, self.database, self._timeout_s = script, database, timeout_s

    def load(self, collection: str, documents: Iterable[Document]) -> Any:
        manager = self._script.BulkManager(self.database[collection], timeout_s=self._timeout_s)
        return manager.load(documents)

    def run(self, collection: str, pipeline: Sequence[Document]) -> Any:
        return self._script.AggregationManager(self.database).run(collection, pipeline)

    def transfer(self, source: object, target: object, amount: Decimal, key: object = None) -> Any:
        ledger = self._script.Ledger(self.database.accounts, self._timeout_s)
        return ledger.transfer(source, target, amount, key)


class AsyncManagers:
    """One event loop from beginning to end, in which the client was made."""

    def __init__(
        self, script: ModuleType, database: Database[Document], uri: str, timeout_s: float
    ) -> None:
        self.database, self._runner = database, asyncio.Runner()
        self._client = self._runner.run(self._connect(uri, script.client_options(uri, 20)))
        found = self._client.get_database(
            database.name, codec_options=script.CODEC, write_concern=script.DURABLE
        )
        self._manager = script.AsyncManager(found, timeout_s)

    @staticmethod
    async def _connect(uri: str, options: Document) -> pymongo.AsyncMongoClient[Document]:
        return pymongo.AsyncMongoClient(uri, **options)

    def load(self, collection: str, documents: Iterable[Document]) -> Any:
        return self._runner.run(self._manager.load(collection, documents))

    def run(self, collection: str, pipeline: Sequence[Document]) -> Any:
        return self._runner.run(self._manager.run(collection, pipeline))

    def transfer(self, source: object, target: object, amount: Decimal, key: object = None) -> Any:
        return self._runner.run(self._manager.transfer(source, target, amount, key))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


MakeManagers = Callable[[float], Managers]


# ── The script in a process, and servers of a test's own ────────────────────────────

# A Ctrl-C inside the constructor of a cursor: PyMongo 4.20's destructor then stumbles over the half
# that is missing, and Python says so on stderr. The script cannot reach it.
HALF_BUILT_CURSOR = re.compile(
    r"Exception ignored in: <function _AgnosticCursorBase\.__del__ at \w+>\n"
    r"Traceback \(most recent call last\):\n(?:  .*\n)+"
    r"AttributeError: '\w+' object has no attribute '_ns'\n"
)


class Child(running.Child):
    harmless = HALF_BUILT_CURSOR


class Run(running.Run):
    child = Child

    def __init__(self, home: Path) -> None:
        super().__init__(SCRIPTS["02"].path, home)


@contextmanager
def started(kind: type[servers.Mongo]) -> Iterator[Any]:
    """A server of `kind`, on loopback; fails or skips where none can be had."""
    directory = servers.RunDirectory()
    try:
        server = kind(directory, kind.find())
        server.start()
        yield server
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)
    finally:
        directory.close()
