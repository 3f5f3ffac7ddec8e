"""The follower that may be killed at any moment.

First the effect, then the token: a kill between the two repeats a change, and loses none. So each
effect has to be one that may come twice: an insert replaces, a delete of what is gone is done.
Where both are in one database, one transaction holds effect and token, as in script 02; a search
index is another system, and repetitions are the best that can be had.

Guide: docs/02-mongodb.md, chapter 8, Change streams.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

Document = dict[str, Any]


class Stream(Protocol):
    def watch(self, resume_after: object | None) -> Iterable[Document]:
        """Changes behind this token, or all, in order. `_id` is the token of a change."""


class Tokens(Protocol):
    def load(self) -> object | None: ...

    def save(self, token: object) -> None: ...


class Index(Protocol):
    def add(self, key: int, document: Document) -> None:
        """Raises KeyError where the key is there."""

    def replace(self, key: int, document: Document) -> None:
        """Adds it where the key is not there."""

    def remove(self, key: int) -> None:
        """Raises KeyError where the key is not there."""

    def __contains__(self, key: int) -> bool: ...


class Follower:
    def __init__(self, products: Stream, tokens: Tokens, index: Index) -> None:
        self._products, self._tokens, self._index = products, tokens, index

    def run(self) -> None:
        for change in self._products.watch(self._tokens.load()):
            self._handle(change)
            self._tokens.save(change["_id"])

    def _handle(self, change: Document) -> None:
        key = change["documentKey"]["_id"]
        match change["operationType"]:
            case "insert" | "update" | "replace":
                self._index.replace(key, change["fullDocument"])
            case "delete" if key in self._index:
                self._index.remove(key)
