"""The forward kernels of `selective_scan`, in the order in which they run, and helpers that the backward ones share.

A program of `span_states` and `write_outputs` loops over one span, with a tile of BLOCK channels by N states in
registers. One of `scan_short` loops over a whole chunk.

Sequences are rows of [b, T, ...] with states [b, ...]. With cu_seqlens [c+1] they are chunks of one row, and their
states are in slots [c]. A chunk without a slot (negative) starts from zero states and gives zeros.
"""

# ruff: noqa: ANN001, ANN201 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl

from m1.ops.triton import LOG2_E, silu, softplus

LENGTHS = ("T", "spans")  # they differ from batch to batch; Triton would compile for multiples of 16 again


@triton.jit
def load(pointers, mask):
    """The values at the pointers in float32, or zero where the mask is not set."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def token_of(activation, strides, row, t):
    """Pointer to the first channel of token t. strides: of a sequence, of a token."""
    return activation + row * strides[0] + t * strides[1]


@triton.jit
def edges_of(sequence, cu_seqlens, T, SHORT: tl.constexpr = 0):
    """The row that has the sequence's tokens, and in it the sequence's first and end token.

    A chunk of up to SHORT tokens counts as empty.
    """
    if cu_seqlens is None:
        return sequence, sequence * 0, sequence * 0 + T
    else:
        start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
        return sequence * 0, start, tl.where(end - start > SHORT, end, start)


@triton.jit
def state_of(sequence, slots):
    """The place of the sequence's states; negative if it has none."""
    if slots is None:
        return sequence
    else:
        return tl.load(slots + sequence)


@triton.jit
def span_of(T, cu_seqlens, SPAN: tl.constexpr, SHORT: tl.constexpr = 0):
    """The program's row, its span's index among those of all sequences, and the span's first and end token."""
    span, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, start, end = edges_of(sequence, cu_seqlens, T, SHORT)
    first = start + span.to(tl.int64) * SPAN
    return row, sequence * tl.num_programs(1) + span, first, tl.minimum(first + SPAN, end)


