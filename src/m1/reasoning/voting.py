"""Self-consistency (Wang et al. 2023, arXiv 2203.11171): the answer most samples agree on, each with its weight.

Weights are summed by `math.fsum`, which rounds once: the sum, and so the winner, doesn't depend on the samples' order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from m1.reasoning.answers import Grader

ROUNDING = 1e-9  # relative, far above what summing in floats can be off by: a lead within it isn't a lead


@dataclass(frozen=True)
class Vote:
    """A tally: each cluster's answer with its samples (`counts`) and their summed weight, the winner first in both."""

    counts: dict[str, int]
    weights: dict[str, float]
    abstained: int = 0

    @property
    def answer(self) -> str | None:
        """The winner; None where no sample gave an answer."""
        return next(iter(self.counts), None)

    def decided(self, remaining: int, bound: float = 1.0) -> bool:
        """Whether no `remaining` further samples, each of a weight from 0 to `bound`, can change the winner."""
        first, second = [*self.weights.values(), 0.0, 0.0][:2]
        room = remaining * bound
        return first - second > room + ROUNDING * (first + room)

    def confidence(self) -> float:
        r"""Chance that the leader is truly given more often than the runner-up (Adaptive-Consistency, Aggarwal et al.
        2023, arXiv 2305.11860: its Beta criterion).

        Of a votes for the leader and b for its strongest rival, seen under a uniform prior, the leader's share is
        distributed as Beta(a+1, b+1). For whole a and b its mass above 1/2 is a finite sum, here without rounding:

            1 - I_{1/2}(a+1, b+1) = P(Binomial(a+b+1, 1/2) <= a)

        Votes are counted, whatever they weigh: a weight is no number of observations.
        """
        counts = [*self.counts.values(), 0, 0]
        leader = counts[0]
        tosses = leader + max(counts[1:]) + 1
        return sum(math.comb(tosses, k) for k in range(leader + 1)) / (1 << tosses)


def vote(answers: Sequence[str | None], grader: Grader, weights: Sequence[float] | None = None) -> Vote:
    """The heaviest cluster of equal answers wins.

    Ties go to the shorter, then the alphabetically first answer: never to whichever sample came first.

    Args:
        answers: one a sample, None where it gave none.
        weights: one a sample, at least 0; all 1 when None.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    clusters = grader.cluster(answers)
    sums = {answer: math.fsum(weights[i] for i in members) for answer, members in clusters.items()}
    order = sorted(clusters, key=lambda answer: (-sums[answer], len(answer), answer))
    counts = {answer: len(clusters[answer]) for answer in order}
    return Vote(counts, {answer: sums[answer] for answer in order}, abstained=len(answers) - sum(counts.values()))
