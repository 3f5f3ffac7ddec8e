"""03_caching_strategies.py: ratios count keys, however asked for; what a review showed."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import redis
import redis.asyncio
from script03 import WAIT_S
from services import load_script

app: Any = load_script("03_caching_strategies")
KEYS = [f"key:{i}" for i in range(10)]


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_miss_without_a_loader_is_no_hit() -> None:
    # Fails where the ratio is 1 - loads / questions: `get` asks, and loads nothing.
    cache = app.TieredCache("ratio")
    assert [cache.get(key, None) for key in KEYS] == [None] * 10
    assert cache.stats().hit_ratio == 0.0


def test_keys_that_one_call_loaded_are_no_hits() -> None:
    # Fails where a call of `load_many` counts as the load of one key.
    cache = app.TieredCache("ratio")
    cache.get_many(KEYS, lambda missing: dict.fromkeys(missing, 1))
    assert cache.stats().hit_ratio == 0.0
    cache.get_many(KEYS)
    assert cache.stats().hit_ratio == pytest.approx(0.5)


def test_ten_hits_on_what_one_call_loaded_save_its_time_once() -> None:
    # Fails where each key is taken to cost the whole call: 10 x 2 s.
    clock = Clock()
    cache = app.TieredCache("ratio", clock=clock)

    def load_many(missing: list[str]) -> dict[str, int]:
        clock.now += 2.0
        return dict.fromkeys(missing, 1)

    cache.get_many(KEYS, load_many)
    cache.get_many(KEYS)
    assert cache.stats().saved_s == pytest.approx(2.0)


# ── What a reviewer's programs showed ───────────────────────────────────────────────


def test_a_source_that_fails_is_not_asked_by_each_refresh() -> None:
    # Fails where a refresh neither keeps its error nor heeds the one that is kept.
    clock, calls = Clock(), []
    policy = app.Policy(
        ttl_s=10, jitter=0, beta=0, error_ttl_s=60, stale_while_revalidate_s=300, l1_ttl_s=5
    )
    with app.TieredCache("refresh", None, policy, clock=clock, wall_clock=clock) as cache:
        cache.get_or_load("k", lambda: "v")
        clock.now += 11

        def fail() -> str:
            calls.append(1)
            raise LookupError

        for _ in range(20):
            assert cache.get_or_load("k", fail) == "v"
            deadline = time.monotonic() + 5
            while cache._refreshes and time.monotonic() < deadline:
                time.sleep(0.001)
    assert len(calls) == 1


def test_a_closed_cache_loads_nothing() -> None:
    cache = app.TieredCache("closed")
    cache.set("have", 1)
    cache.close()
    assert cache.get_or_load("have", lambda: 2) == 1
    with pytest.raises(app.CacheClosed):
        cache.get_or_load("k", lambda: 2)
    with pytest.raises(app.CacheClosed):
        cache.get_many(["k"], lambda missing: dict.fromkeys(missing, 2))


def test_what_load_many_returns_must_be_a_mapping() -> None:
    with pytest.raises(TypeError, match="mapping"):
        app.TieredCache("mapping").get_many(["k"], lambda _missing: ["v"])


# ── Threads ─────────────────────────────────────────────────────────────────────────


def caches(client: redis.Redis, prefix: str, **policy: Any) -> Any:
    return app.TieredCache(f"{prefix}review", client, app.Policy(jitter=0, beta=0, **policy))


def test_an_error_is_no_hit(redis_prefix: str, client: redis.Redis) -> None:
    cache = caches(client, redis_prefix, error_ttl_s=60)

    def fail() -> None:
        raise LookupError

    for _ in range(10):
        with pytest.raises(LookupError):
            cache.get_or_load("k", fail)
    stats = cache.stats()
    assert (stats.loads, stats.hits, stats.hit_ratio, stats.saved_s) == (1, 0, 0.0, 0.0)


def test_a_loader_that_hangs_does_not_keep_its_key_for_ever(
    redis_prefix: str, client: redis.Redis
) -> None:
    cache = caches(client, redis_prefix, load_timeout_s=0.05, lease_s=0.05)
    began, go_on = threading.Event(), threading.Event()

    def hang() -> str:
        began.set()
        go_on.wait(WAIT_S)
        return "late"

    hung = threading.Thread(target=cache.get_or_load, args=["k", hang])
    hung.start()
    began.wait(WAIT_S)
    with pytest.raises(app.LoadTimeout):
        cache.get_or_load("k", lambda: "never asked")
    assert cache.get_or_load("k", lambda: "well again") == "well again"
    go_on.set()
    hung.join()
    assert cache.get_or_load("k", lambda: 1 / 0) == "well again"


@pytest.mark.parametrize("answer", ["no mapping", KeyboardInterrupt])
def test_a_bulk_load_that_ends_badly_gives_its_leases_back(
    redis_prefix: str, client: redis.Redis, answer: Any
) -> None:
    cache = caches(client, redis_prefix)

    def load_many(_missing: list[str]) -> Any:
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer

    with pytest.raises((TypeError, KeyboardInterrupt)):
        cache.get_many(["a", "b"], load_many)
    assert list(client.scan_iter(match=f"{redis_prefix}*lease*")) == []


def test_a_reader_without_tags_keeps_no_copy_that_is_invalidated_meanwhile(
    redis_prefix: str, client: redis.Redis
) -> None:
    cache = caches(client, redis_prefix, l1_ttl_s=60)
    cache.set("k", "old", tags=["t"])
    send = cache._send

    def send_then_invalidate(calls: Any) -> Any:
        replies = send(calls)
        if calls[0] == ("GET", cache.keys.tag("t")):  # the last step of the read
            cache._send = send
            cache.invalidate_tag("t")
        return replies

    cache._send = send_then_invalidate
    assert cache.get_or_load("k", lambda: "new") == "old"  # asked for before
    assert cache.get_or_load("k", lambda: "new") == "new"


def test_a_value_that_the_cache_cannot_keep_does_not_leave_the_old_one(
    redis_prefix: str, client: redis.Redis
) -> None:
    cache, source = caches(client, redis_prefix), {"k": "old"}
    cache.set("k", "old")
    with pytest.raises(app.Uncacheable):
        app.write_through(cache, "k", {1}, lambda: source.update(k="new"))
    assert source == {"k": "new"}
    assert cache.get("k") is app.MISSING


def test_while_one_caller_replays_the_others_do_without_redis(
    redis_prefix: str, client: redis.Redis
) -> None:
    cache, sent = caches(client, redis_prefix), []
    cache.set("other", "in Redis")
    cache.forget_all()
    cache._pending = {cache.keys.value(f"k{i}"): object() for i in range(250)}
    send = cache._send

    def send_and_look(calls: Any) -> Any:
        sent.append(calls)
        if len(sent) == 1:  # a second caller, in the midst of the first one's replay
            assert cache.get_or_load("other", lambda: "loaded") == "loaded"
        return send(calls)

    cache._send = send_and_look
    assert cache.get("first") is app.MISSING
    drops = [call for calls in sent for call in calls if call[1] == app.DROP.sha]
    assert len(drops) == 250 + (sent[0][0] in sent[1])  # once more where the script was not there
    assert cache._pending == {}


def test_a_key_that_is_pending_already_fits_in(
    redis_prefix: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_PENDING", 2)
    cache = caches(client, redis_prefix)
    monkeypatch.setattr(cache.breaker, "allow", lambda: False)
    assert [cache.invalidate(key) for key in ("a", "b", "a")] == [False] * 3
    with pytest.raises(app.InvalidationLost):
        cache.invalidate("c")


def test_a_long_key_does_not_stay_in_memory() -> None:
    cache = app.TieredCache("long")
    cache.set("k" * 100_000, 1)
    assert cache.get("k" * 100_000) == 1
    assert cache.keys._short.cache_info().currsize == 0


def test_a_session_of_a_stranger_lets_nobody_in(redis_prefix: str, client: redis.Redis) -> None:
    sessions = app.Sessions(client, f"{redis_prefix}s", idle_s=0.0001)
    for raw in (b"", b"\xff", b"[]", b"{}", b'{"user":1,"ends_at":null}', b"7"):
        client.set(sessions._key("token"), raw, px=60_000)
        sessions._idle_ms = 60_000
        assert sessions.get("token") is None
    client.unlink(sessions._key("token"))


def test_what_holds_a_password_does_not_show_it(client: redis.Redis) -> None:
    workspace = app.Workspace("redis://:secret@127.0.0.1/0", client, "Redis")
    assert "secret" not in repr(workspace)


def test_what_cannot_go_together_is_refused(client: redis.Redis) -> None:
    async def load(_key: str) -> None: ...

    with pytest.raises(TypeError):
        app.cached(app.TieredCache("x"), "x")(load)
    with pytest.raises(TypeError):
        app.cached(app.AsyncTieredCache("x"), "x")(lambda _key: None)
    with pytest.raises(TypeError):
        app.AsyncTieredCache("x", client)
    with pytest.raises(TypeError):
        app.TieredCache("x", redis.asyncio.Redis())


# ── asyncio ─────────────────────────────────────────────────────────────────────────


def test_no_cancellation_is_forgotten(redis_url: str, redis_prefix: str) -> None:
    """Bare redis-py goes on to the end in a third of the cases."""

    async def cancel_many() -> list[bool]:
        client = app.connect_async(redis_url, WAIT_S)
        ended = []
        async with app.AsyncTieredCache(f"{redis_prefix}cancel", client) as cache:
            await cache.get("warm")
            for i in range(200):
                reached = asyncio.Event()

                async def ask(key: str, reached: asyncio.Event = reached) -> None:
                    reached.set()
                    await cache.get(key)

                task = asyncio.create_task(ask(f"k{i}"))
                await reached.wait()
                for _ in range(i % 4):
                    await asyncio.sleep(0)
                if task.cancel():
                    await asyncio.wait([task])
                    ended.append(task.cancelled())
        await client.aclose()
        return ended

    ended = asyncio.run(cancel_many())
    assert len(ended) > 50
    assert all(ended)


def test_a_bulk_load_goes_on_when_who_asked_is_cancelled(redis_url: str, redis_prefix: str) -> None:
    async def cancel_first() -> tuple[int, list[Any]]:
        client, loads = app.connect_async(redis_url, WAIT_S), 0
        may_end = asyncio.Event()

        async def load_many(missing: list[str]) -> dict[str, str]:
            nonlocal loads
            loads += 1
            await may_end.wait()
            return dict.fromkeys(missing, "v")

        async with app.AsyncTieredCache(f"{redis_prefix}bulk", client) as cache:
            tasks = [asyncio.create_task(cache.get_many(["k"], load_many)) for _ in range(10)]
            while not loads or cache.stats().waits < 9:
                await asyncio.sleep(0)
            tasks[0].cancel()
            await asyncio.wait([tasks[0]])
            may_end.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()
        return loads, answers

    loads, (first, *others) = asyncio.run(cancel_first())
    assert isinstance(first, asyncio.CancelledError)
    assert (loads, others) == (1, [{"k": "v"}] * 9)


def test_an_invalidation_that_is_cancelled_is_made_up_for(
    redis_url: str, redis_prefix: str
) -> None:
    async def cancel() -> tuple[bool, Any]:
        client = app.connect_async(redis_url, WAIT_S)
        cache = app.AsyncTieredCache(f"{redis_prefix}invalid", client)
        await cache.set("k", "old")
        send, never = cache._send, asyncio.Event()

        async def hang(_calls: Any) -> Any:
            await never.wait()

        cache._send = hang
        task = asyncio.create_task(cache.invalidate("k"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        cache._send = send
        found = await cache.get("k")
        await client.aclose()
        return task.cancelled(), found

    assert asyncio.run(cancel()) == (True, app.MISSING)


def test_a_task_that_a_loader_began_may_ask_for_the_key_later() -> None:
    async def begin() -> Any:
        async with app.AsyncTieredCache("later") as cache:
            later: list[asyncio.Task[Any]] = []
            has_value = asyncio.Event()

            async def ask() -> Any:
                await has_value.wait()
                return await cache.get_or_load("k", load)

            async def load() -> str:
                later.append(asyncio.create_task(ask()))
                return "v"

            await cache.get_or_load("k", load)
            has_value.set()
            return await later[0]

    assert asyncio.run(begin()) == "v"
