"""Invariant 2: the C++ scan equals the reference: outputs, states and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_rms_close

from m1.ops import reference, selective_scan

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")

NAMES = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dh0"]
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 500]


def make(b, T, d=64, x_width=32, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    dt = torch.rand(b, T, d, generator=g) * 0.5
    A = -torch.rand(d, 16, generator=g) * 4 - 0.1
    seq_idx = (torch.rand(b, T, generator=g) < 0.1).int().cumsum(1)
    inputs = [normal(b, T, d), dt.to(dtype), A, normal(b, T, x_width), normal(b, T, d), normal(d)]
    return inputs, seq_idx, torch.randn(b, d, 16, generator=g)


def run(backend, inputs, seq_idx, h0):
    """[y, final state, gradients of all inputs and of the initial state], under fixed random output gradients."""
    leaves = [t.clone().requires_grad_() for t in [*inputs, h0]]
    y, state = selective_scan(*leaves[:6], seq_idx, leaves[6], backend=backend)
    g = torch.Generator().manual_seed(9)
    grads = [torch.randn(t.shape, generator=g).to(t.dtype) for t in (y, state)]
    return [y, state, *torch.autograd.grad([y, state], leaves, grads)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_kernel_equals_reference(length, packed):
    inputs, seq_idx, h0 = make(2, length)
    seq_idx = seq_idx if packed else None
    assert_rms_close(run("cpu", inputs, seq_idx, h0), run("reference", inputs, seq_idx, h0), 1e-4, NAMES)


def test_training_path_without_states():
    """No initial state, no gradient into the final one: what the model's training runs."""
    inputs, seq_idx, _ = make(2, 33)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, _ = selective_scan(*leaves, seq_idx, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for name, a, e in zip(["y", "dx", "ddt", "dA", "dB", "dC", "dD"], *results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3, msg=name)


def test_bfloat16_inputs():
    inputs, seq_idx, h0 = make(2, 63, dtype=torch.bfloat16)
    assert_rms_close(run("cpu", inputs, seq_idx, h0), run("reference", inputs, seq_idx, h0), 0.005, NAMES)


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 3),
    T=st.integers(1, 40),
    kv_groups=st.integers(1, 3),
    rep=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_shape(b, T, kv_groups, rep, seed):
    inputs, seq_idx, h0 = make(b, T, 16 * kv_groups * rep, 16 * kv_groups, seed)
    assert_rms_close(run("cpu", inputs, seq_idx, h0), run("reference", inputs, seq_idx, h0), 1e-4, NAMES)


def test_every_output_element_is_written(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    inputs, seq_idx, h0 = make(2, 33)
    for tensor in run("cpu", inputs, seq_idx, h0):
        assert tensor.isfinite().all()


def test_nan_input_is_not_swallowed():
    inputs, _, h0 = make(1, 5)
    inputs[1][0, 2, 3] = torch.nan
    y, _ = selective_scan(*inputs, None, h0, backend="cpu")
    assert y[0, 2:, 3].isnan().all() and y[0, :2].isfinite().all()


def test_strided_slices_are_read_in_place():
    """Slices of one projection's output, as the mixer passes them."""
    inputs, seq_idx, h0 = make(2, 19)
    x, dt, A, B, C, D = inputs
    joined = torch.cat([x, B, C], dim=-1)
    xs, Bs, Cs = joined.split([64, 32, 64], dim=-1)
    expected = selective_scan(*inputs, seq_idx, h0, backend="cpu")
    for a, e in zip(selective_scan(xs, dt, A, Bs, Cs, D, seq_idx, h0, backend="cpu"), expected, strict=True):
        assert torch.equal(a, e)


def test_state_carries_over():
    inputs, _, h0 = make(2, 40)
    x, dt, A, B, C, D = inputs
    y, state = selective_scan(*inputs, None, h0)
    y1, middle = selective_scan(x[:, :23], dt[:, :23], A, B[:, :23], C[:, :23], D, None, h0)
    y2, end = selective_scan(x[:, 23:], dt[:, 23:], A, B[:, 23:], C[:, 23:], D, None, middle)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y)
    torch.testing.assert_close(end, state)


def test_reference_by_hand():
    """Two channels of one group, N = 2, one step from a known state: every number worked out on paper."""
    x, dt = torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[1.0, 0.5]]])
    A = torch.tensor([[-1.0, -2.0], [-1.0, -4.0]])
    B, C, D = torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[1.0, 0.1]]]), torch.tensor([5.0, 7.0])
    h0 = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    y, h = reference.selective_scan(x, dt, A, B, C, D, None, h0)
    e = torch.exp(torch.tensor([-1.0, -2.0, -0.5, -2.0]))
    expected = torch.tensor([[[e[0] + 2, e[1] + 20], [2 * e[2] + 1.5, 2 * e[3] + 15]]])
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(y[0, 0], (expected[0] * torch.tensor([1.0, 0.1])).sum(1) + D * x[0, 0])


def test_groups_repeat_as_in_grouped_query_attention():
    """Group g of C reads group g // rep of B: with 2 KV groups and rep 2, groups 0 and 1 see B's group 0."""
    inputs, _, h0 = make(1, 4)
    x, dt, A, B, C, D = inputs
    B_changed = B.clone()
    B_changed[..., :16] += 1
    y, y_changed = (selective_scan(x, dt, A, b, C, D, None, h0)[0] for b in (B, B_changed))
    assert (y - y_changed)[..., :32].abs().min() > 0
    assert torch.equal(y[..., 32:], y_changed[..., 32:])


@pytest.mark.parametrize(("d", "x_width"), [(60, 32), (64, 24), (64, 48)])
def test_shapes_that_do_not_fit(d, x_width):
    x = torch.zeros(1, 2, d)
    with pytest.raises(ValueError, match="must be multiples"):
        selective_scan(x, x, torch.zeros(d, 16), torch.zeros(1, 2, x_width), x, torch.zeros(d))


@pytest.mark.parametrize("packed", [False, True])
def test_is_a_proper_pytorch_operator(packed):
    """Schema, fake tensors, autograd registration and tracing, as torch.compile relies on them."""
    inputs, seq_idx, h0 = make(2, 17)
    leaves = [t.requires_grad_() for t in inputs]
    documents = seq_idx.to(torch.int32) if packed else None
    torch.library.opcheck(torch.ops.m1.selective_scan, (*leaves, documents, h0 if packed else None, True))


@pytest.mark.parametrize("which", ["B", "seq_idx", "h0"])
def test_operands_of_another_batch_are_refused(which):
    """The kernel would read behind the end of what belongs to one sequence."""
    inputs, seq_idx, h0 = make(2, 5)
    if which == "B":
        inputs[3] = inputs[3][:1]
    seq_idx, h0 = (seq_idx[:1] if which == "seq_idx" else seq_idx), (h0[:1] if which == "h0" else h0)
    with pytest.raises(ValueError, match="don't fit"):
        selective_scan(*inputs, seq_idx, h0)
