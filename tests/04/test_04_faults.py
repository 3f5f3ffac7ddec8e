"""Faults on the real broker: what WindowedProducer and the three consumers do about each.

Lines are cut by a proxy; the broker that is killed and frozen is this file's own. Not here: the
broker's own limit on an ack, consumer_timeout, which it enforces once a minute.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import multiprocessing
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import script04
from running import missing, until
from script04 import END_S, KINDS, Proxy, Running, Work, mq, noted, number, outgoing

import servers

Caplog = pytest.LogCaptureFixture
Three = tuple[Any, dict[str, Any]]  # a broker, and a contract for each kind of consumer
every_kind = pytest.mark.parametrize("kind", KINDS)
SPAWN = multiprocessing.get_context("spawn")
RETRY = mq.RetryPolicy(0.05, 0.1, 3)


@pytest.fixture
def work(rabbitmq_url: str, rabbitmq_prefix: str) -> Iterator[Work]:
    broker, bindings = mq.RabbitMQ(rabbitmq_url), [("work", "", "")]
    with mq.declared(broker, rabbitmq_prefix, bindings, retry=RETRY) as (_, contract):
        yield Work(broker, contract, mq.Topology(bindings, prefix=rabbitmq_prefix, retry=RETRY))


@pytest.fixture
def line(rabbitmq_url: str) -> Iterator[Proxy]:
    with closing(Proxy(int(re.findall(r":(\d+)/", rabbitmq_url)[0]))) as made:
        yield made


@pytest.fixture
def by_line(work: Work, line: Proxy) -> Work:
    """The same by way of the proxy; an attempt to connect costs 0.5 s at most."""
    url = re.sub(r"@.*:\d+/", f"@127.0.0.1:{line.port}/", work.broker.url)
    return work._replace(broker=mq.RabbitMQ(f"{url}?stack_timeout=0.5&socket_timeout=0.5"))


def collecting(broker: Any, window: int = 1_000) -> tuple[Any, dict[int, str]]:
    """A producer, and how each message ended: "" if it was confirmed."""
    outcomes: dict[int, str] = {}
    settle = lambda message, error: outcomes.update({number(message): str(error or "")})  # noqa: E731
    return mq.WindowedProducer(broker, settle, window), outcomes


# ── WindowedProducer ────────────────────────────────────────────────────────────────


def test_order_is_kept_over_lines_that_are_cut(work: Work, by_line: Work, line: Proxy) -> None:
    producer, outcomes = collecting(by_line.broker, window=50)
    for n in range(600):
        producer.publish(outgoing(work.contract.queue, n), END_S)
        if n % 200 == 150:
            line.cut()
    producer.close()
    assert outcomes == dict.fromkeys(range(600), "")
    assert list(dict.fromkeys(work.left())) == list(range(600))


def test_each_failure_is_reported_for_its_message(work: Work) -> None:
    key = work.contract.queue
    full = f"{key}.full"
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with closing(work.broker.connect()) as connection:
        channel = connection.channel()
        channel.queue_declare(full, durable=True, arguments=arguments)
        producer, outcomes = collecting(work.broker)
        messages = [outgoing(to, n) for n, to in enumerate([full, full, "no", key, "k" * 256])]
        messages += [outgoing(key, 5), outgoing(key, 6)]
        messages[5].properties.headers = {"x": object()}
        for message in messages:
            producer.publish(message)
        producer.close()
        channel.queue_delete(full)
    reported = [re.split(r"\W", outcomes[n])[0] for n in range(7)]
    unfit = ["ShortStringTooLong", "UnsupportedAMQPFieldException"]
    assert reported == ["", "nacked", "unroutable", "", *unfit, ""]
    assert work.left() == [3, 6]


def test_only_messages_to_a_missing_exchange_fail(work: Work) -> None:
    producer, outcomes = collecting(work.broker)
    for n in range(60):
        producer.publish(outgoing(work.contract.queue, n, "missing" if n in (20, 21, 59) else ""))
    producer.close()
    failed = {n: why for n, why in outcomes.items() if why}
    assert list(failed) == [20, 21, 59]
    assert all(re.match("404 .*'missing'", why) for why in failed.values())
    assert [n for n in range(60) if n not in failed] == sorted(set(work.left()))


def test_a_callback_that_raises_ends_nothing(work: Work, caplog: Caplog) -> None:
    settled: list[int] = []

    def on_settled(message: Any, _: object) -> None:
        settled.append(number(message))
        raise ZeroDivisionError

    producer = mq.WindowedProducer(work.broker, on_settled, window=2)
    for n in range(20):
        producer.publish(outgoing(work.contract.queue, n), END_S)
    producer.close()
    assert settled == list(range(20))
    assert caplog.text.count("on_settled failed") == 20


def test_a_full_window_blocks_and_close_settles_the_rest(by_line: Work, line: Proxy) -> None:
    line.silent = True
    producer, outcomes = collecting(by_line.broker, window=3)
    for n in range(3):
        producer.publish(outgoing("any", n), 0)
    with pytest.raises(TimeoutError, match="3 messages unconfirmed"):
        producer.publish(outgoing("any", 3), 0.05)
    thread = threading.Thread(target=producer.close, args=(0.05,), daemon=True)
    thread.start()
    thread.join(END_S)
    assert not thread.is_alive()
    assert list(outcomes) == [0, 1, 2]
    assert all(why.startswith("unconfirmed when closed") for why in outcomes.values())
    with pytest.raises(RuntimeError, match="closed"):
        producer.publish(outgoing("any", 4), 0.05)


def test_closed_too_soon_each_message_is_settled_once(work: Work) -> None:
    settled: Counter[int] = Counter()
    producer = mq.WindowedProducer(
        work.broker, lambda message, _: settled.update([number(message)]), 5_000
    )
    for n in range(3_000):
        producer.publish(outgoing(work.contract.queue, n))
    producer.close(0)
    until(lambda: "producer" not in {thread.name for thread in threading.enumerate()}, "its end")
    assert settled == Counter(range(3_000))


# ── Consumers: lost lines, channels and queues ──────────────────────────────────────


@every_kind
def test_a_consumer_outlives_its_lines(kind: str, work: Work, by_line: Work, line: Proxy) -> None:
    """Silent ones first: AMQPConnectorStackTimeout is no AMQPError."""
    line.silent, seen = True, set[int]()
    with Running(by_line.consumer(kind, lambda d: seen.add(number(d)))):
        until(lambda: line.accepted >= 4, "a second attempt of the consumer and its publisher")
        line.silent = False
        for n in range(3):
            line.cut()
            work.put(n)
            until(lambda n=n: n in seen, f"a message over line {n}")


@every_kind
def test_a_channel_that_the_broker_closed_is_noticed(kind: str, work: Work) -> None:
    seen: list[int] = []

    def handler(delivery: Any) -> None:
        seen.append(number(delivery))
        if len(seen) == 1:  # an ack of what is not unacked: 406
            in_loop = getattr(delivery.channel.connection, "add_callback_threadsafe", lambda f: f())
            in_loop(lambda: delivery.channel.basic_ack(99_999))

    with Running(work.consumer(kind, handler)):
        work.put(0)
        until(lambda: len(seen) >= 2, "the second delivery")
    assert work.left() == []


@every_kind
def test_a_queue_deleted_and_declared_again(kind: str, work: Work, caplog: Caplog) -> None:
    """Not in the same moment: RabbitMQ 3.10 then counts the consumer, and tells it nothing."""
    seen: list[int] = []
    with Running(work.consumer(kind, lambda d: seen.append(number(d)))):
        work.put(0)
        until(lambda: seen, "a message")
        with closing(work.broker.connect()) as connection:
            connection.channel().queue_delete(work.contract.queue)
            until(lambda: f"consumer of {work.contract.queue}" in caplog.text, "it to notice")
            work.topology.declare(connection.channel())
        work.put(1)
        until(lambda: 1 in seen, "a message in the new queue")


@every_kind
def test_a_queue_that_stays_away_ends_it(
    kind: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mq, "RECONNECT", RETRY)
    seen: list[int] = []
    started = Running(work.consumer(kind, lambda d: seen.append(number(d))))
    work.put(0)
    until(lambda: seen, "a message")
    with closing(work.broker.connect()) as connection:
        connection.channel().queue_delete(work.contract.queue)
    with pytest.raises(ConnectionError, match=r"NOT_FOUND|channel closed|cancelled"):
        raise started.joined() or AssertionError("ended in peace")


# ── Consumers: stopping ─────────────────────────────────────────────────────────────


def start_working(*args: object) -> Any:
    process = SPAWN.Process(target=script04.work_in_a_process, args=args)
    process.start()
    return process


@every_kind
def test_sigterm_finishes_what_is_in_hand_and_no_more(
    kind: str, work: Work, tmp_path: Path
) -> None:
    work.put(*range(150))
    notes = tmp_path / "notes"
    process = start_working(kind, work.broker.url, work.contract, str(notes), 0.03)
    until(lambda: len(noted(notes, "done")) >= 10, "some work")
    process.terminate()
    process.join(END_S)
    assert process.exitcode == 0
    done, left = noted(notes, "done"), work.left()
    assert sorted(noted(notes, "begun")) == sorted(done)
    assert left
    assert sorted(done + left) == list(range(150))


@every_kind
def test_a_second_takes_over_from_one_that_is_killed(kind: str, work: Work, tmp_path: Path) -> None:
    work.put(*range(30))
    notes, seen = tmp_path / "notes", list[int]()
    process = start_working(kind, work.broker.url, work.contract, str(notes), 60.0)
    until(lambda: noted(notes, "begun"), "a message in hand")
    with Running(work.consumer(kind, lambda d: seen.append(number(d)))):
        until(lambda: len(seen) == 20, "what the first does not hold")
        process.kill()
        process.join(END_S)
        until(lambda: len(seen) >= 30, "what the first held")
    assert (sorted(seen), noted(notes, "done")) == (list(range(30)), [])


@pytest.mark.parametrize("kind", ["pool", "async"])
def test_a_handler_that_hangs_does_not_hold_up_the_end(kind: str, work: Work) -> None:
    begun, released = threading.Event(), threading.Event()

    def hang(_: object) -> None:
        begun.set()
        released.wait(2 * END_S)

    async def hang_awaiting(_: object) -> None:
        begun.set()
        await asyncio.sleep(2 * END_S)

    handler: Any = hang_awaiting if kind == "async" else hang
    work.put(0)
    with Running(work.consumer(kind, handler, drain_s=0.2)):
        assert begun.wait(END_S)
    released.set()
    assert work.left() == [0]


@every_kind
def test_stopped_before_it_runs(kind: str, work: Work) -> None:
    work.put(0)
    consumer = work.consumer(kind, lambda _: None)
    consumer.stop()
    assert Running(consumer).joined() is None
    assert work.left() == [0]


@every_kind
def test_stopped_while_it_connects_to_a_silent_port(kind: str, by_line: Work, line: Proxy) -> None:
    line.silent = True
    with Running(by_line.consumer(kind, lambda _: None, drain_s=0.2)):
        until(lambda: line.accepted >= 2, "the consumer and its publisher")


# ── Consumers: follow-ups ───────────────────────────────────────────────────────────


@every_kind
def test_an_unconfirmed_follow_up_holds_up_no_other(
    kind: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, seen = list[Any](), list[int]()
    work.put(*range(60))

    class Unconfirming:
        def __init__(self, *_: object) -> None: ...

        def publish(self, message: Any, timeout_s: float) -> None:
            published.append(message)

        def close(self, timeout_s: float) -> None: ...

    monkeypatch.setattr(mq, "WindowedProducer", Unconfirming)

    def handler(delivery: Any) -> None:
        seen.append(number(delivery))
        if seen[-1] == 3:
            raise mq.PoisonMessage("three")

    with Running(work.consumer(kind, handler, prefetch=8, drain_s=0.3)):
        until(lambda: len(seen) >= 60, "all of them, past the prefetch")
    assert sorted(seen) == list(range(60))
    assert ([number(one) for one in published], work.left()) == ([3], [3])


def test_no_follow_up_for_what_came_by_a_lost_line(work: Work, by_line: Work, line: Proxy) -> None:
    deliveries: list[Any] = []
    released, ended = threading.Event(), threading.Event()

    def handler(delivery: Any) -> None:
        deliveries.append(delivery)
        if len(deliveries) == 1:
            released.wait(END_S)
            ended.set()
            raise mq.PoisonMessage("too late")

    with Running(by_line.consumer("pool", handler)):
        work.put(0)
        until(lambda: deliveries, "a delivery")
        line.cut()
        until(lambda: len(deliveries) == 2, "the second delivery")
        released.set()
        assert ended.wait(END_S)
        work.put(1)
        until(lambda: len(deliveries) == 3, "the next message")
    assert [delivery.redelivered for delivery in deliveries] == [False, True, False]
    assert work.left() + work.left("dead_letter_queue") == []


def test_a_cancelled_handler_is_a_failure_like_others(work: Work) -> None:
    begun: list[int] = []

    async def handler(delivery: Any) -> None:
        begun.append(number(delivery))
        if begun[-1] == 0:
            raise asyncio.CancelledError

    with Running(work.consumer("async", handler, prefetch=2)):
        work.put(*range(5))
        until(lambda: work.ready("dead_letter_queue") == 1, "the dead letter")
        until(lambda: len(begun) == 5, "the others")
    assert work.left() == []


@every_kind
def test_what_is_no_exception_leaves_no_dead_consumer(kind: str, work: Work) -> None:
    """It ends run(), or it is a failure like others."""
    seen: list[int] = []

    def handler(delivery: Any) -> None:
        seen.append(number(delivery))
        if seen[-1] == 0:
            raise SystemExit("of the test")

    def run() -> None:
        started = Running(work.consumer(kind, handler, prefetch=1, **options))
        try:
            until(lambda: started.error or len(seen) == 3, "the end of run(), or the others")
        finally:
            started.consumer.stop()
            started.joined()

    options = {"workers": 1} if kind == "pool" else {}
    work.put(0, 1, 2)
    run()
    gc.collect()  # asyncio logs a task's SystemExit when the task goes: here, not in another test


@pytest.mark.slow
@every_kind
def test_without_a_dead_letter_exchange_nothing_loops_busily(
    kind: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each wait at its bound."""
    tried_s, waits_s, jittered_s = list[float](), list[float](), mq.RetryPolicy.jittered_s

    def waiting_s(policy: Any, failures: int) -> float:
        waits_s.append(jittered_s(policy, failures))
        return waits_s[-1]

    def handler(_: object) -> None:
        tried_s.append(time.monotonic())
        raise mq.PoisonMessage("of the test")

    with closing(work.broker.connect()) as connection:
        connection.channel().exchange_delete(work.contract.dead_letter_exchange)
    work.put(0)
    monkeypatch.setattr(mq.random, "uniform", lambda _, bound: bound)
    monkeypatch.setattr(mq.RetryPolicy, "jittered_s", waiting_s)
    with Running(work.consumer(kind, handler)):
        until(lambda: len(tried_s) == 4, "the fourth attempt")
        with closing(work.broker.connect()) as connection:
            work.topology.declare(connection.channel())
        until(lambda: work.ready("dead_letter_queue") == 1, "the dead letter")
    assert waits_s[:3] == [0.2, 0.4, 0.8]
    gaps_s = [after - before for before, after in itertools.pairwise(tried_s)]
    assert all(gap_s >= wait_s for gap_s, wait_s in zip(gaps_s, waits_s, strict=False))


