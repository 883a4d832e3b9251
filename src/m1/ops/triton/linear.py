"""Matrix products of few rows on a GPU, as in a decode step, whose time is that of reading the weights.

A program has some outputs of all rows and reads their weights in order, several tiles ahead. While the kernel before it
ends, it already fetches its first weights into the L2 cache.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import await_previous, overlap, silu

# Fixed, not autotuned: on an H100, at the shapes of M1-3B, these are within 3 % of the best for 8, 32 and 64 rows. With
# tiles in more than half of the shared memory, a multiprocessor has one program. With less, the next kernel's programs,
# which start early, would crowd on some of them.
MIN_ROWS, MAX_ROWS = 16, 64  # with more rows, torch's products are as fast
WIDE, NARROW, MANY = 64, 32, 4096  # outputs per program: WIDE for more than MANY outputs
INPUTS = (256, 128, 64)  # inputs that a program reads at a time: the first that divides their number
STAGES = 6  # maximum number of tiles in flight
LINE, FETCHED = 128, 8  # bytes per cache line, and lines of each output's weights that a program fetches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gated: bool) -> None:
    """Fills out [rows, outputs] with x weight^T + bias, of at most MAX_ROWS rows.

    If `gated`, weight has twice as many outputs, and out becomes silu(first half) * second half.
    """
    (rows, outputs), inputs = out.shape, weight.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    padded = max(triton.next_power_of_2(rows), MIN_ROWS)
    tile = WIDE if outputs > MANY else NARROW
    widths = INPUTS[1:] if gated or padded > 32 else INPUTS
    width = next((width for width in widths if inputs % width == 0), INPUTS[-1])
    bytes_of_stage = (padded + tile * (1 + gated)) * width * x.element_size()
    stages = max(min(STAGES, shared_memory(x.device) // bytes_of_stage), 2)
    lines = max(min(FETCHED, inputs * x.element_size() // LINE), 1)
    _linear[(triton.cdiv(outputs, tile),)](
        x, weight, bias, out, rows, outputs, x.stride(0), inputs, padded, tile, width, inputs % width == 0,
        bias is not None, gated, 1 << lines.bit_length() - 1, LINE // x.element_size(), num_stages=stages,
        **overlap(x.device),
    )  # fmt: skip


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory for a program's tiles: 7/8 of what it can have."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin * 7 // 8


@triton.jit
def _fetch(lines):
    """Fetches the cache lines at these pointers into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _product(total, x, weight, at, inputs, IN: tl.constexpr, EVEN: tl.constexpr):
    """total + x weight^T for the tile of weights at `weight`, of which inputs from `at` on exist."""
    if EVEN:
        w = tl.load(weight, eviction_policy="evict_first")
    else:
        w = tl.load(weight, mask=(at + tl.arange(0, IN) < inputs)[None, :], other=0.0, eviction_policy="evict_first")
    return tl.dot(x, tl.trans(w), total)


@triton.jit
def _linear(
    x, weight, bias, out, rows, outputs, stride, inputs, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row, n, k = tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
    in_rows = (row < rows)[:, None]
    first = weight + tl.minimum(n, outputs - 1).to(tl.int64) * inputs
    second = first + outputs * inputs
    if EARLY:
        lines = tl.arange(0, LINES)[None, :] * LINE
        _fetch(first[:, None] + lines)
        if GATED:
            _fetch(second[:, None] + lines)
    await_previous(EARLY)
    gate, up = tl.zeros([ROWS, OUT], tl.float32), tl.zeros([ROWS, OUT], tl.float32)
    for at in range(0, inputs, IN):
        in_x = in_rows if EVEN else in_rows & (at + k < inputs)[None, :]
        values = tl.load(x + row[:, None] * stride + (at + k)[None, :], mask=in_x, other=0.0)
        gate = _product(gate, values, first[:, None] + (at + k)[None, :], at, inputs, IN, EVEN)
        if GATED:
            up = _product(up, values, second[:, None] + (at + k)[None, :], at, inputs, IN, EVEN)
    exists = n < outputs
    if HAS_BIAS:
        gate += tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + outputs + n, mask=exists, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = silu(gate) * up
    tl.store(out + row[:, None] * outputs + n[None, :], gate, mask=in_rows & exists[None, :])
