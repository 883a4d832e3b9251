"""Invariant 1: with every layer kept as attention, the model is the teacher. And what travels with the weights."""

import json

import pytest
import torch
from checkpoints import FAMILIES, LLAMA3_ROPE, save_checkpoint, tiny_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from m1.errors import UserError
from m1.model.convert import convert

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CHANGES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "yarn-rope": {"rope_parameters": YARN_ROPE},
    "no-gqa": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True},
    "mlp-biases": {"mlp_bias": True},
}
CASES = [(family, case) for family in FAMILIES for case in CHANGES]
CASES = [
    (f, c) for f, c in CASES if not (c.endswith("biases") and f == "qwen2") and not (c == "mlp-biases" and f == "qwen3")
]


@torch.no_grad()
def test_masks_and_caches_mean_what_they_mean_to_the_teacher(teacher_dir, tmp_path, tokens):
    """4D masks, and a mask of the new tokens alone: refused with Mamba layers, a transformer's own without them."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    model = convert(teacher_dir, tmp_path / "out", range(4)).eval()
    documents = torch.block_diag(torch.ones(20, 20), torch.ones(17, 17)).bool().tril().expand(2, 1, 37, 37)
    for mask in (documents, torch.zeros(2, 1, 37, 37).masked_fill(~documents, -torch.inf)):
        ours, theirs = (m(tokens, attention_mask=mask).logits for m in (model, teacher))
        torch.testing.assert_close(ours, theirs)
    for new in (torch.ones(2, 1), torch.ones(2, 38)):
        logits = []
        for m in (model, teacher):
            cache = m(tokens, use_cache=True).past_key_values
            logits.append(m(tokens[:, :1], past_key_values=cache, attention_mask=new.long()).logits)
        torch.testing.assert_close(*logits)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_all_attention_equals_teacher(tmp_path, tokens, family, case):
    teacher = tiny_teacher(family, **CHANGES[case])
    save_checkpoint(teacher, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "out", range(4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_loaded_from_disk_is_the_same(tmp_path, tokens, family):
    """Through transformers' own loading, not the object the checkpoint was saved from; and greedy text is equal."""
    save_checkpoint(tiny_teacher(family), tmp_path / "teacher", max_shard_size="100KB")
    assert (tmp_path / "teacher" / "model.safetensors.index.json").exists()
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    model = convert(tmp_path / "teacher", tmp_path / "out", range(4))
    torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **arguments), teacher.generate(tokens, **arguments))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_bfloat16_stays_bfloat16(tmp_path, family, mixer):
    save_checkpoint(tiny_teacher(family).to(torch.bfloat16), tmp_path / "teacher")
    model = convert(tmp_path / "teacher", tmp_path / "out", [1], mixer=mixer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_tokenizer_template_and_generation_config_travel(tmp_path):
    teacher = tiny_teacher("qwen2")
    teacher.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=[3, 4])
    save_checkpoint(teacher, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "out", [1])
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("teacher", "out"))
    message = [{"role": "user", "content": "7+5 mod 10 · π"}]
    assert after.chat_template == before.chat_template
    assert after.apply_chat_template(message) == before.apply_chat_template(message)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (config.temperature, config.top_p, config.eos_token_id) == (0.6, 0.95, [3, 4])


def test_sliding_windows_are_refused(tmp_path):
    teacher = tiny_teacher("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    save_checkpoint(teacher, tmp_path / "teacher")
    with pytest.raises(UserError, match="sliding-window attention"):
        convert(tmp_path / "teacher", tmp_path / "out", [1])


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2' model; supported here: llama, qwen2, qwen3"):
        convert(tmp_path, tmp_path / "out", [1])
