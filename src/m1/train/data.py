"""Training data: a recipe's `[data]` table becomes rows with the keys TRL knows."""

import random

from datasets import Dataset

from m1.errors import UserError
from m1.jsonl import problem_and_golds, read_jsonl
from m1.reasoning.chain import chain_problems
from m1.recipe import Data

BUCKET_WINDOW = 16  # runs sorted together: enough for similar lengths, few enough that runs stay random samples


def conversations(data: Data) -> Dataset:
    """Rows {"messages": [user, assistant]} for supervised training and distillation."""
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
    """Rows {"prompt": [user], "answers": [...]} for RL."""
    rows = []
    for number, row in enumerate(_rows(data), start=1):
        problem, golds = problem_and_golds(row, f"{data.path}, row {number}")
        rows.append({"prompt": [_user(data.prompt_template.replace("{problem}", problem))], "answers": golds})
    return Dataset.from_list(rows)


def bucketed(rows: list[dict], size: int, seed: int) -> list[dict]:
    """The rows in runs of `size` similar lengths, runs in random order: sorted inside windows of BUCKET_WINDOW runs."""
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
