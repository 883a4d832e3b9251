"""What the engine is asked for and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from m1.engine.sampling import SamplingParams, stream_of


@dataclass
class Completion:
    """One sample: new token ids (with the stop token, if it was reached), their log-probabilities, why it ended."""

    prompt: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = (
        "abort"  # "stop", "length", "nan" (the model's logits), or "abort" until it has ended by itself
    )
    done: bool = False


@dataclass(eq=False)
class Request:
    """A prompt, n samples of it, and how far they are."""

    tokens: Sequence[int]
    params: SamplingParams
    completions: list[Completion]
    stop: frozenset[int] = frozenset()  # tokens that end a sample
    started: int = 0  # samples that have a slot of their own, or had
    slot: int | None = None  # holds the prompt until the last sample takes it over
    seen: int = 0  # prompt tokens the slot has seen
    logits: Tensor | None = None  # [V] behind the prompt

    @property
    def done(self) -> bool:
        return all(completion.done for completion in self.completions)


@dataclass(eq=False)
class Running:
    """A sample that is being decoded, in a slot and from a random stream of its own."""

    request: Request
    completion: Completion
    slot: int
    stream: int

    @property
    def length(self) -> int:
        """Tokens that the slot has seen: all but the last one sampled."""
        return len(self.request.tokens) + len(self.completion.token_ids) - 1

    @classmethod
    def start(cls, request: Request, slot: int) -> "Running":
        sample, request.started = request.started, request.started + 1
        return cls(request, request.completions[sample], slot, stream_of(request.params.seed, sample))
