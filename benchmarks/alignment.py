"""Head alignment "attention" against "official" on the pocket recipe: distillation KL against steps, three seeds each.

    python benchmarks/alignment.py        # about 20 minutes on two cores; goes on where it was cut off

A seed is one teacher, one conversion and one order of training data, shared by the two alignments, which makes their
curves a pair. Every batch is seen once, so the training KL is that of unseen data. Writes results/alignment.json.
"""

import dataclasses
import json
from pathlib import Path

from m1.jsonl import read_jsonl, write_json
from m1.pipeline import finished, run_stage
from m1.recipe import Stage, load_pipeline

ALIGNMENTS = ("attention", "official")
SEEDS = range(8)
ROOT = Path(__file__).parents[1]


def main() -> None:
    _, stages = load_pipeline(ROOT / "recipes/pocket")
    curves = {
        alignment: {seed: distillation_curve(stages, alignment, seed) for seed in SEEDS} for alignment in ALIGNMENTS
    }
    steps = [row["step"] for row in curves[ALIGNMENTS[0]][SEEDS[0]]]
    result = {
        "recipe": "pocket",
        "steps": steps,
        "divergence": [next(k for k in ("forward_kl", "reverse_kl") if k in r) for r in curves["attention"][0]],
        "nats_per_token": {
            alignment: {seed: [kl_of(row) for row in rows] for seed, rows in by_seed.items()}
            for alignment, by_seed in curves.items()
        },
    }
    write_json(ROOT / "results/alignment.json", result)
    print(table(json.loads((ROOT / "results/alignment.json").read_text())))


def distillation_curve(stages: dict[str, Stage], alignment: str, seed: int) -> list[dict]:
    """The logged rows of one distillation; each is the mean over its logging interval."""
    folder = f"runs/alignment/seed-{seed}"
    teacher, converted = f"{folder}/teacher", f"{folder}/{alignment}/converted"

    def seeded(stage: Stage, **changes: object) -> Stage:
        data = dataclasses.replace(stage.data, seed=stage.data.seed + 1000 * seed)
        return dataclasses.replace(stage, data=data, trainer=stage.trainer | {"seed": seed}, **changes)

    run = [
        seeded(stages["teacher"], out=teacher),
        dataclasses.replace(stages["convert"], teacher=teacher, out=converted, head_alignment=alignment, seed=seed),
        seeded(stages["distill"], teacher=teacher, model=converted, out=f"{folder}/{alignment}/distilled"),
    ]
    for stage in run:
        if not finished(stage):
            run_stage(stage, resume=True)
    return [row for row in read_jsonl(Path(run[-1].out, "metrics.jsonl")) if "loss" in row]


def kl_of(row: dict) -> float:
    return round(row["forward_kl"] if "forward_kl" in row else row["reverse_kl"], 5)


def table(result: dict) -> str:
    """Markdown: mean over seeds at some steps, and in how many of the seeds "attention" is lower."""
    lines = ["| step | divergence | attention | official | attention lower |", "|---:|---|---:|---:|---:|"]
    curves = {a: list(result["nats_per_token"][a].values()) for a in ALIGNMENTS}
    for i, step in enumerate(result["steps"]):
        if step in (20, 50, 100, 200, 300, 400, 460):
            pairs = list(zip(*([curve[i] for curve in curves[a]] for a in ALIGNMENTS), strict=True))
            means = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
            lower = sum(a < o for a, o in pairs)
            lines.append(
                f"| {step} | {result['divergence'][i].replace('_', ' ')} | {means[0]:.4f} | {means[1]:.4f} "
                f"| {lower} of {len(pairs)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
