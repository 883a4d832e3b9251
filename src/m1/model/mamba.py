"""The Mamba-1 mixer with grouped heads: the layer that takes an attention layer's place.

    z, x, B, C, dt[R] = in_proj(h)
    dt = dt_proj(dt)                                  a step size a channel, before softplus
    y = selective_scan(z, x, B, C, dt, A, D, conv)    A = -exp(A_log); convolution, scan, skip and gate in one op
    out = out_proj(y)

One layer keeps the last K-1 inputs of the convolution, before the repeat, and a float32 state [D, N] per sequence.
"""

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from m1.model.configuration import M1Config
from m1.model.mixer import Mixer, initial_time_step_bias
from m1.ops import selective_scan, state_update


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
        z, x, B, C, dt = self.project(hidden_states)
        dt = self.dt_proj(dt)
        if padding_mask is not None:
            real = padding_mask.to(torch.bool).unsqueeze(-1)
            x, dt = x * real, dt.masked_fill(~real, -torch.inf)
        A = -torch.exp(self.A_log.float())
        conv_weight, conv_bias = self.conv1d()
        states = self.states_to_update(x, past_key_values)
        if states is not None:
            z, x, B, C, dt = (t[:, 0] for t in (z, x, B, C, dt))
            y = state_update(z, x, B, C, dt, A, self.D, conv_weight, conv_bias, *states)
            return self.out_proj(y.unsqueeze(1))
        window = state = None
        if past_key_values is not None:
            state = self.recurrent_state(past_key_values)
            window = self.conv_window(x, past_key_values)
        y, state = selective_scan(z, x, B, C, dt, A, self.D, conv_weight, conv_bias, seq_idx, window, state)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(y)
