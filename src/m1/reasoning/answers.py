r"""Answers: taken out of a text, compared with golds, put into clusters of equal ones.

Comparison is math-verify's. It runs in a worker process, because it can hang or exhaust memory on hostile
input and its own timeout works in main threads alone: a worker that takes too long, or dies, is replaced and costs one
answer.
"""

import contextlib
import json
import re
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType

TIMEOUT_SECONDS = 10.0
STARTUP_SECONDS = 120.0  # importing sympy on a slow, busy machine
MAX_ANSWER_CHARACTERS = 1000  # nothing longer is an answer; it is compared as text only


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} whose braces balance, stripped; None without one. One pass over the text."""
    starts: list[int | None] = []  # of the open braces: where a \boxed's content begins, None for other braces
    last: tuple[int, int] | None = None
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        token = match.group()
        if token == "}":
            start = starts.pop() if starts else None
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
        elif token.endswith("{") and (token == "{" or len(token) > 2):
            starts.append(match.end() if len(token) > 2 else None)
    return text[last[0] : last[1]].strip() if last else None


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

    def start(self) -> None:
        """Starts the worker now, if it can be, so that the first hard pair doesn't wait for it."""
        with contextlib.suppress(TimeoutError, EOFError, OSError):  # the first hard pair will meet and count it
            self._worker = self._worker or _Worker()

    def _ask_worker(self, gold: str, answer: str) -> bool:
        self.counts["graded"] += 1
        try:
            self._worker = self._worker or _Worker()
            return self._worker.ask(gold, answer, self.timeout)
        except TimeoutError:
            self.counts["timeout"] += 1
        except (EOFError, OSError):
            self.counts["crash"] += 1
        self.close()
        return False


class _Worker:
    """One grading_worker process and the pipes to it. Raises TimeoutError or EOFError where it hangs or dies."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("grading_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._read_line(STARTUP_SECONDS)
        except (TimeoutError, EOFError):
            self.kill()
            raise

    def ask(self, gold: str, answer: str, timeout: float) -> bool:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self._read_line(timeout))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was still to be flushed
                pipe.close()  # type: ignore[union-attr]

    def _read_line(self, timeout: float) -> bytes:
        """A worker writes whole lines, so one that can be read from has a whole line."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line


def _is_integer(answer: str) -> bool:
    return re.fullmatch(r"-?\d+", answer) is not None
