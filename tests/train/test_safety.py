"""Training that goes wrong says so: numbers that aren't finite, arguments without effect, damaged checkpoints."""

import dataclasses
import errno
import json
import math

import pytest
import torch
from commands import check, m1
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_stages import CHAIN, TRAINER, distill_stage, metrics
from trl import SFTConfig

from m1.data_options import Data
from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.recipe import DistillStage, GRPOStage, SFTStage
from m1.train import distill, grpo, sft
from m1.train.checkpoints import last_checkpoint, seal
from m1.train.stage_trainer import StageTrainer, first_not_finite
from m1.train.trainer import trainer_arguments

RL = {"num_generations": 4, "max_completion_length": 8, "steps_per_generation": 1, "per_device_train_batch_size": 8}
STAGES = {"sft": SFTStage, "distill": DistillStage, "grpo": GRPOStage}
MODULES = {"sft": sft, "distill": distill, "grpo": grpo}


def stage_of(kind, model, teacher, out, trainer=None, **options):
    options |= {"teacher": str(teacher)} if kind == "distill" else {}
    settings = TRAINER | (RL if kind == "grpo" else {}) | (trainer or {})
    return STAGES[kind](model=str(model), out=str(out), **{"data": CHAIN, "trainer": settings} | options)


def arguments_of(kind, trainer, **options):
    return MODULES[kind].arguments_of(stage_of(kind, "m", "t", "o", trainer, **options))


# Numbers that aren't finite


def damaged_model(model, folder, value):
    """A copy with one such value in an A_log."""
    made, tokenizer = load_model(model)
    with torch.no_grad():
        made.model.layers[0].mamba.A_log[0, 0] = value
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", STAGES)
def test_a_nan_weight_stops_the_stage(kind, hybrid_dir, teacher_dir, tmp_path):
    """Logged as loss 0.0 before, trained to the end and published with a manifest."""
    model = damaged_model(hybrid_dir, tmp_path / "model", math.nan)
    with pytest.raises(UserError, match=r"step 0: the weight model\.layers\.0\.mamba\.A_log isn't finite"):
        stage_of(kind, model, teacher_dir, tmp_path / "out").run()
    assert not list((tmp_path / "out").glob("*.safetensors")) and not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("kind", STAGES)
def test_divergence_stops_the_stage_and_keeps_the_last_good_checkpoint(kind, hybrid_dir, teacher_dir, tmp_path):
    trainer = {"learning_rate": 1e18, "save_steps": 1, "max_steps": 6, "warmup_steps": 1, "max_grad_norm": 0.0}
    with pytest.raises(UserError, match=r"step [2-4]: .* Lower the learning rate"):
        stage_of(kind, hybrid_dir, teacher_dir, tmp_path, trainer).run()
    assert not (tmp_path / "manifest.json").exists()
    kept = load_file(last_checkpoint(tmp_path) + "/model.safetensors")
    assert first_not_finite(kept.items()) is None
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path))


@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("loss", math.inf), ("gradient norm", math.inf)])
def test_the_step_is_named(what, value, hybrid_dir, tmp_path, monkeypatch):
    """Where numbers wait to be read, as on a GPU, the error names the step they are from."""
    note = StageTrainer.check_finite

    def check(self):
        self._unread = [(s, n, torch.tensor(value) if (s, n) == (2, what) else v) for s, n, v in self._unread]
        if self.state.global_step in (0, 3):
            note(self)

    monkeypatch.setattr(StageTrainer, "check_finite", check)
    with pytest.raises(UserError, match=f"step 2: the {what} is {value}"):
        stage_of("sft", hybrid_dir, None, tmp_path).run()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_among_many_is_found(value):
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "empty": torch.ones(0)}
    assert first_not_finite(tensors.items()) is None
    tensors["b"][4] = value
    assert first_not_finite(tensors.items()) == "b"


# Arguments


