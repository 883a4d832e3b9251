"""Invariants 4 and 11: padding changes nothing, wherever it is; a mask that Mamba layers can't follow is refused."""

import pytest
import torch
from tolerance import assert_rms_close, gradients_of
from transformers import DynamicCache, StaticCache

VARIANTS = ["llama-mamba", "qwen3-mamba-attention", "qwen2-mamba2", "qwen3-mamba2"]
pytestmark = pytest.mark.parametrize("variant_dir", VARIANTS, indirect=True)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=256),
}


def test_left_padded_equals_unpadded_with_gradients(hybrid, tokens):
    lengths = [37, 21, 2]
    tokens = torch.cat([tokens, tokens[:1].flip(1)])
    padded = torch.zeros(3, 37, dtype=torch.long)
    mask = torch.zeros(3, 37, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 37 - length :] = tokens[row, :length]
        mask[row, 37 - length :] = 1
    logits = hybrid(padded, attention_mask=mask).logits
    together = [logits[row, 37 - length :] for row, length in enumerate(lengths)]
    alone = [hybrid(tokens[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert_rms_close(gradients_of(hybrid, together), gradients_of(hybrid, alone), 1e-4)


def scattered(tokens, width, real_share):
    """The rows of `tokens`, each with as much padding at random places as makes it `width` wide, and the mask."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(len(tokens), width, dtype=torch.long)
    padded = torch.full_like(mask, 7)  # padding isn't token 0 only
    for row, count in enumerate(real_share):
        places = torch.randperm(width, generator=generator)[:count].sort().values
        mask[row, places] = 1
        padded[row, places] = tokens[row, :count]
    return padded, mask


def real_tokens(logits, mask):
    return [rows[real.bool()] for rows, real in zip(logits, mask, strict=True)]


def test_scattered_padding_with_gradients(hybrid, tokens):
    """Left, right and in the middle at once; positions that aren't given count real tokens."""
    padded, mask = scattered(tokens, 60, (37, 20))
    together = real_tokens(hybrid(padded, attention_mask=mask).logits, mask)
    alone = [hybrid(tokens[row : row + 1, :count]).logits[0] for row, count in enumerate((37, 20))]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert_rms_close(gradients_of(hybrid, together), gradients_of(hybrid, alone), 1e-4)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("sizes", [[60], [1] * 60, [5, 1, 2, 30, 1, 3, 18]], ids=["whole", "one-by-one", "chunks"])
@torch.no_grad()
def test_padding_in_chunks_of_a_cache(hybrid, tokens, cache, sizes):
    """Between the real tokens of two chunks, on the right of a prompt, in a chunk or a step of padding only."""
    padded, mask = scattered(tokens, 60, (37, 20))
    cache, logits, end = cache(hybrid.config), [], 0
    for size in sizes:
        start, end = end, end + size
        chunk = {"attention_mask": mask[:, :end], "past_key_values": cache}
        logits.append(hybrid(padded[:, start:end], **chunk).logits)
    logits = torch.cat(logits, dim=1)
    assert logits.isfinite().all()
    for row, ours in enumerate(real_tokens(logits, mask)):
        torch.testing.assert_close(ours, hybrid(tokens[row : row + 1, : len(ours)]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_generation_continues_a_right_padded_prompt(hybrid, tokens, cache):
    """The cache of a right-padded batch, then one more token per row and `generate`."""
    mask = torch.ones_like(tokens)
    mask[0, 20:] = 0
    mask[1, 36:] = 0
    cache = cache(hybrid.config)
    hybrid(tokens, attention_mask=mask, past_key_values=cache)
    following = torch.cat([tokens, torch.tensor([[5], [6]])], dim=1)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = hybrid.generate(following, attention_mask=mask, past_key_values=cache, **options)
    for row in range(2):
        alone = following[row][mask[row].bool()][None]
        expected = hybrid.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[row, 38:], expected[0, alone.shape[1] :])


@torch.no_grad()
def test_padding_of_packed_rows_is_a_document_of_its_own(hybrid, tokens):
    """On both sides of a document that padding shares its number with."""
    seq_idx = (torch.arange(37) >= 20).long().expand(2, -1)
    mask = torch.ones_like(tokens)
    mask[:, :4] = mask[:, 17:23] = mask[:, 35:] = 0
    logits = hybrid(tokens, attention_mask=mask, seq_idx=seq_idx).logits
    for document in (slice(4, 17), slice(23, 35)):
        torch.testing.assert_close(logits[:, document], hybrid(tokens[:, document]).logits, **TOLERANCE)


def test_masks_that_are_refused(hybrid, tokens):
    causal = torch.ones(2, 1, 37, 37, dtype=torch.bool).tril()
    cache = DynamicCache(config=hybrid.config)
    for mask in (causal, causal.float(), causal[:, 0]):
        with pytest.raises(ValueError, match=r"attention_mask has shape \[2, .*37, 37\], .* seq_idx"):
            hybrid(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="has 36 columns, for 0 cached and 37 new tokens"):
        hybrid(tokens, attention_mask=torch.ones(2, 36))
    hybrid(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="has 37 columns, for 37 cached and 37 new tokens"):
        hybrid(tokens, attention_mask=torch.ones(2, 37), past_key_values=cache)
