"""Commands that train (align, choose-layers, sft, distill, grpo), pipeline, which runs a recipe, and runs, a list."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from m1.cli.arguments import Force
from m1.data_options import Data
from m1.recipe import STAGES, load_stage

app = typer.Typer()


def add_training(kind: str, text: str) -> None:
    """Adds the command of a training stage, with `text` and the recipe's keys as its help."""
    keys = [f"{field.name}: {field.metadata['help']}" for field in fields(STAGES[kind])]
    keys += [f"data.{field.name}: {field.metadata['help']}" for field in fields(Data)]

    @app.command(kind, help="\n".join([text, "\n\b", "Keys of the recipe:", *keys]), short_help=text)
    def train(
        recipe: Annotated[Path, typer.Argument(help="The stage's TOML file.")],
        resume: Annotated[bool, typer.Option("--resume", help="Continue from this stage's last checkpoint.")] = False,
        force: Force = False,
    ) -> None:
        from m1.cli import render

        stage = load_stage(recipe, kind)
        if not force and stage.finished():
            render.line(f"{stage.out} is finished")
        else:
            stage.run(resume, force)


add_training("align", "Train a converted model's mixers towards the attention that they replace.")
add_training("choose-layers", "Choose the layers that stay attention, by training them beside aligned mixers.")
add_training("sft", "Fine-tune on worked solutions (TRL's SFTTrainer).")
add_training("distill", "Distil a teacher into a hybrid on assistant tokens.")
add_training("grpo", "Learn from verifiable rewards (TRL's GRPOTrainer).")


@app.command()
def pipeline(
    recipe_dir: Annotated[Path, typer.Argument(help="Recipe folder with a pipeline.toml.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the training stages would take, and run nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="With --dry-run: number of GPUs.")] = 1,
    card: Annotated[str, typer.Option(help="With --dry-run: a100, h100, h200 or b200.")] = "h100",
    mfu: Annotated[float, typer.Option(help="With --dry-run: share of the card's rate that training reaches.")] = 0.3,
) -> None:
    """Run all stages of a recipe folder. Run again to resume."""
    from m1.cli import render
    from m1.pipeline import load_pipeline, run_pipeline

    if dry_run:
        from m1.train.plan import plan

        render.plan(plan(load_pipeline(recipe_dir)[1], gpus, card, mfu), f"{gpus} x {card}, {mfu:.0%} of its rate")
        return
    render.json_data(run_pipeline(recipe_dir, render.stage_begins, render.stage_result, render.progress_bar))


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Folder with runs in it or below it.")] = Path("runs")) -> None:
    """List runs: stage, state, steps, last loss and time, the latest first."""
    from m1.cli import render
    from m1.history import list_runs

    render.runs(list_runs(folder), folder)
