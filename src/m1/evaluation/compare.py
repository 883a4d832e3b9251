"""Tests whether one result is better than another on the same problems, by a paired bootstrap over problems.

The problems are the random sample, as in every interval of this package. Both results of a resampled problem are taken
together, so the difficulty that they share cancels out (Efron and Tibshirani 1993, chapter 13; Koehn 2004). The
interval is the percentile interval of the difference. p is the level at which this interval would just touch 0.
"""

from pathlib import Path
from typing import Any

import numpy as np

from m1.errors import UserError
from m1.jsonl import read_json, read_jsonl

RESAMPLES = 10_000
CHUNK = 500  # resamples at a time, for memory
MOST_DIFFERENT = 10


def compare(a: str | Path, b: str | Path, seed: int = 0) -> dict[str, Any]:
    """Computes the differences B - A of two result folders: of pass@1, and of maj@k for the largest k that both have.

    Args:
        a, b: finished result folders of `m1 eval`, on the same problems.
        seed: of the resampling.

    Raises:
        UserError: a folder without a finished result, or results of different problems or golds.
    """
    results = [_result(Path(folder)) for folder in (a, b)]
    _check_same_problems(Path(a), Path(b))
    first, second = (result["per_problem"] for result in results)
    ids = sorted(first)
    k = max(set(results[0]["maj@k"]) & set(results[1]["maj@k"]), key=int)
    accuracy = [np.array([side[i]["pass@1"] for i in ids]) for side in (first, second)]
    majority = [np.array([side[i]["maj@k"][k] for i in ids]) for side in (first, second)]
    difference = accuracy[1] - accuracy[0]
    order = sorted(np.flatnonzero(difference), key=lambda i: (-abs(difference[i]), ids[i]))
    return {
        "a": str(a),
        "b": str(b),
        "problems": len(ids),
        "resamples": RESAMPLES,
        "seed": seed,
        "settings_that_differ": _differing(*results),
        "measures": {
            "pass@1": paired_bootstrap(accuracy[0], accuracy[1], seed),
            f"maj@{k}": paired_bootstrap(majority[0], majority[1], seed),
        },
        "most_different": [
            {"problem": ids[i], "a": accuracy[0][i], "b": accuracy[1][i]} for i in order[:MOST_DIFFERENT]
        ],
    }


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Estimates the mean difference b - a and its 95 % interval.

    Args:
        a, b: [problems], one number per problem.
        seed: of the resampling.
        resamples: number of resamples.

    Returns:
        {"a", "b": means, "difference", "ci95": [low, high], "p": two-sided, of no difference}.
    """
    rng = np.random.default_rng(seed)
    difference = b - a
    parts = []
    for start in range(0, resamples, CHUNK):
        drawn = rng.integers(len(difference), size=(min(CHUNK, resamples - start), len(difference)))
        parts.append(difference[drawn].mean(axis=1))
    means = np.concatenate(parts)
    # A tied resample counts for both sides. One is added, because finitely many resamples can't show that p is 0.
    tail = min((means <= 0).sum(), (means >= 0).sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": float(difference.mean()),
        "ci95": [float(low), float(high)],
        "p": min(1.0, 2 * float(tail + 1) / (resamples + 1)),
    }


def _result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.exists():
        raise UserError(f"{path} is missing: give the folder of a finished `m1 eval`, or run it again to finish it")
    result = read_json(path)
    if "per_problem" not in result or not (folder / "problems.jsonl").exists():
        raise UserError(f"{folder} has no results per problem: it isn't from this version's `m1 eval`; run it again")
    return result


def _check_same_problems(a: Path, b: Path) -> None:
    first, second = ({row["id"]: row for row in read_jsonl(folder / "problems.jsonl")} for folder in (a, b))
    for left, right, folder in ((first, second, a), (second, first, b)):
        if alone := [id_ for id_ in left if id_ not in right]:
            raise UserError(
                f"{a} and {b} are of different problems: {alone[0]!r} and {len(alone) - 1} more are only in {folder}"
            )
    for id_, row in first.items():
        for key, what in (("text", "texts"), ("answers", "golds")):
            if row[key] != second[id_][key]:
                raise UserError(
                    f"problem {id_!r} has different {what}: {row[key]!r} in {a} and {second[id_][key]!r} in {b}"
                )


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    loaded = ("sampler", "dtype")
    used, others = ({**r["settings"], **{key: r.get(key) for key in loaded}} for r in (a, b))
    pairs = {name: [used.get(name), others.get(name)] for name in used | others}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
