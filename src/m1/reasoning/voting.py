"""Self-consistency (Wang et al. 2023, arXiv 2203.11171): sampled answers vote, and the most frequent answer wins.

Weights are summed by `math.fsum`, which rounds once. The sums, and so the winner, don't depend on the samples' order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from m1.grading.spelling import normalize

ROUNDING = 1e-9  # relative error, far above that of summing floats: a smaller lead isn't a lead

# Gives the class of each answer; equal answers have the same one. It must be an equivalence, as `Grader.partition` is.
Partition = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Vote:
    """The result of a vote: a tally of answers in which the winner comes first.

    Attributes:
        counts: number of samples per answer. Equal answers are counted under their heaviest spelling.
        weights: summed weight of these samples per answer, in the same order.
        abstained: number of samples without an answer.
    """

    counts: dict[str, int]
    weights: dict[str, float]
    abstained: int = 0

    @property
    def answer(self) -> str | None:
        """The winner; None if no sample gave an answer."""
        return next(iter(self.counts), None)

    def decided(self, remaining: int, bound: float = 1.0) -> bool:
        """Whether `remaining` more samples, each with a weight from 0 to `bound`, can no longer change the winner."""
        first, second = [*self.weights.values(), 0.0, 0.0][:2]
        room = remaining * bound
        return first - second > room + ROUNDING * (first + room)

    def confidence(self) -> float:
        r"""Probability that the model gives the leader more often than the runner-up.

        This is the Beta criterion of Adaptive-Consistency (Aggarwal et al. 2023, arXiv 2305.11860). Let the leader have
        a votes and its strongest rival b. Under a uniform prior the leader's share follows Beta(a+1, b+1). For integers
        a and b its mass above 1/2 is a finite sum, computed here without rounding:

            1 - I_{1/2}(a+1, b+1) = P(Binomial(a+b+1, 1/2) <= a)

        Votes are counted without their weights, because a weight is not a number of observations.
        """
        counts = [*self.counts.values(), 0, 0]
        leader = counts[0]
        tosses = leader + max(counts[1:]) + 1
        return sum(math.comb(tosses, k) for k in range(leader + 1)) / (1 << tosses)


def vote(answers: Sequence[str | None], partition: Partition, weights: Sequence[float] | None = None) -> Vote:
    """Finds the answer with the largest summed weight. Equal answers share their weight.

    Ties go to the shorter answer, then to the alphabetically first. The samples' order has no influence.

    Args:
        answers: one per sample, None for a sample without an answer.
        partition: decides which answers are equal.
        weights: one per sample, at least 0; all 1 when None.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    clusters = cluster(answers, partition, weights)
    sums = {answer: math.fsum(weights[i] for i in members) for answer, members in clusters.items()}
    order = sorted(clusters, key=lambda answer: (-sums[answer], len(answer), answer))
    counts = {answer: len(clusters[answer]) for answer in order}
    return Vote(counts, {answer: sums[answer] for answer in order}, abstained=len(answers) - sum(counts.values()))


def cluster(
    answers: Sequence[str | None], partition: Partition, weights: Sequence[float] | None = None
) -> dict[str, list[int]]:
    r"""Groups equal answers: the name of each cluster, and the indices of its members. None is in no cluster.

    A cluster is named by the normalized spelling with the largest summed weight, so that a vote is right if most of
    its winner's weight is: three `50\%` and one `50` vote for `50\%`, which is 0.5. Ties go to the shorter spelling,
    then to the alphabetically first.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    spellings: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            spellings.setdefault(normalize(answer), []).append(i)
    order = sorted(spellings, key=lambda s: (-math.fsum(weights[i] for i in spellings[s]), len(s), s))
    names: dict[int, str] = {}
    clusters: dict[str, list[int]] = {}
    for spelling, label in zip(order, partition(order), strict=True):
        clusters.setdefault(names.setdefault(label, spelling), []).extend(spellings[spelling])
    return clusters
