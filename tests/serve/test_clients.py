"""Clients of others against the server: the lm-evaluation-harness, and curl."""

import json
import shutil
import subprocess

import lm_eval
import pytest
from serving import KEY

QUESTIONS = [("2+3=", ["5", "17"], 0), ("10-7=", ["3 ", "30"], 0), ("4*2=", ["6", "8\n"], 1)]


def task(tmp_path, **own):
    """A task of three questions from a file."""
    file = tmp_path / "questions.jsonl"
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    file.write_text("\n".join(rows))
    metric = {"metric": own.pop("metric"), "aggregation": "mean", "higher_is_better": True}
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return files | {"doc_to_text": "question", "metric_list": [metric]} | own


def evaluate(model, model_args, tmp_path):
    tasks = [
        task(tmp_path, task="choice", output_type="multiple_choice", doc_to_choice="choices", doc_to_target="answer",
             metric="acc"),
        task(tmp_path, task="written", output_type="generate_until", doc_to_target="{{choices[0]}}",
             generation_kwargs={"max_gen_toks": 6, "until": ["\n"], "do_sample": False}, metric="exact_match"),
    ]  # fmt: skip
    samples = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=tasks, batch_size=2, bootstrap_iters=0, log_samples=True, device="cpu"
    )["samples"]
    return [sample["filtered_resps"] for name in ("choice", "written") for sample in samples[name]]


@pytest.mark.long
def test_lm_eval_gets_what_the_model_gives(server, hybrid_dir, tmp_path, monkeypatch):
    """Log-likelihoods, whether they are of the likeliest tokens, and greedy texts are those of transformers."""
    pytest.importorskip("tenacity", reason="lm_eval[api]")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    remote = {"base_url": f"{server.url}/v1/completions", "model": "small", "tokenizer": str(hybrid_dir)}
    remote |= {"tokenizer_backend": "huggingface", "max_length": 512, "num_concurrent": 2}
    got = evaluate("local-completions", remote, tmp_path)
    expected = evaluate("hf", {"pretrained": str(hybrid_dir), "dtype": "float32"}, tmp_path)
    assert got[3:] == expected[3:]
    for of_question, known in zip(got[:3], expected[:3], strict=True):
        for (score, greedy), (its_score, its_greedy) in zip(of_question, known, strict=True):
            assert score == pytest.approx(its_score, abs=1e-3) and greedy == its_greedy


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server):
    def curl(*options):
        return subprocess.run(
            ["curl", "--silent", "--show-error", "--no-buffer", "--header", f"Authorization: Bearer {KEY}", *options],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip

    body = {"model": "small", "messages": [{"role": "user", "content": "7+5"}], "max_tokens": 8, "seed": 1}
    url = f"{server.url}/v1/chat/completions"
    text = json.loads(curl(url, "--json", json.dumps(body)))["choices"][0]["message"]["content"]
    events = curl(url, "--json", json.dumps(body | {"stream": True})).strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert json.loads(curl(f"{server.url}/v1/models"))["data"][0]["id"] == "small"
