"""Rotary embedding of new tokens on a GPU. Keys and values go straight into their pages."""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import await_previous, overlap

HEADS = 8  # heads per program


def rotate_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, slots: Tensor,
    positions: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Fills out and the tokens' places in the pages."""
    rows, heads, head_dim = qkv.shape
    kv_heads, page = k_cache.shape[1:3]
    if rows:
        _rotate_and_cache[rows, triton.cdiv(heads, HEADS)](
            qkv, cos, sin, k_cache, v_cache, page_table, slots, positions, out, qkv.stride()[:2],
            k_cache.stride()[:3], v_cache.stride()[:3], heads - 2 * kv_heads, kv_heads, head_dim, page_table.shape[1],
            page, HEADS, triton.next_power_of_2(head_dim // 2), num_warps=2, **overlap(out.device),
        )  # fmt: skip


@triton.jit
def _rotate_and_cache(
    qkv, cos, sin, k_cache, v_cache, page_table, slots, positions, out, strides, k_strides, v_strides, q_heads,
    kv_heads, head_dim, M, page_size, HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head, i = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, HALF)[None, :]
    half = head_dim // 2
    exists = (head < q_heads + 2 * kv_heads) & (i < half)
    source = qkv + row * strides[0] + head * strides[1] + i
    a = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=exists, other=0.0).to(tl.float32)
    c = tl.load(cos + row * head_dim + i, mask=i < half, other=0.0).to(tl.float32)
    s = tl.load(sin + row * head_dim + i, mask=i < half, other=0.0).to(tl.float32)
    rotates = head < q_heads + kv_heads
    first, second = tl.where(rotates, a * c - b * s, a), tl.where(rotates, b * c + a * s, b)
    target = out + (row * q_heads + head) * head_dim + i
    tl.store(target, first, mask=exists & (head < q_heads))
    tl.store(target + half, second, mask=exists & (head < q_heads))
    slot, position = tl.load(slots + row), tl.load(positions + row)
    if slot >= 0:
        page, place = tl.load(page_table + slot * M + position // page_size).to(tl.int64), position % page_size
        key = head - q_heads
        target = k_cache + page * k_strides[0] + key * k_strides[1] + place * k_strides[2] + i
        tl.store(target, first, mask=exists & (key >= 0) & (key < kv_heads))
        tl.store(target + half, second, mask=exists & (key >= 0) & (key < kv_heads))
        value = key - kv_heads
        target = v_cache + page * v_strides[0] + value * v_strides[1] + place * v_strides[2] + i
        tl.store(target, first, mask=exists & (value >= 0))
        tl.store(target + half, second, mask=exists & (value >= 0))
