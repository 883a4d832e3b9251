"""What all training stages share: the output folder, metrics, interruption and resumption.

OUT/checkpoints/   the trainer's own checkpoints; an interrupted stage resumes from the last one
OUT/metrics.jsonl  one line per logged step; OUT/tensorboard/ the same
OUT/               the trained model and tokenizer, and the run's own files (runs.py)
"""

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from m1.errors import UserError
from m1.jsonl import to_jsonl, write_text
from m1.model.checkpoint import saved_dtype
from m1.options import check_keys
from m1.recipe import Stage
from m1.runs import Run

METRICS = "metrics.jsonl"
MADE = ("checkpoints", METRICS, "tensorboard", "model.part")  # what an interrupted stage leaves
S = TypeVar("S", bound=Stage)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def trainer_arguments(cls: type[Arguments], out: str | Path, given: dict[str, Any], **defaults: Any) -> Arguments:
    """Builds a trainer's arguments.

    Args:
        cls: their class, such as TRL's `SFTConfig`.
        out: the stage's output folder.
        given: the recipe's `[trainer]` table, which takes precedence over `defaults`.
        defaults: the stage's own defaults.

    Raises:
        UserError: an unknown argument, or an invalid value.
    """
    known = {f.name for f in dataclasses.fields(cls) if f.init} - {"output_dir", "resume_from_checkpoint"}
    check_keys(given, known, "[trainer]")
    if not isinstance(given.get("model_init_kwargs", {}), dict):
        raise UserError(f"[trainer]: model_init_kwargs = {given['model_init_kwargs']!r} should be a table")
    if "trust_remote_code" in {*given, *given.get("model_init_kwargs", {})}:
        raise UserError("[trainer]: trust_remote_code: M1 never runs code that comes with a checkpoint; remove the key")
    common = {
        "output_dir": str(Path(out) / "checkpoints"),
        "save_total_limit": 1,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),  # else emulated and slow
        "disable_tqdm": False,
    }
    given = {key: value for key, value in given.items() if key != "model_init_kwargs"}  # see model_options
    try:
        return cls(**(common | defaults | given))
    except (TypeError, ValueError) as error:
        raise UserError(f"[trainer]: {error}") from None


def model_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for loading the model: `[trainer] model_init_kwargs`. The stage loads it, not TRL.

    Weights are float32 while they are trained, by default, as in TRL. At RL's learning rates, rounding would lose the
    updates of bfloat16 weights.
    """
    return {"dtype": torch.float32, **given.get("model_init_kwargs", {})}


def run_training(
    stage: S, arguments: TrainingArguments, make_trainer: Callable[[S, Any], Trainer], resume: bool, force: bool
) -> None:
    """Trains a stage's model, from its last checkpoint if there is one, and saves it to the stage's folder.

    The model is saved in the dtype of its teacher, or of the checkpoint that it began from, whatever it was trained in.

    A stage that has finished already is left alone. Ctrl-C finishes the current step, saves a checkpoint and raises
    KeyboardInterrupt.

    Args:
        arguments: the trainer's.
        make_trainer: loads the model and the data. Called with the stage and `arguments`, after the seed is set.
        resume: continue an interrupted run from its last checkpoint.
        force: move aside what `out` holds, if it can't be resumed.

    Raises:
        UserError: `out` holds an interrupted run of this stage, and `resume` is False; and as `Run`.
    """
    with ExitStack() as stack:
        with arguments.main_process_first(local=False):  # it may move or delete what the others then look at
            run = stack.enter_context(Run(stage.kind, stage.out, stage.settings(), force=force, ranks=True))
            last = last_checkpoint(run.folder)
            if last and not run.finished and not resume:
                raise UserError(f"{stage.out} holds this stage, interrupted: give --resume, or delete it to restart")
            if not last and not run.finished:
                run.clear(*MADE)
        if run.finished:
            return
        source = getattr(stage, "teacher", None) or getattr(stage, "model", None)
        dtype = saved_dtype(source) if source else torch.float32
        set_seed(arguments.seed)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")  # the trainer reads it when it is made
        trainer, interrupt = make_trainer(stage, arguments), _InterruptCallback()
        trainer.add_callback(interrupt)
        trainer.add_callback(MetricsCallback(run))
        trainer.add_callback(_TrainedCallback())
        with interrupt, suppress(_Trained):
            trainer.train(resume_from_checkpoint=last)
        if interrupt.requested:
            raise KeyboardInterrupt
        _save(trainer, run, dtype)
        run.finish()
        if run.writes:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def _save(trainer: Trainer, run: Run, dtype: torch.dtype) -> None:
    """Saves the model into the run's folder, file by file when all are complete: a reader never sees half a file."""
    trainer.accelerator.unwrap_model(trainer.model).to(dtype)
    draft = run.folder / "model.part"
    trainer.save_model(str(draft))
    if run.writes:
        for path in draft.iterdir():
            path.replace(run.folder / path.name)
        draft.rmdir()


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint in OUT/checkpoints, None without one. Its trainer_state.json is written last."""
    complete = [path.parent for path in out.glob("checkpoints/checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


class MetricsCallback(TrainerCallback):
    """Writes the trainer's logs to metrics.jsonl, one JSON line per logged step.

    When training resumes, lines logged after the checkpoint are dropped. `seconds` counts all sessions.

    Args:
        run: the run whose folder holds the file.
    """

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops lines after the checkpoint and continues the clock."""
        self.seconds_before, self.started = 0.0, time.monotonic()
        if not self.run.writes:
            return
        rows = [row for row in self.run.read(METRICS, "step", "seconds") if row["step"] <= state.global_step]
        write_text(self.run.folder / METRICS, to_jsonl(rows))
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends a line. The trainer's last log is no step's: it sums up the session."""
        if logs and "train_runtime" in logs:
            return
        seconds = self.seconds_before + time.monotonic() - self.started
        self.run.append(METRICS, {"step": state.global_step, "seconds": round(seconds, 2), **(logs or {})})


class _Trained(Exception):
    """The last checkpoint is the trained model."""


class _TrainedCallback(TrainerCallback):
    """Ends training where it begins if the checkpoint has all steps. The trainer itself would take one step more."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises _Trained once the checkpoint is loaded."""
        if state.global_step >= state.max_steps:
            raise _Trained


class _InterruptCallback(TrainerCallback):
    """Makes Ctrl-C finish the step, save a checkpoint and stop. A second Ctrl-C stops at once."""

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
        """After Ctrl-C, makes the trainer save a checkpoint and stop."""
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control
