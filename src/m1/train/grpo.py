"""Reinforcement learning with verifiable rewards (paper §3.4).

It uses TRL's GRPOTrainer without a KL term and with an entropy bonus. This project's engine generates the rollouts, or
vLLM.
"""

import logging
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from m1.errors import UserError
from m1.grading import Grader
from m1.model.checkpoint import load_model
from m1.model.tokenizer import encode_chat
from m1.recipe import GRPOStage
from m1.train.data import problems
from m1.train.distributed import with_batch
from m1.train.grpo_trainer import Trainer
from m1.train.rewards import reward_functions
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
    "logging_steps": 1,
    "vllm_importance_sampling_mode": "token_truncate",
}
IGNORED = ("repetition_penalty", "generation_kwargs", "cache_implementation", "chat_template_kwargs")
IGNORED_FAMILIES = ("use_vllm", "use_transformers_", "transformers_continuous_")
# What cuts the distribution that a token is drawn from, and the value that cuts nothing.
CUTS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "vllm_structured_outputs_regex": None}
VLLM, CORRECTION = "vllm_", "vllm_importance_sampling_"


def grpo(stage: GRPOStage, resume: bool = False, force: bool = False) -> None:
    """Trains stage.model on stage.data and saves to stage.out. Raises UserError for bad input."""
    with Grader() as grader:
        run_training(stage, arguments_of(stage), partial(grpo_trainer, grader), resume, force)
        if any(grader.counts[name] for name in ("timeout", "crash", "error")):
            logger.warning("some answers couldn't be graded and got reward 0: %s", dict(grader.counts))


def grpo_trainer(grader: Grader, stage: GRPOStage, arguments: GRPOConfig) -> Trainer:
    """The stage's trainer, with model, data, rewards and rollouts."""
    model, tokenizer = load_model(stage.model, **model_options(stage.trainer))
    stage.use_chat_template(tokenizer)
    fitting, longest = fitting_problems(stage, arguments, tokenizer, model.config.max_position_embeddings)
    rows, held_out = split(fitting, stage.eval_rows, arguments.seed)
    return Trainer(
        stage,
        longest + arguments.max_completion_length,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        reward_funcs=reward_functions(stage, arguments, grader, tokenizer),
    )


def fitting_problems(
    stage: GRPOStage, arguments: GRPOConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[Dataset, int]:
    """The rows of `problems` whose prompt leaves room for a completion, and their longest prompt's number of tokens.

    Logs how many don't fit.

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
    return Dataset.from_list(fitting), max(length for length in lengths if length <= room)


def arguments_of(stage: GRPOStage) -> GRPOConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]`."""
    given = stage.trainer
    engine = stage.rollout == "engine"
    ignored = [key for key in given if key in IGNORED or key.startswith(IGNORED_FAMILIES)]
    ignored += [key for key in given if engine and key.startswith(VLLM) and not key.startswith(CORRECTION)]
    refuse_ignored(given, ignored, f"M1 {'samples the rollouts itself' if engine else 'tells vLLM how to sample'}")
    if "reward_weights" in given:
        raise UserError("[trainer]: reward_weights: the table [rewards] has each reward's weight; remove the key")
    if stage.data.streaming or stage.data.weights:
        raise UserError("[data] streaming and weights are for sft and distill: remove them")
    defaults = DEFAULTS | eval_defaults(stage) | best_defaults(stage) | {"reward_weights": [*stage.rewards.values()]}
    arguments = trainer_arguments(GRPOConfig, stage.out, with_batch(GRPOConfig, stage), **defaults)
    if arguments.loss_type == "cispo" and arguments.epsilon_high is None:
        raise UserError("[trainer]: loss_type = 'cispo' cuts ratios off at epsilon_high itself: set it, e.g. to 5.0")
    if arguments.loss_type == "vespo" and arguments.vllm_importance_sampling_mode.startswith("sequence"):
        raise UserError("[trainer]: with loss_type = 'vespo' vllm_importance_sampling_mode must be token_...")
    if not engine:
        check_vllm(stage, arguments)
    whole = arguments.per_device_train_batch_size * arguments.steps_per_generation % arguments.num_generations == 0
    if stage.zero_variance == "resample" and not whole:
        raise UserError(
            f"zero_variance='resample': a process's {arguments.per_device_train_batch_size} x "
            f"{arguments.steps_per_generation} samples must be whole groups of num_generations = "
            f"{arguments.num_generations}"
        )
    return arguments


def check_vllm(stage: GRPOStage, arguments: GRPOConfig) -> None:
    """Raises UserError if vLLM isn't there, or can't sample as these arguments say."""
    if not is_vllm_available():
        raise UserError(
            'rollout = "vllm": vLLM isn\'t installed: `pip install m1-reasoning[vllm]`, or set rollout = "engine"'
        )
    for key, none in CUTS.items():
        if (value := getattr(arguments, key) or none) != none:
            raise UserError(
                f"[trainer]: {key} = {value!r}: vLLM's log-probabilities are those after the cut, and the trainer's "
                'before it, so drift couldn\'t be told: remove the key, or set rollout = "engine"'
            )
    sleeps = arguments.vllm_enable_sleep_mode and stage.shard
    if stage.zero_variance == "resample" and sleeps and arguments.world_size > 1:
        raise UserError(
            "zero_variance='resample': processes draw different numbers of times, and each time would gather the "
            "sharded weights for a vLLM that slept: set vllm_enable_sleep_mode = false"
        )
    shared = arguments.vllm_mode == "server" or arguments.vllm_tensor_parallel_size > 1
    if stage.zero_variance == "resample" and shared and arguments.world_size > 1:
        raise UserError(
            "zero_variance='resample': each process draws other problems, so none may share a vLLM: set "
            "vllm_mode = 'colocate' and vllm_tensor_parallel_size = 1"
        )


def best_defaults(stage: GRPOStage) -> dict[str, Any]:
    """With held-out rows, the checkpoint with the best reward on them is kept, and is what the stage saves."""
    if not stage.eval_rows or stage.trainer.get("eval_strategy", "epoch") == "no":
        return {}
    strategy = stage.trainer.get("eval_strategy", "epoch")
    steps = {"save_steps": stage.trainer["eval_steps"]} if "eval_steps" in stage.trainer else {}
    return {
        "save_strategy": strategy,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "greater_is_better": True,
        "save_total_limit": 3,
        **steps,
    }
