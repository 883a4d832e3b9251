"""Calls sample_token.cpp. Tensors, their shapes and dtypes are those of the operator in ops/sample_token.py."""

import torch
from torch import Tensor

from m1.ops.build import call


def sample_token(logits: Tensor, uniform: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Fills tokens and logprobs."""
    inputs = [logits, uniform.contiguous(), temperature.contiguous()]
    call("m1_sample_token", *logits.shape, logits.dtype == torch.bfloat16, *inputs, tokens, logprobs)
