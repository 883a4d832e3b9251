"""RL that can't go wrong in silence: drift and its correction, exact resume, seeds, groups, rewards, logs."""

import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_stages import CHAIN, TRAINER, metrics
from trl import GRPOConfig

from m1.data_options import Data
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.recipe import GRPOStage
from m1.train import trainer as trainer_module
from m1.train.grpo import arguments_of
from m1.train.grpo_trainer import Trainer
from m1.train.rollout import MAX_DRIFT, EngineRollouts, check_drift, drift_of, seed_of

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

def odd(completion_ids, **_):
    return [ids[0] % 2 for ids in completion_ids]

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


@pytest.mark.long
def test_the_correction_keeps_the_losss_direction(stage, hybrid_dir, tmp_path, monkeypatch):
    """An engine that samples at twice the temperature: corrected, a step goes where the exact one goes."""
    temperature = [1.0]

    def sample(self, *arguments, plain=EngineRollouts.sample):
        with monkeypatch.context() as patch:
            patch.setattr(self, "arguments", SimpleNamespace(**vars(self.arguments) | {"temperature": temperature[0]}))
            return plain(self, *arguments)

    monkeypatch.setattr(EngineRollouts, "sample", sample)
    path = tmp_path / "one.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n')
    options = {"optim": "sgd", "max_grad_norm": 0.0, "entropy_coef": 0.0, "max_completion_length": 1, "max_steps": 1}
    options |= {"num_generations": 1024, "per_device_train_batch_size": 1024, "scale_rewards": "none"}
    start = load_file(hybrid_dir / "model.safetensors")

    def step(**more):
        made = stage(options | more, str(more), "odd", data=Data(path=str(path)))
        made.run()
        return torch.cat([(weight - start[name]).flatten() for name, weight in weights(made).items()])

    exact, temperature[0] = step(seed=1), 2.0
    with pytest.raises(UserError, match="the engine's probabilities differ"):
        step(seed=2)
    monkeypatch.setattr("m1.train.grpo_trainer.check_drift", lambda *_: None)
    steps = [step(seed=3, vllm_importance_sampling_correction=corrected) for corrected in (True, False)]
    corrected, plain = (torch.cosine_similarity(exact, found, dim=0) for found in steps)
    assert corrected > 0.85 and corrected > plain + 0.05


def test_the_correction_can_be_switched_off(stage, monkeypatch):
    skewed(monkeypatch, -0.1)
    monkeypatch.setattr("m1.train.grpo_trainer.check_drift", lambda *_: None)
    options = {"max_steps": 1, "seed": 2}  # completions of different lengths: else the advantages cancel
    plain = stage(options | {"vllm_importance_sampling_correction": False}, out="off")
    plain.run()
    corrected = stage(options, out="on")
    corrected.run()
    losses = [rows(made)[0]["policy_loss"] for made in (plain, corrected)]
    assert losses[1] == pytest.approx(losses[0] * math.exp(0.1), rel=1e-3)


# Resuming


@pytest.mark.parametrize("how", ["killed", pytest.param("Ctrl-C", marks=pytest.mark.long)])
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
    seeds = [seed_of(*numbers) for numbers in itertools.product(range(3), range(-3, 9), range(3))]
    assert len(set(seeds)) == len(seeds) == 3 * 12 * 3


