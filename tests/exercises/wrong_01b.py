NESTED = "            with session.begin_nested():\n"
ADDED = "                session.add(Price(sku=sku, cents=int(price * 100)))\n"
CAUGHT = "        except IntegrityError:\n"
AGAIN = "            batch.rollback()\n            batch = session.begin_nested()\n"
INSERTED = """            price_of = {"sku": sku, "cents": int(price * 100)}
            session.execute(sa.insert(Price).values(price_of))
"""

WRONG = {
    "a-commit-a-row": [(ADDED, f"{ADDED}            session.commit()\n")],
    "one-savepoint": [
        ("    for line,", "    batch = session.begin_nested()\n    for line,"),
        (NESTED, ""),
        (ADDED, f"{ADDED[4:]}            session.flush()\n"),
        (CAUGHT, CAUGHT + AGAIN),
    ],
    "no-savepoint": [(NESTED + ADDED, INSERTED)],
    "bad-rows-told-by-the-list-alone": [
        (
            NESTED + ADDED,
            "            if price <= 0 or sku in report.stored:\n"
            "                raise IntegrityError('', {}, ValueError(sku))\n" + ADDED[4:],
        )
    ],
    "looked-up-before": [
        (
            NESTED + ADDED,
            "            if price <= 0 or session.get(Price, sku):\n"
            "                report.rejected[line] = sku\n"
            "                continue\n" + INSERTED,
        )
    ],
    "euros-for-cents": [("int(price * 100)", "int(price)")],
    "any-error-is-a-bad-row": [("except IntegrityError", "except Exception")],
}

RIGHT = {
    "a-savepoint-ended-by-hand": [
        (
            NESTED + ADDED,
            f"            batch = session.begin_nested()\n{ADDED[4:]}            batch.commit()\n",
        ),
        (CAUGHT, f"{CAUGHT}            batch.rollback()\n"),
    ],
}
