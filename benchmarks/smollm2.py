"""What a recipe made of SmolLM2: how far each trained model is from the teacher on unseen text, and how accurate it is.

    python benchmarks/smollm2.py [--recipe recipes/smollm2] [--rows 500] [--out results/smollm2.json]

Reads the outputs of a finished `m1 pipeline`. The texts are the first rows of the files of solutions, which the stages
skip, and the teacher's answers to problems that no stage trains on. On a text's assistant tokens:

    kl            mean of KL(teacher || model), nats a token
    perplexity    of the model, and `ratio` to the teacher's
    same          share of tokens at which both models have the same likeliest token

`accuracy` has each eval stage's numbers, by model: the pipeline's, and those of the recipe's other files, which this
runs first. `compared` has the differences between each hybrid and the transformer that was trained as it was.
"""

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.data_options import Data
from m1.evaluation.compare import compare as compare_results
from m1.jsonl import read_json, write_json
from m1.machine import describe_machine
from m1.model.checkpoint import load_model
from m1.ops.backend import default_device
from m1.pipeline import load_pipeline
from m1.recipe import ConvertStage, EvalStage, GenerateStage, Stage, load_stage
from m1.runs import MANIFEST, run_folder
from m1.tasks.prompts import MATH_PROMPT
from m1.train.data_cache import Preparation
from m1.train.data_mask import IGNORED, ChatEncoder
from m1.train.divergence import divergence

ROOT = Path(__file__).parents[1]
LENGTH, TOKENS = 1024, 4096  # most tokens of a row, and of a batch with its padding
Rows = list[dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/smollm2")
    parser.add_argument("--rows", type=int, default=500, help="of each text")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "smollm2.json")
    options = parser.parse_args()
    pipeline, stages = load_pipeline(options.recipe)
    evaluations = run_evaluations(Path(options.recipe), stages)
    device = default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = next(stage.teacher for stage in stages.values() if isinstance(stage, ConvertStage))
    teacher, tokenizer = load_model(source, device, dtype=dtype)
    texts = tokenized(unseen(stages, options.rows), tokenizer)
    found: dict[str, Any] = {}
    for name, folder in next(iter(evaluations.values())).models.items():
        if folder != source:
            model, _ = load_model(folder, device, dtype=dtype)
            found[name] = {text: compare(model.eval(), teacher.eval(), rows) for text, rows in texts.items()}
            print(name, {text: round(numbers["kl"], 4) for text, numbers in found[name].items()}, flush=True)
    result = {"machine": describe_machine(torch.device(device)), "recipe": pipeline.name}
    result |= {"seconds": seconds(stages), "divergence": found}
    result |= {"accuracy": {name: accuracy(stage) for name, stage in evaluations.items()}}
    result |= {"compared": {name: compared(stage) for name, stage in evaluations.items()}}
    write_json(options.out, result)


def run_evaluations(recipe: Path, stages: dict[str, Stage]) -> dict[str, EvalStage]:
    """The eval stages by name: the pipeline's own first, then those that aren't part of it. Runs the latter."""
    further = {path.stem: load_stage(path) for path in sorted(recipe.glob("eval-*.toml")) if path.stem not in stages}
    for stage in further.values():
        if not stage.finished():
            stage.run()
    return {name: stage for name, stage in (stages | further).items() if isinstance(stage, EvalStage)}


def unseen(stages: dict[str, Stage], rows: int) -> dict[str, Data]:
    """The texts by name: what the training stages skip of files of solutions, and the last answers that one makes."""
    folder, options = os.environ.get("M1_DATA", "."), {"limit": rows, "prompt_template": MATH_PROMPT}
    texts = {f"{name} solutions": f"{folder}/{name}_train.jsonl" for name in ("gsm8k", "math")}
    texts |= {f"teacher's {name}": stage.out for name, stage in stages.items() if isinstance(stage, GenerateStage)}
    return {name: Data(path=path, **options) for name, path in [*list(texts.items())[:2], list(texts.items())[-1]]}


def tokenized(texts: dict[str, Data], tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """The rows of each text, as the training stages prepare them."""
    encoder = ChatEncoder(tokenizer)
    return {
        name: list(Preparation(data, encoder, LENGTH).run().rows.with_format("torch")) for name, data in texts.items()
    }


def batches(rows: Rows, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of similar lengths, padded at their ends: token ids and labels [b, T]."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    while rows:
        count = max(TOKENS // len(rows[-1]["input_ids"]), 1)
        batch, rows = rows[-count:], rows[:-count]
        padded = [
            torch.nn.utils.rnn.pad_sequence([row[key].long() for row in batch], batch_first=True, padding_value=value)
            for key, value in (("input_ids", 0), ("labels", IGNORED))
        ]
        yield padded[0].to(device), padded[1].to(device)


@torch.inference_mode()
def compare(model: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> dict[str, float]:
    """The numbers of one text. Padding comes last, so no token that counts sees any."""
    sums: dict[str, float] = defaultdict(float)
    for tokens, labels in batches(rows, model.device):
        targets = labels[:, 1:]
        at = targets != IGNORED
        own, wanted = (m(tokens, use_cache=False).logits[:, :-1][at].float() for m in (model, teacher))
        sums["tokens"] += int(at.sum())
        sums["kl"] += float(divergence(own, wanted, "forward_kl").sum())
        sums["same"] += int((own.argmax(-1) == wanted.argmax(-1)).sum())
        for name, logits in (("own", own), ("teacher", wanted)):
            sums[name] += float(torch.nn.functional.cross_entropy(logits, targets[at], reduction="sum"))
    mean = {name: value / sums["tokens"] for name, value in sums.items()}
    perplexity = math.exp(mean["own"])
    return {
        "kl": mean["kl"],
        "perplexity": perplexity,
        "ratio": perplexity / math.exp(mean["teacher"]),
        "same": mean["same"],
        "tokens": int(sums["tokens"]),
    }


def seconds(stages: dict[str, Stage]) -> dict[str, float]:
    """Of each stage, all its sessions."""
    return {
        name: read_json(run_folder(stage.out, stage.is_file) / MANIFEST)["seconds"] for name, stage in stages.items()
    }


def accuracy(stage: EvalStage) -> dict[str, Any]:
    """Each evaluated model's numbers."""
    results = {model: read_json(Path(stage.out, model, "result.json")) for model in stage.models}
    return {model: {key: result[key] for key in KEPT} for model, result in results.items()}


def compared(stage: EvalStage) -> dict[str, Any]:
    """transformer -> hybrid, for each pair: pass@1, the vote, and their differences with intervals."""
    pairs = [(f"{name}-transformer", name) for name in stage.models if f"{name}-transformer" in stage.models]
    return {" -> ".join(pair): compare_results(*(Path(stage.out, name) for name in pair))["measures"] for pair in pairs}


KEPT = (
    "n_problems",
    "pass@1",
    "pass@1_ci95",
    "pass@k",
    "maj@k",
    "tokens_per_second",
    "tokens",
    "seconds",
    "no_answer",
    "truncated",
)


if __name__ == "__main__":
    main()
