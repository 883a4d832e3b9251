"""`m1 pipeline` finds the mistakes of every stage before the first one runs, and reports without a trained stage."""

import json

import pytest
from commands import check


@pytest.fixture
def recipe(teacher_dir, tmp_path):
    """`recipe(changes)` writes one that converts, evaluates and measures budgets; returns its folder."""
    out = tmp_path / "runs"
    (tmp_path / "own.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')

    def write(**changes):
        common = {"task": "chain", "limit": 1, "max_new_tokens": 3, "models": {"x": f"{out}/model"}}
        stages = {
            "convert": {"teacher": f"{teacher_dir}", "out": f"{out}/model", "keep_attention": [1]},
            "eval": {"out": f"{out}/eval", "n": 1} | common,
            "budget": {"out": f"{out}/budget", "seconds": 0.2, "seeds": 1} | common,
        }
        for name, options in stages.items():
            table = {"stage": name} | options | changes.get(name, {})
            text = (f"{key} = {toml(value)}\n" for key, value in table.items() if value is not None)
            (tmp_path / f"{name}.toml").write_text("".join(text))
        (tmp_path / "pipeline.toml").write_text(f'name = "x"\nout = "{out}"\nstages = {json.dumps([*stages])}\n')
        return tmp_path

    return write


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    return str(value) if isinstance(value, float) else json.dumps(value)


MISTAKES = [
    {"task": "nope"},
    {"task": "../x"},
    {"task": "own", "data": "missing.jsonl"},
    {"task": "math500", "data": "own.jsonl", "problem_column": "nope"},
    {"limit": 0},
    {"limit": 10**23},
    {"max_steps": 10**23},
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": 1e-40},
    {"max_num_seqs": 0},
    {"max_num_seqs": 10**12},
    {"max_new_tokens": 0},
    {"prompt_template": "@missing.txt"},
    {"prompt_template": "no place"},
    {"system_prompt": "@missing.txt"},
    {"few_shot": "missing.jsonl"},
    {"models": {"x": "missing/of/all"}},
    {"models": {"$x^$": "m"}},
    {"dtype": "float33"},
]
EVAL = [{"n": 0}, {"n": -1}, {"n": 10**23}, {"sampler": "nope"}]
BUDGET = [{"seconds": 0.0}, {"seconds": float("inf")}, {"seconds": 1e39}, {"seeds": 0}, {"vllm": ["y"]}]
OTHERS = [{"teacher": "missing/of/all"}, {"teacher": "missing.gguf"}, {"keep_attention": "@missing.json:2"}]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        *(("eval", mistake) for mistake in MISTAKES),
        *(("budget", mistake) for mistake in MISTAKES[::5]),
        *(("eval", mistake) for mistake in EVAL),
        *(("budget", mistake) for mistake in BUDGET),
        *(("convert", mistake) for mistake in OTHERS),
    ],
    ids=str,
)
def test_every_mistake_is_found_before_the_first_stage_runs(run, recipe, monkeypatch, tmp_path, stage, changes):
    monkeypatch.chdir(tmp_path)
    check(run("pipeline", recipe(**{stage: changes})), f"{stage}.toml")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["sft", "distill", "grpo"])
@pytest.mark.parametrize("key", ["data", "model"])
def test_what_training_reads(run, recipe, tmp_path, name, key):
    folder = recipe()
    paths = {"data": "missing.jsonl", "model": "missing/of/all"}
    (tmp_path / "own.jsonl").write_text('{"problem": "1+1", "answer": "2", "solution": "2"}\n')
    right = {"data": tmp_path / "own.jsonl", "model": tmp_path / "runs" / "model"}
    path = {field: paths[field] if field == key else right[field] for field in right}
    teacher = f'teacher = "{right["model"]}"\n' if name == "distill" else ""
    text = f'stage = "{name}"\nout = "{tmp_path}/runs/t"\nmodel = "{path["model"]}"\n{teacher}'
    text += f'[data]\npath = "{path["data"]}"\n'
    (folder / "train.toml").write_text(text)
    pipeline = folder / "pipeline.toml"
    pipeline.write_text(pipeline.read_text().replace('"eval"', '"train", "eval"'))
    check(run("pipeline", folder), "train.toml", "missing")
    assert not (tmp_path / "runs").exists()


def test_a_report_without_a_trained_stage(run, recipe, tmp_path):
    assert run("pipeline", recipe())[0] == 0
    assert list(json.loads((tmp_path / "runs" / "report.json").read_text())["models"]) == ["x"]


@pytest.mark.parametrize("name", ["eval/x/result.json", "eval/manifest.json", "budget/budget.json"])
def test_a_report_of_edited_results(run, recipe, tmp_path, name):
    assert run("pipeline", recipe())[0] == 0
    path = tmp_path / "runs" / name
    path.write_text('{"command": "eval"}')
    check(run("pipeline", tmp_path), str(tmp_path) if "manifest" in name else "a stage's result")
