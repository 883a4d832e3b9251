"""Invariant 2 for the prefill of Mamba layers: chunks on states in slots equal each chunk alone and the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import BACKENDS, DTYPES, interpreted, to_backend
from tolerance import assert_rms_close

from m1.ops import prefill_scan, prefill_ssd, reference, selective_scan, ssd_update
from m1.ops.chunks import chunk_of_tokens
from m1.ops.inputs import SSDPrefillInputs
from m1.ops.prefill_scan import _ssd_in_turn, _ssd_padded

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")

SLOTS, GROUPS, HEADS, P, N = 7, 2, 6, 16, 32
CHANNELS = GROUPS * (P + N) + HEADS * N
LENGTHS = [1, 37, 2, 0, 64, 5]
PADDED = [4, 0, 6, 1, -1, 3]  # slots: the fifth chunk is padding, slots 2 and 5 aren't named


def generator(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


def mamba(lengths=LENGTHS, slots=PADDED, dtype=torch.float32, d=32, x=16, seed=0):
    """The arguments of `prefill_scan`. What mustn't be read is NaN: slots without a chunk, and padding."""
    normal, T = generator(seed), sum(lengths)
    activations = [normal(T, width).to(dtype) for width in (d, x, x, d, d)]
    parameters = [-normal(d, 16).exp(), normal(d), normal(d, 4) * 0.5, normal(d) * 0.1]
    return pack(lengths, slots, activations, parameters, [normal(SLOTS, x, 3).to(dtype), normal(SLOTS, d, 16)])


def mamba2(lengths=LENGTHS, slots=PADDED, dtype=torch.float32, seed=0):
    """The arguments of `prefill_ssd`."""
    normal, T = generator(seed), sum(lengths)
    activations = [normal(T, CHANNELS).to(dtype), normal(T, HEADS)]
    parameters = [-normal(HEADS).exp(), normal(HEADS), normal(CHANNELS, 4) * 0.5, normal(CHANNELS) * 0.1]
    states = [normal(SLOTS, CHANNELS, 3).to(dtype), normal(SLOTS, HEADS, P, N)]
    return pack(lengths, slots, activations, parameters, states)


def pack(lengths, slots, activations, parameters, states):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for first, end, slot in zip(cu_seqlens[:-1], cu_seqlens[1:], slots, strict=True):
        if slot < 0:
            for t in activations:
                t[first:end] = torch.nan
    for t in states:
        t[[s for s in range(SLOTS) if s not in slots]] = torch.nan
    places = torch.tensor(slots, dtype=torch.long)
    return [*activations, *parameters, *states, places, cu_seqlens, max([*lengths, 1]) + 3]


def run(op, arguments, **options):
    """[y, conv_state, ssm_state] on the CPU; the arguments stay as they are."""
    *tensors, max_length = arguments
    tensors = to_backend(options.get("backend"), *(t.clone() for t in tensors))
    y = op(*tensors, max_length, **options)
    return [t.cpu() for t in (y, *tensors[-4:-2])]


def run_on_tuple(function, arguments):
    """`run` for a function below the public op."""
    return run(lambda *inputs: function(SSDPrefillInputs(*inputs)), arguments)


