"""03_caching_strategies.py: the ratios of `Stats` count keys, however they were asked for."""

from __future__ import annotations

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
