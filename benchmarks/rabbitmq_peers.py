"""The peers and the limits of bench_04_rabbitmq.py, each set up as its manual advises.

A function per way: to publish, it connects and makes the messages, and returns what is timed; to
consume, it hands each payload to a sink, and returns when that is full.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import aio_pika
import amqp  # type: ignore[import-untyped]
import celery  # type: ignore[import-untyped]
import dramatiq
import pika
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from harness import check
from pika import spec
from pika.frame import Body, Header, Method, ProtocolHeader, decode_frame

kombu: Any = importlib.import_module("kombu")  # its types are half there

WINDOW = 1_000  # unconfirmed messages of every way that has a window
REFILL, BARE_REFILL = 500, 100  # room in it at which py-amqp and bare frames are fastest
# The upper end of what RabbitMQ's documentation calls optimal for throughput (100 to 300).
PREFETCH = 300
ACK_EVERY = PREFETCH // 4  # as BatchConsumer does
TIMEOUT_S, POLL_S = 30.0, 0.01  # of whatever is waited for

Payloads = Sequence[bytes]

# ── The broker ──────────────────────────────────────────────────────────────────────


def about(number: int) -> dict[str, Any]:
    return {"delivery_mode": 2, "message_id": str(number)}


def properties(number: int) -> pika.BasicProperties:
    return pika.BasicProperties(**about(number))


def await_that(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {TIMEOUT_S:g} s: {what}")
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Bench:
    """A broker, a prefix for queues in it, an event loop, and a channel of the bench's own."""

    url: str
    broker: Any
    server: str
    stack: ExitStack
    runner: asyncio.Runner
    channel: Any
    prefix: str

    def queue(self, name: str) -> str:
        """A new queue, gone at the end."""
        name = f"{self.prefix}{name}"
        self.channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
        self.stack.callback(self.channel.exchange_delete, name)  # celery makes one for its queue
        self.stack.callback(self.channel.queue_delete, name)
        return name

    def empty(self, queue: str) -> int:
        """Once nobody consumes from it; returns how many messages there were."""
        await_that(lambda: self.counts(queue).consumer_count == 0, f"consumers of {queue} gone")
        return int(self.channel.queue_purge(queue).method.message_count)

    def counts(self, queue: str) -> Any:
        """With `message_count`, of those that are ready, and `consumer_count`."""
        return self.channel.queue_declare(queue, passive=True).method

    def drained(self, queue: str, count: int) -> list[bytes]:
        """The bodies; TimeoutError where there are not `count` of them."""
        await_that(lambda: self.counts(queue).message_count == count, f"{count} in {queue}")
        sink = Sink(count)
        by_select_connection(self, queue, sink)
        return sink.bodies


