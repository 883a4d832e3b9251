r"""Chain problems: left-to-right arithmetic modulo 10, worked out a step at a time. A task small enough to train on.

    7+5*3-4 mod 10   ->   7+5=2      every operator applies to the result so far, from left to right
                          2*3=6
                          6-4=2
                          \boxed{2}

Training and held-out problems are disjoint by construction: a hash of the problem's text says where it belongs.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from m1.errors import UserError

MODULUS = 10
HELD_OUT_SHARE = 16  # one problem in 16 is held out

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ChainProblem:
    problem: str
    solution: str
    answer: str


def solve_chain(first: int, steps: list[tuple[str, int]], slips: Sequence[int] = ()) -> ChainProblem:
    """The problem, a worked solution and the true answer. Steps are (operator, digit).

    `slips` are added to the steps' results: a nonzero one is a slip, from which the solution goes on as if nothing
    had happened. The answer is always the true one.
    """
    true, value, lines = first, first, []
    for i, (operator, digit) in enumerate(steps):
        slip = slips[i] if slips else 0
        true = _apply(true, operator, digit)
        result = (_apply(value, operator, digit) + slip) % MODULUS
        lines.append(f"{value}{operator}{digit}={result}")
        value = result
    text = f"{first}" + "".join(f"{operator}{digit}" for operator, digit in steps) + f" mod {MODULUS}"
    return ChainProblem(text, "\n".join([*lines, rf"\boxed{{{value}}}"]), str(true))


def _apply(value: int, operator: str, digit: int) -> int:
    return {"+": value + digit, "-": value - digit, "*": value * digit}[operator] % MODULUS


def split_of(problem: str) -> Split:
    return "test" if zlib.crc32(problem.encode()) % HELD_OUT_SHARE == 0 else "train"


def chain_problems(
    count: int, min_steps: int, max_steps: int, split: Split, seed: int, slip_rate: float = 0.0
) -> list[ChainProblem]:
    """`count` different problems of a split, lengths uniform in [min_steps, max_steps].

    Args:
        slip_rate: share of the worked steps whose result is wrong. Traces people train on are like that: a model that
            learned from them slips when it samples, which is what voting averages out and RL trains away.

    Raises:
        UserError: fewer than `count` different problems could be found.
    """
    if not 1 <= min_steps <= max_steps or count < 1:
        raise UserError(
            f"count={count}, min_steps={min_steps}, max_steps={max_steps}: need 1 <= min <= max and a count"
        )
    rng = random.Random(f"chain-{split}-{seed}")
    found: dict[str, ChainProblem] = {}
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 20 * count * HELD_OUT_SHARE:
            raise UserError(f"only {len(found)} of {count} different {split} problems of {min_steps}-{max_steps} steps")
        steps = [(rng.choice("+-*"), rng.randrange(MODULUS)) for _ in range(rng.randint(min_steps, max_steps))]
        slips = [rng.randrange(1, MODULUS) if rng.random() < slip_rate else 0 for _ in steps]
        problem = solve_chain(rng.randrange(MODULUS), steps, slips)
        if split_of(problem.problem) == split:
            found.setdefault(problem.problem, problem)
    return list(found.values())
