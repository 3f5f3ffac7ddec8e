"""Kills the follower at each call that it makes, before the call and after it, and starts it again.

Refused: the two lines swapped and no more, since then a change may come twice, and its second
`add` or `remove` raises; the token saved in `finally`, also where handling failed; errors of the
index passed over, if only of updates and deletes; no token at all, or one for many changes, which
repeats too much; a token put back by `except` or `finally`, which a SIGKILL does not run.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from checks import Wrong

Document = dict[str, Any]
T = TypeVar("T")

MOST_STARTS = 3  # the first, the one after the kill, and one to spare


class Killed(BaseException):
    """Stands for SIGKILL: the calls that were made have their effect, and nothing follows."""


class Unavailable(Exception):
    """The index, not the change, is to blame."""


def changes() -> list[Document]:
    """Inserts, updates and deletes of three products; one is made again after its end."""
    told: list[Document] = []
    for what, key, name in [
        ("insert", 1, "tap"), ("insert", 2, "sink"), ("update", 1, "brass tap"),
        ("delete", 2, ""), ("insert", 3, "bath"), ("insert", 2, "steel sink"),
        ("replace", 3, "tub"), ("delete", 1, ""),
    ]:  # fmt: skip
        change = {
            "_id": f"token {len(told) + 1}",
            "operationType": what,
            "documentKey": {"_id": key},
        }
        told.append(change | ({"fullDocument": {"name": name}} if name else {}))
    return told


PRODUCTS = {2: {"name": "steel sink"}, 3: {"name": "tub"}}


class World:
    """Stream, tokens and index. Call number `kill_at` is the follower's last: it is killed before
    its effect if that number is even, after it if it is odd."""

    def __init__(self, kill_at: int, down_after: int | None = None) -> None:
        self.token: object | None = None
        self.documents: dict[int, Document] = {}
        self.calls, self.kill_at, self.is_dead = 0, kill_at, False
        self.down_after = down_after  # changes of the index, or never
        self.what = "no kill"
        self.handed: dict[object, int] = {}

    def call(self, what: str, effect: Callable[[], T]) -> T:
        step, self.calls = self.calls, self.calls + 1
        self._kill(2 * step, f"killed before {what}")
        done = effect()
        self._kill(2 * step + 1, f"killed after {what}")
        return done

    def _kill(self, moment: int, what: str) -> None:
        if moment == self.kill_at:
            self.is_dead, self.what = True, what
        if self.is_dead:
            raise Killed

    def watch(self, resume_after: object | None = None) -> Iterator[Document]:
        every = changes()
        tokens = [change["_id"] for change in every]
        for change in every[tokens.index(resume_after) + 1 if resume_after else 0 :]:
            self.handed[change["_id"]] = self.handed.get(change["_id"], 0) + 1
            yield change

    def load(self) -> object | None:
        return self.call("load()", lambda: self.token)

    def save(self, token: object) -> None:
        self.call(f"save({token!r})", lambda: setattr(self, "token", token))

    def add(self, key: int, document: Document) -> None:
        def effect() -> None:
            self._is_up()
            if key in self.documents:
                raise KeyError(f"{key} is there")
            self.documents[key] = document

        self.call(f"add({key})", effect)

    def replace(self, key: int, document: Document) -> None:
        def effect() -> None:
            self._is_up()
            self.documents[key] = document

        self.call(f"replace({key})", effect)

    def remove(self, key: int) -> None:
        def effect() -> None:
            self._is_up()
            if key not in self.documents:
                raise KeyError(f"{key} is not there")
            del self.documents[key]

        self.call(f"remove({key})", effect)

    def __contains__(self, key: int) -> bool:
        return self.call(f"{key} in index", lambda: key in self.documents)

    def _is_up(self) -> None:
        if self.down_after == 0:
            raise Unavailable("503 Service Unavailable")
        if self.down_after is not None:
            self.down_after -= 1


def follow(exercise: ModuleType, world: World) -> BaseException | None:
    """What ended it, if not the end of the stream."""
    world.is_dead = False
    try:
        exercise.Follower(world, world, world).run()
    except (Killed, Exception) as error:
        return error
    return None


def check(exercise: ModuleType) -> None:
    calls = undisturbed(exercise)
    for kill_at in range(2 * calls):
        world = World(kill_at)
        ended: BaseException | None = None
        for _ in range(MOST_STARTS):
            ended = follow(exercise, world)
            if ended is None:
                break
        call = f"Follower.run(), {world.what}, and run() again"
        if ended is not None:
            raise Wrong(call, "the end of the stream", f"each time {ended!r}")
        if world.documents != PRODUCTS:
            raise Wrong(call, f"in the index: {PRODUCTS}", world.documents)
        repeated = sum(world.handed.values()) - len(world.handed)
        if repeated > 1:
            raise Wrong(call, "one change handed over again at most", f"{repeated} of them")
    for n in range(len(changes())):
        world = World(-1, down_after=n)
        ended = follow(exercise, world)
        world.down_after = None
        call = f"Follower.run(), and the index answers 503 from change {n + 1} on"
        if not isinstance(ended, Unavailable):
            raise Wrong(call, "the index's error", repr(ended) if ended else "no error")
        follow(exercise, world)
        if world.documents != PRODUCTS:
            expected = f"in the index: {PRODUCTS}"
            raise Wrong(f"{call}; later run() again", expected, world.documents)


def undisturbed(exercise: ModuleType) -> int:
    """The number of calls that it makes, if it is right where nothing happens."""
    world = World(-1)
    exercise.Follower(world, world, world).run()
    if world.documents != PRODUCTS:
        raise Wrong("Follower.run()", f"in the index: {PRODUCTS}", world.documents)
    return world.calls
