"""The inside of a Mamba-1 mixer, from the input projection's output to the output projection's input, as one op."""

from typing import Any

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, kernels, require_shapes

CHUNK = {"cpu": 16, "triton": 32}  # tokens between the states that the forward pass saves for the backward pass


def selective_scan(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    seq_idx: Tensor | None = None,
    window: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """u = silu(conv(x)),  dt = softplus(dt),  h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,
    y_t = (<C_t, h_t> + D u_t) silu(z_t).

    Channels form groups of N. Group g reads C's group g, and group g // (D / X) of x and B: they are repeated as
    grouped-query attention repeats key-value heads, x before its convolution. The specification is
    `reference.selective_scan`; `state_update` is the same for one token of many sequences, in place.

    Args:
        z: [b, T, D] gate.
        x: [b, T, X] inputs, X a multiple of N that divides D.
        B: [b, T, X].
        C: [b, T, D].
        dt: [b, T, D] step sizes before softplus. -inf, a step of size 0, leaves the state as it is (padding).
        A: [D, N], negative.
        D: [D] skip weights.
        conv_weight: [D, K]; the last tap multiplies the current token. Taps never reach into another document.
        conv_bias: [D].
        seq_idx: [b, T] integers, the document of each token; the state is cleared where it changes.
        window: [b, K-1, X], the inputs in front of the first token (which then belong to its document).
        initial_state: [b, D, N] state in front of the first token, zero when None.
        backend: "cpu" and "triton" take N = 16 and K <= 4; "auto" picks what fits.

    Returns:
        y [b, T, D] in z's dtype and the final state [b, D, N] in float32. All arithmetic is in float32.

    Raises:
        ValueError: shapes that don't fit, or a backend that can't run this.
    """
    b, T, X = x.shape
    d, n = A.shape
    K = conv_weight.shape[1]
    if d % n or X % n or d % X:
        raise ValueError(f"selective_scan: D={d} and X={X} must be multiples of the state size {n}, and X divide D")
    fits = [z.shape == C.shape == dt.shape == (b, T, d), B.shape == x.shape, D.shape == conv_bias.shape == (d,)]
    fits += [conv_weight.shape[0] == d, seq_idx is None or seq_idx.shape == (b, T)]
    fits += [window is None or window.shape == (b, K - 1, X)]
    fits += [initial_state is None or initial_state.shape == (b, d, n)]
    named = dict(z=z, x=x, B=B, C=C, dt=dt, A=A, D=D, conv_weight=conv_weight, conv_bias=conv_bias)
    states = dict(seq_idx=seq_idx, window=window, initial_state=initial_state)
    require_shapes("selective_scan", fits, named | states)
    backend = choose("selective_scan", backend, z, {"state size 16": n == 16, "at most 4 convolution taps": K <= 4})
    if backend == "reference":
        return reference.selective_scan(z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, window, initial_state)
    dtype = kernel_dtype(backend, z, x, B, C, dt)
    activations = [t.to(dtype) for t in (z, x, B, C, dt)]
    parameters = [t.float() for t in (A, D, conv_weight, conv_bias)]
    documents = None if seq_idx is None else seq_idx.to(torch.int32)
    window = None if window is None else window.to(dtype)
    h0 = None if initial_state is None else initial_state.float()
    differentiable = (*activations, *parameters, window, h0)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    y, state, _ = _forward(*activations, *parameters, documents, window, h0, backend, save)
    return y.to(z.dtype), state


def kernel_dtype(backend: Backend, *activations: Tensor) -> torch.dtype:
    """The one dtype in which a kernel reads these: what they have in common, if the kernel knows it, else float32."""
    dtypes = {t.dtype for t in activations}
    known = {torch.float32, torch.bfloat16} | ({torch.float16} if backend == "triton" else set())
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= known else torch.float32


# The kernels as PyTorch operators. Activations share one dtype, parameters and states are float32.


@torch.library.custom_op("m1::selective_scan", mutates_args=())
def _forward(
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
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states the backward pass starts from (empty unless `save`), laid out as the
    backend likes."""
    inputs = (z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, window, h0)
    outputs = _forward_outputs(*inputs, backend, save)
    kernels(backend, "selective_scan").forward(*inputs, *outputs)
    return outputs


@_forward.register_fake
def _forward_outputs(
    z: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, backend, save = rest
    b, T, d = z.shape
    chunks = -(-T // CHUNK[backend]) if save else 0
    return z.new_empty(b, T, d), A.new_empty(b, *A.shape), A.new_empty(b, chunks, *A.shape)


@torch.library.custom_op("m1::selective_scan_backward", mutates_args=())
def _backward(
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
    backend: str,
) -> list[Tensor]:
    """Gradients of z, x, B, C, dt, A, D, conv_weight, conv_bias, window and h0."""
    inputs = (z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, window, saved, dy, dh_last)
    gradients = _backward_outputs(*inputs, backend)
    kernels(backend, "selective_scan").backward(*inputs, *gradients)
    return gradients


@_backward.register_fake
def _backward_outputs(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    *rest: Any,
) -> list[Tensor]:
    inputs = (z, x, B, C, dt, A, D, conv_weight, conv_bias)
    window = x.new_empty(x.shape[0], conv_weight.shape[1] - 1, x.shape[2])
    return [*(t.new_empty(t.shape) for t in inputs), window, A.new_empty(z.shape[0], *A.shape)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, h0, backend, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.backend, ctx.has_h0 = backend, h0 is not None


def _autograd(ctx: Any, dy: Tensor, dh_last: Tensor, _: Tensor) -> tuple:
    *inputs, seq_idx, window, saved = ctx.saved_tensors
    *gradients, dwindow, dh0 = _backward(*inputs, seq_idx, window, saved, dy, dh_last, ctx.backend)
    return (
        *gradients,
        None,
        None if window is None else dwindow,
        dh0 if ctx.has_h0 else None,
        None,
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)
