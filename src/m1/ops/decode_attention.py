"""Attention of one new token per sequence over the keys and values in its slot."""

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
    """softmax(scale q k^T) v over the first `length` keys of each row's slot, query heads grouped over KV heads.

    The keys are split into parts of a fixed number, each read once for all query heads of its group, and the parts'
    results merged in order (flash-decoding): a row's result doesn't depend on its batch-mates. Not differentiable.

    Args:
        q: [b, heads, head_dim], the new tokens' queries, rotated.
        k_cache: [S, kv_heads, L, head_dim], the slots' keys, the new token's included; the layout of transformers'
            StaticCache. Keys behind `length` are never read.
        v_cache: as k_cache.
        lengths: [b] integers, the number of keys of each row, 0 to L. A row with none gives zeros.
        slots: [b] integers, each row's slot; a negative one means no slot, and gives zeros. Row i has slot i when None.
        scale: head_dim**-0.5 when None.

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
    dtype = kernel_dtype(backend, q, k_cache, v_cache)  # converts the caches where nothing is shared: not a fast path
    arguments = (q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), lengths.long().contiguous(), slots, scale, backend)
    return _decode_attention(*arguments).to(q.dtype)


ARGUMENTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor slots, float scale"
_decode_attention = decode_operator(
    "decode_attention", "decode_attention", ARGUMENTS, lambda q, *rest: q.new_empty(q.shape)
)
