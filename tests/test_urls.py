"""What becomes of the URLs that people write, for all four variables: load_settings says what is
wrong with their shape, the scripts what is wrong with their options, and neither shows a secret; or
they are read as their driver reads them. And what scripts then do with those that name several
hosts, sockets, and a server that is slow to refuse.
"""

from __future__ import annotations

import importlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pika
import pytest
import sqlalchemy as sa
from pymongo.uri_parser import parse_uri
from redis import ConnectionPool
from running import missing
from services import postgres_engine

import config
import servers

ENCODE = "percent-encoded"
PORT = "port is no number from 1 to 65535"
BRACKETS = "an IPv6 address belongs in brackets"
ONE_HOST = "it names several hosts, and its driver takes one"
LIST = "SQLAlchemy wants ?host=h1:5432&host=h2:5432&target_session_attrs=read-write"
FILE = "cannot read /no/such/file"
SECRET = "12345"  # digits: what a parser could take for a port

REFUSED: dict[str, dict[str, str]] = {
    "DATABASE_URL": {
        "postgresql://app:12345/ss@h/db": ENCODE,
        "postgresql://app:12345?ss@h/db": ENCODE,
        "postgresql://app:12345#ss@h/db": ENCODE,
        "postgresql://app:12345@ss@h/db": ENCODE,
        "postgresql://app:12345 ss@h/db": ENCODE,
        "postgresql://app:12345@127.0.0.1:/app": PORT,
        "postgresql://app:12345@h:99999/app": PORT,
        "postgresql://app:12345@h:-1/app": PORT,
        "postgresql://app:12345@h:port/app": PORT,
        "postgresql://app:12345@::1/app": BRACKETS,
        "postgresql://app:12345@::1:5432/app": BRACKETS,
        "postgresql://app:12345@h1:5432,h2:5432/app": LIST,
        "postgresql+psycopg2:/app": "expected postgresql+psycopg2://…",
        "postgresql+psycopg2:app:12345@h/app": "expected postgresql+psycopg2://…",
        "postgresql://": "expected postgresql+psycopg2://…",
        "PostgreSQL://app:12345@h/app": "expected postgresql+psycopg2://…",
        "postgresql://h/app?sslmode=verify-full&sslrootcert=/no/such/file": FILE,
        "postgresql://h/app?sslcert=%2Fno%2Fsuch%2Ffile": FILE,
        "postgresql://h/app?sslkey=/no/such/file": FILE,
        "postgresql://h/app?sslcrl=/no/such/file": FILE,
    },
    "MONGODB_URI": {
        "mongodb://foo:12345/@h": ENCODE,
        "mongodb://foo:12345?@h": ENCODE,
        "mongodb://foo:12345#@h": ENCODE,
        "mongodb://foo:12345@x@h": ENCODE,
        "mongodb://foo:12345 @h": ENCODE,
        "mongodb+srv://foo:12345/@h.example": ENCODE,
        "mongodb://foo:12345@h:/": PORT,
        "mongodb://foo:12345@h1:27017,h2:99999/": PORT,
        "mongodb://foo:12345@h:0/": PORT,
        "mongodb://foo:12345@::1/": BRACKETS,
        "mongodb://foo:12345@h1,::1:27017/": BRACKETS,
        "mongodb:h": "expected mongodb://… or mongodb+srv://…",
        "mongodb://": "expected mongodb://… or mongodb+srv://…",
        "mongodb://h/?tls=true&tlsCAFile=/no/such/file": FILE,
        "mongodb+srv://h.example/?tlsCertificateKeyFile=/no/such/file": FILE,
    },
    "REDIS_URL": {
        "redis://:12345#@h": ENCODE,
        "redis://:12345/@h": ENCODE,
        "redis://:12345?@h": ENCODE,
        "redis://:12345@x@h": ENCODE,
        "redis://:12345\t@h": ENCODE,
        "redis://:12345@h:99999/0": PORT,
        "redis://:12345@h:port/0": PORT,
        "redis://:12345@::1:6379/0": BRACKETS,
        "redis://:12345@h1,h2/0": ONE_HOST,
        "redis://:12345@h1:6379,h2:6379/0": ONE_HOST,
        "redis://:12,345@h:port/0": PORT,
        "redis:h": "expected redis://… or rediss://… or unix://…",
        "redis://": "expected redis://… or rediss://… or unix://…",
        "rediss://h/0?ssl_ca_certs=/no/such/file": FILE,
        "rediss://h/0?ssl_ca_path=/no/such/file": FILE,
        "rediss://h/0?ssl_certfile=/no/such/file": FILE,
        "rediss://h/0?ssl_keyfile=/no/such/file": FILE,
    },
    "RABBITMQ_URL": {
        "amqp://u:12345/@h/": ENCODE,
        "amqp://u:12345?@h/": ENCODE,
        "amqp://u:12345#@h/": ENCODE,
        "amqp://u:12345@x@h/": ENCODE,
        "amqp://u:12345\n@h/": ENCODE,
        "amqp://u:12345@h:99999/": PORT,
        "amqp://u:12345@h:port/": PORT,
        "amqp://u:12345@::1:5672/": BRACKETS,
        "amqp://u:12345@h1,h2/": ONE_HOST,
        "amqp://u:12345@h1:5672,h2:5672/": ONE_HOST,
        "amqp://u:12345@h:5672//": "virtual host ''; write %2F for the default one",
        "amqp://u:12345@h:5672/a/b": "virtual host 'a'; write %2F",
        "amqp:h": "expected amqp://… or amqps://…",
        "amqp://": "expected amqp://… or amqps://…",
        "amqps://h/?ssl_options={'cafile': '/no/such/file'}": FILE,
        'amqps://h/?ssl_options={"ca_certs":"/no/such/file"}': FILE,
        "amqps://h/?ssl_options=%7B%27certfile%27%3A+%27%2Fno%2Fsuch%2Ffile%27%7D": FILE,
        "amqps://h/?ssl_options={'keyfile':%20'/no/such/file','password':'12345'}": FILE,
    },
}


