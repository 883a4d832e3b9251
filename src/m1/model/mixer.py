"""What the Mamba-1 and the Mamba-2 mixer share: projections, caches, initial time steps.

    in_proj(h) -> z[D] | x[X] | B[X] | C[D] | dt            D = heads * head_dim, X = kv_heads * head_dim
    ...                                                      mamba.py, mamba2.py
    out_proj(y)

C, B, x and out take over the places of Q, K, V and O, so their weights can be copied from attention (convert.py). There
is no rotation, no softmax and no growing cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from m1.model.configuration import M1Config

Activations = tuple[Tensor, ...]  # what a scan reads at every token
Constants = tuple[Tensor, Tensor, Tensor, Tensor]  # A, D, conv weight [channels, K], conv bias [channels]

TIME_STEP_RANGE = (1e-3, 1e-1)  # initial step sizes (Mamba, §3.6)


class Mixer(nn.Module):
    """Base class. Parameter names are those of the released checkpoints.

    A teacher's QK-norm becomes B_norm and C_norm: B and C are its keys and queries, less the rotation.
    """

    A_log: Tensor  # -A's logarithm and the skip weights, whose shapes are the subclass's
    D: Tensor

    def __init__(self, config: M1Config, layer_idx: int, conv_size: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.conv_kernel = config.conv_kernel
        self.initializer_range = config.initializer_range
        self.widths = config.mamba_widths
        self.repeats = config.mamba_size // config.mamba_kv_size
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.attention_bias)
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
        """Initialises everything that `convert` doesn't copy; leaves alone what a checkpoint has filled.

        The convolution is torch's own: one that starts as the identity distils more slowly (docs/training.md).
        """
        for projection in (self.in_proj, self.out_proj):
            init.normal_(projection.weight, std=self.initializer_range)
            if projection.bias is not None:
                init.zeros_(projection.bias)
        bound = self.conv_kernel**-0.5
        init.uniform_(self.conv1d.weight, -bound, bound)
        init.uniform_(self.conv1d.bias, -bound, bound)

    def constants(self) -> Constants:
        """A, D and the convolution's taps and bias."""
        conv_weight, conv_bias = self.conv1d()
        return -torch.exp(self.A_log.float()), self.D, conv_weight, conv_bias

    def activations(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Activations:
        """[..., H] -> z, the convolution's inputs, and the rest. Padding becomes a step of size 0 on a zero input."""
        raise NotImplementedError

    def conv_inputs(self, activations: Activations) -> Tensor:
        """[..., channels]: what the convolution's window keeps the last K-1 of."""
        return activations[1]

    def scan(
        self,
        activations: Activations,
        constants: Constants,
        seq_idx: Tensor | None,
        window: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Whole sequences [b, T, ...] from a window [b, K-1, channels] and a state: y [b, T, D] and the final state."""
        raise NotImplementedError

    def step(
        self,
        activations: Activations,
        constants: Constants,
        conv_state: Tensor,
        ssm_state: Tensor,
        slots: Tensor | None = None,
    ) -> Tensor:
        """One token a row, [b, ...]: y [b, D]; updates the states in the rows' slots."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        seq_idx: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """hidden_states [b, T, H] -> [b, T, H].

        Args:
            seq_idx: [b, T] integers, the document of each packed token.
            padding_mask: [b, T], zero at padding, which leaves conv window and state as in a sequence without it.
            past_key_values: continues from, and updates, this layer's conv and recurrent state.
        """
        activations, constants = self.activations(hidden_states, padding_mask), self.constants()
        inputs = self.conv_inputs(activations)
        states = self.states_to_update(inputs, past_key_values)
        if states is not None:
            y = self.step(tuple(t[:, 0] for t in activations), constants, *states)
            return self.out_proj(y.unsqueeze(1))
        window = state = None
        if past_key_values is not None:
            state = self.recurrent_state(past_key_values)
            window = self.conv_window(inputs, past_key_values)
        y, state = self.scan(activations, constants, seq_idx, window, state)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(y)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[..., H] -> z, x, B, C, dt."""
        z, x, B, C, dt = self.in_proj(hidden_states).split(self.widths, dim=-1)
        return z, x, self.B_norm(B), self.C_norm(C), dt

    def conv_window(self, inputs: Tensor, cache: Cache) -> Tensor:
        """The K-1 convolution inputs in front of `inputs` [b, T, ·], [b, K-1, ·]; pushes `inputs` into the cache."""
        K1 = self.conv_kernel - 1
        window = cache.update_conv_state(inputs.transpose(1, 2), self.layer_idx, conv_kernel_size=K1)
        past = window.transpose(1, 2)[:, : -inputs.shape[1]][:, -K1:] if K1 else inputs[:, :0]
        return F.pad(past, (0, 0, K1 - past.shape[1], 0))

    def recurrent_state(self, cache: Cache) -> Tensor | None:
        """This layer's float32 state after what the cache has seen, None before the first token."""
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        return layer.recurrent_states[0] if layer is not None and layer.has_previous_state[0] else None

    def states_to_update(self, inputs: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor] | None:
        """Conv and recurrent state, to be updated in place by one more token a row; None where that can't be: no state
        yet, several tokens, gradients, or a cache that records its past."""
        if cache is None or inputs.shape[1] != 1 or torch.is_grad_enabled():
            return None
        state = self.recurrent_state(cache)
        layer = cache.layers[self.layer_idx] if state is not None else None
        return None if layer is None or layer.record_past else (layer.conv_states[0], state)


class ConvTaps(nn.Conv1d):
    """nn.Conv1d's parameters for an op that takes them: a call, which is what offloading hooks see, hands them over."""

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """weight [channels, K], bias [channels]."""
        return self.weight.squeeze(1), self.bias


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head of [..., size], with a gain a channel.

    `convert.group_permutation` takes heads apart into groups of `part` = N channels and lets the groups of
    `interleaved` heads take turns; a head's mean is over all its groups.
    """

    def __init__(self, size: int, head_dim: int, eps: float, part: int | None = None, interleaved: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        part = part or head_dim
        self.shape = (-1, head_dim // part, interleaved, part)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.float().unflatten(-1, self.shape)
        heads = heads * torch.rsqrt(heads.square().mean((-3, -1), keepdim=True) + self.eps)
        return self.weight * heads.flatten(-4).to(x.dtype)


def initial_time_step_bias(size: int, device: torch.device) -> Tensor:
    """[size] biases whose softplus is log-uniform in TIME_STEP_RANGE."""
    low, high = (math.log(step) for step in TIME_STEP_RANGE)
    steps = torch.exp(torch.rand(size, device=device) * (high - low) + low)
    return steps + torch.log(-torch.expm1(-steps))
