"""What the Mamba-1 and Mamba-2 mixers share: projections, caches and initial step sizes.

    in_proj(h) -> z[D] | x[X] | B[X] | C[D] | dt            D = heads * head_dim, X = kv_heads * head_dim
    ...                                                      mamba.py, mamba2.py
    out_proj(y)

C, B, x and out correspond to Q, K, V and O, so their weights can be copied from attention (convert.py). There is no
rotation, no softmax and no growing cache.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from m1.model.cache_layout import MambaState
from m1.model.configuration import M1Config
from m1.model.packing import Padding

PastState = MambaState[Tensor | None]  # state of whole sequences before their first token; None is zero
SlotStates = MambaState[Tensor]  # states of all slots

TIME_STEP_RANGE = (1e-3, 1e-1)  # initial step sizes (Mamba, §3.6)
ALIGNED = 8  # a GPU's fast products need rows of whole 16 bytes


class Constants(NamedTuple):
    """The inputs of a scan that are the same for all tokens, made of the mixer's parameters.

    Attributes:
        A: -exp(A_log), float32: [D, N] in Mamba-1, [heads] in Mamba-2.
        D: skip weights: [D] in Mamba-1, [heads] in Mamba-2.
        conv_weight: [channels, K], taps of the causal convolution: D channels in Mamba-1, X + X + D in Mamba-2.
        conv_bias: [channels].
    """

    A: Tensor
    D: Tensor
    conv_weight: Tensor
    conv_bias: Tensor


class Mixer(nn.Module):
    """Base class of the Mamba-1 and Mamba-2 mixers, which replace attention in a decoder layer.

    It has the projections, the caches and `forward`: [b, T, H] -> [b, T, H]. A subclass defines four methods:
    `activations` returns a NamedTuple of per-token inputs, `scan` runs them for whole sequences, `step` for one token
    per row, and `prefill` for chunks of sequences.

    A teacher's QK-norm becomes B_norm and C_norm, since B and C are its keys and queries without the rotation.
    Parameter names are those of the released checkpoints.

    Args:
        config: `M1Config`.
        layer_idx: number of the layer, its place in a cache.
        conv_size: number of channels of `conv1d`'s parameters.
    """

    A_log: Tensor  # log(-A); the subclass makes it and D, whose shapes differ
    D: Tensor  # skip weights

    def __init__(self, config: M1Config, layer_idx: int, conv_size: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.conv_kernel = config.conv_kernel
        self.initializer_range = config.initializer_range
        self.widths = config.mamba_widths
        self.repeats = config.mamba_size // config.mamba_kv_size
        self.in_proj = AlignedLinear(config.hidden_size, sum(self.widths), bias=config.attention_bias)
        self.conv1d = ConvTaps(conv_size, conv_size, config.conv_kernel, groups=conv_size)
        self.out_proj = nn.Linear(config.mamba_size, config.hidden_size, bias=config.attention_out_bias)
        self.B_norm: nn.Module = nn.Identity()
        self.C_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            head_dim, eps, part = config.head_dim, config.rms_norm_eps, config.state_size
            interleaved = self.repeats if config.head_alignment == "attention" else 1
            self.B_norm = HeadRMSNorm(config.mamba_kv_size, head_dim, eps)
            self.C_norm = HeadRMSNorm(config.mamba_size, head_dim, eps, part, interleaved)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the parameters, except for those that a checkpoint has filled.

        The convolution is initialised as in torch: one that starts as the identity distils more slowly
        (docs/training.md).
        """
        for projection in (self.in_proj, self.out_proj):
            init.normal_(projection.weight, std=self.initializer_range)
            if projection.bias is not None:
                init.zeros_(projection.bias)
        bound = self.conv_kernel**-0.5
        init.uniform_(self.conv1d.weight, -bound, bound)
        init.uniform_(self.conv1d.bias, -bound, bound)

    def constants(self) -> Constants:
        """The scan's inputs that are the same for all tokens."""
        return Constants(-torch.exp(self.A_log.float()), self.D, *self.conv1d())

    def activations(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Any:
        """hidden_states [..., H], padding_mask [...] -> the subclass's activations [..., channels].

        Padding becomes a zero input with step size 0, which leaves the recurrent state unchanged.
        """
        raise NotImplementedError

    def conv_inputs(self, activations: Any) -> Tensor:
        """[..., channels], the convolution's inputs, of which a cache keeps the last K-1."""
        raise NotImplementedError

    def scan(
        self, activations: Any, constants: Constants, seq_idx: Tensor | None, state: PastState
    ) -> tuple[Tensor, Tensor]:
        """Runs whole sequences. Returns y [b, T, D] and the final ssm state, float32.

        Args:
            activations: [b, T, ...] each.
            constants: of this mixer.
            seq_idx: [b, T] integers, the document of each token in packed rows.
            state: conv [b, channels, K-1] and ssm [b, ...] before the first token; zero when None.
        """
        raise NotImplementedError

    def step(self, activations: Any, constants: Constants, state: SlotStates, slots: Tensor | None = None) -> Tensor:
        """Runs one token per row. Returns y [b, D].

        Args:
            activations: [b, ...] each.
            constants: of this mixer.
            state: conv [S, channels, K-1] and ssm [S, ...] float32 of all slots; the rows' slots are updated in place.
            slots: [b] integers, the slot of each row; row i has slot i when None.
        """
        raise NotImplementedError

    def prefill(
        self, activations: Any, constants: Constants, state: SlotStates, slots: Tensor, cu_seqlens: Tensor,
        max_length: int,
    ) -> Tensor:  # fmt: skip
        """Runs chunks of c sequences, T tokens one after another. Returns y [T, D].

        Args:
            activations: [T, ...] each.
            constants: of this mixer.
            state: conv [S, channels, K-1] and ssm [S, ...] float32 of all slots; those of the chunks are updated.
            slots: [c] integers, the slot of each chunk.
            cu_seqlens: [c + 1] int64, where each chunk begins, and T.
            max_length: number of tokens of the longest chunk.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        seq_idx: Tensor | None = None,
        padding: Padding | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """hidden_states [b, T, H] -> [b, T, H].

        Args:
            seq_idx: [b, T] integers, the document of each token in packed rows.
            padding: which tokens are padding. It leaves both states unchanged, wherever it is.
            cache: holds this layer's convolution and recurrent states, which are continued and updated.
        """
        if padding is None:
            return self.out_proj(self.mix(hidden_states, seq_idx, padding, cache))
        return padding.restore(self.out_proj(self.mix(padding.compact(hidden_states), seq_idx, padding, cache)))

    def mix(
        self, hidden_states: Tensor, seq_idx: Tensor | None, padding: Padding | None, cache: Cache | None
    ) -> Tensor:
        """`forward` without the output projection, for rows with padding at their end only: [b, T, H] -> [b, T, D]."""
        real, slots = (None, None) if padding is None else (padding.real, padding.slots)
        activations, constants = self.activations(hidden_states, real), self.constants()
        inputs = self.conv_inputs(activations)
        state = self.state_to_update(inputs, cache)
        if state is not None:
            y = self.step(activations._make(t[:, 0] for t in activations), constants, state, slots)
            return y.unsqueeze(1)
        if cache is None:
            return self.scan(activations, constants, seq_idx, MambaState(None, None))[0]
        past = self.past_state(cache)
        conv_state = self.update_conv_state(inputs, real, past.conv, cache)
        y, ssm_state = self.scan(activations, constants, seq_idx, MambaState(conv_state, past.ssm))
        cache.update_recurrent_state(ssm_state, self.layer_idx)
        return y

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden_states [..., H] -> z, x, B, C, dt, with B and C normed."""
        z, x, B, C, dt = self.in_proj(hidden_states).split(self.widths, dim=-1)
        return z, x, self.B_norm(B), self.C_norm(C), dt

    def past_state(self, cache: Cache) -> PastState:
        """This layer's states in the cache, the cache's own tensors; None before the first token."""
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if layer is None or not layer.has_previous_state[0]:
            return MambaState(None, None)
        return MambaState(layer.conv_states[0], layer.recurrent_states[0])

    def update_conv_state(self, inputs: Tensor, real: Tensor | None, past: Tensor | None, cache: Cache) -> Tensor:
        """Stores each row's last K-1 real inputs in the cache. Returns those before `inputs`, [b, channels, K-1].

        Args:
            inputs: [b, T, channels].
            real: [b, T], False at padding, which ends a row; None if there is none.
            past: the cache's [b, channels, K-1]; None before the first token.
        """
        K1 = self.conv_kernel - 1
        inputs = inputs.mT
        joined = F.pad(inputs, (K1, 0)) if past is None else torch.cat([past, inputs], dim=-1)
        if real is None:
            last = joined[..., inputs.shape[-1] :]
        else:
            window = real.sum(dim=1, keepdim=True) + torch.arange(K1, device=real.device)
            last = joined.gather(-1, window.unsqueeze(1).expand(-1, joined.shape[1], -1))
        cache.update_conv_state(last, self.layer_idx, conv_kernel_size=K1)
        return joined[..., :K1]

    def state_to_update(self, inputs: Tensor, cache: Cache | None) -> SlotStates | None:
        """The cache's own tensors, if one more token per row can update them in place.

        None if there is no cache or state yet, for several tokens, or with gradients.
        """
        if cache is None or inputs.shape[1] != 1 or torch.is_grad_enabled():
            return None
        state = self.past_state(cache)
        return None if state.ssm is None else state


class ConvTaps(nn.Conv1d):
    """An nn.Conv1d whose call returns its weight and bias, for ops that convolve themselves.

    Weights offloaded by accelerate's hooks are loaded on a call only, so the parameters aren't read directly.
    """

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns weight [channels, K] and bias [channels]."""
        return self.weight.squeeze(1), self.bias


class AlignedLinear(nn.Linear):
    """An nn.Linear of any size, which a GPU computes with sizes rounded up to multiples of ALIGNED."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; on a GPU possibly a view of longer rows."""
        is_aligned = self.in_features % ALIGNED == self.out_features % ALIGNED == 0
        if is_aligned or input.device.type != "cuda":
            return super().forward(input)
        return aligned_linear(input, self.weight, self.bias)


def aligned_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, computed with zeros added to both sizes up to multiples of ALIGNED. The result is a view."""
    size = len(weight)
    inner, outer = -weight.shape[1] % ALIGNED, -size % ALIGNED
    weight, bias = F.pad(weight, (0, inner, 0, outer)), None if bias is None else F.pad(bias, (0, outer))
    return F.linear(F.pad(x, (0, inner)) if inner else x, weight, bias)[..., :size]


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head of [..., size], with one gain per channel.

    It also norms heads whose channels were reordered by `convert.group_permutation`. That splits heads into groups of
    `part` channels and interleaves the groups of `interleaved` heads. A head's mean is over all its groups.

    Args:
        size: number of channels, a multiple of head_dim.
        head_dim: channels per head.
        eps: added to the mean square.
        part: channels per group; head_dim when None.
        interleaved: number of heads whose groups are interleaved; 1 for heads in one piece.
    """

    def __init__(self, size: int, head_dim: int, eps: float, part: int | None = None, interleaved: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        part = part or head_dim
        self.shape = (-1, head_dim // part, interleaved, part)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], normed."""
        heads = x.float().unflatten(-1, self.shape)
        heads = heads * torch.rsqrt(heads.square().mean((-3, -1), keepdim=True) + self.eps)
        return self.weight * heads.flatten(-4).to(x.dtype)


def initial_time_step_bias(size: int, device: torch.device) -> Tensor:
    """[size] biases whose softplus, the step size, is log-uniform in TIME_STEP_RANGE."""
    low, high = (math.log(step) for step in TIME_STEP_RANGE)
    steps = torch.exp(torch.rand(size, device=device) * (high - low) + low)
    return steps + torch.log(-torch.expm1(-steps))
