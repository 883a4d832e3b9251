"""What a model is made of: parameters and cache of every layer, and its cache against its teacher's at any context.

Needs the configuration only: parameters are counted on a model without weights.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedConfig

from m1.errors import UserError
from m1.model.cache_layout import layer_bytes, slot_bytes
from m1.model.checkpoint import load_config, model_without_weights
from m1.model.configuration import ATTENTION, MAMBA, layer_kinds
from m1.model.convert import TEACHERS

CONTEXTS = tuple(1024 * 2**i for i in range(0, 9, 2))  # 1k ... 256k tokens


@dataclass(frozen=True)
class Layer:
    kind: str  # "attention", "mamba" or "mamba2"
    mixer_parameters: int
    mlp_parameters: int  # with the norms
    cache_bytes: int  # of one sequence after `Summary.context` tokens


@dataclass(frozen=True)
class Summary:
    """A model, and the transformer it would be with attention in every layer: its teacher."""

    config: PreTrainedConfig
    teacher: PreTrainedConfig
    layers: list[Layer]
    parameters: int  # a tied head counted once
    teacher_parameters: int
    context: int  # tokens
    dtype: torch.dtype  # of weights and cached values

    def cache_bytes(self, context: int) -> int:
        return slot_bytes(self.config, context, self.dtype)

    def teacher_cache_bytes(self, context: int) -> int:
        return slot_bytes(self.teacher, context, self.dtype)

    @property
    def break_even(self) -> int | None:
        """The context from which on the cache is smaller than the teacher's; None where no layer is Mamba."""
        mamba = [layer for layer in self.layers if layer.kind != "attention"]
        if not mamba:
            return None
        a_token = layer_bytes(self.config, ATTENTION, 1, self.dtype)
        return mamba[0].cache_bytes // a_token + 1


def summarize(folder: str | Path, context: int = 4096) -> Summary:
    """Reads FOLDER/config.json of an M1 model or of a teacher.

    Args:
        context: tokens at which the layers' caches are given.

    Raises:
        UserError: a context below 1; as `checkpoint.load_config`.
    """
    folder = Path(folder)
    if context < 1:
        raise UserError(f"a context of {context} tokens: expected at least 1")
    config = load_config(folder, ("m1", *TEACHERS))
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
            Layer(
                kind=config.mixer if layer_kind == MAMBA else "attention",
                mixer_parameters=mixer_parameters,
                mlp_parameters=sum(p.numel() for p in layer.parameters()) - mixer_parameters,
                cache_bytes=layer_bytes(config, layer_kind, context, dtype),
            )
        )
    return Summary(config, teacher, layers, model.num_parameters(), teacher_parameters, context, dtype)


def print_summary(summary: Summary, console: Console) -> None:
    table = Table("layer", "kind", *_right("mixer parameters", "MLP and norms", f"cache at {summary.context:,} tokens"))
    for i, layer in enumerate(summary.layers):
        cells = (f"{layer.mixer_parameters:,}", f"{layer.mlp_parameters:,}", human_bytes(layer.cache_bytes))
        table.add_row(str(i), layer.kind, *cells)
    outside = summary.parameters - sum(layer.mixer_parameters + layer.mlp_parameters for layer in summary.layers)
    tied = " (tied)" if summary.config.tie_word_embeddings else ""
    table.add_section()
    table.add_row("", f"embedding, head{tied}", "", f"{outside:,}", "")
    total = human_bytes(summary.cache_bytes(summary.context))
    table.add_row("", "total", "", f"{summary.parameters:,}", total, style="bold")
    console.print(table)

    size = human_bytes(summary.parameters * summary.dtype.itemsize)
    dtype = str(summary.dtype).removeprefix("torch.")
    more = summary.parameters / summary.teacher_parameters - 1
    console.print(f"{size} of weights in {dtype}; {100 * more:+.1f} % parameters against attention in every layer")

    table = Table(*_right("context", "cache", "attention everywhere", "ratio"), title="cache of one sequence")
    for context in CONTEXTS:
        ours, teachers = summary.cache_bytes(context), summary.teacher_cache_bytes(context)
        table.add_row(f"{context:,}", human_bytes(ours), human_bytes(teachers), f"{ours / teachers:.3f}")
    console.print(table)
    if summary.break_even is not None:
        console.print(f"smaller from {summary.break_even:,} tokens on")


def plot_summary(summary: Summary, path: Path) -> None:
    """Cache bytes of one sequence against context, for the model and its teacher. UserError for an unknown format."""
    from matplotlib.figure import Figure

    from m1.plots import save_figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    contexts = [2**i for i in range(7, 19)]
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


def human_bytes(size: float) -> str:
    if size < 1024:
        return f"{size:,.0f} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if round(size, 1) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.1f} GiB"


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
