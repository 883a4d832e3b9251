"""Metrics against numbers worked out by hand."""

from collections import Counter
from itertools import combinations
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.evaluation.intervals import estimate
from m1.evaluation.metrics import classes_of, majority_at_k, metrics_of, pass_at_1, pass_at_k
from m1.grading import Grader

CORRECT = [[True, True, False, False], [False, False, False, False]]


def test_pass_at_1():
    assert pass_at_1(CORRECT) == [0.5, 0.0]


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


def majority(answers, gold, k):
    """maj@k of one problem."""
    with Grader() as grader:
        correct = [answer is not None and grader.grade(answer, [gold]) for answer in answers]
        return majority_at_k([classes_of(answers, grader.partition)], [correct], k)[0]


def test_majority():
    assert majority(["1", "1", "2", None], "1", 4) == 1
    assert majority(["3", "4", "4", "4"], "3", 4) == 0
    assert majority([None, None], "1", 2) == 0
    assert majority([], "1", 0) == 0


@pytest.mark.parametrize("gold", ["123", "7"])
def test_a_tie_counts_its_share(gold):
    """metric/tie of the cases: the shorter answer would win all ties, so maj@2 was 0.2 or 0.8."""
    answers = ["123"] * 8 + ["7"] * 8
    assert [majority(answers, gold, k) for k in (1, 2, 15, 16)] == [0.5] * 4
    assert majority(["123", "7", "5", None], gold, 4) == 1 / 3


def test_majority_of_a_part_of_the_samples():
    """Three of "1 1 1 2 2": all draws but the 3 with one 1 elect 1, 7 of 10. Single samples are right 3 times of 5."""
    assert [majority(["1", "1", "1", "2", "2"], "1", k) for k in (1, 3)] == [0.6, 0.7]


def test_a_vote_is_as_right_as_its_members():
    """vote/percent of the cases: 50 is in the class of 50 %, but isn't 0.5."""
    answers = [r"50\%", r"50\%", r"50\%", "50"]
    assert [majority(answers, "0.5", k) for k in (1, 2, 4)] == [0.75, 0.75, 1]


def elected(draw):
    """The accuracy of one vote, from its definition. `draw` has (class, correct) of each sample."""
    votes = Counter(label for label, _ in draw if label is not None)
    leaders = [label for label in votes if votes[label] == max(votes.values())]
    right = [sum(ok for label, ok in draw if label == leader) / votes[leader] for leader in leaders]
    return mean((share > 1 / 2) + (share == 1 / 2) / 2 for share in right) if leaders else 0


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2, 3]), st.booleans()), min_size=1, max_size=8), st.data())
def test_majority_is_the_mean_over_all_draws(samples, data):
    samples = [(label, label is not None and ok) for label, ok in samples]
    k = data.draw(st.integers(1, len(samples)))
    classes, correct = zip(*samples, strict=True)
    expected = mean(map(elected, combinations(samples, k)))
    assert majority_at_k([classes], [correct], k)[0] == pytest.approx(expected)


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2, 3]), st.booleans()), min_size=1, max_size=64))
def test_maj_at_1_is_pass_at_1(samples):
    classes, correct = zip(*[(label, label is not None and ok) for label, ok in samples], strict=True)
    assert majority_at_k([classes], [correct], 1) == pass_at_1([correct])


def test_many_samples():
    """All different, or two answers of 128 samples each: the integers have 76 digits."""
    labels = list(range(256))
    assert majority_at_k([labels], [[i == 0 for i in labels]], 2) == [1 / 256]
    assert majority_at_k([[i % 2 for i in labels]], [[i % 2 == 0 for i in labels]], 128) == [0.5]


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
    found = metrics_of(ROWS, ["a", "b"], 2, Grader())
    half = {"value": 0.5, "ci95": estimate([1.0, 0.0]).ci95}
    assert found.pop("accuracy_against_seconds") == [
        {"samples": 1, "seconds": 2.0, "accuracy": 0.5, "ci95": half["ci95"]},
        {"samples": 2, "seconds": 5.0, "accuracy": 0.5, "ci95": half["ci95"]},
    ]
    assert found == {
        "n_problems": 2,
        "pass@1": 0.5,
        "pass@1_ci95": half["ci95"],
        "pass@k": {"1": half, "2": half},
        "maj@k": {"1": half, "2": half},
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
    found = metrics_of(rows, ["a"], 2, Grader(), by_round=False)
    assert found["tokens"] is None and found["tokens_per_second"] is None
    assert [point["samples"] for point in found["accuracy_against_seconds"]] == [2]


def test_the_curve_is_of_the_first_rounds_not_of_a_draw():
    rows = [row("a", i, answer, answer == "1", i + 1.0) for i, answer in enumerate(["2", "1", "1"])]
    curve = metrics_of(rows, ["a"], 3, Grader())["accuracy_against_seconds"]
    assert [(point["seconds"], point["accuracy"]) for point in curve] == [(1, 0), (2, 0.5), (3, 1)]
