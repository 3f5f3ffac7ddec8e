WRONG = {
    "one lock for all keys": [
        ("return self._fly(key, render, mine) if flight is mine else flight.result()",
         "\n        with self._slow:\n"
         "            page = self._fresh(key)\n"
         "            return page if page is not None else self._fly(key, render, mine)"),
        ("        self._flights: dict", "        self._slow = threading.Lock()\n"
         "        self._flights: dict"),
        ("flight = self._flights.setdefault(key, mine)", "self._flights[key] = mine"),
        ("            self._pages[key] = page, self._clock() + self._ttl_s\n"
         "            del self._flights[key]",
         "            self._pages[key] = page, self._clock() + self._ttl_s"),
        ("            with self._lock:\n                del self._flights[key]\n", ""),
    ],
    "a lock for each key": [
        ("self._flights: dict[str, Future[str]]", "self._locks: dict[str, threading.Lock]"),
        ("self._flights.setdefault(key, mine)", "self._locks.setdefault(key, threading.Lock())"),
        ("return self._fly(key, render, mine) if flight is mine else flight.result()",
         "\n        with flight:\n"
         "            page = self._fresh(key)\n"
         "            return page if page is not None else self._fly(key, render, mine)"),
        ("            del self._flights[key]\n        flight.set_result",
         "        flight.set_result"),
        ("            with self._lock:\n                del self._flights[key]\n", ""),
    ],
    "a flight that an error does not end": [
        ("            with self._lock:\n                del self._flights[key]\n"
         "            flight.set_exception(error)\n            raise\n",
         "            raise error\n"),
    ],
    "an error that is kept": [
        ("            with self._lock:\n                del self._flights[key]\n"
         "            flight.set_exception(error)\n",
         "            flight.set_exception(error)\n"),
    ],
    "one page for all keys": [
        ("            self._pages[key] =", "            self._pages[''] ="),
        ("self._pages.get(key,", "self._pages.get('',"),
    ],
    "a look for the page, and one for the flight": [
        ("            flight = self._flights", "        with self._lock:\n"
         "            flight = self._flights"),
    ],
    "a flight that ends before its page is stored": [
        ("            self._pages[key] = page, self._clock() + self._ttl_s\n"
         "            del self._flights[key]\n",
         "            del self._flights[key]\n        with self._lock:\n"
         "            self._pages[key] = page, self._clock() + self._ttl_s\n"),
    ],
    "an old page for who waits": [
        ("return self._fly(key, render, mine) if",
         "if flight is not mine and key in self._pages:\n"
         "            return self._pages[key][0]\n"
         "        return self._fly(key, render, mine) if"),
    ],
    "an old page instead of the error": [
        ("            flight.set_exception(error)\n",
         "            if key in self._pages:\n"
         "                flight.set_result(self._pages[key][0])\n"
         "                return flight.result()\n"
         "            flight.set_exception(error)\n"),
    ],
    "pages that never end": [("if self._clock() < fresh_until", "if page")],
}  # fmt: skip
