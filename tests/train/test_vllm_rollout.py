"""GRPO with rollouts from vLLM, by TRL's code.

The first tests need no vLLM: in its place there is a small one with the parts that TRL uses, which samples with this
project's engine. The last ones run real stages in vLLM for CPUs, which `make peers` installs.
"""

import json
import math
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from commands import check, m1
from safetensors.torch import load_file
from test_grpo import REWARD, RL, TWO_UPDATES, rows, weights
from test_stages import CHAIN
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl.generation import vllm_client, vllm_generation

from m1.engine import Engine, SamplingParams
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.model.convert import convert
from m1.peers.vllm_client import PYTHON, plugin_path
from m1.recipe import GRPOStage
from m1.train import trainer as trainer_module
from m1.train.grpo import arguments_of
from m1.train.grpo_trainer import Trainer
from m1.train.vllm_rollout import seeded

PEERS = Path(__file__).parents[2] / PYTHON


class SmallVLLM:
    """vLLM's `LLM`, as far as TRL uses it. Its weights are the checkpoint's until it is given others."""

    made: list["SmallVLLM"] = []  # noqa: RUF012

    def __init__(self, model, dtype="auto", seed=0, **options):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.options, self.loaded, self.resets = options, [], 0
        torch.manual_seed(seed)  # as vLLM does
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self)))
        self.llm_engine = SimpleNamespace(model_executor=executor)
        self.made.append(self)

    def load_weights(self, weights):
        for name, weight in weights:
            self.model.get_parameter(name).data.copy_(weight)
            self.loaded.append(name)

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        assert sampling_params.ignore_eos and sampling_params.n == 1 and sampling_params.logprobs == 0
        tokens = [prompt["prompt_token_ids"] for prompt in prompts]
        params = SamplingParams(
            max_tokens=sampling_params.max_tokens,
            temperature=sampling_params.temperature,
            seed=int(torch.randint(2**62, ())),  # drawn from the process's generator, as vLLM's samples are
        )
        engine = Engine(self.model, sampling_params.stop_token_ids, 8, max_model_len=self.options["max_model_len"])
        return [request_output(*pair) for pair in zip(tokens, engine.generate(tokens, params), strict=True)]


def request_output(prompt, sequence):
    """vLLM's answer."""
    pairs = zip(sequence.token_ids, sequence.logprobs, strict=True)
    logprobs = [{token: SimpleNamespace(rank=1, logprob=value)} for token, value in pairs]
    output = SimpleNamespace(token_ids=tuple(sequence.token_ids), logprobs=logprobs)
    return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


class SmallServer:
    """TRL's client of a vLLM server, without the server. It keeps what it is asked."""

    mode = "processed_logprobs"
    made: list["SmallServer"] = []  # noqa: RUF012

    def __init__(self, base_url, group_port, connection_timeout):
        self.base_url, self.asked = base_url, []
        self.made.append(self)

    def init_communicator(self, device):
        self.llm = None

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": self.mode}}

    def update_named_params(self, metadata, named_params):
        named = list(named_params)
        assert metadata == [(name, str(weight.dtype)[6:], list(weight.shape)) for name, weight in named]
        self.llm.load_weights(named)

    def reset_prefix_cache(self):
        self.llm.reset_prefix_cache()

    def generate(self, prompts, features, n, generation_kwargs, structured_outputs_regex, repetition_penalty, **params):
        self.asked.append((len(prompts), n))
        params = SimpleNamespace(**params | generation_kwargs, n=1)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts for _ in range(n)], params, False)
        logprobs, tokens = vllm_generation.extract_logprobs(outputs)
        completions = [list(output.outputs[0].token_ids) for output in outputs]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": logprobs, "logprob_token_ids": tokens}


