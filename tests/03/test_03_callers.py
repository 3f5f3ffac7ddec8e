"""Script 03's cache and its callers: many at once, in bulk, by @cached, and in tasks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import sys
import threading
import time
import traceback
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, make_dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from running import until
from script03 import NEVER, WAIT_S, MakeCache, Source, SourceDown, app, finished, on_redis, start


def waiting() -> int:
    """Threads that wait within the script for another's load."""
    wait = threading.Event.wait.__code__
    gc.disable()  # Python 3.11 may deadlock with its threads where this call collects garbage
    try:
        frames = sys._current_frames().values()
    finally:
        gc.enable()
    events = [frame.f_back for frame in frames if frame.f_back and frame.f_back.f_code is wait]
    return sum(event.f_back.f_code.co_filename == app.__file__ for event in events if event.f_back)


def begun(source: Source, ask: Callable[..., Any], *args: Any) -> Future[Any]:
    """What is asked, once it loads."""
    asked = start(ask, *args, source)
    until(lambda: source.loads)
    return asked


def crowd(cache: Any, source: Source, callers: int) -> list[Any]:
    """What they get who all ask while the first one of them loads."""
    asked = [begun(source, cache.get_or_load, "k")]
    asked += [start(cache.get_or_load, "k", source) for _ in range(callers - 1)]
    until(lambda: waiting() == callers - 1)
    source.release()
    return finished(asked)


@pytest.mark.parametrize("answer", [{"a": 1}, SourceDown("no"), KeyboardInterrupt()], ids=repr)
def test_a_crowd_costs_one_load(make_cache: MakeCache, answer: Any) -> None:
    cache, slow = make_cache(), Source("slow", held=True)
    other = begun(slow, cache.get_or_load, "other")
    first, *others = crowd(cache, Source(answer, "again", held=True), 200)
    slow.release()
    assert finished([other]) == ["slow"]  # which held up nobody
    stats = [cache.stats()[name] for name in ("loads", "misses", "load_errors", "l2_hits")]
    if isinstance(answer, KeyboardInterrupt):  # who waits asks again
        assert (first, others) == (answer, ["again"] * 199)
    elif isinstance(answer, SourceDown):
        assert ([first, *others], stats) == ([answer] * 200, [1, 201, 1, 0])
        trace = traceback.extract_tb(answer.__traceback__)
        assert trace[-1].name == "__call__"  # the loader's
        assert len(trace) < 60  # not the waiters'
    else:
        assert ([first, *others], stats) == ([answer] * 200, [2, 2, 0, 0])
    assert cache.get_or_load("outer", lambda: cache.get_or_load("inner", lambda: "v")) == "v"


def test_who_waits_too_long_is_told(make_cache: MakeCache) -> None:
    cache, hung = make_cache(load_timeout_s=0.05, lease_s=60), Source("late", held=True)
    first = begun(hung, cache.get_or_load, "k")
    with pytest.raises(app.LoadTimeout):
        cache.get_or_load("k", NEVER)
    if cache.client:
        assert cache.client.unlink(cache.name("k") + ":lease") == 1  # as the server does at its end
    assert cache.get_or_load("k", Source("next")) == "next"
    hung.release()
    assert finished([first]) == ["late"]
    assert cache.get_or_load("k", NEVER) == make_cache().get_or_load("k", Source("next")) == "next"


INVALIDATIONS: dict[str, Callable[[Any, Any], object]] = {
    "key": lambda here, _: here.invalidate("k"),
    "tag": lambda here, _: here.invalidate(tags=["t"]),
    "key, heard": lambda here, there: (there.invalidate("k"), here.forget(here.name("k"))),
    "all": lambda here, there: (there.invalidate(tags=["t"]), here.forget()),  # as it reconnects
}  # fmt: skip


@pytest.mark.parametrize("act", INVALIDATIONS.values(), ids=INVALIDATIONS)
@pytest.mark.parametrize("reader", ["single", "untold", "asks meanwhile", "bulk"])
def test_nothing_old_is_kept(make_cache: MakeCache, tier: str, act: Any, reader: str) -> None:
    here = make_cache(lease_s=0.2)
    there = make_cache() if tier == "redis" else here
    ask, old = partial(here.get_or_load, tags=["t"]), Source({"k": "old"}, held=True)
    before = begun(old, *((here.get_many, ["k"]) if reader == "bulk" else (ask, "k")))
    if reader in ("untold", "bulk"):  # which names no tags
        there.invalidate("k")
    if reader != "untold":
        act(here, there)
    if reader == "asks meanwhile":  # and does not wait for that load
        assert ask("k", Source("new")) == "new"
    old.release()
    assert finished([before]) == [{"k": "old"}]  # who asked before
    new = Source("new")
    assert [ask("k", new), ask("k", new), there.get_or_load("k", NEVER)] == ["new"] * 3


