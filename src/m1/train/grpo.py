"""RL with verifiable rewards (paper §3.4): TRL's GRPOTrainer, no KL term, an entropy bonus, the engine's rollouts."""

import logging
from typing import Any

from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.reasoning.answers import Grader
from m1.recipe import GRPOStage
from m1.train import stage
from m1.train.data import problems
from m1.train.rollout import EngineRollouts

logger = logging.getLogger(__name__)

DEFAULTS = {
    "beta": 0.0,
    "entropy_coef": 0.01,
    "num_generations": 8,
    "gradient_checkpointing": False,
    "remove_unused_columns": False,
}


def grpo(recipe: GRPOStage, resume: bool = False) -> None:
    """Trains recipe.model on recipe.data and saves to recipe.out. Raises UserError for bad input."""
    arguments = arguments_of(recipe)
    set_seed(arguments.seed)
    model, tokenizer = load_model(recipe.model, **stage.model_options(recipe.trainer))
    with Grader() as grader:
        trainer = GRPOTrainer(
            model=model,
            args=arguments,
            train_dataset=problems(recipe.data),
            processing_class=tokenizer,
            reward_funcs=correctness_reward(grader),
            rollout_func=EngineRollouts(recipe.max_num_seqs),
        )
        stage.run(trainer, recipe.out, recipe, resume)
    if any(grader.counts[name] for name in ("timeout", "crash", "error")):
        logger.warning("grading gave up on some answers and rewarded them 0: %s", dict(grader.counts))


def arguments_of(recipe: GRPOStage) -> GRPOConfig:
    """Raises UserError for a `[trainer]` that can't be."""
    arguments = stage.trainer_arguments(GRPOConfig, recipe.out, recipe.trainer, **DEFAULTS)
    if arguments.entropy_coef < 0:
        raise UserError(f"[trainer] entropy_coef = {arguments.entropy_coef} must not be negative")
    return arguments


def correctness_reward(grader: Grader) -> Any:
    """A reward function for TRL: 1 where the completion's final answer equals one of the golds, else 0."""

    def correct(completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(ok) for ok in grader.grade_texts(texts, answers)]

    return correct