@pytest.fixture
def small_vllm(monkeypatch):
    """Makes TRL and M1 find a vLLM. Returns the list of those that are made."""
    monkeypatch.setattr(SmallVLLM, "made", [])
    monkeypatch.setattr(SmallServer, "made", [])
    for module in (vllm_generation, vllm_client):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr("m1.train.grpo.is_vllm_available", lambda: True)
    monkeypatch.setattr("m1.train.vllm_rollout.use_weights_as_they_are", lambda: None)
    monkeypatch.setattr(vllm_generation, "LLM", None, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    module = ModuleType("vllm")
    module.LLM = SmallVLLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    return SmallVLLM.made


@pytest.fixture
def server(small_vllm, monkeypatch, hybrid_dir):
    def init(self, device, plain=SmallServer.init_communicator):
        self.llm = SmallVLLM(hybrid_dir, "float32", max_model_len=512)

    monkeypatch.setattr(SmallServer, "init_communicator", init)
    monkeypatch.setattr(vllm_generation, "VLLMClient", SmallServer)
    return SmallServer.made


@pytest.fixture
def stage(hybrid_dir, tmp_path):
    """Makes a grpo stage whose rollouts are vLLM's."""
    path = tmp_path / "own_rewards.py"
    path.write_text(REWARD)

    def make(trainer=None, out="out", reward="length", **options):
        options = {"data": CHAIN, "rewards": {f"{path}:{reward}": 1.0}, "rollout": "vllm"} | options
        return GRPOStage(model=str(hybrid_dir), out=str(tmp_path / out), trainer=RL | (trainer or {}), **options)

    return make


@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-9), (True, 0.005)])
def test_vllm_has_the_weights_of_each_step_in_the_trainers_precision(stage, small_vllm, bf16, bound):
    before = dict(os.environ)
    made = stage({"bf16": bf16, "learning_rate": 1e-2}, max_num_seqs=3)
    made.run()
    assert len(rows(made)) == 4 and all(0 <= row["sampling/k3"] < bound for row in rows(made))
    (llm,) = small_vllm
    assert llm.model.dtype == (torch.bfloat16 if bf16 else torch.float32)
    names = [name for name, _ in llm.model.named_parameters()]
    assert llm.loaded == names * 4 and llm.resets == 4
    assert llm.options["max_num_seqs"] == 3 and llm.options["logprobs_mode"] == "processed_logprobs"
    assert llm.options["gpu_memory_utilization"] == 0.3  # TRL's default
    assert {name for name in os.environ if os.environ[name] != before.get(name)} <= {"TENSORBOARD_LOGGING_DIR"}
    samples = list(read_jsonl(Path(made.out) / "samples.jsonl"))
    assert len(samples) == 32 and {row["step"] for row in samples} == {1, 2, 3, 4}
    texts = [row["completion"] for row in samples]
    assert len(set(texts)) > 28  # seeds don't repeat; a random model may end a sample at once


@pytest.mark.parametrize("zero_variance", ["keep", "resample"])
def test_a_resume_is_exact(stage, small_vllm, monkeypatch, zero_variance):
    options = TWO_UPDATES | {"max_steps": 5, "save_steps": 3, "learning_rate": 1e-2}
    whole, cut = (stage(options, out, zero_variance=zero_variance) for out in ("whole", "cut"))
    whole.run()
    assert all(row.get("sampling/k3", 0.0) < 1e-9 for row in rows(whole))

    def stop(self, args, state, control, plain=trainer_module._InterruptCallback.on_step_end, **kwargs):
        if state.global_step == 4:
            raise ZeroDivisionError
        return plain(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer_module._InterruptCallback, "on_step_end", stop)
        cut.run()
    cut.run(resume=True)
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())
    samples = [list(read_jsonl(Path(made.out) / "samples.jsonl")) for made in (whole, cut)]
    assert samples[0] == samples[1]


def test_a_server_gets_the_weights_of_each_step(stage, server):
    """One request per generation, with each problem once."""
    made = stage({"learning_rate": 1e-2, "vllm_mode": "server", "vllm_server_port": 8123})
    made.run()
    assert len(rows(made)) == 4 and all(0 <= row["sampling/k3"] < 1e-9 for row in rows(made))
    (client,) = server
    assert client.base_url == "http://0.0.0.0:8123" and client.asked == [(2, 4)] * 4
    assert client.llm.resets == 4


def test_a_server_whose_numbers_are_others_is_refused(stage, server, monkeypatch):
    monkeypatch.setattr(SmallServer, "mode", "raw_logprobs")
    with pytest.raises(UserError, match="start it with --logprobs-mode processed_logprobs"):
        stage({"vllm_mode": "server"}).run()


