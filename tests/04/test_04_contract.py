"""One contract, two brokers: what holds on RabbitMQ holds on the broker in memory.

Each test with the fixture `broker` runs on both, by the same calls; the generated ones compare the
two with each other, step by step.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pika
import pytest
from brokers import UnderTest, app
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pika import exceptions as amqp

ONE_TOPOLOGY = settings(
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example empties it
)
NAMES = itertools.count()  # of queues that live for one example


def send(channel: Any, queue: str, body: object, exchange: str = "", **properties: Any) -> None:
    properties = {"delivery_mode": 2, **properties}
    channel.basic_publish(
        exchange, queue, str(body).encode(), pika.BasicProperties(**properties), mandatory=True
    )


def get(channel: Any, queue: str) -> tuple[int, str, bool] | None:
    """Tag, body and whether it was delivered before."""
    method, _, body = channel.basic_get(queue)
    return method and (method.delivery_tag, body.decode(), method.redelivered)


def taken(channel: Any, queue: str) -> list[str]:
    """All bodies; they are gone then."""
    bodies = []
    while got := get(channel, queue):
        channel.basic_ack(got[0])
        bodies.append(got[1])
    return bodies


def holds(broker: UnderTest, channel: Any, queue: str, count: int) -> None:
    """Wait until so many messages are ready."""

    def is_so() -> bool:
        declared = channel.queue_declare(queue, passive=True)
        return bool(declared.method.message_count == count)

    broker.until(is_so, f"{count} messages in {queue}")


# ── Routing ─────────────────────────────────────────────────────────────────────────

words = st.sampled_from(["", "a", "b", "#", "*"])
keys = st.lists(words, max_size=4).map(".".join)


@pytest.fixture
def sides(both: list[UnderTest]) -> list[Any]:
    """Of each broker: itself, a channel, the names of its exchanges by kind, a contract."""
    kinds = {kind: kind for kind in ("topic", "direct", "fanout")}
    options = {"exchanges": kinds, "delivery_limit": app.UNLIMITED}
    made = [(one, one.channel(), one.topology(**options)) for one in both]
    return [(one, channel, each.name, each.contract("work")) for one, channel, each in made]


@ONE_TOPOLOGY
@given(
    kind=st.sampled_from(["topic", "topic", "topic", "direct", "fanout"]),
    patterns=st.lists(st.lists(keys, min_size=1, max_size=2), min_size=1, max_size=3),
    sent=st.lists(keys, min_size=1, max_size=4),
)
@example(kind="topic", patterns=[["", "#"], ["*"], ["."]], sent=["", ".", "a"])
@example(kind="topic", patterns=[["#.#"], ["*.#.*"], ["#.a.#"]], sent=["", "a", "..", "b.a.a"])
def test_both_brokers_fill_the_same_queues_once(
    sides: list[Any], kind: str, patterns: list[list[str]], sent: list[str]
) -> None:
    names, filled = [f"{next(NAMES)}" for _ in patterns], []
    for _, channel, full, _ in sides:
        for name, bound in zip(names, patterns, strict=True):
            channel.queue_declare(full(name), exclusive=True)
            for pattern in bound:
                channel.queue_bind(full(name), full(kind), pattern)
        for key in sent:
            channel.basic_publish(full(kind), key, key.encode(), pika.BasicProperties())
        filled.append([taken(channel, full(name)) for name in names])
        for name in names:
            if hasattr(channel, "queue_delete"):  # in memory, other names are enough
                channel.queue_delete(full(name))
    assert filled[1] == filled[0]
    if kind != "topic":
        expected = [[k for k in sent if kind == "fanout" or k in bound] for bound in patterns]
        assert filled[1] == expected


def test_a_message_that_no_queue_takes_is_returned_and_named(broker: UnderTest) -> None:
    topology = broker.topology(("work", "jobs", "a"), exchanges={"jobs": "direct"})
    producer, message = app.Producer(broker.connect()), app.Message("t", {})
    with pytest.raises(
        app.Undelivered, match=f"UnroutableError.*: message {message.message_id} to"
    ):
        producer.publish(app.Outgoing.of(message, "b", topology.name("jobs")))
    producer.publish(app.Outgoing.of(message, "a", topology.name("jobs")))
    assert taken(broker.channel(), topology.name("work")) == [message.encode().decode()]


def test_an_exchange_that_is_not_there_is_named_and_the_producer_goes_on(broker: UnderTest) -> None:
    contract, message = broker.contract(), app.Message("t", {})
    producer, missing = app.Producer(broker.connect()), f"{broker.prefix}missing"
    with pytest.raises(app.Undelivered, match="404") as told:
        producer.publish(app.Outgoing.of(message, "a", missing))
    assert missing in str(told.value)
    assert message.message_id in str(told.value)
    producer.publish(app.Outgoing.of(message, contract.queue))
    assert taken(broker.channel(), contract.queue) == [message.encode().decode()]


# ── Topology ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "other", [{"delivery_limit": 4}, {"exchanges": {"jobs": "fanout"}}], ids=str
)
def test_what_differs_is_a_conflict_and_another_version_cures_it(
    broker: UnderTest, other: dict[str, Any]
) -> None:
    same = {"exchanges": {"jobs": "direct"}, "delivery_limit": 3}
    before, channel = broker.topology(("work", "jobs", "a"), **same), broker.channel()
    send(channel, "a", "old", before.name("jobs"))
    before.declare(broker.channel())  # the same again changes nothing
    with pytest.raises(amqp.ChannelClosedByBroker, match="raise the topology's version") as told:
        replace(before, **other).declare(refused := broker.channel())
    assert before.name("jobs" if "exchanges" in other else "work") in str(told.value)
    assert not refused.is_open
    after = broker.topology(("work", "jobs", "a"), **{**same, **other}, version=2)
    send(channel, "a", "new", after.name("jobs"))
    assert taken(channel, before.name("work")) == ["old"]
    assert taken(channel, after.name("work")) == ["new"]


# ── Delivery and its end ────────────────────────────────────────────────────────────


def test_acks_one_and_multiple_and_a_tag_that_is_unknown(broker: UnderTest) -> None:
    queue, channel, other = broker.contract().queue, broker.channel(), broker.channel()
    for n in range(4):
        send(channel, queue, n)
    tags = [channel.basic_get(queue)[0].delivery_tag for _ in range(4)]
    channel.basic_ack(tags[0])
    channel.basic_ack(tags[2], multiple=True)
    with pytest.raises(amqp.ChannelClosedByBroker, match="406"):  # noqa: PT012
        channel.basic_ack(tags[1])  # which has no answer
        channel.queue_declare(queue, passive=True)
    holds(broker, other, queue, 1)  # closed: what was unacked is back
    assert get(other, queue) == (1, "3", True)


def test_a_closed_connection_gives_back_in_order(broker: UnderTest) -> None:
    queue, channel, doomed = broker.contract().queue, broker.channel(), broker.connect()
    for n in range(4):
        send(channel, queue, n)
    held = doomed.channel()
    assert [get(held, queue) for _ in range(2)] == [(1, "0", False), (2, "1", False)]
    assert get(channel, queue) == (1, "2", False)
    doomed.close()
    holds(broker, channel, queue, 3)
    back = [(2, "0", True), (3, "1", True), (4, "3", False)]
    assert [get(channel, queue) for _ in range(3)] == back


def test_no_consumer_holds_more_than_its_prefetch(broker: UnderTest) -> None:
    contract, channel, release = broker.contract(), broker.channel(), threading.Event()
    handled: list[bytes] = []

    def waits(delivery: Any) -> None:
        release.wait(60)
        handled.append(delivery.body)

    for n in range(7):
        send(channel, contract.queue, n)
    with broker.consumer(contract, waits, prefetch=3):
        for _ in range(5):
            holds(broker, channel, contract.queue, 4)
        release.set()
        broker.until(lambda: len(handled) == 7)  # not of the queue: what is on its way goes back
    assert taken(broker.channel(), contract.queue) == []


STEPS = "publish publish get get ack ack-all nack nack-all reject reject-all".split()
operations = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), max_size=25)


PUT, GET = [("publish", 0)] * 4, [("get", 0)] * 4


@ONE_TOPOLOGY
@given(steps=operations)
@example(steps=[*PUT, *GET, ("nack", 1), ("nack", 2), ("nack", 0), *GET])
@example(steps=[*PUT, *GET, ("reject-all", 2), ("ack", 0)])
def test_both_brokers_answer_a_generated_sequence_alike(
    sides: list[Any], steps: list[tuple[str, int]]
) -> None:
    seen = []
    for one, channel, _, contract in sides:
        held, answers, dead = dict[int, str](), list[object](), 0
        for n, (step, which) in enumerate(steps):
            if step == "publish":
                send(channel, contract.queue, n)
            elif step == "get":
                got = get(channel, contract.queue)
                answers.append(got and got[1:])
                held.update({got[0]: got[1]} if got else {})
            elif held:
                tag, is_all = list(held)[which % len(held)], step.endswith("all")
                gone = [t for t in held if t <= tag] if is_all else [tag]
                if step.startswith("ack"):
                    channel.basic_ack(tag, multiple=is_all)
                else:
                    channel.basic_nack(tag, multiple=is_all, requeue=step.startswith("nack"))
                dead += len(gone) if step.startswith("reject") else 0
                answers.append([held.pop(t) for t in gone])
        channel.basic_nack(0, multiple=True, requeue=True)
        holds(one, channel, contract.dead_letter_queue, dead)
        answers += taken(channel, contract.queue), taken(channel, contract.dead_letter_queue)
        seen.append(answers)
    assert seen[1] == seen[0]


# ── Expiry and dead letters ─────────────────────────────────────────────────────────


def test_a_message_expires_at_the_head_of_its_queue_only(broker: UnderTest) -> None:
    contract, channel = broker.contract(), broker.channel()
    for body, ttl in (("long", "400"), ("short", "50"), ("none", None)):
        send(channel, contract.queue, body, expiration=ttl)
    holds(broker, channel, contract.dead_letter_queue, 2)
    dead = broker.dead_letters(contract)
    assert [(d.body, why) for d, why in dead.peek()] == [
        (b"long", "expired"),
        (b"short", "expired"),
    ]
    assert {d.properties.expiration for d, _ in dead.peek()} == {None}
    assert taken(channel, contract.queue) == ["none"]


def test_a_rejected_message_is_a_dead_letter_with_that_reason(broker: UnderTest) -> None:
    contract, channel = broker.contract(), broker.channel()
    for n in range(3):
        send(channel, contract.queue, n, headers={"of": "the sender"}, message_id=f"id {n}")
    tags = [channel.basic_get(contract.queue)[0].delivery_tag for _ in range(3)]
    channel.basic_nack(tags[0], requeue=False)
    channel.basic_nack(tags[2], multiple=True, requeue=False)
    dead = broker.dead_letters(contract)
    broker.until(lambda: dead.count() == 3)
    for n, (delivery, why) in enumerate(dead.peek()):
        assert (delivery.body, delivery.properties.message_id, why) == (
            f"{n}".encode(), f"id {n}", "rejected",
        )  # fmt: skip
        assert delivery.properties.headers["of"] == "the sender"
    assert get(channel, contract.queue) is None


def test_a_limit_of_three_means_four_deliveries(broker: UnderTest) -> None:
    """By connections that end: of those, every version of RabbitMQ takes count."""
    contract, channel = broker.contract(delivery_limit=3), broker.channel()
    dead, flags = broker.dead_letters(contract), list[bool]()
    send(channel, contract.queue, "poison")
    while not dead.count():
        doomed = broker.connect()
        if got := get(doomed.channel(), contract.queue):
            flags.append(got[2])
        doomed.close()
    assert flags == [False, True, True, True]
    assert [(d.body, why) for d, why in dead.peek()] == [(b"poison", "delivery_limit")]


def test_the_reason_of_a_dead_letter_is_the_last_one(broker: UnderTest) -> None:
    """It came through a delay queue, which is a dead letter's way, too."""
    contract, channel = broker.contract(), broker.channel()
    send(channel, contract.delay_queues[0], "x")
    holds(broker, channel, contract.queue, 1)
    channel.basic_nack(channel.basic_get(contract.queue)[0].delivery_tag, requeue=False)
    dead = broker.dead_letters(contract)
    broker.until(lambda: dead.count() == 1)
    assert [why for _, why in dead.peek()] == ["rejected"]


