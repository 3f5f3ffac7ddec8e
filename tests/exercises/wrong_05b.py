GAIN = """    with_it = customer.buys_with * (customer.margin_cents - offer.voucher_cents)
    without = customer.buys_without * customer.margin_cents
    return with_it - without - offer.letter_cents
"""
UPLIFT = "(customer.buys_with - customer.buys_without)"

WRONG = {
    "the highest uplift, whatever it costs": [(GAIN, f"    return {UPLIFT}\n")],
    "the voucher is paid by nobody who would have bought": [
        (GAIN, f"    margin = customer.margin_cents - offer.voucher_cents\n"
               f"    return {UPLIFT} * margin - offer.letter_cents\n"),
    ],
    "the letter is free": [(" - offer.letter_cents", "")],
    "the least promising first": [
        ("    return worth_it[:at_most]", "    return worth_it[:at_most][::-1]"),
    ],
    "nobody who often buys": [("in customers}", "in customers if customer.buys_without < 0.6}")],
    "also where it does not pay": [("if gain > 0", "if gain < 10_000")],
}  # fmt: skip
