LAST = "    return [Line(*row) for row in db.execute(QUERY).fetchall()]\n"
NAME = "CASE WHEN grouping(segment) = 1 THEN 'all' ELSE coalesce(segment, 'none') END"

WRONG = {
    "weighted averages, and customers added up": [
        (LAST, "    *lines, _ = [Line(*row) for row in db.execute(QUERY).fetchall()]\n"
               "    _, people, orders, cents, _ = map(sum, zip(*[(0, *x[1:]) for x in lines]))\n"
               "    everybody = Line('all', people, orders, cents, round(cents / orders))\n"
               "    return [*lines, everybody]\n"),
    ],
    "weighted means of rounded averages": [
        (LAST, "    *lines, last = [Line(*row) for row in db.execute(QUERY).fetchall()]\n"
               "    cents = sum(line.average_cents * line.orders for line in lines)\n"
               "    return [*lines, last._replace(average_cents=round(cents / last.orders))]\n"),
    ],
    "not rounded": [
        (LAST, "    *lines, last = [Line(*row) for row in db.execute(QUERY).fetchall()]\n"
               "    average = last.sales_cents / last.orders\n"
               "    return [*lines, last._replace(average_cents=average)]\n"),
    ],
    "all is told by its NULL": [(NAME, "coalesce(segment, 'all')")],
    "orders without a segment are left out": [
        ("FROM orders\nGROUP", "FROM orders\nWHERE segment IS NOT NULL\nGROUP"),
    ],
}  # fmt: skip
