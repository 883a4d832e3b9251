"""Calls sample_token.cpp. Tensors, their shapes and dtypes are those of the operator in ops/sample_token.py."""

import torch
from torch import Tensor

from m1.ops.build import call


def sample_token(logits: Tensor, uniform: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Fills tokens and logprobs."""
    is_bfloat16 = logits.dtype == torch.bfloat16
    call("m1_sample_token", *logits.shape, is_bfloat16, logits, uniform, temperature, tokens, logprobs)
