"""Runs as a process of its own: reads [gold, answer] as lines of JSON, writes true or false a line.

It imports math-verify and nothing of this package, so it starts fast. It knows no time limit: its parent kills it.
"""

import json
import logging
import signal
import sys

from math_verify import parse, verify


def equal(gold: str, answer: str) -> bool:
    try:
        sides = [parse(rf"\boxed{{{side}}}", parsing_timeout=None) for side in (gold, answer)]
        return bool(verify(*sides, timeout_seconds=None))
    except Exception:  # an answer it can't parse isn't equal to anything
        return False


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
