"""What the tests of script 04 share: its consumers, a proxy that cuts lines, a process to kill."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from services import load_script

mq = load_script("04_rabbitmq_messaging")

KINDS: dict[str, Any] = {
    "pool": mq.WorkerPoolConsumer, "batch": mq.BatchConsumer, "async": mq.AsyncConsumer,
}  # fmt: skip
END_S = 30.0  # for what takes a second or two


class Work(NamedTuple):
    """A broker, and the contract of a work queue on it."""

    broker: Any
    contract: Any
    topology: Any = None

    def consumer(self, kind: str, handler: Callable[[Any], object], **options: Any) -> Any:
        """Of a handler that does not block, or is a coroutine function."""

        async def awaiting(delivery: Any) -> None:
            handler(delivery)

        is_right = kind != "async" or asyncio.iscoroutinefunction(handler)
        right = handler if is_right else awaiting
        return KINDS[kind](self.broker, self.contract, right, **options)

    def put(self, *numbers: int) -> None:
        messages = (outgoing(self.contract.queue, n) for n in numbers)
        assert len(mq.publish_all(self.broker, messages)) == len(numbers)

    def left(self, queue: str = "queue") -> list[int]:
        """The numbers in a queue that nobody consumes, which is then empty."""
        with closing(self.broker.connect()) as connection:
            found = mq.take_all(connection.channel(), getattr(self.contract, queue))
            return [message.payload["n"] for message in found]

    def ready(self, queue: str = "queue") -> int:
        """How many messages of it nobody holds."""
        with closing(self.broker.connect()) as connection:
            name = getattr(self.contract, queue)
            return int(connection.channel().queue_declare(name, passive=True).method.message_count)


class Running:
    """A consumer in a thread; `error` is what ended its run(): nothing, where it is used by `with`,
    which stops it."""

    def __init__(self, consumer: Any) -> None:
        self.consumer = consumer
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.consumer.run()
        except BaseException as error:  # whatever it is: the test asserts what
            self.error = error

    def joined(self) -> BaseException | None:
        self._thread.join(END_S)
        assert not self._thread.is_alive(), "run() did not end"
        return self.error

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.stop()
        assert self.joined() is None


def outgoing(key: str, n: int = 0, exchange: str = "") -> Any:
    """A message that carries a number."""
    return mq.Outgoing.of(mq.Message("test", {"n": n}), key, exchange)


def number(delivery: Any) -> int:
    return int(mq.Message.decode(delivery.body).payload["n"])


class Proxy:
    """Before a port. `cut()` ends each connection, as a router does that forgets them; while it is
    `silent`, it accepts and says nothing."""

    def __init__(self, port: int) -> None:
        self.silent, self.accepted = False, 0
        self._upstream = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                self.accepted += 1
                if not self.silent:
                    server = socket.create_connection(("127.0.0.1", self._upstream))
                    self._open.append(server)
                    threading.Thread(target=self._pump, args=(client, server), daemon=True).start()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, suppress(OSError, ValueError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    if not (data := source.recv(65536)):
                        return
                    (server if source is client else client).sendall(data)

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def work_in_a_process(kind: str, url: str, contract: Any, path: str, wait_s: float) -> None:
    """Consume until SIGTERM, ten at most in hand; note in a file what is begun and done."""

    def note(mark: str, delivery: Any) -> None:
        with Path(path).open("a") as file:
            file.write(f"{mark} {number(delivery)}\n")

    def handler(delivery: Any) -> None:
        note("begun", delivery)
        time.sleep(wait_s)
        note("done", delivery)

    async def awaiting(delivery: Any) -> None:
        note("begun", delivery)
        await asyncio.sleep(wait_s)
        note("done", delivery)

    chosen: Any = awaiting if kind == "async" else handler
    consumer = Work(mq.RabbitMQ(url), contract).consumer(kind, chosen, prefetch=10)
    signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
    consumer.run()


def noted(path: Path, mark: str) -> list[int]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(f"{mark} ")]
