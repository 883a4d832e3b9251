"""What the trainers of all stages have in common at a step: parameter groups, and numbers that must be finite."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer

from m1.errors import UserError
from m1.model.checkpoint import one_line
from m1.model.mixer import Mixer
from m1.model.parallelize import is_sharded, shard, whole, whole_weights
from m1.train.distributed import any_process, load_shards, save_shards, world_size

UNDECAYED = ("A_log", "D")  # as in the mamba_ssm package; transformers itself leaves out biases and norms
SCHEDULE = "scheduler.pt"  # transformers' name
COUNTED = ("attention_mask", "prompt_mask", "completion_mask")  # the masks of a batch's real tokens


class StageTrainer(Trainer):
    """A mixin for TRL's trainers. Put it before the trainer among the base classes.

    Args:
        mixer_lr_scale: the learning rate of Mamba mixers, as a multiple of `learning_rate`.
        shard: split weights, gradients and optimizer over the processes. One process has them whole, and stores them
            in checkpoints as several do.

    Attributes:
        compiles: whether the layers of `networks` can be compiled.
        files: names of JSONL files that the trainer writes with `write_row`. A resumed run drops later steps' rows.
        write_row: appends a row to one of them, in the run's folder; does nothing outside a run.
        tokens: number of real tokens trained on so far, by this process in this session.

    Raises:
        UserError: when the optimizer is made, if there is a scale but no mixer.
    """

    files: tuple[str, ...] = ()
    compiles = True

    def __init__(self, *args: Any, mixer_lr_scale: float = 1.0, shard: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mixer_lr_scale, self.shard = mixer_lr_scale, shard
        self.write_row: Callable[[str, dict[str, Any]], None] = lambda name, row: None
        self.tokens: Tensor | int = 0
        self._unread: list[tuple[int, str, Tensor]] = []

    @property
    def networks(self) -> list[PreTrainedModel]:
        """The models whose layers a step runs."""
        return [self.accelerator.unwrap_model(self.model)]

    @property
    def flops_per_token(self) -> float:
        """Operations per trained token: 2 per weight in each of 3 passes, without attention scores or recomputing."""
        return 6 * weights_in_products(self.accelerator.unwrap_model(self.model))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters with weight decay: neither norms and biases nor the `A_log` and `D` of Mamba mixers."""
        return [n for n in super().get_decay_parameter_names(model) if n.rpartition(".")[2] not in UNDECAYED]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Makes the optimizer. With a `mixer_lr_scale`, each of its groups is split into mixers and the rest."""
        is_new = self.optimizer is None
        with one_line("[trainer]: its optimizer can't be made"):
            optimizer = super().create_optimizer(model)
        if is_new and self.mixer_lr_scale != 1:
            optimizer.param_groups[:] = self._split(optimizer, self.model if model is None else model)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's schedule of learning rates. Raises UserError for arguments that it doesn't take."""
        with one_line("[trainer]: its learning rates can't be scheduled"):
            return super().create_scheduler(*args, **kwargs)

    @property
    def group_sizes(self) -> list[dict[str, float]]:
        """The optimizer's groups: number of parameters, learning rate and weight decay. Empty groups are left out."""
        groups = [
            {
                "parameters": sum(p.numel() for p in group["params"]),
                "learning_rate": group.get("initial_lr", group["lr"]),
                "weight_decay": group.get("weight_decay", 0.0),
            }
            for group in (self.optimizer.param_groups if self.optimizer else ())
        ]
        return [group for group in groups if group["parameters"]]

    def _split(self, optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
        mixers = {id(p) for module in model.modules() if isinstance(module, Mixer) for p in module.parameters()}
        if not mixers:
            raise UserError(f"mixer_lr_scale={self.mixer_lr_scale}: the model has no Mamba layers; remove the key")
        groups = []
        for group in optimizer.param_groups:
            for inside, scale in ((False, 1.0), (True, self.mixer_lr_scale)):
                parameters = [p for p in group["params"] if (id(p) in mixers) == inside]
                groups.append({**group, "params": parameters, "lr": scale * group["lr"]})
        return groups

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass. Notes the loss, for `check_finite`."""
        loss = super().training_step(*args, **kwargs)
        self._unread.append((self.state.global_step + 1, "loss", loss.detach()))
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss. Counts the tokens."""
        self.count_tokens(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def count_tokens(self, inputs: dict[str, Any]) -> None:
        """Adds a training batch to `tokens`, without waiting for the GPU."""
        if self.model.training:
            masks = [inputs[name] for name in COUNTED if name in inputs]
            self.tokens = self.tokens + (sum(mask.sum() for mask in masks) if masks else inputs["input_ids"].numel())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, noted for `check_finite`. In float16 it may overflow: then the loss scale is lowered."""
        grad_norm = whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm), device=self.args.device))
        if self.accelerator.scaler is None:
            self._unread.append((self.state.global_step + 1, "gradient norm", grad_norm))
        return grad_norm

    # Sharding

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Shards the model before the optimizer is made. accelerate then leaves it as it is, without DDP around it."""
        if self.shard and world_size() > 1 and not is_sharded(self.model):
            shard(self.model, self.args.device)
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            self.model._is_accelerate_prepared = True
        return super()._prepare_for_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model. In checkpoints of a sharded training, the weights are in the shards instead."""
        if self.shard and _internal_call:
            return
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights = {}
        for name, weight in whole_weights(self.model):
            if self.args.should_save:
                weights[name] = weight.cpu()
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shard:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(Path(output_dir), self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads a checkpoint's weights. Those in shards are loaded later, with the optimizer."""
        if not self.shard:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shard or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_shards(checkpoint, self.model, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULE), weights_only=True))

    def _load_best_model(self) -> None:
        if self.shard:
            load_shards(self.state.best_model_checkpoint, self.model)
        else:
            super()._load_best_model()

    def check_finite(self) -> None:
        """Raises UserError if a loss or gradient norm since the last check, or a weight, isn't finite anywhere."""
        problem = self._not_finite()
        if any_process(problem is not None):
            raise problem or not_finite(self.state.global_step, "another process has a number that isn't finite")

    def _not_finite(self) -> UserError | None:
        noted, self._unread = self._unread, []
        if noted:
            values = torch.stack([value.to(torch.float32).reshape(()) for *_, value in noted]).tolist()
            for (step, what, _), value in zip(noted, values, strict=True):
                if not math.isfinite(value):
                    return not_finite(step, f"the {what} is {value}")
        if name := first_not_finite(self.model.named_parameters()):
            return not_finite(self.state.global_step, f"the weight {name} isn't finite")
        return None


def not_finite(step: int, what: str) -> UserError:
    """The error for training that has diverged, or began from a broken checkpoint."""
    return UserError(
        f"step {step}: {what}. Training has stopped and no model was saved; the last good checkpoint is kept. "
        "Lower the learning rate, or check the model and the data"
    )


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None if there is none."""
    local = [(name, t.to_local() if isinstance(t, DTensor) else t) for name, t in tensors]
    named = [(name, t) for name, t in local if t.numel()]  # of a short one a process may have no part
    if get_total_norm([t for _, t in named], math.inf).isfinite():  # the largest magnitude: one pass, one number
        return None
    return next(name for name, t in named if not t.isfinite().all())


def weights_in_products(model: PreTrainedModel) -> int:
    """Number of weights that a token is multiplied with: all but an embedding that isn't the head, too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    total = sum(p.numel() for p in model.parameters())
    return total if head.weight is embedding.weight else total - embedding.weight.numel()
