"""What several tests of 02_mongodb_advanced.py share, besides the fixtures of conftest.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import running
from running import SCRIPTS, missing

import servers

PROBE_TIMEOUT_S = 5.0  # a connection over loopback or to a container
SEEDED_CUSTOMERS = 300  # about 1,200 orders: seeded in half a second

Document = dict[str, Any]


@contextmanager
def open_workspace(script: ModuleType, uri: str) -> Iterator[Any]:
    """A `Workspace` as main makes it; what it made is dropped afterwards."""
    log = script.CommandLog()
    client, hello = script.connect(uri, PROBE_TIMEOUT_S, log)
    made = script.Workspace(uri, client, hello, log)
    try:
        yield made
    finally:
        made.close()


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
