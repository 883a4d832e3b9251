"""A problem with its gold answers, and how a row of a data set states them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

from m1.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A problem to be solved, with its gold answers.

    Attributes:
        id: unique within a task.
        text: the problem. It replaces {problem} in the prompt template.
        answers: the golds. An answer that equals any of them is right.
    """

    id: str
    text: str
    answers: tuple[str, ...]


def problems_hash(problems: Iterable[Problem]) -> str:
    """sha256 of the problems' ids, texts and answers."""
    return hashlib.sha256(json.dumps([astuple(problem) for problem in problems]).encode()).hexdigest()


def problem_and_golds(row: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """A row's `problem`, and its `answers` or single `answer`, as strings. Raises UserError naming `where`."""
    golds = row.get("answers") or row.get("answer")
    golds = golds if isinstance(golds, list) else [golds]
    if not isinstance(row.get("problem"), str) or not all(isinstance(gold, str | int | float) for gold in golds):
        raise UserError(f"{where}: needs a text `problem` and `answer` (or a list `answers`); has {sorted(row)}")
    return row["problem"], [str(gold) for gold in golds]
