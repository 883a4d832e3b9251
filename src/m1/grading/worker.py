"""The worker process: compares pairs of answers by math-verify.

It reads lines of JSON, [gold, answer, seconds], and writes one line per pair: "equal", "different" or "error".

It imports math-verify and nothing of this package, so it starts fast. The parent kills it when it takes too long. Its
own alarm covers a parent that is gone. The alarm runs no Python code, so computing a huge power can't delay it.
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
ALARM_AFTER = 5.0  # seconds after the parent's limit
SAME_DIGITS = 1e-5  # relative difference: six digits, rounded or truncated


def verdict(gold: str, answer: str) -> str:
    """Compares two answers: "equal" if any of their readings are equal, else "error" if math-verify raised, else
    "different"."""
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
    """Whether two numbers differ in their first six digits.

    math-verify compares decimals, not digits: it calls 0.0000672 equal to 0.0000674, and 10^-20 to 10^-21. Percentages
    are exempt, because 50 % may equal both 50 and 0.5.
    """
    if not all(isinstance(x, Basic) and x.is_number and not x.has(UnevaluatedExpr) for x in (gold, answer)):
        return False
    if gold == answer or gold.is_zero or answer.is_zero:
        return False
    x, y = (side.evalf(20) for side in (gold, answer))
    return bool(abs(x - y) > SAME_DIGITS * max(abs(x), abs(y)))


def main() -> None:
    """Answers the pairs on stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with contextlib.suppress(OSError, ValueError):  # not every system can limit memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what a library prints out of the replies
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + ALARM_AFTER)
        print(verdict(gold, answer), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
