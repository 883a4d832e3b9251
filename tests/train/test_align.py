"""Alignment: mixers learn their attention's output from its inputs, and nothing else of the model moves."""

import dataclasses

import pytest
import torch
from test_stages import CHAIN, TRAINER, distill_stage, metrics

from m1.data_options import Data
from m1.errors import UserError
from m1.model import packed_attention
from m1.model.checkpoint import load_model
from m1.recipe import AlignStage
from m1.train.speed import speed_up


def align_stage(model, teacher, out, **options):
    paths = {"model": str(model), "teacher": str(teacher), "out": str(out)}
    return AlignStage(**paths, **{"data": CHAIN, "trainer": TRAINER} | options)


def weights(folder):
    return load_model(folder)[0].state_dict()


@pytest.fixture
def aligned(hybrid_dir, teacher_dir, tmp_path):
    trainer = TRAINER | {"max_steps": 60, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    align_stage(hybrid_dir, teacher_dir, tmp_path / "aligned", trainer=trainer, eval_rows=8).run()
    return tmp_path / "aligned"


def test_only_mixers_move_and_distillation_starts_lower(aligned, hybrid_dir, teacher_dir, tmp_path):
    rows = metrics(aligned)
    errors = [row["attention_error"] for row in rows if "attention_error" in row]
    assert errors[-1] < 0.7 * errors[0]
    assert any("eval_attention_error" in row for row in rows)
    before, after = weights(hybrid_dir), weights(aligned)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".mamba." in name for name in moved)
    divergences = []
    for start in (hybrid_dir, aligned):
        trainer = TRAINER | {"max_steps": 1, "learning_rate": 0.0}
        distill_stage(start, teacher_dir, tmp_path / start.name / "kl", trainer, divergence="forward_kl").run()
        divergences.append(metrics(tmp_path / start.name / "kl")[0]["forward_kl"])
    assert divergences[1] < divergences[0]


def test_the_error_by_hand(hybrid_dir, teacher_dir, tmp_path):
    """Of one batch: each mixer and its attention on the teacher's own inputs, compared outside the trainer."""
    stage = align_stage(hybrid_dir, teacher_dir, tmp_path, trainer=TRAINER | {"max_steps": 1, "learning_rate": 0.0})
    from m1.train.align import align_trainer, arguments_of

    trainer = align_trainer(stage, arguments_of(stage))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    student, teacher = (load_model(folder)[0].eval() for folder in (hybrid_dir, teacher_dir))
    kept, errors = {}, []
    for i, layer in enumerate(teacher.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, i=i: kept.update({i: (kwargs["hidden_states"], output[0])}),
            with_kwargs=True,
        )
    with torch.no_grad():
        teacher(batch["input_ids"], batch["attention_mask"])
        for i, layer in enumerate(student.model.layers):
            if hasattr(layer, "mamba"):
                inputs, wanted = kept[i]
                output, total, size = layer.mamba(inputs), 0.0, 0.0  # padding is on the right
                for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
                    total += (output[row, :length] - wanted[row, :length]).square().sum()
                    size += wanted[row, :length].square().sum()
                errors.append(total / size)
    torch.testing.assert_close(loss.detach(), torch.stack(errors).mean())


def test_packed_rows_have_the_same_error(hybrid_dir, teacher_dir, tmp_path, monkeypatch):
    data, errors, masks = Data(task="chain", count=8, min_steps=1, max_steps=4), [], []
    attend = packed_attention.varlen_attention
    monkeypatch.setattr(packed_attention, "varlen_attention", lambda *args: masks.append(1) or attend(*args))
    for name, options in {"padded": {}, "packed": {"packing": True, "max_length": 512}}.items():
        trainer = TRAINER | {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 8} | options
        align_stage(hybrid_dir, teacher_dir, tmp_path / name, trainer=trainer, data=data).run()
        errors.append(metrics(tmp_path / name)[0]["attention_error"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert len(masks) == 4 + 2  # the teacher's layers and the student's: packed rows need no mask of T² elements


def test_packed_rows_have_no_masks(hybrid_dir, teacher_dir, tmp_path, monkeypatch):
    """Neither model's attention makes a mask of all pairs; nothing compiles, since hooks are inside of layers."""
    seen = []
    monkeypatch.setattr("m1.train.trainer.speed_up", lambda *given: seen.append((given[1], speed_up(*given))))
    stage = align_stage(hybrid_dir, teacher_dir, tmp_path, trainer=TRAINER | {"max_steps": 1}, compile=True)
    stage.run()
    assert seen == [(False, None)] * 2


def test_accumulated_batches_count_the_same(hybrid_dir, teacher_dir, tmp_path):
    """The logged loss of two batches is their mean, not their sum."""
    trainer = TRAINER | {"max_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 2}
    align_stage(hybrid_dir, teacher_dir, tmp_path, trainer=trainer).run()
    row = metrics(tmp_path)[0]
    assert row["loss"] == pytest.approx(row["attention_error"], rel=1e-4)


def test_what_has_no_pairs_is_refused(hybrid_dir, teacher_dir, tmp_path):
    stage = align_stage(hybrid_dir, teacher_dir, tmp_path / "out")
    for changed, message in (
        ({"model": str(teacher_dir)}, "has no Mamba layers: give a hybrid"),
        ({"teacher": str(hybrid_dir)}, "has Mamba layers, too: give the transformer"),
        ({"trainer": TRAINER | {"gradient_checkpointing": True}}, "passes through no other layer: remove the key"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(stage, **changed).run()
