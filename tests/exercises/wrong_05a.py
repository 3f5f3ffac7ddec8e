WRONG = {
    "refunds of after the cutoff": [(" OR refunded_on > $cutoff", "")],
    "silence to the end of the data": [
        ("    $cutoff - max(day)", "    (SELECT max(day) FROM orders) - max(day)"),
    ],
    "a refund of the cutoff's day is not known": [
        ("refunded_on > $cutoff", "refunded_on >= $cutoff"),
    ],
    "the cutoff's day is left out": [("WHERE day <= $cutoff", "WHERE day < $cutoff")],
    "a horizon that is a day short": [("day <= $until", "day < $until")],
    "a horizon of always 90 days": [("days=horizon_days", "days=90")],
    "a label without an end": [(" AND day <= $until", " AND $until > $cutoff")],
    "no customer that buys again": [("WHERE day > $cutoff AND", "WHERE day < $cutoff AND")],
}
