"""Solves one problem by self-consistency: draws samples within a budget and takes the answer that wins the vote."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from m1.engine import LLM, Engine, Request, SamplingParams, Sequence, fold_in
from m1.errors import UserError
from m1.grading import Grader, extract_answer, with_thought
from m1.reasoning.budget import Budget, Timer, timed
from m1.reasoning.solution import Solution, VotedSample
from m1.reasoning.verifier import Weights, bound_of, weigh
from m1.reasoning.voting import vote
from m1.tasks.prompts import MATH, ProblemPrompt


def solve(
    problem: str,
    llm: LLM,
    grader: Grader,
    params: SamplingParams,
    budget: Budget,
    weights: Weights = "uniform",
    prompt: ProblemPrompt = MATH,
    on_step: Callable[[Solution], None] = lambda solution: None,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Draws samples of a problem until the budget stops them, and votes over their answers.

    Unfinished samples are aborted when the budget's rule applies or its seconds are over. The time is checked before
    every engine step, so the budget is exceeded by one step at most, on a GPU by two.

    The clock includes grading. A sample that finishes in the last, late step is compared only as text. The clock also
    includes the verifier, whose calls can't be interrupted. A call that began in time is waited for, and samples that
    finish too late for a call get weight 0. The clock excludes making the engine.

    Args:
        problem: the question, as a user would type it.
        params: of each sample. The budget sets the number of samples.
        weights: of the votes; see verifier.py.
        prompt: makes the chat messages. The default asks for the answer in a \\boxed{}, which is where votes are read
            from. A model trained on other prompts needs its own.
        on_step: called after every step with the solution so far. The clock includes it.
        clock: returns the current time in seconds; tests replace it.

    Raises:
        UserError: the engine refuses the prompt, a verifier's score is invalid, or the rule is "decided" and the
            verifier's scores have no known bound.
    """
    tokens = llm.encode(prompt.messages(problem))
    engine = llm.engine_for([tokens], params.max_tokens)
    timer, bound, solution = Timer(budget.seconds, clock), bound_of(weights), Solution()
    if budget.rule == "decided" and bound is None:
        raise UserError(
            "rule 'decided' needs the maximum weight of a sample: give the verifier an attribute `bound`, "
            "or choose the rule none or confident"
        )
    grader.start(timer.left())
    partition = timed(grader.partition, timer)
    requests: list[Request] = []
    with closing(engine.run(requests)) as steps:
        while not solution.reason and timer.left() > 0:
            if wave := _wave(engine, budget, requests):
                requests.append(Request(tokens, replace(params, n=wave, seed=fold_in(params.seed, len(requests)))))
                solution.sequences += requests[-1].sequences
            if ended := [_read(sequence, llm, timer.spent()) for sequence in next(steps)]:
                if not callable(weights) or timer.left() > 0:
                    _weigh(ended, problem, weights)
                solution.samples += ended
                answers = [sample.answer for sample in solution.samples]
                solution.vote = vote(answers, partition, [sample.weight for sample in solution.samples])
                solution.reason = budget.why_stop(solution.vote, len(answers), bound)
            solution.seconds = timer.spent()
            on_step(solution)
    solution.reason = solution.reason or "seconds"
    solution.seconds = timer.spent()
    return solution


def _wave(engine: Engine, budget: Budget, requests: list[Request]) -> int:
    """Number of samples to start now. With n, all at once: the engine queues them. Without n, one per free slot. If
    other requests take all slots, one sample is queued."""
    if budget.n is not None:
        return 0 if requests else budget.n
    return engine.free_slots or int(all(request.done for request in requests))


def _read(sequence: Sequence, llm: LLM, seconds: float) -> VotedSample:
    text = with_thought(llm.decode(sequence.request.tokens), llm.decode(sequence.token_ids))
    count = len(sequence.token_ids)
    logprob = math.fsum(sequence.logprobs) / count if count else 0.0
    return VotedSample(text, extract_answer(text), count, logprob, sequence.finish_reason, seconds)


def _weigh(samples: list[VotedSample], problem: str, weights: Weights) -> None:
    """Sets the weights of samples with an answer. The others keep weight 0, and the verifier never sees them."""
    voters = [sample for sample in samples if sample.answer is not None]
    if voters:
        scores = weigh(weights, problem, [s.text for s in voters], [s.logprob for s in voters])
        for sample, score in zip(voters, scores, strict=True):
            sample.weight = score
