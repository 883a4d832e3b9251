"""Rotary position embedding, in which a row's frequencies depend on that row alone."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Rotary:
    """Computes cos and sin of token positions, for any rope type of transformers.

    transformers chooses the frequencies of rope types "longrope" and "dynamic" by the batch's last position. Here each
    row gets those that `generate` gives it alone. A prompt's depend on its length, a decoded token's on its position;
    keys in a cache keep theirs. With "dynamic" they never change, as the engine stays inside the model's context.

    Args:
        rotary: the model's rotary embedding.

    Attributes:
        switch: number of tokens beyond which "longrope" has other frequencies; None for other rope types.
    """

    def __init__(self, rotary: Any):
        self.scaling: float = rotary.attention_scaling
        self.frequencies: Tensor = rotary.original_inv_freq.float()  # [head_dim / 2]
        self.switch: int | None = None
        if rotary.rope_type == "longrope":
            self.switch = int(rotary.config.rope_parameters["original_max_position_embeddings"])
            scaled = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, self.frequencies.device, seq_len=self.switch + 1)
            self.long_frequencies: Tensor = scaled[0]

    def __call__(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cos and sin [rows, head_dim] in `dtype`.

        Args:
            positions: [rows] int64, from 0.
            lengths: [rows] or [1] int64, number of tokens whose frequencies a row takes.
        """
        frequencies = self.frequencies
        if self.switch is not None:
            frequencies = torch.where(lengths[:, None] > self.switch, self.long_frequencies, frequencies)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
