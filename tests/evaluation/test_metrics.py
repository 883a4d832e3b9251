"""Metrics against numbers worked out by hand."""

import math
from itertools import combinations

import pytest

from m1.evaluation.metrics import estimate, majority_at_k, metrics_of, pass_at_1, pass_at_k
from m1.grading import Grader

CORRECT = [[True, True, False, False], [False, False, False, False]]


def test_pass_at_1_and_its_interval():
    assert pass_at_1(CORRECT) == [0.5, 0.0]
    result = estimate(pass_at_1(CORRECT))
    assert result.value == 0.25
    assert result.ci95 == pytest.approx(1.96 * math.sqrt(0.125 / 2))


def test_the_interval_of_five_problems():
    """Mean 0.4; squared deviations 0.16 * 3 + 0.36 * 2 = 1.2; variance 1.2 / 4; standard error sqrt(0.3 / 5)."""
    result = estimate([1.0, 0.0, 0.0, 1.0, 0.0])
    assert result.value == pytest.approx(0.4) and result.ci95 == pytest.approx(1.96 * math.sqrt(0.06))


def test_one_problem_has_no_spread_to_estimate():
    assert estimate([1.0]).ci95 == 1.0


def test_pass_at_k():
    assert pass_at_k(CORRECT, 2) == [pytest.approx(1 - 1 / 6), 0.0]
    assert pass_at_k(CORRECT, 4) == [1.0, 0.0]
    assert pass_at_k(CORRECT, 1) == pass_at_1(CORRECT)


@pytest.mark.parametrize("right", range(8))
@pytest.mark.parametrize("k", [1, 3, 7])
def test_pass_at_k_is_the_mean_over_all_draws(right, k):
    samples = [True] * right + [False] * (7 - right)
    draws = list(combinations(samples, k))
    assert pass_at_k([samples], k)[0] == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majority():
    answers = [["1", "1", "2", None], ["3", "4", "4", "4"]]
    golds = [("1",), ("3",)]
    grader = Grader()
    assert majority_at_k(answers, golds, 4, grader) == [1.0, 0.0]
    assert majority_at_k([[None, None]], [("1",)], 2, grader) == [0.0]


def test_majority_of_a_part_of_the_samples():
    """Three of "1 1 1 2 2": all draws but the 3 with one 1 elect 1, 7 of 10. Single samples are right 3 times of 5."""
    grader = Grader()
    answers = [["1", "1", "1", "2", "2"]] * 40
    for k, expected in ((1, 0.6), (3, 0.7)):
        per_problem = majority_at_k(answers, [("1",)] * 40, k, grader)
        # 4000 draws: the standard deviation of their mean is below 0.008
        assert estimate(per_problem).value == pytest.approx(expected, abs=0.03)
        assert all((100 * value) == pytest.approx(round(100 * value)) for value in per_problem)
        assert any(10 * value != round(10 * value) for value in per_problem)  # by a hundred draws, not by ten
        assert len(set(per_problem)) > 5  # drawn, and anew for every problem


def test_any_written_form_of_a_gold_is_right():
    assert majority_at_k([["5", "5"]], [("3", "5")], 2, Grader()) == [1.0]


def row(problem, round_, answer, correct, seconds, tokens=10, finish_reason="stop"):
    return {
        "problem": problem, "round": round_, "answer": answer, "correct": correct, "seconds": seconds,
        "tokens": tokens, "finish_reason": finish_reason,
    }  # fmt: skip


ROWS = [
    row("b", 1, "2", False, 5.0, finish_reason="length"),
    row("a", 0, "1", True, 1.0),
    row("a", 1, "1", True, 3.0),
    row("b", 0, None, False, 2.0, tokens=30),
]


def test_summary():
    found = metrics_of(ROWS, {"a": ("1",), "b": ("1",)}, 2, Grader())
    half = 1.96 * math.sqrt(0.5 / 2)
    assert found.pop("accuracy_against_seconds") == [
        {"samples": 1, "seconds": 2.0, "accuracy": 0.5, "ci95": half},
        {"samples": 2, "seconds": 5.0, "accuracy": 0.5, "ci95": half},
    ]
    assert found == {
        "n_problems": 2,
        "pass@1": 0.5,
        "pass@1_ci95": half,
        "pass@k": {"1": 0.5, "2": 0.5},
        "maj@k": {"1": {"value": 0.5, "ci95": half}, "2": {"value": 0.5, "ci95": half}},
        "truncated": 0.25,
        "no_answer": 0.25,
        "tokens": 60,
        "seconds": 5.0,
        "tokens_per_second": 12.0,
        "per_problem": {
            "a": {"pass@1": 1.0, "maj@k": {"1": 1.0, "2": 1.0}},
            "b": {"pass@1": 0.0, "maj@k": {"1": 0.0, "2": 0.0}},
        },
    }


def test_summary_of_what_is_not_known():
    rows = [{**ROWS[1], "tokens": None}, ROWS[2]]
    found = metrics_of(rows, {"a": ("1",)}, 2, Grader(), by_round=False)
    assert found["tokens"] is None and found["tokens_per_second"] is None
    assert [point["samples"] for point in found["accuracy_against_seconds"]] == [2]


def test_the_curve_is_of_the_first_rounds_not_of_a_draw():
    rows = [row("a", i, answer, answer == "1", i + 1.0) for i, answer in enumerate(["2", "1", "1"])]
    curve = metrics_of(rows, {"a": ("1",)}, 3, Grader())["accuracy_against_seconds"]
    # of "2" and "1", as often given, the alphabetically first wins
    assert [(point["seconds"], point["accuracy"]) for point in curve] == [(1, 0), (2, 1), (3, 1)]
