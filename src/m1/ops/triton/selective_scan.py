"""The Mamba-1 scan on a GPU, forward and backward: parallel over sequences, channels and spans of SPAN tokens.

The recurrence is linear, so what a span does to the state is one decay and one addition, and both are found without
knowing the state in front of it. Forward:

    _prepare            step sizes and the convolution, element by element
    _span_states        each span's final state from a zero start, and the sum of its step sizes
    _carry              from span to span, the state in front of each; the final state
    _outputs            each span again, from its state: y

Backward, where the gradient of the state takes the state's part and time runs in reverse:

    _prepare            again: cheaper than keeping its results
    _span_gradients     the gradient of each span's initial state from the span's own outputs
    _carry              from span to span, the gradient of each one's final state; the gradient of h0
    _read_gradients     forwards through each span, with the states: z, C, D, A
    _write_gradients    backwards through each span, with the states' gradients: B, dt, the convolution's output
    _shared_gradients   back through the convolution, and sums over the groups that read the same x and B

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

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.ops.selective_scan import CHUNK
from m1.ops.triton import LOG2_E, sigmoid, silu, silu_gradient, softplus

SPAN = CHUNK["triton"]
BLOCK, OUTPUTS_BLOCK = 32, 16  # channels in a tile; of one warp, so that no reduction leaves it
CARRIED = 256  # elements of the state in a program of _carry
AHEAD = tl.constexpr(8)  # spans whose loads _carry starts at once, as its loop is all latency
PREPARED = (32, 128)  # tile of _prepare, tokens by channels
SHARED = (32, 32)  # tile of _shared_gradients


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
    """Fills y, h_last and, unless it is empty, saved [b, T / SPAN, D, N], the state in front of each span."""
    b, T, d = z.shape
    n, rep = A.shape[1], d // x.shape[2]
    spans, blocks = triton.cdiv(T, SPAN), triton.cdiv(d, BLOCK)
    states = saved if saved.numel() else A.new_empty(b, spans, d, n)
    steps = A.new_empty(b, spans, d)
    step, conv = _prepared(x, dt, n, conv_weight, conv_bias, seq_idx, window)
    _span_states[blocks, spans, b](
        step, conv, B, A, seq_idx, states, steps, _strides(B), T, d, rep, n, SPAN, BLOCK, num_warps=1
    )
    _carry[triton.cdiv(d * n, CARRIED), b](states, steps, A, h0, h_last, spans, d * n, n, False, CARRIED)
    _outputs[triton.cdiv(d, OUTPUTS_BLOCK), spans, b](
        z, step, conv, B, C, A, D, seq_idx, states, y, _strides(z, B, C), T, d, rep, n, SPAN, OUTPUTS_BLOCK, num_warps=1
    )


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
    """Fills the gradients."""
    b, T, d = z.shape
    X, K, n = x.shape[2], conv_weight.shape[1], A.shape[1]
    rep, spans, blocks = d // X, triton.cdiv(T, SPAN), triton.cdiv(d, BLOCK)
    dy, dh_last = dy.contiguous(), dh_last.contiguous()
    step, conv = _prepared(x, dt, n, conv_weight, conv_bias, seq_idx, window)

    dstates, steps = torch.empty_like(saved), A.new_empty(b, spans, d)
    _span_gradients[blocks, spans, b](
        z, step, C, A, seq_idx, dy, dstates, steps, _strides(z, C), T, d, n, SPAN, BLOCK, num_warps=1
    )
    _carry[triton.cdiv(d * n, CARRIED), b](dstates, steps, A, dh_last, dh0, spans, d * n, n, True, CARRIED)

    dA_parts, dD_parts = torch.empty_like(saved), A.new_empty(b, spans, d)
    dlog, dlog_end = torch.empty_like(step), torch.empty_like(steps)
    _read_gradients[blocks, spans, b](
        z, step, conv, B, C, A, D, seq_idx, saved, dy, dstates, dz, dC, dA_parts, dD_parts, dlog, dlog_end,
        _strides(z, B, C), T, d, rep, n, SPAN, BLOCK, num_warps=1,
    )  # fmt: skip
    dB_parts, dconv = torch.empty_like(step), torch.empty_like(conv)
    _write_gradients[blocks, spans, b](
        z, step, conv, B, C, dt, A, D, seq_idx, dy, dstates, dlog, dlog_end, dB_parts, ddt, dconv,
        _strides(z, B, C, dt), T, d, rep, n, SPAN, BLOCK, num_warps=1,
    )  # fmt: skip

    tiles = triton.cdiv(T + K - 1, SHARED[0])
    dweight_parts, dbias_parts = A.new_empty(b, tiles, d, K), A.new_empty(b, tiles, d)
    _shared_gradients[triton.cdiv(X, SHARED[1]), tiles, b](
        x, conv_weight, seq_idx, window, dconv, dB_parts, dx, dB, dwindow, dweight_parts, dbias_parts,
        _strides(x), T, d, X, rep, n, K, *SHARED, num_warps=1,
    )  # fmt: skip
    sums = ((dA_parts, dA), (dD_parts, dD), (dweight_parts, dconv_weight), (dbias_parts, dconv_bias))
    for parts, gradient in sums:
        torch.sum(parts, (0, 1), out=gradient)


def _prepared(
    x: Tensor, dt: Tensor, n: int, conv_weight: Tensor, conv_bias: Tensor, seq_idx: Tensor | None, window: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step sizes and the convolution's outputs, [b, T, D] float32."""
    b, T, d = dt.shape
    X, K = x.shape[2], conv_weight.shape[1]
    step, conv = conv_weight.new_empty(b, T, d), conv_weight.new_empty(b, T, d)
    _prepare[triton.cdiv(d, PREPARED[1]), triton.cdiv(T, PREPARED[0]), b](
        x, dt, conv_weight, conv_bias, seq_idx, window, step, conv, _strides(x, dt), T, d, X, d // X, n, K, *PREPARED
    )
    return step, conv


