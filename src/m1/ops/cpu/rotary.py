"""Calls rotary.cpp. Tensors, their shapes and dtypes are those of the operator in ops/rotary.py."""

from torch import Tensor

from m1.ops.calls import call
from m1.ops.cpu import ELEMENTS


def rotate_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, slots: Tensor,
    positions: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Fills out and the tokens' pages. Raises IndexError, before any change, for a place that doesn't exist."""
    (S, M), (pages, kv_heads, page, _) = page_table.shape, k_cache.shape
    sizes = [len(qkv), out.shape[1], kv_heads, qkv.shape[2], *qkv.stride()[:2], S, M, pages, page, ELEMENTS[qkv.dtype]]
    caches: list[Tensor | int] = [k_cache, *k_cache.stride()[:3], v_cache, *v_cache.stride()[:3]]
    bad_row = call("m1_rotate_and_cache", *sizes, qkv, cos, sin, page_table, slots, positions, *caches, out)
    if bad_row >= 0:
        slot, position = int(slots[bad_row]), int(positions[bad_row])
        limits = f"{S} slots of {M * page} keys, in {pages} pages"
        raise IndexError(f"row {bad_row} has slot {slot} and position {position}, but there are {limits}")
