"""Runs a program for as long as stdin is open. It is itself a separate program, which needs nothing else of M1.

    python lifeline.py SECONDS COMMAND...

Whoever starts it holds the other end of stdin. However the starter ends, the command then gets SIGTERM. SECONDS later,
or SECONDS after the command has ended by itself, whatever is left of its process group is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable


def main() -> None:
    """Runs the program."""
    seconds, *command = sys.argv[1:]
    process, over = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True), threading.Event()

    def end_after(wait: Callable[[], object]) -> None:
        wait()
        over.set()

    for wait in (process.wait, lambda: os.read(0, 1)):  # nobody writes to stdin, so this waits until it is closed
        threading.Thread(target=end_after, args=(wait,), daemon=True).start()
    over.wait()
    process.terminate()
    deadline = time.monotonic() + float(seconds)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
