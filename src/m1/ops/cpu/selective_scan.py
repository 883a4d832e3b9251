"""Calls selective_scan.cpp. The inputs are converted already, as described in ops/inputs.py."""

import torch.nn.functional as F
from torch import Tensor

from m1.ops.calls import call
from m1.ops.cpu import ELEMENTS
from m1.ops.inputs import PrefillInputs, ScanGradients, ScanInputs, ScanOutputs

TAPS = 4  # the kernel's number of taps; a shorter convolution is padded with leading taps of 0


def forward(inputs: ScanInputs, outputs: ScanOutputs) -> None:
    """Fills the outputs. A nonempty `saved` gets each group's state before each chunk, as [n, channel]."""
    saved = outputs.saved if outputs.saved.numel() else None
    call("m1_selective_scan_forward", *_fields(inputs), inputs.ssm_state, outputs.y, outputs.ssm_state, saved, None)


def prefill_scan(inputs: PrefillInputs, y: Tensor) -> None:
    """Updates the slots' states and fills y."""
    conv_state, ssm_state, slots, cu_seqlens, _ = inputs[9:]
    held = conv_state.to(inputs.x.dtype)  # a copy if the dtype isn't the activations'
    activations = [t[None] for t in inputs[:5]]
    fields = _fields(ScanInputs._make([*activations, *inputs[5:9], None, held, ssm_state]))
    fields[0] = len(slots)
    call("m1_selective_scan_forward", *fields[:-2], cu_seqlens, slots, ssm_state, y, ssm_state, None, held)
    if held is not conv_state:
        conv_state.copy_(held)


def backward(inputs: ScanInputs, saved: Tensor, dy: Tensor, dssm_state: Tensor, gradients: ScanGradients) -> None:
    """Fills the gradients. The kernel returns those of parameters per sequence; this function sums them."""
    (b, d), K = (inputs.z.shape[0], inputs.z.shape[2]), inputs.conv_weight.shape[1]
    A, D = inputs.A, inputs.D
    sequences = [A.new_empty(b, *A.shape), D.new_empty(b, d), D.new_empty(b, TAPS, d), D.new_empty(b, d)]
    conv_state = inputs.x.new_empty(b, inputs.x.shape[2], TAPS - 1)
    outputs = [*gradients[:5], *sequences, conv_state, gradients.ssm_state]
    call("m1_selective_scan_backward", *_fields(inputs), saved, dy.contiguous(), dssm_state.contiguous(), *outputs)
    totals = [parts.sum(0) for parts in sequences]
    totals[2] = totals[2][-K:].T
    for gradient, total in zip(gradients[5:9], totals, strict=True):
        gradient.copy_(total)
    gradients.conv_state.copy_(conv_state[:, :, TAPS - K :])


def _fields(inputs: ScanInputs) -> list[Tensor | int | None]:
    """The fields of the C++ struct Inputs."""
    z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, conv_state, _ = inputs
    missing = TAPS - conv_weight.shape[1]
    taps = F.pad(conv_weight, (missing, 0)).T.contiguous()
    if conv_state is not None and missing:
        conv_state = F.pad(conv_state, (missing, 0))
    n = A.shape[1]
    fields: list[Tensor | int | None] = [*z.shape[:2], z.shape[2] // n, x.shape[2] // n, ELEMENTS[z.dtype]]
    for t in map(rows, (z, x, B, C, dt)):
        fields += [t, t.stride(1)]
    return [*fields, A, D, taps, conv_bias, seq_idx, conv_state, None, None]


def rows(t: Tensor) -> Tensor:
    """t if all its tokens [b, T] are evenly spaced in memory, else a contiguous copy."""
    return t if t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()
