"""Chunks of several prompts in a Mamba layer. Their states are in slots and are updated in place.

The activations of all chunks are packed one after another; chunk j is tokens cu_seqlens[j] to cu_seqlens[j + 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.causal_conv import causal_conv
from m1.ops.chunks import bounds, check_chunks, chunk_of_tokens
from m1.ops.inputs import PrefillInputs, SSDPrefillInputs
from m1.ops.selective_scan import GROUPS, channels_last, kernel_dtype
from m1.ops.shapes import Shapes, declared
from m1.ops.ssd import ssd
from m1.ops.state_update import SSD_GROUPS, STATES, state_limits

CHECK = Shapes("prefill_scan", **declared(PrefillInputs), where=GROUPS)
CHECK_SSD = Shapes("prefill_ssd", **declared(SSDPrefillInputs), where=SSD_GROUPS)


def prefill_scan(
    z: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor,
    A: Tensor, D: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    conv_state: Tensor, ssm_state: Tensor, slots: Tensor, cu_seqlens: Tensor, max_length: int,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Mamba-1's scan of chunks of several prompts: `state_update` with many tokens per row.

    Each chunk resumes from the states of its slot and overwrites them. Results don't depend on the other chunks; on a
    CPU they equal those of `selective_scan` bit for bit. Not differentiable. The kernels require N = 16, K = 4 and
    contiguous states.

    Args:
        z, C, dt: [T, D] as in `selective_scan`.
        x, B: [T, X] as in `selective_scan`.
        A, D, conv_weight, conv_bias: as in `selective_scan`.
        conv_state: [S, X, K-1], any float dtype; the last convolution inputs of each slot, oldest first. Updated.
        ssm_state: [S, D, N] float32. Updated.
        slots: [c] integers, the slot of each chunk, without duplicates. A chunk with a negative slot is padding.
        cu_seqlens: [c+1] integers that rise from 0 to T; the edges of the chunks.
        max_length: at least the length of the longest chunk.

    Returns:
        y [T, D] in z's dtype; zero for padding.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a slot that doesn't exist.
    """
    CHECK(z, x, B, C, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, cu_seqlens)
    contiguous = conv_state.is_contiguous() and ssm_state.is_contiguous()
    limits = {"state size 16": A.shape[1] == 16, "contiguous states": contiguous} | state_limits(conv_state, ssm_state)
    backend = choose("prefill_scan", backend, z, limits)
    if backend != "triton":
        check_chunks("prefill_scan", cu_seqlens, slots, len(ssm_state), max_length, z=z)
    states = (conv_state, ssm_state, slots.long().contiguous(), cu_seqlens.long().contiguous(), max_length)
    if backend == "reference":
        return reference.prefill_scan(PrefillInputs(z, x, B, C, dt, A, D, conv_weight, conv_bias, *states))
    dtype = kernel_dtype(z, x, B, C, dt)
    activations = [channels_last(t.to(dtype)) for t in (z, x, B, C, dt)]
    parameters = [t.float().contiguous() for t in (A, D, conv_weight, conv_bias)]
    return _prefill_scan(*activations, *parameters, *states, backend).to(z.dtype)


def prefill_ssd(
    xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, conv_weight: Tensor, conv_bias: Tensor,
    conv_state: Tensor, ssm_state: Tensor, slots: Tensor, cu_seqlens: Tensor, max_length: int,
) -> Tensor:  # fmt: skip
    """Mamba-2's scan of chunks of several prompts: convolution and silu of x | B | C, then `ssd`, on states in slots.

    On a CPU chunks run one by one, so results don't depend on other chunks. On a GPU they run as one padded batch. Not
    differentiable.

    Args:
        xBC: [T, G P + G N + heads N] as in `ssd_update`.
        dt: [T, heads] step sizes before softplus.
        A, D, conv_weight, conv_bias: as in `ssd_update`.
        conv_state: [S, channels of xBC, K-1], any float dtype; the last inputs of each slot, oldest first. Updated.
        ssm_state: [S, heads, P, N] float32. Updated.
        slots, cu_seqlens, max_length: as in `prefill_scan`.

    Returns:
        y [T, heads, P] float32, without gate and norm; zero for padding.

    Raises:
        ValueError: a tensor that doesn't fit.
        IndexError: on a CPU, a slot that doesn't exist.
    """
    CHECK_SSD(xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots, cu_seqlens)
    on_cpu = xBC.device.type == "cpu"
    if on_cpu:
        check_chunks("prefill_ssd", cu_seqlens, slots, len(ssm_state), max_length, xBC=xBC)
    states = (conv_state, ssm_state, slots.long(), cu_seqlens.long(), max_length)
    inputs = SSDPrefillInputs(xBC, dt, A.float(), D.float(), conv_weight.float(), conv_bias.float(), *states)
    return (_ssd_in_turn if on_cpu else _ssd_padded)(inputs)


