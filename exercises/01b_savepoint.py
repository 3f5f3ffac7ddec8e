"""The import that reports more than it has stored.

Each night a supplier's price list is imported, some 5,000 rows. A row that the database refuses
must cost itself only, so each has its savepoint. Last night's report says "4,998 stored, 2
rejected". The shop has 212 of them, and the import's own row in `imports` is gone, too. No error
was logged. Without bad rows all is well.

Change `import_prices`. The transaction is the caller's: the function must not commit it.

Judged: after the caller's commit the table holds, besides the prices of earlier nights, exactly
what the report names as stored, in cents, and what the caller wrote before is there; after the
caller's rollback neither is. After an error every statement is refused until a rollback, as
PostgreSQL does. A row may be refused by a rule of the database that is not in these models. An
error that is not a row's fault reaches the caller.
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
            session.rollback()
            report.rejected[line] = sku
        else:
            report.stored.append(sku)
    return report
