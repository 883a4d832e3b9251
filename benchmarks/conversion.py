"""How a conversion should be made, measured by how fast distillation mends it (the pocket model, short chains).

    python benchmarks/conversion.py alignment    # head alignment "attention" against "official": results/alignment.json
    python benchmarks/conversion.py layers       # every choice of two kept layers, against `m1 rank-layers`:
                                                 # results/layer_choice.json

On two cores about 75 and 25 minutes; run again, they resume. A seed is one teacher, one draw of
the conversion's new parameters and one order of training data, shared by all that is compared. Every batch is seen
once, so the training KL is that of unseen data. Both print the tables that stand in docs/training.md.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

from m1.data_options import Data
from m1.jsonl import read_jsonl, write_json
from m1.pipeline import load_pipeline
from m1.recipe import DistillStage, RankLayersStage, SFTStage, Stage

ROOT = Path(__file__).parents[1]
ALIGNMENTS = ("attention", "official")
# The recipe's own heads are two groups of 16 states wide; real checkpoints' (head_dim 128) are eight.
ALIGNMENT_SEEDS = {32: range(8), 128: range(3)}
STUDENT_T = {3: 4.303, 8: 2.365}  # 97.5 % quantile for the mean of so many
LAYER_SEEDS = range(2)
KEPT = [1, 3]
# Chains of 2 to 8 steps that don't repeat, and the stages' lengths: the pocket recipe's until 2026-11-28.
SHORT = {"min_steps": 2, "max_steps": 8, "period": None, "slip_rate": 0.02}
TEACHER = {"max_steps": 450, "per_device_train_batch_size": 64}
DISTILL = {"max_steps": 460, "per_device_train_batch_size": 32}
FORWARD_KL_STEPS = 400
TABLE_STEPS = (20, 50, 100, 200, 300, 400, 460)


def alignment() -> None:
    result: dict = {"recipe": "pocket", "head_dim": {}}
    for head_dim, seeds in ALIGNMENT_SEEDS.items():
        curves = {a: {seed: distil(seed, a, head_dim, head_alignment=a) for seed in seeds} for a in ALIGNMENTS}
        rows = curves[ALIGNMENTS[0]][seeds[0]]
        result["head_dim"][str(head_dim)] = {
            "steps": [row["step"] for row in rows],
            "divergence": ["forward_kl" if "forward_kl" in row else "reverse_kl" for row in rows],
            "nats_per_token": {
                a: {str(seed): [divergence_of(row) for row in rows] for seed, rows in by_seed.items()}
                for a, by_seed in curves.items()
            },
        }
    write_json(ROOT / "results/alignment.json", result)
    for head_dim, measured in result["head_dim"].items():
        print(f"\nhead_dim {head_dim}\n")
        print(alignment_table(measured))


def alignment_table(result: dict) -> str:
    """Geometric means over seeds, and the mean and 95 % interval of the paired ratio."""
    lines = [
        "| step | divergence | attention | official | attention / official | attention lower |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    curves = {a: list(result["nats_per_token"][a].values()) for a in ALIGNMENTS}
    for i, step in enumerate(result["steps"]):
        if step not in TABLE_STEPS:
            continue
        logs = {a: [math.log(curve[i]) for curve in curves[a]] for a in ALIGNMENTS}
        differences = [a - o for a, o in zip(*logs.values(), strict=True)]
        n = len(differences)
        mean = sum(differences) / n
        deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
        half = STUDENT_T[n] * deviation / math.sqrt(n)
        means = [math.exp(sum(values) / n) for values in logs.values()]
        lines.append(
            f"| {step} | {result['divergence'][i].replace('_', ' ')} | {means[0]:.4f} | {means[1]:.4f} "
            f"| {math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f}) "
            f"| {sum(d < 0 for d in differences)} of {n} |"
        )
    return "\n".join(lines)


def layers() -> None:
    result: dict = {"recipe": "pocket", "seeds": {}}
    for seed in LAYER_SEEDS:
        distilled = {}
        for pair in itertools.combinations(range(4), 2):
            name = "official" if pair == tuple(KEPT) else f"keep-{pair[0]}-{pair[1]}"  # one of `alignment`'s
            curve = distil(seed, name, 32, keep_attention=list(pair))
            forward = [divergence_of(row) for row in curve if "forward_kl" in row]
            distilled[f"{pair[0]},{pair[1]}"] = {"step_100": forward[9], "step_400": forward[-1]}
        folder = ROOT / f"runs/conversion/head-dim-32/seed-{seed}"
        data = Data(task="chain", count=256, slip_rate=0.02, seed=77)
        ranked = RankLayersStage(teacher=f"{folder}/teacher", data=data, out=f"{folder}/ranking.json").run()
        result["seeds"][str(seed)] = {"cost": ranked["kl"], "ranking": ranked["ranking"], "distilled": distilled}
    write_json(ROOT / "results/layer_choice.json", result)
    print(layers_table(result))


def layers_table(result: dict) -> str:
    """Per seed: what replacing each kept pair's layers would have cost, and the KL their hybrid reaches."""
    lines = ["| kept | " + " | ".join(f"seed {s}: cost, KL at 100, at 400" for s in result["seeds"]) + " |"]
    lines.append("|---|" + "---:|" * len(result["seeds"]))
    for pair in next(iter(result["seeds"].values()))["distilled"]:
        cells = [pair]
        for seed in result["seeds"].values():
            cost = sum(seed["cost"][layer] for layer in pair.split(","))
            reached = seed["distilled"][pair]
            cells.append(f"{cost:.2f}, {reached['step_100']:.3f}, {reached['step_400']:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def distil(seed: int, name: str, head_dim: int, **conversion: object) -> list[dict]:
    """The pocket recipe up to its distillation, on short chains, in runs/conversion/head-dim-.../seed-.../NAME: the
    rows it logged, each the mean over ten steps."""
    _, stages = load_pipeline(ROOT / "recipes/pocket")
    teacher, distill = on_short_chains(stages["teacher"], TEACHER), on_short_chains(stages["distill"], DISTILL)
    folder = ROOT / f"runs/conversion/head-dim-{head_dim}/seed-{seed}"
    made, converted = f"{folder}/teacher", f"{folder}/{name}/converted"
    conversion = {"keep_attention": KEPT, **conversion}
    init = teacher.init | {"head_dim": head_dim}
    changes = {"teacher": made, "model": converted, "forward_kl_steps": FORWARD_KL_STEPS}

    run = [
        seeded(teacher, seed, out=made, init=init),
        dataclasses.replace(stages["convert"], teacher=made, out=converted, seed=seed, **conversion),
        seeded(distill, seed, out=f"{folder}/{name}/distilled", **changes),
    ]
    for stage in run:
        if not stage.finished():
            stage.run(resume=True)
    return [row for row in read_jsonl(Path(run[-1].out, "metrics.jsonl")) if "loss" in row]


def on_short_chains(stage: SFTStage | DistillStage, trainer: dict) -> Stage:
    batch = trainer["per_device_train_batch_size"]
    data = dataclasses.replace(stage.data, **SHORT, bucket=batch, count=trainer["max_steps"] * batch)
    return dataclasses.replace(stage, data=data, trainer=stage.trainer | trainer)


def seeded(stage: SFTStage | DistillStage, seed: int, **changes: object) -> Stage:
    """The stage on another draw of data and weights, 0 being the recipe's own."""
    data = dataclasses.replace(stage.data, seed=stage.data.seed + 1000 * seed)
    return dataclasses.replace(stage, data=data, trainer=stage.trainer | {"seed": seed}, **changes)


def divergence_of(row: dict) -> float:
    """Nats per token."""
    return round(row["forward_kl"] if "forward_kl" in row else row["reverse_kl"], 5)


if __name__ == "__main__":
    experiments = {"alignment": alignment, "layers": layers}
    if len(sys.argv) != 2 or sys.argv[1] not in experiments:
        sys.exit(__doc__)
    experiments[sys.argv[1]]()
