"""Every file of examples/, run as its docstring says, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from m1.train.rewards import imported

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN_BELOW = [
    "convert",
    "generate",
    "solve",
    "custom_verifier",
    "custom_task",
    "custom_reward",
    "evaluate",
    "serve_client",
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run_here_and_short():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(RUN_BELOW)
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES.glob("*.py"))


def test_convert(run, teacher_dir, tmp_path):
    assert "4 layers; [3] stay attention" in run("convert", teacher_dir, "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_generate(run, hybrid_dir):
    printed = run("generate", hybrid_dir, "2+2?")
    assert printed.count("[length] ") + printed.count("[stop] ") == 4


def test_solve(run, hybrid_dir):
    assert "stopped: " in run("solve", hybrid_dir, "2+2?")


def test_custom_verifier(run, hybrid_dir):
    assert "weights {" in run("custom_verifier", hybrid_dir, "2+2?")
    score = runpy.run_path(str(EXAMPLES / "custom_verifier.py"))["StepsAreRight"]().score
    assert score("6 * 7 = 42, 42 + 5 = 48") == 0.5 and score("2 - 5 = -3") == 1 and score("") == 0.5


def test_custom_task(run, hybrid_dir, tmp_path):
    assert "pass@1 0.00" in run("custom_task", hybrid_dir, "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["n_problems"] == 10


def test_custom_reward(run):
    high, low = json.loads(run("custom_reward"))
    assert high > 0.9 and low == pytest.approx(0.25)
    brief = imported(f"{EXAMPLES / 'custom_reward.py'}:brief")
    assert brief(completions=[[{"role": "assistant", "content": "42"}]], answers=[["42"]]) == [0.995]


def test_evaluate(run, hybrid_dir, tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "#### 4"}) + "\n")
    assert "tokens/s" in run("evaluate", hybrid_dir, "out", "gsm8k.jsonl")
    assert "pass@1" in run("evaluate", hybrid_dir, "again", "gsm8k.jsonl", "out")


def test_serve_client(run, hybrid_dir, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "serve")
    from serving import Running

    from m1.engine import LLM

    server = Running(LLM.from_pretrained(hybrid_dir, max_num_seqs=8, max_model_len=512), [])
    try:
        assert "by vote: " in run("serve_client", f"{server.url}/v1", "small")
    finally:
        server.close()