# ── A slow handler; a broker that is killed, stopped or frozen ──────────────────────


@pytest.mark.slow
def test_eight_seconds_of_work_at_a_heartbeat_of_two(work: Work) -> None:
    """pika #418, #1104: a handler costs no connection, on threads or on asyncio."""
    begun, done = list[int](), list[int]()

    def sleeps(delivery: Any) -> None:
        begun.append(number(delivery))
        time.sleep(8.0)
        done.append(number(delivery))

    async def awaits(delivery: Any) -> None:
        begun.append(number(delivery))
        await asyncio.sleep(8.0)
        done.append(number(delivery))

    impatient = work._replace(broker=mq.RabbitMQ(f"{work.broker.url}?heartbeat=2"))
    pool = impatient.consumer("pool", sleeps, prefetch=1)
    with Running(pool), Running(impatient.consumer("async", awaits, prefetch=1)):
        work.put(0, 1)
        until(lambda: len(done) == 2, "both")
    assert (sorted(begun), sorted(done)) == ([0, 1], [0, 1])
    assert work.left() == []


@pytest.fixture(scope="module")
def own_server() -> Iterator[servers.Server]:
    try:
        with servers.running("rabbitmq") as started:
            yield started["rabbitmq"]
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


@pytest.fixture
def own(own_server: servers.Server) -> Iterator[servers.Server]:
    """A broker that may be killed, and runs."""
    own_server.start()
    yield own_server
    own_server.resume()
    own_server.start()


