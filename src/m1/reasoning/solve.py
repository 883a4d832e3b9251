"""One problem, many samples, one answer: self-consistency within a budget of samples and seconds."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from m1.engine import LLM, Engine, Request, SamplingParams, Sequence, fold_in
from m1.errors import UserError
from m1.reasoning.answers import Grader, extract_answer
from m1.reasoning.budget import Budget, TimedGrader, Timer
from m1.reasoning.solution import Sample, Solution
from m1.reasoning.verifier import Weights, bound_of, weigh
from m1.reasoning.voting import vote


def solve(
    problem: str,
    llm: LLM,
    grader: Grader,
    params: SamplingParams,
    budget: Budget,
    weights: Weights = "uniform",
    on_step: Callable[[Solution], None] = lambda solution: None,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Votes over samples of the problem (a user message, given to the chat template as it stands).

    When the budget's rule or its seconds end it, unfinished samples are aborted. Seconds are looked at before every
    step of the engine, so they are overrun by one step at most. Grading is on the clock: a sample that ends in the
    step that overruns is compared by its text alone. So is a verifier, which can't be interrupted: one call of it that
    began in time is waited for, and samples that end too late for it weigh 0. Making the engine, where there is none
    yet, is not.

    Args:
        params: of a sample; the number of samples is the budget's.
        weights: of the votes; see verifier.py.
        on_step: called after every step with the solution so far; its time is on the clock.
        clock: seconds, for tests.

    Raises:
        UserError: a prompt the engine refuses, a verifier's impossible score, or the rule "decided" with a verifier
            whose scores have no known bound.
    """
    prompt = llm.encode([{"role": "user", "content": problem}])
    engine = llm.engine_for([prompt], params.max_tokens)
    timer, bound, solution = Timer(budget.seconds, clock), bound_of(weights), Solution()
    if budget.rule == "decided" and bound is None:
        raise UserError(
            "rule 'decided' needs to know the most a sample can weigh: give the verifier an attribute `bound`, "
            "or choose the rule none or confident"
        )
    grader.start(timer.left())
    timed_grader = TimedGrader(grader, timer)
    requests: list[Request] = []
    with closing(engine.run(requests)) as steps:
        while not solution.reason and timer.left() > 0:
            if wave := _wave(engine, budget, requests):
                requests.append(Request(prompt, replace(params, n=wave, seed=fold_in(params.seed, len(requests)))))
                solution.sequences += requests[-1].sequences
            if ended := [_read(sequence, llm, timer.spent()) for sequence in next(steps)]:
                if not callable(weights) or timer.left() > 0:
                    _weigh(ended, problem, weights)
                solution.samples += ended
                answers = [sample.answer for sample in solution.samples]
                solution.vote = vote(answers, timed_grader, [sample.weight for sample in solution.samples])
                solution.reason = budget.why_stop(solution.vote, len(answers), bound)
            solution.seconds = timer.spent()
            on_step(solution)
    solution.reason = solution.reason or "seconds"
    solution.seconds = timer.spent()
    return solution


def _wave(engine: Engine, budget: Budget, requests: list[Request]) -> int:
    """Samples to begin now: all n at once, which the engine queues; without n, one for each free slot, or one that
    waits where others have taken all."""
    if budget.n is not None:
        return 0 if requests else budget.n
    return engine.free_slots or int(all(request.done for request in requests))


def _read(sequence: Sequence, llm: LLM, seconds: float) -> Sample:
    text, count = llm.decode(sequence.token_ids), len(sequence.token_ids)
    logprob = math.fsum(sequence.logprobs) / count if count else 0.0
    return Sample(text, extract_answer(text), count, logprob, sequence.finish_reason, seconds)


def _weigh(samples: list[Sample], problem: str, weights: Weights) -> None:
    """Those with an answer; nothing is asked about the others, whose weight stays 0."""
    voters = [sample for sample in samples if sample.answer is not None]
    if voters:
        scores = weigh(weights, problem, [s.text for s in voters], [s.logprob for s in voters])
        for sample, score in zip(voters, scores, strict=True):
            sample.weight = score
