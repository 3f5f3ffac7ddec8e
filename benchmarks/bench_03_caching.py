"""Benchmark of 03_caching_strategies.py on Redis: its caches against limits and peers.

Run:
  python servers.py run --only redis -- python benchmarks/bench_03_caching.py

Every answer is checked in every round against `record()`, which no cache made, and the source
itself counts its loads. What is in a figure:
- hit in the process: a Python loop that calls the decorated function with one and the same number;
  the loop's own ten nanoseconds are on both sides. Ours has a TTL, counts hits, and would load
  once. `lru_cache` counts hits, and has neither of the others. cachetools stands there twice: with
  nothing but its TTL, and with the Condition and the counts that make it do the same as ours.
- hit in Redis: each call asks for a number that this instance has never seen, and that another
  instance has stored. So its memory misses, Redis hits, and keeping the value in memory is part of
  the time. GET fetches the same keys, and decodes nothing. For asyncio a thread asks Redis.
- keys at once: from Redis in the same way; MGET fetches the same keys, and decodes nothing.
- threads, tasks, processes: all are there beforehand, and are let go at once. The seconds of the
  processes run from their barrier to the last answer. Writes are calls of the commands that the
  server itself flags as writes, in scripts too, by INFO commandstats, which has those of everybody:
  run it on a Redis that nobody else uses meanwhile.
- hung: without an answer after HUNG_S, or CROWD_HUNG_S among the processes.

The peers use the same Redis by the same redis-py, through pools that wait for a connection, and
JSON: dogpile.cache by orjson as ours, cashews and aiocache by their own. What one lacks is left
out: lru_cache, cachetools and theine are in-process only, lru_cache, cachetools and dogpile.cache
for threads only, cashews and aiocache for asyncio only.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import itertools
import json
import multiprocessing
import re
import secrets
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import aiocache  # type: ignore[import-untyped]
import cachetools
import cashews
import orjson
import redis
import theine
from dogpile.cache import CacheRegion, make_region
from harness import (
    NONE,
    WARM_UPS,
    CountLine,
    Counts,
    Line,
    Samples,
    Side,
    Tally,
    check,
    counted,
    faster,
    measure,
    run_bench,
    slower,
)

import config

script = importlib.import_module("03_caching_strategies")

T = TypeVar("T")
Document = dict[str, Any]
Function = Callable[[int], Any]
AsyncFunction = Callable[[int], Awaitable[Any]]

TTL_S = 3_600  # nothing expires under the benchmark
POLICY = script.Policy(ttl_s=TTL_S, l1_ttl_s=TTL_S)  # else the defaults: jitter and XFetch are on
ENTRIES = 50_000  # of a cache in memory: more than any measure stores
CONNECTIONS = 50  # a peer's pool waits for one of them; redis-py's default pool raises
NUMBER = 7
HITS = 100_000  # a round; lru_cache takes 4 ms for them
FEWER_HITS = {"dogpile.cache": 5_000}  # two hundred times slower; compared per hit
ASYNC_HITS = 5_000  # cashews takes 30 µs each
HIT_ROUNDS = 11
# A GET over loopback takes 40 or 90 µs, by where the scheduler has put its two ends, and for
# seconds on end: many short rounds, so that both sides of a ratio meet the same.
ROUND_KEYS, MANY_ROUND_KEYS = 200, 1_000
REDIS_ROUNDS, MANY_ROUNDS = 29, 15  # the second for get_many, and for asyncio
BATCH = 100  # keys a get_many
CALLERS, FAILING_CALLERS, CANCELLED_OF = 1_000, 100, 10
PROCESSES, CROWD = 4, 250
LOAD_S, CROWD_LOAD_S = 0.05, 0.3
MOST_WRITES = 10  # of all processes together, by the issue
LEASE_S = 10  # of the peers' locks: far longer than a load
AIOCACHE_LEASE_S = 1  # who misses its wake-up waits that long: counted as an answer, not as hung
HUNG_S, CROWD_HUNG_S = 1.5, 5.0  # the processes of dogpile.cache take two, on an idle machine
LINGER_S = 20.0  # for hung callers to end, untimed, before the next way is measured

# ── The source ──────────────────────────────────────────────────────────────────────


class LoaderFailed(Exception):
    """What a failing source raises."""


def record(number: int) -> Document:
    """What is cached: a small row, since caches are compared here and not JSON decoders."""
    return {"id": number, "name": f"product {number}", "price_cents": 100 * number, "sold": True}


class Source:
    """Counts its loads, each of which lasts `load_s`: long enough for all callers to come
    meanwhile. Where it fails, only the first lasts, which spares the peers that load in series."""

    def __init__(self, load_s: float = 0.0, *, fails: bool = False) -> None:
        self.load_s, self.fails = load_s, fails
        self._loads, self._lock = 0, threading.Lock()

    def taken(self) -> int:
        """The loads since the last time."""
        with self._lock:
            loads, self._loads = self._loads, 0
        return loads

    def _begin(self) -> float:
        with self._lock:
            self._loads += 1
            return 0.0 if self.fails and self._loads > 1 else self.load_s

    def _end(self, number: int) -> Document:
        if self.fails:
            raise LoaderFailed(number)
        return record(number)

    def loader(self) -> Function:
        """A function of its own each time, since decorators leave marks on what they wrap."""

        def load(number: int) -> Document:
            time.sleep(self._begin())
            return self._end(number)

        return load

    def async_loader(self) -> AsyncFunction:
        async def load(number: int) -> Document:
            await asyncio.sleep(self._begin())
            return self._end(number)

        return load


# ── Ours for asyncio, and the peers, each as its manual advises ─────────────────────


def by_async_tiers(cache: Any, load: AsyncFunction) -> AsyncFunction:
    return lambda number: cache.get_or_load(f"record:{number}", partial(load, number))


def by_cachetools(load: Function) -> Function:
    cache: Any = cachetools.TTLCache(ENTRIES, TTL_S)
    return cachetools.cached(cache, condition=threading.Condition(), info=True)(load)


def by_bare_cachetools(load: Function) -> Function:
    cache: Any = cachetools.TTLCache(ENTRIES, TTL_S)
    return cachetools.cached(cache)(load)


def by_theine(load: Any) -> Any:
    """Of coroutine functions too."""
    function: Any = theine.Memoize(ENTRIES, timedelta(seconds=TTL_S))(load)
    function.key(lambda number: number)
    return function


def by_aiocache(**options: Any) -> Callable[[AsyncFunction], Any]:
    decorator: Any = aiocache.cached_stampede(
        lease=AIOCACHE_LEASE_S,
        ttl=TTL_S,
        key_builder=lambda _function, number: f"record:{number}",
        **options,
    )
    return decorator  # type: ignore[no-any-return]


# ── The bench ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Bench:
    """A server, a prefix in it, an event loop, and the clients; all closed by `stack`."""

    url: str
    prefix: str
    stack: ExitStack
    runner: asyncio.Runner
    client: redis.Redis  # bare: as redis-py makes it
    facts: dict[str, str] = field(default_factory=dict)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Heeds a Ctrl-C that redis-py's asyncio side forgets, as it does with many of those
        cancellations that meet its look for bytes left over from before."""

        async def heeding() -> T:
            result = await work
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            return result

        return self.runner.run(heeding())

    def cache(self, name: str) -> Any:
        """A TieredCache of the script; each call is another instance, as in another process."""
        client = self.stack.enter_context(script.connect(self.url))
        return script.TieredCache(f"{self.prefix}{name}", client, POLICY, max_entries=ENTRIES)

    def async_cache(self, name: str) -> Any:
        return self.stack.enter_context(closing(script.AsyncTieredCache(self.cache(name))))

    def dogpile(self, name: str, **locks: object) -> CacheRegion:
        """Without `locks` a mutex of this process guards a key."""
        pool = redis.BlockingConnectionPool.from_url(self.url, max_connections=CONNECTIONS)
        self.stack.callback(pool.disconnect)
        region = make_region(
            serializer=orjson.dumps,
            deserializer=orjson.loads,
            key_mangler=f"{self.prefix}{name}{{}}".format,
        )
        options = {"connection_pool": pool, "redis_expiration_time": 2 * TTL_S, **locks}
        return region.configure("dogpile.cache.redis", TTL_S, options)

    def cashews(self) -> cashews.Cache:
        cache = cashews.Cache()
        cache.setup(self.url, pickle_type="json", max_connections=CONNECTIONS)
        self.stack.callback(lambda: self.run(cache.close()))
        return cache

    def aiocache(self, name: str) -> Callable[[AsyncFunction], Any]:
        """Its decorator. Its own options for the server know no user and no TLS; a pool does."""

        def pool(**_: object) -> redis.asyncio.BlockingConnectionPool:
            options = {"max_connections": CONNECTIONS}
            return redis.asyncio.BlockingConnectionPool.from_url(self.url, **options)

        decorate = by_aiocache(
            cache=aiocache.Cache.REDIS,
            serializer=aiocache.serializers.JsonSerializer(),
            namespace=f"{self.prefix}{name}",
            connection_pool_class=pool,
        )

        def decorated(load: AsyncFunction) -> Any:
            function = decorate(load)
            self.stack.callback(lambda: self.run(function.cache.close()))
            return function

        return decorated

    def names(self, part: str = "") -> list[str]:
        """The keys in Redis under the prefix and `part`, locks of peers too."""
        found = self.client.scan_iter(match=f"*{self.prefix}{part}*", count=1_000)
        return [name.decode() for name in found]

    def numbered(self, part: str, numbers: Sequence[int]) -> list[str]:
        """Those of a cache of ours, in the order of the numbers; none missing."""
        names = sorted(self.names(part), key=lambda name: int(re.findall(r"\d+", name)[-1]))
        check("keys in Redis", [int(re.findall(r"\d+", name)[-1]) for name in names], [*numbers])
        return names


