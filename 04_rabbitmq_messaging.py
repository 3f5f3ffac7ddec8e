"""Messages through RabbitMQ: what is confirmed is in a queue, what is acked was handled.

You will learn to
  - publish fast, and know what arrived; choose among three consumers that keep one contract
  - retry with back-off in queues, and give up well: dead letters, replayed
  - have effects once over deliveries at least once, and publish what a transaction changed
  - lose nothing when a consumer or the broker is killed, and count to prove it

Run:
  python 04_rabbitmq_messaging.py                        # five of nine demos, a broker in memory
  python servers.py run -- python 04_rabbitmq_messaging.py
  RABBITMQ_URL='amqps://user:password@mq.example.com/%2F' python 04_rabbitmq_messaging.py

Without RabbitMQ the same topology, handlers and retries run over a broker in memory; without
MongoDB the pipeline stores in SQLite.

Glossary:
  confirm            the broker's word that it has a message; of a quorum queue: on disk
  prefetch           how many deliveries a consumer may hold unacked
  follow-up          a failed message, published to a delay queue or as a dead letter

Guide: docs/04-rabbitmq.md
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import logging
import multiprocessing
import queue
import random
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import parse_qs, urlsplit

import pika
from pika import exceptions as amqp
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils import connection_workflow
from pymongo import MongoClient
from pymongo.errors import ConnectionFailure, DuplicateKeyError, PyMongoError
from pymongo.uri_parser import parse_uri

import config
from config import conclude, fact, note, table

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1  # of a message's body
MAX_BODY_BYTES = 1_100_000
ATTEMPT_HEADER = "x-attempt"  # our own: RabbitMQ 4 does not count in x-death what is republished
REASON_HEADER = "x-reason"
NOT_FORWARDED = (REASON_HEADER, "x-death", "CC", "BCC")  # x-death: RabbitMQ 3 drops "cycles"
REASON_LIMIT = 500  # characters: all headers of a message share one frame
QUORUM = {"x-queue-type": "quorum"}
DELIVERY_LIMIT = 20  # deliveries without an ack; RabbitMQ 4's own default
UNLIMITED = 1_000_000  # of dead letters: each look at one counts as a delivery
HELD_LIMIT = 10_000  # dead letters that one call looks at
NOTHING = (None, None, None)  # pika's answer for an empty queue
CONNECTION_FORCED = 320  # reply code of a broker that shuts down
POLL_S = 0.1  # how soon stop() is seen, and the longest that a batch waits for its ack
STABLE_S = 10.0  # a session that lasted this long was a success
CONNECTION = {  # options of the URL that it does not set itself
    "heartbeat": 20,  # s; a peer that froze is noticed within 50
    "socket_timeout": 5.0,
    "stack_timeout": 5.0,  # TCP, TLS and AMQP together
    "blocked_connection_timeout": 30.0,
}
# AMQPConnectorException is no AMQPError.
LOST = (amqp.AMQPError, connection_workflow.AMQPConnectorException, OSError)
MONGO_TIMEOUT_MS = 10_000  # an operation, retries included
NOTED = 100  # messages a user, in MongoDB
WAIT_S = 60.0  # the longest that a demo waits
COMPARED, PREFETCHES = 1_000, (1, 10, 100, 1_000)  # messages of demo 3
HANDLER_S = 0.001  # that handlers of demos 3 and 9 wait
REQUEUEING_S = 0.5  # how long demo 4 requeues
USERS = 10_000  # of demo 7
CHANGES, RELAYED_ALIVE = 40, 15  # of demo 8, whose relay dies with the next message
CRASH_USERS = 4_000  # of demo 9
REGISTERED_S = 2.0  # until a new queue is on disk


# ── 1. Message ──


class PoisonMessage(Exception):
    """No attempt will ever succeed; the text is the reason of the dead letter."""


@dataclass(frozen=True, slots=True)
class Message:
    """JSON on the wire. By `message_id`, consumers know a repetition."""

    type: str
    payload: dict[str, Any]
    message_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    correlation_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    traceparent: str = field(  # W3C Trace Context: version, trace, span, sampled
        default_factory=lambda: f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    )

    def encode(self) -> bytes:
        """Raises ValueError or TypeError for what JSON rules out."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["created_at"] = self.created_at.astimezone(UTC).isoformat()
        return json.dumps({"version": SCHEMA_VERSION, **fields}, allow_nan=False).encode()

    @classmethod
    def decode(cls, body: bytes) -> Message:
        """Raises PoisonMessage for a body that is none of ours."""
        if len(body) > MAX_BODY_BYTES:
            raise PoisonMessage(f"{len(body):,} bytes, and {MAX_BODY_BYTES:,} is the bound")
        try:
            fields = json.loads(body.decode("utf-8"), parse_constant=int)  # no NaN
            if fields.pop("version") != SCHEMA_VERSION or fields.keys() != set(cls.__slots__):
                raise ValueError("another version, or other fields")
            fields["created_at"] = datetime.fromisoformat(fields["created_at"])
            message = cls(**fields)
            texts = message.type, message.message_id, message.correlation_id, message.traceparent
            are_texts = {str} == {type(text) for text in texts}
            if not (are_texts and isinstance(message.payload, dict) and message.created_at.tzinfo):
                raise TypeError("a field of the wrong type, or a time without its zone")
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise PoisonMessage(f"not a message: {type(error).__name__}: {error}") from None
        return message


# ── 2. Topology ──


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off. Source: Brooker, Exponential Backoff and Jitter, AWS, 2015."""

    first_s: float = 1.0
    cap_s: float = 60.0
    attempts: int = 5  # in all, the first included

    def steps_s(self) -> list[float]:
        """The waits before attempts 2, 3, …; exact, as is the TTL of a delay queue."""
        return [min(self.cap_s, self.first_s * 2**step) for step in range(self.attempts - 1)]

    def jittered_s(self, failures: int) -> float:
        """Random, so that not all clients of an outage return together."""
        bound_s = min(self.cap_s, self.first_s * float(2 ** min(failures, 60)))
        return bound_s * random.uniform(0.1, 1.0)


RECONNECT = RetryPolicy(0.2, cap_s=5.0, attempts=15)  # fewer than DELIVERY_LIMIT; 30 s or so


class Contract(NamedTuple):
    """Where a work queue's messages go when their handler fails."""

    queue: str
    delay_queues: Sequence[str]  # one for each back-off step; after the last: give up
    dead_letter_exchange: str
    dead_letter_queue: str


@dataclass(frozen=True)
class Topology:
    """Exchanges, and work queues, each with its delay queues and its dead-letter queue: quorum
    queues, where a confirm means that a majority has the message on disk."""

    bindings: Sequence[tuple[str, str, str]]  # work queue, exchange (or "": none), binding key
    exchanges: Mapping[str, str] = field(default_factory=dict)  # name → direct, topic or fanout
    prefix: str = ""
    version: int = 1  # part of each name: other arguments, other queues
    retry: RetryPolicy = RetryPolicy()
    delivery_limit: int = DELIVERY_LIMIT

    def name(self, part: str) -> str:
        return f"{self.prefix}{part}.v{self.version}"

    def contract(self, work_queue: str) -> Contract:
        full = self.name(work_queue)
        delays = tuple(f"{full}.delay.{step_s * 1000:.0f}ms" for step_s in self.retry.steps_s())
        return Contract(full, delays, self.name("dead-letters"), f"{full}.dead")

    def queues(self) -> dict[str, dict[str, Any]]:
        """Full name → arguments of every queue."""
        arguments: dict[str, dict[str, Any]] = {}
        # The broker, too, waits for a confirm before it lets go; that needs both.
        safe = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        for work_queue, _, _ in self.bindings:
            work, delays, exchange, dead = self.contract(work_queue)
            to = {"x-dead-letter-routing-key": work, **safe}
            arguments[work] = {"x-delivery-limit": self.delivery_limit, **to}
            arguments[work]["x-dead-letter-exchange"] = exchange
            for delay, step_s in zip(delays, self.retry.steps_s(), strict=True):
                ttl = {"x-message-ttl": round(step_s * 1000)}
                arguments[delay] = {"x-dead-letter-exchange": "", **ttl, **to}
            arguments[dead] = {"x-delivery-limit": UNLIMITED}
        return {name: QUORUM | rest for name, rest in arguments.items()}

    def declare(self, channel: Any) -> None:
        """Makes what is not there yet. Raises ChannelClosedByBroker, 406, for what differs."""
        try:
            for exchange, kind in {**self.exchanges, "dead-letters": "direct"}.items():
                channel.exchange_declare(self.name(exchange), kind, durable=True)
            for name, arguments in self.queues().items():
                channel.queue_declare(name, durable=True, arguments=arguments)
            for work_queue, exchange, key in self.bindings:
                work, _, dead_letters, dead = self.contract(work_queue)
                channel.queue_bind(dead, dead_letters, work)
                if exchange:
                    channel.queue_bind(work, self.name(exchange), key)
        except amqp.ChannelClosedByBroker as error:
            if error.reply_code != pika.spec.PRECONDITION_FAILED:
                raise
            cure = "To change it, raise the topology's version, and drain the old queues."
            raise type(error)(error.reply_code, f"{error.reply_text}. {cure}") from error

    def delete(self, channel: Any) -> None:
        """With all messages."""
        for name in self.queues():
            channel.queue_delete(name)
        for exchange in (*self.exchanges, "dead-letters"):
            channel.exchange_delete(self.name(exchange))


