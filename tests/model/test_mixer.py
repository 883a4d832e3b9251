"""Parts of the mixers."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_rms_close

from m1.model.mixer import ALIGNED, aligned_linear


@pytest.mark.parametrize(("inner", "outer"), [(36, 24), (24, 1572), (7, 9), (16, 8)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_aligned_sizes_change_nothing(inner, outer, has_bias):
    """The result and all gradients are the plain layer's, and rows begin at multiples of 16 bytes."""
    weight, bias = torch.randn(outer, inner), torch.randn(outer) if has_bias else None
    tensors = [t.requires_grad_() for t in (torch.randn(2, 5, inner), weight, bias) if t is not None]
    upstream = torch.randn(2, 5, outer)
    results = []
    for linear in (F.linear, aligned_linear):
        x, *parameters = tensors
        y = linear(x, *parameters) if has_bias else linear(x, *parameters, None)
        results.append([y, *torch.autograd.grad(y, tensors, upstream)])
    assert_rms_close(*results, 1e-6)
    assert results[1][0].stride(-2) % ALIGNED == 0
