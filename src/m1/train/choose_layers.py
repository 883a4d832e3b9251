"""Chooses the layers that stay attention, by training with both in every layer: its attention and an aligned mixer.

A layer blends the two. What it adds to its input is

    share * attention(x) + (1 - share) * mixer(x)        share = sigmoid(SCALE * gate + c)

The number c is such that the shares add up to a budget. It is halfway between all layers and `keep` at first, because
with attention alone the model is the teacher and has no gradient. In the first half of the steps it falls to `keep`.
Weights and gates learn to match the teacher under forward KL, so a layer whose mixer can do what its attention did
loses its share to one whose mixer can't. The first `keep` layers by share stay attention.

rank_layers.py measures what replacing a layer costs now; this looks at what training doesn't mend.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from trl import SFTConfig

from m1.errors import UserError
from m1.jsonl import write_json
from m1.model.configuration import ATTENTION, MAMBA, layer_kinds
from m1.model.modeling import M1Attention, M1DecoderLayer
from m1.model.packing import Padding
from m1.recipe import ChooseLayersStage
from m1.train import distill
from m1.train.align import check_layers
from m1.train.distill import DistillTrainer, load_pair
from m1.train.distributed import world_size
from m1.train.trainer import run_training

RANKING = "ranking.json"
SCALE = 16.0  # so that gates move as fast as they have to at the weights' learning rate
LARGEST = 30.0  # a logit whose sigmoid is 1
HALVINGS = 40


def choose_layers(stage: ChooseLayersStage, resume: bool = False, force: bool = False) -> None:
    """Trains gates and saves the chosen hybrid and OUT/ranking.json to stage.out. Raises UserError for bad input."""
    run_training(stage, arguments_of(stage), choice_trainer, resume, force)


def arguments_of(stage: ChooseLayersStage) -> SFTConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]`."""
    if stage.shard or world_size() > 1:
        raise UserError("choose-layers runs in one process, without shard = true: start it with m1, not torchrun")
    return distill.arguments_of(stage)


def choice_trainer(stage: ChooseLayersStage, arguments: SFTConfig) -> "ChoiceTrainer":
    """The stage's trainer, with both models and the data. Raises UserError for models that it can't blend."""
    options = load_pair(stage, arguments)
    model, teacher = options["model"], options["teacher"]
    check_layers(model, teacher, f"{stage.model} and {stage.teacher}")
    if (kept := layer_kinds(model.config).count(ATTENTION)) or stage.keep >= model.config.num_hidden_layers:
        raise UserError(
            f"choose-layers: keep = {stage.keep} of the {model.config.num_hidden_layers} layers of {stage.model}, of "
            f"which {kept} are attention already: give a model that was converted with keep_attention = none, and keep "
            "fewer layers than it has"
        )
    blend(model, teacher)
    return ChoiceTrainer(**options, divergence="forward_kl", keep=stage.keep)


class BlendedLayer(M1DecoderLayer):
    """A decoder layer with both kinds of mixers, and the share of attention, a number of 0 to 1."""

    share: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        padding: Padding | None,
        position_embeddings: tuple[Tensor, Tensor],
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `M1DecoderLayer`."""
        x = self.input_layernorm(hidden_states)
        attention, _ = self.self_attn(x, position_embeddings, attention_mask, cache, **kwargs)
        hidden_states = hidden_states + torch.lerp(self.mamba(x, seq_idx, padding, cache), attention, self.share)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def blend(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Gives each layer of an M1 model without attention the teacher's attention, too, and the model gates [layers]."""
    for i, layer in enumerate(model.get_decoder().layers):
        layer.self_attn = M1Attention(model.config, i).to(model.device, model.dtype)
        layer.self_attn.load_state_dict(teacher.get_decoder().layers[i].self_attn.state_dict())
        layer.__class__ = BlendedLayer
    model.gates = nn.Parameter(torch.zeros(len(model.get_decoder().layers), device=model.device))
    model.config.layer_types = [ATTENTION, *model.config.layer_types[1:]]  # so both kinds' masks are made


def choose(model: PreTrainedModel, gates: Tensor, keep: int) -> dict[str, Any]:
    """Makes a blended model the hybrid whose `keep` layers with the largest gates are attention.

    Args:
        gates: [layers] float32, as they were trained.

    Returns:
        {"ranking": the layers by their gates, "shares": {layer: share of attention}}.
    """
    ranking = gates.argsort(descending=True, stable=True).tolist()
    kinds = [ATTENTION if i in ranking[:keep] else MAMBA for i in range(len(ranking))]
    for layer, kind in zip(model.get_decoder().layers, kinds, strict=True):
        layer.__class__, layer.layer_type = M1DecoderLayer, kind
        layer.__dict__.pop("share", None)  # there is none if no step ran, as when all had before
        delattr(layer, "mamba" if kind == ATTENTION else "self_attn")
    del model.gates
    model.config.layer_types = kinds
    return {"ranking": ranking, "shares": {str(i): share for i, share in enumerate(shares(gates, keep).tolist())}}


def shares(gates: Tensor, budget: float) -> Tensor:
    """[n] gates -> [n] numbers of 0 to 1 whose sum is the budget, without waiting for a GPU."""
    logits = SCALE * gates
    fixed = logits.detach()
    low, high = -fixed.max() - LARGEST, LARGEST - fixed.min()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_much = torch.sigmoid(fixed + middle).sum() > budget
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    return torch.sigmoid(logits + low)


class ChoiceTrainer(DistillTrainer):
    """Trains a blended model towards its teacher while less and less of its layers is attention.

    Args:
        keep: the budget from half of the steps on. Other arguments are those of `DistillTrainer`.
    """

    def __init__(self, *args: Any, keep: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keep = keep

    @property
    def budget(self) -> float:
        """The sum of all shares at this step."""
        left = max(1 - 2 * self.state.global_step / max(self.state.max_steps, 1), 0)
        return self.keep + left * (len(self.model.gates) - self.keep) / 2

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in all stages; gates don't decay."""
        return [name for name in super().get_decay_parameter_names(model) if name != "gates"]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The divergence, under the current shares."""
        network = self.accelerator.unwrap_model(model)
        for layer, share in zip(network.get_decoder().layers, shares(network.gates, self.budget), strict=True):
            layer.share = share
        return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and keeps the gates as they were trained: the model is rounded before it is saved."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.gates = self.accelerator.unwrap_model(self.model).gates.detach().float().clone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint is of the blended model; at last the chosen hybrid is saved, and the ranking beside it."""
        if not _internal_call:
            choice = choose(self.accelerator.unwrap_model(self.model), self.gates, self.keep)
            if self.args.should_save and output_dir:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                write_json(Path(output_dir, RANKING), choice)
        super().save_model(output_dir, _internal_call)
