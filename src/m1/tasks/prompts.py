"""Prompt templates: texts with {problem} in place of the problem."""

from pathlib import Path

from m1.errors import UserError
from m1.tasks.benchmarks import check_task

# As in the paper, the model is to think step by step and to put its final answer in \boxed{}.
MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def load_template(task: str, own: str | None = None) -> str:
    """Returns the prompt template of a task, or the user's own after a check.

    Args:
        task: one of `benchmarks.TASKS`.
        own: the user's template, which replaces the task's; see `read_template`.

    Raises:
        UserError: an unknown task; as `read_template`.
    """
    check_task(task)
    if own is None:
        return "{problem}" if task == "chain" else MATH_PROMPT
    return read_template(own)


def read_template(own: str) -> str:
    """Returns the user's own template: a text, or @FILE to read it from a file.

    Raises:
        UserError: an unreadable file, a template without {problem}.
    """
    if own.startswith("@"):
        try:
            own = Path(own[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read the prompt template {own[1:]}: {error}") from None
    if "{problem}" not in own:
        raise UserError(f"the prompt template {own!r} has no {{problem}} in it")
    return own
