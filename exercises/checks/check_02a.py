"""Plans a find over sorted tuples, and counts keys and documents.

Refused: the predicate repeated, and the order as it was (E-R-S: SORT); the sort first (S-E-R: the
keys of all customers); the range left out of the index (E-S: each key costs a document); an index
without its predicate, which holds closed orders, too, or with `$ne` in it, which MongoDB refuses;
an amount or a limit written down; no sort; a second index; a hint.

It knows what these cases need, and no more. For the stub, the solution and those refused, explain
of MongoDB 6.0.5 gives the same counts, and the same stages but for LIMIT (tried).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any, NamedTuple

from pymongo import IndexModel

from checks import Wrong

Document = dict[str, Any]
Key = list[tuple[str, int]]  # field, direction

ORDERS, CUSTOMERS, OPEN_SHARE, SEED = 40_000, 20, 0.1, 7
QUESTIONS = (7, 50_000, 20), (3, 40_000, 10)  # customer; cents, which half of them have; limit
KEYS_EACH = 3  # for each document returned
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, bound: value == bound,
    "$ne": lambda value, bound: value != bound,
    "$gt": lambda value, bound: value > bound,
    "$gte": lambda value, bound: value >= bound,
    "$in": lambda value, bound: value in bound,
}


class Plan(NamedTuple):
    stages: str
    keys: int
    docs: int
    found: list[Document]

    def __str__(self) -> str:
        counts = f"{self.keys:,} keys, {self.docs:,} documents, {len(self.found)} returned"
        return f"{self.stages}: {counts}"


class Question:
    """A find's filter, sort and limit."""

    def __init__(self, asked: Mapping[str, Any], sort: Key, limit: int) -> None:
        self.sort, self.limit = sort, limit
        self.conditions: dict[str, Mapping[str, Any]] = {}
        for field, bound in asked.items():
            asked_of = dict(bound) if isinstance(bound, Mapping) else {"$eq": bound}
            if len(one := asked_of.get("$in", ())) == 1:  # as the server simplifies it
                asked_of = {"$eq": one[0], **{n: b for n, b in asked_of.items() if n != "$in"}}
            self.conditions[field] = asked_of
            named = {name for name in (field, *self.conditions[field]) if name.startswith("$")}
            if unknown := named - OPERATORS.keys():
                known = f"no operators but {', '.join(OPERATORS)}"
                raise Wrong(f"orders.find({dict(asked)})", known, ", ".join(unknown))

    def equals(self, field: str) -> bool:
        return "$eq" in self.conditions.get(field, {})

    def allows(self, document: Document, fields: Sequence[str]) -> bool:
        return all(
            OPERATORS[name](document[field], bound)
            for field in fields
            for name, bound in self.conditions.get(field, {}).items()
        )

    def sorts(self, key: Key) -> bool:
        """Whether entries that are equal in what is asked to be equal lie in the sort's order."""
        rest = [(field, way) for field, way in key if not self.equals(field)][: len(self.sort)]
        return rest in (self.sort, [(field, -way) for field, way in self.sort])


def in_order(documents: Sequence[Document], key: Key) -> list[Document]:
    ordered = list(documents)
    for field, way in reversed(key):
        ordered.sort(key=lambda document: document[field], reverse=way < 0)
    return ordered


def scan(question: Question, documents: Sequence[Document]) -> Plan:
    found = [d for d in documents if question.allows(d, list(question.conditions))]
    stages = "SORT ← COLLSCAN" if question.sort else "COLLSCAN"
    return Plan(stages, 0, len(documents), in_order(found, question.sort)[: question.limit])


def entries(index: IndexModel, documents: Sequence[Document]) -> list[Document]:
    predicate = index.document.get("partialFilterExpression", {})
    return [d for d in documents if Question(predicate, [], 0).allows(d, list(predicate))]


def walk(question: Question, index: IndexModel, documents: Sequence[Document]) -> Plan | None:
    """None where the planner leaves this index out of account."""
    predicate = Question(index.document.get("partialFilterExpression", {}), [], 0).conditions
    if any(question.conditions.get(field) != asked for field, asked in predicate.items()):
        return None
    key = [(field, int(way)) for field, way in index.document["key"].items()]
    fields, is_sorted = [field for field, _ in key], question.sorts(key)
    if fields[0] not in question.conditions and not is_sorted:
        return None
    bounds = []  # the fields that bound the walk: equalities, and one range behind them
    for field in fields:
        if field in question.conditions:
            bounds.append(field)
        if not question.equals(field):
            break
    # An index that is used for its order alone has no filter of its own: each key is fetched.
    in_key = fields if fields[0] in question.conditions else []
    keys, found, docs = 0, [], 0
    ordered = in_order(entries(index, documents), key)
    if question.sort and is_sorted and question.sort[0][1] != dict(key)[question.sort[0][0]]:
        ordered.reverse()
    for document in (d for d in ordered if question.allows(d, bounds)):
        keys += 1
        if question.allows(document, in_key):
            docs += 1
            if question.allows(document, list(question.conditions)):
                found.append(document)
        if is_sorted and len(found) == question.limit:
            break
    stages = "FETCH ← IXSCAN" if is_sorted else "SORT ← FETCH ← IXSCAN"
    return Plan(stages, keys, docs, in_order(found, question.sort)[: question.limit])


