"""Which layers should stay attention, and which mixer should replace the others, at equal tokens.

    python benchmarks/layers.py [--recipe recipes/smollm2] [--steps 300] [--seeds 3] [--minutes 9] [--out FILE]

A variant is a choice of layers, a mixer and a seed, which is that of new weights and of the data's order:

    even      the recipe's own layers, evenly spaced
    cost      as many as `m1 rank-layers` ranks first: the cost of converting each layer alone, untrained
    greedy    as many as `m1 rank-layers --aligned` ranks first: what is left after alignment
    gates     those that `m1 choose-layers` chooses: what is left after training both in every layer

The stages are the recipe's, on those of its files that no stage makes. For each mixer and seed, the mixers of all
layers are aligned once. Each variant takes from there those that it needs, and is distilled for as many steps on the
same rows. The training that chooses with gates comes on top, a third of these steps. Then a variant is measured as by
benchmarks/smollm2.py, on the rows that the stages skip.

Writes results/layers-DEVICE.json after each variant. Run again, it resumes; rows of another machine or of other
options are dropped. With `--minutes` no variant begins that would take longer, as the longest one so far did.
"""

import argparse
import dataclasses
import gc
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from smollm2 import compare, tokenized, unseen
from transformers import PreTrainedModel

from m1.data_options import Data
from m1.jsonl import read_json, write_json
from m1.layer_choice import NONE, choose_layers
from m1.machine import describe_machine
from m1.model.checkpoint import load_model
from m1.ops.backend import default_device
from m1.pipeline import load_pipeline
from m1.recipe import ChooseLayersStage, RankLayersStage, Stage
from m1.runs import MANIFEST
from m1.train.choose_layers import RANKING

ROOT = Path(__file__).parents[1]
CHOICES, MIXERS = ("even", "cost", "greedy", "gates"), ("mamba", "mamba2")
RANKED_ROWS, RANKED_LENGTH = 16, 512  # rows of each file that the rankings are made on, and most tokens of a row
Stages = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/smollm2")
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; each runs all variants before the next")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no variant that would take longer")
    parser.add_argument("--out", type=Path, help="default: results/layers-DEVICE.json")
    options = parser.parse_args(argv)

    pipeline, stages = load_pipeline(options.recipe)
    device = default_device()
    result: dict[str, Any] = {
        "machine": describe_machine(torch.device(device)), "recipe": pipeline.name, "steps": options.steps,
        "rankings": {}, "variants": {},
    }  # fmt: skip
    out = options.out or ROOT / f"results/layers-{device}.json"
    if out.exists():
        earlier = read_json(out)
        if all(earlier.get(key) == result[key] for key in ("machine", "recipe", "steps")):
            result = earlier
    variants = list(itertools.product(range(options.seeds), MIXERS, CHOICES))
    begun, longest = time.monotonic(), max((row["seconds"] for row in result["variants"].values()), default=0.0)
    teacher, tokenizer = load_model(stages["convert"].teacher, device, dtype=dtype(device))
    texts = tokenized(unseen({}, stages["align"].data.skip), tokenizer)
    for place, (seed, mixer, choice) in enumerate(variants):
        name = f"{choice} {mixer} {seed}"
        if name in result["variants"]:
            continue
        started = time.monotonic()
        if started - begun + longest > 60 * options.minutes:
            print(f"{len(variants) - place} variants left: run this again", flush=True)
            return
        folder = f"{pipeline.out}-layers/{mixer}-{seed}"
        own = layers_of(stages["convert"], teacher)
        aligned, rankings = prepare(stages, folder, mixer, seed, len(own), options.steps)
        result["rankings"][f"{mixer} {seed}"] = rankings
        keep = own if choice == "even" else sorted(rankings[choice]["ranking"][: len(own)])
        row = measured(variant(stages, aligned, f"{folder}/{choice}", keep, options.steps, seed), teacher, texts)
        longest = max(longest, time.monotonic() - started)
        result["variants"][name] = row
        write_json(out, result)
        print(line(name, row), flush=True)


