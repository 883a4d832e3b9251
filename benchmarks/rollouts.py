"""GRPO with rollouts from this engine and from vLLM: their seconds, and how far they are from the trainer.

    python benchmarks/rollouts.py                          # under a Python that has vLLM; results/rollouts-DEVICE.json
    python benchmarks/rollouts.py --device cpu --shape 30m --steps 2 --new-tokens 16 --samplers engine colocate

Each row trains in a process of its own, from the same random weights, at a learning rate that moves all probabilities
at each step. A server has the last GPU, and the trainer the first.

    rollout_seconds     of a generation, without the first one, in which vLLM compiles
    tokens_per_second   of the same generations
    k3                  the drift from the trainer, at each step (docs/training.md); old weights would raise it
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from m1.bench.decoders import make_model
from m1.bench.models import SHAPES
from m1.data_options import Data
from m1.evaluation.vllm_server import answers
from m1.jsonl import read_jsonl, write_json
from m1.machine import describe_machine, free_port
from m1.model.tokenizer import byte_tokenizer
from m1.ops.backend import default_device
from m1.recipe import GRPOStage

MODELS, SAMPLERS = ("hybrid", "transformer"), ("engine", "colocate", "server")
CONTEXT = 4096
START, END = 300, 30  # seconds in which a server must start and end
Row = dict[str, Any]


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward with variance for random weights: how many different letters there are."""
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


def work(kind: str, sampler: str, options: argparse.Namespace) -> Row:
    """Trains for some steps in this process."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        make_model(options.shape, dtype, kind == "hybrid", CONTEXT).save_pretrained(model)
        byte_tokenizer(CONTEXT).save_pretrained(model)
        trainer = {
            "max_steps": options.steps, "num_generations": 8, "per_device_train_batch_size": options.completions,
            "steps_per_generation": 1, "max_completion_length": options.new_tokens, "learning_rate": 1e-3,
            "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "bf16": options.device == "cuda",
        }  # fmt: skip
        port = free_port()
        if sampler != "engine":
            trainer |= {"vllm_mode": sampler, "vllm_server_port": port}
        stage = GRPOStage(
            model=str(model), out=str(Path(folder, "out")), trainer=trainer, max_num_seqs=options.completions,
            rollout="engine" if sampler == "engine" else "vllm", rewards={f"{Path(__file__).resolve()}:letters": 1.0},
            data=Data(task="chain", count=4096, min_steps=1, max_steps=2), gate_steps=1,
        )  # fmt: skip
        with server(model, port) if sampler == "server" else nullcontext():
            stage.run()
        rows = [row for row in read_jsonl(Path(stage.out, "metrics.jsonl")) if "loss" in row]
    seconds = median(row["time/rollout"] for row in rows[1:])
    tokens = median(row["completions/mean_length"] for row in rows[1:]) * options.completions
    found = {
        "rollout_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "k3": [row["sampling/k3"] for row in rows],
    }
    if sampler == "engine":
        return found
    import vllm

    return found | {"vllm": vllm.__version__}


@contextmanager
def server(model: Path, port: int) -> Iterator[None]:
    """vLLM's server on the last GPU, as docs/training.md starts it."""
    options = "--dtype bfloat16 --gpu-memory-utilization 0.5 --logprobs-mode processed_logprobs --max-logprobs -1"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options.split()]
    command += ["--port", str(port), "--max-model-len", str(CONTEXT), "--weight-transfer-config", '{"backend": "nccl"}']
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    own = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": gpus.split(",")[-1]}
    process = subprocess.Popen(command, env=os.environ | own)
    try:
        deadline = time.monotonic() + START
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("vLLM's server doesn't start")
            time.sleep(1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()


def measure(kind: str, sampler: str, argv: Sequence[str]) -> Row:
    """Runs a row in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        command = [sys.executable, __file__, *argv, "--worker", kind, sampler, str(out)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text()) if not done.returncode else {"not_run": f"exit code {done.returncode}"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=SAMPLERS)
    parser.add_argument("--completions", type=int, default=256, help="of a generation")
    parser.add_argument("--new-tokens", type=int, default=256, help="maximum number of tokens of a completion")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--out", type=Path, help="default: results/rollouts-DEVICE.json")
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "SAMPLER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        write_json(options.worker[2], work(*options.worker[:2], options))
        return

    out = options.out or Path(__file__).parents[1] / f"results/rollouts-{options.device}.json"
    settings = {key: getattr(options, key) for key in ("shape", "completions", "new_tokens", "steps")}
    result: Row = {"machine": describe_machine(torch.device(options.device)), "settings": settings, "rows": {}}
    for kind in MODELS:
        for sampler in SAMPLERS:
            if kind not in options.models or sampler not in options.samplers:
                row: Row = {"not_run": "not asked for"}
            elif sampler == "server" and torch.cuda.device_count() < 2:
                row = {"not_run": "needs two GPUs"}
            else:
                row = measure(kind, sampler, sys.argv[1:] if argv is None else argv)
            result["rows"][f"{kind} {sampler}"] = row
            print(f"{kind} {sampler}", json.dumps(row), flush=True)
            write_json(out, result)


if __name__ == "__main__":
    main()