@on_redis
@pytest.mark.parametrize("ask", ["get_or_load", "get_many"])
@pytest.mark.parametrize("what", ["key", "tag"])
def test_no_copy_is_older_than_an_invalidation(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, ask: str, what: str
) -> None:
    make_cache().get_or_load("k", Source("old"), tags=["t"])
    cache = make_cache()
    mget = cache.client.mget
    todo = [partial(INVALIDATIONS[what], cache, None)]

    def reply_and_be_overtaken(names: Any) -> Any:
        replies = mget(names)
        if todo and cache.name("t", "tag") in names:  # the last step of that reading
            todo.pop()()
        return replies

    monkeypatch.setattr(cache.client, "mget", reply_and_be_overtaken)
    cache.get_or_load("k", NEVER) if ask == "get_or_load" else cache.get_many(["k"])
    assert todo == []
    assert cache.get_or_load("k", Source("new")) == "new"


def test_get_many_asks_each_tier_once(make_cache: MakeCache, tier: str) -> None:
    cache, there, is_redis = make_cache(), make_cache(), tier == "redis"
    cache.get_or_load("l1", Source("in L1"))
    there.get_many(["l2"], Source({"l2": "in Redis"}))
    there.get_or_load("tagged", Source("old"), tags=["t"])
    there.invalidate(tags=["t"])

    def mgets() -> Any:
        return is_redis and cache.client.info("commandstats")["cmdstat_mget"]["calls"]

    before, source = mgets(), Source({"b": 2, "tagged": "new", "not asked for": 9})
    keys = ["b", "l1", "left out", "l2", "b", "tagged", "l1"]
    expected = {"b": 2, "l1": "in L1", "left out": None, "tagged": "new"}
    expected["l2"] = "in Redis" if is_redis else None
    assert cache.get_many(iter(keys), source) == expected
    assert mgets() - before == 2 * is_redis  # the values; the tokens of their tags
    assert source.calls == [(["b", "left out", *([] if is_redis else ["l2"]), "tagged"],)]
    assert cache.get_many(keys, source) == expected  # also the None
    assert (cache.get_many([], source), source.loads) == ({}, 1)
    assert mgets() - before == 2 * is_redis


@pytest.mark.parametrize("answer", [SourceDown("no"), KeyboardInterrupt(), [1]], ids=repr)
def test_a_bulk_load_that_fails_gives_its_leases_back(make_cache: MakeCache, answer: Any) -> None:
    cache, source = make_cache(), Source(answer, {"a": 1, "b": 2})
    (error,) = finished([start(cache.get_many, ["a", "b"], source)])
    assert error is answer or isinstance(error, AttributeError | TypeError)  # no mapping
    assert (cache.stats()["load_errors"], cache.stats()["loads"]) == (1, 0)
    assert cache.get_many(["a", "b"], source) == {"a": 1, "b": 2}
    assert make_cache().get_or_load("a", Source(1)) == 1  # no lease is waited for


@on_redis
def test_a_bulk_load_stores_nothing_that_another_loads(make_cache: MakeCache) -> None:
    slow, bulk = Source("single", held=True), {"a": "bulk", "b": "bulk"}
    single = begun(slow, make_cache().get_or_load, "a")
    assert make_cache().get_many(["a", "b"], Source(bulk)) == bulk
    assert make_cache().get_many(["a", "b"]) == {"b": "bulk"}
    slow.release()
    assert finished([single]) == ["single"]
    assert make_cache().get_many(["a", "b"]) == {"a": "single", "b": "bulk"}


def test_a_call_is_known_by_its_arguments(make_cache: MakeCache) -> None:
    source = Source("v")

    @app.cached(make_cache(), "price")
    def price(product: Any, currency: Any = "EUR", *, rebate: Any = None) -> Any:
        return [source(product), repr((product, currency, rebate))]

    same = [price(7), price(7, "EUR"), price(product=7), price(rebate=None, product=7)]
    assert (same, source.loads) == ([["v", "(7, 'EUR', None)"]] * 4, 1)
    assert price.key(7) == price.key(product=7, currency="EUR") != price.key(8)
    price.invalidate(product=7)
    assert [price(7), price(7), source.loads] == [*same[:2], 2]
    different = [1, True, "1", "True", None, "None", 0, False, "", -1, "a'b", "\n", "é", "x" * 300]
    assert all(price(one)[1] == repr((one, "EUR", None)) for one in different * 2)
    assert price("a", "b") != price("a','b") != price("a", rebate="b")
    assert source.loads == len(different) + 5
    for refused in (1.0, Decimal(1), uuid.UUID(int=1), date(2026, 1, 1), object(), [1], {}, (1,)):
        with pytest.raises(TypeError):  # also what equals an argument that was seen
            price(refused)
    with pytest.raises(TypeError):
        app.cached(make_cache(), "x")(asyncio.sleep)  # a coroutine function


