"""The selective scan: one public function, which runs the C++ kernel on the CPU and the reference elsewhere."""

import ctypes
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1.ops import reference
from m1.ops.build import load_cpu_kernels

KERNEL_STATE_SIZE = 16
KERNEL_CHUNK = 16  # tokens between saved states, as in cpu/selective_scan.cpp

Backend = Literal["auto", "cpu", "reference"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,  y_t = <C_t, h_t> + D x_t, with grouped B and C.

    Channels form groups of N. Group g reads C's group g and B's group g // (D / X): B is repeated as grouped-query
    attention repeats key-value heads.

    Args:
        x: [b, T, D] inputs, after convolution and activation.
        dt: [b, T, D] step sizes >= 0, after softplus. A step of 0 leaves the state as it is (padding).
        A: [D, N], negative.
        B: [b, T, X], X a multiple of N that divides D.
        C: [b, T, D].
        D: [D] skip weights.
        seq_idx: [b, T] integers, the document of each token; the state is cleared where it changes.
        initial_state: [b, D, N] state in front of the first token, zero when None.
        backend: "cpu" is the C++ kernel (N = 16 only), "reference" plain PyTorch; "auto" picks.

    Returns:
        y [b, T, D] in x's dtype and the final state [b, D, N] in float32. All arithmetic is in float32.

    Raises:
        ValueError: shapes that don't fit, or backend "cpu" where it can't run.
    """
    d, n, kv = x.shape[-1], A.shape[1], B.shape[-1]
    if d % n or kv % n or d % kv:
        raise ValueError(f"selective_scan: D={d} and X={kv} must be multiples of the state size {n}, and X divide D")
    if x.shape != dt.shape or x.shape != C.shape or A.shape[0] != d or D.shape != (d,):
        shapes = [tuple(t.shape) for t in (x, dt, A, B, C, D)]
        raise ValueError(f"selective_scan: shapes of x, dt, A, B, C, D don't fit: {shapes}")
    kernels = None
    if backend != "reference" and x.device.type == "cpu" and n == KERNEL_STATE_SIZE and x.shape[1] > 0:
        kernels = load_cpu_kernels("selective_scan")
    if kernels is None:
        if backend == "cpu":
            raise ValueError("selective_scan: backend 'cpu' needs CPU tensors, state size 16 and a C++ compiler")
        y, state = reference.selective_scan(x, dt, A, B, C, D, seq_idx, initial_state)
    else:
        tensors = [t.float() for t in (x, dt, A, B, C, D)]
        h0 = None if initial_state is None else initial_state.float()
        documents = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        y, state = _CpuScan.apply(*tensors, h0, documents, kernels)
    return y.to(x.dtype), state


class _CpuScan(torch.autograd.Function):
    """The C++ kernel under autograd. Tensors are float32; see cpu/selective_scan.cpp for layouts."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, seq_idx, kernels):  # noqa: ANN001
        b, T, d = x.shape
        x, dt, B, C = (_rows(t) for t in (x, dt, B, C))
        A, D, h0 = A.contiguous(), D.contiguous(), None if h0 is None else h0.contiguous()
        y = x.new_empty(b, T, d)
        h_last = x.new_empty(b, d, KERNEL_STATE_SIZE)
        saved = None
        if any(ctx.needs_input_grad):
            chunks = -(-T // KERNEL_CHUNK)
            saved = x.new_empty(b, chunks, d // KERNEL_STATE_SIZE, KERNEL_STATE_SIZE, KERNEL_STATE_SIZE)
        _call(
            kernels.m1_selective_scan_forward,
            *_sizes(x, B),
            *_operands(x, dt, A, B, C, D, seq_idx),
            h0,
            y,
            h_last,
            saved,
        )
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, saved)
        ctx.kernels = kernels
        return y, h_last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh_last):  # noqa: ANN001
        x, dt, A, B, C, D, seq_idx, saved = ctx.saved_tensors
        b, T, d = x.shape
        dx, ddt, dC = (x.new_empty(b, T, d) for _ in range(3))
        dB = x.new_empty(b, T, B.shape[-1])
        dA, dh0 = (x.new_empty(b, d, KERNEL_STATE_SIZE) for _ in range(2))
        dD = x.new_empty(b, d)
        gradients = [dx, ddt, dA, dB, dC, dD, dh0]
        operands = _operands(x, dt, A, B, C, D, seq_idx)
        _call(
            ctx.kernels.m1_selective_scan_backward,
            *_sizes(x, B), *operands, saved, dy.contiguous(), dh_last.contiguous(), *gradients,
        )  # fmt: skip
        return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dh0 if ctx.needs_input_grad[6] else None, None, None


def _rows(t: Tensor) -> Tensor:
    """t with contiguous channels and evenly spaced rows: slices of a projection's output pass without a copy."""
    return t if t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()


def _sizes(x: Tensor, B: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] // KERNEL_STATE_SIZE, B.shape[2] // KERNEL_STATE_SIZE


def _operands(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor | None) -> tuple:
    return x, x.stride(1), dt, dt.stride(1), A, B, B.stride(1), C, C.stride(1), D, seq_idx


def _call(function, *arguments) -> None:  # noqa: ANN001
    """Calls a C function: tensors are passed as data pointers, None as a null pointer, integers as int64."""
    function.restype = None
    function(
        *(
            ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        )
    )
