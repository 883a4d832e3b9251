"""A row's next token and its log-probability, in one operation over the logits. For inference only."""

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, decode_operator
from m1.ops.shapes import Shapes

CHECK = Shapes(
    "sample_token", logits="b V", uniform="b", temperature="b", where={"V must be at least 1": lambda V: V > 0}
)


def sample_token(
    logits: Tensor, uniform: Tensor, temperature: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Draws a token per row by the inverse of its distribution function.

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
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    CHECK(logits, uniform, temperature)
    known = {"float32 or bfloat16": logits.dtype in (torch.float32, torch.bfloat16)}
    backend = choose("sample_token", backend, logits, known)
    if backend == "reference":
        return reference.sample_token(logits, uniform, temperature)
    uniform, temperature = uniform.double().contiguous(), temperature.float().contiguous()
    return _sample_token(logits.contiguous(), uniform, temperature, backend)


def _new_outputs(logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.long), logits.new_empty(len(logits), dtype=torch.float32)


ARGUMENTS = "Tensor logits, Tensor uniform, Tensor temperature"
_sample_token = decode_operator("sample_token", "sample_token", ARGUMENTS, _new_outputs, returns="(Tensor, Tensor)")