def _ssd_in_turn(inputs: SSDPrefillInputs) -> Tensor:
    """`prefill_ssd` chunk by chunk."""
    (xBC, dt), parameters, (conv_state, ssm_state, slots, cu_seqlens, _) = inputs[:2], inputs[2:6], inputs[6:]
    y = ssm_state.new_zeros(len(xBC), *ssm_state.shape[1:3])
    for slot, (first, end) in zip(slots.tolist(), bounds(cu_seqlens), strict=True):
        if slot >= 0 and first < end:
            states = conv_state[slot, None], ssm_state[slot, None]
            y[first:end], ssm_state[slot] = _ssd(xBC[None, first:end], dt[None, first:end], parameters, *states)
            joined = torch.cat([conv_state[slot], xBC[first:end].T.to(conv_state.dtype)], dim=1)
            conv_state[slot] = joined[:, end - first :]
    return y


def _ssd_padded(inputs: SSDPrefillInputs) -> Tensor:
    """`prefill_ssd` with all chunks padded to max_length, [c, max_length, ...], without waiting for the device."""
    (xBC, dt), parameters = inputs[:2], inputs[2:6]
    conv_state, ssm_state, slots, cu_seqlens, max_length = inputs[6:]
    T, c, held = len(xBC), len(slots), conv_state.shape[2]
    if not T or not (slots.numel() and max_length):
        return ssm_state.new_zeros(T, *ssm_state.shape[1:3])
    lengths, time = cu_seqlens.diff()[:, None], torch.arange(max_length, device=xBC.device)
    token = (cu_seqlens[:-1, None] + time).clamp(max=T - 1)
    padding = (time >= lengths)[..., None]
    xBC, dt = xBC[token].masked_fill(padding, 0.0), dt[token].masked_fill(padding, -torch.inf)

    # Duplicates in a scatter must write the same: chunks without a slot write what the one with the highest slot does.
    source = torch.where(slots < 0, slots.argmax(), torch.arange(c, device=slots.device))
    kept, at = slots[source] >= 0, slots[source].clamp(min=0)
    conv_before, ssm_before = conv_state[at], ssm_state[at]
    y, ssm_after = _ssd(xBC, dt, parameters, conv_before, ssm_before)
    joined = torch.cat([conv_before.mT, xBC.to(conv_state.dtype)], dim=1)
    newest = lengths + torch.arange(held, device=xBC.device)
    conv_after = joined[torch.arange(c, device=xBC.device)[:, None], newest].mT
    for state, before, after in ((conv_state, conv_before, conv_after), (ssm_state, ssm_before, ssm_after)):
        state[at] = torch.where(kept.view(-1, *[1] * (state.dim() - 1)), after[source], before)

    chunk = chunk_of_tokens(cu_seqlens, T)
    y = y[chunk, torch.arange(T, device=xBC.device) - cu_seqlens[chunk]]
    return y.masked_fill((slots < 0)[chunk, None, None], 0.0)


def _ssd(
    xBC: Tensor, dt: Tensor, parameters: tuple[Tensor, ...], conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor]:
    """y [b, T, heads, P] and the final state of sequences [b, T, ...] that continue from the states [b, ...]."""
    A, D, conv_weight, conv_bias = parameters
    heads, P, N = ssm_state.shape[1:]
    G = (xBC.shape[-1] - heads * N) // (P + N)
    u = F.silu(causal_conv(xBC.float(), conv_weight, conv_bias, None, conv_state))
    x, B, C = u.split([G * P, G * N, heads * N], dim=-1)
    x, B, C = x.unflatten(-1, (G, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (heads, N))
    return ssd(x, F.softplus(dt.float()), A, B, C, D, None, ssm_state)


def _new_y(inputs: PrefillInputs) -> Tensor:
    return inputs.z.new_empty(inputs.z.shape)


_prefill_scan = inference_operator("prefill_scan", "selective_scan", PrefillInputs, _new_y, mutates=STATES)
