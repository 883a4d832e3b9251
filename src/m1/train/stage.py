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
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m1.errors import UserError
from m1.jsonl import append_jsonl, drop_torn_line, read_json, read_jsonl, write_json
from m1.model.layer_choice import ranking_file
from m1.recipe import check_keys

MANIFEST, RECIPE = "manifest.json", "recipe.json"
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def trainer_arguments(cls: type[Arguments], out: str | Path, given: dict[str, Any], **defaults: Any) -> Arguments:
    """The trainer's arguments from a recipe's `[trainer]` over `defaults`. Raises UserError for a bad one."""
    known = {f.name for f in dataclasses.fields(cls) if f.init} - {"output_dir", "resume_from_checkpoint"}
    check_keys(given, known, "[trainer]")
    if not isinstance(given.get("model_init_kwargs", {}), dict):
        raise UserError(f"[trainer]: model_init_kwargs = {given['model_init_kwargs']!r} should be a table")
    common = {
        "output_dir": str(Path(out) / "checkpoints"),
        "save_total_limit": 1,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),  # elsewhere emulated, slowly
        "disable_tqdm": False,
    }
    given = {key: value for key, value in given.items() if key != "model_init_kwargs"}  # see model_options
    try:
        return cls(**(common | defaults | given))
    except (TypeError, ValueError) as error:
        raise UserError(f"[trainer]: {error}") from None


def model_options(given: dict[str, Any]) -> dict[str, Any]:
    """`[trainer] model_init_kwargs`: for the model's construction, which is the stages' work here.

    Trained weights are float32 unless it says otherwise, as in TRL: at RL's learning rates an update of a bfloat16
    weight rounds to nothing.
    """
    return {"dtype": torch.float32, **given.get("model_init_kwargs", {})}


def run(trainer: Trainer, out: str | Path, recipe: Any, resume: bool) -> None:
    """Trains, saves the model, writes the manifest.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; `resume` goes on from the last one.

    Raises:
        UserError: OUT holds a finished stage, an unfinished one and `resume` is off, or one of another recipe.
    """
    out = Path(out)
    checkpoints = out / "checkpoints"
    last = last_checkpoint(checkpoints)
    if (out / MANIFEST).exists():
        raise UserError(f"{out} already holds this stage's finished output: delete it to run the stage again")
    if last and not resume:
        raise UserError(f"{out} holds this stage, cut off: give --resume to go on, or delete it to start again")
    if last and read_json(out / RECIPE)["sha256"] != recipe_hash(recipe):
        raise UserError(f"{out} was begun with another recipe: delete it to start again, or undo the change")
    if not last:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    write_json(out / RECIPE, {"sha256": recipe_hash(recipe)})
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    interrupt, metrics = _InterruptCallback(), MetricsCallback(out / "metrics.jsonl")
    trainer.add_callback(interrupt)
    trainer.add_callback(metrics)
    with interrupt:
        trainer.train(resume_from_checkpoint=last)
    if interrupt.requested:
        raise KeyboardInterrupt
    trainer.save_model(str(out))
    write_manifest(out, recipe, metrics.seconds())
    shutil.rmtree(checkpoints, ignore_errors=True)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete one: trainer_state.json is written last, a checkpoint without it was cut off."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


class MetricsCallback(TrainerCallback):
    """Every log of the trainer as one line of JSON. On resumption, lines past the checkpoint are dropped."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds_before = 0.0
        if self.path.exists():
            drop_torn_line(self.path)
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
        append_jsonl(self.path, [{"step": state.global_step, "seconds": round(self.seconds(), 2), **(logs or {})}])

    def seconds(self) -> float:
        """Of training, over all sessions."""
        return self.seconds_before + time.monotonic() - self.started


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
    write_json(Path(out, MANIFEST), manifest)


def recipe_hash(recipe: Any) -> str:
    """Of all a stage's output depends on: the recipe, the files it names and the stages its models come from."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode())
    data = getattr(recipe, "data", None)
    models = [getattr(recipe, "model", None), getattr(recipe, "teacher", None), *getattr(recipe, "models", {}).values()]
    inputs = [
        ranking_file(getattr(recipe, "keep_attention", None)),
        getattr(data, "path", data),
        *(Path(model, MANIFEST) for model in models if model),
    ]
    for path in inputs:
        if path and Path(path).is_file():
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
