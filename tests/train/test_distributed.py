"""Several processes train as one does: the same rows, losses and weights, sharded or not."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from transformers import TrainerControl

from m1.data_options import Data
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.model.checkpoint import load_model
from m1.model.convert import convert
from m1.recipe import SFTStage
from m1.train import trainer
from m1.train.checkpoints import damage
from m1.train.distributed import load_shards, save_shards, split_batch

REWARDS = """
def length(completions, **columns):
    return [float(len(completion[0]["content"]) % 5) for completion in completions]
"""
TRAINER = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
}
PARTS = ("one", "two")
DATA = {"task": "chain", "count": 37, "min_steps": 1, "max_steps": 2}  # the last rows fill no step


@pytest.fixture
def job(hybrid_dir, teacher_dir, tmp_path):
    """A job for ranks.py: `job(kind, name, trainer, **keys)`."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def make(kind, name, trainer=None, **keys):
        made = {"stage": kind, "out": str(tmp_path / name), "model": str(hybrid_dir), "data": DATA, "global_batch": 8}
        made |= {
            "distill": {"teacher": str(teacher_dir)},
            "grpo": {"rewards": {f"{tmp_path}/rewards.py:length": 1.0}},
        }.get(kind, {})
        return made | {"trainer": TRAINER | (trainer or {})} | keys

    return make


def run_on(processes, jobs, folder):
    """Runs jobs with torchrun."""
    path = Path(folder, "jobs.json")
    path.write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*launcher, ranks.__file__, path, str(processes)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            errors = process.communicate(timeout=300)[1]
        finally:
            process.terminate()  # torchrun then ends its processes
    assert process.returncode == 0, errors[-5000:]


