"""What makes training steps fast without changing their results: compiled layers, and packed rows without masks."""

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from m1.model.packed_attention import attend_without_mask

Compile = Literal["auto", True, False]
VARIANTS = 64  # graphs per function: kinds of layers x static and dynamic lengths x packed or padded x train or eval


def speed_up(model: PreTrainedModel, compile: Compile = "auto") -> None:
    """Prepares a model for fast training steps, in place.

    Args:
        model: a causal LM of M1 or transformers.
        compile: whether to compile its layers. "auto" compiles on a GPU only: on a CPU it takes longer than it saves.
    """
    attend_without_mask(model)
    if compile is True or (compile == "auto" and model.device.type == "cuda"):
        compile_layers(model)


def compile_layers(model: PreTrainedModel, **options: Any) -> None:
    """Compiles each decoder layer in place, by torch.compile. Parameter names and checkpoints stay as they are.

    Layers of a kind share their graph, so a deep model compiles as fast as a shallow one.

    Args:
        model: a causal LM of M1 or transformers.
        options: arguments of torch.compile.
    """
    torch._dynamo.config.optimize_ddp = False  # it cuts graphs at DDP's buckets, and a layer is small enough
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in model.get_decoder().layers:
        layer.compile(**options)
