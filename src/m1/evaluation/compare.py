"""Tests whether one result is better than another on the same problems.

The problems are the random sample, as in every interval of this package. Both results of a problem are taken together,
so the difficulty that they share cancels out. The test and the interval are `m1.evaluation.intervals.difference`.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from m1.errors import UserError
from m1.evaluation.intervals import RESAMPLES, difference
from m1.jsonl import as_written, read_json, read_jsonl

MOST_DIFFERENT = 10


def compare(a: str | Path, b: str | Path, seed: int = 0) -> dict[str, Any]:
    """Computes the differences B - A of two result folders: of pass@1, and of maj@k for the largest k that both have.

    Args:
        a, b: finished result folders of `m1 eval`, on the same problems.
        seed: of the random signs.

    Raises:
        UserError: a folder without a finished result, or results of different problems or golds.
    """
    with as_written(f"a file of {a} or {b}"):
        return _compared(a, b, seed)


def _compared(a: str | Path, b: str | Path, seed: int) -> dict[str, Any]:
    results = [_result(Path(folder)) for folder in (a, b)]
    _check_same_problems(Path(a), Path(b))
    first, second = (result["per_problem"] for result in results)
    ids = sorted(first)
    k = max(set(results[0]["maj@k"]) & set(results[1]["maj@k"]), key=int)
    accuracy = [[side[i]["pass@1"] for i in ids] for side in (first, second)]
    majority = [[side[i]["maj@k"][k] for i in ids] for side in (first, second)]
    unlike = [(i, a, b) for i, a, b in zip(ids, *accuracy, strict=True) if a != b]
    unlike.sort(key=lambda row: -abs(row[2] - row[1]))
    return {
        "a": str(a),
        "b": str(b),
        "problems": len(ids),
        "resamples": RESAMPLES,
        "seed": seed,
        "settings_that_differ": _differing(*results),
        "measures": {
            "pass@1": _measure(accuracy, seed),
            f"maj@{k}": _measure(majority, seed),
        },
        "most_different": [{"problem": i, "a": a, "b": b} for i, a, b in unlike[:MOST_DIFFERENT]],
    }


def _measure(sides: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    """{"a", "b": means, "difference", "ci95": [low, high], "p"}."""
    a, b = sides
    found = difference(a, b, seed)
    return {"a": fmean(a), "b": fmean(b), "difference": found.value, "ci95": found.ci95, "p": found.p}


def _result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.exists():
        raise UserError(f"{path} is missing: give the folder of a finished `m1 eval`, or run it again to finish it")
    result = read_json(path)
    if "per_problem" not in result or not (folder / "problems.jsonl").exists():
        raise UserError(f"{folder} has no results per problem: it isn't from this version's `m1 eval`; run it again")
    if "shard" in result:
        raise UserError(f"{folder} is shard {result['shard']} of an evaluation: join all with `m1 eval merge` first")
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
