"""Fixtures for the tests of 03_caching_strategies.py.

`make_cache` runs a test four times: through `TieredCache` and `AsyncTieredCache`, each alone and on
Redis.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest
import redis
from running import until
from script03 import (
    CALLERS,
    TIMEOUT_S,
    WAIT_S,
    AsyncDriver,
    Driver,
    LoopThread,
    MakeCache,
    SyncDriver,
)
from services import load_script


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return load_script("03_caching_strategies")


@pytest.fixture
def client(script: ModuleType, redis_url: str) -> Iterator[redis.Redis]:
    """To look at Redis past the caches."""
    with script.connect(redis_url, TIMEOUT_S) as made:
        yield made


@pytest.fixture
def clock(script: ModuleType) -> Any:
    """Of the caches, moved by hand; it is their wall clock, too."""
    return script.ManualClock()


@pytest.fixture(params=["sync", "async"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["alone", "redis"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_cache(
    request: pytest.FixtureRequest, script: ModuleType, clock: Any, flavour: str, tier: str
) -> Iterator[MakeCache]:
    """Caches of one name share a namespace, as those of several processes do.

    At the end each has closed, and nothing is left on its boards.
    """
    prefix = request.getfixturevalue("redis_prefix") if tier == "redis" else "test:"
    url = request.getfixturevalue("redis_url") if tier == "redis" else None
    policy_names = script.Policy.__dataclass_fields__
    made: list[Driver] = []
    with ExitStack() as stack:
        if flavour == "sync":
            workers: Any = stack.enter_context(ThreadPoolExecutor(CALLERS + 20))
            drivers: Any = SyncDriver
            client = url and stack.enter_context(script.connect(url, TIMEOUT_S))
        else:
            workers, drivers = LoopThread(), AsyncDriver
            stack.callback(workers.close)
            client = url and script.connect_async(url, TIMEOUT_S)
            if client:
                stack.callback(lambda: workers.start(client.aclose()).result(WAIT_S))
        kind = script.TieredCache if flavour == "sync" else script.AsyncTieredCache

        def make(name: str = "x", **options: Any) -> Driver:
            policy = {key: options.pop(key) for key in list(options) if key in policy_names}
            given = {"clock": clock, "wall_clock": clock, "rng": lambda: 0.0, **options}
            cache = kind(f"{prefix}{name}", client or None, script.Policy(**policy), **given)
            made.append(drivers(script, cache, workers))
            return made[-1]

        yield make
        for driver in made:
            driver.close()
        until(lambda: not any(driver.in_progress for driver in made))
