"""Grades answers: the class `Grader` decides equality by rules and, for the hard pairs, by math-verify in workers."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import TracebackType

from m1.errors import UserError
from m1.grading.equality import MAX_ANSWER_CHARACTERS, decide, normalize
from m1.grading.extract import extract_answer
from m1.grading.process import GradingProcess

TIMEOUT_SECONDS = 10.0


class Grader:
    """Decides whether two answers have the same value, and whether a text's final answer is right.

    Rules decide the easy pairs of answers. math-verify decides the rest in worker processes, because it can hang or
    exhaust memory on hostile input. A worker that hangs or dies is replaced, and its pair counts as unequal. Verdicts
    are remembered. Use a grader as a context manager, or call `close` to end its workers.

    Attributes:
        timeout: maximum seconds per pair.
        workers: number of worker processes that `grade_texts` and `start` use.
        counts: number of pairs sent to a worker ("graded"), and how many of these failed. "timeout": the time was over.
            "crash": the worker died or wrote an invalid reply. "error": math-verify raised an exception. Failed pairs
            are unequal. A pair that failed because `within` was too short may be sent again.

    Raises:
        UserError: `timeout` or `workers` isn't positive.
    """

    def __init__(self, timeout: float = TIMEOUT_SECONDS, workers: int = 1):
        if not timeout > 0 or workers < 1:
            raise UserError(f"timeout={timeout}, workers={workers}: both must be positive")
        self.timeout = timeout
        self.workers = workers
        self.counts: Counter[str] = Counter(graded=0, timeout=0, crash=0, error=0)
        self._known: dict[tuple[str, str], bool] = {}
        self._idle: list[GradingProcess] = []
        self._lock = Lock()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the idle workers."""
        while self._idle:
            self._idle.pop().kill()

    def grade_texts(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> list[bool]:
        """Whether each text's final answer equals one of its golds. A text without an answer is wrong.

        Up to `workers` texts are graded in parallel.
        """
        rows = [(extract_answer(text), tuple(gold)) for text, gold in zip(texts, golds, strict=True)]
        different = list(dict.fromkeys(rows))  # equal rows are graded and counted once
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = pool.map(lambda row: row[0] is not None and self.grade(row[0], row[1]), different)
            known = dict(zip(different, verdicts, strict=True))
        return [known[row] for row in rows]

    def grade(self, answer: str, golds: Sequence[str]) -> bool:
        """Whether the answer equals one of the golds. Raises UserError if `golds` is one text and not a list."""
        if isinstance(golds, str):
            raise UserError(f"golds={golds!r}: give a list of texts")
        return any(self.equal(gold, answer) for gold in golds)

    def equal(self, gold: str, answer: str, within: float = math.inf) -> bool:
        """Whether the answer has the same value as the gold. A pair that can't be decided in time is unequal.

        Args:
            within: maximum seconds of this call, including the start of a worker. A pair that needs more is not
                remembered as unequal.
        """
        gold, answer = normalize(gold), normalize(answer)
        if gold == answer:
            return bool(gold)
        if not gold or not answer or max(len(gold), len(answer)) > MAX_ANSWER_CHARACTERS:
            return False
        if (gold, answer) not in self._known:
            decided = decide(gold, answer)
            if decided is None:
                decided = self._ask_worker(gold, answer, within)
            if decided is None:
                return False
            self._known[gold, answer] = decided
        return self._known[gold, answer]

    def start(self, within: float = math.inf) -> None:
        """Starts the missing workers in advance, so that the first hard pair doesn't wait for one.

        Args:
            within: maximum seconds to wait. Workers that need longer continue to start in the background.
        """
        with self._lock:
            idle, self._idle = self._idle, []

        def started(worker: GradingProcess | None) -> GradingProcess | None:
            try:
                worker = worker or GradingProcess()
                worker.wait(within)
            except (TimeoutError, EOFError, OSError):  # the first hard pair will fail, too, and count it
                if worker and not worker.usable:
                    worker.kill()
            return worker if worker and worker.usable else None

        missing = [None] * (self.workers - len(idle))
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(filter(None, pool.map(started, [*idle, *missing])))
        with self._lock:
            self._idle += found

    def _ask_worker(self, gold: str, answer: str, within: float) -> bool | None:
        """The verdict of a worker; None if `within` was too short for one."""
        deadline = time.monotonic() + within
        with self._lock:
            self.counts["graded"] += 1
            worker = self._idle.pop() if self._idle else None
        reply = "crash"
        try:
            worker = worker or GradingProcess()
            worker.wait(within)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            reply = worker.ask(gold, answer, min(self.timeout, left))
        except TimeoutError:
            reply = "timeout"
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                if reply in self.counts:
                    self.counts[reply] += 1
                if worker and worker.usable:
                    self._idle.append(worker)
            if worker and not worker.usable:
                worker.kill()
        return None if reply == "timeout" and time.monotonic() >= deadline else reply == "equal"
