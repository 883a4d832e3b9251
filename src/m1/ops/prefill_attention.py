"""Causal attention of chunks of several prompts over the keys and values in their slots' pages."""

from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.chunks import bounds, check_chunks
from m1.ops.decode_attention import CACHES, RULES, page_limits
from m1.ops.selective_scan import kernel_dtype
from m1.ops.shapes import Shapes

CHECK = Shapes(
    "prefill_attention", where=RULES,
    q="T heads head_dim", **CACHES, starts="c: int", cu_seqlens="c+1: int", page_table="S M: int", slots="c: int",
)  # fmt: skip


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor,
    max_length: int, scale: float | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v of chunks of several prompts, packed one after another, with grouped query heads.

    Chunk j is tokens cu_seqlens[j] to cu_seqlens[j + 1]. Its token i is at position starts[j] + i of its slot, and
    attends to the keys up to there, which are in the cache already. Results don't depend on the other chunks. Not
    differentiable.

    Args:
        q: [T, heads, head_dim], queries after rotary embedding.
        k_cache, v_cache, page_table: as in `decode_attention`.
        starts: [c] integers, the position of each chunk's first token.
        cu_seqlens: [c+1] integers that rise from 0 to T; the edges of the chunks.
        slots: [c] integers, the slot of each chunk. A chunk with a negative slot is padding.
        max_length: at least the length of the longest chunk.
        scale: factor of the scores; head_dim**-0.5 when None.

    Returns:
        [T, heads, head_dim] in q's dtype; zero for padding.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a slot, a position or a page that doesn't exist.
    """
    CHECK(q, k_cache, v_cache, starts, cu_seqlens, page_table, slots)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    backend = choose("prefill_attention", backend, q, page_limits(k_cache, v_cache, page_table))
    if backend != "triton":
        check_chunks("prefill_attention", cu_seqlens, slots, len(page_table), max_length, q=q)
    if backend == "reference":
        _check_pages(k_cache, starts, cu_seqlens, page_table, slots)
    chunks = (starts.long().contiguous(), cu_seqlens.long().contiguous())
    table, slots = page_table.int().contiguous(), slots.long().contiguous()
    if backend == "reference":
        return reference.prefill_attention(q, k_cache, v_cache, *chunks, table, slots, scale)
    dtype = kernel_dtype(q, k_cache, v_cache)  # slow if dtypes differ: converts the caches
    tensors = (q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), *chunks, table, slots)
    return _prefill_attention(*tensors, max_length, scale, backend).to(q.dtype)


def _check_pages(k_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor) -> None:
    """Raises IndexError if a chunk has keys before or after its slot's pages, or in a page that doesn't exist."""
    pages, keys, capacity = len(k_cache), k_cache.shape[2], k_cache.shape[2] * page_table.shape[1]
    chunks = zip(slots.tolist(), starts.tolist(), bounds(cu_seqlens), strict=True)
    for chunk, (slot, start, (first, end)) in enumerate(chunks):
        last = start + end - first
        if slot >= 0 and not 0 <= start <= last <= capacity:
            raise IndexError(f"chunk {chunk} has keys {start} to {last}, but a slot has {capacity}")
        used = page_table[slot, : -(-last // keys)]
        if slot >= 0 and first < end and not ((used >= 0) & (used < pages)).all():
            raise IndexError(f"chunk {chunk} has pages {used.tolist()}, but there are {pages}")


ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor cu_seqlens, Tensor page_table, Tensor slots, "
    "int max_length, float scale"
)
_prefill_attention = inference_operator(
    "prefill_attention", "prefill_attention", ARGUMENTS, lambda q, *rest: q.new_empty(q.shape)
)
