"""Accuracy against seconds, from the runs of `m1 budget`, and how far each model leads over the first one."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from m1.evaluation.intervals import difference, estimate
from m1.evaluation.metrics import classes_of, majority_at_k
from m1.grading import Grader
from m1.tasks.problem import Problem

POINTS = 16  # number of budgets at which accuracy is computed; each is longer than the one before by the same factor
SHORTEST = 1 / 64  # the shortest budget, as a share of the longest
VOTES = (1, 4, 16, 64)  # numbers of samples whose time is reported
SECONDS_AXIS = "measured seconds per problem"

Run = Mapping[str, Any]  # a line of runs.jsonl (see time_budget.py)


class Outcome(NamedTuple):
    """The result that a run would have had at some budget.

    Attributes:
        accuracy: of the vote over the samples finished by then: 1, 0, or the share of a tie.
        samples: number of these samples.
    """

    accuracy: float
    samples: int


Outcomes = dict[str, list[list[Outcome]]]  # problem id -> one list per run (one run per seed) -> one outcome per budget


def accuracy_curves(
    runs: Sequence[Run], models: Sequence[str], problems: Sequence[Problem], seconds: float, grader: Grader
) -> dict[str, Any]:
    """Computes each model's accuracy at each budget, and the lead of each model over the first.

    Args:
        runs: one per model, problem and seed.
        models: names of the models.
        problems: the problems with their golds.
        seconds: the longest budget.
        grader: decides which answers are equal, and which are right.

    Returns:
        {"models": {name: curve}, "leads": {name: lead}}, the content of budget.json (see `_curve` and `_lead`).
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
        classes = classes_of([answer for _, answer, _ in run["samples"]], grader.partition)
        correct = [_is_right(answer, golds[run["problem"]], grader) for _, answer, _ in run["samples"]]
        of_run = []
        for budget in budgets:
            count = sum(ended <= budget for ended, _, _ in run["samples"])
            [accuracy] = majority_at_k([classes[:count]], [correct[:count]], count)
            of_run.append(Outcome(accuracy, count))
        outcomes[run["problem"]].append(of_run)
    return outcomes


def _is_right(answer: str | None, golds: Sequence[str], grader: Grader) -> bool:
    return answer is not None and grader.grade(answer, golds)


def _curve(
    runs: Sequence[Run],
    outcomes: Outcomes,
    budgets: Sequence[float],
    golds: Mapping[str, Sequence[str]],
    grader: Grader,
) -> dict[str, Any]:
    """One model's curve.

    Returns:
        points: per budget, the accuracy of the vote with its interval over problems, the accuracy per seed
            (`of_seeds`), and the mean number of samples in a vote.
        seconds_to_samples: for each number in VOTES, the median time until so many samples had finished. None if half
            of the runs had fewer.
        sample_accuracy, tokens_per_second, tokens_per_sample: of finished samples.
    """
    points = []
    for i, seconds in enumerate(budgets):
        accuracy = estimate(_accuracies(outcomes, i))
        by_seed = zip(*outcomes.values(), strict=True)
        of_seeds = [sum(run[i].accuracy for run in seed) / len(outcomes) for seed in by_seed]
        samples = sum(run[i].samples for problem in outcomes.values() for run in problem) / len(runs)
        point = {"seconds": seconds, "accuracy": accuracy.value, "ci95": accuracy.ci95}
        points.append({**point, "of_seeds": of_seeds, "samples": samples})
    ended = [(run["problem"], answer, tokens) for run in runs for _, answer, tokens in run["samples"]]
    right = sum(_is_right(answer, golds[problem], grader) for problem, answer, _ in ended)
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
    """How much more often the vote is right than another model's on the same problems: at each budget, and averaged
    over the budgets. With intervals and p-values over problems."""
    points = []
    for i, seconds in enumerate(budgets):
        points.append({"seconds": seconds, **asdict(difference(_accuracies(other, i), _accuracies(own, i)))})
    return {**asdict(difference(_accuracies(other), _accuracies(own))), "points": points}


def _accuracies(outcomes: Outcomes, i: int | None = None) -> list[float]:
    """The mean accuracy of the runs per problem: at budget i, or over all budgets."""
    chosen = slice(None) if i is None else slice(i, i + 1)
    return [statistics.fmean(at.accuracy for run in runs for at in run[chosen]) for runs in outcomes.values()]


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws accuracy and the number of samples in a vote against seconds. `result` is the content of budget.json."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    accuracy, samples = figure.subplots(1, 2)
    draw_accuracy(accuracy, result["models"])
    for name, model in result["models"].items():
        points = model["points"]
        samples.plot([p["seconds"] for p in points], [p["samples"] for p in points], marker=".", label=name)
    samples.set(xscale="log", xlabel=SECONDS_AXIS, ylabel="samples in the vote")
    samples.grid(alpha=0.3)
    samples.legend()
    return figure


def draw_accuracy(axes: Axes, models: Mapping[str, Any]) -> None:
    """Draws each model's accuracy, with its 95 % interval, against seconds. `models` are curves by name."""
    for name, model in models.items():
        points = model["points"]
        seconds = [p["seconds"] for p in points]
        axes.plot(seconds, [p["accuracy"] for p in points], marker=".", label=name)
        low, high = ([p["ci95"][end] for p in points] for end in (0, 1))
        axes.fill_between(seconds, low, high, alpha=0.15)
    axes.set(xscale="log", xlabel=SECONDS_AXIS, ylabel="accuracy of the vote", ylim=(0, 1.02))
    axes.xaxis.set_minor_formatter(NullFormatter())  # minor labels would overlap
    axes.grid(alpha=0.3)
    axes.legend()
