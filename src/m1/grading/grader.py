"""Grades answers: the class `Grader` reads each answer once, the hard ones in worker processes, and compares values."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from threading import Lock
from types import TracebackType

from m1.errors import UserError
from m1.grading.extract import extract_answer
from m1.grading.process import STARTUP_SECONDS, GradingProcess
from m1.grading.reading import NeedsAlgebra, Reading, Unreadable, agree, as_text, partition, read
from m1.grading.spelling import MAX_ANSWER_CHARACTERS, normalize

TIMEOUT_SECONDS = 10.0
START_ATTEMPTS = 2


class Grader:
    """Decides whether answers have the same value, and whether a text's final answer is right.

    Each different answer is read once, and only values are compared. Rules read the easy answers. Worker processes with
    math-verify's parser read the rest, because it can hang or exhaust memory on hostile input. A worker that hangs or
    dies is replaced, and its answer is compared as a text from then on. Use a grader as a context manager, or call
    `close` to end its workers.

    Attributes:
        timeout: maximum seconds per answer.
        workers: number of worker processes that `grade_texts`, `partition` and `start` use.
        counts: number of answers sent to a worker ("graded"), and how many of these failed. "timeout": the time was
            over. "crash": the worker died or wrote an invalid reply. "error": the answer has no value. An answer that
            failed isn't sent again, unless `within` was too short.

    Raises:
        UserError: `timeout` or `workers` isn't positive, or, in any method but `start`, no worker starts.
    """

    def __init__(self, timeout: float = TIMEOUT_SECONDS, workers: int = 1):
        if not timeout > 0 or workers < 1:
            raise UserError(f"timeout={timeout}, workers={workers}: both must be positive")
        self.timeout = timeout
        self.workers = workers
        self.counts: Counter[str] = Counter(graded=0, timeout=0, crash=0, error=0)
        self._known: dict[str, list[Reading]] = {}
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
        """Whether two answers have the same value: whether any of their readings agree (see reading.py).

        An answer that can't be read in time is compared as a text.

        Args:
            within: maximum seconds of this call, including the start of a worker.
        """
        deadline = time.monotonic() + within
        gold, answer = normalize(gold), normalize(answer)
        if gold == answer:
            return bool(gold)
        sides = [self._readings(side, deadline - time.monotonic()) for side in (gold, answer)]
        return bool(gold and answer) and any(agree(x, y) for x, y in product(*sides))

    def partition(self, answers: Sequence[str], left: Callable[[], float] = lambda: math.inf) -> list[int]:
        """Divides answers into classes of equal answers: an equivalence. It gives the class of each answer.

        Each answer counts with its usual reading, so each is read once (see `reading.partition`). Answers of one class
        are `equal`. The reverse is false: `1/3` and `0.333333` are equal, but `0.333333` isn't `0.3333333`, so these
        three are three classes.

        Args:
            left: gives the seconds that are left for this call. They include the start of a worker. An answer that
                can't be read in time is compared as a text.
        """
        texts = list(dict.fromkeys(map(normalize, answers)))
        with ThreadPoolExecutor(self.workers) as pool:
            readings = list(pool.map(lambda text: self._readings(text, left())[0], texts))
        classes = dict(zip(texts, partition(readings), strict=True))
        return [classes[normalize(answer)] for answer in answers]

    def start(self, within: float = math.inf) -> None:
        """Starts the missing workers in advance, so that the first hard answer doesn't wait for one.

        Args:
            within: maximum seconds to wait. Workers that need longer continue to start in the background.
        """
        with self._lock:
            idle, self._idle = self._idle, []

        def started(worker: GradingProcess | None) -> GradingProcess | None:
            try:
                worker = worker or GradingProcess()
                worker.wait(within)
            except (TimeoutError, EOFError, OSError):  # the first hard answer will start another
                if worker and not worker.usable:
                    worker.kill()
            return worker if worker and worker.usable else None

        missing = [None] * (self.workers - len(idle))
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(filter(None, pool.map(started, [*idle, *missing])))
        with self._lock:
            self._idle += found

    def _readings(self, answer: str, within: float) -> list[Reading]:
        """The readings of a normalized answer. It is remembered, unless `within` was too short."""
        if answer not in self._known:
            readings: list[Reading] | None = [as_text(answer)]
            if answer and len(answer) <= MAX_ANSWER_CHARACTERS:
                with suppress(Unreadable):
                    try:
                        readings = read(answer)
                    except NeedsAlgebra:
                        readings = self._ask_worker(answer, within)
            if readings is None:
                return [as_text(answer)]
            self._known[answer] = readings
        return self._known[answer]

    def _ask_worker(self, answer: str, within: float) -> list[Reading] | None:
        """What a worker reads in an answer, or its text if the worker fails; None if `within` was too short."""
        deadline = time.monotonic() + within
        with self._lock:
            self.counts["graded"] += 1
        worker = self._started_worker(deadline)
        left = deadline - time.monotonic()
        fate, readings = "crash", None
        try:
            if worker is None or left <= 0:
                raise TimeoutError
            readings = worker.ask(answer, min(self.timeout, left))
            fate = "read" if readings else "error"
        except TimeoutError:
            fate = "timeout"
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                if fate in self.counts:
                    self.counts[fate] += 1
                self._keep(worker)
        return None if fate == "timeout" and time.monotonic() >= deadline else readings or [as_text(answer)]

    def _started_worker(self, deadline: float) -> GradingProcess | None:
        """A worker that has started; None if there is none until the deadline. It makes START_ATTEMPTS."""
        for _ in range(START_ATTEMPTS):
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            try:
                worker = worker or GradingProcess()
                worker.wait(deadline - time.monotonic())
                return worker
            except TimeoutError:
                if time.monotonic() >= deadline:
                    self._keep(worker)
                    return None
            except (EOFError, OSError):
                pass
            self._keep(worker)
        raise UserError(
            f"{START_ATTEMPTS} grading processes didn't start within {STARTUP_SECONDS:g} s each: "
            "`python -c 'import math_verify'` says why, or the machine is too busy"
        )

    def _keep(self, worker: GradingProcess | None) -> None:
        if worker and worker.usable:
            self._idle.append(worker)
        elif worker:
            worker.kill()
