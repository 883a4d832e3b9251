"""What rounded weights cost in accuracy: a model in bfloat16, int8 and int4 against itself in float32, on real text.

python benchmarks/quantization.py MODEL $M1_DATA/gsm8k_test.jsonl [--rows 300]

Reads the problems of the file. For each kind of weights: the perplexity of all tokens but the first of each; how often
the likeliest next token is float32's; and the mean and the largest difference of the log-probabilities. Then it answers
the problems greedily, and counts the right answers. Writes results/quantization.json.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m1.engine import LLM, Request, SamplingParams
from m1.grading import Grader
from m1.jsonl import read_jsonl, write_json
from m1.machine import describe_machine
from m1.tasks.prompts import MATH

ROOT = Path(__file__).parents[1]
KINDS: dict[str, tuple[str, Any]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
LENGTH, NEW, SLOTS = 1024, 256, 64  # tokens of a row or an answer with its question; new tokens; sequences together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()
    rows = list(read_jsonl(Path(options.data)))[: options.rows]
    texts, found = [row["problem"] for row in rows], {}
    with Grader() as grader:
        for name, (dtype, quantize) in KINDS.items():
            llm = LLM.from_pretrained(
                options.model, dtype, "cpu", max_num_seqs=SLOTS, max_model_len=LENGTH, quantize=quantize
            )
            found[name] = read(llm, texts) | {"right": answered(llm, rows, grader)}
            print(name, math.exp(-np.mean(found[name]["logprobs"])), sum(found[name]["right"]), flush=True)
            write(options, found)


def read(llm: LLM, texts: list[str]) -> dict[str, Any]:
    """The log-probability of every token but the first of each text, and the likeliest token there."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=1)
    requests = [
        Request(llm.encode(text)[: LENGTH - 1], params, i, prompt_logprobs=True) for i, text in enumerate(texts)
    ]
    for _ in llm.engine_for([], 1).run(requests):
        pass
    logprobs = [value for request in requests for value in request.logprobs]
    return {"logprobs": logprobs, "likeliest": [best[0][0] for request in requests for best in request.top_logprobs]}


def answered(llm: LLM, rows: list[dict[str, Any]], grader: Grader) -> list[bool]:
    """Whether the greedy answer to each question is right."""
    prompts = [MATH.messages(row["problem"]) for row in rows]
    samples = llm.generate(prompts, SamplingParams(max_tokens=NEW, temperature=0))
    truths = [[row["answer"]] for row in rows]
    return grader.grade_texts([sample.text for sample in samples], truths)


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    exact, rows = found["float32"], []
    for name, values in found.items():
        apart = np.abs(np.subtract(values["logprobs"], exact["logprobs"]))
        same = np.equal(values["likeliest"], exact["likeliest"])
        row = {"name": name, "perplexity": math.exp(-np.mean(values["logprobs"])), "same_likeliest": same.mean()}
        row |= {"mean_difference": apart.mean(), "largest_difference": apart.max(), "right": sum(values["right"])}
        rows.append(row)
    result = {"machine": describe_machine(torch.device("cpu")), "model": Path(options.model).name}
    result |= {"data": Path(options.data).name, "problems": options.rows, "tokens": len(exact["logprobs"])}
    write_json(ROOT / "results" / "quantization.json", result | {"rows": rows})


if __name__ == "__main__":
    main()
