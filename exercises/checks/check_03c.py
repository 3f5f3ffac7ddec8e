"""The border of a window first, then random times against a count by hand."""

import random
import tracemalloc
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from checks import Wrong

LIMIT, WINDOW_S = 100, 60.0
FEW, SHORT_S = 30, 20.0  # other numbers than those of the story
CALLS, RATE_PER_S = 2_000, 4.0  # more than twice the limit
SEED = 3
FLOOD = 8  # times the limit
MOST_GROWN = 10_000  # bytes; the times of a flooded window take more than twice that


def check(exercise: ModuleType) -> None:
    noon = 12 * 3600.0
    border(exercise.RateLimit, noon)
    random_times(exercise.RateLimit, noon)
    memory(exercise.RateLimit)


def asked(
    make: Callable[..., Any], times: Iterable[float], most: int = LIMIT, window_s: float = WINDOW_S
) -> list[float]:
    """When calls were allowed."""
    now = 0.0
    limit, allowed = make(most, window_s, lambda: now), []
    for at in times:
        now = at
        if limit.allow():
            allowed.append(at)
    return allowed


def border(make: Callable[..., Any], noon: float) -> None:
    # Refuses the token bucket, too: full, it has as many again a window later.
    for first, second in ((59.0, 61.0), (1.0, 59.0)):
        times = [noon + at + n / 1000 for at in (first, second) for n in range(LIMIT)]
        call = f"{LIMIT} × allow() {first:g} s past noon, {LIMIT} × at {second:g} s"
        if (allowed := len(asked(make, times))) != LIMIT:
            raise Wrong(call, f"{LIMIT} allowed", f"{allowed} allowed")


def random_times(make: Callable[..., Any], noon: float) -> None:
    # Refuses what counts refused calls, too: who goes on asking is never let in again.
    rng, at, times = random.Random(SEED), noon, []
    for _ in range(CALLS):
        at += rng.expovariate(RATE_PER_S)
        times.append(at)
    allowed, expected = asked(make, times, FEW, SHORT_S), list[float]()
    for time in times:
        if sum(time - SHORT_S < earlier for earlier in expected) < FEW:
            expected.append(time)
    for time in times:
        if (time in allowed) != (time in expected):
            inside = sum(time - SHORT_S < earlier < time for earlier in allowed)
            call = (
                f"RateLimit({FEW}, {SHORT_S:g}).allow() {time - noon:.2f} s past noon, "
                f"{inside} allowed in {SHORT_S:g} s before"
            )
            raise Wrong(call, time in expected, time in allowed)


def memory(make: Callable[..., Any]) -> None:
    now = 0.0
    limit, kept = make(LIMIT, WINDOW_S, lambda: now), list[int]()
    tracemalloc.start()
    for n in range(10 * FLOOD * LIMIT):
        now = n * WINDOW_S / LIMIT / FLOOD
        limit.allow()
        if n in (2 * LIMIT - 1, 10 * FLOOD * LIMIT - 1):
            kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    if kept[1] - kept[0] > MOST_GROWN:
        call = f"{10 * FLOOD * LIMIT} × allow() in {10 * WINDOW_S:g} s, most of them refused"
        as_many = f"as much memory as after {2 * LIMIT} × allow()"
        raise Wrong(call, as_many, f"{kept[1] - kept[0]:,} bytes more")
