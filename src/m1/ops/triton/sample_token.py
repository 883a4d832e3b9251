"""Draws one token per row on a GPU.

In `_sum_blocks`, one program handles BLOCK logits of a row. It finds the highest logit and the sum of
e^((logit - highest) / temperature). `_draw` finds the block, and in it the token, at which the running sum passes the
target. Logits are subtracted before the division, in which a low temperature could make them infinite.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import LOG2_E, await_previous, overlap

BLOCK = 1024  # logits per program of _sum_blocks


def sample_token(logits: Tensor, uniform: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Fills tokens and logprobs."""
    b, V = logits.shape
    if not b:
        return
    blocks = triton.cdiv(V, BLOCK)
    highest, sums = torch.empty(2, b, blocks, dtype=torch.float32, device=logits.device)
    early = overlap(logits.device)
    _sum_blocks[blocks, b](logits, temperature, highest, sums, V, BLOCK, **early)
    sizes = V, blocks, BLOCK, triton.next_power_of_2(blocks)
    _draw[(b,)](logits, uniform, temperature, highest, sums, tokens, logprobs, *sizes, **early)


@triton.jit
def _load(logits, row, block, V, BLOCK: tl.constexpr):
    """The block's logits, padded with -inf after the last."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _exponents(x, top, temperature, row):
    """(x - top) / temperature as exponents of 2; -inf where x is, even if top is, too."""
    heat = tl.load(temperature + row)
    return tl.where(x == float("-inf"), x, (x - top) * (LOG2_E / tl.where(heat > 0, heat, 1.0)))


@triton.jit
def _sum_blocks(logits, temperature, highest, sums, V, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    await_previous(EARLY)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = _load(logits, row, block, V, BLOCK)
    top = tl.max(x, axis=0)
    weights = tl.exp2(_exponents(x, top, temperature, row))
    tl.store(highest + row * tl.num_programs(0) + block, top)
    tl.store(sums + row * tl.num_programs(0) + block, tl.sum(weights, axis=0))


@triton.jit
def _draw(
    logits, uniform, temperature, highest, sums, tokens, logprobs, V, blocks,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    block, offset = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    tops = tl.load(highest + row * blocks + block, mask=block < blocks, other=float("-inf"))
    top = tl.max(tops, axis=0)
    weights = tl.exp2(_exponents(tops, top, temperature, row))
    weights *= tl.load(sums + row * blocks + block, mask=block < blocks, other=0.0)
    running = tl.cumsum(weights, axis=0)
    total = tl.sum(weights, axis=0)
    target = tl.load(uniform + row).to(tl.float32) * total
    greedy = tl.load(temperature + row) == 0.0
    # the first block that passes the target, or if rounding leaves none, the last one with any probability
    passes = (weights > 0) & (tl.where(greedy, tops == top, running > target))
    first, last = tl.min(tl.where(passes, block, WIDTH), axis=0), tl.max(tl.where(weights > 0, block, 0), axis=0)
    chosen = tl.minimum(first, last)
    before = tl.sum(tl.where(block < chosen, weights, 0.0), axis=0)

    x = _load(logits, row, chosen, V, BLOCK)
    exponents = _exponents(x, top, temperature, row)
    inside = tl.exp2(exponents)
    passes = (inside > 0) & (tl.where(greedy, x == top, before + tl.cumsum(inside, axis=0) > target))
    first, last = tl.min(tl.where(passes, offset, BLOCK), axis=0), tl.max(tl.where(inside > 0, offset, 0), axis=0)
    at = tl.minimum(first, last)
    own = tl.sum(tl.where(offset == at, exponents, 0.0), axis=0)
    tl.store(tokens + row, chosen * BLOCK + at)
    tl.store(logprobs + row, (own - tl.log2(total)) / LOG2_E)
