LOADED = "selectinload(Order.lines).joinedload(Line.product),"
FOUND = "list(session.scalars(newest.options(*needed)))"

WRONG = {
    "products-one-by-one": [
        (LOADED, "selectinload(Order.lines),"),
        ('        raiseload("*"),\n', ""),
    ],
    "limit-counts-lines": [
        ("sa.select(Order).", "sa.select(Order).join(Order.lines)."),
        (FOUND, "list(session.scalars(newest.options(*needed)).unique())"),
    ],
    "all-loaded": [(".limit(limit)", ""), (FOUND, f"{FOUND}[:limit]")],
}
