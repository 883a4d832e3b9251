r"""How far the grader can be trusted, on answers others have labelled: writes results/grading.json.

    python benchmarks/grading.py --data FOLDER

FOLDER holds graded_outputs.jsonl, reasoning_samples.jsonl, grading_cases.jsonl, math500.jsonl, olympiadbench.jsonl,
olympiadbench_meta.jsonl, and example_model_solutions.jsonl from github.com/openai/grade-school-math (commit 3101c7d,
grade_school_math/data). About a minute on two cores.

- Rules were written while looking at the first three: they are "tuned". The solutions of OpenAI's GSM8K models are
  "unseen": no rule was written or changed for them. Their last line, "A: 18", is written as the data set's "#### 18".
- Labelled answers: agreement per category, precision and recall of "correct", and every disagreement with the reason
  from benchmarks/grading_notes.json; a disagreement without one is an error. The audit grader is measured beside it.
  Gold and prediction of grading_cases are whole texts or bare answers: both are read by `extract_answer`, and a text
  without an answer in it is taken as the answer.
- MATH-500's golds against themselves, and against each other shuffled: pairs called equal, which a person judged.
- OlympiadBench's golds of several parts: in another order they must be equal; with a part missing or wrong, different.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from m1.grading import Grader, extract_answer
from m1.grading.audit import audit, same, split
from m1.jsonl import read_json, read_jsonl, write_json

ROOT = Path(__file__).parents[1]
SHUFFLES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the labelled files")
    data = parser.parse_args().data
    notes = read_json(ROOT / "benchmarks/grading_notes.json")
    result: dict[str, Any] = {}
    with Grader(workers=2) as grader:
        for kind, files in (("tuned", tuned(data)), ("unseen", {"gsm8k_solutions": gsm8k_solutions(data)})):
            measured = {
                name: compare(rows, grader_verdicts(grader, rows), notes["disagreements"])
                for name, rows in files.items()
            }
            result[kind] = {key: sum(m[key] for m in measured.values()) for key in ("rows", "agreed")}
            result[kind]["files"] = measured
        result["math500"] = math500(data, grader, notes["pairs"])
        result["olympiadbench_lists"] = olympiadbench_lists(data, grader)
        result["counts"] = dict(grader.counts)
    write_json(ROOT / "results/grading.json", result)
    for kind in ("tuned", "unseen"):
        print(kind, {key: result[kind][key] for key in ("rows", "agreed")})
        for name, measured in result[kind]["files"].items():
            print(" ", name, {key: measured[key] for key in ("rows", "agreed", "precision", "recall", "audit_agreed")})


def tuned(data: Path) -> dict[str, list[dict[str, Any]]]:
    """File -> rows {"id", "category", "golds", "answer", "label"}."""
    files = {}
    for name in ("graded_outputs", "reasoning_samples"):
        files[name] = [
            {"id": row["id"], "category": row["id"].split("/")[0], "golds": [row["answer"]]}
            | {"answer": extract_answer(row["response"]), "label": row["correct"]}
            for row in read_jsonl(data / f"{name}.jsonl")
        ]
    files["grading_cases"] = [
        {"id": row["id"], "category": row["id"].split("/")[1]}
        | {"golds": [extract_answer(row["gold"]) or row["gold"]]}
        | {"answer": extract_answer(row["pred"]) or row["pred"], "label": row["expected"]}
        for row in read_jsonl(data / "grading_cases.jsonl")
    ]
    return files


def gsm8k_solutions(data: Path) -> list[dict[str, Any]]:
    """The same rows of four models' solutions of each test problem."""
    rows = []
    for number, row in enumerate(read_jsonl(data / "example_model_solutions.jsonl")):
        gold = row["ground_truth"].rpartition("A: ")[2].replace(",", "")
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            text = row[model]["solution"].replace("\nA: ", "\n#### ")
            rows.append(
                {"id": f"{model}/{number}", "category": model, "golds": [gold], "answer": extract_answer(text)}
                | {"label": row[model]["is_correct"]}
            )
    return rows


