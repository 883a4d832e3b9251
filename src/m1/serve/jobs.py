"""What one HTTP request asks of the engine: a `Generation`, or a `Ballot`, whose samples vote.

The engine's thread calls `start`, `take` and `end` (loop.py). The request's own task waits for `changed`, then reads
`samples`, `solution` and `done`. Texts and lists only grow, so it reads them without a lock.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor

from m1.engine import LLM, Engine, Request, SamplingParams, Sequence
from m1.engine.llm import TextSequence
from m1.grading import Grader
from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution
from m1.reasoning.solve import SelfConsistency
from m1.reasoning.verifier import Weights


class Job(ABC):
    """A request's work, from its submission to its end.

    Attributes:
        requests: the engine's requests so far.
        weight: number of samples it may run or queue at the same time.
        samples: the texts of sequences, if the job reads any.
        complete: the places in `samples` of those whose text is complete.
        done: whether it has ended.
        error: what went wrong; None if nothing did.
        changed: set whenever there is something new to read.
    """

    def __init__(self, weight: int):
        self.requests: list[Request] = []
        self.weight = weight
        self.done = False
        self.error: BaseException | None = None
        self.changed = asyncio.Event()
        self.samples: list[TextSequence] = []
        self.complete: set[int] = set()
        self._open: dict[Sequence, int] = {}  # the places of the others

    @abstractmethod
    def start(self, engine: Engine, share: int) -> None:
        """Before a step: submits the samples to start now. A vote has at most `share` open at a time."""

    @abstractmethod
    def take(self, engine: Engine, ended: list[Sequence]) -> bool:
        """After a step: takes in its own sequences that ended in it. Returns whether there is something new to read."""

    def end(self, engine: Engine, error: BaseException | None = None) -> None:
        """Ends the job. Unfinished samples are aborted, and their slots are free at once."""
        for request in self.requests:
            if not request.done:
                engine.abort(request)
        self.done, self.error = True, self.error or error

    def _show(self, llm: LLM, sequences: list[Sequence]) -> None:
        """Adds texts of sequences, which `_read` makes grow."""
        for sequence in sequences:
            self._open[sequence] = len(self.samples)
            self.samples.append(llm.text_of(sequence))

    def _read(self, engine: Engine, sequences: list[Sequence]) -> bool:
        """Reads the new text of sequences that aren't complete. A stop string ends its sequence.

        Returns whether a text has grown or become complete.
        """
        news = False
        for sequence in sequences:
            place = self._open[sequence]
            sample = self.samples[place]
            length = len(sample.text)
            if sample.read():
                engine.finish(sequence, "stop")
            if sequence.done:
                del self._open[sequence]
                self.complete.add(place)
            news = news or sequence.done or len(sample.text) > length
        return news


class Generation(Job):
    """Samples of one or more prompts.

    Args:
        llm: makes texts of the sequences.
        requests: one per prompt.
        streamed: whether texts are read as they grow, and not only at their ends.
    """

    def __init__(self, llm: LLM, requests: list[Request], streamed: bool):
        super().__init__(sum(len(request.sequences) for request in requests))
        llm.prepare(requests)
        self.requests, self.streamed = requests, streamed
        self._show(llm, [sequence for request in requests for sequence in request.sequences])
        self._reading = streamed or any(request.params.stop for request in requests)
        self._submitted = False

    def start(self, engine: Engine, share: int) -> None:
        """Submits all samples at once."""
        if not self._submitted:
            self._submitted = True
            for request in self.requests:
                engine.submit(request)

    def take(self, engine: Engine, ended: list[Sequence]) -> bool:
        """Reads the new text of its samples."""
        news = self._read(engine, list(self._open) if self._reading else ended)
        self.done = not self._open
        return news


class Ballot(Job):
    """A vote over samples of one prompt (reasoning/solve.py). Answers are compared in a thread of `graders`.

    Args:
        llm: makes texts of the sequences.
        problem: for a verifier.
        tokens: the prompt.
        params: of each sample.
        budget: number of samples, seconds, and the rule to stop early.
        weights: of the votes.
        grader: compares answers.
        graders: runs the comparisons, which may take seconds.
        wake: makes the engine's thread go on when a comparison is done.
        shown: whether the samples' texts are read as they grow.
    """

    def __init__(
        self,
        llm: LLM,
        problem: str,
        tokens: list[int],
        params: SamplingParams,
        budget: Budget,
        weights: Weights,
        grader: Grader,
        graders: Executor,
        wake: Callable[[], None],
        shown: bool = False,
    ):
        super().__init__(1)  # it takes slots that are free, and makes nobody wait
        self.voting = SelfConsistency(problem, tokens, llm, grader, params, budget, weights)
        self.requests = self.voting.requests
        self._llm, self._graders, self._wake, self._shown = llm, graders, wake, shown
        self._lock = threading.Lock()
        self._ended: list[Sequence] = []  # not counted yet
        self._counting = False
        self._news = False

    @property
    def solution(self) -> Solution:
        """The solution so far."""
        return self.voting.solution

    def start(self, engine: Engine, share: int) -> None:
        """Starts as many samples as its share of the slots lets."""
        if self.voting.over:
            return
        opened = sum(not sequence.done for sequence in self.solution.sequences)
        room = max(0, min(share - opened, engine.free_slots))
        if (room or not opened) and (request := self.voting.start(room)):
            engine.submit(request)

    def take(self, engine: Engine, ended: list[Sequence]) -> bool:
        """Has the votes of ended samples counted. Aborts the others at once when the budget says so."""
        with self._lock:
            self._ended += ended
            if self._ended and not self._counting:
                self._counting = True
                self._graders.submit(self._count)
            news, self._news = self._news, False
            idle = not self._counting
        if self._shown:
            self._show(self._llm, self.solution.sequences[len(self.samples) :])
            news = self._read(engine, list(self._open)) or news
        if self.error:
            self.end(engine)
        elif self.voting.over:
            for request in self.requests:
                if not request.done:
                    engine.abort(request)
            if idle:
                self.voting.finish()
                self.end(engine)
        return news or self.done

    def _count(self) -> None:
        try:
            while True:
                with self._lock:
                    ended, self._ended = self._ended, []
                    self._counting = bool(ended)
                if not ended:
                    return
                self.voting.count(ended)
                self._news = True
        except BaseException as error:
            self.error, self._counting = error, False
        finally:
            self._wake()
