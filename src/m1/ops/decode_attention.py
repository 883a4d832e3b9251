"""Attention of one new token per sequence over the keys and values in the sequence's slot."""

from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, decode_operator
from m1.ops.selective_scan import kernel_dtype
from m1.ops.shapes import Rule, Shapes
from m1.ops.state_update import rows_as_slots

GROUPED: dict[str, Rule] = {"kv_heads must divide heads": lambda kv_heads, heads: kv_heads and heads % kv_heads == 0}
CHECK = Shapes(
    "decode_attention", where=GROUPED,
    q="b heads head_dim", k_cache="S kv_heads L head_dim", v_cache="S kv_heads L head_dim",
    lengths="b: int", slots="b: int or None",
)  # fmt: skip


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    slots: Tensor | None = None, scale: float | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v over the first `length` keys of each row's slot, with grouped query heads.

    Keys are split into parts of a fixed size, and the parts' results are merged in order (flash-decoding). All query
    heads of a group share one read of a part from memory. Results are batch-invariant. Not differentiable.

    Args:
        q: [b, heads, head_dim], queries of the new tokens, after rotary embedding.
        k_cache: [S, kv_heads, L, head_dim], keys of the slots, including the new token's, in the layout of
            transformers' StaticCache. Keys after the first `length` are never read.
        v_cache: [S, kv_heads, L, head_dim], values of the slots.
        lengths: [b] integers, the number of keys of each row, 0 to L. The output is zero for a row without keys.
        slots: [b] integers, the slot of each row. A negative slot means none, and the output is zero. Row i has slot i
            when None.
        scale: factor of the scores; head_dim**-0.5 when None.

    Returns:
        [b, heads, head_dim] in q's dtype. Sums and softmax are in float32.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    CHECK(q, k_cache, v_cache, lengths, slots)
    head_dim = q.shape[2]
    slots = rows_as_slots("decode_attention", slots, q, k_cache)
    scale = head_dim**-0.5 if scale is None else scale
    contiguous = k_cache.stride(3) == v_cache.stride(3) == 1
    limits = {"a head_dim that is a multiple of 16": head_dim % 16 == 0, "contiguous keys and values": contiguous}
    backend = choose("decode_attention", backend, q, limits)
    if backend == "reference":
        return reference.decode_attention(q, k_cache, v_cache, lengths, slots, scale)
    dtype = kernel_dtype(q, k_cache, v_cache)  # slow if dtypes differ: converts the caches
    arguments = (q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), lengths.long().contiguous(), slots, scale, backend)
    return _decode_attention(*arguments).to(q.dtype)


ARGUMENTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor slots, float scale"
_decode_attention = decode_operator(
    "decode_attention", "decode_attention", ARGUMENTS, lambda q, *rest: q.new_empty(q.shape)
)
