"""A price that comes back from the dead.

A shop changes the price of tea to 42.00 and invalidates its cache. For some minutes the site goes
on selling tea for 10.00. The log is in order: the update was committed, and the invalidation ran
after it, as it should. Somebody had asked for the price just before, though, and his process was
busy collecting garbage between the answer of the database and the line that stores it.

Change `PriceCache` so that nobody stores what he read before an invalidation.

Judged: after a change and its invalidation, the cache never gives the old price, whoever was
loading it meanwhile, at whichever line, and however many loads are under way. `invalidate` does not
wait for a load. A price that was loaded after the invalidation is kept: the next call is a hit. The
slow caller himself may get the old price: he asked before the change.
"""

import threading
from collections.abc import Callable

Load = Callable[[str], int]  # product → cents, from the database


class PriceCache:
    """Prices in cents, by product; for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prices: dict[str, int] = {}

    def get(self, product: str, load: Load) -> int:
        """From the cache, or from the database, whose errors are raised."""
        with self._lock:
            if product in self._prices:
                return self._prices[product]
        price = load(product)
        with self._lock:
            self._prices[product] = price
        return price

    def invalidate(self, product: str) -> None:
        """To be called after the change of a price is committed."""
        with self._lock:
            self._prices.pop(product, None)
