"""Invariant 2 for the selective scan: every kernel equals the reference: outputs, states and gradients."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import BACKENDS, DTYPES, cases, interpreted, to_backend
from tolerance import assert_rms_close

from m1.ops import reference, selective_scan
from m1.ops.inputs import ScanInputs
from m1.ops.reference import repeat_groups

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")

SCAN = importlib.import_module("m1.ops.selective_scan")
ACTIVATIONS = ["z", "x", "B", "C", "dt"]
PARAMETERS = ["A", "D", "conv_weight", "conv_bias"]
STATES = ["conv_state", "ssm_state"]
NAMES = ["y", "state", *(f"d{name}" for name in [*ACTIVATIONS, *PARAMETERS, *STATES])]


def make(b, T, d=64, x_width=32, seed=0, dtype=torch.float32, taps=4):
    """Inputs by name, but for seq_idx, and a seq_idx."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    activations = [normal(b, T, width) for width in (d, x_width, x_width, d, d)]
    A = -torch.rand(d, 16, generator=g) * 4 - 0.1
    parameters = [A, normal(d), normal(d, taps) * 0.5, normal(d) * 0.1]
    inputs = dict(zip(ACTIVATIONS + PARAMETERS, [t.to(dtype) for t in activations] + parameters, strict=True))
    inputs |= {"conv_state": normal(b, taps - 1, x_width).mT.to(dtype), "ssm_state": normal(b, d, 16)}
    seq_idx = (torch.rand(b, T, generator=g) < 0.1).int().cumsum(1)
    return inputs, seq_idx


def make_for(backend, b, T, dtype=torch.float32):
    """`make`; of long sequences only one, and few channels, where Triton's interpreter has to go through them."""
    return make(1, T, 32, 16, dtype=dtype) if interpreted(backend) and T > 3 else make(b, T, dtype=dtype)


def run(backend, inputs, seq_idx, device="cpu"):
    """[y, final state, gradients of all inputs], under fixed random output gradients, on the CPU."""
    leaves = {name: t.to(device).requires_grad_() for name, t in inputs.items()}
    documents = None if seq_idx is None else seq_idx.to(device)
    y, state = selective_scan(**leaves, seq_idx=documents, backend=backend)
    g = torch.Generator().manual_seed(9)
    grads = [torch.randn(t.shape, generator=g).to(t) for t in (y, state)]
    return [t.cpu() for t in (y, state, *torch.autograd.grad([y, state], list(leaves.values()), grads))]


def assert_equals_reference(backend, inputs, seq_idx, tolerance=1e-4):
    (probe,) = to_backend(backend, torch.empty(0))
    expected = run("reference", {name: t.clone() for name, t in inputs.items()}, seq_idx)
    assert_rms_close(run(backend, inputs, seq_idx, probe.device), expected, tolerance, NAMES)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "length", "packed"), cases())
