r"""CPU-seconds of grouping LaTeX answers into classes for a vote: writes results/clusters.json.

    python benchmarks/clusters.py

The time is that of this process and of the grading worker, which has started before. The answers are different LaTeX
expressions, so a worker reads each. 64 votes have 64 spellings; 1,024 votes have 128.
"""

import os
import random
import time
from pathlib import Path

import torch

from m1.grading import Grader
from m1.jsonl import write_json
from m1.machine import describe_machine
from m1.reasoning.voting import vote

ROOT = Path(__file__).parents[1]
SIZES = ((64, 64), (1024, 128))
REPEATS = 3
FORMS = (
    r"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}",
    r"{a}-{b}\sqrt{{{c}}}",
    r"\frac{{{a}\pi}}{{{b}}}+{c}",
    r"x^{{{c}}}+{a}x-{b}",
    r"\left({a}, \frac{{{b}\pi}}{{{c}}}\right)",
    r"{a}e^{{{c}}}",
    r"\sqrt{{{a}}}+\sqrt{{{b}}}",
)


def main() -> None:
    rows = []
    for votes, spellings in SIZES:
        seconds = [measure(votes, spellings, seed) for seed in range(REPEATS)]
        rows.append({"votes": votes, "spellings": spellings, "cpu_seconds": [round(s, 2) for s in seconds]})
        print(rows[-1])
    write_json(ROOT / "results/clusters.json", {"machine": describe_machine(torch.device("cpu")), "rows": rows})


def measure(votes: int, spellings: int, seed: int) -> float:
    """CPU-seconds of one vote."""
    rng = random.Random(seed)
    different: dict[str, None] = {}
    while len(different) < spellings:
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        different[rng.choice(FORMS).format(a=a, b=b, c=c)] = None
    answers = [*different, *rng.choices(list(different), k=votes - spellings)]
    with Grader() as grader:
        grader.start()
        pid = grader._idle[0].process.pid
        before = time.process_time() + of_process(pid)
        vote(answers, grader.partition)
        assert grader.counts["graded"] == spellings and grader._idle[0].process.pid == pid
        return time.process_time() + of_process(pid) - before


def of_process(pid: int) -> float:
    """CPU-seconds that a process has used, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
