"""The order list, in as many queries for 200 orders as for 20.

The query names all that `as_json` reads: lines by `selectinload`, since a join would repeat each
order for each of its lines; customer and product by `joinedload`, where a join repeats no row.
`raiseload("*")` makes the next relationship that somebody adds to the JSON an error in a test,
instead of one query more for each order.

Guide: docs/01-sqlalchemy.md, chapter 4, N+1.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    raiseload,
    relationship,
    selectinload,
)


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Product(Base):
    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2, asdecimal=True))


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customers.id"))
    placed_on: Mapped[date]
    customer: Mapped[Customer] = relationship()
    lines: Mapped[list[Line]] = relationship(order_by="Line.id")

    @property
    def total(self) -> Decimal:
        return sum((line.product.price * line.quantity for line in self.lines), Decimal("0.00"))


class Line(Base):
    __tablename__ = "order_lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(sa.ForeignKey("orders.id"), index=True)
    product_id: Mapped[int] = mapped_column(sa.ForeignKey("products.id"))
    quantity: Mapped[int]
    product: Mapped[Product] = relationship()


def newest_orders(session: Session, limit: int) -> list[Order]:
    newest = sa.select(Order).order_by(Order.placed_on.desc(), Order.id.desc()).limit(limit)
    needed = (
        joinedload(Order.customer),
        selectinload(Order.lines).joinedload(Line.product),
        raiseload("*"),
    )
    return list(session.scalars(newest.options(*needed)))


def as_json(order: Order) -> dict[str, Any]:
    return {
        "id": order.id,
        "customer": order.customer.name,
        "products": [line.product.name for line in order.lines],
        "total": str(order.total),
    }


def page(session: Session, limit: int) -> list[dict[str, Any]]:
    return [as_json(order) for order in newest_orders(session, limit)]
