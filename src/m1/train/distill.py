"""Distillation on assistant tokens (paper §3.2): the student matches the teacher's next-token distribution.

    reverse KL   sum_v s(v) (log s(v) - log t(v))          the paper's
    forward KL   sum_v t(v) (log t(v) - log s(v))
    JSD          half of each against the mean of s and t

A student far from a near-deterministic teacher learns little from reverse KL. Its gradient vanishes where s has no mass
on the teacher's token. `forward_kl_steps` sets the length of a warm-up with forward KL.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.recipe import DistillStage
from m1.train.sft import arguments_of, training_rows
from m1.train.trainer import model_options, run_training

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
CHUNK_TOKENS = 1024  # tokens whose logits exist at a time


def distill(stage: DistillStage, resume: bool = False, force: bool = False) -> None:
    """Trains stage.model towards stage.teacher and saves to stage.out. Raises UserError for bad input."""
    run_training(stage, arguments_of(stage), distill_trainer, resume, force)


def distill_trainer(stage: DistillStage, arguments: SFTConfig) -> "DistillTrainer":
    """The stage's trainer, with both models and the data. Raises UserError for models of different vocabularies."""
    options = model_options(stage.trainer)
    model, tokenizer = load_model(stage.model, **options)
    teacher, _ = load_model(stage.teacher, **(options | {"dtype": "auto"}))
    if teacher.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{stage.teacher} has a vocabulary of {teacher.config.vocab_size} and {stage.model} of "
            f"{model.config.vocab_size}: a teacher must share its student's tokenizer"
        )
    return DistillTrainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(stage, arguments, tokenizer, model),
        processing_class=tokenizer,
        teacher=teacher,
        divergence=stage.divergence,
        forward_kl_steps=stage.forward_kl_steps,
    )


class DistillTrainer(SFTTrainer):
    """TRL's SFTTrainer with a divergence from a teacher in place of the cross-entropy.

    Args:
        teacher: a causal LM with the student's vocabulary.
        divergence: the loss, per assistant token.
        forward_kl_steps: optimizer steps under forward KL before `divergence` takes over.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        divergence: Divergence = "reverse_kl",
        forward_kl_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        self.divergence, self.forward_kl_steps = divergence, forward_kl_steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divergence from the teacher, averaged over assistant tokens. Overrides TRL's loss."""
        labels = inputs["labels"]
        # The model's own forward, with its wrappers, runs for its last hidden states. It makes logits of one position.
        forward = {k: v for k, v in inputs.items() if k != "labels"}
        forward |= {"use_cache": False, "output_hidden_states": True, "logits_to_keep": 1}
        outputs = model(**forward)
        with torch.no_grad():
            teacher_states = self.teacher(**forward).hidden_states[-1]
        selected = labels[:, 1:] != -100
        total = divergence_from_states(
            outputs.hidden_states[-1][:, :-1][selected],
            self.accelerator.unwrap_model(model).get_output_embeddings().weight,
            teacher_states[:, :-1][selected],
            self.teacher.get_output_embeddings().weight,
            self.current_divergence,
        )
        count = selected.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][self.current_divergence].append((total / selected.sum().clamp(min=1)).item())
        return (loss, outputs) if return_outputs else loss

    @property
    def current_divergence(self) -> Divergence:
        """The divergence of the current step: forward KL during the warm-up."""
        return "forward_kl" if self.state.global_step < self.forward_kl_steps else self.divergence


def divergence_from_states(
    student_states: Tensor, student_head: Tensor, teacher_states: Tensor, teacher_head: Tensor, kind: Divergence
) -> Tensor:
    """Sum over tokens of the divergence between two heads' distributions.

    Logits exist for CHUNK_TOKENS tokens at a time, also in the backward pass, which computes them again.

    Args:
        student_states, teacher_states: [tokens, H] of each model's own H.
        student_head, teacher_head: [V, H].

    Returns:
        A float32 scalar with gradients to the student's states and head.
    """

    def chunk_loss(student: Tensor, teacher: Tensor) -> Tensor:
        student_logits = student.to(student_head.dtype) @ student_head.T
        teacher_logits = teacher.to(teacher_head.dtype) @ teacher_head.T
        return divergence(student_logits, teacher_logits, kind).sum()

    total = (
        student_states.new_zeros((), dtype=torch.float32) + 0 * student_states.sum()
    )  # a gradient even without tokens
    for student, teacher in zip(student_states.split(CHUNK_TOKENS), teacher_states.split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(chunk_loss, student, teacher, use_reentrant=False)
    return total


def divergence(student_logits: Tensor, teacher_logits: Tensor, kind: Divergence) -> Tensor:
    """[tokens, V] logits of both -> [tokens] divergence in nats, float32."""
    s = student_logits.float().log_softmax(-1)
    t = teacher_logits.float().log_softmax(-1)
    if kind == "reverse_kl":
        return _kl(s, t)
    if kind == "forward_kl":
        return _kl(t, s)
    mean = torch.logaddexp(s, t) - torch.log(torch.tensor(2.0))
    return (_kl(s, mean) + _kl(t, mean)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)