@contextmanager
def open_bench(url: str, timeout_s: float) -> Iterator[Bench]:
    """Raises ServiceUnavailable where nothing answers, ConfigError where it refuses."""
    with closing(script.open_redis(url, timeout_s)) as workspace, ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(url))
        runner = stack.enter_context(asyncio.Runner())
        bench = Bench(url, f"bench03-{secrets.token_hex(4)}-", stack, runner, client)
        bench.facts["server"] = workspace.server
        try:
            yield bench
        finally:
            for names in in_batches(bench.names(), 1_000):
                client.unlink(*names)


def in_batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# ── Hits in the process ─────────────────────────────────────────────────────────────


def call_often(function: Function, times: int) -> None:
    for _ in itertools.repeat(None, times):
        function(NUMBER)


async def await_often(function: AsyncFunction, times: int) -> None:
    for _ in itertools.repeat(None, times):
        await function(NUMBER)


def multiples(sides: Sequence[Side], base: Side) -> str:
    medians = [statistics.median(slower("", side, base).ratios) for side in sides]
    return ", ".join(f"{side.name} {m:.1f}×" for side, m in zip(sides, medians, strict=True))


def hits(bench: Bench) -> Iterator[Line]:
    source, cache = Source(), bench.cache("l1")
    in_memory = make_region().configure("dogpile.cache.memory", TTL_S)
    functions: dict[str, Any] = {
        "TieredCache": script.cached(cache, "record")(source.loader()),
        "lru_cache": functools.lru_cache(maxsize=ENTRIES)(source.loader()),
        "cachetools": by_bare_cachetools(source.loader()),
        "cachetools, Condition": by_cachetools(source.loader()),
        "theine": by_theine(source.loader()),
        "dogpile.cache": in_memory.cache_on_arguments()(source.loader()),
    }
    times = {name: FEWER_HITS.get(name, HITS) for name in functions}
    for function in functions.values():
        function(NUMBER)
    check("loads", source.taken(), len(functions))
    seen = cache.stats()["l1_hits"]

    def verify(name: str, _answer: object) -> None:
        nonlocal seen
        if name == "TieredCache":
            check("hits counted", cache.stats()["l1_hits"] - seen, HITS)
        check(name, functions[name](NUMBER), record(NUMBER))
        check(name, source.taken(), 0)
        seen = cache.stats()["l1_hits"]

    ways = {name: partial(call_often, functions[name], n) for name, n in times.items()}
    seconds = measure(ways, after=verify, rounds=HIT_ROUNDS)
    ours, limit, *peers = (Side(n, s, times[n], "hits") for n, s in seconds.items())
    yield slower("hit in the process", ours, limit, at_most=7)
    for peer in peers:
        yield faster("hit in the process", ours, peer)
    bench.facts["hit, of lru_cache"] = multiples([ours, *peers], limit)


