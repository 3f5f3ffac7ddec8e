"""Loads into a collection of our own that refuses as the server does, and counts what is in it.

Refused: `ordered=False` alone, which reports as stored what the schema refused; all duplicates as
"already there", also those of another unique index; `insert_one` in a loop; a write concern that
failed, passed over, if only beside a duplicate; a lost connection, passed over.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from pymongo.errors import AutoReconnect, BulkWriteError, DuplicateKeyError, WriteError
from pymongo.results import BulkWriteResult, InsertManyResult, InsertOneResult

from checks import Wrong

Document = dict[str, Any]

EVENTS, MOST_CALLS = 1_000, 10
DUPLICATE_KEY, REFUSED_BY_SCHEMA = 11000, 121
KNOWN, INVALID, TAKEN = (3, 400, 999), (5, 500), (7, 700)  # positions
STORED = EVENTS - len(KNOWN) - len(INVALID) - len(TAKEN)


class Events:
    """By `_id`; `reference` is unique, too, and a schema wants `kind` to be a text."""

    def __init__(self, write_concern_error: Document | None = None) -> None:
        self.by_id: dict[Any, Document] = {}
        self.calls = 0
        self._references: set[str] = set()
        self._concern_errors = [write_concern_error] if write_concern_error else []

    def _try(self, document: Document) -> Document | None:
        """Stores it, or gives its entry of `writeErrors`, but for the index."""
        taken = "_id" if document["_id"] in self.by_id else "reference"
        if taken == "_id" or document["reference"] in self._references:
            index = "_id_" if taken == "_id" else f"{taken}_1"
            text = f"E11000 duplicate key error collection: shop.events index: {index} dup key: "
            text += f"{{ {taken}: {document[taken]!r} }}"
            what = {"keyPattern": {taken: 1}, "keyValue": {taken: document[taken]}}
            return {"code": DUPLICATE_KEY, "errmsg": text, **what, "op": document}
        if not isinstance(document["kind"], str):
            text = "Document failed validation"
            return {"code": REFUSED_BY_SCHEMA, "errmsg": text, "op": document}
        self.by_id[document["_id"]] = document
        self._references.add(document["reference"])
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
        self.calls += 1
        before, errors = len(self.by_id), list[Document]()
        for index, document in enumerate(documents):
            if entry := self._try(document):
                errors.append({"index": index, **entry})
                if ordered:
                    break
        if errors or self._concern_errors:
            counts = dict.fromkeys(("nUpserted", "nMatched", "nModified", "nRemoved"), 0)
            counts["nInserted"] = len(self.by_id) - before
            told = {"writeErrors": errors, "writeConcernErrors": self._concern_errors}
            raise BulkWriteError({**told, **counts, "upserted": []})
        return InsertManyResult([document["_id"] for document in documents], True)

    def bulk_write(
        self, requests: Sequence[Any], ordered: bool = True, **_: object
    ) -> BulkWriteResult:
        told = self.insert_many([request._doc for request in requests], ordered)
        return BulkWriteResult({"nInserted": len(told.inserted_ids)}, True)

    def find(self, asked: Mapping[str, Any], *_: object) -> list[Document]:
        """For those who ask first what is there: `{"_id": {"$in": [...]}}`."""
        self.calls += 1
        return [self.by_id[key] for key in asked["_id"]["$in"] if key in self.by_id]


def event(number: int, **changed: object) -> Document:
    return {"_id": number, "reference": f"R{number}", "kind": "visit", **changed}


def closed(*_: object, **__: object) -> Any:
    raise AutoReconnect("connection closed")


def check(exercise: ModuleType) -> None:
    events = Events()
    events.insert_many([event(number) for number in KNOWN])
    events.insert_many([event(-number, reference=f"R{number}") for number in TAKEN])
    there, events.calls = len(events.by_id), 0
    documents = [event(number) for number in range(EVENTS)]
    for number in INVALID:
        documents[number]["kind"] = number
    report = exercise.load(events, documents)
    stored = len(events.by_id) - there
    refused = f"{len(KNOWN)} known, {len(TAKEN)} references taken, {len(INVALID)} invalid"
    call = f"load(events, {EVENTS:,} documents), {refused}"
    if stored != STORED:
        raise Wrong(call, f"{STORED} documents more", f"{stored} more, and the report: {report}")
    expected = exercise.Report(
        STORED,
        len(KNOWN),
        dict.fromkeys(INVALID, REFUSED_BY_SCHEMA) | dict.fromkeys(TAKEN, DUPLICATE_KEY),
    )
    if report != expected:
        raise Wrong(call, expected, report)
    if events.calls > MOST_CALLS:
        raise Wrong(call, f"{MOST_CALLS} calls of the server at most", f"{events.calls:,} calls")
    report = exercise.load(Events(), [event(number) for number in range(EVENTS)])
    if report != exercise.Report(EVENTS):
        raise Wrong(f"load(events, {EVENTS:,} new documents)", exercise.Report(EVENTS), report)
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
        except BulkWriteError:
            continue
        call = f"load(events, 2 documents), {len(known)} known; their write concern failed: code 64"
        raise Wrong(call, "BulkWriteError", report)
