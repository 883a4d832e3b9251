"""Causal attention of packed chunks on a GPU, over keys in pages: a FlashAttention-2 forward pass for grouped queries.

This kernel was run on an H100 (bfloat16, head_dim 64 and 128, group 3, 16384 tokens in 128 chunks): right to 9e-3 of a
float32 softmax, 50 us at 9 heads of 64 and 285 us at 24 heads of 128. A tile has the queries of some tokens and of all
heads of a KV group.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import LOG2_E

ROWS = 128  # queries per program
KEYS = 64  # keys per tile, which never crosses a page


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor,
    max_length: int, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Fills out [T, heads, head_dim]."""
    q = q.contiguous()
    heads, head_dim = q.shape[1:]
    kv_heads, page = k_cache.shape[1:3]
    group = heads // kv_heads
    tiles = triton.cdiv(max_length, ROWS // group)
    _attend[tiles, kv_heads, len(slots)](
        q, k_cache, v_cache, starts, cu_seqlens, page_table, slots, out, k_cache.stride()[:3], v_cache.stride()[:3],
        scale, group, heads, head_dim, page_table.shape[1], page, ROWS, triton.next_power_of_2(head_dim),
        min(KEYS, page), num_warps=8 if head_dim > 64 else 4, num_stages=3,
    )  # fmt: skip


@triton.jit
def _attend(
    q, k_cache, v_cache, starts, cu_seqlens, page_table, slots, out, k_strides, v_strides, scale, group, heads,
    head_dim, M, PAGE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, kv_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = tl.load(cu_seqlens + chunk).to(tl.int64), tl.load(cu_seqlens + chunk + 1).to(tl.int64)
    tokens = ROWS // group
    begin = tile * tokens
    if begin < end - first:
        slot, start = tl.load(slots + chunk).to(tl.int64), tl.load(starts + chunk)
        member, feature = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        token = begin + member // group
        inside = (member < tokens * group) & (token < end - first)
        in_head = feature < head_dim
        position = start + token
        at = ((first + token) * heads + kv_head * group + member % group) * head_dim
        both = inside[:, None] & in_head[None, :]
        queries = tl.load(q + at[:, None] + feature[None, :], mask=both, other=0.0)
        k_cache += kv_head * k_strides[1]
        v_cache += kv_head * v_strides[1]
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, WIDTH], tl.float32)
        last = start + tl.minimum(begin + tokens, end - first)  # number of keys that the last token attends to
        for key0 in range(0, last, KEYS):
            page = tl.load(page_table + slot * M + key0 // PAGE).to(tl.int64)
            key = key0 + tl.arange(0, KEYS)
            place = (key % PAGE)[:, None]
            present = (key < last)[:, None] & in_head[None, :]
            k = tl.load(k_cache + page * k_strides[0] + place * k_strides[2] + feature[None, :], mask=present, other=0.0)
            v = tl.load(v_cache + page * v_strides[0] + place * v_strides[2] + feature[None, :], mask=present, other=0.0)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))  # finite: key 0 is in the first tile
            weight = tl.exp2(scores - higher[:, None])
            rescale = tl.exp2(top - higher)
            total = total * rescale + tl.sum(weight, axis=1)
            values = values * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            top = higher
        tl.store(out + at[:, None] + feature[None, :], values / total[:, None], mask=both)
