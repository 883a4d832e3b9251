"""Recipes: TOML files that become frozen, validated dataclasses. An unknown key is refused, naming the nearest one.

One file a stage; its `stage` key says which. `[trainer]` holds the arguments of the stage's own trainer (TRL's
`SFTConfig` or `GRPOConfig`) under their own names.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from m1.errors import UserError
from m1.model.layer_choice import check_choice
from m1.reasoning.budget import Budget
from m1.reasoning.chain import ChainSizes

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Data(ChainSizes):
    """Where problems come from: a JSONL file, or chain problems made on the spot.

    A file's rows have `messages`, or `problem` with `solution` (SFT, distillation) or `answer`/`answers` (RL).
    """

    path: str | None = None
    task: Literal["chain"] | None = None
    count: int = 10_000  # chain problems to make
    slip_rate: float = 0.0  # share of a chain's worked steps that are wrong
    seed: int = 0
    limit: int | None = None  # rows of a file to use
    prompt_template: str = "{problem}"
    bucket: int | None = None  # rows in runs of this many of similar length: little padding, if sampled sequentially

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.task is None):
            raise UserError('[data] needs exactly one of `path` (a JSONL file) and `task` ("chain")')
        if not 0 <= self.slip_rate < 1:
            raise UserError(f"[data] slip_rate={self.slip_rate}: need 0 <= slip_rate < 1")
        if "{problem}" not in self.prompt_template:
            raise UserError(f"[data] prompt_template={self.prompt_template!r} has no {{problem}} in it")


@dataclass(frozen=True)
class ConvertStage:
    """A teacher's conversion; either `keep_attention` (also "@FILE:COUNT") or `attention_ratio` chooses its layers."""

    teacher: str
    out: str
    keep_attention: list[int] | str | None = None
    attention_ratio: float | None = None
    mixer: Literal["mamba", "mamba2"] = "mamba"
    head_alignment: Literal["official", "attention"] = "official"
    state_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.keep_attention, self.attention_ratio)


@dataclass(frozen=True)
class SFTStage:
    """Supervised fine-tuning of `model`, or of a new Llama transformer described by `[init]`."""

    out: str
    data: Data
    model: str | None = None
    init: dict[str, Any] = field(default_factory=dict)  # LlamaConfig arguments; comes with the byte tokenizer
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.init):
            raise UserError(
                "an sft stage needs exactly one of `model` (a checkpoint folder) and `[init]` (a new model)"
            )


@dataclass(frozen=True)
class DistillStage:
    """Distillation of `teacher` into `model` on assistant tokens."""

    model: str
    teacher: str
    out: str
    data: Data
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    forward_kl_steps: int = 0  # optimizer steps under forward KL before `divergence` takes over
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GRPOStage:
    """RL with a verifiable reward; rollouts and their log-probabilities come from the engine."""

    model: str
    out: str
    data: Data
    max_num_seqs: int = 256  # sequences the engine decodes together
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MeasuredStage(ChainSizes):
    """Every model of `models` on the same problems: the first `limit` of a task."""

    models: dict[str, str]
    out: str
    task: str = "chain"
    data: str | None = None
    limit: int = 200
    max_new_tokens: int = 128
    temperature: float = 1.0
    max_num_seqs: int = 256  # sequences decoded together


@dataclass(frozen=True, kw_only=True)
class EvalStage(MeasuredStage):
    """Accuracy of `n` samples a problem, and of their votes; ends in a report."""

    n: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BudgetStage(MeasuredStage):
    """Accuracy of the vote against measured seconds a problem, `max_num_seqs` of whose samples are decoded together."""

    seconds: float
    seeds: int = 1
    limit: int = 32
    max_num_seqs: int = 64
    vllm: list[str] = field(default_factory=list)  # names of models that vLLM samples, too (see `make peers`)

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget(seconds=self.seconds)
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds}: need at least one")
        if unknown := [name for name in self.vllm if name not in self.models]:
            raise UserError(f"vllm {unknown[0]!r}: give the name of one of the models, {', '.join(self.models)}")


Stage = ConvertStage | SFTStage | DistillStage | GRPOStage | EvalStage | BudgetStage
STAGES: dict[str, type[Any]] = {
    "convert": ConvertStage,
    "sft": SFTStage,
    "distill": DistillStage,
    "grpo": GRPOStage,
    "eval": EvalStage,
    "budget": BudgetStage,
}


@dataclass(frozen=True)
class Pipeline:
    """`pipeline.toml`: the stage files of a recipe folder, in order."""

    name: str
    out: str
    stages: list[str]


def load_pipeline(folder: str | Path) -> tuple[Pipeline, dict[str, Stage]]:
    """A recipe folder's pipeline and all its stages: a mistake in the last one shows before the first runs."""
    folder = Path(folder)
    pipeline = build(Pipeline, read_toml(folder / "pipeline.toml"), str(folder / "pipeline.toml"))
    stages = {name: load_stage(folder / f"{name}.toml") for name in pipeline.stages}
    evaluations = [stage for stage in stages.values() if isinstance(stage, EvalStage)]
    if len(evaluations) != 1 or not evaluations[0].models:
        raise UserError(f"{folder}/pipeline.toml: the report needs exactly one eval stage with [models]")
    return pipeline, stages


def load_stage(path: str | Path, expected: str | None = None) -> Stage:
    """Raises UserError for a missing file, bad TOML, an unknown or missing key, or a value of the wrong type."""
    path = Path(path)
    table = read_toml(path)
    kind = table.pop("stage", None)
    if kind not in STAGES:
        raise UserError(f"{path}: stage = {kind!r} must be one of {', '.join(STAGES)}")
    if expected and kind != expected:
        raise UserError(f"{path} is a recipe for `m1 {kind}`, not for `m1 {expected}`")
    return build(STAGES[kind], table, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def build(cls: type[T], table: dict[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` from a parsed table. Raises UserError with `where` and the key."""
    hints = typing.get_type_hints(cls)
    check_keys(table, hints, where)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in table]:
        raise UserError(f"{where}: missing key {missing[0]!r}")
    values = {}
    for key, value in table.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = build(typing.cast(type, hints[key]), value, f"{where} [{key}]")
        elif type(value) is int and not _matches(value, hints[key]) and _matches(float(value), hints[key]):
            value = float(value)
        if not _matches(value, hints[key]):
            raise UserError(f"{where}: {key} = {value!r} should be {_describe(hints[key])}")
        values[key] = value
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_keys(table: dict[str, Any], known: typing.Iterable[str], where: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, choice) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_matches(item, arguments[1]) for item in value.values())
    return isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
