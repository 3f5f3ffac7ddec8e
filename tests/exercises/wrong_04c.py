PUBLISH = '            channel.basic_publish("", QUEUE, body, properties, mandatory=True)\n'
DELETE = """            with self._database:
                self._database.execute("DELETE FROM outbox WHERE id = ?", (row_id,))
"""
CONFIRMS = "        channel.confirm_delivery()\n"
TRY = f"            try:\n    {PUBLISH}            except Exception:\n                "
IMPORT = "from typing"
AMQP = "from pika import exceptions as amqp\n"
OPENED = "        channel = connection.channel()\n"
LOOP = "        for row_id, body in rows:\n"
DELETED_BY_FINALLY = f"""        confirmed: list[tuple[int]] = []
        try:
            self._publish(rows, channel, confirmed)
        finally:
            with self._database:
                self._database.executemany("DELETE FROM outbox WHERE id = ?", confirmed)
        return len(confirmed)

    def _publish(self, rows: Any, channel: Any, confirmed: list[tuple[int]]) -> None:
{LOOP}"""

WRONG = {
    "confirms-without-mandatory": [(", mandatory=True", "")],
    "mandatory-without-confirms": [(CONFIRMS, "")],
    "error-caught-and-row-deleted": [(PUBLISH, f"{TRY}pass\n")],
    "error-caught-and-next-row-sent": [(PUBLISH, f"{TRY}continue\n")],
    "lost-connection-passed-over-and-row-deleted": [
        (
            PUBLISH,
            TRY.replace("except Exception", "except (amqp.NackError, amqp.UnroutableError)")
            + "raise\n            except amqp.AMQPError:\n                pass\n",
        ),
        (IMPORT, AMQP + IMPORT),
    ],
    "counted-and-not-sent": [(PUBLISH, f"{TRY}break\n")],
    "deleted-first": [(PUBLISH + DELETE, DELETE + PUBLISH)],
    "deleted-together-at-the-end": [
        (DELETE, ""),
        (
            "        return len(rows)",
            "        with self._database:\n"
            '            self._database.execute("DELETE FROM outbox")\n'
            "        return len(rows)",
        ),
    ],
    "deleted-by-finally-which-a-kill-leaves-out": [
        (LOOP, DELETED_BY_FINALLY),
        (DELETE, "            confirmed.append((row_id,))\n"),
        ("        return len(rows)\n", ""),
    ],
    "looks-for-the-queue-in-place-of-mandatory": [
        (CONFIRMS, f"{CONFIRMS}        channel.queue_declare(QUEUE, passive=True)\n"),
        (", mandatory=True", ""),
    ],
    "oldest-row-only": [("ORDER BY id", "ORDER BY id LIMIT 1")],
    "a-new-id-each-time": [
        (
            "message = messaging.Message.decode(body)\n",
            "old = messaging.Message.decode(body)\n"
            "            message = messaging.Message(old.type, old.payload)\n"
            "            body = message.encode()\n",
        )
    ],
}

RIGHT = {
    "a-channel-of-a-with-block": [
        (OPENED + CONFIRMS, "        with connection.channel() as channel:\n"
                            "            channel.confirm_delivery()\n"
                            "            return self._relay(rows, channel)\n\n"
                            "    def _relay(self, rows: Any, channel: Any) -> int:\n"),
    ],
    "ended-at-a-nack-and-counted-to-there": [
        ("for row_id, body in rows", "for n, (row_id, body) in enumerate(rows)"),
        (PUBLISH, f"{TRY}return n\n"),
    ],
    "a-nack-is-tried-again": [
        (PUBLISH, TRY.replace("Exception", "amqp.NackError") + PUBLISH.lstrip()),
        (IMPORT, AMQP + IMPORT),
    ],
    "the-queue-is-declared-first": [
        (CONFIRMS, f"{CONFIRMS}        channel.queue_declare(QUEUE, durable=True)\n"),
    ],
}  # fmt: skip
