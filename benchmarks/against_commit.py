"""Decoding speed of the working tree beside another commit's, in turns: has a change cost anything?

python benchmarks/against_commit.py COMMIT [--rounds 15]

Two processes, one a tree, hold the engines of `m1 bench decode --shape 30m`. They take turns on every batch, which of
them first alternating, so that a disturbance hits both. A ratio above 1 says that the working tree is faster. Writes
results/against-commit.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from m1.bench.roofline import describe_machine
from m1.jsonl import write_json

ROOT = Path(__file__).parents[1]
OPTIONS = {"shape": "30m", "prompt": 32, "dtype": "float32", "device": "cpu", "backends": None, "repeats": 1}
ENGINES, CELLS = ("ours-hybrid", "ours-transformer"), ((1, 64), (16, 48), (64, 32))  # batch, new tokens
WORKER = """
import json, sys
from contextlib import ExitStack
from m1.bench.decoders import DecodeOptions, start
options = json.loads(sys.argv[1])
options = DecodeOptions(**options | {"cells": [tuple(cell) for cell in options["cells"]]})
with ExitStack() as stack:
    decoders = {name: stack.enter_context(start(name, options)) for name in options.engines}
    for line in sys.stdin:
        name, batch, new = json.loads(line)
        print(decoders[name](batch, new).seconds, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "tree")
        git("worktree", "add", "--detach", str(other), arguments.commit)
        workers = {"here": start(ROOT), "commit": start(other)}
        try:
            rows = [measure(workers, name, *cell, arguments.rounds) for cell in CELLS for name in ENGINES]
        finally:
            for worker in workers.values():
                worker.kill()
            git("worktree", "remove", "--force", str(other))
    facts = {"machine": describe_machine(torch.device("cpu")), "commit": git("rev-parse", arguments.commit)}
    write_json(ROOT / "results" / "against-commit.json", facts | {"options": OPTIONS, "rows": rows})


def start(tree: Path) -> subprocess.Popen[str]:
    options = json.dumps(OPTIONS | {"engines": ENGINES, "cells": CELLS})
    command = [sys.executable, "-c", WORKER, options]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(workers: dict[str, subprocess.Popen[str]], name: str, batch: int, new: int, rounds: int) -> dict:
    """Medians over the rounds; the ratio is the median of the rounds' own."""

    def decode(tree: str) -> float:
        worker = workers[tree]
        print(json.dumps([name, batch, new]), file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    seconds: dict[str, list[float]] = {tree: [] for tree in workers}
    for i in range(rounds + 1):  # the first warms up
        for tree in sorted(workers, reverse=i % 2 == 1):
            seconds[tree].append(decode(tree))
    here, commit = seconds["here"][1:], seconds["commit"][1:]
    ratios = [b / a for a, b in zip(here, commit, strict=True)]
    row = {"engine": name, "batch": batch, "new_tokens": new, "rounds": rounds, "ratio": statistics.median(ratios)}
    row |= {"here_seconds": statistics.median(here), "commit_seconds": statistics.median(commit)}
    row |= {"here_seconds_min": min(here), "commit_seconds_min": min(commit)}
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}), flush=True)
    return row


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
