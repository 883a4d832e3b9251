"""`m1 bench chat` on a tiny model, with stand-ins for llama.cpp's and vLLM's workers."""

import json
import sys

import pytest
from typer.testing import CliRunner

from m1.bench import chat, contest
from m1.bench.chat import TimedChats, rows_of
from m1.bench.options import ChatOptions
from m1.bench.roofline import Limits
from m1.cli import app
from m1.errors import UserError
from m1.peers import vllm_client
from m1.peers.worker import start_worker

WORKER = """
import json, sys
print(json.dumps({"ready": True, "versions": {"peer": "0.1"}, "settings": {"arguments": sys.argv[1:]}}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    seconds = work["batch"] * (0.5 + 0.25 * work["new_tokens"])
    print(json.dumps({"seconds": seconds, "tokens": work["batch"] * work["new_tokens"]}), flush=True)
"""


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """No row depends on the machine's limits."""
    monkeypatch.setattr(contest, "measure_limits", lambda *_: Limits(copy=1.0, gemm=1.0))


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """Replaces the peers' workers."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(chat, "LLAMA_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(vllm_client, "WORKER", tmp_path / "worker.py")


def bench(tmp_path, *arguments):
    command = ["bench", "chat", "--device", "cpu", "--vllm-python", sys.executable, "--repeats", "1"]
    run = CliRunner().invoke(app, [*command, *map(str, arguments), "--out", str(tmp_path / "chat.json")])
    assert run.exit_code == 0, run.output
    return json.loads((tmp_path / "chat.json").read_text())


def test_peers_get_the_same_chats(peers, teacher_dir, tmp_path):
    options = ["--engines", "llama.cpp,vllm", "--chats", "1,3", "--prompt", 20, "--new-tokens", 9, "--gguf", "a.gguf"]
    result = bench(tmp_path, "--model", teacher_dir, *options)
    assert [(row["name"], row["chats"]) for row in result["rows"]] == [
        ("llama.cpp", 1), ("vllm", 1), ("llama.cpp", 3), ("vllm", 3),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["first_token_seconds"] == 0.75 * row["chats"] and row["seconds"] == 2.75 * row["chats"]
        assert row["tokens_per_second"] == 4 and row["prefill_tokens_per_second"] == 20 / 0.75
        assert row["peak_memory_bytes"] > 1e6 and row["versions"] == {"peer": "0.1"}
    llama, vllm = (row["settings"]["arguments"] for row in result["rows"][:2])
    assert llama[:5] == ["a.gguf", "--max-model-len", "29", "--max-num-seqs", "3"] and "bfloat16" in vllm
    assert result["rows"][0]["times_vllm"] == result["rows"][1]["times_llama_cpp"] == 1


@pytest.mark.long
def test_own_engines_run_in_processes_of_their_own(hybrid_dir, teacher_dir, tmp_path):
    engines = ["ours-hybrid", "ours-transformer-int4"]
    options = ["--engines", ",".join(engines), "--chats", 2, "--prompt", 20, "--new-tokens", 5]
    rows = bench(tmp_path, "--model", teacher_dir, "--hybrid", hybrid_dir, *options)["rows"]
    assert [row["settings"]["quantize"] for row in rows] == [None, "int4"]
    assert all(row["settings"]["max_model_len"] == 25 and row["seconds"] > 0 for row in rows)


def test_rows_are_medians():
    class Worker:
        versions, settings = {}, {}

        def peak_bytes(self):
            return 1

    options = ChatOptions(model="m", engines="ours-transformer", prompt=100, new_tokens=11, device="cpu")
    runs = {("ours-transformer", 4): [TimedChats(*times) for times in ((1, 5, 44), (2, 4, 88), (2, 9, 132))]}
    (row,) = rows_of(options, runs, {"ours-transformer": Worker()})
    assert (row["first_token_seconds"], row["seconds"], row["seconds_min"], row["seconds_max"]) == (2, 5, 4, 9)
    assert row["prefill_tokens_per_second"] == 200 and row["tokens_per_second"] == 40 / 3
    assert row["joules_per_token"] == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "--model : give a checkpoint folder or a GGUF file"),
        ({"model": "m", "engines": "ours-hybrid"}, "ours-hybrid needs --hybrid"),
        ({"model": "m", "engines": "llama.cpp"}, "llama.cpp needs --gguf"),
        ({"model": "m", "engines": "ollama"}, "no engine 'ollama'"),
        ({"model": "m", "engines": "vllm", "chats": "1,x"}, "--chats 1,x: give numbers such as 1,8,64"),
        ({"model": "m", "engines": "vllm", "new_tokens": 1}, "--new-tokens 1: must be at least 2"),
    ],
)
def test_impossible_options_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        ChatOptions(device="cpu", **values)


def test_a_worker_that_ends_is_quoted():
    command = [sys.executable, "-c", "import sys; sys.exit('no model here')"]
    said = r"llama\.cpp: the worker ended without an answer: no model here"
    with pytest.raises(UserError, match=said), start_worker("llama.cpp", command):
        pass