def async_hits(bench: Bench) -> Iterator[Line]:
    """No limit: nothing of the standard library memoises coroutine functions."""
    source = Source()
    in_memory = cashews.Cache()
    in_memory.setup("mem://")
    bench.stack.callback(lambda: bench.run(in_memory.close()))
    functions: dict[str, Any] = {
        "AsyncTieredCache": by_async_tiers(bench.async_cache("async-l1"), source.async_loader()),
        "theine": by_theine(source.async_loader()),
        "cashews": in_memory(ttl=TTL_S, key="record:{number}")(source.async_loader()),
        "aiocache": by_aiocache(cache=aiocache.Cache.MEMORY)(source.async_loader()),
    }
    for function in functions.values():
        bench.run(await_often(function, 1))
    check("loads", source.taken(), len(functions))

    def verify(name: str, _answer: object) -> None:
        check(name, bench.run(await_each(functions[name], [NUMBER])), [record(NUMBER)])
        check(name, source.taken(), 0)

    def often(function: AsyncFunction) -> None:
        bench.run(await_often(function, ASYNC_HITS))

    ways = {name: partial(often, function) for name, function in functions.items()}
    seconds = measure(ways, after=verify)
    ours, *peers = (Side(n, s, ASYNC_HITS, "hits") for n, s in seconds.items())
    for peer in peers:
        yield faster("hit in the process, asyncio", ours, peer)


