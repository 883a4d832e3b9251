"""Limits on the samples and seconds per problem, rules that stop earlier, and a timer that covers grading, too."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from m1.errors import UserError
from m1.options import MAX_SECONDS
from m1.reasoning.voting import Partition, Vote

CONFIDENT = 0.95  # the threshold of the paper's experiments

Rule = Literal["none", "decided", "confident"]


@dataclass(frozen=True)
class Budget:
    """How much may be spent on one problem, and when to stop before it is spent.

    Args:
        n: number of samples. When None, as many as fit into the seconds.
        seconds: wall-clock time; no limit when None.
        rule: when to stop early.
            "none": never.
            "decided": when the missing samples can't change the winner. The answer is that of "none", unless a late
            answer contradicts a unit or name and so divides a class (see `Grader.partition`). Without `n` the number
            of missing samples is unknown, so it never stops.
            "confident": as "decided", and also when `Vote.confidence` is at least 0.95. This may change the answer.

    Raises:
        UserError: neither n nor seconds, one out of range, or an unknown rule.
    """

    n: int | None = None
    seconds: float | None = None
    rule: Rule = "decided"

    def __post_init__(self) -> None:
        if self.n is None and self.seconds is None:
            raise UserError("give a number of samples, seconds, or both: without either sampling would never end")
        if self.n is not None and self.n < 1:
            raise UserError(f"n={self.n}: need at least one sample")
        if self.seconds is not None and not 0 < self.seconds <= MAX_SECONDS:
            raise UserError(f"seconds={self.seconds}: need a positive number of at most {MAX_SECONDS:.0f}")
        if self.rule not in get_args(Rule):
            raise UserError(f"rule {self.rule!r} is unknown: choose {', '.join(get_args(Rule))}")

    def why_stop(self, vote: Vote, finished: int, bound: float | None) -> str | None:
        """The reason to stop: "all", "decided" or "confident"; None to continue. It doesn't check the time.

        Args:
            finished: number of finished samples, including those without an answer.
            bound: maximum weight of a sample; None if it is unknown.
        """
        if finished == self.n:
            return "all"
        if self.rule == "none":
            return None
        if self.n is not None and bound is not None and vote.decided(self.n - finished, bound):
            return "decided"
        if self.rule == "confident" and vote.confidence() >= CONFIDENT:
            return "confident"
        return None


class Timer:
    """Measures the time a problem has taken and what is left of it. It starts when it is made.

    Args:
        seconds: the time limit; no limit when None.
        clock: returns the current time in seconds.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float]):
        self._clock, self._started = clock, clock()
        self._seconds = math.inf if seconds is None else seconds

    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def left(self) -> float:
        """Seconds until the limit; 0 or less after it."""
        return self._seconds - self.spent()


def timed(partition: Callable[[Sequence[str], Callable[[], float]], Sequence[int]], timer: Timer) -> Partition:
    """A partition for `vote` that doesn't exceed the timer.

    It gets no more than the seconds left, including the restart of a worker. What was read before stays valid after the
    limit. Other answers are then compared as texts.

    Args:
        partition: finds equal answers while there are seconds left, as `Grader.partition` does.
    """
    return lambda answers: partition(answers, timer.left)