Offer = make_dataclass("Offer", ["cents"])


@pytest.mark.parametrize(
    ("value", "encode", "decode"),
    [(Decimal("1.10"), str, Decimal), (Offer(5), asdict, lambda stored: Offer(**stored)),
     (datetime(2026, 1, 1, tzinfo=UTC), datetime.isoformat, datetime.fromisoformat),
     (None, str, Decimal), ([1], list, list)],
    ids=["Decimal", "dataclass", "datetime", "None", "list"],
)  # fmt: skip
def test_key_encode_decode(make_cache: MakeCache, value: Any, encode: Any, decode: Any) -> None:
    class Shop:
        def __init__(self, name: str) -> None:
            self.name, self.source = name, Source(value)

        @app.cached(make_cache(), "x", key=lambda shop, what: f"{shop.name}:{what}",
                    encode=encode, decode=decode)  # fmt: skip
        def offer(self, _what: dict[str, Any]) -> Any:
            return self.source()

    shops, what = [Shop("one"), Shop("other")], {"id": uuid.UUID(int=1), "cost": Decimal(1)}
    answers = [shop.offer(what) for shop in shops * 3]
    Shop.offer.invalidate(shops[0], what)
    answers += [shop.offer(what) for shop in shops]
    assert answers == [value] * 8
    assert {type(answer) for answer in answers} == {type(value)}
    assert [shop.source.loads for shop in shops] == [2, 1]
    if isinstance(value, (Offer, list)):  # each caller has an object of his own
        assert len({id(answer) for answer in answers}) == 8


def test_what_is_kept_for_arguments_is_bounded() -> None:
    size = app.cached(app.TieredCache("x", max_entries=100), "x")(lambda what: len(f"{what}"))
    tracemalloc.start()
    try:
        for number in range(6_200):
            if number == 200:
                before, _ = tracemalloc.get_traced_memory()
            size(number)
            assert number % 120 or size(f"{number}".ljust(1_200_000)) == 1_200_000
        assert tracemalloc.get_traced_memory()[0] - before < 500_000
    finally:
        tracemalloc.stop()


@on_redis
def test_a_call_passes_few_of_our_functions(make_cache: MakeCache) -> None:
    cache = make_cache(clock=time.monotonic, wall_clock=time.time, rng=random.random)
    price, passed = app.cached(cache, "x")(lambda number: number), set[str]()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == app.__file__:
            passed.add(frame.f_code.co_qualname)

    def functions(ask: Callable[..., object], *args: Any) -> int:
        """How many it passes; a comprehension is none, as from Python 3.12 on."""
        passed.clear()
        sys.setprofile(note)
        ask(*args)
        sys.setprofile(None)
        return sum(not name.endswith(">") for name in passed)

    assert 4 < functions(cache.get_or_load, "k", Source(1)) <= 25
    cache.forget()
    assert 4 < functions(cache.get_or_load, "k", NEVER) <= 20  # from Redis
    price(7)
    assert 0 < functions(price, 7) <= functions(cache.get_or_load, "k", NEVER) <= 4


HANG = partial(asyncio.sleep, WAIT_S)


def awaited(source: Source) -> Callable[[], Any]:
    return partial(asyncio.to_thread, source)


@pytest.fixture
def tasks(make_cache: MakeCache) -> Iterator[Any]:
    patient = make_cache(load_timeout_s=WAIT_S, lease_s=WAIT_S)
    with closing(app.AsyncTieredCache(patient)) as made:
        yield made


@pytest.mark.parametrize("answer", ["v", SourceDown("no")], ids=["value", "error"])
def test_200_tasks_cost_one_load_and_the_first_may_be_cancelled(tasks: Any, answer: Any) -> None:
    source = Source(answer, held=True)

    async def ask() -> list[Any]:
        coroutines = [tasks.get_or_load("k", awaited(source)) for _ in range(200)]
        asked = [asyncio.create_task(each) for each in coroutines]
        await asyncio.to_thread(until, lambda: source.loads)
        asked[0].cancel()
        await asyncio.wait(asked[:1])
        source.release()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert isinstance(first, asyncio.CancelledError)
    assert (others, source.loads) == ([answer] * 199, 1)
    tasks.close()
    if answer == "v":  # a hit needs no thread
        assert asyncio.run(tasks.get_or_load("k", HANG)) == "v"


