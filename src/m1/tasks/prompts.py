"""How a problem becomes chat messages: a system prompt, solved examples, and a template with {problem} in it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.jsonl import read_jsonl

Messages = list[dict[str, str]]  # {"role", "content"} each

# As in the paper, the model is to think step by step and to put its final answer in \boxed{}.
MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class ProblemPrompt:
    """Makes the chat messages that ask for a problem's solution.

    Attributes:
        template: the user message, with {problem} in it.
        system: the system message; None for the chat template's own.
        examples: solved problems, (problem, solution) each. They come first, as a user and an assistant message each,
            like `fewshot_as_multiturn` in the lm-evaluation-harness.
    """

    template: str = MATH_PROMPT
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()

    def messages(self, problem: str) -> Messages:
        """The messages for a problem."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for example, solution in self.examples:
            messages += [self._question(example), {"role": "assistant", "content": solution}]
        return [*messages, self._question(problem)]

    def settings(self) -> dict[str, Any]:
        """What samples depend on, by the names of the options: the texts, and a hash of the examples."""
        digest = hashlib.sha256(json.dumps(self.examples).encode()).hexdigest() if self.examples else None
        return {"prompt_template": self.template, "system_prompt": self.system, "few_shot": digest}

    def _question(self, problem: str) -> dict[str, str]:
        return {"role": "user", "content": self.template.replace("{problem}", problem)}


PLAIN, MATH = ProblemPrompt("{problem}"), ProblemPrompt()


def task_template(task: str) -> str:
    """The default prompt template of a task."""
    return (PLAIN if task == "chain" else MATH).template


def read_text(own: str, what: str) -> str:
    """An option's text: `own` itself, or the content of FILE for @FILE. Raises UserError for an unreadable file."""
    if not own.startswith("@"):
        return own
    try:
        return Path(own[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the {what} {own[1:]}: {error}") from None


def read_template(own: str) -> str:
    """The user's own template, a text or @FILE. Raises UserError for an unreadable file, or without {problem}."""
    template = read_text(own, "prompt template")
    if "{problem}" not in template:
        raise UserError(f"the prompt template {template!r} has no {{problem}} in it")
    return template


def read_examples(path: str | Path) -> tuple[tuple[str, str], ...]:
    """The solved problems of a JSONL file, (problem, solution) each.

    Rows are {"problem", "solution"} or {"problem", "answer"}; `question` is the same as `problem`.

    Raises:
        UserError: an unreadable file, one without rows, or a row without these texts.
    """
    examples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        problem, solution = row.get("problem", row.get("question")), row.get("solution", row.get("answer"))
        if not isinstance(problem, str) or not isinstance(solution, str | int | float):
            raise UserError(f"{path}, row {number}: needs `problem` and `solution` or `answer`; has {sorted(row)}")
        examples.append((problem, str(solution)))
    if not examples:
        raise UserError(f"{path} has no examples in it")
    return tuple(examples)
