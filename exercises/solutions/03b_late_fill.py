"""A price that comes back from the dead: a lease.

Deleting takes away what is stored, not what is about to be. So a load takes a lease, and a fill
needs it; an invalidation deletes the lease together with the price. The lease is of one load: were
it the same for all loads of a product, a later load would renew it for an earlier one.
Chapter: docs/03-caching.md#5-invalidation; FILL does the same in Redis, for all processes.
"""

import threading
from collections.abc import Callable

Load = Callable[[str], int]  # product → cents, from the database


class PriceCache:
    """Prices in cents, by product; for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prices: dict[str, int] = {}
        self._leases: dict[str, object] = {}  # of the load that began last

    def get(self, product: str, load: Load) -> int:
        """From the cache, or from the database, whose errors are raised."""
        lease = object()
        with self._lock:
            if product in self._prices:
                return self._prices[product]
            self._leases[product] = lease
        price = None
        try:
            price = load(product)
            return price
        finally:
            with self._lock:
                if self._leases.get(product) is lease:
                    del self._leases[product]
                    if price is not None:  # the load has not failed
                        self._prices[product] = price

    def invalidate(self, product: str) -> None:
        """To be called after the change of a price is committed."""
        with self._lock:
            self._prices.pop(product, None)
            self._leases.pop(product, None)
