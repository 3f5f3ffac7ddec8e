"""Loads into a collection of our own that refuses as the server does, and counts what is in it.

Refused: `ordered=False` alone, which reports as stored what the schema refused; all duplicates as
"already there", also those of another unique index, or whose index has `_id` in its name;
`insert_one` in a loop, or a call for each refusal; a position for an `_id`; what comes twice in one
load; a call without documents; a write concern that failed, passed over, if only beside a
duplicate; a lost connection, passed over.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from pymongo import UpdateOne
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    DuplicateKeyError,
    PyMongoError,
    WriteError,
)
from pymongo.results import BulkWriteResult, InsertManyResult, InsertOneResult

from checks import Wrong

Document = dict[str, Any]

EVENTS, MOST_CALLS = 1_000, 10
DUPLICATE_KEY, REFUSED_BY_SCHEMA = 11000, 121
KNOWN, INVALID, TAKEN = (3, *range(400, 410), 999), (5, 500), (7, 700)  # _id
TWICE = 9  # stored the first time, and there the second
STORED = EVENTS - len(KNOWN) - len(INVALID) - len(TAKEN)


class Events:
    """By `_id`; `order_id` is unique, too, and a schema wants `kind` to be a text."""

    def __init__(self, write_concern_error: Document | None = None) -> None:
        self.by_id: dict[Any, Document] = {}
        self.calls = 0
        self._orders: set[str] = set()
        self._concern_errors = [write_concern_error] if write_concern_error else []

    def _try(self, document: Document) -> Document | None:
        """Stores it, or gives its entry of `writeErrors`, but for the index."""
        taken = "_id" if document["_id"] in self.by_id else "order_id"
        if taken == "_id" or document["order_id"] in self._orders:
            index = "_id_" if taken == "_id" else f"{taken}_1"
            text = f"E11000 duplicate key error collection: shop.events index: {index} dup key: "
            text += f"{{ {taken}: {document[taken]!r} }}"
            what = {"keyPattern": {taken: 1}, "keyValue": {taken: document[taken]}}
            return {"code": DUPLICATE_KEY, "errmsg": text, **what, "op": document}
        if not isinstance(document["kind"], str):
            text = "Document failed validation"
            return {"code": REFUSED_BY_SCHEMA, "errmsg": text, "op": document}
        self.by_id[document["_id"]] = document
        self._orders.add(document["order_id"])
        return None

    def insert_one(self, document: Document) -> InsertOneResult:
        self.calls += 1
        if entry := self._try(document):
            kind = DuplicateKeyError if entry["code"] == DUPLICATE_KEY else WriteError
            raise kind(entry["errmsg"], entry["code"], entry)
        return InsertOneResult(document["_id"], True)

    def insert_many(
        self, documents: Sequence[Document], ordered: bool = True, **_: object
    ) -> InsertManyResult:
        self._write(documents, ordered, upsert=False)
        return InsertManyResult([document["_id"] for document in documents], True)

    def bulk_write(
        self, requests: Sequence[Any], ordered: bool = True, **_: object
    ) -> BulkWriteResult:
        """Inserts, or upserts by `_id` of `$setOnInsert`."""
        upsert = all(isinstance(request, UpdateOne) and request._upsert for request in requests)
        documents = [request._doc.get("$setOnInsert", request._doc) for request in requests]
        return BulkWriteResult(self._write(documents, ordered, upsert), True)

    def _write(self, documents: Sequence[Document], ordered: bool, upsert: bool) -> Document:
        if not documents:
            raise Wrong("events.insert_many([])", "no call", "TypeError: it needs a non-empty list")
        self.calls += 1
        told = dict.fromkeys(("nInserted", "nUpserted", "nMatched", "nModified", "nRemoved"), 0)
        errors = list[Document]()
        for index, document in enumerate(documents):
            if upsert and document["_id"] in self.by_id:
                told["nMatched"] += 1
            elif entry := self._try(document):
                errors.append({"index": index, **entry})
                if ordered:
                    break
            else:
                told["nUpserted" if upsert else "nInserted"] += 1
        if errors or self._concern_errors:
            refused = {"writeErrors": errors, "writeConcernErrors": self._concern_errors}
            raise BulkWriteError({**refused, **told, "upserted": []})
        return told

    def find(self, filter: Mapping[str, Any], *_: object, **__: object) -> list[Document]:
        """For those who ask first what is there: `{"_id": {"$in": [...]}}`."""
        self.calls += 1
        return [self.by_id[key] for key in filter["_id"]["$in"] if key in self.by_id]


def event(number: int, **changed: object) -> Document:
    return {"_id": number, "order_id": f"R{number}", "kind": "visit", **changed}


def closed(*_: object, **__: object) -> Any:
    raise AutoReconnect("connection closed")


def check(exercise: ModuleType) -> None:
    events = Events()
    events.insert_many([event(number) for number in KNOWN])
    events.insert_many([event(-number, order_id=f"R{number}") for number in TAKEN])
    there, events.calls = len(events.by_id), 0
    documents = [event(number) for number in range(1, EVENTS + 1)]
    for number in INVALID:
        documents[number - 1]["kind"] = number
    documents.append(event(TWICE))
    report = exercise.load(events, documents)
    stored = len(events.by_id) - there
    refused = f"{len(KNOWN)} known, 1 twice, {len(TAKEN)} order_ids taken, {len(INVALID)} invalid"
    call = f"load(events, {len(documents):,} documents), {refused}"
    if stored != STORED:
        raise Wrong(call, f"{STORED} documents more", f"{stored} more, and the report: {report}")
    expected = exercise.Report(
        STORED,
        len(KNOWN) + 1,
        dict.fromkeys(INVALID, REFUSED_BY_SCHEMA) | dict.fromkeys(TAKEN, DUPLICATE_KEY),
    )
    if report != expected:
        raise Wrong(call, expected, report)
    if events.calls > MOST_CALLS:
        raise Wrong(call, f"{MOST_CALLS} calls of the server at most", f"{events.calls:,} calls")
    events, new = Events(), [event(number) for number in range(EVENTS)]
    for what, sent, expected in (
        (f"{EVENTS:,} new documents", new, exercise.Report(EVENTS)),
        (f"{EVENTS:,} documents that are all there", new, exercise.Report(0, EVENTS)),
        ("no document", [], exercise.Report()),
    ):
        report = exercise.load(events, sent)
        if report != expected:
            raise Wrong(f"load(events, {what})", expected, report)
    cut_off = Events()
    cut_off.insert_many = cut_off.bulk_write = closed  # type: ignore[method-assign]
    try:
        report = exercise.load(cut_off, [event(1)])
    except AutoReconnect:
        pass
    else:
        call = "load(events, 1 document), and the connection is closed"
        raise Wrong(call, "AutoReconnect", report)
    for known in ([], [1]):
        late = Events({"code": 64, "errmsg": "waiting for replication timed out"})
        late.by_id = {number: event(number) for number in known}
        try:
            report = exercise.load(late, [event(1), event(2)])
        except PyMongoError:
            continue
        call = f"load(events, 2 documents), {len(known)} known; their write concern failed: code 64"
        raise Wrong(call, "PyMongo's error", report)
