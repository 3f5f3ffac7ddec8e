"""What checks with threads share: each answer has a deadline, so that none hangs."""

import itertools
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType, ModuleType
from typing import Any

from checks import Wrong

WAIT_S = 5.0  # for what takes milliseconds
GRACE_S = 0.5  # for what must not happen; too short, it spares a wrong solution, fails no right one
MOMENT_S = 0.02  # likewise, at each line


def start(work: Callable[..., Any], *args: Any) -> Future[Any]:
    """In a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:  # an answer, too
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def answer(future: Future[Any], call: str, may_raise: tuple[type[Exception], ...] = ()) -> Any:
    """Its value. Errors of the kinds in `may_raise` are values, others are raised here."""
    try:
        error = future.exception(WAIT_S)
    except TimeoutError:
        raise Wrong(call, "an answer", f"none within {WAIT_S:g} s") from None
    return error if isinstance(error, may_raise) else future.result()


def until(condition: Callable[[], bool], deadline_s: float) -> bool:
    """Whether it came true by the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def overtaken(
    exercise: ModuleType, nth: int, work: Callable[[], Any], rival: Callable[[], Any], call: str
) -> int:
    """Before the `nth` line of the exercise that `work` comes to, from 0, another thread runs
    `rival`: to its end, or to what `work` locks. Gives the number of the line in its file, or 0."""
    lines, seen, rivals = itertools.count(), 0, list[Future[Any]]()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if frame.f_globals is not vars(exercise):
            return None
        if event == "line" and next(lines) == nth:
            seen = frame.f_lineno
            rivals.append(start(rival))
            until(rivals[0].done, MOMENT_S)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()

    answer(start(traced), call)
    for future in rivals:
        answer(future, call)
    return seen
