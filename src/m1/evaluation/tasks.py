r"""What is evaluated: chain problems made on the spot, and benchmarks from a JSONL file or a Hugging Face data set.

A file's rows are {"id", "problem", "answer"}, or "answers" for several written forms of one gold: any of them is right.
Published data sets name their columns in a few other ways, which are known here: `question` for the problem; the gold
as `answer` (GSM8K: a worked solution that ends in "#### 18"), `final_answer` or the last \boxed{} of `solution`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.jsonl import problem_and_golds, read_jsonl
from m1.reasoning.answers import extract_answer
from m1.reasoning.chain import ChainSizes, chain_problems

# The paper's prompt asks to think step by step and to put the final answer in \boxed{}.
MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
HUB = {  # where each benchmark is taken from when no data is given
    "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "math-ai/aime25:test",
    "amc23": "math-ai/amc23:test",
    "olympiadbench": "Hothan/OlympiadBench/OE_TO_maths_en_COMP:train",
    "minerva": "math-ai/minervamath:test",
    "gsm8k": "openai/gsm8k/main:test",
}
PROMPTS = {"chain": "{problem}", **dict.fromkeys(HUB, MATH_PROMPT)}
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
FILE_ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".parquet")  # a name that ends so was meant as a file
ID_COLUMNS = ("id", "unique_id")
PROBLEM_COLUMNS = ("problem", "question")
GOLD_COLUMNS = ("answers", "answer", "final_answer", "solution")


@dataclass(frozen=True)
class Problem:
    """`text` goes into the prompt template; any of `answers` is right."""

    id: str
    text: str
    answers: tuple[str, ...]


def prompt_template(task: str, own: str | None = None) -> str:
    """The task's template, or the user's own: a text, or @FILE that holds it.

    Raises:
        UserError: an unknown task, an unreadable file, a template without {problem}.
    """
    _check_task(task)
    if own is None:
        return PROMPTS[task]
    if own.startswith("@"):
        try:
            own = Path(own[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read the prompt template {own[1:]}: {error}") from None
    if "{problem}" not in own:
        raise UserError(f"the prompt template {own!r} has no {{problem}} in it")
    return own


def load_task(
    task: str, data: str | Path | None, limit: int | None = None, sizes: ChainSizes | None = None, seed: int = 0
) -> list[Problem]:
    """The first `limit` problems of a task; of chain, that many held-out ones of these sizes.

    Args:
        data: a JSONL file, or a data set as `datasets.load_dataset` takes it: org/name[/config][:split] of the Hub
            or FOLDER[:split], split "test" when not given. The task's own place in HUB when None.

    Raises:
        UserError: unknown task, no or unreadable data, a row without problem or gold, an id twice.
    """
    _check_task(task)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: need at least one problem")
    if task == "chain" and data is None:
        found = chain_problems(limit or 200, sizes or ChainSizes(), "test", seed)
        return [Problem(f"chain/{i}", p.problem, (p.answer,)) for i, p in enumerate(found)]
    source = HUB[task] if data is None else str(data)
    rows = _rows(source, f"task {task!r} needs --data FILE.jsonl: " if data is None else "")
    problems = [
        _problem(row, f"{task}/{number}", f"{source}, row {number}")
        for number, row in enumerate(islice(rows, limit), start=1)
    ]
    if not problems:
        raise UserError(f"{source} has no problems in it")
    repeated = [id_ for id_, count in Counter(p.id for p in problems).items() if count > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]!r} stands more than once; ids must differ")
    return problems


def _check_task(task: str) -> None:
    if task not in PROMPTS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(PROMPTS)}")


def _rows(source: str, advice: str) -> Iterable[dict[str, Any]]:
    folder, _, split = source.partition(":")
    if Path(folder).is_dir():
        return _dataset(folder, None, split, advice)
    if not Path(source).exists() and not source.endswith(FILE_ENDINGS) and (match := HUB_ID.fullmatch(source)):
        return _dataset(match["id"], match["config"], match["split"], advice)
    return read_jsonl(source)


def _dataset(name: str, config: str | None, split: str | None, advice: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset  # takes a second, and files don't need it
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, config, split=split or "test")
    except (OSError, ValueError, DatasetsError) as error:  # no network, no such data set, config, split or format
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{advice}can't load the data set {name} ({text})") from None


def _problem(row: dict[str, Any], default_id: str, where: str) -> Problem:
    """A row, whatever its columns are called. Raises UserError naming `where`."""
    id_ = next((row[name] for name in ID_COLUMNS if row.get(name) is not None), default_id)
    text = next((row[name] for name in PROBLEM_COLUMNS if name in row), None)
    column = next((name for name in GOLD_COLUMNS if row.get(name) not in (None, [])), None)
    renamed = {**row, "problem": text, "answers": _golds(column, row[column])} if text and column else row
    text, golds = problem_and_golds(renamed, where)
    try:
        "".join([text, *golds]).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a character (a lone surrogate) in its text") from None
    if not text.strip() or not all(gold.strip() for gold in golds):
        raise UserError(f"{where}: an empty problem or answer")
    return Problem(str(id_), text, tuple(golds))


def _golds(column: str, value: Any) -> list[Any]:
    match column, value:
        case "solution", str():
            return [extract_answer(value)]
        case "answer", str() if "####" in value:
            return [value.rpartition("####")[2].strip().replace(",", "")]
        case "final_answer", list():
            return [", ".join(map(str, value))]  # OlympiadBench lists the parts of one answer: all are needed
        case _, list():
            return [_written(gold) for gold in value]
    return [_written(value)]


def _written(gold: Any) -> Any:
    """AMC's golds are stored as 27.0 where 27 is meant."""
    return int(gold) if isinstance(gold, float) and gold.is_integer() else gold