def test_a_prompt_gets_other_samples_each_time(stage, tmp_path):
    """One problem, in two generations per step: no completion is drawn twice."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n' * 8)
    made = stage({"gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.0}, data=Data(path=str(path)))
    made.run()
    texts = [row["completion"] for row in read_jsonl(Path(made.out) / "samples.jsonl")]
    assert len(texts) == 32 and len(set(texts)) == 32


# Truncated completions


def test_truncated_completions_are_counted_and_masked(stage):
    plain, masked = (
        stage({"max_steps": 1}, "plain"),
        stage({"max_steps": 1, "mask_truncated_completions": True}, "masked"),
    )
    losses = []
    for made in (plain, masked):
        made.run()
        row = rows(made)[0]
        cut = [sample["truncated"] for sample in read_jsonl(Path(made.out) / "samples.jsonl")]
        assert row["completions/truncated"] == sum(cut) == 8 * row["completions/clipped_ratio"] > 0
        losses.append(row["loss"])
    assert losses[0] != losses[1]


def test_overlong_is_a_soft_penalty(stage):
    """From 0 to -1 over the last tokens (DAPO, equation 13), beside other rewards, and logged apart."""
    made = stage({"max_steps": 1}, reward={"correct": 2.0, "answered": 1.0, "overlong": 0.5}, overlong_tokens=4)
    made.run()
    samples = list(read_jsonl(Path(made.out) / "samples.jsonl"))
    assert {sample["rewards"]["overlong"] for sample in samples if sample["truncated"]} == {-1.0}
    row = rows(made)[0]
    parts = [row[f"rewards/{name}/mean"] for name in ("correct", "answered", "overlong")]
    assert row["reward"] == pytest.approx(2 * parts[0] + parts[1] + 0.5 * parts[2])


def test_a_batch_cut_without_a_reward_warns(stage, caplog):
    stage({"max_steps": 1, "max_completion_length": 1}, reward={"correct": 1.0}).run()
    assert "step 1: all 8 completions were cut at max_completion_length = 1, and none has a reward" in caplog.text


# Groups of equal rewards


def test_groups_of_equal_rewards_are_counted_and_left_out(stage):
    """Kept, they still get the entropy bonus. Left out, nothing of them moves a weight."""
    for zero_variance, moves in (("keep", True), ("filter", False)):
        made = stage({"max_steps": 1}, zero_variance, reward="same", zero_variance=zero_variance)
        made.run()
        row = rows(made)[0]
        assert row["zero_variance_groups"] == 2 and row["frac_reward_zero_std"] == 1
        assert (row["grad_norm"] > 0) == moves


def test_a_part_of_the_groups_is_left_out(stage, tmp_path):
    """The others' loss is that of a batch with nothing else (dapo divides by the number of trained tokens)."""
    path = tmp_path / "two.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "9+9", "answer": "8"}\n')
    data = Data(path=str(path))
    made = stage({"max_steps": 1}, data=data, reward="first_problems", zero_variance="filter")
    made.run()
    row = rows(made)[0]
    samples = list(read_jsonl(Path(made.out) / "samples.jsonl"))
    assert row["zero_variance_groups"] == 1 and row["loss"] != 0
    assert {sample["advantage"] != 0 for sample in samples if sample["prompt"] == "1+1"} == {True}
    assert {sample["advantage"] for sample in samples if sample["prompt"] == "9+9"} == {0.0}


def test_groups_of_equal_rewards_are_replaced(stage, tmp_path):
    """Dynamic sampling: other problems of the data take their places, until every group differs."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"problem": "{i % 10}+{i}", "answer": "1"}}\n' for i in range(32)))
    options = {"data": Data(path=str(path)), "reward": "first_problems"}
    made = stage(zero_variance="resample", **options)
    made.run()
    assert [row["zero_variance_groups"] for row in rows(made)] == [0] * 4
    assert sum(row["resampled_groups"] for row in rows(made)) > 0
    assert {sample["prompt"] < "5" for sample in read_jsonl(Path(made.out) / "samples.jsonl")} == {True}
    again = stage(out="again", zero_variance="resample", **options)
    again.run()
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(made).items())


def test_a_draw_has_as_many_problems_as_give_the_missing_groups(stage, tmp_path, monkeypatch):
    """Half of the groups are equal, so twice as many are drawn as are missing. It took eight draws of ever fewer."""
    path, draws = tmp_path / "rows.jsonl", []
    path.write_text("".join(f'{{"problem": "{i % 10}+{i}", "answer": "1"}}\n' for i in range(64)))

    def sample(self, prompts, first, attempt=0, plain=Trainer._sample):
        varied = sum(prompt[-1]["content"] < "5" for prompt in prompts) // 4
        draws.append((self.state.global_step, attempt, len(prompts) // 4, varied))
        return plain(self, prompts, first, attempt)

    monkeypatch.setattr(Trainer, "_sample", sample)
    options = {"data": Data(path=str(path)), "reward": "first_problems", "zero_variance": "resample"}
    stage({"per_device_train_batch_size": 32, "max_steps": 2}, **options).run()
    for _, generation in itertools.groupby(draws, key=lambda draw: draw[0]):
        drawn = found = 0
        for _, attempt, problems, varied in generation:
            if attempt:
                assert problems == min(math.ceil((8 - found) * drawn / max(found, 1)), 16)
            drawn, found = drawn + problems, found + varied
        assert attempt and found >= 8


def test_replaced_groups_have_the_weights_of_their_step(stage):
    """They are drawn before TRL would renew the engine's copy of the weights: they had those of the step before."""
    made = stage({"bf16": True, "learning_rate": 3e-2}, zero_variance="resample", gate_steps=9)
    made.run()
    assert all(row["sampling/k3"] < 0.005 for row in rows(made)), [row["sampling/k3"] for row in rows(made)]


def test_groups_that_stay_equal_are_trained_on(stage):
    made = stage({"max_steps": 1}, reward="same", zero_variance="resample")
    made.run()
    assert rows(made)[0]["zero_variance_groups"] == 2


def test_resampling_needs_whole_groups(stage, monkeypatch):
    """Each of several processes replaces its own."""
    monkeypatch.setattr(GRPOConfig, "world_size", property(lambda self: 2))
    arguments_of(stage({"per_device_train_batch_size": 4}, zero_variance="resample"))
    with pytest.raises(UserError, match="2 x 1 samples must be whole groups of num_generations = 4"):
        arguments_of(stage({"per_device_train_batch_size": 2}, zero_variance="resample"))


