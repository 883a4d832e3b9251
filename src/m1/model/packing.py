"""Prepares documents, positions, cache and masks before the first layer, so that packed and padded rows are exact."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import create_causal_mask

from m1.model.configuration import ATTENTION, MAMBA, M1Config
from m1.model.packed_attention import PACKED, Documents

Masks = dict[str, Tensor | None]  # by layer type, as transformers' `generate` makes them for static caches


class Padding(NamedTuple):
    """Which tokens of a batch are padding. Mamba layers put every row's real tokens in front, and padding behind them.

    So the convolution never reads padding, and the states after a row are those after its last real token, wherever
    the padding is.

    Attributes:
        real: [b, T] bool, False at padding, after `compact`.
        order: [b, T], where each token of the compacted rows comes from.
        places: [b, T], where each token of the original rows goes.
        slots: [b], the row's own number, or -1 for a row of padding only, which a decode step skips.
    """

    real: Tensor
    order: Tensor
    places: Tensor
    slots: Tensor

    @classmethod
    def of(cls, real: Tensor) -> "Padding":
        """From a bool mask [b, T], False at padding."""
        lengths = real.sum(dim=1, keepdim=True)
        places = torch.where(real, real.cumsum(1) - 1, lengths + (~real).cumsum(1) - 1)
        rows, index = (torch.arange(size, device=real.device) for size in real.shape)
        return cls(index < lengths, places.argsort(dim=1), places, torch.where(lengths[:, 0] > 0, rows, -1))

    def compact(self, t: Tensor) -> Tensor:
        """[b, T, H] -> [b, T, H], each row's real tokens in front."""
        return t.gather(1, self.order.unsqueeze(-1).expand_as(t))

    def restore(self, t: Tensor) -> Tensor:
        """[b, T, H] -> [b, T, H], the inverse of `compact`."""
        return t.gather(1, self.places.unsqueeze(-1).expand_as(t))


class Packing(NamedTuple):
    """What every layer needs to know about its batch.

    Attributes:
        seq_idx: [b, T] integers, the document of each token; None unless rows are packed.
        position_ids: [b or 1, T], each token's position in its document.
        cache: the cache to continue and update, or None.
        attention_mask: the attention layers' mask, made by transformers, or `Documents`.
        padding: the Mamba layers' padding; None without any, and in packed rows.
    """

    seq_idx: Tensor | None
    position_ids: Tensor
    cache: Cache | None
    attention_mask: Any
    padding: Padding | None


def prepare(
    config: M1Config,
    embeds: Tensor,
    attention_mask: Tensor | Masks | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    seq_idx: Tensor | None,
    use_cache: bool,
    documents: Documents | None = None,
) -> Packing:
    """Fills in what the caller of `M1Model` left out: documents, positions, cache and masks.

    Packing is detected from `seq_idx` or from `position_ids` that restart; one is computed from the other. As in
    transformers, positions show packing only without a cache and without `attention_mask`. A 2D `attention_mask` over
    cache and input marks padding, which is exact wherever it is: left, right, or between two chunks of a cache.
    Positions that aren't given count real tokens only. In packed rows, padding is a document of its own.

    Args:
        embeds: [b, T, H] input embeddings.
        attention_mask: 2D, zero at padding; or the masks by layer type, which are used as they are.
        use_cache: makes a cache if none is given and the rows aren't packed.
        documents: those of packed rows, if known: `packed_attention` needs them, and finding them waits for the device.

    Raises:
        ValueError: `seq_idx` with a cache, more than one packed row with flash attention, a mask that isn't 2D or isn't
            as long as cache and input, a cache of other layers, or one that is to be rolled back.
    """
    T = embeds.shape[1]
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
    check_cache(config, cache)
    seen = cache.get_seq_length() if cache is not None and config.attention_layers else 0
    if isinstance(attention_mask, dict):  # already made by `generate`
        real: Tensor | None = attention_mask.get(MAMBA)
        visible: Any = attention_mask.get(ATTENTION)
    else:
        check_mask(config, attention_mask, T, seen, cache)
        real = visible = attention_mask
    if MAMBA not in config.layer_types and seq_idx is None:
        real = None  # then masks and positions mean what they mean for any transformer
    restarting = None
    if seq_idx is not None:
        if real is not None:
            seq_idx = torch.where(real.bool(), seq_idx, seq_idx.min() - 1)
        # transformers detects packing from positions that restart, and only without a 2D mask
        restarting, real, visible = positions_of(seq_idx), None, None
    if position_ids is None and restarting is not None:
        position_ids = restarting
    elif position_ids is None and real is not None:
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
    elif position_ids is None:
        position_ids = (torch.arange(T, device=embeds.device) + seen).unsqueeze(0)
    if config._attn_implementation == PACKED and documents and restarting is not None and attention_mask is None:
        visible = documents
    elif config.attention_layers and not isinstance(attention_mask, dict):
        positions = position_ids if restarting is None else restarting
        visible = create_causal_mask(config, embeds, visible, cache, positions)
    return Packing(seq_idx, position_ids, cache, visible, padding_of(real, T))


def check_cache(config: M1Config, cache: Cache | None) -> None:
    """Raises ValueError for a cache of other layers, or one that records its past to remove tokens later."""
    if cache is None or MAMBA not in config.layer_types:
        return
    mamba_layers = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers]
    if mamba_layers != [kind == MAMBA for kind in config.layer_types]:
        raise ValueError("this cache doesn't have the model's layers: make it with config=model.config")
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise ValueError(
            "this cache records its past to be rolled back, which Mamba layers can't be: generate without prompt "
            "lookup and assistant models, and keep a copy.deepcopy of the cache in place of Cache.crop"
        )


def check_mask(config: M1Config, mask: Any, T: int, seen: int | Tensor, cache: Cache | None) -> None:
    """Raises ValueError for a mask that isn't 2D, or isn't as long as the tokens `seen` by the cache and the T of now.

    Static caches, and caches without an attention layer, can't tell how many tokens they have seen.
    """
    if mask is None or MAMBA not in config.layer_types:
        return
    if len(mask.shape) != 2:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, but Mamba layers can follow a 2D mask only: mark padding "
            "with a 2D mask, and packed documents with seq_idx or with position_ids that restart"
        )
    if isinstance(seen, int) and (cache is None or config.attention_layers) and mask.shape[1] != seen + T:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, for {seen} cached and {T} new tokens: give one for each"
        )


def padding_of(mask: Tensor | None, T: int) -> Padding | None:
    """The padding of the last T tokens, from a 2D mask that is zero at padding; None if there is none.

    Whether a mask has padding at all is read from several tokens only, and not while compiling: for a single token it
    would cost a synchronisation per decode step.
    """
    if mask is None:
        return None
    real = mask[:, -T:].bool()
    if T > 1 and not torch.compiler.is_compiling() and real.all():
        return None
    return Padding.of(real)


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
