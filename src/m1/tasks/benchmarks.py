r"""Loads the problems of a task: generated chain problems, or a benchmark from a file or a Hugging Face data set.

Rows of a file are {"id", "problem", "answer"}. "answers" may list several spellings of one gold; any of them is right.
Other column names of published data sets are known, too. The problem may be called `question`. The gold may be `answer`
(in GSM8K a worked solution that ends in "#### 18"), `final_answer`, or the last \boxed{} of `solution`. `Columns`
names other columns. Your own problems may have any task name.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.grading import extract_answer
from m1.options import option, shown
from m1.tasks.chain import ChainSizes, chain_problems
from m1.tasks.problem import Problem, problem_and_golds
from m1.tasks.rows import read_rows

HUB = {  # default source of each benchmark
    "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "math-ai/aime25:test",
    "amc23": "math-ai/amc23:test",
    "olympiadbench": "Hothan/OlympiadBench/OE_TO_maths_en_COMP:train",
    "minerva": "math-ai/minervamath:test",
    "gsm8k": "openai/gsm8k/main:test",
}
TASKS = ("chain", *HUB)
MAX_CHAINS = 1_000_000  # generated problems, which are held in memory
TASK_NAME = re.compile(r"[\w.-]*\w[\w.-]*")  # used as a folder name
ID_COLUMNS = ("id", "unique_id")
PROBLEM_COLUMNS = ("problem", "question")
GOLD_COLUMNS = ("answers", "answer", "final_answer", "solution")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of a data set's columns. When None, the known names are tried."""

    problem_column: str | None = option(None, "Column of the data with the problem. Default: problem or question.")
    answer_column: str | None = option(
        None, "Column with the gold. Default: answers, answer, final_answer or the last box of solution."
    )
    id_column: str | None = option(None, "Column with the problem's id. Default: id or unique_id, else its number.")


def load_task(
    task: str,
    data: str | Path | None,
    limit: int | None = None,
    sizes: ChainSizes | None = None,
    seed: int = 0,
    columns: Columns | None = None,
) -> list[Problem]:
    """Loads the first `limit` problems of a task, or generates `limit` held-out chain problems.

    Args:
        task: one of TASKS, or with `data` any name of letters, digits and . - _
        data: a source for `read_rows`, whose default split is "test". The default data is the task's entry in HUB.
        limit: maximum number of problems. When None, all of a benchmark, or 200 chain problems.
        sizes: of generated chain problems.
        seed: of generated chain problems.
        columns: names of the data's columns.

    Raises:
        UserError: an unknown task, missing or unreadable data, a row without problem or gold, a repeated id.
    """
    check_task(task, data, limit)
    if task == "chain" and data is None:
        found = chain_problems(limit or 200, sizes or ChainSizes(), "test", seed)
        return [Problem(f"chain/{i}", p.problem, (p.answer,)) for i, p in enumerate(found)]
    source = HUB[task] if data is None else str(data)
    rows = read_rows(source, "test", f"task {task!r} needs --data FILE.jsonl: " if data is None else "")
    problems = [
        _problem(row, f"{task}/{number}", f"{source}, row {number}", columns or Columns())
        for number, row in enumerate(islice(rows, limit), start=1)
    ]
    if not problems:
        raise UserError(f"{source} has no problems in it")
    repeated = [id_ for id_, count in Counter(p.id for p in problems).items() if count > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]!r} is used more than once; ids must be unique")
    return problems


def check_task(task: str, data: str | Path | None, limit: int | None) -> None:
    """Raises UserError for a task, or a number of problems, that `load_task` would refuse."""
    if task not in TASKS and data is None:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}; other names need --data")
    if not TASK_NAME.fullmatch(task):
        raise UserError(f"task {task!r}: a name has letters, digits and . - _ only")
    if limit is not None and limit < 1:
        raise UserError(f"limit={shown(limit)}: need at least one problem")
    if task == "chain" and data is None and limit is not None and limit > MAX_CHAINS:
        raise UserError(f"limit={shown(limit)}: need at most {MAX_CHAINS} chain problems")


def _problem(row: dict[str, Any], default_id: str, where: str, columns: Columns) -> Problem:
    """Makes a problem from a row. Raises UserError naming `where`."""

    def find(own: str | None, known: tuple[str, ...]) -> str | None:
        """The user's own column, or the first known one with a value."""
        found = next((name for name in ([own] if own else known) if row.get(name) not in (None, [])), None)
        if own and not found:
            raise UserError(f"{where}: has nothing in column {own!r}; its columns are {sorted(row)}")
        return found

    id_column = find(columns.id_column, ID_COLUMNS)
    problem_column = find(columns.problem_column, PROBLEM_COLUMNS)
    gold_column = find(columns.answer_column, GOLD_COLUMNS)
    id_ = row[id_column] if id_column else default_id
    if problem_column and gold_column:
        row = {**row, "problem": row[problem_column], "answers": _golds(gold_column, row[gold_column])}
    text, golds = problem_and_golds(row, where)
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
            return [", ".join(map(str, value))]  # OlympiadBench lists the parts of one answer, and all are needed
        case _, list():
            return [_written(gold) for gold in value]
    return [_written(value)]


def _written(gold: Any) -> Any:
    """Turns 27.0 into 27: AMC's data set stores integers as floats."""
    return int(gold) if isinstance(gold, float) and gold.is_integer() else gold