def test_kernel_equals_reference(backend, length, packed):
    inputs, seq_idx = make_for(backend, 2, length)
    assert_equals_reference(backend, inputs, seq_idx if packed else None)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_path(backend):
    """No gradients, and so no states saved on the way."""
    inputs, _ = make_for(backend, 2, 257 if interpreted(backend) else 1025)
    with torch.no_grad():
        actual = selective_scan(*to_backend(backend, *inputs.values())[:9], backend=backend)
        expected = selective_scan(*list(inputs.values())[:9], backend="reference")
    assert_rms_close([t.cpu() for t in actual], expected, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_path_without_states(backend):
    """No states before the first token, no gradient into the final one: what the model's training runs."""
    inputs, seq_idx = make_for(backend, 2, 35)
    inputs = {name: inputs[name] for name in ACTIVATIONS + PARAMETERS}
    results = []
    for which in (backend, "reference"):
        *leaves, documents = to_backend(backend, *inputs.values(), seq_idx)
        leaves = [t.clone().requires_grad_() for t in leaves]
        y, _ = selective_scan(*leaves, documents, backend=which)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_rms_close(*results, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend, dtype):
    inputs, seq_idx = make_for(backend, 2, 63, dtype)
    assert_equals_reference(backend, inputs, seq_idx, 0.005)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_shorter_convolutions(backend, taps):
    inputs, seq_idx = make(1, 9, taps=taps)
    if taps == 1:
        del inputs["conv_state"]  # holds nothing
    assert_equals_reference(backend, inputs, seq_idx)


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 3),
    T=st.integers(1, 40),
    kv_groups=st.integers(1, 3),
    rep=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(b, T, kv_groups, rep, dtype, seed):
    inputs, seq_idx = make(b, T, 16 * kv_groups * rep, 16 * kv_groups, seed, dtype)
    assert_equals_reference("cpu", inputs, seq_idx, 1e-4 if dtype == torch.float32 else 0.005)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_input_is_not_swallowed(backend):
    inputs, _ = make(1, 5)
    inputs["dt"][0, 2, 3] = torch.nan
    y, _ = selective_scan(*to_backend(backend, *inputs.values())[:9], backend=backend)
    assert y[0, 2:, 3].isnan().all() and y[0, :2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_stay_finite(backend):
    """Steps of nothing (padding), of almost nothing, and so long that all decays underflow; in both directions."""
    inputs, _ = make(1, 6)
    inputs["dt"][0] = torch.tensor([-torch.inf, -200.0, -30.0, 30.0, 500.0, -torch.inf])[:, None]
    results = run(backend, inputs, None, to_backend(backend, torch.empty(0))[0].device)
    assert all(t.isfinite().all() for t in results)
    assert results[NAMES.index("ddt")][0, 0].abs().max() < 1e-30


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_leaves_the_state_alone(backend):
    inputs, _ = make(1, 7)
    inputs["dt"][:, 4:] = -torch.inf
    _, state = selective_scan(*to_backend(backend, *inputs.values())[:9], backend=backend)
    short = {name: inputs[name][:, :4] for name in ACTIVATIONS} | {name: inputs[name] for name in PARAMETERS}
    _, expected = selective_scan(**short, backend="reference")
    torch.testing.assert_close(state.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spare", [16, 4])
def test_strided_slices(backend, spare, monkeypatch):
    """Of one projection's output, as the mixer passes them. Triton would read rows that aren't aligned one by one."""
    inputs, seq_idx = make_for(backend, 2, 19)
    activations = to_backend(backend, *(inputs[name] for name in ACTIVATIONS), inputs["z"][..., :spare])
    rest = to_backend(backend, *(inputs[name] for name in PARAMETERS), seq_idx)
    *slices, _ = torch.cat(activations, dim=-1).split([t.shape[-1] for t in activations], dim=-1)
    expected = selective_scan(*activations[:5], *rest, backend=backend)
    plain, read = SCAN._forward, []
    monkeypatch.setattr(SCAN, "_forward", lambda *arguments: (read.extend(arguments[:5]), plain(*arguments))[1])
    for a, e in zip(selective_scan(*slices, *rest, backend=backend), expected, strict=True):
        assert torch.equal(a, e)
    in_place = backend == "cpu" or spare == 16
    assert all((a.data_ptr() == b.data_ptr()) == in_place for a, b in zip(read, slices, strict=True))
    assert in_place or all(t.stride(1) % 16 == 0 for t in read)


def test_state_carries_over():
    inputs, _ = make(2, 40)
    parameters = [inputs[name] for name in PARAMETERS]
    activations = [inputs[name] for name in ACTIVATIONS]
    states = [inputs[name] for name in STATES]
    y, state = selective_scan(*activations, *parameters, None, *states)
    y1, middle = selective_scan(*(t[:, :23] for t in activations), *parameters, None, *states)
    y2, end = selective_scan(*(t[:, 23:] for t in activations), *parameters, None, inputs["x"][:, 20:23].mT, middle)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y)
    torch.testing.assert_close(end, state)


def test_reference_by_hand():
    """Two channels of one group, N = 2, one step from a known state: every number worked out on paper."""
    softplus_inverse = torch.tensor([1.0, 0.5]).expm1().log()  # steps of 1 and 0.5
    u = torch.tensor([2.0, 3.0])
    A = torch.tensor([[-1.0, -2.0], [-1.0, -4.0]])
    B, C, D = torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[1.0, 0.1]]]), torch.tensor([5.0, 7.0])
    ssm_state = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    x = torch.tensor([[[-1.0, 0.5]]])
    conv_state = torch.tensor([[[4.0], [2.0]]])
    conv_weight = torch.tensor([[0.25, 1.0], [1.0, -2.0]])
    conv_bias = _silu_inverse(u) - torch.tensor([0.25 * 4.0 - 1.0, 2.0 - 2.0 * 0.5])  # so that silu(conv) is u
    z = torch.tensor([[[0.3, -0.7]]])
    dt = softplus_inverse.view(1, 1, 2)
    inputs = ScanInputs(z, x, B, C, dt, A, D, conv_weight, conv_bias, None, conv_state, ssm_state)
    y, h = reference.selective_scan(inputs)
    e = torch.exp(torch.tensor([-1.0, -2.0, -0.5, -2.0]))
    expected = torch.tensor([[[e[0] + 2, e[1] + 20], [2 * e[2] + 1.5, 2 * e[3] + 15]]])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)
    out = ((expected[0] * torch.tensor([1.0, 0.1])).sum(1) + D * u) * z[0, 0] / (1 + torch.exp(-z[0, 0]))
    torch.testing.assert_close(y[0, 0], out, rtol=1e-4, atol=1e-4)