def same(one, other, atol=1e-5):  # weights move by 1e-3 a step
    """Whether two jobs have the same logged numbers and weights."""
    rows = [list(read_jsonl(Path(j["out"], "metrics.jsonl"))) for j in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for key in {"loss", "grad_norm", "reverse_kl", "reward", "eval_reward"}:
        for a, b in zip(*([row for row in part if key in row] for part in rows), strict=True):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (key, a["step"])
    weights = [load_file(Path(j["out"], "model.safetensors")) for j in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=atol)
    configs = [json.loads(Path(j["out"], "config.json").read_text()) for j in (one, other)]
    assert configs[0] == configs[1]


@pytest.mark.long
def test_two_processes_equal_one(job, hybrid_dir, tmp_path):
    """Sharded and replicated, with the same global batch; and trainings that change the number of their processes."""
    model, tokenizer = load_model(hybrid_dir)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    tokenizer.save_pretrained(tmp_path / "bfloat16")
    packed = {"packing": True, "max_length": 64, "gradient_checkpointing": True, "max_steps": 2}
    rollouts = {"num_generations": 4, "max_completion_length": 8, "optim": "sgd", "learning_rate": 0.1}
    rollouts |= {"entropy_coef": 0.0}  # TRL averages the bonus over each pass, and passes are other samples' here
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    kinds = [
        ("sft", {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}, {}),
        ("sft-bfloat16", {"bf16": True, "max_steps": 2}, {"model": str(tmp_path / "bfloat16")}),
        ("distill", {}, {}),
        ("distill-packed", packed, {"global_batch": 4}),
        ("grpo", rollouts | evaluated, {"eval_rows": 4}),  # the best checkpoint is loaded at the end
        ("grpo-split", rollouts | {"num_generations": 8}, {}),  # each process has a half of every group
    ]
    pairs = [
        tuple(job(name.partition("-")[0], f"{name}-{part}", trainer, shard=part == "two", **keys) for part in PARTS)
        for name, trainer, keys in kinds
    ]
    pairs.append((pairs[2][0], job("distill", "distill-replicated")))
    moving = {"max_steps": 6, "save_steps": 100}
    moved, whole = (job("distill", name, moving, shard=True) for name in ("moved", "whole"))
    pairs.append((whole, moved))
    halved = job("grpo", "halved", rollouts | {"generation_batch_size": 16}, shard=True)  # two updates per generation
    broken = job("sft", "broken")
    jobs = [*(two for _, two in pairs[:-1]), broken | {"error": True}, halved | {"stop": 1}, moved | {"stop": 2}]
    run_on(2, jobs, tmp_path)
    ranks.run(moved | {"stop": 4})
    run_on(2, [moved], tmp_path)
    for one, two in pairs:
        if not Path(one["out"]).exists():
            ranks.run(one)
        same(one, two)
    assert not Path(broken["out"], "model.safetensors").exists()
    ranks.run(halved)  # what was left of its generation is sampled again
    assert [row["step"] for row in read_jsonl(Path(halved["out"], "metrics.jsonl")) if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.long
def test_uneven_shards(job, teacher_dir, tmp_path):
    """Three processes share Mamba-2's vectors of four heads: one has nothing of them."""
    convert(teacher_dir, tmp_path / "mamba2", [1, 3], mixer="mamba2")
    keys = {"model": str(tmp_path / "mamba2"), "global_batch": 12}
    one, three = (job("sft", name, {"max_steps": 2}, shard=name == "three", **keys) for name in ("one", "three"))
    run_on(3, [three], tmp_path)
    ranks.run(one)
    same(one, three)


@pytest.mark.long
def test_eight_processes_hammer_a_run(tmp_path):
    """Each opens, reads, appends and finishes: rank 0 alone writes, and nothing fails."""
    script = (
        "import sys; from m1.runs import Run\n"
        "for i in range(40):\n"
        "    with Run('sft', sys.argv[1], {'a': 1}, ranks=True) as run:\n"
        "        run.append('metrics.jsonl', {'step': i}); run.read('metrics.jsonl', {'step': int}); run.finish(i=i)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "run"],
            env=os.environ | {"RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(8)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [*range(40)]


def test_a_sharded_training_of_one_process_resumes_exactly(job):
    """Its checkpoints are those of many processes, and sealed like others."""
    whole, cut = (job("sft", name, {"save_steps": 100}, shard=True) for name in ("whole", "cut"))
    ranks.run(whole)
    ranks.run(cut | {"stop": 2})
    checkpoint = Path(cut["out"], "checkpoints", "checkpoint-2")
    assert damage(checkpoint) is None and not list(checkpoint.glob("*.safetensors"))
    part = next(checkpoint.glob("shards/*.distcp"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    assert str(part.relative_to(checkpoint)) in damage(checkpoint)
    part.write_bytes(content)
    ranks.run(cut)
    same(whole, cut, atol=0)


class Call:
    """A pickle that calls a function when it is read."""

    def __reduce__(self):
        return os.system, ("true",)


def test_shards_run_no_code(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    save_shards(tmp_path, model, optimizer)
    load_shards(tmp_path, model, optimizer)
    optimizer.param_groups[0]["betas"] = Call()
    save_shards(tmp_path / "setting", model, optimizer)
    with pytest.raises(UserError, match=r"setting can't be resumed from.*[Ww]eights.only"):
        load_shards(tmp_path / "setting", model, torch.optim.AdamW(model.parameters()))
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Call()))
    with pytest.raises(UserError, match=r"names (posix|os)\.system: it isn't one that M1 saved"):
        load_shards(tmp_path, model)


def test_a_batch_is_split():
    assert split_batch(8, 4, 1) == (4, 2)
    assert split_batch(8, 4, 2) == (4, 1)
    assert split_batch(8, 4, 8) == (1, 1)
    assert split_batch(64, 1, 8) == (1, 8)


@pytest.mark.parametrize(("batch", "most", "processes"), [(8, 4, 3), (4, 4, 8), (12, 4, 2)])
def test_a_batch_that_cant_be_split(batch, most, processes):
    with pytest.raises(UserError, match=f"global_batch={batch} can't be split over {processes} processes in passes of"):
        split_batch(batch, most, processes)


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "steps_per_generation"])
def test_what_follows_from_the_batch_is_refused(hybrid_dir, tmp_path, key):
    data, trainer = Data(**DATA), TRAINER | {key: 2}
    stage = SFTStage(out=str(tmp_path), data=data, model=str(hybrid_dir), trainer=trainer, global_batch=8)
    with pytest.raises(UserError, match=f"{key} follows from global_batch: remove the key"):
        stage.check()


def test_a_batch_larger_than_the_data(job):
    with pytest.raises(UserError, match="global_batch=64: the data has only 37 rows"):
        ranks.run(job("sft", "out", global_batch=64))


def test_other_sharding_is_refused(job, monkeypatch):
    with pytest.raises(UserError, match="fp16 can't be sharded: set bf16 = true instead"):
        ranks.run(job("sft", "out", {"fp16": True}, shard=True))
    with pytest.raises(UserError, match="save_only_model = true: sharded checkpoints hold the optimizer"):
        ranks.run(job("sft", "out", {"save_only_model": True}, shard=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="remove it, and set the stage's shard = true"):
        ranks.run(job("sft", "out"))


def test_a_signal_after_another_processs_is_the_first_here(monkeypatch):
    """It comes while the checkpoint is saved that the other one asked for."""
    monkeypatch.setattr(trainer, "any_process", lambda flag: True)
    interrupt, control = trainer._InterruptCallback(), TrainerControl()
    interrupt.on_step_end(None, None, control)
    assert control.should_save and control.should_training_stop and interrupt.requested
    interrupt._on_signal(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt._on_signal(signal.SIGTERM, None)
