"""Invariant 2 for decode attention: every kernel equals the reference, which equals torch's attention."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import BACKENDS, DTYPES, interpreted, to_backend
from tolerance import assert_rms_close

from m1.ops import decode_attention

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")


def make(lengths, kv_heads=2, group=3, capacity=400, head_dim=64, dtype=torch.float32, seed=0):
    """q, k_cache, v_cache, lengths, slots: a slot more than rows, rows in reverse, NaN wherever nothing may be read."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)
    q = torch.randn(b, kv_heads * group, head_dim, generator=g).to(dtype) * 2
    caches = [torch.randn(b + 1, kv_heads, capacity, head_dim, generator=g).to(dtype) for _ in "kv"]
    slots = torch.arange(b).flip(0)
    for cache in caches:
        cache[b] = torch.nan
        for slot, length in zip(slots, lengths, strict=True):
            cache[slot, :, length:] = torch.nan
    return q, *caches, torch.tensor(lengths, dtype=torch.long), slots


def run(backend, *arguments):
    return decode_attention(*to_backend(backend, *arguments), backend=backend).cpu()


def shapes():
    """(backend, group, head_dim), every pair of the latter but where they take seconds."""
    few = [(1, 128), (3, 64), (4, 16), (7, 80)]
    pairs = list(itertools.product([1, 3, 4, 7], [16, 64, 80, 128]))
    return [(backend, *pair) for backend in BACKENDS for pair in (few if interpreted(backend) else pairs)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "group", "head_dim"), shapes())
def test_kernel_equals_reference(backend, dtype, group, head_dim):
    arguments = make([1, 2, 17, 128, 129, 400], group=group, head_dim=head_dim, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.005
    assert_rms_close([run(backend, *arguments)], [run("reference", *arguments)], tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=0, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    parts=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_shape(lengths, kv_heads, group, parts, seed):
    arguments = make(lengths, kv_heads, group, 300, 16 * parts, seed=seed)
    assert_rms_close([run("cpu", *arguments)], [run("reference", *arguments)], 1e-5)


def test_reference_equals_torchs_attention():
    q, k, v, lengths, _ = make([50, 50, 50], capacity=50)
    expected = F.scaled_dot_product_attention(q[:, :, None], k[:3], v[:3], enable_gqa=True)[:, :, 0]
    torch.testing.assert_close(run("reference", q, k[:3], v[:3], lengths), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_nothing_to_attend_to_gives_zeros(backend):
    q, k, v, lengths, slots = make([0, 5, 6])
    slots[1] = -1
    out = run(backend, q, k, v, lengths, slots)
    assert out[:2].abs().max() == 0 and out[2].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_batch_mates(backend):
    q, k, v, lengths, slots = make([300, 31, 257])
    together = run(backend, q, k, v, lengths, slots)
    for row in range(3):
        alone = run(
            backend, *(t[row : row + 1] if t is q else t for t in (q, k, v)), lengths[row, None], slots[row, None]
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v, lengths, slots = make([200])
    arguments = (q * 1e3, k, v, lengths, slots)
    out = run(backend, *arguments)
    assert out.isfinite().all()
    assert_rms_close([out], [run("reference", *arguments)], 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_caches_are_read_in_place(backend):
    """Keys and values stored token-major, [slots, tokens, heads, head_dim], and joined in one tensor."""
    q, k, v, lengths, slots = make([120, 77])
    joined = torch.stack([k.transpose(1, 2), v.transpose(1, 2)])
    views = [t.transpose(1, 2) for t in joined]
    assert torch.equal(run(backend, q, *views, lengths, slots), run(backend, q, k, v, lengths, slots))


@pytest.mark.parametrize(("slots", "lengths"), [([0, 3], [5, 5]), ([0, 1], [5, 401]), ([0, 1], [5, -1])])
def test_slots_and_lengths_that_do_not_exist_are_refused(slots, lengths):
    q, k, v, _, _ = make([5, 5])
    with pytest.raises(IndexError, match=r"row 1 has slot .* but there are 3 slots of 400 keys"):
        decode_attention(q, k, v, torch.tensor(lengths), torch.tensor(slots), backend="cpu")


@pytest.mark.parametrize("which", ["heads", "cache", "lengths"])
def test_shapes_that_do_not_fit_are_refused(which):
    q, k, v, lengths, slots = make([5, 5])
    q, v = (q[:, :5] if which == "heads" else q), (v[:2] if which == "cache" else v)
    named = {
        "heads": "kv_heads must divide heads, but kv_heads is 2 from k_cache, heads is 5 from q",
        "cache": r"v_cache has shape \(2, 2, 400, 64\)",
        "lengths": r"lengths has shape \(1,\)",
    }
    with pytest.raises(ValueError, match=f"decode_attention: {named[which]}"):
        decode_attention(q, k, v, lengths[:1] if which == "lengths" else lengths, slots)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_proper_pytorch_operator(backend):
    arguments = to_backend(backend, *make([5, 40]))
    torch.library.opcheck(torch.ops.m1.decode_attention, (*arguments, 0.1, backend))
