"""Benchmark of 04_rabbitmq_messaging.py on RabbitMQ: its producer and consumers against peers.

Run:
  python servers.py run --only rabbitmq -- python benchmarks/bench_04_rabbitmq.py

All queues are quorum queues. Every payload is checked in every round: what was published is read
back by a bare SelectConnection, what was consumed is compared with what was published.
- publish: persistent messages, made beforehand, to an empty queue, until the last is confirmed; or,
  where a way asks for no confirms, as dramatiq and celery by default, until the last call returns.
  py-amqp by default looks for a blocked connection before each message; it is fastest without that
  capability, which one may refuse. Bare frames are encoded beforehand, and sent many at once.
- consume: messages that are ready beforehand, from the first call of a handler to the last, so that
  nobody's start counts. The handler keeps the payload. kombu acks each message, and sets a timeout
  for each event, as its manual does; it is fastest without timeouts and decoding. The bare
  SelectConnection acks as many at once as BatchConsumer. dramatiq's worker has its 8 threads, and
  prefetches two for each. celery's would leave 28 queues behind, as it does for quorum queues.
- kills: of a broker of its own, each when all three consumers have worked since the last. One
  message in a hundred is poison, one in twenty fails at first. Lost is what was confirmed, and
  neither handled nor dead-lettered.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

import amqp  # type: ignore[import-untyped]
import harness
import pika
import rabbitmq_peers as peers
from harness import CountLine, Line, Side, Tally, check, counted, faster, measure
from rabbitmq_peers import (
    PREFETCH,
    TIMEOUT_S,
    WINDOW,
    Bench,
    Payloads,
    Publish,
    Sink,
    await_that,
)

import config
import servers

script = importlib.import_module("04_rabbitmq_messaging")

PAYLOAD = re.compile(rb"\d{8}\.{192}")  # finds it in an envelope, too
MESSAGES = 10_000  # a round, of the fast ways: a third of a second
ROUNDS = 7
KILLS = 10
AT_WORK = 1_000  # messages that each consumer handles before each kill, at least
BACKLOG = 5_000  # messages published and not handled, at most
POISON, FAILING = 100, 20  # one message in so many
RETRY = script.RetryPolicy(first_s=0.2, attempts=2)
QUIET_S = 2.0  # without a dead letter: there are no more
# A quorum queue that RabbitMQ 3.10 declared 0.6 s before a SIGKILL comes back without a leader, and
# hangs whoever uses it; after a second it comes back whole.
SETTLE_S = 2.0


def payloads(count: int) -> list[bytes]:
    return [f"{number:08}".encode() + b"." * 192 for number in range(count)]


@contextmanager
def open_bench(url: str, timeout_s: float) -> Iterator[Bench]:
    """Raises ServiceUnavailable where nothing answers, ConfigError where it refuses."""
    broker, server = script.open_rabbitmq(url, timeout_s)
    parameters = broker.parameters()
    if parameters.ssl_options:
        raise config.ConfigError("RABBITMQ_URL: the bare frames of this benchmark speak no TLS")
    parameters.heartbeat = 0  # nobody attends to this connection while others are measured
    prefix = f"bench04-{secrets.token_hex(4)}-"
    with (
        closing(pika.BlockingConnection(parameters)) as connection,
        asyncio.Runner() as runner,
        ExitStack() as stack,
    ):
        yield Bench(url, broker, server, stack, runner, connection.channel(), prefix)


# ── Publish ─────────────────────────────────────────────────────────────────────────


def by_window(bench: Bench, queue: str, bodies: Payloads) -> Publish:
    settled = list[Exception | None]()

    def on_settled(_message: object, failure: Exception | None) -> None:
        settled.append(failure)

    producer = script.WindowedProducer(bench.broker, on_settled, window=WINDOW)
    bench.stack.callback(producer.close)
    messages = [script.Outgoing(queue, body, peers.properties(i)) for i, body in enumerate(bodies)]

    def publish() -> int:
        settled.clear()
        for message in messages:
            producer.publish(message)
        producer.flush(TIMEOUT_S)
        return settled.count(None)

    return publish


PUBLISHERS: dict[str, tuple[Callable[[Bench, str, Payloads], Publish], int, float | None]] = {
    "WindowedProducer": (by_window, MESSAGES, None),  # messages a round, goal
    "pika, a confirm a message": (peers.by_pika, 500, 15),
    "py-amqp at its fastest": (partial(peers.by_py_amqp, peers.Unblocked), MESSAGES, 0.9),
    "bare frames": (peers.by_bare_frames, MESSAGES, 0.5),
    "py-amqp by default": (partial(peers.by_py_amqp, amqp.Connection), MESSAGES, None),
    "aio-pika, confirms gathered": (peers.by_aio_pika, 2_000, None),
    "dramatiq, no confirms": (peers.by_dramatiq, 2_000, None),
    "celery, no confirms": (peers.by_celery, 500, None),
}


def publishing(bench: Bench) -> Iterator[Line]:
    queue, expected = bench.queue("publish"), payloads(MESSAGES)
    counts = {name: count for name, (_, count, _) in PUBLISHERS.items()}

    def verify(name: str, confirmed: int) -> None:
        check(name, confirmed, 0 if "no confirms" in name else counts[name])
        found = [PAYLOAD.findall(body) for body in bench.drained(queue, counts[name])]
        check(name, found, [[payload] for payload in expected[: counts[name]]])

    ways = {n: make(bench, queue, expected[:count]) for n, (make, count, _) in PUBLISHERS.items()}
    seconds = measure(ways, before=partial(bench.empty, queue), after=verify, rounds=ROUNDS)
    ours, *others = (Side(n, s, counts[n], "msgs") for n, s in seconds.items())
    for other in others:
        yield faster(f"publish, window {WINDOW:,}", ours, other, PUBLISHERS[other.name][2])


# ── Consume ─────────────────────────────────────────────────────────────────────────


def by_script(kind: Any, bench: Bench, queue: str, sink: Sink) -> None:
    async def take(delivery: Any) -> None:
        sink.take(delivery.body)

    handler = take if kind is script.AsyncConsumer else lambda d: sink.take(d.body)
    contract = script.Contract(queue, (), dead_letter_exchange="", dead_letter_queue="")
    consumer = kind(bench.broker, contract, handler, prefetch=PREFETCH)
    thread = threading.Thread(target=consumer.run, daemon=True)
    thread.start()
    sink.done.wait(TIMEOUT_S)
    consumer.stop()
    thread.join(TIMEOUT_S)


CONSUMERS: dict[str, tuple[Callable[[Bench, str, Sink], None], int, float | None]] = {
    "BatchConsumer": (partial(by_script, script.BatchConsumer), MESSAGES, None),
    "kombu": (partial(peers.by_kombu, True), 5_000, 3.5),
    "bare SelectConnection": (peers.by_select_connection, MESSAGES, 0.85),
    "kombu at its fastest": (partial(peers.by_kombu, False), 5_000, None),
    "WorkerPoolConsumer": (partial(by_script, script.WorkerPoolConsumer), 5_000, None),
    "AsyncConsumer": (partial(by_script, script.AsyncConsumer), 5_000, None),
    "aio-pika": (peers.by_aio_pika_iterator, 5_000, None),
    "dramatiq": (peers.by_dramatiq_worker, 1_000, None),
}


def consuming(bench: Bench) -> Iterator[Line]:
    queue, expected = bench.queue("consume"), payloads(MESSAGES)
    bench.queue("consume.DQ")  # dramatiq's worker wants it
    channel = bench.stack.enter_context(closing(peers.BareChannel(bench.broker.parameters())))
    encoded = channel.encoded(queue, expected)
    encoded_tasks = channel.encoded(queue, [task.encode() for task in peers.tasks(queue, expected)])
    walls: dict[str, harness.Samples] = {name: [] for name in CONSUMERS}

    def consume(name: str) -> Sink:
        way, count, _ = CONSUMERS[name]
        channel.publish((encoded_tasks if name == "dramatiq" else encoded)[:count])
        sink = Sink(count)
        way(bench, queue, sink)
        return sink

    def verify(name: str, sink: Sink) -> None:
        check(name, sorted(sink.bodies), expected[: sink.count])
        left = bench.empty(queue)
        check(f"{name} left {left} of the last messages", left <= PREFETCH, True)
        walls[name].append(sink.ended_s - sink.started_s)

    measure({name: partial(consume, name) for name in CONSUMERS}, after=verify, rounds=ROUNDS)
    counted_s = {name: samples[harness.WARM_UPS :] for name, samples in walls.items()}
    ours, *others = (Side(n, s, CONSUMERS[n][1], "msgs") for n, s in counted_s.items())
    for other in others:
        yield faster(f"consume, prefetch {PREFETCH:,}", ours, other, CONSUMERS[other.name][2])


# ── Kills ───────────────────────────────────────────────────────────────────────────


class Load:
    """A producer and the three consumers; numbers tell what became of each message."""

    def __init__(self, broker: Any) -> None:
        kinds = script.WorkerPoolConsumer, script.BatchConsumer, script.AsyncConsumer
        self._broker, self._failed = broker, set[int]()
        self.published, self.confirmed = 0, list[int]()
        self.handled: dict[Any, list[int]] = {kind: [] for kind in kinds}
        topology = script.Topology([("work", "", "")], retry=RETRY)
        with closing(broker.connect()) as connection:
            topology.declare(connection.channel())
        self._contract = topology.contract("work")
        self._producer = script.WindowedProducer(broker, self._on_settled, window=WINDOW)
        self._consumers = [
            kind(broker, self._contract, self._handler(kind), prefetch=PREFETCH) for kind in kinds
        ]
        self.restarts = 0
        for consumer in self._consumers:
            threading.Thread(target=self._supervise, args=[consumer], daemon=True).start()

    def _supervise(self, consumer: Any) -> None:
        """A consumer gives up where sessions keep failing, and the kills come faster than that it
        forgets the earlier ones; in service, too, something starts it again."""
        while True:
            try:
                consumer.run()
                return
            except ConnectionError:
                self.restarts += 1

    def _on_settled(self, message: Any, failure: Exception | None) -> None:
        if failure is None:
            self.confirmed.append(int(message.properties.message_id))

    def _handler(self, kind: Any) -> Callable[[Any], Any]:
        def handle(delivery: Any) -> None:
            number = int(delivery.properties.message_id)
            if number % POISON == 0:
                raise script.PoisonMessage("never")
            if number % FAILING == 1 and number not in self._failed:
                self._failed.add(number)
                raise script.Transient("at first")
            self.handled[kind].append(number)

        async def handle_async(delivery: Any) -> None:
            handle(delivery)

        return handle_async if kind is script.AsyncConsumer else handle

    def work(self) -> None:
        """Publishes until each consumer has handled AT_WORK messages more."""
        marks = [(numbers, len(numbers) + AT_WORK) for numbers in self.handled.values()]

        def done() -> bool:
            return all(len(numbers) >= mark for numbers, mark in marks)

        def has_room() -> bool:
            return self.published - sum(map(len, self.handled.values())) < BACKLOG or done()

        while not done():
            properties = peers.properties(self.published)
            self._producer.publish(
                script.Outgoing(self._contract.queue, b"." * 200, properties), TIMEOUT_S
            )
            self.published += 1
            await_that(has_room, "work of all three consumers")

    def end(self) -> harness.Counts:
        """What became of all, once nothing moves any more."""
        self._producer.close(TIMEOUT_S)
        confirmed = set(self.confirmed)
        with suppress(TimeoutError):  # then they are lost, and counted
            await_that(lambda: not self._missing(confirmed), "the rest")
        with closing(self._broker.connect()) as connection:
            got = connection.channel().consume(
                self._contract.dead_letter_queue, auto_ack=True, inactivity_timeout=QUIET_S
            )
            dead = [int(p.message_id) for _, p, _ in itertools.takewhile(lambda g: g[1], got)]
        for consumer in self._consumers:
            consumer.stop()
        handled = list(itertools.chain(*self.handled.values()))
        return {
            "lost": len(confirmed.difference(handled, dead)),
            "handled again": len(handled) - len(set(handled)),
            "dead-lettered": len(set(dead)),
            "restarted": self.restarts,
        }

    def _missing(self, confirmed: set[int]) -> set[int]:
        return {n for n in confirmed.difference(*self.handled.values()) if n % POISON}


def kills() -> CountLine:
    logging.disable(logging.CRITICAL)  # pika and the script tell, rightly, of each lost connection
    try:
        with servers.running("rabbitmq") as started:
            server = started["rabbitmq"]
            load = Load(script.RabbitMQ(server.url))
            time.sleep(SETTLE_S)
            for _ in range(KILLS):
                load.work()
                server.kill()
                server.start()
            load.work()
            ours = Tally("three consumers", [load.end()])
    except servers.ServerUnavailable as missing:
        raise config.ServiceUnavailable("RabbitMQ to kill", missing.reason) from missing
    published = Tally("WindowedProducer", [{"confirmed": len(set(load.confirmed))}])
    return counted(f"{KILLS} kills under load", ours, published, exactly={"lost": 0})


# ── Main ────────────────────────────────────────────────────────────────────────────


def measures(settings: config.Settings) -> tuple[dict[str, str], list[Line | CountLine]]:
    """All lines; the queues are removed at the end, also after an error."""
    assert settings.rabbitmq_url
    with open_bench(settings.rabbitmq_url, settings.connect_timeout_s) as bench:
        lines: list[Line | CountLine] = [*publishing(bench), *consuming(bench)]
    lines.append(kills())
    ways = {**PUBLISHERS, **CONSUMERS}
    fewer = {name: count for name, (_, count, _) in ways.items() if count < MESSAGES}
    facts = {
        "server": bench.server,
        "messages": f"200 bytes, persistent; {MESSAGES:,} a round",
        "fewer, compared by each": "; ".join(f"{name}: {n:,}" for name, n in fewer.items()),
        "kills": f"{AT_WORK:,} messages or more by each consumer between two; prefetch {PREFETCH}, "
        f"window {WINDOW:,}: what a crash repeats",
    }
    return facts, lines


def main() -> int:
    packages = "pika amqp kombu aio-pika dramatiq celery".split()
    return harness.run_bench(__doc__ or "", ("RABBITMQ_URL",), packages, measures)


if __name__ == "__main__":
    raise SystemExit(main())
