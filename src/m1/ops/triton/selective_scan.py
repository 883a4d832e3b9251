"""The Mamba-1 scan on a GPU, forward and backward: parallel over sequences, channels and spans of SPAN tokens.

The recurrence is linear, so a span changes the state by one decay and one addition. Both can be computed without the
state before the span. Forward:

    prepare            step sizes and the convolution, elementwise
    span_states        each span's final state from a zero start, and the sum of its step sizes
    carry              from span to span: the state before each, and the final state
    write_outputs      scans each span again, from the state before it: y

`prefill_scan` runs the same on chunks of several prompts, and `keep_inputs` then updates their conv_state. Chunks of up
to SHORT tokens, which have one span, need a single kernel, `scan_short`. What a chunk needs depends on its length only,
so results are batch-invariant.

Backward, the same with gradients of states in place of states, and time reversed:

    prepare            again: cheaper than storing its results
    span_gradients     gradient of each span's initial state, from the span's own outputs
    carry              from span to span: gradient of each span's final state, and of ssm_state
    read_gradients     forwards through each span, with the states: gradients of z, C, D, A
    write_gradients    backwards through each span, with the states' gradients: of B, dt, the convolution's output
    shared_gradients   back through the convolution, and sums over the groups that read the same x and B

Here and in the code, read_t = <C_t, h_t>, added_t = step_t u_t B_t, and dv is the gradient of v.

No sweep has both h_t and dh_t, so the states of all tokens need not be stored. Two gradients seem to require both:

    A   `read_gradients` carries the derivative of h_t with respect to A beside h_t, as a second state.
    dt  The gradient of step_t A is g_t = dh_t * decay_t h_{t-1}, elementwise. Since
            h_t = decay_t h_{t-1} + added_t            and so  dh_t * h_t = g_t + dh_t * added_t,
            dh_t = dread_t C_t + decay_{t+1} dh_{t+1}  and so  dh_t * h_t = g_{t+1} + dread_t C_t * h_t,
        g_t = g_{t+1} + dread_t C_t * h_t - dh_t * added_t. Each sweep contributes one of the last two terms.

In the loops over time, a program owns a tile of BLOCK channels by N states. There are no atomic additions: programs
write partial sums, which are added in a fixed order. So results are the same on every run.

Shape letters as in `reference`. A group of N channels shares C, and REP = D / X such groups share x and B.
"""

import torch
import triton
from torch import Tensor

from m1.ops.inputs import PrefillInputs, ScanGradients, ScanInputs, ScanOutputs
from m1.ops.selective_scan import CHUNK
from m1.ops.triton.scan_backward import read_gradients, shared_gradients, span_gradients, write_gradients
from m1.ops.triton.scan_forward import carry, keep_inputs, prepare, scan_short, span_states, write_outputs

# Fixed, not autotuned. On an H200 in bfloat16, forward and backward take 0.62 ms for 8 x 1024 tokens at D = 768 and
# 2.1 ms for 8192 tokens at D = 3072. Spans of 64 change these times by +6 and -2 %, spans of 128 by +21 and +3 %. BLOCK
# 16 changes them by +21 and +28 %, BLOCK 64 by +35 and +33 %. Two warps double them. The best other tiles of `prepare`
# and `shared_gradients` save 0.3 %.
SPAN = CHUNK["triton"]
BLOCK, OUTPUTS_BLOCK = 32, 16  # channels per tile; a tile has one warp, so no reduction crosses warps
CARRIED = 64  # elements of the state per program of `carry`
PREPARED = (32, 128)  # tile of `prepare`, tokens by channels
SHARED = (32, 32)  # tile of `shared_gradients`
KEPT = 128  # channels per program of `keep_inputs`
SHORT, SHORT_BLOCK, TOKENS = 512, 16, 4  # of `scan_short`: tokens of a chunk, channels per tile, tokens read at once


def forward(inputs: ScanInputs, outputs: ScanOutputs) -> None:
    """Fills y and the final state, and saved [b, spans * D * N] with the state before each span unless it is empty."""
    b, T, _ = inputs.z.shape
    _scan(inputs, outputs.y, outputs.ssm_state, outputs.saved if outputs.saved.numel() else None, b, T)


def prefill_scan(inputs: PrefillInputs, y: Tensor) -> None:
    """Updates the slots' states and fills y."""
    conv_state, ssm_state, slots, cu_seqlens, max_length = inputs[9:]
    X, K = inputs.x.shape[1], inputs.conv_weight.shape[1]
    if not len(y):
        return
    activations, parameters, d = inputs[:5], inputs[5:9], y.shape[1]
    scan_short[triton.cdiv(d, SHORT_BLOCK), len(slots)](
        *activations, *parameters, conv_state, ssm_state, y, cu_seqlens, slots,
        tuple(t.stride(0) for t in activations), d, X, d // X, inputs.A.shape[1], K, SHORT, SHORT_BLOCK, TOKENS,
        num_warps=1,
    )  # fmt: skip
    if max_length > SHORT:
        row = ScanInputs._make([*(t[None] for t in activations), *parameters, None, conv_state, ssm_state])
        _scan(row, y, ssm_state, None, len(slots), max_length, cu_seqlens, slots, SHORT)
    keep_inputs[triton.cdiv(X, KEPT), len(slots)](
        inputs.x, conv_state, cu_seqlens, slots, inputs.x.stride(0), X, K, KEPT, num_warps=1
    )


