"""Commands on training data."""

from pathlib import Path
from typing import Annotated

import typer

from m1.errors import UserError
from m1.options import INT32_MAX
from m1.recipe import SFTStage, TaughtStage, load_stage

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at training data.")


@app.callback()
def data() -> None:
    """Look at training data."""


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="TOML file of an align, sft or distill stage.")],
    samples: Annotated[int, typer.Option(min=1, max=INT32_MAX, help="Number of rows that are shown.")] = 3,
) -> None:
    """Show what a stage would train on: rows with their trained tokens marked, counts, and the rows' lengths."""
    stage = load_stage(recipe)
    if not isinstance(stage, SFTStage | TaughtStage):
        raise UserError(
            f"{recipe} is a recipe for `m1 {stage.kind}`: `m1 data show` takes one for align, sft or distill"
        )

    from m1.cli import render
    from m1.train.sft import data_report

    text, lengths = data_report(stage, samples)
    render.line(text)
    render.lengths(lengths)