# ── 3. Producer: a confirm a message ──


class Undelivered(Exception):
    """The broker did not take over this message."""


class Outgoing(NamedTuple):
    """A body and where it goes; `context` is never sent."""

    routing_key: str
    body: bytes
    properties: pika.BasicProperties
    exchange: str = ""  # the default one: the key names a queue
    context: Any = None

    @classmethod
    def of(cls, message: Message, routing_key: str, exchange: str = "") -> Outgoing:
        properties = pika.BasicProperties(
            message_id=message.message_id, correlation_id=message.correlation_id, type=message.type,
            headers={"traceparent": message.traceparent}, content_type="application/json",
            delivery_mode=2,
        )  # fmt: skip
        return cls(routing_key, message.encode(), properties, exchange)

    def __str__(self) -> str:
        return f"message {self.properties.message_id} to {self.exchange!r}/{self.routing_key}"

    def send(self, channel: Any) -> None:
        """`mandatory`: without it, a message to nowhere is confirmed like any other."""
        channel.basic_publish(self.exchange, self.routing_key, self.body, self.properties, True)


class Producer:
    """Publishes a message and returns when it is confirmed. For one thread."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._channel: Any = None

    def publish(self, message: Outgoing) -> None:
        """Raises Undelivered for this message, AMQPError for a lost connection."""
        if not (self._channel and self._channel.is_open):  # an error 404 closes the channel
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
        try:
            message.send(self._channel)
        except (amqp.UnroutableError, amqp.NackError, amqp.ChannelClosedByBroker) as error:
            raise Undelivered(f"{error!r}: {message}") from error


OnSettled = Callable[[Outgoing, Undelivered | None], object]


@dataclass(frozen=True)
class RabbitMQ:
    """Where a broker is, and how this module connects to it."""

    url: str

    def parameters(self) -> pika.URLParameters:
        """Raises ValueError, SyntaxError, TypeError or OSError for wrong options."""
        parameters, given = pika.URLParameters(self.url), parse_qs(urlsplit(self.url).query)
        for option in CONNECTION.keys() - given.keys():
            setattr(parameters, option, CONNECTION[option])
        return parameters

    def connect(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(self.parameters())


# ── 4. WindowedProducer: many unconfirmed at once ──


class WindowedProducer:
    """Publishes with up to `window` messages unconfirmed, by a connection in a thread of its own.

    On that thread each message ends in `on_settled(message, error)`; no error: it is confirmed.
    After a lost connection, what was unconfirmed is sent again, in order, perhaps twice."""

    def __init__(self, broker: RabbitMQ, on_settled: OnSettled, window: int = 1_000) -> None:
        self._parameters = broker.parameters()
        self._on_settled, self._window = on_settled, window
        self._lock = threading.RLock()  # a Condition's `with` may be interrupted
        self._room = threading.Condition(self._lock)  # guards the next three
        self._outstanding = 0  # published and not settled
        self._waiting: deque[Outgoing] = deque()
        self._is_woken = False
        self._closing = threading.Event()
        self._connection: Any = None  # from here on: of the thread alone
        self._channel: Any = None
        self._failures = 0  # to connect, in a row
        self._unconfirmed: dict[int, Outgoing] = {}  # by delivery tag, ascending
        self._returned: Counter[tuple[str | None, str, str]] = Counter()
        self._suspects = 0  # to be sent one by one: one of them closed the channel
        self._thread = threading.Thread(target=self._run, name="producer", daemon=True)
        self._thread.start()

    def publish(self, message: Outgoing, timeout_s: float = 30.0) -> None:
        """Blocks while the window is full; TimeoutError if it stays so."""
        with self._lock:
            self._wait(lambda: self._outstanding < self._window, timeout_s)
            if self._closing.is_set():
                raise RuntimeError("the producer is closed")
            self._outstanding += 1
            self._waiting.append(message)
            wake, self._is_woken = not self._is_woken, True
        if wake:
            self._in_loop(self._send)

    def flush(self, timeout_s: float = 30.0) -> None:
        """Returns when every message is settled; TimeoutError otherwise."""
        with self._lock:
            self._wait(lambda: not self._outstanding, timeout_s)

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        if not self._room.wait_for(condition, timeout_s):
            raise TimeoutError(f"{self._outstanding} messages unconfirmed for {timeout_s} s")

    def close(self, timeout_s: float = 30.0) -> None:
        """Waits for what is outstanding; then settles the rest as Undelivered."""
        with suppress(TimeoutError):
            self.flush(timeout_s)
        self._closing.set()
        self._in_loop(self._disconnect)
        self._thread.join()  # pika gives up on a silent broker
        self._settle([*self._unconfirmed.values(), *self._waiting], "unconfirmed when closed")

    def _run(self) -> None:
        while not self._closing.is_set():
            self._connection = pika.SelectConnection(
                self._parameters, self._open_channel, self._on_end, self._on_end
            )
            self._connection.ioloop.start()
            self._connection.ioloop.close()
            self._closing.wait(RECONNECT.jittered_s(self._failures))
            self._failures += 1

    def _in_loop(self, callback: Callable[[], None]) -> None:
        if self._connection:  # else the first channel will look for messages
            self._connection.ioloop.add_callback_threadsafe(callback)

    def _disconnect(self) -> None:
        if self._connection.is_open:
            self._connection.close()
        else:
            self._connection.ioloop.stop()

    def _on_end(self, connection: Any, reason: BaseException) -> None:
        if not self._closing.is_set():
            logger.warning("producer without a connection: %r", reason)
        connection.ioloop.stop()

    def _open_channel(self, connection: Any) -> None:
        if self._closing.is_set():  # while it connected
            connection.close()
        else:
            connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm)
        self._failures, self._channel = 0, channel
        self._oldest_tag = self._next_tag = 1
        self._send()

    def _send(self) -> None:
        self._is_woken = False  # first: what is appended from here on wakes again
        window = 1 if self._suspects else self._window
        while self._channel and self._waiting and len(self._unconfirmed) < window:
            message = self._waiting.popleft()
            try:
                message.send(self._channel)
            except Exception as error:  # not encodable: nothing was sent, no tag used
                self._settle([message], repr(error))
            else:
                self._unconfirmed[self._next_tag] = message
                self._next_tag += 1

    def _on_return(self, _channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        self._returned[properties.message_id, method.exchange, method.routing_key] += 1

    def _on_confirm(self, frame: Any) -> None:
        tag, is_multiple = frame.method.delivery_tag, frame.method.multiple
        tags = range(self._oldest_tag if is_multiple else tag, tag + 1)
        settled = [message for t in tags if (message := self._unconfirmed.pop(t, None))]
        if is_multiple:
            self._oldest_tag = tag + 1
        self._suspects = max(0, self._suspects - len(settled))
        self._settle(settled, "nacked" if isinstance(frame.method, pika.spec.Basic.Nack) else "")
        self._send()

    def _settle(self, messages: Sequence[Outgoing], failure: str = "") -> None:
        for message in messages:
            why = failure
            if self._returned:  # a return comes before its confirm
                key = message.properties.message_id, message.exchange, message.routing_key
                if self._returned[key]:
                    self._returned, why = self._returned - Counter([key]), "unroutable"
            try:
                self._on_settled(message, Undelivered(f"{why}: {message}") if why else None)
            except Exception:  # the caller's: the thread must outlive it
                logger.exception("on_settled failed for %s", message)
        with self._lock:
            self._outstanding -= len(messages)
            if self._outstanding <= self._window // 2:  # not for each: thread switches are dear
                self._room.notify_all()

    def _on_channel_closed(self, _channel: Any, reason: Any) -> None:
        """What is unconfirmed goes to the front again, but for the culprit."""
        again, self._channel = list(self._unconfirmed.values()), None
        self._unconfirmed.clear()
        self._returned.clear()
        is_refusal = isinstance(reason, amqp.ChannelClosedByBroker | amqp.ConnectionClosedByBroker)
        if is_refusal and reason.reply_code != CONNECTION_FORCED:  # which names no message
            if len(again) == 1:
                self._settle([again.pop()], f"{reason.reply_code} {reason.reply_text}")
            self._suspects = max(len(again), self._suspects - 1)
        with self._lock:
            self._waiting.extendleft(reversed(again))
        if self._connection.is_open:
            self._open_channel(self._connection)


# ── 5. Three consumers, one contract ──


class Transient(Exception):
    """What a handler raises where another attempt is worth while."""


class Delivery(NamedTuple):
    """A message as a handler sees it."""

    tag: int
    body: bytes
    properties: pika.BasicProperties
    redelivered: bool
    channel: Any  # an ack is valid on this one only

    @property
    def reason(self) -> str:
        """Of a dead letter: what its handler raised, or what the broker says."""
        headers = self.properties.headers or {}
        deaths = headers.get("x-death") or [{"reason": "unknown"}]
        return str(headers.get(REASON_HEADER, deaths[0]["reason"]))

    def forward(self, routing_key: str, exchange: str, headers: Mapping[str, object]) -> Outgoing:
        """The same message with other headers, without what would stop it there."""
        properties = copy.copy(self.properties)
        given = (self.properties.headers or {}).items()
        kept = {name: value for name, value in given if name not in NOT_FORWARDED}
        properties.headers = {**kept, **headers}
        properties.delivery_mode = 2
        properties.expiration = None  # a dead letter must not expire
        properties.user_id = None  # the broker refuses another user's name: 406
        return Outgoing(routing_key, self.body, properties, exchange, context=self)


def get_up_to(limit: int, channel: Any, queue_name: str) -> list[Delivery]:
    """By as many calls; for browsing, not for throughput."""
    got = itertools.islice(iter(partial(channel.basic_get, queue_name), NOTHING), limit)
    return [Delivery(m.delivery_tag, body, p, m.redelivered, channel) for m, p, body in got]


def follow_up(contract: Contract, delivery: Delivery, error: BaseException) -> Outgoing:
    """What to publish, have confirmed, and then ack, after a handler raised `error`."""
    attempt = (delivery.properties.headers or {}).get(ATTEMPT_HEADER, 0)
    if isinstance(error, PoisonMessage):
        reason = str(error)
    elif not isinstance(error, Transient):  # a bug: to retry would only hide it
        reason = f"{type(error).__name__}: {error}"
    elif not isinstance(attempt, int) or isinstance(attempt, bool) or attempt < 0:
        reason = f"header {ATTEMPT_HEADER} is not a count"
    elif attempt >= len(contract.delay_queues):
        reason = f"gave up after {attempt + 1} attempts: {error}"
    else:
        return delivery.forward(contract.delay_queues[attempt], "", {ATTEMPT_HEADER: attempt + 1})
    reason = reason[:REASON_LIMIT].encode(errors="backslashreplace").decode()  # no surrogates
    return delivery.forward(contract.queue, contract.dead_letter_exchange, {REASON_HEADER: reason})


Handler = Callable[[Delivery], Any]


@dataclass(eq=False)
class Consumer:
    """The handler returns: ack. It raises: first a follow-up, confirmed, and then the ack. So a
    crash anywhere repeats messages, and loses none."""

    broker: RabbitMQ
    contract: Contract
    handler: Handler
    prefetch: int = 100
    drain_s: float = 10.0
    _stopping, _failure, _deadline_s = False, "", 0.0  # why the session must end; of the drain
    _connection = _channel = _call_soon = cast(Any, None)  # of the session

    def stop(self) -> None:
        """Ends run() for good, after `drain_s` if the broker answers. Safe in signal handlers."""
        self._stopping = True

    def run(self) -> None:
        """Consumes until stop(). ConnectionError after RECONNECT.attempts sessions in vain."""
        # Apart: short of memory, the broker reads no more of those that publish.
        self._publisher = WindowedProducer(self.broker, self._on_follow_up, 2 * self.prefetch)
        failures = 0
        try:
            while not self._stopping and failures < RECONNECT.attempts:
                started_s, self._failure = time.monotonic(), ""
                try:
                    self._session()
                except LOST as error:
                    self._fail(repr(error))
                # Not reset by a connection alone: each may end at the same message.
                if self._channel and time.monotonic() - started_s > STABLE_S:
                    failures = 0
                self._channel = None  # what is at work can no longer be acked
                if not self._stopping:
                    logger.warning("consumer of %s: %s", self.contract.queue, self._failure)
                    time.sleep(RECONNECT.jittered_s(failures))
                failures += 1
        finally:
            self._publisher.close(self.drain_s)
        if not self._stopping:
            raise ConnectionError(self._failure)

    _session = _dispatch = cast(Any, None)  # of each kind

    def _in_loop(self, callback: Callable[[], None]) -> None:
        # Where that is closed, the message will be delivered again.
        with suppress(amqp.ConnectionWrongStateError, RuntimeError):
            self._call_soon(callback)

    def _consume(self, channel: Any) -> None:
        self._channel, self._deadline_s = channel, 0.0
        self._in_hand = set[int]()  # delivery tags; of the loop's thread
        channel.add_on_cancel_callback(lambda _: self._fail("cancelled by the broker"))
        channel.basic_qos(prefetch_count=self.prefetch)
        self._consumer_tag = channel.basic_consume(self.contract.queue, self._on_message)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason

    def _is_over(self) -> bool:
        """Failed, or stopped with nothing in hand, or stopped `drain_s` ago."""
        if not self._channel.is_open:  # by the broker
            self._fail("channel closed")
        if self._failure or not self._stopping:
            return bool(self._failure)
        if not self._deadline_s:
            self._deadline_s = time.monotonic() + self.drain_s
            self._channel.basic_cancel(self._consumer_tag)
        return not self._in_hand or time.monotonic() > self._deadline_s

    def _on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if not self._stopping:  # else left to the next consumer
            tag = method.delivery_tag
            self._in_hand.add(tag)
            self._dispatch(Delivery(tag, body, properties, method.redelivered, channel))

    def _follow(self, delivery: Delivery, error: BaseException) -> None:
        """Publish, and ack once that is confirmed. From any thread."""
        if delivery.channel is not self._channel:  # to be delivered again
            return
        try:
            self._publisher.publish(follow_up(self.contract, delivery, error), timeout_s=0)
        except TimeoutError as full:
            self._fail(str(full))

    def _on_follow_up(self, message: Outgoing, error: Undelivered | None) -> None:
        delivery: Delivery = message.context
        if error is None:
            self._in_loop(partial(self._ack, delivery))
        elif delivery.channel is self._channel:  # to be delivered again
            self._fail(str(error))

    def _ack(self, delivery: Delivery) -> None:
        if delivery.channel is self._channel and delivery.channel.is_open:
            self._in_hand.discard(delivery.tag)
            delivery.channel.basic_ack(delivery.tag)


@dataclass(eq=False)
class WorkerPoolConsumer(Consumer):
    """For handlers that block: threads work, and the connection's thread keeps the heartbeats."""

    workers: int = 8

    def run(self) -> None:
        self._jobs: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()  # ≤ prefetch
        for _ in range(self.workers):  # daemons: a handler may hang
            threading.Thread(target=self._work, name="worker", daemon=True).start()
        try:
            super().run()
        finally:
            for _ in range(self.workers):
                self._jobs.put(None)

    def _session(self) -> None:
        self._connection = self.broker.connect()
        self._call_soon = self._connection.add_callback_threadsafe
        try:
            self._consume(self._connection.channel())
            while not self._is_over():
                self._connection.process_data_events(POLL_S)
        finally:
            if self._connection.is_open:
                self._connection.close()

    def _dispatch(self, delivery: Delivery) -> None:
        self._jobs.put(delivery)

    def _work(self) -> None:
        while delivery := self._jobs.get():
            if delivery.channel is not self._channel:  # of a connection that is gone
                continue
            try:
                self.handler(delivery)
            except BaseException as error:  # the thread must outlive it
                self._follow(delivery, error)
            else:
                self._in_loop(partial(self._ack, delivery))


