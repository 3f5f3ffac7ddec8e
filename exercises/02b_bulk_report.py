"""The load that says 49,999 and stored 312.

Every night the day's events are loaded: 50,000 documents, by `insert_many`. A load that was cut
off is repeated, so a duplicate is nothing to worry about. Last night's report: "stored 49,999,
already there 1, rejected 0". In the collection are 312 more than the day before. Nothing was
logged.

Change `load`. `Report` stays as it is.

Judged: what can be stored is stored, whatever becomes of the others; each document is counted once,
as stored, as there before (its `_id` is), or as rejected for any other reason, with the server's
code; an error that belongs to no document is raised; and a load takes a handful of calls, not one a
document, and none where there is no document. A load may hold a document twice.
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
        events.insert_many(documents)
    except BulkWriteError as error:
        for refusal in error.details["writeErrors"]:
            if refusal["code"] == DUPLICATE_KEY:
                report.already_there += 1
    report.stored = len(documents) - report.already_there
    return report
