"""Metrics against numbers worked out by hand."""

import math

import pytest

from m1.evaluation.metrics import estimate, majority_at_k, pass_at_1, pass_at_k
from m1.reasoning.answers import Grader

CORRECT = [[True, True, False, False], [False, False, False, False]]


def test_pass_at_1_and_its_interval():
    result = pass_at_1(CORRECT)
    assert result.value == 0.25
    assert result.ci95 == pytest.approx(1.96 * math.sqrt(0.125 / 2))


def test_pass_at_k():
    assert pass_at_k(CORRECT, 2).value == pytest.approx((1 - 1 / 6) / 2)
    assert pass_at_k(CORRECT, 4).value == 0.5


def test_majority():
    answers = [["1", "1", "2", None], ["3", "4", "4", "4"]]
    golds = [("1",), ("3",)]
    grader = Grader()
    assert majority_at_k(answers, golds, 4, grader).value == 0.5
    assert majority_at_k(answers, golds, 1, grader).value == pytest.approx((0.5 + 0.25) / 2, abs=0.1)
    assert majority_at_k([[None, None]], [("1",)], 2, grader).value == 0


def test_one_problem_has_no_spread_to_estimate():
    assert estimate([1.0]).ci95 == 1.0
