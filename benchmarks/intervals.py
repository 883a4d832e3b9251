"""What the 95 % intervals cover, and how often `m1 eval compare` finds a difference: writes results/intervals.json.

    python benchmarks/intervals.py

A population is a distribution of problems' rates of right samples. Each simulated evaluation draws its problems from
one, and 16 samples of each problem. All wrong answers are the same one. Rows give the worst and the mean over
populations and true rates, and compare with Student's interval, the normal approximation, and the percentile bootstrap
that `m1 eval compare` once used. It uses all cores: half an hour of two.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from m1.evaluation.intervals import LEVEL, Z95, _student, difference, estimate
from m1.jsonl import write_json
from m1.machine import describe_machine

ROOT = Path(__file__).parents[1]
PROBLEMS = (8, 15, 30, 60, 120, 500)
PROBLEMS_OF_DIFFERENCES = (5, *PROBLEMS)
N = 16
RATES, EXTREME_RATES = (0.05, 0.2, 0.5, 0.8, 0.95), (0.02, 0.98)
SHIFT = 0.7  # logits by which the better model's rates are higher
REPEATS, REPEATS_OF_POWER = 10_000, 2_000
RESAMPLES = 500

Population = tuple[np.ndarray, np.ndarray]  # rates, and their shares
RIGHT = np.arange(N + 1)
MEASURES = {  # the value of a problem with 0, 1, ... right samples
    "avg@1": np.array([0.0, 1.0]),
    "avg@16": RIGHT / N,
    "pass@4": np.array([1 - math.comb(N - c, 4) / math.comb(N, 4) for c in RIGHT]),
    "maj@16": (np.sign(2 * RIGHT - N) + 1) / 2,
}


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))


def beta(concentration: float) -> Callable[[float], Population]:
    """Rates of a symmetric Beta distribution, shifted by x logits."""
    rates = np.random.default_rng(0).beta(concentration / 2, concentration / 2, size=200)
    logits = np.log(rates.clip(1e-12)) - np.log((1 - rates).clip(1e-12))
    return lambda x: (sigmoid(logits + x), np.full(len(logits), 1 / len(logits)))


def two_rates(low: float, high: float) -> Callable[[float], Population]:
    return lambda x: (np.array([low, high]), np.array([1 - sigmoid(x), sigmoid(x)]))


POPULATIONS = {
    "Beta, 0.2": beta(0.2),
    "Beta, 2": beta(2),
    "Beta, 50": beta(50),
    "one rate": lambda x: (sigmoid(np.array([x])), np.ones(1)),
    "0 or 1": two_rates(0.0, 1.0),
    "0 or 0.98": two_rates(0.0, 0.98),
    "0.02 or 1": two_rates(0.02, 1.0),
}


def counts(rates: np.ndarray, n: int) -> np.ndarray:
    """[rates, n + 1]: probabilities of 0 to n right samples."""
    right = np.arange(n + 1)
    ways = np.array([math.comb(n, c) for c in right])
    return ways * rates[:, None] ** right * (1 - rates[:, None]) ** (n - right)


def with_rate(population: Callable[[float], Population], values: np.ndarray, rate: float) -> np.ndarray | None:
    """Probabilities of 0 to n right samples in the population whose true value is `rate`; None if it can't be."""

    def probabilities(x: float) -> np.ndarray:
        rates, shares = population(x)
        return shares @ counts(rates, len(values) - 1)

    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probabilities(middle) @ values < rate else (low, middle)
    found = probabilities(low)
    return found if abs(found @ values - rate) < 1e-6 else None


def evaluations(
    probabilities: np.ndarray, values: np.ndarray, problems: int, repeats: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, float]]:
    """Different simulated evaluations, one value per problem, and the share of each."""
    drawn = rng.multinomial(problems, probabilities / probabilities.sum(), size=repeats)
    for histogram, times in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True):
        yield np.repeat(values, histogram), times / repeats


