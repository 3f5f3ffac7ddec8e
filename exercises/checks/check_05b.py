"""What a choice is expected to bring, against the best of all choices, tried one by one."""

import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from types import ModuleType
from typing import Any

from checks import Wrong

KINDS = {  # chances of a purchase: without a letter, with it
    "sure": (0.85, 0.97), "gone": (0.02, 0.03), "wavering": (0.20, 0.45), "offended": (0.60, 0.40),
    "half sure": (0.50, 0.60),
}  # fmt: skip
EACH, AT_MOST, SEEDS = 2, (1, 3, 10), range(5)
TERMS = (500, 100), (500, 0), (3_000, 900)  # cents: of the voucher, of the letter
TOLERANCE_CENTS = 1e-6


def check(exercise: ModuleType) -> None:
    # Refuses uplift × (margin - voucher): who would have bought anyway redeems the voucher, too.
    for seed in SEEDS:
        customers = random_customers(exercise, random.Random(seed))
        for voucher, letter in TERMS:
            offer = exercise.Offer(voucher, letter)
            for at_most in AT_MOST:
                one(exercise, customers, offer, at_most)


def random_customers(exercise: ModuleType, rng: random.Random) -> list[Any]:
    customers = []
    for kind, chances in KINDS.items():
        for number in range(EACH):
            without, with_it = (chance + rng.uniform(-0.02, 0.02) for chance in chances)
            margin = rng.randrange(1_000, 9_000)
            name = f"{kind} {number}"
            customers.append(exercise.Customer(name, without, max(0.0, with_it), margin))
    rng.shuffle(customers)
    return customers


def one(exercise: ModuleType, customers: Sequence[Any], offer: Any, at_most: int) -> None:
    call = f"chosen({len(customers)} customers, {offer}, at_most={at_most})"
    names = list(exercise.chosen(customers, offer, at_most))
    known = {customer.name: customer for customer in customers}
    if len(set(names)) != len(names) or not known.keys() >= set(names) or len(names) > at_most:
        raise Wrong(call, f"at most {at_most} of their names, each once", names)

    def brings(letters: Iterable[str]) -> float:
        """Cents, compared with sending nothing."""
        return sum(profit(known[name], offer) - profit(known[name], None) for name in letters)

    choices = (some for size in range(at_most + 1) for some in combinations(known, size))
    best = max(choices, key=brings)
    if brings(names) < brings(best) - TOLERANCE_CENTS:
        raise Wrong(call, told(brings(best), best), told(brings(names), names))
    in_order = sorted(names, key=lambda name: brings([name]), reverse=True)
    if names != in_order:
        raise Wrong(call, f"the most promising first: {', '.join(in_order)}", ", ".join(names))


def profit(customer: Any, offer: Any) -> float:
    """Cents, expected of one customer; without an offer, he gets no letter."""
    if offer is None:
        return float(customer.buys_without * customer.margin_cents)
    left = customer.margin_cents - offer.voucher_cents
    return float(customer.buys_with * left - offer.letter_cents)


def told(cents: float, names: Sequence[str]) -> str:
    return f"{cents / 100:.2f}, by letters to {', '.join(sorted(names)) or 'nobody'}"
