NOTED = (
    "            is_new = self._database.execute(NOTE, (message.message_id,)).rowcount == 1\n"
    "            if is_new:\n"
)
CREDITED = '                self._database.execute(CREDIT, (deposit["wallet"], deposit["cents"]))\n'
BEGIN = "        with self._database:\n" + NOTED
LOOKED_UP = """        known = "SELECT 1 FROM handled WHERE message_id = ?"
        if self._database.execute(known, (message.message_id,)).fetchone():
            return
        with self._database:
"""
NOTE_ALONE = """        with self._database:
            self._database.execute(NOTE, (message.message_id,))
"""
FIRST = "        self._database = database\n"
SEEN = """        if message.message_id in self._seen:
            return
        self._seen.add(message.message_id)
"""
BY_A_CURSOR = """            cursor = self._database.cursor()
            cursor.execute("SELECT 1 FROM handled WHERE message_id = ?", (message.message_id,))
            if cursor.fetchone() is None:
                cursor.execute(NOTE, (message.message_id,))
"""

WRONG = {
    "redelivered-means-handled": [
        (NOTED, "            if not delivery.redelivered:\n"),
    ],
    "note-committed-before": [
        (
            BEGIN,
            BEGIN.replace(
                "            if is_new", "        with self._database:\n            if is_new"
            ),
        ),
    ],
    "note-committed-behind": [(BEGIN, LOOKED_UP), (CREDITED, CREDITED[4:] + NOTE_ALONE)],
    "looked-up-first-and-noted-later": [
        ("(message_id TEXT PRIMARY KEY)", "(message_id TEXT)"),
        (BEGIN, LOOKED_UP + NOTE_ALONE.partition("\n")[2]),
        (CREDITED, CREDITED[4:]),
    ],
    "known-by-wallet-and-amount": [("(NOTE, (message.message_id,))", "(NOTE, (str(deposit),))")],
    "no-note": [(NOTED, "            if True:\n")],
    "only-the-newest-note-is-kept": [
        (
            CREDITED,
            f"{CREDITED}                self._database.execute("
            '"DELETE FROM handled WHERE message_id != ?", (message.message_id,))\n',
        ),
    ],
    "looked-up-by-a-cursor": [
        ("(message_id TEXT PRIMARY KEY)", "(message_id TEXT)"),
        (NOTED, BY_A_CURSOR),
    ],
    "noted-in-memory-before-it-is-done": [
        (FIRST, f"{FIRST}        self._seen = set()\n"),
        (BEGIN, SEEN + BEGIN),
    ],
    "each-error-means-handled": [
        ("import importlib\n", "import importlib\nfrom contextlib import suppress\n"),
        ("INSERT OR IGNORE INTO handled", "INSERT INTO handled"),
        (BEGIN, BEGIN.replace("with ", "with suppress(sqlite3.Error), ")),
    ],
}

RIGHT = {
    "it-looks-at-redelivered-too": [(BEGIN, "        print(delivery.redelivered)\n" + BEGIN)],
    "rows-by-name": [
        (FIRST, f"{FIRST}        database.row_factory = sqlite3.Row\n"),
        (
            NOTED,
            "            self._database.execute(NOTE, (message.message_id,))\n"
            '            new = self._database.execute("SELECT changes() AS n").fetchone()\n'
            '            if new["n"]:\n',
        ),
    ],
}
