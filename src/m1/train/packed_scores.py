"""Scores completions in a packed row: the real tokens of a padded batch follow one another, so padding costs nothing.

In RL, padding is more than half of a batch of short problems and long answers.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from m1.model.configuration import MODEL_TYPES
from m1.model.packed_attention import PACKED
from m1.ops.varlen_attention import is_one_kernel


def can_pack(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a model takes packed rows without a mask of all pairs of tokens, and is faster on them.

    Args:
        model: a causal LM.
        dtype: what it computes in.
    """
    config, device = model.config, model.device
    if config.model_type not in MODEL_TYPES:
        return False
    attention = config._attn_implementation or ""
    if attention != PACKED:
        return "flash" in attention
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return not slides and (device.type == "cpu" or is_one_kernel(device, dtype))


def packed_scores(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any
) -> SimpleNamespace:
    """Calls a model with TRL's fused head on padded rows, and runs it on one packed row.

    Each token that has a label is scored from the tokens before it.

    Args:
        model: returns `log_probs` and `entropy` of labels; it may be wrapped.
        input_ids: [b, T].
        attention_mask: [b, T], zero at padding, which may be left and right.
        labels: [b, T], -100 where there is no score. A row's first real token must have none.
        options: further arguments of the model.

    Returns:
        Its `log_probs` and `entropy` of labels 1 to T-1: [b, T-1] each, zero without a label.
    """
    real = attention_mask.bool()
    positions = (real.cumsum(dim=1) - 1)[real]
    row = {"input_ids": input_ids[real], "position_ids": positions, "labels": labels[real]}
    scores = model(**{name: values.unsqueeze(0) for name, values in row.items()}, **options)

    def padded(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(real.shape).masked_scatter(real, F.pad(values[0], (1, 0)))[:, 1:]

    return SimpleNamespace(log_probs=padded(scores.log_probs), entropy=padded(scores.entropy))
