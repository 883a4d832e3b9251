"""One decode step of a Mamba layer on a GPU: convolution, softplus, state, skip and gate, states updated in place.

Channels that read the same input share its convolution window, which must be shifted once, behind the last read. In
`state_update` a program owns a group of inputs with all channels that read them, and shifts at its end. The programs
of `ssd_update` are smaller than that; a second kernel shifts.
"""

# ruff: noqa: ANN001, ANN202 (inside kernels everything is a tensor, a pointer or a constexpr)

import triton
import triton.language as tl
from torch import Tensor

from m1.ops.triton import LOG2_E, silu, softplus

FEATURES = 16  # rows of a head's state in a program of ssd_update
SHIFTED = 256  # windows in a program of _shift_windows


def state_update(
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    y: Tensor,
) -> None:
    """Fills y [b, D] and updates the states of the rows' slots."""
    (b, d), X, n = z.shape, x.shape[1], A.shape[1]
    strides = tuple(t.stride(0) for t in (z, x, B, C, dt))
    _state_update[X // n, b](
        z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y, strides,
        d // X, n, conv_weight.shape[1], num_warps=1,
    )  # fmt: skip


def ssd_update(
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    y: Tensor,
) -> None:
    """Fills y [b, heads, P] and updates the states of the rows' slots."""
    (b, channels), (_, heads, P, N) = xBC.shape, ssm_state.shape
    groups, K = (channels - heads * N) // (P + N), conv_weight.shape[1]
    _ssd_update[triton.cdiv(P, FEATURES), heads, b](
        xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y, xBC.stride(0), dt.stride(0), channels,
        groups, P, N, K, FEATURES, triton.next_power_of_2(N),
    )  # fmt: skip
    _shift_windows[triton.cdiv(channels, SHIFTED), b](xBC, conv_state, slots, xBC.stride(0), channels, K, SHIFTED)


@triton.jit
def _convolution(token, windows, conv_weight, conv_bias, source, channel, inside, K: tl.constexpr):
    """silu of the convolution; channel's input is `source` of the token and of the windows."""
    total = tl.load(conv_bias + channel, mask=inside, other=0.0)
    for k in tl.static_range(K - 1):
        past = tl.load(windows + source * (K - 1) + k, mask=inside, other=0.0).to(tl.float32)
        total += past * tl.load(conv_weight + channel * K + k, mask=inside, other=0.0)
    newest = tl.load(token + source, mask=inside, other=0.0).to(tl.float32)
    return silu(total + newest * tl.load(conv_weight + channel * K + (K - 1), mask=inside, other=0.0))


@triton.jit
def _shift(token, windows, channel, inside, K: tl.constexpr):
    """Drops the windows' oldest inputs and appends the token's, once all threads have read the windows."""
    kept: list = []
    for k in tl.static_range(1, K - 1):
        kept += (tl.load(windows + channel * (K - 1) + k, mask=inside, other=0.0),)
    newest = tl.load(token + channel, mask=inside, other=0.0)
    tl.debug_barrier()
    for k in tl.static_range(K - 2):
        tl.store(windows + channel * (K - 1) + k, kept[k], mask=inside)
    tl.store(windows + channel * (K - 1) + (K - 2), newest, mask=inside)


@triton.jit
def _state_update(
    z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y, strides,
    REP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A program takes a group of N inputs of a row, and the REP groups of channels that read it."""
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
        windows = conv_state + slot * X * (K - 1)
        B_n = tl.load(B + row * strides[2] + shared * N + n).to(tl.float32)
        for copy in tl.static_range(REP):
            d = (shared * REP + copy) * N + n
            u = _convolution(x + row * strides[1], windows, conv_weight, conv_bias, shared * N + n, d, every, K)
            step = softplus(tl.load(dt + row * strides[4] + d).to(tl.float32))
            tile = d[:, None] * N + n[None, :]
            state = ssm_state + slot * X * REP * N + tile
            decay = tl.exp2(step[:, None] * (tl.load(A + tile) * LOG2_E))
            h = decay * tl.load(state) + (step * u)[:, None] * B_n[None, :]
            tl.store(state, h)
            C_n = tl.load(C + row * strides[3] + d).to(tl.float32)
            gate = silu(tl.load(z + row * strides[0] + d).to(tl.float32))
            tl.store(y + d, (tl.sum(h * C_n[None, :], axis=1) + tl.load(D + d) * u) * gate)
        _shift(x + row * strides[1], windows, shared * N + n, every, K)


@triton.jit
def _ssd_update(
    xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y, xBC_stride, dt_stride, channels,
    groups, P, N, K: tl.constexpr, FEATURES: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
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
        windows = conv_state + slot * channels * (K - 1)
        of_x, of_B, of_C = group * P + p, groups * P + group * N + n, groups * (P + N) + head * N + n
        x = _convolution(token, windows, conv_weight, conv_bias, of_x, of_x, in_p, K)
        B = _convolution(token, windows, conv_weight, conv_bias, of_B, of_B, in_n, K)
        C = _convolution(token, windows, conv_weight, conv_bias, of_C, of_C, in_n, K)
        step = softplus(tl.load(dt + row * dt_stride + head).to(tl.float32))
        decay = tl.exp2(step * tl.load(A + head) * LOG2_E)
        state = ssm_state + ((slot * heads + head) * P + p)[:, None] * N + n[None, :]
        h = decay * tl.load(state, mask=inside, other=0.0) + (step * x)[:, None] * B[None, :]
        tl.store(state, h, mask=inside)
        tl.store(out, tl.sum(h * C[None, :], axis=1) + tl.load(D + head) * x, mask=in_p)


@triton.jit
def _shift_windows(xBC, conv_state, slots, xBC_stride, channels, K: tl.constexpr, SHIFTED: tl.constexpr):
    channel = tl.program_id(0) * SHIFTED + tl.arange(0, SHIFTED)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        _shift(xBC + row * xBC_stride, conv_state + slot * channels * (K - 1), channel, channel < channels, K)
