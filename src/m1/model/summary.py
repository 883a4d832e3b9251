"""Size of a model: parameters and cache of each layer, and its cache against its teacher's at any context.

Only the configuration is read: parameters are counted on a model without weights.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.model.cache_layout import layer_bytes, slot_bytes
from m1.model.checkpoint import load_config, model_without_weights
from m1.model.configuration import ATTENTION, MAMBA, MODEL_TYPES, layer_kinds

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class LayerSummary:
    """Size of one layer of a model, part of a `Summary`.

    Attributes:
        kind: "attention", "mamba" or "mamba2".
        mixer_parameters: number of parameters of the attention or Mamba mixer.
        mlp_parameters: number of parameters of the MLP and the norms.
        cache_bytes: bytes of one sequence's cache after `Summary.context` tokens.
    """

    kind: str
    mixer_parameters: int
    mlp_parameters: int
    cache_bytes: int


@dataclass(frozen=True)
class Summary:
    """Size of a model, compared with its teacher: the same model with attention in every layer.

    Attributes:
        config: the model's configuration.
        teacher: the teacher's configuration.
        layers: size of each layer.
        parameters: number of parameters; a tied head is counted once.
        teacher_parameters: number of the teacher's parameters.
        context: number of tokens at which `layers` give the cache.
        dtype: of weights and cached values.
    """

    config: PreTrainedConfig
    teacher: PreTrainedConfig
    layers: list[LayerSummary]
    parameters: int
    teacher_parameters: int
    context: int
    dtype: torch.dtype

    def cache_bytes(self, context: int) -> int:
        """Bytes of one sequence's cache after `context` tokens."""
        return slot_bytes(self.config, context, self.dtype)

    def teacher_cache_bytes(self, context: int) -> int:
        """Bytes of one sequence's cache in the teacher after `context` tokens."""
        return slot_bytes(self.teacher, context, self.dtype)

    def contexts(self, first: int, factor: int) -> list[int]:
        """The contexts first, first * factor, ... below the model's context, and that."""
        longest, lengths = self.config.max_position_embeddings, [first]
        while lengths[-1] * factor < longest:
            lengths.append(lengths[-1] * factor)
        return [*(length for length in lengths if length < longest), longest]

    @property
    def break_even(self) -> int | None:
        """The smallest context, in tokens, at which the cache is smaller than the teacher's; None without Mamba."""
        mamba = [layer for layer in self.layers if layer.kind != "attention"]
        if not mamba:
            return None
        a_token = layer_bytes(self.config, ATTENTION, 1, self.dtype)
        return mamba[0].cache_bytes // a_token + 1


def summarize(folder: str | Path, context: int | None = None) -> Summary:
    """Summarizes the M1 model or teacher described by FOLDER/config.json.

    Args:
        folder: a checkpoint's folder or Hub id (`checkpoint_folder`); its config.json is enough.
        context: number of tokens at which the layers' caches are given. When None, the model's context, but at most
            4096.

    Raises:
        UserError: a context below 1 or longer than the model's; as `checkpoint_folder` and `checkpoint.load_config`.
    """
    folder = checkpoint_folder(folder, config_only=True)
    config = load_config(folder, MODEL_TYPES)
    longest = config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= context <= longest:
        raise UserError(f"a context of {context} tokens: expected 1 to {longest}, the model's context")
    teacher = copy.deepcopy(config)
    if config.model_type == "m1":
        teacher.layer_types = [ATTENTION] * config.num_hidden_layers
    dtype = config.dtype or torch.float32
    model = model_without_weights(config, folder)
    teacher_parameters = model_without_weights(teacher, folder).num_parameters()
    layers = []
    for layer, layer_kind in zip(model.model.layers, layer_kinds(config), strict=True):
        mixer = layer.mamba if layer_kind == MAMBA else layer.self_attn
        mixer_parameters = sum(p.numel() for p in mixer.parameters())
        layers.append(
            LayerSummary(
                kind=config.mixer if layer_kind == MAMBA else "attention",
                mixer_parameters=mixer_parameters,
                mlp_parameters=sum(p.numel() for p in layer.parameters()) - mixer_parameters,
                cache_bytes=layer_bytes(config, layer_kind, context, dtype),
            )
        )
    return Summary(config, teacher, layers, model.num_parameters(), teacher_parameters, context, dtype)


def plot_summary(summary: Summary, path: Path) -> None:
    """Cache bytes of one sequence against context, for the model and its teacher. UserError for an unknown format."""
    from matplotlib.figure import Figure

    from m1.plots import save_figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    contexts = summary.contexts(128, 2)
    curves = {"attention in every layer": summary.teacher_cache_bytes}
    kept = sum(layer.kind == "attention" for layer in summary.layers)
    if kept < len(summary.layers):
        curves[f"attention in {kept} of {len(summary.layers)} layers"] = summary.cache_bytes
    for label, size in curves.items():
        axes.plot(contexts, [size(context) / 2**20 for context in contexts], marker=".", label=label)
    axes.set(yscale="log", xlabel="context, tokens", ylabel="cache of one sequence, MiB")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
