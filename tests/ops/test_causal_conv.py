"""Invariant 2 for the convolution, and what packing and carried states mean for it."""

import pytest
import torch

from m1.ops import causal_conv, reference


def make(T, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, conv_state = torch.randn(2, T, 6, generator=g), torch.randn(2, 6, 3, generator=g)
    return x, torch.randn(6, 4, generator=g), torch.randn(6, generator=g), conv_state


@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_equals_reference_with_gradients(length, packed, carried):
    x, weight, bias, conv_state = make(length)
    seq_idx = torch.tensor([0, 0, 1, 2, 2] * 4)[:length].expand(2, -1) if packed else None
    results = []
    for function in (causal_conv, reference.causal_conv):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves, seq_idx, conv_state if carried else None)
        results.append([y, *torch.autograd.grad((y * y).sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_is_torchs_convolution():
    x, weight, bias, _ = make(11)
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :11]
    torch.testing.assert_close(causal_conv(x, weight, bias), expected.transpose(1, 2))


def test_no_tap_reaches_into_another_document():
    x, weight, bias, _ = make(8)
    seq_idx = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).expand(2, -1)
    packed = causal_conv(x, weight, bias, seq_idx)
    torch.testing.assert_close(packed[:, 3:], causal_conv(x[:, 3:], weight, bias))


def test_continues_after_a_conv_state():
    x, weight, bias, _ = make(8)
    whole = causal_conv(x, weight, bias)
    torch.testing.assert_close(causal_conv(x[:, 5:], weight, bias, None, x[:, 2:5].mT), whole[:, 5:])
