"""Hybrid and transformer of one size at the same measured seconds, on chains of thought of growing length.

    python benchmarks/long_chains.py train SEED    # recipes/long's models, in runs/long-chains/seed-SEED: 0, 1 and 2
    python benchmarks/long_chains.py measure       # both models' votes at each length: results/long-chains.json, .png
    python benchmarks/long_chains.py vllm          # the first transformer, in this engine and in vLLM (`make peers`):
                                                   # results/long-chains-vllm.json

Run again, all resume. Training takes half an hour per seed on two cores, 5 minutes for all three
on an H100; measuring takes half an hour and wants a quiet machine.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from conversion import seeded
from matplotlib.figure import Figure

from m1.cli.render import progress_bar
from m1.evaluation.curves import accuracy_curves, draw_accuracy
from m1.evaluation.time_budget import measure_budgets
from m1.grading import Grader
from m1.jsonl import read_jsonl, write_json
from m1.machine import describe_machine
from m1.model.checkpoint import load_model
from m1.peers.vllm_client import version
from m1.pipeline import load_pipeline
from m1.plots import save_figure
from m1.recipe import BudgetSettings, ConvertStage, DistillStage, SFTStage, Stage
from m1.tasks.benchmarks import load_task
from m1.tasks.chain import ChainSizes
from m1.tasks.problem import Problem

ROOT = Path(__file__).parents[1]
SEEDS = range(3)
MAX_NUM_SEQS = 32
PROBLEMS, PROBLEMS_FOR_VLLM = 16, 4
# Steps of a chain, and seconds a problem may take: about twice what the transformer's first 32 samples take.
BUDGETS = {2: 0.12, 4: 0.24, 8: 0.4, 16: 0.8, 32: 1.8, 64: 4.5, 128: 12.0}
MODELS = {"transformer": "teacher", "hybrid": "distilled"}


def train(seed: int) -> None:
    """The recipe's models from another draw of weights, data and their order."""
    pipeline, stages = load_pipeline(ROOT / "recipes/long")
    for stage in stages.values():
        if isinstance(stage, SFTStage | DistillStage | ConvertStage):
            stage = moved(stage, pipeline.out, seed)
            if not stage.finished():
                stage.run(resume=True)


def moved(stage: Stage, recipe_out: str, seed: int) -> Stage:
    """The stage with another seed, in that seed's folder."""
    changes: dict = {}
    for field in ("out", "model", "teacher"):
        if path := getattr(stage, field, None):
            changes[field] = path.replace(recipe_out, str(folder(seed)))
    if isinstance(stage, ConvertStage):
        return dataclasses.replace(stage, seed=seed, **changes)
    return seeded(stage, seed, **changes)


def measure() -> None:
    """Every length with every seed's models: a problem has a run with each."""
    result = about(PROBLEMS) | {"seeds": len(SEEDS), "lengths": {}}
    for steps, seconds in BUDGETS.items():
        problems = problems_of(steps, PROBLEMS)
        runs = []
        for seed in SEEDS:
            models = {name: folder(seed) / stage for name, stage in MODELS.items()}
            out = folder(seed) / f"budget-{steps}"
            runs += [{**run, "seed": seed} for run in runs_of(models, problems, steps, seconds, out)]
        with Grader() as grader:
            measured = accuracy_curves(runs, list(MODELS), problems, seconds, grader)
        result["lengths"][str(steps)] = {"seconds": seconds, **measured}
    write_json(ROOT / "results/long-chains.json", result)
    save_figure(draw(result), ROOT / "results/long-chains.png")


def vllm() -> None:
    """vLLM is slower here, so it has twice the time."""
    result = about(PROBLEMS_FOR_VLLM) | {"vllm": version(), "served": True, "lengths": {}}
    for steps, seconds in BUDGETS.items():
        problems = problems_of(steps, PROBLEMS_FOR_VLLM)
        models = {"transformer": folder(0) / MODELS["transformer"]}
        out = folder(0) / f"vllm-{steps}"
        runs = runs_of(models, problems, steps, 2 * seconds, out, vllm=["transformer"])
        with Grader() as grader:
            measured = accuracy_curves(runs, ["transformer", "transformer, vLLM"], problems, 2 * seconds, grader)
        result["lengths"][str(steps)] = {"seconds": 2 * seconds, **measured}
    write_json(ROOT / "results/long-chains-vllm.json", result)


def about(problems: int) -> dict:
    return {"machine": describe_machine(torch.device("cpu")), "max_num_seqs": MAX_NUM_SEQS, "problems": problems}


def problems_of(steps: int, count: int) -> list[Problem]:
    return load_task("chain", None, count, ChainSizes(min_steps=steps, max_steps=steps, period=8))


def runs_of(
    models: dict[str, Path], problems: list[Problem], steps: int, seconds: float, out: Path, vllm: Sequence[str] = ()
) -> list[dict]:
    options = {"max_new_tokens": 10 * steps + 32, "temperature": 1.0, "max_num_seqs": MAX_NUM_SEQS}
    settings = BudgetSettings(seconds=seconds, seeds=1, **options)
    loaded = {name: load_model(path) for name, path in models.items()}
    loaded = {name: (model.to("cpu"), tokenizer) for name, (model, tokenizer) in loaded.items()}
    with progress_bar(f"{out.parent.name}, {out.name}", "runs") as on_progress:
        measure_budgets(loaded, problems, settings, out, vllm, on_progress)
    return list(read_jsonl(out / "runs.jsonl"))


def draw(result: dict) -> Figure:
    """Accuracy against seconds at each length."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, -(-len(result["lengths"]) // 2)).flatten()
    for axes in panels[len(result["lengths"]) :]:
        axes.set_axis_off()
    for axes, (steps, measured) in zip(panels, result["lengths"].items(), strict=False):
        draw_accuracy(axes, measured["models"])
        tokens = measured["models"]["hybrid"]["tokens_per_sample"]
        axes.set_title(f"{steps} steps, {tokens:,.0f} tokens", fontsize="medium")
    return figure


def folder(seed: int) -> Path:
    return ROOT / f"runs/long-chains/seed-{seed}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", seed]:
            train(int(seed))
        case ["measure"]:
            measure()
        case ["vllm"]:
            vllm()
        case _:
            sys.exit(__doc__)