@pytest.fixture
def dead_letters(broker: UnderTest) -> tuple[Any, Any, Any]:
    """Ten of them, the call to see them, and a channel."""
    contract, channel = broker.contract(), broker.channel()
    for n in range(10):
        headers = {app.REASON_HEADER: f"reason {n}", app.ATTEMPT_HEADER: 4}
        send(channel, contract.dead_letter_queue, n, headers=headers)
    return contract, broker.dead_letters(contract), channel


def test_peeking_neither_removes_nor_reorders(
    broker: UnderTest, dead_letters: tuple[Any, Any, Any]
) -> None:
    _, dead, _ = dead_letters
    for n in range(30):
        seen = dead.peek(limit=n % 12)
        assert [(d.body, why) for d, why in seen] == [
            (f"{n}".encode(), f"reason {n}") for n in range(min(n % 12, 10))
        ]
    broker.until(lambda: dead.count() == 10)  # what is given back counts a moment later


def test_replay_takes_what_is_wanted_up_to_a_limit_and_mends_it(
    dead_letters: tuple[Any, Any, Any],
) -> None:
    contract, dead, channel = dead_letters
    odd = dead.replay(2, lambda d: int(d.body) % 2 == 1, lambda body: body + b" mended")
    assert odd == 2
    _, properties, body = channel.basic_get(contract.queue)
    assert (body, properties.headers[app.ATTEMPT_HEADER]) == (b"1 mended", 0)
    assert taken(channel, contract.queue) == ["3 mended"]
    assert [d.body for d, _ in dead.peek()] == [b"0", b"2", *(b"%d" % n for n in range(4, 10))]
    assert dead.replay() == 8
    assert (dead.peek(), dead.replay()) == ([], 0)


