"""Distillation through its stage: masks, batches, vocabularies."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_stages import CHAIN, TRAINER, distill_stage, metrics

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.train.distill import arguments_of, check_vocabulary, distill_trainer


def first_loss(model, teacher, out, trainer=None, **options):
    trainer = TRAINER | {"max_steps": 1, "learning_rate": 0.0} | (trainer or {})
    distill_stage(model, teacher, out, trainer, **options).run()
    return metrics(out)[0]["loss"]


def test_accumulated_batches_are_one_batch(hybrid_dir, teacher_dir, tmp_path):
    """The mean is over the tokens of all batches of a step: a short answer's tokens weigh no more than a long one's."""
    weights = []
    for size in (8, 1):
        trainer = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        trainer |= {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
        first_loss(hybrid_dir, teacher_dir, tmp_path / str(size), trainer)
        weights.append(load_file(tmp_path / str(size) / "model.safetensors"))
    before = load_model(hybrid_dir)[0].state_dict()
    assert max((weights[0][name] - before[name]).abs().max() for name in weights[0]) > 1e-3
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def padded(model, folder, rows):
    made, tokenizer = load_model(model)
    made.resize_token_embeddings(made.config.vocab_size + rows, mean_resizing=False)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_padding_rows_of_a_vocabulary_change_nothing(hybrid_dir, teacher_dir, tmp_path):
    """Qwen2.5-7B has 152,064 rows, its 3B sibling 151,936, and the same tokens."""
    plain = first_loss(hybrid_dir, teacher_dir, tmp_path / "plain")
    for name, models in {
        "teacher": (hybrid_dir, padded(teacher_dir, tmp_path / "t", 64)),
        "student": (padded(hybrid_dir, tmp_path / "s", 64), teacher_dir),
    }.items():
        assert first_loss(*models, tmp_path / name) == pytest.approx(plain, rel=1e-5)


def test_a_vocabulary_is_compared_by_content():
    """The same number of tokens, ids shifted by one: trained without a word."""
    student, teacher = (SimpleNamespace(get_vocab=lambda i=i: {"1": i, "2": i + 1}) for i in (16, 17))
    with pytest.raises(UserError, match="token '1' is 16 for the student and 17 for the teacher"):
        check_vocabulary(student, teacher, "a and b")
    more = SimpleNamespace(get_vocab=lambda: {"1": 16, "2": 17, "<tool>": 18})
    check_vocabulary(student, more, "a and b")
    with pytest.raises(UserError, match="token '<tool>' is 18 for the student and None"):
        check_vocabulary(more, student, "a and b")


def test_the_teacher_has_a_dtype_and_a_device_of_its_own(hybrid_dir, teacher_dir, tmp_path):
    stage = distill_stage(
        hybrid_dir, teacher_dir, tmp_path, TRAINER, teacher_dtype="float32", teacher_device="cpu", data=CHAIN
    )
    trainer = distill_trainer(stage, arguments_of(stage))
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    exact = trainer.teacher.model(**batch).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trainer.teacher_states(batch), exact)
        trainer.teacher_autocast = True
        assert 1e-4 < (trainer.teacher_states(batch) - exact).abs().max() < 0.2
    with trainer.compute_loss_context_manager():
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(UserError, match="teacher_device='cuda:77'"):
        arguments_of(distill_stage("m", "t", tmp_path, TRAINER, teacher_device="cuda:77"))


def test_mixed_precision_covers_the_teacher_and_the_loss(hybrid_dir, teacher_dir, tmp_path):
    """accelerate wraps the model alone: a float32 teacher ran in float32, and the logits' products on a GPU, too."""
    stage = distill_stage(hybrid_dir, teacher_dir, tmp_path, TRAINER | {"bf16": True}, data=CHAIN)
    trainer = distill_trainer(stage, arguments_of(stage))
    seen = []
    for module in (trainer.teacher.model.layers[1].self_attn.q_proj, trainer.model.model.layers[1].mlp.up_proj):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = next(iter(trainer.get_train_dataloader()))
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, batch)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.bfloat16] * 2
