"""Calls registers.cpp. Tensors, their shapes and dtypes are those of the operators in ops/registers.py."""

from torch import Tensor

from m1.ops.calls import call


def read_registers(integers: Tensor, floats: Tensor, slots: Tensor, *inputs: Tensor) -> None:
    """Fills the inputs of the next step. Raises IndexError if a slot doesn't exist."""
    sizes = [len(slots), *integers.shape, floats.shape[1]]
    _check(slots, integers, call("m1_read_registers", *sizes, integers, floats, slots, *inputs))


def advance_registers(integers: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Updates integers. Raises IndexError, before any change, if a slot doesn't exist."""
    _check(slots, integers, call("m1_advance_registers", len(slots), *integers.shape, integers, slots, tokens))


def _check(slots: Tensor, integers: Tensor, bad_row: int) -> None:
    if bad_row >= 0:
        raise IndexError(f"row {bad_row} has slot {int(slots[bad_row])}, but there are {len(integers)} slots")