# TRL's losses, the entropy bonus, sampling


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},  # GSPO
        {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.25, "entropy_coef_max": 1.0},
        {"min_p": 0.2, "top_k": 9},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_losses_and_options_go_through(stage, options):
    """Two updates per generation: the second has ratios other than 1."""
    made = stage(TWO_UPDATES | options | {"max_steps": 4})
    made.run()
    found = rows(made)
    assert len(found) == 4 and all(row["grad_norm"] > 0 for row in found)
    if "use_adaptive_entropy" in options:
        assert [row["entropy_coef"] for row in found] == [0.26, 0.51, 0.76, 1.0]


def test_min_p_reaches_the_engine(stage):
    """Where only the likeliest token is allowed, all samples of a group are one."""
    made = stage({"max_steps": 1, "min_p": 1.0})
    made.run()
    samples = list(read_jsonl(Path(made.out) / "samples.jsonl"))
    assert len({sample["completion"] for sample in samples}) == 2


# Rewards of one's own


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("broken", "broken must return a finite number or None for each of 8 completions"),
        ("short", "short must return a finite number"),
        ("missing", "can't import"),
        ({"corect": 1.0}, "'corect': neither one of correct, answered, overlong nor FILE.py:NAME"),
        ({"nowhere.py:f": 1.0}, "can't import 'nowhere.py:f'"),
        ({"correct": 0.0}, "need at least one reward with a weight"),
        ({"correct": math.nan}, "need a finite number"),
        ({"correct": 1.0, "operator:correct": 1.0}, "can't import"),
    ],
)
def test_bad_rewards_are_refused(stage, reward, words):
    with pytest.raises(UserError, match=words):
        stage(reward=reward).run()


def test_a_changed_reward_is_another_setting(stage, tmp_path):
    made = stage()
    before = made.settings()
    (tmp_path / "own_rewards.py").write_text("def length(completions, **_): return [0.0] * len(completions)")
    assert made.settings() != before


# Evaluation, the best checkpoint, and what can be read while it runs


def test_evaluation_has_its_own_n_and_the_best_checkpoint_is_saved(stage, monkeypatch):
    """A reward on held-out problems that is best at step 2 of 4. Seeds are the same at each evaluation."""
    asked, evaluated, scores = [], [], [0.25, 0.75, 0.5, 0.0]

    def sample(self, prompts, n, first, seed, stop, plain=EngineRollouts.sample):
        asked.append((len(prompts) // n, n, (seed, first)))
        return plain(self, prompts, n, first, seed, stop)

    def evaluate(self, *arguments, plain=Trainer.evaluation_loop, **options):
        output = plain(self, *arguments, **options)
        self._metrics["eval"]["reward"] = [scores[len(evaluated)]]
        evaluated.append({name: weight.clone() for name, weight in self.model.state_dict().items()})
        return output

    monkeypatch.setattr(EngineRollouts, "sample", sample)
    monkeypatch.setattr(Trainer, "evaluation_loop", evaluate)
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    made = stage(options | {"learning_rate": 1e-2}, eval_rows=4)
    made.run()
    of_evaluations = [(p, n, seed) for p, n, seed in asked if n == 2]
    assert len(asked) == 4 + 4 * 2 and len(of_evaluations) == 4 * 2 and {p for p, *_ in of_evaluations} == {2}
    assert len({seed for *_, seed in of_evaluations}) == 2  # of the two batches
    assert [row["eval_reward"] for row in metrics(Path(made.out)) if "eval_reward" in row] == scores
    assert all(torch.equal(evaluated[1][name], tensor) for name, tensor in weights(made).items())
    modes = [(row["step"], row["mode"]) for row in read_jsonl(Path(made.out) / "samples.jsonl")]
    assert modes.count((1, "train")) == modes.count((1, "eval")) == 8


def test_seconds_are_split(stage, monkeypatch):
    """Into rollout, grading and update, which are all of a step. What an evaluation takes is none of them."""

    def evaluate(self, *arguments, plain=Trainer.evaluation_loop, **options):
        time.sleep(1)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluate)
    made = stage(
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "load_best_model_at_end": False}, eval_rows=8
    )
    made.run()
    for row in rows(made):
        parts = [row[f"time/{name}"] for name in ("rollout", "grading", "update")]
        assert min(parts) >= 0 and parts[0] > 0
    first, *_, last = rows(made)
    split = sum(row[f"time/{name}"] for row in rows(made)[1:] for name in ("rollout", "grading", "update"))
    assert split < last["seconds"] - first["seconds"] - 0.9


# It learns


def test_reward_rises(stage):
    """From the share of odd first tokens that a random model draws."""
    options = {"max_steps": 12, "per_device_train_batch_size": 32, "max_completion_length": 2, "learning_rate": 3e-3}
    made = stage(options, reward="odd")
    made.run()
    rewards = [row["reward"] for row in rows(made)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.15
