"""One problem, many samples, one answer: self-consistency within a budget of samples and seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from m1.engine import Completion, Engine, SamplingParams
from m1.model.tokenizer import conversation_tokens
from m1.reasoning.answers import TIMEOUT_SECONDS, Grader, extract_answer
from m1.reasoning.voting import Vote, vote


@dataclass
class Solution:
    """The vote, the samples behind it, what they cost and why it ended ("all", "decided" or "seconds")."""

    vote: Vote
    texts: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    reason: str = "all"


def solve(
    problem: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    params: SamplingParams,
    n: int = 16,
    seconds: float | None = None,
    stop_when_decided: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Votes over n samples of the problem (a user message, given to the chat template as it stands).

    Unfinished samples are aborted as soon as the leader can't be caught (lossless: the answer is that of all n, unless
    answers tie in value but not in spelling), or when `seconds` are over; a budget is overrun by one step at most.

    Args:
        clock: for tests.
    """
    grader.start()
    started = clock()
    prompt = chat_prompt(tokenizer, problem)
    solution = Solution(vote=Vote({}, 0))

    def finished(completion: Completion) -> None:
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        solution.texts.append(text)
        solution.answers.append(extract_answer(text))
        if seconds is not None:  # grading is on the clock, too
            grader.timeout = max(0.1, min(TIMEOUT_SECONDS, started + seconds - clock()))
        solution.vote = vote(solution.answers, grader)

    def should_stop() -> bool:
        if seconds is not None and clock() - started >= seconds:
            solution.reason = "seconds"
        elif stop_when_decided and solution.vote.decided(remaining=n - len(solution.answers)):
            solution.reason = "decided"
        return solution.reason != "all"

    completions = engine.generate([prompt], params, n, should_stop=should_stop, on_finish=finished)
    solution.tokens = sum(len(c.token_ids) for c in completions)
    solution.seconds = clock() - started
    return solution


def chat_prompt(tokenizer: PreTrainedTokenizerBase, problem: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a user's message, or of whole messages, ready for the assistant's.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
    return conversation_tokens(tokenizer, messages, add_generation_prompt=True)
