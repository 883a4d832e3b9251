"""The Mamba-1 mixer with grouped heads: the layer that replaces an attention layer.

    z, x, B, C, dt[R] = in_proj(h)
    dt = dt_proj(dt)                                  one step size per channel, before softplus
    y = selective_scan(z, x, B, C, dt, A, D, conv)    A = -exp(A_log); convolution, scan, skip and gate in one op
    out = out_proj(y)

Per sequence, a layer caches the last K-1 inputs of the convolution (before the repeat) and a float32 state [D, N].
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from m1.model.configuration import M1Config
from m1.model.mixer import AlignedLinear, Constants, Mixer, PastState, SlotStates, initial_time_step_bias
from m1.ops import prefill_scan, selective_scan, state_update


class MambaActivations(NamedTuple):
    """The inputs of Mamba-1's scan that change per token. D = heads * head_dim, X = kv_heads * head_dim.

    Attributes:
        z: [..., D], the gate.
        x: [..., X], the inputs of the convolution.
        B: [..., X], how x enters the state.
        C: [..., D], how the state is read.
        dt: [..., D], step sizes before softplus.
    """

    z: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor


class MambaMixer(Mixer):
    """The Mamba-1 mixer with grouped heads, which replaces attention in a decoder layer: [b, T, H] -> [b, T, H].

    x and B have one head per KV head and are repeated to the query heads, as keys and values are in grouped-query
    attention. A cache holds the last K-1 inputs of the convolution and a float32 state [D, N] per sequence.

    Args:
        config: `M1Config` with mixer "mamba".
        layer_idx: number of the layer, its place in a cache.
    """

    def __init__(self, config: M1Config, layer_idx: int):
        super().__init__(config, layer_idx, conv_size=config.mamba_size)
        self.state_size = config.state_size
        self.dt_proj = AlignedLinear(config.time_step_rank, config.mamba_size)
        self.A_log = nn.Parameter(torch.empty(config.mamba_size, self.state_size))
        self.D = nn.Parameter(torch.empty(config.mamba_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as Mamba does: A_n = -n (S4D-real), D = 1, log-uniform step sizes."""
        super().reset_parameters()
        device = self.A_log.device
        init.copy_(self.A_log, torch.arange(1, self.state_size + 1, device=device).log().expand_as(self.A_log))
        init.ones_(self.D)
        init.copy_(self.dt_proj.bias, initial_time_step_bias(self.dt_proj.out_features, device))
        init.uniform_(self.dt_proj.weight, -(self.dt_proj.in_features**-0.5), self.dt_proj.in_features**-0.5)

    def activations(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> MambaActivations:
        """hidden_states [..., H] -> the scan's inputs (see `Mixer.activations`)."""
        z, x, B, C, dt = self.project(hidden_states)
        dt = self.dt_proj(dt)
        if padding_mask is not None:
            real = padding_mask.to(torch.bool).unsqueeze(-1)
            x, dt = x * real, dt.masked_fill(~real, -torch.inf)
        # under autocast a QK-norm's float32 gains make B and C float32, and would make the scan so
        return MambaActivations(z, x, B.to(z.dtype), C.to(z.dtype), dt)

    def conv_inputs(self, activations: MambaActivations) -> Tensor:
        """x, the convolution's inputs."""
        return activations.x

    def scan(
        self, activations: MambaActivations, constants: Constants, seq_idx: Tensor | None, state: PastState
    ) -> tuple[Tensor, Tensor]:
        """Runs whole sequences (see `Mixer.scan`)."""
        return selective_scan(*activations, *constants, seq_idx, *state)

    def step(
        self, activations: MambaActivations, constants: Constants, state: SlotStates, slots: Tensor | None = None
    ) -> Tensor:
        """Runs one token per row (see `Mixer.step`)."""
        return state_update(*activations, *constants, *state, slots)

    def prefill(
        self, activations: MambaActivations, constants: Constants, state: SlotStates, slots: Tensor, cu_seqlens: Tensor,
        max_length: int,
    ) -> Tensor:  # fmt: skip
        """Runs chunks of sequences (see `Mixer.prefill`)."""
        return prefill_scan(*activations, *constants, *state, slots, cu_seqlens, max_length)
