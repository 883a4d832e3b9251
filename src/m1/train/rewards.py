"""The rewards of RL: functions with names and weights, logged apart. TRL sums them.

A reward function has TRL's signature: it takes `prompts`, `completions` (lists of messages), `completion_ids` and the
rows' columns, such as `answers`, all as keyword arguments, and returns one number per completion, or None for one that
it can't judge.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from m1.errors import UserError
from m1.grading import Grader, with_thought
from m1.grading.extract import extract_answer
from m1.model.tokenizer import decode_text, encode_chat
from m1.recipe import BUILT_IN_REWARDS, GRPOStage

Reward = Callable[..., list[float | None]]


def reward_functions(
    stage: GRPOStage, arguments: GRPOConfig, grader: Grader, tokenizer: PreTrainedTokenizerBase
) -> list[Reward]:
    """The functions of `stage.rewards`, in its order. Each has the name that it is logged by.

    Raises:
        UserError: a function that can't be imported, or two with one name.
    """
    buffer = stage.overlong_tokens or max(1, arguments.max_completion_length // 5)
    built_in: dict[str, Reward] = {
        "correct": correctness(grader, tokenizer),
        "answered": answered,
        "overlong": get_soft_overlong_punishment(arguments.max_completion_length, buffer),
    }
    functions = []
    for entry in stage.rewards:
        function = built_in[entry] if entry in BUILT_IN_REWARDS else imported(entry)
        functions.append(_checked(function, entry.rpartition(":")[2]))
    names = [function.__name__ for function in functions]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"[rewards]: two functions are called {repeated[0]!r}: rename one")
    return functions


def correctness(grader: Grader, tokenizer: PreTrainedTokenizerBase) -> Reward:
    """Makes the reward `correct`: 1 if a completion's final answer equals one of the golds, else 0."""

    def correct(prompts: list[Any], completions: list[Any], answers: list[list[str]], **_: Any) -> list[float | None]:
        prompt = decode_text(tokenizer, encode_chat(tokenizer, prompts[0]))  # all end as the chat template says
        texts = [with_thought(prompt, completion[-1]["content"]) for completion in completions]
        return [float(ok) for ok in grader.grade_texts(texts, answers)]

    return correct


def answered(completions: list[Any], **_: Any) -> list[float | None]:
    """The reward `answered`: 1 if a completion has a final answer, right or wrong, else 0."""
    return [float(extract_answer(completion[-1]["content"]) is not None) for completion in completions]


def imported(entry: str) -> Reward:
    """Imports "FILE.py:FUNCTION" or "MODULE:FUNCTION". Raises UserError if there is no such function."""
    where, _, name = entry.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(where)
        return getattr(module, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise UserError(f"[rewards]: can't import {entry!r}: {error}") from error


def _checked(function: Reward, name: str) -> Reward:
    """The function, whose values must be finite numbers or None, one per completion."""

    def reward(**columns: Any) -> list[float | None]:
        values = list(function(**columns))
        if len(values) != len(columns["completions"]) or not all(v is None or math.isfinite(v) for v in values):
            raise UserError(
                f"[rewards]: {name} must return a finite number or None for each of {len(columns['completions'])} "
                f"completions, and returned {values[:8]}"
            )
        return values

    reward.__name__ = name
    return reward