@pytest.fixture
def three(own: servers.Server, rabbitmq_prefix: str) -> Iterator[Three]:
    """This file's broker, and a contract for each kind of consumer."""
    broker = mq.RabbitMQ(f"{own.url}?heartbeat=2")
    bindings = [(kind, "", "") for kind in KINDS]
    topology = mq.Topology(bindings, prefix=rabbitmq_prefix, retry=RETRY)
    with mq.declared(broker, rabbitmq_prefix, bindings, retry=RETRY):
        time.sleep(mq.REGISTERED_S)  # RabbitMQ 3.10 forgets younger queues when it is killed
        yield broker, {kind: topology.contract(kind) for kind in KINDS}


def working(seen: set[int], failed: set[int]) -> Callable[[Any], None]:
    """One message in fifty is poison, one in ten fails at first."""

    def handler(delivery: Any) -> None:
        n = number(delivery)
        if n % 50 == 49:
            raise mq.PoisonMessage("of the test")
        if n % 10 == 3 and n not in failed:
            failed.add(n)
            raise mq.Transient("of the test")
        seen.add(n)

    return handler


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_what_is_confirmed_is_handled_or_dead_though_the_broker_ends_under_load(
    end: str, own: servers.Server, three: Three
) -> None:
    broker, contracts = three
    seen: dict[str, set[int]] = {kind: set() for kind in KINDS}
    runs = [Running(Work(broker, contracts[k]).consumer(k, working(seen[k], set()))) for k in KINDS]
    outcomes: Counter[str] = Counter()
    producer = mq.WindowedProducer(
        broker, lambda _, error: outcomes.update([str(error or "")]), 200
    )
    restart = threading.Thread(target=lambda: (getattr(own, end)(), own.start()))
    for n in range(1_500):
        for kind in KINDS:
            producer.publish(outgoing(contracts[kind].queue, n), END_S)
        if n == 700:
            restart.start()
    restart.join(END_S)
    producer.close()
    assert outcomes == {"": 4_500}  # all are confirmed, none is outstanding
    poison = set(range(49, 1_500, 50))

    def dead(kind: str) -> set[int]:
        with closing(broker.connect()) as connection:
            found = mq.DeadLetterQueue(connection, contracts[kind]).peek(5_000)
        return {number(delivery) for delivery, _ in found}

    for kind in KINDS:
        until(lambda k=kind: seen[k] == set(range(1_500)) - poison, "all good messages")
        until(lambda k=kind: dead(k) == poison, "all dead letters")
    for run in runs:
        run.consumer.stop()
    assert [run.joined() for run in runs] == [None] * 3