# ── Hits in Redis ───────────────────────────────────────────────────────────────────


class Untouched:
    """Ways that each ask, round after round, for what they have not asked for before."""

    def __init__(self, size: int, rounds: int) -> None:
        self.numbers = range(size * (WARM_UPS + rounds))
        self.size, self.rounds = size, rounds
        self._ways: dict[str, Callable[[], Any]] = {}
        self._expected: dict[str, Iterator[list[Any]]] = {}

    def add(
        self,
        name: str,
        ask: Callable[[Sequence[Any]], Any],
        asked: Sequence[Any] | None = None,
        expected: Sequence[Any] | None = None,
    ) -> None:
        """`ask` gets `size` of `asked`, numbers unless given, and returns their answers."""
        batches = iter(in_batches(asked or self.numbers, self.size))
        answers = expected or [record(number) for number in self.numbers]
        self._expected[name] = iter([list(b) for b in in_batches(answers, self.size)])
        self._ways[name] = lambda: ask(next(batches))

    def measure(self, source: Source, unit: str) -> list[Side]:
        source.taken()

        def verify(name: str, answer: Any) -> None:
            check(name, list(answer), next(self._expected[name]))
            check(f"loads of {name}", source.taken(), 0)

        seconds = measure(self._ways, after=verify, rounds=self.rounds)
        return [Side(name, s, self.size, unit) for name, s in seconds.items()]


def one_by_one(function: Callable[[Any], Any]) -> Callable[[Sequence[Any]], list[Any]]:
    return lambda batch: [function(item) for item in batch]


async def await_each(function: Callable[[Any], Awaitable[Any]], batch: Sequence[Any]) -> list[Any]:
    return [await function(item) for item in batch]


def awaited(
    bench: Bench, function: Callable[[Any], Awaitable[Any]]
) -> Callable[[Sequence[Any]], list[Any]]:
    return lambda batch: bench.run(await_each(function, batch))


def hits_in_redis(bench: Bench) -> Iterator[Line]:
    source, untouched = Source(), Untouched(ROUND_KEYS, REDIS_ROUNDS)
    store = script.cached(bench.cache("l2"), "record")(source.loader())
    cache = bench.cache("l2")
    region = bench.dogpile("dogpile:")
    by_region = region.cache_on_arguments()(source.loader())
    for number in untouched.numbers:
        check("stored", store(number), record(number))
        by_region(number)
    names = bench.numbered("l2", untouched.numbers)
    untouched.add("TieredCache", one_by_one(script.cached(cache, "record")(source.loader())))
    untouched.add("GET", one_by_one(bench.client.get), names, bench.client.mget(names))
    untouched.add("dogpile.cache", one_by_one(by_region))
    ours, limit, peer = untouched.measure(source, "hits")
    check("hits in Redis", cache.stats()["l2_hits"], len(untouched.numbers))
    yield slower("hit in Redis", ours, limit, at_most=1.3)
    yield faster("hit in Redis", ours, peer)
    bench.facts["hit in Redis, of GET"] = multiples([ours, peer], limit)