def _silu_inverse(u):
    v = u.clone()
    for _ in range(50):  # Newton
        s = v.sigmoid()
        v = v - (v * s - u) / (s * (1 + v * (1 - s)))
    return v


def test_is_mambas_composition():
    """Without groups shared and with torch's own convolution: repeat, conv1d, silu, softplus, the recurrence, gate."""
    inputs, _ = make(2, 11)
    z, x, B, C, dt, A, D, w, bias = (inputs[name] for name in ACTIVATIONS + PARAMETERS)
    x = repeat_groups(x, 16, 2)
    u = F.silu(F.conv1d(x.mT, w[:, None], bias, padding=3, groups=64)[..., :11].mT)
    step, B = F.softplus(dt), repeat_groups(B, 16, 2)
    h, ys = torch.zeros(2, 64, 16), []
    for t in range(11):
        for channel_group in range(4):
            c = slice(16 * channel_group, 16 * channel_group + 16)
            decay = torch.exp(step[:, t, c, None] * A[c])
            h[:, c] = decay * h[:, c] + (step * u)[:, t, c, None] * B[:, t, None, c]
        grouped = torch.einsum("bgcn,bgn->bgc", h.view(2, 4, 16, 16), C[:, t].view(2, 4, 16)).flatten(1)
        ys.append((grouped + D * u[:, t]) * F.silu(z[:, t]))
    y, state = selective_scan(*(inputs[name] for name in ACTIVATIONS + PARAMETERS))
    assert_rms_close([y, state], [torch.stack(ys, 1), h], 1e-5)


def test_groups_repeat_as_in_grouped_query_attention():
    """Group g of C reads group g // rep of B: with 2 KV groups and rep 2, groups 0 and 1 see B's group 0."""
    inputs, _ = make(1, 4)
    y, _ = selective_scan(**inputs)
    inputs["B"][..., :16] += 1
    y_changed, _ = selective_scan(**inputs)
    assert (y - y_changed)[..., :32].abs().min() > 0
    assert torch.equal(y[..., 32:], y_changed[..., 32:])


@pytest.mark.parametrize(("d", "x_width"), [(60, 32), (64, 24), (64, 48)])
def test_shapes_that_do_not_fit(d, x_width):
    inputs, _ = make(1, 2, d, x_width)
    with pytest.raises(
        ValueError,
        match=r"X must be a multiple of N that divides D, but X is \d+ from x, N is 16 from A, D is \d+ from z",
    ):
        selective_scan(**inputs)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *STATES, "conv_weight", "D", "seq_idx"])
def test_operands_of_another_batch_or_width_are_refused(name):
    """The kernel would read behind the end of what belongs to one sequence."""
    inputs, seq_idx = make(2, 5)
    inputs["seq_idx"] = seq_idx
    inputs[name] = inputs[name][:1]
    with pytest.raises(ValueError, match=f"selective_scan: .*({name} has shape|from {name})"):
        selective_scan(**inputs)


def test_a_backend_that_cannot_run_this_says_why():
    inputs, _ = make(1, 3)
    inputs["A"] = inputs["A"][:, :8]
    del inputs["ssm_state"]
    with pytest.raises(ValueError, match="'cpu' needs state size 16"):
        selective_scan(**inputs, backend="cpu")
    selective_scan(**inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_is_a_proper_pytorch_operator(backend, packed):
    """Schema, fake tensors, autograd registration and tracing, as torch.compile relies on them."""
    inputs, seq_idx = make_for(backend, 2, 5 if interpreted(backend) else 17)
    *leaves, conv_state, ssm_state, documents = to_backend(backend, *inputs.values(), seq_idx)
    leaves = [t.requires_grad_() for t in leaves]
    states = (documents, conv_state, ssm_state) if packed else (None, None, None)
    torch.library.opcheck(torch.ops.m1.selective_scan, (*leaves, *states, backend, True))


def test_compiles_without_a_graph_break():
    inputs, seq_idx = make(2, 9)
    leaves = [inputs[name].requires_grad_() for name in ACTIVATIONS + PARAMETERS]
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    results = []
    for function in (selective_scan, compiled):
        y, _ = function(*leaves, seq_idx)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)
