"""Causal attention of packed chunks on a GPU, over keys in pages: a FlashAttention-2 forward pass for grouped queries.

A tile has the queries of some tokens and of all heads of a KV group. Its sizes are fixed, so a chunk's results don't
depend on the other chunks.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import LOG2_E

ROWS, KEYS = 128, 64  # queries per program, and keys that it reads at a time; half of them in float32
MIN_ROWS = 16  # minimum number of rows of an operand of tl.dot


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor,
    max_length: int, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """Fills out [T, heads, head_dim]."""
    q, (heads, head_dim), (kv_heads, page) = q.contiguous(), q.shape[1:], k_cache.shape[1:3]
    if not len(q):
        return
    group, halved = heads // kv_heads, q.element_size() // 2
    rows = max(ROWS // halved, triton.next_power_of_2(group))
    keys = max(min(KEYS // halved, triton.next_power_of_2(page)), MIN_ROWS)
    _attend[triton.cdiv(max_length, rows // group), kv_heads, len(slots)](
        q, k_cache, v_cache, starts, cu_seqlens, page_table, slots, out, k_cache.stride()[:3], v_cache.stride()[:3],
        scale, group, heads, head_dim, page_table.shape[1], page, rows, triton.next_power_of_2(head_dim), keys,
        num_warps=8 if head_dim > 64 else 4, num_stages=3,
    )  # fmt: skip


@triton.jit
def _attend(
    q, k_cache, v_cache, starts, cu_seqlens, page_table, slots, out, k_strides, v_strides, scale, group, heads,
    head_dim, M, PAGE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS // group tokens of a chunk, for a KV head. Scores include a factor of log2(e)."""
    kv_head, chunk = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_seqlens + chunk)
    length = (tl.load(cu_seqlens + chunk + 1) - first).to(tl.int32)
    tokens = ROWS // group
    begin = tl.program_id(0) * tokens
    if begin < length:
        slot, start = tl.load(slots + chunk), tl.load(starts + chunk).to(tl.int32)
        member, feature = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        token = begin + member // group
        inside = (member < tokens * group) & (token < length)
        in_head = feature < head_dim
        both = inside[:, None] & in_head[None, :]
        at = ((first + token) * heads + kv_head * group + member % group) * head_dim
        queries = tl.load(q + at[:, None] + feature[None, :], mask=both, other=0.0)
        page_table += slot * M
        k_cache += kv_head * k_strides[1]
        v_cache += kv_head * v_strides[1]
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, WIDTH], tl.float32)
        # keys that the last token attends to; without a slot none, and the values stay zero
        end = tl.where(slot < 0, 0, start + tl.minimum(begin + tokens, length))
        page = tl.load(page_table, mask=end > 0, other=0).to(tl.int64)
        for tile in range(0, end, KEYS):
            key = tile + tl.arange(0, KEYS)
            present = (key < end)[:, None] & in_head[None, :]
            place = (tile % PAGE + tl.arange(0, KEYS))[:, None]  # a tile never crosses a page
            keys, vectors = k_cache + page * k_strides[0], v_cache + page * v_strides[0]
            k = tl.load(keys + place * k_strides[2] + feature[None, :], mask=present, other=0.0)
            v = tl.load(vectors + place * v_strides[2] + feature[None, :], mask=present, other=0.0)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            scores = tl.where(key[None, :] <= (start + token)[:, None], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))  # finite, as key 0 is in the first tile
            weight = tl.exp2(scores - higher[:, None])
            rescale = tl.exp2(top - higher)
            total = total * rescale + tl.sum(weight, axis=1)
            values = values * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            top = higher
            if (tile + KEYS) % PAGE == 0 and tile + KEYS < end:
                page = tl.load(page_table + (tile + KEYS) // PAGE).to(tl.int64)
        tl.store(out + at[:, None] + feature[None, :], values / tl.where(end > 0, total, 1.0)[:, None], mask=both)
