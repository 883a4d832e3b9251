"""`m1 runs`: what a folder's runs are and how far they got."""

import json
import os

from commands import m1

from m1.history import list_runs
from m1.runs import Run

SETTINGS = {"trainer": {"max_steps": 40}}


def test_runs_are_listed_with_their_state(tmp_path, capsys):
    for number, name in enumerate(("finished", "interrupted", "running")):
        run = Run("sft", tmp_path / "deep" / name, SETTINGS)
        run.__enter__()
        for step in (10, 20):
            run.append("metrics.jsonl", {"step": step, "loss": 1 / step})
        run.append("metrics.jsonl", {"step": 20, "eval_loss": 9.0})
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30, "lo')  # is being written
        if name == "finished":
            run.finish()
        if name != "running":
            run.__exit__()
        for path in run.folder.iterdir():
            os.utime(path, (number, number))
    (tmp_path / "settings.json").write_text('{"editor.tabSize": 4}')
    (tmp_path / "deep" / "finished" / "checkpoints").mkdir()
    (tmp_path / "deep" / "finished" / "checkpoints" / "settings.json").write_text(json.dumps({"command": "sft"}))
    found = list_runs(tmp_path)
    assert [run.path.name for run in found] == [run.state for run in found] == ["running", "interrupted", "finished"]
    assert {(run.stage, run.step, run.max_steps, run.loss) for run in found} == {("sft", 20, 40, 0.05)}
    assert m1("runs", tmp_path) == 0
    table = capsys.readouterr().out
    assert "20 of 40" in table and "interrupted" in table and "0.05" in table


def test_a_file_with_a_run_beside_it_and_an_empty_folder(tmp_path, capsys):
    with Run("generate", tmp_path / "a.jsonl", {}, is_file=True) as run:
        run.append("a.jsonl", {"id": 1})
        run.finish()
    (found,) = list_runs(tmp_path)
    assert found.path == tmp_path / "a.jsonl" and found.step is None
    (tmp_path / "empty").mkdir()
    assert m1("runs", tmp_path / "empty") == 0 and "no runs in" in capsys.readouterr().out
    assert m1("runs", tmp_path / "missing") == 2 and "isn't a folder" in capsys.readouterr().err
