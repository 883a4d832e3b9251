"""The selective scan: one public function, which runs the C++ kernel on the CPU and the reference elsewhere."""

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor

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
    fits = [x.shape == dt.shape == C.shape, B.shape[:-1] == x.shape[:-1], A.shape[0] == d, D.shape == (d,)]
    fits.append(seq_idx is None or seq_idx.shape == x.shape[:-1])
    fits.append(initial_state is None or initial_state.shape == (x.shape[0], d, n))
    if not all(fits):
        shapes = [None if t is None else tuple(t.shape) for t in (x, dt, A, B, C, D, seq_idx, initial_state)]
        raise ValueError(f"selective_scan: shapes of x, dt, A, B, C, D, seq_idx and initial_state don't fit: {shapes}")
    kernel_fits = x.device.type == "cpu" and n == KERNEL_STATE_SIZE and x.shape[1] > 0
    if backend == "reference" or not kernel_fits or not _kernels_available():
        if backend == "cpu":
            raise ValueError("selective_scan: backend 'cpu' needs CPU tensors, state size 16 and a C++ compiler")
        y, state = reference.selective_scan(x, dt, A, B, C, D, seq_idx, initial_state)
    else:
        tensors = [t.float() for t in (x, dt, A, B, C, D)]
        h0 = None if initial_state is None else initial_state.float()
        documents = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, h0))
        y, state, _ = _cpu_forward(*tensors, documents, h0, save)
    return y.to(x.dtype), state


@torch.compiler.assume_constant_result
def _kernels_available() -> bool:
    return load_cpu_kernels("selective_scan") is not None


# The C++ kernel as a PyTorch operator: float32 tensors; layouts are those of cpu/selective_scan.cpp.


@torch.library.custom_op("m1::selective_scan", mutates_args=(), device_types="cpu")
def _cpu_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    h0: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states the backward pass starts from (empty unless `save`)."""
    y, h_last, saved = _cpu_forward_outputs(x, dt, A, B, C, D, seq_idx, h0, save)
    x, dt, B, C = (_rows(t) for t in (x, dt, B, C))
    _call(
        "m1_selective_scan_forward",
        *_sizes(x, B),
        *_operands(x, dt, A.contiguous(), B, C, D.contiguous(), seq_idx),
        None if h0 is None else h0.contiguous(),
        y,
        h_last,
        saved if save else None,
    )
    return y, h_last, saved


@_cpu_forward.register_fake
def _cpu_forward_outputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Any, h0: Any, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b, T, d = x.shape
    chunks = -(-T // KERNEL_CHUNK) if save else 0
    saved = x.new_empty(b, chunks, d // KERNEL_STATE_SIZE, KERNEL_STATE_SIZE, KERNEL_STATE_SIZE)
    return x.new_empty(b, T, d), x.new_empty(b, d, KERNEL_STATE_SIZE), saved


@torch.library.custom_op("m1::selective_scan_backward", mutates_args=(), device_types="cpu")
def _cpu_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dh_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and h0; those of A and D a sequence, to be summed over it."""
    gradients = _cpu_backward_outputs(x, dt, A, B, C, D, seq_idx, saved, dy, dh_last)
    x, dt, B, C = (_rows(t) for t in (x, dt, B, C))
    operands = _operands(x, dt, A.contiguous(), B, C, D.contiguous(), seq_idx)
    contiguous = [t.contiguous() for t in (saved, dy, dh_last)]
    _call("m1_selective_scan_backward", *_sizes(x, B), *operands, *contiguous, *gradients)
    return gradients


@_cpu_backward.register_fake
def _cpu_backward_outputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Any, saved: Any, dy: Any, dh_last: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, T, d = x.shape
    dx, ddt, dC = (x.new_empty(b, T, d) for _ in range(3))
    dA, dh0 = (x.new_empty(b, d, KERNEL_STATE_SIZE) for _ in range(2))
    return dx, ddt, dA, x.new_empty(b, T, B.shape[-1]), dC, x.new_empty(b, d), dh0


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, h0, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_h0 = h0 is not None


def _backward(ctx: Any, dy: Tensor, dh_last: Tensor, _: Tensor) -> tuple:
    x, dt, A, B, C, D, seq_idx, saved = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dh0 = _cpu_backward(x, dt, A, B, C, D, seq_idx, saved, dy, dh_last)
    return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), None, dh0 if ctx.has_h0 else None, None


_cpu_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _rows(t: Tensor) -> Tensor:
    """t with contiguous channels and evenly spaced rows: slices of a projection's output pass without a copy."""
    return t if t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()


def _sizes(x: Tensor, B: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] // KERNEL_STATE_SIZE, B.shape[2] // KERNEL_STATE_SIZE


def _operands(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor | None) -> tuple:
    return x, x.stride(1), dt, dt.stride(1), A, B, B.stride(1), C, C.stride(1), D, seq_idx


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Calls a C function: tensors are passed as data pointers, None as a null pointer, integers as int64."""
    function = getattr(load_cpu_kernels("selective_scan"), name)
    function.restype = None
    function(
        *(
            ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        )
    )
