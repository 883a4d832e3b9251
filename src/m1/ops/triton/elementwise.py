"""Residual connection with RMSNorm, and SwiGLU, on a GPU."""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import await_previous, overlap, silu

WARP_NUMBERS = 512  # elements per warp of _add_rms_norm
BLOCK = 1024  # outputs per program of _swiglu


def add_rms_norm(hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """Updates hidden and fills out."""
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    warps = min(max(block // WARP_NUMBERS, 1), 16)
    if rows:
        sizes = eps, width, block, update is not None
        _add_rms_norm[(rows,)](hidden, update, weight, out, *sizes, num_warps=warps, **overlap(out.device))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Fills out."""
    rows, width = out.shape
    if rows:
        _swiglu[rows, triton.cdiv(width, BLOCK)](gate_up, out, width, BLOCK, **overlap(out.device))


@triton.jit
def _add_rms_norm(
    hidden, update, weight, out, eps, width, BLOCK: tl.constexpr, HAS_UPDATE: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < width
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64) * width + at
    x = tl.load(hidden + row, mask=inside, other=0.0)
    if HAS_UPDATE:
        x = (x.to(tl.float32) + tl.load(update + row, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(hidden + row, x, mask=inside)
    x = x.to(tl.float32)
    tl.store(out + row, x / tl.sqrt(tl.sum(x * x, axis=0) / width + eps) * scale, mask=inside)


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    await_previous(EARLY)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, silu(gate) * up, mask=inside)
