"""Decoding speed of the working tree beside another commit's, in turns: has a change cost anything?

python benchmarks/against_commit.py COMMIT [--starts 6] [--rounds 2]

Two processes, one a tree, hold the engines of `m1 bench decode --shape 30m`. They take turns on every batch, which of
them first alternating, so that a disturbance hits both. They are started several times: where a process's memory lies
moves its speed by some percent. A ratio above 1 says that the working tree is faster. Writes
results/against-commit.json.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from m1.jsonl import write_json
from m1.machine import describe_machine

ROOT = Path(__file__).parents[1]
OPTIONS = {"shape": "30m", "prompt": 32, "dtype": "float32", "device": "cpu", "repeats": 1}
ENGINES, CELLS = ("ours-hybrid", "ours-transformer"), ((1, 64), (16, 48), (64, 32))  # batch, new tokens
Worker = subprocess.Popen[str]
Cell = tuple[str, tuple[int, int]]
WORKER = """
import json, sys
from contextlib import ExitStack
from m1.bench.decoders import DecodeOptions, start
options, engines, cells = json.loads(sys.argv[1])
if DecodeOptions.__annotations__["cells"] is str:
    lists = {"engines": ",".join(engines), "cells": ",".join(f"{batch}x{new}" for batch, new in cells)}
else:  # a commit from before m1/bench/options.py held all options
    lists = {"engines": engines, "cells": cells, "backends": None}
options = DecodeOptions(**options, **lists)
with ExitStack() as stack:
    decoders = {name: stack.enter_context(start(name, options)) for name in engines}
    for line in sys.stdin:
        name, batch, new = json.loads(line)
        print(decoders[name](batch, new).seconds, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    facts = {"machine": describe_machine(torch.device("cpu")), "commit": git("rev-parse", arguments.commit)}
    seconds: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: {"here": [], "commit": []})
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "tree")
        git("worktree", "add", "--detach", str(other), arguments.commit)
        try:
            for i in range(arguments.starts):
                measure({"here": ROOT, "commit": other}, seconds, first=i, rounds=arguments.rounds)
                rows = [summary(cell, taken) for cell, taken in seconds.items()]
                write_json(ROOT / "results" / "against-commit.json", facts | {"options": OPTIONS, "rows": rows})
                print(f"start {i + 1}:", *(f"{r['engine']} {r['batch']}: {r['ratio']:.3f}" for r in rows), flush=True)
        finally:
            git("worktree", "remove", "--force", str(other))


def start(tree: Path) -> Worker:
    options = json.dumps([OPTIONS, ENGINES, CELLS])
    command = [sys.executable, "-c", WORKER, options]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(trees: dict[str, Path], seconds: dict[Cell, dict[str, list[float]]], first: int, rounds: int) -> None:
    """Starts the processes and appends each cell's seconds in each round, after one that warms up."""
    workers = {name: start(tree) for name, tree in trees.items()}
    try:
        for cell, i in itertools.product(itertools.product(ENGINES, CELLS), range(rounds + 1)):
            for name in sorted(workers, reverse=(first + i) % 2 == 1):
                print(json.dumps([cell[0], *cell[1]]), file=workers[name].stdin, flush=True)
                taken = float(workers[name].stdout.readline())
                if i:
                    seconds[cell][name].append(taken)
    finally:
        for worker in workers.values():
            worker.kill()


def summary(cell: Cell, seconds: dict[str, list[float]]) -> dict[str, Any]:
    here, commit = (statistics.median(taken) for taken in seconds.values())
    name, (batch, new) = cell
    row = {"engine": name, "batch": batch, "new_tokens": new, "runs": len(seconds["here"]), "ratio": commit / here}
    return row | {"here_seconds": here, "commit_seconds": commit, "all_seconds": seconds}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
