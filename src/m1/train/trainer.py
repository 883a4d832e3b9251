"""What all training stages share: the output folder, metrics, interruption and resumption.

OUT/checkpoints/   the trainer's own checkpoints; an interrupted stage resumes from the last one
OUT/metrics.jsonl  one line per logged step; OUT/tensorboard/ the same
OUT/               the trained model and tokenizer, and the run's own files (runs.py)
"""

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from datasets import Dataset
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from m1.errors import UserError
from m1.history import METRICS, SAMPLES
from m1.jsonl import to_jsonl, write_text
from m1.machine import describe_machine, gemm_rate, process_bytes
from m1.model.checkpoint import reason, saved_dtype
from m1.options import INT32_MAX, INT64_MAX, check_keys, fitted, shown
from m1.recipe import TrainedStage
from m1.runs import Run, sha256
from m1.secrets import redact_settings
from m1.train.checkpoints import last_checkpoint, seal
from m1.train.data import check_files
from m1.train.distributed import any_process, from_first, refuse_other_sharding
from m1.train.speed import speed_up
from m1.train.stage_trainer import StageTrainer

MADE = ("checkpoints", METRICS, SAMPLES, "tensorboard", "model.part")  # what an interrupted stage leaves
TINY, BELOW_1 = 1e-9, math.nextafter(1, 0)
RANGES: dict[str, tuple[float, float]] = {  # of trainers' arguments that transformers and TRL don't check themselves
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, INT64_MAX)),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "dataset_num_proc"), (1, INT64_MAX)),
    **dict.fromkeys(("max_completion_length", "num_iterations", "steps_per_generation"), (1, INT64_MAX)),
    **dict.fromkeys(("pad_to_multiple_of", "max_length", "torch_empty_cache_steps"), (1, INT32_MAX)),
    **dict.fromkeys(("num_generations", "num_generations_eval", "generation_batch_size"), (1, INT32_MAX)),
    **dict.fromkeys(("ref_model_sync_steps", "eval_accumulation_steps", "ddp_bucket_cap_mb"), (1, INT32_MAX)),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout"), (1, INT32_MAX)),
    **dict.fromkeys(("warmup_steps", "eval_delay", "neftune_noise_alpha", "router_aux_loss_coef"), (0, INT32_MAX)),
    **dict.fromkeys(("num_completions_to_print", "max_tool_calling_iterations"), (0, INT32_MAX)),
    **dict.fromkeys(("label_smoothing_factor", "top_entropy_quantile", "ref_model_mixup_alpha"), (0, 1)),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), (TINY, INT32_MAX)),
    "dataloader_num_workers": (0, 1024),
    "data_seed": (0, 2**32 - 1),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), (TINY, INT64_MAX)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), (0, INT64_MAX)),
    **dict.fromkeys(("beta", "epsilon", "epsilon_high", "entropy_coef"), (0, INT64_MAX)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, BELOW_1)),
    "temperature": (TINY, INT64_MAX),  # at 0 all samples of a prompt are the same
    "top_p": (TINY, 1),
    "min_p": (0, 1),
    "top_k": (0, INT64_MAX),
    "seed": (0, 2**32 - 1),
}
S = TypeVar("S", bound=TrainedStage)
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
    hints = typing.get_type_hints(cls)
    hints |= {key: dict[str, Any] for key in hints if key.endswith("_kwargs")}  # not JSON in a text, as TRL's say
    given = {key: fitted(value, hints[key], f"[trainer]: {key}") for key, value in given.items()}
    for key, value in given.items():
        low, high = RANGES.get(key, (-INT64_MAX, INT64_MAX))
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"[trainer]: {key} = {shown(value)} is out of range: must be {low:.3g} to {high:.3g}")
    if "trust_remote_code" in {*given, *given.get("model_init_kwargs", {})}:
        raise UserError("[trainer]: trust_remote_code: M1 never runs code that comes with a checkpoint; remove the key")
    common = {
        "output_dir": str(Path(out) / "checkpoints"),
        "save_total_limit": 2,  # if the last one is damaged, the one before is still there
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it would log a NaN as 0
        "report_to": ["tensorboard"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),  # else emulated and slow
        "disable_tqdm": False,
    }
    if torch.cuda.is_available():  # batches are made and copied while the GPU works
        common |= {"dataloader_num_workers": 1, "accelerator_config": {"non_blocking": True}}
    given = {key: value for key, value in given.items() if key != "model_init_kwargs"}  # see model_options
    try:
        arguments = cls(**(common | defaults | given))
    except Exception as error:
        raise UserError(f"[trainer]: {' '.join(str(error).split()) or type(error).__name__}") from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with more, one process would train copies in threads (DataParallel)
    return arguments


def refuse_ignored(given: dict[str, Any], ignored: Iterable[str], why: str) -> None:
    """Raises UserError if `[trainer]` has one of the arguments that the stage would ignore."""
    for key in ignored:
        if key in given:
            raise UserError(f"[trainer]: {key} = {given[key]!r} would change nothing, because {why}: remove the key")


