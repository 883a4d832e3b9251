"""One problem, many samples, one answer: self-consistency within a budget of samples and seconds."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from m1.engine import Completion, Engine, SamplingParams
from m1.engine.sampling import stream_of
from m1.engine.sequence import Request
from m1.errors import UserError
from m1.model.tokenizer import conversation_tokens
from m1.reasoning.answers import Grader, extract_answer
from m1.reasoning.budget import Budget, TimedGrader, Timer
from m1.reasoning.solution import Sample, Solution
from m1.reasoning.verifier import Weights, bound_of, weigh
from m1.reasoning.voting import vote


def solve(
    problem: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
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
    began in time is waited for, and samples that end too late for it weigh 0.

    Args:
        weights: of the votes; see verifier.py.
        on_step: called after every step with the solution so far; its time is on the clock.
        clock: seconds, for tests.

    Raises:
        UserError: a prompt the engine refuses, a verifier's impossible score, or the rule "decided" with a verifier
            whose scores have no known bound.
    """
    timer, bound, solution = Timer(budget.seconds, clock), bound_of(weights), Solution()
    if budget.rule == "decided" and bound is None:
        raise UserError(
            "rule 'decided' needs to know the most a sample can weigh: give the verifier an attribute `bound`, "
            "or choose the rule none or confident"
        )
    grader.start(timer.left())
    timed_grader = TimedGrader(grader, timer)
    prompt = chat_prompt(tokenizer, problem)
    requests: list[Request] = []
    mine: set[int] = set()  # others may use the engine, too
    try:
        while not solution.reason and timer.left() > 0:
            if wave := _wave(engine, budget, begun=len(mine)):
                seeded = replace(params, seed=stream_of(params.seed, len(requests)))
                requests.append(engine.submit(prompt, seeded, wave))
                solution.completions += requests[-1].completions
                mine |= {id(completion) for completion in requests[-1].completions}
            fresh = [completion for completion in engine.step() if id(completion) in mine]
            if ended := [_read(completion, tokenizer, timer.spent()) for completion in fresh]:
                if not callable(weights) or timer.left() > 0:
                    _weigh(ended, problem, weights)
                solution.samples += ended
                answers = [sample.answer for sample in solution.samples]
                solution.vote = vote(answers, timed_grader, [sample.weight for sample in solution.samples])
                solution.reason = budget.why_stop(solution.vote, len(answers), bound)
            solution.seconds = timer.spent()
            on_step(solution)
    finally:
        for request in requests:
            if not request.done:
                engine.abort(request)
    solution.reason = solution.reason or "seconds"
    solution.seconds = timer.spent()
    return solution


def _wave(engine: Engine, budget: Budget, begun: int) -> int:
    """Samples to begin now: all n at once, which the engine queues, or else as many as it has free slots."""
    if budget.n is not None:
        return budget.n - begun
    return 0 if engine.scheduler.waiting else len(engine.slots.free)


def _read(completion: Completion, tokenizer: PreTrainedTokenizerBase, seconds: float) -> Sample:
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    count = len(completion.token_ids)
    logprob = math.fsum(completion.logprobs) / count if count else 0.0
    return Sample(text, extract_answer(text), count, logprob, completion.finish_reason, seconds)


def _weigh(samples: list[Sample], problem: str, weights: Weights) -> None:
    """Those with an answer; nothing is asked about the others, whose weight stays 0."""
    voters = [sample for sample in samples if sample.answer is not None]
    if voters:
        scores = weigh(weights, problem, [s.text for s in voters], [s.logprob for s in voters])
        for sample, score in zip(voters, scores, strict=True):
            sample.weight = score


def chat_prompt(tokenizer: PreTrainedTokenizerBase, problem: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a user's message, or of whole messages, ready for the assistant's.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
    return conversation_tokens(tokenizer, messages, add_generation_prompt=True)
