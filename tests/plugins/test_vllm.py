"""M1 models in vLLM: greedy tokens and log-probabilities are those of transformers and of this project's engine.

`make peers` installs vLLM for CPUs. All engines but the last are started in one process (vllm_run.py).
"""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import LLAMA3_ROPE, save_checkpoint, scramble, tiny_teacher
from commands import m1
from peft import LoraConfig, PeftModel, get_peft_model

from m1.engine import Engine, SamplingParams
from m1.evaluation.vllm_parity import compare
from m1.model import M1ForCausalLM
from m1.model.convert import convert
from m1.peers.vllm_client import PYTHON, plugin_path

PEERS = Path(__file__).parents[2] / PYTHON

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PEERS.exists(), reason="vLLM isn't there: `make peers` installs it"),
]
NEW, TOLERANCE = 64, 1e-3
FAMILIES, MIXERS = ("llama", "qwen2", "qwen3"), ("mamba", "mamba2")
LORA = {"enable_lora": True, "max_lora_rank": 8}
# Prompts are longer than a step's tokens: they are prefilled in chunks, beside samples that decode.
CACHED = {"enable_prefix_caching": True, "max_num_batched_tokens": 160}  # chunks end with blocks, of 128 tokens
UNCACHED = {"enable_prefix_caching": False, "max_num_batched_tokens": 90}
SPECULATIVE = {
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
}
SETTINGS = {"llama": CACHED | LORA, "qwen2": UNCACHED, "qwen3": CACHED}
# Of 7, 4 and 4 layers. Two or three, one, and three Mamba layers share a page.
KEPT = {"llama": [3, 6], "qwen2": [1, 3], "qwen3": [2]}


def prompts():
    """20 of 1 to 300 tokens; the last six begin alike."""
    numbers = random.Random(0)

    def tokens(count):
        return [numbers.randrange(256) for _ in range(count)]

    shared = tokens(300)
    lengths = (1, 2, 3, 4, 5, 17, 40, 63, 64, 65, 128, 129, 200, 300)
    return [*map(tokens, lengths), *(shared[:n] + tokens(3) for n in (130, 200, 256, 257, 290, 297))]


def make_model(folder, family, mixer):
    """A checkpoint of a hybrid, all of whose weights matter, and an adapter of all its linear layers."""
    options = {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 7} if family == "llama" else {}
    teacher = save_checkpoint(tiny_teacher(family, **options), folder / f"teacher-{family}-{mixer}")
    out = folder / f"{family}-{mixer}"
    convert(teacher, out, KEPT[family], mixer=mixer, head_alignment="official" if mixer == "mamba2" else "attention")
    model = scramble(M1ForCausalLM.from_pretrained(out))
    model.save_pretrained(out)
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    adapter.save_pretrained(folder / f"{family}-{mixer}-adapter")
    return out


def run_vllm(jobs, folder, cores="0-1"):
    """What vllm_run.py answers, in an environment without M1 but its plugin."""
    plugin, work, answers = folder / "plugin", folder / "jobs.json", folder / "answers.json"
    plugin.mkdir()
    work.write_text(json.dumps(jobs))
    settings = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {} if "|" in cores else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [PEERS, Path(__file__).with_name("vllm_run.py"), work, answers]
    done = subprocess.run(command, env=os.environ | settings | plugin_path(plugin), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answers.read_text())


def job(out, settings, renewed=None):
    adapter = f"{out}-adapter" if "enable_lora" in settings else None
    limits = {"max_num_seqs": 5, "max_model_len": 512}
    settings = settings | limits
    return {"model": str(out), "prompts": prompts(), "settings": settings, "adapter": adapter, "renewed": renewed}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {(family, mixer): make_model(folder, family, mixer) for family in FAMILIES for mixer in MIXERS}


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    jobs = [job(out, SETTINGS[family]) for (family, _), out in models.items()]
    jobs.append(job(models["llama", "mamba"], SPECULATIVE))
    *answered, refused = run_vllm(jobs, tmp_path_factory.mktemp("vllm"))
    return dict(zip(models, answered, strict=True)) | {"speculative": refused}


def agree(model, samples):
    compared = list(compare(model.eval(), prompts(), samples))
    assert all(sample.equal == NEW and sample.difference <= TOLERANCE for sample in compared), compared


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_are_those_of_transformers_and_of_the_engine(models, answers, family, mixer):
    """Also after requests were aborted, in another order."""
    answer, model = answers[family, mixer], M1ForCausalLM.from_pretrained(models[family, mixer])
    agree(model, answer["all"])
    agree(model, answer["again"])
    own = Engine(model, [], 8, max_model_len=512).generate(prompts(), SamplingParams(max_tokens=NEW, temperature=0))
    assert [list(sample.token_ids) for sample in own] == [sample["token_ids"] for sample in answer["all"]]


def test_prompts_that_begin_alike_are_found_in_the_cache(answers):
    for family in FAMILIES:
        found = [sum(sample["cached"] for sample in answers[family, mixer]["again"]) for mixer in MIXERS]
        assert all(found) if SETTINGS[family]["enable_prefix_caching"] else not any(found)


def test_layers_are_scheduled_in_two_groups(answers):
    """Each group costs time for every sequence at every step."""
    found = {(family, mixer): answers[family, mixer]["groups"] for family in FAMILIES for mixer in MIXERS}
    assert found == dict.fromkeys(found, 2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_adapters_are_applied(models, answers, mixer):
    out, answer = models["llama", mixer], answers["llama", mixer]
    agree(PeftModel.from_pretrained(M1ForCausalLM.from_pretrained(out), f"{out}-adapter"), answer["adapted"])
    assert all(a["token_ids"] != b["token_ids"] for a, b in zip(answer["all"], answer["adapted"], strict=True))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_running_engine_takes_other_weights(models, tmp_path, mixer):
    """Some at a time, as a server has them from a trainer. The first ones were refused."""
    out, other = models["qwen3", mixer], tmp_path / "other"
    model = M1ForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(other)
    (answer,) = run_vllm([job(out, CACHED, str(other))], tmp_path)
    agree(model, answer["renewed"])
    assert all(a["token_ids"] != b["token_ids"] for a, b in zip(answer["all"], answer["renewed"], strict=True))


def test_speculative_decoding_is_refused(answers):
    assert "no speculative decoding in vLLM" in answers["speculative"]["refused"]


def test_two_ranks_compute_the_same(models, answers, tmp_path):
    """Tensor parallelism, with biases. Two threads, one each."""
    out = models["qwen2", "mamba"]
    (answer,) = run_vllm([job(out, UNCACHED | {"tensor_parallel_size": 2})], tmp_path, cores="0|1")
    agree(M1ForCausalLM.from_pretrained(out), answer["all"])


def test_check_vllm_says_whether_they_agree(models, capfd):
    out = models["qwen3", "mamba"]
    assert m1("check-vllm", out, "--prompts", 3, "--new-tokens", 8) == 0
    shown = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert shown["agree"] and shown["tokens"] == shown["equal"] == 24 and shown["largest_difference"] < TOLERANCE
