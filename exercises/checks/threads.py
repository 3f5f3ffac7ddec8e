"""What checks with threads share: each answer has a deadline, so that none hangs."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from checks import Wrong

WAIT_S = 5.0  # for what takes milliseconds
GRACE_S = 0.5  # for what must not happen; too short, it spares a wrong solution, fails no right one


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
