"""Training data: reads a recipe's `[data]` sources, in the formats that data sets are published in."""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from m1.data_options import Data
from m1.errors import UserError
from m1.runs import sha256
from m1.tasks.chain import chain_problems
from m1.tasks.overlap import Overlap
from m1.tasks.problem import problem_and_golds
from m1.tasks.prompts import Messages
from m1.tasks.rows import is_file, read_rows, some_rows
from m1.train.data_mask import Conversation

logger = logging.getLogger(__name__)

BUCKET_WINDOW = 16  # groups sorted together: more makes lengths more similar, fewer keeps groups more random
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def conversations(data: Data, source: str, rows: Iterable[dict[str, Any]]) -> Iterator[Conversation]:
    """Yields a source's conversations, for supervised training and distillation.

    A row has one of

        messages              [{"role", "content"}, ...]
        conversations         ShareGPT's [{"from", "value"}, ...], with an optional text `system`
        prompt, completion    texts, or lists of messages; those of the prompt aren't trained
        problem, solution     texts, which are put into the recipe's `prompt_template` and `solution_template`

    Raises:
        UserError: an unreadable source, a row in none of these formats, or one without the answer that the template
            asks for.
    """
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        prompt, answers = _messages({key: value for key, value in row.items() if value is not None}, data)
        messages = [*prompt, *answers]
        if not messages or not all(_is_message(message) for message in messages):
            raise UserError(
                f"{where}: needs `messages`, a list of {{role, content}} texts, or `conversations`, `prompt` and "
                f"`completion`, or the texts `problem` and `solution`; has {sorted(row)}"
            )
        yield Conversation(where, messages, len(prompt))


def all_conversations(data: Data) -> list[Messages]:
    """The messages of all rows of all sources. Raises UserError as `conversations`."""
    found = [conversations(data, source, open_source(data, source)[0]) for source in data.sources]
    return [conversation.messages for conversation in chain(*found)]


def problems(data: Data) -> Iterator[dict[str, Any]]:
    """Yields rows {"prompt": [user message], "answers": [...]} for RL. Logs how many were in `data.exclude`.

    Raises:
        UserError: an unreadable or empty source, or a row without a problem or its answers.
    """
    overlaps, dropped, kept = Overlap.of(data.exclude), 0, 0
    for source in data.sources:
        for number, row in enumerate(open_source(data, source)[0], start=1):
            problem, golds = problem_and_golds(row, f"{source}, row {number}")
            if overlaps(problem):
                dropped += 1
                continue
            kept += 1
            yield {"prompt": [_user(data, problem)], "answers": golds}
    if data.exclude:
        logger.info("%d of %d problems dropped: they are in %s", dropped, dropped + kept, ", ".join(data.exclude))


def check_files(data: Data) -> None:
    """Raises UserError if a file of the data can't be read, or is empty. Models take longer to load."""
    for source in () if data.task else data.sources:
        if is_file(source):
            next(some_rows(source, read_rows(source, "train"), data.skip, 1))
    for benchmark in data.exclude:
        if is_file(benchmark):
            Overlap.of([benchmark])


def open_source(data: Data, source: str) -> tuple[Iterator[dict[str, Any]], str | None]:
    """Opens a source for the first `limit` rows after `skip` ones.

    Returns:
        The rows, and a hash of the source's content; None where that takes reading it, as for streamed data sets.

    Raises:
        UserError: an unreadable source; an empty one once it is iterated.
    """
    if data.task:
        chains = chain_problems(data.count, data, "train", data.seed, data.slip_rate)
        rows: Any = [{"problem": p.problem, "solution": p.solution, "answer": p.answer} for p in chains]
        return iter(rows), json_hash(rows)
    rows = read_rows(source, "train", streaming=data.streaming)
    content = sha256(source) if is_file(source) else getattr(rows, "_fingerprint", None)
    return some_rows(source, rows, data.skip, data.limit), content


def bucketed(lengths: np.ndarray, size: int, seed: int) -> list[int]:
    """The order of rows that groups similar lengths, `size` rows per group, with the groups in random order.

    A trainer that keeps this order needs less padding. Rows are sorted by length within windows of BUCKET_WINDOW
    groups.

    Args:
        lengths: [rows].
        size: rows per group.
        seed: of the groups' order.
    """
    window = size * BUCKET_WINDOW
    runs: list[np.ndarray] = []
    for start in range(0, len(lengths), window):
        ordered = start + np.argsort(lengths[start : start + window], kind="stable")
        runs += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(seed).shuffle(runs)
    return np.concatenate(runs).tolist()


def json_hash(content: Any) -> str:
    """sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _messages(row: dict[str, Any], data: Data) -> tuple[Messages, Messages]:
    """A row's messages that aren't trained, and those that may be; none if it has no known format."""
    match row:
        case {"messages": [*messages]}:
            return [], [_without_nones(message) for message in messages]
        case {"conversations": [*turns]}:
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            return system, [_turn(turn) for turn in turns]
        case {"prompt": prompt, "completion": completion}:
            return _as_messages(prompt, "user"), _as_messages(completion, "assistant")
        case {"problem": str(problem), "solution": str(solution)}:
            return [_user(data, problem)], [_assistant(data, solution, row)]
    return [], []


def _turn(turn: Any) -> Any:
    match turn:
        case {"from": str(role), "value": content}:
            return {"role": ROLES.get(role, role), "content": content}
    return _without_nones(turn)


def _as_messages(value: Any, role: str) -> Messages:
    if isinstance(value, list):
        return [_without_nones(message) for message in value]
    return [{"role": role, "content": value}]


def _without_nones(message: Any) -> Any:
    """The message without the keys that a table's other rows have: a template takes an empty `tool_calls` for some."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _user(data: Data, problem: str) -> dict[str, str]:
    return {"role": "user", "content": data.prompt_template.replace("{problem}", problem)}


def _assistant(data: Data, solution: str, row: dict[str, Any]) -> dict[str, str]:
    template = data.solution_template
    if "{answer}" in template and not isinstance(row.get("answer"), str):
        raise UserError(
            f"[data] solution_template={template!r} has {{answer}}: a row has no text `answer`: {sorted(row)}"
        )
    parts = (part.replace("{answer}", row.get("answer", "")) for part in template.split("{solution}"))
    return {"role": "assistant", "content": solution.join(parts)}
