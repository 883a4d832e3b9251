"""Invariant 2 for Mamba-2's scan: the chunked form equals the loop, outputs, states and gradients."""

import pytest
import torch
from tolerance import assert_rms_close

from m1.ops import reference, ssd

G, HEADS, P, N = 2, 6, 8, 12


def inputs(T, b=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(T)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    dt = torch.rand(b, T, HEADS, generator=g).mul(0.5).requires_grad_()
    A = (-torch.rand(HEADS, generator=g) * 4).detach().requires_grad_()
    return [randn(b, T, G, P), dt, A, randn(b, T, G, N), randn(b, T, HEADS, N), randn(HEADS)], randn(b, HEADS, P, N)


def documents(T, b=2):
    """Boundaries of their own in each row, one at a chunk's edge, one document of a single token."""
    seq_idx = torch.zeros(b, T, dtype=torch.int32)
    for row, starts in enumerate([(1, 2, 64, 70), (5, 63, 127, 200)]):
        for start in starts:
            seq_idx[row, start:] += 1
    return seq_idx


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 17, 63, 64, 65, 200])
def test_chunked_equals_reference(T, with_state, packed):
    arguments, state = inputs(T)
    seq_idx = documents(T) if packed else None
    results = []
    for function in (ssd, reference.ssd):
        leaves = [t.detach().requires_grad_() for t in (*arguments, state)]
        y, last = function(*leaves[:6], seq_idx, leaves[6] if with_state else None)
        (y.square().sum() + (last * last.detach().cos()).sum()).backward()
        results.append([y, last, *(t.grad for t in leaves[: 7 if with_state else 6])])
    assert_rms_close(*results, 1e-4, ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"])


def test_strong_decay_stays_finite():
    """exp(-cumulative decay) of a whole chunk underflows; its inverse must never be formed."""
    arguments, _ = inputs(130)
    arguments[2] = torch.full((HEADS,), -300.0, requires_grad=True)
    y, _ = ssd(*arguments)
    y.sum().backward()
    expected, _ = reference.ssd(*arguments)
    assert_rms_close([y], [expected], 1e-4)
    assert all(t.grad.isfinite().all() for t in arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    arguments, _ = inputs(100, dtype=dtype)
    y, state = ssd(*arguments)
    expected, expected_state = reference.ssd(*arguments)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert_rms_close([y, state], [expected, expected_state], 0.005)


def test_autocast_leaves_it_in_float32():
    arguments, _ = inputs(70)
    expected, expected_state = reference.ssd(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = ssd(*arguments)
    assert_rms_close([y, state], [expected, expected_state], 1e-5)


def test_shapes_that_do_not_fit_are_refused():
    arguments, _ = inputs(4)
    arguments[1] = arguments[1][..., :-1]
    with pytest.raises(ValueError, match=r"A has shape \(6,\) .* must be \[heads\] = \(5,\), .* heads from dt"):
        ssd(*arguments)
    arguments, _ = inputs(4)
    with pytest.raises(ValueError, match=r"seq_idx has shape \(1, 4\) .* must be \[b, T\] = \(2, 4\)"):
        ssd(*arguments, torch.zeros(1, 4, dtype=torch.int32))
