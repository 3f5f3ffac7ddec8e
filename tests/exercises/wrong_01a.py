LOADED = "selectinload(Order.lines).joinedload(Line.product),"
FOUND = "list(session.scalars(newest.options(*needed)))"
PAGE = "    return [as_json(order) for order in newest_orders(session, limit)]"
TOTAL = """    @property
    def total(self) -> Decimal:
        return sum((line.product.price * line.quantity for line in self.lines), Decimal("0.00"))
"""
TOTAL_BY_SQL = """Order.total = sa.orm.column_property(
    sa.select(sa.func.coalesce(sa.func.sum(Product.price * Line.quantity), 0))
    .where(Line.order_id == Order.id, Line.product_id == Product.id)
    .scalar_subquery()
)"""

WRONG = {
    "products-one-by-one": [
        (LOADED, "selectinload(Order.lines),"),
        ('        raiseload("*"),\n', ""),
    ],
    "limit-counts-lines": [
        ("sa.select(Order).", "sa.select(Order).join(Order.lines)."),
        (FOUND, "list(session.scalars(newest.options(*needed)).unique())"),
    ],
    "orders-without-lines-dropped": [
        (LOADED, "joinedload(Order.lines, innerjoin=True).joinedload(Line.product),"),
        (FOUND, "list(session.scalars(newest.options(*needed)).unique())"),
    ],
    "lines-by-product": [('order_by="Line.id"', 'order_by="Line.product_id"')],
    "all-loaded": [(".limit(limit)", ""), (FOUND, f"{FOUND}[:limit]")],
    "all-products-loaded": [
        (LOADED, "selectinload(Order.lines),"),
        ('        raiseload("*"),\n', ""),
        (PAGE, f"    products = session.scalars(sa.select(Product)).all()\n{PAGE}"),
    ],
}

RIGHT = {
    "total-by-the-database": [
        (TOTAL, ""),
        ("\n\ndef newest_orders", f"\n\n{TOTAL_BY_SQL}\n\ndef newest_orders"),
    ],
}
