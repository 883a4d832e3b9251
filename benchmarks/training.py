"""Training throughput of hybrids and Llamas, beside TRL's plain SFTTrainer: writes results/training-DEVICE.json.

    python benchmarks/training.py                                    # all rows, hours on one GPU
    python benchmarks/training.py --shapes smollm2-135m --lengths 2048 --models llama trl

A row is a task, a model, a shape and a length. The real trainers run on packed rows of random tokens, all of them
trained; documents have between a quarter of the row's length and all of it. "trl" is TRL's own trainer on the same
packed rows, "trl-padded" on a padded row per document, its default. The file is written after each row. Rows of
earlier runs on the same machine are kept. What isn't measured is listed as not run, with the reason.

    tokens_per_second   tokens of documents, padding not counted
    tflops              operations of products and causal attention per second / 1e12, teacher included; without the
                        scan and what checkpointing computes again
    mfu                 their share of `matrix_rate`, which large products reach on this machine
    memory_gib          the most that was allocated
"""

import argparse
import gc
import itertools
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from m1.bench.decoders import make_model
from m1.bench.models import SHAPES
from m1.jsonl import write_json
from m1.machine import describe_machine, gemm_rate
from m1.model.configuration import ATTENTION, layer_kinds
from m1.model.tokenizer import byte_tokenizer
from m1.ops.backend import default_device
from m1.train.distill import DistillTrainer
from m1.train.sft import Trainer
from m1.train.speed import speed_up
from m1.train.stage_trainer import weights_in_products
from m1.train.trainer import most_memory, trainer_arguments

TASKS, MODELS = ("sft", "distill"), ("hybrid", "llama", "trl", "trl-padded")
TRL = ("trl", "trl-padded")
GRID = {"shapes": ("smollm2-135m", "llama-1b"), "lengths": (512, 2048, 8192, 32768)}
WARMUP = 10  # steps that compile and allocate. Lengths differ: another layout may compile again at any of the first
Row = dict[str, Any]


class Meter(TrainerCallback):
    """Counts tokens and pairs of attention, and takes the time of the steps after the warm-up."""

    def __init__(self, model: PreTrainedModel, warmup: int = WARMUP):
        self.device, self.warmup = model.device, warmup
        self.tokens, self.pairs = torch.zeros(2, dtype=torch.float64, device=model.device)
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model: nn.Module, arguments: tuple, inputs: dict[str, Any]) -> None:
        packed = "cu_seq_lens_q" in inputs
        lengths = (inputs["cu_seq_lens_q"].diff() if packed else inputs["attention_mask"].sum(1)).double()
        self.tokens, self.pairs = self.tokens + lengths.sum(), self.pairs + lengths.square().sum() / 2

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in (self.warmup, state.max_steps):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            self.tokens, self.pairs = torch.zeros(2, dtype=torch.float64, device=self.device)
            self.started = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self.started


