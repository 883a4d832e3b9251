"""What every training stage shares: its folder, metrics, interruption, resumption and manifest.

OUT/checkpoints/   the trainer's own checkpoints; a stage that was cut off goes on from the last one
OUT/metrics.jsonl  one line a logged step; OUT/tensorboard/ the same
OUT/               the trained model and tokenizer
OUT/manifest.json  written last: recipe, versions, git commit, seconds. Its presence means the stage is finished
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import m1.model  # noqa: F401  registers the Auto classes
from m1.errors import UserError
from m1.jsonl import append_jsonl, read_jsonl
from m1.recipe import check_keys

MANIFEST = "manifest.json"
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def load_model(path: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint folder (M1 or any transformers causal LM) and its tokenizer. Raises UserError if it is none.

    Args:
        options: for `from_pretrained`, e.g. attn_implementation.
    """
    if not (Path(path) / "config.json").exists():
        raise UserError(f"{path} is not a checkpoint folder (no config.json in it)")
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load {path}: {error}") from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"{path}: its weights are truncated or damaged ({error})") from None
        raise


def trainer_arguments(cls: type[Arguments], out: str | Path, given: dict[str, Any], **defaults: Any) -> Arguments:
    """The trainer's arguments from a recipe's `[trainer]`, whose keys are checked, over `defaults`."""
    check_keys(given, [f.name for f in dataclasses.fields(cls) if f.init], "[trainer]")
    common = {
        "output_dir": str(Path(out) / "checkpoints"),
        "save_total_limit": 1,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "disable_tqdm": False,
    }
    given = {key: value for key, value in given.items() if key != "model_init_kwargs"}  # see model_options
    try:
        return cls(**(common | defaults | given))
    except (TypeError, ValueError) as error:
        raise UserError(f"[trainer]: {error}") from None


def model_options(given: dict[str, Any]) -> dict[str, Any]:
    """`[trainer] model_init_kwargs`: for the model's construction, which is the stages' work here."""
    return given.get("model_init_kwargs", {})


def run(trainer: Trainer, out: str | Path, recipe: Any, resume: bool) -> None:
    """Trains, saves the model, writes the manifest.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; `resume` goes on from the last one.

    Raises:
        UserError: OUT holds a finished or unfinished stage and `resume` is off, or it was made by another recipe.
    """
    out = Path(out)
    checkpoints = out / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if not resume and ((out / MANIFEST).exists() or last):
        raise UserError(f"{out} already holds this stage's output: give --resume to go on, or delete it to start again")
    if not resume or not last:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    out.mkdir(parents=True, exist_ok=True)
    interrupt = _InterruptCallback()
    trainer.add_callback(interrupt)
    trainer.add_callback(MetricsCallback(out / "metrics.jsonl"))
    started = time.monotonic()
    with interrupt:
        trainer.train(resume_from_checkpoint=last)
    if interrupt.requested:
        raise KeyboardInterrupt
    trainer.save_model(str(out))
    shutil.rmtree(checkpoints, ignore_errors=True)
    write_manifest(out, recipe, time.monotonic() - started)


class MetricsCallback(TrainerCallback):
    """Every log of the trainer as one line of JSON. On resumption, lines past the checkpoint are dropped."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds_before = 0.0
        if self.path.exists():
            rows = [row for row in read_jsonl(self.path) if row["step"] <= state.global_step]
            self.path.unlink()
            append_jsonl(self.path, rows)
            self.seconds_before = rows[-1]["seconds"] if rows else 0.0
        self.started = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        seconds = self.seconds_before + time.monotonic() - self.started
        append_jsonl(self.path, [{"step": state.global_step, "seconds": round(seconds, 2), **(logs or {})}])


class _InterruptCallback(TrainerCallback):
    """Turns Ctrl-C into: finish this step, save, stop. A second Ctrl-C stops at once."""

    requested = False

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


def write_manifest(out: str | Path, recipe: Any, seconds: float) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    manifest = {
        "recipe": dataclasses.asdict(recipe),
        "recipe_sha256": recipe_hash(recipe),
        "seconds": round(seconds, 1),
        "versions": versions,
        "git_commit": _git_commit(),
    }
    Path(out, MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def recipe_hash(recipe: Any) -> str:
    """Of the recipe and of the data files it names: a stage is done again, on request, when either changes."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode())
    path = getattr(getattr(recipe, "data", None), "path", None)
    if path and Path(path).exists():
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