class BatchConsumer(Consumer):
    """For short handlers, on the connection's thread: one ack covers many messages, and a crash
    redelivers up to the prefetch, handled or not."""

    _adapter: Any = pika.SelectConnection

    def _connect(self, custom_ioloop: Any = None) -> None:
        self._connection = self._adapter(
            self.broker.parameters(),
            lambda connection: connection.channel(on_open_callback=self._consume),
            self._on_end,
            self._on_end,
            custom_ioloop,
        )

    def _session(self) -> None:
        self._connect()
        self._call_soon = self._connection.ioloop.add_callback_threadsafe
        self._connection.ioloop.start()
        self._connection.ioloop.close()

    def _on_end(self, connection: Any, reason: BaseException) -> None:
        if not isinstance(reason, amqp.ConnectionClosedByClient):  # of our own
            self._fail(repr(reason))
        connection.ioloop.stop()

    def _consume(self, channel: Any) -> None:
        self._handled: list[int] = []  # tags to be acked
        channel.add_on_close_callback(lambda _, reason: self._fail(repr(reason)))
        super()._consume(channel)
        self._tick(channel)

    def _tick(self, channel: Any) -> None:
        if channel is not self._channel or not self._connection.is_open:
            return  # a timer may outlive its session
        self._ack_handled()
        if self._is_over():
            self._connection.close()
        else:
            self._connection.ioloop.call_later(POLL_S, partial(self._tick, channel))

    def _dispatch(self, delivery: Delivery) -> None:
        try:
            self.handler(delivery)
        except Exception as error:  # the contract decides
            self._follow(delivery, error)
        else:
            self._ack(delivery)

    def _ack(self, delivery: Delivery) -> None:
        if delivery.channel is self._channel:
            self._in_hand.discard(delivery.tag)
            self._handled.append(delivery.tag)
            if len(self._handled) >= self.prefetch / 4:
                self._ack_handled()

    def _ack_handled(self) -> None:
        """One ack up to the first that is not done with, one each beyond."""
        gap = min(self._in_hand, default=sys.maxsize)
        below = max((tag for tag in self._handled if tag < gap), default=0)
        beyond = [tag for tag in self._handled if tag > gap]
        self._handled.clear()
        if self._channel.is_open:
            if below:
                self._channel.basic_ack(below, multiple=True)
            for tag in beyond:
                self._channel.basic_ack(tag)


