"""Invariant 2 for prefill attention: every kernel equals the reference, which equals one decode step per token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import BACKENDS, DTYPES, to_backend
from tolerance import assert_rms_close

from m1.ops import decode_attention, prefill_attention

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")

CHUNKS = [(0, 1), (0, 45), (17, 3), (0, 0), (31, 2), (0, 4), (60, 37)]  # start and length; the sixth is padding
SLOTS = [4, 0, 6, 1, 2, -1, 3]


def make(chunks=CHUNKS, slots=SLOTS, kv_heads=2, group=3, page=32, pages=4, head_dim=16, dtype=torch.float32, seed=0):
    """The arguments of `prefill_attention`, with NaN wherever nothing may be read, and no pages of no use."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length for _, length in chunks], dtype=torch.long)
    cu_seqlens = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    q = torch.randn(int(cu_seqlens[-1]), kv_heads * group, head_dim, generator=g).to(dtype) * 2
    count = 7 * pages
    caches = [torch.full((count, kv_heads, page, head_dim), torch.nan, dtype=dtype) for _ in "kv"]
    page_table = torch.randperm(count, generator=g).int().view(7, pages)
    for (start, length), slot, first in zip(chunks, slots, cu_seqlens.tolist(), strict=False):
        end = start + length if slot >= 0 and length else 0
        if slot < 0:
            q[first : first + length] = torch.nan
            continue
        for i, number in enumerate(page_table[slot].tolist()):
            filled = min(max(end - i * page, 0), page)
            for cache in caches:
                cache[number, :, :filled] = torch.randn(kv_heads, filled, head_dim, generator=g).to(dtype)
        page_table[slot, -(-end // page) :] = count + 99
    starts = torch.tensor([start for start, _ in chunks], dtype=torch.long)
    longest = max([int(n) for n in lengths] + [1]) + 3
    return [q, *caches, starts, cu_seqlens, page_table, torch.tensor(slots, dtype=torch.long), longest]


def run(backend, arguments):
    *tensors, max_length = arguments
    return prefill_attention(*to_backend(backend, *tensors), max_length, backend=backend).cpu()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_equals_reference(backend, dtype):
    arguments = make(dtype=dtype)
    actual = run(backend, arguments)
    assert_rms_close([actual], [run("reference", arguments)], 1e-5 if dtype == torch.float32 else 0.005)
    assert actual.dtype == dtype and actual[51:55].abs().max() == 0


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("group", "head_dim", "page", "pages"), [(1, 80, 16, 3), (5, 16, 256, 1), (9, 32, 50, 1), (2, 16, 9, 1)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_heads_and_pages(backend, group, head_dim, page, pages):
    chunks = [(0, min(21, page)), (page - 3, 2)]
    arguments = make(chunks, [1, 0], 1, group, page, pages, head_dim)
    assert_rms_close([run(backend, arguments)], [run("reference", arguments)], 1e-5)


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 34)), max_size=5),
    group=st.integers(1, 5),
    paging=st.sampled_from([(64, 1), (16, 4), (32, 2)]),
    seed=st.integers(0, 99),
)
def test_any_shape(chunks, group, paging, seed):
    slots = torch.randperm(7, generator=torch.Generator().manual_seed(seed))[: len(chunks)] - 1
    arguments = make(chunks, slots.tolist(), 2, group, *paging, seed=seed)
    assert_rms_close([run("cpu", arguments)], [run("reference", arguments)], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_do_not_depend_on_the_others(backend):
    arguments = make()
    together = run(backend, arguments)
    q, k, v, starts, cu_seqlens, page_table, slots, _ = arguments
    for j in (1, 2, 6):
        part, own = slice(cu_seqlens[j], cu_seqlens[j + 1]), slice(j, j + 1)
        edges = torch.tensor([0, len(q[part])])
        alone = run(backend, [q[part], k, v, starts[own], edges, page_table, slots[own], len(q[part])])
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_token_equals_its_decode_step(backend):
    arguments = make([(30, 5)], [2])
    q, k, v, _, _, page_table, slots, _ = arguments
    lengths = torch.arange(31, 36)
    steps = decode_attention(q, k, v, lengths, page_table, slots.expand(5), backend=backend)
    assert_rms_close([run(backend, arguments)], [steps], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, *rest = make([(3, 40)], [0])
    arguments = [q * 1e3, *rest]
    assert_rms_close([run(backend, arguments)], [run("reference", arguments)], 1e-4)


@pytest.mark.parametrize(
    ("starts", "slots", "page", "named"),
    [
        ([0, 2], [0, 7], 1, "chunk 1 has slot 7, but there are 7 slots"),
        ([0, 125], [0, 1], 1, "chunk 1 has keys 125 to 129 of slot 1, .* but a slot has 128"),
        ([0, -1], [0, 1], 1, "chunk 1 has keys -1 to 3 of slot 1, .* but a slot has 128"),
        ([0, 2], [0, 1], 28, r"chunk 1 has keys 2 to 6 of slot 1, in pages \[28.* there are 28 pages"),
    ],
)
def test_what_does_not_exist_is_refused(starts, slots, page, named):
    q, k, v, _, cu_seqlens, page_table, _, longest = make([(0, 3), (2, 4)], [0, 1])
    page_table[1, 0] = page
    with pytest.raises(IndexError, match=named):
        prefill_attention(q, k, v, torch.tensor(starts), cu_seqlens, page_table, torch.tensor(slots), longest)


def test_edges_that_do_not_fit_are_refused():
    q, k, v, starts, _, *rest = make([(0, 3), (2, 4)], [0, 1])
    with pytest.raises(ValueError, match=r"cu_seqlens must rise .* but is \[0, 3, 6\], T is 7 from q"):
        prefill_attention(q, k, v, starts, torch.tensor([0, 3, 6]), *rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_proper_pytorch_operator(backend):
    *tensors, longest = make([(0, 3), (2, 4)], [0, 1])
    tensors = [t.nan_to_num() if t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(torch.ops.m1.prefill_attention, (*to_backend(backend, *tensors), longest, 0.1, backend))