class BareChannel:
    """A socket, AMQP's handshake, and from then on nothing but bytes."""

    CONFIRM = struct.Struct(">BHIHHQBB")  # the frame of a Basic.Ack

    def __init__(self, to: Any) -> None:
        login = f"\0{to.credentials.username}\0{to.credentials.password}"
        self._socket = socket.create_connection((to.host, to.port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received, self._last_tag = b"", 0
        opening = spec.Connection
        self._ask(ProtocolHeader(), opening.Start)
        self._ask(Method(0, opening.StartOk({}, "PLAIN", login, "en_US")), opening.Tune)
        self._socket.sendall(Method(0, opening.TuneOk(2047, 131_072, 0)).marshal())
        self._ask(Method(0, opening.Open(to.virtual_host)), opening.OpenOk)
        self._ask(Method(1, spec.Channel.Open()), spec.Channel.OpenOk)
        self._ask(Method(1, spec.Confirm.Select()), spec.Confirm.SelectOk)

    def _ask(self, frame: Any, answer: Any) -> None:
        self._socket.sendall(frame.marshal())
        used, answered = 0, None
        while not answered:
            self._received += self._socket.recv(65_536)
            used, answered = decode_frame(self._received)
        check("the broker", type(answered.method), answer)
        self._received = self._received[used:]

    def close(self) -> None:
        self._ask(Method(0, spec.Connection.Close(200, "", 0, 0)), spec.Connection.CloseOk)
        self._socket.close()

    @staticmethod
    def encoded(queue: str, bodies: Payloads) -> list[bytes]:
        publish = Method(1, spec.Basic.Publish(routing_key=queue, mandatory=True)).marshal()
        return [
            publish + Header(1, len(body), properties(i)).marshal() + Body(1, body).marshal()
            for i, body in enumerate(bodies)
        ]

    def publish(self, messages: Sequence[bytes]) -> int:
        """Returns how many were confirmed, which is all of them; raises for any other answer."""
        sent, confirmed, up_to, singly = 0, 0, 0, set[int]()
        while confirmed < len(messages):
            room = WINDOW - (sent - confirmed)
            if room >= BARE_REFILL and sent < len(messages):
                self._socket.sendall(b"".join(messages[sent : sent + room]))
                sent = min(sent + room, len(messages))
            self._received += self._socket.recv(65_536)
            whole = len(self._received) // self.CONFIRM.size * self.CONFIRM.size
            for *frame, tag, multiple, _end in self.CONFIRM.iter_unpack(self._received[:whole]):
                check("a confirm", frame, [1, 1, 13, 60, 80])
                singly.add(tag - self._last_tag)
                if multiple:
                    up_to = tag - self._last_tag
                    singly = {later for later in singly if later > up_to}
            self._received = self._received[whole:]
            confirmed = up_to + len(singly)
        self._last_tag += sent
        return confirmed


# ── Publish ─────────────────────────────────────────────────────────────────────────

Publish = Callable[[], int]  # returns how many messages it saw confirmed; raises for a nack


def each(send: Callable[[Any], object], messages: Sequence[Any], confirmed: int) -> int:
    """`send` raises where it asks for a confirm and gets none."""
    for message in messages:
        send(message)
    return confirmed


def by_pika(bench: Bench, queue: str, bodies: Payloads) -> Publish:
    channel = bench.stack.enter_context(closing(bench.broker.connect())).channel()
    channel.confirm_delivery()
    messages = [(body, properties(number)) for number, body in enumerate(bodies)]
    send = partial(channel.basic_publish, "", queue, mandatory=True)
    return partial(each, lambda message: send(*message), messages, len(messages))


class Unblocked(amqp.Connection):  # type: ignore[misc]
    negotiate_capabilities = {**amqp.Connection.negotiate_capabilities, "connection.blocked": False}


def by_py_amqp(kind: Any, bench: Bench, queue: str, bodies: Payloads) -> Publish:
    to = bench.broker.parameters()
    login = to.credentials.username, to.credentials.password
    options = {"virtual_host": to.virtual_host, "read_timeout": TIMEOUT_S}
    connection = bench.stack.enter_context(kind(f"{to.host}:{to.port}", *login, **options))
    channel = connection.channel()
    channel.confirm_select()
    messages = [amqp.Message(body, **about(number)) for number, body in enumerate(bodies)]
    tags, unconfirmed, oldest = itertools.count(1), set[int](), 1

    def on_ack(tag: int, multiple: bool) -> None:
        nonlocal oldest
        if multiple:
            unconfirmed.difference_update(range(oldest, tag + 1))
            oldest = tag + 1
        else:
            unconfirmed.discard(tag)

    channel.events["basic_ack"].add(on_ack)

    def publish() -> int:
        for message in messages:
            unconfirmed.add(next(tags))
            channel.basic_publish(message, "", queue, mandatory=True)
            if len(unconfirmed) >= WINDOW:
                while len(unconfirmed) > WINDOW - REFILL:
                    connection.drain_events()
        while unconfirmed:
            connection.drain_events()
        return len(messages)

    return publish


def by_bare_frames(bench: Bench, queue: str, bodies: Payloads) -> Publish:
    channel = bench.stack.enter_context(closing(BareChannel(bench.broker.parameters())))
    return partial(channel.publish, channel.encoded(queue, bodies))


def by_aio_pika(bench: Bench, queue: str, bodies: Payloads) -> Publish:
    messages = [aio_pika.Message(body, **about(number)) for number, body in enumerate(bodies)]

    async def connect() -> Any:
        connection = await aio_pika.connect_robust(bench.url)
        bench.stack.callback(lambda: bench.runner.run(connection.close()))
        return (await connection.channel()).default_exchange

    exchange = bench.runner.run(connect())

    async def publish() -> int:
        confirms = list[object]()
        for start in range(0, len(messages), WINDOW):
            window = messages[start : start + WINDOW]
            confirms += await asyncio.gather(*(exchange.publish(m, queue) for m in window))
        return sum(type(confirm).__name__ == "Ack" for confirm in confirms)

    return lambda: bench.runner.run(publish())


def dramatiq_broker(bench: Bench, queue: str) -> RabbitmqBroker:
    broker = bench.stack.enter_context(closing(RabbitmqBroker(url=bench.url)))
    broker.declare_queue(queue)
    broker.queues_pending.clear()  # else it declares a classic one
    return broker


def tasks(queue: str, bodies: Payloads) -> list[dramatiq.Message[None]]:
    return [dramatiq.Message(queue, "take", (body.decode(),), {}, {}) for body in bodies]


def by_dramatiq(bench: Bench, queue: str, bodies: Payloads) -> Publish:
    return partial(each, dramatiq_broker(bench, queue).enqueue, tasks(queue, bodies), 0)


def by_celery(bench: Bench, queue: str, bodies: Payloads) -> Publish:
    app = celery.Celery("bench", broker=bench.url, set_as_current=False)
    app.conf.task_create_missing_queue_type = "quorum"
    bench.stack.callback(app.close)
    arguments = [[body.decode()] for body in bodies]
    return partial(each, partial(app.send_task, "take", queue=queue), arguments, 0)


# ── Consume ─────────────────────────────────────────────────────────────────────────


class Sink:
    """Keeps what a handler was given, and when it got the first and the last."""

    def __init__(self, count: int) -> None:
        self.count, self.bodies = count, list[bytes]()
        self.started_s = self.ended_s = 0.0
        self.done = threading.Event()

    def take(self, body: bytes) -> None:
        self.started_s = self.started_s or time.perf_counter()
        self.bodies.append(body)
        if len(self.bodies) == self.count:
            self.ended_s = time.perf_counter()
            self.done.set()


def by_kombu(as_manual: bool, bench: Bench, queue: str, sink: Sink) -> None:
    def on_message(message: Any) -> None:
        sink.take(message.body)
        message.ack()

    callbacks = [lambda _decoded, message: on_message(message)]
    how: dict[str, Any] = {"callbacks": callbacks} if as_manual else {"on_message": on_message}
    source = kombu.Queue(queue, no_declare=True)
    with (
        kombu.Connection(bench.url) as connection,
        connection.Consumer(source, prefetch_count=PREFETCH, **how),
    ):
        while not sink.done.is_set():
            connection.drain_events(timeout=1 if as_manual else None)


def by_select_connection(bench: Bench, queue: str, sink: Sink) -> None:
    def on_message(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        sink.take(body)
        if method.delivery_tag % ACK_EVERY == 0:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if sink.done.is_set():
            connection.close()

    def on_channel(channel: Any) -> None:
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(queue, on_message)

    connection: Any = pika.SelectConnection(
        bench.broker.parameters(),
        lambda _: connection.channel(on_open_callback=on_channel),
        on_close_callback=lambda *_: connection.ioloop.stop(),
    )
    connection.ioloop.start()
    connection.ioloop.close()


def by_aio_pika_iterator(bench: Bench, queue: str, sink: Sink) -> None:
    async def consume() -> None:
        async with await aio_pika.connect_robust(bench.url) as connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=PREFETCH)
            async with (await channel.get_queue(queue)).iterator() as messages:
                async for message in messages:
                    async with message.process():
                        sink.take(message.body)
                    if sink.done.is_set():
                        return

    bench.runner.run(consume())


def by_dramatiq_worker(bench: Bench, queue: str, sink: Sink) -> None:
    broker = dramatiq_broker(bench, queue)

    def take(payload: str) -> None:
        sink.take(payload.encode())

    dramatiq.actor(actor_name="take", queue_name=queue, broker=broker)(take)
    worker = dramatiq.Worker(broker, worker_timeout=100)  # ms: how soon it sees that it shall stop
    worker.start()
    sink.done.wait(TIMEOUT_S)
    worker.stop()