class AsyncConsumer(BatchConsumer):
    """For handlers that await: up to `prefetch` of them at once, on one event loop."""

    _adapter = AsyncioConnection

    def run(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        try:
            super().run()
        finally:
            if self._tasks:  # a thread may not heed that
                self._loop.run_until_complete(asyncio.wait(self._tasks, timeout=POLL_S))
            self._loop.close()

    def _session(self) -> None:
        self._connect(self._loop)
        self._call_soon = self._loop.call_soon_threadsafe
        self._loop.run_forever()
        for task in self._tasks:  # to be delivered again
            task.cancel()

    def _dispatch(self, delivery: Delivery) -> None:
        task = self._loop.create_task(self._handle(delivery))
        self._tasks.add(task)  # the loop itself holds a task only weakly
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, delivery: Delivery) -> None:
        try:
            await self.handler(delivery)
        except (Exception, asyncio.CancelledError) as error:  # the contract decides
            self._follow(delivery, error)
        else:
            self._ack(delivery)


# ── 6. Dead letters ──


Wanted = Callable[[Delivery], bool]


class DeadLetterQueue:
    """What a work queue's consumers gave up. A call holds what it looks at until it returns."""

    def __init__(self, connection: Any, contract: Contract) -> None:
        self._channel, self._producer = connection.channel(), Producer(connection)
        self._work_queue, self._name = contract.queue, contract.dead_letter_queue

    def count(self) -> int:
        """How many wait, or did a moment ago; without those that somebody holds."""
        declared = self._channel.queue_declare(self._name, passive=True)
        return int(declared.method.message_count)

    def peek(self, limit: int = 100) -> list[tuple[Delivery, str]]:
        """The oldest, each with its reason: a handler's or the broker's."""
        with self._held() as held:
            return [(delivery, delivery.reason) for delivery in held[:limit]]

    def replay(
        self, limit: int = 100, wanted: Wanted = bool, mend: Callable[[bytes], bytes] = bytes
    ) -> int:
        """Send up to `limit` of those `wanted` to the work queue, as for a first attempt. Each is
        confirmed there before it goes here."""
        with self._held() as held:
            chosen = list(filter(wanted, held))[:limit]
            for delivery in chosen:
                again = delivery._replace(body=mend(delivery.body))
                self._producer.publish(again.forward(self._work_queue, "", {ATTEMPT_HEADER: 0}))
                self._channel.basic_ack(delivery.tag)
        return len(chosen)

    def purge(self, expected: int) -> None:
        """Delete all, which must be `expected` messages; else ValueError, and none is deleted."""
        with self._held(max(HELD_LIMIT, expected + 1)) as held:
            if len(held) != expected:
                raise ValueError(f"{len(held)} dead letters, not {expected}")
            for delivery in held:
                self._channel.basic_ack(delivery.tag)

    @contextmanager
    def _held(self, limit: int = HELD_LIMIT) -> Iterator[list[Delivery]]:
        try:  # all: what is given back goes behind what was given back before
            yield get_up_to(limit, self._channel, self._name)
        finally:
            if self._channel.is_open:
                self._channel.basic_nack(0, multiple=True, requeue=True)  # 0: all unacked


# ── 7. The broker in memory ──


