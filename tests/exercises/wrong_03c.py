WRONG = {
    "refused calls count": [
        ("                return False\n            self._allowed_at.append(now)\n",
         "                self._allowed_at.append(now)\n                return False\n"
         "            self._allowed_at.append(now)\n"),
    ],
    "a token bucket": [
        ("        self._allowed_at: deque[float] = deque(maxlen=limit)  "
         "# the last ones, the oldest first\n",
         "        self._tokens, self._at = float(limit), clock()\n"),
        ("            is_full = len(self._allowed_at) == self._limit\n"
         "            if is_full and now - self._allowed_at[0] < self._window_s:\n",
         "            trickled = (now - self._at) * self._limit / self._window_s\n"
         "            self._tokens = min(self._limit, self._tokens + trickled)\n"
         "            self._at = now\n"
         "            if self._tokens < 1:\n"),
        ("self._allowed_at.append(now)", "self._tokens -= 1"),
    ],
    "half of the limit a window": [("deque(maxlen=limit)", "deque(maxlen=limit // 2)"),
                                   ("== self._limit", "== self._limit // 2")],
    "the numbers of the story": [
        ("deque(maxlen=limit)", "deque(maxlen=100)"), ("== self._limit", "== 100"),
        ("< self._window_s", "< 60.0"),
    ],
    "refused calls are kept, and do not count": [
        ("deque[float] = deque(maxlen=limit)", "list[tuple[float, bool]] = []"),
        ("            is_full = len(self._allowed_at) == self._limit\n"
         "            if is_full and now - self._allowed_at[0] < self._window_s:\n"
         "                return False\n"
         "            self._allowed_at.append(now)\n"
         "            return True\n",
         "            recent = [at for at in self._allowed_at if now - at[0] < self._window_s]\n"
         "            is_allowed = sum(was for _, was in recent) < self._limit\n"
         "            self._allowed_at = [*recent, (now, is_allowed)]\n"
         "            return is_allowed\n"),
    ],
    "all times are kept": [
        ("deque(maxlen=limit)", "deque()"),
        ("len(self._allowed_at) == self._limit", "len(self._allowed_at) >= self._limit"),
        ("self._allowed_at[0]", "self._allowed_at[-self._limit]"),
    ],
    "all times are kept, in a list of a dict": [
        ("self._allowed_at: deque[float] = deque(maxlen=limit)",
         "self._allowed_at: dict[str, list[float]] = {'all': []}"),
        ("len(self._allowed_at) ==", "len(self._allowed_at['all']) >="),
        ("self._allowed_at[0]", "self._allowed_at['all'][-self._limit]"),
        ("self._allowed_at.append", "self._allowed_at['all'].append"),
    ],
}  # fmt: skip
