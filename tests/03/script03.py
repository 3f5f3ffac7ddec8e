"""What the tests of script 03 share: a source to steer, threads, and a user of docs/servers.md.

PYTEST_DONT_REWRITE: tests import its helpers before pytest could rewrite its assertions.
"""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest
import redis
from services import ROOT, load_script

app: Any = load_script("03_caching_strategies")

WAIT_S = 20.0  # for what takes milliseconds
TIMEOUT_S = 5.0  # of Redis: a busy machine must not look like an outage
on_redis = pytest.mark.parametrize("tier", ["redis"])


class SourceDown(Exception):
    """What a loader raises."""


class Source:
    """A loader that the test steers: its answers in turn, the last one for good; an exception among
    them is raised. While it is held, loads that have begun wait for `release()`."""

    def __init__(self, *answers: Any, held: bool = False) -> None:
        self._answers, self._lock, self._released = answers, threading.Lock(), threading.Event()
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
        with self._lock:
            self.calls.append(args)
            answer = self._answers[min(len(self.calls), len(self._answers)) - 1]
        assert self._released.wait(WAIT_S), "never released"
        if isinstance(answer, BaseException):
            raise answer
        return answer


NEVER = Source(AssertionError("the source is asked"))


# A TieredCache of Policy's options, and its own; as long as `rng` is not among them, nothing is
# drawn: no jitter, no early load.
MakeCache = Callable[..., Any]


def start(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """In a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:  # also an interrupt is an answer
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def finished(futures: Iterable[Future[Any]]) -> list[Any]:
    """Their values; an exception is an answer, too. None may hang."""
    ended = list(futures)
    return [future.exception(WAIT_S) or future.result() for future in ended]


def admit(root: redis.Redis, user: str, password: str, prefix: str = "module8-") -> set[str]:
    """Make a `user` who may do what docs/servers.md grants and no more, under `prefix`; gives the
    commands granted. ACL LOG then holds what else was asked for."""
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
