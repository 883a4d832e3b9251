"""Reinforcement learning with verifiable rewards (paper §3.4).

It uses TRL's GRPOTrainer without a KL term and with an entropy bonus. This project's engine generates the rollouts.
"""

import logging
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from m1.errors import UserError
from m1.grading import Grader, with_thought
from m1.model.checkpoint import load_model
from m1.model.tokenizer import decode_text, encode_chat
from m1.recipe import GRPOStage
from m1.train.data import problems
from m1.train.rollout import EngineRollouts
from m1.train.stage_trainer import StageTrainer
from m1.train.trainer import (
    eval_defaults,
    model_options,
    refuse_ignored,
    run_training,
    split,
    trainer_arguments,
)

logger = logging.getLogger(__name__)

DEFAULTS = {
    "beta": 0.0,
    "entropy_coef": 0.01,
    "num_generations": 8,
    "gradient_checkpointing": False,
    "remove_unused_columns": False,
}
IGNORED = ("min_p", "repetition_penalty", "generation_kwargs", "cache_implementation", "chat_template_kwargs")
IGNORED_FAMILIES = ("use_vllm", "vllm_", "use_transformers_", "transformers_continuous_")


def grpo(stage: GRPOStage, resume: bool = False, force: bool = False) -> None:
    """Trains stage.model on stage.data and saves to stage.out. Raises UserError for bad input."""
    with Grader() as grader:
        run_training(stage, arguments_of(stage), partial(grpo_trainer, grader), resume, force)
        if any(grader.counts[name] for name in ("timeout", "crash", "error")):
            logger.warning("some answers couldn't be graded and got reward 0: %s", dict(grader.counts))


class Trainer(StageTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with what all stages have in common."""

    @property
    def flops_per_token(self) -> float:
        """Operations per trained token, with the forward pass that sampled it."""
        return super().flops_per_token * 4 / 3


def grpo_trainer(grader: Grader, stage: GRPOStage, arguments: GRPOConfig) -> Trainer:
    """The stage's trainer, with model, data, reward and rollouts."""
    model, tokenizer = load_model(stage.model, **model_options(stage.trainer))
    stage.use_chat_template(tokenizer)
    fitting = fitting_problems(stage, arguments, tokenizer, model.config.max_position_embeddings)
    rows, held_out = split(fitting, stage.eval_rows, arguments.seed)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        mixer_lr_scale=stage.mixer_lr_scale,
        reward_funcs=correctness_reward(grader, tokenizer),
        rollout_func=EngineRollouts(stage.max_num_seqs),
    )


def fitting_problems(
    stage: GRPOStage, arguments: GRPOConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> Dataset:
    """The rows of `problems` whose prompt leaves room for a completion. Logs how many don't.

    Args:
        stage: the stage.
        arguments: its trainer's, for max_completion_length.
        tokenizer: with its chat template.
        context: the model's, in tokens.

    Raises:
        UserError: as `problems`, or none fits.
    """
    rows = list(problems(stage.data))
    room = context - arguments.max_completion_length
    lengths = [len(encode_chat(tokenizer, row["prompt"])) for row in rows]
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= room]
    if not fitting:
        raise UserError(
            f"no prompt fits: the shortest of {len(rows)} has {min(lengths)} tokens, and max_completion_length = "
            f"{arguments.max_completion_length} leaves {room} of the model's {context}; lower max_completion_length"
        )
    logger.info(
        "%d prompts, the longest of %d tokens; %d dropped, longer than the %d that max_completion_length leaves",
        len(fitting), max(lengths), len(rows) - len(fitting), room,
    )  # fmt: skip
    return Dataset.from_list(fitting)


def arguments_of(stage: GRPOStage) -> GRPOConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]`."""
    ignored = [key for key in stage.trainer if key in IGNORED or key.startswith(IGNORED_FAMILIES)]
    refuse_ignored(stage.trainer, ignored, "M1's engine samples the rollouts")
    if stage.data.streaming or stage.data.weights:
        raise UserError("[data] streaming and weights are for sft and distill: remove them")
    return trainer_arguments(GRPOConfig, stage.out, stage.trainer, **DEFAULTS, **eval_defaults(stage))


def correctness_reward(grader: Grader, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Makes a reward function for TRL: 1 if a completion's final answer equals one of the golds, else 0."""

    def correct(prompts: list[Any], completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
        prompt = decode_text(tokenizer, encode_chat(tokenizer, prompts[0]))  # all end as the chat template says
        texts = [with_thought(prompt, c if isinstance(c, str) else c[-1]["content"]) for c in completions]
        return [float(ok) for ok in grader.grade_texts(texts, answers)]

    return correct
