"""The shop that promises what it has.

The database reads, compares and writes in one statement: `stock - quantity` is of the row as it
is when it is written, and so is the condition. Whether a row was matched is the answer. No lock
is held while Python thinks, and nothing has to be retried. Where Python must compute the new
value, a version column does it (`version_id_col`), with a loop around StaleDataError.

Guide: docs/01-sqlalchemy.md, chapter 6, Transactions.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"
    __table_args__ = (sa.CheckConstraint("stock >= 0", name="stock_is_not_negative"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]


class Reservation(Base):
    __tablename__ = "reservations"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(sa.ForeignKey("products.id"), index=True)
    customer: Mapped[str]
    quantity: Mapped[int]


def reserve(session: Session, product_id: int, customer: str, quantity: int) -> bool:
    """Promises `quantity` pieces to a customer, and commits. False where fewer are left."""
    take = (
        sa.update(Product)
        .where(Product.id == product_id, Product.stock >= quantity)
        .values(stock=Product.stock - quantity)
        .returning(Product.id)
    )
    if session.scalars(take).first() is None:
        session.rollback()
        return False
    reservation = Reservation(product_id=product_id, customer=customer, quantity=quantity)
    session.add(reservation)
    session.commit()
    return True
