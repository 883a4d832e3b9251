"""Decoding speed of the working tree beside another commit's, in turns: has a change cost anything?

python benchmarks/against_commit.py COMMIT [--rounds 7]

Each round runs `m1 bench decode` in a fresh process of either tree, which of them first alternating. A ratio above 1
says that the working tree is faster. Writes results/against-commit.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from m1.bench.roofline import describe_machine
from m1.jsonl import read_json, write_json

ROOT = Path(__file__).parents[1]
CELLS, PROMPT = "1x128,16x64,64x48", 32
OPTIONS = ["--shape", "30m", "--dtype", "float32", "--prompt", str(PROMPT), "--cells", CELLS, "--repeats", "3"]
OPTIONS += ["--engines", "ours-hybrid,ours-transformer"]
Cell = tuple[str, int, int]  # engine, batch, new tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "tree")
        git("worktree", "add", "--detach", str(other), arguments.commit)
        try:
            taken = measure({"here": ROOT, "commit": other}, arguments.rounds, Path(folder, "decode.json"))
        finally:
            git("worktree", "remove", "--force", str(other))
    rows = []
    for (engine, batch, new), seconds in taken.items():
        pairs = zip(seconds["here"], seconds["commit"], strict=True)
        row = {"engine": engine, "batch": batch, "new_tokens": new, "rounds": arguments.rounds}
        row |= {f"{tree}_seconds": statistics.median(runs) for tree, runs in seconds.items()}
        row |= {"ratio": row["commit_seconds"] / row["here_seconds"]}
        row |= {"ratios_of_rounds": [round(commit / here, 4) for here, commit in pairs]}
        rows.append(row)
        print(f"{engine} {batch} x {new}: {row['ratio']:.3f} times as fast as {arguments.commit}")
    facts = {"machine": describe_machine(torch.device("cpu")), "commit": git("rev-parse", arguments.commit)}
    write_json(ROOT / "results" / "against-commit.json", facts | {"options": OPTIONS, "rows": rows})


def measure(trees: dict[str, Path], rounds: int, out: Path) -> dict[Cell, dict[str, list[float]]]:
    """Seconds of each cell in each round, by tree."""
    taken: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: {name: [] for name in trees})
    for i in range(rounds):
        for name in sorted(trees, reverse=i % 2 == 1):
            command = [sys.executable, "-c", "from m1.cli import main; main()", "bench", "decode", *OPTIONS]
            environment = os.environ | {"PYTHONPATH": str(trees[name] / "src")}
            subprocess.run([*command, "--out", str(out)], env=environment, check=True, capture_output=True)
            for row in read_json(out)["rows"]:
                taken[row["name"], row["batch"], row["new_tokens"]][name].append(row["seconds"])
            print(f"round {i + 1}: {name}", json.dumps([round(row["seconds"], 3) for row in read_json(out)["rows"]]))
    return taken


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