def test_a_server_that_fails_ends_the_training(stage, server, monkeypatch):
    def fail(self):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(SmallServer, "reset_prefix_cache", fail)
    with pytest.raises(UserError, match=r"vLLM's server at http://there:1 failed: .*reset by peer"):
        stage({"vllm_mode": "server", "vllm_server_base_url": "http://there:1"}).run()


def test_a_server_that_doesnt_answer_is_refused(stage, small_vllm, tmp_path, capfd):
    """TRL's own client, which waits for vllm_server_timeout seconds."""
    recipe = tmp_path / "grpo.toml"
    made = stage()
    recipe.write_text(f"""
stage = "grpo"
model = "{made.model}"
out = "{made.out}"
rollout = "vllm"
[data]
task = "chain"
count = 4
[trainer]
vllm_mode = "server"
vllm_server_timeout = 0.0
max_completion_length = 8
vllm_server_base_url = "http://127.0.0.1:9"
bf16 = false
""")
    check(
        (m1("grpo", recipe), capfd.readouterr().err), "vLLM's server at http://127.0.0.1:9 failed", "can't be reached"
    )


def test_without_vllm_it_is_refused_at_once(stage, monkeypatch):
    monkeypatch.setattr("m1.train.grpo.is_vllm_available", lambda: False)
    with pytest.raises(UserError, match=r"vLLM isn't installed: `pip install m1-reasoning\[vllm\]`"):
        arguments_of(stage())


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"vllm_mode": "elsewhere"}, "vllm_mode must be either 'server' or 'colocate', got 'elsewhere'"),
        ({"use_vllm": True}, "use_vllm = True would change nothing"),
        ({"top_p": 0.9}, "top_p = 0.9: vLLM's log-probabilities are those after the cut"),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.1}, "min_p = 0.1: vLLM's"),
        ({"generation_kwargs": {"seed": 1}}, "M1 tells vLLM how to sample"),
    ],
)
def test_bad_arguments_are_refused(stage, small_vllm, trainer, words):
    with pytest.raises(UserError, match=words):
        stage(trainer).run()


def test_processes_that_share_a_vllm_cant_resample(stage, small_vllm, monkeypatch):
    """Each would ask for another number of samples, or none, and the others would wait for it."""
    shared = ({"vllm_mode": "server"}, {"vllm_tensor_parallel_size": 2})
    for options in shared:
        arguments_of(stage(options, zero_variance="resample"))  # one process
    monkeypatch.setattr(GRPOConfig, "world_size", property(lambda self: 2))
    arguments_of(stage({}, zero_variance="resample"))
    for options in shared:
        with pytest.raises(UserError, match="none may share a vLLM"):
            arguments_of(stage(options, zero_variance="resample"))


def test_a_logprob_that_isnt_finite_ends_the_training(stage, small_vllm, monkeypatch):
    def spoilt(self, *arguments, plain=SmallVLLM.generate, **options):
        results = plain(self, *arguments, **options)
        next(iter(results[-1].outputs[0].logprobs[-1].values())).logprob = math.nan
        return results

    monkeypatch.setattr(SmallVLLM, "generate", spoilt)
    with pytest.raises(UserError, match="step 1: a sampled token's log-probability isn't finite"):
        stage().run()


def test_ranks_of_one_vllm_draw_alike_and_others_differ(stage, small_vllm, monkeypatch):
    """Ranks 0 and 1 share one, ranks 2 and 3 another."""
    trainers, drawn = [], []
    plain = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *a, **k: (trainers.append(self), plain(self, *a, **k))[1])
    stage({"max_steps": 1}).run()
    rollouts = trainers[0].rollouts
    rollouts.tensor_parallel_size = 2
    monkeypatch.setattr(
        rollouts, "generate", lambda tokens, *_: drawn.append(torch.rand(()).item()) or [[], [], [], []]
    )
    for rank in range(4):
        rollouts.accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
        rollouts.sample([], 4, 0, 7, [])
        prompts = [[{"role": "user", "content": "1"}]] * 8
        monkeypatch.setattr("m1.train.vllm_rollout.encode_chat", lambda *_: [1])
        rollouts.sample(prompts, 4, 8 * rank, 7, [])
    of_ranks = drawn[1::2]
    assert of_ranks[0] == of_ranks[1] != of_ranks[2] == of_ranks[3]


