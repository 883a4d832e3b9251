"""Commands on checkpoints: convert, rank-layers, inspect, check-vllm, import-gguf, import-official, export-official."""

from pathlib import Path
from typing import Annotated, Any

import typer

from m1.cli.arguments import Force, options_of
from m1.data_options import Data
from m1.options import build
from m1.outputs import make_room
from m1.recipe import ConvertStage, RankLayersStage

app = typer.Typer()

Source = Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")]
Destination = Annotated[Path, typer.Argument(help="Folder for the result.")]


@app.command()
@options_of(ConvertStage)
def convert(force: Force = False, **options: Any) -> None:
    """Turn a transformer checkpoint into a hybrid. Weights are copied, nothing is trained."""
    from m1.cli import render

    stage = build(ConvertStage, options, "convert")
    config = stage.run(force=force).config
    render.conversion(stage.out, config.num_hidden_layers, config.attention_layers)


@app.command("rank-layers")
@options_of(RankLayersStage)
def rank_layers(
    data: Annotated[Path, typer.Option(help='JSONL of {"messages"} or {"problem", "solution"}.')],
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows; the first ones are used.")] = 64,
    force: Force = False,
    **options: Any,
) -> None:
    """Measure the cost of replacing each layer alone.

    The cost is the KL divergence from the teacher; the most costly layers should stay attention.
    """
    from m1.cli import render

    stage = build(RankLayersStage, options | {"data": Data(path=str(data), limit=limit)}, "rank-layers")
    render.ranking(stage.run(force=force, progress=render.progress_bar), stage.out)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of an M1 model or a teacher; its config.json is enough.")
    ],
    context: Annotated[
        int | None,
        typer.Option(
            help="Context, in tokens, for which the layers' caches are shown. Default: the model's, at most 4096."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cache size against context into this file, e.g. cache.png.")
    ] = None,
    force: Force = False,
) -> None:
    """Show a model's layers, parameters and caches.

    The cache is compared with that of the teacher, which has attention in every layer.
    """
    from m1.cli import render
    from m1.model.summary import plot_summary, summarize

    summary = summarize(model, context)
    if plot:
        make_room(plot, "inspect", force=force)
    render.model_summary(summary)
    if plot:
        plot_summary(summary, plot)
        render.line(f"plot written to {plot}")


@app.command("check-vllm")
def check_vllm(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an M1 model or a teacher.")],
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference of a log-probability. Default: 0.001, in half precision more."),
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Number of GPUs that vLLM splits the model over.")
    ] = 1,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of an environment with vLLM. Default: that of `make peers` on a CPU.")
    ] = None,
) -> None:
    """Compare vLLM's greedy tokens and log-probabilities with this model's. The exit code is 1 if they differ."""
    from m1.cli import render
    from m1.evaluation.vllm_parity import TOLERANCES
    from m1.evaluation.vllm_parity import check_vllm as check

    asked = (prompts, new_tokens, dtype, tensor_parallel_size, vllm_python)
    compared = check(model, *asked)  # type: ignore[arg-type]  # other dtypes are refused
    if not render.parity(compared, TOLERANCES[dtype] if tolerance is None else tolerance):
        raise typer.Exit(1)


@app.command("import-gguf")
def import_gguf(
    file: Annotated[Path, typer.Argument(help="GGUF file of a Llama, Qwen2 or Qwen3 model.")],
    out: Destination,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16. float32 keeps all values exactly.")
    ] = "bfloat16",
    force: Force = False,
) -> None:
    """Make a checkpoint folder of a GGUF file, with its tokenizer and chat template."""
    from m1.cli import render
    from m1.model.gguf import import_gguf

    import_gguf(file, out, dtype, force)  # type: ignore[arg-type]  # other dtypes are refused
    render.line(f"{file} -> {out}, dequantized to {dtype}")


@app.command("import-official")
def import_official(source: Source, out: Destination, force: Force = False) -> None:
    """Convert a released M1 checkpoint to an M1 model.

    The source is a folder with config.json and mamba_config.json.
    """
    from m1.cli import render
    from m1.model.official import import_official

    import_official(source, out, force)
    render.line(f"{source} -> {out}")


@app.command("export-official")
def export_official(source: Source, out: Destination, force: Force = False) -> None:
    """Convert an M1 model to the released checkpoints' layout."""
    from m1.cli import render
    from m1.model.official import export_official

    export_official(source, out, force)
    render.line(f"{source} -> {out}")
