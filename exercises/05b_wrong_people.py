"""Offers to the wrong people.

Each month a letter with a voucher goes to the customers with the most to lose: likely to leave, and
with a high margin. The churn model behind it is good, and half of those who get a letter buy. Then
somebody leaves a random half without one, and the campaign turns out to lose money. Some had left
long ago, whatever one sends. Some redeem a voucher for what they would have bought anyway. Some are
reminded by the letter that they wanted to leave.

Change `chosen` so that letters go where they are expected to pay.

A purchase brings `margin_cents`, less the voucher where a letter was sent: who has one redeems it.
A letter costs `letter_cents`, whatever comes of it. `buys_without` and `buys_with` are the chances
of one purchase without a letter and with it; a random half measures both.

Judged: of all choices of at most `at_most` customers, which the check tries one by one, yours is
expected to bring the most, compared with sending nothing, and names the most promising first. Where
nothing pays, nobody is chosen.
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


def at_stake_cents(customer: Customer) -> float:
    """What we lose should he not buy."""
    return (1 - customer.buys_without) * customer.margin_cents


def chosen(customers: Sequence[Customer], offer: Offer, at_most: int) -> list[str]:
    """The names of those who get a letter, the most promising first."""
    cost_cents = offer.voucher_cents + offer.letter_cents
    worth_it = [customer for customer in customers if at_stake_cents(customer) > cost_cents]
    worth_it.sort(key=at_stake_cents, reverse=True)
    return [customer.name for customer in worth_it[:at_most]]
