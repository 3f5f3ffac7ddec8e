"""A rate limit that lets through no more: the times of the last calls.

A window that begins at the full minute promises something about full minutes. The provider counts
in any 60 seconds, so the oldest of the last `limit` calls decides: one more is allowed when it lies
a window back. Exact, at the price of `limit` times in memory.
Chapter: docs/03-caching.md#7-real-world. Its token bucket keeps two numbers, and promises less:
`capacity` at once, and what has trickled in since, so nearly twice as many in the first window.
"""

import threading
import time
from collections import deque
from collections.abc import Callable


class RateLimit:
    """At most `limit` calls in `window_s` seconds; for threads."""

    def __init__(
        self, limit: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._window_s, self._clock = limit, window_s, clock
        self._lock = threading.Lock()
        self._allowed_at: deque[float] = deque(maxlen=limit)  # the last ones, the oldest first

    def allow(self) -> bool:
        """Whether a call may be made now; it is counted then."""
        with self._lock:
            now = self._clock()
            is_full = len(self._allowed_at) == self._limit
            if is_full and now - self._allowed_at[0] < self._window_s:
                return False
            self._allowed_at.append(now)
            return True
