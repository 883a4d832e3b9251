"""How the next token is chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m1.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one generation call.

    Args:
        max_tokens: new tokens at most.
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens (0: all).
        top_p: only the likeliest tokens that together have this probability (1: all).
        seed: of the random draws.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
        }
        for name, fits in checks.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)} is out of range")


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a token a row.

    Args:
        logits: [b, V].

    Returns:
        tokens [b] and their log-probabilities [b] under softmax(logits / temperature) before truncation, float32
        (at temperature 0: under softmax(logits)).
    """
    logits = logits.float() / (params.temperature or 1.0)
    logprobs = logits.log_softmax(dim=-1)
    if params.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        tokens = torch.multinomial(_truncate(logprobs, params).exp(), 1, generator=generator).squeeze(1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _truncate(logprobs: Tensor, params: SamplingParams) -> Tensor:
    """-inf where top-k or top-p leaves a token out; the likeliest token always stays."""
    if params.top_k:
        threshold = logprobs.topk(min(params.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < threshold, -torch.inf)
    if params.top_p < 1:
        ordered, index = logprobs.softmax(-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= params.top_p
        logprobs = logprobs.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return logprobs
