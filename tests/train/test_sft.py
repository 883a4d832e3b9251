"""The loss of fine-tuning through its trainer, against TRL's own."""

import pytest
import torch
from test_stages import CHAIN, TRAINER
from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM
from trl import SFTTrainer

from m1.recipe import SFTStage
from m1.train.sft import arguments_of, sft_trainer


def trainer_of(model, out, **options):
    stage = SFTStage(model=str(model), out=str(out), data=CHAIN, trainer=TRAINER | options)
    trainer = sft_trainer(stage, arguments_of(stage))
    trainer.model.train()
    return trainer


def loss_and_gradients(trainer, batch, compute, **options):
    trainer.model.zero_grad()
    loss = compute(trainer, trainer.model, dict(batch), **options)
    loss.backward()
    return loss, [parameter.grad for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}], ids=["padded", "packed"])
@pytest.mark.parametrize("items", [None, 77])
def test_the_loss_is_trls(hybrid_dir, tmp_path, options, items):
    trainer = trainer_of(hybrid_dir, tmp_path, bf16=False, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    given = {"num_items_in_batch": None if items is None else torch.tensor(items)}
    wanted = loss_and_gradients(trainer, batch, SFTTrainer.compute_loss, **given)
    metrics = {key: values.pop() for key, values in trainer._metrics["train"].items()}
    torch.testing.assert_close(loss_and_gradients(trainer, batch, type(trainer).compute_loss, **given), wanted)
    for name in ("entropy", "mean_token_accuracy"):
        total, count = trainer._metrics["train"][name].pop().tolist()
        assert count > 5 and total / count == pytest.approx(metrics[name], rel=1e-5)


def assert_trls_loss(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    losses = [kind.compute_loss(trainer, trainer.model, dict(batch)) for kind in (type(trainer), SFTTrainer)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=str)
def test_other_losses_are_trls(hybrid_dir, tmp_path, options):
    trainer = trainer_of(hybrid_dir, tmp_path, **options)
    assert_trls_loss(trainer)
    trainer.log({"loss": 1.0})


def test_a_model_with_scaled_logits(tmp_path, hybrid_dir):
    """Granite divides them by 8: without that the loss was 9.7 in place of 5.7."""
    tokenizer = AutoTokenizer.from_pretrained(hybrid_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(**sizes, num_key_value_heads=1, vocab_size=300, logits_scaling=8.0))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "granite")
    trainer = trainer_of(tmp_path / "granite", tmp_path / "out", bf16=False)
    assert_trls_loss(trainer)


def test_a_pass_waits_for_no_other_process(hybrid_dir, tmp_path, monkeypatch):
    """TRL gathered four numbers at each: 1B on two GPUs was 1.70 times as fast as on one."""
    trainer = trainer_of(hybrid_dir, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for name in ("gather", "gather_for_metrics", "reduce"):
        monkeypatch.setattr(trainer.accelerator, name, None)
    assert trainer.compute_loss(trainer.model, batch).requires_grad
