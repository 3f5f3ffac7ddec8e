"""One exercise, judged in a process of its own, which check.py starts:

    python -m checks NUMBER FILE VERDICT DEADLINE

Into the file VERDICT goes what is wrong, or nothing where nothing is. Without that file there is no
verdict: the exercise has ended Python, or never ended. At DEADLINE, of time.monotonic(), which is
that of all processes, all threads are shown.
"""

import faulthandler
import importlib
import io
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from checks import Wrong

PRINTED = 1_000_000  # characters; an endless loop that prints would fill the memory of check.py


class Bounded(io.TextIOWrapper):
    """What an exercise prints, up to a limit."""

    left = PRINTED

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left < 0:
            raise RuntimeError(f"it prints more than {PRINTED:,} characters")
        return super().write(text)


def verdict(number: str, file: Path) -> str:
    """What is wrong, or nothing."""
    sys.path.insert(0, str(file.parent))
    try:
        exercise = importlib.import_module(file.stem)
        importlib.import_module(f"checks.check_{number}").check(exercise)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return raised(error, file)
    return ""


def raised(error: Exception, file: Path) -> str:
    """Where in `file`: the frames of the check are nobody's concern."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename) == file]  # fmt: skip
    if isinstance(error, SyntaxError) and not frames:
        return "".join(traceback.format_exception_only(error)).rstrip()
    if not frames:  # it lacks a name that the check wants
        return "".join(traceback.format_exception(error, limit=-1)).rstrip()
    told = "".join(traceback.format_list(frames) + traceback.format_exception_only(error))
    return f"it raises:\n{told.rstrip()}"


number, file, told, deadline = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, whatever its threads do
sys.stdout = Bounded(sys.stdout.buffer, encoding="utf-8")
faulthandler.dump_traceback_later(max(0.1, float(deadline) - time.monotonic()))
Path(told).write_text(verdict(number, Path(file)), encoding="utf-8")
sys.stdout.flush()
os._exit(0)  # also where the exercise has left threads that wait