def eval_defaults(stage: TrainedStage) -> dict[str, Any]:
    """The trainer's defaults for evaluation. Raises UserError if it is asked for without held-out rows."""
    asked = stage.trainer.get("eval_strategy", "no") != "no" or stage.trainer.get("eval_on_start")
    if asked and not stage.eval_rows:
        raise UserError("[trainer]: eval_strategy needs held-out rows: set the stage's key `eval_rows`")
    return {"eval_strategy": "epoch"} if stage.eval_rows else {}


def split(rows: Any, count: int, seed: int) -> tuple[Any, Dataset | None]:
    """Holds out `count` random rows of a Dataset for evaluation. Returns the others, in their order, and these.

    Without `count`, returns the rows, which may be a stream, and None.

    Raises:
        UserError: no row would be left to train on.
    """
    if not count:
        return rows, None
    if count >= len(rows):
        raise UserError(f"eval_rows={count}: the data has only {len(rows)} rows")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select([i for i in range(len(rows)) if i not in held_out]), rows.select(sorted(held_out))


def model_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for loading the model: `[trainer] model_init_kwargs`. The stage loads it, not TRL.

    Weights are float32 while they are trained, by default, as in TRL. At RL's learning rates, rounding would lose the
    updates of bfloat16 weights.
    """
    return {"dtype": torch.float32, **given.get("model_init_kwargs", {})}


def run_training(
    stage: S, arguments: TrainingArguments, make_trainer: Callable[[S, Any], StageTrainer], resume: bool, force: bool
) -> None:
    """Trains a stage's model, from its last checkpoint if there is one, and saves it to the stage's folder.

    The model is saved in the dtype of its teacher, or of the checkpoint that it began from, whatever it was trained in.

    A stage that has finished already is left alone. Ctrl-C and SIGTERM finish the current step, save a checkpoint and
    raise KeyboardInterrupt.

    Args:
        arguments: the trainer's.
        make_trainer: loads the model and the data. Called with the stage and `arguments`, after the seed is set.
        resume: continue an interrupted run from its last checkpoint.
        force: move aside what `out` holds, if it can't be resumed.

    Raises:
        UserError: `out` holds an interrupted run of this stage, and `resume` is False; a loss, gradient norm or weight
            isn't finite; as `last_checkpoint`; as `Run`.
    """
    refuse_other_sharding(stage, arguments)
    run = Run(stage.kind, stage.out, stage.settings(), force=force, ranks=True)
    with ExitStack() as stack:
        last = from_first(lambda: _opened(stage, stack.enter_context(run), resume))
        if not run.writes:
            stack.enter_context(run)  # which looks at what the first has left there
        if run.finished:
            return
        check_files(stage.data)
        source = getattr(stage, "teacher", None) or getattr(stage, "model", None)
        dtype = saved_dtype(source) if source else torch.float32
        set_seed(arguments.seed)
        stack.enter_context(_without_cudnn_attention())
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")  # the trainer reads it when it is made
        trainer, interrupt = _made(make_trainer, stage, arguments), _InterruptCallback()
        trainer.write_row = run.append
        for network in trainer.networks:
            speed_up(network, trainer.compiles and stage.compile)
        trainer.add_callback(interrupt)
        trainer.add_callback(MetricsCallback(run, trainer))
        trainer.add_callback(_TrainedCallback())
        trainer.add_callback(_SafetyCallback(trainer))  # the last: what it checks, the trainer then saves
        with _written(run), _without_bar(trainer):
            with interrupt:
                try:
                    trainer.train(resume_from_checkpoint=last)
                except _Trained:
                    if arguments.load_best_model_at_end:
                        trainer._load_best_model()
            if interrupt.requested:
                raise KeyboardInterrupt
            trainer.check_finite()
            _save(trainer, run, dtype)
        if run.writes:
            run.finish(**provenance(trainer, run.folder))
        if run.writes:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def _opened(stage: TrainedStage, run: Run, resume: bool) -> str | None:
    """The checkpoint that training resumes from, if any. Without one, deletes what an interrupted run left."""
    if run.finished:
        return None
    last = last_checkpoint(run.folder)
    if last and not resume:
        raise UserError(f"{stage.out} holds this stage, interrupted: give --resume, or delete it to restart")
    if not last:
        run.clear(*MADE)
    return last


def _made(make_trainer: Callable[[S, Any], StageTrainer], stage: S, arguments: TrainingArguments) -> StageTrainer:
    try:
        return make_trainer(stage, arguments)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # what TRL checks itself: choices, combinations, packages
        raise UserError(f"[trainer]: {' '.join(str(error).split())}") from error


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Behind a mask, its gradients aren't finite at some lengths (torch 2.11 to 2.13, pytorch/pytorch#196678)."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def _written(run: Run) -> Iterator[None]:
    """Turns what libraries raise on a full or failing disk into the OSError that it was."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise OSError(errno.EIO, reason(error), str(run.folder)) from error


