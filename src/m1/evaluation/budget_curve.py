"""What runs under a budget say: accuracy against seconds, and who leads."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from m1.evaluation.metrics import estimate
from m1.evaluation.tasks import Problem
from m1.reasoning.answers import Grader
from m1.reasoning.voting import vote

POINTS = 16  # budgets at which accuracy is given, each a fixed factor above the one before
SHORTEST = 1 / 64  # of the longest
VOTES = (1, 4, 16, 64)  # samples whose end is timed
SECONDS_AXIS = "seconds a problem, measured"

Run = Mapping[str, Any]  # a line of runs.jsonl (see budget.py)


class Outcome(NamedTuple):
    """What a run would have answered at some budget: whether rightly, and the samples behind the vote."""

    right: bool
    samples: int


Outcomes = dict[str, list[list[Outcome]]]  # of each problem: its runs' (one a seed) at each budget


def summarize(
    runs: Sequence[Run], models: Sequence[str], problems: Sequence[Problem], seconds: float, grader: Grader
) -> dict[str, Any]:
    """Each model's curve, and the lead of each over the first one.

    Args:
        runs: one of each model, problem and seed.
        seconds: the longest budget.
    """
    golds = {problem.id: problem.answers for problem in problems}
    budgets = [seconds * SHORTEST ** (1 - i / (POINTS - 1)) for i in range(POINTS)]
    curves, outcomes = {}, {}
    for name in models:
        own = [run for run in runs if run["model"] == name]
        outcomes[name] = _outcomes(own, budgets, golds, grader)
        curves[name] = _curve(own, outcomes[name], budgets, golds, grader)
    leads = {name: _lead(outcomes[name], outcomes[models[0]], budgets) for name in models[1:]}
    return {"models": curves, "leads": leads}


def _outcomes(
    runs: Sequence[Run], budgets: Sequence[float], golds: Mapping[str, Sequence[str]], grader: Grader
) -> Outcomes:
    outcomes: Outcomes = {problem: [] for problem in golds}
    for run in sorted(runs, key=lambda run: run["seed"]):
        of_run = []
        for budget in budgets:
            answers = [answer for ended, answer, _ in run["samples"] if ended <= budget]
            winner = vote(answers, grader).answer
            right = winner is not None and grader.grade(winner, golds[run["problem"]])
            of_run.append(Outcome(right, len(answers)))
        outcomes[run["problem"]].append(of_run)
    return outcomes


def _curve(
    runs: Sequence[Run],
    outcomes: Outcomes,
    budgets: Sequence[float],
    golds: Mapping[str, Sequence[str]],
    grader: Grader,
) -> dict[str, Any]:
    """At each budget: the share of problems whose vote is right, with its interval over problems; that of each seed
    alone; and the mean number of samples behind a vote. Tokens, and the accuracy of a sample, are of those that ended.
    `seconds_to_samples`: median time after which so many had; None where half of the runs had fewer.
    """
    points = []
    for i, seconds in enumerate(budgets):
        accuracy = estimate(_shares(outcomes, i))
        by_seed = zip(*outcomes.values(), strict=True)
        of_seeds = [sum(run[i].right for run in seed) / len(outcomes) for seed in by_seed]
        samples = sum(run[i].samples for problem in outcomes.values() for run in problem) / len(runs)
        point = {"seconds": seconds, "accuracy": accuracy.value, "ci95": accuracy.ci95}
        points.append({**point, "of_seeds": of_seeds, "samples": samples})
    ended = [(run["problem"], answer, tokens) for run in runs for _, answer, tokens in run["samples"]]
    right = sum(answer is not None and grader.grade(answer, golds[problem]) for problem, answer, _ in ended)
    tokens = sum(tokens for _, _, tokens in ended)
    return {
        "points": points,
        "seconds_to_samples": {str(votes): _seconds_to(runs, votes) for votes in VOTES},
        "sample_accuracy": right / max(1, len(ended)),
        "tokens_per_second": tokens / sum(run["seconds"] for run in runs),
        "tokens_per_sample": tokens / max(1, len(ended)),
    }


def _seconds_to(runs: Sequence[Run], votes: int) -> float | None:
    reached = [run["samples"][votes - 1][0] if len(run["samples"]) >= votes else math.inf for run in runs]
    median = statistics.median(reached)
    return median if math.isfinite(median) else None


def _lead(own: Outcomes, other: Outcomes, budgets: Sequence[float]) -> dict[str, Any]:
    """How much more often the vote is right than another model's on the same problem, at each budget and on the mean of
    them, with 95 % intervals over problems."""
    differences = [
        [a - b for a, b in zip(_shares(own, i), _shares(other, i), strict=True)] for i in range(len(budgets))
    ]
    of_problems = [sum(of_problem) / len(budgets) for of_problem in zip(*differences, strict=True)]
    points = [{"seconds": seconds, **asdict(estimate(row))} for seconds, row in zip(budgets, differences, strict=True)]
    return {**asdict(estimate(of_problems)), "points": points}


def _shares(outcomes: Outcomes, i: int) -> list[float]:
    """Of each problem: the share of its runs that are right at budget i."""
    return [sum(run[i].right for run in runs) / len(runs) for runs in outcomes.values()]


def draw(result: Mapping[str, Any]) -> Figure:
    """Accuracy, and the samples behind a vote, against seconds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    accuracy, samples = figure.subplots(1, 2)
    draw_accuracy(accuracy, result["models"])
    for name, model in result["models"].items():
        points = model["points"]
        samples.plot([p["seconds"] for p in points], [p["samples"] for p in points], marker=".", label=name)
    samples.set(xscale="log", xlabel=SECONDS_AXIS, ylabel="samples behind the vote")
    samples.grid(alpha=0.3)
    samples.legend()
    return figure


def draw_accuracy(axes: Axes, models: Mapping[str, Any]) -> None:
    for name, model in models.items():
        seconds, middle, half = ([p[key] for p in model["points"]] for key in ("seconds", "accuracy", "ci95"))
        axes.plot(seconds, middle, marker=".", label=name)
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(seconds, low, high, alpha=0.15)
    axes.set(xscale="log", xlabel=SECONDS_AXIS, ylabel="accuracy of the vote", ylim=(0, 1.02))
    axes.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
    axes.grid(alpha=0.3)
    axes.legend()