def async_hits_in_redis(bench: Bench) -> Iterator[Line]:
    source, untouched = Source(), Untouched(ROUND_KEYS, MANY_ROUNDS)
    ours = bench.async_cache("async-l2")
    bare = redis.asyncio.Redis.from_url(bench.url)
    bench.stack.callback(lambda: bench.run(bare.aclose()))
    by_cashews_ = bench.cashews()(ttl=TTL_S, key=f"{bench.prefix}cashews:{{number}}")
    peers: dict[str, Any] = {
        "cashews": by_cashews_(source.async_loader()),
        "aiocache": bench.aiocache("aiocache:")(source.async_loader()),
    }
    store = by_async_tiers(bench.async_cache("async-l2"), source.async_loader())
    for function in (store, *peers.values()):
        bench.run(await_each(function, untouched.numbers))
    names = bench.numbered("async-l2", untouched.numbers)
    load = source.async_loader()
    untouched.add("AsyncTieredCache", awaited(bench, by_async_tiers(ours, load)))
    untouched.add("GET", awaited(bench, bare.get), names, bench.client.mget(names))
    for name, function in peers.items():
        untouched.add(name, awaited(bench, function))
    side, limit, *others = untouched.measure(source, "hits")
    check("hits in Redis", ours.cache.stats()["l2_hits"], len(untouched.numbers))
    yield slower("hit in Redis, asyncio", side, limit)
    for other in others:
        yield faster("hit in Redis, asyncio", side, other)
    bench.facts["the same, asyncio"] = multiples([side, *others], limit)


def many(bench: Bench) -> Iterator[Line]:
    source, untouched = Source(), Untouched(MANY_ROUND_KEYS, MANY_ROUNDS)
    load = source.loader()
    keys = [f"record:{number}" for number in untouched.numbers]
    values = dict(zip(keys, map(record, untouched.numbers), strict=True))
    store, by_many, by_one = (bench.cache("many") for _ in range(3))
    for batch in in_batches(keys, BATCH):
        store.get_many(batch, lambda missing: {key: values[key] for key in missing})
    names = bench.numbered("many", untouched.numbers)
    region = bench.dogpile("dogpile-many:")
    cache, other = bench.cashews(), bench.aiocache("aiocache-many:")(source.async_loader()).cache
    for batch in in_batches(keys, BATCH):
        region.set_multi({key: values[key] for key in batch})
        pairs = {f"{bench.prefix}cashews-{key}": values[key] for key in batch}
        bench.run(cache.set_many(pairs, expire=TTL_S))
        bench.run(other.multi_set([(key, values[key]) for key in batch], ttl=TTL_S))

    def ask(get: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], list[Any]]:
        return lambda asked: [value for b in in_batches(asked, BATCH) for value in get(b)]

    def by_tiers(batch: Sequence[str]) -> Sequence[Any]:
        found = by_many.get_many(batch)
        return [found[key] for key in batch]

    def by_one_key(number: int) -> Any:
        return by_one.get_or_load(f"record:{number}", partial(load, number))

    def by_cashews_(batch: Sequence[str]) -> Sequence[Any]:
        names = [f"{bench.prefix}cashews-{key}" for key in batch]
        found: Sequence[Any] = bench.run(cache.get_many(*names))
        return found

    untouched.add("get_many", ask(by_tiers), keys)
    untouched.add("MGET", ask(bench.client.mget), names, bench.client.mget(names))
    untouched.add("get_or_load", one_by_one(by_one_key))
    untouched.add("dogpile.cache get_multi", ask(region.get_multi), keys)
    untouched.add("cashews get_many", ask(by_cashews_), keys)
    untouched.add("aiocache multi_get", ask(lambda batch: bench.run(other.multi_get(batch))), keys)
    ours, limit, *others = untouched.measure(source, "keys")
    for cache_ in (by_many, by_one):
        check("hits in Redis", cache_.stats()["l2_hits"], len(keys))
    yield slower(f"{BATCH} keys at once", ours, limit, at_most=2)
    for side in others:
        yield faster(f"{BATCH} keys at once", ours, side)
    bench.facts["keys at once, of MGET"] = multiples([ours, *others], limit)


# ── Many callers ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answers:
    """What became of callers who were let go at once: values, errors, cancelled, hung."""

    kinds: Counter[str]
    started_s: float  # by perf_counter, which on Linux and macOS is one clock for all processes
    ended_s: float  # of the last answer, or when waiting was given up


def kind(answer: object, expected: object) -> str:
    if isinstance(answer, LoaderFailed):
        return "errors"
    if isinstance(answer, asyncio.CancelledError):
        return "cancelled"
    if isinstance(answer, BaseException):
        return type(answer).__name__
    check("an answer", answer, expected)
    return "values"


