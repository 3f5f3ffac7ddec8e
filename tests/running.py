"""Scripts as a user runs them, for test_0N_cli.py and its like: a process, its exit code, its two
streams, and what it leaves.

Each run gets an empty directory to work in, a TMPDIR of its own that must be empty afterwards, and
an environment in which no server is configured but those that the test names.

PYTEST_DONT_REWRITE: tests import its helpers before pytest could rewrite its assertions.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NoReturn, Protocol

import pytest

import config

SCRIPT_TIMEOUT_S = 60.0  # a whole script; one that hangs must not hold up the suite
END_TIMEOUT_S = 120.0  # a whole run takes 10 to 30 s; four at once on a busy machine, longer
SECRET = "s3cr3t-horse"
START = "To start one: docker compose up -d --wait, or python servers.py run"  # may be wrapped

Ended = subprocess.CompletedProcess[str]


class Child:
    """`script` in a process of its own, below `home`."""

    script: ClassVar[Path]
    harmless: ClassVar[re.Pattern[str] | None] = None  # on stderr, and not the script's doing
    has_own_group: ClassVar[bool] = False

    def __init__(self, home: Path, args: tuple[str, ...], variables: Mapping[str, str]) -> None:
        self.temporary = home / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        ours = {*config.SCHEMES, "LOG_LEVEL", "LOG_FORMAT", "CONNECT_TIMEOUT_S"}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(self.script), *args],
            cwd=home,
            env={**kept, "TMPDIR": str(self.temporary), "PYTHONUTF8": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=self.has_own_group,
            # A shell without job control starts its jobs deaf to Ctrl-C, and they pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._seen = self.stderr = ""  # what was read so far, and all of the other stream

    def until(self, text: str) -> None:
        """Read its output up to the line that holds `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._seen += line
            if text in line:
                return
        pytest.fail(f"ended without {text!r}: {self._seen}{self.ended().stderr}")

    def ended(self) -> Ended:
        """Wait for its end; it must leave no temporary file and show no traceback."""
        try:
            out, err = self.process.communicate(timeout=END_TIMEOUT_S)
        finally:
            self.process.kill()
        self.stderr = err
        assert list(self.temporary.iterdir()) == []
        shown = self.harmless.sub("", err) if self.harmless else err
        assert "Traceback" not in self._seen + out + shown or "DEBUG" in err, err
        return Ended(self.process.args, self.process.returncode, self._seen + out, shown)


class Run:
    """Run a script below `home`; keyword arguments are environment variables."""

    child: ClassVar[type[Child]]

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *args: str, **variables: str) -> Ended:
        return self.start(*args, **variables).ended()

    def start(self, *args: str, **variables: str) -> Child:
        return self.child(self.home, args, variables)


def at_once(*runs: Callable[[], Ended]) -> list[Ended]:
    with ThreadPoolExecutor(min(4, len(runs))) as threads:
        return [future.result() for future in [threads.submit(run) for run in runs]]


def demos_of(ended: Ended) -> dict[str, dict[str, object]]:
    """The results on stdout, which must be JSON and nothing else."""
    demos: dict[str, dict[str, object]] = json.loads(ended.stdout)["demos"]
    return demos


def missing(reason: object) -> NoReturn:
    """A server that cannot be had: a failure where REQUIRE_SERVICES=1, else a skip."""
    report = pytest.fail if os.environ.get("REQUIRE_SERVICES") == "1" else pytest.skip
    report(str(reason))
    raise AssertionError  # either raised


class RunScript(Protocol):
    def __call__(
        self,
        name: str,
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = SCRIPT_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]: ...
