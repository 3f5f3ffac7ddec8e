"""A thousand callers, one key.

The home page takes a second to render and is cached for a minute. Once a minute, at the busiest
hour, the database's CPU goes to 100 %, and the page takes twenty seconds. The log of slow queries
shows why: at that moment the same page is rendered by everybody who asks for it, until the first
rendering has ended. On a quiet day nobody notices.

Change `PageCache` so that one caller renders a key and the others wait for what he gets.

Judged: 200 threads ask for one key, and it is rendered once; or two, the second while the first is
at any line of `get`. A page of another key is not kept waiting meanwhile. Where rendering fails,
all who wait get the error, and who asks later renders again. A page lives for `ttl_s`, by the
`clock` that the cache is given; after that nobody gets it, also where rendering fails.
"""

import threading
import time
from collections.abc import Callable

Render = Callable[[], str]


class PageCache:
    """Rendered pages by key; for threads."""

    def __init__(self, ttl_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._lock = threading.Lock()
        self._pages: dict[str, tuple[str, float]] = {}  # and until when each is fresh

    def get(self, key: str, render: Render) -> str:
        """The page of `key`, from the cache or from `render()`, whose errors are raised."""
        with self._lock:
            page = self._fresh(key)
        if page is not None:
            return page
        page = render()
        with self._lock:
            self._pages[key] = page, self._clock() + self._ttl_s
        return page

    def _fresh(self, key: str) -> str | None:
        page, fresh_until = self._pages.get(key, ("", float("-inf")))
        return page if self._clock() < fresh_until else None
