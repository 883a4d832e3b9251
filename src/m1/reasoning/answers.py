r"""Answers: taken out of a text, compared with golds, put into clusters of equal ones.

Comparison is math-verify's (design §7). It runs in a worker process, because it can hang or exhaust memory on hostile
input and its own timeout works in main threads alone: a worker that takes too long, or dies, is replaced and costs one
answer.
"""

import multiprocessing
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing.connection import Connection
from types import TracebackType

TIMEOUT_SECONDS = 10.0
STARTUP_SECONDS = 120.0  # importing sympy on a slow, busy machine
MAX_ANSWER_CHARACTERS = 1000  # nothing longer is an answer; it is compared as text only


def extract_answer(text: str) -> str | None:
    r"""The content of the last balanced \boxed{}, stripped; None without one."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            escaped = text[i - 1] == "\\" and text[i - 2] != "\\"
            depth += {"{": 1, "}": -1}.get(text[i], 0) if not escaped else 0
            if depth == 0:
                return text[match.end() : i].strip()
    return None


@lru_cache(maxsize=100_000)
def normalize(answer: str) -> str:
    """Without spelling that never changes a value: outer spaces and dollars, a final period, leading zeros."""
    answer = answer.strip().strip("$").strip().removesuffix(".").replace(r"\!", "").replace(r"\,", "")
    if re.fullmatch(r"[+-]?\d{1,300}", answer):
        return str(int(answer))
    return answer


class Grader:
    """Decides whether answers are equal; counts what it couldn't decide.

    Trivial pairs (the same text, two plain integers) are decided here, others by math-verify in a worker. Use as a
    context manager, or call `close`.

    Attributes:
        counts: "graded", "timeout" and "crash": pairs that went to a worker, and those of them that were given up.
    """

    def __init__(self, timeout: float = TIMEOUT_SECONDS):
        self.timeout = timeout
        self.counts: Counter[str] = Counter(graded=0, timeout=0, crash=0)
        self._known: dict[tuple[str, str], bool] = {}
        self._worker: _Worker | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._worker:
            self._worker.kill()
            self._worker = None

    def grade_texts(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> list[bool]:
        """Whether each text's final answer equals one of its golds. No answer is wrong."""
        answers = [extract_answer(text) for text in texts]
        return [a is not None and self.grade(a, gold) for a, gold in zip(answers, golds, strict=True)]

    def grade(self, answer: str, golds: Sequence[str]) -> bool:
        return any(self.equal(gold, answer) for gold in golds)

    def equal(self, gold: str, answer: str) -> bool:
        """Whether the answer has the gold's value. What can't be decided in time is unequal, and counted."""
        gold, answer = normalize(gold), normalize(answer)
        if gold == answer:
            return True
        if (_is_integer(gold) and _is_integer(answer)) or not answer or len(answer) > MAX_ANSWER_CHARACTERS:
            return False
        if (gold, answer) not in self._known:
            self._known[gold, answer] = self._ask_worker(gold, answer)
        return self._known[gold, answer]

    def cluster(self, answers: Sequence[str | None]) -> dict[str, list[int]]:
        """Indices of equal answers, under the cluster's smallest spelling; None belongs nowhere.

        The clusters don't depend on the answers' order: spellings are visited sorted.
        """
        spellings: dict[str, list[int]] = {}
        for i, answer in enumerate(answers):
            if answer is not None:
                spellings.setdefault(normalize(answer), []).append(i)
        clusters: dict[str, list[int]] = {}
        for spelling in sorted(spellings, key=lambda s: (len(s), s)):
            home = next((c for c in clusters if self.equal(c, spelling)), spelling)
            clusters.setdefault(home, []).extend(spellings[spelling])
        return clusters

    def _ask_worker(self, gold: str, answer: str) -> bool:
        self.counts["graded"] += 1
        if self._worker is None:
            self._worker = _Worker()
        try:
            return self._worker.ask(gold, answer, self.timeout)
        except TimeoutError:
            self.counts["timeout"] += 1
        except (EOFError, OSError):
            self.counts["crash"] += 1
        self.close()
        return False


class _Worker:
    """One math-verify process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(STARTUP_SECONDS) or self.pipe.recv() != "ready":
            self.kill()
            raise RuntimeError(f"the math-verify process did not start within {STARTUP_SECONDS:.0f} s")

    def ask(self, gold: str, answer: str, timeout: float) -> bool:
        self.pipe.send((gold, answer))
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """Runs in the worker: math-verify without its own timeouts, which the parent's replaces."""
    import logging
    import signal

    from math_verify import parse, verify

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.disable(logging.CRITICAL)
    pipe.send("ready")
    while True:
        try:
            gold, answer = pipe.recv()
        except EOFError:
            return
        try:
            sides = [parse(rf"\boxed{{{side}}}", parsing_timeout=None) for side in (gold, answer)]
            pipe.send(bool(verify(*sides, timeout_seconds=None)))
        except Exception:  # an answer it can't parse isn't equal to anything
            pipe.send(False)


def _is_integer(answer: str) -> bool:
    return re.fullmatch(r"-?\d+", answer) is not None
