"""Where a decode step's milliseconds go, against the least they could be on this machine.

python benchmarks/decode_step.py [--batch 64] [--context 1152]

The functions that a step of the hybrid of shape 30m (float32) calls are timed by a clock around each, in a step that
isn't recorded. The least is what a function must multiply, at the rate of large products, or move, at that of a copy,
both measured in the same run.
Writes results/decode-step.json.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import m1.engine.executor as executor
import m1.engine.runner as runner
import m1.model.mamba as mamba
from m1.bench.decode import floor_of_step
from m1.bench.decoders import make_model, random_prompts
from m1.bench.roofline import measure_limits
from m1.engine import Engine, Request, SamplingParams
from m1.jsonl import write_json
from m1.machine import describe_machine
from m1.ops import PackedLinear

ROOT = Path(__file__).parents[1]
STEPS = 60
PARTS: dict[str, tuple[Any, str]] = {
    "matrix products": (PackedLinear, "__call__"),
    "attention": (runner, "decode_attention"),
    "states": (mamba, "state_update"),
    "residuals and norms": (runner, "add_rms_norm"),
    "draw of tokens": (executor, "sample_token"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1152)
    arguments = parser.parse_args()
    batch, context = arguments.batch, arguments.context
    cpu = torch.device("cpu")
    limits = measure_limits(cpu, torch.float32)
    model = make_model("30m", torch.float32, hybrid=True, max_model_len=context + 2 * STEPS)
    engine = Engine(model, [], batch, context + 2 * STEPS, prefix_cache=0)
    engine.executor.use(lambda step: step)  # a recorded step calls no function here
    engine.submit(Request(random_prompts("30m", 1, context)[0], SamplingParams(n=batch, max_tokens=2 * STEPS)))
    while engine.scheduler.waiting:
        engine.step()
    whole, parts = [], defaultdict(list)
    for _ in range(STEPS):
        with clocks() as spent:
            began = time.perf_counter()
            engine.step()
            whole.append(time.perf_counter() - began)
        for name in PARTS:
            parts[name].append(spent[name])
    seconds = {name: statistics.median(taken) for name, taken in parts.items()}
    seconds["Python and small operations"] = statistics.median(whole) - sum(seconds.values())
    least = floor_of_step(model, batch, context, limits)
    rows = [{"name": name, "seconds": taken, "floor_seconds": least.get(name, 0.0)} for name, taken in seconds.items()]
    rows.append({"name": "a step", "seconds": statistics.median(whole), "floor_seconds": sum(least.values())})
    for row in rows:
        print(f"{row['name']:30} {1000 * row['seconds']:7.2f} ms, at least {1000 * row['floor_seconds']:6.2f}")
    facts = {"batch": batch, "context": context, "copy_bytes_per_second": limits.copy}
    facts["gemm_flops_per_second"] = limits.gemm
    write_json(ROOT / "results" / "decode-step.json", {"machine": describe_machine(cpu)} | facts | {"rows": rows})


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each of PARTS within the context."""
    spent: dict[str, float] = defaultdict(float)
    plain = {name: getattr(owner, function) for name, (owner, function) in PARTS.items()}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result

        return run

    try:
        for name, (owner, function) in PARTS.items():
            setattr(owner, function, timed(name, plain[name]))
        yield spent
    finally:
        for name, (owner, function) in PARTS.items():
            setattr(owner, function, plain[name])


if __name__ == "__main__":
    main()
