"""Where the tests' servers come from: the ladder, decided here and nowhere else.

    TEST_DATABASE_URL, TEST_MONGODB_URI, TEST_REDIS_URL, TEST_RABBITMQ_URL
        a server given explicitly: where it does not answer the test fails, and nothing else is
        tried. Each test works in a namespace of its own; still, give none that holds real data
    Docker     through testcontainers, with the images of docker-compose.yml
    local      servers.py, with what is installed on this machine
    otherwise  the test is skipped, with each rung's reason

    SERVICES_FROM=docker or local   this rung alone; a missing server is a failure, not a skip
    REQUIRE_SERVICES=1              any missing server is a failure

DATABASE_URL and its siblings are never read: they may hold a user's data. The tests set them to
NOT_CONFIGURED, in their own process and in those of the scripts that they run.

Glossary: *rung*, a source of servers; *probe*, a login that shows a server ready to work.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import docker
import pika
import pymongo
import redis
import sqlalchemy
from docker.errors import DockerException, ImageNotFound
from docker.utils import parse_repository_tag
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError
from pymongo.errors import PyMongoError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.exc import SQLAlchemyError
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.exceptions import (
    ContainerConnectException,
    ContainerIsNotRunning,
    ContainerStartException,
)

import config
import servers

ROOT = Path(__file__).resolve().parent.parent
PROBE_TIMEOUT_S = 3  # a login, over loopback or to a container
COMMAND_TIMEOUT_S = 30  # a command after it, such as dropping a database
START_TIMEOUT_S = 90.0  # a container; RabbitMQ, the slowest, took 9 s on two busy cores
DAEMON_TIMEOUT_S = 10  # an answer of the Docker daemon, also when it asks the registry
CONTAINER_TIMEOUT_S = 60  # making or removing a container on a slow disk
PULL_STALL_TIMEOUT_S = 60  # between two lines of progress, while a layer is unpacked
PULL_TIMEOUT_S = 600.0  # an image; the largest, MongoDB's, is about 300 MB
POLL_S = 0.2
RUNGS = ("docker", "local")
USER = "tester"  # of the servers in containers; each password is made up at the start


class Unavailable(Exception):
    """A rung cannot give a server; the message says why."""


class Missing(Exception):
    """No server for a test. `is_failure` tells a failure from a skip."""

    def __init__(self, message: str, is_failure: bool) -> None:
        super().__init__(message)
        self.is_failure = is_failure


# ── 1. The four services ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Image:
    """How to run a service in a container. `{user}` and `{password}` are filled in."""

    name: str
    port: int
    url: str  # with {address}, the host and port at which the container is reached
    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    wrapper: str = ""  # a shell script that ends in running the image's own entrypoint


@dataclass(frozen=True)
class Service:
    """A service as servers.py and docker-compose.yml call it, and how to see that it works.

    `probe(url)` raises one of PROBE_ERRORS unless a client can log in and work.
    """

    name: str
    variable: str  # the scripts' variable; the tests read TEST_<variable>
    probe: Callable[[str], None]
    image: Image
    prepare: Callable[[str], None] | None = None  # once, when a container takes logins


PROBE_ERRORS = (
    SQLAlchemyError,
    PyMongoError,
    redis.RedisError,
    AMQPError,
    AMQPConnectorException,  # pika's of a timeout; no AMQPError
    OSError,
    ValueError,  # of a malformed URL
)


def mongo_client(uri: str) -> pymongo.MongoClient[dict[str, object]]:
    return pymongo.MongoClient(
        uri,
        serverSelectionTimeoutMS=PROBE_TIMEOUT_S * 1000,
        socketTimeoutMS=COMMAND_TIMEOUT_S * 1000,
        tz_aware=True,
    )


def redis_client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=PROBE_TIMEOUT_S,
        socket_timeout=PROBE_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def postgres_engine(url: str) -> sqlalchemy.Engine:
    """Each statement in a transaction of its own: CREATE DATABASE runs in none other."""
    return sqlalchemy.create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        poolclass=sqlalchemy.NullPool,
        connect_args={
            "connect_timeout": PROBE_TIMEOUT_S,
            "options": f"-c statement_timeout={COMMAND_TIMEOUT_S}s",
        },
    )


def _probe_postgres(url: str) -> None:
    with postgres_engine(url).connect():
        pass


def _probe_mongo(uri: str) -> None:
    with mongo_client(uri) as client:
        client.list_database_names()  # unlike hello, refused without a login
        hello = client.admin.command("hello")
        if not hello["isWritablePrimary"]:
            raise PyMongoError("this member is no primary")


def _initiate_replica_set(uri: str) -> None:
    """One member that calls itself localhost; the URI's directConnection ignores that name."""
    members = [{"_id": 0, "host": "localhost:27017"}]
    with mongo_client(uri) as client:
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})


def _probe_redis(url: str) -> None:
    with redis_client(url) as client:
        client.ping()


def _probe_rabbitmq(url: str) -> None:
    parameters = pika.URLParameters(url)
    parameters.connection_attempts = 1
    parameters.socket_timeout = PROBE_TIMEOUT_S
    parameters.stack_timeout = PROBE_TIMEOUT_S
    parameters.blocked_connection_timeout = PROBE_TIMEOUT_S
    pika.BlockingConnection(parameters).close()


