"""Accuracy from samples. Input everywhere: one list of samples per problem, all of the same length n."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from m1.reasoning.answers import Grader
from m1.reasoning.voting import vote

RESAMPLES = 100
Z95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and the half-width of its 95 % confidence interval (problems are the random sample)."""

    value: float
    ci95: float


def estimate(per_problem: Sequence[float]) -> Estimate:
    count = len(per_problem)
    mean = math.fsum(per_problem) / count
    if count == 1:
        return Estimate(mean, 1.0)
    variance = math.fsum((x - mean) ** 2 for x in per_problem) / (count - 1)
    return Estimate(mean, Z95 * math.sqrt(variance / count))


def pass_at_1(correct: Sequence[Sequence[bool]]) -> Estimate:
    """avg@n: the share of right samples."""
    return estimate([sum(samples) / len(samples) for samples in correct])


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Chance that k samples drawn without replacement hold a right one: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return estimate([1 - math.comb(len(s) - sum(s), k) / math.comb(len(s), k) for s in correct])


def majority_at_k(
    answers: Sequence[Sequence[str | None]], golds: Sequence[Sequence[str]], k: int, grader: Grader, seed: int = 0
) -> Estimate:
    """Share of problems whose vote over k samples is right: all n if k = n, else the mean of RESAMPLES draws of k."""
    rng = random.Random(seed)
    per_problem = []
    for samples, gold in zip(answers, golds, strict=True):
        draws = [samples] if k == len(samples) else [rng.sample(samples, k) for _ in range(RESAMPLES)]
        winners = [vote(draw, grader).answer for draw in draws]
        per_problem.append(sum(w is not None and grader.grade(w, gold) for w in winners) / len(draws))
    return estimate(per_problem)
