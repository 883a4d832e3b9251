"""What the engine is asked for, and the samples it makes of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from m1.engine.sampling import SamplingParams, fold_in


@dataclass(eq=False)
class Request:
    """A prompt to sample `params.n` times.

    Args:
        tokens: the prompt.
        params: how to sample. `params.seed` and a sequence's index make that sequence's random stream.
        id: names the request in errors; otherwise the caller's own.
    """

    tokens: list[int]
    params: SamplingParams
    id: int = 0
    sequences: list["Sequence"] = field(init=False)
    # The scheduler's notes.
    stop: frozenset[int] = frozenset()  # tokens that end a sequence
    started: int = 0  # sequences that have, or had, a slot
    slot: int | None = None  # holds the prompt until the last sequence takes it over
    computed: int = 0  # prompt tokens the slot has seen

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.params.n)]

    @property
    def done(self) -> bool:
        return all(sequence.done for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request: its tokens so far, their log-probabilities, and why it ended.

    `token_ids` includes the stop token, if it was reached. `finish_reason` is "stop", "length", "nan" (the model's
    logits), or "abort" as long as the sequence hasn't ended by itself.
    """

    request: Request
    index: int  # among the request's n
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "abort"
    done: bool = False
    # The scheduler's notes.
    id: int = -1  # unique among the sequences of an engine
    slot: int = -1
    base: int = 0  # plus a plan's number: tokens the slot has seen when that plan decodes it
    last_plan: int = 0  # the last plan that decodes it


def requests_for(prompts: Iterable[list[int]], params: SamplingParams) -> list[Request]:
    """One request for each prompt. The prompt's number is the request's id, and is folded into its seed."""
    return [Request(prompt, replace(params, seed=fold_in(params.seed, i)), i) for i, prompt in enumerate(prompts)]
