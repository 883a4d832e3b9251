"""`m1 eval merge`: joins the results of all shards of an evaluation, in any order, into that of the whole."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.evaluation.evaluate import ROW, write_result
from m1.evaluation.shards import read_shard
from m1.grading import Grader
from m1.jsonl import read_json, read_jsonl, to_jsonl, write_text
from m1.outputs import MANIFEST, refuse_sources
from m1.runs import Run
from m1.tasks.problem import Problem, problems_hash

SAME = ("settings", "prompt_template_sha256", "problems_sha256", "sampler", "model")  # in all shards' results


def merge(folders: Sequence[str | Path], out: str | Path, force: bool = False) -> dict[str, Any]:
    """Joins the results of all shards. It is the result of the whole evaluation, but for the measured seconds.

    Args:
        folders: the shards' result folders, in any order.
        out: the result folder.
        force: move `out` aside if it holds something else.

    Returns:
        The content of OUT/result.json.

    Raises:
        UserError: a folder that isn't a finished shard, shards of different evaluations, one that is missing or there
            twice, or samples that are.
    """
    results = {Path(folder): _result(Path(folder)) for folder in folders}
    if len(results) != len(folders):
        raise UserError("a folder is given twice")
    refuse_sources(Path(out), list(results))
    (first_folder, first), *others = results.items()
    for folder, result in others:
        for key in SAME:
            if result.get(key) != first.get(key):
                raise UserError(f"{folder} isn't a shard of the same evaluation as {first_folder}: another {key}")
    _check_complete({folder: result["shard"] for folder, result in results.items()})
    problems = [
        Problem(row["id"], row["text"], tuple(row["answers"])) for row in read_jsonl(first_folder / "problems.jsonl")
    ]
    if problems_hash(problems) != first["problems_sha256"]:
        raise UserError(f"{first_folder / 'problems.jsonl'} was changed: its problems aren't those of the result")
    rows = _all_samples(list(results), problems, first["settings"]["n"])
    about = {key: value for key, value in first.items() if key != "shard"} | {"shards": len(results)}
    depends = {"merged": [about[key] for key in SAME]}
    with Run("eval", out, depends, force=force) as run, Grader() as grader:
        write_text(run.folder / "samples.jsonl", to_jsonl(rows))
        return write_result(run, about, problems, rows, {problem.id: problem.answers for problem in problems}, grader)


def _result(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file() or not (folder / "result.json").is_file():
        raise UserError(f"{folder} is no finished result of `m1 eval`: run its shard again to complete it")
    result: dict[str, Any] = read_json(folder / "result.json")
    if "shard" not in result:
        raise UserError(f"{folder} isn't one shard but a whole evaluation, or merged already")
    return result


def _check_complete(shards: dict[Path, str]) -> None:
    """Refuses anything but one folder for each of 1/n to n/n."""
    found = [read_shard(shard) for shard in shards.values()]
    count = found[0].count
    if other := next((folder for folder, shard in shards.items() if read_shard(shard).count != count), None):
        raise UserError(f"{other} is shard {shards[other]}, but others are one of {count}")
    times = Counter(shard.index for shard in found)
    for index in range(1, count + 1):
        if times[index] != 1:
            raise UserError(f"shard {index}/{count} is {'missing' if not times[index] else 'there twice'}")


def _all_samples(folders: list[Path], problems: list[Problem], n: int) -> list[dict[str, Any]]:
    """The rows of all shards, by problem and round. Raises UserError unless each is there once."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for folder in folders:
        for number, row in enumerate(read_jsonl(folder / "samples.jsonl"), start=1):
            where = f"{folder / 'samples.jsonl'}, line {number}"
            if missing := [key for key in ROW if key not in row]:
                raise UserError(f"{where}: has no {missing[0]!r}")
            if (row["problem"], row["round"]) in rows:
                raise UserError(f"{where}: sample {row['round']} of {row['problem']} is there twice")
            rows[row["problem"], row["round"]] = row
    wanted = [(problem.id, round_) for problem in problems for round_ in range(n)]
    for name, round_ in wanted:
        if (name, round_) not in rows:
            raise UserError(f"sample {round_} of {name} is missing in all shards")
    if unknown := set(rows) - set(wanted):
        raise UserError(f"sample {min(unknown)} is of no problem of this evaluation")
    return [rows[key] for key in wanted]
