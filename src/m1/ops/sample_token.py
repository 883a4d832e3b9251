"""Sampling of each row's next token and its log-probability, as one op over the logits. For inference only."""

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.shapes import KERNEL_FLOATS, Shapes

CHECK = Shapes(
    "sample_token", logits="b V", uniform="b", temperature="b", where={"V must be at least 1": lambda V: V > 0}
)


def sample_token(
    logits: Tensor, uniform: Tensor, temperature: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverse transform sampling.

    A row's token is the first at which the running sum of probabilities exceeds `uniform` times their total. A token of
    probability 0 (a logit of -inf) is never drawn. Results are batch-invariant.

    Args:
        logits: [b, V].
        uniform: [b] random numbers in [0, 1).
        temperature: [b], divides the logits. 0 takes the most likely token, and the first of several equal ones.

    Returns:
        tokens: [b] int64.
        logprobs: [b] float32, under softmax(logits / temperature), or under softmax(logits) at temperature 0. NaN if
            the row's logits contain NaN or +inf.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    CHECK(logits, uniform, temperature)
    known = {"float32, bfloat16 or float16": logits.dtype in KERNEL_FLOATS}
    backend = choose("sample_token", backend, logits, known)
    if backend == "reference":
        return reference.sample_token(logits, uniform, temperature)
    uniform, temperature = uniform.double().contiguous(), temperature.float().contiguous()
    return _sample_token(logits.contiguous(), uniform, temperature, backend)


def _new_outputs(logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.long), logits.new_empty(len(logits), dtype=torch.float32)


ARGUMENTS = "Tensor logits, Tensor uniform, Tensor temperature"
_sample_token = inference_operator("sample_token", "sample_token", ARGUMENTS, _new_outputs, returns="(Tensor, Tensor)")
