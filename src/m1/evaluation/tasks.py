"""What is evaluated: benchmark files and chain problems, each with the prompt it is asked with."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from m1.errors import UserError
from m1.jsonl import problem_and_golds, read_jsonl
from m1.reasoning.chain import chain_problems

# The paper's prompt asks to think step by step and to put the final answer in \boxed{}.
MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {
    "chain": "{problem}",
    **dict.fromkeys(("math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva", "gsm8k"), MATH_PROMPT),
}


@dataclass(frozen=True)
class Problem:
    """`prompt` is the user's message; any of `answers` is right."""

    id: str
    prompt: str
    answers: tuple[str, ...]


def load_task(
    task: str, data: str | Path | None, limit: int | None = None, min_steps: int = 2, max_steps: int = 8, seed: int = 0
) -> list[Problem]:
    """The problems of a task: the first `limit` rows of the file `data`, or `limit` held-out chain problems.

    Rows are {"problem", "answer" or "answers"[, "id"]}.

    Raises:
        UserError: unknown task, no or unreadable file, a row without these keys.
    """
    if task not in PROMPTS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(PROMPTS)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: need at least one problem")
    if task == "chain" and data is None:
        found = chain_problems(limit or 200, min_steps, max_steps, "test", seed)
        return [Problem(f"chain/{i}", p.problem, (p.answer,)) for i, p in enumerate(found)]
    if data is None:
        raise UserError(f"task {task!r} needs --data FILE.jsonl with rows {{problem, answer}}")
    problems = []
    for number, row in enumerate(read_jsonl(data), start=1):
        if limit is not None and number > limit:
            break
        problem, golds = problem_and_golds(row, f"{data}, row {number}")
        prompt = PROMPTS[task].replace("{problem}", problem)
        problems.append(Problem(str(row.get("id", f"{task}/{number}")), prompt, tuple(golds)))
    if not problems:
        raise UserError(f"{data} has no problems in it")
    repeated = [id_ for id_, count in Counter(p.id for p in problems).items() if count > 1]
    if repeated:
        raise UserError(f"{data}: the id {repeated[0]!r} stands more than once; ids must differ")
    return problems
