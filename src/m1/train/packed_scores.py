"""Scores completions in a packed row: the real tokens of a padded batch follow one another, so padding costs nothing.

In RL, padding is more than half of a batch of short problems and long answers.
"""

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from m1.model.configuration import TEACHERS
from m1.model.packed_attention import PACKED


def can_pack(config: PretrainedConfig) -> bool:
    """Whether a model's attention takes packed rows without a mask of all pairs of tokens."""
    attention = config._attn_implementation or ""
    return config.model_type in ("m1", *TEACHERS) and (attention == PACKED or "flash" in attention)


class PackedScores:
    """A model with TRL's fused head, called with padded rows and run on one packed row.

    Args:
        model: returns `log_probs` and `entropy` of labels; it may be wrapped.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any) -> Any:
        """Scores each token that has a label from the tokens before it.

        Args:
            input_ids: [b, T].
            attention_mask: [b, T], zero at padding, which may be left and right.
            labels: [b, T], -100 where there is no score. A row's first real token has none.
            options: further arguments of the model.

        Returns:
            Its `log_probs` and `entropy` for the labels behind the first: [b, T-1] each, zero without a label.
        """
        real = attention_mask.bool()
        positions = (real.cumsum(dim=1) - 1)[real]
        row = {"input_ids": input_ids[real], "position_ids": positions, "labels": labels[real]}
        scores = self.model(**{name: values.unsqueeze(0) for name, values in row.items()}, **options)

        def padded(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(real.shape).masked_scatter(real, F.pad(values[0], (1, 0)))[:, 1:]

        return SimpleNamespace(log_probs=padded(scores.log_probs), entropy=padded(scores.entropy))
