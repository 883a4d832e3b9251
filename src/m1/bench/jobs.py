"""`m1 bench jobs`: measures whole jobs, prompts and samples, by this engine and vLLM.

Weights and prompts are random, every prompt is different, and all are submitted at once. The temperature is 1, and no
sample stops early. The same job with one new token per sample tells how long the prompts take.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from m1.bench.contest import begin
from m1.bench.decoders import (
    OnRun,
    clock,
    free_memory,
    ignore,
    is_hybrid,
    measure_engines,
    model_on_device,
    quantization_of,
    random_prompts,
)  # fmt: skip
from m1.bench.options import VLLM, Job, JobsOptions
from m1.engine import Engine, Request, SamplingParams
from m1.options import Quantization
from m1.peers.vllm_client import find_python, start_vllm


class TimedJob(NamedTuple):
    """One timed run of a job by one engine.

    Attributes:
        seconds: time from the prompts' submission to the last token.
        prefill_seconds: time to the first token of every sample, in a job that ends with it.
        facts: further entries of the job's row.
    """

    seconds: float
    prefill_seconds: float
    facts: dict[str, Any]


JobRunner = Callable[[int, int, int, int], TimedJob]  # arguments: the numbers of a Job


def run(options: JobsOptions, on_run: OnRun = ignore) -> dict[str, Any]:
    """Measures all engines. Returns the result that is printed and written."""
    _, result = begin(options)
    return measure_engines(options, options.chosen_jobs(), start, partial(rows_of, options), result, on_run)


def rows_of(options: JobsOptions, job: Job, runs: dict[str, list[TimedJob]]) -> list[dict[str, Any]]:
    """The rows of one job: for each engine its median times, and its speed relative to its peers."""
    rows = []
    tokens = job.samples * sum(options.new_tokens(job))
    whole = {name: statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    prefill = {name: statistics.median(run.prefill_seconds for run in taken) for name, taken in runs.items()}
    for name, taken in runs.items():
        seconds = [run.seconds for run in taken]
        row = {"name": name, "job": str(job), "sampled_tokens": tokens, "runs": len(taken), "seconds": whole[name]}
        row |= {"seconds_min": min(seconds), "seconds_max": max(seconds), "tokens_per_second": tokens / whole[name]}
        row |= {"prefill_seconds": prefill[name], "max_num_seqs": options.num_seqs(job), **taken[-1].facts}
        for peer in (*VLLM, "ours-transformer"):
            if peer in runs and name != peer:
                row[f"times_{peer}"] = whole[peer] / whole[name]
                row[f"prefill_times_{peer}"] = prefill[peer] / prefill[name]
        rows.append(row)
    return rows


@contextmanager
def start(name: str, options: JobsOptions) -> Iterator[JobRunner]:
    """Starts an engine. Its processes end with the context."""
    if name not in VLLM:
        yield own_engine(options, is_hybrid(name), quantization_of(name))
        return
    most, python = max(map(options.num_seqs, options.chosen_jobs())), find_python(options.vllm_python, options.device)
    with start_vllm(model_on_device(options, is_hybrid(name)), options.max_model_len, most, python) as ask:
        ask({"batch": 1, "prompt": options.chosen_jobs()[0].tokens, "new_tokens": 1, "seed": 0})
        facts = {
            "start_seconds": time.perf_counter() - ask.launched,
            "versions": ask.versions,
            "settings": ask.settings,
        }
        warm: set[Job] = set()

        def run(*numbers: int) -> TimedJob:
            job = Job(*numbers)
            work: dict[str, Any] = {"batch": job.prompts, "prompt": job.tokens, "samples": job.samples, "seed": 0}
            if job not in warm:
                ask(work | {"new_tokens": job.new_tokens, "lengths": warmup(options, job)})
                warm.add(job)
            work |= {"lengths": options.new_tokens(job)}
            first, whole = (ask(work | {"new_tokens": new}) for new in (1, job.new_tokens))
            found = {"prompt_tokens": whole["prompt_tokens"], "peak_memory_bytes": whole["peak_bytes"]}
            return TimedJob(whole["seconds"], first["seconds"], facts | present(found))

        yield run


def own_engine(options: JobsOptions, hybrid: bool, quantize: Quantization | None = None) -> JobRunner:
    """Runs jobs in this engine. Each job has an engine with as many slots, and as long ones, as it needs."""
    model = model_on_device(options, hybrid)
    engine: Engine | None = None
    current: Job | None = None
    start_seconds = 0.0

    def run(*numbers: int) -> TimedJob:
        nonlocal engine, current, start_seconds
        job = Job(*numbers)
        if engine is None or job != current:
            engine = None
            free_memory(options)
            began = clock(options)
            engine = Engine(
                model,
                [],
                options.num_seqs(job),
                max_model_len=job.max_model_len,
                prefix_cache=0,  # a repeated job must be computed again
                quantize=quantize,
            )
            seconds_of(options, engine, job._replace(prompts=1, samples=1), [1])
            start_seconds, current = clock(options) - began, job
            seconds_of(options, engine, job, warmup(options, job))
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, _ = seconds_of(options, engine, job, [1] * job.prompts)
        computed = engine.stats.prefilled
        whole, together = seconds_of(options, engine, job, options.new_tokens(job))
        facts = {"start_seconds": start_seconds, "together": together}
        facts |= {"prompt_tokens": engine.stats.prefilled - computed}
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
        return TimedJob(whole, first, facts | present({"peak_memory_bytes": peak}))

    return run


def seconds_of(options: JobsOptions, engine: Engine, job: Job, lengths: Sequence[int]) -> tuple[float, int]:
    """Runs a job with `lengths[i]` new tokens for each sample of prompt i.

    Returns its seconds, and the largest number of sequences that were decoded together.
    """
    prompts = random_prompts(options.shape, job.prompts, job.tokens)
    requests = [
        Request(prompt, SamplingParams(n=job.samples, max_tokens=length, seed=i), i)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    together, began = 0, clock(options)
    for _ in engine.run(requests):
        together = max(together, len(engine.scheduler.running))
    return clock(options) - began, together


def warmup(options: JobsOptions, job: Job) -> list[int]:
    """New tokens of each prompt's samples in an untimed job: two, or one more each where a batch is to shrink.

    Kernels are compiled, and graphs captured, for each size of a batch.
    """
    if len(set(options.new_tokens(job))) == 1:
        return [2] * job.prompts
    return [min(2 + i, job.new_tokens) for i in range(job.prompts)]


def present(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that are known."""
    return {key: value for key, value in facts.items() if value is not None}