def test_replay_forgets_the_old_reason(broker: UnderTest) -> None:
    contract, channel = broker.contract(), broker.channel()
    headers = {app.REASON_HEADER: "a bug, fixed since"}
    send(channel, contract.dead_letter_queue, "x", headers=headers)
    dead = broker.dead_letters(contract)
    assert dead.replay() == 1
    channel.basic_nack(channel.basic_get(contract.queue)[0].delivery_tag, requeue=False)
    broker.until(lambda: dead.count() == 1)
    assert [why for _, why in dead.peek()] == ["rejected"]


def test_what_reached_its_delivery_limit_is_replayed_and_retried(broker: UnderTest) -> None:
    """With its old x-death, RabbitMQ 3 would see a cycle and drop it behind its delay."""
    contract, channel = broker.contract(delivery_limit=1), broker.channel()
    dead, seen = broker.dead_letters(contract), list[bytes]()
    send(channel, contract.queue, "x")
    while not dead.count():
        if (method := channel.basic_get(contract.queue)[0]) is not None:
            channel.basic_nack(method.delivery_tag)
    assert dead.replay() == 1

    def fails_once(delivery: Any) -> None:
        seen.append(delivery.body)
        if len(seen) == 1:
            raise app.Transient("not yet")

    with broker.consumer(contract, fails_once):
        broker.until(lambda: len(seen) == 2)


