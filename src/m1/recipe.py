"""Stages: frozen dataclasses that declare the options of commands and of recipes, once for both.

The fields of a stage are the options of its command (`cli/`) and the keys of its TOML file, with the same names,
defaults and help texts. A recipe is a folder with one TOML file per stage, whose key `stage` gives the stage's kind.
The table `[trainer]` holds arguments of the stage's TRL trainer (`SFTConfig` or `GRPOConfig`) under TRL's names.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from m1 import runs
from m1.data_options import ChatTemplateOption, Data
from m1.errors import UserError
from m1.hub import checkpoint_folder, hub_commit
from m1.layer_choice import check_choice, ranking_file
from m1.options import INT32_MAX, MAX_SECONDS, build, check_at_least_one, check_range, option, shown
from m1.outputs import refuse_sources
from m1.progress import Progress, silent
from m1.sampling_options import DevicesOption, LoadOptions, PenaltyOptions, PromptOptions, TaskOptions
from m1.tasks.benchmarks import Columns, check_task, load_task
from m1.tasks.prompts import read_text
from m1.tasks.rows import is_file
from m1.text import check_name

DATA_FOLDER = "$M1_DATA/"
BUILT_IN_REWARDS = ("correct", "answered", "overlong")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe, or one run of a command: its options and its output. The base of all stages.

    A subclass declares the options as fields; each field's metadata has its help text.

    Attributes:
        kind: name of the stage in recipes and of its command.
        function: "module:function" that runs it. It is imported when it runs, because training libraries load slowly.
        trained: whether the stage trains a model, with a TRL trainer and its arguments in `trainer`.
        is_file: whether `out` is a file and not a folder.
        free: options that the output doesn't depend on. They may change when a run resumes.
        out: path of the output.
    """

    kind: ClassVar[str]
    function: ClassVar[str]
    trained: ClassVar[bool] = False
    is_file: ClassVar[bool] = False
    free: ClassVar[tuple[str, ...]] = ("out", "max_num_seqs", "devices", "compile")

    out: str = option(help="Output.")

    def run(self, resume: bool = False, force: bool = False, progress: Progress = silent) -> Any:
        """Runs the stage and returns its result.

        Args:
            resume: continue interrupted training from its last checkpoint. Other stages always resume.
            force: move existing output aside. An unfinished run with these settings is kept.
            progress: shows the progress of a stage without training.
        """
        refuse_sources(Path(self.out), self.sources())
        if not force:
            runs.refuse_foreign(self.kind, self.out, self.is_file)
        module, _, name = self.function.partition(":")
        options = {"resume": resume} if self.trained else {"progress": progress}
        return getattr(importlib.import_module(module), name)(self, force=force, **options)

    def check(self, made: Collection[str] = ()) -> None:
        """Refuses, before anything runs, what would stop this stage later.

        That is: arguments of a trainer that can't be, an `out` with other files, and inputs that neither exist nor are
        among the outputs `made` by earlier stages.
        """
        runs.refuse_foreign(self.kind, self.out, self.is_file)
        if self.trained:
            importlib.import_module(self.function.partition(":")[0]).arguments_of(self)
        if isinstance(self, ChatTemplateOption) and self.chat_template is not None:
            read_text(self.chat_template, "chat template")
        if isinstance(self, PromptOptions):
            self.load_prompt("{problem}")
        earlier = set(map(Path, made))
        for name in self.checkpoints():
            if Path(name) not in earlier and not (name.endswith(".gguf") and Path(name).is_file()):
                checkpoint_folder(name, config_only=True)
        for path in {*self.sources()} - {*map(Path, self.checkpoints())} - earlier:
            if is_file(str(path)) and not path.exists() and earlier.isdisjoint(path.parents):
                raise UserError(f"{path} is missing: check the path, or add the stage that makes it")

    def sources(self) -> list[Path]:
        """The files and folders that the stage reads."""
        data = getattr(self, "data", None)
        texts = [getattr(self, name, None) or "" for name in ("prompt_template", "system_prompt", "chat_template")]
        paths = data.sources if isinstance(data, Data) and not data.task else [data if isinstance(data, str) else None]
        paths += data.exclude if isinstance(data, Data) else []
        paths += [getattr(self, name, None) for name in ("prompts", "few_shot")]
        paths += [*(text[1:] for text in texts if text.startswith("@")), *self.checkpoints()]
        ranking = ranking_file(getattr(self, "keep_attention", None))
        return [Path(path) for path in [*paths, ranking] if path]

    def checkpoints(self) -> list[str]:
        """The checkpoints that the stage reads: folders and Hub ids."""
        named = [getattr(self, name, None) for name in ("model", "teacher", "aligned")]
        return [name for name in [*named, *getattr(self, "models", {}).values()] if name]

    def settings(self) -> dict[str, Any]:
        """What the output depends on: the options that aren't `free`, and hashes of the files they name.

        A checkpoint is identified by its configuration and, if M1 made it, by its manifest; one on the Hub by its
        commit.
        """
        options = {key: value for key, value in dataclasses.asdict(self).items() if key not in self.free}
        files = [path / name for path in self.sources() for name in ("", runs.MANIFEST, "config.json")]
        inputs = {str(path): runs.sha256(path) for path in files if path.is_file()}
        for name in self.checkpoints():
            with suppress(UserError):  # loading it will report this
                if commit := hub_commit(name):
                    inputs[name] = commit
        return options | {"inputs": inputs}

    def finished(self) -> bool:
        """Whether `out` holds this stage's complete output. Raises UserError if it was made with other settings."""
        return runs.finished(self.kind, self.out, self.settings(), self.is_file)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Which transformer is converted, and into what kind of layers."""

    teacher: str = option(help="Llama, Qwen2 or Qwen3 checkpoint folder, Hub id or GGUF file.")
    mixer: Literal["mamba", "mamba2"] = option("mamba", '"mamba" (Mamba-1) or "mamba2".')
    head_alignment: Literal["official", "attention"] = option(
        "official", 'Order of the heads: "official" (as in the released code) or "attention".'
    )
    seed: int = option(0, "Seed of the new parameters.")


@dataclass(frozen=True, kw_only=True)
class ConvertStage(Stage, ConversionOptions):
    """Stage `convert`: turns a transformer checkpoint into a hybrid, without training.

    Exactly one of `keep_attention` and `attention_ratio` chooses the layers that stay attention.
    """

    kind = "convert"
    function = "m1.model.convert:run"

    out: str = option(help="Folder for the hybrid.")
    keep_attention: list[int] | str | None = option(
        None, "Layers that stay attention, e.g. 1,3,8-11, or @ranking.json:6 (see rank-layers), or none, to align all."
    )
    attention_ratio: float | None = option(None, "Share of layers that stay attention, evenly spaced.")
    state_size: int | None = option(None, "Mamba-1 states per channel, 16 by default; must divide head_dim.")
    aligned: str | None = option(None, "Model of this teacher that was aligned: its mixers in place of new ones.")

    def __post_init__(self) -> None:
        check_choice(self.keep_attention, self.attention_ratio)


@dataclass(frozen=True, kw_only=True)
class RankLayersStage(Stage, ConversionOptions, ChatTemplateOption):
    """Stage `rank-layers`: measures the cost of replacing each layer, in KL divergence from the teacher."""

    kind = "rank-layers"
    function = "m1.train.rank_layers:run"
    is_file = True

    data: Data = option(help="JSONL or other source of {messages} or {problem, solution}.")
    out: str = option("ranking.json", "JSON file for `m1 convert --keep-attention @FILE:COUNT`.")
    max_length: int = option(1024, "Maximum number of tokens used per row.")
    batch_size: int = option(8, "Rows per forward pass.")
    aligned: str | None = option(
        None, "Model with aligned mixers in all layers: rank by replacing the cheapest layer again and again."
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_length", "batch_size")


@dataclass(frozen=True, kw_only=True)
class TrainedStage(Stage, ChatTemplateOption):
    """What all training stages have in common: data, and a TRL trainer with arguments of its own."""

    trained = True

    out: str = option(help="Folder for the trained model.")
    data: Data = option(help="Training data.")
    eval_rows: int = option(0, "Rows held out of the data, to evaluate on; once per epoch, or as `eval_strategy` says.")
    mixer_lr_scale: float = option(1.0, "Learning rate of the Mamba mixers, as a multiple of the others'.")
    compile: Literal["auto", True, False] = option(
        False, "Compile the layers (torch.compile): faster steps after a minute or two. auto: on a GPU."
    )
    global_batch: int | None = option(
        None,
        "Rows per optimizer step over all processes; for grpo, completions. per_device_train_batch_size is then a "
        "process's maximum per pass, and gradient_accumulation_steps follows. Default: as these two say.",
    )
    shard: bool = option(
        False, "Split weights, gradients and optimizer over the processes (FSDP2), and the teacher, too."
    )
    trainer: dict[str, Any] = option({}, "Arguments of TRL's trainer: SFTConfig, for grpo GRPOConfig.")

    def __post_init__(self) -> None:
        if self.eval_rows < 0:
            raise UserError(f"eval_rows={self.eval_rows}: must not be negative")
        if not 0 < self.mixer_lr_scale < math.inf:
            raise UserError(f"mixer_lr_scale={self.mixer_lr_scale}: need a positive, finite number")
        check_at_least_one(self, "global_batch")


@dataclass(frozen=True, kw_only=True)
class SFTStage(TrainedStage):
    """Stage `sft`: supervised fine-tuning of `model`, or of a new Llama transformer described by `[init]`."""

    kind = "sft"
    function = "m1.train.sft:sft"

    model: str | None = option(None, "Checkpoint folder or Hub id.")
    init: dict[str, Any] = option({}, "LlamaConfig arguments of a new model with a byte tokenizer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (not self.init):
            raise UserError("an sft stage needs exactly one of `model` (a checkpoint) and `[init]` (a new model)")


@dataclass(frozen=True, kw_only=True)
class TaughtStage(TrainedStage):
    """What the stages that learn from a teacher have in common: both models."""

    model: str = option(help="The student's checkpoint folder or Hub id.")
    teacher: str = option(help="The teacher's checkpoint folder or Hub id.")
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "What the teacher runs in. Default: the checkpoint's dtype, under the student's autocast."
    )
    teacher_device: str | None = option(None, "Where the teacher runs, e.g. cuda:1. Default: the student's device.")


@dataclass(frozen=True, kw_only=True)
class AlignStage(TaughtStage):
    """Stage `align`: each mixer of `model` learns the output of the attention in `teacher` that it replaces."""

    kind = "align"
    function = "m1.train.align:align"


@dataclass(frozen=True, kw_only=True)
class ChooseLayersStage(TaughtStage):
    """Stage `choose-layers`: trains `model`, aligned mixers in all layers, beside the attention of `teacher`."""

    kind = "choose-layers"
    function = "m1.train.choose_layers:choose_layers"

    keep: int = option(help="Number of layers that stay attention.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "keep")


@dataclass(frozen=True, kw_only=True)
class DistillStage(TaughtStage):
    """Stage `distill`: distillation of `teacher` into `model` on assistant tokens."""

    kind = "distill"
    function = "m1.train.distill:distill"

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = option("reverse_kl", "The loss per assistant token.")
    forward_kl_steps: int = option(0, "Optimizer steps under forward KL before `divergence` takes over.")


@dataclass(frozen=True, kw_only=True)
class GRPOStage(TrainedStage):
    """Stage `grpo`: RL with a verifiable reward. Rollouts come from this project's engine, or from vLLM."""

    kind = "grpo"
    function = "m1.train.grpo:grpo"

    model: str = option(help="Checkpoint folder or Hub id.")
    rollout: Literal["engine", "vllm"] = option(
        "engine", "What samples: this project's engine, or vllm, where `[trainer]` vllm_mode says: colocate or server."
    )
    max_num_seqs: int = option(256, "Maximum number of rollouts decoded in parallel.")
    rewards: dict[str, int | float] = option(
        {"correct": 1.0},
        "Weight of each reward: correct, answered, overlong, or your own functions as FILE.py:NAME or MODULE:NAME.",
    )
    overlong_tokens: int | None = option(
        None, "The reward overlong falls from 0 to -1 over this many last tokens; max_completion_length/5 by default."
    )
    zero_variance: Literal["keep", "filter", "resample"] = option(
        "keep", "Groups of equal rewards: keep, filter (leave them out of the loss), or resample (other problems)."
    )
    gate_steps: int = option(10, "Steps between two checks of the engine's probabilities; each step is logged.")
    logged_samples: int = option(64, "Maximum number of samples per generation in samples.jsonl.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry, weight in self.rewards.items():
            where, _, name = entry.rpartition(":")
            if entry not in BUILT_IN_REWARDS and not (where and name.isidentifier()):
                known = ", ".join(BUILT_IN_REWARDS)
                raise UserError(f"[rewards] {entry!r}: neither one of {known} nor FILE.py:NAME or MODULE:NAME")
            if not math.isfinite(weight):
                raise UserError(f"[rewards] {entry} = {weight}: need a finite number")
        if not any(self.rewards.values()):
            raise UserError("[rewards]: need at least one reward with a weight other than 0")
        check_at_least_one(self, "max_num_seqs", "gate_steps", "overlong_tokens")
        if self.logged_samples < 0:
            raise UserError(f"logged_samples={shown(self.logged_samples)}: must not be negative")

    def sources(self) -> list[Path]:
        """The files and folders that the stage reads, those of its own rewards included."""
        own = [entry.rpartition(":")[0] for entry in self.rewards]
        return [*super().sources(), *(Path(where) for where in own if where.endswith(".py"))]


@dataclass(frozen=True, kw_only=True)
class GenerateStage(Stage, PenaltyOptions, PromptOptions, LoadOptions, DevicesOption):
    """Stage `generate`: samples every prompt of a file with the engine."""

    kind = "generate"
    function = "m1.engine.generate:run"
    is_file = True

    model: str = option(help="Checkpoint folder or Hub id.")
    prompts: str = option(help='JSONL of {"prompt"}, {"problem"} or {"messages"}, each with an optional "id".')
    out: str = option(help="JSONL file, one line per finished sample. Run again to resume.")
    skip: int = option(0, "Number of prompts that are left out, the first ones.")
    limit: int | None = option(None, "Maximum number of prompts; the first ones after `skip` are used.")
    n: int = option(1, "Number of samples per prompt.")
    stop: list[str] = option([], "Stop a sample before this text. Repeatable.")
    max_num_seqs: int = option(
        256, "Maximum number of samples decoded in parallel. More raises throughput and per-sample latency."
    )
    prompt_template: str = option("{problem}", 'User message of a {"problem"}, with {problem} in it, or @FILE.')
    seed: int = option(0, "Seed of the random draws.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n", "max_num_seqs", "limit")
        check_range("skip", self.skip, 0, INT32_MAX)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(TaskOptions):
    """Settings of an evaluation: what its samples depend on, besides the model and the problems."""

    n: int = option(16, "Number of samples per problem.")
    seed: int = option(0, "Seed of the random draws.")
    by_round: bool = option(
        False, "Sample every problem once before any twice: slower, but gives accuracy against seconds."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n")


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(TaskOptions, LoadOptions):
    """Settings of `m1 budget`: what its runs depend on, besides the models and the problems."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = option(
        None,
        "Weights and caches in float32, bfloat16 or float16. Default: the checkpoints' own, which must be alike; auto: "
        "their own, alike or not.",
    )
    seconds: float = option(help="Longest budget per problem, in seconds.")
    seeds: int = option(3, "Number of times each problem is solved.")
    max_num_seqs: int = option(64, "Maximum number of a problem's samples decoded in parallel.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "seeds", "max_num_seqs")
        if not 0 < self.seconds <= MAX_SECONDS:
            raise UserError(f"seconds={self.seconds}: need a positive number of at most {MAX_SECONDS:.0f}")


@dataclass(frozen=True, kw_only=True)
class MeasuredStage(Stage, Columns):
    """A stage that measures every model of `models` on the same problems, the first `limit` of a task."""

    models: dict[str, str] = option(help="Checkpoint folders or Hub ids by name.")
    data: str | None = option(
        None,
        'JSONL of {"problem", "answer"}, or a data set: a folder, or ORG/NAME or ORG/NAME/CONFIG:SPLIT on the Hub. '
        "Default: the task's own on the Hub.",
    )
    limit: int | None = option(None, "Maximum number of problems; the first ones are used.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # that of the settings with which it is combined
        check_at_least_one(self, "limit", "max_num_seqs")
        check_task(self.task, self.data, self.limit)  # type: ignore[attr-defined]  # as above
        for name in self.models:
            check_name(name, "[models]")

    def check(self, made: Collection[str] = ()) -> None:
        """As `Stage.check`; problems in a file are read, too."""
        super().check(made)
        if self.data and is_file(self.data) and Path(self.data) not in set(map(Path, made)):
            load_task(self.task, self.data, self.limit, columns=self)  # type: ignore[attr-defined]  # the settings'


@dataclass(frozen=True, kw_only=True)
class EvalStage(MeasuredStage, EvalSettings, LoadOptions, DevicesOption):
    """Stage `eval`: measures the accuracy of `n` samples per problem and of their votes, for a recipe's report."""

    kind = "eval"
    function = "m1.evaluation.evaluate:run"

    out: str = option(help="Result folder. Run again to resume.")
    max_num_seqs: int = option(
        256, "Maximum number of samples decoded in parallel. More raises throughput and per-sample latency."
    )
    sampler: Literal["engine", "transformers"] = option("engine", "Sampler: this project's engine or transformers.")


@dataclass(frozen=True, kw_only=True)
class BudgetStage(MeasuredStage, BudgetSettings):
    """Stage `budget`: measures the accuracy of voting against the measured seconds per problem."""

    kind = "budget"
    function = "m1.evaluation.time_budget:run"
    free = ("out",)  # not max_num_seqs: samples decoded in parallel share the seconds

    out: str = option(help="Folder for the runs, budget.json and budget.png. Run again to resume.")
    limit: int | None = option(32, "Maximum number of problems; the first ones are used.")
    vllm: list[str] = option([], "Name of a model that vLLM samples as well (see `make peers`). Repeatable.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.vllm if name not in self.models]:
            raise UserError(f"vllm {unknown[0]!r}: give the name of one of the models, {', '.join(self.models)}")


STAGES: dict[str, type[Stage]] = {
    cls.kind: cls
    for cls in (
        ConvertStage, RankLayersStage, AlignStage, SFTStage, DistillStage, GRPOStage, GenerateStage, EvalStage,
        BudgetStage, ChooseLayersStage,
    )
}  # fmt: skip


def load_stage(path: str | Path, expected: str | None = None) -> Stage:
    """Reads a stage's TOML file. `$M1_DATA/` in its texts is the folder that the environment variable names.

    Raises:
        UserError: a missing file, bad TOML, an unknown or missing key, a value of the wrong type, another kind of stage
            than `expected`, or no variable M1_DATA.
    """
    path = Path(path)
    table = _with_data_folder(read_toml(path), path)
    kind = table.pop("stage", None)
    if not isinstance(kind, str) or kind not in STAGES:
        raise UserError(f"{path}: stage = {kind!r} must be one of {', '.join(STAGES)}")
    if expected and kind != expected:
        raise UserError(f"{path} is a recipe for `m1 {kind}`, not for `m1 {expected}`")
    return build(STAGES[kind], table, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file. Raises UserError for a file that can't be read or isn't TOML."""
    import tomllib  # no command needs it to show its help

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read recipe {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also other encodings, and integers of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _with_data_folder(value: Any, path: Path) -> Any:
    match value:
        case dict():
            return {key: _with_data_folder(item, path) for key, item in value.items()}
        case list():
            return [_with_data_folder(item, path) for item in value]
        case str() if DATA_FOLDER in value:
            if not (folder := os.environ.get("M1_DATA")):
                raise UserError(
                    f"{path} reads {value}: set the environment variable M1_DATA to the folder of your data"
                )
            return value.replace(DATA_FOLDER, f"{folder.rstrip('/')}/")
    return value
