"""Writes the README's table from results/pocket.json (`make demo`'s runs/pocket/report.json). `--check` only compares.

python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = r"<!-- pocket table: [^\n]*-->\n", "<!-- end -->"


def table(report: dict) -> str:
    lines = [
        "| model | pass@1 | maj@16 | tokens/s | parameters | cache at 4k tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, m in report["models"].items():
        accuracy = (f"{100 * m[key]:.1f} ± {100 * m[key + '_ci95']:.1f} %" for key in ("pass@1", "maj@16"))
        cells = [name, *accuracy, f"{m['tokens_per_second']:,.0f}", f"{m['parameters']:,}"]
        lines.append("| " + " | ".join([*cells, f"{m['cache_bytes_per_sequence_at_4k'] / 1024:,.0f} KiB"]) + " |")
    count = next(iter(report["models"].values()))["n_problems"]
    lines.append("")
    lines.append(
        f"{count} held-out problems, 16 samples each at temperature 1, 95 % intervals over problems; "
        f"all stages took {report['seconds'] / 60:.1f} minutes."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    report = json.loads((ROOT / "results" / "pocket.json").read_text())
    readme = (ROOT / "README.md").read_text()
    found = re.search(f"({START})(.*?)({END})", readme, re.DOTALL)
    assert found, "README.md has lost the table's markers"
    updated = readme[: found.start(2)] + table(report) + readme[found.end(2) :]
    if "--check" in sys.argv:
        sys.exit(
            0 if updated == readme else "README.md's table is not that of results/pocket.json: run benchmarks/readme.py"
        )
    (ROOT / "README.md").write_text(updated)


if __name__ == "__main__":
    main()
