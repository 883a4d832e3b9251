"""benchmarks/layers.py on a tiny teacher: every choice of layers, aligned once, and a run that resumes."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DATA = """
[data]
path = ["$M1_DATA/gsm8k_train.jsonl", "{out}/answers.jsonl"]
skip = 2
"""
TRAINER = """
[trainer]
max_steps = 10
packing = true
max_length = 64
per_device_train_batch_size = 2
learning_rate = 1e-3
"""
RECIPE = {
    "pipeline": 'name = "tiny"\nout = "{out}"\nstages = ["answers", "convert", "align", "distill", "eval"]',
    "answers": 'stage = "generate"\nmodel = "{teacher}"\nprompts = "p.jsonl"\nout = "{out}/answers.jsonl"',
    "convert": 'stage = "convert"\nteacher = "{teacher}"\nout = "{out}/converted"\nattention_ratio = 0.5',
    "align": 'stage = "align"\nmodel = "{out}/converted"\nteacher = "{teacher}"\nout = "{out}/aligned"'
    + DATA
    + TRAINER,
    "distill": 'stage = "distill"\nmodel = "{out}/aligned"\nteacher = "{teacher}"\nout = "{out}/distilled"\n'
    "forward_kl_steps = 5" + DATA + TRAINER,
    "eval": 'stage = "eval"\nout = "{out}/eval"\ntask = "gsm8k"\ndata = "p.jsonl"\n[models]\na = "{out}/distilled"',
}


@pytest.fixture
def benchmark(tmp_path, teacher_dir, monkeypatch):
    """Runs the benchmark with Mamba-2 alone. Returns its result and what it printed."""
    for name, text in RECIPE.items():
        (tmp_path / f"{name}.toml").write_text(text.format(out=tmp_path / "runs", teacher=teacher_dir))
    rows = [{"problem": f"{i}+{i}", "solution": f"{2 * i}, so {2 * i}", "answer": str(2 * i)} for i in range(24)]
    for name in ("gsm8k", "math"):
        (tmp_path / f"{name}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("M1_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    main = runpy.run_path(str(ROOT / "benchmarks/layers.py"))["main"]
    monkeypatch.setitem(main.__globals__, "MIXERS", ("mamba2",))

    def measure(*options):
        main(["--recipe", str(tmp_path), "--out", str(tmp_path / "out.json"), "--seeds", "1", *options])
        return json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None

    yield measure
    sys.modules.pop("smollm2", None)


def test_every_choice_is_measured_once(benchmark, tmp_path, capsys):
    assert benchmark("--steps", "2", "--minutes", "0") is None
    assert "4 variants left" in capsys.readouterr().out
    result = benchmark("--steps", "2")
    rows, rankings = result["variants"], result["rankings"]["mamba2 0"]
    assert list(rows) == [f"{choice} mamba2 0" for choice in ("even", "cost", "greedy", "gates")]
    assert rows["even mamba2 0"]["layers"] == [1, 3]
    for choice in ("cost", "greedy", "gates"):
        assert rows[f"{choice} mamba2 0"]["layers"] == sorted(rankings[choice]["ranking"][:2])
    for row in rows.values():
        assert set(row["texts"]) == {"gsm8k solutions", "math solutions"}
        assert all(numbers["kl"] > 0 and numbers["perplexity"] > 1 for numbers in row["texts"].values())
    trained = json.loads((tmp_path / "runs-layers/mamba2-0/greedy/distilled-2/manifest.json").read_text())["settings"]
    assert trained["forward_kl_steps"] == 1 and trained["trainer"]["max_steps"] == 2
    assert trained["data"]["path"] == [str(tmp_path / "gsm8k_train.jsonl")]  # the other, a stage would make
    printed = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in printed if "perplexity" in text] == list(rows)
    assert benchmark("--steps", "2") == result and "KL" not in capsys.readouterr().out
