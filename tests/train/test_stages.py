"""Each stage through its real trainer on a tiny model: it learns, resumes, packs exactly, and refuses to overwrite."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from m1.data_options import Data
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.model.checkpoint import load_model, saved_dtype
from m1.recipe import DistillStage, GRPOStage, SFTStage
from m1.train.distill import DistillTrainer

CHAIN = Data(task="chain", count=64, min_steps=1, max_steps=2)
TRAINER = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
}


def distill_stage(model, teacher, out, trainer, **options):
    paths = {"model": str(model), "teacher": str(teacher), "out": str(out)}
    return DistillStage(**paths, **{"data": CHAIN, "trainer": trainer} | options)


def metrics(out):
    return list(read_jsonl(out / "metrics.jsonl"))


def test_distil_lowers_the_divergence_and_switches_it(hybrid_dir, teacher_dir, tmp_path):
    trainer = TRAINER | {"max_steps": 12, "lr_scheduler_type": "constant"}
    stage = distill_stage(hybrid_dir, teacher_dir, tmp_path, trainer, forward_kl_steps=10)
    stage.run()
    rows = metrics(tmp_path)
    forward = [row["forward_kl"] for row in rows if "forward_kl" in row]
    assert len(forward) == 10 and forward[-1] < 0.7 * forward[0]
    assert len([row for row in rows if "reverse_kl" in row]) == 2
    assert stage.finished() and list((tmp_path / "tensorboard").rglob("events.*"))
    weights = (tmp_path / "model.safetensors").stat().st_mtime_ns
    for resume in (False, True):
        stage.run(resume)  # nothing is left to do
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == weights


def test_bfloat16_checkpoints_are_trained_in_float32_and_saved_in_bfloat16(
    hybrid_dir, teacher_dir, tmp_path, monkeypatch
):
    """What every published checkpoint is. While they train, bfloat16 weights would round RL-sized updates away."""
    for name, folder in (("teacher", teacher_dir), ("hybrid", hybrid_dir)):
        model, tokenizer = load_model(folder)
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    trainer = TRAINER | {"max_steps": 2, "bf16": True, "learning_rate": 1e-7, "save_steps": 1}
    seen = set()

    class Watched(DistillTrainer):
        def training_step(self, model, *arguments, **options):
            seen.update(p.dtype for p in model.parameters())
            return super().training_step(model, *arguments, **options)

    monkeypatch.setattr("m1.train.distill.DistillTrainer", Watched)
    distill_stage(tmp_path / "hybrid", tmp_path / "teacher", tmp_path / "out", trainer).run()
    assert seen == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path / "out")[0].parameters()} == {torch.bfloat16}
    assert saved_dtype(tmp_path / "out") == torch.bfloat16
    assert all(math.isfinite(row["reverse_kl"]) for row in metrics(tmp_path / "out") if "reverse_kl" in row)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_dtype_a_stage_saves_in(teacher_dir, tmp_path, key):
    """That of config.json, under its new or old name, or else of the tensors."""
    folder = tmp_path / "teacher"
    load_model(teacher_dir)[0].to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | ({key: "float16"} if key else {})))
    assert saved_dtype(folder) == torch.float16


def test_packed_distillation_equals_unpacked(hybrid_dir, teacher_dir, tmp_path):
    """The first step's loss of one batch, packed into a row and padded: the same documents, the same number."""
    losses = []
    data = Data(task="chain", count=8, min_steps=1, max_steps=4)
    for name, options in {
        "padded": {"per_device_train_batch_size": 8},
        "packed": {"per_device_train_batch_size": 8, "packing": True, "max_length": 512},
    }.items():
        trainer = TRAINER | {"max_steps": 1, "learning_rate": 0.0} | options
        out = tmp_path / name
        distill_stage(hybrid_dir, teacher_dir, out, trainer, data=data).run()
        losses.append(metrics(out)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_interrupted_stage_goes_on(hybrid_dir, tmp_path, monkeypatch):
    """Ctrl-C after step 2 keeps a checkpoint; resuming ends where an uninterrupted run ends."""
    from m1.train import trainer as trainer_module

    def sft(out):
        return SFTStage(out=str(out), data=CHAIN, model=str(hybrid_dir), trainer=TRAINER)

    sft(tmp_path / "whole").run()
    on_step_end = trainer_module._InterruptCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        self.requested = self.requested or state.global_step == 2
        return on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module._InterruptCallback, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "cut").run()
    assert not sft(tmp_path / "cut").finished()
    with pytest.raises(UserError, match="--resume"):
        sft(tmp_path / "cut").run()
    other = dataclasses.replace(sft(tmp_path / "cut"), trainer=TRAINER | {"learning_rate": 2e-3})
    with pytest.raises(UserError, match=r"other settings \(trainer\.learning_rate=0\.001, now 0\.002"):
        other.run(resume=True)
    (tmp_path / "cut" / "checkpoints" / "checkpoint-9").mkdir()  # half-written when the power went
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    sft(tmp_path / "cut").run(resume=True)
    assert [row["step"] for row in metrics(tmp_path / "cut") if "loss" in row] == [1, 2, 3, 4]
    whole, cut = (load_model(tmp_path / name)[0].state_dict() for name in ("whole", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-5)


def test_stage_killed_after_its_last_step(hybrid_dir, tmp_path, monkeypatch):
    """The last checkpoint is complete, the model isn't saved: it is saved without another step."""
    from m1.train import trainer as trainer_module

    stage = SFTStage(out=str(tmp_path / "out"), data=CHAIN, model=str(hybrid_dir), trainer=TRAINER)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "_save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.run()
    before = load_file(next(tmp_path.glob("out/checkpoints/checkpoint-4/model.safetensors")))
    stage.run(resume=True)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4]
    after = load_model(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_grpo_runs_on_engine_rollouts(hybrid_dir, tmp_path):
    trainer = TRAINER | {
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
    }
    GRPOStage(model=str(hybrid_dir), out=str(tmp_path), data=CHAIN, trainer=trainer).run()
    rows = [row for row in metrics(tmp_path) if "reward" in row]
    assert len(rows) == 2 and all(row["entropy"] > 0 and row["entropy_coef"] > 0 for row in rows)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["model"] == str(hybrid_dir) and manifest["versions"]["trl"]


def test_unknown_trainer_argument(hybrid_dir, tmp_path):
    stage = SFTStage(out=str(tmp_path), data=CHAIN, model=str(hybrid_dir), trainer={"learning_rat": 1e-3})
    with pytest.raises(UserError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        stage.run()


def test_real_training_rows(tmp_path, hybrid_dir):
    """Files of {problem, solution} and of messages are both read; the template's braces are left alone."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"problem": "1+1", "solution": r"\boxed{2}"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    data = Data(path=str(path), prompt_template="{problem} Answer in \\boxed{}.")
    SFTStage(out=str(tmp_path / "out"), data=data, model=str(hybrid_dir), trainer=TRAINER | {"max_steps": 1}).run()
    assert (tmp_path / "out" / "manifest.json").exists()
