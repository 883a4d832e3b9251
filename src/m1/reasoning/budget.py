"""What one problem may cost, in samples and in seconds, and the rule that ends it earlier."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from m1.errors import UserError
from m1.reasoning.answers import Grader, normalize
from m1.reasoning.voting import Vote

CONFIDENT = 0.95  # the threshold of the paper's experiments

Rule = Literal["none", "decided", "confident"]


@dataclass(frozen=True)
class Budget:
    """How much may be spent on a problem.

    Args:
        n: samples; as many as fit into the seconds when None.
        seconds: of wall-clock time; no limit when None.
        rule: "none": spend it all. "decided": stop when the samples still missing can't change the winner, so the
            answer is that of "none" (as far as equality of answers is transitive). With `n` None nobody knows how
            many are missing, and it never is. "confident": stop then, too, and already when `Vote.confidence` is
            at least 0.95, which may change the answer.

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
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UserError(f"seconds={self.seconds}: need a positive, finite number")
        if self.rule not in get_args(Rule):
            raise UserError(f"rule {self.rule!r} is unknown: choose {', '.join(get_args(Rule))}")

    def why_stop(self, vote: Vote, finished: int, bound: float | None) -> str | None:
        """ "all", "decided", "confident", or None: go on. Time is not looked at.

        Args:
            finished: samples behind the vote, with those that abstained.
            bound: no sample weighs more; None if that is unknown.
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
    """Counts down from `seconds`, or from infinity when None, as soon as it is made."""

    def __init__(self, seconds: float | None, clock: Callable[[], float]):
        self._clock, self._started = clock, clock()
        self._seconds = math.inf if seconds is None else seconds

    def spent(self) -> float:
        return self._clock() - self._started

    def left(self) -> float:
        """Seconds; 0 or less when time is over."""
        return self._seconds - self.spent()


class TimedGrader(Grader):
    """A grader on a timer: no pair takes longer than is left, not even where a worker has to be started again, and when
    time is over, none is asked any more.

    What it has found equal stays equal then; new pairs are compared as texts.
    """

    def __init__(self, grader: Grader, timer: Timer):
        super().__init__(grader.timeout)
        self._grader, self._timer = grader, timer
        self._found: dict[tuple[str, str], bool] = {}

    def equal(self, gold: str, answer: str, within: float = math.inf) -> bool:
        pair = normalize(gold), normalize(answer)
        left = min(within, self._timer.left())
        if pair not in self._found and left > 0:
            self._found[pair] = self._grader.equal(*pair, left)
        return self._found.get(pair, pair[0] == pair[1])
