"""Commands that measure accuracy: eval run, eval compare and budget."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from m1.cli.arguments import Endpoints, Force, options_of, refuse_local
from m1.errors import UserError
from m1.options import build
from m1.outputs import refuse_sources
from m1.recipe import BudgetStage, EvalStage
from m1.runs import refuse_foreign


class RunByDefault(TyperGroup):
    """A command group in which `m1 eval --model M ...` means `m1 eval run --model M ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts "run" before arguments that begin with an option."""
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a model on a task, or compare two results. `m1 eval --model M ...` is `m1 eval run --model M ...`.",
)


@app.command("run")
@options_of(EvalStage)
def evaluate(
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub id; with --endpoint, the model's name there.")],
    task: Annotated[
        str,
        typer.Option(
            help="chain, math500, aime24, aime25, amc23, olympiadbench, minerva or gsm8k, or any name for the problems "
            "of --data."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Result folder. Default: MODEL/eval/TASK.")] = None,
    endpoint: Endpoints = [],  # noqa: B006 (typer copies it)
    concurrency: Annotated[
        int, typer.Option(help="Maximum number of samples that an endpoint is asked for at the same time.")
    ] = 256,
    samples_per_request: Annotated[
        int, typer.Option(help="Maximum number of a problem's samples in one request to an endpoint.")
    ] = 1,
    timeout: Annotated[
        float, typer.Option(help="Maximum seconds until the endpoint's answer to a request is complete.")
    ] = 3600,
    shard: Annotated[
        str, typer.Option(help="Share of the problems to sample, such as 1/4; `m1 eval merge` joins all shares.")
    ] = "1/1",
    force: Force = False,
    **options: Any,
) -> None:
    """Measure pass@1 (avg@n), pass@k and maj@k.

    Every sample is kept with its grade. Run again to resume.
    """
    from contextlib import nullcontext

    from m1.cli import render
    from m1.evaluation.endpoint import EndpointSampler
    from m1.evaluation.evaluate import evaluate as run
    from m1.evaluation.evaluate import load_problems, local_sampler
    from m1.evaluation.shards import WHOLE, read_shard

    share = read_shard(shard)
    folder = out or Path(model, "eval", task if share == WHOLE else f"{task}-{share.index}-of-{share.count}")
    models = {} if endpoint else {"model": model}
    stage = build(EvalStage, options | {"models": models, "task": task, "out": str(folder)}, "eval")
    if endpoint and (stage.sampler != "engine" or stage.quantize or stage.dtype != "auto" or stage.devices):
        raise UserError("--endpoint samples on a server: leave out --sampler, --dtype, --quantize and --devices")
    refuse_sources(folder, stage.sources())
    if not force:
        refuse_foreign("eval", folder)
    problems = load_problems(stage)
    settings = {"concurrency": concurrency, "timeout": timeout, "samples_per_request": samples_per_request}
    server = nullcontext(EndpointSampler(endpoint, model, **settings)) if endpoint else None  # type: ignore[arg-type]
    with server or local_sampler(stage, model) as sampler, render.progress_bar(task, "samples") as on_progress:
        result = run(sampler, problems, stage, folder, on_progress, force, share)
    render.evaluation(task, result, folder)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="Result folders of all shares of an evaluation, in any order.")],
    out: Annotated[Path, typer.Option(help="Result folder of the whole.")],
    force: Force = False,
) -> None:
    """Join the results of `m1 eval --shard 1/n` to n/n into one.

    Every sample must be there once.
    """
    from m1.cli import render
    from m1.evaluation.merge import merge

    result = merge(shards, out, force)
    render.evaluation(result["settings"]["task"], result, out)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Result folder of `m1 eval`.")],
    b: Annotated[Path, typer.Argument(help="Another result folder, of the same problems.")],
    seed: Annotated[int, typer.Option(help="Seed of the test's random signs.")] = 0,
) -> None:
    """Test whether B is better than A.

    By a paired sign-flip test over problems. The last line is JSON.
    """
    from m1.cli import render
    from m1.evaluation.compare import compare

    render.comparison(compare(a, b, seed))


@options_of(BudgetStage)
def budget(
    model: Annotated[
        list[str],
        typer.Option(
            help="NAME=FOLDER or NAME=HUB_ID; with --endpoint, NAME=the model's name there. Repeatable; the others are "
            "compared with the first."
        ),
    ],
    endpoint: Endpoints = [],  # noqa: B006 (typer copies it)
    force: Force = False,
    **options: Any,
) -> None:
    """Measure voting accuracy against seconds per problem.

    Several models are measured in turns and compared. Run again to resume.
    """
    from m1.cli import render
    from m1.evaluation.endpoint import EndpointSampler
    from m1.evaluation.time_budget import measure_budgets
    from m1.tasks.benchmarks import load_task

    models = dict(part.split("=", 1) for part in model if "=" in part)
    if len(models) != len(model):
        raise UserError(f"--model {' --model '.join(model)}: give each as NAME=FOLDER, with different names")
    stage = build(BudgetStage, options | {"models": {} if endpoint else models}, "budget")
    if not endpoint:
        render.budgets(stage.run(force=force, progress=render.progress_bar), stage.out)
        return
    refuse_local(stage)
    if stage.vllm:
        raise UserError(f"--vllm {stage.vllm[0]}: with --endpoint, servers sample")
    served = {name: EndpointSampler(endpoint, there, stage.max_num_seqs) for name, there in models.items()}
    problems = load_task(stage.task, stage.data, stage.limit, stage, columns=stage)
    with render.progress_bar("budget", "runs") as on_progress:
        result = measure_budgets({}, problems, stage, Path(stage.out), (), on_progress, force, served)
    render.budgets(result, stage.out)
