"""The shop that sold twelve of its ten consoles.

Ten were in stock. On the first day of the sale twelve customers got a confirmation, and `stock`
is zero, not minus two: no constraint was violated. In the tests, one request after another, all is
well. The log shows two pairs of requests that came within 3 ms of one another.

Change `reserve`. It runs in a session of its own for each request; many run at once.

Judged: where a rival's reservation is committed between your reading and your writing, neither is
lost, and what is promised and what is left add up, also where the process is killed between two
statements; of two customers for the last piece one gets it. It runs on SQLite, which leaves FOR
UPDATE out of the statement: a lock that holds on PostgreSQL alone does not pass. Do not lean on
SQLite's own lock either, which the first write takes of the whole file: PostgreSQL has none like
it.
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
    product = session.get_one(Product, product_id)
    if product.stock < quantity:
        return False
    product.stock = product.stock - quantity
    reservation = Reservation(product_id=product_id, customer=customer, quantity=quantity)
    session.add(reservation)
    session.commit()
    return True
