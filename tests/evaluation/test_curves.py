"""Accuracy against seconds: the curve by hand, and real runs that go on where they were cut off."""

import json

import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher
from fake_vllm import fake_python
from typer.testing import CliRunner

from m1.cli import app
from m1.errors import UserError
from m1.evaluation import time_budget
from m1.evaluation.curves import POINTS, SHORTEST, accuracy_curves
from m1.evaluation.intervals import difference, estimate
from m1.grading import Grader
from m1.jsonl import read_jsonl
from m1.model.tokenizer import byte_tokenizer
from m1.peers import vllm_client
from m1.reasoning.solution import Solution
from m1.tasks.problem import Problem

PROBLEMS = [Problem("a", "?", ("7",)), Problem("b", "?", ("3",))]


def run(problem, seed, *samples, model="m"):
    return {"model": model, "problem": problem, "seed": seed, "seconds": 64.0, "samples": samples}


def test_curve_by_hand():
    runs = [
        run("a", 0, [2.0, "7", 4], [3.0, "5", 4], [4.0, "7", 4]),  # a tie from 3 s to 4 s
        run("a", 1, [50.0, "7", 4]),
        run("b", 0, [1.0, "3", 4]),
        run("b", 1, [1.0, None, 4], [60.0, "4", 4]),
        run("a", 0, [1.0, "7", 4], model="other"),
        run("a", 1, [1.0, "7", 4], model="other"),
        run("b", 0, [1.0, "4", 4], model="other"),
        run("b", 1, [1.0, "4", 4], model="other"),
    ]
    summary = accuracy_curves(runs, ["m", "other"], PROBLEMS, 64.0, Grader())
    result = summary["models"]["m"]
    points = {round(p["seconds"], 2): p for p in result["points"]}
    assert len(points) == POINTS and min(points) == 64 * SHORTEST and max(points) == 64
    first, last = points[1.0], points[64.0]
    assert (first["accuracy"], first["of_seeds"], first["samples"]) == (0.25, [0.5, 0.0], 0.5)
    assert (last["accuracy"], last["of_seeds"], last["samples"]) == (0.75, [1.0, 0.5], 7 / 4)
    at_3 = next(p for p in result["points"] if 3 <= p["seconds"] < 4)
    assert at_3["accuracy"] == (0.5 + 1) / 4
    assert result["tokens_per_second"] == 28 / 256 and result["tokens_per_sample"] == 4
    assert result["sample_accuracy"] == 4 / 7
    # the first ends after 2, 50, 1 and 1 seconds; four have ended in none of them
    assert result["seconds_to_samples"] == {"1": 1.5, "4": None, "16": None, "64": None}
    lead = summary["leads"]["other"]
    at = {round(p["seconds"], 2): p for p in lead["points"]}
    assert at[1.0]["value"] == 0.25 and at[64.0]["value"] == -0.25
    assert last["ci95"] == estimate([1.0, 0.5]).ci95
    found = difference([1.0, 0.5], [1.0, 0.0])
    assert (at[64.0]["ci95"], at[64.0]["p"]) == (found.ci95, found.p)
    assert lead["value"] == pytest.approx(sum(p["value"] for p in lead["points"]) / POINTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = save_checkpoint(tiny_teacher(), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save_pretrained(folder)
    return ["--model", f"one={folder}", "--model", f"two={folder}"]


def budget(*arguments):
    command = [
        "budget",
        "--seconds",
        "0.2",
        "--limit",
        "2",
        "--seeds",
        "2",
        "--max-new-tokens",
        "8",
        "--max-num-seqs",
        "3",
    ]
    return CliRunner().invoke(app, [*command, *map(str, arguments)])


def test_runs_go_on_where_they_were_cut_off(models, tmp_path):
    out = budget(*models, "--out", tmp_path)
    assert out.exit_code == 0, out.output
    rows = list(read_jsonl(tmp_path / "runs.jsonl"))
    assert [(r["model"], r["problem"], r["seed"]) for r in rows] == [
        (m, f"chain/{p}", s) for s in range(2) for p in range(2) for m in ("one", "two")
    ]
    assert all(0 < ended <= row["seconds"] for row in rows for ended, _, _ in row["samples"])
    assert (tmp_path / "budget.png").stat().st_size > 1000
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:5]) + '{"torn')
    assert budget(*models, "--out", tmp_path).exit_code == 0
    again = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    assert again[:5] == lines[:5] and len(again) == 8
    result = json.loads((tmp_path / "budget.json").read_text())
    assert set(result["models"]) == {"one", "two"} and result["problems"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "folder"], "give each as NAME=FOLDER"),
        (["--model", "a=x", "--model", "a=y"], "with different names"),
        (["--model", "a=missing"], "missing"),
    ],
)
def test_impossible_models_are_refused(arguments, message, tmp_path):
    out = budget(*arguments, "--out", tmp_path)
    assert isinstance(out.exception, UserError) and message in str(out.exception)


