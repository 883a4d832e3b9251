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


def make(lengths, kv_heads=2, group=3, page=128, pages=4, head_dim=64, dtype=torch.float32, seed=0):
    """q, k_cache, v_cache, lengths, page_table, slots.

    There is a slot more than rows, which are in reverse. Pages are in any order, those of no use are absent, and NaN is
    wherever nothing may be read.
    """
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)
    q = torch.randn(b, kv_heads * group, head_dim, generator=g).to(dtype) * 2
    count = (b + 1) * pages
    caches = [torch.randn(count, kv_heads, page, head_dim, generator=g).to(dtype) for _ in "kv"]
    page_table = torch.randperm(count, generator=g).int().view(b + 1, pages)
    slots = torch.arange(b).flip(0)
    for slot, length in [*zip(slots, lengths, strict=True), (b, 0)]:
        for i, number in enumerate(page_table[slot].tolist()):
            for cache in caches:
                cache[number, :, max(length - i * page, 0) :] = torch.nan
        page_table[slot, -(-length // page) :] = count + 99
    return q, *caches, torch.tensor(lengths, dtype=torch.long), page_table, slots


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
    paging=st.sampled_from([(300, 1), (16, 19), (64, 5), (256, 2)]),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_shape(lengths, kv_heads, group, paging, blocks, seed):
    arguments = make(lengths, kv_heads, group, *paging, 16 * blocks, seed=seed)
    assert_rms_close([run("cpu", *arguments)], [run("reference", *arguments)], 1e-5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("page", "pages"), [(600, 1), (9, 1), (16, 38), (512, 2)])
def test_triton_pages(page, pages):
    """Pages smaller and larger than a split, and with 38 of them more splits than parts."""
    lengths = [1, page, min(page * pages, 600)]
    arguments = make(lengths, 1, 2, page, pages, 16)
    assert_rms_close([run("triton", *arguments)], [run("reference", *arguments)], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_paging_changes_no_result(backend):
    """Bit for bit, where splits are no shorter than without pages."""
    q, k, v, lengths, page_table, slots = make([300, 255], 1, 2, 256, 2, 16)
    whole = [t[page_table.clamp(max=5)].transpose(1, 2).flatten(2, 3) for t in (k, v)]
    expected = run(backend, q, *whole, lengths, torch.arange(3)[:, None], slots)
    assert torch.equal(run(backend, q, k, v, lengths, page_table, slots), expected)


def test_reference_equals_torchs_attention():
    q, k, v, lengths, page_table, slots = make([50, 50, 50], page=50, pages=1)
    whole = [t[page_table[slots, 0]] for t in (k, v)]
    expected = F.scaled_dot_product_attention(q[:, :, None], *whole, enable_gqa=True)[:, :, 0]
    torch.testing.assert_close(run("reference", q, k, v, lengths, page_table, slots), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_nothing_to_attend_to_gives_zeros(backend):
    *tensors, slots = make([0, 5, 6])
    slots[1] = -1
    out = run(backend, *tensors, slots)
    assert out[:2].abs().max() == 0 and out[2].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_batch_mates(backend):
    q, k, v, lengths, page_table, slots = make([300, 31, 257])
    together = run(backend, q, k, v, lengths, page_table, slots)
    for row in range(3):
        own = slice(row, row + 1)
        assert torch.equal(run(backend, q[own], k, v, lengths[own], page_table, slots[own])[0], together[row])


def test_one_program_or_several_per_row_are_equal(monkeypatch):
    """Bit for bit: a program that has all parts of a row merges them as the kernel for those of several does."""
    pytest.importorskip("triton")
    from m1.ops.triton import decode_attention as kernel

    arguments, outs = make([0, 1, 40, 600], 1, 3, 16, 38, 16), []
    for alone in (1, 10**6):
        monkeypatch.setattr(kernel, "ALONE", alone)
        outs.append(run("triton", *arguments))
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, *rest = make([200])
    out = run(backend, q * 1e3, *rest)
    assert out.isfinite().all()
    assert_rms_close([out], [run("reference", q * 1e3, *rest)], 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_caches_are_read_in_place(backend):
    """Keys and values stored token-major, [pages, tokens, heads, head_dim], and joined in one tensor."""
    q, k, v, *rest = make([120, 77])
    joined = torch.stack([k.transpose(1, 2), v.transpose(1, 2)])
    views = [t.transpose(1, 2) for t in joined]
    assert torch.equal(run(backend, q, *views, *rest), run(backend, q, k, v, *rest))


@pytest.mark.parametrize(
    ("slots", "lengths", "page"),
    [([0, 3], [5, 5], 1), ([0, 1], [5, 513], 1), ([0, 1], [5, -1], 1), ([0, 1], [5, 5], 12), ([0, 1], [5, 5], -1)],
)
def test_what_does_not_exist_is_refused(slots, lengths, page):
    q, k, v, _, page_table, _ = make([5, 5])
    page_table[1, 0] = page
    with pytest.raises(IndexError, match=r"row 1 has slot .* but there are 3 slots of 512 keys, in 12 pages"):
        decode_attention(q, k, v, torch.tensor(lengths), page_table, torch.tensor(slots), backend="cpu")


@pytest.mark.parametrize("page", [8, 24])
def test_pages_that_kernels_do_not_know_fall_back(page):
    arguments = make([5, 30], page=page)
    assert torch.equal(run("auto", *arguments), run("reference", *arguments))
    with pytest.raises(ValueError, match="needs pages of a power of two of keys, at least 16, or one page per slot"):
        run("cpu", *arguments)


@pytest.mark.parametrize("which", ["heads", "cache", "lengths"])
def test_shapes_that_do_not_fit_are_refused(which):
    q, k, v, lengths, *rest = make([5, 5])
    q, v = (q[:, :5] if which == "heads" else q), (v[:2] if which == "cache" else v)
    named = {
        "heads": "kv_heads must divide heads, but kv_heads is 2 from k_cache, heads is 5 from q",
        "cache": r"v_cache has shape \(2, 2, 128, 64\)",
        "lengths": r"lengths has shape \(1,\)",
    }
    with pytest.raises(ValueError, match=f"decode_attention: {named[which]}"):
        decode_attention(q, k, v, lengths[:1] if which == "lengths" else lengths, *rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_proper_pytorch_operator(backend):
    arguments = to_backend(backend, *make([5, 40]))
    torch.library.opcheck(torch.ops.m1.decode_attention, (*arguments, 0.1, backend))
