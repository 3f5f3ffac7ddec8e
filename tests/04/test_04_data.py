"""Script 04's messages, policies, names, outbox, and its pipeline with both stores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pika
import pymongo
import pytest
from brokers import UnderTest, app, relay_and_die
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PURE = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
THREADS = 8
FILES = itertools.count()

# ── Message ─────────────────────────────────────────────────────────────────────────

texts = st.text(st.characters(exclude_categories=()))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
times = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.timezones())  # noqa: DTZ001


@PURE
@given(kind=texts, payload=st.dictionaries(texts, values, max_size=4), message_id=texts, at=times)
def test_a_message_survives_the_wire(
    kind: str, payload: dict[str, Any], message_id: str, at: datetime
) -> None:
    message = app.Message(kind, payload, message_id, created_at=at)
    body = message.encode()
    # In UTC, since a local hour that comes twice equals none in another zone.
    assert app.Message.decode(body) == dataclasses.replace(message, created_at=at.astimezone(UTC))
    assert json.loads(body)["created_at"].endswith("+00:00")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.payload = {}


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(app.Message("user", {"id": 1}).encode()), **fields}).encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "JSONDecodeError"), (b"{", "JSONDecodeError"), (b"[" * 100_000, "RecursionError"),
        (b"\xff", "UnicodeDecode"), (changed().decode().encode("utf-16"), "UnicodeDecode"),
        (b"null", "Attribute"), (b"[]", "Type"), (b'"version"', "Attribute"), (b"{}", "version"),
        (changed(version=0), "another version"), (changed(version=2), "another version"),
        (changed(version="1"), "another version"), (changed(version=None), "another version"),
        (b'{"version": 1}', "other fields"), (changed(more=1), "other fields"),
        (changed(**{"\ud800": 1}), ""),  # a reason with it could not be sent
        (b'{"version": 1, "created_at": "2026-01-01T00:00Z"}', "other fields"),
        (changed(payload=[]), "wrong type"), (changed(payload=None), "wrong type"),
        (changed(type=1), "wrong type"), (changed(message_id=None), "wrong type"),
        (changed(correlation_id=[]), "wrong type"), (changed(traceparent={}), "wrong type"),
        (changed(created_at=0), "TypeError"), (changed(created_at="today"), "'today'"),
        (changed(created_at="2026-01-01T00:00:00"), ""),  # in which zone?
        (changed(payload={"n": float("nan")}), ""), (changed(payload={"n": float("-inf")}), ""),
        (changed(payload={"text": "x" * app.MAX_BODY_BYTES}), "1,100,000 is the bound"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_body_that_is_none_of_ours_is_poison(body: bytes, reason: str) -> None:
    with pytest.raises(app.PoisonMessage) as told:
        app.Message.decode(body)
    assert reason in str(told.value)
    delivery = app.Delivery(1, body, pika.BasicProperties(), False, None)
    contract = app.Contract("work", (), "dead-letters", "work.dead")
    app.follow_up(contract, delivery, told.value).properties.encode()  # can be sent


@pytest.mark.parametrize("payload", [{"n": float("nan")}, {"n": {1}}], ids=ascii)
def test_what_no_consumer_could_read_is_not_encoded(payload: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        app.Message("user", payload).encode()


# ── RetryPolicy and Topology ────────────────────────────────────────────────────────


@PURE
@given(first_s=st.floats(0.01, 10), cap_s=st.floats(0.01, 100), attempts=st.integers(1, 12))
def test_a_back_off_doubles_up_to_its_cap(first_s: float, cap_s: float, attempts: int) -> None:
    policy, expected, step_s = app.RetryPolicy(first_s, cap_s, attempts), [], first_s
    for _ in range(attempts - 1):
        expected.append(min(step_s, cap_s))
        step_s *= 2
    assert policy.steps_s() == pytest.approx(expected)
    for failures in (*range(attempts), 10_000):
        bound_s = min(cap_s, first_s * 2.0 ** min(failures, 60))
        waits_s = [policy.jittered_s(failures) for _ in range(20)]
        assert 0.1 * bound_s <= min(waits_s) < max(waits_s) <= bound_s


def test_every_queue_of_a_contract_is_declared_and_safe() -> None:
    topology = app.Topology([("a", "", ""), ("b", "", "")], {}, "p.", 7)
    queues = topology.queues()
    for contract in map(topology.contract, "ab"):
        ttls_ms = [queues[delay]["x-message-ttl"] for delay in contract.delay_queues]
        assert ttls_ms == [round(step_s * 1000) for step_s in topology.retry.steps_s()]
        for queue in (contract.queue, *contract.delay_queues):  # else the broker may lose it
            assert queues[queue]["x-dead-letter-strategy"] == "at-least-once"
            assert queues[queue]["x-overflow"] == "reject-publish"
        assert "x-dead-letter-exchange" not in queues[contract.dead_letter_queue]
    assert all(name.startswith("p.") and ".v7" in name for name in queues)
    assert {arguments["x-queue-type"] for arguments in queues.values()} == {"quorum"}


# ── Outbox ──────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """In place of SIGKILL."""


def opened(path: Path) -> tuple[sqlite3.Connection, Any]:
    database = sqlite3.connect(path)
    database.execute("PRAGMA synchronous = OFF")  # no power fails here
    return database, app.Outbox(database)


@PURE
@given(
    are_committed=st.lists(st.booleans(), max_size=12),
    fails_at=st.integers(0, 12),
    is_published=st.booleans(),
)
def test_an_outbox_loses_nothing_and_keeps_the_order(
    tmp_path: Path, are_committed: list[bool], fails_at: int, is_published: bool
) -> None:
    """The relay dies before or after a publish; what is rolled back has no message."""
    path, calls, arrived = tmp_path / f"{next(FILES)}.sqlite", itertools.count(), list[int]()

    def publish(outgoing: Any) -> None:
        fails = next(calls) == fails_at
        if fails and not is_published:
            raise app.Undelivered("nacked")
        arrived.append(app.Message.decode(outgoing.body).payload["n"])
        if fails:
            raise Killed

    database, outbox = opened(path)
    for n, is_committed in enumerate(are_committed):
        outbox.add(app.Message("changed", {"n": n}), "key")
        database.commit() if is_committed else database.rollback()
    committed = [n for n, is_committed in enumerate(are_committed) if is_committed]
    with suppress(Killed, app.Undelivered):
        assert outbox.relay(publish) == len(committed)
    before = committed[: fails_at + is_published]
    assert arrived == before
    database.close()
    database, outbox = opened(path)
    assert outbox.relay(publish) == len(committed[fails_at:])
    assert arrived == before + committed[fails_at:]
    assert outbox.relay(publish) == 0
    database.close()


def test_what_no_queue_takes_stops_the_relay_and_is_named(
    broker: UnderTest, tmp_path: Path
) -> None:
    contract, (database, outbox) = broker.contract(), opened(tmp_path / "outbox.sqlite")
    for n, key in enumerate((contract.queue, f"{broker.prefix}later", contract.queue)):
        outbox.add(app.Message("changed", {"n": n}, f"id {n}"), key)
    database.commit()
    publish = app.Producer(broker.connect()).publish
    with pytest.raises(app.Undelivered, match=r"UnroutableError.*: message id 1 to"):
        outbox.relay(publish)
    assert [m.payload["n"] for m in app.take_all(broker.channel(), contract.queue)] == [0]
    with pytest.raises(app.Undelivered, match="id 1"):
        outbox.relay(publish)
    database.close()


def test_a_relay_that_is_killed_repeats_one_message(rabbitmq: UnderTest, tmp_path: Path) -> None:
    contract, path = rabbitmq.contract(), tmp_path / "outbox.sqlite"
    database, outbox = opened(path)
    for n in range(10):
        outbox.add(app.Message("changed", {"n": n}), contract.queue)
    database.commit()
    spawn = multiprocessing.get_context("spawn")
    relay = spawn.Process(target=relay_and_die, args=(str(path), rabbitmq.made.url, 4))
    relay.start()
    relay.join(60)
    assert relay.exitcode == -signal.SIGKILL
    assert outbox.relay(app.Producer(rabbitmq.connect()).publish) == 6
    database.close()
    arrived = [m.payload["n"] for m in app.take_all(rabbitmq.channel(), contract.queue)]
    assert arrived == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]


# ── Pipeline ────────────────────────────────────────────────────────────────────────

USER = {"id": 1, "email": "Ada@Example.com", "country": "AT"}


@pytest.fixture(params=["sqlite", "mongo"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "mongo":
        yield app.MongoStore(request.getfixturevalue("mongo_database"))
    else:
        with closing(app.SqliteStore(tmp_path / "users.sqlite")) as made:
            yield made


@pytest.fixture
def pipeline(store: Any) -> Any:
    return app.UserDataPipeline(store, lambda user: app.REGIONS[user["country"]])


def delivery(message: Any) -> Any:
    properties = app.Outgoing.of(message, "").properties
    return app.Delivery(1, message.encode(), properties, False, None)


def at_once(pipeline: Any, messages: list[Any]) -> None:
    barrier = Barrier(THREADS)

    def handle(message: Any) -> None:
        barrier.wait()
        for _ in range(100):  # attempts, as a consumer makes them
            with suppress(app.Transient):
                pipeline(delivery(message))
                return

    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(handle, messages)) == [None] * len(messages)


def test_a_message_has_its_effect_once_however_often_and_at_once_it_comes(
    pipeline: Any, store: Any
) -> None:
    for n in range(1, 6):
        message = app.Message("user", {**USER, "id": n})
        at_once(pipeline, [message] * THREADS)
        assert pipeline.repetitions == [message.message_id] * (THREADS - 1)
        pipeline.repetitions.clear()
        assert store.totals() == (n, n)


def test_no_effect_is_lost_when_messages_of_one_user_come_at_once(
    pipeline: Any, store: Any
) -> None:
    for n in range(1, 6):
        at_once(pipeline, [app.Message("user", {**USER, "id": n}) for _ in range(THREADS)])
        assert (store.totals(), pipeline.repetitions) == ((n, n * THREADS), [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(({"id": value}, "id: no") for value in (None, 0, -1, "1", 1.0, True, [1], 2**63)),
        *(({"email": value}, "email: no") for value in (None, "", "a@b", "@b.c", "a b@c.d", 1)),
        *(({"country": value}, "country: unk") for value in (None, "", "at", "XX", 1, [], {})),
    ],
    ids=ascii,
)  # fmt: skip
def test_an_invalid_user_is_poison_and_the_field_is_named(
    pipeline: Any, store: Any, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(app.PoisonMessage, match=reason):
        pipeline(delivery(app.Message("user", {**USER, **change})))
    assert store.totals() == (0, 0)


def test_a_store_that_is_away_is_worth_another_attempt() -> None:
    with pymongo.MongoClient("mongodb://127.0.0.1:1", timeoutMS=300) as client:
        handle = app.UserDataPipeline(app.MongoStore(client.away), lambda _: "Europe")
        with pytest.raises(app.Transient, match="MongoDB"):
            handle(delivery(app.Message("user", USER)))
    assert handle.repetitions == []