def coverage(name: str, problems: int, rates: tuple[float, ...]) -> dict:
    """Coverage of `estimate` for one measure and number of problems."""
    rng, values = np.random.default_rng(problems), MEASURES[name]
    cells = []
    for population, make in POPULATIONS.items():
        for rate in rates:
            if (probabilities := with_rate(make, values, rate)) is None:
                continue
            covered = dict.fromkeys(("own", "student", "normal"), 0.0)
            width = dict.fromkeys(covered, 0.0)
            for sample, share in evaluations(probabilities, values, problems, REPEATS, rng):
                error = sample.std(ddof=1) / math.sqrt(problems)
                halves = {"student": _student(problems - 1) * error, "normal": Z95 * error}
                ends = {kind: (sample.mean() - half, sample.mean() + half) for kind, half in halves.items()}
                ends["own"] = tuple(estimate(sample).ci95)
                for kind, (low, high) in ends.items():
                    covered[kind] += share * (low - 1e-9 <= rate <= high + 1e-9)
                    width[kind] += share * (high - low)
            cells.append((covered["own"], population, rate, covered, width))
    worst = min(cells)
    valid = [width["own"] / width["student"] for *_, covered, width in cells if covered["student"] >= 0.94]
    row = {
        "measure": name,
        "problems": problems,
        "rates": rates,
        "worst": round(float(worst[0]), 4),
        "worst_of": {"population": worst[1], "rate": worst[2]},
        "mean": round(float(np.mean([cell[0] for cell in cells])), 4),
        "worst_of_normal": round(float(min(covered["normal"] for *_, covered, _ in cells)), 4),
        "width_to_student": [round(float(f(valid)), 3) for f in (np.median, np.max)] if valid else None,
    }
    print(row, flush=True)
    return row


def differences(name: str, problems: int) -> dict:
    """False alarms, coverage and power of `difference` for one measure and number of problems."""
    rng, values = np.random.default_rng(problems), MEASURES[name]
    levels, table = np.unique(np.round(values[None, :] - values[:, None], 12), return_inverse=True)
    weights = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES) / problems
    cells: dict[float, list[np.ndarray]] = {0.0: [], SHIFT: []}
    for population in ("Beta, 0.2", "Beta, 2", "Beta, 50"):
        for x in (0.0, 2.0):
            for shift, rows in cells.items():
                (rates, shares), (better, _) = (POPULATIONS[population](x + by) for by in (0.0, shift))
                of_model, of_better = (counts(own, len(values) - 1) for own in (rates, better))
                joint = of_model.T @ (shares[:, None] * of_better)
                probabilities = np.bincount(table.ravel(), joint.ravel())
                true, found = probabilities @ levels, np.zeros(4)
                repeats = REPEATS_OF_POWER if shift else REPEATS
                sampled = evaluations(probabilities, levels, problems, repeats, rng)
                for seed, (sample, share) in enumerate(sampled):
                    own = difference(np.zeros(problems), sample, seed, RESAMPLES)
                    (low, high), resampled = own.ci95, weights @ sample
                    lower, upper = np.percentile(resampled, [2.5, 97.5])
                    outside = not lower - 1e-9 <= 0 <= upper + 1e-9
                    covers = low - 1e-9 <= true <= high + 1e-9
                    found += share * np.array([own.p < LEVEL, not low <= 0 <= high, outside, covers])
                rows.append(found)
    none, some = (np.array(rows) for rows in cells.values())
    names = ("p", "interval", "bootstrap")
    row = {
        "measure": name,
        "problems": problems,
        "worst_false_alarms": dict(zip(names, none.max(axis=0).round(4).tolist(), strict=False)),
        "worst_coverage": round(float(min(none[:, 3].min(), some[:, 3].min())), 4),
        "mean_power": dict(zip(names, some.mean(axis=0).round(4).tolist(), strict=False)),
    }
    print(row, flush=True)
    return row


def main() -> None:
    with ProcessPoolExecutor() as pool:
        jobs = {
            "coverage": [
                pool.submit(coverage, name, problems, rates)
                for rates in (RATES, EXTREME_RATES)
                for name in MEASURES
                for problems in PROBLEMS
            ],
            "differences": [
                pool.submit(differences, name, problems)
                for name in ("avg@1", "avg@16", "maj@16")
                for problems in PROBLEMS_OF_DIFFERENCES
            ],
        }
        rows = {part: [job.result() for job in submitted] for part, submitted in jobs.items()}
    facts = {"machine": describe_machine(torch.device("cpu")), "samples": N, "repeats": REPEATS, "shift": SHIFT}
    write_json(ROOT / "results/intervals.json", facts | rows)


if __name__ == "__main__":
    main()
