"""TLS against real servers whose certificate only a private authority vouches for: what is verified
works, and whatever is wrong on either side is a refusal, never an absence (exit code 2).

Each by its script, and by 05, which takes all four. The wheels' PostgreSQL and Valkey are built
without TLS: these two must be installed.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from running import missing
from services import mongo_client

import config
import servers

HOST = "127.0.0.1"  # whom the certificates name: MongoDB's member connects to itself by this
OTHER_NAME = "localhost"  # the same server by a name that they do not vouch for


class Encrypted(servers.Server):
    """A server with TLS; `write` puts its certificate and key into files for it."""

    certificate: trustme.LeafCert
    ca_file: Path

    def present(self, certificate: trustme.LeafCert) -> None:
        """Show this one from now on."""
        self.stop()
        self.certificate = certificate
        self.start()

    def write(self, home: Path) -> tuple[Path, Path]:
        """The certificate and its key, owned by whoever owns `home`, under whom the server runs."""
        leaf = self.certificate
        texts = {"tls-cert.pem": leaf.cert_chain_pems[0], "tls-key.pem": leaf.private_key_pem}
        for name, pem in texts.items():
            path = home / name
            path.touch(0o600)
            path.write_bytes(pem.bytes())
            os.chown(path, home.stat().st_uid, home.stat().st_gid)
        return home / "tls-cert.pem", home / "tls-key.pem"


class Postgres(Encrypted, servers.Postgres):
    def _command(self) -> list[str]:
        command = super()._command()
        data = self.home / command[command.index("-D") + 1]
        certificate, key = self.write(data)
        rules = data / "tls_hba.conf"
        rules.write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        settings = {
            "ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key,
            "ssl_ca_file": data / "tls-ca.pem", "hba_file": rules,
        }  # fmt: skip
        (data / "tls-ca.pem").write_bytes(self.ca_file.read_bytes())
        (data / "tls-ca.pem").chmod(0o644)
        rules.chmod(0o644)
        return [*command, *(w for name, v in settings.items() for w in ("-c", f"{name}={v}"))]


class Mongo(Encrypted, servers.Mongo):
    """It takes plain connections, too, until `start` has made its user by one."""

    @property
    def url(self) -> str:
        return f"{super().url}&tls=true&tlsInsecure=true"

    def _command(self) -> list[str]:
        return [
            *super()._command(), "--tlsMode", "preferTLS",
            "--tlsCertificateKeyFile", str(self._both()), "--tlsCAFile", str(self.ca_file),
            "--tlsAllowConnectionsWithoutCertificates",
        ]  # fmt: skip

    def _both(self) -> Path:
        certificate, key = self.write(self.home)
        both = key.with_name("tls.pem")
        both.touch(0o600)
        both.write_bytes(key.read_bytes() + certificate.read_bytes())
        return both

    def start(self) -> None:
        super().start()
        with mongo_client(self.url) as client:
            client.admin.command("setParameter", 1, tlsMode="requireTLS")

    def present(self, certificate: trustme.LeafCert) -> None:
        self.certificate = certificate
        self._both()
        with mongo_client(self.url) as client:
            client.admin.command("rotateCertificates", 1)


class Redis(Encrypted, servers.Redis):
    @property
    def url(self) -> str:
        plain = super().url
        return f"rediss{plain.removeprefix('redis')}?ssl_cert_reqs=none"

    def _command(self) -> list[str]:
        command = super()._command()
        certificate, key = self.write(self.home)
        with Path(command[1]).open("a") as settings:
            settings.write(
                f"port 0\ntls-port {self.port}\ntls-cert-file {certificate}\n"
                f"tls-key-file {key}\ntls-ca-cert-file {self.ca_file}\ntls-auth-clients optional\n"
            )
        return command


class RabbitMQ(Encrypted, servers.RabbitMQ):
    """Plain at `port`, by which servers.py knows it, and with TLS at `tls_port`."""

    tls_port = 0

    def _command(self) -> list[str]:
        command = super()._command()
        certificate, key = self.write(self.home)
        if not self.tls_port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.tls_port = free.getsockname()[1]
        with (self.home / "rabbitmq.conf").open("a") as settings:
            settings.write(
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
                f"ssl_options.certfile = {certificate}\nssl_options.keyfile = {key}\n"
                f"ssl_options.cacertfile = {self.ca_file}\nssl_options.verify = verify_peer\n"
                "ssl_options.fail_if_no_peer_cert = false\n"
            )
        return command

    def _log_in(self) -> None:
        super()._log_in()
        socket.create_connection((HOST, self.tls_port), 1).close()  # it is the last to listen


# ── What each script does with such a URL ───────────────────────────────────────────


def by_script(name: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(name).main
    return main


@dataclass(frozen=True)
class Service:
    """How a server is reached, and who reaches it."""

    kind: type[Encrypted]
    main: Callable[[], Callable[[list[str]], int]]
    online: str  # how a run on a server says so, after On
    args: tuple[str, ...]  # demos that make each kind of connection of the script
    verified: str  # its URL with TLS, checked against {ca}
    plain: str
    fixture: str  # of the URL of a server without TLS; empty where `kind` has a plain port, too


SERVICES = {
    "DATABASE_URL": Service(
        Postgres,
        lambda: by_script("01_sqlalchemy_advanced"),
        "PostgreSQL ",
        ("--only", "repository", "--only", "pool", "--scale", "5"),
        "postgresql://app:{password}@{host}:{port}/app?sslmode=verify-full&sslrootcert={ca}",
        "postgresql://app:{password}@{host}:{port}/app?sslmode=disable",
        "postgres_url",
    ),
    "MONGODB_URI": Service(
        Mongo,
        lambda: by_script("02_mongodb_advanced"),
        "MongoDB ",
        ("--only", "validation", "--only", "async", "--scale", "5"),
        "mongodb://app:{password}@{host}:{port}/?authSource=admin&directConnection=true"
        "&tls=true&tlsCAFile={ca}",
        "mongodb://app:{password}@{host}:{port}/?authSource=admin&directConnection=true",
        "mongo_uri",
    ),
    "REDIS_URL": Service(
        Redis,
        lambda: by_script("03_caching_strategies"),
        "Redis ",
        ("--only", "tiers", "--only", "invalidation", "--scale", "100"),
        "rediss://:{password}@{host}:{port}/0?ssl_ca_certs={ca}",
        "redis://:{password}@{host}:{port}/0",
        "redis_url",
    ),
    "RABBITMQ_URL": Service(
        RabbitMQ,
        lambda: by_script("04_rabbitmq_messaging"),
        "RabbitMQ ",
        ("--only", "routing", "--only", "poison"),
        "amqps://app:{password}@{host}:{port}/%2F?ssl_options={{'cafile':'{ca}'}}",
        "amqp://app:{password}@{host}:{port}/%2F",
        "",
    ),
}
every_service = pytest.mark.parametrize("variable", SERVICES)
BY_05 = ("--only", "rfm", "--only", "live", "--scale", "300")


@dataclass(frozen=True)
class Authority:
    """The private one, another, and what clients read of them."""

    ca: trustme.CA
    directory: Path

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.pem"

    def leaf(self, not_before: datetime, not_after: datetime) -> trustme.LeafCert:
        return self.ca.issue_cert(HOST, not_before=not_before, not_after=not_after)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    directory = tmp_path_factory.mktemp("authority")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    other.cert_pem.write_to_path(str(directory / "other.pem"))
    return Authority(ca, directory)


@pytest.fixture(scope="module")
def started(authority: Authority) -> Iterator[Callable[[str], Any]]:
    """The server with TLS of a variable, started when it is first asked for."""
    directory = servers.RunDirectory()
    running: dict[str, Any] = {}
    without_tls: dict[str, str] = {}  # why, for the next test

    def start(variable: str) -> Any:
        if variable not in running:
            kind = SERVICES[variable].kind
            if variable in without_tls:
                missing(without_tls[variable])
            try:
                with pytest.MonkeyPatch.context() as environment:
                    environment.setenv("SERVERS_IGNORE_INSTALLED", "0")
                    server = kind(directory, kind.find())
                if kind in (Postgres, Redis) and server.installation.origin.startswith("wheel"):
                    without_tls[variable] = f"{server.installation.origin} is built without TLS"
                    missing(without_tls[variable])
                server.certificate = authority.ca.issue_cert(HOST)
                server.ca_file = authority.ca_file
                server.start()
            except servers.ServerUnavailable as unavailable:
                missing(unavailable)
            running[variable] = server
        return running[variable]

    yield start
    directory.close()


@pytest.fixture
def url(started: Callable[[str], Any], authority: Authority) -> Callable[..., str]:
    def make(variable: str, form: str = "", **parts: object) -> str:
        """The verified URL of the server with TLS, or another `form`; `parts` replace its own."""
        server = started(variable)
        given = {
            "password": server.password,
            "host": HOST,
            "port": getattr(server, "tls_port", server.port),
            "ca": authority.ca_file,
        }
        return (form or SERVICES[variable].verified).format(**{**given, **parts})

    return make


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(params=["own", pytest.param("05", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[str, str], Ended]]:
    """Run the script of a variable, or 05, on a URL, in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(variable: str, url: str) -> Ended:
        monkeypatch.setenv(variable, url)
        service = SERVICES[variable]
        main, args = service.main, service.args
        if request.param == "05":
            main, args = lambda: by_script("05_realworld_data_science"), BY_05
        capsys.readouterr()
        ended = Ended(main()(list(args)), *capsys.readouterr())
        assert url.partition("@")[0].rpartition(":")[2] not in ended.out + ended.err
        return ended

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