class Cursor:
    def __init__(self, orders: "Orders", asked: Mapping[str, Any]) -> None:
        self._orders, self._asked, self._sort, self._limit = orders, asked, Key(), 0

    def sort(
        self, key: str | Mapping[str, int] | Sequence[tuple[str, int]], direction: int = 1
    ) -> "Cursor":
        if isinstance(key, str):
            key = [(key, direction)]
        self._sort = list(key.items() if isinstance(key, Mapping) else key)
        return self

    def hint(self, index: object) -> "Cursor":
        call = f"orders.find(…).hint({index!r})"
        raise Wrong(call, "an index that the planner chooses", "a hint")

    def to_list(self) -> list[Document]:
        return list(self)

    def limit(self, limit: int) -> "Cursor":
        self._limit = limit
        return self

    def __iter__(self) -> Iterator[Document]:
        if not self._sort:
            raise Wrong(f"orders.find({dict(self._asked)})", "a sort", "none: any order may come")
        question = Question(self._asked, self._sort, self._limit or ORDERS)
        plans = [walk(question, index, self._orders.documents) for index in self._orders.indexes]
        usable = [plan for plan in plans if plan] or [scan(question, self._orders.documents)]
        self._orders.plan = min(usable, key=lambda plan: plan.keys + plan.docs)
        return iter(self._orders.plan.found)


class Orders:
    """As much of a collection as the exercise needs."""

    def __init__(self) -> None:
        rng, first = random.Random(SEED), datetime(2026, 1, 1, tzinfo=UTC)
        self.indexes: list[IndexModel] = []
        self.plan = Plan("nothing was asked", 0, 0, [])
        self.documents: list[Document] = [
            {
                "_id": number,
                "customer": rng.randrange(CUSTOMERS),
                "amount": rng.randrange(100, 100_000),
                "at": first + timedelta(minutes=number),
                "status": "open" if rng.random() < OPEN_SHARE else "closed",
            }
            for number in range(ORDERS)
        ]

    def create_index(self, keys: Any, **options: Any) -> str:
        return self.create_indexes([IndexModel(keys, **options)])[0]

    def create_indexes(self, indexes: Sequence[IndexModel]) -> list[str]:
        for index in indexes:
            predicate = index.document.get("partialFilterExpression", {})
            if "$ne" in str(predicate):
                raise Wrong("ensure_indexes(orders)", "a predicate without $ne", predicate)
        self.indexes += indexes
        return [index.document["name"] for index in indexes]

    def drop_index(self, name: str) -> None:
        """For those who think of the one that production has; here it may be missing."""
        self.indexes = [index for index in self.indexes if index.document["name"] != name]

    def find(
        self, filter: Mapping[str, Any], *, sort: Sequence[tuple[str, int]] = (), limit: int = 0
    ) -> Cursor:
        return Cursor(self, filter).sort(sort).limit(limit)


def ask(exercise: ModuleType, orders: Orders, customer: int, at_least: int, limit: int) -> None:
    call = f"large_open_orders(orders, {customer=}, {at_least=}, {limit=})"
    found = list(exercise.large_open_orders(orders, customer, at_least, limit))
    right = sorted(
        (
            d
            for d in orders.documents
            if (d["customer"], d["status"]) == (customer, "open") and d["amount"] >= at_least
        ),
        key=lambda document: document["at"],
        reverse=True,
    )[:limit]
    if found != right:
        expected = f"orders {[d['_id'] for d in right]}"
        raise Wrong(call, expected, f"orders {[d['_id'] for d in found]}")
    plan, most = orders.plan, KEYS_EACH * limit
    if plan.stages != "FETCH ← IXSCAN" or plan.docs != limit or plan.keys > most:
        raise Wrong(call, f"FETCH ← IXSCAN: {most} keys at most, {limit} documents", str(plan))


def check(exercise: ModuleType) -> None:
    orders = Orders()
    exercise.ensure_indexes(orders)
    if len(orders.indexes) != 1:
        raise Wrong("ensure_indexes(orders)", "1 index", f"{len(orders.indexes)} indexes")
    for customer, at_least, limit in QUESTIONS:
        ask(exercise, orders, customer, at_least, limit)
    is_open = sum(d["status"] == "open" for d in orders.documents)
    if (held := len(entries(orders.indexes[0], orders.documents))) > is_open:
        raise Wrong("ensure_indexes(orders)", f"{is_open:,} entries: open orders", f"{held:,}")