def topic_matches(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """`*` stands for one word of a routing key, `#` for any number of them."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(topic_matches(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and topic_matches(pattern[1:], words[1:])


@dataclass(eq=False)
class _Stored:
    queue: str
    routing_key: str
    body: bytes
    properties: pika.BasicProperties
    expires_s: float
    returns: int = 0  # deliveries that ended without an ack


class InMemoryBroker:
    """As much of RabbitMQ as this module uses, for one process, by the same tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock  # in seconds
        self.lock = threading.RLock()
        self.exchanges: dict[str, str] = {}  # name → type
        self.bindings: set[tuple[str, str, str]] = set()  # exchange, key, queue
        self.arguments: dict[str, dict[str, Any]] = {}  # by queue
        self.ready: dict[str, deque[_Stored]] = {}  # by queue

    def connect(self) -> InMemoryConnection:
        return InMemoryConnection(self)

    def route(self, exchange: str, key: str) -> set[str]:
        """The queues that get it."""
        if not exchange:
            return {key} & self.ready.keys()
        kind, words = self.exchanges[exchange], key.split(".") if key else []
        bound = {(pattern, name) for source, pattern, name in self.bindings if source == exchange}
        if kind == "topic":
            split = [(pattern.split(".") if pattern else [], name) for pattern, name in bound]
            return {name for pattern, name in split if topic_matches(pattern, words)}
        return {name for pattern, name in bound if kind == "fanout" or pattern == key}

    def publish(self, exchange: str, key: str, body: bytes, properties: Any) -> bool:
        """Whether a queue took it."""
        names = self.route(exchange, key)
        for name in names:
            ttls_ms = [properties.expiration, self.arguments[name].get("x-message-ttl")]
            ttl_s = min(float("inf") if ms is None else int(ms) / 1000 for ms in ttls_ms)
            own = copy.deepcopy(properties)
            self.ready[name].append(_Stored(name, key, body, own, self.clock() + ttl_s))
        return bool(names)

    def expire(self) -> None:
        """At the head of a queue only: what is due behind it, waits."""
        for ready in self.ready.values():
            while ready and ready[0].expires_s <= self.clock():
                self.bury(ready.popleft(), "expired")

    def give_back(self, stored: _Stored) -> None:
        """To the head of its queue, behind what came back before."""
        stored.returns += 1
        if stored.returns > self.arguments[stored.queue].get("x-delivery-limit", float("inf")):
            self.bury(stored, "delivery_limit")
        else:
            ready = self.ready[stored.queue]
            ready.insert(sum(1 for _ in itertools.takewhile(lambda s: s.returns, ready)), stored)

    def bury(self, stored: _Stored, reason: str) -> None:
        """To the dead-letter exchange of its queue, if there is one."""
        arguments, properties = self.arguments[stored.queue], stored.properties
        if (exchange := arguments.get("x-dead-letter-exchange")) in ("", *self.exchanges):
            properties.headers = {**(properties.headers or {}), "x-death": [{"reason": reason}]}
            properties.expiration = None
            key = arguments.get("x-dead-letter-routing-key", stored.routing_key)
            self.publish(exchange, key, stored.body, properties)


class InMemoryConnection:
    """What the above uses of pika's BlockingConnection and of its channel."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self._broker, self.is_open, self._last_tag = broker, True, 0
        self._unacked: dict[int, _Stored] = {}  # by delivery tag

    def channel(self) -> InMemoryConnection:
        self.is_open = True
        return self

    def confirm_delivery(self) -> None: ...

    def close(self) -> None:
        self.basic_nack(0, multiple=True)
        self.is_open = False

    def _refuse(self, reply_code: int, reply_text: str) -> NoReturn:
        self.close()
        raise amqp.ChannelClosedByBroker(reply_code, reply_text)

    def exchange_declare(self, exchange: str, exchange_type: str, **_: object) -> None:
        if self._broker.exchanges.setdefault(exchange, exchange_type) != exchange_type:
            self._refuse(406, f"PRECONDITION_FAILED - exchange '{exchange}'")

    def queue_declare(self, queue: str, passive: bool = False, **options: Any) -> pika.frame.Method:
        with self._broker.lock:
            if not passive:
                arguments = options.get("arguments") or {}
                if self._broker.arguments.setdefault(queue, arguments) != arguments:
                    self._refuse(406, f"PRECONDITION_FAILED - queue '{queue}'")
                self._broker.ready.setdefault(queue, deque())
            count = len(self._ready(queue))
        return pika.frame.Method(1, pika.spec.Queue.DeclareOk(queue, count, 0))

    def _ready(self, queue: str) -> deque[_Stored]:
        if queue not in self._broker.ready:
            self._refuse(404, f"NOT_FOUND - no queue '{queue}'")
        self._broker.expire()
        return self._broker.ready[queue]

    def queue_bind(self, queue: str, exchange: str, routing_key: str) -> None:
        self._broker.bindings.add((exchange, routing_key, queue))

    def basic_publish(
        self, exchange: str, routing_key: str, body: bytes, properties: Any, mandatory: bool = False
    ) -> None:
        with self._broker.lock:
            if exchange not in ("", *self._broker.exchanges):
                self._refuse(404, f"NOT_FOUND - no exchange '{exchange}'")
            if not self._broker.publish(exchange, routing_key, body, properties) and mandatory:
                raise amqp.UnroutableError([])

    def basic_get(self, queue: str) -> tuple[Any, Any, Any]:
        with self._broker.lock:
            if not (ready := self._ready(queue)):
                return NOTHING
            self._last_tag, stored = self._last_tag + 1, ready.popleft()
            self._unacked[self._last_tag] = stored
        method = pika.spec.Basic.Deliver("", self._last_tag, stored.returns > 0)
        return method, copy.deepcopy(stored.properties), stored.body

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self._settled(delivery_tag, multiple)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        with self._broker.lock:
            for stored in self._settled(delivery_tag, multiple):
                if requeue:
                    self._broker.give_back(stored)
                else:
                    self._broker.bury(stored, "rejected")

    def _settled(self, tag: int, multiple: bool) -> list[_Stored]:
        if tag and tag not in self._unacked:
            self._refuse(406, f"PRECONDITION_FAILED - unknown delivery tag {tag}")
        tags = [t for t in self._unacked if not tag or t <= tag] if multiple else [tag]
        return [self._unacked.pop(t) for t in tags]


@dataclass(eq=False)
class InMemoryConsumer:
    """The same contract, on one thread."""

    broker: InMemoryBroker
    contract: Contract
    handler: Handler
    prefetch: int = 100
    _stopping = False

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        with closing(self.broker.connect()) as connection:
            while not self._stopping:
                for delivery in get_up_to(self.prefetch, connection, self.contract.queue):
                    try:
                        self.handler(delivery)
                    except Exception as error:  # the contract decides
                        Producer(connection).publish(follow_up(self.contract, delivery, error))
                    connection.basic_ack(delivery.tag)
                time.sleep(0.002)


# ── 8. A pipeline of user records ──

REGIONS = {"AT": "Europe", "BR": "South America", "JP": "Asia", "KE": "Africa"}


def validated(record: Mapping[str, Any]) -> dict[str, Any]:
    """id, email and country, normalised. Raises PoisonMessage."""
    user_id, email, country = record.get("id"), record.get("email"), record.get("country")
    if type(user_id) is not int or not 0 < user_id < 2**63:  # what both stores take
        raise PoisonMessage("id: no whole number above 0")
    if not isinstance(email, str) or not re.fullmatch(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+", email):
        raise PoisonMessage("email: no address")
    if not isinstance(country, str) or country not in REGIONS:
        raise PoisonMessage("country: unknown")
    return {"id": user_id, "email": email.lower(), "country": country}


class MongoStore:
    """Users in MongoDB. One atomic write has both an effect and a note of its message."""

    def __init__(self, database: Any) -> None:
        self._users = database.users

    def save(self, message_id: str, user: Mapping[str, Any]) -> bool:
        """False for one of the last NOTED messages of this user. Raises Transient."""
        changes = {
            "$set": dict(user), "$inc": {"effects": 1},
            "$push": {"messages": {"$each": [message_id], "$slice": -NOTED}},
        }  # fmt: skip
        is_new = {"_id": user["id"], "messages": {"$ne": message_id}}
        try:
            try:
                self._users.update_one(is_new, changes, upsert=True)
            except DuplicateKeyError:  # not new, or another made the user
                if self._users.find_one({"_id": user["id"], "messages": message_id}):
                    return False
                raise Transient("two messages about a user at once") from None
        except PyMongoError as error:
            if error.timeout or isinstance(error, ConnectionFailure):
                raise Transient(f"MongoDB: {error}") from error
            raise
        return True

    def totals(self) -> tuple[int, int]:
        """Users, and effects on them: equal, if each had one."""
        sums = {"_id": None, "users": {"$sum": 1}, "effects": {"$sum": "$effects"}}
        found = next(self._users.aggregate([{"$group": sums}]), {"users": 0, "effects": 0})
        return found["users"], found["effects"]


class SqliteStore:
    """The same in SQLite, in a file that several processes may share."""

    TABLES = """PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
        CREATE TABLE IF NOT EXISTS handled (message_id TEXT PRIMARY KEY);
        CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, record, effects INTEGER)"""
    CHANGE = """INSERT INTO users VALUES (?, ?, 1) ON CONFLICT (id) DO UPDATE
        SET record = excluded.record, effects = effects + 1"""

    def __init__(self, path: str | Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
        self._connection.executescript(self.TABLES)

    def save(self, message_id: str, user: Mapping[str, Any]) -> bool:
        with self._lock, self._connection as transaction:
            note_it = "INSERT OR IGNORE INTO handled VALUES (?)"
            is_new = transaction.execute(note_it, (message_id,)).rowcount == 1
            if is_new:
                transaction.execute(self.CHANGE, (user["id"], json.dumps(user)))
        return is_new

    def totals(self) -> tuple[int, int]:
        with self._lock:
            sums = "SELECT COUNT(*), COALESCE(SUM(effects), 0) FROM users"
            users, effects = self._connection.execute(sums).fetchone()
        return users, effects

    def handled(self) -> set[str]:
        """The ids of all messages that had their effect."""
        with self._lock:
            return {row[0] for row in self._connection.execute("SELECT message_id FROM handled")}

    def close(self) -> None:
        self._connection.close()


class UserDataPipeline:
    """A handler: decodes, validates, enriches and stores."""

    def __init__(self, store: Any, region_of: Callable[[Mapping[str, Any]], str]) -> None:
        self.store, self._region_of = store, region_of
        self.repetitions: list[str] = []  # ids of messages that had their effect before

    def __call__(self, delivery: Delivery) -> None:
        message = Message.decode(delivery.body)
        user = validated(message.payload)
        user["region"] = self._region_of(user)
        if not self.store.save(message.message_id, user):
            self.repetitions.append(message.message_id)


# ── 9. Outbox ──


class Outbox:
    """Messages in the business database, written by the transaction of the change. One relay
    publishes the oldest and deletes it when it is confirmed; if it dies between the two, that is
    the first to go out again. Source: Richardson, Microservices Patterns, chapter 3."""

    TABLE = """CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY AUTOINCREMENT,
        exchange TEXT NOT NULL, routing_key TEXT NOT NULL, body BLOB NOT NULL)"""
    ADD = "INSERT INTO outbox (exchange, routing_key, body) VALUES (?, ?, ?)"
    OLDEST = "SELECT id, exchange, routing_key, body FROM outbox ORDER BY id LIMIT 1"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._connection.execute(self.TABLE)

    def add(self, message: Message, routing_key: str, exchange: str = "") -> None:
        """Within the caller's transaction. Raises PoisonMessage for what none would take."""
        Message.decode(body := message.encode())
        self._connection.execute(self.ADD, (exchange, routing_key, body))

    def relay(self, publish: Callable[[Outgoing], None]) -> int:
        """Gives the number of messages. Outside a transaction; what `publish` raises, stops it."""
        relayed = 0
        while row := self._connection.execute(self.OLDEST).fetchone():
            row_id, exchange, routing_key, body = row
            publish(Outgoing.of(Message.decode(body), routing_key, exchange))
            with self._connection:
                self._connection.execute("DELETE FROM outbox WHERE id = ?", (row_id,))
            relayed += 1
        return relayed


