"""Distillation on assistant tokens (paper §3.2): the student matches the teacher's next-token distribution.

A student far from a near-deterministic teacher learns little from reverse KL (divergence.py). Its gradient vanishes
where the student has no mass on the teacher's token. `forward_kl_steps` sets the length of a warm-up with forward KL.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.parallelize import is_sharded, shard
from m1.recipe import DistillStage, TaughtStage
from m1.train import sft
from m1.train.distributed import world_size
from m1.train.divergence import Divergence, divergence_from_states
from m1.train.sft import forward_arguments, last_states, trained_positions
from m1.train.stage_trainer import weights_in_products
from m1.train.trainer import model_options, refuse_ignored, run_training, split

IGNORED = ("label_smoothing_factor", "loss_type", "completion_only_loss", "router_aux_loss_coef", "use_liger_kernel")


def distill(stage: DistillStage, resume: bool = False, force: bool = False) -> None:
    """Trains stage.model towards stage.teacher and saves to stage.out. Raises UserError for bad input."""
    run_training(stage, arguments_of(stage), distill_trainer, resume, force)


def distill_trainer(stage: DistillStage, arguments: SFTConfig) -> "DistillTrainer":
    """The stage's trainer, with both models and the data. Raises UserError for models of different vocabularies."""
    options = load_pair(stage, arguments)
    return DistillTrainer(**options, divergence=stage.divergence, forward_kl_steps=stage.forward_kl_steps)


def load_pair(stage: TaughtStage, arguments: SFTConfig) -> dict[str, Any]:
    """The arguments of `DistillTrainer` that a stage with a teacher has: both models and the data.

    Raises:
        UserError: models of different vocabularies, or bad data.
    """
    options = model_options(stage.trainer)
    model, tokenizer = load_model(stage.model, **options)
    teacher, teacher_tokenizer = load_model(stage.teacher, **(options | {"dtype": stage.teacher_dtype or "auto"}))
    check_vocabulary(tokenizer, teacher_tokenizer, f"{stage.model} and {stage.teacher}")
    shared = min(len(m.get_output_embeddings().weight) for m in (model, teacher))
    if (largest := max(tokenizer.get_vocab().values())) >= shared:
        raise UserError(f"{stage.model} and {stage.teacher} share {shared} logits, too few for token {largest}")
    rows, held_out = split(sft.training_rows(stage, arguments, tokenizer, model), stage.eval_rows, arguments.seed)
    return {
        "model": model,
        "args": arguments,
        "train_dataset": rows,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "mixer_lr_scale": stage.mixer_lr_scale,
        "shard": stage.shard,
        "global_batch": stage.global_batch,
        "teacher": teacher,
        "teacher_device": stage.teacher_device,
        "teacher_autocast": stage.teacher_dtype is None,
    }


def check_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, names: str) -> None:
    """Raises UserError unless each of the student's tokens has the same id in the teacher's tokenizer."""
    known = teacher.get_vocab()
    for token, i in student.get_vocab().items():
        if known.get(token) != i:
            raise UserError(
                f"{names} have different vocabularies: token {token!r} is {i} for the student and {known.get(token)} "
                "for the teacher. Give a teacher with the student's tokenizer"
            )


def arguments_of(stage: TaughtStage) -> SFTConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]` or a `teacher_device` that isn't there."""
    refuse_ignored(stage.trainer, IGNORED, "the loss is the distance from the teacher")
    device = stage.teacher_device
    if device not in (None, "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        raise UserError(
            f"teacher_device={device!r}: this machine has cpu and {torch.cuda.device_count()} GPUs (cuda:N)"
        )
    return sft.arguments_of(stage)


class DistillTrainer(sft.Trainer):
    """The trainer of sft with a divergence from a teacher in place of the cross-entropy.

    Args:
        teacher: a causal LM with the student's vocabulary. One may have more padding rows at the end of its head.
        teacher_device: where the teacher runs; None for the student's device.
        teacher_autocast: run the teacher under the student's autocast; else in its own dtype.
        divergence: the loss, per assistant token.
        forward_kl_steps: optimizer steps under forward KL before `divergence` takes over.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        teacher_device: str | None = None,
        teacher_autocast: bool = True,
        divergence: Divergence = "reverse_kl",
        forward_kl_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        self.shards_teacher = self.shard and world_size() > 1 and teacher_device is None
        if not self.shards_teacher:
            self.teacher.to(teacher_device or self.accelerator.device)
        self.teacher_autocast = teacher_autocast
        self.divergence, self.forward_kl_steps = divergence, forward_kl_steps

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Shards the teacher, too, whose head stays whole after its first forward pass."""
        if self.shards_teacher and not is_sharded(self.teacher):
            shard(self.teacher, self.args.device)
        return super()._prepare_for_training(*args, **kwargs)

    @property
    def networks(self) -> list[PreTrainedModel]:
        """The student and the teacher."""
        return [*super().networks, self.teacher]

    @property
    def flops_per_token(self) -> float:
        """Operations per trained token, with the teacher's forward pass."""
        return super().flops_per_token + 2 * weights_in_products(self.teacher)

    @property
    def computes_loss(self) -> bool:
        """Always."""
        return True

    def summed_loss(self, model: nn.Module, states: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """The sum over trained tokens of the divergence from the teacher, and their number."""
        teacher_states = self.teacher_states(forward_arguments(inputs))
        positions, _ = trained_positions(inputs)
        total = divergence_from_states(
            states.flatten(0, 1)[positions],
            self.accelerator.unwrap_model(model).get_output_embeddings().weight,
            teacher_states.flatten(0, 1)[positions],
            self.teacher.get_output_embeddings().weight.to(self.accelerator.device),
            self.current_divergence,
        )
        self.note(self.current_divergence, total, len(positions))
        return total, len(positions)

    @torch.no_grad()
    def teacher_states(self, inputs: dict[str, Any]) -> Tensor:
        """The teacher's last hidden states [b, T, H] of a batch, on the student's device."""
        device = self.teacher.device
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        enabled = self.teacher_autocast and torch.is_autocast_enabled(self.accelerator.device.type)
        with torch.autocast(device.type, torch.get_autocast_dtype(self.accelerator.device.type), enabled=enabled):
            states, _ = last_states(self.teacher.get_decoder(), partial(self.teacher, **inputs))
        return states.to(self.accelerator.device)

    @property
    def current_divergence(self) -> Divergence:
        """The divergence of the current step: forward KL during the warm-up."""
        return "forward_kl" if self.state.global_step < self.forward_kl_steps else self.divergence
