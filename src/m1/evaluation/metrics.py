"""Accuracy from samples.

Every measure takes one list of samples per problem, all of the same length n, and returns one number per problem.
intervals.py turns these numbers into a mean and its interval.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np

from m1.evaluation.intervals import estimate
from m1.grading import Grader
from m1.reasoning.voting import Partition


def pass_at_1(correct: Sequence[Sequence[bool]]) -> list[float]:
    """avg@n: the share of right samples, per problem."""
    return [sum(samples) / len(samples) for samples in correct]


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Probability that k samples drawn without replacement include a right one, per problem.

    With c right samples of n it is 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).
    """
    return [1 - math.comb(len(s) - sum(s), k) / math.comb(len(s), k) for s in correct]


def classes_of(answers: Sequence[str | None], partition: Partition) -> list[int | None]:
    """The class of each sample's answer, None for a sample without an answer.

    Classes are found once among all samples of a problem, and stay so for the votes of some of them.
    """
    labels = iter(partition([answer for answer in answers if answer is not None]))
    return [None if answer is None else next(labels) for answer in answers]


def majority_at_k(classes: Sequence[Sequence[int | None]], correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Expected accuracy of the vote of k samples drawn without replacement, per problem. It is exact.

    Classes that tie for the lead share the vote: if one of t is right, it counts 1/t. A class is right if most of its
    votes are, and half right if half of them are. So maj@1 is pass@1.

    Args:
        classes: per problem, the class of each sample's answer (see `classes_of`).
        correct: whether each sample is right. Samples without an answer are wrong.
        k: number of votes, at most n.
    """
    return [_expected_accuracy(*problem, k) for problem in zip(classes, correct, strict=True)]


def _expected_accuracy(classes: Sequence[int | None], correct: Sequence[bool], k: int) -> float:
    """Counts the draws of k samples by the leader's votes, the number of leaders, and the votes of the classes so far.

    Integers of any size make it exact.
    """
    sizes = Counter(classes)
    right = Counter(label for label, is_right in zip(classes, correct, strict=True) if is_right)
    silent, undrawn = sizes.pop(None, 0), len(classes) - k
    most = max(sizes.values(), default=0)
    total = Fraction(0)
    for lead in range(max(1, most - undrawn), min(k, most) + 1):
        ties = min(k // lead, sum(size >= lead for size in sizes.values()))
        # [draws, right leaders of all draws in halves][number of leaders][votes]
        counts = np.zeros((2, ties + 1, k + 1), dtype=object)
        counts[0, 0, 0] = 1
        for label, size in sizes.items():
            before, counts = counts, np.zeros_like(counts)
            for votes in range(max(0, size - undrawn), min(size, lead) + 1):
                leads = int(votes == lead)
                kept = before[:, : ties + 1 - leads, : k + 1 - votes]
                counts[:, leads:, votes:] += math.comb(size, votes) * kept
                if leads:
                    counts[1, 1:, votes:] += _right_halves(size, right[label], votes) * kept[0]
        for spoken in range(max(0, k - silent), k + 1):
            ways = math.comb(silent, k - spoken)
            total += sum(Fraction(ways * counts[1, leaders, spoken], 2 * leaders) for leaders in range(1, ties + 1))
    return float(total / math.comb(len(classes), k))


def _right_halves(size: int, right: int, votes: int) -> int:
    """Over all draws of some votes from a class: 2 if most of them are right, 1 if half of them are, else 0; summed."""
    ways = [math.comb(right, good) * math.comb(size - right, votes - good) for good in range(votes + 1)]
    return sum(way * ((2 * good > votes) + (2 * good >= votes)) for good, way in enumerate(ways))


def metrics_of(
    rows: Sequence[dict[str, Any]], problems: Iterable[str], n: int, grader: Grader, by_round: bool = True
) -> dict[str, Any]:
    """Computes the metrics of a finished evaluation.

    `accuracy_against_seconds` is the accuracy of the vote after 1, 2, ... n rounds, at measured seconds. If samples
    weren't made in rounds, only its last point is known.

    Args:
        rows: lines of samples.jsonl (evaluate.py), n per problem.
        problems: ids of the problems.
        n: number of samples per problem.
        grader: decides which answers are equal.
        by_round: whether each round sampled every problem once before the next began.
    """
    by_problem: dict[str, list[dict[str, Any]]] = {problem: [] for problem in problems}
    for row in sorted(rows, key=lambda row: row["round"]):
        by_problem[row["problem"]].append(row)
    groups = list(by_problem.values())
    classes = [classes_of([row["answer"] for row in group], grader.partition) for group in groups]
    correct = [[row["correct"] for row in group] for group in groups]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < n] + [n]
    first = pass_at_1(correct)
    majority = {str(k): majority_at_k(classes, correct, k) for k in ks}
    curve = []
    for k in range(1 if by_round else n, n + 1):
        accuracy = estimate(majority_at_k([of[:k] for of in classes], [of[:k] for of in correct], k))
        seconds = max(row["seconds"] for row in rows if row["round"] < k)
        curve.append({"samples": k, "seconds": seconds, "accuracy": accuracy.value, "ci95": accuracy.ci95})
    tokens = [row["tokens"] for row in rows]
    total = None if None in tokens else sum(tokens)
    seconds = max(row["seconds"] for row in rows)
    return {
        "n_problems": len(groups),
        "pass@1": estimate(first).value,
        "pass@1_ci95": estimate(first).ci95,
        "pass@k": {str(k): asdict(estimate(pass_at_k(correct, k))) for k in ks},
        "maj@k": {k: asdict(estimate(values)) for k, values in majority.items()},
        "accuracy_against_seconds": curve,
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "no_answer": sum(row["answer"] is None for row in rows) / len(rows),
        "tokens": total,
        "seconds": seconds,
        "tokens_per_second": None if total is None else total / max(seconds, 1e-9),
        "per_problem": {
            problem: {"pass@1": first[i], "maj@k": {k: values[i] for k, values in majority.items()}}
            for i, problem in enumerate(by_problem)
        },
    }
