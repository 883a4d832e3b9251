"""A submitted job, and what ends it early."""

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import Request

from m1.serve.errors import ClientGone, TimedOut
from m1.serve.jobs import Job
from m1.serve.loop import EngineLoop
from m1.serve.metrics import Metrics


class Submission:
    """A submitted job, which ends when its client goes away or its time is over."""

    def __init__(self, loop: EngineLoop, job: Job, request: Request, timeout: float, metrics: Metrics):
        self.loop, self.job, self.metrics = loop, job, metrics
        self._watch = asyncio.create_task(self._end_early(request, timeout))
        self._submitted = time.monotonic()

    async def _end_early(self, request: Request, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
            self.loop.abort(self.job, ClientGone())
        except TimeoutError:
            self.loop.abort(self.job, TimedOut(f"the request took over {timeout:g} seconds"))

    async def updates(self) -> AsyncIterator[None]:
        """Yields whenever the job has something new to read, at last at its end. Raises what went wrong."""
        last, first, done = self._submitted, True, False
        try:
            while not done:
                await self.job.changed.wait()
                self.job.changed.clear()
                done = self.job.done  # before anything is read: what ends later is read at the next turn
                last, first = self.metrics.news(self.job, last, first), False
                yield
        finally:
            self._watch.cancel()
            if not self.job.done:
                self.loop.abort(self.job, ClientGone())
            self.metrics.end(self.job, self._submitted)
        if self.job.error:
            raise self.job.error

    async def end(self) -> None:
        """Waits for the job's end. Raises what went wrong."""
        async for _ in self.updates():
            pass