@pytest.mark.parametrize("expected", [0, 9, 11])
def test_purging_another_number_deletes_nothing(
    dead_letters: tuple[Any, Any, Any], expected: int
) -> None:
    _, dead, _ = dead_letters
    with pytest.raises(ValueError, match="dead letters"):
        dead.purge(expected)
    assert [d.body for d, _ in dead.peek()] == [b"%d" % n for n in range(10)]
    dead.purge(10)
    assert dead.peek() == []


# ── WorkerPoolConsumer ──────────────────────────────────────────────────────────────


def settled(
    broker: UnderTest, contract: Any, bodies: list[bytes], handler: Any, **more: Any
) -> Any:
    """Publish, consume until all are acked or dead, and give the dead letters with their reasons.

    `handler` must return for each body in the end, or fail it for good."""
    connection, dead = broker.connect(), broker.dead_letters(contract)
    producer, done = app.Producer(connection), Counter[bytes]()
    for body in bodies:
        properties = pika.BasicProperties(delivery_mode=2, **more)
        producer.publish(app.Outgoing(contract.queue, body, properties))

    def counting(delivery: Any) -> None:
        handler(delivery)
        done[delivery.body] += 1

    with broker.consumer(contract, counting):
        broker.until(lambda: done.total() + dead.count() >= len(bodies))
    assert taken(broker.channel(), contract.queue) == []  # acked, or it would be back
    assert done.total() + dead.count() == len(bodies)
    return dead.peek()


