"""The worker process: reads answers that need an algebra system.

It reads lines of JSON, [answer, seconds], and writes one line of JSON per answer: a list of readings (see reading.py),
or null if the answer has no value.

It imports neither torch nor transformers, so it starts fast. The parent kills it when it takes too long. Its own alarm
covers a parent that is gone. The alarm runs no Python code, so computing a huge power can't delay it.
"""

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from m1.grading.algebra import algebra
from m1.grading.process import MAX_REPLY_BYTES
from m1.grading.reading import Unreadable, Valueless, as_text, read

MEMORY_BYTES = 1 << 30
ALARM_AFTER = 5.0  # seconds after the parent's limit
# The first use of each rule of the grammar is slow. It belongs to the start, and not to the first answers' time.
WARM_UP = (r"\frac{3\sqrt{2}}{2}-\frac{2\pi}{5}", r"3x^{2}-\frac{x}{2}+1", r"2e^{3}-2\sqrt{5}+i", r"\log_{2} 3", "x>1")


def reply_to(answer: str) -> Any:
    """The readings of an answer; None if it has no value."""
    try:
        readings = read(answer, algebra)
    except Valueless:
        return None
    except Unreadable:
        readings = [as_text(answer)]
    return readings if len(json.dumps(readings)) < MAX_REPLY_BYTES else None


def main() -> None:
    """Answers the lines on stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with contextlib.suppress(OSError, ValueError):  # not every system can limit memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what a library prints out of the replies
    for answer in WARM_UP:
        read(answer, algebra)
    gc.freeze()  # else the collector visits all of sympy again and again while the parser makes its many objects
    gc.set_threshold(100_000)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + ALARM_AFTER)
        print(json.dumps(reply_to(answer)), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
