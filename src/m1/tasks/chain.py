r"""Chain problems: arithmetic modulo 10, from left to right, solved step by step. A task small enough to train on.

    7+5*3-4 mod 10   ->   7+5=2      every operator applies to the result so far
                          2*3=6
                          6-4=2
                          \boxed{2}

A chain can be repeated, so that a short problem needs a long chain of thought. Steps are then numbered downwards:

    7+5*3 mod 10, 5 steps   ->   5:7+5=2
                                 4:2*3=6
                                 3:6+5=1
                                 2:1*3=3
                                 1:3+5=8
                                 \boxed{8}

Training and held-out problems are disjoint by construction: a hash of the chain's text, without the number of steps,
determines the split.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from m1.errors import UserError
from m1.options import option, shown

MODULUS = 10
OPERATORS = "+-*"
STEPS = [(operator, digit) for operator in OPERATORS for digit in range(MODULUS)]
MAX_STEPS = 100_000
HELD_OUT_SHARE = 16  # one problem in 16 is held out

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class ChainSizes:
    """The number of steps in generated chain problems, uniform between its ends.

    With a `period` the chain itself has two to `period` different steps, and is repeated until the number of worked
    steps is reached. Steps differ so that each one determines the next.
    """

    min_steps: int = option(2, "Minimum number of steps in a generated chain problem.")
    max_steps: int = option(8, "Maximum number of steps in a generated chain problem.")
    period: int | None = option(None, "Maximum number of different steps; after them a chain repeats.")

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= MAX_STEPS:
            raise UserError(
                f"chains of min_steps={shown(self.min_steps)} to max_steps={shown(self.max_steps)}: need "
                f"1 <= min <= max <= {MAX_STEPS}"
            )
        if self.period is not None and not 2 <= self.period <= len(STEPS):
            raise UserError(f"period={self.period}: a chain that is repeated has 2 to {len(STEPS)} steps")


@dataclass(frozen=True)
class ChainProblem:
    r"""A generated chain problem with its worked solution.

    Attributes:
        problem: the text of the problem, such as "7+5*3-4 mod 10".
        solution: one line per step, then the result in \boxed{}. It may contain slips.
        answer: the true result, a digit.
    """

    problem: str
    solution: str
    answer: str


def solve_chain(
    first: int, steps: list[tuple[str, int]], total: int | None = None, slips: Sequence[int] = ()
) -> ChainProblem:
    """Writes a chain problem with its worked solution and true answer.

    Args:
        first: the digit at the beginning of the chain.
        steps: (operator, digit) per step of the chain.
        total: number of steps in the solution, which repeats the chain. When None, each step is solved once.
        slips: one number per step of the solution, added to its result. The solution continues from the wrong result
            of a nonzero slip. The answer is always the true one.
    """
    true, value, lines = first, first, []
    for i in range(total or len(steps)):
        operator, digit = steps[i % len(steps)]
        true = _apply(true, operator, digit)
        result = (_apply(value, operator, digit) + (slips[i] if slips else 0)) % MODULUS
        lines.append((f"{total - i}:" if total else "") + f"{value}{operator}{digit}={result}")
        value = result
    text = f"{first}" + "".join(f"{operator}{digit}" for operator, digit in steps) + f" mod {MODULUS}"
    if total:
        text += f", {total} steps"
    return ChainProblem(text, "\n".join([*lines, rf"\boxed{{{value}}}"]), str(true))


def _apply(value: int, operator: str, digit: int) -> int:
    return {"+": value + digit, "-": value - digit, "*": value * digit}[operator] % MODULUS


def split_of(problem: str) -> Split:
    """The split of a problem, determined by a hash of its chain."""
    chain = problem.partition(",")[0]
    return "test" if zlib.crc32(chain.encode()) % HELD_OUT_SHARE == 0 else "train"


def chain_problems(
    count: int, sizes: ChainSizes, split: Split, seed: int, slip_rate: float = 0.0
) -> list[ChainProblem]:
    """Generates `count` different problems of a split.

    Args:
        slip_rate: share of the steps in solutions with a wrong result, as in real training data. A model trained on
            them slips when it samples. Voting averages slips out, and RL trains them away.

    Raises:
        UserError: fewer than `count` different problems could be found.
    """
    if count < 1:
        raise UserError(f"count={count}: need at least one problem")
    rng = random.Random(f"chain-{split}-{seed}")
    found: dict[str, ChainProblem] = {}
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 20 * count * HELD_OUT_SHARE:
            raise UserError(
                f"only {len(found)} of {count} different {split} problems of "
                f"{sizes.min_steps} to {sizes.max_steps} steps"
            )
        length, total = rng.randint(sizes.min_steps, sizes.max_steps), None
        if sizes.period is None:
            steps = [(rng.choice(OPERATORS), rng.randrange(MODULUS)) for _ in range(length)]
        else:
            steps, total = rng.sample(STEPS, rng.randint(2, sizes.period)), length
        slips = [rng.randrange(1, MODULUS) if rng.random() < slip_rate else 0 for _ in range(length)]
        problem = solve_chain(rng.randrange(MODULUS), steps, total, slips)
        if split_of(problem.problem) == split:
            found.setdefault(problem.problem, problem)
    return list(found.values())
