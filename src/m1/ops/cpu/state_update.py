"""Calls state_update.cpp. The inputs are converted already, as described in ops/inputs.py."""

from torch import Tensor

from m1.ops.calls import call
from m1.ops.cpu import ELEMENTS
from m1.ops.inputs import SSDStepInputs, StepInputs


def state_update(inputs: StepInputs, y: Tensor) -> None:
    """Updates the slots' states and fills y. Raises IndexError, before any change, if a slot is out of range."""
    n = inputs.A.shape[1]
    sizes = [inputs.z.shape[1] // n, inputs.x.shape[1] // n]
    strides = [t.stride(0) for t in inputs[:5]]
    _step("m1_state_update", inputs, y, *sizes, *inputs[:5], *strides, inputs.A, inputs.D)


def ssd_update(inputs: SSDStepInputs, y: Tensor) -> None:
    """Updates the slots' states and fills y. Raises IndexError, before any change, if a slot is out of range."""
    xBC, (_, heads, P, N) = inputs.xBC, inputs.ssm_state.shape
    groups = (xBC.shape[1] - heads * N) // (P + N)
    _step("m1_ssd_update", inputs, y, groups, heads, P, N, xBC, xBC.stride(0), inputs.dt, inputs.A, inputs.D)


def _step(kernel: str, inputs: StepInputs | SSDStepInputs, y: Tensor, *own: Tensor | int) -> None:
    """Calls a kernel with the fields of the C++ struct Step, the kernel's own fields, and y."""
    rows, slots, ssm_state = inputs[0], inputs.slots, inputs.ssm_state
    conv_state = inputs.conv_state.to(rows.dtype)  # a copy if the dtype isn't the rows'
    sizes = [len(rows), len(ssm_state), ELEMENTS[rows.dtype]]
    states = conv_state, ssm_state, conv_state.stride(0), ssm_state.stride(0)
    bad_row = call(kernel, *sizes, slots, inputs.conv_weight, inputs.conv_bias, *states, *own, y)
    if bad_row >= 0:
        raise IndexError(f"row {bad_row} has slot {int(slots[bad_row])}, but there are {len(ssm_state)} slots")
    if conv_state is not inputs.conv_state:
        inputs.conv_state.copy_(conv_state)
