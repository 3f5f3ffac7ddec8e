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
}