@pytest.mark.parametrize(
    ("variable", "url", "problem"),
    [(variable, *case) for variable, cases in REFUSED.items() for case in cases.items()],
)
def test_a_url_that_its_driver_would_misread_is_refused(
    variable: str, url: str, problem: str
) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.load_settings({variable: url}, None)
    assert str(caught.value).startswith(f"{variable}: ")
    assert problem in str(caught.value)
    assert SECRET not in str(caught.value)
    assert (ENCODE in str(caught.value)) is (problem == ENCODE)


NAMES = {
    "DATABASE_URL": "01_sqlalchemy_advanced",
    "MONGODB_URI": "02_mongodb_advanced",
    "REDIS_URL": "03_caching_strategies",
    "RABBITMQ_URL": "04_rabbitmq_messaging",
}


def script(variable: str) -> ModuleType:
    return importlib.import_module(NAMES[variable])


def opened(variable: str, url: str) -> object:
    """What the script of `variable` does first with its URL."""
    checked = getattr(config.load_settings({variable: url}, None), variable.lower())
    if variable == "DATABASE_URL":
        return script(variable).server_version(checked, 0.1)
    if variable == "MONGODB_URI":
        return script(variable).connect(checked, 0.1, script(variable).CommandLog())
    if variable == "REDIS_URL":
        return script(variable).open_redis(checked, 0.1)
    return script(variable).open_rabbitmq(checked, 0.1)


def opened_by_05(variable: str, url: str) -> object:
    """Which takes all four."""
    app = importlib.import_module("05_realworld_data_science")
    (name,) = (name for name, (its_own, *_) in app.SERVICES.items() if its_own == variable)
    settings = config.load_settings({variable: url, "CONNECT_TIMEOUT_S": "0.1"}, None)
    return app.opened(config.Run(settings, offline=False, require_services=True, scale=1), name)


OPTION = "is an option after the ? wrong?"