def assert_close(actual, expected, slots, tolerance):
    """Outputs and states of all slots with a chunk; the others are still NaN, in both."""
    named = sorted({s for s in slots if s >= 0})
    for results in (actual, expected):
        assert all(t[s].isnan().all() for t in results[1:] for s in range(SLOTS) if s not in named)
    results = [[t if i == 0 else t[named] for i, t in enumerate(r)] for r in (actual, expected)]
    assert_rms_close(*results, tolerance, ["y", "conv", "ssm"])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_equals_reference(backend, dtype):
    arguments = mamba(dtype=dtype)
    actual, expected = run(prefill_scan, arguments, backend=backend), run(prefill_scan, arguments, backend="reference")
    assert_close(actual, expected, PADDED, 1e-5 if dtype == torch.float32 else 0.005)
    assert actual[0].dtype == dtype and actual[0][40:104].abs().max() == 0
    for before, after in zip(arguments[-5:-3], actual[1:], strict=True):
        assert torch.equal(before[1], after[1]), "a chunk of no tokens changed its state"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_chunk_equals_the_scan_of_it_alone(backend):
    """Bit for bit on a CPU. `scan_short` of the GPU adds in another order than spans do."""
    lengths, slots = ([1, 33, 2], [4, 0, 6]) if interpreted(backend) else ([1, 137, 2, 64, 5], [4, 0, 6, 1, 3])
    arguments = mamba(lengths, slots)
    *activations, A, D, weight, bias, conv_state, ssm_state = arguments[:11]
    y, conv_after, ssm_after = run(prefill_scan, arguments, backend=backend)
    end = 0
    for length, slot in zip(lengths, slots, strict=True):
        first, end = end, end + length
        alone = [t[None, first:end] for t in activations]
        states = conv_state[slot, None], ssm_state[slot, None]
        tensors = to_backend(backend, *alone, A, D, weight, bias, None, *states)
        expected = [t.cpu()[0] for t in selective_scan(*tensors, backend=backend)]
        assert_rms_close([y[first:end], ssm_after[slot]], expected, 0 if backend == "cpu" else 1e-6)
        inputs = torch.cat([conv_state[slot], activations[1][first:end].T], dim=1)
        assert torch.equal(conv_after[slot], inputs[:, -3:])


