"""Accuracy from samples.

Every measure takes one list of samples per problem, all of the same length n, and returns one number per problem.
`estimate` turns these numbers into a mean and its interval.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from m1.grading import Grader
from m1.reasoning.voting import vote

RESAMPLES = 100  # random draws of k samples for maj@k, as in the paper
Z95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % confidence interval, value ± ci95. The problems are the random sample.

    Attributes:
        value: the mean.
        ci95: half-width of the interval, by the normal approximation.
    """

    value: float
    ci95: float


def estimate(per_problem: Sequence[float]) -> Estimate:
    """The mean of one number per problem, with its interval. A single problem gives a half-width of 1."""
    count = len(per_problem)
    mean = math.fsum(per_problem) / count
    if count == 1:
        return Estimate(mean, 1.0)
    variance = math.fsum((x - mean) ** 2 for x in per_problem) / (count - 1)
    return Estimate(mean, Z95 * math.sqrt(variance / count))


def pass_at_1(correct: Sequence[Sequence[bool]]) -> list[float]:
    """avg@n: the share of right samples, per problem."""
    return [sum(samples) / len(samples) for samples in correct]


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Probability that k samples drawn without replacement include a right one, per problem.

    With c right samples of n it is 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).
    """
    return [1 - math.comb(len(s) - sum(s), k) / math.comb(len(s), k) for s in correct]


def majority_at_k(
    answers: Sequence[Sequence[str | None]], golds: Sequence[Sequence[str]], k: int, grader: Grader, seed: int = 0
) -> list[float]:
    """Accuracy of the vote over k samples, per problem: 0 or 1 if k = n, else the mean over RESAMPLES random draws.

    Args:
        answers: per problem, the samples' answers; None for a sample without an answer.
        golds: per problem, its golds.
        k: number of votes, at most n.
        grader: decides which answers are equal, and which are right.
        seed: of the draws.
    """
    rng = random.Random(seed)
    per_problem = []
    for samples, gold in zip(answers, golds, strict=True):
        draws = [samples] if k == len(samples) else [rng.sample(samples, k) for _ in range(RESAMPLES)]
        winners = [vote(draw, grader.partition).answer for draw in draws]
        per_problem.append(sum(w is not None and grader.grade(w, gold) for w in winners) / len(draws))
    return per_problem


def metrics_of(
    rows: Sequence[dict[str, Any]], golds: Mapping[str, Sequence[str]], n: int, grader: Grader, by_round: bool = True
) -> dict[str, Any]:
    """Computes the metrics of a finished evaluation.

    `accuracy_against_seconds` is the accuracy of the vote after 1, 2, ... n rounds, at measured seconds and without
    resampling. If samples weren't made in rounds, only its last point is known.

    Args:
        rows: lines of samples.jsonl (evaluate.py), n per problem.
        golds: each problem's golds, by its id.
        n: number of samples per problem.
        grader: decides which answers are equal, and which are right.
        by_round: whether each round sampled every problem once before the next began.
    """
    by_problem: dict[str, list[dict[str, Any]]] = {problem: [] for problem in golds}
    for row in sorted(rows, key=lambda row: row["round"]):
        by_problem[row["problem"]].append(row)
    groups, gold = list(by_problem.values()), list(golds.values())
    answers = [[row["answer"] for row in group] for group in groups]
    correct = [[row["correct"] for row in group] for group in groups]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < n] + [n]
    first = pass_at_1(correct)
    majority = {str(k): majority_at_k(answers, gold, k, grader) for k in ks}
    curve = []
    for k in range(1 if by_round else n, n + 1):
        accuracy = estimate(majority_at_k([group[:k] for group in answers], gold, k, grader))
        seconds = max(row["seconds"] for row in rows if row["round"] < k)
        curve.append({"samples": k, "seconds": seconds, "accuracy": accuracy.value, "ci95": accuracy.ci95})
    tokens = [row["tokens"] for row in rows]
    total = None if None in tokens else sum(tokens)
    seconds = max(row["seconds"] for row in rows)
    return {
        "n_problems": len(groups),
        "pass@1": estimate(first).value,
        "pass@1_ci95": estimate(first).ci95,
        "pass@k": {str(k): estimate(pass_at_k(correct, k)).value for k in ks},
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
