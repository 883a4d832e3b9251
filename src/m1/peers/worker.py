"""Workers: separate programs that run an engine, and answer pieces of work in JSON, one line each."""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from m1.errors import UserError

ENDS_WITHIN = 60.0  # seconds that a worker has to exit, before it is killed
LOG_SHOWN = 500  # characters of the worker's log in an error message


class Worker:
    """A running worker. Called with one piece of work, it returns the answer; each worker's program documents both.

    Attributes:
        versions: of the engine and the libraries it runs on.
        settings: those that the engine runs with.
        launched: the value of time.perf_counter when the process was started.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], log: TextIO, launched: float):
        self._name, self._process, self._log, self.launched = name, process, log, launched
        ready = self._read()  # waits until the worker is ready
        self.versions: dict[str, str] = ready["versions"]
        self.settings: dict[str, Any] = ready["settings"]

    def __call__(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer. Raises UserError if it is an error, or if the worker has died."""
        with contextlib.suppress(BrokenPipeError):  # the worker has died: `_read` reports it
            print(json.dumps(work), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            raise UserError(
                f"{self._name}: the worker ended without an answer: {self._log.read()[-LOG_SHOWN:].strip()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self._name}: {answer['error']}")
        return answer

    def peak_bytes(self) -> int:
        """The most memory that the worker and its processes have had, each at its own worst time, in bytes."""
        return sum(_peak_bytes(pid) for pid in _tree(self._process.pid))


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            children += map(int, task.read_text().split())
    return [pid, *(one for child in children for one in _tree(child))]


def _peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


@contextmanager
def start_worker(name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """Starts a worker, which ends with the context. Raises UserError, beginning with its name, if it can't start.

    Args:
        environment: variables beside those of this process.
    """
    with tempfile.TemporaryFile("w+") as log:
        launched = time.perf_counter()
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        process = subprocess.Popen(command, env=os.environ | dict(environment or {}), **pipes)
        assert process.stdin
        try:
            yield Worker(name, process, log, launched)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
