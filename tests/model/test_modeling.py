"""Invariants 3 and 4: full = step by step = chunked; packed = separate, with gradients. Padding: test_padding.py."""

from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tolerance import assert_rms_close, gradients_of
from transformers import DynamicCache

from m1.model import M1Config
from m1.model.cache_layout import slot_bytes
from m1.ops import selective_scan

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
    torch.testing.assert_close(decode(hybrid, tokens, cuts), hybrid(tokens).logits, rtol=0, atol=1e-4)


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
    assert_rms_close(gradients_of(hybrid, together), gradients_of(hybrid, apart), 1e-4)


@torch.no_grad()
def test_positions_of_one_row_pack_the_whole_batch(hybrid, tokens):
    """position_ids [1, T], as transformers' own callers pass them."""
    positions = torch.cat([torch.arange(20), torch.arange(17)])[None]
    together = hybrid(tokens, position_ids=positions).logits
    apart = torch.cat([hybrid(tokens[:, :20]).logits, hybrid(tokens[:, 20:]).logits], dim=1)
    torch.testing.assert_close(together, apart, **TOLERANCE)


def test_what_packing_excludes(hybrid, tokens):
    seq_idx = torch.zeros_like(tokens)
    with pytest.raises(ValueError, match="a cache can't continue"):
        hybrid(tokens, seq_idx=seq_idx, past_key_values=DynamicCache(config=hybrid.config))
    hybrid.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="batches of one"):
        hybrid(tokens, seq_idx=seq_idx)


def test_slot_bytes_is_what_the_cache_holds(hybrid, tokens):
    cache = DynamicCache(config=hybrid.config)
    hybrid(tokens[:1], past_key_values=cache)
    held = 0
    for layer in cache.layers:
        states = (
            [layer.keys, layer.values] if hasattr(layer, "keys") else [layer.conv_states[0], layer.recurrent_states[0]]
        )
        held += sum(t.numel() * t.element_size() for t in states)
    assert held == slot_bytes(hybrid.config, 37, torch.float32)


def test_head_dim_must_be_a_multiple_of_the_state_size():
    with pytest.raises(StrictDataclassError, match=r"head_dim \(24\) must be a multiple of state_size \(16\)"):
        M1Config(hidden_size=96, num_attention_heads=4, num_hidden_layers=1)


@pytest.mark.parametrize("variant_dir", ["qwen3-mamba", "qwen3-mamba-attention"], indirect=True)
def test_autocast_leaves_the_scan_in_bfloat16(hybrid, tokens, monkeypatch):
    """QK-norm's float32 gains would make B and C, and with them all of the scan, float32."""
    seen = set()

    def spy(z, x, B, C, dt, *rest):
        seen.update(t.dtype for t in (z, x, B, C, dt))
        return selective_scan(z, x, B, C, dt, *rest)

    monkeypatch.setattr("m1.model.mamba.selective_scan", spy)
    with torch.autocast("cpu", torch.bfloat16):
        hybrid(tokens, use_cache=False)
    assert seen == {torch.bfloat16}
