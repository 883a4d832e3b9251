"""Invariant 1: with every layer kept as attention, the model is the teacher."""

import pytest
import torch
from conftest import LLAMA3_ROPE, save_checkpoint, tiny_llama

from m1.model.convert import convert


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"rope_parameters": LLAMA3_ROPE},
        {"attention_bias": True},
        {"num_key_value_heads": 4},
    ],
    ids=["tied", "untied", "llama3-rope", "biases", "no-gqa"],
)
def test_all_attention_equals_teacher(tmp_path, tokens, changes):
    teacher = tiny_llama(**changes)
    if changes.get("attention_bias"):
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    save_checkpoint(teacher, tmp_path / "teacher")
    model = convert(tmp_path / "teacher", tmp_path / "out", range(4)).eval()
    torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits)


def test_sharded_checkpoint(tmp_path, tokens):
    teacher = tiny_llama()
    save_checkpoint(teacher, tmp_path / "teacher", max_shard_size="200KB")
    assert (tmp_path / "teacher" / "model.safetensors.index.json").exists()
    model = convert(tmp_path / "teacher", tmp_path / "out", range(4)).eval()
    torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits)


def test_bfloat16_stays_bfloat16(tmp_path):
    save_checkpoint(tiny_llama().to(torch.bfloat16), tmp_path / "teacher")
    model = convert(tmp_path / "teacher", tmp_path / "out", [1])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
