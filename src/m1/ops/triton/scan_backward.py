"""The backward kernels of `selective_scan`, in the order in which they run.

`read_gradients` and `write_gradients` are the two sweeps over each span. The first computes the states forwards in
time, the second the gradients of the states backwards. Both sum over the channels of each group, so they order their
channels to make that cheap.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl

from m1.ops.triton import LOG2_E, sigmoid, silu, silu_gradient
from m1.ops.triton.scan_forward import LENGTHS, continues, decay, load, span_of, tile_of, token_of


@triton.jit(do_not_specialize=LENGTHS)
def span_gradients(
    z, step, C, A, seq_idx, dy, dstates, steps, strides, T, channels,
    N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dstates, the gradient of each span's initial state from its own outputs, and steps as in `span_states`."""
    row, span, first, end = span_of(T, None, SPAN)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, in_tile, tile, _, of_C = tile_of(d, channels, 1, N)
    A_log2 = load(A + tile, in_tile) * LOG2_E
    dh = tl.zeros([BLOCK, N], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for back in range(1, end - first + 1):
        t = end - back
        at = (row * T + t) * channels + d
        step_t = load(step + at, inside)
        dy_t = load(dy + at, inside)
        z_t = load(token_of(z, strides[0], row, t) + d, inside)
        C_t = load(token_of(C, strides[1], row, t) + of_C, in_tile)
        goes_on = continues(seq_idx, row, t, T)
        dh = decay(step_t, A_log2, goes_on) * (dh + (dy_t * silu(z_t))[:, None] * C_t)
        total += tl.where(goes_on, step_t, float("inf"))
    tl.store(dstates + span * channels * N + tile, dh, mask=in_tile)
    tl.store(steps + span * channels + d, total, mask=inside)


@triton.jit
def _channels(N: tl.constexpr, BLOCK: tl.constexpr):
    """The program's channels, in order and permuted so that positions N apart hold channels of one group.

    The same thread holds these positions, so it does part of `_group_sums` alone.
    """
    place = tl.arange(0, BLOCK)
    part: tl.constexpr = N * N // BLOCK
    block = tl.program_id(0) * BLOCK
    return block + place, block + place % N // part * N + place // N * part + place % part


@triton.jit
def _group_sums(tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """Sums [BLOCK, N], permuted as by `_channels`, over each group's channels; concatenates the groups' vectors [N]."""
    parts = tl.reshape(tile, [BLOCK // N, BLOCK // N, N * N // BLOCK, N])
    return tl.reshape(tl.sum(tl.sum(parts, axis=0), axis=1), [BLOCK])


@triton.jit
def _sweep(A, D, T, channels, REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """The values that both sweeps start with: `span_of`, `_channels`, `tile_of`, A * log2(e), and D."""
    row, span, first, end = span_of(T, None, SPAN)
    vectors, d = _channels(N, BLOCK)
    inside, in_tile, tile, of_B, of_C = tile_of(d, channels, REP, N)
    A_log2, skip = load(A + tile, in_tile) * LOG2_E, load(D + d, inside)
    return row, span, first, end, vectors, d, inside, in_tile, tile, of_B, of_C, A_log2, skip


@triton.jit(do_not_specialize=LENGTHS)
def read_gradients(
    z, step, conv, B, C, A, D, seq_idx, states, dy, dstates, dz, dC, dA_parts, dD_parts, dlog, dlog_end,
    strides, T, channels, REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The forward sweep; names as in triton/selective_scan.py.

    Writes:
        dz, dC: gradients.
        dA_parts, dD_parts: gradients of A and D from each span.
        dlog: per token, the sum over n of A_log2 dread_t C_t * h_t, a term of g_t.
        dlog_end: per span, the sum over n of A_log2 dh * h after the span's last token.
    """
    row, span, first, end, vectors, d, inside, in_tile, tile, of_B, of_C, A_log2, skip = _sweep(
        A, D, T, channels, REP, N, SPAN, BLOCK
    )
    h = load(states + span * channels * N + tile, in_tile)
    dh_dA = tl.zeros([BLOCK, N], tl.float32)
    dA = tl.zeros([BLOCK, N], tl.float32)
    dD = tl.zeros([BLOCK], tl.float32)
    for t in range(first, end):
        token = (row * T + t) * channels
        step_t = load(step + token + d, inside)
        u = silu(load(conv + token + d, inside))
        dy_t = load(dy + token + d, inside)
        z_t = load(token_of(z, strides[0], row, t) + d, inside)
        B_t = load(token_of(B, strides[1], row, t) + of_B, in_tile)
        C_t = load(token_of(C, strides[2], row, t) + of_C, in_tile)
        kept = decay(step_t, A_log2, continues(seq_idx, row, t, T))
        dh_dA = kept * (dh_dA + step_t[:, None] * h)
        h = kept * h + (step_t * u)[:, None] * B_t
        dread = dy_t * silu(z_t)
        tl.store(dz + token + d, dy_t * (tl.sum(h * C_t, axis=1) + skip * u) * silu_gradient(z_t), mask=inside)
        tl.store(dC + token + vectors, _group_sums(dread[:, None] * h, N, BLOCK), mask=vectors < channels)
        tl.store(dlog + token + d, dread * tl.sum(h * C_t * A_log2, axis=1), mask=inside)
        dA += dread[:, None] * C_t * dh_dA
        dD += dread * u
    dh = load(dstates + span * channels * N + tile, in_tile)
    tl.store(dA_parts + span * channels * N + tile, dA + dh * dh_dA, mask=in_tile)
    tl.store(dD_parts + span * channels + d, dD, mask=inside)
    tl.store(dlog_end + span * channels + d, tl.sum(dh * h * A_log2, axis=1), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def write_gradients(
    z, step, conv, B, C, dt, A, D, seq_idx, dy, dstates, dlog, dlog_end, dB_parts, ddt, dconv,
    strides, T, channels, REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The backward sweep; names as in triton/selective_scan.py. dlog and dlog_end are those of `read_gradients`.

    Writes:
        dB_parts: gradient of B before the sum over the groups that share it.
        ddt: gradient of dt.
        dconv: gradient of the convolution's output.
    """
    row, span, first, end, vectors, d, inside, in_tile, tile, of_B, of_C, A_log2, skip = _sweep(
        A, D, T, channels, REP, N, SPAN, BLOCK
    )
    dh = load(dstates + span * channels * N + tile, in_tile)
    dlog_t = load(dlog_end + span * channels + d, inside)
    for back in range(1, end - first + 1):
        t = end - back
        token = (row * T + t) * channels
        step_t = load(step + token + d, inside)
        conv_t = load(conv + token + d, inside)
        dy_t = load(dy + token + d, inside)
        z_t = load(token_of(z, strides[0], row, t) + d, inside)
        B_t = load(token_of(B, strides[1], row, t) + of_B, in_tile)
        C_t = load(token_of(C, strides[2], row, t) + of_C, in_tile)
        dt_t = load(token_of(dt, strides[3], row, t) + d, inside)
        dlog_t += load(dlog + token + d, inside)
        goes_on = continues(seq_idx, row, t, T)
        u = silu(conv_t)
        dread = dy_t * silu(z_t)
        dh += dread[:, None] * C_t
        tl.store(dB_parts + token + vectors, _group_sums((step_t * u)[:, None] * dh, N, BLOCK), mask=vectors < channels)
        dwritten = tl.sum(dh * B_t, axis=1)  # the gradient of step_t u
        du = step_t * dwritten + skip * dread
        tl.store(dconv + token + d, du * silu_gradient(conv_t), mask=inside)
        dlog_t -= step_t * u * tl.sum(dh * B_t * A_log2, axis=1)
        dlog_t = tl.where(goes_on, dlog_t, 0.0)
        tl.store(ddt + token + d, (dlog_t / LOG2_E + u * dwritten) * sigmoid(dt_t), mask=inside)
        dh *= decay(step_t, A_log2, goes_on)


@triton.jit(do_not_specialize=LENGTHS)
def shared_gradients(
    x, conv_weight, seq_idx, conv_state, dconv, dB_parts, dx, dB, dconv_state, dweight_parts, dbias_parts,
    strides, T, channels, X, REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program handles a tile of inputs, including those in conv_state, and sums over all outputs that read them."""
    kv = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tile, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tile.to(tl.int64) * TOKENS - (K - 1) + tl.arange(0, TOKENS)
    inside = kv < X
    in_row, before = ((t >= 0) & (t < T))[:, None] & inside[None, :], (t < 0)[:, None] & inside[None, :]
    inputs = load(token_of(x, strides[0], row, t[:, None]) + kv[None, :], in_row)
    past = (row * X + kv)[None, :] * (K - 1) + (K - 1 + t)[:, None]
    if conv_state is not None:
        inputs += load(conv_state + past, before)
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
            gradient = load(dconv + at, reads[:, None] & inside[None, :])
            tap = d * K + (K - 1 - k)
            dinputs += gradient * load(conv_weight + tap, inside)[None, :]
            tl.store(dweight_parts + part * channels * K + tap, tl.sum(gradient * inputs, axis=0), mask=inside)
            if k == 0:
                tl.store(dbias_parts + part * channels + d, tl.sum(gradient, axis=0), mask=inside)
                dB_t += load(dB_parts + at, in_row)
    at = (row * T + t)[:, None] * X + kv[None, :]
    tl.store(dx + at, dinputs, mask=in_row)
    tl.store(dB + at, dB_t, mask=in_row)
    tl.store(dconv_state + past, dinputs, mask=before)