# ── The tests ───────────────────────────────────────────────────────────────────────


def assert_online(ended: Ended, variable: str) -> None:
    assert ended.code == 0, ended.out + ended.err
    online = f"^On (DuckDB .*)?{SERVICES[variable].online}"
    assert re.search(online, ended.out, re.MULTILINE), ended.out
    assert "none failed" in ended.out


def assert_refused(ended: Ended, variable: str, words: str) -> None:
    assert ended.code == 2, ended.out + ended.err
    assert re.sub(r"\w+ is unavailable: \w+ is not set\.\n.+\n", "", ended.out) == ""
    assert variable in ended.err
    assert re.search(words, ended.err), ended.err


Url = Callable[..., str]
RunUrl = Callable[[str, str], Ended]


@every_service
def test_what_is_verified_works(variable: str, url: Url, run: RunUrl) -> None:
    assert_online(run(variable, url(variable)), variable)


@pytest.mark.parametrize("option", ["cafile", "ca_certs"])
@pytest.mark.parametrize("written", [str, quote], ids=["raw", "percent-encoded"])
def test_both_names_and_ways_to_write_rabbitmqs_options(
    written: Callable[[str], str], option: str, url: Url, run: RunUrl, authority: Authority
) -> None:
    plain, _, options = url("RABBITMQ_URL").partition("?ssl_options=")
    given = f"{plain}?ssl_options={written(options.replace('cafile', option))}"
    assert_online(run("RABBITMQ_URL", given), "RABBITMQ_URL")


