"""16 samples of one 512-token prompt are prefilled once: the engine's own count, and time to the samples' first tokens.

python benchmarks/forks.py

Beside it, a prompt for one sample, and 16 different prompts. Shape 30m, float32. Writes results/forks.json.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from m1.bench.decoders import make_model, random_prompts
from m1.engine import Engine, SamplingParams
from m1.jsonl import write_json
from m1.machine import describe_machine

ROOT = Path(__file__).parents[1]
SAMPLES, PROMPT, REPEATS = 16, 512, 9
CASES = {"16 samples of one prompt": (1, SAMPLES), "1 sample of it": (1, 1), "16 prompts": (SAMPLES, 1)}


def main() -> None:
    engine = Engine(
        make_model("30m", torch.float32, hybrid=True, max_model_len=PROMPT + 2), [], SAMPLES, PROMPT + 2, prefix_cache=0
    )
    prompts = random_prompts("30m", SAMPLES, PROMPT)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(1 + REPEATS):  # the first warms up
        for name, (count, n) in CASES.items():
            before, began = engine.stats.prefilled, time.perf_counter()
            engine.generate(prompts[:count], SamplingParams(n=n, max_tokens=1))
            seconds = time.perf_counter() - began
            runs[name].append({"seconds": seconds, "prefilled": engine.stats.prefilled - before})
    rows = [
        {"name": name, "prefilled": taken[0]["prefilled"], "runs": REPEATS}
        | {"seconds": statistics.median(run["seconds"] for run in taken[1:])}
        for name, taken in runs.items()
    ]
    for row in rows:
        print(f"{row['name']}: {row['prefilled']} tokens prefilled, {1000 * row['seconds']:.0f} ms to the first tokens")
    write_json(ROOT / "results" / "forks.json", {"machine": describe_machine(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
