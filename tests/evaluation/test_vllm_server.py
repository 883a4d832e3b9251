"""`m1 eval`, `m1 solve` and `m1 budget` through a real server, vLLM's with a hybrid, where `make peers` has run."""

import os
import socket
import string
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher
from fake_vllm import alive
from typer.testing import CliRunner

from m1.cli import app
from m1.evaluation import vllm_server
from m1.jsonl import read_json, read_jsonl
from m1.model.convert import convert
from m1.model.tokenizer import byte_tokenizer
from m1.peers import vllm_client
from m1.peers.vllm_client import PYTHON, plugin_path
from m1.peers.worker import _tree

PEERS = Path(__file__).parents[2] / PYTHON
STARTS_WITHIN = 300  # seconds
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}

pytestmark = pytest.mark.skipif(not PEERS.exists(), reason="`make peers` has not run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its likeliest tokens are letters: a server withholds bytes that are no text yet."""
    model, tokenizer = tiny_teacher(), byte_tokenizer()
    letters = set(tokenizer(string.ascii_letters).input_ids)
    others = [token for token in range(model.config.vocab_size) if token not in letters]
    with torch.no_grad():
        model.get_output_embeddings().weight[others] = 0.0
    teacher, folder = (tmp_path_factory.mktemp(name) for name in ("teacher", "served"))
    save_checkpoint(model, teacher)
    convert(teacher, folder, [1, 3])
    return folder


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PEERS), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    log, plugin = tmp_path_factory.mktemp("log") / "vllm.log", plugin_path(tmp_path_factory.mktemp("plugin"))
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **SETTINGS, **plugin})
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not ready(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def ready(address):
    try:
        return httpx2.get(address).status_code == 200
    except httpx2.HTTPError:
        return False


def evaluate(out, *arguments):
    command = ["eval", "--task", "chain", "--limit", "3", "--max-new-tokens", "8", "--out", str(out), *arguments]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    return {(row["problem"], row["round"]): row for row in read_jsonl(out / "samples.jsonl")}


def test_greedy_samples_are_those_of_this_engine(url, folder, tmp_path):
    greedy = ("--n", "1", "--temperature", "0")
    served = evaluate(tmp_path / "served", "--endpoint", url, "--model", "tiny", *greedy)
    own = evaluate(tmp_path / "own", "--model", str(folder), *greedy)
    assert len(served) == 3 and served.keys() == own.keys() and all(row["text"] for row in served.values())
    for key, row in served.items():
        assert row["text"] == own[key]["text"] and row["finish_reason"] == own[key]["finish_reason"]
        assert row["logprob"] == pytest.approx(own[key]["logprob"], abs=1e-3)


def test_many_samples(url, tmp_path):
    """Several in a request."""
    several = ("--n", "20", "--samples-per-request", "5")
    rows = evaluate(tmp_path / "out", "--endpoint", url, "--model", "tiny", *several, "--temperature", "1")
    assert len(rows) == 60 and len({row["text"] for row in rows.values()}) > 30
    assert all(1 <= row["tokens"] <= 8 and row["logprob"] < 0 for row in rows.values())
    result = read_json(tmp_path / "out/result.json")
    assert result["sampler"] == "endpoint" and result["tokens"] == sum(row["tokens"] for row in rows.values())


def test_a_vote(url, tmp_path):
    options = ["--model", "tiny", "--endpoint", url, "--n", "6", "--max-new-tokens", "8", "--rule", "none"]
    run = CliRunner().invoke(app, ["solve", "2+2", *options, "--json", str(tmp_path / "vote.json")])
    assert run.exit_code == 0, run.output
    vote = read_json(tmp_path / "vote.json")
    assert (vote["finished"], vote["aborted"], vote["reason"]) == (6, 0, "all") and 6 <= vote["tokens"] <= 48


def test_a_budget(folder, tmp_path, monkeypatch):
    """Its server is started and ended by the command."""
    started, wait = [], vllm_server.wait_until_ready

    def waited(server, *arguments):
        wait(server, *arguments)
        started.extend(_tree(server.pid))

    monkeypatch.setattr(vllm_client, "PYTHON", PEERS)
    monkeypatch.setattr(vllm_server, "wait_until_ready", waited)
    options = ["--model", f"own={folder}", "--vllm", "own", "--limit", "2", "--seeds", "1", "--seconds", "4"]
    options += ["--max-new-tokens", "8", "--max-num-seqs", "4", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, ["budget", *options])
    assert run.exit_code == 0, run.output
    rows = [row for row in read_jsonl(tmp_path / "out/runs.jsonl") if row["model"] == "own, vLLM"]
    assert len(rows) == 2 and all(4 <= row["seconds"] < 8 for row in rows)
    samples = [(row, *sample) for row in rows for sample in row["samples"]]
    assert samples and all(0 < ended <= row["seconds"] and 1 <= tokens <= 8 for row, ended, _, tokens in samples)
    assert list(read_json(tmp_path / "out/budget.json")["models"]) == ["own", "own, vLLM"]
    assert len(started) >= 4 and alive(started) == []
