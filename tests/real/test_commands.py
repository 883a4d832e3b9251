"""Every command that samples, on real weights in every dtype and with every mixer."""

import json
import math

import pytest
from commands import m1

from m1.jsonl import read_json, read_jsonl

DTYPES = ("float32", "bfloat16", "float16")
# The rest are equal in kind: `make test-long` runs them.
SHORT = {("teacher", "float16"), ("mamba", "float32")}


@pytest.fixture(
    params=[
        pytest.param((mixer, dtype), marks=() if (mixer, dtype) in SHORT else pytest.mark.long, id=f"{mixer}-{dtype}")
        for mixer in ("teacher", "mamba", "mamba2")
        for dtype in DTYPES
    ]
)
def model(request, saved_in, tmp_path):
    """The folder of the chat model, or of its conversion with a third of the layers kept."""
    mixer, dtype = request.param
    if mixer == "teacher":
        return saved_in(dtype)
    out = tmp_path / "hybrid"
    assert m1("convert", "--teacher", saved_in(dtype), "--out", out, "--mixer", mixer, "--attention-ratio", 0.34) == 0
    assert read_json(out / "config.json")["dtype"] == dtype
    return out


def test_generate_solve_and_eval(model, tmp_path, capsys):
    rows = [{"problem": "What is 2+2?"}, {"prompt": "The capital of France is"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ("--max-new-tokens", 8, "--seed", 1)
    prompts, samples = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    assert m1("generate", "--model", model, "--prompts", prompts, "--out", samples, "--n", 2, *sampling) == 0
    made = list(read_jsonl(samples))
    assert len(made) == 4 and all(row["finish_reason"] in ("length", "stop") for row in made)
    assert all(-200 < row["logprob"] < 0 and 0 < row["tokens"] <= 8 for row in made)
    solved = tmp_path / "solved.json"
    assert m1("solve", "What is 2+2?", "--model", model, "--n", 2, "--json", solved, *sampling) == 0
    assert len(read_json(solved)["samples"]) == 2
    out = tmp_path / "eval"
    task = ("--task", "chain", "--limit", 2, "--n", 1, "--out", out)
    assert m1("eval", "--model", model, *task, *sampling) == 0
    graded = list(read_jsonl(out / "samples.jsonl"))
    assert len(graded) == 2 and all(math.isfinite(row["logprob"]) for row in graded)
