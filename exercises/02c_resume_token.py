"""The search index that lacks a few products after each deployment.

A follower copies the changes of `products` into a search index. It reads a change stream, and
saves its resume token, so that it goes on where it was. After a deployment a product or two are
missing in search, or are found although they were deleted. The log has the deployment's SIGTERM
and nothing else. Reading everything anew mends it, until the next one.

Change `Follower`. Stream, tokens and index are given, and stay; they share no transaction.

Judged: the follower is killed, by SIGKILL, before and after each of its calls, and started again.
Then the index equals the products, always; one change at most was handled again; and where the
index is down, its error reaches the caller, and no change is passed over.
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
            self._tokens.save(change["_id"])
            self._handle(change)

    def _handle(self, change: Document) -> None:
        key = change["documentKey"]["_id"]
        match change["operationType"]:
            case "insert":
                self._index.add(key, change["fullDocument"])
            case "update" | "replace":
                self._index.replace(key, change["fullDocument"])
            case "delete":
                self._index.remove(key)
