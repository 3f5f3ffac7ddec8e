"""The caches of script 03: each rule, held against an oracle that is not the cache.

A dict and a clock moved by hand for the in-process tier, Python's own JSON values for the bytes,
redis-py's slots for the keys, prometheus_client for the metrics. Through `make_cache` the rules of
reading through are tested on both kinds of cache, each alone and on Redis.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import math
import random
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any

import pytest
import redis
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client.parser import text_string_to_metric_families
from redis.crc import key_slot
from running import until
from script03 import (
    CALLERS,
    WAIT_S,
    Driver,
    MakeCache,
    Source,
    SourceDown,
    alone,
    asynchronous,
    finished,
    on_redis,
    synchronous,
)
from services import load_script

app: Any = load_script("03_caching_strategies")

MISSING = app.MISSING
PURE = settings(deadline=None, database=None)
A_BIT = 0.001  # seconds of the clock that is moved by hand
BAD_TTLS = [0, -1, -0.5, math.inf, -math.inf, math.nan, "5"]
NOW = app.ManualClock().now
# Nothing of ours, though NOW would make some of it fresh.
NO_BYTES_OF_OURS = {
    "nothing": b"",
    "a pickle": b"\x80\x04K\x01.",
    "no text": b"\xff\xfe",
    "null": b"null",
    "an object": b"{}",
    "a list": b"[1]",
    "text of six": b'"123456"',
    "cut short": b'[1,NOW,60,0,{},"trunc',
    "an older schema": b"[0,NOW,60,0,{},7]",
    "a newer schema": b"[2,NOW,60,0,{},7]",
    "no schema": b"[null,NOW,60,0,{},7]",
    "too long": b"[1,NOW,60,0,{},7,8]",
    "a TTL that is no number": b"[1,NOW,null,0,{},7]",
    "texts for numbers": b'[1,"a","b","c",{},7]',
    "lists for numbers": b"[1,[],[],[],{},7]",
    "a delta that is no number": b'[1,NOW,60,"0",{},7]',
    "stamps in a list": b'[1,NOW,60,0,["tag"],7]',
    "no stamps": b"[1,NOW,60,0,null,7]",
    "a stamp that is a number": b'[1,NOW,60,0,{"tag":5},7]',
    "a stamp that is null": b'[1,NOW,60,0,{"tag":null},7]',
}
NO_BYTES_OF_OURS = {
    what: raw.replace(b"NOW", str(NOW).encode()) for what, raw in NO_BYTES_OF_OURS.items()
}

# ── TTLCache ────────────────────────────────────────────────────────────────────────


class TTLCacheMachine(RuleBasedStateMachine):
    """Against an OrderedDict of (value, fresh until, expires at), the most recently used last."""

    LIMIT = 3
    keys = st.integers(0, 4)  # few, and short times: so that what seldom happens does

    def __init__(self) -> None:
        super().__init__()
        self.clock = app.ManualClock(0)
        self.cache = app.TTLCache(self.LIMIT, clock=self.clock)
        self.model: OrderedDict[int, tuple[int, float, float]] = OrderedDict()
        self.counts = dict.fromkeys(("hits", "misses", "evictions", "expirations"), 0)
        self.values = itertools.count()

    def drop_expired(self) -> int:
        expired = [key for key, (*_, end) in self.model.items() if end <= self.clock.now]
        for key in expired:
            del self.model[key]
        self.counts["expirations"] += len(expired)
        return len(expired)

    @rule(key=keys, ttl_s=st.integers(1, 4), stale_s=st.sampled_from([0, 0, 2]))
    def set(self, key: int, ttl_s: int, stale_s: int) -> None:
        value, end = next(self.values), self.clock.now + ttl_s
        self.cache.set(key, value, ttl_s, stale_s=stale_s)
        self.model[key] = value, end, end + stale_s
        self.model.move_to_end(key)
        if len(self.model) > self.LIMIT:
            self.drop_expired()
        while len(self.model) > self.LIMIT:
            self.model.popitem(last=False)
            self.counts["evictions"] += 1

    @rule(key=keys)
    def get(self, key: int) -> None:
        value, end, _ = self.model.get(key, (None, -1, -1))
        if end > self.clock.now:
            self.model.move_to_end(key)
            self.counts["hits"] += 1
            assert self.cache.get(key) == value
        else:
            self.counts["misses"] += 1
            assert self.cache.get(key, "default") == "default"

    @rule(key=keys)
    def delete(self, key: int) -> None:
        assert self.cache.delete(key) is (self.model.pop(key, None) is not None)

    @rule(seconds=st.integers(1, 2))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def purge(self) -> None:
        assert self.cache.purge() == self.drop_expired()

    @precondition(lambda self: len(self.model) == self.LIMIT)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert len(self.cache) == len(self.model) <= self.LIMIT
        for key in range(5):
            value, _, end = self.model.get(key, (None, -1, -1))
            entry = self.cache.stale(key)
            assert (entry and entry.value) == (value if end > self.clock.now else None)

    @invariant()
    def counts_exactly(self) -> None:
        counted = {name: getattr(self.cache, name).value() for name in self.counts}
        assert counted == self.counts


TTLCacheMachine.TestCase.settings = settings(PURE, max_examples=200, stateful_step_count=50)
TestTTLCache = TTLCacheMachine.TestCase


@pytest.mark.parametrize("ttl_s", BAD_TTLS)
def test_an_entry_needs_a_ttl_above_0(ttl_s: Any) -> None:
    cache = app.TTLCache(2)
    with pytest.raises(ValueError, match="ttl_s"):
        cache.set("k", 1, ttl_s)
    assert len(cache) == 0


@pytest.mark.parametrize("max_entries", [0, -1])
def test_a_cache_holds_at_least_one_entry(max_entries: int) -> None:
    with pytest.raises(ValueError, match="max_entries"):
        app.TTLCache(max_entries)


@pytest.mark.parametrize("value", [None, 0, "", False])
def test_a_falsy_value_is_no_miss(value: object) -> None:
    cache = app.TTLCache(2)
    cache.set("k", value, 60)
    assert cache.get("k", "default") is value
    assert cache.get("other") is MISSING


def test_only_what_carries_the_tag_is_dropped() -> None:
    cache = app.TTLCache(10)
    for key, tags in (("a", {"x"}), ("b", {"x", "y"}), ("c", {"y"}), ("d", set())):
        entry = app.Entry(key, math.inf, math.inf, tags=frozenset(tags))
        cache.put([(key, entry)])
    assert cache.delete_tagged("x") == 2
    assert [key for key in "abcd" if cache.get(key) is not MISSING] == ["c", "d"]


@contextmanager
def eager_threads() -> Iterator[None]:
    """Threads take turns about as often as they can: a race that exists is met."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(i)` in as many threads, which begin together."""
    barrier = threading.Barrier(count)

    def begin(i: int) -> Any:
        barrier.wait(WAIT_S)
        return work(i)

    with ThreadPoolExecutor(count) as pool, eager_threads():
        return list(pool.map(begin, range(count)))


def test_eight_threads_lose_no_count_and_exceed_no_limit() -> None:
    limit, steps, threads = 50, 2_000, 8
    cache = app.TTLCache(limit)

    def work(thread: int) -> tuple[int, int, int, int]:
        rng, hits, deleted, longest = random.Random(thread), 0, 0, 0
        for step in range(steps):
            cache.set((thread, step), step, 60)
            hits += cache.get((rng.randrange(threads), step - rng.randrange(5))) is not MISSING
            deleted += cache.delete((rng.randrange(threads), step - rng.randrange(9)))
            longest = max(longest, len(cache))
        return hits, deleted, longest, steps

    hits, deleted, longest, stored = zip(*in_threads(threads, work), strict=True)
    assert cache.hits.value() == sum(hits)
    assert cache.misses.value() == threads * steps - sum(hits)
    assert sum(stored) - cache.evictions.value() - sum(deleted) == len(cache) <= limit
    assert max(longest) <= limit + 1  # the one that is being put in


class ReadMeanwhile:
    """An Entry, or a tag; when the cache looks at it, another thread reads the oldest entry.

    Reading takes no lock, so this thread can stand for the other one.
    """

    value, fresh_until, tags = "v", math.inf, frozenset[str]()

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def _read(self) -> None:
        self._cache.get(next(iter(self._cache._entries), None))

    @property
    def expires_at(self) -> float:
        self._read()
        return math.inf

    def __hash__(self) -> int:
        self._read()
        return 1


# An OrderedDict whose entry is moved raises RuntimeError in whoever iterates over it.
def test_a_reader_does_not_break_who_drops_a_tag() -> None:
    cache = app.TTLCache(10)
    for key in range(10):
        cache.set(key, key, 60)
    assert cache.delete_tagged(ReadMeanwhile(cache)) == 0