# ── Demos: what they share ──


@contextmanager
def declared(
    broker: Any, prefix: str, bindings: Sequence[Any] = (("work", "", ""),), **options: Any
) -> Iterator[Any]:
    """A connection, and the contract of the first work queue; deleted at the end."""
    topology, link = Topology(bindings, prefix=prefix, **options), broker.connect()
    try:
        topology.declare(link.channel())
        yield link, topology.contract(bindings[0][0])
        with suppress(*LOST):  # interrupted, it may hang
            link.close()
    finally:
        if isinstance(broker, RabbitMQ):  # by another: that may have died
            with suppress(*LOST), closing(broker.connect()) as janitor:
                topology.delete(janitor.channel())


def wait_until(is_so: Callable[[], object], poll_s: float = 0.01) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {WAIT_S:g} s in vain")
        time.sleep(poll_s)


@contextmanager
def consuming(consumer: Any) -> Iterator[None]:
    """In a thread; raises what ended it."""
    with ThreadPoolExecutor(1) as thread:
        try:
            run = thread.submit(consumer.run)
            yield
        finally:
            consumer.stop()
        run.result()


CONSUMERS: Any = {RabbitMQ: WorkerPoolConsumer, InMemoryBroker: InMemoryConsumer}


def publish_all(broker: Any, messages: Iterable[Outgoing]) -> set[str]:
    """Gives the ids of what was confirmed."""
    if isinstance(broker, InMemoryBroker):
        publish, messages = Producer(broker.connect()).publish, list(messages)
        for message in messages:
            publish(message)
        return {message.properties.message_id for message in messages}
    outcomes: dict[str, Undelivered | None] = {}
    publisher = WindowedProducer(broker, lambda m, e: outcomes.update({m.properties.message_id: e}))
    try:
        for message in messages:
            publisher.publish(message, WAIT_S)
        publisher.flush(WAIT_S)
    finally:
        publisher.close(0)
    return {message_id for message_id, error in outcomes.items() if error is None}


def take_all(channel: Any, queue_name: str) -> list[Message]:
    """What is in a queue, and then no longer."""
    deliveries = get_up_to(sys.maxsize, channel, queue_name)
    channel.basic_ack(0, multiple=True)
    return [Message.decode(delivery.body) for delivery in deliveries]


def shown(conclusion: str, **counts: int) -> dict[str, int]:
    for label, count in counts.items():
        fact(label.replace("_", " "), f"{count:,}")
    conclude(conclusion)
    return counts


def is_in_memory(broker: Any, missing: str) -> bool:
    if isinstance(broker, InMemoryBroker):
        note(f"needs RabbitMQ: {missing}")
    return isinstance(broker, InMemoryBroker)


# ── Demos 1 to 3: publishing and consuming ──

EXCHANGES = {"jobs": "direct", "events": "topic", "notices": "fanout"}
BINDINGS = (
    ("mail", "jobs", "mail"), ("mail", "events", "user.created"), ("mail", "notices", ""),
    ("audit", "events", "#"), ("audit", "notices", ""), ("orders", "events", "order.*"),
)  # fmt: skip
SENT = "jobs/mail jobs/print events/user.created events/order.paid events/order.paid.late notices/x"


def demo_routing(broker: Any, prefix: str) -> dict[str, list[str]]:
    """1. Routing: which queues the broker fills, by exchange and key.

    Prediction: `order.*` takes order.paid, not order.paid.late; one job has no queue."""
    reached, name = {}, Topology(BINDINGS, prefix=prefix).name
    with declared(broker, prefix, BINDINGS, exchanges=EXCHANGES) as (link, _):
        for sent in SENT.split():
            exchange, key = sent.split("/")
            with suppress(Undelivered):  # then no queue has it
                Producer(link).publish(Outgoing.of(Message("demo", {}), key, name(exchange)))
            queues = ("mail", "audit", "orders")
            reached[sent] = [queue for queue in queues if take_all(link.channel(), name(queue))]
    rows = [[sent, ", ".join(names) or "none: returned"] for sent, names in reached.items()]
    table(["exchange/key", "queues, as the broker filled them"], rows)
    conclude("a sender names exchange and key; the bindings say who gets it")
    return reached


def demo_confirms(broker: Any, prefix: str) -> dict[str, str] | None:
    """2. Confirms: published to nowhere; demo 9 has the broker that dies.

    Prediction: nowhere is confirmed like any queue, unless `mandatory` is set."""
    if is_in_memory(broker, "publishing without a confirm"):
        return None
    said = dict.fromkeys(("no confirms", "confirms", "confirms and mandatory"), "no error")
    with closing(broker.connect()) as link:
        channel = link.channel()
        for way in said:
            try:
                channel.basic_publish("", f"{prefix}nowhere", b"", mandatory="mandatory" in way)
            except amqp.UnroutableError as error:
                said[way] = type(error).__name__
            channel.confirm_delivery()  # after the first
    for way, heard in said.items():
        fact(way, heard)
    conclude("without `mandatory`, a confirm says that the broker has read it, and no more")
    return said


def demo_consumers(broker: Any, prefix: str) -> dict[str, list[float]] | None:
    """3. Three consumers: threads, batches and asyncio on one workload, by prefetch.

    Prediction: of handlers that wait, asyncio has as many at once as the prefetch."""
    if is_in_memory(broker, "its throughput"):
        return None
    seen: list[int] = []

    def wait(delivery: Delivery) -> None:
        time.sleep(HANDLER_S)
        seen.append(delivery.tag)

    async def await_(delivery: Delivery) -> None:
        await asyncio.sleep(HANDLER_S)
        seen.append(delivery.tag)

    kinds: Any = {WorkerPoolConsumer: wait, BatchConsumer: wait, AsyncConsumer: await_}
    rates: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    with declared(broker, f"{prefix}consumers.") as (_, contract):
        for prefetch, (kind, handler) in itertools.product(PREFETCHES, kinds.items()):
            publish_all(broker, [Outgoing.of(Message("demo", {}), contract.queue)] * COMPARED)
            seen.clear()
            started_s = time.perf_counter()
            with consuming(kind(broker, contract, handler, prefetch)):
                wait_until(lambda: len(seen) >= COMPARED)
                rates[kind.__name__].append(COMPARED / (time.perf_counter() - started_s))
    rows = [[name, *(f"{rate:,.0f}" for rate in of_kind)] for name, of_kind in rates.items()]
    table(["messages a second", *(f"prefetch {prefetch:,}" for prefetch in PREFETCHES)], rows)
    conclude(f"the fastest with this handler: {max(rates, key=lambda name: max(rates[name]))}")
    return rates


