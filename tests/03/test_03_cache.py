"""Script 03's cache in one process: its tiers, its counts, what it refuses, and its breaker.

The oracles: an OrderedDict, a clock moved by hand, JSON, prometheus_client's parser.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import make_dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from threading import Event
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from script03 import NEVER, MakeCache, Source, SourceDown, app, finished, on_redis, start

A_BIT = 0.001  # seconds of the clock that is moved by hand
BAD_TTLS = (0, -1, math.nan, math.inf)

WHATS = st.sampled_from(["put", "put", "fresh", "fresh", "delete", "wait"])


@settings(deadline=None, database=None, max_examples=100)
@given(st.lists(st.tuples(WHATS, st.sampled_from("abcd"), st.integers(1, 2)), max_size=60))
def test_the_lru_cache_does_what_a_model_does(taken: list[tuple[str, str, int]]) -> None:
    model, hits, evicted = OrderedDict[str, tuple[int, float]](), 0, 0
    cache = app.LRUCache(3, clock := app.ManualClock())
    for value, (what, name, life_s) in enumerate(taken):
        stored, end = model.get(name, (None, 0.0))
        if what == "put":
            model[name] = value, clock.now + life_s
            model.move_to_end(name)
            cache.put({name: app.Entry(value, *[clock.now + life_s] * 3, {})})
            if len(model) > 3:
                model.popitem(last=False)
                evicted += 1
        elif what == "fresh":
            entry = cache.fresh(name)
            assert (entry and entry.value) == (stored if end > clock.now else None)
            if entry:
                hits += 1
                model.move_to_end(name)
        elif what == "delete":
            cache.delete([name, "never there"])
            model.pop(name, None)
        else:
            clock.now += life_s
        assert list(cache.entries) == list(model)
    asked = [what for what, *_ in taken].count("fresh")
    assert (cache.hits, cache.misses, cache.evictions) == (hits, asked - hits, evicted)


@pytest.mark.parametrize("tier", ["alone"])
def test_readers_disturb_no_tag_and_lose_no_count(make_cache: MakeCache) -> None:
    cache, stop, interval_s = make_cache(max_entries=50), Event(), sys.getswitchinterval()

    def read(thread: int) -> int:
        rng, reads = random.Random(thread), 0
        while not stop.is_set():
            key, reads = f"k{rng.randrange(45)}", reads + 1
            assert cache.get_or_load(key, lambda key=key: key, tags=["t"]) == key
        return reads

    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        reading = [start(read, thread) for thread in range(8)]
        while cache.stats()["loads"] < 500 and not any(each.done() for each in reading):
            cache.invalidate(tags=["t"])
    finally:
        stop.set()
        sys.setswitchinterval(interval_s)
    reads, stats = sum(finished(reading)), cache.stats()
    assert stats["l1_hits"] + stats["l1_misses"] == reads


@pytest.mark.parametrize("bad", BAD_TTLS)
def test_what_makes_no_sense_is_refused(make_cache: MakeCache, bad: float) -> None:
    wrong = [{name: bad} for name in ("ttl_s", "negative_ttl_s", "lease_s", "load_timeout_s")]
    if bad != 0:  # which switches these off
        wrong += [{name: bad} for name in ("beta", "stale_if_error_s", "l1_ttl_s", "jitter")]
    for options in [*wrong, {"jitter": 1}]:
        with pytest.raises(ValueError, match=r"above 0|negative"):
            app.Policy(**options)
    cache, source = make_cache(), Source("v")
    for ask in (cache.get_or_load, lambda key, load, ttl_s: cache.get_many([key], load, ttl_s)):
        with pytest.raises(ValueError, match="ttl_s"):
            ask("k", source, bad)
    assert (source.loads, cache.get_many(["k"])) == (0, {})


@pytest.mark.parametrize(
    "life",  # of a value, given its TTL, and what is drawn
    [
        ("v", None, 60, 0), ("v", 7, 7, 0), ("v", 600, 600, 0), ("v", 0.5, 0.5, 0),
        ("v", 100, 90, 0.25), ("v", 100, 60, 1 - 1e-9),  # jitter is 0.4
        (None, None, 5, 0), (None, 2, 2, 0), (None, None, 4.5, 0.25),  # unknown to the source
        (0, None, 60, 0), ("", None, 60, 0), (False, None, 60, 0), ([], 60, 60, 0), ({}, 9, 9, 0),
    ],
)  # fmt: skip
def test_a_value_lives_for_its_ttl(make_cache: MakeCache, tier: str, clock: Any, life: Any) -> None:
    value, ttl_s, life_s, drawn = life
    cache, other = (make_cache(jitter=0.4, beta=0, rng=lambda: drawn) for _ in range(2))
    one, many = Source(value, "new"), Source({"many": value}, {"many": "new"})

    def answers(asked: Any = cache) -> list[str]:
        found = asked.get_many(["many"], many, ttl_s)["many"]
        return [repr(asked.get_or_load("k", one, ttl_s)), repr(found)]

    assert answers() == answers() == [repr(value)] * 2
    if tier == "redis":
        kept_s = life_s + (0 if value is None else 300)  # to stand in for an error
        for key in ("k", "many"):
            assert kept_s - 4 < cache.client.pttl(cache.name(key)) / 1000 <= kept_s
        assert answers(other) == [repr(value)] * 2
    clock.now += life_s - A_BIT
    assert (answers(), one.loads, many.loads) == ([repr(value)] * 2, 1, 1)
    clock.now += 2 * A_BIT
    assert answers() == ["'new'", "'new'"]


@on_redis
@pytest.mark.parametrize(
    "case",  # what is drawn, beta, how long the load takes, how early the next one may begin
    [(1 - 1 / math.e, 1, 0.25, 0.25),  # ln(1 - drawn) is -1: the load's time before the end
     (1 - 1 / math.e, 4, 0.25, 1.0), (1 - math.exp(-3), 1, 0.5, 1.5),
     (0.0, 1, 0.25, 0), (0.999, 0, 0.25, 0), (0.999, 1, 0.0, 0)],
)  # fmt: skip
def test_xfetch(make_cache: MakeCache, clock: Any, case: Any) -> None:
    drawn, beta, takes_s, early_s = case
    cache, other = (make_cache(jitter=0, beta=beta, rng=lambda: drawn) for _ in range(2))
    cache.get_or_load("k", lambda: setattr(clock, "now", clock.now + takes_s) or "old")
    clock.now += 60 - early_s - 2 * A_BIT
    assert cache.get_or_load("k", NEVER) == "old"
    clock.now += early_s and 4 * A_BIT
    early = Source("new", held=True)
    asked = start(cache.get_or_load, "k", early)
    while early_s and not early.loads:
        assert not asked.done()
    assert [one.get_or_load("k", NEVER) for one in (cache, other) * 2] == ["old"] * 4
    early.release()
    assert finished([asked]) == ["new" if early_s else "old"]
    assert make_cache().get_or_load("k", NEVER) == ("new" if early_s else "old")


def test_counts_are_exact(make_cache: MakeCache, tier: str, clock: Any) -> None:
    cache, down = make_cache(max_entries=3), Source(SourceDown())

    def slow(*_: object) -> Any:
        clock.now += 0.25
        return {"a": 1, "b": 2}

    for _ in range(4):
        cache.get_or_load("x", slow)  # 1 miss, 3 hits
    cache.get_many(["x", "a", "b", "nowhere"], slow)  # 1 hit, 3 misses in one load, 1 evicted
    cache.get_many(["not stored", "a"])  # 1 hit, 1 miss
    for _ in range(10):  # an error is a miss
        with pytest.raises(SourceDown):
            cache.get_or_load("down", down)
    stats = {"l1_hits": 5, "l1_misses": 15, "misses": 15, "loads": 2, "load_seconds": 0.5}
    expected = dict.fromkeys(app.COUNTED, 0) | stats | {"load_errors": 10, "evictions": 1}
    assert {name: cache.stats()[name] for name in app.COUNTED} == expected
    if tier == "redis":
        (other := make_cache(l1_ttl_s=5)).get_many(["x", "a", "b"])
        clock.now += 6
        other.get_or_load("a", NEVER)
        assert [other.stats()[n] for n in ("l1_hits", "l1_misses", "l2_hits")] == [0, 4, 4]


@pytest.mark.parametrize("case", [("v", 300), ("v", 0), (None, 300)])
def test_stale_if_error(make_cache: MakeCache, tier: str, clock: Any, case: Any) -> None:
    (value, stale_s), source = case, Source(case[0], SourceDown("no"))
    is_served = value == "v" and stale_s
    caches = [make_cache(stale_if_error_s=stale_s) for _ in range(2 if tier == "redis" else 1)]
    caches[0].get_or_load("k", source)
    clock.now += 60 + stale_s - A_BIT if is_served else 60
    for cache in caches if is_served else []:  # another process has it, too
        assert cache.get_or_load("k", source) == "v"
        assert (cache.stats()["stale_served"], cache.stats()["load_errors"]) == (1, 1)
    clock.now += 2 * A_BIT
    for cache in caches:
        with pytest.raises(SourceDown):
            cache.get_or_load("k", source)
        assert cache.get_many(["k"]) == {}


@pytest.mark.parametrize("gone", [False, True], ids=["invalidated", "gone from Redis"])
def test_what_is_gone_never_stands_in(make_cache: Any, tier: str, clock: Any, gone: bool) -> None:
    cache, source = make_cache(l1_ttl_s=5), Source("old", SourceDown("no"), 7)
    cache.get_or_load("k", source, tags=["t"])
    if gone and tier == "redis":
        cache.client.unlink(cache.name("k"))
    else:
        cache.invalidate(tags=["t"])
    clock.now += 5 + A_BIT  # Redis is asked, and has none: so the copy is not served
    with pytest.raises(SourceDown):
        cache.get_or_load("k", source)
    assert cache.get_or_load("k", source) == 7  # and no error is kept


def test_a_tag_takes_its_own_values_along(make_cache: MakeCache, tier: str) -> None:
    here = make_cache()
    there = make_cache(l1_ttl_s=0) if tier == "redis" else here
    tagged = {"a": ["x"], "b": ["x", "y"], "c": ("y",), "d": [], "e": {"long " * 100}}
    kept = {key: here.get_or_load(key, Source(key), tags=tags) for key, tags in tagged.items()}
    for tag, *gone in (["never used"], ["x", "a", "b"], ["long " * 100, "e"]):
        assert here.invalidate(tags=[tag])
        kept = {key: key for key in kept if key not in gone}
        assert here.get_many(list(tagged)) == there.get_many(list(tagged)) == kept
    source = Source("new", "newer")  # and serves anew; also who names no tags is told
    assert [here.get_or_load("a", source, tags=["x"]) for _ in range(2)] == ["new"] * 2
    assert there.get_or_load("a", source) == "new"
    here.invalidate(tags=["x"])
    assert there.get_or_load("a", source) == "newer"


@on_redis
def test_a_tag_without_a_token_is_a_miss_and_no_error(make_cache: MakeCache) -> None:
    make_cache().get_or_load("k", Source("old"), tags=["one", "two"])
    cache = make_cache()
    tag = cache.name("two", "tag")
    cache.client.unlink(tag)  # as by the end of its TTL
    assert (cache.get_many(["k"]), cache.get_or_load("k", Source("new"))) == ({}, "new")
    assert make_cache().get_or_load("k", NEVER) == "new"
    cache.client.lpush(tag, "as where another process drops the tag between SET and MGET")
    cache.client.expire(tag, 60)
    for cache in (make_cache(), make_cache()):
        assert cache.get_or_load("other", Source("v"), tags=["two"]) == "v"
        assert cache.stats()["loads"] == 1


NASTY = ["", "k", "K", "k:lease", "k}:lease", "{k}", "k}", "}", "{", "a b", "a\nb", "é", "e\u0301",
         "value:k", "x:value:{k", "k" * 200, "k" * 201, "k" * 10_000, "k" * 9_999 + "j", "#", "#k",
         "\u4e2d" * 201, "\x00", "*"]  # fmt: skip


def test_no_two_keys_share_a_name(make_cache: MakeCache) -> None:
    cache = make_cache(max_entries=len(NASTY))
    found = {key: cache.get_or_load(key, Source(number)) for number, key in enumerate(NASTY)}
    assert [cache.get_many(NASTY), list(found.values())] == [found, list(range(len(NASTY)))]
    caches = [app.TieredCache(name) for name in ("a", "a:value", "a:value:x", "value", "a:tag")]
    hashes = {name.partition("{")[2][:-1] for name in map(caches[0].name, NASTY) if "#" in name}
    keys = {*NASTY, *hashes, *(f"{one}:lease" for one in NASTY)}
    names = [cache.name(key, kind) for cache in caches for key in keys for kind in ("value", "tag")]
    assert len({*names, *(f"{name}:lease" for name in names)}) == 2 * len(names)
    assert max(map(len, names)) < 250
    for namespace in ("", "a{b", "a}", "a*", "a b", "a\nb"):
        with pytest.raises(ValueError, match="namespace"):
            app.TieredCache(namespace)


@pytest.mark.parametrize("key", [None, 1, True, b"k", ("k",), "\ud800", "\ud800" * 201], ids=ascii)
def test_what_no_key_can_be_is_refused(make_cache: MakeCache, clock: Any, key: Any) -> None:
    cache, source = make_cache(), Source("v")
    calls: list[Callable[[], object]] = [
        lambda: cache.get_or_load(key, source),
        lambda: cache.get_or_load("k", source, tags=[key]),
        lambda: cache.get_many(["good", key], source),
        lambda: cache.invalidate(key),
        lambda: cache.invalidate("good", tags=[key]),
    ]
    for failures in (0, 3):
        for _ in range(failures):
            cache.breaker.failure()
        for call in calls:
            with pytest.raises(ValueError if isinstance(key, str) else TypeError):
                call()
    clock.now += 1  # Redis is back: nothing that it cannot do waits for it
    assert (source.loads, cache.get_or_load("good", source)) == (0, "v")


UNCACHEABLE = [
    (1, 2), {"a": [(1,)]}, {1: "a"}, math.nan, [-math.inf], {1}, b"a", Decimal("1.10"), 1j, 2**70,
    datetime(2026, 1, 1, tzinfo=UTC), Enum("Colour", ["RED"])(1), "\ud800",
    make_dataclass("Point", ["x"])(1),
]  # fmt: skip


@pytest.mark.parametrize("value", UNCACHEABLE, ids=ascii)
def test_what_json_would_change_is_returned_and_not_cached(
    make_cache: MakeCache, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    cache, source, many = make_cache(), Source(value), Source({"good": 1, "bad": value})
    assert all(cache.get_or_load("k", source) is value for _ in range(3))
    assert cache.get_many(["good", "bad"], many)["bad"] is value
    assert cache.get_many(["good", "bad", "k"]) == {"good": 1}
    assert (source.loads, cache.stats()["uncacheable"]) == (3, 4)
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert type(value).__name__ in told


@on_redis
@pytest.mark.parametrize("ask", ["get_or_load", "get_many"])
def test_what_a_stranger_left_is_a_miss_and_is_replaced(make_cache: MakeCache, ask: str) -> None:
    cache = make_cache()
    cache.get_or_load("k", Source("old"))
    name = cache.name("k")
    fields, ours = json.loads(raw := cache.client.get(name)), len(raw)
    wrong: list[Any] = [None, [], "a", ["tag"], {"tag": 5}, {"tag": None}]
    changed = [[*fields[:i], bad, *fields[i + 1 :]] for i in range(4) for bad in wrong]
    changed += [fields[:-1], [*fields, 1], [fields[0] - 1, *fields[1:]], [9, *fields[1:]]]
    texts = [json.dumps(one).encode() for one in changed]
    texts += [raw[:cut] for cut in (0, 1, ours - 4, ours - 1)]
    texts += [b"\x80\x04K\x01.", b"\xff\xfe", b"null", b"{}", b"[1]", b'"12345"', b"[" * 5_000]
    for text in texts:
        cache.client.set(name, text, px=60_000)
        reader = make_cache()
        if ask == "get_or_load":
            assert reader.get_or_load("k", Source("new")) == "new", text
        else:
            assert reader.get_many(["k"], Source({"k": "new"})) == {"k": "new"}, text
        assert reader.stats()["undecodable"] or b"tag" in text  # or as of another token
        assert make_cache().get_or_load("k", NEVER) == "new", text
    cache.client.unlink(name)
    cache.client.lpush(name, "a list: as if nothing were there")
    assert [make_cache().get_or_load("k", Source("new")) for _ in range(2)] == ["new"] * 2


# f and s: a call fails or succeeds; w and h: a second passes, or half of one; + and -: the next
# call is allowed or not.
BREAKER_TALES = {
    "closed below the limit": "+f+f+", "opened by the third": "ff+f-", "not in a row": "ffsff+",
    "open for a second": "fffh-h+", "one probe at a time": "fffw+---",
    "a probe's success closes": "fffw+s++ff+", "a probe's failure opens anew": "fffw+f-h-h+",
    "a probe that never reports": "fffw+-w+-s+",
}  # fmt: skip


@pytest.mark.parametrize("tale", BREAKER_TALES.values(), ids=list(BREAKER_TALES))
def test_the_breaker_follows_its_table(tale: str) -> None:
    breaker = app.CircuitBreaker(3, 1.0, clock := app.ManualClock())
    for at, event in enumerate(tale):
        if event in "fs":
            breaker.failure() if event == "f" else breaker.success()
        elif event in "wh":
            clock.now += 1 if event == "w" else 0.5
        else:
            assert breaker.allow() is (event == "+"), tale[: at + 1]
    assert breaker.opened == ("fff" in tale.replace("+", ""))


def test_prometheus_reads_every_count(make_cache: MakeCache) -> None:
    cache = make_cache(max_entries=2)
    for key in "aabcda":
        cache.get_or_load(key, Source(key))
    counts = {f"cache_{what}_total": cache.stats()[what] for what in app.COUNTED}
    assert counts["cache_evictions_total"] == 3
    for name in ("shop", 'a "quoted" one', "back\\slash\\n", "two\nlines", "é"):
        families = list(text_string_to_metric_families(app.prometheus(name, cache)))
        samples = [sample for family in families for sample in family.samples]
        assert {family.type for family in families} == {"counter"}
        assert [sample.labels for sample in samples] == [{"cache": name}] * len(counts)
        assert {sample.name: sample.value for sample in samples} == counts