def test_a_reader_does_not_break_who_overwrites() -> None:
    cache = app.TTLCache(10)
    for key in range(1_000):
        cache.put([(key % 10, ReadMeanwhile(cache))])
    assert len(cache) == 10


@pytest.mark.parametrize("deletes", [False, True])
def test_endless_writing_needs_no_endless_memory(deletes: bool) -> None:
    limit = 20
    cache = app.TTLCache(limit)
    longest = 0
    for step in range(5_000):
        cache.set(step % limit, step, 1_000)
        if deletes:
            cache.delete(step % limit)
        sizes = (len(held) for held in vars(cache).values() if hasattr(held, "__len__"))
        longest = max(longest, *sizes)
    assert longest <= 10 * limit


# ── CircuitBreaker ──────────────────────────────────────────────────────────────────

# f and s: a call fails or succeeds; w and h: a second passes, or half of one; + and -: the next
# call is allowed or not.
BREAKER_TALES = {
    "closed at first": ("+", "closed"),
    "closed below the limit": ("+f+f+", "closed"),
    "opened by the third in a row": ("+f+f+f-", "open"),
    "failures not in a row": ("+f+f+s+f+f+", "closed"),
    "open until a second has passed": ("fff-w+", "half-open"),
    "one probe at a time": ("fffw+---", "half-open"),
    "a probe's success closes": ("fffw+s++f+f+", "closed"),
    "a probe's failure opens anew": ("fffw+f-", "open"),
    "and for a whole second": ("fffw+f-w+s+", "closed"),
    "a success of a call from before does not close": ("fffs-", "open"),
    "nor after the wait, without a probe": ("fffws+-", "half-open"),
    "a failure of a call from before does not put the probe off": ("fffhf-h+", "half-open"),
    "a probe that never reports: another a second later": ("fffw+-w+-", "half-open"),
    "whose success closes": ("fffw+w+s+", "closed"),
}


@pytest.mark.parametrize(("tale", "state"), BREAKER_TALES.values(), ids=list(BREAKER_TALES))
def test_the_breaker_follows_its_table(tale: str, state: str) -> None:
    clock = app.ManualClock()
    breaker = app.CircuitBreaker(3, 1.0, clock)
    for at, event in enumerate(tale):
        match event:
            case "f":
                breaker.failure()
            case "s":
                breaker.success()
            case "w" | "h":
                clock.advance(1 if event == "w" else 0.5)
            case _:
                assert breaker.allow() is (event == "+"), f"at {tale[: at + 1]}"
    assert breaker.state == state
    assert breaker.short_circuited.value() == tale.count("-")


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_breaker_opens_at_its_own_limit_and_counts_it(limit: int) -> None:
    clock = app.ManualClock()
    breaker = app.CircuitBreaker(limit, 10.0, clock)
    allowed = 0
    while breaker.allow() and allowed < 9:
        allowed += 1
        breaker.failure()
    assert (allowed, breaker.opened.value()) == (limit, 1)
    clock.advance(10 - A_BIT)
    assert not breaker.allow()
    clock.advance(2 * A_BIT)
    assert breaker.allow()
    breaker.failure()  # of the probe: it was open all the time
    assert breaker.opened.value() == 1


def test_of_many_threads_one_probes() -> None:
    clock = app.ManualClock()
    breaker = app.CircuitBreaker(1, 1.0, clock)
    breaker.failure()
    clock.advance(1)
    assert sum(in_threads(8, lambda _: breaker.allow())) == 1


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"reset_after_s": 0}, {"reset_after_s": -1}])
def test_the_breaker_refuses_senseless_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        app.CircuitBreaker(**wrong)


# ── pack and unpack ─────────────────────────────────────────────────────────────────

numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
)


def envelope(value: object, **changes: Any) -> Any:
    return app.Envelope(app.SCHEMA, 5.5, 60.0, 0.25, {"t": "1"}, value)._replace(**changes)