def prepare(stages: Stages, folder: str, mixer: str, seed: int, count: int, steps: int) -> tuple[Stage, dict[str, Any]]:
    """Aligns mixers of all layers and ranks the layers. Returns the stage of the aligned model, and the rankings."""
    data = own_files(stages)
    converted = dataclasses.replace(
        stages["convert"], keep_attention=NONE, attention_ratio=None, mixer=mixer, seed=seed, out=f"{folder}/converted"
    )
    aligned = seeded(stages["align"], seed, model=converted.out, out=f"{folder}/aligned", data=data)
    sample: dict[str, Any] = {
        "teacher": converted.teacher, "mixer": mixer, "head_alignment": converted.head_alignment, "seed": seed,
        "data": dataclasses.replace(data, limit=RANKED_ROWS), "max_length": RANKED_LENGTH,
        "batch_size": RANKED_ROWS * len(data.sources),
    }  # fmt: skip
    ranked = {
        "cost": RankLayersStage(out=f"{folder}/cost.json", **sample),
        "greedy": RankLayersStage(out=f"{folder}/greedy.json", aligned=aligned.out, **sample),
    }
    trained = stages["distill"].trainer | {"seed": seed, "max_steps": max(steps // 3, 1)}
    gates = ChooseLayersStage(
        model=aligned.out, teacher=converted.teacher, out=f"{folder}/gates-{steps}", keep=count, data=data,
        mixer_lr_scale=stages["distill"].mixer_lr_scale, trainer=trained,
    )  # fmt: skip
    run(converted, aligned, *ranked.values(), gates)
    found = {choice: read_json(stage.out) for choice, stage in ranked.items()}
    found["gates"] = read_json(Path(gates.out, RANKING))
    shown = ("ranking", "kl", "shares")
    return aligned, {choice: {key: r[key] for key in shown if key in r} for choice, r in found.items()}


def layers_of(convert: Any, teacher: PreTrainedModel) -> list[int]:
    """The layers that stay attention in the recipe."""
    return choose_layers(teacher.config.num_hidden_layers, convert.keep_attention, convert.attention_ratio)


def variant(stages: Stages, aligned: Any, folder: str, keep: list[int], steps: int, seed: int) -> Stage:
    """Converts with the aligned mixers and distils. Returns the stage of the distilled model."""
    mixer = read_json(Path(aligned.model, "config.json"))["mixer"]
    converted = dataclasses.replace(
        stages["convert"], keep_attention=keep, attention_ratio=None, mixer=mixer, seed=seed, aligned=aligned.out,
        out=f"{folder}/converted-{'-'.join(map(str, keep))}",
    )  # fmt: skip
    recipe = stages["distill"]
    distilled = seeded(
        recipe, seed, model=converted.out, out=f"{folder}/distilled-{steps}", data=aligned.data,
        forward_kl_steps=recipe.forward_kl_steps * steps // recipe.trainer["max_steps"],
    )  # fmt: skip
    distilled.trainer["max_steps"] = steps
    run(converted, distilled)
    return distilled


def own_files(stages: Stages) -> Data:
    """The data of the recipe's align stage, without the files that one of its stages makes."""
    made, data = {stage.out for stage in stages.values()}, stages["align"].data
    return dataclasses.replace(data, path=[path for path in data.sources if path not in made])


def seeded(stage: Any, seed: int, **changes: Any) -> Any:
    return dataclasses.replace(stage, trainer=stage.trainer | {"seed": seed}, **changes)


def run(*stages: Stage) -> None:
    """Runs what isn't finished, and frees what it used."""
    for stage in stages:
        if not stage.finished():
            stage.run(resume=True)
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(stage: Stage, teacher: PreTrainedModel, texts: dict[str, Any]) -> dict[str, Any]:
    """A variant's row: its layers, the seconds of its distillation, and its numbers on each text."""
    model, _ = load_model(stage.out, str(teacher.device), dtype=teacher.dtype)
    found = {text: compare(model.eval(), teacher.eval(), rows) for text, rows in texts.items()}
    seconds = read_json(Path(stage.out, MANIFEST))["seconds"]
    return {"layers": model.config.attention_layers, "seconds": seconds, "texts": found}


def line(name: str, row: dict[str, Any]) -> str:
    numbers = [f"{text}: KL {n['kl']:.4f}, perplexity {n['perplexity']:.3f}" for text, n in row["texts"].items()]
    return f"{name}: layers {','.join(map(str, row['layers']))}; {'; '.join(numbers)}; {row['seconds']:.0f} s"


def dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


if __name__ == "__main__":
    main()
