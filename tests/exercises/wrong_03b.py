WRONG = {
    "stored only where nothing is": [
        ("            self._leases.pop(product, None)\n", ""),
        ("self._prices[product] = price", "self._prices.setdefault(product, price)"),
    ],
    "one lease for all loads of a product": [("lease = object()", "lease = True")],
    "a mark that the next load takes away": [
        ("            self._leases.pop(product, None)\n",
         "            self._leases[product] = True\n"),
        ("self._leases[product] = lease", "self._leases.pop(product, None)"),
        ("if self._leases.get(product) is lease:\n                    del self._leases[product]\n",
         "if product not in self._leases:\n"),
    ],
    "an old load takes away the lease of a new one": [
        ("if self._leases.get(product) is lease:\n                    del self._leases[product]\n",
         "if self._leases.pop(product, None) is lease:\n"),
    ],
    "invalidate waits for the load": [
        ("            self._leases[product] = lease\n",
         "            self._prices[product] = load(product)\n"
         "            return self._prices[product]\n"),
    ],
    "one price for all products": [
        ("if product in self._prices:\n                return self._prices[product]\n",
         "if self._prices:\n                return next(iter(self._prices.values()))\n"),
    ],
    "invalidate empties the cache": [("self._prices.pop(product, None)", "self._prices.clear()")],
    "nothing is ever kept": [("if price is not None:", "if price is None:")],
    "looked at, then stored": [
        ("                if self._leases.get(product) is lease:\n"
         "                    del self._leases[product]\n",
         "                is_valid = self._leases.get(product) is lease\n"
         "            with self._lock:\n"
         "                if is_valid:\n"),
    ],
    "first the price is deleted, then the lease": [
        ("            self._leases.pop(product, None)\n",
         "        with self._lock:\n            self._leases.pop(product, None)\n"),
    ],
}  # fmt: skip

RIGHT = {
    "an old price is loaded again": [
        ("            return price\n",
         "            if self._leases.get(product) is lease:\n"
         "                return price\n"
         "            return self.get(product, load)\n"),
    ],
}  # fmt: skip
