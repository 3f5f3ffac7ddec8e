"""Python runs this before a script that `running.Child` was told to pause at a text: the process
stops itself when it has printed it, so that the test, however late it comes, finds it there."""

import io
import os
import signal
import sys


class Pausing(io.TextIOWrapper):
    def write(self, text: str) -> int:
        written = super().write(text)
        if os.environ["PAUSE_AT"] in text:
            os.kill(os.getpid(), signal.SIGSTOP)
        return written


sys.stdout = Pausing(sys.stdout.buffer, encoding="utf-8", write_through=True)
