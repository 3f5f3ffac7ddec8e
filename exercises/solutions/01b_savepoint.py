"""The import whose report is what the table holds.

`with session.begin_nested()` is all that a bad row takes: leaving the block by an exception rolls
back to the savepoint. `session.rollback()` after it means the outermost transaction, with each
row before and with the caller's; the rows after it then begin a new one, which commits. So
nothing fails, and the report is wrong. Only IntegrityError is a row's fault.

Guide: docs/01-sqlalchemy.md, chapters 3, Repository and unit of work, and 6, Transactions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Import(Base):
    """One run; written by the caller, before the rows."""

    __tablename__ = "imports"

    id: Mapped[int] = mapped_column(primary_key=True)
    supplier: Mapped[str]


class Price(Base):
    __tablename__ = "prices"
    __table_args__ = (sa.CheckConstraint("cents > 0", name="cents_are_positive"),)

    sku: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]


@dataclass
class Report:
    stored: list[str] = field(default_factory=list)  # stock-keeping units, in order
    rejected: dict[int, str] = field(default_factory=dict)  # line, from 1 → SKU


def import_prices(session: Session, rows: Iterable[tuple[str, Decimal]]) -> Report:
    """Inserts each SKU and its price; what the database refuses is reported."""
    report = Report()
    for line, (sku, price) in enumerate(rows, start=1):
        try:
            with session.begin_nested():
                session.add(Price(sku=sku, cents=int(price * 100)))
        except IntegrityError:
            report.rejected[line] = sku
        else:
            report.stored.append(sku)
    return report
