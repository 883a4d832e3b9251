"""The memory of running sequences: states of Mamba layers in slots, keys and values of attention layers in pages.

A slot, or a page, is the same row in the buffers of every layer. model/cache_layout.py declares the buffers. Who holds
which page is decided in pages.py. On a CPU, memory is used only once it is written.
"""

import gc
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from m1.engine.plan import Copy, Placed, Swap
from m1.machine import free_host_memory
from m1.model.cache_layout import AttentionCache, MambaState, layer_bytes, layer_layout
from m1.model.configuration import ATTENTION, layer_kinds

PAGE_SIZE = 256  # tokens
SHARE = {"cuda": 0.9}  # share of the free memory used; 0.8 on other devices

LayerState = AttentionCache[Tensor] | MambaState[Tensor]


class Capacity(NamedTuple):
    """How much an engine holds at the same time.

    Attributes:
        slots: number of sequences that run.
        kept: number of states in the prefix cache, which have slots of their own.
        pages: number of pages, which both share.
        page_size: tokens per page.
        max_pages: maximum number of pages of a sequence.
    """

    slots: int
    kept: int
    pages: int
    page_size: int
    max_pages: int


class Slots:
    """Caches of all running sequences and of the prefix cache.

    One sequence has one slot, and pages for its keys and values. One more slot and one more page, `spare`, pad
    CUDA-graph batches. They are the last ones, so index -1 means them, too.

    Args:
        config: of an M1 model or a transformer.
        capacity: how many slots and pages.
        dtype: of the buffers, except for recurrent states, which are float32.

    Attributes:
        layers: per layer, a `MambaState` of buffers [slots, ...], or an `AttentionCache` of buffers
            [pages, kv_heads, page_size, head_dim].
        page_table: [slots, max_pages] int32, the pages of each slot.
        spare: index of the extra slot.
        max_length: number of tokens that a slot's pages hold at most.
    """

    def __init__(self, config: PreTrainedConfig, capacity: Capacity, dtype: torch.dtype, device: torch.device):
        self.spare = capacity.slots + capacity.kept
        self.max_length = capacity.max_pages * capacity.page_size
        self.page_table = torch.full(
            (self.spare + 1, capacity.max_pages), capacity.pages, dtype=torch.int32, device=device
        )
        self.layers: list[LayerState] = []
        for kind in layer_kinds(config):
            count = (capacity.pages if kind == ATTENTION else self.spare) + 1
            layout: Any = layer_layout(config, kind, capacity.page_size, dtype)
            buffers = (torch.empty(count, *buffer.shape, dtype=buffer.dtype, device=device) for buffer in layout)
            self.layers.append(type(layout)(*buffers))

    def place(self, placed: list[Placed]) -> None:
        """Enters new pages of slots into the page table."""
        if placed:
            slot, place, page = self._tensor(placed).unbind(1)
            self.page_table[slot, place] = page.int()

    def clear(self, slots: Tensor) -> None:
        """Empties slots: zeroes their Mamba states. Stale keys stay, since they are never read."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                for buffer in layer:
                    buffer.index_fill_(0, slots, 0)

    def copy(self, copies: list[Copy]) -> None:
        """Copies states between slots, and the pages that aren't full. The copies don't depend on each other."""
        slots = self._tensor([(copy.source, copy.target) for copy in copies if copy.source != copy.target])
        pages = self._tensor([copy.pages for copy in copies if copy.pages])
        for layer in self.layers:
            pairs = slots if isinstance(layer, MambaState) else pages
            for buffer in layer if len(pairs) else ():
                buffer.index_copy_(0, pairs[:, 1], buffer[pairs[:, 0]])

    def save(self, swap: Swap) -> list[LayerState]:
        """Returns a copy of a sequence's states and pages in the host's memory."""
        rows = [self._tensor(swap.pages if isinstance(layer, AttentionCache) else [swap.slot]) for layer in self.layers]
        return [type(layer)(*(t[i].to("cpu") for t in layer)) for layer, i in zip(self.layers, rows, strict=True)]

    def load(self, swap: Swap, saved: list[LayerState]) -> None:
        """Writes what `save` returned into the sequence's new slot and pages."""
        for layer, copies in zip(self.layers, saved, strict=True):
            rows = self._tensor(swap.pages if isinstance(layer, AttentionCache) else [swap.slot])
            for buffer, copy in zip(layer, copies, strict=True):
                buffer.index_copy_(0, rows, copy.to(buffer.device))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.page_table.device, non_blocking=True)


def capacity_for(
    config: PreTrainedConfig,
    max_num_seqs: int,
    prefix_cache: int,
    max_model_len: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Capacity:
    """The slots and pages that fit into `SHARE` of the free memory, for at most `max_num_seqs` sequences.

    Every slot has a page at least. There are pages for two sequences of the maximum length, whatever fits, since the
    `Scheduler` needs them.
    """
    of_slot, of_page, max_pages = _sizes(config, max_model_len, page_size, dtype)
    enough = 2 * max_pages + 2
    room = _room(device) - (prefix_cache + 1) * of_slot - (enough + 1) * of_page
    slots = max(1, min(max_num_seqs, room // (of_slot + of_page)))
    wanted = (slots + prefix_cache) * max_pages
    left = (room - slots * of_slot) // of_page + enough if of_page else wanted
    return Capacity(slots, prefix_cache, max(enough, min(left, wanted)), page_size, max_pages)


def _sizes(config: PreTrainedConfig, max_model_len: int, page_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of a slot, bytes of a page, and the maximum number of pages of a sequence."""
    kinds = layer_kinds(config)
    of_page = sum(layer_bytes(config, kind, page_size, dtype) for kind in kinds if kind == ATTENTION)
    of_slot = sum(layer_bytes(config, kind, page_size, dtype) for kind in kinds if kind != ATTENTION)
    return of_slot, of_page, -(-max_model_len // page_size)


def _room(device: torch.device) -> int:
    return int(SHARE.get(device.type, 0.8) * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Free memory of the device, in bytes. On a GPU, what deleted objects still hold is returned first."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()
