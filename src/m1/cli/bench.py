"""`m1 bench`: measures the kernels and the engine, prints the result and writes it.

Libraries that load slowly (torch, transformers, matplotlib) are imported inside the commands: `m1 --help` needs none.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from m1.bench.options import (
    AttentionOptions,
    ChatOptions,
    DecodeOptions,
    JobsOptions,
    Options,
    ScanOptions,
    StateOptions,
)
from m1.bench.results import result_file
from m1.cli.arguments import Force, options_of
from m1.jsonl import write_json
from m1.outputs import make_room

app = typer.Typer(rich_markup_mode=None)

OptionsT = TypeVar("OptionsT", bound=Options)
Out = Annotated[
    Path | None,
    typer.Option("--out", help="JSON file. Default: results/bench-NAME-DEVICE.json if the folder results exists."),
]
Plot = Annotated[Path | None, typer.Option(help="Draw tokens/s against batch and length into this file.")]


def add_kernels(cls: type[Options], text: str) -> None:
    """Adds the command of a kernel's benchmark, which is the function `run` in the module of its name."""

    @app.command(cls.name, help=text)
    @options_of(cls)
    def command(out: Out = None, force: Force = False, **values: Any) -> None:
        run = importlib.import_module(f"m1.bench.{cls.name}").run
        measure(run, options_from(cls, values), out, force)


add_kernels(ScanOptions, "Time the selective scan of one layer over whole sequences, forward and backward.")
add_kernels(StateOptions, "Time one decode step of a Mamba layer for many sequences.")
add_kernels(AttentionOptions, "Time one decode step of an attention layer for many sequences with long contexts.")


@app.command("decode")
@options_of(DecodeOptions)
def bench_decode(out: Out = None, plot: Plot = None, force: Force = False, **values: Any) -> None:
    """Measure the tokens per second of whole batches.

    Of this engine, on a hybrid and a transformer, and of its peers.
    """
    from m1.bench.decode import plot_result, run
    from m1.cli import render

    options = options_from(DecodeOptions, values)
    if plot:
        make_room(plot, "bench decode", force=force)
    result = measure(run, options, out, force, by_run=True)
    if plot:
        plot_result(result, plot)
        render.line(f"written to {plot}", to=render.errors)  # the last line of stdout is the JSON


@app.command("jobs")
@options_of(JobsOptions)
def bench_jobs(out: Out = None, force: Force = False, **values: Any) -> None:
    """Measure the seconds of whole jobs: many prompts, some samples of each.

    Of this engine, on a hybrid and a transformer, and of vLLM.
    """
    from m1.bench.jobs import run

    measure(run, options_from(JobsOptions, values), out, force, by_run=True)


@app.command("chat")
@options_of(ChatOptions)
def bench_chat(out: Out = None, force: Force = False, **values: Any) -> None:
    """Measure one chat and many of a real model on a CPU: first token, tokens per second, memory.

    Of this engine, llama.cpp and vLLM.
    """
    from m1.bench.chat import run

    measure(run, options_from(ChatOptions, values), out, force, by_run=True)


def options_from(cls: type[OptionsT], values: dict[str, Any]) -> OptionsT:
    """Builds a benchmark's options from the command line's values. None means the default."""
    return cls(**{name: value for name, value in values.items() if value is not None})


def measure(
    run: Callable[..., dict[str, Any]], options: Options, out: Path | None, force: bool, by_run: bool = False
) -> dict[str, Any]:
    """Runs one benchmark, prints and writes its result and returns it. The exit code is 1 if a row failed.

    Args:
        by_run: the benchmark takes minutes, and reports each run. The file then has the rows so far.
    """
    from m1.cli import render

    path = result_file(options.name, options.device, out, force)

    def on_run(line: str, result: dict[str, Any]) -> None:
        render.line(line, to=render.errors)
        if path:
            write_json(path, result)

    with render.errors.status(f"measuring on {options.device} ..."):
        result = run(options, on_run) if by_run else run(options)
    if path:
        write_json(path, result)
    render.benchmark(result, path)
    if any("failure" in row for row in result["rows"]):
        raise typer.Exit(1)
    return result
