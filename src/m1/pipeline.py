"""All stages of a recipe folder in order. Finished ones are skipped, a cut-off one goes on; ends in a report."""

import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from m1.errors import UserError
from m1.jsonl import read_json, write_json
from m1.recipe import BudgetStage, ConvertStage, DistillStage, EvalStage, GRPOStage, SFTStage, Stage, load_pipeline

console = Console(stderr=True)

# Each trained stage's module in m1.train, and the function in it. Imported when needed: TRL takes seconds.
TRAINED: dict[type, str] = {SFTStage: "sft", DistillStage: "distill", GRPOStage: "grpo"}


def run_pipeline(folder: str | Path) -> dict[str, Any]:
    """Runs the recipe and returns report.json's content.

    Raises:
        UserError: a mistake in any of its files, or an output folder made by another version of a stage.
    """
    pipeline, stages = load_pipeline(folder)
    for name, stage in stages.items():  # a mistake in a trainer's arguments shows before anything runs
        try:
            if type(stage) in TRAINED:
                _module(stage).arguments_of(stage)
        except UserError as error:
            raise UserError(f"{name}.toml: {error}") from None
    for number, (name, stage) in enumerate(stages.items()):
        bar = "█" * number + "░" * (len(stages) - number)  # a line between the stages' own bars
        console.rule(f"{pipeline.name} {bar} stage {number + 1} of {len(stages)}: {name}")
        if finished(stage):
            console.print(f"{stage.out} is finished")
        else:
            run_stage(stage, resume=True)
    console.rule(f"{pipeline.name} {'█' * len(stages)} report")
    return report(pipeline.name, pipeline.out, stages)


def finished(stage: Stage) -> bool:
    """Whether the stage's folder holds its complete output. Raises UserError if another recipe made it."""
    from m1.train.stage import MANIFEST, recipe_hash

    manifest = Path(stage.out, MANIFEST)
    if not manifest.exists():
        return False
    if read_json(manifest)["recipe_sha256"] != recipe_hash(stage):
        raise UserError(
            f"{stage.out} was made by another recipe or from other inputs: "
            "delete it, and what was made from it, to run again"
        )
    return True


def run_stage(stage: Stage, resume: bool = False) -> None:
    """Runs one stage of any kind."""
    match stage:
        case ConvertStage():
            _convert(stage)
        case EvalStage():
            _evaluate(stage)
        case BudgetStage():
            _measure_budgets(stage)
        case _:
            getattr(_module(stage), TRAINED[type(stage)])(stage, resume)


def report(name: str, out: str, stages: dict[str, Stage]) -> dict[str, Any]:
    """Collects what the stages wrote."""
    from m1.evaluation.report import write_report

    manifests = [read_json(Path(stage.out, "manifest.json")) for stage in stages.values()]
    training = {
        stage_name: Path(stage.out, "metrics.jsonl") for stage_name, stage in stages.items() if type(stage) in TRAINED
    }
    results = {
        model: read_json(Path(stage.out, model, "result.json"))
        for stage in stages.values()
        if isinstance(stage, EvalStage)
        for model in stage.models
    }
    budgets = [read_json(Path(s.out, "budget.json")) for s in stages.values() if isinstance(s, BudgetStage)]
    return write_report(out, f"M1 {name}", sum(m["seconds"] for m in manifests), results, training, budgets)


def _module(stage: Stage) -> ModuleType:
    return importlib.import_module(f"m1.train.{TRAINED[type(stage)]}")


def _convert(stage: ConvertStage) -> None:
    from m1.model.convert import convert
    from m1.train.stage import write_manifest

    started = time.monotonic()
    convert(**dataclasses.asdict(stage))
    write_manifest(stage.out, stage, time.monotonic() - started)


def _evaluate(stage: EvalStage) -> None:
    from m1.evaluation.evaluate import Settings, evaluate
    from m1.evaluation.generators import EngineGenerator
    from m1.evaluation.tasks import load_task, prompt_template
    from m1.model.checkpoint import load_model
    from m1.train.stage import write_manifest

    spent = Path(stage.out, "seconds.json")  # over all sessions: an interrupted evaluation goes on
    before = read_json(spent)["seconds"] if spent.exists() else 0.0
    started = time.monotonic()
    problems = load_task(stage.task, stage.data, stage.limit, stage, stage.seed)
    template = prompt_template(stage.task)
    settings = Settings(stage.task, stage.n, stage.max_new_tokens, stage.temperature, stage.seed, template)
    try:
        for name, path in stage.models.items():
            generator = EngineGenerator(*load_model(path), stage.max_num_seqs)
            with progress_bar(name, "samples") as on_progress:
                result = evaluate(generator, problems, settings, Path(stage.out, name), on_progress)
            majority = result["maj@k"][str(stage.n)]["value"]
            console.print(
                f"{name}: pass@1 {result['pass@1']:.3f} ± {result['pass@1_ci95']:.3f}, maj@{stage.n} {majority:.3f}"
            )
    finally:
        seconds = before + time.monotonic() - started
        write_json(spent, {"seconds": seconds})
    write_manifest(stage.out, stage, seconds)


def _measure_budgets(stage: BudgetStage) -> None:
    from m1.evaluation.budget import Settings, measure_budgets
    from m1.evaluation.tasks import load_task, prompt_template
    from m1.model.checkpoint import load_model
    from m1.train.stage import write_manifest

    started = time.monotonic()
    problems = load_task(stage.task, stage.data, stage.limit, stage)
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "prompt_template"]
    template = prompt_template(stage.task)
    settings = Settings(**{name: getattr(stage, name) for name in names}, prompt_template=template)
    models = {name: load_model(path) for name, path in stage.models.items()}
    with progress_bar("budget", "runs") as on_progress:
        measure_budgets(models, problems, settings, Path(stage.out), stage.vllm, on_progress)
    write_manifest(stage.out, stage, time.monotonic() - started)


class progress_bar:
    """`with progress_bar("gsm8k", "samples") as on_progress: ...` calls on_progress(done, total)."""

    def __init__(self, name: str, unit: str):
        self.bar = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), console=console
        )

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        task = self.bar.add_task("", total=None)
        return lambda done, total: self.bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