def attention_width(model: PreTrainedModel) -> int:
    """Query channels of all attention layers."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return layer_kinds(config).count(ATTENTION) * config.num_attention_heads * head_dim


def operations(model: PreTrainedModel, tokens: float, pairs: float, passes: int) -> float:
    """Of products and causal attention, in `passes` passes (3 for training) over `tokens`.

    Args:
        pairs: of a query and a key that it sees.
    """
    return passes * (2 * weights_in_products(model) * tokens + 4 * attention_width(model) * pairs)


def documents(vocabulary: int, length: int, tokens: int) -> Dataset:
    """Documents of random tokens, of length / 4 to `length`, that have `tokens` at least."""
    draw, rows = random.Random(0), []
    while tokens > 0:
        size = draw.randint(max(length // 4, 1), length)
        rows.append(torch.randint(vocabulary, (size,)).tolist())
        tokens -= size
    return Dataset.from_dict({"input_ids": rows})


def measure(task: str, kind: str, shape: str, length: int, options: argparse.Namespace, out: str) -> Row:
    """Trains for some steps. Returns the row's numbers."""
    device = torch.device(options.device)
    hybrid, rows = kind == "hybrid", max(options.tokens // length, 1)
    arguments = {
        "max_steps": WARMUP + options.steps, "per_device_train_batch_size": rows, "packing": kind != "trl-padded",
        "max_length": length, "gradient_checkpointing": length >= options.checkpoint_from, "learning_rate": 1e-5,
        "report_to": [], "save_strategy": "no", "logging_steps": 10, "disable_tqdm": True,
        "bf16": device.type == "cuda", "use_cpu": device.type == "cpu",
    }  # fmt: skip
    with device:
        model = make_model(shape, torch.float32, hybrid, length).train()
    data = documents(SHAPES[shape]["vocab_size"], length, 2 * rows * length * (WARMUP + options.steps))
    common: Row = {"model": model, "train_dataset": data, "processing_class": byte_tokenizer(length)}
    meter, teacher = Meter(model), None
    trainer: SFTTrainer
    if kind in TRL:
        trainer = SFTTrainer(args=SFTConfig(out, **arguments), **common)
    else:
        ours = trainer_arguments(SFTConfig, out, arguments)
        if task == "distill":
            with device:
                teacher = make_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, False, length)
            trainer = DistillTrainer(args=ours, teacher=teacher, **common)
        else:
            trainer = Trainer(args=ours, **common)
        for network in trainer.networks:
            speed_up(network, {"auto": "auto", "on": True, "off": False}[options.compile])
    trainer.add_callback(meter)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens, pairs = float(meter.tokens), float(meter.pairs)
    work = operations(model, tokens, pairs, 3) + (operations(teacher, tokens, pairs, 1) if teacher else 0)
    return {
        "tokens_per_second": tokens / meter.seconds,
        "tflops": work / meter.seconds / 1e12,
        "memory_gib": most_memory(device) / 2**30,
        "tokens_per_step": tokens / options.steps,
        "checkpointing": bool(arguments["gradient_checkpointing"]),
        "compiled": any(layer._compiled_call_impl is not None for layer in model.get_decoder().layers),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS, help="trl...: TRL's SFTTrainer on a Llama"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=GRID["shapes"])
    parser.add_argument("--lengths", nargs="+", type=int, default=GRID["lengths"], help="tokens of a packed row")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step; a row at least")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--checkpoint-from", type=int, default=8192, help="shortest row with activation checkpointing")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, help="default: results/training-DEVICE.json")
    options = parser.parse_args(argv)

    device = torch.device(options.device)
    machine = describe_machine(device)
    out = options.out or Path(__file__).parents[1] / f"results/training-{device.type}.json"
    rate = gemm_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    result: Row = {"machine": machine, "matrix_rate": rate, "rows": {}}
    if out.exists() and (earlier := json.loads(out.read_text()))["machine"] == machine:
        result["rows"] = {name: row for name, row in earlier["rows"].items() if "not_run" not in row}
    grid = (TASKS, MODELS, {*GRID["shapes"], *options.shapes}, {*GRID["lengths"], *options.lengths})
    for row in itertools.product(*map(sorted, grid)):
        if row[0] == "sft" or row[1] not in TRL:
            result["rows"].setdefault(name_of(*row), {"not_run": "not asked for"})
    for row in itertools.product(options.tasks, options.models, options.shapes, options.lengths):
        if row[0] == "distill" and row[1] in TRL:  # TRL's plain trainer doesn't distil
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                numbers = measure(*row, options, folder)
                numbers["mfu"] = numbers["tflops"] * 1e12 / rate
            except torch.OutOfMemoryError as error:
                numbers = {"not_run": f"out of memory: {str(error).splitlines()[0]}"}
        result["rows"][name_of(*row)] = numbers
        print(name_of(*row), json.dumps(numbers), flush=True)
        write_json(out, result)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def name_of(task: str, kind: str, shape: str, length: int) -> str:
    return f"{task} {kind} {shape} {length}"


if __name__ == "__main__":
    main()