POSTGRES = Service(
    "postgres",
    "DATABASE_URL",
    _probe_postgres,
    Image(
        "postgres:18",
        5432,
        "postgresql+psycopg2://{user}:{password}@{address}/{user}",
        {"POSTGRES_USER": "{user}", "POSTGRES_PASSWORD": "{password}"},
    ),
)
MONGO = Service(
    "mongo",
    "MONGODB_URI",
    _probe_mongo,
    Image(
        "mongo:8.0",
        27017,
        "mongodb://{user}:{password}@{address}/?authSource=admin&directConnection=true",
        {"MONGO_INITDB_ROOT_USERNAME": "{user}", "MONGO_INITDB_ROOT_PASSWORD": "{password}"},
        ("mongod", "--replSet", "rs0", "--keyFile", "/data/configdb/keyfile"),
        # A replica set with authentication takes a key file; alone in its set, any will do.
        "head -c 512 /dev/urandom | base64 -w 0 >/data/configdb/keyfile"
        " && chmod 400 /data/configdb/keyfile && chown mongodb /data/configdb/keyfile"
        ' && exec docker-entrypoint.sh "$@"',
    ),
    prepare=_initiate_replica_set,
)
REDIS = Service(
    "redis",
    "REDIS_URL",
    _probe_redis,
    Image(
        "redis:8",
        6379,
        "redis://:{password}@{address}/0",
        command=("redis-server", "--requirepass", "{password}"),
    ),
)
RABBITMQ = Service(
    "rabbitmq",
    "RABBITMQ_URL",
    _probe_rabbitmq,
    Image(
        "rabbitmq:4-management",
        5672,
        "amqp://{user}:{password}@{address}/%2F",
        {"RABBITMQ_DEFAULT_USER": "{user}", "RABBITMQ_DEFAULT_PASS": "{password}"},
    ),
)
SERVICES = {service.name: service for service in (POSTGRES, MONGO, REDIS, RABBITMQ)}

# ── 2. The rungs: each yields a URL or raises Unavailable ───────────────────────────


def _one_line(error: BaseException) -> str:
    """Why, on one line and without secrets: a driver's error may quote its URL."""
    return config.redact(" ".join(str(error).split())[:300]) or type(error).__name__


def _explicit(service: Service, url: str) -> str:
    try:
        settings = config.load_settings({service.variable: url}, path=None)
        checked: str = getattr(settings, service.variable.lower())
        service.probe(checked)
    except (config.ConfigError, *PROBE_ERRORS) as error:
        raise Unavailable(f"{config.redact(url)}: {_one_line(error)}") from error
    return checked


@contextlib.contextmanager
def _local(service: Service) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(servers.running(service.name))
        except servers.ServerUnavailable as error:
            raise Unavailable(f"{error.reason}; {error.remedy}") from error
        yield started[service.name].url


class Docker:
    """Containers of the daemon that testcontainers finds."""

    _ERRORS = (
        DockerException,
        OSError,  # requests' errors, too
        ContainerConnectException,
        ContainerIsNotRunning,
        ContainerStartException,
    )

    def __init__(self) -> None:
        self._no_daemon = ""  # each is a reason, asked for once: a daemon that hangs for one
        self._no_registry = ""  # service would hang for the next

    @contextlib.contextmanager
    def running(self, service: Service) -> Iterator[str]:
        with contextlib.ExitStack() as stack:
            try:
                url = self._start(service, stack)
            except self._ERRORS as error:
                raise Unavailable(_one_line(error)) from error
            yield url

    def _start(self, service: Service, stack: contextlib.ExitStack) -> str:
        image = service.image
        self._provide(image.name)
        self._arrange_cleanup()
        names = {"user": USER, "password": secrets.token_hex(16)}
        container = stack.enter_context(_container(image, names))
        address = container.get_container_host_ip(), container.get_exposed_port(image.port)
        url = image.url.format(address="{}:{}".format(*address), **names)
        deadline = time.monotonic() + START_TIMEOUT_S
        if service.prepare:
            _retry(service.prepare, url, deadline)
        _retry(service.probe, url, deadline)
        return url

    def _arrange_cleanup(self) -> None:
        """Ryuk removes containers if this process is killed; without it, only the ladder does."""
        if not testcontainers_config.ryuk_disabled:
            try:
                self._provide(testcontainers_config.ryuk_image)
            except Unavailable:
                testcontainers_config.ryuk_disabled = True

    def _provide(self, image: str) -> None:
        """Have `image` on the daemon, pulled if need be, or raise Unavailable in bounded time."""
        image = testcontainers_config.hub_image_name_prefix + image  # of a mirror
        with contextlib.closing(self._daemon(DAEMON_TIMEOUT_S)) as daemon:
            try:
                daemon.images.get(image)
                return
            except ImageNotFound:
                pass
            try:
                if not self._no_registry:
                    daemon.images.get_registry_data(image)  # soon answered, which a pull is not
            except (DockerException, OSError) as error:
                self._no_registry = _one_line(error)
        if self._no_registry:
            raise Unavailable(f"{image} cannot be pulled: {self._no_registry}")
        self._pull(image)

    def _pull(self, image: str) -> None:
        repository, tag = parse_repository_tag(image)
        deadline = time.monotonic() + PULL_TIMEOUT_S
        with contextlib.closing(self._daemon(PULL_STALL_TIMEOUT_S)) as daemon:
            for line in daemon.api.pull(repository, tag=tag, stream=True, decode=True):
                if "error" in line:
                    raise Unavailable(f"{image} cannot be pulled: {line['error']}")
                if time.monotonic() > deadline:
                    raise Unavailable(f"{image} not pulled in {PULL_TIMEOUT_S:g} s")

    def _daemon(self, timeout_s: int) -> docker.DockerClient:
        if self._no_daemon:
            raise Unavailable(self._no_daemon)
        try:
            daemon = DockerClient(timeout=timeout_s).client
            daemon.ping()
        except (DockerException, OSError) as error:
            self._no_daemon = f"no daemon: {_one_line(error)}"
            raise Unavailable(self._no_daemon) from error
        return daemon


