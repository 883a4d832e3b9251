"""Options of the commands that sample: how they load models, draw tokens and put problems to a model."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from m1.errors import UserError
from m1.options import INT64_MAX, Quantization, check_at_least_one, check_range, option
from m1.tasks.chain import ChainSizes
from m1.tasks.prompts import ProblemPrompt, read_examples, read_template, read_text, task_template

FLOAT32 = 2.0**-126, 2.0**128 - 2.0**104  # the smallest and the largest positive number, without loss of precision


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a command loads the models that it samples."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = option(
        "auto", "Weights and caches in float32, bfloat16 or float16; auto: the checkpoint's own."
    )
    quantize: Quantization | None = option(None, "int8 or int4: round the weights of linear layers (on a CPU).")


@dataclass(frozen=True, kw_only=True)
class DevicesOption:
    """Which devices share a command's samples. Samples don't depend on it."""

    devices: str | None = option(
        None,
        "all: one engine per GPU of this host; or a list such as cuda:0,cuda:1. Default, auto: one device. "
        "max_num_seqs is per engine.",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a command samples tokens: the user's part of the engine's `SamplingParams`.

    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = option(1024, "Maximum number of new tokens per sample.")
    temperature: float = option(0.7, "Divides the logits; 0 is greedy.")
    top_k: int = option(0, "Sample only from the k likeliest tokens (0: all).")
    top_p: float = option(1.0, "Sample only from the likeliest tokens that together have this probability (1: all).")
    min_p: float = option(
        0.0, "Sample only from tokens with this share of the likeliest one's probability or more (0: all)."
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_new_tokens")
        check_distribution(self)


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions(SamplingOptions):
    """`SamplingOptions`, and those that only this project's engine has."""

    min_new_tokens: int = option(0, "Minimum number of new tokens per sample: no earlier stop.")
    repetition_penalty: float = option(
        1.0, "Divides positive logits of the prompt's and the sample's tokens, and multiplies negative ones (1: off)."
    )
    presence_penalty: float = option(0.0, "Subtracted from the logits of the sample's tokens (0: off).")
    frequency_penalty: float = option(
        0.0, "Subtracted from the logits of the sample's tokens, once per occurrence (0: off)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_penalties(self)
        check_range("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)


def check_penalties(params: Any) -> None:
    """Raises UserError if a penalty, of options or of `SamplingParams`, is out of range."""
    check_range("repetition_penalty", params.repetition_penalty, 0.01, 100)  # beyond, logits may become infinite
    for name in ("presence_penalty", "frequency_penalty"):
        check_range(name, getattr(params, name), -2, 2)


def check_distribution(params: Any) -> None:
    """Raises UserError if temperature, top_k, top_p or min_p, of options or of `SamplingParams`, is out of range."""
    tiny, most = FLOAT32
    checks = {
        "temperature": (
            params.temperature == 0 or tiny <= params.temperature <= most,
            f"0 (greedy) or a number that float32 holds, {tiny:.2g} to {most:.2g}",
        ),
        "top_k": (0 <= params.top_k <= INT64_MAX, f"0 (all tokens) to {INT64_MAX}"),
        "top_p": (0 < params.top_p <= 1, "above 0, and 1 at most"),
        "min_p": (0 <= params.min_p <= 1, "0 to 1"),
    }
    for name, (fits, range_) in checks.items():
        if not fits:
            raise UserError(f"{name}={getattr(params, name)} is out of range: must be {range_}")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a command puts a problem to the model."""

    prompt_template: str | None = option(
        None,
        "User message with {problem} in it, or @FILE. Default: the task's own, which asks for steps and a \\boxed{} "
        "answer; for chain problems {problem} alone.",
    )
    system_prompt: str | None = option(None, "System message, or @FILE. Default: the chat template's own.")
    few_shot: str | None = option(
        None, "JSONL of {problem, solution} or {problem, answer}: examples, shown as earlier turns of the chat."
    )

    def load_prompt(self, default: str) -> ProblemPrompt:
        """Reads the prompt with its files. `default` is the template when none is given.

        Raises:
            UserError: an unreadable file, a template without {problem}, an example without problem or solution.
        """
        return ProblemPrompt(
            default if self.prompt_template is None else read_template(self.prompt_template),
            None if self.system_prompt is None else read_text(self.system_prompt, "system prompt"),
            () if self.few_shot is None else read_examples(self.few_shot),
        )


@dataclass(frozen=True, kw_only=True)
class SolveOptions(PenaltyOptions, PromptOptions, LoadOptions):
    """Options that `m1 solve` shares with other commands: the sampling, the prompt and the loading."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(PenaltyOptions, LoadOptions):
    """Options that `m1 chat` shares with other commands: the sampling and the loading."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(ChainSizes, SamplingOptions, PromptOptions):
    """Options that all measurements of accuracy share: the task, its sampling and its prompt."""

    task: str = option(
        "chain",
        "chain, math500, aime24, aime25, amc23, olympiadbench, minerva or gsm8k; or any name, for problems of `data`.",
    )

    def __post_init__(self) -> None:
        ChainSizes.__post_init__(self)
        SamplingOptions.__post_init__(self)

    def task_prompt(self) -> ProblemPrompt:
        """The prompt, with the task's own template as the default. Raises UserError as `load_prompt`."""
        return self.load_prompt(task_template(self.task))

    def used(self, settings: type, prompt: ProblemPrompt) -> dict[str, Any]:
        """The options that the dataclass `settings` declares, with the prompt's content in place of its files.

        The sizes of chains are left out: a hash of the problems covers them.
        """
        names = {field.name for field in dataclasses.fields(settings)}
        names -= {field.name for field in dataclasses.fields(ChainSizes)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name in names} | prompt.settings()
