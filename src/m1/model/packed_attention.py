"""Attention in packed rows without a mask tensor, for any model of transformers: `attn_implementation="m1_packed"`.

A mask of T tokens has T² elements. Here the documents' edges take its place. Rows that aren't packed get the mask and
the attention of "sdpa", and so does everything that a list of edges can't say, such as sliding windows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from m1.ops import varlen_attention

PACKED = "m1_packed"


class Documents(NamedTuple):
    """The documents of packed rows, in place of an attention mask.

    Attributes:
        cu_seqlens: [documents + 1] integers: where each begins, counted through all rows, and the number of tokens.
        max_length: number of tokens of the longest document, or more.
    """

    cu_seqlens: Tensor
    max_length: int

    @classmethod
    def of(cls, starts: Tensor) -> "Documents":
        """From [b, T] bool, True at the first token of each document. Waits for the device."""
        edges = torch.cat([starts.flatten(), starts.new_ones(1)]).nonzero().flatten()
        return cls(edges.int(), int(edges.diff().max()))


def packed_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, local_size: int | None = None, use_vmap: bool = False,
    device: torch.device | str = "cpu", **options: Any,
) -> Any:  # fmt: skip
    """The `Documents` of packed rows; for others the mask of "sdpa".

    Transformers marks rows as packed by a causal mask that may not be skipped. A document begins at each token that
    doesn't see the one before.
    """
    plain = allow_is_causal_skip or attention_mask is not None or local_size or use_vmap
    if plain or q_length != kv_length or q_length == 1 or torch.compiler.is_compiling():
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, local_size=local_size,
            use_vmap=use_vmap, device=device, **options,
        )  # fmt: skip
    rows, index = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)
    sees_previous = mask_function(rows, torch.zeros_like(rows), index, (index - 1).clamp(min=0))
    return Documents.of(~sees_previous.expand(batch_size, -1) | (index == 0))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of queries [b, heads, T, d] over keys and values [b, kv_heads, T, d]: [b, T, heads, d].

    Args:
        attention_mask: `Documents`, or a mask of "sdpa".

    Raises:
        ValueError: dropout in packed rows.
    """
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if dropout:
        raise ValueError(f"attention_dropout={dropout} isn't supported in packed rows: use attn_implementation='sdpa'")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    rows = query.shape[0], query.shape[2]
    query, key, value = (t.to(dtype).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return varlen_attention(query, key, value, *attention_mask, scaling).unflatten(0, rows), None


def attend_without_mask(model: PreTrainedModel) -> None:
    """Chooses this attention for a model that has "sdpa", unless it has dropout. It changes packed rows only."""
    if model.config._attn_implementation == "sdpa" and not getattr(model.config, "attention_dropout", 0):
        model.set_attn_implementation(PACKED)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
