"""A rate limit that lets through twice as many.

A payment provider allows 100 calls in any 60 seconds, and blocks for an hour whoever makes more. We
count ours, and stop at 100 in a minute. On a normal day that holds. On the day of the sale we are
blocked at 12:01: the provider shows 200 calls between 12:00:59 and 12:01:01. Our own log shows no
minute with more than 100.

Change `RateLimit` so that in no span of `window_s` seconds, wherever it begins, more than `limit`
calls are allowed.

Judged: by a clock of the check's own, and 2,000 calls at random times, also for another limit and
window. No span holds more than `limit`, and a call is refused only where one more would be too
many: fewer than promised is as wrong as more. Exactly `window_s` after a call, either answer
passes. A refused call does not count. What is kept in memory does not grow with the calls, allowed
or refused. Threads are not judged.
"""

import threading
import time
from collections.abc import Callable


class RateLimit:
    """At most `limit` calls in `window_s` seconds; for threads."""

    def __init__(
        self, limit: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._window_s, self._clock = limit, window_s, clock
        self._lock = threading.Lock()
        self._window = 0  # the number of the present one
        self._used = 0  # calls in it

    def allow(self) -> bool:
        """Whether a call may be made now; it is counted then."""
        with self._lock:
            window = int(self._clock() // self._window_s)
            if window != self._window:
                self._window, self._used = window, 0
            if self._used >= self._limit:
                return False
            self._used += 1
            return True
