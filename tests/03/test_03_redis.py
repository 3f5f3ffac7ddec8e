"""Script 03 on Redis: pools, leases, copies in other processes, and Redis killed, stopped, full.

What a cache left is read back by a bare client, and what it sent is counted by the server. Servers
that are stopped are these tests' own; a breaker's time is moved by hand. Time limits only end a
test that hangs: nothing here is measured.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
from running import missing, until
from script03 import TIMEOUT_S, WAIT_S, AsyncDriver, LoopThread, Source, SyncDriver, admit
from services import ROOT, load_script, redis_client

import servers

app: Any = load_script("03_caching_strategies")

IMTIMEOUT_S = 0.5  # of a client whose server is stopped
PLAIN = app.Policy(jitter=0.0, beta=0.0, l1_ttl_s=0.0, stale_if_error_s=0.0)
COPYING = replace(PLAIN, l1_ttl_s=60.0)  # reads in this process are answered here
LISTENERS = [app.MessageListener, app.TrackingListener]

# ── Caches of both kinds, and servers ───────────────────────────────────────────────

Make = Callable[..., Any]


@contextmanager
def maker(flavour: str, url: str, namespace: str) -> Iterator[Make]:
    """`make(policy)`: a cache with a client of its own, as another process would have it."""
    with ExitStack() as stack:
        if flavour == "sync":
            workers: Any = stack.enter_context(ThreadPoolExecutor(20))
        else:
            workers = LoopThread()
            stack.callback(workers.close)

        def make_sync(url: str, timeout_s: float, options: dict[str, Any]) -> Any:
            client = stack.enter_context(app.connect(url, timeout_s))
            return SyncDriver(app, app.TieredCache(namespace, client, **options), workers)

        def make_async(url: str, timeout_s: float, options: dict[str, Any]) -> Any:
            client = app.connect_async(url, timeout_s)
            stack.callback(lambda: workers.start(client.aclose()).result(WAIT_S))
            return AsyncDriver(app, app.AsyncTieredCache(namespace, client, **options), workers)

        def make(
            policy: Any = PLAIN, timeout_s: float = TIMEOUT_S, url: str = url, **options: Any
        ) -> Any:
            kind = make_sync if flavour == "sync" else make_async
            driver = kind(url, timeout_s, {"policy": policy, **options})
            stack.callback(driver.close)
            return driver

        yield make


@pytest.fixture
def make(flavour: str, redis_url: str, redis_prefix: str) -> Iterator[Make]:
    with maker(flavour, redis_url, f"{redis_prefix}x") as made:
        yield made


def awaited(driver: Any, answer: Any) -> Any:
    """What a method of a driver's client gives: itself, or a coroutine of the driver's loop."""
    return driver._loop.start(answer).result(WAIT_S) if inspect.isawaitable(answer) else answer


def has_copy(driver: Any, key: str) -> bool:
    return driver.cache.l1.stale(driver.cache.keys.value(key)) is not None


def no_copies(driver: Any, *keys: str) -> Callable[[], bool]:
    return lambda: not any(has_copy(driver, key) for key in keys)


@pytest.fixture(scope="module")
def module_victim() -> Iterator[Any]:
    try:
        with servers.running("redis") as started:
            yield started["redis"]
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


@pytest.fixture
def victim(module_victim: Any) -> Any:
    """A Redis to be ill-treated: as new when a test begins, whatever the one before did to it."""
    module_victim.kill()
    module_victim.start()
    return module_victim


@pytest.fixture
def root(victim: Any) -> Iterator[redis.Redis]:
    """A bare client of the victim."""
    with redis_client(victim.url) as made:
        yield made


@pytest.fixture
def make_on_victim(flavour: str, victim: Any) -> Iterator[Make]:
    with maker(flavour, victim.url, "test:x") as made:
        yield made


def stored(client: redis.Redis, cache: Any, key: str) -> Any:
    """The value in Redis, or MISSING: past everything that a cache does but its envelope."""
    raw = client.get(cache.cache.keys.value(key))
    return app.MISSING if raw is None else app.unpack(raw).value


def names(client: redis.Redis, prefix: str) -> set[bytes]:
    return set(client.scan_iter(match=f"{prefix}*", count=1000))


class Away:
    """A breaker's clock, by which Redis is away from one cache and from no other."""

    def __init__(self) -> None:
        self.clock = app.ManualClock()
        self.breaker = app.CircuitBreaker(3, 1.0, self.clock)

    def begin(self) -> None:
        self.breaker.allow()  # where it is open: the probe, which fails
        for _ in range(3):
            self.breaker.failure()
        assert self.breaker.state == "open"

    def end(self) -> None:
        self.clock.advance(1.0)


