"""Chunks of several prompts, packed one after another: chunk j is tokens cu_seqlens[j] to cu_seqlens[j + 1]."""

from itertools import pairwise

import torch
from torch import Tensor


def chunk_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The chunk of each of `tokens` tokens, [tokens] int64, without waiting for the device."""
    return torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device), right=True) - 1


def bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """The first token of each chunk and the one after its last."""
    return list(pairwise(cu_seqlens.tolist()))


def check_chunks(op: str, cu_seqlens: Tensor, slots: Tensor, count: int, max_length: int, **tokens: Tensor) -> None:
    """Checks the values of cu_seqlens and slots against the number of slots, `count`, and one tensor of tokens.

    Raises:
        ValueError: cu_seqlens doesn't rise from 0 to the number of tokens, or a chunk is longer than max_length.
        IndexError: a slot doesn't exist.
    """
    ((name, packed),) = tokens.items()
    edges = cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != len(packed) or not all(0 <= e - s <= max_length for s, e in bounds(cu_seqlens)):
        rule = f"cu_seqlens must rise from 0 to T in steps of at most max_length = {max_length}"
        raise ValueError(f"{op}: {rule}, but is {edges}, T is {len(packed)} from {name}")
    for chunk, slot in enumerate(slots.tolist()):
        if slot >= count:
            raise IndexError(f"chunk {chunk} has slot {slot}, but there are {count} slots")
