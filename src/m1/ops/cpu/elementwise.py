"""Calls elementwise.cpp. Tensors, their shapes and dtypes are those of the operators in ops/elementwise.py."""

from torch import Tensor

from m1.ops.calls import call, float_bits
from m1.ops.cpu import ELEMENTS


def add_rms_norm(hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """Updates hidden and fills out."""
    call("m1_add_rms_norm", *hidden.shape, ELEMENTS[hidden.dtype], float_bits(eps), hidden, update, weight, out)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Fills out."""
    call("m1_swiglu", *out.shape, ELEMENTS[out.dtype], gate_up, out)
