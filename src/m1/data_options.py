"""Options of training data: where rows come from, and how conversations become text."""

from dataclasses import dataclass
from typing import Any, Literal

from m1.errors import UserError
from m1.options import INT32_MAX, check_at_least_one, check_range, option
from m1.tasks.chain import ChainSizes
from m1.tasks.prompts import read_text


@dataclass(frozen=True, kw_only=True)
class Data(ChainSizes):
    """Training data of a stage: files, data sets or generated chain problems.

    Rows for fine-tuning and distillation have `messages`, ShareGPT's `conversations`, `prompt` with `completion`, or
    `problem` with `solution`. For RL they have `problem` with `answer` or `answers`. Each field's metadata has its help
    text.

    Raises:
        UserError: both or neither of `path` and `task`, a value out of range, or options that exclude each other.
    """

    path: str | list[str] | None = option(
        None,
        "JSONL or Parquet file, folder of a data set, or ORG/NAME[/CONFIG][@REVISION][:SPLIT] on the Hub; or a list of "
        "them.",
    )
    weights: list[int | float] = option(
        [], "Share of each path among the rows; the smaller repeat. Default: every row once, in random order."
    )
    task: Literal["chain"] | None = option(None, "Generate chain problems instead of reading a file.")
    count: int = option(10_000, "Number of chain problems.")
    slip_rate: float = option(0.0, "Share of a chain's worked steps that are wrong.")
    seed: int = option(0, "Seed of the chain problems, and of the order in which several paths are mixed.")
    skip: int = option(0, "Number of rows of each path that are left out, the first ones.")
    limit: int | None = option(None, "Maximum number of rows of each path; the first ones after `skip` are used.")
    exclude: list[str] = option(
        [], "Benchmarks whose problems are dropped from the rows, and counted: gsm8k, math500, ..., files or data sets."
    )
    prompt_template: str = option("{problem}", "User message, with {problem} in it.")
    solution_template: str = option("{solution}", "Answer of a row with `solution`; may have the row's {answer}, too.")
    overlong: Literal["drop", "cut"] = option(
        "drop", "Rows longer than max_length: drop them, or cut them, so that the answer loses its end."
    )
    streaming: bool = option(False, "Read and prepare rows while training, for data that fits no disk.")
    bucket: int | None = option(
        None, "Group rows by length, this many per group. It saves padding with sequential sampling."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (not self.path) == (self.task is None):
            raise UserError('[data] needs exactly one of `path` (a file or a data set) and `task` ("chain")')
        if not 0 <= self.slip_rate < 1:
            raise UserError(f"[data] slip_rate={self.slip_rate}: need 0 <= slip_rate < 1")
        if "{problem}" not in self.prompt_template:
            raise UserError(f"[data] prompt_template={self.prompt_template!r} has no {{problem}} in it")
        if "{solution}" not in self.solution_template:
            raise UserError(f"[data] solution_template={self.solution_template!r} has no {{solution}} in it")
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            raise UserError(f"[data] weights={self.weights}: need one positive number for each of {self.sources}")
        if self.streaming and (self.task or self.bucket):
            raise UserError("[data] streaming goes neither with `task` nor with `bucket`: remove one of them")
        try:
            check_at_least_one(self, "count", "limit", "bucket")
            check_range("skip", self.skip, 0, INT32_MAX)
        except UserError as error:
            raise UserError(f"[data] {error}") from None

    @property
    def sources(self) -> list[str]:
        """The paths; for generated problems, the task's name."""
        if self.task:
            return [self.task]
        return [self.path] if isinstance(self.path, str) else list(self.path or [])


@dataclass(frozen=True, kw_only=True)
class ChatTemplateOption:
    """How conversations become text."""

    chat_template: str | None = option(None, "Chat template in Jinja, or @FILE. Default: the tokenizer's own.")

    def use_chat_template(self, tokenizer: Any) -> None:
        """Gives the tokenizer this template, if there is one. Raises UserError for an unreadable file."""
        if self.chat_template is not None:
            tokenizer.chat_template = read_text(self.chat_template, "chat template")
