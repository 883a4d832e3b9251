"""What the larger ops take, declared once: names, order, sizes and dtypes of their tensors (the notation of `Shapes`).

Below the public function the tensors travel together. For a kernel, activations and conv_state share one dtype, the
other floats are float32, seq_idx is int32; the channels of a token are contiguous, and all but activations is as a
whole. Shape letters as in `reference`.
"""

from typing import Annotated, NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """Of `selective_scan`."""

    z: Annotated[Tensor, "b T D"]
    x: Annotated[Tensor, "b T X"]
    B: Annotated[Tensor, "b T X"]
    C: Annotated[Tensor, "b T D"]
    dt: Annotated[Tensor, "b T D"]
    A: Annotated[Tensor, "D N"]
    D: Annotated[Tensor, "D"]
    conv_weight: Annotated[Tensor, "D K"]
    conv_bias: Annotated[Tensor, "D"]
    seq_idx: Annotated[Tensor | None, "b T: int or None"] = None
    conv_state: Annotated[Tensor | None, "b X K-1 or None"] = None
    ssm_state: Annotated[Tensor | None, "b D N or None"] = None


class ScanGradients(NamedTuple):
    """Of the differentiable ScanInputs, in their shapes and dtypes."""

    z: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    conv_state: Tensor
    ssm_state: Tensor


class ScanOutputs(NamedTuple):
    """Of `selective_scan`'s operator. `saved` is what the backward pass starts from, laid out as the backend likes."""

    y: Annotated[Tensor, "b T D"]
    ssm_state: Annotated[Tensor, "b D N: float32"]
    saved: Annotated[Tensor, "b chunks D N: float32"]


class StepInputs(NamedTuple):
    """Of `state_update`, which updates the states. Below the public function there always are slots, int64."""

    z: Annotated[Tensor, "b D"]
    x: Annotated[Tensor, "b X"]
    B: Annotated[Tensor, "b X"]
    C: Annotated[Tensor, "b D"]
    dt: Annotated[Tensor, "b D"]
    A: Annotated[Tensor, "D N"]
    D: Annotated[Tensor, "D"]
    conv_weight: Annotated[Tensor, "D K"]
    conv_bias: Annotated[Tensor, "D"]
    conv_state: Annotated[Tensor, "S X K-1"]
    ssm_state: Annotated[Tensor, "S D N: float32"]
    slots: Annotated[Tensor, "b: int or None"]


class SSDStepInputs(NamedTuple):
    """Of `ssd_update`, as StepInputs."""

    xBC: Annotated[Tensor, "b channels"]
    dt: Annotated[Tensor, "b heads"]
    A: Annotated[Tensor, "heads"]
    D: Annotated[Tensor, "heads"]
    conv_weight: Annotated[Tensor, "channels K"]
    conv_bias: Annotated[Tensor, "channels"]
    conv_state: Annotated[Tensor, "S channels K-1"]
    ssm_state: Annotated[Tensor, "S heads P N: float32"]
    slots: Annotated[Tensor, "b: int or None"]
