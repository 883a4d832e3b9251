"""Runs worker.py in a separate process, which may hang, die or reply nonsense."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from m1.grading.reading import Reading

STARTUP_SECONDS = 120.0  # enough to import sympy on a slow, busy machine
# A worker inherits nothing of the parent's environment: it parses hostile texts and must not see API keys.
# The hash seed is fixed because the order of sympy's sets, and so a value, could depend on it.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
# The import path is handed over in the arguments, since it may come from the environment.
START = "import runpy, sys; script, *sys.path = sys.argv[1:]; runpy.run_path(script, run_name='__main__')"
ANSWERS_PER_WORKER = 1000  # a worker is replaced after these, because sympy's caches grow
MAX_REPLY_BYTES = 1 << 16


class GradingProcess:
    """A worker process that reads one answer at a time, and the pipes to it.

    Methods raise TimeoutError if the process hangs. They raise EOFError or OSError if it dies or writes an invalid
    reply. The process ends when its input is closed, so it doesn't outlive its parent.

    Attributes:
        process: the process itself.
        usable: whether it may be asked. It may not if it is broken, has reached ANSWERS_PER_WORKER, or still owes a
            reply (after Ctrl-C, for example): a late reply would be taken for the next answer's.
    """

    def __init__(self) -> None:
        self.usable = True
        self._asked, self._ready, self._ready_by = 0, False, time.monotonic() + STARTUP_SECONDS
        script = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(script), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )

    def wait(self, timeout: float) -> None:
        """Waits until the process has started.

        Args:
            timeout: maximum seconds to wait. A process that needs longer stays usable for STARTUP_SECONDS in total.
        """
        if not self._ready:
            self.usable = False
            try:
                if self._read(min(timeout, self._ready_by - time.monotonic())) != "ready":
                    raise EOFError
                self._ready = self.usable = True
            except TimeoutError:
                self.usable = time.monotonic() < self._ready_by
                raise

    def ask(self, answer: str, timeout: float) -> list[Reading] | None:
        """The readings of an answer, within `timeout` seconds; None if it has no value."""
        assert self.process.stdin
        self.usable = False
        self._asked += 1
        self.process.stdin.write(json.dumps([answer, timeout]).encode() + b"\n")
        self.process.stdin.flush()
        reply = self._read(timeout)
        try:
            readings = None if reply == "null" else [Reading(value, tuple(marks)) for value, marks in json.loads(reply)]
        except (ValueError, TypeError):
            raise EOFError from None
        if readings == []:
            raise EOFError
        self.usable = self._asked < ANSWERS_PER_WORKER
        return readings

    def kill(self) -> None:
        """Ends the process and closes its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # the rest of a write can't be flushed to a dead process
                pipe.close()  # type: ignore[union-attr]

    def _read(self, timeout: float) -> str:
        assert self.process.stdout
        deadline = time.monotonic() + timeout
        poll = select.poll()  # not select(), which knows no file descriptors past 1023
        poll.register(self.process.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), MAX_REPLY_BYTES)
            line += part
            if not part or len(line) > MAX_REPLY_BYTES or line.count(b"\n") > 1:
                raise EOFError
        return line[:-1].decode(errors="replace")
