"""What goes into the engine and comes out of it: `Request` and `Sequence`."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from m1.engine.sampling import SamplingParams
from m1.errors import M1Warning
from m1.ops.random_bits import fold_in

TopLogprobs = list[list[tuple[int, float]]]  # by position and rank: a token and its log-probability


@dataclass(eq=False)
class Request:
    """A prompt to be sampled `params.n` times by the engine.

    Args:
        tokens: the prompt's token ids.
        params: how to sample. Each sequence's random stream is `fold_in(params.seed, its index)`.
        id: the caller's number for the request. Error messages name it.
        indices: the sequences' indices; they replace `params.n`. A job that resumes asks for those it lacks. When
            None, 0 to n - 1.
        resumable: keeps the states at the ends of its sequences for a prompt that continues one, such as a chat's next
            turn, and continues such a state itself. That rounds otherwise than a prefill of the whole prompt.
        prompt_logprobs: computes the log-probabilities of the prompt's tokens, too. The prefix cache isn't used then.

    Attributes:
        sequences: the samples, which the engine fills.
        logprobs: of the prompt's second and further tokens, if asked for, at temperature 1.
        top_logprobs: at each of these, as in `Sequence`.
        cached: number of prompt tokens that were found in the prefix cache.
        done: whether all of them have ended.
    """

    tokens: list[int]
    params: SamplingParams
    id: int = 0
    indices: tuple[int, ...] | None = None
    resumable: bool = False
    prompt_logprobs: bool = False
    logprobs: list[float] = field(default_factory=list, init=False)
    top_logprobs: TopLogprobs = field(default_factory=list, init=False)
    sequences: list["Sequence"] = field(init=False)
    cached: int = field(default=0, init=False)
    # The scheduler's own fields.
    stop: frozenset[int] = frozenset()  # tokens that end a sequence
    started: int = 0  # number of sequences that have, or had, a slot
    slot: int | None = None  # holds the prompt until a sequence takes it over
    computed: int = 0  # number of prompt tokens the slot has seen
    pages: list[int] = field(default_factory=list)  # of the slot
    scored: int = 0  # number of prompt tokens whose chunks score what follows

    def __post_init__(self) -> None:
        if self.indices is not None:
            self.params = replace(self.params, n=len(self.indices))
        self.sequences = [Sequence(self, index) for index in self.indices or range(self.params.n)]

    @property
    def done(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.done for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request, which grows by one token per step until it is done.

    Attributes:
        request: the request it belongs to.
        index: its number among the prompt's samples, from 0.
        token_ids: the tokens drawn so far, including the stop token if it was reached.
        logprobs: their log-probabilities.
        top_logprobs: for each of them the `params.logprobs` likeliest tokens there and their log-probabilities, in
            order, of equal ones the lowest ids first; empty if that is 0.
        finish_reason: "stop", "length" or "nan" (NaN in the model's logits); "abort" before the end and after an abort.
        done: whether it has ended.
    """

    request: Request
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: TopLogprobs = field(default_factory=list)
    finish_reason: str = "abort"
    done: bool = False
    # The scheduler's own fields.
    id: int = -1  # unique among the sequences of an engine
    slot: int = -1
    base: int = 0  # base + a plan's number = tokens the slot has seen when that plan decodes the sequence
    last_plan: int = 0  # number of the last plan that decodes the sequence; while swapped out, both as of plan 0
    pages: list[int] = field(default_factory=list)

    def forget(self) -> None:
        """Frees the tokens of a sequence that is done, which a job of many requests would keep to its end."""
        self.token_ids, self.logprobs, self.top_logprobs = [], [], []


def shortened(params: SamplingParams, room: int, limit: str) -> SamplingParams:
    """The parameters with max_tokens at most `room`, as in vLLM, with a warning that names the limit if it is less."""
    if params.max_tokens <= room:
        return params
    text = f"max_tokens is {params.max_tokens}, more than {limit} leaves: samples end there"
    warnings.warn(text, M1Warning, stacklevel=2)
    return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))


def requests_for(prompts: Iterable[list[int]], params: SamplingParams) -> list[Request]:
    """Makes one request per prompt. The prompt's number is the request's id and is folded into its seed."""
    return [Request(prompt, replace(params, seed=fold_in(params.seed, i)), i) for i, prompt in enumerate(prompts)]
