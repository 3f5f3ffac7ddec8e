"""Old prices are not stored, in any order of two loads; and hits are hits."""

import itertools
import threading
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import Any

from checks import Wrong
from checks.threads import WAIT_S, answer, overtaken, start, until

OLD, NEW, COFFEE = 1_000, 4_200, 800


class Database:
    """Of one price that changes, of tea. Answers can be held: read, and not yet given."""

    def __init__(self) -> None:
        self.price, self.asked = OLD, 0

    def load(self, product: str) -> int:
        self.asked += 1
        return self.price if product == "tea" else COFFEE


class SlowLoad:
    """A call of `get` that has read the price, and pauses until `end`."""

    def __init__(self, cache: Any, database: Database) -> None:
        read, self._released = threading.Event(), threading.Event()

        def load(product: str) -> int:
            price = database.load(product)
            read.set()
            self._released.wait()  # longer than any deadline below
            return price

        self._future: Future[Any] = start(cache.get, "tea", load)
        if not until(read.is_set, WAIT_S):
            call = "cache.get('tea', load) while an older load is under way"
            raise Wrong(call, "a load of its own", f"none within {WAIT_S:g} s")

    def end(self) -> Any:
        self._released.set()
        return answer(self._future, "cache.get('tea', load) with a slow load")


def check(exercise: ModuleType) -> None:
    hits(exercise.PriceCache(), Database())
    one_load(exercise.PriceCache(), Database())
    for first in ("old", "new"):
        two_loads(exercise.PriceCache(), Database(), first)
    at_each_line(exercise)


def get(
    cache: Any, database: Database, when: str, expected: int = NEW, product: str = "tea"
) -> None:
    call = f"cache.get({product!r}, load), {when}"
    found = answer(start(cache.get, product, database.load), call)
    if found != expected:
        raise Wrong(call, expected, found)


def change(cache: Any, database: Database) -> None:
    database.price = NEW
    answer(start(cache.invalidate, "tea"), "cache.invalidate('tea') while a load is under way")


def one_load(cache: Any, database: Database) -> None:
    slow = SlowLoad(cache, database)
    change(cache, database)
    slow.end()
    get(cache, database, f"after a load of {OLD} during which the price became {NEW}")


def two_loads(cache: Any, database: Database, first: str) -> None:
    # Refuses a mark "invalidated" that the next load takes away, and a lease that is the same for
    # all loads: each lets the load of the old price pass for the one that began after it. And an
    # old load that takes away the lease of the new one, whose price then is not kept.
    old = SlowLoad(cache, database)
    change(cache, database)
    new = SlowLoad(cache, database)
    for slow in (old, new) if first == "old" else (new, old):
        slow.end()
    when = f"after loads of {OLD} and {NEW}; the {first} one ended first"
    asked = database.asked
    get(cache, database, when)
    if database.asked != asked:
        raise Wrong(f"cache.get('tea', load), {when}", "a hit: no load", "another load")


def at_each_line(exercise: ModuleType) -> None:
    # Refuses two steps where one is needed: in `get` the look at the lease, then the fill; in
    # `invalidate` the price, then the lease.
    for nth in itertools.count():
        cache, database = exercise.PriceCache(), Database()
        load, rival = partial(cache.get, "tea", database.load), partial(change, cache, database)
        line = overtaken(exercise, nth, load, rival, "cache.get('tea', load)")
        if not line:
            break
        get(cache, database, f"after an invalidation while another get was before line {line}")
    for nth in itertools.count():
        cache, database = exercise.PriceCache(), Database()
        slow, database.price = SlowLoad(cache, database), NEW
        invalidate = partial(cache.invalidate, "tea")
        line = overtaken(exercise, nth, invalidate, slow.end, "cache.invalidate('tea')")
        slow.end()
        if not line:
            break
        get(cache, database, f"after a load of {OLD} ended while invalidate was before line {line}")


def hits(cache: Any, database: Database) -> None:
    get(cache, database, "the first", OLD)
    get(cache, database, "the second", OLD)
    get(cache, database, "the first", COFFEE, "coffee")
    change(cache, database)
    get(cache, database, "after its invalidation")
    get(cache, database, "after that")
    get(cache, database, "after the invalidation of tea", COFFEE, "coffee")
    if database.asked != 3:
        call = "cache.get of tea twice and of coffee once, invalidate('tea'), then the same again"
        raise Wrong(call, "3 loads: 2 of tea, 1 of coffee", f"{database.asked} loads")
