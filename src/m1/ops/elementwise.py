"""Fused steps between a decoder layer's matrix products, each in one pass over memory. For inference only."""

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.shapes import KERNEL_FLOATS, Shapes

CHECK = Shapes("add_rms_norm", hidden="rows H", update="rows H: as hidden or None", weight="H: as hidden")
CHECK_SWIGLU = Shapes("swiglu", gate_up="rows width", where={"width must be even": lambda width: width % 2 == 0})
LANES = 16  # elements per iteration of the CPU kernel


def add_rms_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, backend: Backend = "auto"
) -> Tensor:
    """Residual connection and the norm after it: hidden += update, in place, then hidden / rms(hidden) * weight.

    Results are batch-invariant. Not differentiable.

    Args:
        hidden: [rows, H], the residual stream.
        update: [rows, H], the output of a mixer or MLP, added to hidden. Nothing is added when None.
        weight: [H], scale of each channel.
        eps: added to the mean square (Zhang and Sennrich 2019, with transformers' epsilon).

    Returns:
        [rows, H] in hidden's dtype. Sums are in float32.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    CHECK(hidden, update, weight)
    backend = choose("add_rms_norm", backend, hidden, _limits(hidden, hidden.shape[1]))
    if backend == "reference":
        return reference.add_rms_norm(hidden, update, weight, eps)
    return _add_rms_norm(hidden, None if update is None else update.contiguous(), weight.contiguous(), eps, backend)


def swiglu(gate_up: Tensor, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up (Shazeer 2020), computed in float32. Not differentiable.

    Args:
        gate_up: [rows, 2 I], gate followed by up in each row, as one matrix product returns them.

    Returns:
        [rows, I] in the same dtype.

    Raises:
        ValueError: a tensor that doesn't fit (its width must be even), or a backend that can't run this.
    """
    CHECK_SWIGLU(gate_up)
    backend = choose("swiglu", backend, gate_up, _limits(gate_up, gate_up.shape[1] // 2))
    return reference.swiglu(gate_up) if backend == "reference" else _swiglu(gate_up, backend)


def _limits(rows: Tensor, width: int) -> dict[str, bool]:
    limits = {"float32, bfloat16 or float16": rows.dtype in KERNEL_FLOATS, "contiguous rows": rows.is_contiguous()}
    return limits | {f"a width that is a multiple of {LANES}": width % LANES == 0}


ARGUMENTS = "Tensor(a!) hidden, Tensor? update, Tensor weight, float eps"
_add_rms_norm = inference_operator(
    "add_rms_norm", "elementwise", ARGUMENTS, lambda hidden, *rest: torch.empty_like(hidden)
)
_swiglu = inference_operator(
    "swiglu", "elementwise", "Tensor gate_up", lambda rows: rows.new_empty(len(rows), rows.shape[1] // 2)
)
