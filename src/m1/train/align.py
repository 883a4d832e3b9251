"""Alignment: before distillation, each Mamba mixer learns to give the output of the attention that it replaces.

The student runs with the teacher's attention outputs in place of its mixers' own, so each mixer sees the inputs that
the attention saw. Beside it, the mixer is trained towards that output (MOHAWK, arXiv 2408.10189, stage 2). The gradient
passes through one mixer only: no other layer, MLP or head has one. So a batch costs less than one of distillation.

    loss = mean over the Mamba layers of |mixer(x) - attention(x)|^2 / |attention(x)|^2, over all tokens
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig

from m1.errors import UserError
from m1.model.configuration import MAMBA, layer_kinds
from m1.recipe import AlignStage
from m1.train import distill
from m1.train.distill import DistillTrainer, load_pair
from m1.train.sft import forward_arguments
from m1.train.stage_trainer import weights_in_products
from m1.train.trainer import refuse_ignored, run_training


def align(stage: AlignStage, resume: bool = False, force: bool = False) -> None:
    """Trains the mixers of stage.model and saves the model to stage.out. Raises UserError for bad input."""
    run_training(stage, arguments_of(stage), align_trainer, resume, force)


def align_trainer(stage: AlignStage, arguments: SFTConfig) -> "AlignTrainer":
    """The stage's trainer, with both models and the data. Raises UserError for models whose layers don't correspond."""
    options = load_pair(stage, arguments)
    model, teacher = options["model"], options["teacher"]
    check_layers(model, teacher, f"{stage.model} and {stage.teacher}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mamba." in name)
    return AlignTrainer(**options)


def arguments_of(stage: AlignStage) -> SFTConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]`."""
    ignored = ["gradient_checkpointing"] if stage.trainer.get("gradient_checkpointing") else []
    refuse_ignored(stage.trainer, ignored, "a mixer's gradient passes through no other layer")
    if stage.shard:
        raise UserError("align: shard = true can't be: mixers train inside their layers; remove it")
    arguments = distill.arguments_of(stage)
    arguments.gradient_checkpointing = False
    return arguments


def check_layers(student: PreTrainedModel, teacher: PreTrainedModel, names: str) -> None:
    """Raises UserError unless the student has Mamba layers, and the teacher attention of the same width in each."""
    if MAMBA not in layer_kinds(student.config):
        raise UserError(
            f"align: {names.split(' and ')[0]} has no Mamba layers: give a hybrid, as `m1 convert` makes it"
        )
    shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (student, teacher)]
    if shapes[0] != shapes[1]:
        texts = [f"{layers} layers of {width}" for layers, width in shapes]
        raise UserError(f"align: {names} have {' and '.join(texts)}: give the teacher that the student was made from")
    if MAMBA in layer_kinds(teacher.config):
        raise UserError(f"align: the second of {names} has Mamba layers, too: give the transformer")


class AlignTrainer(DistillTrainer):
    """Trains the mixers of a model, whose other weights are frozen, towards a teacher's attention.

    Its arguments are those of `DistillTrainer`.
    """

    compiles = False  # layers with hooks inside don't

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss isn't a sum over tokens: each batch counts the same
        self._wanted: dict[int, Tensor] = {}  # by layer, the teacher's attention output [b, T, H]
        self._errors: list[Tensor] = []
        self._real: Tensor | None = None  # [b, T] the batch's real tokens; None for all
        mixers = self.accelerator.unwrap_model(self.model).get_decoder().layers
        for i, layer in enumerate(self.teacher.get_decoder().layers):
            if hasattr(mixers[i], "mamba"):
                layer.self_attn.register_forward_hook(self._keeps(i))
                mixers[i].mamba.register_forward_hook(self._compares(i))

    @property
    def flops_per_token(self) -> float:
        """Operations per trained token: both models' forward pass, and the mixers' backward pass."""
        model = self.accelerator.unwrap_model(self.model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return 2 * weights_in_products(model) + 2 * weights_in_products(self.teacher) + 4 * trained

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mixers' relative errors, averaged over layers. Overrides the divergence."""
        self.count_tokens(inputs)
        forward = forward_arguments(inputs)
        self.teacher_states(forward)
        self._real, self._errors = inputs.get("attention_mask"), []
        outputs = model(**forward)
        self._wanted.clear()
        loss = torch.stack(self._errors).mean()
        self.note("attention_error", loss, 1)
        return (loss, outputs) if return_outputs else loss

    def _keeps(self, i: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
            self._wanted[i] = output[0]

        return keep

    def _compares(self, i: int) -> Any:
        def compare(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            wanted = self._wanted[i].to(output.device)
            error, size = (x.float().square().sum(dim=-1) for x in (output - wanted, wanted))
            if self._real is not None:
                error, size = error * self._real, size * self._real
            self._errors.append(error.sum() / size.sum())
            return wanted.to(output.dtype)

        return compare
