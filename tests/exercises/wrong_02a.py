KEY = '[("customer", ASCENDING), ("at", DESCENDING), ("amount", DESCENDING)]'
ERS = '[("customer", ASCENDING), ("amount", DESCENDING), ("at", DESCENDING)]'
SER = '[("at", DESCENDING), ("customer", ASCENDING), ("amount", DESCENDING)]'
ES = '[("customer", ASCENDING), ("at", DESCENDING)]'
PARTIAL = '    partialFilterExpression={"status": "open"},\n'
STATUS = '"status": "open",\n        "amount"'
CREATED = "orders.create_indexes([OPEN_ORDERS])"
LIMITED = 'list(orders.find(query).sort("at", DESCENDING).limit(limit))'

WRONG = {
    "equality-range-sort": [(KEY, ERS)],
    "sort-first": [(KEY, SER)],
    "range-not-in-the-index": [(KEY, ES)],
    "predicate-not-repeated": [(STATUS, STATUS.replace('"open"', '{"$ne": "closed"}'))],
    "no-status-at-all": [(STATUS, '"amount"')],
    "closed-orders-in-the-index": [(PARTIAL, "")],
    "closed-orders-in-the-index-by-status": [
        (KEY, KEY.replace("[", '[("status", ASCENDING), ')),
        (PARTIAL, ""),
    ],
    "the-predicate-with-ne-too": [
        (STATUS, STATUS.replace('"open"', '{"$ne": "closed"}')),
        (PARTIAL, PARTIAL.replace('"open"', '{"$ne": "closed"}')),
    ],
    "an-amount-in-the-predicate": [
        (KEY, ES),
        (PARTIAL, PARTIAL.replace("}", ', "amount": {"$gte": 50_000}}')),
    ],
    "no-sort": [('.sort("at", DESCENDING)', "")],
    "some-twenty-sorted-in-python": [
        (LIMITED, 'sorted(orders.find(query).limit(limit), key=lambda order: order["at"])[::-1]')
    ],
    "always-twenty": [(".limit(limit)", ".limit(20)")],
    "a-hint": [(LIMITED, LIMITED.replace("))", ').hint("open_orders"))'))],
    "two-indexes": [
        ("create_indexes([OPEN_ORDERS])", 'create_indexes([OPEN_ORDERS, IndexModel("customer")])')
    ],
}

RIGHT = {
    "create-index": [
        (
            CREATED,
            f'orders.create_index({KEY}, partialFilterExpression={{"status": "open"}})',
        )
    ],
    "the-old-index-dropped": [(CREATED, f'orders.drop_index("open_orders")\n    {CREATED}')],
    "options-of-find": [
        (LIMITED, 'list(orders.find(filter=query, sort=[("at", DESCENDING)], limit=limit))')
    ],
    "to-list": [(LIMITED, LIMITED.removeprefix("list(").removesuffix(")") + ".to_list()")],
    "sort-by-a-mapping": [('.sort("at", DESCENDING)', '.sort({"at": DESCENDING})')],
    "oldest-first-and-walked-back": [(KEY, KEY.replace("DESCENDING", "ASCENDING"))],
}