def is_same(one: object, other: object) -> bool:
    """Equal, and of one type all the way down: 1 is neither 1.0 nor True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(map(is_same, one.values(), other.values()))
    return repr(one) == repr(other)


@PURE
@given(json_values)
def test_json_values_come_back_as_they_were(value: object) -> None:
    packed, as_read = app.pack(envelope(value))
    assert isinstance(packed, bytes)
    assert is_same(as_read, value)
    found = app.unpack(packed)
    assert is_same(found.value, value)
    assert found._replace(value=None) == envelope(None)
    assert is_same(json.loads(packed)[-1], value)  # Python's own reader agrees


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int = 1


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


UNCACHEABLE = {
    "tuple": (1, 2),
    "tuple within": {"a": [(1,)]},
    "int key": {1: "a"},
    "None key": {None: 1},
    "nan": math.nan,
    "inf": [-math.inf],
    "nan within": {"a": [math.nan]},
    "set": {1},
    "frozenset": frozenset("a"),
    "bytes": b"a",
    "decimal": Decimal("1.10"),
    "datetime": datetime(2026, 1, 1, tzinfo=UTC),
    "date": date(2026, 1, 1),
    "uuid": uuid.UUID(int=1),
    "enum": Colour.RED,
    "dataclass": Point(),
    "complex": 1j,
    "object": object(),
    "function": print,
    "sentinel": MISSING,
    "surrogate": "\ud800",
    "surrogate key": {"\ud800": 1},
    "2**70": 2**70,
    "-2**70": [-(2**70)],
    "deep": nested(5_000),
    "recursive": endless(),
}


@pytest.mark.parametrize("value", UNCACHEABLE.values(), ids=list(UNCACHEABLE))
def test_what_json_would_change_is_uncacheable(value: object) -> None:
    with pytest.raises(app.Uncacheable):
        app.pack(envelope(value))


@pytest.mark.parametrize("raw", NO_BYTES_OF_OURS.values(), ids=list(NO_BYTES_OF_OURS))
def test_foreign_bytes_are_undecodable(raw: bytes) -> None:
    with pytest.raises(app.Undecodable):
        app.unpack(raw)


def check_unpack(raw: bytes) -> None:
    """Undecodable, or an envelope that can be worked with."""
    try:
        found = app.unpack(raw)
    except app.Undecodable:
        return
    assert found.schema == app.SCHEMA
    assert all(isinstance(number, int | float) for number in found[1:4])
    assert all(isinstance(stamp, str) for stamp in found.stamps.values())


@PURE
@given(st.binary())
def test_any_bytes_are_undecodable_or_an_envelope(raw: bytes) -> None:
    check_unpack(raw)


@settings(PURE, max_examples=100)
@given(
    st.tuples(
        st.just(app.SCHEMA) | json_values,
        *[st.floats(0, 9) | json_values] * 3,
        st.dictionaries(texts, texts | json_values) | json_values,
        json_values,
    )
)
def test_any_json_is_undecodable_or_an_envelope(parts: tuple[Any, ...]) -> None:
    check_unpack(json.dumps(parts).encode())


@PURE
@given(st.data())
def test_bytes_cut_short_are_undecodable(data: st.DataObject) -> None:
    packed, _ = app.pack(envelope({"a": [1, "two"]}))
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(app.Undecodable):
        app.unpack(packed[:cut])


# ── Keys ────────────────────────────────────────────────────────────────────────────

any_key = st.text(st.characters(), min_size=1) | st.text("{}:*\n a", min_size=1)


@PURE
@given(any_key)
def test_a_value_and_its_lease_share_a_slot_and_name_their_cache(key: str) -> None:
    keys = app.Keys("shop", 3)
    value, tag = keys.value(key), keys.tag(key)
    lease = keys.lease(value)
    assert len({value, tag, lease}) == 3
    assert all(name.startswith("shop:v3:") for name in (value, tag, lease))
    assert key_slot(value.encode()) == key_slot(lease.encode())
    assert len(value.encode()) <= app.MAX_KEY_BYTES + len("shop:v3:value:{}")
    assert value.isprintable()


@PURE
@given(any_key, any_key)
def test_no_two_keys_have_one_name(one: str, other: str) -> None:
    assume(one != other)
    keys = app.Keys("shop", 1)
    assert keys.value(one) != keys.value(other)


@pytest.mark.parametrize("key", ["k" * 10_000, "{user}", "two\nlines", "\ud800"])
def test_a_key_that_was_hashed_shares_its_name_with_none(key: str) -> None:
    # Else whoever chooses keys could read and replace the value of another.
    keys = app.Keys("shop", 1)
    name = keys.value(key)
    shown = name.partition("{")[2].rpartition("}")[0]
    assert shown != key
    assert keys.value(shown) != name


def test_a_key_of_10_kb_is_hashed_and_a_readable_one_is_not() -> None:
    keys = app.Keys("shop", 1)
    assert len(keys.value("k" * 10_000)) < 100
    assert "user:7" in keys.value("user:7")
    assert keys.value("k" * 10_000) != keys.value("k" * 9_999 + "j")


@pytest.mark.parametrize("key", ["", None, 1, True, b"k", 1.5, ("k",)])
def test_a_key_is_a_string_with_something_in_it(key: Any) -> None:
    keys = app.Keys("shop", 1)
    for name in (keys.value, keys.tag):
        with pytest.raises(ValueError, match="string"):
            name(key)


@pytest.mark.parametrize("namespace", ["", "a{b", "a}", "a*", "a b", "a\nb"])
def test_a_namespace_has_no_braces_and_blanks(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        app.Keys(namespace, 1)


def test_namespaces_and_versions_share_no_name() -> None:
    names = {
        app.Keys(namespace, version).value(key)
        for namespace in ("a", "a:v1", "a:v1:value:")
        for version in (1, 2, 11)
        for key in ("k", "1:k", "v1:value:k")
    }
    assert len(names) == 27


# ── Reading through, by either kind of cache ────────────────────────────────────────


@pytest.mark.parametrize("value", [None, 0, "", False, 0.0, [], {}], ids=repr)
def test_a_falsy_value_is_loaded_once(make_cache: MakeCache, tier: str, value: object) -> None:
    cache, source = make_cache(), Source(value)
    assert is_same(cache.get_or_load("k", source), value)
    assert is_same(cache.get_or_load("k", source), value)
    assert is_same(cache.get("k", "default"), value)
    assert cache.get_many(["k"]) == {"k": value}
    if tier == "redis":
        assert is_same(make_cache().get_or_load("k", source), value)
    assert source.loads == 1


def test_tiers_answer_in_their_order(make_cache: MakeCache, tier: str, clock: Any) -> None:
    cache, source = make_cache(l1_ttl_s=5), Source("v")
    assert cache.fetch("k", source)[:4] == ("v", "loader", 0.0, False)
    clock.advance(4)
    assert cache.fetch("k", source)[:4] == ("v", "L1", 4.0, False)
    clock.advance(2)
    assert cache.fetch("k", source).tier == ("L2" if tier == "redis" else "L1")
    assert cache.fetch("k", source).tier == "L1"
    assert source.loads == cache.stats.loads == 1
    assert cache.stats.l2_hits == (1 if tier == "redis" else 0)


@pytest.mark.parametrize("ttl_s", BAD_TTLS)
def test_a_ttl_is_a_number_above_0(make_cache: MakeCache, ttl_s: Any) -> None:
    cache, source = make_cache(), Source({"k": 1})
    for ask in (
        partial(cache.get_or_load, "k", source),
        partial(cache.get_many, ["k"], source),
        partial(cache.set, "k", 1),
    ):
        with pytest.raises(ValueError, match="ttl_s"):
            ask(ttl_s=ttl_s)
    assert source.loads == 0
    assert cache.get("k") is MISSING


@pytest.mark.parametrize(
    "wrong",
    [
        *({"ttl_s": ttl_s} for ttl_s in BAD_TTLS),
        *({name: 0} for name in ("negative_ttl_s", "lease_s", "load_timeout_s")),
        *({name: -1} for name in ("beta", "error_ttl_s", "l1_ttl_s", "stale_if_error_s")),
        *({"jitter": share} for share in (-0.1, 1, math.nan)),
        {"stale_while_revalidate_s": math.inf},
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        app.Policy(**wrong)


@pytest.mark.parametrize("key", ["", None, 7])
def test_a_bad_key_is_refused_and_not_loaded(make_cache: MakeCache, key: Any) -> None:
    cache, source = make_cache(), Source(1)
    for ask in (
        partial(cache.get_or_load, key, source),
        partial(cache.set, key, 1),
        partial(cache.get, key),
        partial(cache.invalidate, key),
        partial(cache.get_many, ["good", key]),
        partial(cache.invalidate_tag, key),
    ):
        with pytest.raises(ValueError, match="key"):
            ask()
    assert source.loads == 0


def test_a_key_of_10_kb_is_as_good_as_any(make_cache: MakeCache) -> None:
    cache, source, long = make_cache(), Source("v"), "é" * 5_000
    assert cache.get_or_load(long, source) == cache.get(long) == "v"
    assert cache.get(long + "x") is MISSING
    cache.invalidate(long)
    assert cache.get(long) is MISSING


@pytest.mark.parametrize(("call_ttl_s", "life_s"), [(None, 60), (7, 7), (0.5, 0.5), (600, 600)])
def test_a_value_lives_for_its_ttl(
    make_cache: MakeCache, clock: Any, call_ttl_s: float | None, life_s: float
) -> None:
    cache, source = make_cache(ttl_s=60), Source("old", "new")
    cache.get_or_load("k", source, call_ttl_s)
    cache.set("set", "old", call_ttl_s)
    clock.advance(life_s - A_BIT)
    assert cache.get_or_load("k", source) == cache.get("set") == "old"
    clock.advance(2 * A_BIT)
    assert cache.get("k") is cache.get("set") is MISSING
    assert cache.get_or_load("k", source) == "new"


@pytest.mark.parametrize(("ttl_s", "life_s"), [(60, 5), (2, 2)])
def test_none_lives_for_the_negative_ttl_at_most(
    make_cache: MakeCache, clock: Any, ttl_s: float, life_s: float
) -> None:
    cache, source = make_cache(negative_ttl_s=5), Source(None)
    cache.get_or_load("k", source, ttl_s)
    cache.set("set", None, ttl_s)
    clock.advance(life_s - A_BIT)
    assert cache.get_or_load("k", source) is None
    assert cache.get("set") is None
    assert source.loads == 1
    clock.advance(2 * A_BIT)
    assert cache.get("k") is cache.get("set") is MISSING


@pytest.mark.parametrize("value", [0, "", False, [], {}], ids=repr)
def test_no_other_value_counts_as_none(make_cache: MakeCache, clock: Any, value: object) -> None:
    cache = make_cache(ttl_s=60, negative_ttl_s=5)
    cache.get_or_load("k", Source(value))
    clock.advance(60 - A_BIT)
    assert is_same(cache.get("k"), value)


@alone
def test_none_is_not_served_stale(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(negative_ttl_s=5, stale_if_error_s=300)
    cache.get_or_load("k", Source(None))
    clock.advance(5 + A_BIT)
    with pytest.raises(SourceDown):
        cache.get_or_load("k", Source(SourceDown("no")))


@on_redis
@pytest.mark.parametrize(("value", "life_s"), [("v", 60 + 300), (None, 5)])
def test_redis_keeps_a_value_as_long_as_it_may_be_served(
    make_cache: MakeCache, client: redis.Redis, value: object, life_s: int
) -> None:
    cache = make_cache(ttl_s=60, negative_ttl_s=5, stale_if_error_s=300)
    cache.get_or_load("loaded", Source(value))
    cache.set("set", value)
    cache.get_many(["many"], Source({"many": value}))
    for key in ("loaded", "set", "many"):
        assert (life_s - 4) * 1000 < client.pttl(cache.cache.keys.value(key)) <= life_s * 1000


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.999])
def test_jitter_shortens_a_ttl_by_what_is_drawn_of_its_share(
    make_cache: MakeCache, clock: Any, drawn: float
) -> None:
    cache = make_cache(jitter=0.4, beta=0, rng=lambda: drawn)
    cache.get_or_load("k", Source("v"), 100)
    cache.set("set", "v", 100)
    cache.get_many(["many"], Source({"many": "v"}), 100)
    clock.advance(100 * (1 - 0.4 * drawn) - A_BIT)
    assert cache.get_many(["k", "set", "many"]) == dict.fromkeys(("k", "set", "many"), "v")
    clock.advance(2 * A_BIT)
    assert cache.get_many(["k", "set", "many"]) == {}


@pytest.mark.parametrize("jitter", [0.1, 0.5])
def test_jitter_spreads_the_ends_within_its_share(
    make_cache: MakeCache, clock: Any, jitter: float
) -> None:
    cache = make_cache(jitter=jitter, beta=0, rng=random.Random(8).random)
    keys = [f"k{i}" for i in range(300)]
    cache.get_many(keys, Source(dict.fromkeys(keys, 1)), 1_000)
    clock.advance(1_000 * (1 - jitter) - A_BIT)
    assert len(cache.get_many(keys)) == 300
    clock.advance(1_000 * jitter / 2)
    assert 100 < len(cache.get_many(keys)) < 200
    clock.advance(1_000 * jitter / 2 + A_BIT)
    assert cache.get_many(keys) == {}


# ── Errors ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [SourceDown("no"), KeyError("k"), TimeoutError(), OSError(5)])
def test_an_error_reaches_the_caller_and_is_not_cached(
    make_cache: MakeCache, error: Exception
) -> None:
    cache, source = make_cache(), Source(error, 7)
    with pytest.raises(type(error)) as caught:
        cache.get_or_load("k", source)
    assert str(caught.value) == str(error)
    assert cache.get("k") is MISSING
    assert cache.get_or_load("k", source) == 7
    assert (cache.stats.loads, cache.stats.load_errors) == (2, 1)


def test_an_error_is_answered_again_for_its_ttl(make_cache: MakeCache, clock: Any) -> None:
    cache, source = make_cache(error_ttl_s=2), Source(SourceDown("no"))
    for _ in range(3):
        with pytest.raises(SourceDown, match="no"):
            cache.get_or_load("k", source)
    clock.advance(2 - A_BIT)
    with pytest.raises(SourceDown):
        cache.get_or_load("k", source)
    assert source.loads == 1
    clock.advance(2 * A_BIT)
    assert cache.get_or_load("k", Source(7)) == 7


@pytest.mark.parametrize("act", ["invalidate", "set"])
def test_who_writes_ends_a_cached_error(make_cache: MakeCache, clock: Any, act: str) -> None:
    cache = make_cache(error_ttl_s=60)
    with pytest.raises(SourceDown):
        cache.get_or_load("k", Source(SourceDown("no")))
    if act == "set":
        cache.set("k", 7)
    else:
        cache.invalidate("k")
    assert cache.get_or_load("k", Source(7)) == 7


def test_a_stale_value_stands_in_for_an_error_until_its_end(
    make_cache: MakeCache, clock: Any
) -> None:
    cache = make_cache(ttl_s=60, stale_if_error_s=300)
    source = Source("v", SourceDown("no"))
    cache.get_or_load("k", source)
    clock.advance(60 + 300 - A_BIT)
    value, _, age_s, is_stale, *_ = cache.fetch("k", source)
    assert (value, is_stale) == ("v", True)
    assert age_s == pytest.approx(360 - A_BIT)
    assert (cache.stats.stale_served, cache.stats.load_errors, source.loads) == (1, 1, 2)
    clock.advance(2 * A_BIT)
    with pytest.raises(SourceDown):
        cache.fetch("k", source)


def test_without_an_error_nothing_stale_is_served(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(ttl_s=60, stale_if_error_s=300)
    source = Source("old", "new")
    cache.get_or_load("k", source)
    clock.advance(61)
    assert cache.fetch("k", source)[:4] == ("new", "loader", 0.0, False)
    assert cache.stats.stale_served == 0


def test_stale_if_error_can_be_switched_off(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(ttl_s=60, stale_if_error_s=0)
    source = Source("old", SourceDown("no"))
    cache.get_or_load("k", source)
    clock.advance(60 + A_BIT)
    with pytest.raises(SourceDown):
        cache.get_or_load("k", source)


@on_redis
def test_another_process_has_the_stale_value_too(make_cache: MakeCache, clock: Any) -> None:
    make_cache().get_or_load("k", Source("v"), 60)
    clock.advance(100)
    reading = make_cache().fetch("k", Source(SourceDown("no")))
    assert (reading.value, reading.age_s, reading.is_stale) == ("v", 100, True)
    assert reading.tier == "L2"


# ── Refreshing before and after the end ─────────────────────────────────────────────


def test_stale_while_revalidate_answers_at_once_and_refreshes_once(
    make_cache: MakeCache, clock: Any
) -> None:
    cache = make_cache(ttl_s=60, stale_while_revalidate_s=30, stale_if_error_s=0)
    cache.get_or_load("k", Source("old"))
    clock.advance(60 + A_BIT)
    slow = Source("new", held=True)
    for _ in range(20):
        reading = cache.fetch("k", slow)
        assert (reading.value, reading.is_stale) == ("old", True)
        until(lambda: slow.loads == 1)
    slow.release()
    until(lambda: cache.in_progress == 0)
    reading = cache.fetch("k", Source("newest"))
    assert (reading.value, reading.age_s, reading.is_stale) == ("new", 0.0, False)
    assert (slow.loads, cache.stats.stale_served, cache.stats.loads) == (1, 20, 2)


def test_after_the_window_the_caller_waits(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(ttl_s=60, stale_while_revalidate_s=30)
    cache.get_or_load("k", Source("old"))
    clock.advance(90 + A_BIT)
    assert cache.get_or_load("k", Source("new")) == "new"


def test_a_refresh_that_fails_harms_nobody_and_is_tried_again(
    make_cache: MakeCache, clock: Any
) -> None:
    cache = make_cache(ttl_s=60, stale_while_revalidate_s=30, stale_if_error_s=0)
    cache.get_or_load("k", Source("old"))
    clock.advance(61)
    source = Source(SourceDown("no"), "new")
    for loads in (1, 2):
        assert cache.get_or_load("k", source) == "old"
        until(lambda loads=loads: source.loads == loads and not cache.in_progress)
    assert cache.get_or_load("k", source) == "new"
    assert (source.loads, cache.stats.load_errors) == (2, 1)


@pytest.mark.parametrize(
    ("drawn", "beta", "takes_s", "early_s"),
    [
        (1 - 1 / math.e, 1, 0.25, 0.25),  # ln(1 - drawn) is -1: the load's time before the end
        (1 - 1 / math.e, 4, 0.25, 1.0),
        (1 - math.exp(-3), 1, 0.5, 1.5),
        (0.0, 1, 0.25, 0.0),
        (0.999, 0, 0.25, 0.0),
        (0.999, 1, 0.0, 0.0),
    ],
)
def test_xfetch_refreshes_as_early_as_load_time_beta_and_chance_say(
    make_cache: MakeCache, clock: Any, drawn: float, beta: float, takes_s: float, early_s: float
) -> None:
    cache = make_cache(jitter=0, beta=beta, l1_ttl_s=0, rng=lambda: drawn)
    cache.get_or_load("k", Source("old", clock=clock, takes_s=takes_s), 60)
    source = Source("new")
    clock.advance(60 - early_s - 2 * A_BIT)
    assert cache.get_or_load("k", source) == "old"
    until(lambda: cache.in_progress == 0)
    assert (source.loads, cache.stats.early_refreshes) == (0, 0)
    if not early_s:
        return
    clock.advance(4 * A_BIT)
    assert cache.get_or_load("k", source) == "old"
    until(lambda: cache.in_progress == 0)
    assert cache.get_or_load("k", source) == "new"
    assert (source.loads, cache.stats.early_refreshes, cache.stats.stale_served) == (1, 1, 0)


# ── Tags and versions ───────────────────────────────────────────────────────────────


def test_a_tag_takes_its_own_values_along(make_cache: MakeCache) -> None:
    cache = make_cache()
    tagged = {"a": ["x"], "b": ["x", "y"], "c": ("y",), "d": [], "e": {"long " * 100}}
    for key, tags in tagged.items():
        cache.get_or_load(key, Source(key), tags=tags)
    cache.set("f", "f", tags=["x"])
    cache.get_many(["g"], Source({"g": "g"}), tags=["x"])
    everything = [*tagged, "f", "g"]
    assert cache.get_many(everything) == {key: key for key in everything}
    cache.invalidate_tag("x")
    assert cache.get_many(everything) == {"c": "c", "d": "d", "e": "e"}
    cache.invalidate_tag("long " * 100)
    assert cache.get_many(everything) == {"c": "c", "d": "d"}


def test_after_a_tag_is_invalidated_it_serves_anew(make_cache: MakeCache) -> None:
    cache, source = make_cache(), Source("old", "new")
    cache.get_or_load("k", source, tags=["x"])
    cache.invalidate_tag("x")
    assert [cache.get_or_load("k", source, tags=["x"]) for _ in range(2)] == ["new", "new"]


def test_tags_are_a_collection_not_one_name(make_cache: MakeCache) -> None:
    cache, source = make_cache(), Source({"k": 1})
    for ask in (
        partial(cache.get_or_load, "k", source),
        partial(cache.get_many, ["k"], source),
        partial(cache.set, "k", 1),
    ):
        with pytest.raises(TypeError, match="tags"):
            ask(tags="product")
    assert source.loads == 0


@on_redis
@pytest.mark.parametrize("read", ["get", "get_many", "get_or_load"])
def test_other_processes_see_what_was_invalidated(make_cache: MakeCache, read: str) -> None:
    one, other = make_cache(), make_cache(l1_ttl_s=0)

    def seen() -> list[Any]:
        if read == "get_many":
            return list(other.get_many(["k", "t", "s"]).values())
        if read == "get":
            found = [other.get(key) for key in ("k", "t", "s")]
            return [value for value in found if value is not MISSING]
        return [other.get_or_load(key, Source("new")) for key in ("k", "t", "s")]

    one.set("k", "old")
    one.set("t", "old", tags=["x"])
    one.set("s", "old")
    assert seen() == ["old", "old", "old"]
    one.invalidate("k")
    one.invalidate_tag("x")
    one.set("s", "set")
    assert seen() == (["new", "new", "set"] if read == "get_or_load" else ["set"])


def test_versions_and_namespaces_are_apart(make_cache: MakeCache) -> None:
    caches = [make_cache(version=1), make_cache(version=2), make_cache("y")]
    for number, cache in enumerate(caches):
        assert cache.get_or_load("k", Source(number), tags=["x"]) == number
    caches[0].invalidate("k")
    caches[0].invalidate_tag("x")
    assert [cache.get("k") for cache in caches] == [MISSING, 1, 2]


# ── set, get, get_many ──────────────────────────────────────────────────────────────


def test_what_is_set_is_read_and_what_is_not_is_missing(make_cache: MakeCache) -> None:
    cache = make_cache()
    assert cache.get("k") is MISSING
    assert cache.get("k", "default") == "default"
    assert cache.set("k", {"a": [1, 2]}) is True
    assert cache.get("k") == cache.get_or_load("k", Source("new")) == {"a": [1, 2]}
    assert cache.set("k", "newer") is True
    assert cache.get("k") == "newer"
    assert cache.invalidate("k", "never there") is True
    assert cache.get("k") is MISSING
    assert cache.stats.invalidations == 2


def test_get_many_loads_what_is_missing_in_one_call(make_cache: MakeCache) -> None:
    cache, source = make_cache(), Source({"b": 2, "c": None, "e": 5, "never asked": 9})
    cache.set("a", 1)
    keys = ["e", "a", "b", "c", "left out", "b"]
    expected = {"e": 5, "a": 1, "b": 2, "c": None, "left out": None}
    assert cache.get_many(keys) == {"a": 1}
    assert cache.get_many(keys, source) == expected
    assert list(cache.get_many(keys, source)) == list(expected)  # in the order asked for
    assert source.calls == [(["e", "b", "c", "left out"],)]
    assert cache.get("never asked") is MISSING
    assert (cache.stats.loads, cache.get_many([], source)) == (1, {})


def test_an_error_of_load_many_reaches_the_caller_and_is_not_cached(
    make_cache: MakeCache, tier: str
) -> None:
    cache, source = make_cache(), Source(SourceDown("no"), {"a": 1, "b": 2})
    with pytest.raises(SourceDown, match="no"):
        cache.get_many(["a", "b"], source)
    assert cache.get_many(["a", "b"], source) == {"a": 1, "b": 2}
    assert (cache.stats.loads, cache.stats.load_errors, source.loads) == (2, 1, 2)


def test_a_single_caller_waits_for_load_many(make_cache: MakeCache) -> None:
    cache, many, single = make_cache(), Source({"a": 1, "b": 2}, held=True), Source("single")
    bulk = cache.start("get_many", ["a", "b"], many)
    until(lambda: many.loads == 1)
    waiter = cache.start("get_or_load", "b", single)
    until(lambda: cache.stats.waits == 1)
    many.release()
    assert finished([bulk, waiter]) == [{"a": 1, "b": 2}, 2]
    assert single.loads == 0


def test_load_many_waits_for_a_single_caller(make_cache: MakeCache) -> None:
    cache, many, single = make_cache(), Source({"a": 1, "b": "many"}), Source(2, held=True)
    first = cache.start("get_or_load", "b", single)
    until(lambda: single.loads == 1)
    bulk = cache.start("get_many", ["a", "b"], many)
    until(lambda: many.loads == 1)
    single.release()
    assert finished([first, bulk]) == [2, {"a": 1, "b": 2}]
    assert many.calls == [(["a"],)]


def test_two_bulk_readers_share_what_they_both_want(make_cache: MakeCache) -> None:
    cache = make_cache()
    one, other = Source({"a": 1, "b": 1}, held=True), Source({"b": 2, "c": 2})
    first = cache.start("get_many", ["a", "b"], one)
    until(lambda: one.loads == 1)
    second = cache.start("get_many", ["b", "c"], other)
    until(lambda: other.loads == 1)
    one.release()
    assert finished([first, second]) == [{"a": 1, "b": 1}, {"b": 1, "c": 2}]
    assert other.calls == [(["c"],)]


# ── Bad values ──────────────────────────────────────────────────────────────────────


def test_a_value_that_cannot_be_cached_is_returned_and_counted(
    make_cache: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache, source = make_cache(), Source((1, 2))
    assert [cache.get_or_load("k", source) for _ in range(2)] == [(1, 2), (1, 2)]
    assert (source.loads, cache.stats.uncacheable) == (2, 2)
    assert cache.get("k") is MISSING
    assert "tuple" in caplog.text
    mixed = Source({"good": 1, "bad": {1}})
    assert cache.get_many(["good", "bad"], mixed) == {"good": 1, "bad": {1}}
    assert cache.get_many(["good", "bad"]) == {"good": 1}
    assert cache.stats.uncacheable == 3


@on_redis
@pytest.mark.parametrize("read", ["get_or_load", "get_many"])
def test_after_a_load_no_lease_is_left(
    make_cache: MakeCache, client: redis.Redis, redis_prefix: str, read: str
) -> None:
    # Else every other caller of that key would wait for the end of the lease.
    cache = make_cache()
    for number, answer in enumerate(("good", {"un", "cacheable"}, None, SourceDown("no"))):
        key = f"k{number}"
        failed = isinstance(answer, Exception)
        if read == "get_or_load":
            future = cache.start("get_or_load", key, Source(answer))
        else:
            source = Source(answer if failed else {key: answer})
            future = cache.start("get_many", [key], source)
        (ended,) = finished([future])
        assert isinstance(ended, SourceDown) is failed
        left = [name for name in client.scan_iter(f"{redis_prefix}*") if b"lease" in name]
        assert left == [], answer


def test_setting_what_cannot_be_cached_is_an_error_and_changes_nothing(
    make_cache: MakeCache,
) -> None:
    cache = make_cache()
    cache.set("k", "old")
    with pytest.raises(app.Uncacheable, match="set"):
        cache.set("k", {1, 2})
    assert cache.get("k") == "old"


@on_redis
@pytest.mark.parametrize("read", ["get_or_load", "get_many", "get_many without L1", "get"])
@pytest.mark.parametrize("what", [*NO_BYTES_OF_OURS, "a Redis list"])
def test_what_a_stranger_left_is_a_miss_and_is_replaced(
    make_cache: MakeCache,
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    what: str,
    read: str,
) -> None:
    cache = make_cache(l1_ttl_s=0) if read == "get_many without L1" else make_cache()
    name = cache.cache.keys.value("k")
    if what == "a Redis list":
        client.lpush(name, "item")
    else:
        client.set(name, NO_BYTES_OF_OURS[what])
    if read == "get":
        assert cache.get("k", "default") == "default"
        client.delete(name)
        return
    if read == "get_or_load":
        assert cache.get_or_load("k", Source("new")) == "new"
    else:
        assert cache.get_many(["k"], Source({"k": "new"})) == {"k": "new"}
    found = client.get(name)
    assert isinstance(found, bytes)
    assert app.unpack(found).value == "new"
    if read != "get_or_load" and what == "a Redis list":
        return  # MGET takes it for nothing
    assert cache.stats.undecodable == 1
    assert any(record.levelno == logging.WARNING for record in caplog.records)


@on_redis
def test_a_stranger_at_a_tag_costs_the_caching_not_the_answer(
    make_cache: MakeCache, client: redis.Redis
) -> None:
    cache = make_cache(lease_s=0.5)
    client.lpush(cache.cache.keys.tag("x"), "item")
    assert cache.get_or_load("k", Source("v"), tags=["x"]) == "v"
    lease = cache.cache.keys.lease(cache.cache.keys.value("k"))
    assert not client.exists(lease)  # else other callers would wait for its end
    cache.invalidate_tag("x")
    assert cache.get_or_load("k", Source("new"), tags=["x"]) == "new"


# ── One load for all callers ────────────────────────────────────────────────────────


def crowd(cache: Driver, source: Source, key: str = "k", callers: int = CALLERS) -> list[Any]:
    """What as many callers get who all wait for one load; the source is held until then."""
    futures = [cache.start("get_or_load", key, source) for _ in range(callers)]
    until(lambda: source.loads and cache.stats.waits >= callers - 1)
    source.release()
    return finished(futures)


def test_a_crowd_costs_one_load(make_cache: MakeCache) -> None:
    cache, source = make_cache(), Source("v", held=True)
    assert crowd(cache, source) == ["v"] * CALLERS
    assert (source.loads, cache.stats.loads, cache.stats.waits) == (1, 1, CALLERS - 1)
    assert cache.in_progress == 0


def test_a_crowd_gets_the_error_and_none_hangs(make_cache: MakeCache) -> None:
    cache, source = make_cache(), Source(SourceDown("no"), held=True)
    errors = crowd(cache, source)
    assert [type(error) for error in errors] == [SourceDown] * CALLERS
    assert (source.loads, cache.stats.load_errors) == (1, 1)
    assert cache.in_progress == 0


def test_keys_do_not_wait_for_each_other(make_cache: MakeCache) -> None:
    cache, slow = make_cache(), Source("slow", held=True)
    waiting = cache.start("get_or_load", "slow", slow)
    until(lambda: slow.loads == 1)
    assert cache.get_or_load("quick", Source("quick")) == "quick"
    slow.release()
    assert waiting.result(WAIT_S) == "slow"


def depth(error: BaseException) -> int:
    """Frames of its traceback, and exceptions behind it."""
    frames, chain, seen = 0, error, set()
    trace = error.__traceback__
    while trace is not None:
        frames, trace = frames + 1, trace.tb_next
    while id(chain) not in seen and (behind := chain.__cause__ or chain.__context__):
        seen.add(id(chain))
        chain = behind
    return frames + len(seen)


def test_an_error_does_not_grow_with_its_waiters(make_cache: MakeCache) -> None:
    cache = make_cache()
    depths = []
    for callers in (2, 60):
        error = SourceDown("no")
        crowd(cache, Source(error, held=True), str(callers), callers)
        depths.append(depth(error))
    assert depths[1] <= depths[0] + 10


def test_an_error_does_not_grow_while_it_is_cached(make_cache: MakeCache) -> None:
    cache, error = make_cache(error_ttl_s=60), SourceDown("no")
    source, depths = Source(error), []
    for _ in range(100):
        assert cache.start("get_or_load", "k", source).exception(WAIT_S) is error
        depths.append(depth(error))
    assert source.loads == 1
    assert depths[-1] <= depths[1] + 10


@pytest.mark.parametrize("asks", ["get_or_load", "get_many"])
@pytest.mark.parametrize("within", ["get_or_load", "get_many"])
def test_a_loader_that_asks_for_its_own_key_is_told(
    make_cache: MakeCache, within: str, asks: str
) -> None:
    # Else it would wait for itself.
    cache = make_cache(load_timeout_s=0.5, lease_s=0.2)
    single, many = cache.adapt(lambda: 1), cache.adapt(lambda keys: dict.fromkeys(keys, 1))
    ask: dict[str, Callable[..., Any]] = {
        "get_or_load": lambda *_: cache.cache.get_or_load("k", single),
        "get_many": lambda *_: cache.cache.get_many(["k"], many),
    }
    with pytest.raises(RuntimeError, match="own key"):
        cache.call(within, "k" if within == "get_or_load" else ["k"], ask[asks])


def test_a_loader_may_ask_for_other_keys(make_cache: MakeCache) -> None:
    cache = make_cache()
    inner = cache.adapt(lambda: "inner")
    assert cache.get_or_load("outer", lambda: cache.cache.get_or_load("inner", inner)) == "inner"
    assert cache.get_or_load("inner", Source("other")) == "inner"


def test_a_loader_may_be_asked_for_its_key_again_once_it_failed(make_cache: MakeCache) -> None:
    cache = make_cache()
    seven = cache.adapt(lambda: 7)
    with pytest.raises(SourceDown):
        cache.get_or_load("k", Source(SourceDown("no")))
    assert cache.get_or_load("outer", lambda: cache.cache.get_or_load("k", seven)) == 7
    assert cache.get("k") == 7


def test_who_waits_too_long_for_a_load_is_told(make_cache: MakeCache, flavour: str) -> None:
    cache, slow = make_cache(load_timeout_s=0.05), Source("v", held=True)
    first = cache.start("get_or_load", "k", slow)
    until(lambda: slow.loads == 1)
    with pytest.raises(app.LoadTimeout):
        cache.get_or_load("k", Source("other"))
    slow.release()
    (ended,) = finished([first])
    if flavour == "sync":  # a thread cannot be cancelled: who loads goes on
        assert ended == cache.get("k") == "v"
    else:
        assert isinstance(ended, app.LoadTimeout)


@asynchronous
def test_a_stale_value_stands_in_for_a_source_that_hangs(make_cache: MakeCache, clock: Any) -> None:
    # The caller's wait began before the load, and must not end before it.
    cache = make_cache(load_timeout_s=0.1, ttl_s=60, stale_if_error_s=300)
    cache.get_or_load("k", Source("old"))
    clock.advance(61)
    hangs = Source("never", held=True)
    assert cache.fetch("k", hangs)[:1] == ("old",)
    assert hangs.loads == 1


@synchronous
def test_who_waits_for_an_interrupted_load_loads_anew(make_cache: MakeCache) -> None:
    cache, interrupted = make_cache(lease_s=0.2), Source(KeyboardInterrupt(), held=True)
    first = cache.start("get_or_load", "k", interrupted)
    until(lambda: interrupted.loads == 1)
    others = [cache.start("get_or_load", "k", Source("v")) for _ in range(5)]
    until(lambda: cache.stats.waits == 5)
    interrupted.release()
    assert isinstance(first.exception(WAIT_S), KeyboardInterrupt)
    assert finished(others) == ["v"] * 5
    assert cache.stats.loads == 1


# ── Cancelled callers, closed caches ────────────────────────────────────────────────


@asynchronous
def test_the_first_of_ten_is_cancelled_and_the_others_get_the_value(make_cache: MakeCache) -> None:
    cache, slow = make_cache(), Source("v", held=True)
    futures = [cache.start("get_or_load", "k", slow) for _ in range(10)]
    until(lambda: slow.loads == 1 and cache.stats.waits == 9)
    futures[0].cancel()
    slow.release()
    assert finished(futures[1:]) == ["v"] * 9
    assert futures[0].cancelled()
    assert slow.loads == 1


@asynchronous
def test_all_are_cancelled_and_the_load_is_not_lost(make_cache: MakeCache) -> None:
    cache, slow = make_cache(), Source("v", held=True)
    futures = [cache.start("get_or_load", "k", slow) for _ in range(10)]
    until(lambda: slow.loads == 1 and cache.stats.waits == 9)
    for future in futures:
        future.cancel()
    slow.release()
    until(lambda: cache.in_progress == 0)
    assert cache.get("k") == "v"
    assert slow.loads == 1


@asynchronous
def test_nobody_hears_of_an_error_and_none_is_reported_lost(
    make_cache: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache, slow = make_cache(), Source(SourceDown("no"), held=True)
    alone_asking = cache.start("get_or_load", "k", slow)
    until(lambda: slow.loads == 1)
    alone_asking.cancel()
    slow.release()
    until(lambda: cache.in_progress == 0)
    assert cache.get_or_load("k", Source(7)) == 7
    assert "never retrieved" not in caplog.text


@asynchronous
def test_a_cancelled_bulk_reader_leaves_the_others_their_value(make_cache: MakeCache) -> None:
    cache, slow = make_cache(lease_s=0.2), Source({"k": "first"}, held=True)
    first = cache.start("get_many", ["k"], slow)
    until(lambda: slow.loads == 1)
    many = cache.start("get_many", ["k"], Source({"k": "v"}))
    until(lambda: cache.stats.waits == 1)
    single = cache.start("get_or_load", "k", Source("v"))
    until(lambda: cache.stats.waits == 2)
    first.cancel()
    slow.release()
    found, value = finished([many, single])
    assert found == {"k": value}
    assert value in ("first", "v")


@asynchronous
@alone
def test_a_loader_that_was_cancelled_ends_its_callers(make_cache: MakeCache) -> None:
    # Such as one that awaits a shared task: to load again would be no end of it.
    cache, loads = make_cache(), itertools.count(1)

    def gives_up() -> str:
        if next(loads) > 50:
            return "asked without end"
        raise asyncio.CancelledError

    future = cache.start("get_or_load", "k", gives_up)
    until(future.done)
    assert future.cancelled() or future.exception()
    assert next(loads) <= 3


@asynchronous
@pytest.mark.parametrize("moment", ["before the load", "during the load"])
def test_aclose_ends_loads_and_who_waits_for_them(make_cache: MakeCache, moment: str) -> None:
    cache, slow = make_cache(load_timeout_s=2, lease_s=0.2), Source("v", held=True)

    async def ask_and_close() -> list[Any]:
        asking = asyncio.create_task(cache.cache.get_or_load("k", slow.awaited))
        while moment == "during the load" and not slow.loads:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await cache.cache.aclose()
        return await asyncio.gather(asking, return_exceptions=True)

    ended = asyncio.run_coroutine_threadsafe(ask_and_close(), loop_of(cache))
    until(lambda: ended.done() or slow.loads > 1)
    loads = slow.loads
    slow.release()
    (outcome,) = ended.result(WAIT_S)
    assert isinstance(outcome, BaseException)
    assert not isinstance(outcome, app.LoadTimeout)  # that took no time at all
    assert loads == (1 if moment == "during the load" else 0)


def loop_of(cache: Any) -> asyncio.AbstractEventLoop:
    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    loop: asyncio.AbstractEventLoop = cache._loop.start(running()).result(WAIT_S)
    return loop


@synchronous
def test_close_waits_for_refreshes_and_starts_no_more(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(ttl_s=60, stale_while_revalidate_s=30)
    cache.get_or_load("k", Source("old"))
    cache.get_or_load("other", Source("old"))
    clock.advance(61)
    slow = Source("new", held=True)
    assert cache.get_or_load("k", slow) == "old"
    until(lambda: slow.loads == 1)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(cache.close)
        assert not closing.done()
        slow.release()
        closing.result(WAIT_S)
    assert cache.get("k") == "new"
    late = Source("late")
    assert cache.get_or_load("other", late) == "old"
    assert (late.loads, cache.in_progress) == (0, 0)


@asynchronous
def test_aclose_ends_refreshes_and_starts_no_more(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(ttl_s=60, stale_while_revalidate_s=30)
    cache.get_or_load("k", Source("old"))
    clock.advance(61)
    slow = Source("new", held=True)
    assert cache.get_or_load("k", slow) == "old"
    until(lambda: slow.loads == 1)
    cache.close()
    assert cache.in_progress == 0
    late = Source("late")
    assert cache.get_or_load("k", late) == "old"
    assert (late.loads, cache.in_progress) == (0, 0)


# ── @cached ─────────────────────────────────────────────────────────────────────────


def recorded(cache: Driver, **options: Any) -> tuple[Any, list[Any]]:
    """`price` under @cached, and its calls."""
    calls: list[Any] = []

    def price(product: Any, currency: Any = "EUR", *, rebate: Any = None) -> str:
        """What a product costs."""
        calls.append((product, currency, rebate))
        return repr((product, currency, rebate))

    return cache.decorate(price, "price", **options), calls


def test_a_call_is_known_by_its_arguments_however_given(make_cache: MakeCache) -> None:
    price, calls = recorded(make_cache())
    answers = {
        price(7),
        price(7, "EUR"),
        price(product=7),
        price(currency="EUR", product=7),
        price(7, rebate=None),
    }
    assert answers == {"(7, 'EUR', None)"}
    assert calls == [(7, "EUR", None)]
    assert price.key(7) == price.key(product=7, currency="EUR") != price.key(8)


def test_arguments_that_differ_have_results_that_differ(make_cache: MakeCache) -> None:
    price, calls = recorded(make_cache())
    arguments = [1, True, "1", "True", None, "None", 0, False, "", -1, "a'b", 'a"b', "é", "\n"]
    for argument in arguments:
        assert price(argument) == repr((argument, "EUR", None))
    assert price("a", "b") != price("a,'b'")
    assert len(calls) == len(arguments) + 2
    assert len({price.key(argument) for argument in arguments}) == len(arguments)


@pytest.mark.parametrize("argument", [1.5, [1], {"a": 1}, object(), b"a", (1,), Decimal(1)])
def test_an_argument_without_a_stable_text_is_refused(
    make_cache: MakeCache, argument: object
) -> None:
    price, calls = recorded(make_cache())
    with pytest.raises(TypeError):
        price(argument)
    assert calls == []


def test_an_argument_is_refused_though_an_equal_one_was_seen(make_cache: MakeCache) -> None:
    price, _ = recorded(make_cache())
    price(1)
    for equal in (1.0, Decimal(1)):
        with pytest.raises(TypeError):
            price(equal)


def test_cached_results_are_invalidated_by_arguments_and_by_tag(make_cache: MakeCache) -> None:
    cache = make_cache()
    price, calls = recorded(cache, tags=lambda product, *_: [f"product:{product}"])
    for product in (1, 2, 3):
        price(product)
    price.invalidate(1)
    cache.invalidate_tag("product:2")
    for product in (1, 2, 3):
        price(product)
    assert [product for product, *_ in calls] == [1, 2, 3, 1, 2]
    assert cache.get(price.key(3)) == "(3, 'EUR', None)"


def test_cached_results_expire_and_hits_are_counted(make_cache: MakeCache, clock: Any) -> None:
    cache = make_cache(l1_ttl_s=60)
    price, calls = recorded(cache, ttl_s=7)
    for _ in range(3):
        price(1)
    assert (cache.stats.l1_hits, cache.stats.l1_misses, cache.stats.loads) == (2, 1, 1)
    clock.advance(7 - A_BIT)
    price(1)
    clock.advance(2 * A_BIT)
    price(1)
    assert len(calls) == 2


def test_a_hit_keeps_its_entry_from_being_evicted(make_cache: MakeCache) -> None:
    cache = make_cache(max_entries=2)
    price, _ = recorded(cache)
    for product in (1, 2, 1, 3):
        price(product)
    keys, l1 = cache.cache.keys, cache.cache.l1
    kept = [each for each in (1, 2, 3) if l1.get(keys.value(price.key(each))) is not MISSING]
    assert kept == [1, 3]
    assert cache.stats.evictions == 1


def test_the_decorated_function_keeps_its_name(make_cache: MakeCache) -> None:
    cache = make_cache()

    def price(product: int) -> int:
        """What a product costs."""
        return product

    made = app.cached(cache.cache, "price")(cache.adapt(price))
    assert (made.__name__, made.__doc__) == ("price", "What a product costs.")


# ── Races of loads and invalidations ────────────────────────────────────────────────

ACTS: dict[str, Callable[[Driver], Any]] = {
    "invalidate": lambda cache: cache.invalidate("k"),
    "set": lambda cache: cache.set("k", "set", tags=["x"]),
    "invalidate_tag": lambda cache: cache.invalidate_tag("x"),
}
act = pytest.mark.parametrize("act", list(ACTS))
begin = pytest.mark.parametrize("begin", ["get_or_load", "get_many", "refresh"])


def begun(cache: Driver, begin: str, clock: Any, slow: Source) -> Future[Any]:
    """A load of the key k, with the tag x, that has begun and is held."""
    if begin == "refresh":
        cache.get_or_load("k", Source("older"), 60, tags=["x"])
        clock.advance(61)
        future = cache.start("get_or_load", "k", slow, 60, ["x"])
    elif begin == "get_many":
        future = cache.start("get_many", ["k"], slow, 60, ["x"])
    else:
        future = cache.start("get_or_load", "k", slow, 60, ["x"])
    until(lambda: slow.loads == 1)
    return future


@begin
@act
@pytest.mark.parametrize("whose", ["own", "another process's"])
def test_what_was_read_before_an_invalidation_is_stored_nowhere(
    make_cache: MakeCache, tier: str, clock: Any, begin: str, act: str, whose: str
) -> None:
    options: dict[str, Any] = {"stale_while_revalidate_s": 30, "stale_if_error_s": 0}
    cache, other = make_cache(**options), make_cache(**options)
    if tier == "alone" and whose != "own":
        other = cache
    slow = Source({"k": "old"} if begin == "get_many" else "old", held=True)
    future = begun(cache, begin, clock, slow)
    ACTS[act](cache if whose == "own" else other)
    slow.release()
    future.result(WAIT_S)
    until(lambda: cache.in_progress == 0)
    expected = "set" if act == "set" else MISSING
    if whose != "own" and (begin == "refresh" or act == "invalidate_tag"):
        clock.advance(6)  # without a listener, its copy in L1 lives for `l1_ttl_s`
    assert cache.get("k") == expected
    if tier == "redis":
        assert make_cache(**options).get("k") == expected
    assert cache.get_or_load("k", Source("new"), tags=["x"]) in ("new", "set")


@act
def test_who_asks_after_an_invalidation_does_not_wait_for_the_load_before_it(
    make_cache: MakeCache, clock: Any, act: str
) -> None:
    cache, slow, fresh = make_cache(lease_s=0.2), Source("old", held=True), Source("new")
    before = begun(cache, "get_or_load", clock, slow)
    ACTS[act](cache)
    expected = "set" if act == "set" else "new"
    assert cache.get_or_load("k", fresh, tags=["x"]) == expected
    slow.release()
    assert before.result(WAIT_S) == "old"  # asked for before
    assert cache.get("k") == expected


@act
def test_an_error_from_before_a_write_is_not_answered_after_it(
    make_cache: MakeCache, clock: Any, act: str
) -> None:
    cache = make_cache(error_ttl_s=60, l1_ttl_s=5)
    slow = Source(SourceDown("no"), held=True)
    future = begun(cache, "get_or_load", clock, slow)
    ACTS[act](cache)
    slow.release()
    assert isinstance(future.exception(WAIT_S), SourceDown)
    clock.advance(6)
    expected = "set" if act == "set" else "new"
    assert cache.get_or_load("k", Source("new"), tags=["x"]) == expected


@on_redis
@synchronous
@pytest.mark.parametrize("happens", ["invalidate", "set", "invalidate_tag"])
@pytest.mark.parametrize("meanwhile", ["get_or_load", "get", "get_many", "set"])
def test_an_invalidation_between_redis_and_this_process_is_not_lost(
    make_cache: MakeCache, meanwhile: str, happens: str
) -> None:
    """It happens after Redis has replied and before this process has kept what it said."""
    cache = make_cache()
    make_cache().set("k", "old", tags=["x"])
    replied = cache.cache._send
    todo = [partial(ACTS[happens], cache)]

    def reply_and_be_interrupted(calls: Any) -> Any:
        replies = replied(calls)
        if any(word == cache.cache.keys.value("k") for call in calls for word in call) and todo:
            todo.pop()()
        return replies

    asked: dict[str, Callable[[], Any]] = {
        "get_or_load": partial(cache.cache.get_or_load, "k", Source("new")),
        "get": partial(cache.cache.get, "k"),
        "get_many": partial(cache.cache.get_many, ["k"]),
        "set": partial(cache.cache.set, "k", "old"),
    }
    cache.set("warm", 1)  # Redis knows the scripts
    cache.cache._send = reply_and_be_interrupted
    asked[meanwhile]()
    assert todo == []
    if meanwhile == "set" and happens == "invalidate_tag":
        return  # what was set carries no tag
    allowed = ("set",) if happens == "set" else (MISSING, "new")
    assert make_cache().get("k") in allowed
    assert cache.get("k") in allowed


# ── Evictions, memory, counters ─────────────────────────────────────────────────────


def test_each_question_is_a_hit_or_a_miss(make_cache: MakeCache) -> None:
    cache = make_cache()
    for _ in range(4):
        cache.get_or_load("a", Source(1))  # 1 miss, 3 hits
    crowd(cache, Source(1, held=True), "b", 10)  # 1 miss, 9 hits
    cache.get_many(["a", "c", "d"], Source({}))  # 2 misses, 1 hit
    cache.get("a")  # 1 hit
    cache.get("unknown")  # 1 miss, though nobody loads it
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.loads, stats.loaded) == (14, 5, 3, 4)
    assert stats.hit_ratio == pytest.approx(14 / 19)


@alone
def test_a_cache_alone_keeps_at_most_its_entries(make_cache: MakeCache) -> None:
    cache = make_cache(max_entries=10)
    for key in range(50):
        cache.get_or_load(f"k{key}", Source(key))
    assert (cache.stats.l1_entries, cache.stats.evictions, cache.stats.loads) == (10, 40, 50)


def test_cached_errors_are_bounded_too(make_cache: MakeCache) -> None:
    cache, source = make_cache(max_entries=5, error_ttl_s=60), Source(SourceDown("no"))
    for key in range(20):
        assert cache.start("get_or_load", f"k{key}", source).exception(WAIT_S)
    assert len(cache.cache.errors) == 5


def test_the_time_of_loads_is_counted_and_put_into_its_bucket(
    make_cache: MakeCache, clock: Any
) -> None:
    cache = make_cache()
    times_s = [0.0005, 0.002, 0.002, 0.3, 7.0]
    for number, takes_s in enumerate(times_s):
        cache.get_or_load(f"k{number}", Source(1, clock=clock, takes_s=takes_s))
    bounds = [*app.LOAD_BUCKETS_S, math.inf]
    expected = [
        sum(low < seconds <= high for seconds in times_s)
        for low, high in itertools.pairwise([0, *bounds])
    ]
    assert list(cache.stats.load_buckets) == expected
    assert cache.stats.load_s == pytest.approx(sum(times_s))
    cache.get_or_load("k4", Source(1))
    assert cache.stats.saved_s == pytest.approx(sum(times_s) / 5)
    assert cache.stats.hit_ratio == pytest.approx(1 / 6)


# ── Prometheus ──────────────────────────────────────────────────────────────────────


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """As prometheus_client reads them."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    named = {(each.name, frozenset(each.labels.items())): each.value for each in found}
    assert len(named) == len(found)
    return named