def test_the_processs_own_generators_are_left_alone():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    for make in (random.seed, numpy.random.seed, torch.manual_seed):
        make(3)
    own = draw(), draw()
    for make in (random.seed, numpy.random.seed, torch.manual_seed):
        make(3)
    first = draw()
    inside = []
    for seed in (5, 5 + 2**32, 6):
        with seeded(seed, torch.device("cpu")):
            inside.append(draw())
    assert (first, draw()) == own
    assert inside[0] == inside[1] != inside[2]


# In vLLM

needs_vllm = pytest.mark.skipif(not PEERS.exists(), reason="vLLM isn't there: `make peers` installs it")


def run_vllm(jobs, folder, processes=1):
    """Runs grpo stages under the Python of `make peers`, which finds what it lacks here, such as TRL."""
    path, work = folder / "path", folder / "jobs.json"
    path.mkdir()
    found = plugin_path(path)
    (path / "sitecustomize.py").write_text(f"import sys\nsys.path.append({sysconfig.get_path('purelib')!r})\n")
    work.write_text(json.dumps(jobs))
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [PEERS, *launcher, Path(__file__).with_name("vllm_stages.py"), work]
    done = subprocess.run(command, env=os.environ | settings | found, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def drifts(job):
    return [row["sampling/k3"] for row in read_jsonl(Path(job["out"], "metrics.jsonl")) if "loss" in row]


@pytest.fixture
def job(stage):
    """Makes a job of vllm_stages.py: three steps of 1e-2. Stale weights would drift by some 1e-2."""

    def make(name, model, trainer=None, **keys):
        made = stage({"learning_rate": 1e-2, "max_steps": 3, "save_steps": 1} | (trainer or {}), name)
        data = {"task": "chain", "count": 64, "min_steps": 1, "max_steps": 2}
        names = {"model": str(model), "out": made.out, "rewards": made.rewards, "rollout": "vllm", "data": data}
        return names | {"trainer": made.trainer} | keys

    return make


@pytest.mark.long
@needs_vllm
def test_real_stages_in_vllm(job, hybrid_dir, teacher_dir, tmp_path):
    """Hybrids of both kinds and a Llama, in one process; and one that is killed and resumes."""
    convert(teacher_dir, tmp_path / "hybrid", [1, 3], mixer="mamba2")
    resampled = {"zero_variance": "resample"}
    jobs = [
        job("mamba", hybrid_dir),
        job("mamba2", tmp_path / "hybrid"),
        job("llama", teacher_dir),
        job("bf16", hybrid_dir, {"bf16": True, "learning_rate": 1e-3}),
        job("whole", hybrid_dir, **resampled),
        job("cut", hybrid_dir, **resampled, kill=2),
        job("cut", hybrid_dir, **resampled),
    ]
    run_vllm(jobs, tmp_path)
    for done in jobs:
        found, bound = drifts(done), 0.005 if done["trainer"]["bf16"] else 1e-9
        assert len(found) == 3 and max(found) < bound, (done["out"], found)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


@pytest.mark.long
@needs_vllm
@pytest.mark.parametrize("ranks", [1, 2], ids=["a vLLM each", "one vLLM for both"])
def test_real_processes_in_vllm(job, hybrid_dir, tmp_path, ranks):
    """Two, with sharded weights."""
    done = job("out", hybrid_dir, {"vllm_tensor_parallel_size": ranks}, shard=True, global_batch=8)
    del done["trainer"]["steps_per_generation"]
    run_vllm([done], tmp_path, processes=2)
    assert len(drifts(done)) == 3 and max(drifts(done)) < 1e-9, drifts(done)
    texts = [row["completion"] for row in read_jsonl(Path(done["out"], "samples.jsonl"))]
    assert len(texts) == 24 and len(set(texts)) > 20  # a random model may end a sample at once
