"""Training data: turns a recipe's `[data]` table into a data set with the columns that TRL expects."""

import random

from datasets import Dataset

from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.recipe import Data
from m1.tasks.chain import chain_problems
from m1.tasks.problem import problem_and_golds

BUCKET_WINDOW = 16  # groups sorted together: more makes lengths more similar, fewer keeps groups more random


def conversations(data: Data) -> Dataset:
    """Loads rows {"messages": [...]} for supervised training and distillation.

    Raises:
        UserError: an unreadable or empty file, or a row with neither messages nor a problem with its solution.
    """
    rows = []
    for number, row in enumerate(_rows(data), start=1):
        match row:
            case {"messages": [_, *_] as messages} if all(_is_message(message) for message in messages):
                rows.append({"messages": messages})
            case {"problem": str(problem), "solution": str(solution)}:
                prompt = data.prompt_template.replace("{problem}", problem)
                rows.append({"messages": [_user(prompt), {"role": "assistant", "content": solution}]})
            case _:
                raise UserError(
                    f"{data.path}, row {number}: needs `messages`, a list of {{role, content}} texts, or the texts "
                    f"`problem` and `solution`; has {sorted(row)}"
                )
    return Dataset.from_list(bucketed(rows, data.bucket, data.seed) if data.bucket else rows)


def problems(data: Data) -> Dataset:
    """Loads rows {"prompt": [user message], "answers": [...]} for RL.

    Raises:
        UserError: an unreadable or empty file, or a row without a problem or its answers.
    """
    rows = []
    for number, row in enumerate(_rows(data), start=1):
        problem, golds = problem_and_golds(row, f"{data.path}, row {number}")
        rows.append({"prompt": [_user(data.prompt_template.replace("{problem}", problem))], "answers": golds})
    return Dataset.from_list(rows)


def bucketed(rows: list[dict], size: int, seed: int) -> list[dict]:
    """Groups rows of similar length, `size` rows per group, and puts the groups in random order.

    A trainer that keeps this order needs less padding. Rows are sorted by length within windows of BUCKET_WINDOW
    groups.
    """
    window = size * BUCKET_WINDOW
    runs = []
    for start in range(0, len(rows), window):
        ordered = sorted(rows[start : start + window], key=lambda row: sum(len(m["content"]) for m in row["messages"]))
        runs += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(seed).shuffle(runs)
    return [row for run in runs for row in run]


def _rows(data: Data) -> list[dict]:
    if data.task == "chain":
        found = chain_problems(data.count, data, "train", data.seed, data.slip_rate)
        return [{"problem": p.problem, "solution": p.solution, "answer": p.answer} for p in found]
    assert data.path is not None
    rows = list(read_jsonl(data.path))[: data.limit]
    if not rows:
        raise UserError(f"{data.path} has no rows")
    return rows


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
