"""A thousand callers, one key: single-flight.

The lock was right, and around the wrong thing: it guarded the dictionary, not the rendering. Held
while rendering, it would make all keys wait for each other. So there is a flight for each key: who
finds none under the lock renders, and the others wait for his result. An error is a result, too;
the flight ends either way, or nobody would ever render that key again.
Chapter: docs/03-caching.md#4-stampede; there also what it takes among processes.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

Render = Callable[[], str]


class PageCache:
    """Rendered pages by key; for threads."""

    def __init__(self, ttl_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._lock = threading.Lock()
        self._pages: dict[str, tuple[str, float]] = {}  # and until when each is fresh
        self._flights: dict[str, Future[str]] = {}  # renderings in progress

    def get(self, key: str, render: Render) -> str:
        """The page of `key`, from the cache or from `render()`, whose errors are raised."""
        mine: Future[str] = Future()
        with self._lock:
            page = self._fresh(key)
            if page is not None:
                return page
            flight = self._flights.setdefault(key, mine)
        return self._fly(key, render, mine) if flight is mine else flight.result()

    def _fly(self, key: str, render: Render, flight: Future[str]) -> str:
        try:
            page = render()
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            raise
        with self._lock:  # stored and ended in one step: nobody finds neither page nor flight
            self._pages[key] = page, self._clock() + self._ttl_s
            del self._flights[key]
        flight.set_result(page)
        return page

    def _fresh(self, key: str) -> str | None:
        page, fresh_until = self._pages.get(key, ("", float("-inf")))
        return page if self._clock() < fresh_until else None
