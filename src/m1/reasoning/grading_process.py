"""A grading worker as its parent sees it: a process that may hang, die or talk nonsense."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

STARTUP_SECONDS = 120.0  # importing sympy on a slow, busy machine
GRADINGS_PER_WORKER = 1000  # then it is replaced: sympy's caches grow


class GradingProcess:
    """One grading_worker process and the pipes to it.

    Raises TimeoutError where it hangs, EOFError or OSError where it dies or writes what isn't a reply. It ends by
    itself when its input does, so it doesn't outlive its parent.

    Attributes:
        usable: it may be asked: it is not broken, has not been asked too often, and owes no reply. After Ctrl-C, too,
            a late reply would be taken for the next pair's.
    """

    def __init__(self) -> None:
        self.usable = True
        self._asked, self._ready, self._ready_by = 0, False, time.monotonic() + STARTUP_SECONDS
        script = Path(__file__).with_name("grading_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of sets, so its verdicts, could depend on it
        )

    def wait(self, timeout: float) -> None:
        """Until it has started. One that hasn't in time stays usable, for STARTUP_SECONDS in all."""
        if not self._ready:
            self.usable = False
            try:
                self._read(min(timeout, self._ready_by - time.monotonic()), "ready")
                self._ready = self.usable = True
            except TimeoutError:
                self.usable = time.monotonic() < self._ready_by
                raise

    def ask(self, gold: str, answer: str, timeout: float) -> str:
        """ "equal", "different" or "error"."""
        assert self.process.stdin
        self.usable = False
        self._asked += 1
        self.process.stdin.write(json.dumps([gold, answer, timeout]).encode() + b"\n")
        self.process.stdin.flush()
        reply = self._read(timeout, "equal", "different", "error")
        self.usable = self._asked < GRADINGS_PER_WORKER
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was still to be flushed
                pipe.close()  # type: ignore[union-attr]

    def _read(self, timeout: float, *replies: str) -> str:
        assert self.process.stdout
        deadline = time.monotonic() + timeout
        poll = select.poll()  # not select(), which knows no file descriptors past 1023
        poll.register(self.process.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), 4096)
            line += part
            if not part or len(line) > 4096:
                raise EOFError
        reply = line[:-1].decode(errors="replace")
        if reply not in replies:
            raise EOFError
        return reply