@pytest.mark.slow
def test_a_broker_that_freezes_is_noticed(
    own: servers.Server, three: Three, caplog: Caplog
) -> None:
    """Nobody closes a connection: only the heartbeats, of 2 s, stop."""
    caplog.set_level(logging.INFO)
    broker, contracts = three
    seen: Counter[str] = Counter()
    runs = [
        Running(Work(broker, contracts[k]).consumer(k, lambda _, k=k: seen.update([k])))
        for k in KINDS
    ]
    producer, outcomes = collecting(broker)
    for n, kind in enumerate(KINDS):
        producer.publish(outgoing(contracts[kind].queue, n))
    until(lambda: set(seen) == set(KINDS), "a message of each")
    names = ["producer without", *(f"consumer of {one.queue}" for one in contracts.values())]
    own.pause()
    try:
        for n, kind in enumerate(KINDS, start=3):
            producer.publish(outgoing(contracts[kind].queue, n))
        until(lambda: not [name for name in names if name not in caplog.text], "all to notice")
        assert list(outcomes) == [0, 1, 2]
    finally:
        own.resume()
    until(lambda: min(seen.values()) >= 2, "a message of each afterwards")
    producer.close()
    assert outcomes == dict.fromkeys(range(6), "")
    for run in runs:
        run.consumer.stop()
    assert [run.joined() for run in runs] == [None] * 3
