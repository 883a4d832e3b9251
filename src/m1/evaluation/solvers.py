"""Solvers for `m1 budget` sample a problem for some seconds, with this engine, with vLLM or on servers."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from m1.engine import LLM, SamplingParams
from m1.errors import UserError
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.samplers import Sample, SampleRequest
from m1.grading import Grader, extract_answer, with_thought
from m1.model.tokenizer import encode_chat
from m1.peers.vllm_client import Worker, start_vllm
from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution, VotedSample
from m1.reasoning.solve import Tally, solve
from m1.reasoning.verifier import Weights
from m1.tasks.prompts import MATH, ProblemPrompt

MOST = 100_000  # samples of a problem that are sampled until its seconds are over


class Ended(NamedTuple):
    """A sample that finished within a problem's time.

    Attributes:
        seconds: from the start of the problem to the end of the sample.
        answer: the final answer; None if the sample has none.
        tokens: number of generated tokens.
    """

    seconds: float
    answer: str | None
    tokens: int


class Solver(Protocol):
    """The interface through which `m1 budget` has an engine sample one problem for a number of seconds.

    A solver draws as many samples as fit. A new one starts whenever another frees its slot.
    """

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Samples a problem until its time is over.

        Args:
            text: the problem.
            seed: of the sampling.
            seconds: the time.

        Returns:
            The seconds it took, and the finished samples in the order in which they finished.
        """


def solve_served(
    problem: str,
    sampler: EndpointSampler,
    grader: Grader,
    params: SamplingParams,
    budget: Budget,
    weights: Weights = "uniform",
    prompt: ProblemPrompt = MATH,
    on_step: Callable[[Solution], None] = lambda solution: None,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """`reasoning.solve.solve`, with samples of servers.

    Each sample is a request of its own. As soon as the vote is decided, or its seconds are over, the connections of the
    unfinished ones are closed, and with them a server ends the samples. Arguments are those of `solve`.

    Raises:
        UserError: the servers fail, or give no log-probabilities to weigh by.
    """
    sampler.prepare()
    tally = Tally(problem, grader, budget, weights, clock)
    tally.solution.asked = budget.n or sampler.concurrency * len(sampler.servers)
    grader.start(tally.timer.left())
    request = SampleRequest(problem, prompt.messages(problem), tuple(range(budget.n or MOST)), params.seed)
    with closing(sampler.generate([request], params, tally.timer.left)) as samples:
        for sample in samples:
            tally.add([_voted(sample, weights, tally.timer.spent())])
            if budget.n is None:  # another request takes its place
                tally.solution.asked += 1
            on_step(tally.solution)
            if tally.over:
                break
    return tally.finish()


def _voted(sample: Sample, weights: Weights, seconds: float) -> VotedSample:
    if sample.logprob is None and weights == "logprob":
        raise UserError("weights logprob: the server gives no log-probabilities; choose others")
    tokens = sample.tokens or 0
    logprob = (sample.logprob or 0.0) / max(tokens, 1)
    return VotedSample(sample.text, extract_answer(sample.text), tokens, logprob, sample.finish_reason, seconds)


class ServedSolver:
    """Solves problems with samples of servers.

    Its clock includes the vote after each sample, but not the start of a grading worker.

    Args:
        sampler: asks the servers.
        prompt: makes the chat messages of a problem.
        params: of the sampling, except for the seed.
        grader: decides which answers are equal.
    """

    def __init__(self, sampler: EndpointSampler, prompt: ProblemPrompt, params: SamplingParams, grader: Grader):
        self.sampler, self.prompt, self.params, self.grader = sampler, prompt, params, grader

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Solves a problem by voting without an early stop (see `Solver`)."""
        self.grader.start()
        budget, params = Budget(seconds=seconds, rule="none"), replace(self.params, seed=seed)
        solution = solve_served(text, self.sampler, self.grader, params, budget, prompt=self.prompt)
        return solution.seconds, [Ended(s.seconds, s.answer, s.tokens) for s in solution.samples]


class EngineSolver:
    """Solves problems with this project's engine, which is warmed up: it compiles and captures graphs when made.

    Its clock includes the vote after each sample, but not the start of a grading worker.

    Args:
        llm: the model.
        prompt: makes the chat messages of a problem.
        prompts: token ids of all prompts to come. They determine the engine's max_model_len.
        params: of the sampling, except for the seed and the number of samples.
        grader: decides which answers are equal.
    """

    def __init__(
        self, llm: LLM, prompt: ProblemPrompt, prompts: list[list[int]], params: SamplingParams, grader: Grader
    ):
        self.llm, self.prompt, self.params, self.grader = llm, prompt, params, grader
        engine = llm.engine_for(prompts, params.max_tokens)
        engine.generate(prompts[:1], replace(params, max_tokens=2, n=engine.num_slots))

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Solves a problem by voting without an early stop (see `Solver`)."""
        self.grader.start()
        budget = Budget(seconds=seconds, rule="none")
        params = replace(self.params, seed=seed)
        solution = solve(text, self.llm, self.grader, params, budget, prompt=self.prompt)
        return solution.seconds, [Ended(s.seconds, s.answer, s.tokens) for s in solution.samples]


class VLLMSolver:
    """Solves problems with vLLM, which runs in its own process and is warmed up. It ignores the seed.

    Its clock includes sampling only.

    Args:
        llm: gives the tokenizer and the stop tokens.
        ask: sends work to vLLM's process.
        prompt: makes the chat messages of a problem.
        prompts: token ids; the first prompt is used to warm up.
        params: of the sampling: max_tokens, temperature, top_k, top_p and min_p.
    """

    def __init__(self, llm: LLM, ask: Worker, prompt: ProblemPrompt, prompts: list[list[int]], params: SamplingParams):
        self.llm, self.ask, self.prompt, self.params = llm, ask, prompt, params
        self.length = llm.length_for(prompts, params.max_tokens)
        self._sample(prompts[0], replace(params, max_tokens=2), [], 1.0)

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Samples a problem with vLLM (see `Solver`)."""
        prompt = encode_chat(self.llm.tokenizer, self.prompt.messages(text))
        answer = self._sample(prompt, self.params, self.llm.stop_token_ids, seconds)
        ended = []
        for sample in answer["samples"]:
            text = with_thought(self.llm.decode(prompt), self.llm.decode(sample["token_ids"]))
            ended.append(Ended(sample["seconds"], extract_answer(text), len(sample["token_ids"])))
        return answer["seconds"], ended

    def _sample(self, prompt: list[int], params: SamplingParams, stop: list[int], seconds: float) -> dict[str, Any]:
        new_tokens = min(params.max_tokens, self.length - len(prompt))  # as in this project's engine
        drawn = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return self.ask({"tokens": prompt, "new_tokens": new_tokens, **drawn, "stop": stop, "seconds": seconds})


@contextmanager
def vllm_solver(
    llm: LLM, prompt: ProblemPrompt, prompts: list[list[int]], params: SamplingParams, max_num_seqs: int
) -> Iterator[VLLMSolver]:
    """Runs vLLM on the model of `llm` until the context ends, and yields a solver.

    Raises:
        UserError: vLLM isn't installed or can't run the model, or the model is on a GPU.
    """
    if llm.model.device.type != "cpu":
        raise UserError(f"vllm: `make peers` installs it for CPUs only, but the model is on {llm.model.device}")
    with start_vllm(llm.model, llm.length_for(prompts, params.max_tokens), max_num_seqs) as ask:
        yield VLLMSolver(llm, ask, prompt, prompts, params)