def test_vllm_samples_too(models, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_client, "PYTHON", fake_python(tmp_path))
    out = budget(*models, "--vllm", "one", "--top-p", 0.9, "--out", tmp_path / "out")
    assert out.exit_code == 0, out.output
    rows = [row for row in read_jsonl(tmp_path / "out/runs.jsonl") if row["model"] == "one, vLLM"]
    assert len(rows) == 4 and all(row["seconds"] >= 0.2 and row["samples"] for row in rows)
    assert {tuple(sample[1:]) for row in rows for sample in row["samples"]} == {("7", 7)}
    result = json.loads((tmp_path / "out/budget.json").read_text())
    assert list(result["models"]) == ["one", "one, vLLM", "two"]
    without = budget(*models, "--top-p", 0.9, "--out", tmp_path / "out")
    assert isinstance(without.exception, UserError) and "other settings" in str(without.exception)


def test_every_run_has_a_seed_of_its_own(models, tmp_path, monkeypatch):
    """But models share it: they are compared on the same draws."""
    asked = []

    def solve(text, params, **others):
        asked.append((text, params.seed))
        return Solution(seconds=0.2)

    monkeypatch.setattr(time_budget, "solve", solve)
    out = budget(*models, "--out", tmp_path)
    assert out.exit_code == 0, out.output
    assert len(asked) == 8 and asked[::2] == asked[1::2] and len({seed for _, seed in asked}) == 4


def test_versions_and_settings_are_in_the_result(models, tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"problem": "1+1 mod 10", "solution": "1+1=2"}')
    options = ("--system-prompt", "Be brief.", "--few-shot", tmp_path / "shots.jsonl", "--min-p", 0.1)
    done = budget(*models[:2], *options, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out/budget.json").read_text())
    assert {"m1-reasoning", "math-verify", "torch", "transformers"} <= set(result["versions"])
    assert result["settings"]["system_prompt"] == "Be brief." and result["settings"]["min_p"] == 0.1
    (tmp_path / "shots.jsonl").write_text('{"problem": "1+1 mod 10", "solution": "2"}')
    again = budget(*models[:2], *options, "--out", tmp_path / "out")
    assert isinstance(again.exception, UserError) and "other settings" in str(again.exception)


def test_chains_that_repeat_themselves(models, tmp_path):
    out = budget(*models, "--min-steps", "9", "--max-steps", "9", "--period", "3", "--out", tmp_path)
    assert out.exit_code == 0, out.output
    problems = read_jsonl(tmp_path / "problems.jsonl")
    assert all(problem["text"].endswith(" mod 10, 9 steps") for problem in problems)


def test_vllm_of_no_model(models, tmp_path):
    out = budget(*models, "--vllm", "three", "--out", tmp_path)
    assert isinstance(out.exception, UserError) and "one of the models, one, two" in str(out.exception)


def test_other_settings_are_not_mixed_in(models, tmp_path):
    assert budget(*models, "--out", tmp_path).exit_code == 0
    out = budget(*models, "--out", tmp_path, "--temperature", "0.5")
    assert isinstance(out.exception, UserError) and "temperature=0.7" in str(out.exception)
    out = budget(*models, "--out", tmp_path, "--seeds", "0")
    assert isinstance(out.exception, UserError) and "seeds=0" in str(out.exception)


@pytest.mark.long
def test_unlike_dtypes_are_refused_unless_told(tmp_path):
    """A float32 model beside a bfloat16 one is slower for that alone."""
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = save_checkpoint(tiny_teacher().to(dtype), tmp_path / str(dtype))
        models += ["--model", f"{len(models)}={folder}"]
    out = budget(*models, "--out", tmp_path / "out")
    assert isinstance(out.exception, UserError) and "0 in float32, 2 in bfloat16" in str(out.exception)
    assert not (tmp_path / "out").exists()
    for dtype in ("auto", "float32"):
        out = budget(*models, "--out", tmp_path / dtype, "--dtype", dtype, "--seeds", 1, "--limit", 1)
        assert out.exit_code == 0, out.output
        assert json.loads((tmp_path / dtype / "budget.json").read_text())["settings"]["dtype"] == dtype
    out = budget(*models[:2], "--out", tmp_path / "int8", "--quantize", "int8", "--vllm", "0")
    assert isinstance(out.exception, UserError) and "quantize int8: vLLM samples without it" in str(out.exception)
