"""Attention of one new token a sequence over the keys and values in its slot."""

from typing import Any

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, decode_operator, kernels, require_shapes
from m1.ops.selective_scan import kernel_dtype
from m1.ops.state_update import rows_as_slots


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(scale q k^T) v over the first `length` keys of each row's slot, query heads grouped over KV heads.

    The keys are split into parts of a fixed number, each read once for all query heads of its group, and the parts'
    results merged in order (flash-decoding): a row's result doesn't depend on its batch-mates. Not differentiable.

    Args:
        q: [b, heads, head_dim], the new tokens' queries, rotated.
        k_cache: [S, kv_heads, L, head_dim], the slots' keys, the new token's included; the layout of transformers'
            StaticCache. Keys behind `length` are never read.
        v_cache: as k_cache.
        lengths: [b] integers, the number of keys of each row, 0 to L. A row with none gives zeros.
        slots: [b] integers, each row's slot; negative stands for none, and gives zeros. Row i has slot i when None.
        scale: head_dim**-0.5 when None.

    Returns:
        [b, heads, head_dim] in q's dtype. Sums and softmax are in float32.

    Raises:
        ValueError: shapes that don't fit, or a backend that can't run this.
    """
    b, heads, head_dim = q.shape
    S, kv_heads = k_cache.shape[:2]
    fits = [k_cache.shape == v_cache.shape, k_cache.shape[3] == head_dim, heads % kv_heads == 0]
    fits += [lengths.shape == (b,), b <= S if slots is None else slots.shape == (b,)]
    named = dict(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, slots=slots)
    require_shapes("decode_attention", fits, named)
    slots = rows_as_slots(slots, q)
    scale = head_dim**-0.5 if scale is None else scale
    contiguous = k_cache.stride(3) == v_cache.stride(3) == 1
    limits = {"a head_dim that is a multiple of 16": head_dim % 16 == 0, "contiguous keys and values": contiguous}
    backend = choose("decode_attention", backend, q, limits)
    if backend == "reference":
        return reference.decode_attention(q, k_cache, v_cache, lengths, slots, scale)
    dtype = kernel_dtype(backend, q, k_cache, v_cache)  # converts the caches where nothing is shared: not a fast path
    arguments = (q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), lengths.long(), slots, scale, backend)
    return _decode_attention(*arguments).to(q.dtype)


@decode_operator("decode_attention")
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, slots: Tensor, scale: float, backend: str
) -> Tensor:
    out = q.new_empty(q.shape)
    kernels(backend, "decode_attention").decode_attention(q, k_cache, v_cache, lengths, slots, scale, out)
    return out


@torch.library.register_fake("m1::decode_attention")
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)