def _container(image: Image, names: Mapping[str, str]) -> DockerContainer:
    container = DockerContainer(image.name, docker_client_kw={"timeout": CONTAINER_TIMEOUT_S})
    container.with_exposed_ports(image.port)
    container.with_envs(**{key: value.format(**names) for key, value in image.environment.items()})
    container.with_command([word.format(**names) for word in image.command])
    if image.wrapper:
        container.with_kwargs(entrypoint=["bash", "-c", image.wrapper, "bash"])
    return container


def _retry(step: Callable[[str], None], url: str, deadline: float) -> None:
    """Repeat `step(url)` until it succeeds; raises Unavailable with its last error."""
    while True:
        try:
            return step(url)
        except PROBE_ERRORS as error:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"not ready in {START_TIMEOUT_S:g} s: {_one_line(error)}"
                ) from error
        time.sleep(POLL_S)


# ── 3. The ladder ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Served:
    url: str
    source: str  # explicit, docker or local


def is_required(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a missing server is a failure."""
    return environ.get("REQUIRE_SERVICES", "") not in ("", "0")


class Ladder:
    """Gives each service's URL, from a server that it starts when first asked and keeps.

    `environ` is read once, here. Raises ValueError where SERVICES_FROM names no rung.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._given = {name: environ.get(f"TEST_{s.variable}") for name, s in SERVICES.items()}
        self._asked_for = environ.get("SERVICES_FROM", "")
        if self._asked_for not in ("", *RUNGS):
            raise ValueError(f"SERVICES_FROM={self._asked_for}: expected {' or '.join(RUNGS)}")
        self._required = is_required(environ)
        self._rungs: dict[str, Callable[[Service], AbstractContextManager[str]]] = {
            "docker": Docker().running,
            "local": _local,
        }
        self._outcomes: dict[str, Served | Missing] = {}
        self._started = contextlib.ExitStack()

    def url(self, name: str) -> str:
        """The URL of service `name`; raises Missing."""
        if name not in self._outcomes:
            self._outcomes[name] = self._climb(SERVICES[name])
        outcome = self._outcomes[name]
        if isinstance(outcome, Missing):
            raise outcome
        return outcome.url

    def _climb(self, service: Service) -> Served | Missing:
        if explicit := self._given[service.name]:
            try:
                return Served(_explicit(service, explicit), "explicit")
            except Unavailable as error:
                return Missing(f"TEST_{service.variable}: {error}", is_failure=True)
        reasons = [] if self._asked_for else [f"TEST_{service.variable} is not set"]
        for rung in [self._asked_for] if self._asked_for else RUNGS:
            try:
                return Served(self._started.enter_context(self._rungs[rung](service)), rung)
            except Unavailable as error:
                reasons.append(f"{rung}: {error}")
        return Missing(" | ".join(reasons), is_failure=bool(self._asked_for) or self._required)

    def told(self) -> dict[str, str]:
        """Which source served each service, in words; nothing of what no test asked for."""
        return {
            name: outcome.source
            if isinstance(outcome, Served)
            else f"absent ({' '.join(str(outcome).split())})"
            for name, outcome in self._outcomes.items()
        }

    def close(self) -> None:
        """Stop every server that was started."""
        self._started.close()


def summary(told: Sequence[Mapping[str, str]]) -> str:
    """Which source served each service, on one line; `told` by one ladder or several."""
    sources = {name: {one[name] for one in told if name in one} for name in SERVICES}
    return "services: " + " ".join(
        f"{name}={' and '.join(sorted(words)) or 'unused'}" for name, words in sources.items()
    )


# ── 4. The scripts ──────────────────────────────────────────────────────────────────

NOT_CONFIGURED = dict.fromkeys(config.SCHEMES, "")  # set, so that no .env file can fill them in


def load_script(name: str) -> ModuleType:
    """Import a script, such as `01_sqlalchemy_advanced`, whose name no import statement takes."""
    return importlib.import_module(name)