# ── Demos 4 to 6: retry, poison, blocked heads ──


def demo_retry(broker: Any, prefix: str) -> list[float]:
    """4. Retry: back-off in delay queues, against `requeue=True`.

    Prediction: attempts come 0.1, 0.2 and 0.4 s apart; requeueing tries as fast as it can."""
    policy, tried_s = RetryPolicy(0.1, cap_s=0.4, attempts=5), list[float]()

    def fails_three_times(_delivery: Delivery) -> None:
        tried_s.append(time.monotonic())
        if len(tried_s) < 4:
            raise Transient("not yet")

    with declared(broker, f"{prefix}retry.", retry=policy) as (link, contract):
        channel, message = link.channel(), Outgoing.of(Message("demo", {}), contract.queue)
        publish_all(broker, [message])
        with consuming(CONSUMERS[type(broker)](broker, contract, fails_three_times)):
            wait_until(lambda: len(tried_s) == 4)
        waited_s = [after - before for before, after in itertools.pairwise(tried_s)]
        fact("waited", ", ".join(f"{wait_s:.2f} s" for wait_s in waited_s))
        endless, end_s, requeued = contract.dead_letter_queue, time.monotonic() + REQUEUEING_S, 0
        publish_all(broker, [message._replace(routing_key=endless)])  # it has no delivery limit
        while time.monotonic() < end_s:
            for delivery in get_up_to(1, channel, endless):
                channel.basic_nack(delivery.tag, requeue=True)
                requeued += 1
    if not is_in_memory(broker, "how many deliveries requeueing makes"):
        fact("requeue=True", f"{requeued / REQUEUEING_S:,.0f} deliveries a second, to no avail")
    conclude(f"handled at attempt {len(tried_s)}, after {tried_s[-1] - tried_s[0]:.1f} s")
    return waited_s


def demo_poison(broker: Any, prefix: str) -> dict[str, int]:
    """5. Poison: messages that cannot be handled are given up, mended, and replayed.

    Prediction: what raises is a dead letter at once; what kills, past a limit of 3."""
    handled: list[str] = []

    def handler(delivery: Delivery) -> None:
        handled.append(validated(Message.decode(delivery.body).payload)["email"])

    with declared(broker, f"{prefix}poison.", delivery_limit=3) as (link, contract):
        dead, deliveries = DeadLetterQueue(link, contract), 0
        user = {"id": 1, "email": "user at example.com", "country": "KE"}
        typo = Outgoing.of(Message("user", user), contract.queue)
        right = typo._replace(body=typo.body.replace(b" at ", b"@"))
        publish_all(broker, [right])
        while not dead.count():
            with closing(broker.connect()) as consumer:  # whose end gives the message back
                deliveries += consumer.channel().basic_get(contract.queue) != NOTHING
        publish_all(broker, [typo])
        with consuming(CONSUMERS[type(broker)](broker, contract, handler)):
            wait_until(lambda: dead.count() == 2)
            for _, reason in dead.peek():
                fact("dead letter", reason)
            replayed = dead.replay(mend=lambda body: right.body)
            wait_until(lambda: len(handled) == 2)
        left = dead.count()
    return shown(
        "nothing looped, nothing was lost",
        delivered_to_the_limit=deliveries, mended_and_replayed=replayed, dead_letters_left=left,
    )  # fmt: skip


def demo_head_of_line(broker: Any, prefix: str) -> dict[str, list[float]] | None:
    """6. Blocked heads: a TTL of each message's own, against a queue for each delay.

    Prediction: in one queue, what may wait 0.1 s waits 1.6 s, behind what may wait 1.6 s."""
    if is_in_memory(broker, "how its queues expire"):
        return None
    came_s: dict[str, list[float]] = {}
    with declared(broker, f"{prefix}ttl.", retry=RetryPolicy(0.1, attempts=6)) as (link, contract):
        channel, (short, *_, long) = link.channel(), contract.delay_queues
        for way, second in {"one queue": long, "a queue for each delay": short}.items():
            started_s, came_s[way] = time.monotonic(), []
            for delay_queue, ttl_ms in ((long, "1600"), (second, "100")):
                message = Outgoing.of(Message("demo", {}), delay_queue)
                message.properties.expiration = ttl_ms
                publish_all(broker, [message])
            while len(came_s[way]) < 2 and time.monotonic() < started_s + WAIT_S:
                came = take_all(channel, contract.queue)
                came_s[way] += [time.monotonic() - started_s] * len(came)
            fact(way, "came after " + " and ".join(f"{one_s:.2f} s" for one_s in came_s[way]))
    conclude("a queue expires at its head: give each delay a queue")
    return came_s


# ── Demos 7 to 9: pipeline, outbox, crash ──


def imported_users(count: int) -> Iterator[Message]:
    """One in a hundred has no e-mail address."""
    for n, country in zip(range(1, count + 1), itertools.cycle(REGIONS), strict=False):
        email = f"User{n}@Example.com" if n % 100 else "unknown"
        yield Message("imported", {"id": n, "email": email, "country": country})


def demo_pipeline(broker: Any, prefix: str, store: Any, users: int) -> dict[str, int]:
    """7. The pipeline: users are validated, enriched and stored, each once.

    Prediction: 1 % are invalid, 5 % fail at first, 1 % are sent twice; the sum adds up."""
    failed: set[int] = set()

    def region_of(user: Mapping[str, Any]) -> str:
        if user["id"] % 20 == 7 and user["id"] not in failed:
            failed.add(user["id"])
            raise Transient("the look-up timed out")
        return REGIONS[user["country"]]

    pipeline, messages = UserDataPipeline(store, region_of), list(imported_users(users))
    messages += messages[::100]  # as after a lost confirm
    with declared(broker, f"{prefix}7.", retry=RetryPolicy(0.2, attempts=3)) as (link, contract):
        dead, counts = DeadLetterQueue(link, contract), list[int]()

        def is_done() -> bool:
            counts[:] = store.totals()[1], len(pipeline.repetitions), dead.count()
            bar.update(task, completed=sum(counts))
            return sum(counts) == len(messages)

        publish_all(broker, (Outgoing.of(message, contract.queue) for message in messages))
        consumer = CONSUMERS[type(broker)](broker, contract, pipeline)
        with config.progress() as bar, consuming(consumer):
            task = bar.add_task("", total=len(messages))
            wait_until(is_done, poll_s=0.2)
    effects, again, given_up = counts
    note("the look-up that fails, once for one user in 20, is the demo's own")
    return shown(
        f"{effects:,} + {again:,} + {given_up:,} = {len(messages):,} published",
        published=len(messages), users_stored=store.totals()[0], effects_on_them=effects,
        repeated_without_effect=again, failed_at_first=len(failed), dead_letters=given_up,
    )  # fmt: skip


def demo_outbox(broker: Any, prefix: str, home: Path) -> dict[str, int]:
    """8. Outbox: a change and its message in one transaction, and the relay killed.

    Prediction: one message goes out twice, none is lost, none overtakes another."""
    database, published = sqlite3.connect(home / "outbox.sqlite"), itertools.count()
    database.execute("CREATE TABLE changes (id INTEGER PRIMARY KEY)")
    outbox = Outbox(database)
    with declared(broker, f"{prefix}outbox.") as (link, contract):
        for n in range(CHANGES):
            change = database.execute("INSERT INTO changes DEFAULT VALUES").lastrowid
            outbox.add(Message("changed", {"change": change}), contract.queue)
            database.rollback() if n % 10 == 3 else database.commit()
        committed = {change for (change,) in database.execute("SELECT id FROM changes")}
        producer = Producer(link)

        def publish_and_die(message: Outgoing) -> None:
            producer.publish(message)
            if next(published) == RELAYED_ALIVE:
                raise SystemExit

        with suppress(SystemExit):
            outbox.relay(publish_and_die)
        outbox.relay(producer.publish)
        arrived = [m.payload["change"] for m in take_all(link.channel(), contract.queue)]
    database.close()
    note("SystemExit stands for SIGKILL, which tests/04 sends")
    return shown(
        f"{len(committed)} committed → {len(set(arrived))} told",
        committed=len(committed), rolled_back=CHANGES - len(committed), arrived=len(arrived),
        twice=len(arrived) - len(set(arrived)), lost=len(committed - set(arrived)),
        overtaken=sum(before > after for before, after in itertools.pairwise(arrived)),
    )  # fmt: skip


