"""The Mamba mixer (Mamba-1 with grouped heads): the layer that takes an attention layer's place.

    in_proj(h) -> z[D] | x[X] | B[X] | C[D] | dt[R]
    x = silu(causal_conv(repeat(x)))                  per channel, after the repeat
    dt = softplus(dt_proj(dt))
    y = selective_scan(x, dt, A, B, C, D)             A = -exp(A_log)
    out = out_proj(y * silu(z))

D = heads * head_dim, X = kv_heads * head_dim. C, B, x and out take over the places of Q, K, V and O, so their weights
can be copied from attention (model/convert.py). There is no rotation, no softmax and no growing cache: one layer
keeps the last K-1 inputs of the convolution and a float32 state [D, N] per sequence.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from m1.model.configuration import M1Config
from m1.ops import causal_conv, selective_scan
from m1.ops.reference import repeat_groups

TIME_STEP_RANGE = (1e-3, 1e-1)  # initial step sizes (Mamba, §3.6)


class MambaMixer(nn.Module):
    """See the module's text. Parameter names are those of the released checkpoints."""

    def __init__(self, config: M1Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.state_size, self.conv_kernel = config.state_size, config.conv_kernel
        inner, rank = config.mamba_size, config.time_step_rank
        self.repeats = inner // config.mamba_kv_size
        self.widths = config.mamba_widths
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.attention_bias)
        self.conv1d = nn.Conv1d(inner, inner, self.conv_kernel, groups=inner)  # holds the weights; ops.causal_conv runs
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, self.state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        """Mamba's initialisation of what attention has no counterpart for: A, D, time steps and convolution.

        A_n = -n (S4D-real), D = 1, steps log-uniform in TIME_STEP_RANGE, torch's own initialisation of a convolution.
        (A convolution that starts as the identity distils more slowly: docs/training.md.)
        """
        self.A_log.copy_(torch.arange(1, self.state_size + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        low, high = (math.log(step) for step in TIME_STEP_RANGE)
        steps = torch.exp(torch.rand(self.dt_proj.bias.shape, device=self.dt_proj.bias.device) * (high - low) + low)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is `steps`
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_proj.in_features**-0.5), self.dt_proj.in_features**-0.5)
        self.conv1d.reset_parameters()

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
            padding_mask: [b, T], zero at padding. Padding is a step of size 0 on a zero input: it leaves conv window
                and state as in a sequence without it.
            past_key_values: continues from, and updates, this layer's conv and recurrent state.
        """
        z, x, B, C, dt = self.in_proj(hidden_states).split(self.widths, dim=-1)
        if padding_mask is not None:
            padding_mask = padding_mask.to(torch.bool).unsqueeze(-1)
            x = x * padding_mask
        state = conv_state = None
        if past_key_values is not None:
            conv_state, state = self._previous(past_key_values, x)
        weight = self.conv1d.weight.squeeze(1)
        x = repeat_groups(x, self.state_size, self.repeats)
        x = F.silu(causal_conv(x, weight, self.conv1d.bias, seq_idx, conv_state))
        dt = F.softplus(self.dt_proj(dt).float())
        if padding_mask is not None:
            dt = dt * padding_mask
        y, state = selective_scan(x, dt, -torch.exp(self.A_log.float()), B, C, self.D, seq_idx, state)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(y * F.silu(z))

    def _previous(self, cache: Cache, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the K-1 conv inputs in front of x [b, K-1, D], the state or None); pushes x [b, T, X] into the cache.

        The cache keeps x before the repeat, D / X times smaller than what the convolution reads.
        """
        K1 = self.conv_kernel - 1
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        state = layer.recurrent_states[0] if layer is not None and layer.has_previous_state[0] else None
        window = cache.update_conv_state(x.transpose(1, 2), self.layer_idx, conv_kernel_size=K1)
        past = window.transpose(1, 2)[:, : -x.shape[1]][:, -K1:] if K1 else x[:, :0]
        past = F.pad(past, (0, 0, K1 - past.shape[1], 0))
        return repeat_groups(past, self.state_size, self.repeats), state
