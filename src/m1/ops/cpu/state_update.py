"""Calls state_update.cpp. Tensors, their shapes and dtypes are those of the operators in ops/state_update.py."""

import torch
from torch import Tensor

from m1.ops.build import call


def state_update(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    y: Tensor,
) -> None:
    """Updates the slots' states and fills y. Raises IndexError, before any change, where a slot doesn't exist."""
    n = A.shape[1]
    held = conv_state.to(z.dtype)  # itself, but for a dtype the kernel doesn't know
    step = _step(z, conv_weight, conv_bias, held, ssm_state, slots)
    activations = [contiguous_rows(t) for t in (z, x, B, C, dt)]
    strides = [t.stride(0) for t in activations]
    parameters = [A.contiguous(), D.contiguous()]
    sizes = [z.shape[1] // n, x.shape[1] // n]
    _check(call("m1_state_update", *step, *sizes, *activations, *strides, *parameters, y), slots, ssm_state)
    if held is not conv_state:
        conv_state.copy_(held)


def ssd_update(
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    y: Tensor,
) -> None:
    """Updates the slots' states and fills y. Raises IndexError, before any change, where a slot doesn't exist."""
    _, heads, P, N = ssm_state.shape
    held = conv_state.to(xBC.dtype)  # as in state_update
    step = _step(xBC, conv_weight, conv_bias, held, ssm_state, slots)
    xBC = contiguous_rows(xBC)
    parameters = [t.contiguous() for t in (dt, A, D)]
    sizes = [(xBC.shape[1] - heads * N) // (P + N), heads, P, N]
    _check(call("m1_ssd_update", *step, *sizes, xBC, xBC.stride(0), *parameters, y), slots, ssm_state)
    if held is not conv_state:
        conv_state.copy_(held)


def _step(
    rows: Tensor, conv_weight: Tensor, conv_bias: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor
) -> list[Tensor | int]:
    """The fields of the C++ struct Step."""
    sizes = [len(rows), len(ssm_state), rows.dtype == torch.bfloat16]
    return [*sizes, slots.contiguous(), conv_weight.T.contiguous(), conv_bias.contiguous(), conv_state, ssm_state]


def contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _check(bad_row: int, slots: Tensor, states: Tensor) -> None:
    if bad_row >= 0:
        raise IndexError(f"row {bad_row} has slot {int(slots[bad_row])}, but there are {len(states)} slots")
