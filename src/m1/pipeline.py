"""Runs a recipe folder's stages in order and writes a report. Finished stages are skipped, others resume."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.jsonl import as_written, read_json
from m1.options import build
from m1.progress import Progress, silent
from m1.recipe import BudgetStage, EvalStage, Stage, load_stage, read_toml
from m1.runs import MANIFEST, run_folder
from m1.text import check_name

# Called before each stage with (pipeline's name, stage's name, number of stages before it, number of stages, whether it
# has finished already), and once more for the report.
OnStage = Callable[[str, str, int, int, bool], None]


@dataclass(frozen=True)
class Pipeline:
    """The content of a recipe's `pipeline.toml`.

    Attributes:
        name: title of the report.
        out: folder of the report.
        stages: names of the stages' TOML files, without the ending, in the order in which they run.
    """

    name: str
    out: str
    stages: list[str]


def load_pipeline(folder: str | Path) -> tuple[Pipeline, dict[str, Stage]]:
    """Reads a recipe folder: its pipeline, and all its stages by name.

    All are read at once, so that a mistake in the last stage is reported before the first one runs.

    Raises:
        UserError: as `load_stage`, or the recipe doesn't have exactly one eval stage with models.
    """
    folder = Path(folder)
    pipeline = build(Pipeline, read_toml(folder / "pipeline.toml"), str(folder / "pipeline.toml"))
    for name in pipeline.stages:
        check_name(name, f"{folder}/pipeline.toml: stages")
    stages = {name: load_stage(folder / f"{name}.toml") for name in pipeline.stages}
    evaluations = [stage for stage in stages.values() if isinstance(stage, EvalStage)]
    if len(evaluations) != 1 or not evaluations[0].models:
        raise UserError(f"{folder}/pipeline.toml: the report needs exactly one eval stage with [models]")
    return pipeline, stages


def run_pipeline(
    folder: str | Path,
    on_stage: OnStage = lambda *_: None,
    on_result: Callable[[Stage, Any], None] = lambda *_: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Runs a recipe and returns the content of report.json.

    Args:
        folder: the recipe folder, with a pipeline.toml.
        on_stage: called before each stage and before the report.
        on_result: called with a stage and its result after it has run.
        progress: shows the progress of stages without training.

    Raises:
        UserError: a mistake in any of the recipe's files, or an output made with other settings.
    """
    from m1.evaluation.report import refuse_foreign_report  # imports matplotlib

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "m1 pipeline runs in one process: run its training stages with torchrun, e.g. "
            f"`torchrun ... -m m1 distill {folder}/distill.toml`, then m1 pipeline, which skips what is finished"
        )
    pipeline, stages = load_pipeline(folder)
    refuse_foreign_report(pipeline.out)
    made: list[str] = []
    for name, stage in stages.items():
        try:
            stage.check(made)
            made.append(stage.out)
        except UserError as error:
            raise UserError(f"{name}.toml: {error}") from None
    for number, (name, stage) in enumerate(stages.items()):
        finished = stage.finished()
        on_stage(pipeline.name, name, number, len(stages), finished)
        if not finished:
            on_result(stage, stage.run(resume=True, progress=progress))
    on_stage(pipeline.name, "report", len(stages), len(stages), False)
    return report(pipeline.name, pipeline.out, stages)


def report(name: str, out: str, stages: dict[str, Stage]) -> dict[str, Any]:
    """Writes OUT/report.html and OUT/report.json from the results of finished stages. Returns the latter's content."""
    from m1.evaluation.report import write_report

    with as_written("a stage's result"):
        manifests = [read_json(run_folder(stage.out, stage.is_file) / MANIFEST) for stage in stages.values()]
        training = {key: Path(stage.out, "metrics.jsonl") for key, stage in stages.items() if stage.trained}
        results = {
            model: read_json(Path(stage.out, model, "result.json"))
            for stage in stages.values()
            if isinstance(stage, EvalStage)
            for model in stage.models
        }
        budgets = [read_json(Path(s.out, "budget.json")) for s in stages.values() if isinstance(s, BudgetStage)]
        seconds = sum(manifest["seconds"] for manifest in manifests)
        return write_report(out, f"M1 {name}", seconds, results, training, budgets)
