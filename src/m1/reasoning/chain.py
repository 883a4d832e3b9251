r"""Chain problems: left-to-right arithmetic modulo 10, worked out a step at a time. A task small enough to train on.

    7+5*3-4 mod 10   ->   7+5=2      every operator applies to the result so far, from left to right
                          2*3=6
                          6-4=2
                          \boxed{2}

A chain that is gone through again and again makes a short problem need a long chain of thought. Its steps count down:

    7+5*3 mod 10, 5 steps   ->   5:7+5=2
                                 4:2*3=6
                                 3:6+5=1
                                 2:1*3=3
                                 1:3+5=8
                                 \boxed{8}

Training and held-out problems are disjoint by construction: a hash of the chain's text says where it belongs, however
many steps it is gone through for.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from m1.errors import UserError

MODULUS = 10
OPERATORS = "+-*"
STEPS = [(operator, digit) for operator in OPERATORS for digit in range(MODULUS)]
HELD_OUT_SHARE = 16  # one problem in 16 is held out

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class ChainSizes:
    """Steps worked out, uniform between their ends.

    With a `period` the chain itself has two to `period` steps, and is gone through until that many are worked out. None
    of them stands twice in it: each tells which one comes next.
    """

    min_steps: int = 2
    max_steps: int = 8
    period: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise UserError(f"chains of min_steps={self.min_steps} to max_steps={self.max_steps}: need 1 <= min <= max")
        if self.period is not None and not 2 <= self.period <= len(STEPS):
            raise UserError(f"period={self.period}: a chain that repeats has from 2 to {len(STEPS)} steps of its own")


@dataclass(frozen=True)
class ChainProblem:
    problem: str
    solution: str
    answer: str


def solve_chain(
    first: int, steps: list[tuple[str, int]], total: int | None = None, slips: Sequence[int] = ()
) -> ChainProblem:
    """The problem, a worked solution and the true answer. Steps are (operator, digit).

    Args:
        total: steps to work out, by going through `steps` again and again; each once when None.
        slips: added to the results of the steps worked out: a nonzero one is a slip, from which the solution goes on as
            if nothing had happened. The answer is always the true one.
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
    chain = problem.partition(",")[0]
    return "test" if zlib.crc32(chain.encode()) % HELD_OUT_SHARE == 0 else "train"


def chain_problems(
    count: int, sizes: ChainSizes, split: Split, seed: int, slip_rate: float = 0.0
) -> list[ChainProblem]:
    """`count` different problems of a split.

    Args:
        slip_rate: share of the worked steps whose result is wrong. Traces people train on are like that: a model that
            learned from them slips when it samples, which is what voting averages out and RL trains away.

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
