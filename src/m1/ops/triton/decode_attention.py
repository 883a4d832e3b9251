"""Decode attention on a GPU: split-KV flash-decoding for grouped queries, on keys in pages.

The keys of a row and KV head come in parts, which are read once for all query heads of the group. A part is one split
of SPLIT keys, or several of a row with more than PARTS splits. So the buffers for the parts don't grow with the
capacity. The parts of a row are merged in order. In `_attend`, PROGRAMS programs share the parts of all rows. If
one program has all parts of a row and KV head, it merges them itself; else `_merge` does. Both do the same arithmetic,
and the parts depend on the row's own length only, so results are batch-invariant.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import LOG2_E, await_previous, overlap

# Fixed, not autotuned. On an H200 in bfloat16, tiles of half the size lose 3 % with 512 sequences of 2200 keys and 8 %
# with 128 or 256, and gain 3 to 5 % with 8 or 64; more stages gain nothing. SPLIT 512 is 5 % faster at 16384 keys but
# 18 % slower for a single sequence, and the split must not depend on the batch.
SPLIT = 256  # keys per split, or those of a page if fewer
PARTS = 32  # maximum number of parts of a row
ALONE = 1024  # with as many rows and KV heads, or more, a program handles all parts of one
PROGRAMS = 2048  # with fewer, as many programs share them
TILE_BYTES, STAGES = 32768, 2  # bytes of keys, and of values, that _attend reads at a time; tiles in flight
MERGED = 8  # parts that _merge reads at a time
MIN_ROWS = 16  # minimum number of rows of an operand of tl.dot


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor, slots: Tensor, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Fills out [b, heads, head_dim]."""
    b, heads, head_dim = q.shape
    (kv_heads, page), M = k_cache.shape[1:3], page_table.shape[1]
    split = min(SPLIT, page)
    group, count, width = heads // kv_heads, min(triton.cdiv(M * page, split), PARTS), triton.next_power_of_2(head_dim)
    q = q.contiguous()
    rows = max(triton.next_power_of_2(group), MIN_ROWS)
    keys = min(TILE_BYTES // (width * q.element_size()), triton.next_power_of_2(split))
    pairs, early = max(b * kv_heads, 1), overlap(q.device)
    shared = 1 if pairs >= ALONE else min(triton.cdiv(PROGRAMS, pairs), count)
    parts = torch.empty(b, heads, count if shared > 1 else 0, head_dim, dtype=torch.float32, device=q.device)
    highest, weights = torch.empty_like(parts[..., 0]), torch.empty_like(parts[..., 0])
    _attend[shared, kv_heads, b](
        q, k_cache, v_cache, lengths, page_table, slots, parts, highest, weights, out, k_cache.stride()[:3],
        v_cache.stride()[:3], scale, group, head_dim, M, count, page, split, rows, width, max(keys, MIN_ROWS),
        shared == 1, num_stages=STAGES, **early,
    )  # fmt: skip
    if shared > 1:
        sizes = count, head_dim, width, split, MERGED
        _merge[heads, b](parts, highest, weights, lengths, slots, out, *sizes, num_warps=1, **early)


@triton.jit
def _keys(lengths, slots, row):
    """Number of keys of the row; 0 without a slot."""
    return tl.where(tl.load(slots + row) < 0, 0, tl.load(lengths + row))


@triton.jit
def _splits_per_part(length, count, SPLIT: tl.constexpr):
    """Number of splits in each of a row's `count` parts; the last ones may have fewer or none."""
    return tl.cdiv(tl.cdiv(length, SPLIT), count)


@triton.jit
def _merge_weights(top, total, own_top, own_total):
    """Merges a part into those before it: their highest scores, and the sums of their weights.

    Returns both, and the factors of the values before and of the part's own. Explicit FMAs round the same way in every
    kernel.
    """
    higher = tl.maximum(top, own_top)
    before, own = tl.exp2(top - higher), tl.exp2(own_top - higher)
    return higher, tl.fma(own_total, own, total * before), before, own


@triton.jit
def _attend(
    q, k_cache, v_cache, lengths, page_table, slots, parts, highest, weights, out, k_strides, v_strides, scale, group,
    head_dim, M, count, PAGE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, ALONE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention over the keys of each n-th part, for n programs per row and KV head.

    Scores include a factor of log2(e), so weights are 2^(score - highest). If ALONE, n is 1, and the program writes
    `out`. Else it writes per query head and part:
        parts: the weighted sum of the values.
        highest: the highest score.
        weights: the sum of the weights.
    """
    await_previous(EARLY)
    kv_head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, length = tl.load(slots + row), _keys(lengths, slots, row)
    part_keys = _splits_per_part(length, count, SPLIT) * SPLIT
    member, feature = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    heads = row * tl.num_programs(1) * group + kv_head * group + member
    in_group, in_head = member < group, feature < head_dim
    both = in_group[:, None] & in_head[None, :]
    queries = tl.load(q + heads[:, None] * head_dim + feature[None, :], mask=both, other=0.0)
    page_table += slot * M
    all_top, all_total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    all_values = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in range(tl.program_id(0), tl.cdiv(length, tl.maximum(part_keys, 1)), tl.num_programs(0)):
        first, end = part * part_keys, tl.minimum((part + 1) * part_keys, length)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, WIDTH], tl.float32)
        page = tl.load(page_table + first // PAGE).to(tl.int64)
        for start in range(first, end, KEYS):
            keys = k_cache + page * k_strides[0] + kv_head * k_strides[1]
            vectors = v_cache + page * v_strides[0] + kv_head * v_strides[1]
            exists = start + tl.arange(0, KEYS) < end
            present = exists[:, None] & in_head[None, :]
            key = start % PAGE + tl.arange(0, KEYS)
            k = tl.load(keys + key[:, None] * k_strides[2] + feature[None, :], mask=present, other=0.0)
            v = tl.load(vectors + key[:, None] * v_strides[2] + feature[None, :], mask=present, other=0.0)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            scores = tl.where(exists[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            weight = tl.exp2(scores - higher[:, None])
            rescale = tl.exp2(top - higher)
            total = total * rescale + tl.sum(weight, axis=1)
            values = values * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            top = higher
            if (start + KEYS) % PAGE == 0 and start + KEYS < end:
                page = tl.load(page_table + (start + KEYS) // PAGE).to(tl.int64)
        if ALONE:
            all_top, all_total, before, own = _merge_weights(all_top, all_total, top, total)
            all_values = tl.fma(values, own[:, None] + tl.zeros_like(values), all_values * before[:, None])
        else:
            at = heads * count + part
            tl.store(highest + at, top, mask=in_group)
            tl.store(weights + at, total, mask=in_group)
            tl.store(parts + at[:, None] * head_dim + feature[None, :], values, mask=both)
    if ALONE:
        values = all_values / tl.where(length > 0, all_total, 1.0)[:, None]
        tl.store(out + heads[:, None] * head_dim + feature[None, :], values, mask=both)


@triton.jit
def _merge(
    parts, highest, weights, lengths, slots, out, count, head_dim,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    row = tl.program_id(1).to(tl.int64)
    head = row * tl.num_programs(0) + tl.program_id(0)
    length = _keys(lengths, slots, row)
    part_keys = tl.maximum(_splits_per_part(length, count, SPLIT), 1) * SPLIT
    filled = tl.cdiv(length, part_keys)
    feature = tl.arange(0, WIDTH)
    in_head = feature < head_dim
    top, total, values = float("-inf"), 0.0, tl.zeros([WIDTH], tl.float32)
    for start in range(0, filled, MERGED):
        for i in tl.static_range(MERGED):
            at = head * count + tl.minimum(start + i, filled - 1)
            own_top = tl.where(start + i < filled, tl.load(highest + at), float("-inf"))
            own_total = tl.load(weights + at)
            part = tl.load(parts + at * head_dim + feature, mask=in_head, other=0.0)
            top, total, before, own = _merge_weights(top, total, own_top, own_total)
            values = tl.fma(part, own + tl.zeros_like(part), values * before)
    tl.store(out + head * head_dim + feature, values / tl.where(filled > 0, total, 1.0), mask=in_head)