@pytest.mark.parametrize(
    ("kind", "trainer", "words"),
    [
        ("distill", {"label_smoothing_factor": 0.3}, "label_smoothing_factor = 0.3 would change nothing"),
        ("distill", {"loss_type": "dft"}, "loss_type = 'dft' would change nothing"),
        ("grpo", {"min_p": 1.5}, "min_p = 1.5 is out of range"),
        ("grpo", {"vllm_mode": "server"}, "vllm_mode = 'server' would change nothing"),
        ("grpo", {"reward_weights": [1.0]}, r"\[rewards\] has each reward's weight"),
        ("grpo", {"loss_type": "cispo"}, "cuts ratios off at epsilon_high itself"),
        ("grpo", {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"}, "vespo"),
        ("grpo", {"repetition_penalty": 1.1}, "repetition_penalty"),
        ("grpo", {"generation_kwargs": {"num_beams": 2}}, "generation_kwargs"),
        ("grpo", {"use_vllm": True}, "use_vllm = True would change nothing"),
        ("grpo", {"temperature": 0.0}, "temperature = 0.0 is out of range"),
        ("sft", {"eval_strategy": "steps"}, "set the stage's key `eval_rows`"),
        ("grpo", {"eval_on_start": True}, "set the stage's key `eval_rows`"),
    ],
)
def test_arguments_without_effect_are_refused(kind, trainer, words):
    with pytest.raises(UserError, match=words):
        arguments_of(kind, trainer)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("max_steps", 1.5),
        ("max_steps", "10"),
        ("per_device_train_batch_size", [4]),
        ("gradient_checkpointing", "no"),
        ("gradient_checkpointing", 1),
        ("lr_scheduler_type", 3),
        ("lr_scheduler_type", "cosinus"),
        ("optim", "adamm"),
        ("report_to", 5),
        ("max_grad_norm", {}),
        ("warmup_steps", "many"),
        ("seed", None),
        ("seed", -1),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("num_train_epochs", 0),
        ("adam_beta2", 1.0),
        ("deepspeed", "zero3.json"),
        ("pad_to_multiple_of", 0),
        ("dataloader_num_workers", -1),
        ("label_smoothing_factor", 2.0),
        ("lr_scheduler_kwargs", "epoch"),
        ("gradient_checkpointing_kwargs", "x"),
        ("seed", 10**400),
    ],
)
def test_bad_values_are_refused_before_a_model_is_loaded(kind, key, value):
    with pytest.raises(UserError, match=r"\[trainer\]"):
        arguments_of(kind, {key: value})


def test_what_trl_refuses_is_one_line(hybrid_dir, tmp_path):
    with pytest.raises(UserError, match=r"\[trainer\]: Invalid `loss_type` zzz"):
        stage_of("sft", hybrid_dir, None, tmp_path, {"loss_type": "zzz"}).run()


@pytest.mark.parametrize("trainer", [{"optim_args": "nope"}, {"lr_scheduler_kwargs": {"nope": 1}}])
def test_what_optimizers_and_schedules_refuse_is_one_line(trainer, hybrid_dir, teacher_dir, tmp_path):
    stage = distill_stage(hybrid_dir, teacher_dir, tmp_path, TRAINER | trainer)
    made = MODULES["distill"].distill_trainer(stage, distill.arguments_of(stage))
    with pytest.raises(UserError, match=r"\[trainer\]: its .* can't be"):
        made.create_optimizer_and_scheduler(2)


def test_an_integer_is_a_float():
    assert arguments_of("sft", {"learning_rate": 1}).learning_rate == 1.0


@pytest.mark.parametrize("options", [{"eval_rows": -1}, {"mixer_lr_scale": 0.0}, {"mixer_lr_scale": math.nan}])
def test_bad_keys_of_a_stage(options):
    with pytest.raises(UserError, match=next(iter(options))):
        arguments_of("sft", {}, **options)


# Parameter groups


