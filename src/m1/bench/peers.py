"""Kernels of other libraries for the same work, with the same inputs in the layout that each library prefers.

Preparing a layout isn't timed. The libraries' Mamba is channel-major and doesn't know repeated groups, so its x is
repeated beforehand. The Mamba-1 of transformers has one vector B and one C per token for all channels. So the
benchmarks use the same B and C in all groups, and all rows compute the same.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from m1.bench.layer_inputs import Inputs
from m1.ops.reference import repeat_groups

Step = Callable[[], dict[str, Tensor]]


class Scan(NamedTuple):
    """One implementation of the selective scan, with its inputs. The benchmark times it forward and backward.

    Attributes:
        name: its name in the table.
        loop: whether it is a loop over time in Python.
        leaves: its inputs by name. Those that are arguments of `m1.ops.selective_scan` have the same names.
        forward: computes y [b, T, D] from the leaves, differentiably.
        dy: the gradient of y, with the memory layout of y.
    """

    name: str
    loop: bool
    leaves: dict[str, Tensor]
    forward: Callable[[Inputs], Tensor]
    dy: Tensor


class MambaLibrary(NamedTuple):
    """A library's Mamba functions. Their signatures are those of causal-conv1d and mamba-ssm.

    Attributes:
        name: the library and its version.
        grouped: whether B and C of Mamba-1 may differ between groups of channels.
        conv: the causal convolution of a sequence.
        scan: the selective scan of a sequence.
        conv_update: one decode step of the convolution.
        state_update: one decode step of the scan.
        heads_update: as `state_update`, for states with heads.
    """

    name: str
    grouped: bool
    conv: Callable[..., Tensor]
    scan: Callable[..., Tensor]
    conv_update: Callable[..., Tensor]
    state_update: Callable[..., Tensor]
    heads_update: Callable[..., Tensor]


def mamba_libraries(device: str) -> tuple[list[MambaLibrary], list[str]]:
    """The libraries that run on the device, and one line for each that doesn't."""
    found, skipped = [], []
    try:
        found.append(_transformers())
    except ImportError:
        skipped.append(f"transformers {transformers.__version__}: its Mamba has no functions of the known names")
    if device == "cuda":
        try:
            found.append(_mamba_ssm())
        except ImportError:
            skipped.append("mamba-ssm: needs mamba_ssm and causal_conv1d, built for this torch")
    else:
        skipped.append("mamba-ssm: runs on GPUs only")
    return found, skipped


def _transformers() -> MambaLibrary:
    """The plain PyTorch code of MambaMixer between its projections. `heads_update` is that of Mamba2Mixer."""
    from transformers.models.mamba.modeling_mamba import (
        causal_conv1d_fn,
        causal_conv1d_update,
        mamba_selective_scan,
        mamba_selective_state_update,
    )
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    functions = (
        causal_conv1d_fn,
        mamba_selective_scan,
        causal_conv1d_update,
        mamba_selective_state_update,
        mamba2_selective_state_update,
    )
    # The functions' decorators would call mamba-ssm if it is installed, which has its own row.
    return MambaLibrary(f"transformers {transformers.__version__}", False, *map(inspect.unwrap, functions))


def _mamba_ssm() -> MambaLibrary:
    import mamba_ssm
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    scans = (causal_conv1d_fn, selective_scan_fn, causal_conv1d_update)
    updates = (selective_state_update, selective_state_update)
    return MambaLibrary(f"mamba-ssm {mamba_ssm.__version__}", True, *scans, *updates)


