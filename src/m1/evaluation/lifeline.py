"""Runs a program for as long as stdin is open. It is itself a separate program, which needs nothing else of M1.

    python lifeline.py SECONDS COMMAND...

Whoever starts it holds the other end of stdin. However the starter ends, the command then gets SIGTERM. SECONDS later,
or when the command has ended by itself, whatever is left of its process group is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

LEAVE = 3.0  # seconds for the command's children to end after it


def main() -> None:
    """Runs the program."""
    seconds, *command = sys.argv[1:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end_with_stdin() -> None:
        sys.stdin.buffer.read()
        process.terminate()
        time.sleep(float(seconds))
        os.killpg(process.pid, signal.SIGKILL)

    threading.Thread(target=end_with_stdin, daemon=True).start()
    process.wait()
    deadline = time.monotonic() + LEAVE
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