def _scan(
    inputs: ScanInputs, y: Tensor, last: Tensor, saved: Tensor | None, b: int, T: int,
    cu_seqlens: Tensor | None = None, slots: Tensor | None = None, short: int = 0,
) -> None:  # fmt: skip
    """Scans b sequences of up to T tokens. Fills y, the final states `last`, and `saved`.

    Chunks of up to `short` tokens are left out.
    """
    z, x, B, C, _, A, D, _, _, seq_idx, _, ssm_state = inputs
    d, n = A.shape
    rep, spans, blocks = d // x.shape[2], triton.cdiv(T, SPAN), triton.cdiv(d, BLOCK)
    states = A.new_empty(b, spans, d, n) if saved is None else saved
    steps = A.new_empty(b, spans, d)
    step, conv = _prepared(inputs, b, T, cu_seqlens, slots, short)
    span_states[blocks, spans, b](
        step, conv, B, A, seq_idx, states, steps, cu_seqlens, _strides(B), T, d, rep, n, SPAN, BLOCK, short, num_warps=1
    )
    carry[triton.cdiv(d * n, CARRIED), b](
        states, steps, A, ssm_state, last, cu_seqlens, slots, spans, d * n, n, False, SPAN, CARRIED, _ahead(spans),
        short, num_warps=1,
    )  # fmt: skip
    write_outputs[triton.cdiv(d, OUTPUTS_BLOCK), spans, b](
        z, step, conv, B, C, A, D, seq_idx, states, y, cu_seqlens, slots, _strides(z, B, C), T, d, rep, n, SPAN,
        OUTPUTS_BLOCK, short, num_warps=1,
    )  # fmt: skip


def backward(inputs: ScanInputs, saved: Tensor, dy: Tensor, dssm_state: Tensor, gradients: ScanGradients) -> None:
    """Fills the gradients, given the states that the forward pass saved and the gradients of its two results."""
    z, x, B, C, dt, A, D, conv_weight, _, seq_idx, conv_state, _ = inputs
    (b, T, d), X, K, n = z.shape, x.shape[2], conv_weight.shape[1], A.shape[1]
    rep, spans, blocks = d // X, triton.cdiv(T, SPAN), triton.cdiv(d, BLOCK)
    dy, dssm_state = dy.contiguous(), dssm_state.contiguous()
    step, conv = _prepared(inputs, b, T)

    dstates, steps = torch.empty_like(saved), A.new_empty(b, spans, d)
    span_gradients[blocks, spans, b](
        z, step, C, A, seq_idx, dy, dstates, steps, _strides(z, C), T, d, n, SPAN, BLOCK, num_warps=1
    )
    carried = (dstates, steps, A, dssm_state, gradients.ssm_state, None, None)
    carry[triton.cdiv(d * n, CARRIED), b](*carried, spans, d * n, n, True, SPAN, CARRIED, _ahead(spans), num_warps=1)

    dA_parts, dD_parts = A.new_empty(b, spans, d, n), A.new_empty(b, spans, d)
    dlog, dlog_end = torch.empty_like(step), torch.empty_like(steps)
    read_gradients[blocks, spans, b](
        z, step, conv, B, C, A, D, seq_idx, saved, dy, dstates, gradients.z, gradients.C, dA_parts, dD_parts, dlog,
        dlog_end, _strides(z, B, C), T, d, rep, n, SPAN, BLOCK, num_warps=1,
    )  # fmt: skip
    dB_parts, dconv = torch.empty_like(step), torch.empty_like(conv)
    write_gradients[blocks, spans, b](
        z, step, conv, B, C, dt, A, D, seq_idx, dy, dstates, dlog, dlog_end, dB_parts, gradients.dt, dconv,
        _strides(z, B, C, dt), T, d, rep, n, SPAN, BLOCK, num_warps=1,
    )  # fmt: skip

    tiles = triton.cdiv(T + K - 1, SHARED[0])
    dweight_parts, dbias_parts = A.new_empty(b, tiles, d, K), A.new_empty(b, tiles, d)
    shared_gradients[triton.cdiv(X, SHARED[1]), tiles, b](
        x, conv_weight, seq_idx, conv_state, dconv, dB_parts, gradients.x, gradients.B, gradients.conv_state,
        dweight_parts, dbias_parts, _strides(x), T, d, X, rep, n, K, *SHARED, num_warps=1,
    )  # fmt: skip
    for parts, gradient in zip((dA_parts, dD_parts, dweight_parts, dbias_parts), gradients[5:9], strict=True):
        torch.sum(parts, (0, 1), out=gradient)


def _prepared(
    inputs: ScanInputs, b: int, T: int, cu_seqlens: Tensor | None = None, slots: Tensor | None = None, short: int = 0
) -> tuple[Tensor, Tensor]:
    """Step sizes and the convolution's outputs of b sequences of up to T tokens, float32, in the layout of dt."""
    x, dt, conv_weight = inputs.x, inputs.dt, inputs.conv_weight
    (d, K), X, n = conv_weight.shape, x.shape[2], inputs.A.shape[1]
    step, conv = conv_weight.new_empty(dt.shape), conv_weight.new_empty(dt.shape)
    prepare[triton.cdiv(d, PREPARED[1]), triton.cdiv(T, PREPARED[0]), b](
        x, dt, conv_weight, inputs.conv_bias, inputs.seq_idx, inputs.conv_state, step, conv, cu_seqlens, slots,
        _strides(x, dt), T, d, X, d // X, n, K, *PREPARED, short,
    )  # fmt: skip
    return step, conv


def _ahead(spans: int) -> int:
    """How many spans `carry` loads at once. Places beyond the last cost time, too."""
    return 8 if spans <= 16 else 32


def _strides(*activations: Tensor) -> tuple[tuple[int, int], ...]:
    """Each activation's sequence and token strides. Its channels are contiguous."""
    return tuple((t.stride(0), t.stride(1)) for t in activations)
