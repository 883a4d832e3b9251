"""The Mamba-1 scan on a GPU, forward and backward: parallel over sequences, channels and spans of SPAN tokens.

The recurrence is linear, so what a span does to the state is one decay and one addition, and both are found without
knowing the state in front of it. Forward:

    prepare            step sizes and the convolution, element by element
    span_states        each span's final state from a zero start, and the sum of its step sizes
    carry              from span to span, the state before each; the final state
    write_outputs      each span again, from its state: y

Backward, where the gradient of the state takes the state's part and time runs in reverse:

    prepare            again: cheaper than keeping its results
    span_gradients     the gradient of each span's initial state from the span's own outputs
    carry              from span to span, the gradient of each one's final state; that of ssm_state
    read_gradients     forwards through each span, with the states: z, C, D, A
    write_gradients    backwards through each span, with the states' gradients: B, dt, the convolution's output
    shared_gradients   back through the convolution, and sums over the groups that read the same x and B

No sweep holds a state and its gradient at once, so no history of states is kept. Two gradients would need both:

    A   The derivative of h_t by A is carried along with h_t instead, one more state of the same shape.
    dt  The gradient of step_t A is g_t = dh_t * decay_t h_{t-1}, element by element. Since
            h_t = decay_t h_{t-1} + added_t            and so  dh_t * h_t = g_t + dh_t * added_t,
            dh_t = dread_t C_t + decay_{t+1} dh_{t+1}  and so  dh_t * h_t = g_{t+1} + dread_t C_t * h_t,
        g_t = g_{t+1} + dread_t C_t * h_t - dh_t * added_t: a term from either sweep.

where read_t = <C_t, h_t>, added_t = step_t u_t B_t and dv is the gradient of v, here as in the code.

In the loops over time a program owns a tile of BLOCK channels by N states. Nothing is added up atomically: partial
sums of programs are written out and summed in a fixed order, so that the results are the same on every run.

Shape letters as in `reference`. A group of N channels shares C; REP = D / X such groups share x and B.
"""

import torch
import triton
from torch import Tensor

from m1.ops.inputs import ScanGradients, ScanInputs, ScanOutputs
from m1.ops.selective_scan import CHUNK
from m1.ops.triton.scan_backward import read_gradients, shared_gradients, span_gradients, write_gradients
from m1.ops.triton.scan_forward import carry, prepare, span_states, write_outputs

# Fixed, not autotuned. Forward and backward of 8 x 1024 tokens at D = 768 and of 8192 at D = 3072, in bfloat16, take
# 0.62 and 2.1 ms on an H200. Spans of 64 change that by +6 and -2 %, of 128 by +21 and +3 %; BLOCK 16 by +21 and +28 %,
# 64 by +35 and +33 %; two warps double it; the best other tiles of `prepare` and `shared_gradients` win 0.3 %.
SPAN = CHUNK["triton"]
BLOCK, OUTPUTS_BLOCK = 32, 16  # channels in a tile; of one warp, so that no reduction leaves it
CARRIED = 256  # elements of the state in a program of `carry`
PREPARED = (32, 128)  # tile of `prepare`, tokens by channels
SHARED = (32, 32)  # tile of `shared_gradients`


def forward(inputs: ScanInputs, outputs: ScanOutputs) -> None:
    """Fills y, the final state and, unless it is empty, saved [b, T / SPAN, D, N], the state before each span."""
    z, x, B, C, _, A, D, _, _, seq_idx, _, ssm_state = inputs
    (b, T, d), n = z.shape, A.shape[1]
    rep, spans, blocks = d // x.shape[2], triton.cdiv(T, SPAN), triton.cdiv(d, BLOCK)
    states = outputs.saved if outputs.saved.numel() else A.new_empty(b, spans, d, n)
    steps = A.new_empty(b, spans, d)
    step, conv = _prepared(inputs)
    span_states[blocks, spans, b](
        step, conv, B, A, seq_idx, states, steps, _strides(B), T, d, rep, n, SPAN, BLOCK, num_warps=1
    )
    last = outputs.ssm_state
    carry[triton.cdiv(d * n, CARRIED), b](states, steps, A, ssm_state, last, spans, d * n, n, False, CARRIED)
    write_outputs[triton.cdiv(d, OUTPUTS_BLOCK), spans, b](
        z, step, conv, B, C, A, D, seq_idx, states, outputs.y, _strides(z, B, C), T, d, rep, n, SPAN, OUTPUTS_BLOCK,
        num_warps=1,
    )  # fmt: skip


def backward(inputs: ScanInputs, saved: Tensor, dy: Tensor, dssm_state: Tensor, gradients: ScanGradients) -> None:
    """Fills the gradients."""
    z, x, B, C, dt, A, D, conv_weight, _, seq_idx, conv_state, _ = inputs
    (b, T, d), X, K, n = z.shape, x.shape[2], conv_weight.shape[1], A.shape[1]
    rep, spans, blocks = d // X, triton.cdiv(T, SPAN), triton.cdiv(d, BLOCK)
    dy, dssm_state = dy.contiguous(), dssm_state.contiguous()
    step, conv = _prepared(inputs)

    dstates, steps = torch.empty_like(saved), A.new_empty(b, spans, d)
    span_gradients[blocks, spans, b](
        z, step, C, A, seq_idx, dy, dstates, steps, _strides(z, C), T, d, n, SPAN, BLOCK, num_warps=1
    )
    carried = (dstates, steps, A, dssm_state, gradients.ssm_state)
    carry[triton.cdiv(d * n, CARRIED), b](*carried, spans, d * n, n, True, CARRIED)

    dA_parts, dD_parts = torch.empty_like(saved), A.new_empty(b, spans, d)
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


def _prepared(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Step sizes and the convolution's outputs, [b, T, D] float32."""
    x, dt, conv_weight = inputs.x, inputs.dt, inputs.conv_weight
    (b, T, d), X, K, n = dt.shape, x.shape[2], conv_weight.shape[1], inputs.A.shape[1]
    step, conv = conv_weight.new_empty(b, T, d), conv_weight.new_empty(b, T, d)
    prepare[triton.cdiv(d, PREPARED[1]), triton.cdiv(T, PREPARED[0]), b](
        x, dt, conv_weight, inputs.conv_bias, inputs.seq_idx, inputs.conv_state, step, conv, _strides(x, dt), T, d, X,
        d // X, n, K, *PREPARED,
    )  # fmt: skip
    return step, conv


def _strides(*activations: Tensor) -> tuple[tuple[int, int], ...]:
    """Of each its sequence and its token stride; its channels lie side by side."""
    return tuple((t.stride(0), t.stride(1)) for t in activations)
