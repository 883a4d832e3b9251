"""What a decode step knows of each slot's sequence besides its caches. It is read before and advanced after a step."""

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.inputs import MAX_STOPS, STOPS
from m1.ops.shapes import Shapes

INTEGERS, FLOATS = f"S {STOPS + MAX_STOPS}: int64", "S 3: float32"
CHECK = Shapes("read_registers", integers=INTEGERS, floats=FLOATS, slots="b: int64")
CHECK_ADVANCE = Shapes("advance_registers", integers=INTEGERS, slots="b: int64", tokens="b: int64")


def read_registers(integers: Tensor, floats: Tensor, slots: Tensor, backend: Backend = "auto") -> tuple[Tensor, ...]:
    """The inputs of the next step of these slots.

    Args:
        integers: [S, 14] int64, floats: [S, 3] float32, the registers of all slots.
        slots: [b] int64.

    Returns:
        tokens: [b] int64, the last token of each sequence.
        active: [b] int64, the slots; -1 for sequences that have ended.
        lengths: [b] int64, the number of tokens that the slots have seen, which is the position of the next.
        keys: [b] int64, lengths + 1, the number of keys that the next token sees.
        uniform: [b] float64, the random numbers in [0, 1) of the next draw: a function of its stream and number.
        temperature: [b] float32.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a slot that doesn't exist.
    """
    CHECK(integers, floats, slots)
    backend = _chosen("read_registers", backend, integers, floats)
    arguments = integers, floats, slots.contiguous()
    return reference.read_registers(*arguments) if backend == "reference" else _read_registers(*arguments, backend)


def advance_registers(integers: Tensor, slots: Tensor, tokens: Tensor, backend: Backend = "auto") -> None:
    """Makes the drawn tokens [b] the inputs of the next step of these slots [b], in place.

    A sequence that draws one of its stop tokens ends. One that had ended before stays as it is, but for its last token.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a slot that doesn't exist.
    """
    CHECK_ADVANCE(integers, slots, tokens)
    backend = _chosen("advance_registers", backend, integers)
    arguments = integers, slots.contiguous(), tokens.contiguous()
    if backend == "reference":
        reference.advance_registers(*arguments)
    else:
        _advance_registers(*arguments, backend)


def _chosen(name: str, backend: Backend, *registers: Tensor) -> Backend:
    return choose(name, backend, registers[0], {"contiguous registers": all(map(Tensor.is_contiguous, registers))})


def _new_inputs(integers: Tensor, floats: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
    integers_of_rows = [torch.empty_like(slots) for _ in range(4)]
    return *integers_of_rows, slots.new_empty(len(slots), dtype=torch.float64), floats.new_empty(len(slots))


READ, ADVANCE = "Tensor integers, Tensor floats, Tensor slots", "Tensor(a!) integers, Tensor slots, Tensor tokens"
INPUTS = f"({', '.join(['Tensor'] * 6)})"
_read_registers = inference_operator("read_registers", "registers", READ, _new_inputs, returns=INPUTS)
_advance_registers = inference_operator("advance_registers", "registers", ADVANCE, lambda *rest: None, returns="()")
