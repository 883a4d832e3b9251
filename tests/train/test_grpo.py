"""RL that can't go wrong in silence: drift and its correction, exact resume, seeds, groups, rewards, logs."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_stages import CHAIN, TRAINER, metrics

from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.recipe import Data, GRPOStage
from m1.train import trainer as trainer_module
from m1.train.grpo_trainer import Trainer
from m1.train.rollout import MAX_DRIFT, check_drift, drift_of, seed_of

RL = TRAINER | {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "steps_per_generation": 1,
}
TWO_UPDATES = {"steps_per_generation": 2, "per_device_train_batch_size": 4}
REWARD = """
def length(completions, **_):
    return [float(len(c[-1]["content"])) for c in completions]

def halves(completions, **_):
    return [float(i // 2 % 2) for i in range(len(completions))]

def same(completions, **_):
    return [1.0] * len(completions)

def broken(completions, **_):
    return [float("nan")] * len(completions)

def short(completions, **_):
    return [0.0]

def first_problems(prompts, **_):
    return [i % 2 if prompt[-1]["content"] < "5" else 0.0 for i, prompt in enumerate(prompts)]
"""


@pytest.fixture
def stage(hybrid_dir, tmp_path):
    """Makes a grpo stage with rewards of REWARD."""
    path = tmp_path / "own_rewards.py"
    path.write_text(REWARD)

    def make(trainer=None, out="out", reward="length", **options):
        rewards = {f"{path}:{reward}": 1.0} if isinstance(reward, str) else reward
        options = {"data": CHAIN, "rewards": rewards} | options
        return GRPOStage(model=str(hybrid_dir), out=str(tmp_path / out), trainer=RL | (trainer or {}), **options)

    return make


def rows(made):
    return [row for row in metrics(Path(made.out)) if "loss" in row]


def weights(made):
    return load_file(f"{made.out}/model.safetensors")


# The engine against the trainer


def test_drift_by_hand():
    """The mean of r - 1 - ln r over the tokens that count."""
    trainer, engine = torch.tensor([[0.0, -1.0, 9.0]]), torch.tensor([[0.0, -1.5, 0.0]])
    drift = drift_of(trainer, engine, torch.tensor([[1, 1, 0]]))
    assert drift.mean == pytest.approx((math.exp(0.5) - 1 - 0.5) / 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, MAX_DRIFT * 1.001])
def test_the_gate_refuses(value):
    check_drift(MAX_DRIFT, 3)
    with pytest.raises(UserError, match="step 3: the engine's probabilities differ"):
        check_drift(value, 3)


@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-9), (True, 0.005)])
def test_every_step_has_the_number(stage, bf16, bound):
    """The engine has the weights of each step, in the trainer's precision, and is made once."""
    made = stage({"bf16": bf16, "learning_rate": 1e-2})
    made.run()
    assert len(rows(made)) == 4
    for row in rows(made):
        assert 0 <= row["sampling/k3"] < bound
        assert row["sampling/sampling_logp_difference/max"] >= row["sampling/sampling_logp_difference/mean"]


def test_the_engine_is_kept_and_has_the_trainers_precision(stage, monkeypatch):
    from m1.engine import Engine

    made = []

    def init(self, model, *arguments, plain=Engine.__init__, **options):
        made.append((model.dtype, {b.dtype for b in model.buffers()}))
        plain(self, model, *arguments, **options)

    monkeypatch.setattr(Engine, "__init__", init)
    stage({"bf16": True}).run()
    assert made == [(torch.bfloat16, {torch.float32})]


def skewed(monkeypatch, shift, after=0):
    """Engine log-probabilities that are off by `shift`, from some step on."""
    monkeypatch.setattr(
        Trainer, "_sample", lambda self, *a, plain=Trainer._sample: shifted(plain(self, *a), self, shift, after)
    )


def shifted(sequences, trainer, shift, after):
    if trainer.state.global_step >= after:
        for sequence in sequences:
            sequence.logprobs = [logprob + shift for logprob in sequence.logprobs]
    return sequences


@pytest.mark.parametrize(("after", "step"), [(0, 1), (1, 4)])
def test_a_skewed_engine_trips_the_gate(stage, monkeypatch, after, step):
    """At the start, and every gate_steps steps after it."""
    skewed(monkeypatch, 0.3, after)
    with pytest.raises(UserError, match=f"step {step}: the engine's probabilities differ"):
        stage({"max_steps": 9}, gate_steps=3).run()


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_drift_is_corrected_for(stage, monkeypatch, mode):
    """Each token's loss is multiplied by the trainer's probability over the engine's, at most C, or else masked."""
    skewed(monkeypatch, -0.1)
    monkeypatch.setattr("m1.train.grpo_trainer.check_drift", lambda *_: None)
    ratios = []

    def loss(self, model, inputs, plain=Trainer._compute_loss):
        ratios.append((inputs["importance_sampling_ratio"], inputs["completion_mask"]))
        return plain(self, model, inputs)

    monkeypatch.setattr(Trainer, "_compute_loss", loss)
    options = {"vllm_importance_sampling_mode": mode, "max_steps": 1, "max_completion_length": 4}
    expected = 0.1 if mode.startswith("token") else 0.1 * 4
    for name, cap in (("inside", 3.0), ("beyond", 1.05)):
        stage(options | {"vllm_importance_sampling_clip_max": cap}, out=name).run()
        ratio, mask = ratios.pop()
        whole = mask.sum(1) == 4
        value = math.exp(expected) if name == "inside" else cap if mode.endswith("truncate") else 0.0
        torch.testing.assert_close(ratio[whole], torch.full_like(ratio[whole], value), rtol=1e-4, atol=1e-5)


def test_the_correction_can_be_switched_off(stage, monkeypatch):
    skewed(monkeypatch, -0.1)
    monkeypatch.setattr("m1.train.grpo_trainer.check_drift", lambda *_: None)
    plain = stage({"max_steps": 1, "vllm_importance_sampling_correction": False}, out="off")
    plain.run()
    corrected = stage({"max_steps": 1}, out="on")
    corrected.run()
    losses = [rows(made)[0]["policy_loss"] for made in (plain, corrected)]
    assert losses[1] == pytest.approx(losses[0] * math.exp(0.1), rel=1e-3)


# Resuming


@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resume_is_exact_at_any_step(stage, monkeypatch, how, step):
    """Two updates per generation: after odd steps half of one is left. It was drawn again, with newer weights."""
    options = TWO_UPDATES | {"max_steps": 5, "save_steps": step, "learning_rate": 1e-2, "use_adaptive_entropy": True}
    whole, cut = stage(options, "whole"), stage(options, "cut")
    whole.run()

    def stop(self, args, state, control, plain=trainer_module._InterruptCallback.on_step_end, **kwargs):
        if state.global_step == step + (how == "killed"):
            if how == "killed":
                raise ZeroDivisionError
            self.requested = True
        return plain(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else ZeroDivisionError):
        patch.setattr(trainer_module._InterruptCallback, "on_step_end", stop)
        cut.run()
    cut.run(resume=True)
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())
    same = ("step", "loss", "entropy_coef", "reward", "sampling/k3")
    assert [[row.get(key) for key in same] for row in rows(cut)] == [
        [row.get(key) for key in same] for row in rows(whole)
    ]
    samples = [list(read_jsonl(Path(made.out) / "samples.jsonl")) for made in (whole, cut)]
    assert samples[0] == samples[1] and {row["step"] for row in samples[0]} == {1, 3, 5}


# Seeds


def test_seeds_never_repeat():
    """Seed 1 at step t was seed 0 at step t + 1, and generations of one step shared theirs."""
    seeds = [seed_of(*numbers) for numbers in itertools.product(range(3), range(-3, 9), range(4), range(3))]
    assert len(set(seeds)) == len(seeds) == 3 * 12 * 4 * 3


def test_a_prompt_gets_other_samples_each_time(stage, tmp_path):
    """One problem, in two generations per step: no completion is drawn twice."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n' * 8)
    made = stage({"gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.0}, data=Data(path=str(path)))
    made.run()
    texts = [row["completion"] for row in read_jsonl(Path(made.out) / "samples.jsonl")]
    assert len(texts) == 32 and len(set(texts)) == 32
