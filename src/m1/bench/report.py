"""How a benchmark's result is told: a table for people, a file, and a last line of JSON for programs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m1.errors import UserError
from m1.jsonl import write_json

Row = dict[str, Any]
RESULTS = Path("results")
WIDTH = 180  # of the table in a file or a pipe


def show_time(row: Row) -> str:
    """The median, and from the fastest to the slowest call, in a unit that fits: "3.21 ms (3.10..3.52)"."""
    unit, scale = next(
        ((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e3)) if row["seconds"] * scale >= 1), ("µs", 1e6)
    )
    median, fastest, slowest = (scale * row[key] for key in ("seconds", "seconds_min", "seconds_max"))
    return f"{median:.3g} {unit} ({fastest:.3g}..{slowest:.3g})"


def show_memory(row: Row) -> str:
    """Of a token where the row counts those, else in all."""
    if "tokens" in row:
        return f"{row['peak_memory_bytes'] / row['tokens'] / 1024:,.1f} KiB/token"
    return f"{row['peak_memory_bytes'] / 2**30:,.1f} GiB"


# Heading, a key that a row needs for it, and what it shows. A column that no row has a value for is left out.
COLUMNS: list[tuple[str, str, Callable[[Row], str]]] = [
    ("pass", "pass", lambda row: row["pass"]),
    ("", "name", lambda row: row["name"]),
    ("batch", "batch", lambda row: str(row["batch"])),
    ("new tokens", "new_tokens", lambda row: f"{row['new_tokens']:,}"),
    ("tokens/s", "tokens_per_second", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("of floor", "share_of_floor", lambda row: f"{row['share_of_floor']:.0%}"),
    ("times vLLM", "times_vllm", lambda row: f"{row['times_vllm']:.2f}"),
    ("times transformer", "times_ours-transformer", lambda row: f"{row['times_ours-transformer']:.2f}"),
    ("together", "together", lambda row: str(row["together"])),
    ("largest batch", "largest_batch", lambda row: str(row["largest_batch"])),
    ("time", "seconds", show_time),
    ("runs", "runs", lambda row: str(row["runs"])),
    ("tokens", "tokens", lambda row: f"{row['tokens']:,}"),
    ("µs/token·layer", "microseconds_per_token", lambda row: f"{row['microseconds_per_token']:.3g}"),
    ("GB/s", "gigabytes_per_second", lambda row: f"{row['gigabytes_per_second']:.3g} ({row['share_of_copy']:.0%})"),
    ("GFLOP/s", "gigaflops_per_second", lambda row: f"{row['gigaflops_per_second']:.3g} ({row['share_of_gemm']:.1%})"),
    ("time/ours", "ratio_to_ours", lambda row: f"{row['ratio_to_ours']:.3g}"),
    ("memory", "peak_memory_bytes", show_memory),
    ("error", "error", lambda row: f"{row['error']:.0e}"),
]


def destination(name: str, device: str, out: Path | None) -> Path | None:
    """The result's file: `out`, or one in the folder `results` where there is one, else None.

    Raises:
        UserError: it can't be written; better known before the measuring than after it.
    """
    if out is None:
        return RESULTS / f"bench-{name}-{device}.json" if RESULTS.is_dir() else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: can't make its folder: {error.strerror}") from None
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file")
    return out


def publish(result: dict[str, Any], path: Path | None) -> None:
    """Prints the table, writes the file, and prints the result as one line of JSON."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    machine, limits, rows = result["machine"], result["limits"], result["rows"]
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    table = Table(*(heading for heading, *_ in columns))
    for row in rows:
        table.add_row(*(show(row) if key in row else "" for _, key, show in columns))
    console.print(table)
    console.print(
        f"Shares are of what this machine ({machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, "
        f"{machine['isa']}) did in the same run: copies {limits['copy_bytes_per_second'] / 1e9:,.1f} GB/s, "
        f"matrix products {limits['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s.",
        soft_wrap=True,
        highlight=False,
    )
    failures = [f"{row['name']}: {row['failure']}" for row in rows if "failure" in row]
    for line in [*failures, *(f"left out: {line}" for line in result["skipped"])]:
        console.print(line, markup=False, highlight=False)
    if path:
        write_json(path, result)
        console.print(f"written to {path}", soft_wrap=True, markup=False, highlight=False)
    print(json.dumps(result, allow_nan=False))
