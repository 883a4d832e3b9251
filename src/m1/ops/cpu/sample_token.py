"""Calls sample_token.cpp. Tensors, their shapes and dtypes are those of the operator in ops/sample_token.py."""

from torch import Tensor

from m1.ops.calls import call
from m1.ops.cpu import ELEMENTS


def sample_token(logits: Tensor, uniform: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Fills tokens and logprobs."""
    call("m1_sample_token", *logits.shape, ELEMENTS[logits.dtype], logits, uniform, temperature, tokens, logprobs)
