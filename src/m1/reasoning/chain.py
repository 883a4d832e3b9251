r"""Chain problems: left-to-right arithmetic modulo 10, worked out a step at a time. A task small enough to train on.

    7+5*3-4 mod 10   ->   7+5=2      every operator applies to the result so far, from left to right
                          2*3=6
                          6-4=2
                          \boxed{2}

Gone through several times, a short problem needs a long chain of thought, each round under the number of rounds left:

    7+5*3 mod 10, 2 rounds   ->   2:
                                  7+5=2
                                  2*3=6
                                  1:
                                  6+5=1
                                  1*3=3
                                  \boxed{3}

Training and held-out problems are disjoint by construction: a hash of the chain's text says where it belongs, in however
many rounds.
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


@dataclass(frozen=True, kw_only=True)
class ChainSizes:
    """Steps of a chain, and the rounds in which it is gone through: both uniform between their ends."""

    min_steps: int = 2
    max_steps: int = 8
    min_rounds: int = 1
    max_rounds: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.min_steps <= self.max_steps and 1 <= self.min_rounds <= self.max_rounds):
            raise UserError(
                f"chains of min_steps={self.min_steps}, max_steps={self.max_steps}, min_rounds={self.min_rounds}, "
                f"max_rounds={self.max_rounds}: need 1 <= min <= max"
            )


@dataclass(frozen=True)
class ChainProblem:
    problem: str
    solution: str
    answer: str


def solve_chain(first: int, steps: list[tuple[str, int]], rounds: int = 1, slips: Sequence[int] = ()) -> ChainProblem:
    """The problem, a worked solution and the true answer. Steps are (operator, digit).

    `slips` are added to the results of all rounds' steps: a nonzero one is a slip, from which the solution goes on as
    if nothing had happened. The answer is always the true one.
    """
    true, value, lines = first, first, []
    for number, (operator, digit) in enumerate(steps * rounds):
        left, begins = rounds - number // len(steps), number % len(steps) == 0
        if rounds > 1 and begins:
            lines.append(f"{left}:")
        slip = slips[number] if slips else 0
        true = _apply(true, operator, digit)
        result = (_apply(value, operator, digit) + slip) % MODULUS
        lines.append(f"{value}{operator}{digit}={result}")
        value = result
    text = f"{first}" + "".join(f"{operator}{digit}" for operator, digit in steps) + f" mod {MODULUS}"
    if rounds > 1:
        text += f", {rounds} rounds"
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
                f"only {len(found)} of {count} different {split} problems of {sizes.min_steps} to {sizes.max_steps} "
                f"steps and {sizes.min_rounds} to {sizes.max_rounds} rounds"
            )
        length = rng.randint(sizes.min_steps, sizes.max_steps)
        steps = [(rng.choice("+-*"), rng.randrange(MODULUS)) for _ in range(length)]
        rounds = sizes.min_rounds
        if sizes.max_rounds > sizes.min_rounds:  # no draw where there is no choice
            rounds = rng.randint(sizes.min_rounds, sizes.max_rounds)
        slips = [rng.randrange(1, MODULUS) if rng.random() < slip_rate else 0 for _ in range(rounds * length)]
        problem = solve_chain(rng.randrange(MODULUS), steps, rounds, slips)
        if split_of(problem.problem) == split:
            found.setdefault(problem.problem, problem)
    return list(found.values())
