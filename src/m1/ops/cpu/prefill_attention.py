"""Prefill attention on a CPU, by PyTorch's attention chunk by chunk."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops.chunks import bounds
from m1.ops.reference import keys_of


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor,
    max_length: int, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Fills out. A chunk's call has the same tensors in any company, and so the same result."""
    out.zero_()
    for slot, start, (first, end) in zip(slots.tolist(), starts.tolist(), bounds(cu_seqlens), strict=True):
        if slot < 0 or first == end:
            continue
        length = start + end - first
        k, v = (keys_of(cache, page_table[slot], length)[None] for cache in (k_cache, v_cache))
        mask = torch.ones(end - first, length, dtype=torch.bool).tril(start) if start else None
        queries = q[None, first:end].transpose(1, 2)
        y = F.scaled_dot_product_attention(queries, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        out[first:end] = y[0].transpose(0, 1)
