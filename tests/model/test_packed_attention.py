"""Packed rows without a mask tensor: the results of "sdpa", for hybrids and for transformers' own models."""

import pytest
import torch
from tolerance import assert_rms_close, gradients_of
from transformers import AutoModelForCausalLM

from m1.model import packed_attention
from m1.model.packed_attention import PACKED, attend_without_mask
from m1.ops import varlen_attention

LENGTHS = (11, 1, 25)
EDGES = torch.tensor([0, 11, 12, 37], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.fixture
def edges(monkeypatch):
    """The edges of documents that the attention layers got."""
    found = []

    def spy(query, key, value, cu_seqlens, *rest):
        found.append(cu_seqlens.tolist())
        return varlen_attention(query, key, value, cu_seqlens, *rest)

    monkeypatch.setattr(packed_attention, "varlen_attention", spy)
    return found


def results(model, attention, tokens, **arguments):
    model.set_attn_implementation(attention)
    logits = model(tokens, use_cache=False, **arguments).logits
    return [logits, *gradients_of(model, logits)]


@pytest.mark.parametrize("known", [False, True], ids=["edges computed", "edges given"])
def test_packed_hybrid_equals_masked(hybrid, tokens, edges, known):
    arguments = {"position_ids": POSITIONS}
    if known:  # as in TRL's batches
        arguments |= {"seq_idx": (torch.arange(37) >= 11).int()[None] + (torch.arange(37) >= 12).int()[None]}
        arguments |= {"cu_seq_lens_q": EDGES, "max_length_q": 25}
    masked = results(hybrid, "sdpa", tokens[:1], **arguments)
    assert not edges
    assert_rms_close(results(hybrid, PACKED, tokens[:1], **arguments), masked, 1e-4)
    assert edges == 2 * [EDGES.tolist()]


def test_packed_teacher_equals_masked(teacher_dir, tokens, edges):
    """A model of transformers finds the edges in its positions; several rows have edges of their own."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    positions = torch.cat([POSITIONS, torch.arange(37)[None]])
    masked = results(teacher, "sdpa", tokens, position_ids=positions)
    assert_rms_close(results(teacher, PACKED, tokens, position_ids=positions), masked, 1e-4)
    assert edges == 4 * [[0, 11, 12, 37, 74]]


@pytest.mark.parametrize("padded", [False, True])
def test_other_rows_are_left_to_sdpa(hybrid, tokens, edges, padded):
    arguments = {"attention_mask": (torch.arange(37) >= torch.tensor([[9], [0]])).long()} if padded else {}
    plain = results(hybrid, "sdpa", tokens, **arguments)
    for ours, expected in zip(results(hybrid, PACKED, tokens, **arguments), plain, strict=True):
        assert torch.equal(ours, expected)
    assert not edges


def test_padding_in_packed_rows(hybrid, tokens, edges):
    """Padding is a document of its own, whatever edges the batch names."""
    arguments = {
        "seq_idx": (torch.arange(37) >= 11).int()[None],
        "attention_mask": (torch.arange(37) < 30).long()[None],
    }
    arguments |= {"cu_seq_lens_q": torch.tensor([0, 11, 37]), "max_length_q": 26}
    masked = results(hybrid, "sdpa", tokens[:1], **arguments)
    assert_rms_close(results(hybrid, PACKED, tokens[:1], **arguments), masked, 1e-4)
    assert edges == 2 * [[0, 11, 30, 37]]


def test_sliding_windows_keep_their_mask(teacher_dir, tokens, edges):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=261, num_key_value_heads=2, sliding_window=5, **sizes))
    masked = results(model, "sdpa", tokens[:1], position_ids=POSITIONS)
    assert_rms_close(results(model, PACKED, tokens[:1], position_ids=POSITIONS), masked, 1e-6)
    assert not edges


def test_chosen_for_training_unless_there_is_dropout(hybrid):
    hybrid.set_attn_implementation("eager")
    attend_without_mask(hybrid)
    assert hybrid.config._attn_implementation == "eager"
    hybrid.set_attn_implementation("sdpa")
    hybrid.config.attention_dropout = 0.1
    attend_without_mask(hybrid)
    assert hybrid.config._attn_implementation == "sdpa"
    hybrid.config.attention_dropout = 0.0
    attend_without_mask(hybrid)
    assert hybrid.config._attn_implementation == PACKED
    assert "attn" not in str(hybrid.config.to_dict().keys() & {"_attn_implementation", "attn_implementation"})
