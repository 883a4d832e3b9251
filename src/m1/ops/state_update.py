"""One decode step of a Mamba layer for many sequences. Their states are in slots and are updated in place."""

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.inputs import SSDStepInputs, StepInputs
from m1.ops.selective_scan import GROUPS, channels_last, kernel_dtype
from m1.ops.shapes import Shapes, declared

CHECK = Shapes("state_update", **declared(StepInputs), where=GROUPS)


def _has_groups(channels: int, heads: int, P: int, N: int) -> bool:
    groups, left = divmod(channels - heads * N, max(P + N, 1))
    return left == 0 and groups > 0 and heads % groups == 0


SSD_GROUPS = {"channels must be G P + G N + heads N with G that divides heads": _has_groups}
CHECK_SSD = Shapes("ssd_update", **declared(SSDStepInputs), where=SSD_GROUPS)


def state_update(
    z: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor,
    A: Tensor, D: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    conv_state: Tensor, ssm_state: Tensor, slots: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Mamba-1's decode step: `selective_scan` of one token per row, which updates the states of the row's slot.

    Not differentiable. The kernels require N = 16, K = 4 and states that are contiguous in each slot.

    Args:
        z, C, dt: [b, D] as in `selective_scan`.
        x, B: [b, X] as in `selective_scan`.
        A, D, conv_weight, conv_bias: as in `selective_scan`.
        conv_state: [S, X, K-1], any float dtype; the last convolution inputs of each slot, oldest first. Updated.
        ssm_state: [S, D, N] float32. Updated.
        slots: [b] integers, the slot of each row, without duplicates. A row with a negative slot is skipped. Row i has
            slot i when None.

    Returns:
        y [b, D] in z's dtype; zero for skipped rows.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    CHECK(z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots)
    slots = rows_as_slots("state_update", slots, z, ssm_state)
    backend = choose(
        "state_update", backend, z, {"state size 16": A.shape[1] == 16} | state_limits(conv_state, ssm_state)
    )
    if backend == "reference":
        inputs = StepInputs(z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots)
        return reference.state_update(inputs)
    dtype = kernel_dtype(z, x, B, C, dt, conv_state)
    activations = [channels_last(t.to(dtype)) for t in (z, x, B, C, dt)]
    parameters = [t.float().contiguous() for t in (A, D, conv_weight, conv_bias)]
    return _state_update(*activations, *parameters, conv_state, ssm_state, slots, backend).to(z.dtype)


def ssd_update(
    xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    conv_state: Tensor, ssm_state: Tensor, slots: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Mamba-2's decode step: convolution and silu of x | B | C, then `ssd` of one token per row.

    It updates the states of the row's slot. Not differentiable. The kernels require P and N that are multiples of 16,
    K = 4 and states that are contiguous in each slot.

    Args:
        xBC: [b, G P + G N + heads N] inputs x, B, C, before the convolution; head i reads group i // (heads / G).
        dt: [b, heads] step sizes before softplus.
        A: [heads], negative.
        D: [heads] skip weights.
        conv_weight: [channels of xBC, K]; the last tap multiplies the current token.
        conv_bias: [channels of xBC].
        conv_state: [S, channels of xBC, K-1], any float dtype; the last inputs of each slot, oldest first. Updated.
        ssm_state: [S, heads, P, N] float32. Updated.
        slots: as in `state_update`.

    Returns:
        y [b, heads, P] in xBC's dtype, without gate and norm; zero for skipped rows.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    CHECK_SSD(xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots)
    slots = rows_as_slots("ssd_update", slots, xBC, ssm_state)
    P, N = ssm_state.shape[2:]
    limits = {"P and N that are multiples of 16": P % 16 == N % 16 == 0} | state_limits(conv_state, ssm_state)
    backend = choose("ssd_update", backend, xBC, limits)
    if backend == "reference":
        inputs = SSDStepInputs(xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots)
        return reference.ssd_update(inputs)
    rows = channels_last(xBC.to(kernel_dtype(xBC, conv_state)))
    parameters = [t.float().contiguous() for t in (dt, A, D, conv_weight, conv_bias)]
    return _ssd_update(rows, *parameters, conv_state, ssm_state, slots, backend).to(xBC.dtype)


def state_limits(conv_state: Tensor, ssm_state: Tensor) -> dict[str, bool]:
    """What the kernels require of states in slots, in words, and whether it holds."""
    contiguous = all(len(t) == 0 or t[0].is_contiguous() for t in (conv_state, ssm_state))
    return {"4 convolution taps": conv_state.shape[2] == 3, "states that are contiguous in each slot": contiguous}


def rows_as_slots(op: str, slots: Tensor | None, rows: Tensor, states: Tensor) -> Tensor:
    """The slots [b] as contiguous int64; if None, row i has slot i. Raises ValueError if a row then has no slot."""
    if slots is not None:
        return slots.long().contiguous()
    if len(rows) > len(states):
        raise ValueError(f"{op}: slots is None for {len(rows)} rows, but there are only {len(states)} slots")
    return torch.arange(len(rows), device=rows.device)


def _new_y(inputs: StepInputs) -> Tensor:
    return inputs.z.new_empty(inputs.z.shape)


def _new_ssd_y(inputs: SSDStepInputs) -> Tensor:
    return inputs.xBC.new_empty(len(inputs.xBC), *inputs.ssm_state.shape[1:3])


STATES = ("conv_state", "ssm_state")
_state_update = inference_operator("state_update", "state_update", StepInputs, _new_y, mutates=STATES)
_ssd_update = inference_operator("ssd_update", "state_update", SSDStepInputs, _new_ssd_y, mutates=STATES)
