"""Reads and advances the registers of slots on a GPU, in one kernel each."""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops import inputs
from m1.ops.random_bits import FACTORS, STEP
from m1.ops.triton import await_previous, overlap

ROWS = 32  # rows per program
TOKEN, LENGTH, DRAWN, ENDED, STREAM, STOPS, MAX_STOPS, TEMPERATURE = (
    tl.constexpr(getattr(inputs, name))
    for name in ("TOKEN", "LENGTH", "DRAWN", "ENDED", "STREAM", "STOPS", "MAX_STOPS", "TEMPERATURE")
)
STEP_BITS, FIRST_FACTOR, SECOND_FACTOR = (tl.constexpr(bits) for bits in (STEP, *FACTORS))


def read_registers(
    integers: Tensor, floats: Tensor, slots: Tensor, tokens: Tensor, active: Tensor, lengths: Tensor, keys: Tensor,
    uniform: Tensor, temperature: Tensor,
) -> None:  # fmt: skip
    """Fills tokens, active, lengths, keys, uniform and temperature."""
    if len(slots):
        _read[(triton.cdiv(len(slots), ROWS),)](
            integers, floats, slots, tokens, active, lengths, keys, uniform, temperature, len(slots),
            integers.stride(0), floats.stride(0), ROWS, num_warps=1, **overlap(slots.device),
        )  # fmt: skip


def advance_registers(integers: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Updates integers."""
    if len(slots):
        _advance[(triton.cdiv(len(slots), ROWS),)](
            integers, slots, tokens, len(slots), integers.stride(0), ROWS, num_warps=1, **overlap(slots.device)
        )


@triton.jit
def _shifted(x, BITS: tl.constexpr):
    """x shifted to the right, filled with zeros."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _uniform(stream, index):
    """Element `index` of the stream, as `random_bits.uniforms`."""
    x = stream + (index + 1) * STEP_BITS
    x = (x ^ _shifted(x, 30)) * FIRST_FACTOR
    x = (x ^ _shifted(x, 27)) * SECOND_FACTOR
    return _shifted(x ^ _shifted(x, 31), 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _read(
    integers, floats, slots, tokens, active, lengths, keys, uniform, temperature, count, width, float_width,
    ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    slot = tl.load(slots + row, mask=exists, other=0)
    own = integers + slot * width
    tl.store(tokens + row, tl.load(own + TOKEN, mask=exists), mask=exists)
    tl.store(active + row, tl.where(tl.load(own + ENDED, mask=exists) > 0, -1, slot), mask=exists)
    length = tl.load(own + LENGTH, mask=exists)
    tl.store(lengths + row, length, mask=exists)
    tl.store(keys + row, length + 1, mask=exists)
    drawn, stream = tl.load(own + DRAWN, mask=exists), tl.load(own + STREAM, mask=exists)
    tl.store(uniform + row, _uniform(stream, drawn), mask=exists)
    tl.store(temperature + row, tl.load(floats + slot * float_width + TEMPERATURE, mask=exists), mask=exists)


@triton.jit
def _advance(integers, slots, tokens, count, width, ROWS: tl.constexpr, EARLY: tl.constexpr):
    await_previous(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    own = integers + tl.load(slots + row, mask=exists, other=0) * width
    token = tl.load(tokens + row, mask=exists, other=0)
    ended = tl.load(own + ENDED, mask=exists, other=1)
    length, drawn = tl.load(own + LENGTH, mask=exists), tl.load(own + DRAWN, mask=exists)
    ends = ended
    for i in tl.static_range(MAX_STOPS):
        ends = tl.where(tl.load(own + STOPS + i, mask=exists) == token, 1, ends)
    tl.store(own + TOKEN, token, mask=exists)
    tl.store(own + LENGTH, length + 1 - ended, mask=exists)
    tl.store(own + DRAWN, drawn + 1 - ended, mask=exists)
    tl.store(own + ENDED, ends, mask=exists)
