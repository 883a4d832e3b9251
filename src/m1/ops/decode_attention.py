"""Attention of one new token per sequence over the keys and values in the sequence's pages."""

from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.selective_scan import kernel_dtype
from m1.ops.shapes import Rule, Shapes
from m1.ops.state_update import rows_as_slots

RULES: dict[str, Rule] = {
    "kv_heads must divide heads": lambda kv_heads, heads: kv_heads and heads % kv_heads == 0,
    "page_table must have a row": lambda S: S > 0,
}
CACHES = {"k_cache": "pages kv_heads PAGE head_dim", "v_cache": "pages kv_heads PAGE head_dim"}
CHECK = Shapes(
    "decode_attention", where=RULES,
    q="b heads head_dim", **CACHES, lengths="b: int", page_table="S M: int", slots="b: int or None",
)  # fmt: skip


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor,
    slots: Tensor | None = None, scale: float | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v over the first `length` keys of each row's slot, with grouped query heads.

    Key t of slot s is in page page_table[s, t // PAGE], at t % PAGE. Keys are split into parts, and the parts' results
    are merged in order (flash-decoding). A row's parts depend on its own length only, so results are batch-invariant.
    All query heads of a group share one read of a part from memory. Not differentiable.

    Args:
        q: [b, heads, head_dim], queries of the new tokens, after rotary embedding.
        k_cache: [pages, kv_heads, PAGE, head_dim], keys, including the new token's. Those after the first `length` of
            a slot are never read. The kernels require pages of a power of two of keys, at least 16, unless M is 1.
        v_cache: [pages, kv_heads, PAGE, head_dim], values.
        lengths: [b] integers, the number of keys of each row, 0 to M * PAGE. The output is zero for a row without keys.
        page_table: [S, M] integers, the pages of each slot; int32 isn't converted. Entries after the first `length`
            keys are never read.
        slots: [b] integers, the slot of each row. A negative slot means none, and the output is zero. Row i has slot i
            when None.
        scale: factor of the scores; head_dim**-0.5 when None.

    Returns:
        [b, heads, head_dim] in q's dtype. Sums and softmax are in float32.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a slot, a length or a page that doesn't exist.
    """
    CHECK(q, k_cache, v_cache, lengths, page_table, slots)
    slots = rows_as_slots("decode_attention", slots, q, page_table)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    backend = choose("decode_attention", backend, q, page_limits(k_cache, v_cache, page_table))
    if backend == "reference":
        return reference.decode_attention(q, k_cache, v_cache, lengths, page_table, slots, scale)
    dtype = kernel_dtype(q, k_cache, v_cache)  # slow if dtypes differ: converts the caches
    tensors = (q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), lengths.long().contiguous())
    return _decode_attention(*tensors, page_table.int().contiguous(), slots, scale, backend).to(q.dtype)


def page_limits(k_cache: Tensor, v_cache: Tensor, page_table: Tensor) -> dict[str, bool]:
    """What the attention kernels require of the caches, in words, and whether it holds."""
    keys, head_dim = k_cache.shape[2:]
    whole = page_table.shape[1] == 1 or (keys >= 16 and keys & (keys - 1) == 0)
    return {
        "a head_dim that is a multiple of 16": head_dim % 16 == 0,
        "contiguous keys and values": k_cache.stride(3) == v_cache.stride(3) == 1,
        "pages of a power of two of keys, at least 16, or one page per slot": whole,
    }


ARGUMENTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor page_table, Tensor slots, float scale"
_decode_attention = inference_operator(
    "decode_attention", "decode_attention", ARGUMENTS, lambda q, *rest: q.new_empty(q.shape)
)
