"""Solves one problem by self-consistency: draws samples within a budget and takes the answer that wins the vote."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from m1.engine import LLM, Request, SamplingParams, Sequence, fold_in
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
    voting = SelfConsistency(problem, tokens, llm, grader, params, budget, weights, clock)
    grader.start(voting.timer.left())
    with closing(engine.run(voting.requests)) as steps:
        while not voting.over:
            voting.start(budget.n or engine.free_slots)  # with n all at once: the engine queues them
            voting.count(next(steps))
            on_step(voting.solution)
    return voting.finish()


class Tally:
    """The votes of one problem's samples, wherever they come from, and when to stop.

    Its clock starts when it is made.

    Args: those of `solve`.

    Attributes:
        solution: the solution so far.
        timer: measures the budget's seconds.
    """

    def __init__(
        self,
        problem: str,
        grader: Grader,
        budget: Budget,
        weights: Weights = "uniform",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.problem, self.budget, self.weights = problem, budget, weights
        self.bound = bound_of(weights)
        if budget.rule == "decided" and self.bound is None:
            raise UserError(
                "rule 'decided' needs the maximum weight of a sample: give the verifier an attribute `bound`, "
                "or choose the rule none or confident"
            )
        self.solution = Solution()
        self.timer = Timer(budget.seconds, clock)
        self._partition = timed(grader.partition, self.timer)

    @property
    def over(self) -> bool:
        """Whether to stop: the budget's rule applies, or its seconds are over."""
        return bool(self.solution.reason) or self.timer.left() <= 0

    def add(self, samples: list[VotedSample]) -> None:
        """Counts the votes of more samples, and sets the solution's reason to stop if there is one."""
        solution = self.solution
        if samples:
            if not callable(self.weights) or self.timer.left() > 0:
                _weigh(samples, self.problem, self.weights)
            solution.samples += samples
            answers = [sample.answer for sample in solution.samples]
            solution.vote = vote(answers, self._partition, [sample.weight for sample in solution.samples])
            solution.reason = self.budget.why_stop(solution.vote, len(answers), self.bound)
        solution.seconds = self.timer.spent()

    def finish(self) -> Solution:
        """The solution, with the reason to stop and the seconds taken."""
        self.solution.reason = self.solution.reason or "seconds"
        self.solution.seconds = self.timer.spent()
        return self.solution


class SelfConsistency(Tally):
    """One problem being solved by an engine: which samples to start, the vote so far, and when to stop.

    It steps no engine.

    Args: those of `solve`, and the prompt's tokens. Its clock starts when it is made.

    Attributes:
        requests: of its samples. `start` appends to them.
    """

    def __init__(
        self,
        problem: str,
        tokens: list[int],
        llm: LLM,
        grader: Grader,
        params: SamplingParams,
        budget: Budget,
        weights: Weights = "uniform",
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(problem, grader, budget, weights, clock)
        self.tokens, self.llm, self.params = tokens, llm, params
        self.requests: list[Request] = []

    def start(self, free: int) -> Request | None:
        """Appends a request for the samples to start now, at most `free`. One is queued if all others have ended.

        Sample i is drawn from stream i of the seed, whenever it starts.
        """
        begun = len(self.solution.sequences)
        left = math.inf if self.budget.n is None else self.budget.n - begun
        wave = int(min(left, free or all(request.done for request in self.requests)))
        if not wave:
            return None
        params = replace(self.params, n=wave, seed=fold_in(self.params.seed, 0))
        request = Request(self.tokens, params, indices=tuple(range(begun, begun + wave)))
        self.requests.append(request)
        self.solution.sequences += request.sequences
        return request

    def count(self, ended: list[Sequence]) -> None:
        """Counts the votes of samples that have ended, and sets the solution's reason to stop if there is one."""
        self.add([_read(sequence, self.llm, self.timer.spent()) for sequence in ended])


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
