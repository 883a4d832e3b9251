"""Which Mamba layers share a page of vLLM's cache.

vLLM manages pages for groups of equally many layers, and a group costs time for each sequence at each step. Of four
layers one is attention, so the Mamba layers would be three groups. Sharing pages makes them one.
"""

import math

import torch

from m1.model.cache_layout import Buffer, MambaState
from m1.model.configuration import MAMBA, M1Config

ALIGNMENT = 16  # bytes
LIKE = 1.5  # vLLM puts layers of one kind into one group if they are fewer than this many times the other kind's
# Attention's blocks are as large as the pages. With longer ones, in tokens, less of a prompt would be found in the
# prefix cache.
LONGEST_BLOCK = 512


def aligned_bytes(buffer: Buffer) -> int:
    """Bytes of a buffer in a page."""
    return -(-math.prod(buffer.shape) * buffer.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def shared_pages(config: M1Config, layout: MambaState[Buffer], dtype: torch.dtype) -> list[list[int]]:
    """The Mamba layers that share pages: as many kinds of pages as attention layers, or a multiple of that.

    Args:
        config: of a model, or of a rank's share.
        layout: what a Mamba layer keeps of a sequence.
        dtype: of keys and values.
    """
    mamba = [i for i, kind in enumerate(config.layer_types) if kind == MAMBA]
    attention = len(config.layer_types) - len(mamba)
    pages = len(mamba)
    if 0 < LIKE * attention <= len(mamba):
        token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
        most = max(1, LONGEST_BLOCK * token // sum(map(aligned_bytes, layout)))
        pages = min(pages, attention * math.ceil(len(mamba) / (attention * most)))
    return [mamba[i * len(mamba) // pages : (i + 1) * len(mamba) // pages] for i in range(pages)]
