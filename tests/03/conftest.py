"""Fixtures of script 03's tests: `make_cache` runs a test on the in-process tier, and on Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import pytest
import redis
from running import missing, until
from script03 import TIMEOUT_S, MakeCache
from services import load_script, redis_client

import servers


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return load_script("03_caching_strategies")


@pytest.fixture
def client(script: ModuleType, redis_url: str) -> Iterator[redis.Redis]:
    with script.connect(redis_url, TIMEOUT_S) as made:
        yield made


@pytest.fixture
def clock(script: ModuleType) -> Any:
    """Of the caches, moved by hand; it is their wall clock, too."""
    return script.ManualClock()


@pytest.fixture(params=["alone", "redis"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_cache(
    request: pytest.FixtureRequest, script: ModuleType, clock: Any, tier: str
) -> Iterator[MakeCache]:
    """Caches on one namespace, as those of several processes. What they leave in Redis is no lease,
    and ends by itself."""
    client, prefix = None, "test:"
    if tier == "redis":
        client, prefix = map(request.getfixturevalue, ("client", "redis_prefix"))

    def make(**options: Any) -> Any:
        policy = {key: options.pop(key) for key in script.Policy.__match_args__ if key in options}
        given = {"clock": clock, "wall_clock": clock, "rng": lambda: 0.0, **options}
        return script.TieredCache(f"{prefix}x", client, script.Policy(**policy), **given)

    yield make
    if client is not None:
        until(lambda: not list(client.scan_iter(match=f"{prefix}*:lease", count=1000)))
        assert all(client.ttl(key) != -1 for key in client.scan_iter(match=f"{prefix}*"))


# ── A Redis of the tests' own ───────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def own() -> Iterator[Any]:
    """It asks for a password, and takes no harm of kill, start, pause, resume."""
    try:
        with servers.running("redis") as started:
            yield started["redis"]
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


@pytest.fixture
def root(own: Any) -> Iterator[redis.Redis]:
    """A bare client of it, empty and running whatever the test before did."""
    own.start()
    with redis_client(own.url) as client:
        client.flushall()
        client.config_resetstat()
        yield client


@pytest.fixture
def trouble(own: Any, root: redis.Redis) -> Callable[[str], AbstractContextManager[None]]:
    @contextmanager
    def trouble(how: str) -> Iterator[None]:
        begin, end = {
            "killed": (own.kill, own.start),
            "stopped": (own.pause, own.resume),
            "full": [lambda size=size: root.config_set("maxmemory", size) for size in (1, 0)],
            "read-only": [lambda at=at: root.replicaof(*at) for at in (("::1", 1), ("NO", "ONE"))],
        }[how]
        begin()
        try:
            yield
        finally:
            end()

    return trouble
