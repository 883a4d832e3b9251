"""Writes the tables of README.md and docs/ from the files in results/. `--check` only compares.

python benchmarks/tables.py [--check]
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def pocket() -> str:
    """`make demo`'s runs/pocket/report.json."""
    report = result("pocket")
    rows = []
    for name, m in report["models"].items():
        accuracy = [f"{100 * m[key]:.1f} ± {100 * m[key + '_ci95']:.1f} %" for key in ("pass@1", "maj@16")]
        cache = f"{m['cache_bytes_per_sequence_at_4k'] / 1024:,.0f} KiB"
        rows.append([name, *accuracy, f"{m['tokens_per_second']:,.0f}", f"{m['parameters']:,}", cache])
    count = next(iter(report["models"].values()))["n_problems"]
    columns = ["model", "pass@1", "maj@16", "tokens/s", "parameters", "cache at 4k tokens"]
    return markdown(columns, rows) + (
        f"\n{count} held-out problems, 16 samples each at temperature 1, 95 % intervals over problems; "
        f"all stages took {report['seconds'] / 60:.1f} minutes.\n"
    )


def kernels() -> str:
    """`m1 bench scan|state|attention` on a CPU and on a GPU."""
    rows, machines = [], []
    for device in ("cpu", "cuda"):
        for benchmark in ("scan", "state", "attention"):
            bench = result(f"bench-{benchmark}-{device}")
            for row in bench["rows"]:
                what = " ".join(filter(None, [device, benchmark, row.get("pass"), "—", row["name"]]))
                per_token = f"{row['microseconds_per_token']:,.3g} µs"
                rows.append([what, per_token, f"{100 * row['share_of_copy']:.1f} %", f"{row['ratio_to_ours']:,.3g}"])
        machine, limits = bench["machine"], bench["limits"]
        name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
        machines.append(f"{device}: {name}, copies {limits['copy_bytes_per_second'] / 1e9:,.0f} GB/s")
    columns = ["kernel", "a token and layer", "of the copy bandwidth", "time / ours"]
    return markdown(columns, rows) + "\n" + "; ".join(machines) + ".\n"


TABLES: dict[str, list[Callable[[], str]]] = {"README.md": [pocket], "docs/kernels.md": [kernels]}


def main() -> None:
    for file, tables in TABLES.items():
        text = (ROOT / file).read_text()
        updated = text
        for table in tables:
            start, end = rf"<!-- {table.__name__} table[^\n]*-->\n", "<!-- end -->"
            found = re.search(f"({start})(.*?)({end})", updated, re.DOTALL)
            assert found, f"{file} has lost the markers of the table {table.__name__}"
            updated = updated[: found.start(2)] + table() + updated[found.end(2) :]
        if "--check" in sys.argv and updated != text:
            sys.exit(f"{file}'s tables are not those of results/: run benchmarks/tables.py")
        (ROOT / file).write_text(updated)


if __name__ == "__main__":
    main()