# ── Connections ─────────────────────────────────────────────────────────────────────


def test_more_threads_than_connections_wait_for_one(
    redis_url: str, client: redis.Redis, redis_prefix: str
) -> None:
    name = redis_prefix.rstrip(":")
    with app.connect(f"{redis_url}?max_connections=3&client_name={name}", TIMEOUT_S) as bounded:
        pings = app.in_threads(48, lambda _i: [bounded.ping() for _ in range(5)])
        ours = [one for one in client.client_list() if one["name"] == name]
    assert pings == [[True] * 5] * 48
    assert 1 <= len(ours) <= 3


def test_pools_are_bounded_and_their_waits_are_short() -> None:
    for made in (app.connect("redis://127.0.0.1:1/0"), app.connect_async("redis://127.0.0.1:1/0")):
        pool = made.connection_pool
        assert (pool.max_connections, pool.timeout) == (32, 0.25)
        options = pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (0.25, 0.25)


@pytest.fixture
def hang_up() -> Iterator[tuple[str, list[object]]]:
    """The URL of a server that accepts and hangs up, and the connections that it has seen."""
    seen: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                seen.append(address)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0", seen
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_call_is_one_attempt(hang_up: tuple[str, list[object]]) -> None:
    url, seen = hang_up
    with app.connect(url, TIMEOUT_S) as client, pytest.raises(redis.ConnectionError):
        client.get("key")
    assert len(seen) == 1


def test_an_awaited_call_is_one_attempt(hang_up: tuple[str, list[object]]) -> None:
    url, seen = hang_up

    async def call() -> None:
        async with app.connect_async(url, TIMEOUT_S) as client:
            await client.get("key")

    with pytest.raises(redis.ConnectionError):
        asyncio.run(call())
    assert len(seen) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://h:1/0?socket_timeout=soon", ""])
def test_a_malformed_url_is_a_value_error(url: str) -> None:
    for connect in (app.connect, app.connect_async):
        with pytest.raises(ValueError, match=r"URL"):
            connect(url)


def test_a_client_that_decodes_is_refused() -> None:
    for kind, client in (
        (app.TieredCache, redis.Redis(decode_responses=True)),
        (app.AsyncTieredCache, redis.asyncio.Redis(decode_responses=True)),
    ):
        with pytest.raises(ValueError, match="decode_responses"):
            kind("test", client)


def test_a_busy_pool_costs_nobody_an_error_and_does_not_open_the_breaker(
    make: Make, redis_url: str
) -> None:
    cache = make(url=f"{redis_url}?max_connections=1&timeout=0.02")
    pool = cache.cache.client.connection_pool
    held = awaited(cache, pool.get_connection())
    assert [cache.get_or_load(f"k{i}", lambda: "value") for i in range(5)] == ["value"] * 5
    assert cache.stats.redis_errors == 5
    assert (cache.cache.breaker.state, cache.stats.breaker_opened) == ("closed", 0)
    awaited(cache, pool.release(held))
    assert cache.set("key", "value") is True


# ── The lease ───────────────────────────────────────────────────────────────────────


def test_a_lease_has_one_holder_and_a_ttl(client: redis.Redis, redis_prefix: str) -> None:
    mine, other = (app.RedisLease(client, f"{redis_prefix}lease", 40.0) for _ in range(2))
    assert (mine.acquire(), other.acquire(), mine.acquire()) == (True, False, False)
    assert client.get(mine.name) == mine.token.encode()
    assert 0 < client.pttl(mine.name) <= 40_000
    assert (other.extend(), other.release()) == (False, False)
    assert client.get(mine.name) == mine.token.encode()
    client.pexpire(mine.name, 1_000)
    assert other.extend() is False
    assert client.pttl(mine.name) <= 1_000
    assert mine.extend() is True
    assert 1_000 < client.pttl(mine.name) <= 40_000
    assert (mine.release(), mine.release(), mine.extend()) == (True, False, False)
    assert (client.exists(mine.name), other.acquire()) == (0, True)


def test_tokens_differ(client: redis.Redis) -> None:
    assert len({app.RedisLease(client, "name", 1.0).token for _ in range(100)}) == 100


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf")])
def test_a_lease_without_end_is_refused(client: redis.Redis, ttl_s: float) -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        app.RedisLease(client, "name", ttl_s)