def test_transient_waits_in_each_delay_queue_and_is_given_up_in_the_end(broker: UnderTest) -> None:
    contract = broker.contract(retry=app.RetryPolicy(0.02, attempts=4))
    attempts: list[object] = []

    def fails(delivery: Any) -> None:
        attempt = (delivery.properties.headers or {}).get(app.ATTEMPT_HEADER)
        if delivery.body == b"x":
            attempts.append(attempt)
        if delivery.body == b"x" or attempt != 2:
            raise app.Transient("no answer")

    bodies = [b"x", *(b"%d" % n for n in range(10))]
    ((delivery, why),) = settled(broker, contract, bodies, fails, message_id="id")
    assert attempts == [None, 1, 2, 3]
    assert (why, delivery.properties.message_id) == ("gave up after 4 attempts: no answer", "id")
    assert delivery.body == b"x"


def test_poison_and_bugs_are_dead_letters_at_once(broker: UnderTest) -> None:
    tried: list[bytes] = []

    def fails(delivery: Any) -> None:
        tried.append(delivery.body)
        if delivery.body == b"poison":
            raise app.PoisonMessage("no e-mail " + 600 * "é")
        _ = 1 / 0

    given_up = settled(broker, broker.contract(), [b"poison", b"bug"], fails)
    assert {d.body: why for d, why in given_up} == {
        b"poison": ("no e-mail " + 600 * "é")[: app.REASON_LIMIT],
        b"bug": "ZeroDivisionError: division by zero",
    }
    assert sorted(tried) == [b"bug", b"poison"]


@pytest.mark.parametrize("reason", ["", "\ud800", "\x00", "a\nb"], ids=ascii)
def test_any_text_may_be_a_reason(broker: UnderTest, reason: str) -> None:
    """A lone surrogate, for one, comes out of JSON, and cannot be encoded for the wire."""
    tried: list[bytes] = []

    def fails(delivery: Any) -> None:
        tried.append(delivery.body)
        raise app.PoisonMessage(reason)

    assert len(settled(broker, broker.contract(delivery_limit=1), [b"x"], fails)) == 1
    assert tried == [b"x"]


@pytest.mark.parametrize("attempt", ["1", -1, True, None, [1], 2**40], ids=repr)
def test_an_attempt_header_that_is_no_count(broker: UnderTest, attempt: object) -> None:
    def fails(_delivery: Any) -> None:
        raise app.Transient("again")

    headers = {app.ATTEMPT_HEADER: attempt}
    ((_, why),) = settled(broker, broker.contract(), [b"x"], fails, headers=headers)
    if type(attempt) is int and attempt > 0:
        assert why == f"gave up after {attempt + 1} attempts: again"
    else:
        assert why == f"header {app.ATTEMPT_HEADER} is not a count"


@pytest.mark.parametrize("header", ["CC", "BCC"])
@pytest.mark.parametrize("error", [app.Transient, app.PoisonMessage])
def test_properties_that_would_stop_or_lose_a_follow_up(
    broker: UnderTest, error: type[Exception], header: str
) -> None:
    """A user's name is refused for another user, what expires is lost, CC sends to more queues."""
    contract, user = broker.contract(), None
    if isinstance(broker.made, app.RabbitMQ):
        user = broker.made.parameters().credentials.username
    tried: list[bytes] = []

    def fails(delivery: Any) -> None:
        tried.append(delivery.body)
        raise error("no")

    # What the broker checks is the sender's; the follow-up might be another user's.
    ((delivery, _),) = settled(
        broker, contract, [b"x"], fails, user_id=user, expiration="60000",
        headers={header: [f"{broker.prefix}nowhere"]},
    )  # fmt: skip
    assert (delivery.properties.user_id, delivery.properties.expiration) == (None, None)
    assert "CC" not in delivery.properties.headers
    assert len(tried) == (2 if error is app.Transient else 1)


def test_bodies_of_any_kind_reach_the_handler_as_they_are(broker: UnderTest) -> None:
    message = app.Message("user", {"id": 1})
    broken = [
        b"", b"\xff\xfe", b"[1]", b'{"a": 1}', b"x" * 1_000_000,
        message.encode().replace(b'"version": 1', b'"version": 2'),
        message.encode().replace(b'"id": 1', b'"id": NaN'),
    ]  # fmt: skip
    handled: list[Any] = []

    def decodes(delivery: Any) -> None:
        handled.append(app.Message.decode(delivery.body))

    reasons = settled(broker, broker.contract(), [*broken, message.encode()], decodes)
    assert handled == [message]
    assert sorted(d.body for d, _ in reasons) == sorted(broken)
    assert all(why.startswith("not a message: ") for _, why in reasons)
