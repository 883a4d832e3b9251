"""Calls selective_scan.cpp. Tensors, their shapes and dtypes are those of the operators in ops/selective_scan.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops.build import call

TAPS = 4  # the kernel's: shorter convolutions get taps of weight 0 in front


def forward(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    seq_idx: Tensor | None,
    window: Tensor | None,
    h0: Tensor | None,
    y: Tensor,
    h_last: Tensor,
    saved: Tensor,
) -> None:
    """Fills y, h_last and, if it has room, saved: in front of every chunk the groups' states, [n, channel] each."""
    inputs = _inputs(z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, window)
    h0 = None if h0 is None else h0.contiguous()
    call("m1_selective_scan_forward", *inputs, h0, y, h_last, saved if saved.numel() else None)


def backward(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    seq_idx: Tensor | None,
    window: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dh_last: Tensor,
    dz: Tensor,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
    ddt: Tensor,
    dA: Tensor,
    dD: Tensor,
    dconv_weight: Tensor,
    dconv_bias: Tensor,
    dwindow: Tensor,
    dh0: Tensor,
) -> None:
    """Fills the gradients. Those of parameters come from the kernel a sequence each and are summed here."""
    inputs = _inputs(z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, window)
    b, d = z.shape[0], z.shape[2]
    sequences = [A.new_empty(b, *A.shape), D.new_empty(b, d), D.new_empty(b, TAPS, d), D.new_empty(b, d)]
    window_taps = x.new_empty(b, TAPS - 1, x.shape[2])
    dy, dh_last = dy.contiguous(), dh_last.contiguous()
    outputs = [dz, dx, dB, dC, ddt, *sequences, window_taps, dh0]
    call("m1_selective_scan_backward", *inputs, saved, dy, dh_last, *outputs)
    K = conv_weight.shape[1]
    totals = [parts.sum(0) for parts in sequences]
    totals[2] = totals[2][-K:].T
    for gradient, total in zip([dA, dD, dconv_weight, dconv_bias], totals, strict=True):
        gradient.copy_(total)
    dwindow.copy_(window_taps[:, TAPS - K :])


def _inputs(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    seq_idx: Tensor | None,
    window: Tensor | None,
) -> list[Tensor | int | None]:
    """The fields of the C++ struct Inputs."""
    missing = TAPS - conv_weight.shape[1]
    taps = F.pad(conv_weight, (missing, 0)).T.contiguous()
    if window is not None:
        window = F.pad(window, (0, 0, missing, 0)).contiguous()
    activations = [rows(t) for t in (z, x, B, C, dt)]
    n = A.shape[1]
    fields: list[Tensor | int | None] = [*z.shape[:2], z.shape[2] // n, x.shape[2] // n, z.dtype == torch.bfloat16]
    for t in activations:
        fields += [t, t.stride(1)]
    tensors = [A.contiguous(), D.contiguous(), taps, conv_bias.contiguous()]
    return [*fields, *tensors, None if seq_idx is None else seq_idx.contiguous(), window]


def rows(t: Tensor) -> Tensor:
    """t with contiguous channels and evenly spaced rows: slices of a projection's output pass without a copy."""
    return t if t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()
