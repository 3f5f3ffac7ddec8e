"""What several tests of 03_caching_strategies.py share, besides the fixtures of conftest.py.

Both kinds of cache are driven by the same blocking calls: the asynchronous one lives on the loop of
an `asyncio.Runner` in a thread of its own, so that its background work goes on between two calls.

PYTEST_DONT_REWRITE: tests import its helpers before pytest could rewrite its assertions.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import shlex
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import ModuleType
from typing import Any, Protocol

import pytest
import redis
from services import ROOT

WAIT_S = 20.0  # for what takes milliseconds
POLL_S = 0.002
CALLERS = 100
TIMEOUT_S = 5.0  # of Redis: a busy machine must not look like an outage

on_redis = pytest.mark.parametrize("tier", ["redis"])
alone = pytest.mark.parametrize("tier", ["alone"])
synchronous = pytest.mark.parametrize("flavour", ["sync"])
asynchronous = pytest.mark.parametrize("flavour", ["async"])


class SourceDown(Exception):
    """What a loader raises."""


def admit(root: redis.Redis, user: str, password: str, prefix: str = "module8-") -> set[str]:
    """Make a `user` who may do what docs/servers.md grants and no more, under `prefix`; gives the
    commands granted. ACL LOG then holds what else was asked for.
    """
    guide = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (granted,) = re.findall(r"^redis-cli ACL SETUSER module8 on '>PASSWORD' (.+)$", guide, re.M)
    rights = shlex.split(granted.replace("module8-", prefix))
    root.execute_command("ACL", "SETUSER", user, "reset", "on", f">{password}", *rights)
    # How redis-py names itself: refused, it goes on. A server that does not know them logs nothing.
    for right in ("+client|setinfo", "+client|maint_notifications"):
        with suppress(redis.ResponseError):
            root.execute_command("ACL", "SETUSER", user, right)
    root.execute_command("ACL", "LOG", "RESET")
    return {right[1:] for right in rights if right.startswith("+")}


class Source:
    """A loader that the test steers: its answers in turn, the last one for good.

    An exception among them is raised. While it is held, loads that have begun wait for
    `release()`. Each load takes `takes_s` of a `clock` moved by hand.
    """

    def __init__(
        self, *answers: Any, held: bool = False, clock: Any = None, takes_s: float = 0.0
    ) -> None:
        self._answers, self._clock, self._takes_s = answers, clock, takes_s
        self._lock, self._released = threading.Lock(), threading.Event()
        self.calls: list[tuple[Any, ...]] = []  # their arguments
        if not held:
            self.release()

    @property
    def loads(self) -> int:
        """How many have begun."""
        return len(self.calls)

    def release(self) -> None:
        self._released.set()

    def __call__(self, *args: Any) -> Any:
        answer = self._begin(*args)
        assert self._released.wait(WAIT_S), "never released"
        return self._end(answer)

    async def awaited(self, *args: Any) -> Any:
        answer = self._begin(*args)
        while not self._released.is_set():
            await asyncio.sleep(POLL_S)
        return self._end(answer)

    def _begin(self, *args: Any) -> Any:
        with self._lock:
            self.calls.append(args)
            return self._answers[min(len(self.calls), len(self._answers)) - 1]

    def _end(self, answer: Any) -> Any:
        if self._clock is not None:
            self._clock.advance(self._takes_s)
        if isinstance(answer, BaseException):
            raise answer
        return answer


# ── The same work through either kind of cache ──────────────────────────────────────


class Driver(ABC):
    """A cache of either kind through blocking calls; `start` gives a call's future at once."""

    script: ModuleType
    cache: Any

    @abstractmethod
    def start(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]: ...

    @abstractmethod
    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as the cache takes a loader: a function, or a coroutine function."""

    @abstractmethod
    def decorate(self, function: Callable[..., Any], name: str, **options: Any) -> Any:
        """`function` under @cached, to be called blocking."""

    @abstractmethod
    def close(self) -> None: ...

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.start(method, *args, **kwargs).result(WAIT_S)

    def get_or_load(self, key: Any, loader: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return self.call("get_or_load", key, loader, *args, **more)

    def fetch(self, key: str, loader: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return self.call("fetch", key, loader, *args, **more)

    def get(self, key: Any, *default: Any) -> Any:
        return self.call("get", key, *default)

    def get_many(self, keys: Sequence[str], *args: Any, **more: Any) -> Any:
        return self.call("get_many", keys, *args, **more)

    def set(self, key: Any, value: object, *args: Any, **more: Any) -> Any:
        return self.call("set", key, value, *args, **more)

    def invalidate(self, *keys: str) -> Any:
        return self.call("invalidate", *keys)

    def invalidate_tag(self, tag: Any) -> Any:
        return self.call("invalidate_tag", tag)

    @property
    def stats(self) -> Any:
        return self.cache.stats()

    @property
    def in_progress(self) -> int:
        """Loads and refreshes that the cache keeps account of."""
        return len(self.cache._flights) + len(self.cache._refreshes)


class SyncDriver(Driver):
    def __init__(self, script: ModuleType, cache: Any, pool: ThreadPoolExecutor) -> None:
        self.script, self.cache, self._pool = script, cache, pool

    def start(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(getattr(self.cache, method), *args, **kwargs)

    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def decorate(self, function: Callable[..., Any], name: str, **options: Any) -> Any:
        return self.script.cached(self.cache, name, **options)(function)

    def close(self) -> None:
        self.cache.close()


class LoopThread:
    """The loop of an asyncio.Runner, in a thread of its own."""

    def __init__(self) -> None:
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._loop.set_result(asyncio.get_running_loop())
        await self._stop.wait()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop.result(WAIT_S))

    def close(self) -> None:
        self._loop.result(WAIT_S).call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)


class AsyncDriver(Driver):
    def __init__(self, script: ModuleType, cache: Any, loop: LoopThread) -> None:
        self.script, self.cache, self._loop = script, cache, loop

    def start(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        adapted = (self.adapt(arg) if callable(arg) else arg for arg in args)
        return self._loop.start(getattr(self.cache, method)(*adapted, **kwargs))

    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, Source):
            return function.awaited

        @functools.wraps(function)
        async def adapted(*args: Any, **kwargs: Any) -> Any:
            answer = function(*args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

        return adapted

    def decorate(self, function: Callable[..., Any], name: str, **options: Any) -> Any:
        made = self.script.cached(self.cache, name, **options)(self.adapt(function))

        def blocking(call: Callable[..., Any]) -> Any:
            return lambda *args, **more: self._loop.start(call(*args, **more)).result(WAIT_S)

        decorated = blocking(made)
        decorated.key, decorated.invalidate = made.key, blocking(made.invalidate)
        return decorated

    def close(self) -> None:
        self._loop.start(self.cache.aclose()).result(WAIT_S)


class MakeCache(Protocol):
    def __call__(self, name: str = "x", **options: Any) -> Driver:
        """A cache; `options` are those of Policy, and of Tiers.

        As long as `rng` is not given, nothing is drawn: no jitter, no early refresh.
        """


def finished(futures: Iterable[Future[Any]]) -> list[Any]:
    """Their values; an exception is an answer, too. None may hang."""
    ended = list(futures)
    return [future.exception(WAIT_S) or future.result() for future in ended]
