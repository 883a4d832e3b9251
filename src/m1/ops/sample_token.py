"""A row's next token and its log-probability, in one operation over the logits. For inference only."""

from typing import Any

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, decode_operator, kernels, require_shapes


def sample_token(
    logits: Tensor, uniform: Tensor, temperature: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Draws a token a row by the inverse of its distribution function.

    A row's token is the one at which the running sum of its probabilities passes `uniform` of their total; one of
    probability 0 (a logit of -inf) is never drawn. What a row draws doesn't depend on the other rows.

    Args:
        logits: [b, V].
        uniform: [b], in [0, 1).
        temperature: [b], divides the logits; 0 takes the likeliest token, the first of equals.

    Returns:
        tokens: [b] int64.
        logprobs: [b] float32, under softmax(logits / temperature), at temperature 0 under softmax(logits); NaN where a
            row's logits have a NaN or +inf.

    Raises:
        ValueError: shapes that don't fit, or a backend that can't run this.
    """
    b, V = logits.shape
    named = dict(logits=logits, uniform=uniform, temperature=temperature)
    require_shapes("sample_token", [uniform.shape == temperature.shape == (b,), V > 0], named)
    known = {"float32 or bfloat16": logits.dtype in (torch.float32, torch.bfloat16)}
    backend = choose("sample_token", backend, logits, known)
    if backend == "reference":
        return reference.sample_token(logits, uniform, temperature)
    return _sample_token(logits.contiguous(), uniform.double(), temperature.float(), backend)


@decode_operator("sample_token")
def _sample_token(logits: Tensor, uniform: Tensor, temperature: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    kernels(backend, "sample_token").sample_token(logits, uniform, temperature, tokens, logprobs)
    return tokens, logprobs


@torch.library.register_fake("m1::sample_token")
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.long), logits.new_empty(len(logits), dtype=torch.float32)
