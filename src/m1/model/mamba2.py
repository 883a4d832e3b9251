"""The Mamba-2 mixer with grouped heads: one decay per head, and states as wide as a head (the released `mamba2` code).

    z, x, B, C, dt[heads] = in_proj(h)
    x, B, C = silu(causal_conv(x | B | C))            per channel, before any repeat
    dt = softplus(dt + dt_bias)                       one step size per head
    y = ssd(x, dt, A, B, C, D)                        A = -exp(A_log); KV head k serves heads k * rep ... as in GQA
    out = out_proj(norm(y * silu(z)))                 RMSNorm over each head

Per sequence, a layer caches the last K-1 inputs of the convolution and a float32 state [heads, head_dim, head_dim].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from m1.model.configuration import M1Config
from m1.model.mixer import Constants, HeadRMSNorm, Mixer, PastState, SlotStates, initial_time_step_bias
from m1.ops import causal_conv, prefill_ssd, ssd, ssd_update

A_RANGE = (1.0, 16.0)  # initial -A, uniform (Mamba-2)
GATED_NORM_EPS = 1e-5  # a constant of the released code


class Mamba2Activations(NamedTuple):
    """The inputs of Mamba-2's scan that change per token. D = heads * head_dim, X = kv_heads * head_dim.

    Attributes:
        z: [..., D], the gate.
        xBC: [..., X + X + D], x | B | C, the inputs of the convolution.
        dt: [..., heads] float32, step sizes before softplus, with their bias.
    """

    z: Tensor
    xBC: Tensor
    dt: Tensor


class Mamba2Mixer(Mixer):
    """The Mamba-2 mixer with grouped heads, which replaces attention in a decoder layer: [b, T, H] -> [b, T, H].

    Each head has one decay and a state matrix. KV head k of x and B serves rep = heads / kv_heads query heads, as in
    grouped-query attention. A cache holds the last K-1 inputs of the convolution and a float32 state
    [heads, head_dim, head_dim] per sequence.

    Args:
        config: `M1Config` with mixer "mamba2".
        layer_idx: number of the layer, its place in a cache.
    """

    def __init__(self, config: M1Config, layer_idx: int):
        conv_widths = [config.mamba_kv_size, config.mamba_kv_size, config.mamba_size]
        super().__init__(config, layer_idx, conv_size=sum(conv_widths))
        self.conv_widths = conv_widths
        self.head_dim = config.head_dim
        self.dt_bias = nn.Parameter(torch.empty(config.num_attention_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_attention_heads))
        self.D = nn.Parameter(torch.empty(config.num_attention_heads))
        self.norm = HeadRMSNorm(config.mamba_size, config.head_dim, GATED_NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as Mamba-2 does: -A uniform in A_RANGE, D = 1, log-uniform step sizes."""
        super().reset_parameters()
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*A_RANGE).log())
        init.ones_(self.D)
        init.copy_(self.dt_bias, initial_time_step_bias(self.dt_bias.numel(), self.dt_bias.device))

    def activations(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Mamba2Activations:
        """hidden_states [..., H] -> the scan's inputs (see `Mixer.activations`)."""
        z, x, B, C, dt = self.project(hidden_states)
        xBC = torch.cat([x, B, C], dim=-1)
        dt = dt.float() + self.dt_bias.float()
        if padding_mask is not None:
            real = padding_mask.to(torch.bool).unsqueeze(-1)
            xBC, dt = xBC * real, dt.masked_fill(~real, -torch.inf)
        return Mamba2Activations(z, xBC, dt)

    def conv_inputs(self, activations: Mamba2Activations) -> Tensor:
        """x | B | C, the convolution's inputs."""
        return activations.xBC

    def scan(
        self, activations: Mamba2Activations, constants: Constants, seq_idx: Tensor | None, state: PastState
    ) -> tuple[Tensor, Tensor]:
        """Runs whole sequences (see `Mixer.scan`)."""
        z, xBC, dt = activations
        A, D, conv_weight, conv_bias = constants
        xBC = xBC.to(torch.promote_types(xBC.dtype, conv_weight.dtype))  # float32 weights: rounded once, at the end
        xBC = F.silu(causal_conv(xBC, conv_weight, conv_bias, seq_idx, state.conv))
        x, B, C = (t.unflatten(-1, (-1, self.head_dim)) for t in xBC.split(self.conv_widths, dim=-1))
        y, ssm_state = ssd(x, F.softplus(dt), A, B, C, D, seq_idx, state.ssm)
        return self.norm(y.flatten(-2) * F.silu(z)).to(z.dtype), ssm_state

    def step(
        self, activations: Mamba2Activations, constants: Constants, state: SlotStates, slots: Tensor | None = None
    ) -> Tensor:
        """Runs one token per row (see `Mixer.step`)."""
        z, xBC, dt = activations
        y = ssd_update(xBC, dt, *constants, *state, slots)
        return self.norm(y.flatten(-2) * F.silu(z))

    def prefill(
        self, activations: Mamba2Activations, constants: Constants, state: SlotStates, slots: Tensor,
        cu_seqlens: Tensor, max_length: int,
    ) -> Tensor:  # fmt: skip
        """Runs chunks of sequences (see `Mixer.prefill`)."""
        z, xBC, dt = activations
        y = prefill_ssd(xBC, dt, *constants, *state, slots, cu_seqlens, max_length)
        return self.norm(y.flatten(-2) * F.silu(z)).to(z.dtype)