def groups_of(trainer):
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups]


def made_trainer(stage):
    trainer = MODULES[stage.kind].distill_trainer(stage, distill.arguments_of(stage))
    trainer.create_optimizer()
    return trainer


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_the_recurrence_and_norms_do_not_decay(mixer, teacher_dir, tmp_path):
    from m1.model.convert import convert

    convert(teacher_dir, tmp_path / "m", [1, 3], mixer=mixer)
    trainer = made_trainer(distill_stage(tmp_path / "m", teacher_dir, tmp_path / "o", TRAINER | {"weight_decay": 0.1}))
    (decayed, _, decay), (kept, _, none) = groups_of(trainer)
    assert (decay, none) == (0.1, 0.0)
    assert not [n for n in decayed if n.endswith(("A_log", "D", "bias")) or "norm" in n]
    assert {n.rpartition(".")[2] for n in kept} >= {"A_log", "D"} and all("proj.weight" not in n for n in kept)
    assert sum(group["parameters"] for group in trainer.group_sizes) == sum(
        p.numel() for p in trainer.model.parameters()
    )


def test_mixers_can_have_a_learning_rate_of_their_own(hybrid_dir, teacher_dir, tmp_path):
    trainer = made_trainer(distill_stage(hybrid_dir, teacher_dir, tmp_path, TRAINER, mixer_lr_scale=5.0))
    for names, rate, _ in groups_of(trainer):
        assert {(".mamba." in name) for name in names} == {rate == pytest.approx(5e-3)}
    assert sum(len(names) for names, *_ in groups_of(trainer)) == len(list(trainer.model.parameters()))
    with pytest.raises(UserError, match=r"mixer_lr_scale=5\.0: the model has no Mamba layers"):
        made_trainer(distill_stage(teacher_dir, teacher_dir, tmp_path, TRAINER, mixer_lr_scale=5.0))


# Damaged checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """Three sealed checkpoints; by name, 9 comes after 10."""
    for step in (8, 9, 10):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"a": torch.ones(64)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal(folder)
    return tmp_path


def test_the_newest_checkpoint_is_the_one_with_most_steps(checkpoints):
    assert last_checkpoint(checkpoints).endswith("checkpoint-10")


