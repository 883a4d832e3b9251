"""Intervals and the sign-flip test: by hand, and that they keep what they promise in simulation.

`benchmarks/intervals.py` simulates more kinds of problems, rates and measures.
"""

import math
from itertools import product

import numpy as np
import pytest

from m1.evaluation.intervals import ALL_FLIPS, RESAMPLES, _student, difference, estimate, percent


def test_the_interval_of_eight_problems():
    """With 0 and 1 added: mean 0.4, squared deviations 10 * 0.4 * 0.6; 9 degrees of freedom."""
    found = estimate([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    half = 2.2622 * math.sqrt(2.4 / 9 / 10)
    assert found.value == 0.375 and found.ci95 == pytest.approx([0.4 - half, 0.4 + half], abs=1e-4)


@pytest.mark.parametrize("freedom, quantile", [(2, 4.3027), (3, 3.1824), (9, 2.2622), (16, 2.1199), (120, 1.9799)])
def test_students_quantile(freedom, quantile):
    assert _student(freedom) == pytest.approx(quantile, rel=0.01 if freedom < 4 else 1e-4)


def test_intervals_stay_in_range_and_say_little_about_few_problems():
    assert estimate([1.0]).ci95 == [0, 1]
    assert estimate([0.0] * 8).ci95 == pytest.approx([0, 0.326], abs=1e-3)
    assert estimate([1.0] * 8).ci95 == pytest.approx([0.674, 1], abs=1e-3)
    assert difference([0.5] * 4, [0.5] * 4).ci95 == pytest.approx([-0.664, 0.664], abs=1e-3)


def test_more_samples_per_problem_narrow_the_interval_only_as_problems_agree():
    even, uneven = estimate([0.5] * 100).ci95, estimate([0.0, 1.0] * 50).ci95
    assert even[1] - even[0] < 0.4 * (uneven[1] - uneven[0])


def covered(problems, rate, draws, repeats=1000):
    """The share of simulated evaluations whose interval holds the true rate."""
    rng = np.random.default_rng(0)
    ends = (estimate(draws(rng, problems)).ci95 for _ in range(repeats))
    return np.mean([low <= rate <= high for low, high in ends])


@pytest.mark.parametrize("problems", [8, 15, 120])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_95_percent_are_covered(problems, rate):
    """The normal approximation covers 0.54 of 15 problems at a rate of 0.95."""
    assert covered(problems, rate, lambda rng, n: rng.random(n) < rate) >= 0.93
    assert covered(problems, rate, lambda rng, n: rng.binomial(16, rng.beta(rate, 1 - rate, size=n)) / 16) >= 0.93
    assert covered(problems, rate, lambda rng, n: rng.binomial(16, rate, size=n) / 16) >= 0.93


def test_p_is_exact_for_few_differences():
    """Of 2^3 combinations of signs, only 2 give a mean as large as three equal differences."""
    assert difference([0.0, 0.25, 0.5], [0.5, 0.75, 1.0]).p == 2 / 8
    assert difference([0.0, 0.0, 0.5, 0.5], [1.0, 0.5, 0.0, 0.5]).p == 6 / 8  # |±1 ±1/2 ±1/2| >= 1
    assert difference([0.5] * 500, [1.0] * 6 + [0.5] * 494).p == 2 / 2**6  # problems without a difference count nothing


def test_random_signs_agree_with_all_signs():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, ALL_FLIPS + 1))
    sums = [abs(np.dot(signs, b - a)) for signs in product((-1, 1), repeat=len(a))]
    assert difference(a, b).p == pytest.approx(np.mean(np.array(sums) >= abs((b - a).sum()) - 1e-12), abs=0.02)
    assert difference(a, b, seed=1) == difference(a, b, seed=1) != difference(a, b, seed=2)


def test_p_is_never_0():
    """A hundred equal differences, more than any random signs give; their own signs count."""
    assert difference([0.0] * 100, [0.5] * 100).p == 1 / (RESAMPLES + 1)


def test_the_interval_follows_the_test():
    """Five problems never suffice for p < 0.05; six do. Student's interval alone says otherwise of both."""
    found = difference([0.0] * 5, [1.0] * 5)
    assert found.p == 2 / 32 and found.ci95[0] == 0
    found = difference([0.0] * 6, [0.1] * 6)
    assert found.p == 2 / 64 and found.ci95[0] == pytest.approx(0.1 - 0.4 / 6)  # one negative sign of six


def test_no_difference():
    found = difference([0.0, 1.0, 0.5], [0.0, 1.0, 0.5])
    assert (found.value, found.p) == (0, 1)


def test_the_spread_between_problems_cancels_out():
    """Hard and easy problems, B a little better on each."""
    rng = np.random.default_rng(0)
    hardness = 0.9 * rng.random(200)
    found = difference(hardness, hardness + 0.05 + 0.02 * rng.standard_normal(200))
    assert found.p < 0.001 and 0 < found.ci95[0] < 0.05 < found.ci95[1] < 0.07


def test_the_sign():
    a, b = np.random.default_rng(1).random((2, 12))
    forth, back = difference(a, b), difference(b, a)
    assert forth.value == pytest.approx((b - a).mean()) and back.value == -forth.value
    assert back.ci95 == pytest.approx([-forth.ci95[1], -forth.ci95[0]]) and back.p == forth.p


@pytest.mark.parametrize("problems", [5, 8, 15, 60])
def test_false_alarms(problems):
    """Two models with the same rate on each problem; of 1,000, 5.5 % and two standard deviations are 69."""
    rng = np.random.default_rng(0)
    alarms = 0
    for i in range(1000):
        rates = rng.random(problems)
        found = difference(*(rng.binomial(16, [rates, rates]) / 16), seed=i, resamples=500)
        assert (found.p < 0.05) == (not found.ci95[0] <= 0 <= found.ci95[1])
        alarms += found.p < 0.05
    assert alarms < 69


def test_a_difference_is_found_and_covered():
    rng = np.random.default_rng(0)
    rates = rng.random((500, 30))
    better = np.minimum(1, rates + 0.15)
    found = [difference(*(rng.binomial(16, pair) / 16), resamples=500) for pair in zip(rates, better, strict=True)]
    true = (better - rates).mean()
    assert np.mean([m.p < 0.05 for m in found]) > 0.9
    assert np.mean([m.ci95[0] <= true <= m.ci95[1] for m in found]) >= 0.93


def test_percent():
    assert percent(0.874, [0.8488, 0.896]) == "87.4 % [84.9, 89.6]"
