"""The GPU kernels, in Triton, and what they share.

For tests they also run on CPU tensors, slowly, under TRITON_INTERPRET=1.

The kernels of a decode step are short, so the next one is launched while one runs ("programmatic dependent launch", on
NVIDIA GPUs from the H100 on). Each calls `await_previous` before it touches what earlier kernels read or write.
"""

# ruff: noqa: ANN001, ANN201 (inside kernels everything is a tensor, a pointer or a constexpr)

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)


@functools.cache
def overlap(device: torch.device) -> dict[str, Any]:
    """The launch options of a kernel that calls `await_previous`: EARLY, and Triton's own where the GPU can do it."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """Lets the next kernel start, and waits until the previous ones have ended."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_gradient(x):
    """The derivative of silu at x."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):
    """log(1 + e^x), with a small relative error even where the result is small. 0 at -inf.

    It is max(x, 0) + log(1 + e) with e = exp(-|x|). With s = e / (2 + e) <= 1/3,
    log(1 + e) = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...).
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    s = e / (2.0 + e)
    q = s * s
    tail = 2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13 + q * (2 / 15))))))
    return tl.maximum(x, 0.0) + s * (2.0 + q * tail)
