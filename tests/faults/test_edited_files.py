"""Files that M1 wrote and somebody changed: one line, and what can be resumed later still can."""

import json
import shutil
import time

import pytest
from commands import check

from m1.grading.audit import audit, same


@pytest.fixture(scope="module")
def measured(tmp_path_factory, teacher_dir):
    from commands import m1

    out = tmp_path_factory.mktemp("measured") / "e"
    assert m1(*words(teacher_dir, out)) == 0
    return out


def words(model, out):
    return ("eval", "--model", model, "--task", "chain", "--limit", 2, "--n", 1, "--max-new-tokens", 3, "--out", out)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", 10**30),
        ("tokens", -5),
        ("tokens", 2.5),
        ("tokens", float("nan")),
        ("tokens", "7"),
        ("tokens", True),
        ("round", 10**30),
        ("round", [1]),
        ("problem", ["x"]),
        ("problem", "unknown"),
        ("seconds", "x"),
        ("seconds", 10**400),
        ("text", 5),
        ("answer", {}),
        ("correct", 1),
        ("grading", {"graded": "x"}),
        ("finish_reason", None),
    ],
)
def test_numbers_of_samples(run, teacher_dir, measured, tmp_path, key, value):
    out = shutil.copytree(measured, tmp_path / "e")
    (out / "manifest.json").unlink()
    path = out / "samples.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(first) | {key: value}) + "\n" + "".join(rest))
    check(run(*words(teacher_dir, out)), "samples.jsonl")
    path.write_text("".join(rest))
    assert run(*words(teacher_dir, out))[0] == 0


def test_a_table_that_cannot_be_written_costs_a_warning(run, teacher_dir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OverflowError("too large")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    code, err = run(*words(teacher_dir, tmp_path / "e"))
    assert code == 0 and "samples.parquet isn't written: too large" in err
    assert (tmp_path / "e" / "result.json").exists() and not list((tmp_path / "e").glob(".*part"))


def test_a_figure_that_cannot_be_written_costs_a_warning(run, teacher_dir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    budget = ("budget", "--model", f"a={teacher_dir}", "--limit", 1, "--seconds", 0.2, "--max-new-tokens", 3)
    code, err = run(*budget, "--seeds", 1, "--out", tmp_path / "b")
    assert code == 0 and "can't write the plot" in err and (tmp_path / "b" / "budget.json").exists()


RESULTS = [
    "{}",
    '{"per_problem": {}}',
    '{"per_problem": []}',
    '{"per_problem": {"x": 1}, "maj@k": {"a": 1}}',
    "[]",
    "x",
]


@pytest.mark.parametrize("content", RESULTS)
def test_results_to_compare(run, measured, tmp_path, content):
    out = shutil.copytree(measured, tmp_path / "e")
    (out / "result.json").write_text(content)
    check(run("eval", "compare", out, measured), str(out))
    check(run("eval", "compare", measured, out), str(out))
    (out / "result.json").write_text((measured / "result.json").read_text())
    (out / "problems.jsonl").write_text('{"id": [1]}\n')
    check(run("eval", "compare", measured, out))


@pytest.mark.parametrize(
    "settings", [{"trainer": "x"}, {"trainer": {"max_steps": "x"}}, {"command": 5}, {"command": "sft"}]
)
@pytest.mark.parametrize("metrics", ['{"step": "x"}', '{"step": 1, "loss": "x"}', '{"step": 1e400}', "[" * 10**5, "5"])
def test_runs_of_anything(run, tmp_path, settings, metrics):
    (tmp_path / "settings.json").write_text(json.dumps({"command": "sft"} | settings))
    (tmp_path / "metrics.jsonl").write_text(metrics + "\n")
    assert run("runs", tmp_path)[0] == 0


@pytest.mark.parametrize("ranking", ['["a"]', "[[1], 2, 3, 0]", "[0, 1, 2, 3.5]", '{"0": 1}', "[null]"])
def test_rankings(run, teacher_dir, tmp_path, ranking):
    (tmp_path / "r.json").write_text(f'{{"ranking": {ranking}}}')
    convert = ("convert", "--teacher", teacher_dir, "--out", tmp_path / "o", "--keep-attention")
    check(run(*convert, f"@{tmp_path}/r.json:2"), "r.json")


@pytest.mark.parametrize(
    "unit", [" ", "\t", "\n", r"\quad ", "{", "(", "1,", "and ", r"\text{", "^{", "\\\\", "$", "x="]
)
def test_the_audit_takes_linear_time(unit):
    """30,000 spaces took 45 seconds."""
    answer = "a" + unit * (100_000 // len(unit)) + "b"
    started = time.perf_counter()
    assert not same("5", answer) and same(answer, answer)
    assert audit([{"answer": answer, "correct": False, "golds": ["1", "2"]}]).agreed == 1
    assert time.perf_counter() - started < 0.5
    for length in (900, 990):  # what is below the cap
        same("5", ("a" + unit * length)[:length])
    assert time.perf_counter() - started < 1.5
