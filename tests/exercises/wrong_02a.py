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
    "to-list": [(LIMITED, LIMITED.removeprefix("list(").removesuffix(")") + ".to_list()")],
    "sort-by-a-mapping": [('.sort("at", DESCENDING)', '.sort({"at": DESCENDING})')],
    "oldest-first-and-walked-back": [(KEY, KEY.replace("DESCENDING", "ASCENDING"))],
}
