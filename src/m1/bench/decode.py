"""`m1 bench decode`: measures how fast this engine and its peers generate whole batches.

Weights and prompts are random, the temperature is 1, and no sample stops early. The speed is the batch's new tokens,
divided by the time from the first prompt's submission to the last token.
"""

import statistics
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m1.bench.contest import begin
from m1.bench.decoders import OnRun, TimedRun, ignore, is_hybrid, make_model, measure_engines, quantization_of, start
from m1.bench.options import VLLM, Cell, DecodeOptions
from m1.bench.roofline import Limits
from m1.model.cache_layout import layer_bytes
from m1.model.configuration import ATTENTION, layer_kinds


def run(options: DecodeOptions, on_run: OnRun = ignore) -> dict[str, Any]:
    """Measures all engines. Returns the result that is printed and written."""
    limits, result = begin(options)
    return measure_engines(options, options.chosen_cells(), start, partial(rows_of, options, limits), result, on_run)


def rows_of(
    options: DecodeOptions, limits: Limits, cell: Cell, runs: dict[str, list[TimedRun]]
) -> list[dict[str, Any]]:
    """The rows of one batch: for each engine its median time, and its speed relative to its floor and to its peers."""
    batch, new = cell
    rows: list[dict[str, Any]] = []
    medians = {name: statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    for name, taken in runs.items():
        median, together = medians[name], taken[0].together
        seconds = [run.seconds for run in taken]
        row = {"name": name, "batch": batch, "new_tokens": new, "runs": len(taken), "seconds": median}
        row |= {"seconds_min": min(seconds), "seconds_max": max(seconds), "tokens_per_second": batch * new / median}
        facts: dict[str, Any] = {
            "together": min(together.values()),
            "peak_memory_bytes": taken[0].peak_bytes,
        }
        facts |= {"versions": taken[0].versions}
        row |= {key: value for key, value in facts.items() if value is not None}
        if name.startswith("ours") and not quantization_of(name):
            row["share_of_floor"] = floor_seconds(options, name, cell, together, limits) / median
        for peer in (*VLLM, "ours-transformer"):
            if peer in medians and name != peer:
                row[f"times_{peer}"] = medians[peer] / median
        rows.append(row)
    return rows


def floor_seconds(options: DecodeOptions, name: str, cell: Cell, together: dict[int, int], limits: Limits) -> float:
    """The minimum seconds of a batch: the prompts' matrix products, and one step per new token.

    Args:
        together: the contexts whose mean step counts, and how many samples of the batch a step decodes at each.
    """
    batch, new = cell
    model = meta_model(options.shape, options.torch_dtype, is_hybrid(name), options.prompt + new)
    layers = product_weights(model) - model.config.hidden_size * model.config.vocab_size
    steps = [
        sum(floor_of_step(model, rows, context, limits).values()) * batch / rows for context, rows in together.items()
    ]
    return new * statistics.mean(steps) + 2 * layers * batch * options.prompt / limits.gemm


@cache
def meta_model(shape: str, dtype: torch.dtype, hybrid: bool, max_model_len: int) -> PreTrainedModel:
    """`make_model` without memory for the weights. The rows are made after each run, with the same few models."""
    with torch.device("meta"):
        return make_model(shape, dtype, hybrid, max_model_len)


def floor_of_step(model: PreTrainedModel, batch: int, context: int, limits: Limits) -> dict[str, float]:
    """The minimum seconds of each part of a decode step (design §10) whose rows have `context` tokens.

    The weights are read or multiplied, whichever takes longer. Keys and values are read, states are read and written,
    and logits are read.
    """
    config, products, itemsize = model.config, product_weights(model), model.dtype.itemsize
    kept = Counter[str]()
    for kind in layer_kinds(config):
        kept["attention" if kind == ATTENTION else "states"] += layer_bytes(config, kind, context, model.dtype)
    return {
        "matrix products": max(products * itemsize / limits.copy, 2 * products * batch / limits.gemm),
        "attention": batch * kept["attention"] / limits.copy,
        "states": 2 * batch * kept["states"] / limits.copy,
        "draw of tokens": 4 * batch * config.vocab_size / limits.copy,
    }


def product_weights(model: PreTrainedModel) -> int:
    """Number of weights in all linear layers."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def plot_result(result: dict[str, Any], path: Path) -> None:
    """Draws tokens per second against the batch, and against the new tokens per sample.

    Each panel shows the cells that share the most frequent value of the other quantity.

    Raises:
        UserError: the file can't be written, or its format is unknown.
    """
    from matplotlib.figure import Figure

    from m1.plots import save_figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, common in zip(panels, ("batch", "new_tokens"), ("new_tokens", "batch"), strict=True):
        shared = statistics.mode(row[common] for row in result["rows"])
        for name in dict.fromkeys(row["name"] for row in result["rows"]):
            points = [
                (r[key], r["tokens_per_second"]) for r in result["rows"] if (r["name"], r[common]) == (name, shared)
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        of = f"{shared:,} new tokens" if key == "batch" else f"batch {shared}"
        axes.set(title=of, xlabel=key.replace("_", " "), ylabel="tokens per second")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