@pytest.mark.parametrize(
    ("variable", "url", "problem"),
    [
        ("DATABASE_URL", "postgresql://app:12345@h/app?host=h1:soon&host=h2:1", OPTION),
        # SQLAlchemy reads host "[":
        ("DATABASE_URL", "postgresql://h/app?host=[::1]:5432&host=h2:5432", OPTION),
        ("DATABASE_URL", "postgresql://h/app?host=h1:1&host=h2:2&port=12345", OPTION),
        ("MONGODB_URI", "mongodb://foo:12345%zz@h", "must be escaped"),
        ("MONGODB_URI", "mongodb://foo:12345@h/?replicaSet", "key=value"),
        ("REDIS_URL", "redis://:12345@h/0?socket_timeout=soon", "'socket_timeout'"),
        ("DATABASE_URL", "postgresql://app:12345@h/app?bogus=1", OPTION),
        ("DATABASE_URL", "postgresql://app:12345@h/app?port=99999", OPTION),
        ("REDIS_URL", "redis://:12345@h/0?port=99999", "no port"),
        ("REDIS_URL", "redis://:12345@h/0?port=soon", "malformed URL"),
        ("REDIS_URL", "redis://user:pa[ss@h", "malformed URL"),
        ("REDIS_URL", "unix://?db=1", "a socket begins with /"),
        ("REDIS_URL", "unix://:12345@run/redis.sock", "a socket begins with /"),  # or /redis.sock
        ("RABBITMQ_URL", "amqp://u:12345@h/%2F?heartbeat=abc", "heartbeat"),  # pika's ValueError
        ("RABBITMQ_URL", "amqp://u:12345@h/?socket_timeout=-1", "socket_timeout"),
        ("RABBITMQ_URL", "amqp://u:12345@h/?hartbeat=5", "hartbeat"),
        ("RABBITMQ_URL", "amqps://u:12345@h/?ssl_options={", "closed"),
        ("RABBITMQ_URL", "amqps://u:12345@h/?ssl_options=%7B'key':1}", "cafile, capath"),
        ("RABBITMQ_URL", "amqps://u:12345@h/?ssl_options=5", "'int'"),
        ("RABBITMQ_URL", "amqp://u:12345@h/?ssl_options={'password':'12345'}", "ssl_options"),
    ],
)
def test_what_only_its_driver_can_read_is_refused_by_the_script(
    variable: str, url: str, problem: str
) -> None:
    with pytest.raises(config.ConfigError) as caught:
        opened(variable, url)
    assert str(caught.value).startswith(f"{variable}: ")
    assert problem in str(caught.value)
    assert SECRET not in str(caught.value)
    with pytest.raises(config.ConfigError) as by_05:
        opened_by_05(variable, url)  # in words of its own; a host that is away, it names as such
    assert re.match(f"{variable}: |--require-services: \\w+ at .*: ", str(by_05.value))
    assert SECRET not in str(by_05.value).replace(f"&port={SECRET}", "")


def addresses(variable: str, url: str) -> list[tuple[str, int | None]]:
    """Where its driver will look for the server of `url`: what a script probes."""
    checked = getattr(config.load_settings({variable: url}, None), variable.lower())
    if variable == "DATABASE_URL":
        return list(script(variable).libpq_addresses(checked))
    if variable == "MONGODB_URI":
        return list(parse_uri(checked)["nodelist"])
    if variable == "REDIS_URL":
        return [script(variable).redis_address(script(variable).connect(checked))]
    parameters = script(variable).RabbitMQ(checked).parameters()
    return [(parameters.host, parameters.port)]


TAKEN: dict[str, dict[str, list[tuple[str, int | None]]]] = {
    "DATABASE_URL": {
        "postgresql://u:a%40b%2Fc@h/db": [("h", 5432)],
        "postgresql://u:p[q@h:1/db": [("h", 1)],
        "postgresql://u:a,b@h:65535/a,b": [("h", 65535)],
        "postgresql://u:p@[::1]:5433/db": [("::1", 5433)],
        "postgresql://h1,h2:5433/db": [("h1", 5433), ("h2", 5433)],
        "postgresql://h/db?user=me@tenant\r\n": [("h", 5432)],
        "postgresql://u@/db?host=h1:1&host=h2:2": [("h1", 1), ("h2", 2)],
        "postgresql://h/db?hostaddr=127.0.0.2": [("127.0.0.2", 5432)],
        "postgresql://u:p@%2Fvar%2Frun:5433/db": [("/var/run/.s.PGSQL.5433", None)],
        "postgresql://%2fvar%2frun/db?sslmode=disable": [("/var/run/.s.PGSQL.5432", None)],
        "postgresql:///db?host=/var/run": [("/var/run/.s.PGSQL.5432", None)],
        "postgresql:///db?host=/a&host=h:2": [("/a/.s.PGSQL.5432", None), ("h", 2)],
        "postgresql:///db?host=&port=1": [],
        "postgresql:///db": [],
        "postgresql://h/db?sslrootcert=system": [("h", 5432)],
    },
    "MONGODB_URI": {
        "mongodb://u:p@h/?ssl=true&appName=@acct@": [("h", 27017)],
        "mongodb://u:p@h1:1,h2/?replicaSet=rs0": [("h1", 1), ("h2", 27017)],
        "mongodb://[::1]:1/": [("::1", 1)],
        "mongodb://u:a,b@h1:1,[::1]:2,h3/": [("h1", 1), ("::1", 2), ("h3", 27017)],
        "mongodb://u:p@%2Ftmp%2Fmongodb-27017.sock/": [("/tmp/mongodb-27017.sock", None)],
    },
    "REDIS_URL": {
        "redis://h/0?username=me@corp": [("h", 6379)],
        "unix:///run/redis@1.sock": [("/run/redis@1.sock", None)],
        "redis://:p@h": [("h", 6379)],
        "redis:///0": [("localhost", 6379)],
        "rediss://[::1]:1/0": [("::1", 1)],
        "redis://:50%off@h": [("h", 6379)],  # what pymongo alone refuses
        "unix://u:p@/run/redis.sock?db=1": [("/run/redis.sock", None)],
    },
    "RABBITMQ_URL": {
        "amqp://u:p@h/%2F": [("h", 5672)],
        "amqps://h": [("h", 5671)],
        "amqp://[::1]:1/a%2Fb": [("::1", 1)],
    },
}