def counted(load_buckets: tuple[int, ...] | None = None) -> Any:
    """Stats with a number of its own in each field, large enough to be cut by a short format."""
    numbers = itertools.count(12_345_678, 1_111)
    values: dict[str, Any] = {field.name: next(numbers) for field in dataclasses.fields(app.Stats)}
    buckets = load_buckets or tuple(10_000_000 + i for i in range(len(app.LOAD_BUCKETS_S) + 1))
    return app.Stats(**{**values, "load_s": 1_234_567.891, "load_buckets": buckets})


def test_every_sample_is_the_counter_it_names() -> None:
    stats = counted()
    cache = ("cache", "shop")

    def of(tier: str, what: str) -> int:
        return int(getattr(stats, f"{tier}_{what}"))

    expected: dict[Any, float] = {
        (f"cache_{what}_total", frozenset([cache, ("tier", tier)])): of(tier, what)
        for what in ("hits", "misses")
        for tier in ("l1", "l2")
    }
    shown_otherwise = {"l1_hits", "l1_misses", "l2_hits", "l2_misses", "l1_entries"}
    for field in dataclasses.fields(stats):
        if field.name in shown_otherwise or field.name.startswith("load_") or field.name == "loads":
            continue
        expected[f"cache_{field.name}_total", frozenset([cache])] = getattr(stats, field.name)
    expected["cache_source_total", frozenset([cache])] = stats.misses
    expected["cache_load_errors_total", frozenset([cache])] = stats.load_errors
    expected["cache_entries", frozenset([cache])] = stats.l1_entries
    expected["cache_saved_seconds", frozenset([cache])] = stats.saved_s
    expected["cache_load_seconds_sum", frozenset([cache])] = stats.load_s
    expected["cache_load_seconds_count", frozenset([cache])] = sum(stats.load_buckets)
    below = 0
    for bound, loads in zip([*app.LOAD_BUCKETS_S, "+Inf"], stats.load_buckets, strict=True):
        below += loads
        expected["cache_load_seconds_bucket", frozenset([cache, ("le", str(bound))])] = below
    found = samples(app.prometheus("shop", stats))
    assert found.items() <= expected.items()
    not_shown = {name for name, _ in expected.keys() - found.keys()}
    assert not_shown <= {"cache_misses_total", "cache_loaded_total"}  # hits_total tells as much


def test_metrics_have_the_type_that_their_names_promise() -> None:
    families = list(text_string_to_metric_families(app.prometheus("shop", counted())))
    assert all(family.documentation for family in families)
    kinds = {family.name: family.type for family in families}
    assert kinds.pop("cache_load_seconds") == "histogram"
    assert kinds.pop("cache_entries") == "gauge"
    assert kinds.pop("cache_saved_seconds") == "gauge"  # an estimate, which may fall
    assert set(kinds.values()) == {"counter"}


@pytest.mark.parametrize("name", ["shop", 'a "quoted" name', "back\\slash", "two\nlines", "é"])
def test_a_label_is_escaped(name: str) -> None:
    found = samples(app.prometheus(name, counted()))
    assert {dict(labels)["cache"] for _, labels in found} == {name}


def test_a_cache_that_did_nothing_can_be_shown(make_cache: MakeCache) -> None:
    found = samples(app.prometheus("shop", make_cache().stats))
    assert set(found.values()) == {0.0}
