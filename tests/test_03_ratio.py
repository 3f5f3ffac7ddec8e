"""03_caching_strategies.py: ratios count keys, however asked for; what a review showed."""

from __future__ import annotations

import time

import pytest
from services import load_script

app = load_script("03_caching_strategies")
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
