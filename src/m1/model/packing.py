"""Prepares documents, positions, cache and masks before the first layer, so that packed and padded rows are exact."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from m1.model.configuration import ATTENTION, MAMBA, M1Config

Masks = dict[str, Tensor | None]  # by layer type, made by transformers' functions


class Packing(NamedTuple):
    """What every layer needs to know about its batch.

    Attributes:
        seq_idx: [b, T] integers, the document of each token; None unless rows are packed.
        position_ids: [b or 1, T], each token's position in its document.
        past_key_values: the cache to continue and update, or None.
        masks: the attention mask and the Mamba layers' padding mask, by layer type.
    """

    seq_idx: Tensor | None
    position_ids: Tensor
    past_key_values: Cache | None
    masks: Masks


def prepare(
    config: M1Config,
    embeds: Tensor,
    attention_mask: Tensor | Masks | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    seq_idx: Tensor | None,
    use_cache: bool,
) -> Packing:
    """Fills in what the caller of `M1Model` left out: documents, positions, cache and masks.

    Packing is detected from `seq_idx` or from `position_ids` that restart; one is computed from the other. As in
    transformers, positions show packing only without a cache and without `attention_mask`. A 2D `attention_mask` over
    cache and input marks padding. Padding on the left is exact, also in generation.

    Args:
        embeds: [b, T, H] input embeddings.
        attention_mask: 2D, zero at padding; or the masks by layer type, which are used as they are.
        use_cache: makes a cache if none is given and the rows aren't packed.

    Raises:
        ValueError: `seq_idx` with a cache, or more than one packed row with flash attention.
    """
    if seq_idx is None and position_ids is not None and attention_mask is None and cache is None:
        # a compiled graph can't depend on the positions' values, so it treats a single document as packed, too
        always = torch.compiler.is_compiling() and not use_cache
        seq_idx = documents_of(position_ids.expand(embeds.shape[:2]), always)
    if seq_idx is not None and cache is not None:
        raise ValueError("seq_idx marks packed rows, which a cache can't continue: give one of the two")
    flash = "flash" in (config._attn_implementation or "")
    if flash and seq_idx is not None and len(seq_idx) > 1 and not torch.compiler.is_compiling():
        raise ValueError("flash attention takes packed rows in batches of one: flatten the batch into one row")
    if use_cache and cache is None and seq_idx is None:  # packed rows are never continued
        cache = DynamicCache(config=config)
    restarting = None if seq_idx is None else positions_of(seq_idx)
    if position_ids is None and seq_idx is not None:
        position_ids = restarting
    elif position_ids is None:
        seen = cache.get_seq_length() if cache is not None and config.attention_layers else 0
        position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen).unsqueeze(0)
    if isinstance(attention_mask, dict):  # already made by `generate`
        return Packing(seq_idx, position_ids, cache, attention_mask)
    arguments = {"config": config, "inputs_embeds": embeds, "past_key_values": cache}
    masks = {MAMBA: create_recurrent_attention_mask(attention_mask=attention_mask, **arguments)}
    if config.attention_layers:
        # transformers detects packing from positions that restart, and only without a 2D mask. Packed rows don't need
        # that mask: their padding comes after the documents, and no real token attends to it.
        visible, positions = (attention_mask, position_ids) if seq_idx is None else (None, restarting)
        masks[ATTENTION] = create_causal_mask(attention_mask=visible, position_ids=positions, **arguments)
    return Packing(seq_idx, position_ids, cache, masks)


def documents_of(position_ids: Tensor, always: bool = False) -> Tensor | None:
    """[b, T] document numbers of packed rows. A document begins where a position isn't the previous one plus 1.

    None if every row is a single document, unless `always`.
    """
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts.cumsum(dim=1) if always or starts.any() else None


def positions_of(seq_idx: Tensor) -> Tensor:
    """[b, T] position of each token in its document, from the document numbers [b, T]."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
