"""95 % intervals over problems, and a test of differences.

The problems are the random sample, so the samples of one problem are one observation: their mean (Miller 2024, arXiv
2411.00640). The intervals also hold for few problems and for rates near 0 and 1, where the normal approximation fails
(Bowyer et al. 2025, arXiv 2503.01747): `benchmarks/intervals.py` simulates their coverage and the test's false alarms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964  # 97.5 % quantile of the normal distribution
LEVEL = 0.05
ALL_FLIPS = 14  # non-zero differences up to which the test tries every combination of signs
RESAMPLES = 10_000  # random combinations beyond that
CHUNK = 500  # combinations at a time, for memory
ROUNDING = 1e-9  # relative error, far above that of summing floats


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
        value: the mean.
        ci95: [low, high], its 95 % confidence interval.
    """

    value: float
    ci95: list[float]


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference over problems. Its interval leaves out 0 exactly if p < 0.05.

    Attributes:
        p: two-sided p-value of no difference.
    """

    p: float


def estimate(per_problem: Sequence[float]) -> Estimate:
    """The mean of one number from 0 to 1 per problem, with its interval."""
    return Estimate(math.fsum(per_problem) / len(per_problem), _interval(np.asarray(per_problem), 0.0, 1.0))


def difference(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """The mean difference b - a on the same problems, with its interval and p-value.

    p is of the sign-flip test: without a difference, b - a is as likely as a - b on each problem (Fisher 1935). Where
    the interval and the test disagree, the interval's end nearer to 0 is moved: to 0, or to the difference minus the
    test's critical value.

    Args:
        a, b: numbers from 0 to 1, one per problem.
        seed: of the random signs.
        resamples: number of random combinations of signs, if there are too many to try all.
    """
    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    value = math.fsum(differences) / len(differences)
    p, critical = _sign_flip_test(differences, seed, resamples)
    low, high = _interval(differences, -1.0, 1.0)
    if p >= LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    elif low <= 0 < value:
        low = value - critical
    elif value < 0 <= high:
        high = value + critical
    return Difference(value, [low, high], p)


def percent(value: float, ci95: Sequence[float]) -> str:
    """A rate and its interval, as in "87.4 % [84.9, 89.6]"."""
    low, high = ci95
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _interval(values: np.ndarray, lowest: float, highest: float) -> list[float]:
    """Student's interval, after one problem at each end of the range is added.

    For rates of 0 and 1 this is the interval of Agresti and Coull (1998), with two added problems instead of four and
    Student's quantile instead of the normal one. The added problems matter where the values vary too little to show
    what they could be: all right, say.
    """
    values = np.append(values, [lowest, highest])
    half = _student(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [max(lowest, float(values.mean() - half)), min(highest, float(values.mean() + half))]


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t, by its expansion around the normal one (Abramowitz and Stegun 1964, 26.7.5).

    Its error is 0.03 for 2 degrees of freedom and below 0.001 from 4 on.
    """
    z, v = Z95, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4


def _sign_flip_test(differences: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """The p-value, and the largest mean difference that has p >= 0.05."""
    nonzero = differences[differences != 0]
    means = np.abs(_flipped(nonzero, seed, resamples)) / len(differences)
    observed = abs(nonzero.sum()) / len(differences)
    p = np.mean(means >= observed * (1 - ROUNDING))
    critical = np.sort(means)[-math.ceil(LEVEL * len(means))]
    return float(p), float(critical)


def _flipped(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums of the values under many combinations of signs, with the values' own signs among them."""
    if len(values) <= ALL_FLIPS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return sums
    rng = np.random.default_rng(seed)
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    signs = (rng.integers(2, size=(size, len(values)), dtype=np.int8) for size in sizes)
    return np.concatenate([[values.sum()], *((2.0 * flips - 1) @ values for flips in signs)])