@pytest.mark.parametrize("damage", ["half", "flipped", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(checkpoints, name, damage, caplog):
    for step in (10, 9):
        path = checkpoints / "checkpoints" / f"checkpoint-{step}" / name
        content = path.read_bytes()
        match damage:
            case "half":
                path.write_bytes(content[: len(content) // 2])
            case "flipped":
                path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
            case "missing":
                path.unlink()
    assert last_checkpoint(checkpoints).endswith("checkpoint-8")
    assert ("checkpoint-10 is damaged" in caplog.text) == ((name, damage) != ("trainer_state.json", "missing"))
    (checkpoints / "checkpoints" / "checkpoint-8" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="has no intact checkpoint"):
        last_checkpoint(checkpoints)


UNSEALED = {
    "model.safetensors": b"half",
    "optimizer.pt": b"half",
    "trainer_state.json": b'{"global_step": "x"}',
    "sha256.json": b"[]",
}


@pytest.mark.parametrize("name", UNSEALED)
def test_a_checkpoint_without_a_seal_must_be_readable(checkpoints, name):
    folder = checkpoints / "checkpoints" / "checkpoint-10"
    (folder / "sha256.json").unlink()
    torch.save({"a": torch.ones(64)}, folder / "optimizer.pt")
    (folder.parent / "checkpoint-mine").mkdir()
    (folder.parent / "checkpoint-mine" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(checkpoints) == str(folder)
    (folder / name).write_bytes(UNSEALED[name])
    assert last_checkpoint(checkpoints).endswith("checkpoint-9")


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def test_training_resumes_from_the_checkpoint_before(hybrid_dir, tmp_path, monkeypatch):
    """Half of any file was a traceback, and no other checkpoint was left."""
    from m1.train import trainer as trainer_module

    stage = SFTStage(
        out=str(tmp_path / "whole"), data=CHAIN, model=str(hybrid_dir), trainer=TRAINER | {"save_steps": 1}
    )
    stage.run()
    cut = dataclasses.replace(stage, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer_module, "_save", lambda *_: 1 / 0)
        cut.run()
    last = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    assert sorted(path.name for path in last.parent.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert set(FILES) <= set(json.loads((last / "sha256.json").read_text()))
    (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:999])
    cut.run(resume=True)
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "cut" / "model.safetensors")[name], tensor)


FULL = [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 600384 vs 600272"),
    OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_while_a_model_is_saved_is_one_line(hybrid_dir, tmp_path, monkeypatch, capsys, error):
    from m1.train import trainer as trainer_module

    def fail(*_):
        raise error

    monkeypatch.setattr(trainer_module, "_save", fail)
    (tmp_path / "sft.toml").write_text(
        f'stage = "sft"\nout = "{tmp_path}/o"\nmodel = "{hybrid_dir}"\n[data]\ntask = "chain"\ncount = 4\n'
        "[trainer]\nmax_steps = 1\nper_device_train_batch_size = 2\nbf16 = false\n"
    )
    check((m1("sft", tmp_path / "sft.toml"), capsys.readouterr().err), "can't read or write")


# Evaluation, metrics and the manifest


@pytest.mark.parametrize("kind", STAGES)
def test_held_out_rows_are_evaluated_and_the_manifest_tells_all(kind, hybrid_dir, teacher_dir, tmp_path):
    trainer = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    stage = stage_of(kind, hybrid_dir, teacher_dir, tmp_path, trainer, eval_rows=8)
    stage.run()
    losses = [row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    speeds = [row for row in metrics(tmp_path) if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1.5 and row["memory_gib"] > 0 for row in speeds)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["weights_sha256"]) == {"model.safetensors"} and len(manifest["data_sha256"]) == 64
    assert manifest["arguments"]["max_steps"] == 2 and manifest["arguments"]["adam_beta1"] == 0.9
    assert manifest["machine"]["cores"] and sum(g["parameters"] for g in manifest["parameter_groups"]) > 1000


def test_rows_held_out_are_not_trained_on(hybrid_dir, tmp_path):
    from m1.train.trainer import rows_sha256, split

    rows = Dataset.from_list([{"input_ids": [i, i + 1]} for i in range(64)])
    train, held_out = split(rows, 10, seed=0)
    texts = [list(part["input_ids"]) for part in (rows, train, held_out)]
    assert len(train) == 54 and len(held_out) == 10 and sorted(texts[1] + texts[2]) == sorted(texts[0])
    assert texts[1] == [text for text in texts[0] if text in texts[1]]  # in their order
    assert rows_sha256(train) == rows_sha256(split(rows, 10, seed=0)[0]) != rows_sha256(rows)
    with pytest.raises(UserError, match="eval_rows=64: the data has only 64 rows"):
        split(rows, 64, seed=0)


def test_a_stage_depends_on_the_manifests_of_its_models(hybrid_dir, teacher_dir, tmp_path):
    """A model trained again by the same recipe has other weights, and its manifest another time."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text('{"seconds": 1}')
    stage = SFTStage(out=str(tmp_path / "out"), data=Data(task="chain"), model=str(folder))
    before = stage.settings()
    (folder / "manifest.json").write_text('{"seconds": 2}')
    assert stage.settings() != before


def test_a_process_trains_on_one_gpu(tmp_path, monkeypatch):
    """With more, transformers would train copies of the model in threads (DataParallel)."""
    monkeypatch.setattr(SFTConfig, "n_gpu", 4)
    assert trainer_arguments(SFTConfig, tmp_path, {})._n_gpu == 1
