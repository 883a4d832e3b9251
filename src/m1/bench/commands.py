"""`m1 bench`: parses, measures, publishes."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from m1.errors import UserError

bench = typer.Typer(
    no_args_is_help=True, help="Measure the kernels against each other, peers and the machine's limits."
)
errors = Console(stderr=True)

Dtype = Annotated[str, typer.Option(help="Of the activations: float32 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; when not given, cuda if there is a GPU.")]
Backends = Annotated[str | None, typer.Option(help="Those to measure, e.g. cpu,reference; all that run here.")]
Repeats = Annotated[int, typer.Option(help="Timed calls a row; slow ones have fewer.")]
Result = Annotated[
    Path | None, typer.Option("--out", help="JSON; results/bench-NAME-DEVICE.json if there is a folder results.")
]


@bench.command("scan")
def bench_scan(
    inner: Annotated[int, typer.Option(help="Channels.")] = 768,
    kv: Annotated[int, typer.Option(help="Channels of x and B, before they are repeated.")] = 256,
    state: Annotated[int, typer.Option(help="States a channel.")] = 16,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    dtype: Dtype = "float32",
    device: Device = None,
    backends: Backends = None,
    repeats: Repeats = 7,
    out: Result = None,
) -> None:
    """The selective scan of one layer over whole sequences, forward, and forward and backward."""
    from m1.bench.options import default_device
    from m1.bench.scan import ScanOptions, run

    device = device or default_device()
    own = dict(inner=inner, kv=kv, state=state, batch=batch, length=length)
    _bench(run, ScanOptions(**own, dtype=dtype, device=device, backends=backends, repeats=repeats), out)


@bench.command("state")
def bench_state(
    mixer: Annotated[str, typer.Option(help='"mamba" (Mamba-1) or "mamba2".')] = "mamba",
    slots: Annotated[int, typer.Option(help="Sequences.")] = 64,
    inner: Annotated[int, typer.Option(help="Channels.")] = 768,
    kv: Annotated[int, typer.Option(help="Channels of x and B, before they are repeated.")] = 256,
    head_dim: Annotated[int, typer.Option(help="Of Mamba-2's heads.")] = 64,
    dtype: Dtype = "float32",
    device: Device = None,
    backends: Backends = None,
    repeats: Repeats = 7,
    out: Result = None,
) -> None:
    """One decode step of a Mamba layer for many sequences."""
    from m1.bench.options import default_device
    from m1.bench.state import StateOptions, run

    device = device or default_device()
    own = dict(slots=slots, inner=inner, kv=kv, head_dim=head_dim)
    _bench(run, StateOptions(mixer=mixer, **own, dtype=dtype, device=device, backends=backends, repeats=repeats), out)


@bench.command("attention")
def bench_attention(
    batch: Annotated[int, typer.Option(help="Sequences.")] = 64,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values.")] = 4,
    group: Annotated[int, typer.Option(help="Query heads that share one of them.")] = 3,
    keys: Annotated[int, typer.Option(help="Keys of a sequence.")] = 4096,
    head_dim: int = 64,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    backends: Backends = None,
    repeats: Repeats = 7,
    out: Result = None,
) -> None:
    """One decode step of an attention layer for many sequences with long contexts."""
    from m1.bench.attention import AttentionOptions, run
    from m1.bench.options import default_device

    device = device or default_device()
    own = dict(batch=batch, kv_heads=kv_heads, group=group, keys=keys, head_dim=head_dim)
    _bench(run, AttentionOptions(**own, dtype=dtype, device=device, backends=backends, repeats=repeats), out)


@bench.command("decode")
def bench_decode(
    shape: Annotated[str, typer.Option(help="30m, 100m or m1-3b; tiny to try it.")] = "30m",
    cells: Annotated[
        str, typer.Option(help="BATCHxNEW_TOKENS, separated by commas.")
    ] = "16x512,64x512,64x2048,16x8192",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    engines: Annotated[
        str,
        typer.Option(
            help="Some of ours-hybrid, ours-transformer, each also with -int8, transformers, vllm (`make peers`)."
        ),
    ] = "ours-hybrid,ours-transformer,vllm",
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32 or bfloat16.")] = "float32",
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Timed runs a cell and engine, in turns.")] = 3,
    contexts: Annotated[
        int | None, typer.Option(help="Don't decode every token: time a few steps at so many contexts of each batch.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens/s against batch and length into this file.")] = None,
    out: Result = None,
) -> None:
    """Tokens a second of whole batches: this engine, hybrid and transformer, beside its peers."""
    from m1.bench.decode import plot as plot_result
    from m1.bench.decode import run
    from m1.bench.decoders import DecodeOptions
    from m1.bench.options import default_device

    try:
        pairs = [(int(batch), int(new)) for batch, new in (cell.split("x") for cell in cells.split(","))]
    except ValueError:
        raise UserError(f"--cells {cells}: give BATCHxNEW_TOKENS, such as 16x512,64x2048") from None
    options = DecodeOptions(
        shape=shape, cells=pairs, prompt=prompt, engines=engines.split(","), dtype=dtype,
        device=device or default_device(), backends=None, repeats=repeats, contexts=contexts,
    )  # fmt: skip
    result = _bench(lambda options: run(options, errors.print), options, out)
    if plot:
        plot_result(result, plot)


def _bench(run: Callable[[Any], dict[str, Any]], options: Any, out: Path | None) -> dict[str, Any]:
    """Runs, prints and writes one benchmark; exit code 1 where a row failed."""
    from m1.bench.report import destination, publish

    path = destination(options.name, options.device, out)
    with errors.status(f"measuring on {options.device} ..."):
        result = run(options)
    publish(result, path)
    if any("failure" in row for row in result["rows"]):
        raise typer.Exit(1)
    return result
