"""The thread that owns an engine: it alone submits, steps and aborts. Requests talk to it by an inbox."""

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable

from m1.engine import LLM, Engine, Request, Sequence
from m1.errors import UserError
from m1.serve.jobs import Ballot, Job

SPARED = 4  # one slot in 4 is kept from votes, so that a chat doesn't wait for a vote's samples to end
POLL_SECONDS = 0.02  # between two looks at a vote whose samples have all ended, for its budget's seconds

logger = logging.getLogger(__name__)


class Overloaded(UserError):
    """Too many samples are waiting."""


class EngineLoop:
    """Runs an engine in a thread of its own, for the jobs of many requests.

    Args:
        llm: the model, with a fixed max_model_len.
        max_waiting: maximum number of samples without a slot; more are refused.

    Attributes:
        engine: owned by the thread. Others may read its counters, and call `check`.
        jobs: those that haven't ended.
    """

    def __init__(self, llm: LLM, max_waiting: int):
        self.llm, self.max_waiting = llm, max_waiting
        self.engine: Engine = llm.engine_for([], 1)
        self.jobs: list[Job] = []
        self._load = 0  # samples of all submitted jobs
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = False
        self._tasks: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def begin(self) -> None:
        """Starts the thread. Called in the event loop whose tasks submit jobs."""
        self._tasks = asyncio.get_running_loop()
        self._thread.start()

    @property
    def room(self) -> int:
        """Number of samples that may still be submitted. Read in the event loop."""
        return self.engine.num_slots + self.max_waiting - self._load

    def submit(self, job: Job) -> None:
        """Queues a job. Called in the event loop.

        Raises:
            Overloaded: more samples wait than `max_waiting`.
            UserError: the engine refuses a prompt (`Engine.check`).
        """
        for request in job.requests:
            self.engine.check(request)
        if job.weight > self.room:
            raise Overloaded(f"{self._load} samples are running or waiting: try again later")
        self._load += job.weight
        self._inbox.put(lambda: self.jobs.append(job))

    def abort(self, job: Job, error: BaseException | None = None) -> None:
        """Ends a job before the next step."""
        self._inbox.put(lambda: None if job.done else self._end(job, error))

    def wake(self) -> None:
        """Makes the thread look at its jobs."""
        self._inbox.put(None)

    async def stop(self) -> None:
        """Ends all jobs and the thread."""
        self._stopping = True
        self.wake()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._obey()
                self._step()
            except BaseException as error:  # of the engine: it has ended all its sequences
                logger.exception("a step failed; its requests end with an error")
                for job in list(self.jobs):
                    self._end(job, error)
        for job in list(self.jobs):
            self._end(job, RuntimeError("the server stops"))

    def _obey(self) -> None:
        """Does what the inbox says. Waits for something to do."""
        timeout = 0 if self.engine.busy else POLL_SECONDS if self.jobs else None
        try:
            order = self._inbox.get(block=timeout != 0, timeout=timeout)
            while True:
                if order:
                    order()
                order = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _step(self) -> None:
        spared = min(self.engine.num_slots - 1, -(-self.engine.num_slots // SPARED))
        votes = sum(isinstance(job, Ballot) for job in self.jobs)
        share = max(1, (self.engine.num_slots - spared) // max(1, votes))
        for job in self.jobs:
            job.start(self.engine, share)
        ended: defaultdict[Request, list[Sequence]] = defaultdict(list)
        for sequence in self.engine.step() if self.engine.busy else ():
            ended[sequence.request].append(sequence)
        news = []
        for job in self.jobs:
            own = [sequence for request in job.requests for sequence in ended.get(request, ())]
            if job.take(self.engine, own):
                news.append(job)
        self._tell(news)

    def _end(self, job: Job, error: BaseException | None) -> None:
        job.end(self.engine, error)
        self._tell([job])

    def _tell(self, news: list[Job]) -> None:
        """Wakes the tasks of these jobs, and forgets those that have ended."""
        if not news:
            return
        self.jobs = [job for job in self.jobs if not job.done]
        ended = sum(job.weight for job in news if job.done)

        def tell() -> None:
            self._load -= ended
            for job in news:
                job.changed.set()

        assert self._tasks is not None
        self._tasks.call_soon_threadsafe(tell)
