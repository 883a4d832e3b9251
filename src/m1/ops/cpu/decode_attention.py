"""Calls decode_attention.cpp. Tensors, their shapes and dtypes are those of the operator in ops/decode_attention.py."""

import math

from torch import Tensor

from m1.ops.calls import call, float_bits
from m1.ops.cpu import ELEMENTS


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor, slots: Tensor, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Fills out. Raises IndexError, before any change, if a slot, a length or a page is out of range."""
    (S, M), (pages, kv_heads, page, _) = page_table.shape, k_cache.shape
    sizes = [q.shape[0], S, M, pages, page, q.shape[1], kv_heads, q.shape[2], ELEMENTS[q.dtype]]
    sizes.append(float_bits(scale * math.log2(math.e)))
    caches = [*_cache(k_cache), *_cache(v_cache)]
    bad_row = call("m1_decode_attention", *sizes, slots, lengths, page_table, q.contiguous(), *caches, out)
    if bad_row >= 0:
        slot, length = int(slots[bad_row]), int(lengths[bad_row])
        limits = f"{S} slots of {M * page} keys, in {pages} pages"
        raise IndexError(f"row {bad_row} has slot {slot} and {length} keys, but there are {limits}")


def _cache(t: Tensor) -> list[Tensor | int]:
    """The fields of the C++ struct Cache."""
    return [t, *t.stride()[:3]]
