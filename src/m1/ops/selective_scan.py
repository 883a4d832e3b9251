"""Everything between the input and output projections of a Mamba-1 mixer, as one differentiable op."""

from typing import Any

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, kernels, schema_of
from m1.ops.inputs import ScanGradients, ScanInputs, ScanOutputs
from m1.ops.shapes import KERNEL_FLOATS, Rule, Shapes, declared

GROUPS: dict[str, Rule] = {
    "X must be a multiple of N that divides D": lambda X, N, D: N > 0 and X > 0 and X % N == D % X == 0
}
CHECK = Shapes("selective_scan", **declared(ScanInputs), where=GROUPS | {"K must be at least 1": lambda K: K > 0})
ALIGNED = {"cpu": 1, "triton": 16}  # a token's channels begin at multiples; else Triton reads them one by one
CHUNK = {"cpu": 16, "triton": 32}  # tokens between the states that the forward pass saves for the backward pass


def selective_scan(
    z: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor,
    A: Tensor, D: Tensor, conv_weight: Tensor, conv_bias: Tensor, seq_idx: Tensor | None = None,
    conv_state: Tensor | None = None, ssm_state: Tensor | None = None, backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u = silu(conv(x)),  dt = softplus(dt),  h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,
    y_t = (<C_t, h_t> + D u_t) silu(z_t).

    Channels form groups of N. Group g reads group g of C, and group g // (D / X) of x and B. So groups of x and B are
    shared like key-value heads in grouped-query attention, x before its convolution. The specification is
    `reference.selective_scan`. `state_update` is the decode step: one token per sequence, with states updated in place.

    Args:
        z: [b, T, D] gate.
        x: [b, T, X] inputs, X a multiple of N that divides D.
        B: [b, T, X].
        C: [b, T, D].
        dt: [b, T, D] step sizes before softplus. -inf gives a step of 0 (below 1e-37 in the CPU kernel), for padding.
        A: [D, N], negative.
        D: [D] skip weights.
        conv_weight: [D, K]; the last tap multiplies the current token. Taps on another document count as zero.
        conv_bias: [D].
        seq_idx: [b, T] integers, the document of each token; the state is cleared where it changes.
        conv_state: [b, X, K-1], the inputs before the first token, oldest first. They belong to the first token's
            document. Zero when None.
        ssm_state: [b, D, N], the state before the first token; zero when None.
        backend: "cpu" and "triton" require N = 16 and K <= 4; "auto" falls back to "reference".

    Returns:
        y [b, T, D] in z's dtype and the final state [b, D, N] in float32. All arithmetic is in float32.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
    """
    inputs = ScanInputs(z, x, B, C, dt, A, D, conv_weight, conv_bias, seq_idx, conv_state, ssm_state)
    CHECK(*inputs)
    taps, states = conv_weight.shape[1], A.shape[1]
    limits = {"state size 16": states == 16, "at most 4 convolution taps": taps <= 4}
    backend = choose("selective_scan", backend, z, limits)
    if backend == "reference":
        return reference.selective_scan(inputs)
    inputs = _converted(inputs, kernel_dtype(z, x, B, C, dt), ALIGNED[backend])
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, state, _ = _forward(*inputs, backend, save)
    return y.to(z.dtype), state


def _converted(inputs: ScanInputs, dtype: torch.dtype, aligned: int) -> ScanInputs:
    """The inputs as kernels read them: contiguous, with dtypes and exceptions as in `m1.ops.inputs`.

    A slice of a projection's output isn't copied, unless its rows lie other than multiples of `aligned` apart.
    """
    seq_idx, conv_state, ssm_state = inputs[9:]
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    conv_state = None if conv_state is None else conv_state.to(dtype).contiguous()
    ssm_state = None if ssm_state is None else ssm_state.float().contiguous()
    activations = [channels_last(t.to(dtype)) for t in inputs[:5]]
    activations = [t if t.stride(1) % aligned == 0 else t.contiguous() for t in activations]
    parameters = [t.float().contiguous() for t in inputs[5:9]]
    return ScanInputs._make([*activations, *parameters, seq_idx, conv_state, ssm_state])


def channels_last(t: Tensor) -> Tensor:
    """t with contiguous channels. A slice of a projection's output already has them and isn't copied."""
    return t if t.stride(-1) == 1 else t.contiguous()


def kernel_dtype(*activations: Tensor) -> torch.dtype:
    """The dtype in which a kernel reads the activations: their common one if kernels know it, else float32."""
    dtypes = {t.dtype for t in activations}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {*KERNEL_FLOATS} else torch.float32


# The schemas of the kernels as PyTorch operators.
_FORWARD = f"({schema_of(ScanInputs)}, str backend, bool save) -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"({schema_of(ScanInputs)}, Tensor saved, Tensor dy, Tensor dssm_state, str backend) -> Tensor[]"


@torch.library.custom_op("m1::selective_scan", mutates_args=(), schema=_FORWARD)
def _forward(*arguments: Any) -> ScanOutputs:
    """Runs the forward pass. `saved` is empty unless `save` is set."""
    outputs = _forward_outputs(*arguments)
    *inputs, backend, _ = arguments
    kernels(backend, "selective_scan").forward(ScanInputs(*inputs), outputs)
    return outputs


@_forward.register_fake
def _forward_outputs(*arguments: Any) -> ScanOutputs:
    *tensors, backend, save = arguments
    inputs = ScanInputs(*tensors)
    z, A = inputs.z, inputs.A
    b, T, _ = z.shape
    chunks = -(-T // CHUNK[backend]) if save else 0
    return ScanOutputs(z.new_empty(z.shape), A.new_empty(b, *A.shape), A.new_empty(b, chunks * A.numel()))


@torch.library.custom_op("m1::selective_scan_backward", mutates_args=(), schema=_BACKWARD)
def _backward(*arguments: Any) -> list[Tensor]:
    """The fields of ScanGradients, from the saved states and the gradients of y and of the final state."""
    gradients = _backward_outputs(*arguments)
    *inputs, saved, dy, dssm_state, backend = arguments
    kernels(backend, "selective_scan").backward(ScanInputs(*inputs), saved, dy, dssm_state, ScanGradients(*gradients))
    return gradients


@_backward.register_fake
def _backward_outputs(*arguments: Any) -> list[Tensor]:
    z, x, *_, A, _, conv_weight, _ = arguments[:9]
    conv_state = x.new_empty(x.shape[0], x.shape[2], conv_weight.shape[1] - 1)
    return [*(t.new_empty(t.shape) for t in arguments[:9]), conv_state, A.new_empty(z.shape[0], *A.shape)]


def _setup_context(ctx: Any, inputs: tuple, output: ScanOutputs) -> None:
    *tensors, ctx.backend, _ = inputs
    scan = ScanInputs(*tensors)
    ctx.has_ssm_state = scan.ssm_state is not None  # the backward pass reads it from `saved`
    ctx.save_for_backward(*scan._replace(ssm_state=None), output[2])


def _autograd(ctx: Any, dy: Tensor, dssm_state: Tensor, _: Tensor) -> tuple:
    *tensors, saved = ctx.saved_tensors
    inputs = ScanInputs(*tensors)
    *gradients, dconv_state, dinitial = _backward(*inputs, saved, dy, dssm_state, ctx.backend)
    of_states = (None if inputs.conv_state is None else dconv_state, dinitial if ctx.has_ssm_state else None)
    return (*gradients, None, *of_states, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
