"""Importing a script opens no connection, reads no file and sets no logging or signal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from services import NOT_CONFIGURED, ROOT

SCRIPTS = sorted(ROOT.glob("0?_*.py"))
IMPORT = """
import importlib, logging, signal, sys
name = sys.argv[1]
importlib.import_module(name)  # and with it, all that it imports
del sys.modules[name]
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[:1]))))
importlib.import_module(name)
print(sorted({args for event, args in seen if event == "open" and name not in args}))
print(sorted({event for event, _ in seen if event.startswith(("socket", "sqlite3", "tempfile"))}))
print(logging.getLogger().handlers, logging.getLogger().level == logging.WARNING)
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_importing_opens_reads_and_configures_nothing(tmp_path: Path, script: Path) -> None:
    nonsense = "".join(f"{variable}=nonsense\n" for variable in NOT_CONFIGURED)
    (tmp_path / ".env").write_text(f"LOG_LEVEL=DEBUG\n{nonsense}")
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT, script.stem],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["[]", "[]", "[] True", "True"]
