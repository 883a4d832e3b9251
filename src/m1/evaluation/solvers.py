"""Solves one problem with samples of servers, or of a vLLM started here, as `reasoning.solve` does with an engine."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from m1.engine import LLM, SamplingParams
from m1.engine.sequence import shortened
from m1.errors import UserError
from m1.evaluation.endpoint import OPTIONAL, EndpointSampler
from m1.evaluation.samplers import Sample, SampleRequest
from m1.evaluation.vllm_server import SERVED_NAME, vllm_server
from m1.grading import Grader, extract_answer
from m1.grading.extract import opens_thought
from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution, VotedSample
from m1.reasoning.solve import Tally
from m1.reasoning.verifier import Weights
from m1.tasks.prompts import MATH, ProblemPrompt

MOST = 100_000  # samples of a problem that are sampled until its seconds are over


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


@contextmanager
def vllm_solver(
    llm: LLM, problems: Sequence[str], prompt: ProblemPrompt, params: SamplingParams, max_num_seqs: int
) -> Iterator[Callable[..., Solution]]:
    """Starts vLLM's server on a model, warms it up, and yields `solve_served` with samples of it.

    That returns once the server has dropped the unfinished samples, so the next model has the machine to itself.
    Requests have no seed and ask for no log-probabilities: both would cost vLLM time.

    Args:
        llm: the model. Its own engine isn't used.
        problems: all problems to come. They determine the server's max_model_len.
        prompt: makes the chat messages of a problem.
        params: of the sampling.
        max_num_seqs: maximum number of samples decoded in parallel.

    Raises:
        UserError: as `vllm_server`, or the server fails.
    """
    prompts = [llm.encode(prompt.messages(problem)) for problem in problems]
    length, opened = llm.length_for(prompts, params.max_tokens), opens_thought(llm.decode(prompts[0]))
    room = {problem: length - len(tokens) for problem, tokens in zip(problems, prompts, strict=True)}
    with vllm_server(llm, length, max_num_seqs) as url:
        sampler = EndpointSampler(url, SERVED_NAME, max_num_seqs, left_out=OPTIONAL, opens_thought=opened)

        def draw(n: int, tokens: int) -> None:
            request = SampleRequest("", prompt.messages(problems[0]), tuple(range(n)), 0)
            deque(sampler.generate([request], replace(params, max_tokens=tokens, min_tokens=0)), maxlen=0)

        def solve(problem: str, grader: Grader, params: SamplingParams, budget: Budget, **options: Any) -> Solution:
            params = shortened(params, room[problem], f"max_model_len={length}")  # as in this project's engine
            solution = solve_served(problem, sampler, grader, params, budget, **options)
            draw(1, 1)  # has its turn once the others have left; fails if the server has ended
            return solution

        draw(max_num_seqs, 2)  # warms up
        yield solve
