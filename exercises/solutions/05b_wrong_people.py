"""Offers to the right people: by what a letter changes, in money.

A high risk says that somebody leaves, not that a letter keeps him. What counts is the difference
that the letter makes: what he brings with it, less what he brings without. The voucher is paid for
each who redeems it, also for who would have bought anyway, so it goes with `buys_with` and not with
the uplift. The letter is paid in any case.
Chapter: docs/05-data-science.md#5-a-retention-campaign; there the two chances are fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Customer:
    name: str
    buys_without: float  # chance of a purchase without a letter
    buys_with: float  # and with one
    margin_cents: int  # of a purchase, before the voucher


@dataclass(frozen=True)
class Offer:
    voucher_cents: int  # off the price of a purchase
    letter_cents: int  # for each that is sent


def gain_cents(customer: Customer, offer: Offer) -> float:
    """What a letter to him is expected to change."""
    with_it = customer.buys_with * (customer.margin_cents - offer.voucher_cents)
    without = customer.buys_without * customer.margin_cents
    return with_it - without - offer.letter_cents


def chosen(customers: Sequence[Customer], offer: Offer, at_most: int) -> list[str]:
    """The names of those who get a letter, the most promising first."""
    gains = {customer.name: gain_cents(customer, offer) for customer in customers}
    worth_it = [name for name, gain in gains.items() if gain > 0]
    worth_it.sort(key=gains.__getitem__, reverse=True)
    return worth_it[:at_most]