def test_tasks_do_not_wait_for_a_load_from_before_an_invalidation(tasks: Any) -> None:
    old = Source("old", held=True)

    async def ask() -> list[Any]:
        before = asyncio.create_task(tasks.get_or_load("k", awaited(old)))
        await asyncio.to_thread(until, lambda: old.loads)
        assert await tasks.run(tasks.cache.invalidate, "k")
        after = await tasks.get_or_load("k", awaited(Source("new")))
        old.release()
        return [await before, after, await tasks.get_or_load("k", HANG)]

    assert asyncio.run(ask()) == ["old", "new", "new"]


@pytest.mark.parametrize("cut_off", ["never", "in the loader", "before it", "as the loop ends"])
def test_one_cache_serves_one_loop_after_another(make_cache: MakeCache, cut_off: str) -> None:
    reached, may_go = threading.Event(), threading.Event()

    def clock() -> float:  # the thread reads it before it asks the loop for the load
        if cut_off in ("before it", "as the loop ends") and not reached.is_set():
            reached.set()
            assert may_go.wait(WAIT_S)
        return 0.0

    async def load() -> str:
        reached.set()
        return await asyncio.sleep(0 if cut_off == "never" else WAIT_S, "first")

    async def last() -> Any:  # closed once asyncio.run has cancelled all tasks
        try:
            yield
        finally:
            may_go.set()
            await asyncio.sleep(0.1)

    async def ask_first() -> None:
        task = asyncio.create_task(cache.get_or_load("k", load))
        await asyncio.to_thread(until, reached.is_set)
        if cut_off in ("never", "as the loop ends"):
            await (task if cut_off == "never" else anext(ending))

    cache, ending = app.AsyncTieredCache(make_cache(clock=clock, load_timeout_s=2)), last()
    asyncio.run(ask_first())
    again = start(asyncio.run, cache.get_or_load("k", awaited(Source("second"))))
    if cut_off == "before it":
        until(lambda: waiting() == 1)
    may_go.set()
    assert finished([again]) == ["first" if cut_off == "never" else "second"]
    cache.close()


def test_a_loader_that_raises_stop_iteration_is_an_error(tasks: Any) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):  # else nobody ever hears of it
        asyncio.run(
            asyncio.wait_for(
                tasks.run(tasks.cache.get_or_load, "k", lambda: next(iter(()))), WAIT_S
            )
        )


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "is cancelled"])
def test_a_loader_that_hangs_or_is_cancelled_is_an_error(tasks: Any, hangs: bool) -> None:
    source, patient = Source(asyncio.CancelledError()), tasks.cache.policy

    async def load() -> Any:
        await asyncio.sleep(WAIT_S if hangs else 0)
        return source()

    async def ask() -> list[Any]:
        if hangs:
            tasks.cache.policy = replace(patient, load_timeout_s=0.1)
        asked = [tasks.get_or_load("k", load) for _ in range(3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        tasks.cache.policy = patient
        return [*answers, await tasks.get_or_load("k", awaited(Source("next")))]

    *errors, answer = asyncio.run(ask())
    told = (TimeoutError, app.LoadTimeout) if hangs else app.LoadCancelled
    assert all(isinstance(each, told) for each in errors), errors
    assert (answer, source.loads) == ("next", not hangs)


def test_tasks_threads_and_loops_share_a_load_in_its_context(tasks: Any) -> None:
    user, source = contextvars.ContextVar("user", default="nobody"), Source("v", held=True)

    async def load() -> str:
        return f"{await asyncio.to_thread(source)} {user.get()}"

    async def ask() -> list[Any]:
        user.set("ann")
        task = asyncio.create_task(tasks.get_or_load("k", load))
        await asyncio.to_thread(until, lambda: source.loads)
        thread = start(tasks.cache.get_or_load, "k", NEVER)
        loop = start(asyncio.run, tasks.get_or_load("k", load))  # another one
        await asyncio.to_thread(until, lambda: waiting() == 2)
        source.release()
        return [await task, *await asyncio.to_thread(finished, [thread, loop])]

    assert (asyncio.run(ask()), source.loads) == (["v ann"] * 3, 1)
