r"""Chain problems: left-to-right arithmetic modulo 10, worked out a step at a time. A task small enough to train on.

    7+5*3-4 mod 10   ->   7+5=2      every operator applies to the result so far, from left to right
                          2*3=6
                          6-4=2
                          \boxed{2}

Training and held-out problems are disjoint by construction: a hash of the problem's text says where it belongs.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Literal

MODULUS = 10
HELD_OUT_SHARE = 16  # one problem in 16 is held out

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ChainProblem:
    problem: str
    solution: str
    answer: str


def solve_chain(first: int, steps: list[tuple[str, int]]) -> ChainProblem:
    """The problem, its worked solution and answer. Steps are (operator, digit)."""
    value, lines = first, []
    for operator, digit in steps:
        result = {"+": value + digit, "-": value - digit, "*": value * digit}[operator] % MODULUS
        lines.append(f"{value}{operator}{digit}={result}")
        value = result
    text = f"{first}" + "".join(f"{operator}{digit}" for operator, digit in steps) + f" mod {MODULUS}"
    return ChainProblem(text, "\n".join([*lines, rf"\boxed{{{value}}}"]), str(value))


def split_of(problem: str) -> Split:
    return "test" if zlib.crc32(problem.encode()) % HELD_OUT_SHARE == 0 else "train"


def chain_problems(count: int, min_steps: int, max_steps: int, split: Split, seed: int) -> list[ChainProblem]:
    """`count` different problems of a split, lengths uniform in [min_steps, max_steps].

    Raises:
        ValueError: fewer than `count` different problems could be found.
    """
    rng = random.Random(f"chain-{split}-{seed}")
    found: dict[str, ChainProblem] = {}
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 100 * count * HELD_OUT_SHARE:
            raise ValueError(f"only {len(found)} of {count} different {split} problems of {min_steps}-{max_steps} steps")
        steps = [(rng.choice("+-*"), rng.randrange(MODULUS)) for _ in range(rng.randint(min_steps, max_steps))]
        problem = solve_chain(rng.randrange(MODULUS), steps)
        if split_of(problem.problem) == split:
            found.setdefault(problem.problem, problem)
    return list(found.values())