def grader_verdicts(grader: Grader, rows: list[dict[str, Any]]) -> list[bool]:
    return [row["answer"] is not None and grader.grade(row["answer"], row["golds"]) for row in rows]


def compare(rows: list[dict[str, Any]], verdicts: list[bool], notes: dict[str, str]) -> dict[str, Any]:
    categories: dict[str, dict[str, int]] = defaultdict(lambda: {"rows": 0, "agreed": 0})
    for row, verdict in zip(rows, verdicts, strict=True):
        categories[row["category"]]["rows"] += 1
        categories[row["category"]]["agreed"] += verdict == row["label"]
    pairs = [(verdict, row["label"]) for row, verdict in zip(rows, verdicts, strict=True)]
    right = pairs.count((True, True))
    against_labels = audit({**row, "correct": row["label"]} for row in rows)
    against_grader = audit({**row, "correct": verdict} for row, verdict in zip(rows, verdicts, strict=True))
    return {
        "rows": len(rows),
        "agreed": sum(verdict == label for verdict, label in pairs),
        "precision": right / sum(verdict for verdict, _ in pairs),
        "recall": right / sum(label for _, label in pairs),
        "categories": dict(categories),
        "disagreements": [
            {"id": row["id"], "gold": row["golds"][0], "answer": row["answer"]}
            | {"label": row["label"], "verdict": verdict, "why": notes[row["id"]]}
            for row, verdict in zip(rows, verdicts, strict=True)
            if verdict != row["label"]
        ],
        "audit_agreed": against_labels.agreed,
        "audit_called_wrong_answers_correct": sum(not row["label"] for row in against_labels.disagreements),
        "audit_differs_from_grader": [row["id"] for row in against_grader.disagreements],
    }


def math500(data: Path, grader: Grader, notes: dict[str, str]) -> dict[str, Any]:
    golds = [row["answer"] for row in read_jsonl(data / "math500.jsonl")]
    itself = grader.grade_texts([rf"so \boxed{{{gold}}}" for gold in golds], [[gold] for gold in golds])
    identical, different, called_equal = 0, 0, {}
    for seed in range(SHUFFLES):
        shuffled = random.Random(seed).sample(golds, len(golds))
        for gold, other in zip(golds, shuffled, strict=True):
            if gold == other:
                identical += 1
            elif grader.equal(gold, other):
                key = " | ".join(sorted((gold, other)))
                called_equal[key] = notes[key]
            else:
                different += 1
    return {
        "golds": len(golds),
        "equal_to_itself": sum(itself),
        "audit_equal_to_itself": sum(same(gold, gold) for gold in golds),
        "shuffles": SHUFFLES,
        "identical_pairs": identical,
        "pairs_called_different": different,
        "pairs_called_equal": called_equal,
    }


def olympiadbench_lists(data: Path, grader: Grader) -> dict[str, Any]:
    """Golds whose parts are all needed. Those with prose in them or a part twice are left out."""
    multiple = {row["id"] for row in read_jsonl(data / "olympiadbench_meta.jsonl") if row["is_multiple_answer"]}
    counts = {"lists": 0, "reordered_equal": 0, "part_missing_equal": 0, "part_wrong_equal": 0}
    for row in read_jsonl(data / "olympiadbench.jsonl"):
        parts = [part.strip() for part in split(row["answer"])]
        if row["id"] not in multiple or len(set(parts)) < max(2, len(parts)) or "where" in row["answer"]:
            continue
        counts["lists"] += 1
        for what, changed in (
            ("reordered", parts[::-1]),
            ("part_missing", parts[:-1]),
            ("part_wrong", [*parts[:-1], "17"]),
        ):
            counts[f"{what}_equal"] += grader.equal(row["answer"], ", ".join(changed))
    return counts


if __name__ == "__main__":
    main()
