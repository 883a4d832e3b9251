"""Calls prefill_attention.cpp. Tensors, shapes and dtypes are those of the operator in ops/prefill_attention.py."""

import math

from torch import Tensor

from m1.ops.calls import call, float_bits
from m1.ops.cpu import ELEMENTS


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor,
    max_length: int, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Fills out. Raises IndexError, before any change, if a slot, a length or a page is out of range."""
    q = q if q.stride(2) == 1 else q.contiguous()
    (S, M), (pages, kv_heads, page, head_dim) = page_table.shape, k_cache.shape
    sizes = [len(slots), S, M, pages, page, q.shape[1], kv_heads, head_dim, *q.stride()[:2], ELEMENTS[q.dtype]]
    caches: list[Tensor | int] = [k_cache, *k_cache.stride()[:3], v_cache, *v_cache.stride()[:3]]
    places = starts, cu_seqlens, slots, page_table
    chunk = call("m1_prefill_attention", *sizes, float_bits(scale * math.log2(math.e)), *places, q, *caches, out)
    if chunk >= 0:
        slot, start = int(slots[chunk]), int(starts[chunk])
        keys = f"keys {start} to {start + int(cu_seqlens[chunk + 1] - cu_seqlens[chunk])} of slot {slot}"
        limits = f"a slot has {M * page}, and there are {pages} pages"
        raise IndexError(f"chunk {chunk} has {keys}, in pages {page_table[slot].tolist()}, but {limits}")
