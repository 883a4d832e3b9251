"""The Mamba-1 mixer with grouped heads: the layer that takes an attention layer's place.

    z, x, B, C, dt[R] = in_proj(h)
    dt = dt_proj(dt)                                  a step size a channel, before softplus
    y = selective_scan(z, x, B, C, dt, A, D, conv)    A = -exp(A_log); convolution, scan, skip and gate in one op
    out = out_proj(y)

One layer keeps the last K-1 inputs of the convolution, before the repeat, and a float32 state [D, N] per sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from m1.model.configuration import M1Config
from m1.model.mixer import Constants, Mixer, PastState, SlotStates, initial_time_step_bias
from m1.ops import selective_scan, state_update


class MambaActivations(NamedTuple):
    """What the scan reads of every token. X = kv_heads * head_dim."""

    z: Tensor  # [..., D]
    x: Tensor  # [..., X], the convolution's inputs
    B: Tensor  # [..., X]
    C: Tensor  # [..., D]
    dt: Tensor  # [..., D], before softplus


class MambaMixer(Mixer):
    """See the module's text."""

    def __init__(self, config: M1Config, layer_idx: int):
        super().__init__(config, layer_idx, conv_size=config.mamba_size)
        self.state_size = config.state_size
        self.dt_proj = nn.Linear(config.time_step_rank, config.mamba_size)
        self.A_log = nn.Parameter(torch.empty(config.mamba_size, self.state_size))
        self.D = nn.Parameter(torch.empty(config.mamba_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's own: A_n = -n (S4D-real), D = 1, steps log-uniform."""
        super().reset_parameters()
        device = self.A_log.device
        init.copy_(self.A_log, torch.arange(1, self.state_size + 1, device=device).log().expand_as(self.A_log))
        init.ones_(self.D)
        init.copy_(self.dt_proj.bias, initial_time_step_bias(self.dt_proj.out_features, device))
        init.uniform_(self.dt_proj.weight, -(self.dt_proj.in_features**-0.5), self.dt_proj.in_features**-0.5)

    def activations(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> MambaActivations:
        z, x, B, C, dt = self.project(hidden_states)
        dt = self.dt_proj(dt)
        if padding_mask is not None:
            real = padding_mask.to(torch.bool).unsqueeze(-1)
            x, dt = x * real, dt.masked_fill(~real, -torch.inf)
        return MambaActivations(z, x, B, C, dt)

    def conv_inputs(self, activations: MambaActivations) -> Tensor:
        return activations.x

    def scan(
        self, activations: MambaActivations, constants: Constants, seq_idx: Tensor | None, state: PastState
    ) -> tuple[Tensor, Tensor]:
        return selective_scan(*activations, *constants, seq_idx, *state)

    def step(
        self, activations: MambaActivations, constants: Constants, state: SlotStates, slots: Tensor | None = None
    ) -> Tensor:
        return state_update(*activations, *constants, *state, slots)
