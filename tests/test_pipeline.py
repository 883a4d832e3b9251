"""The shipped pocket recipe, every stage through the command line, made small; the README's commands on its output."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
from commands import m1

RECIPE = Path(__file__).parents[1] / "recipes" / "pocket"
SMALLER = {
    r"^(min|max)_steps = \d+$": r"\1_steps = 2",  # the trainers', and the problems'
    r"^count = \d+": "count = 64",
    r"^limit = \d+": "limit = 4",
    r"^n = \d+": "n = 2",
    r"^forward_kl_steps = \d+": "forward_kl_steps = 1",
    r"^warmup_steps = \d+": "warmup_steps = 1",
    r"^per_device_train_batch_size = \d+": "per_device_train_batch_size = 8",
    r"^hidden_size = \d+": "hidden_size = 64",
    r"^seconds = .*": "seconds = 0.2",
    r"^max_(new_tokens|completion_length) = \d+": r"max_\1 = 8",
}
MODELS = ["teacher", "converted", "distilled", "sft", "grpo"]


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """The folder the pipeline ran in."""
    folder = tmp_path_factory.mktemp("pocket")
    (folder / "recipe").mkdir()
    for path in RECIPE.glob("*.toml"):
        text = path.read_text().replace("runs/pocket", str(folder / "runs"))
        for pattern, replacement in SMALLER.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        (folder / "recipe" / path.name).write_text(text)
    assert m1("pipeline", folder / "recipe") == 0
    return folder


def test_report(pocket):
    report = json.loads((pocket / "runs" / "report.json").read_text())
    assert list(report["models"]) == MODELS and report["seconds"] > 0
    for model in report["models"].values():
        assert 0 <= model["pass@1"] <= 1 and 0 <= model["maj@2"] <= 1 and model["n_problems"] == 4
        assert model["tokens_per_second"] > 0 and model["parameters"] > 0
    budget = json.loads((pocket / "runs" / "budget" / "budget.json").read_text())
    assert list(budget["models"]) == ["transformer", "hybrid", "reinforced"] and budget["settings"]["seconds"] == 0.2
    assert report["machine"]["cpu"] and budget["machine"] == report["machine"]
    caches = {name: model["cache_bytes_per_sequence_at_4k"] for name, model in report["models"].items()}
    assert caches["grpo"] < 0.3 * caches["teacher"]
    page = (pocket / "runs" / "report.html").read_text()
    assert "Accuracy against seconds per problem" in page
    assert page.count("data:image/png;base64,") == 3 and "://" not in page and "{{" not in page


def test_running_again_does_nothing_again(pocket, capsys):
    before = {path: path.stat().st_mtime_ns for path in (pocket / "runs").glob("*/model.safetensors")}
    assert len(before) == 5
    assert m1("pipeline", pocket / "recipe") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_changed_recipe_is_not_mixed_with_old_output(pocket, capsys):
    path = pocket / "recipe" / "sft.toml"
    text = path.read_text()
    try:
        path.write_text(text.replace("learning_rate = 5e-4", "learning_rate = 6e-4"))
        assert m1("pipeline", pocket / "recipe") == 2
        assert "was made with other settings" in capsys.readouterr().err
    finally:
        path.write_text(text)


def test_an_interrupted_evaluation_counts_all_its_seconds(pocket, monkeypatch):
    from m1 import runs
    from m1.evaluation import evaluate as module
    from m1.recipe import load_stage

    stage = load_stage(pocket / "recipe" / "eval.toml")
    stage = dataclasses.replace(stage, out=str(pocket / "runs" / "eval-again"))
    clock = itertools.count(0, 50)
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))

    def interrupted(sampler, problems, settings, out, on_progress):
        (out.parent / "something").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "evaluate", interrupted)
        stage.run()
    spent = json.loads((pocket / "runs" / "eval-again" / "seconds.json").read_text())["seconds"]
    assert spent == 50
    stage.run()
    manifest = json.loads((pocket / "runs" / "eval-again" / "manifest.json").read_text())
    assert manifest["seconds"] > spent + 50


def test_solve_prints_votes_and_answer(pocket, capsys):
    model = pocket / "runs" / "grpo"
    assert m1("solve", "7+5*3-4 mod 10", "--model", model, "--n", 4, "--max-new-tokens", 8) == 0
    out = capsys.readouterr().out
    assert "4 of 4 samples" in out and "answer: " in out


def test_real_problems_are_graded_and_a_cut_off_run_goes_on(pocket, tmp_path, capsys):
    problems = tmp_path / "math.jsonl"
    rows = [
        {"id": f"p{i}", "problem": rf"What is $\frac{{{i}}}{{2}}$?", "answer": rf"\frac{{{i}}}{{2}}"} for i in range(3)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    command = ("eval", "--model", pocket / "runs" / "grpo", "--task", "math500", "--data", problems)
    command += ("--n", 2, "--max-new-tokens", 6, "--out", out)
    assert m1(*command) == 0
    samples = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(samples) == 6
    result = json.loads((out / "result.json").read_text())
    assert result["n_problems"] == 3 and result["settings"]["task"] == "math500" and "grading" in result
    (out / "samples.jsonl").write_text("".join(samples[:4]) + samples[4][:20])  # killed while writing the fifth
    (out / "result.json").unlink()
    assert m1(*command) == 0
    assert (out / "samples.jsonl").read_text().splitlines(keepends=True)[:4] == samples[:4]
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sorted((row["problem"], row["round"]) for row in rows) == [(f"p{i}", r) for i in range(3) for r in range(2)]


def test_several_processes_are_refused(pocket, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert m1("pipeline", pocket / "recipe") == 2
    assert "m1 pipeline runs in one process: run its training stages with torchrun" in capsys.readouterr().err