@pytest.mark.parametrize(
    ("variable", "url", "expected"),
    [(variable, *case) for variable, cases in TAKEN.items() for case in cases.items()],
)
def test_a_url_is_probed_where_its_driver_connects(
    variable: str,
    url: str,
    expected: list[tuple[str, int | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PGPORT", raising=False)
    assert addresses(variable, url) == expected


def test_a_port_that_only_libpq_knows_of_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "5433")
    assert addresses("DATABASE_URL", "postgresql://h/db") == [("h", 5433)]


def test_hosts_that_come_from_dns_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise AssertionError("DNS was asked")

    monkeypatch.setattr("dns.resolver.resolve", resolve)
    uri = "mongodb+srv://u:p@cluster.example/?w=majority"
    assert config.load_settings({"MONGODB_URI": uri}, None).mongodb_uri == uri


def test_a_plus_in_a_password_is_what_the_example_file_says() -> None:
    password = sa.make_url("postgresql+psycopg2://u:a+b@h/").password
    assert password == "a+b"
    assert ConnectionPool.from_url("redis://:a+b@h").connection_kwargs["password"] == "a+b"
    assert pika.URLParameters("amqp://u:a+b@h/").credentials.password == "a+b"
    assert parse_uri("mongodb://u:a+b@h/")["password"] == "a b"
    example = (Path(config.__file__).parent / ".env.example").read_text(encoding="utf-8")
    assert "MongoDB reads a + as a space: write %2B" in " ".join(example.replace("#", "").split())


# ── Script 01 with them ─────────────────────────────────────────────────────────────

SILENCE = "it accepts, and says nothing"


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Any]:
    directory = servers.RunDirectory()
    try:
        server = servers.Postgres(directory, servers.Postgres.find())
        server.start()
        yield server
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)
    finally:
        directory.close()


@pytest.fixture
def free_port() -> Iterator[int]:
    with closing(socket.socket()) as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def version_at(url: str, timeout_s: float = 2.0) -> str:
    checked = config.load_settings({"DATABASE_URL": url}, None).database_url
    version: str = script("DATABASE_URL").server_version(checked, timeout_s)
    return version