KILLABLE = """if True:
    import sys, servers
    with servers.running("rabbitmq") as started:
        print(started["rabbitmq"].url, flush=True)
        for line in sys.stdin:
            getattr(started["rabbitmq"], line.strip())()
            print("done", flush=True)
"""


@contextmanager
def killable_broker() -> Iterator[tuple[RabbitMQ, Callable[[str], object]]]:
    """One of the demo's own, and a call to `kill` (SIGKILL) and to `start` it, by servers.py."""
    command, home = [sys.executable, "-c", KILLABLE], Path(__file__).resolve().parent
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: Any = subprocess.Popen(command, cwd=home, start_new_session=True, **pipes)  # noqa: S603

    def order(what: str) -> object:
        print(what, file=process.stdin, flush=True)
        return process.stdout.readline()

    try:
        if not (url := process.stdout.readline().strip()):
            raise config.ServiceUnavailable("RabbitMQ to kill", "servers.py has none")
        logger.setLevel(logging.ERROR)  # lost on purpose
        yield RabbitMQ(url), order
    finally:
        process.communicate()  # end of input: the order to end
    logger.setLevel(logging.NOTSET)  # Ctrl-C may leave a producer


def slow_region(user: Mapping[str, Any]) -> str:
    time.sleep(HANDLER_S)
    return REGIONS[user["country"]]


def consume_in_a_process(broker: RabbitMQ, contract: Contract, path: str) -> None:
    """Until it is killed; SIGTERM would drain it."""
    logging.disable()
    pipeline = UserDataPipeline(SqliteStore(path), slow_region)
    consumer = WorkerPoolConsumer(broker, contract, pipeline)
    signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
    consumer.run()


def crash(prefix: str, home: Path) -> dict[str, int]:
    path, dead = str(home / "crash.sqlite"), set[str]()
    pipeline = UserDataPipeline(store := SqliteStore(path), slow_region)
    spawn = multiprocessing.get_context("spawn")
    with killable_broker() as (doomed, order), declared(doomed, prefix) as (_, contract):
        time.sleep(REGISTERED_S)
        messages = (Outgoing.of(message, contract.queue) for message in imported_users(CRASH_USERS))
        args, heard = (doomed, contract, path), signal.signal(signal.SIGINT, signal.SIG_IGN)
        first = spawn.Process(target=consume_in_a_process, args=args, daemon=True)
        first.start()  # deaf to Ctrl-C
        try:
            signal.signal(signal.SIGINT, heard)
            confirmed = publish_all(doomed, itertools.islice(messages, CRASH_USERS // 2))
            wait_until(lambda: len(store.handled()) > CRASH_USERS // 8)
        finally:
            first.kill()

        def the_rest_and_the_kill() -> Iterator[Outgoing]:
            yield from itertools.islice(messages, CRASH_USERS // 4)
            order("kill")
            order("start")
            yield from messages

        def lost() -> set[str]:
            with closing(doomed.connect()) as link:
                given_up = DeadLetterQueue(link, contract).peek(CRASH_USERS)
            dead.update(delivery.properties.message_id for delivery, _ in given_up)
            return confirmed - store.handled() - dead

        with consuming(WorkerPoolConsumer(doomed, contract, pipeline)):
            confirmed |= publish_all(doomed, the_rest_and_the_kill())
            wait_until(lambda: not lost(), poll_s=0.2)
    (stored, _), handled = store.totals(), store.handled()
    store.close()
    return shown(
        f"{len(confirmed):,} confirmed = {stored:,} stored + {len(dead):,} dead letters",
        confirmed=len(confirmed), users_stored=stored, dead_letters=len(dead),
        lost=len(confirmed - handled - dead), repeated_without_effect=len(pipeline.repetitions),
    )  # fmt: skip


def demo_crash(broker: Any, prefix: str, home: Path) -> dict[str, int] | None:
    """9. Crash: a consumer killed in mid-message, then the broker under load.

    Prediction: what was confirmed is stored or a dead letter, to the message."""
    try:
        return (
            None if is_in_memory(broker, "queues that outlive a process") else crash(prefix, home)
        )
    except config.ServiceUnavailable as missing:
        note(str(missing).partition("\n")[0])
        return None


# ── Main ──

DEMOS = (
    demo_routing, demo_confirms, demo_consumers, demo_retry, demo_poison, demo_head_of_line,
    demo_pipeline, demo_outbox, demo_crash,
)  # fmt: skip


def open_rabbitmq(url: str, timeout_s: float) -> tuple[RabbitMQ, str]:
    """A broker and its name; ServiceUnavailable, or ConfigError where we are refused."""
    try:
        parameters = RabbitMQ(url).parameters()
        config.require_reachable("RabbitMQ", url, [(parameters.host, parameters.port)], timeout_s)
        parameters.socket_timeout = parameters.stack_timeout = timeout_s
        with closing(pika.BlockingConnection(parameters)) as connection:
            about = connection._impl.server_properties  # pika shows it nowhere else
    except connection_workflow.AMQPConnectorStackTimeout:
        reason = f"it accepts, and says nothing within {timeout_s:g} s"
        raise config.ServiceUnavailable("RabbitMQ", reason, url) from None
    except (*LOST, ValueError, SyntaxError, TypeError) as error:  # of options
        reason = config.redact(f"{url}: {type(error).__name__}: {error}")
        raise config.ConfigError(f"RABBITMQ_URL: {reason}") from error
    return RabbitMQ(url), f"{about['product']} {about['version']}"


def open_mongodb(uri: str, timeout_s: float) -> tuple[MongoClient[dict[str, Any]], str]:
    """A client and the server's name; as open_rabbitmq."""
    options: Any = {"serverSelectionTimeoutMS": timeout_s * 1000, "timeoutMS": MONGO_TIMEOUT_MS}
    try:
        client = MongoClient[dict[str, Any]](uri, **options)
        addresses = [] if "+srv:" in uri else parse_uri(uri)["nodelist"]
        config.require_reachable("MongoDB", uri, addresses, timeout_s)
        client.admin.command("listDatabases", nameOnly=True)
        return client, f"MongoDB {client.server_info()['version']}"
    except (PyMongoError, ValueError) as error:
        reason = config.redact(str(error).partition(", Timeout:")[0])
        raise config.ConfigError(f"MONGODB_URI: {config.redact(uri)}: {reason}") from error


@contextmanager
def open_resources(run: config.Run) -> Iterator[dict[str, object]]:
    """A broker, a store for users, a directory for the demos' files."""
    timeout_s, token = run.settings.connect_timeout_s, secrets.token_hex(4)
    broker: RabbitMQ | InMemoryBroker = InMemoryBroker()
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        url = run.url("RabbitMQ", "RABBITMQ_URL")
        broker, run.services["rabbitmq"] = open_rabbitmq(url, timeout_s)
    except config.ServiceUnavailable as error:
        run.fall_back("rabbitmq", error, "a broker in memory")
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="module8-")))
        store: MongoStore | SqliteStore = stack.enter_context(closing(SqliteStore(home / "users")))
        try:
            uri = run.url("MongoDB", "MONGODB_URI")
            client, run.services["mongodb"] = open_mongodb(uri, timeout_s)
            stack.enter_context(client)
            stack.callback(client.drop_database, f"module8_{token}")
            store = MongoStore(client[f"module8_{token}"])
        except config.ServiceUnavailable as error:
            run.fall_back("mongodb", error, "SQLite in place of MongoDB")
        prefix, users = f"module8-{token}.", run.scale
        yield {"broker": broker, "prefix": prefix, "store": store, "home": home, "users": users}


def main(argv: Sequence[str] | None = None) -> int:
    unit = "users of demo 7"
    return config.run_script(__doc__, DEMOS, open_resources, argv, scale=USERS, scale_unit=unit)


if __name__ == "__main__":
    raise SystemExit(main())
