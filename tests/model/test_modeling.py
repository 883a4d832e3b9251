"""Invariants 3 and 4: full = step by step = chunked; packed = separate; left-padded = unpadded. And the HF citizen."""

from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from m1.model import M1Config, M1ForCausalLM
from m1.model.configuration import cache_bytes

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def decode(model, tokens, cuts):
    cache = DynamicCache(config=model.config)
    pieces = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(
    "cuts",
    [list(range(38)), [0, 1, 3, 20, 37], [0, 2, 4, 37], [0, 36, 37]],
    ids=["step-by-step", "chunks", "shorter-than-conv", "prefill-one"],
)
@torch.no_grad()
def test_decoding_in_pieces_equals_full_forward(hybrid, tokens, cuts):
    torch.testing.assert_close(decode(hybrid, tokens, cuts), hybrid(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx", "both", "seq_idx and mask"])
def test_packed_equals_separate_with_gradients(hybrid, tokens, attention, told_by):
    hybrid.set_attn_implementation(attention)
    documents = [tokens[0, :11], tokens[0, 11:12], tokens[1, :25]]
    packed = torch.cat(documents)[None]
    position_ids = torch.cat([torch.arange(len(d)) for d in documents])[None]
    seq_idx = torch.cat([torch.full((len(d),), i, dtype=torch.int32) for i, d in enumerate(documents)])[None]
    arguments = {
        "position_ids": {"position_ids": position_ids},
        "seq_idx": {"seq_idx": seq_idx},
        "both": {"seq_idx": seq_idx, "position_ids": position_ids},
        "seq_idx and mask": {"seq_idx": seq_idx, "attention_mask": torch.ones_like(packed)},
    }[told_by]
    together = hybrid(packed, **arguments).logits
    apart = torch.cat([hybrid(d[None]).logits for d in documents], dim=1)
    torch.testing.assert_close(together, apart, **TOLERANCE)
    gradients = []
    for logits in (together, apart):
        hybrid.zero_grad()
        logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in hybrid.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@torch.no_grad()
def test_left_padded_equals_unpadded(hybrid, tokens):
    lengths = [37, 21]
    padded = torch.zeros(2, 37, dtype=torch.long)
    mask = torch.zeros(2, 37, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 37 - length :] = tokens[row, :length]
        mask[row, 37 - length :] = 1
    logits = hybrid(padded, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = hybrid(tokens[row : row + 1, :length]).logits
        torch.testing.assert_close(logits[row : row + 1, 37 - length :], alone, **TOLERANCE)


@torch.no_grad()
def test_right_padded_equals_unpadded(hybrid, tokens):
    mask = torch.ones_like(tokens)
    mask[0, 20:] = 0
    logits = hybrid(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1, :20], hybrid(tokens[:1, :20]).logits, **TOLERANCE)


@torch.no_grad()
def test_chunked_prefill_of_a_left_padded_batch(hybrid, tokens):
    """A row whose first chunk is all padding must start its state in the second."""
    mask = torch.ones_like(tokens)
    mask[0, :22] = 0
    cache = DynamicCache(config=hybrid.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for a, b in ((0, 15), (15, 37)):
        logits = hybrid(
            tokens[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache
        ).logits
    torch.testing.assert_close(logits[0, 7:], hybrid(tokens[:1, 22:]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generate_with_left_padding(hybrid, tokens, options):
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens[:1, :10]], dim=1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 10, dtype=torch.long)], dim=1)
    alone = hybrid.generate(tokens[:1, :10], attention_mask=torch.ones(1, 10, dtype=torch.long), **arguments)
    together = hybrid.generate(padded, attention_mask=mask, **arguments)
    assert torch.equal(together[:, 16:], alone[:, 10:])


@torch.no_grad()
def test_greedy_generate_follows_the_full_forward(hybrid, tokens):
    out = hybrid.generate(tokens[:1, :5], max_new_tokens=15, do_sample=False, eos_token_id=None)
    assert torch.equal(hybrid(out[:, :-1]).logits[0, 4:].argmax(-1), out[0, 5:])


def test_auto_class_round_trip(hybrid, tokens, tmp_path):
    hybrid.save_pretrained(tmp_path, max_shard_size="200KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, M1ForCausalLM)
    assert torch.equal(loaded(tokens).logits, hybrid(tokens).logits)


def test_conversion_carries_the_tokenizer(hybrid_dir):
    tokenizer = AutoTokenizer.from_pretrained(hybrid_dir)
    text = "7+5*3 mod 10 · π ≈ 3.14159 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert [tokenizer.decode(t) for t, m in zip(ids["input_ids"], ids["assistant_masks"], strict=True) if m] == [
        "b",
        "<|end|>",
    ]


def test_gradient_checkpointing_changes_nothing(hybrid, tokens):
    hybrid.train()
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            hybrid.gradient_checkpointing_enable()
        hybrid.zero_grad()
        loss = hybrid(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in hybrid.parameters()])
    assert losses[0] == losses[1]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_cache_bytes_is_what_the_cache_holds(hybrid, tokens):
    cache = DynamicCache(config=hybrid.config)
    hybrid(tokens[:1], past_key_values=cache)
    held = 0
    for layer in cache.layers:
        states = (
            [layer.keys, layer.values] if hasattr(layer, "keys") else [layer.conv_states[0], layer.recurrent_states[0]]
        )
        held += sum(t.numel() * t.element_size() for t in states)
    assert held == cache_bytes(hybrid.config, 37, 4)


def test_head_dim_must_be_a_multiple_of_the_state_size():
    with pytest.raises(StrictDataclassError, match=r"head_dim \(24\) must be a multiple of state_size \(16\)"):
        M1Config(hidden_size=96, num_attention_heads=4, num_hidden_layers=1)