UNVERIFIED = r"certificate verify failed|does not match host name"


@every_service
def test_a_certificate_of_another_authority(
    variable: str, url: Url, run: RunUrl, authority: Authority
) -> None:
    wrong = url(variable, ca=authority.directory / "other.pem")
    assert_refused(run(variable, wrong), variable, UNVERIFIED)


@every_service
def test_a_certificate_for_another_host(variable: str, url: Url, run: RunUrl) -> None:
    assert_refused(run(variable, url(variable, host=OTHER_NAME)), variable, UNVERIFIED)


@pytest.mark.slow
@every_service
def test_a_certificate_that_has_expired(
    variable: str, url: Url, run: RunUrl, started: Callable[[str], Any], authority: Authority
) -> None:
    server, good = started(variable), started(variable).certificate
    now = datetime.now(UTC)
    # mongod takes no certificate that has expired already.
    ends = now + timedelta(seconds=3) if variable == "MONGODB_URI" else now - timedelta(days=1)
    server.present(authority.leaf(now - timedelta(days=9), ends))
    try:
        while datetime.now(UTC) < ends + timedelta(seconds=1):
            time.sleep(0.05)
        assert_refused(run(variable, url(variable)), variable, UNVERIFIED)
    finally:
        server.present(good)


PLAIN = r"no encryption|connection closed|reset by peer|IncompatibleProtocol"


@every_service
def test_a_plain_client_of_a_server_with_tls(variable: str, url: Url, run: RunUrl) -> None:
    assert_refused(run(variable, url(variable, SERVICES[variable].plain)), variable, PLAIN)


NO_TLS = (  # 05 says it in its drivers' words
    r"does not support SSL|SSL handshake failed|which this Redis seems to lack|SSLError"
    r"|WRONG_VERSION_NUMBER|Timeout connecting to server"
)


@every_service
def test_a_client_with_tls_of_a_plain_server(
    variable: str,
    url: Url,
    run: RunUrl,
    started: Callable[[str], Any],
    request: pytest.FixtureRequest,
) -> None:
    fixture = SERVICES[variable].fixture
    plain = request.getfixturevalue(fixture) if fixture else started(variable).url
    ((host, port),) = re.findall(r"([\w.]+):(\d+)/", plain)
    ended = run(variable, url(variable, host=host, port=port))
    assert_refused(ended, variable, NO_TLS)


@every_service
def test_a_missing_file_is_a_refusal_also_where_nobody_listens(
    variable: str, url: Url, run: RunUrl
) -> None:
    ended = run(variable, url(variable, ca="/no/such/file", port=1))
    assert_refused(ended, variable, "cannot read /no/such/file")


@every_service
def test_a_file_that_is_no_certificate_is_a_refusal(
    variable: str, url: Url, run: RunUrl, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("nothing\n")
    ended = run(variable, url(variable, ca=tmp_path / "ca.pem"))
    assert_refused(ended, variable, "(?i)no certificate or crl found")


def test_what_the_example_file_says_of_a_hosted_postgresql(
    url: Url, run: RunUrl, authority: Authority
) -> None:
    example = (Path(config.__file__).parent / ".env.example").read_text(encoding="utf-8")
    (line,) = re.findall(r"^#DATABASE_URL=(.+)$", example, flags=re.MULTILINE)
    parts = {"USER:PASSWORD": "app:{password}", "HOST:5432": "{host}:{port}", "/DATABASE": "/app"}
    for theirs, ours in parts.items():
        assert theirs in line
        line = line.replace(theirs, ours)
    system = "/etc/ssl/certs/ca-certificates.crt"
    assert line.endswith(f"sslrootcert={system}")
    # The system's authorities do not vouch for ours: it is their file that is read.
    ended = run("DATABASE_URL", url("DATABASE_URL", line))
    assert_refused(ended, "DATABASE_URL", f"certificate verify failed|cannot read {system}")
    verified = line.replace(system, str(authority.ca_file))
    assert_online(run("DATABASE_URL", url("DATABASE_URL", verified)), "DATABASE_URL")
