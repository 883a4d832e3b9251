"""Rotary position embedding from a table, in which a row's frequencies depend on that row alone."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from m1.ops import embedding


class Rotary:
    """Gives cos and sin of token positions, for any rope type of transformers.

    transformers chooses the frequencies of rope types "longrope" and "dynamic" by the batch's last position. Here each
    row gets those that `generate` gives it alone. A prompt's depend on its length, a decoded token's on its position;
    keys in a cache keep theirs. With "dynamic" they never change, as the engine stays inside the model's context.

    Args:
        rotary: the model's rotary embedding.
        length: number of positions.
        dtype: of the results.

    Attributes:
        switch: number of tokens beyond which "longrope" has other frequencies; None for other rope types.
    """

    def __init__(self, rotary: Any, length: int, dtype: torch.dtype):
        frequencies: Tensor = rotary.original_inv_freq.float()  # [head_dim / 2]
        scaling: float = rotary.attention_scaling

        def table(frequencies: Tensor) -> tuple[Tensor, Tensor]:
            """cos and sin of all positions, [length, head_dim] each."""
            angles = torch.arange(length, device=frequencies.device)[:, None].float() * frequencies
            angles = torch.cat([angles, angles], dim=-1)
            return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

        self._table, self.switch = table(frequencies), None
        if rotary.rope_type == "longrope":
            self.switch = int(rotary.config.rope_parameters["original_max_position_embeddings"])
            scaled = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, frequencies.device, seq_len=self.switch + 1)
            self._long_table = table(scaled[0])

    def __call__(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin [rows, head_dim].

        Args:
            positions: [rows] int64, from 0.
            lengths: [rows] int64, number of tokens whose frequencies a row takes.
        """
        cos, sin = (embedding(positions, values) for values in self._table)
        if self.switch is None:
            return cos, sin
        is_long = lengths[:, None] > self.switch
        long_cos, long_sin = (embedding(positions, values) for values in self._long_table)
        return torch.where(is_long, long_cos, cos), torch.where(is_long, long_sin, sin)