@pytest.mark.parametrize("short", [0, 8, 512])
def test_triton_chunks_do_not_depend_on_the_others(monkeypatch, short):
    """Short chunks and long ones run in different kernels."""
    pytest.importorskip("triton")
    from m1.ops.triton import selective_scan as launcher

    monkeypatch.setattr(launcher, "SHORT", short)
    lengths, slots = [3, 33, 0, 8, 9], [4, 0, 2, -1, 6]
    arguments = mamba(lengths, slots)
    together = run(prefill_scan, arguments, backend="triton")
    assert_close(together, run(prefill_scan, arguments, backend="reference"), slots, 1e-5)
    end = 0
    for length, slot in zip(lengths, slots, strict=True):
        first, end = end, end + length
        chunk = torch.tensor([slot]), torch.tensor([0, length]), length
        y, *states = run(
            prefill_scan, [*(t[first:end] for t in arguments[:5]), *arguments[5:11], *chunk], backend="triton"
        )
        assert torch.equal(y, together[0][first:end])
        assert slot < 0 or all(torch.equal(t[slot], both[slot]) for t, both in zip(states, together[1:], strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=5),
    rep=st.integers(1, 3),
    kv=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_shape(lengths, rep, kv, seed):
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed))[: len(lengths)] - 1
    arguments = mamba(lengths, slots.tolist(), d=16 * rep * kv, x=16 * kv, seed=seed)
    actual, expected = run(prefill_scan, arguments, backend="cpu"), run(prefill_scan, arguments, backend="reference")
    assert_close(actual, expected, slots.tolist(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_a_prompt_equal_it_whole(backend):
    arguments = mamba([40], [2])
    whole = run(prefill_scan, arguments, backend=backend)
    *activations, A, D, weight, bias, conv_state, ssm_state, slots, _, _ = arguments
    ys = []
    for first, end in ((0, 2), (2, 3), (3, 40)):
        cu_seqlens, length = torch.tensor([0, end - first]), end - first
        chunk = [t[first:end] for t in activations]
        arguments = [*chunk, A, D, weight, bias, conv_state, ssm_state, slots, cu_seqlens, length]
        y, conv_state, ssm_state = run(prefill_scan, arguments, backend=backend)
        ys.append(y)
    assert_close([torch.cat(ys), conv_state, ssm_state], whole, [2], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_states_of_another_dtype(backend):
    arguments = mamba([3, 2], [1, 0], torch.bfloat16)
    arguments[9] = arguments[9].float()
    actual, expected = run(prefill_scan, arguments, backend=backend), run(prefill_scan, arguments, backend="reference")
    assert actual[1].dtype == torch.float32
    assert_close(actual, expected, [1, 0], 0.005)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [_ssd_in_turn, _ssd_padded])
def test_mamba2_equals_its_decode_steps(way, dtype):
    arguments = mamba2(dtype=dtype)
    actual = run_on_tuple(way, arguments)
    expected = run_on_tuple(reference.prefill_ssd, arguments)
    assert_close(actual, expected, PADDED, 1e-5)
    assert actual[0].dtype == torch.float32 and actual[0][40:104].abs().max() == 0


@pytest.mark.parametrize("slots", [[-1, -1], [-1, 0], [3, -2]])
def test_mamba2_padding_writes_no_state(slots):
    arguments = mamba2([3, 4], slots)
    ways = [
        run(lambda *inputs, way=way: way(SSDPrefillInputs(*inputs)), arguments) for way in (_ssd_in_turn, _ssd_padded)
    ]
    assert_close(*ways, slots, 1e-5)


def test_mamba2_chunks_do_not_depend_on_the_others():
    arguments = mamba2([70, 3], [1, 0])
    y, *states = run(prefill_ssd, arguments)
    xBC, dt, *rest = arguments[:-2]
    for part, slot in ((slice(0, 70), 1), (slice(70, 73), 0)):
        cu_seqlens = torch.tensor([0, len(xBC[part])])
        alone = run(prefill_ssd, [xBC[part], dt[part], *rest[:-1], torch.tensor([slot]), cu_seqlens, 70])
        assert torch.equal(alone[0], y[part])
        assert all(torch.equal(a[slot], b[slot]) for a, b in zip(alone[1:], states, strict=True))


def test_mamba2_prefill_goes_on_in_decode_steps():
    arguments = mamba2([9], [2])
    whole = run(prefill_ssd, arguments)
    xBC, dt, *parameters, conv_state, ssm_state, slots, _, _ = arguments
    first = [xBC[:8], dt[:8], *parameters, conv_state, ssm_state, slots, torch.tensor([0, 8]), 8]
    _, conv_state, ssm_state = run(prefill_ssd, first)
    y = ssd_update(xBC[8:], dt[8:], *parameters, conv_state, ssm_state, slots)
    assert_close([y, conv_state, ssm_state], [whole[0][8:], *whole[1:]], [2], 1e-5)


@pytest.mark.parametrize(("op", "make"), [(prefill_scan, mamba), (prefill_ssd, mamba2)])
@pytest.mark.parametrize(("edges", "longest"), [([0, 4, 6], 9), ([1, 4, 7], 9), ([0, 8, 7], 9), ([0, 4, 7], 3)])
def test_edges_that_do_not_fit_are_refused(op, make, edges, longest):
    *arguments, _, _ = make([3, 4], [1, 0])
    with pytest.raises(ValueError, match=rf"{op.__name__}: cu_seqlens must rise .* max_length = {longest}, but is \["):
        op(*arguments, torch.tensor(edges), longest)


@pytest.mark.parametrize(("op", "make"), [(prefill_scan, mamba), (prefill_ssd, mamba2)])
def test_a_slot_that_does_not_exist_is_refused_before_anything_changes(op, make):
    *arguments, _, cu_seqlens, length = make([3, 4], [1, 0])
    before = [t.clone() for t in arguments]
    with pytest.raises(IndexError, match="chunk 1 has slot 7, but there are 7"):
        op(*arguments, torch.tensor([1, 7]), cu_seqlens, length)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(arguments, before, strict=True))


def test_chunk_of_tokens():
    assert chunk_of_tokens(torch.tensor([0, 2, 2, 5]), 5).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_proper_pytorch_operator(backend):
    *tensors, max_length = mamba([2, 3], [1, 0])
    tensors = [t.nan_to_num() if t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(torch.ops.m1.prefill_scan, (*to_backend(backend, *tensors), max_length, backend))