@contextmanager
def _without_bar(trainer: StageTrainer) -> Iterator[None]:
    """Ends the line of the trainer's progress bar, so that an error has its own."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar:
                callback.training_bar.close()


def _save(trainer: StageTrainer, run: Run, dtype: torch.dtype) -> None:
    """Saves the model into the run's folder, file by file when all are complete: a reader never sees half a file."""
    trainer.accelerator.unwrap_model(trainer.model).to(dtype)
    draft = run.folder / "model.part"
    trainer.save_model(str(draft))
    if run.writes:
        for path in draft.iterdir():
            path.replace(run.folder / path.name)
        draft.rmdir()


def provenance(trainer: StageTrainer, folder: Path) -> dict[str, Any]:
    """What the manifest says of a trained model: data and weights by hash, resolved arguments, groups, machine."""
    return {
        "data_sha256": rows_sha256(trainer.train_dataset),
        "weights_sha256": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        "arguments": redact_settings(json.loads(trainer.args.to_json_string())),
        "parameter_groups": trainer.group_sizes,
        "machine": describe_machine(trainer.accelerator.device),
    }


def rows_sha256(rows: Dataset) -> str:
    """The hash of a data set's content in its order, as the trainer sees it: tokens and labels."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products on one device, measured once."""
    return gemm_rate(device, dtype)


def most_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU so far; on a CPU the process's largest size, 0 if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes("VmHWM") or 0


class MetricsCallback(TrainerCallback):
    """Writes the trainer's logs to metrics.jsonl, one JSON line per logged step.

    When training resumes, lines logged after the checkpoint are dropped. `seconds` counts all sessions. A line of
    training also has

        tokens_per_second   real tokens trained on since the line before, on all devices
        mfu                 model FLOPs utilization: the share of the rate that matrix products reach on this machine
        memory_gib          most memory so far: of the first GPU, or of the process

    Args:
        run: the run whose folder holds the file.
        trainer: counts the tokens.
    """

    def __init__(self, run: Run, trainer: StageTrainer):
        self.run, self.trainer = run, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops lines after the checkpoint and continues the clock."""
        device = self.trainer.accelerator.device
        self.peak = matrix_rate(device, torch.bfloat16 if args.bf16 else torch.float32) * args.world_size
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.logged_tokens, self.logged_at = 0.0, self.started
        if not self.run.writes:
            return
        for group in self.trainer.group_sizes:
            tqdm.write(
                "{parameters:,} parameters: learning rate {learning_rate:g}, decay {weight_decay:g}".format(**group)
            )
        for name in self.trainer.files:
            self._kept(name, state.global_step, step=int)
        rows = self._kept(METRICS, state.global_step, step=int, seconds=float)
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0

    def _kept(self, name: str, last: int, **types: type) -> list[dict[str, Any]]:
        """Drops the rows of a file that are of later steps. Returns the others."""
        rows = [row for row in self.run.read(name, types) if row["step"] <= last]
        if (self.run.folder / name).exists() or rows:
            write_text(self.run.folder / name, to_jsonl(rows))
        return rows

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
        row = {"step": state.global_step, "seconds": round(seconds, 2), **(logs or {})}
        self.run.append(METRICS, row | (self._speed() if "loss" in row else {}))

    def _speed(self) -> dict[str, float]:
        device, now = self.trainer.accelerator.device, time.monotonic()
        tokens = float(self.trainer.accelerator.reduce(torch.as_tensor(self.trainer.tokens, device=device)))
        rate = (tokens - self.logged_tokens) / (now - self.logged_at)
        self.logged_tokens, self.logged_at = tokens, now
        return {
            "tokens_per_second": round(rate, 1),
            "mfu": round(rate * self.trainer.flops_per_token / self.peak, 4),
            "memory_gib": round(most_memory(device) / 2**30, 2),
        }


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


class _SafetyCallback(TrainerCallback):
    """Checks that numbers are finite before the trainer logs or saves them, and seals checkpoints.

    Reading a number waits for a GPU. There the numbers of many steps are read together, where the trainer logs or
    saves, which waits anyway. On a CPU they are read at each step.
    """

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the weights."""
        self.trainer.check_finite()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Checks the step's numbers, unless they can wait."""
        stops = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        if stops or self.trainer.accelerator.device.type == "cpu":
            self.trainer.check_finite()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the numbers; the trainer may log and save now."""
        self.trainer.check_finite()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes the hashes of the checkpoint's files when all ranks have written theirs."""
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            seal(Path(args.output_dir, f"checkpoint-{state.global_step}"))


class _InterruptCallback(TrainerCallback):
    """Makes Ctrl-C and SIGTERM finish the step, save a checkpoint and stop. A second one stops at once."""

    requested = False  # by a signal in any process
    _signalled = False  # in this one

    def __enter__(self) -> None:
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After a signal, makes the trainer save a checkpoint and stop: all processes at the same step."""
        self.requested = any_process(self.requested or self._signalled)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control
