"""The first steps of a recipe's training stages on one GPU, in their full width: results/first-steps-DEVICE.json.

    python benchmarks/first_steps.py                            # recipes/llama3.2-3b with 9 of 28 layers; minutes
    python benchmarks/first_steps.py --device cpu --shape tiny --layers 4 --longest 512

The teacher has random weights, fewer layers and the byte tokenizer. The stages keep their recipe's settings, lengths of
rows and completions included, but train on files of the folder `$M1_DATA`, with `--global-batch` rows a step. In RL
that many completions are an update, and there is one generation, of two updates. The file is written after each stage.

    losses              of the steps
    tokens_per_second   of the last step
    memory_gib          the most that was allocated
    planned_gib         what `m1 pipeline --dry-run` says of the same stage
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from m1.bench.models import SHAPES
from m1.jsonl import read_jsonl, write_json
from m1.machine import describe_machine
from m1.model.tokenizer import byte_tokenizer
from m1.ops.backend import default_device
from m1.pipeline import load_pipeline
from m1.recipe import ConvertStage, GRPOStage, Stage, TaughtStage, TrainedStage
from m1.train.plan import CARDS, GIB, plan

ROOT = Path(__file__).parents[1]
SAVES = ("eval_strategy", "eval_steps", "save_steps")  # of whole trainings
LENGTHS = {"max_length", "max_completion_length"}
SETTINGS = ("shape", "layers", "steps", "global_batch", "longest", "data", "card")
CONTEXT = 65_536


def shortened(stage: Stage, folder: Path, options: argparse.Namespace) -> Stage:
    """The stage with its files in FOLDER, fewer layers and steps, and shorter rows if that is asked for."""
    named = {key: getattr(stage, key) for key in ("out", "model", "teacher") if hasattr(stage, key)}
    changes: dict[str, Any] = {key: str(folder / Path(name).name) for key, name in named.items()}
    if isinstance(stage, ConvertStage):
        kept = [layer for layer in stage.keep_attention or () if int(layer) < options.layers]
        return replace(stage, keep_attention=kept, **changes)
    assert isinstance(stage, TrainedStage)
    given = {key: value for key, value in stage.trainer.items() if key not in SAVES}
    given |= {key: min(given[key], options.longest) for key in LENGTHS & {*given}}
    given |= {"max_steps": options.steps, "logging_steps": 1, "report_to": []}
    if isinstance(stage, GRPOStage):
        given |= {"generation_batch_size": 2 * options.global_batch, "max_steps": 2}
    paths = [str(Path(os.environ["M1_DATA"], name)) for name in options.data]
    changes |= {"data": replace(stage.data, path=paths, exclude=[]), "trainer": given, "eval_rows": 0}
    return replace(stage, global_batch=options.global_batch, **changes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "llama3.2-3b")
    parser.add_argument("--shape", choices=SHAPES, default="m1-3b")
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--longest", type=int, default=CONTEXT, help="maximum number of tokens of rows and completions")
    parser.add_argument("--data", nargs="+", default=["math_train.jsonl"], help="files in $M1_DATA")
    parser.add_argument("--card", choices=CARDS, default="h100", help="for the plan")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--out", type=Path, help="default: results/first-steps-DEVICE.json")
    options = parser.parse_args(argv)

    if "M1_DATA" not in os.environ:
        parser.error("set M1_DATA to the folder that has the data")
    out = options.out or ROOT / "results" / f"first-steps-{options.device}.json"
    result: dict[str, Any] = {
        "machine": describe_machine(torch.device(options.device)), "recipe": options.recipe.name,
        "settings": {key: getattr(options, key) for key in SETTINGS}, "stages": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _, stages = load_pipeline(options.recipe)
        stages = {
            name: shortened(stage, Path(folder), options)
            for name, stage in stages.items()
            if isinstance(stage, ConvertStage | TrainedStage)
        }
        save_teacher(Path(next(stage.teacher for stage in stages.values() if isinstance(stage, TaughtStage))), options)
        planned = {p.name: sum(p.memory.values()) / GIB for p in plan(stages, 1, options.card, 0.3)}
        for name, stage in stages.items():
            if options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            stage.run()
            if stage.trained:
                result["stages"][name] = measured(stage) | {"planned_gib": planned[name]}
                print(name, json.dumps(result["stages"][name]), flush=True)
                write_json(out, result)


def save_teacher(folder: Path, options: argparse.Namespace) -> None:
    """A transformer of the shape with random weights and fewer layers."""
    sizes = SHAPES[options.shape] | {"num_hidden_layers": options.layers, "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in sizes.items() if key != "attention"}))
    model.bfloat16().save_pretrained(folder)
    byte_tokenizer(CONTEXT).save_pretrained(folder)


def measured(stage: Stage) -> dict[str, Any]:
    """The numbers of a stage that has run."""
    rows = [row for row in read_jsonl(Path(stage.out, "metrics.jsonl")) if "loss" in row]
    numbers = {key: rows[-1][key] for key in ("tokens_per_second", "mfu", "memory_gib")}
    drift = [row["sampling/k3"] for row in rows if "sampling/k3" in row]
    return {"losses": [row["loss"] for row in rows]} | numbers | ({"k3": max(drift)} if drift else {})


if __name__ == "__main__":
    main()