def mamba_scan(library: MambaLibrary, inputs: Inputs, dy: Tensor) -> Scan:
    """A library's scan. As in this package's op, convolution, silu, softplus, scan, skip and gate are timed."""
    n, dtype = inputs["A"].shape[1], inputs["z"].dtype

    def channel_major(t: Tensor) -> Tensor:
        return t.mT.contiguous()

    def vectors(t: Tensor) -> Tensor:
        """[b, T, channels] -> [b, N, T], or [b, D / N groups, N, T] if each group may have its own."""
        if not library.grouped:
            return channel_major(t[..., :n])
        return repeat_groups(t, n, dy.shape[-1] // t.shape[-1]).mT.unflatten(1, (-1, n)).contiguous()

    leaves = {
        "u": channel_major(repeat_groups(inputs["x"], n, dy.shape[-1] // inputs["x"].shape[-1])),
        "z_channels": channel_major(inputs["z"]),
        "dt_channels": channel_major(inputs["dt"]),
        "B_vectors": vectors(inputs["B"]),
        "C_vectors": vectors(inputs["C"]),
        "A": inputs["A"],
        "D": inputs["D"],
        "conv_weight": inputs["conv_weight"].to(dtype),
        "conv_bias": inputs["conv_bias"].to(dtype),
    }

    def forward(t: Inputs) -> Tensor:
        u = library.conv(t["u"], t["conv_weight"], t["conv_bias"], activation="silu")
        arguments = (u, t["dt_channels"], t["A"], t["B_vectors"], t["C_vectors"], t["D"])
        return library.scan(*arguments, z=t["z_channels"], delta_softplus=True).mT.to(dtype)

    return Scan(library.name, not library.grouped, leaves, forward, channel_major(dy).mT)


def mamba_step(library: MambaLibrary, layer: Inputs) -> Step:
    """A library's decode step of Mamba-1. As in this package's op, convolution, softplus, skip and gate are timed."""
    x, B, C, A = layer["x"], layer["B"], layer["C"], layer["A"]
    n, rep = A.shape[1], A.shape[0] // x.shape[1]
    x = repeat_groups(x, n, rep)[..., None]
    weight, bias = layer["conv_weight"].to(x.dtype), layer["conv_bias"].to(x.dtype)
    conv_state = repeat_groups(layer["conv_state"].mT, n, rep).mT.contiguous()
    ssm_state = layer["ssm_state"].clone()

    def groups_as_heads(t: Tensor, dim: int = 1) -> Tensor:
        return t.unflatten(dim, (-1, n)) if library.grouped else t

    update = library.heads_update if library.grouped else library.state_update
    B, C = (groups_as_heads(repeat_groups(B, n, rep)), groups_as_heads(C)) if library.grouped else (B[:, :n], C[:, :n])
    A, D = groups_as_heads(A, 0), groups_as_heads(layer["D"], 0)
    z, dt, state = groups_as_heads(layer["z"]), groups_as_heads(layer["dt"]), groups_as_heads(ssm_state)

    def step() -> dict[str, Tensor]:
        u = groups_as_heads(library.conv_update(x, conv_state, weight, bias, activation="silu")[..., 0])
        y = update(state, u, dt, A, B, C, D, z=z, dt_softplus=True)
        return {"y": y.flatten(1), "ssm_state": ssm_state}

    return step


def mamba2_step(library: MambaLibrary, layer: Inputs) -> Step:
    """A library's decode step of Mamba-2. As in this package's op, convolution, softplus and skip are timed.

    C differs between all heads, but x and B only between groups. Repeating x and B is a copy, and part of the step.
    """
    xBC, ssm_state, conv_state = layer["xBC"][..., None], layer["ssm_state"].clone(), layer["conv_state"].clone()
    _, heads, P, N = ssm_state.shape
    groups = (xBC.shape[1] - heads * N) // (P + N)
    weight, bias = layer["conv_weight"].to(xBC.dtype), layer["conv_bias"].to(xBC.dtype)
    A, D = layer["A"][:, None, None].expand(heads, P, N), layer["D"][:, None].expand(heads, P)
    dt = layer["dt"][..., None].expand(-1, heads, P)
    # mamba-ssm needs a bias if A is one number per head
    no_bias = torch.zeros_like(layer["A"])[:, None].expand(heads, P)

    def step() -> dict[str, Tensor]:
        u = library.conv_update(xBC, conv_state, weight, bias, activation="silu")[..., 0]
        x, B, C = u.split([groups * P, groups * N, heads * N], dim=1)
        x = x.unflatten(1, (groups, P)).repeat_interleave(heads // groups, dim=1)
        B = B.unflatten(1, (groups, N)).repeat_interleave(heads // groups, dim=1)
        y = library.heads_update(
            ssm_state, x, dt, A, B, C.unflatten(1, (heads, N)), D, dt_bias=no_bias, dt_softplus=True
        )
        return {"y": y, "ssm_state": ssm_state}

    return step


def attention_peers(device: str, dtype: str) -> tuple[dict[str, Callable[[Inputs], Step]], list[str]]:
    """By name, the function that prepares a step of each peer that runs here. Also one line for each that doesn't."""
    peers: dict[str, Callable[[Inputs], Step]] = {f"torch {torch.__version__} SDPA": sdpa_step}
    skipped = []
    if device == "cuda" and dtype == "bfloat16":
        try:
            import flash_attn

            peers[f"flash-attn {flash_attn.__version__}"] = flash_attention_step
        except ImportError:
            skipped.append("flash-attn: needs flash_attn, built for this torch")
    else:
        skipped.append("flash-attn: runs on GPUs and in bfloat16 only")
    return peers, skipped


def sdpa_step(layer: Inputs) -> Step:
    """PyTorch's attention on the same tensors, without a mask: all caches are full."""
    q, k, v = layer["q"][:, :, None], layer["k_cache"], layer["v_cache"]
    return lambda: {"y": F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]}


def flash_attention_step(layer: Inputs) -> Step:
    """flash-attn's decode kernel, with keys and values in the token-major layout that it needs."""
    from flash_attn import flash_attn_with_kvcache

    q, lengths = layer["q"][:, None], layer["lengths"].int()
    k, v = (layer[name].transpose(1, 2).contiguous() for name in ("k_cache", "v_cache"))
    return lambda: {"y": flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)[:, 0]}
