"""The load that counts what the server says.

`ordered=True` is the default and stops at the first refusal: what follows is not tried, and
`writeErrors` has one entry, however many documents are missing. Unordered, each document is
tried, and each refusal has its entry. `nInserted` is the server's own count; a subtraction counts
as stored what nobody has mentioned. Code 11000 is any unique index: only that of `_id` says that
this document was there before.

Guide: docs/02-mongodb.md, chapter 6, Bulk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pymongo.collection import Collection
from pymongo.errors import BulkWriteError

Document = dict[str, Any]

DUPLICATE_KEY = 11000  # code of the server, for any unique index


@dataclass
class Report:
    stored: int = 0
    already_there: int = 0
    rejected: dict[Any, int] = field(default_factory=dict)  # _id → code of the server

    def __str__(self) -> str:
        return (
            f"stored {self.stored:,}, already there {self.already_there:,}, "
            f"rejected {len(self.rejected):,}"
        )


def load(events: Collection[Document], documents: Sequence[Document]) -> Report:
    """Stores documents that have an `_id` each."""
    report = Report()
    if not documents:
        return report
    try:
        report.stored = len(events.insert_many(documents, ordered=False).inserted_ids)
    except BulkWriteError as error:
        if error.details["writeConcernErrors"]:
            raise
        report.stored = error.details["nInserted"]
        for refusal in error.details["writeErrors"]:
            is_known = refusal["code"] == DUPLICATE_KEY and refusal["keyPattern"] == {"_id": 1}
            if is_known:
                report.already_there += 1
            else:
                report.rejected[refusal["op"]["_id"]] = refusal["code"]
    return report