def lapse(client: redis.Redis, cache: Any, key: str) -> None:
    """What the server does at the end of a lease."""
    name = cache.cache.keys.lease(cache.cache.keys.value(key))
    assert client.pttl(name) > 0
    client.delete(name)


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_a_fill_after_the_end_of_its_lease_is_refused(
    make: Make, client: redis.Redis, is_taken_over: bool
) -> None:
    slow, quick = make(COPYING), make(COPYING)
    source = Source("old", held=True)
    answer = slow.start("get_or_load", "key", source)
    until(lambda: source.loads)
    lapse(client, slow, "key")
    if is_taken_over:
        assert quick.get_or_load("key", lambda: "new") == "new"
    source.release()
    assert answer.result(WAIT_S) == "old"  # what its own loader said
    assert slow.stats.fills_refused == 1
    assert stored(client, slow, "key") == ("new" if is_taken_over else app.MISSING)
    assert not has_copy(slow, "key")
    assert slow.get_or_load("key", lambda: "new") == "new"


def test_who_waits_for_a_lease_takes_it_over_when_its_holder_dies(
    make: Make, client: redis.Redis, redis_url: str
) -> None:
    cache = make(replace(PLAIN, lease_s=60.0, load_timeout_s=60.0))
    holder = in_another_process(
        "cache.get_or_load('key', lambda: print('loading', flush=True) or sys.stdin.read())",
        redis_url,
        cache,
    )
    was_alive = []

    def load() -> str:
        was_alive.append(holder.poll() is None)
        return "mine"

    try:
        assert holder.stdout.readline() == "loading\n"
        answer = cache.start("get_or_load", "key", load)
        until(lambda: cache.stats.l2_misses)
        lease = cache.cache.keys.lease(cache.cache.keys.value("key"))
        assert client.pttl(lease) > 30_000
        holder.kill()
        holder.wait()
        client.pexpire(lease, 1)  # rather than wait a minute
        assert answer.result(WAIT_S) == "mine"
    finally:
        finish(holder)
    assert was_alive == [False]
    assert stored(client, cache, "key") == "mine"
    assert client.exists(lease) == 0


WITH_PATIENCE = (
    f"?timeout={TIMEOUT_S}&socket_timeout={TIMEOUT_S}&socket_connect_timeout={TIMEOUT_S}"
)


def test_four_processes_load_once_and_who_waits_only_reads(victim: Any, root: redis.Redis) -> None:
    """Writes are what the server's own table of commands says they are."""
    commands = root.command()
    writing = {name for name, about in commands.items() if "write" in about["flags"]}
    assert {"set", "del", "unlink", "pexpire", "publish"} - writing == {"publish"}
    workspace = app.Workspace(victim.url + WITH_PATIENCE, root, "Redis")
    root.config_resetstat()
    result = app.stampede_processes(workspace, "stampede", 4, 250, 0.3)
    stats = root.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): int(about["calls"]) for name, about in stats.items()}
    writes = {name: count for name, count in calls.items() if name in writing}
    assert (result.answers, result.loads) == (1_000, 1)
    assert sum(writes.values()) <= 10, writes
    assert result.writes == sum(writes.values())
    assert names(root, "module8-") == {
        f"{workspace.prefix}:stampede:v1:value:{{hot}}".encode()
    }  # and no lease


# ── Copies in other processes ───────────────────────────────────────────────────────

ANOTHER_PROCESS = """
import importlib, sys
app = importlib.import_module("03_caching_strategies")
client = app.connect(sys.argv[1], float(sys.argv[3]))
cache = app.TieredCache(sys.argv[2], client, app.Policy(lease_s=60.0))
"""


