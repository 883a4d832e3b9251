"""Invariant 11: what continues, copies or rolls back a cache gives the plain result or is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from m1.model.convert import convert

pytestmark = pytest.mark.parametrize("variant_dir", ["llama-mamba", "qwen2-mamba2"], indirect=True)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def teacher(teacher_dir):
    return AutoModelForCausalLM.from_pretrained(teacher_dir).eval()


@pytest.mark.parametrize("lookup", [2, 3, 8])
def test_prompt_lookup_is_refused(hybrid, tokens, lookup):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hybrid.generate(tokens[:1], prompt_lookup_num_tokens=lookup, **GREEDY)


def test_assistants_are_refused(hybrid, teacher, tokens):
    """A model that helps M1, M1 that helps itself or a transformer, and its own first layers."""
    for options in ({"assistant_model": teacher}, {"assistant_model": hybrid}, {"assistant_early_exit": 2}):
        with pytest.raises(ValueError, match="stateful models"):
            hybrid.generate(tokens[:1], **GREEDY, **options)
    assert hybrid.config.num_hidden_layers == len(hybrid.model.layers)
    with pytest.raises(ValueError, match="records its past to be rolled back, which Mamba layers can't"):
        teacher.generate(tokens[:1], assistant_model=hybrid, **GREEDY)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "teacher"}])
def test_without_mamba_layers_they_are_right(hybrid, teacher, teacher_dir, tmp_path, tokens, options):
    """A model whose layers are all attention rolls back, as its teacher does."""
    whole = convert(teacher_dir, tmp_path / "whole", [0, 1, 2, 3])
    options = {name: teacher if value == "teacher" else value for name, value in options.items()}
    expected = teacher.generate(tokens[:1], **GREEDY)
    assert torch.equal(whole.generate(tokens[:1], **GREEDY, **options), expected)


@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=99)])
def test_cropping_is_refused(hybrid, tokens, kind):
    cache = kind(config=hybrid.config)
    hybrid(tokens, past_key_values=cache)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-3)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"copy\.deepcopy of the cache in place of Cache\.crop"):
        hybrid(tokens[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_copy_rolls_back(hybrid, tokens):
    """What the message of a refused crop advises."""
    cache = DynamicCache(config=hybrid.config)
    hybrid(tokens[:, :20], past_key_values=cache)
    kept = copy.deepcopy(cache)
    hybrid(tokens[:, :9], past_key_values=cache)
    expected = hybrid(tokens).logits[:, 20:]
    torch.testing.assert_close(hybrid(tokens[:, 20:], past_key_values=kept).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [None, "teacher"])
def test_a_cache_of_other_layers_is_refused(hybrid, teacher, tokens, config):
    with pytest.raises(ValueError, match=r"make it with config=model\.config"):
        hybrid(tokens, past_key_values=DynamicCache(config=teacher.config if config else None))


@torch.no_grad()
def test_a_conversation_on_one_cache(hybrid, tokens):
    """Three turns of `generate`, each with the whole conversation and the last turn's cache."""
    for cache in (DynamicCache(config=hybrid.config), StaticCache(config=hybrid.config, max_cache_len=128)):
        conversation = tokens[:1, :5]
        for turn in range(3):
            conversation = torch.cat([conversation, tokens[1:, turn * 4 : turn * 4 + 3]], dim=1)
            mask = torch.ones_like(conversation)
            expected = hybrid.generate(conversation, attention_mask=mask, **GREEDY)
            conversation = hybrid.generate(conversation, attention_mask=mask, past_key_values=cache, **GREEDY)
            assert torch.equal(conversation, expected)


@torch.no_grad()
def test_the_cache_has_either_name(hybrid, tokens):
    """`past_key_values`, and `cache` as newer transformers call it."""
    expected = hybrid(tokens).logits[:, 20:]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=hybrid.config)
        for part in (slice(20), slice(20, None)):
            logits = hybrid(tokens[:, part], **{name: cache}).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_takes_no_cache(hybrid, tokens):
    """Its second forward pass would update the cache again. Generation, which needs no gradients, works."""
    expected = hybrid.generate(tokens[:1], **GREEDY)
    hybrid.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="update the cache twice"):
        hybrid(tokens, past_key_values=DynamicCache(config=hybrid.config))
    assert torch.equal(hybrid.generate(tokens[:1], **GREEDY), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need a GPU")
def test_offloaded_cache(hybrid, tokens):
    hybrid, tokens = hybrid.cuda(), tokens[:1].cuda()
    expected = hybrid.generate(tokens, **GREEDY)
    assert torch.equal(hybrid.generate(tokens, cache_implementation="offloaded", **GREEDY), expected)
