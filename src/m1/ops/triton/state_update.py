"""One decode step of a Mamba layer on a GPU: convolution, softplus, state, skip and gate, with states updated in place.

Channels that read the same input share its conv_state, which must be shifted once, after the last read. In
`state_update` one program owns a group of inputs and all channels that read them, and shifts at its end. In
`ssd_update` several programs read the same input, so a second kernel shifts.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops.inputs import SSDStepInputs, StepInputs
from m1.ops.triton import LOG2_E, await_previous, overlap, silu, softplus

FEATURES = 32  # rows of a head's state per program of ssd_update
SHIFTED = 256  # channels per program of _shift_conv_states
# Fixed, not autotuned. On an H200, two warps per program make `state_update` 4 to 20 % slower, for 1 to 256 sequences
# at D = 768 and 3072. Other FEATURES and numbers of warps make small calls of `ssd_update` at most 5 % faster.


def state_update(inputs: StepInputs, y: Tensor) -> None:
    """Fills y [b, D] and updates the states of the rows' slots."""
    (b, d), X, n = inputs.z.shape, inputs.x.shape[1], inputs.A.shape[1]
    strides = tuple(t.stride(0) for t in (*inputs[:5], inputs.conv_state, inputs.ssm_state))
    sizes = d // X, n, inputs.conv_weight.shape[1]
    _state_update[X // n, b](*inputs, y, strides, *sizes, num_warps=1, **overlap(y.device))


def ssd_update(inputs: SSDStepInputs, y: Tensor) -> None:
    """Fills y [b, heads, P] and updates the states of the rows' slots."""
    xBC, conv_state, slots = inputs.xBC, inputs.conv_state, inputs.slots
    (b, channels), (_, heads, P, N) = xBC.shape, inputs.ssm_state.shape
    groups, K = (channels - heads * N) // (P + N), inputs.conv_weight.shape[1]
    sizes = (groups, P, N, K, FEATURES, triton.next_power_of_2(N))
    strides, early = tuple(t.stride(0) for t in (xBC, inputs.dt, conv_state, inputs.ssm_state)), overlap(y.device)
    _ssd_update[triton.cdiv(P, FEATURES), heads, b](*inputs, y, *strides, *sizes, **early)
    shifted = xBC, conv_state, slots, strides[0], strides[2], channels, K, SHIFTED
    _shift_conv_states[triton.cdiv(channels, SHIFTED), b](*shifted, **early)


@triton.jit
def _inputs(token, held, channel, inside, K: tl.constexpr):
    """[channels, K] float32, the inputs of the convolution: those in conv_state (`held`), then the new token's."""
    tap, channel, inside = tl.arange(0, K)[None, :], channel[:, None], inside[:, None]
    past = tl.load(held + channel * (K - 1) + tap, mask=inside & (tap < K - 1), other=0.0)
    newest = tl.load(token + channel + tap * 0, mask=inside & (tap == K - 1), other=0.0)
    return tl.where(tap < K - 1, past.to(tl.float32), newest.to(tl.float32))


@triton.jit
def _convolution(inputs, conv_weight, conv_bias, channel, inside, K: tl.constexpr):
    """silu of the convolution, [channels]."""
    weight = conv_weight + channel[:, None] * K + tl.arange(0, K)[None, :]
    total = tl.sum(inputs * tl.load(weight, mask=inside[:, None], other=0.0), axis=1)
    return silu(total + tl.load(conv_bias + channel, mask=inside, other=0.0))


@triton.jit
def _shift(inputs, held, channel, inside, K: tl.constexpr):
    """Drops the oldest inputs in conv_state (`held`) and appends the token's, after all threads have read them."""
    tap = tl.arange(0, K)[None, :]
    tl.debug_barrier()
    tl.store(held + channel[:, None] * (K - 1) + tap - 1, inputs, mask=inside[:, None] & (tap > 0))


@triton.jit
def _state_update(
    z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y, strides,
    REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program handles a group of N inputs of a row, and the REP groups of channels that read it."""
    await_previous(EARLY)
    shared, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    X = tl.num_programs(0) * N
    n = tl.arange(0, N)
    every = n < N
    slot = tl.load(slots + row)
    y += row * X * REP
    if slot < 0:
        for copy in tl.static_range(REP):
            tl.store(y + (shared * REP + copy) * N + n, tl.zeros([N], tl.float32))
    else:
        states = ssm_state + slot * strides[6] + shared * N * REP * N + n[:, None] * N + n[None, :]
        held = conv_state + slot * strides[5]
        inputs = _inputs(x + row * strides[1], held, shared * N + n, every, K)
        B_n = tl.load(B + row * strides[2] + shared * N + n).to(tl.float32)
        read: list = []  # all loads come before the first store, as latency is half of a small batch's time
        for copy in tl.static_range(REP):
            d = (shared * REP + copy) * N + n
            state, A_d = tl.load(states + copy * N * N), tl.load(A + d[:, None] * N + n[None, :])
            z_d, C_d = tl.load(z + row * strides[0] + d), tl.load(C + row * strides[3] + d)
            read += ((state, A_d, z_d, C_d, tl.load(dt + row * strides[4] + d), tl.load(D + d)),)
        for copy in tl.static_range(REP):
            d = (shared * REP + copy) * N + n
            state, A_d, z_d, C_d, dt_d, skip = read[copy]
            u = _convolution(inputs, conv_weight, conv_bias, d, every, K)
            step = softplus(dt_d.to(tl.float32))
            h = tl.exp2(step[:, None] * (A_d * LOG2_E)) * state + (step * u)[:, None] * B_n[None, :]
            tl.store(states + copy * N * N, h)
            out = tl.sum(h * C_d.to(tl.float32)[None, :], axis=1) + skip * u
            tl.store(y + d, out * silu(z_d.to(tl.float32)))
        _shift(inputs, held, shared * N + n, every, K)


@triton.jit
def _ssd_update(
    xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y, xBC_stride, dt_stride, conv_stride,
    ssm_stride, groups, P, N, K: tl.constexpr, FEATURES: tl.constexpr, STATES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    p = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    n = tl.arange(0, STATES)
    head, heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row)
    in_p, in_n = p < P, n < N
    inside = in_p[:, None] & in_n[None, :]
    out = y + (row * heads + head) * P + p
    if slot < 0:
        tl.store(out, tl.zeros([FEATURES], tl.float32), mask=in_p)
    else:
        group = head // (heads // groups)
        token = xBC + row * xBC_stride
        held = conv_state + slot * conv_stride
        of_x, of_B, of_C = group * P + p, groups * P + group * N + n, groups * (P + N) + head * N + n
        x = _convolution(_inputs(token, held, of_x, in_p, K), conv_weight, conv_bias, of_x, in_p, K)
        B = _convolution(_inputs(token, held, of_B, in_n, K), conv_weight, conv_bias, of_B, in_n, K)
        C = _convolution(_inputs(token, held, of_C, in_n, K), conv_weight, conv_bias, of_C, in_n, K)
        step = softplus(tl.load(dt + row * dt_stride + head).to(tl.float32))
        decay = tl.exp2(step * tl.load(A + head) * LOG2_E)
        state = ssm_state + slot * ssm_stride + (head * P + p)[:, None] * N + n[None, :]
        h = decay * tl.load(state, mask=inside, other=0.0) + (step * x)[:, None] * B[None, :]
        tl.store(state, h, mask=inside)
        tl.store(out, tl.sum(h * C[None, :], axis=1) + tl.load(D + head) * x, mask=in_p)


@triton.jit
def _shift_conv_states(
    xBC, conv_state, slots, xBC_stride, conv_stride, channels, K: tl.constexpr, SHIFTED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    channel = tl.program_id(0) * SHIFTED + tl.arange(0, SHIFTED)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        held, inside = conv_state + slot * conv_stride, channel < channels
        _shift(_inputs(xBC + row * xBC_stride, held, channel, inside, K), held, channel, inside, K)