def in_another_process(work: str, url: str, cache: Any) -> subprocess.Popen[str]:
    """Python that does `work` with a `cache` of its own of the same namespace."""
    return subprocess.Popen(
        [sys.executable, "-c", ANOTHER_PROCESS + work, url, cache.cache.namespace, str(TIMEOUT_S)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> int:
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=WAIT_S)
    return process.returncode


@contextmanager
def listening(listener: Any, cache: Any, client: redis.Redis) -> Iterator[Any]:
    with listener(cache.cache, client) as made:
        assert made.ready.wait(WAIT_S)
        yield made


@pytest.fixture(params=LISTENERS, ids=["messages", "tracking"])
def listener(request: pytest.FixtureRequest) -> Any:
    return request.param


CHANGES = """
client.delete(cache.keys.value("a stranger's DEL"))
client.set(cache.keys.value("a stranger's SET"), b"foreign", px=60_000)
cache.invalidate("invalidate")
cache.set("set", "new")
cache.invalidate_tag("tag of tag")
"""
CHANGED = ("invalidate", "set", "tag", "a stranger's DEL", "a stranger's SET", "none")


def test_what_another_process_changes_is_dropped_here(
    make: Make, listener: Any, redis_url: str
) -> None:
    cache = make(COPYING)
    for key in CHANGED:
        cache.set(key, "old", tags=[f"tag of {key}"])
    with app.connect(redis_url, TIMEOUT_S) as client, listening(listener, cache, client):
        assert [cache.get(key) for key in CHANGED] == ["old"] * len(CHANGED)
        assert all(has_copy(cache, key) for key in CHANGED)
        assert in_another_process(CHANGES, redis_url, cache).wait(WAIT_S) == 0
        # In one connection, in order: when the last one is heard, all were that can be.
        until(no_copies(cache, "tag"))
        kept = [key for key in CHANGED if has_copy(cache, key)]
    deaf = ["a stranger's DEL", "a stranger's SET"] if listener is app.MessageListener else []
    assert kept == [*deaf, "none"]
    assert cache.get("set") == "new"
    assert [cache.get(key) for key in ("invalidate", "tag")] == [app.MISSING] * 2


def test_a_cache_sends_its_id_and_does_not_hear_itself(make: Make, client: redis.Redis) -> None:
    here, other = make(COPYING), make(COPYING)
    keys, sender = here.cache.keys, here.cache.id
    with client.pubsub() as spy, listening(app.MessageListener, here, client):
        spy.subscribe(keys.channel)
        assert spy.get_message(timeout=WAIT_S)["type"] == "subscribe"
        here.set("mine", 1)
        heard = spy.get_message(timeout=WAIT_S)["data"]
        assert heard == f"{sender} {keys.value('mine')}".encode()
        other.set("theirs", 1)
        for key in ("mine", "theirs"):  # until no message comes between
            until(lambda key=key: here.get(key) == 1 and has_copy(here, key))
        client.publish(keys.channel, heard)  # once more, now that there is a copy
        other.invalidate("theirs")
        until(no_copies(here, "theirs"))
        assert has_copy(here, "mine")


def test_tracking_hears_the_cache_s_own_fill_and_then_keeps_what_it_reads(
    make: Make, client: redis.Redis, redis_url: str
) -> None:
    cache = make(COPYING)
    with (
        app.connect(redis_url, TIMEOUT_S) as tracked,
        listening(app.TrackingListener, cache, tracked),
    ):
        cache.get_or_load("key", lambda: "value")
        until(no_copies(cache, "key"))
        assert (cache.get("key"), has_copy(cache, "key")) == ("value", True)
    assert cache.stats.loads == 1


def test_keys_that_are_hashed_are_heard_of(make: Make, listener: Any, redis_url: str) -> None:
    here, other = make(COPYING), make(COPYING)
    keys = ["k" * 10_000, "{braces}", "tab\t", "ключ", "\ud800"]
    for key in keys:
        other.set(key, "old")
    with app.connect(redis_url, TIMEOUT_S) as client, listening(listener, here, client):
        assert here.get_many(keys) == dict.fromkeys(keys, "old")
        assert all(has_copy(here, key) for key in keys)
        other.invalidate(*keys)
        until(no_copies(here, *keys))


def test_a_flushed_database_drops_every_copy(make_on_victim: Make, root: redis.Redis) -> None:
    cache = make_on_victim(COPYING)
    cache.set("a", 1)
    cache.set("b", 2)
    with listening(app.TrackingListener, cache, root):
        assert cache.get_many(["a", "b"]) == {"a": 1, "b": 2}
        assert has_copy(cache, "a")
        root.flushdb()
        until(lambda: not (has_copy(cache, "a") or has_copy(cache, "b")))


def test_a_listener_outlives_its_server_and_drops_what_it_may_have_missed(
    make_on_victim: Make, listener: Any, victim: Any
) -> None:
    cache, other = make_on_victim(COPYING), make_on_victim(COPYING)
    with app.connect(victim.url, TIMEOUT_S) as client, listening(listener, cache, client) as made:
        victim.kill()
        until(lambda: not made.ready.is_set())
        cache.set("key", "only here")
        assert has_copy(cache, "key")
        victim.start()
        assert made.ready.wait(WAIT_S)
        assert not has_copy(cache, "key")  # dropped before it is said to listen
        until(lambda: cache.get("key") is app.MISSING)  # and its breaker closed
        until(lambda: other.set("key", "old"))
        until(lambda: cache.get("key") == "old" and has_copy(cache, "key"))
        other.invalidate("key")
        until(no_copies(cache, "key"))


def test_a_listener_waits_for_a_server_that_is_not_there_yet(
    make_on_victim: Make, listener: Any, victim: Any
) -> None:
    cache = make_on_victim(COPYING)
    victim.kill()
    with app.connect(victim.url, TIMEOUT_S) as client, listener(cache.cache, client) as made:
        assert not made.ready.is_set()
        victim.start()
        assert made.ready.wait(WAIT_S)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_foreign_message_does_not_end_a_listener(make: Make, client: redis.Redis) -> None:
    here, other = make(COPYING), make(COPYING)
    with listening(app.MessageListener, here, client):
        here.set("key", "old")
        for junk in (b"", b"no-blank", b"\xff\xfe not UTF-8", b"sender " + b"k" * 10_000):
            client.publish(here.cache.keys.channel, junk)
        other.invalidate("key")
        until(no_copies(here, "key"))


def test_tracking_without_resp3_never_says_that_it_listens(blocking: Make, redis_url: str) -> None:
    """RESP3 alone pushes invalidations: refused, or never ready, but not ready and deaf."""
    here, other = blocking(COPYING), blocking(COPYING)
    other.set("key", "old")
    with ExitStack() as stack:
        resp2 = stack.enter_context(app.connect(f"{redis_url}?protocol=2", TIMEOUT_S))
        try:
            made = stack.enter_context(app.TrackingListener(here.cache, resp2))
        except ValueError:
            return
        if made.ready.wait(1.0):
            assert here.get("key") == "old"
            other.invalidate("key")
            until(no_copies(here, "key"))


def test_a_tracked_connection_is_not_given_back(
    make: Make, client: redis.Redis, redis_url: str, redis_prefix: str
) -> None:
    """The flag t of CLIENT LIST: tracked."""
    name = redis_prefix.rstrip(":")

    def flags() -> list[str]:
        return [one["flags"] for one in client.client_list() if one["name"] == name]

    with app.connect(f"{redis_url}?client_name={name}", TIMEOUT_S) as tracked:
        with listening(app.TrackingListener, make(), tracked):
            assert any("t" in flag for flag in flags())
        assert tracked.ping()
        until(lambda: not any("t" in flag for flag in flags()))
        assert flags()


# ── An invalidation is not undone ───────────────────────────────────────────────────


def meanwhile(cache: Any, script: Any, work: Callable[[], object]) -> None:
    """Do `work` once, between Redis's next answer to `script` and the cache's next step."""
    send = cache.cache._send

    def hooked(calls: Sequence[tuple[Any, ...]]) -> Any:
        replies = send(calls)
        if any(script.sha in call for call in calls):
            del cache.cache._send
            work()
        return replies

    cache.cache._send = hooked


@pytest.fixture
def blocking(redis_url: str, redis_prefix: str) -> Iterator[Make]:
    with maker("sync", redis_url, f"{redis_prefix}x") as made:
        yield made


@pytest.mark.parametrize("who", ["same cache", "another, heard"])
def test_a_set_that_an_invalidation_overtakes_leaves_no_copy(
    blocking: Make, client: redis.Redis, who: str
) -> None:
    """Redis has stored, then dropped the value; the setter comes to its own copy only then."""
    here, other = blocking(COPYING), blocking(COPYING)

    def invalidate() -> None:
        if who == "same cache":
            here.invalidate("key")
        else:
            other.invalidate("key")
            here.cache.forget(here.cache.keys.value("key"))  # as its listener does

    meanwhile(here, app.PUT, invalidate)
    here.set("key", "old")
    assert stored(client, here, "key") is app.MISSING
    assert here.get("key") is app.MISSING


def test_a_fill_that_an_invalidation_overtakes_leaves_no_copy(
    blocking: Make, client: redis.Redis
) -> None:
    here = blocking(COPYING)
    meanwhile(here, app.FILL, lambda: here.invalidate("key"))
    assert here.get_or_load("key", lambda: "old") == "old"
    assert stored(client, here, "key") is app.MISSING
    assert here.get("key") is app.MISSING


def test_an_invalidation_made_while_one_of_its_key_is_replayed_is_not_lost(blocking: Make) -> None:
    away, other = Away(), blocking()
    cache = blocking(breaker=away.breaker)

    def again() -> None:
        assert other.set("key", "old")
        away.begin()
        assert cache.invalidate("key") is False  # kept, it says

    away.begin()
    assert cache.invalidate("key") is False
    away.end()
    meanwhile(cache, app.DROP, again)
    cache.get("other")
    away.end()
    assert cache.get("another") is app.MISSING
    assert cache.cache.breaker.state == "closed"
    assert other.get("key") is app.MISSING


# ── Redis is away: killed, stopped, refusing ────────────────────────────────────────


def fail(victim: Any, how: str) -> Callable[[], None]:
    """Stop the server; the answer starts it again."""
    if how == "killed":
        victim.kill()
        return victim.start
    victim.pause()
    return victim.resume


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_three_failures_open_the_breaker_and_a_probe_closes_it(
    make_on_victim: Make, victim: Any, root: redis.Redis, how: str
) -> None:
    away = Away()
    cache = make_on_victim(timeout_s=IMTIMEOUT_S, breaker=away.breaker)
    assert cache.get_or_load("before", lambda: "before") == "before"
    restore = fail(victim, how)
    try:
        for i in range(20):
            assert cache.get_or_load(f"k{i}", lambda i=i: i) == i
        stats = cache.stats
        assert (stats.redis_errors, stats.breaker_opened) == (3, 1)
        assert stats.short_circuited == 17
        assert (stats.loads, away.breaker.state) == (1 + 20, "open")
        away.end()
        assert cache.get_or_load("probe", lambda: "probe") == "probe"
        assert (cache.stats.redis_errors, away.breaker.state) == (4, "open")
    finally:
        restore()
    assert cache.get_or_load("early", lambda: "early") == "early"  # the breaker asks nobody yet
    assert (cache.stats.redis_errors, stored(root, cache, "early")) == (4, app.MISSING)

    def is_back() -> bool:
        away.end()
        cache.get_or_load("late", lambda: "late")
        return bool(away.breaker.state == "closed")

    until(is_back)
    until(lambda: cache.get("late") == "late")
    assert cache.stats.breaker_opened == 1


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_under_load_no_caller_sees_an_outage(victim: Any, how: str) -> None:
    answers: list[bool] = []
    with maker("sync", victim.url, "test:x") as made:
        breaker = app.CircuitBreaker(3, 0.1)
        cache = made(replace(PLAIN, ttl_s=0.2), IMTIMEOUT_S, breaker=breaker)
        ending = threading.Event()

        def read(i: int) -> None:
            key = f"k{i % 4}"
            while not ending.is_set():
                answers.append(cache.get_or_load(key, lambda: key) == key)

        def some_more() -> None:
            goal = len(answers) + 200
            until(lambda: len(answers) > goal)

        with ThreadPoolExecutor(8) as threads:
            reading = [threads.submit(read, i) for i in range(8)]
            try:
                some_more()
                restore = fail(victim, how)
                try:
                    until(lambda: breaker.state == "open")
                    some_more()
                finally:
                    restore()
                until(lambda: breaker.state == "closed")
                some_more()
            finally:
                ending.set()
            for future in reading:
                future.result(WAIT_S)
        stats = cache.stats
    assert all(answers)
    assert stats.breaker_opened >= 1
    assert stats.short_circuited > 0
    assert stats.load_errors == 0


FIRST_CALLS: dict[str, Callable[[Any], object]] = {
    "get": lambda cache: cache.get("other"),
    "get_or_load": lambda cache: cache.get_or_load("other", lambda: 1),
    "get_many": lambda cache: cache.get_many(["other", "another"]),
    "load_many": lambda cache: cache.get_many(["other"], lambda keys: dict.fromkeys(keys, 1)),
    "set": lambda cache: cache.set("other", 1, tags=["tag"]),
    "invalidate": lambda cache: cache.invalidate("other"),
}


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_what_was_invalidated_while_redis_was_away_is_gone_after_the_first_call(
    make: Make, client: redis.Redis, first: str
) -> None:
    away, other = Away(), make()
    cache = make(breaker=away.breaker)
    for i in range(250):  # some batches
        other.set(f"old {i}", "old")
    other.set("tagged", "old", tags=["gone"])
    other.set("kept", "kept")
    away.begin()
    assert cache.invalidate(*(f"old {i}" for i in range(250))) is False
    assert cache.invalidate_tag("gone") is False
    assert cache.set("set", "new") is False
    assert other.get("old 0") == "old"  # for others, until Redis answers us
    away.end()
    FIRST_CALLS[first](cache)
    found = other.get_many([f"old {i}" for i in range(250)] + ["tagged", "kept"])
    assert found == {"kept": "kept"}
    assert cache.cache.breaker.state == "closed"


def test_a_value_set_while_redis_was_away_replaces_the_old_one(make: Make) -> None:
    away, other = Away(), make()
    cache = make(COPYING, breaker=away.breaker)
    other.set("key", "old")
    away.begin()
    assert cache.set("key", "new") is False
    assert cache.get("key") == "new"  # in this process
    away.end()
    cache.get("other")
    assert other.get("key") is app.MISSING


def test_the_replay_outlives_a_second_outage(make: Make) -> None:
    away, other = Away(), make()
    cache = make(breaker=away.breaker)
    other.set("key", "old")
    away.begin()
    cache.invalidate("key")
    away.end()
    away.begin()
    assert cache.get_or_load("key", lambda: "source") == "source"
    assert other.get("key") == "old"
    away.end()
    assert cache.get_or_load("key", lambda: "source") == "source"
    assert other.get("key") == "source"


def test_more_invalidations_than_can_be_kept_are_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_PENDING", 3)
    away, other = Away(), make()
    cache = make(COPYING, breaker=away.breaker)
    for key in "abcd":
        cache.set(key, "old")
    away.begin()
    assert [cache.invalidate(key) for key in "abc"] == [False] * 3
    with pytest.raises(app.InvalidationLost):
        cache.invalidate("d")
    assert no_copies(cache, *"abcd")()
    with pytest.raises(app.InvalidationLost):
        cache.set("d", "new")
    away.end()
    cache.get("other")
    assert other.get_many(list("abcd")) == {"d": "old"}
    assert cache.invalidate("d") is True


def everything(cache: Any, forget_scripts: Callable[[], object]) -> None:
    """Each kind of round trip, and what it must have done in Redis, as another cache sees it."""
    forget_scripts()
    assert cache.get_or_load("one", lambda: 1) == 1
    forget_scripts()
    assert cache.get_or_load("tagged", lambda: 2, tags=["a", "b"]) == 2
    forget_scripts()
    assert cache.get_many(["m", "n"], lambda keys: dict.fromkeys(keys, 3)) == {"m": 3, "n": 3}
    forget_scripts()
    assert cache.set("set", 4, tags=["a"]) is True
    forget_scripts()
    assert cache.invalidate("m", "n") is True
    forget_scripts()
    assert cache.invalidate_tag("b") is True
    with pytest.raises(ZeroDivisionError):
        cache.get_or_load("fails", lambda: 1 // 0)
    stats = cache.stats
    assert (stats.redis_errors, stats.loads, stats.fills_refused) == (0, 4, 0)


EVERY_KEY = ["one", "tagged", "m", "n", "set", "fails"]


@pytest.mark.parametrize("forgets", [True, False], ids=["SCRIPT FLUSH", "scripts known"])
def test_every_round_trip_with_and_without_the_scripts(
    make_on_victim: Make, root: redis.Redis, forgets: bool
) -> None:
    cache, other = make_on_victim(), make_on_victim()
    everything(cache, root.script_flush if forgets else root.ping)
    assert other.get_many(EVERY_KEY) == {"one": 1, "set": 4}
    leases = names(root, "test:x:v1:lease:")
    assert leases == set()


def test_a_replay_gives_the_server_its_scripts(make_on_victim: Make, root: redis.Redis) -> None:
    away, other = Away(), make_on_victim()
    cache = make_on_victim(breaker=away.breaker)
    for key in "ab":
        other.set(key, "old")
    away.begin()
    cache.invalidate("a", "b")
    away.end()
    root.script_flush()
    cache.get("other")
    assert other.get_many(["a", "b"]) == {}


def test_scripts_called_by_a_bare_client_survive_a_flush(root: redis.Redis) -> None:
    lease = app.RedisLease(root, "test:lease", 10.0)
    lease.acquire()
    for call in (lease.extend, lease.release, lambda: app.TokenBucket(root, 1, 1).take("b")[0]):
        root.script_flush()
        assert call() is True


def out_of_memory(root: redis.Redis) -> None:
    root.config_set("maxmemory", "1")


def read_only(root: redis.Redis) -> None:
    root.replicaof("127.0.0.1", 1)


def well_again(root: redis.Redis) -> None:
    root.replicaof("NO", "ONE")
    root.config_set("maxmemory", "0")


@pytest.mark.parametrize("refuse", [out_of_memory, read_only])
def test_a_server_that_refuses_writes_costs_no_caller_an_error(
    make_on_victim: Make, root: redis.Redis, refuse: Callable[[redis.Redis], None]
) -> None:
    cache, other = make_on_victim(COPYING), make_on_victim()
    other.set("there", "there")
    other.set("old", "old")
    refuse(root)
    assert cache.get("there") == "there"
    assert cache.get_or_load("key", lambda: "value") == "value"
    assert cache.get_or_load("tagged", lambda: "value", tags=["a", "b"]) == "value"
    assert cache.get_many(["m"], lambda keys: dict.fromkeys(keys, 1)) == {"m": 1}
    assert cache.set("old", "new") is False
    assert cache.get_many(["key", "old"]) == {"key": "value", "old": "new"}  # from this process
    stats = cache.stats
    assert stats.redis_errors >= 4
    assert (stats.breaker_opened, cache.cache.breaker.state) == (0, "closed")  # it answers
    well_again(root)
    cache.get("other")
    assert other.get("old") is app.MISSING
    assert cache.get_or_load("next", lambda: "next") == "next"
    assert other.get("next") == "next"


# ── What is left, and what is asked for ─────────────────────────────────────────────


def test_all_that_a_cache_leaves_expires(
    make: Make, client: redis.Redis, redis_prefix: str
) -> None:
    cache = make(replace(PLAIN, stale_if_error_s=30.0))
    leased: list[int] = []

    def load() -> int:
        found = names(client, f"{redis_prefix}x:v1:lease:")
        leased.extend(client.pttl(name) for name in found)
        return 1

    everything(cache, lambda: None)
    cache.get_or_load("seen", load, tags=["tag"])
    cache.get_or_load("none", lambda: None, ttl_s=3600)
    cache.set("long", "value", ttl_s=3600, tags=["long"])
    assert len(leased) == 1
    assert 0 < leased[0] <= 1000 * PLAIN.lease_s
    left = {name: client.pttl(name) for name in names(client, redis_prefix)}
    assert len(left) >= 8
    assert {name: ttl for name, ttl in left.items() if ttl <= 0} == {}
    value, tag, none = (
        left[name.encode()]
        for name in (
            cache.cache.keys.value("long"),
            cache.cache.keys.tag("long"),
            cache.cache.keys.value("none"),
        )
    )
    assert 3_600_000 < value <= 3_630_000 < tag  # a tag outlives what carries it
    assert none <= 1000 * (PLAIN.negative_ttl_s + 30)


def test_a_user_who_may_do_this_much_and_no_more_will_do(
    flavour: str, victim: Any, root: redis.Redis, listener: Any
) -> None:
    admit(root, "cache", "secret", "test:x:")
    url = f"redis://cache:secret@127.0.0.1:{victim.port}/0"
    with ExitStack() as stack:
        make = stack.enter_context(maker(flavour, url, "test:x"))
        client = stack.enter_context(app.connect(url, TIMEOUT_S))
        cache, other = make(COPYING), make()
        stack.enter_context(listening(listener, cache, client))
        everything(cache, root.script_flush)
        other.set("heard", 1)
        until(lambda: cache.get("heard") == 1 and has_copy(cache, "heard"))
        other.invalidate("heard")
        until(no_copies(cache, "heard"))
    refused = root.execute_command("ACL", "LOG")
    assert refused == []


def test_a_user_who_may_not_see_our_keys_is_a_redis_that_is_away(
    flavour: str, victim: Any, root: redis.Redis
) -> None:
    root.execute_command("ACL", "SETUSER", "else", "on", ">secret", "~other:*", "+@all")
    with maker(flavour, f"redis://else:secret@127.0.0.1:{victim.port}/0", "test:x") as make:
        cache = make(COPYING)
        assert cache.get_or_load("key", lambda: "value") == "value"
        assert cache.get_or_load("key", lambda: "again") == "value"
        assert cache.set("key", "new") is False
        assert cache.stats.redis_errors > 0
    assert names(root, "") == set()


def test_a_server_that_hangs_loses_its_client_s_connection_not_its_order(
    make_on_victim: Make, victim: Any
) -> None:
    """An answer that comes too late is never taken for the next question's."""
    away = Away()
    cache = make_on_victim(timeout_s=IMTIMEOUT_S, breaker=away.breaker)
    keys = [f"k{i}" for i in range(20)]
    for key in keys:
        cache.set(key, f"value of {key}")
    victim.pause()
    try:
        for key in keys[:3]:
            assert cache.get(key) is app.MISSING
    finally:
        victim.resume()
    away.end()
    until(lambda: cache.get("k0") != app.MISSING or away.end())
    assert {key: cache.get(key) for key in keys} == {key: f"value of {key}" for key in keys}
