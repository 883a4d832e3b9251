"""One decode step of a Mamba layer for many sequences: states live in slots and are updated in place."""

from typing import Any

import torch
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, decode_operator, kernels, require_shapes
from m1.ops.selective_scan import kernel_dtype

PROBLEM = "shapes don't fit, or ssm_state isn't float32"


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
    slots: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`selective_scan` of one token a row, continuing and updating the states of the row's slot. Not differentiable.

    Args:
        z, C, dt: [b, D] as in `selective_scan`; x, B: [b, X].
        A, D, conv_weight, conv_bias: as in `selective_scan`.
        conv_state: [S, X, K-1], any float dtype; a slot's last convolution inputs, oldest first. Updated.
        ssm_state: [S, D, N] float32. Updated.
        slots: [b] integers, each row's slot, no two the same. A negative one stands for none: the row is skipped.
            Row i has slot i when None.

    Returns:
        y [b, D] in z's dtype; zero for skipped rows.

    Raises:
        ValueError: shapes that don't fit, or a backend that can't run this.
    """
    b, d = z.shape
    X, K = x.shape[1], conv_weight.shape[1]
    n = A.shape[1]
    fits = [C.shape == dt.shape == (b, d), B.shape == x.shape == (b, X), A.shape[0] == conv_weight.shape[0] == d]
    fits += [conv_state.shape[1:] == (X, K - 1), ssm_state.shape[1:] == (d, n), ssm_state.dtype == torch.float32]
    fits += [len(conv_state) == len(ssm_state), d % X == X % n == 0, b <= len(ssm_state) or slots is not None]
    fits += [slots is None or slots.shape == (b,)]
    named = dict(z=z, x=x, B=B, C=C, dt=dt, A=A, conv_state=conv_state, ssm_state=ssm_state, slots=slots)
    require_shapes("state_update", fits, named, PROBLEM)
    slots = rows_as_slots(slots, z)
    contiguous = conv_state.is_contiguous() and ssm_state.is_contiguous()
    limits = {"state size 16": n == 16, "4 convolution taps": K == 4, "contiguous states": contiguous}
    backend = choose("state_update", backend, z, limits)
    if backend == "reference":
        return reference.state_update(z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots)
    dtype = kernel_dtype(backend, z, x, B, C, dt, conv_state)
    activations = [t.to(dtype) for t in (z, x, B, C, dt)]
    parameters = [t.float() for t in (A, D, conv_weight, conv_bias)]
    return _state_update(*activations, *parameters, conv_state, ssm_state, slots, backend).to(z.dtype)


def ssd_update(
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mamba-2's decode step: convolution and silu of x | B | C, then `ssd` of one token a row, in the row's slot.

    Args:
        xBC: [b, G P + G N + heads N] inputs x, B, C, before the convolution; head i reads group i // (heads / G).
        dt: [b, heads] step sizes before softplus.
        A: [heads], negative.
        D: [heads] skip weights.
        conv_weight: [channels of xBC, K]; conv_bias: [channels of xBC].
        conv_state: [S, channels of xBC, K-1], any float dtype. Updated.
        ssm_state: [S, heads, P, N] float32. Updated.
        slots: as in `state_update`.

    Returns:
        y [b, heads, P] in xBC's dtype, without gate and norm; zero for skipped rows.

    Raises:
        ValueError: shapes that don't fit, or a backend that can't run this.
    """
    b, channels = xBC.shape
    _, heads, P, N = ssm_state.shape
    K = conv_weight.shape[1]
    groups, left = divmod(channels - heads * N, P + N)
    fits = [left == 0, groups > 0 and heads % groups == 0, dt.shape == (b, heads), A.shape == D.shape == (heads,)]
    fits += [conv_weight.shape[0] == channels, conv_state.shape[1:] == (channels, K - 1)]
    fits += [len(conv_state) == len(ssm_state), ssm_state.dtype == torch.float32]
    fits += [b <= len(ssm_state) if slots is None else slots.shape == (b,)]
    named = dict(xBC=xBC, dt=dt, A=A, conv_weight=conv_weight, conv_state=conv_state, ssm_state=ssm_state)
    require_shapes("ssd_update", fits, named, PROBLEM)
    slots = rows_as_slots(slots, xBC)
    contiguous = conv_state.is_contiguous() and ssm_state.is_contiguous()
    limits = {"P and N that are multiples of 16": P % 16 == N % 16 == 0, "4 convolution taps": K == 4}
    backend = choose("ssd_update", backend, xBC, limits | {"contiguous states": contiguous})
    if backend == "reference":
        return reference.ssd_update(xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots)
    parameters = [t.float() for t in (dt, A, D, conv_weight, conv_bias)]
    y = _ssd_update(xBC.to(kernel_dtype(backend, xBC, conv_state)), *parameters, conv_state, ssm_state, slots, backend)
    return y.to(xBC.dtype)


def rows_as_slots(slots: Tensor | None, rows: Tensor) -> Tensor:
    """[b] int64 slots; row i's is i unless told otherwise."""
    return torch.arange(len(rows), device=rows.device) if slots is None else slots.long()


@decode_operator("state_update", mutates=("conv_state", "ssm_state"))
def _state_update(
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
    backend: str,
) -> Tensor:
    y = z.new_empty(z.shape)
    kernels(backend, "state_update").state_update(
        z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y
    )
    return y


@torch.library.register_fake("m1::state_update")
def _(z: Tensor, *rest: Any) -> Tensor:
    return z.new_empty(z.shape)


@decode_operator("ssd_update", mutates=("conv_state", "ssm_state"))
def _ssd_update(
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    backend: str,
) -> Tensor:
    y = xBC.new_empty(len(xBC), *ssm_state.shape[1:3])
    kernels(backend, "state_update").ssd_update(xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, y)
    return y


@torch.library.register_fake("m1::ssd_update")
def _(
    xBC: Tensor, dt: Tensor, A: Tensor, D: Any, w: Any, b: Any, conv_state: Any, ssm_state: Tensor, *rest: Any
) -> Tensor:
    return xBC.new_empty(len(xBC), *ssm_state.shape[1:3])