def by_threads(
    function: Function,
    callers: int,
    number: int,
    go: Callable[[], object] = lambda: None,
    hung_s: float = HUNG_S,
    linger_s: float = 0.0,
) -> Answers:
    """Threads that exist when `go()` returns. Who is hung has `linger_s` more, so as not to
    disturb the next way, and then stays, as a daemon."""
    gate, answers, last_s = threading.Event(), list[object](), list[float]()

    def call() -> None:
        gate.wait()
        try:
            answer: object = function(number)
        except Exception as error:  # of any kind: which one is what is measured
            answer = error
        answers.append(answer)
        last_s.append(time.perf_counter())

    threads = [threading.Thread(target=call, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    go()
    started_s = time.perf_counter()
    gate.set()
    for thread in threads:
        thread.join(max(0.0, started_s + hung_s - time.perf_counter()))
    kinds = Counter(kind(answer, record(number)) for answer in tuple(answers))
    hung = callers - kinds.total()
    for thread in threads:
        thread.join(max(0.0, started_s + hung_s + linger_s - time.perf_counter()))
    return Answers(
        kinds + Counter(hung=hung), started_s, started_s + hung_s if hung else max(last_s)
    )


async def by_tasks(
    function: AsyncFunction,
    callers: int,
    number: int,
    go: Callable[[], object] = lambda: None,
    hung_s: float = HUNG_S,
    cancel_first_s: float | None = None,
) -> Answers:
    """Tasks; the first of them is cancelled after `cancel_first_s`, if given."""

    async def call() -> object:
        return await function(number)

    go()
    started_s = time.perf_counter()
    tasks = [asyncio.create_task(call()) for _ in range(callers)]
    if cancel_first_s is not None:
        await asyncio.sleep(cancel_first_s)
        tasks[0].cancel()
    _, pending = await asyncio.wait(tasks, timeout=hung_s)
    ended_s = time.perf_counter()
    for task in pending:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    done = [answer for task, answer in zip(tasks, found, strict=True) if task not in pending]
    kinds = Counter(kind(answer, record(number)) for answer in done)
    return Answers(kinds + Counter(hung=len(pending)), started_s, ended_s)


Ask = Callable[[int], Answers]  # lets callers ask for a number that was never asked for


def tallies(source: Source, ways: Mapping[str, Ask], labels: Sequence[str]) -> list[Tally]:
    """What each way counted in each round; there is no warm-up for what must be exact."""
    counts: dict[str, list[Counts]] = {name: [] for name in ways}
    numbers = itertools.count()

    def verify(name: str, answers: Answers) -> None:
        shown = {label: answers.kinds.pop(label, 0) for label in labels}
        counts[name].append({"loads": source.taken(), **shown, **answers.kinds})

    def ask(way: Ask) -> Answers:
        return way(next(numbers))

    measure({name: partial(ask, way) for name, way in ways.items()}, after=verify)
    return [Tally(name, rounds) for name, rounds in counts.items()]


def threaded(functions: Mapping[str, Function], callers: int) -> dict[str, Ask]:
    return {n: partial(by_threads, function, callers) for n, function in functions.items()}


def tasked(
    bench: Bench, functions: Mapping[str, AsyncFunction], callers: int, **options: Any
) -> dict[str, Ask]:
    def ask(function: AsyncFunction, number: int) -> Answers:
        return bench.run(by_tasks(function, callers, number, **options))

    return {name: partial(ask, function) for name, function in functions.items()}


def sync_functions(bench: Bench, part: str, source: Source) -> dict[str, Any]:
    region = bench.dogpile(f"{part}-dogpile:")
    return {
        "TieredCache": script.cached(bench.cache(part), "record")(source.loader()),
        "lru_cache": functools.lru_cache(maxsize=ENTRIES)(source.loader()),
        "cachetools": by_cachetools(source.loader()),
        "dogpile.cache": region.cache_on_arguments()(source.loader()),
        "theine": by_theine(source.loader()),
    }


def async_functions(bench: Bench, part: str, source: Source) -> dict[str, Any]:
    cashews_ = bench.cashews()
    key = f"{bench.prefix}{part}-cashews:{{number}}"
    return {
        "AsyncTieredCache": by_async_tiers(
            bench.async_cache(f"async-{part}"), source.async_loader()
        ),
        "cashews": cashews_(ttl=TTL_S, key=key, lock=True)(source.async_loader()),
        "aiocache": bench.aiocache(f"{part}-aiocache:")(source.async_loader()),
        "theine": by_theine(source.async_loader()),
    }


def beside(
    measure_: str, tallied: Sequence[Tally], exactly: Counts, at_most: Counts = NONE
) -> Iterator[CountLine]:
    """The first beside each of the others; the goal stands once."""
    ours, first, *others = tallied
    yield counted(measure_, ours, first, exactly, at_most)
    for peer in others:
        yield counted(measure_, ours, peer)


def cold_key(bench: Bench) -> Iterator[CountLine]:
    source = Source(LOAD_S)
    goal = {"loads": 1, "values": CALLERS}
    ways = threaded(sync_functions(bench, "cold", source), CALLERS)
    yield from beside(f"{CALLERS:,} threads, cold key", tallies(source, ways, ["values"]), goal)
    ways = tasked(bench, async_functions(bench, "cold", source), CALLERS)
    yield from beside(f"{CALLERS:,} tasks, cold key", tallies(source, ways, ["values"]), goal)


def first_cancelled(bench: Bench) -> Iterator[CountLine]:
    source = Source(2 * LOAD_S)
    functions = async_functions(bench, "cancel", source)
    ways = tasked(bench, functions, CANCELLED_OF, cancel_first_s=LOAD_S)
    tallied = tallies(source, ways, ["values", "cancelled"])
    goal = {"values": CANCELLED_OF - 1, "cancelled": 1}
    yield from beside(f"first of {CANCELLED_OF} tasks cancelled", tallied, goal)


def failing_loader(bench: Bench) -> Iterator[CountLine]:
    source, n = Source(LOAD_S, fails=True), FAILING_CALLERS
    goal = {"loads": 1, "errors": n, "hung": 0}
    ways = threaded(sync_functions(bench, "fail", source), n)
    yield from beside(f"loader raises, {n} threads", tallies(source, ways, list(goal)[1:]), goal)
    ways = tasked(bench, async_functions(bench, "fail", source), n)
    yield from beside(f"loader raises, {n} tasks", tallies(source, ways, list(goal)[1:]), goal)


# ── Many callers in several processes ───────────────────────────────────────────────

Go = Callable[[], object]
Crowd = Callable[[int, Go], Answers]  # the callers of one process


def crowd_of_threads(function: Function) -> Crowd:
    return lambda number, go: by_threads(function, CROWD, number, go, CROWD_HUNG_S, LINGER_S)


def crowd_of_tasks(bench: Bench, function: AsyncFunction) -> Crowd:
    return lambda number, go: bench.run(by_tasks(function, CROWD, number, go, CROWD_HUNG_S))


@contextmanager
def crowds(url: str, prefix: str, source: Source) -> Iterator[dict[str, Crowd]]:
    """This process's side of each way. Locks are those for several processes."""
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        client = stack.enter_context(redis.Redis.from_url(url))
        bench = Bench(url, prefix, stack, runner, client)
        locks = {"distributed_lock": True, "thread_local_lock": False, "lock_timeout": LEASE_S}
        region = bench.dogpile("crowd-dogpile:", **locks)
        by_tiers = script.cached(bench.cache("crowd"), "record")(source.loader())
        by_region = region.cache_on_arguments()(source.loader())
        functions = async_functions(bench, "crowd", source)
        del functions["theine"]  # shares nothing among processes
        yield {
            "TieredCache": crowd_of_threads(by_tiers),
            **{name: crowd_of_tasks(bench, function) for name, function in functions.items()},
            "dogpile.cache": crowd_of_threads(by_region),
        }


def work(url: str, prefix: str, barrier: Any, pipe: Connection) -> None:
    """A process: on each (way, number) of `pipe` its crowd asks, after the barrier."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    source = Source(CROWD_LOAD_S)
    with suppress(EOFError), crowds(url, prefix, source) as ways:
        pipe.send(sorted(ways))
        for way, number in iter(pipe.recv, None):
            answers = ways[way](number, barrier.wait)
            pipe.send((source.taken(), answers))


def received(pipe: Connection) -> Any:
    """Raises TimeoutError where the process says nothing, EOFError where it has ended."""
    if not pipe.poll(CROWD_HUNG_S + 2 * LINGER_S):
        raise TimeoutError("a process of the benchmark does not answer")
    return pipe.recv()


@contextmanager
def processes(bench: Bench) -> Iterator[list[Connection]]:
    """PROCESSES of them, ready; those that do not end by themselves are ended."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES, timeout=CROWD_HUNG_S)
    pipes, started = [], []
    try:
        for _ in range(PROCESSES):
            ours, theirs = context.Pipe()
            arguments = (bench.url, bench.prefix, barrier, theirs)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            pipes.append(ours)
        for pipe in pipes:
            received(pipe)
        yield pipes
        for pipe in pipes:
            pipe.send(None)
        for process in started:
            process.join(CROWD_HUNG_S)
    finally:
        for process in started:
            process.terminate()


def write_commands(client: redis.Redis) -> set[str]:
    """By the server's own flags."""
    return {name for name, command in client.command().items() if "write" in command["flags"]}


def several_processes(bench: Bench) -> Iterator[Line | CountLine]:
    writing, numbers = write_commands(bench.client), itertools.count()
    walls: dict[str, Samples] = {}
    counts: dict[str, list[Counts]] = {}

    def writes() -> int:
        called = bench.client.info("commandstats")
        return sum(s["calls"] for c, s in called.items() if c.removeprefix("cmdstat_") in writing)

    def ask(way: str, pipes: Sequence[Connection]) -> tuple[int, list[tuple[int, Answers]]]:
        before, number = writes(), next(numbers)
        for pipe in pipes:
            pipe.send((way, number))
        reports = [received(pipe) for pipe in pipes]
        return writes() - before, reports

    def verify(way: str, answer: tuple[int, list[tuple[int, Answers]]]) -> None:
        written, reports = answer
        loads, answers = zip(*reports, strict=True)
        kinds = sum((a.kinds for a in answers), Counter[str]())
        counts.setdefault(way, []).append({"loads": sum(loads), "writes": written, **kinds})
        wall_s = max(a.ended_s for a in answers) - min(a.started_s for a in answers)
        walls.setdefault(way, []).append(wall_s)

    compared = {
        "TieredCache": ("dogpile.cache",),
        "AsyncTieredCache": ("cashews", "aiocache"),
    }
    names = [name for ours, peers in compared.items() for name in (ours, *peers)]
    with processes(bench) as pipes:
        measure({name: partial(ask, name, pipes) for name in names}, after=verify)
    sides = [Side(name, walls[name][WARM_UPS:]) for name in names]
    by_name = {side.name: side for side in sides}
    loader = Side("the loader", [CROWD_LOAD_S] * len(sides[0].samples))
    measure_ = f"{PROCESSES} processes × {CROWD}"
    for name, peers in compared.items():
        yield from beside(
            measure_,
            [Tally(n, counts[n]) for n in (name, *peers)],
            {"loads": 1, "values": PROCESSES * CROWD},
            {"writes": MOST_WRITES},
        )
        yield slower(measure_, by_name[name], loader, at_most=1.3)
        for peer in peers:
            yield faster(measure_, by_name[name], by_name[peer])
    bench.facts["processes, of the loader"] = multiples(sides, loader)


# ── Main ────────────────────────────────────────────────────────────────────────────


def measures(settings: config.Settings) -> tuple[dict[str, str], list[Line | CountLine]]:
    """All lines, under a prefix whose keys are removed at the end, also after an error."""
    assert settings.redis_url
    with open_bench(settings.redis_url, settings.connect_timeout_s) as bench:
        lines: list[Line | CountLine] = [
            *hits(bench),
            *async_hits(bench),
            *hits_in_redis(bench),
            *async_hits_in_redis(bench),
            *many(bench),
            *several_processes(bench),
            *cold_key(bench),
            *first_cancelled(bench),
            *failing_loader(bench),  # last, for it leaves theine's hung threads
        ]
    sizes = {
        "value": json.dumps(record(NUMBER)),
        "in the process": f"{HITS:,} hits a round; dogpile.cache {FEWER_HITS['dogpile.cache']:,}, "
        f"asyncio {ASYNC_HITS:,}",
        "in Redis": f"{ROUND_KEYS:,} keys a round; get_many {MANY_ROUND_KEYS:,}, {BATCH} a call",
        "loads": f"{1e3 * LOAD_S:.0f} ms, those of the processes {1e3 * CROWD_LOAD_S:.0f} ms",
    }
    return {**bench.facts, **sizes}, lines


def main() -> int:
    clients, peers = "redis hiredis orjson", "cachetools theine dogpile.cache cashews aiocache"
    packages = f"{clients} {peers}".split()
    return run_bench(__doc__ or "", ("REDIS_URL",), packages, measures)


if __name__ == "__main__":
    raise SystemExit(main())
