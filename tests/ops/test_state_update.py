"""Invariant 2 for the decode steps: every kernel equals the reference, and many steps equal one scan."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import BACKENDS, DTYPES, to_backend
from tolerance import assert_rms_close

from m1.ops import causal_conv, selective_scan, ssd, ssd_update, state_update

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")

D, X, TAPS = 96, 32, 4
GROUPS, HEADS, P, N = 2, 6, 16, 32
CHANNELS = GROUPS * (P + N) + HEADS * N


def generator(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


def mamba(b, slots, dtype=torch.float32, seed=0, d=D, x=X):
    """Activations [b, ...], parameters, and conv and SSM states of `slots` slots."""
    normal = generator(seed)
    activations = [normal(b, width).to(dtype) for width in (d, x, x, d, d)]
    parameters = [-normal(d, 16).exp(), normal(d), normal(d, TAPS) * 0.5, normal(d) * 0.1]
    return activations, parameters, [normal(slots, x, TAPS - 1).to(dtype), normal(slots, d, 16)]


def mamba2(b, slots, dtype=torch.float32, seed=0):
    normal = generator(seed)
    activations = [normal(b, CHANNELS).to(dtype), normal(b, HEADS)]
    parameters = [-normal(HEADS).exp(), normal(HEADS), normal(CHANNELS, TAPS) * 0.5, normal(CHANNELS) * 0.1]
    return activations, parameters, [normal(slots, CHANNELS, TAPS - 1).to(dtype), normal(slots, HEADS, P, N)]


def step(op, backend, activations, parameters, states, slots=None):
    """[y, conv states, SSM states] after one step, on the CPU; the arguments stay as they are."""
    on_device = to_backend(backend, *activations, *parameters, *states, slots)
    conv_state, ssm_state = (t.clone() for t in on_device[-3:-1])
    y = op(*on_device[:-3], conv_state, ssm_state, on_device[-1], backend=backend)
    return [t.cpu() for t in (y, conv_state, ssm_state)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "make"), [(state_update, mamba), (ssd_update, mamba2)])
def test_kernel_equals_reference(backend, dtype, op, make):
    """Slots out of order, one row without any; slots that no row names stay untouched."""
    case = make(5, 8, dtype)
    slots = torch.tensor([6, 0, -1, 3, 7])
    actual, expected = step(op, backend, *case, slots), step(op, "reference", *case, slots)
    assert_rms_close(actual, expected, 1e-5 if dtype == torch.float32 else 0.005, ["y", "conv", "ssm"])
    assert actual[0][2].abs().max() == 0
    for before, after in zip(case[2], actual[1:], strict=True):
        assert torch.equal(after[[1, 2, 4, 5]], before[[1, 2, 4, 5]])
        assert (after[[0, 3, 6, 7]] != before[[0, 3, 6, 7]]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "make"), [(state_update, mamba), (ssd_update, mamba2)])
def test_states_in_pages(backend, op, make):
    """A slot's two states may lie in a page beside other things, as in vLLM. Those stay as they are."""
    activations, parameters, states = make(3, 4)
    sizes = [7, states[0][0].numel(), 5, states[1][0].numel(), 3]
    pages = to_backend(backend, torch.full((4, sum(sizes)), torch.nan))[0]
    paged = [pages.split(sizes, 1)[i].view_as(t) for i, t in zip((1, 3), states, strict=True)]
    for view, state in zip(paged, states, strict=True):
        view.copy_(state)
    given = to_backend(backend, *activations, *parameters)
    slots = to_backend(backend, torch.tensor([2, 0, 3]))[0]
    y = op(*given, *paged, slots, backend=backend)
    expected = step(op, backend, activations, parameters, states, slots.cpu())
    assert all(torch.equal(a.cpu(), e) for a, e in zip((y, *paged), expected, strict=True))
    assert all(pages.split(sizes, 1)[i].isnan().all() for i in (0, 2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize(("op", "make"), [(state_update, mamba), (ssd_update, mamba2)])
def test_conv_states_of_any_dtype(op, make, dtype, held):
    """A kernel that takes one dtype for another reads and writes outside its slot."""
    activations, parameters, (conv_state, ssm_state) = make(3, 4, dtype)
    case = activations, parameters, [conv_state.to(held), ssm_state], torch.tensor([2, 0, 3])
    actual, expected = step(op, "cpu", *case), step(op, "reference", *case)
    assert actual[1].dtype == held
    assert_rms_close(actual, expected, 0.005, ["y", "conv", "ssm"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "make"), [(state_update, mamba), (ssd_update, mamba2)])
def test_float64_activations_are_computed_in_float32(backend, op, make):
    case = make(3, 4, torch.float64)
    actual, expected = step(op, backend, *case), step(op, "reference", *case)
    assert actual[0].dtype == actual[1].dtype == torch.float64
    assert_rms_close(actual, expected, 1e-5, ["y", "conv", "ssm"])


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=25, deadline=None)
@given(b=st.integers(0, 5), kv_groups=st.integers(1, 4), rep=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_shape(b, kv_groups, rep, seed):
    case = mamba(b, 6, seed=seed, d=16 * kv_groups * rep, x=16 * kv_groups)
    slots = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:b]
    assert_rms_close(step(state_update, "cpu", *case, slots), step(state_update, "reference", *case, slots), 1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_mamba_steps_equal_the_scan(backend):
    T, b = 7, 3
    normal = generator()
    activations = [normal(b, T, width) for width in (D, X, X, D, D)]
    _, parameters, (conv_state, ssm_state) = mamba(b, b)
    expected, last = selective_scan(*activations, *parameters, None, conv_state, ssm_state)
    ys = []
    for t in range(T):
        y, conv_state, ssm_state = step(
            state_update, backend, [a[:, t] for a in activations], parameters, [conv_state, ssm_state]
        )
        ys.append(y)
    assert_rms_close([torch.stack(ys, 1), ssm_state], [expected, last], 1e-5)
    assert torch.equal(conv_state, activations[1][:, -3:].mT)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_mamba2_steps_equal_the_scan(backend):
    T, b = 7, 3
    normal = generator()
    xBC, dt = normal(b, T, CHANNELS), normal(b, T, HEADS)
    _, (A, skip, weight, bias), (conv_state, ssm_state) = mamba2(b, b)
    u = F.silu(causal_conv(xBC, weight, bias, None, conv_state))
    x, B, C = (
        t.unflatten(-1, (-1, w))
        for t, w in zip(u.split([GROUPS * P, GROUPS * N, HEADS * N], -1), (P, N, N), strict=True)
    )
    expected, last = ssd(x, F.softplus(dt), A, B, C, skip, None, ssm_state)
    ys = []
    for t in range(T):
        y, conv_state, ssm_state = step(
            ssd_update, backend, [xBC[:, t], dt[:, t]], [A, skip, weight, bias], [conv_state, ssm_state]
        )
        ys.append(y)
    assert_rms_close([torch.stack(ys, 1), ssm_state], [expected, last], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_batch_mates(backend):
    case = mamba(5, 5)
    together = step(state_update, backend, *case)
    for row in range(5):
        slots = torch.tensor([row])
        alone = step(state_update, backend, [t[row : row + 1] for t in case[0]], *case[1:], slots)
        assert torch.equal(alone[0][0], together[0][row]) and torch.equal(alone[2][row], together[2][row])


@pytest.mark.parametrize(("op", "make"), [(state_update, mamba), (ssd_update, mamba2)])
def test_a_slot_that_does_not_exist_is_refused_before_anything_changes(op, make):
    activations, parameters, states = make(2, 3)
    before = [t.clone() for t in states]
    with pytest.raises(IndexError, match="row 1 has slot 3, but there are 3"):
        op(*activations, *parameters, *states, torch.tensor([0, 3]), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


@pytest.mark.parametrize("which", ["conv_state", "ssm_state", "half", "slots"])
@pytest.mark.parametrize(("op", "make"), [(state_update, mamba), (ssd_update, mamba2)])
def test_shapes_that_do_not_fit_are_refused(which, op, make):
    activations, parameters, states = make(2, 3)
    states = {
        "conv_state": [states[0][:, :-1], states[1]],
        "ssm_state": [states[0], states[1][:2]],
        "half": [states[0], states[1].bfloat16()],
    }.get(which, states)
    named = "ssm_state has shape .* float32" if which == "half" else f"({which} has shape|from {which})"
    with pytest.raises(ValueError, match=rf"{op.__name__}: .*{named}"):
        op(*activations, *parameters, *states, torch.tensor([0]) if which == "slots" else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "make"), [("state_update", mamba), ("ssd_update", mamba2)])
def test_is_a_proper_pytorch_operator(backend, name, make):
    activations, parameters, states = make(2, 3)
    arguments = to_backend(backend, *activations, *parameters, *states, torch.tensor([2, 0]))
    torch.library.opcheck(getattr(torch.ops.m1, name), (*arguments, backend))
