"""One rendering for all who wait, whatever becomes of it; and no waiting for other keys."""

import itertools
import threading
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import Any

from checks import Wrong
from checks.threads import GRACE_S, WAIT_S, answer, overtaken, start, until

CALLERS, FEW = 200, 20
TTL_S = 60.0


class SourceDown(Exception):
    """What a rendering raises."""


class Rendering:
    """Counts; each rendering waits for `release`, then fails if it was told to."""

    def __init__(self, fails: bool = False, page: str = "the page") -> None:
        self.page = page
        self._fails, self._released, self._lock = fails, threading.Event(), threading.Lock()
        self.begun = 0

    def release(self) -> None:
        self._released.set()

    def __call__(self) -> str:
        with self._lock:
            self.begun += 1
        self._released.wait()
        if self._fails:
            raise SourceDown
        return self.page


def crowd(cache: Any, render: Rendering, callers: int) -> list[Future[Any]]:
    """They ask for "home" at once; the rendering ends when all had the time to begin theirs."""
    arrived = threading.Semaphore(0)

    def ask() -> Any:
        arrived.release()
        return cache.get("home", render)

    asking = [start(ask) for _ in range(callers)]
    for _ in range(callers):
        arrived.acquire(timeout=WAIT_S)
    until(lambda: render.begun == callers, GRACE_S)
    render.release()
    return asking


def check(exercise: ModuleType) -> None:
    now_s = 0.0
    cache = exercise.PageCache(TTL_S, lambda: now_s)
    render, call = Rendering(), f"{CALLERS} threads at once: cache.get('home', render)"
    answers = {answer(one, call) for one in crowd(cache, render, CALLERS)}
    if render.begun != 1:
        raise Wrong(call, "1 rendering", f"{render.begun} renderings")
    if answers != {"the page"}:
        raise Wrong(call, "'the page' for each", answers)
    for at_s, expected, when in ((TTL_S - 1, 1, "before"), (TTL_S + 1, 2, "after")):
        now_s = at_s
        answer(start(cache.get, "home", render), call)
        if render.begun != expected:
            again = f"cache.get('home', render), a second {when} the end of its ttl_s"
            raise Wrong(again, f"{expected} renderings in all", f"{render.begun} renderings")
    now_s = 3 * TTL_S
    errors(cache)
    errors(exercise.PageCache())
    other_keys(exercise.PageCache())
    two_callers(exercise)


def other_keys(cache: Any) -> None:
    # Refuses the lock that is held while rendering: one key at a time; and one page for all keys.
    slow, quick = Rendering(), Rendering(page="another page")
    quick.release()
    asking = start(cache.get, "slow", slow)
    until(lambda: slow.begun == 1, WAIT_S)
    answer(start(cache.get, "quick", quick), "cache.get('quick', …) while 'slow' is rendered")
    slow.release()
    answer(asking, "cache.get('slow', …)")
    call = "cache.get('quick', …) once more, after 'slow' was rendered"
    page = answer(start(cache.get, "quick", quick), call)
    if page != quick.page:
        raise Wrong(call, quick.page, page)


def two_callers(exercise: ModuleType) -> None:
    # Refuses two steps between which the second finds neither page nor flight: a look for the one,
    # then for the other; and a flight that is ended before the page is stored.
    for nth in itertools.count():
        render = Rendering()
        render.release()
        ask, call = partial(exercise.PageCache().get, "home", render), "cache.get('home', render)"
        line = overtaken(exercise, nth, ask, ask, call)
        if not line:
            return
        if render.begun != 1:
            call = f"{call}, by a second thread while the first is before line {line}"
            raise Wrong(call, "1 rendering", f"{render.begun} renderings")


def errors(cache: Any) -> None:
    # Refuses the flight that does not end where rendering fails, and a lock a key, by which each
    # who waits renders again, after the one before. Half may: who comes late finds no flight. And
    # the page whose time is over, for who waits, or instead of the error.
    call = f"{FEW} threads at once, no fresh page: cache.get('home', render) raises SourceDown"
    failing = Rendering(fails=True)
    for found in [answer(one, call, (SourceDown,)) for one in crowd(cache, failing, FEW)]:
        if not isinstance(found, SourceDown):
            raise Wrong(call, "SourceDown for each", found)
    if failing.begun > FEW // 2:
        raise Wrong(call, "1 rendering", f"{failing.begun} renderings")
    later, call = Rendering(page="later"), "cache.get('home', render), after one that failed"
    later.release()
    found = answer(start(cache.get, "home", later), call, (SourceDown,))
    if found != later.page:
        raise Wrong(call, repr(later.page), found)