@triton.jit
def tile_of(d, channels, REP: tl.constexpr, N: tl.constexpr):
    """Masks and offsets for channels d.

    Returns:
        Which channels exist, [BLOCK] and as a column; the offsets of their states in [D, N]; the offsets of what they
        read in a token's B and in its C, [BLOCK, N] each.
    """
    n = tl.arange(0, N)[None, :]
    inside = d < channels
    of_B, of_C = (d // (N * REP) * N)[:, None] + n, (d // N * N)[:, None] + n
    return inside, inside[:, None], d[:, None] * N + n, of_B, of_C


@triton.jit
def continues(seq_idx, row, t, T):
    """Whether token t is in the same document as token t-1. True for the first token."""
    if seq_idx is None:
        return True
    else:
        documents = seq_idx + row * T
        return tl.load(documents + t) == tl.load(documents + tl.maximum(t - 1, 0))


@triton.jit
def decay(step, A_log2, goes_on):
    """[BLOCK, N], the factor by which a token decays the state before it; zero if the token starts a document."""
    return tl.where(goes_on, tl.exp2(step[:, None] * A_log2), 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def prepare(
    x, dt, conv_weight, conv_bias, seq_idx, conv_state, step, conv, cu_seqlens, slots, strides, T, channels, X,
    REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    SHORT: tl.constexpr = 0,
):  # fmt: skip
    """Writes step, the step sizes, and conv, the outputs of the convolution; both [b, T, D]."""
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    sequence = tl.program_id(2).to(tl.int64)
    row, start, end = edges_of(sequence, cu_seqlens, T, SHORT)
    t = start + tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    if start + tl.program_id(1) * TOKENS >= end:
        return
    state = state_of(sequence, slots)
    held_until = tl.where(state >= 0, start, -K)  # earlier tokens are in conv_state
    inside = d < channels
    here = (t < end)[:, None] & inside[None, :]
    kv = d // (N * REP) * N + d % N
    total = tl.zeros([TOKENS, WIDTH], tl.float32) + load(conv_bias + d, inside)[None, :]
    for k in tl.static_range(K):
        at = t - k
        counts = t < end
        if seq_idx is not None:
            own = tl.load(seq_idx + row * T + t, mask=counts, other=0)
            counts &= own == tl.load(seq_idx + row * T + tl.maximum(at, 0), mask=counts, other=0)
        in_row, before = counts & (at >= start), counts & (at < held_until)
        value = load(token_of(x, strides[0], row, at[:, None]) + kv[None, :], in_row[:, None] & inside[None, :])
        if conv_state is not None:
            tap = (K - 1 + at - start).to(tl.int32)
            past = (conv_state + state * X * (K - 1)) + (kv[None, :] * (K - 1) + tap[:, None])
            value += load(past, before[:, None] & inside[None, :])
        total += value * load(conv_weight + d * K + (K - 1 - k), inside)[None, :]
    at = (row * T + t)[:, None] * channels + d[None, :]
    tl.store(conv + at, total, mask=here)
    tl.store(step + at, softplus(load(token_of(dt, strides[1], row, t[:, None]) + d[None, :], here)), mask=here)


@triton.jit(do_not_specialize=LENGTHS)
def span_states(
    step, conv, B, A, seq_idx, states, steps, cu_seqlens, strides, T, channels,
    REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, SHORT: tl.constexpr = 0,
):  # fmt: skip
    """Scans each span from a zero state.

    Writes:
        states: the final state of each span.
        steps: the sum of the span's step sizes. Infinite if a document starts in the span, as this clears the state.
    """
    row, span, first, end = span_of(T, cu_seqlens, SPAN, SHORT)
    if first >= end:
        return
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, in_tile, tile, of_B, _ = tile_of(d, channels, REP, N)
    A_log2 = load(A + tile, in_tile) * LOG2_E
    h = tl.zeros([BLOCK, N], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(first, end):
        at = (row * T + t) * channels + d
        step_t = load(step + at, inside)
        u = silu(load(conv + at, inside))
        B_t = load(token_of(B, strides[0], row, t) + of_B, in_tile)
        goes_on = continues(seq_idx, row, t, T)
        h = decay(step_t, A_log2, goes_on) * h + (step_t * u)[:, None] * B_t
        total += tl.where(goes_on, step_t, float("inf"))
    tl.store(states + span * channels * N + tile, h, mask=in_tile)
    tl.store(steps + span * channels + d, total, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def carry(
    states, steps, A, start, end, cu_seqlens, slots, spans, size,
    N: tl.constexpr, REVERSE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    SHORT: tl.constexpr = 0,
):  # fmt: skip
    """Carries the state from span to span, forwards in time or, with REVERSE, backwards.

    It loads AHEAD spans at once, as latency bounds its loop.

    states: on entry the final state of each span scanned from zero; overwritten with the state before each span.
    start: the state before the first span in this order; zero when None.
    end: receives the state after the last span. It may be `start`.
    spans: number of spans of each sequence; with cu_seqlens, of the longest.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = at < size
    A_log2 = load(A + at, inside) * LOG2_E
    state, filled = state_of(row, slots), spans
    if cu_seqlens is not None:
        _, first, behind = edges_of(row, cu_seqlens, 0, SHORT)
        filled = tl.cdiv(behind - first, SPAN)
    in_state = at < tl.where(state >= 0, size, 0)
    carried = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        carried += load(start + state * size + at, in_state)
    for done in range(0, filled, AHEAD):
        added: list = []
        total: list = []
        for i in tl.static_range(AHEAD):
            span = row * spans + (spans - 1 - done - i if REVERSE else done + i)
            exists = at < tl.where(done + i < filled, size, 0)
            added += (load(states + span * size + at, exists),)
            total += (load(steps + span * (size // N) + at // N, exists),)
        for i in tl.static_range(AHEAD):
            span = row * spans + (spans - 1 - done - i if REVERSE else done + i)
            tl.store(states + span * size + at, carried, mask=at < tl.where(done + i < filled, size, 0))
            left = tl.where(total[i] < float("inf"), tl.exp2(total[i] * A_log2), 0.0)
            carried = left * carried + added[i]
    tl.store(end + state * size + at, carried, mask=in_state)


@triton.jit(do_not_specialize=LENGTHS)
def write_outputs(
    z, step, conv, B, C, A, D, seq_idx, states, y, cu_seqlens, slots, strides, T, channels,
    REP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, SHORT: tl.constexpr = 0,
):  # fmt: skip
    """Scans each span from the state before it and writes y."""
    row, span, first, end = span_of(T, cu_seqlens, SPAN, SHORT)
    if first >= end:
        return
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, in_tile, tile, of_B, of_C = tile_of(d, channels, REP, N)
    A_log2, skip = load(A + tile, in_tile) * LOG2_E, load(D + d, inside)
    h = load(states + span * channels * N + tile, in_tile)
    has_slot = state_of(tl.program_id(2), slots) >= 0
    for t in range(first, end):
        at = (row * T + t) * channels + d
        step_t = load(step + at, inside)
        u = silu(load(conv + at, inside))
        z_t = load(token_of(z, strides[0], row, t) + d, inside)
        B_t = load(token_of(B, strides[1], row, t) + of_B, in_tile)
        C_t = load(token_of(C, strides[2], row, t) + of_C, in_tile)
        h = decay(step_t, A_log2, continues(seq_idx, row, t, T)) * h + (step_t * u)[:, None] * B_t
        out = (tl.sum(h * C_t, axis=1) + skip * u) * silu(z_t)
        if slots is not None:
            out = tl.where(has_slot, out, 0.0)
        tl.store(y + at, out, mask=inside)


@triton.jit
def scan_short(
    z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, y, cu_seqlens, slots, strides, channels, X,
    REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Scans chunks of up to SHORT tokens from their slots' states, writes y, and updates ssm_state. K is 4."""
    sequence = tl.program_id(1).to(tl.int64)
    _, start, end = edges_of(sequence, cu_seqlens, 0)
    if start >= end or end - start > SHORT:
        return
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, in_tile, tile, of_B, of_C = tile_of(d, channels, REP, N)
    slot = tl.load(slots + sequence)
    in_slot = d < tl.where(slot >= 0, channels, 0)
    kv = d // (N * REP) * N + d % N
    held, taps = conv_state + (slot * X + kv) * (K - 1), conv_weight + d * K
    oldest, older, old = load(held, in_slot), load(held + 1, in_slot), load(held + 2, in_slot)
    tap_0, tap_1, tap_2, tap_3 = (
        load(taps, inside), load(taps + 1, inside), load(taps + 2, inside), load(taps + 3, inside),
    )  # fmt: skip
    A_log2, skip, bias = load(A + tile, in_tile) * LOG2_E, load(D + d, inside), load(conv_bias + d, inside)
    states = ssm_state + slot * channels * N + tile
    h = load(states, in_slot[:, None])
    for first in range(start, end, TOKENS):
        read: list = []  # all loads come before the first store, to wait for memory once
        for i in tl.static_range(TOKENS):
            t = tl.minimum(first + i, end - 1)
            read += ((
                load(x + t * strides[1] + kv, inside), load(dt + t * strides[4] + d, inside),
                load(z + t * strides[0] + d, inside), load(B + t * strides[2] + of_B, in_tile),
                load(C + t * strides[3] + of_C, in_tile),
            ),)  # fmt: skip
        for i in tl.static_range(TOKENS):
            x_t, dt_t, z_t, B_t, C_t = read[i]
            u = silu(tap_0 * oldest + tap_1 * older + tap_2 * old + tap_3 * x_t + bias)
            oldest, older, old = older, old, x_t
            step = tl.where(first + i < end, softplus(dt_t), 0.0)  # a step of 0 leaves the state as it is
            h = tl.exp2(step[:, None] * A_log2) * h + (step * u)[:, None] * B_t
            out = tl.where(slot >= 0, (tl.sum(h * C_t, axis=1) + skip * u) * silu(z_t), 0.0)
            tl.store(y + (first + i) * channels + d, out, mask=d < tl.where(first + i < end, channels, 0))
    tl.store(states, h, mask=in_slot[:, None])


@triton.jit
def keep_inputs(
    x, conv_state, cu_seqlens, slots, stride, channels, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the last K-1 inputs of the convolution, x [T, channels], into the conv_state of each chunk's slot."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(1).to(tl.int64)
    _, start, end = edges_of(sequence, cu_seqlens, 0)
    slot, inside = tl.load(slots + sequence), channel < channels
    if slot >= 0:
        held = conv_state + (slot * channels + channel) * (K - 1)
        kept: list = []
        for k in tl.static_range(K - 1):
            t = end - (K - 1) + k
            new = load(x + t * stride + channel, channel < tl.where(t >= start, channels, 0))
            kept += (new + load(held + (K - 1) + (t - start), channel < tl.where(t < start, channels, 0)),)
        tl.debug_barrier()
        for k in tl.static_range(K - 1):
            tl.store(held + k, kept[k], mask=inside)
