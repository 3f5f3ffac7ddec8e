import re
from pathlib import Path

SOLUTION = Path(__file__).parents[2] / "exercises" / "solutions" / "01c_lost_update.py"
# All of the conditional UPDATE, as it stands there.
TAKE = re.search(r"    take = \(.*?(?=    reservation = )", SOLUTION.read_text("utf-8"), re.S)[0]
WRITE = "    product.stock = product.stock - quantity\n"
READ = """    product = session.get_one(Product, product_id)
    if product.stock < quantity:
        return False
"""
PROMISED_EACH_TIME = """    with session.no_autoflush:
        while True:
            seen = session.scalar(sa.select(Product.stock).where(Product.id == product_id))
            if seen < quantity:
                session.rollback()
                return False
            session.add(
                Reservation(product_id=product_id, customer=customer, quantity=quantity)
            )
            swap = sa.update(Product).where(Product.id == product_id, Product.stock == seen)
            if session.execute(swap.values(stock=seen - quantity)).rowcount == 1:
                session.commit()
                return True
"""

WRONG = {
    "read-again": [(TAKE, f"{READ}    session.refresh(product)\n{WRITE}")],
    "for-update": [(TAKE, READ.replace("_id)", "_id, with_for_update=True)") + WRITE)],
    "no-condition": [(", Product.stock >= quantity", "")],
    "two-commits": [("    reservation = ", "    session.commit()\n    reservation = ")],
    "promised-each-time": [(TAKE, PROMISED_EACH_TIME)],
    "all-products": [("Product.id == product_id, ", "")],
}

STOCK = "    stock: Mapped[int]\n"
VERSION = """    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}
"""
COMMIT = "    session.commit()\n"
COMMIT_OR_AGAIN = """    try:
        session.commit()
    except sa.orm.exc.StaleDataError:
        session.rollback()
        return reserve(session, product_id, customer, quantity)
"""

RIGHT = {
    "a-version": [(STOCK, STOCK + VERSION), (TAKE, READ + WRITE), (COMMIT, COMMIT_OR_AGAIN)],
}
