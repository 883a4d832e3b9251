"""Runs as a process of its own: reads [gold, answer, seconds] as lines of JSON, writes "equal", "different" or
"error" a line.

It imports math-verify and nothing of this package, so it starts fast. Its parent kills it when it takes too long; its
own alarm is for when the parent is gone, and needs no Python to run, so a huge power can't hold it up.
"""

import contextlib
import itertools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from math_verify import parse, verify
from sympy import Basic, UnevaluatedExpr

MEMORY_BYTES = 1 << 30
ALARM_AFTER = 5.0  # seconds past the parent's limit
SAME_DIGITS = 1e-5  # relative: six digits, rounded or cut off


def compare(gold: str, answer: str) -> str:
    """ "error" where math-verify raised and no other reading of the two was equal."""
    reply = "different"
    try:
        sides = [parse(rf"\boxed{{{side}}}", parsing_timeout=None, raise_on_error=True) for side in (gold, answer)]
    except Exception:
        return "error"
    for pair in itertools.product(*sides):
        try:
            same = verify(*pair, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
            if same and not far_apart(*pair):
                return "equal"
        except Exception:
            reply = "error"
    return reply


def far_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers differ in their first six digits: math-verify compares decimals, not digits.

    To it 0.0000672 is 0.0000674 and 10^-20 is 10^-21. A percentage may equal its number, so it is left alone.
    """
    if not all(isinstance(x, Basic) and x.is_number and not x.has(UnevaluatedExpr) for x in (gold, answer)):
        return False
    if gold == answer or gold.is_zero or answer.is_zero:
        return False
    x, y = (side.evalf(20) for side in (gold, answer))
    return bool(abs(x - y) > SAME_DIGITS * max(abs(x), abs(y)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(OSError, ValueError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + ALARM_AFTER)
        print(compare(gold, answer), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
