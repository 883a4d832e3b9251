"""What dashboards of vLLM read, under the prefix m1: in Prometheus's text format."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from m1.serve.jobs import Ballot, Generation, Job
from m1.serve.loop import EngineLoop

GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)  # seconds
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class EngineCounters(Collector):
    """Reads the engines' own counters when it is asked."""

    def __init__(self, loops: dict[str, EngineLoop]):
        self.loops = loops

    def collect(self) -> list[Metric]:
        """One value per model and counter."""
        running = GaugeMetricFamily("m1:num_requests_running", "Samples being decoded.", labels=["model_name"])
        waiting = GaugeMetricFamily("m1:num_requests_waiting", "Requests that wait for slots.", labels=["model_name"])
        totals = {
            "decoded": CounterMetricFamily("m1:generation_tokens", "Tokens drawn.", labels=["model_name"]),
            "prefilled": CounterMetricFamily("m1:prompt_tokens", "Prompt tokens computed.", labels=["model_name"]),
            "prefix_queries": CounterMetricFamily(
                "m1:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", labels=["model_name"]
            ),
            "prefix_hits": CounterMetricFamily(
                "m1:prefix_cache_hits", "Prompt tokens found in the prefix cache.", labels=["model_name"]
            ),
            "swaps": CounterMetricFamily(
                "m1:num_preemptions", "Samples swapped out for want of memory.", labels=["model_name"]
            ),
        }
        for name, loop in self.loops.items():
            running.add_metric([name], len(loop.engine.scheduler.running))
            waiting.add_metric([name], len(loop.engine.scheduler.waiting))
            for counter, family in totals.items():
                family.add_metric([name], getattr(loop.engine.stats, counter))
        return [running, waiting, *totals.values()]


class Metrics:
    """Counts requests and measures their latencies."""

    def __init__(self, loops: dict[str, EngineLoop]):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCounters(loops))
        self._first = Histogram(
            "m1:time_to_first_token_seconds", "From submission to the first new text.", buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._between = Histogram(
            "m1:inter_token_latency_seconds", "Between two new texts of a stream.", buckets=GAPS,
            registry=self._registry,
        )  # fmt: skip
        self._whole = Histogram(
            "m1:e2e_request_latency_seconds", "From submission to the end.", buckets=SECONDS, registry=self._registry
        )
        self._ended = Counter("m1:request_success", "Requests that ended well.", registry=self._registry)
        self._failed = Counter("m1:request_failure", "Requests that failed or were given up.", registry=self._registry)
        self._votes = Counter("m1:votes", "Votes, by why they stopped.", ["reason"], registry=self._registry)

    def text(self) -> bytes:
        """All values, as Prometheus reads them."""
        return generate_latest(self._registry)

    def news(self, job: Job, since: float, first: bool) -> float:
        """Notes that a request has something new to read. Returns the time, by time.monotonic.

        Args:
            job: the request's.
            since: the time of the news before, or of the submission.
            first: whether it is the first.
        """
        now = time.monotonic()
        if first:
            self._first.observe(now - since)
        elif isinstance(job, Generation) and job.streamed:
            self._between.observe(now - since)
        return now

    def end(self, job: Job, since: float) -> None:
        """Notes a request's end."""
        self._whole.observe(time.monotonic() - since)
        (self._failed if job.error or not job.done else self._ended).inc()
        if isinstance(job, Ballot) and job.solution.reason:
            self._votes.labels(job.solution.reason).inc()
