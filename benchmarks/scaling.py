"""Training throughput on 1, 2 and 4 GPUs of a host, and their losses against one's: results/scaling-DEVICE.json.

    python benchmarks/scaling.py                                  # all GPUs of this host; minutes
    python benchmarks/scaling.py --task distill --shape m1-3b
    python benchmarks/scaling.py --device cpu --shape tiny --length 64 --processes 1 2

Each row starts its processes with torchrun and trains the same hybrid on the same packed rows with the same global
batch, so that one process does more passes per step. `replicated` is DDP, `sharded` is FSDP2 (`shard = true`). The file
is written after each row; rows that weren't run say why.

    tokens_per_second   of all processes, padding not counted, after the first steps
    speedup             as a multiple of the row of one process
    loss_difference     the largest |loss - loss of one process| of all steps, and `at`, the loss there
    memory_gib          the most that was allocated in the first process
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import WARMUP, Meter, documents
from trl import SFTConfig

from m1.bench.decoders import make_model
from m1.bench.models import SHAPES
from m1.jsonl import write_json
from m1.machine import describe_machine
from m1.model.tokenizer import byte_tokenizer
from m1.ops.backend import default_device
from m1.train.distill import DistillTrainer
from m1.train.distributed import is_first, split_batch, world_size
from m1.train.sft import Trainer
from m1.train.speed import speed_up
from m1.train.trainer import most_memory, trainer_arguments

WAYS = ("replicated", "sharded")
Row = dict[str, Any]


def keep_losses(trainer: Trainer, steps: int) -> Tensor:
    """The losses of all steps, as they come. They stay on the device: reading one would wait for it."""
    losses, training_step = torch.zeros(steps, device=trainer.accelerator.device), trainer.training_step

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        losses[trainer.state.global_step] += loss
        return loss

    trainer.training_step = keep
    return losses


def work(way: str, options: argparse.Namespace, folder: str) -> Row:
    """Trains for some steps in this process, one of several. Returns the row's numbers."""
    passes, steps = split_batch(options.global_batch, options.rows, world_size()), options.warmup + options.steps
    cuda = options.device == "cuda"
    given = {
        "max_steps": steps, "per_device_train_batch_size": passes[0],
        "gradient_accumulation_steps": passes[1], "packing": True, "max_length": options.length,
        "gradient_checkpointing": True, "learning_rate": 1e-4, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "bf16": cuda, "use_cpu": not cuda,
    }  # fmt: skip
    arguments = trainer_arguments(SFTConfig, folder, given)  # from here on the processes know each other
    torch.manual_seed(0)
    tokens = 2 * options.length * options.global_batch * steps
    common: Row = {
        "args": arguments, "train_dataset": documents(SHAPES[options.shape]["vocab_size"], options.length, tokens),
        "processing_class": byte_tokenizer(options.length), "shard": way == "sharded",
        "global_batch": options.global_batch,
    }  # fmt: skip
    with arguments.device:
        model = make_model(options.shape, torch.float32, True, options.length).train()
        if options.task == "distill":
            teacher = make_model(options.shape, torch.bfloat16 if cuda else torch.float32, False, options.length)
    meter = Meter(model, options.warmup)
    trainer: Trainer
    if options.task == "distill":
        trainer = DistillTrainer(model=model, teacher=teacher, **common)
    else:
        trainer = Trainer(model=model, **common)
    for network in trainer.networks:
        speed_up(network, options.compile)
    trainer.add_callback(meter)
    losses = keep_losses(trainer, steps)
    trainer.train()
    device = trainer.accelerator.device
    counted = trainer.accelerator.reduce(torch.tensor(float(meter.tokens), device=device))
    return {
        "tokens_per_second": float(counted) / meter.seconds,
        "tokens_per_step": float(counted) / options.steps,
        "passes_per_step": passes[1],
        "memory_gib": most_memory(device) / 2**30,
        "losses": trainer.accelerator.reduce(losses, "mean").tolist(),
    }


def measure(way: str, processes: int, argv: Sequence[str]) -> Row:
    """Runs a row in its own processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*launcher, __file__, *argv, "--worker", way, str(out)], stdout=subprocess.PIPE)
        return json.loads(out.read_text()) if not done.returncode else {"not_run": f"exit code {done.returncode}"}


def compare(row: Row, one: Row) -> None:
    """Adds how much faster the row is than one process, and how far its losses are from that one's."""
    row["speedup"] = row["tokens_per_second"] / one["tokens_per_second"]
    apart = [abs(a - b) for a, b in zip(row["losses"], one["losses"], strict=True)]
    row["loss_difference"], row["at"] = max(zip(apart, one["losses"], strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sft", "distill"), default="sft")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--global-batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--rows", type=int, default=1, help="maximum number of rows of a pass")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="steps before them, which compile and allocate")
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="how several processes share the work")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--out", type=Path, help="default: results/scaling-DEVICE.json")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            row = work(options.worker[0], options, folder)
        if is_first():
            write_json(options.worker[1], row)
        return

    out = options.out or Path(__file__).parents[1] / f"results/scaling-{options.device}.json"
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "worker", "processes", "ways", "device")}
    result: Row = {"machine": describe_machine(torch.device(options.device)), "settings": settings, "rows": {}}
    most = torch.cuda.device_count() if options.device == "cuda" else max(options.processes)
    for processes in options.processes:
        for way in WAYS[:1] if processes == 1 else WAYS:
            if processes > most:
                row: Row = {"not_run": f"this host has {most} GPUs"}
            elif processes > 1 and way not in options.ways:
                row = {"not_run": "not asked for"}
            else:
                row = measure(way, processes, sys.argv[1:] if argv is None else argv)
            one = result["rows"].get("1 replicated", {})
            if "losses" in row and "losses" in one:
                compare(row, one)
            result["rows"][f"{processes} {way}"] = row
            print(f"{processes} {way}", json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
            write_json(out, result)


if __name__ == "__main__":
    main()
