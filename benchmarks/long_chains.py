"""Hybrid and transformer of one size at the same measured seconds, on chains of thought of growing length.

    python benchmarks/long_chains.py train SEED    # recipes/long's models, in runs/long-chains/seed-SEED

Run again, it goes on where it was cut off.
"""

import dataclasses
import sys
from pathlib import Path

from m1.pipeline import finished, run_stage
from m1.recipe import ConvertStage, DistillStage, SFTStage, Stage, load_pipeline

ROOT = Path(__file__).parents[1]
SEEDS = range(3)


def train(seed: int) -> None:
    """The recipe's models from another draw of weights, data and their order."""
    pipeline, stages = load_pipeline(ROOT / "recipes/long")
    for stage in stages.values():
        if isinstance(stage, SFTStage | DistillStage | ConvertStage):
            stage = seeded(stage, pipeline.out, seed)
            if not finished(stage):
                run_stage(stage, resume=True)


def seeded(stage: Stage, recipe_out: str, seed: int) -> Stage:
    changes: dict = {}
    for field in ("out", "model", "teacher"):
        if path := getattr(stage, field, None):
            changes[field] = path.replace(recipe_out, str(folder(seed)))
    if isinstance(stage, ConvertStage):
        return dataclasses.replace(stage, seed=seed, **changes)
    data = dataclasses.replace(stage.data, seed=stage.data.seed + 1000 * seed)
    return dataclasses.replace(stage, data=data, trainer=stage.trainer | {"seed": seed}, **changes)


def folder(seed: int) -> Path:
    return ROOT / f"runs/long-chains/seed-{seed}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", seed]:
            train(int(seed))
        case _:
            sys.exit(__doc__)
