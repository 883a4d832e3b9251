"""`m1 eval` on a data set of the Hub, by the real client: a stand-in serves the Hub's protocol."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import Hub

from m1.jsonl import read_jsonl

CARD = """---
configs:
- config_name: main
  data_files:
  - split: test
    path: main/test.jsonl
  - split: train
    path: main/train.jsonl
---
"""
ROWS = [{"question": "1+1", "answer": "one and one\n#### 2"}, {"question": "600*2", "answer": "#### 1,200"}]
FILES = {
    "README.md": CARD.encode(),
    "main/test.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "main/train.jsonl": json.dumps({"question": "0", "answer": "#### 0"}).encode(),
}


@pytest.fixture
def evaluate(hybrid_dir, tmp_path):
    """Runs the command in a process of its own, as where the Hub is and its cache are read at import."""

    def run(data):
        command = [sys.executable, "-c", "from m1.cli import main; main()", "eval", "--model", str(hybrid_dir)]
        command += [
            "--task",
            "gsm8k",
            "--data",
            data,
            "--n",
            "1",
            "--max-new-tokens",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
        with Hub("org/name", FILES) as hub:
            env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
            return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    return run


@pytest.mark.long
def test_a_configuration_and_split(evaluate, tmp_path):
    done = evaluate("org/name/main:test")
    assert done.returncode == 0, done.stderr
    problems = list(read_jsonl(tmp_path / "out/problems.jsonl"))
    assert [(p["text"], p["answers"]) for p in problems] == [("1+1", ["2"]), ("600*2", ["1200"])]


@pytest.mark.long
def test_what_is_not_there_is_one_line(evaluate):
    done = evaluate("org/name/main:validation")
    lines = [line for line in done.stderr.splitlines() if line.startswith("m1: ")]
    assert done.returncode == 2 and len(lines) == 1 and "can't load the data set org/name" in lines[0]
    assert "Traceback" not in done.stderr