def _strides(*activations: Tensor) -> tuple[tuple[int, int], ...]:
    """Of each its sequence and its token stride; its channels lie side by side."""
    return tuple((t.stride(0), t.stride(1)) for t in activations)


@triton.jit
def _prepare(
    x, dt, conv_weight, conv_bias, seq_idx, window, step, conv, strides, T, channels, X,
    REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(2).to(tl.int64)
    inside = d < channels
    here = (t < T)[:, None] & inside[None, :]
    kv = d // (N * REP) * N + d % N
    total = tl.zeros([TOKENS, WIDTH], tl.float32) + tl.load(conv_bias + d, mask=inside, other=0.0)[None, :]
    for k in tl.static_range(K):
        at = t - k
        counts = t < T
        if seq_idx is not None:
            own = tl.load(seq_idx + row * T + t, mask=counts, other=0)
            counts &= own == tl.load(seq_idx + row * T + tl.maximum(at, 0), mask=counts, other=0)
        in_row, in_window = counts & (at >= 0), counts & (at < 0)
        past = x + row * strides[0][0] + at[:, None] * strides[0][1] + kv[None, :]
        value = tl.load(past, mask=in_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if window is not None:
            past = window + (row * (K - 1) + K - 1 + at)[:, None] * X + kv[None, :]
            value += tl.load(past, mask=in_window[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += value * tl.load(conv_weight + d * K + (K - 1 - k), mask=inside, other=0.0)[None, :]
    at = (row * T + t)[:, None] * channels + d[None, :]
    tl.store(conv + at, total, mask=here)
    raw = tl.load(dt + row * strides[1][0] + t[:, None] * strides[1][1] + d[None, :], mask=here, other=0.0)
    tl.store(step + at, softplus(raw.to(tl.float32)), mask=here)


@triton.jit
def _continues(seq_idx, t):
    """Whether token t belongs to the document of the token in front of it."""
    if seq_idx is None:
        return True
    else:
        return tl.load(seq_idx + t) == tl.load(seq_idx + tl.maximum(t - 1, 0))


@triton.jit
def _decay(step, A_log2, continues):
    """What a token leaves of the state in front of it [BLOCK, N]."""
    return tl.where(continues, tl.exp2(step[:, None] * A_log2), 0.0)


@triton.jit
def _span_states(
    step, conv, B, A, seq_idx, states, steps, strides, T, channels,
    REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states: the final state of each span that starts from zero. steps: the sum of its step sizes, infinite when a
    document starts in it, for then nothing of the state in front of it is left."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    span, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = d < channels
    tile, in_tile = d[:, None] * N + n[None, :], inside[:, None]
    of_B = (d // (N * REP) * N)[:, None] + n[None, :]
    B += row * strides[0][0]
    seq_idx = None if seq_idx is None else seq_idx + row * T
    A_log2 = tl.load(A + tile, mask=in_tile, other=0.0) * LOG2_E
    h = tl.zeros([BLOCK, N], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = span.to(tl.int64) * SPAN
    for t in range(first, tl.minimum(first + SPAN, T)):
        at = (row * T + t) * channels + d
        step_t = tl.load(step + at, mask=inside, other=0.0)
        u = silu(tl.load(conv + at, mask=inside, other=0.0))
        B_t = tl.load(B + t * strides[0][1] + of_B, mask=in_tile, other=0.0).to(tl.float32)
        continues = _continues(seq_idx, t)
        h = _decay(step_t, A_log2, continues) * h + (step_t * u)[:, None] * B_t
        total += tl.where(continues, step_t, float("inf"))
    span_at = row * tl.num_programs(1) + span
    tl.store(states + span_at * channels * N + tile, h, mask=in_tile)
    tl.store(steps + span_at * channels + d, total, mask=inside)


@triton.jit
def _carry(states, steps, A, start, end, spans, size, N: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """states: what each span adds -> what is in front of it, in the order of time or against it.

    start: what is in front of the first span, zero when None. end: what the last leaves.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = at < size
    A_log2 = tl.load(A + at, mask=inside, other=0.0) * LOG2_E
    carried = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        carried += tl.load(start + row * size + at, mask=inside, other=0.0)
    for done in range(0, spans, AHEAD):
        added: list = []
        total: list = []
        for i in tl.static_range(AHEAD):
            span = row * spans + (spans - 1 - done - i if REVERSE else done + i)
            exists = at < tl.where(done + i < spans, size, 0)
            added += (tl.load(states + span * size + at, mask=exists, other=0.0),)
            total += (tl.load(steps + span * (size // N) + at // N, mask=exists, other=0.0),)
        for i in tl.static_range(AHEAD):
            span = row * spans + (spans - 1 - done - i if REVERSE else done + i)
            tl.store(states + span * size + at, carried, mask=at < tl.where(done + i < spans, size, 0))
            decay = tl.where(total[i] < float("inf"), tl.exp2(total[i] * A_log2), 0.0)
            carried = decay * carried + added[i]
    tl.store(end + row * size + at, carried, mask=inside)


@triton.jit
def _outputs(
    z, step, conv, B, C, A, D, seq_idx, states, y, strides, T, channels,
    REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, from the states in front of the spans."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    span, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = d < channels
    tile, in_tile = d[:, None] * N + n[None, :], inside[:, None]
    of_B, of_C = (d // (N * REP) * N)[:, None] + n[None, :], (d // N * N)[:, None] + n[None, :]
    z += row * strides[0][0]
    B += row * strides[1][0]
    C += row * strides[2][0]
    seq_idx = None if seq_idx is None else seq_idx + row * T
    A_log2 = tl.load(A + tile, mask=in_tile, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=inside, other=0.0)
    h = tl.load(states + (row * tl.num_programs(1) + span) * channels * N + tile, mask=in_tile, other=0.0)
    first = span.to(tl.int64) * SPAN
    for t in range(first, tl.minimum(first + SPAN, T)):
        at = (row * T + t) * channels + d
        step_t = tl.load(step + at, mask=inside, other=0.0)
        u = silu(tl.load(conv + at, mask=inside, other=0.0))
        z_t = tl.load(z + t * strides[0][1] + d, mask=inside, other=0.0).to(tl.float32)
        B_t = tl.load(B + t * strides[1][1] + of_B, mask=in_tile, other=0.0).to(tl.float32)
        C_t = tl.load(C + t * strides[2][1] + of_C, mask=in_tile, other=0.0).to(tl.float32)
        h = _decay(step_t, A_log2, _continues(seq_idx, t)) * h + (step_t * u)[:, None] * B_t
        tl.store(y + at, (tl.sum(h * C_t, axis=1) + skip * u) * silu(z_t), mask=inside)


@triton.jit
def _span_gradients(
    z, step, C, A, seq_idx, dy, dstates, steps, strides, T, channels,
    N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dstates: the gradient of each span's initial state from its own outputs. steps as in `_span_states`."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    span, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = d < channels
    tile, in_tile = d[:, None] * N + n[None, :], inside[:, None]
    of_C = (d // N * N)[:, None] + n[None, :]
    z += row * strides[0][0]
    C += row * strides[1][0]
    seq_idx = None if seq_idx is None else seq_idx + row * T
    A_log2 = tl.load(A + tile, mask=in_tile, other=0.0) * LOG2_E
    dh = tl.zeros([BLOCK, N], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = span.to(tl.int64) * SPAN
    end = tl.minimum(first + SPAN, T)
    for back in range(1, end - first + 1):
        t = end - back
        at = (row * T + t) * channels + d
        step_t = tl.load(step + at, mask=inside, other=0.0)
        dy_t = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        z_t = tl.load(z + t * strides[0][1] + d, mask=inside, other=0.0).to(tl.float32)
        C_t = tl.load(C + t * strides[1][1] + of_C, mask=in_tile, other=0.0).to(tl.float32)
        continues = _continues(seq_idx, t)
        dh = _decay(step_t, A_log2, continues) * (dh + (dy_t * silu(z_t))[:, None] * C_t)
        total += tl.where(continues, step_t, float("inf"))
    span_at = row * tl.num_programs(1) + span
    tl.store(dstates + span_at * channels * N + tile, dh, mask=in_tile)
    tl.store(steps + span_at * channels + d, total, mask=inside)


@triton.jit
def _interleaved(N: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] the channels 0 ... BLOCK-1 in such an order that those N places apart are of one group.

    They fall to the same thread, which then does part of `_group_sums` alone.
    """
    place = tl.arange(0, BLOCK)
    part: tl.constexpr = N * N // BLOCK
    return place % N // part * N + place // N * part + place % part


@triton.jit
def _group_sums(tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK interleaved channels, N] summed over each group's channels: the groups' vectors in a row [BLOCK]."""
    parts = tl.reshape(tile, [BLOCK // N, BLOCK // N, N * N // BLOCK, N])
    return tl.reshape(tl.sum(tl.sum(parts, axis=0), axis=1), [BLOCK])


@triton.jit
def _read_gradients(
    z, step, conv, B, C, A, D, seq_idx, states, dy, dstates, dz, dC, dA_parts, dD_parts, dlog, dlog_end,
    strides, T, channels, REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlog: the sum over n of A_log2 dread_t C_t * h_t, from g_t. dlog_end: that of A_log2 dh * h behind each span."""
    block = tl.program_id(0) * BLOCK
    vectors, d = block + tl.arange(0, BLOCK), block + _interleaved(N, BLOCK)
    n = tl.arange(0, N)
    span, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = d < channels
    tile, in_tile = d[:, None] * N + n[None, :], inside[:, None]
    of_B, of_C = (d // (N * REP) * N)[:, None] + n[None, :], (d // N * N)[:, None] + n[None, :]
    z += row * strides[0][0]
    B += row * strides[1][0]
    C += row * strides[2][0]
    seq_idx = None if seq_idx is None else seq_idx + row * T
    A_log2 = tl.load(A + tile, mask=in_tile, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=inside, other=0.0)
    span_at = row * tl.num_programs(1) + span
    h = tl.load(states + span_at * channels * N + tile, mask=in_tile, other=0.0)
    dh_dA = tl.zeros([BLOCK, N], tl.float32)
    dA = tl.zeros([BLOCK, N], tl.float32)
    dD = tl.zeros([BLOCK], tl.float32)
    first = span.to(tl.int64) * SPAN
    for t in range(first, tl.minimum(first + SPAN, T)):
        token = (row * T + t) * channels
        step_t = tl.load(step + token + d, mask=inside, other=0.0)
        u = silu(tl.load(conv + token + d, mask=inside, other=0.0))
        dy_t = tl.load(dy + token + d, mask=inside, other=0.0).to(tl.float32)
        z_t = tl.load(z + t * strides[0][1] + d, mask=inside, other=0.0).to(tl.float32)
        B_t = tl.load(B + t * strides[1][1] + of_B, mask=in_tile, other=0.0).to(tl.float32)
        C_t = tl.load(C + t * strides[2][1] + of_C, mask=in_tile, other=0.0).to(tl.float32)
        decay = _decay(step_t, A_log2, _continues(seq_idx, t))
        dh_dA = decay * (dh_dA + step_t[:, None] * h)
        h = decay * h + (step_t * u)[:, None] * B_t
        dread = dy_t * silu(z_t)
        tl.store(dz + token + d, dy_t * (tl.sum(h * C_t, axis=1) + skip * u) * silu_gradient(z_t), mask=inside)
        tl.store(dC + token + vectors, _group_sums(dread[:, None] * h, N, BLOCK), mask=vectors < channels)
        tl.store(dlog + token + d, dread * tl.sum(h * C_t * A_log2, axis=1), mask=inside)
        dA += dread[:, None] * C_t * dh_dA
        dD += dread * u
    dh = tl.load(dstates + span_at * channels * N + tile, mask=in_tile, other=0.0)
    tl.store(dA_parts + span_at * channels * N + tile, dA + dh * dh_dA, mask=in_tile)
    tl.store(dD_parts + span_at * channels + d, dD, mask=inside)
    tl.store(dlog_end + span_at * channels + d, tl.sum(dh * h * A_log2, axis=1), mask=inside)


@triton.jit
def _write_gradients(
    z, step, conv, B, C, dt, A, D, seq_idx, dy, dstates, dlog, dlog_end, dB_parts, ddt, dconv,
    strides, T, channels, REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlog and dlog_end as `_read_gradients` leaves them. dB_parts: the gradient of B before the sum over copies."""
    block = tl.program_id(0) * BLOCK
    vectors, d = block + tl.arange(0, BLOCK), block + _interleaved(N, BLOCK)
    n = tl.arange(0, N)
    span, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = d < channels
    tile, in_tile = d[:, None] * N + n[None, :], inside[:, None]
    of_B, of_C = (d // (N * REP) * N)[:, None] + n[None, :], (d // N * N)[:, None] + n[None, :]
    z += row * strides[0][0]
    B += row * strides[1][0]
    C += row * strides[2][0]
    dt += row * strides[3][0]
    seq_idx = None if seq_idx is None else seq_idx + row * T
    A_log2 = tl.load(A + tile, mask=in_tile, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=inside, other=0.0)
    span_at = row * tl.num_programs(1) + span
    dh = tl.load(dstates + span_at * channels * N + tile, mask=in_tile, other=0.0)
    dlog_t = tl.load(dlog_end + span_at * channels + d, mask=inside, other=0.0)
    first = span.to(tl.int64) * SPAN
    end = tl.minimum(first + SPAN, T)
    for back in range(1, end - first + 1):
        t = end - back
        token = (row * T + t) * channels
        step_t = tl.load(step + token + d, mask=inside, other=0.0)
        conv_t = tl.load(conv + token + d, mask=inside, other=0.0)
        dy_t = tl.load(dy + token + d, mask=inside, other=0.0).to(tl.float32)
        z_t = tl.load(z + t * strides[0][1] + d, mask=inside, other=0.0).to(tl.float32)
        dt_t = tl.load(dt + t * strides[3][1] + d, mask=inside, other=0.0).to(tl.float32)
        B_t = tl.load(B + t * strides[1][1] + of_B, mask=in_tile, other=0.0).to(tl.float32)
        C_t = tl.load(C + t * strides[2][1] + of_C, mask=in_tile, other=0.0).to(tl.float32)
        continues = _continues(seq_idx, t)
        u = silu(conv_t)
        dread = dy_t * silu(z_t)
        dh += dread[:, None] * C_t
        tl.store(dB_parts + token + vectors, _group_sums((step_t * u)[:, None] * dh, N, BLOCK), mask=vectors < channels)
        dwritten = tl.sum(dh * B_t, axis=1)  # the gradient of step_t u
        du = step_t * dwritten + skip * dread
        tl.store(dconv + token + d, du * silu_gradient(conv_t), mask=inside)
        dlog_t += tl.load(dlog + token + d, mask=inside, other=0.0) - step_t * u * tl.sum(dh * B_t * A_log2, axis=1)
        dlog_t = tl.where(continues, dlog_t, 0.0)
        tl.store(ddt + token + d, (dlog_t / LOG2_E + u * dwritten) * sigmoid(dt_t), mask=inside)
        dh *= _decay(step_t, A_log2, continues)


@triton.jit
def _shared_gradients(
    x, conv_weight, seq_idx, window, dconv, dB_parts, dx, dB, dwindow, dweight_parts, dbias_parts,
    strides, T, channels, X, REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of inputs, the window's among them, and goes through all that they flow into."""
    kv = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tile, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tile.to(tl.int64) * TOKENS - (K - 1) + tl.arange(0, TOKENS)
    inside = kv < X
    in_row, in_window = ((t >= 0) & (t < T))[:, None] & inside[None, :], (t < 0)[:, None] & inside[None, :]
    inputs = x + row * strides[0][0] + t[:, None] * strides[0][1] + kv[None, :]
    inputs = tl.load(inputs, mask=in_row, other=0.0).to(tl.float32)
    window_at = (row * (K - 1) + K - 1 + t)[:, None] * X + kv[None, :]
    if window is not None:
        inputs += tl.load(window + window_at, mask=in_window, other=0.0).to(tl.float32)
    dinputs = tl.zeros([TOKENS, WIDTH], tl.float32)
    dB_t = tl.zeros([TOKENS, WIDTH], tl.float32)
    part = row * tl.num_programs(1) + tile
    for copy in range(REP):
        d = (kv // N * REP + copy) * N + kv % N
        for k in tl.static_range(K):
            reader = t + k
            reads = (reader >= 0) & (reader < T)
            if seq_idx is not None:
                own = tl.load(seq_idx + row * T + tl.maximum(t, 0), mask=reads, other=0)
                reads &= own == tl.load(seq_idx + row * T + reader, mask=reads, other=0)
            at = (row * T + reader)[:, None] * channels + d[None, :]
            gradient = tl.load(dconv + at, mask=reads[:, None] & inside[None, :], other=0.0)
            tap = d * K + (K - 1 - k)
            dinputs += gradient * tl.load(conv_weight + tap, mask=inside, other=0.0)[None, :]
            tl.store(dweight_parts + part * channels * K + tap, tl.sum(gradient * inputs, axis=0), mask=inside)
            if k == 0:
                tl.store(dbias_parts + part * channels + d, tl.sum(gradient, axis=0), mask=inside)
                dB_t += tl.load(dB_parts + at, mask=in_row, other=0.0)
    at = (row * T + t)[:, None] * X + kv[None, :]
    tl.store(dx + at, dinputs, mask=in_row)
    tl.store(dB + at, dB_t, mask=in_row)
    tl.store(dwindow + window_at, dinputs, mask=in_window)
