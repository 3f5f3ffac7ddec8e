ASK = 'tax_cents = self._tax_cents(order["number"])\n'
TRANSIENT = 'raise messaging.Transient("the tax service is unavailable") from error'
BOOK = '        self._book(order["number"], tax_cents)\n'
IMPORT = "import importlib\n"
SHORT_WAITS = f"""import time
            for _ in range(4):
                try:
                    {ASK}                    break
                except Unavailable:
                    time.sleep(0.01)
            else:
                {ASK}"""
TIMER = """self._later(order["number"])
            return
        self._book(order["number"], tax_cents)

    def _later(self, number: int, attempt: int = 0) -> None:
        def again() -> None:
            try:
                self._book(number, self._tax_cents(number))
            except Unavailable:
                if attempt < 3:
                    self._later(number, attempt + 1)

        timer = threading.Timer(RETRY.steps_s()[attempt], again)
        timer.daemon = True
        timer.start()
"""

WRONG = {
    "shorter-waits": [(ASK, SHORT_WAITS)],
    "error-as-it-is": [(TRANSIENT, "raise")],
    "retries-a-bad-order": [("raise messaging.PoisonMessage", "raise messaging.Transient")],
    "retries-each-error-of-the-service": [("except Unavailable", "except Exception")],
    "booked-twice": [(BOOK, BOOK * 2)],
    "gives-up-silently": [(TRANSIENT, "return")],
    "poison": [("raise messaging.Transient", "raise messaging.PoisonMessage")],
    "timer-in-a-thread": [
        (IMPORT, f"{IMPORT}import threading\n"),
        (f"{TRANSIENT}\n{BOOK}", TIMER),
        (" as error", ""),
    ],
}