@contextmanager
def slow_link(port: int, delay_s: float) -> Iterator[int]:
    """The port of a proxy before `port` that holds back each packet for `delay_s`."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with closing(source), closing(sink):
            try:
                while packet := source.recv(65536):
                    time.sleep(delay_s)
                    sink.sendall(packet)
            except OSError:  # the other direction has ended
                return

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", port))
            for pair in ((client, upstream), (upstream, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_refusal_that_comes_late_is_a_refusal(own_postgres: servers.Server) -> None:
    with (
        slow_link(own_postgres.port, 0.3) as port,
        pytest.raises(config.ConfigError, match="FATAL:  password authentication failed"),
    ):
        version_at(f"postgresql://app:wrong@127.0.0.1:{port}/app")


def test_of_several_hosts_one_that_works_is_enough(
    own_postgres: servers.Server, free_port: int
) -> None:
    hosts = f"host=127.0.0.1:{free_port}&host=127.0.0.1:{own_postgres.port}"
    url = f"postgresql://app:{own_postgres.password}@/app?{hosts}&target_session_attrs=read-write"
    assert version_at(url) == own_postgres.installation.version
    with pytest.raises(config.ConfigError, match="FATAL:  password authentication failed"):
        version_at(f"postgresql://app:wrong@/app?{hosts}")


def test_several_hosts_of_which_none_listens_are_an_absence(free_port: int) -> None:
    hosts = f"host=127.0.0.1:{free_port}&host=127.0.0.1:{free_port}"
    with pytest.raises(config.ServiceUnavailable, match="is unavailable: Connection refused"):
        version_at(f"postgresql://app:x@/app?{hosts}&target_session_attrs=read-write")


def test_several_hosts_of_which_one_hangs_and_one_is_gone_are_an_absence(free_port: int) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        hosts = f"host=127.0.0.1:{silent.getsockname()[1]}&host=127.0.0.1:{free_port}"
        with pytest.raises(config.ServiceUnavailable, match=SILENCE):
            version_at(f"postgresql://app:x@/app?{hosts}", 0.5)


def test_a_socket_that_is_absent_dead_or_somebody_elses(tmp_path: Path) -> None:
    path = tmp_path / ".s.PGSQL.5432"
    encoded = str(tmp_path).replace("/", "%2F")
    both = (f"postgresql://app:x@{encoded}/app", f"postgresql://app:x@/app?host={tmp_path}")
    for url in both:
        with pytest.raises(config.ServiceUnavailable, match="No such file or directory"):
            version_at(url)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        for url in both:
            with pytest.raises(config.ServiceUnavailable, match="Connection refused"):
                version_at(url)
        server.listen()
        thread = threading.Thread(target=_hang_up, args=(server, 2))
        thread.start()
        with pytest.raises(config.ConfigError, match=r"DATABASE_URL: .*closed the connection"):
            version_at(both[1])
        thread.join()


def _hang_up(server: socket.socket, times: int) -> None:
    """On the probe, and on libpq."""
    for _ in range(times):
        client, _ = server.accept()
        with closing(client):
            client.recv(8)


def test_libpqs_own_default_is_asked_by_libpq(
    tmp_path: Path, own_postgres: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", str(tmp_path))
    with pytest.raises(config.ServiceUnavailable, match=f"socket .{tmp_path}.* No such file"):
        version_at("postgresql:///app")
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    url = f"postgresql://app:{own_postgres.password}@/app?port={own_postgres.port}"
    assert version_at(url) == own_postgres.installation.version


@pytest.mark.parametrize("options", ["sslmode=bogus", "sslmode=require"])
def test_an_option_that_does_not_fit_is_no_absence(
    own_postgres: servers.Server, options: str
) -> None:
    with pytest.raises(config.ConfigError, match=r"^DATABASE_URL: .* refuses: "):
        version_at(f"{own_postgres.url}?{options}")


@pytest.fixture
def standby(own_postgres: servers.Postgres) -> Iterator[Any]:
    """The same server as the standby of nobody: it recovers for ever, and answers meanwhile."""
    with postgres_engine(own_postgres.url).connect() as connection:
        data = Path(str(connection.scalar(sa.text("SHOW data_directory"))))
    own_postgres.stop()
    (data / "standby.signal").touch()
    (data / "standby.signal").chmod(0o644)
    own_postgres.start()
    yield own_postgres
    own_postgres.stop()
    (data / "standby.signal").unlink()
    own_postgres.start()


def test_a_standby_is_refused_by_name(standby: servers.Server, free_port: int) -> None:
    with pytest.raises(config.ConfigError, match=r"^DATABASE_URL: .* is a read-only standby"):
        version_at(standby.url)
    hosts = f"host=127.0.0.1:{standby.port}&host=127.0.0.1:{free_port}"
    login = f"postgresql://app:{standby.password}@/app"
    with pytest.raises(config.ConfigError, match="is a read-only standby"):
        version_at(f"{login}?{hosts}")
    with pytest.raises(config.ConfigError, match="session is read-only"):
        version_at(f"{login}?{hosts}&target_session_attrs=read-write")
