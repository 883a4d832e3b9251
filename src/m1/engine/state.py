"""Slots: where sequences keep what their layers remember. A slot is the same row of every layer's buffers.

model/cache_layout.py declares the buffers. On a CPU unwritten memory costs nothing.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from m1.model.cache_layout import AttentionCache, MambaState, layer_layout, slot_bytes
from m1.model.configuration import layer_kinds

SHARE = {"cuda": 0.9}  # of the free memory, for slots; 0.8 elsewhere

LayerState = AttentionCache[Tensor] | MambaState[Tensor]
Snapshot = list[LayerState]  # one sequence's, layer by layer


class Slots:
    """Buffers of `count` slots of `capacity` tokens each. One extra slot, `spare`, pads CUDA-graph batches."""

    def __init__(self, config: PreTrainedConfig, count: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.spare = count
        self.layers: list[LayerState] = []
        for kind in layer_kinds(config):
            layout: Any = layer_layout(config, kind, capacity, dtype)
            buffers = (torch.empty(count + 1, *buffer.shape, dtype=buffer.dtype, device=device) for buffer in layout)
            self.layers.append(type(layout)(*buffers))

    def clear(self, slot: int) -> None:
        """Empties a slot: Mamba states are zero, stale keys are never read."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.conv[slot].zero_()
                layer.ssm[slot].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies what a sequence of `length` tokens has in one slot into another."""
        self.restore(target, length, [used(layer, source, length) for layer in self.layers])

    def snapshot(self, slot: int, length: int) -> Snapshot:
        """A copy of what a sequence of `length` tokens has in the slot."""
        return [type(layer)(*(t.clone() for t in used(layer, slot, length))) for layer in self.layers]

    def restore(self, slot: int, length: int, snapshot: Snapshot) -> None:
        for layer, saved in zip(self.layers, snapshot, strict=True):
            for buffer, copy in zip(used(layer, slot, length), saved, strict=True):
                buffer.copy_(copy)


def used(layer: LayerState, slot: int, length: int) -> LayerState:
    """Views of what a sequence of `length` tokens has in a slot of a layer."""
    if isinstance(layer, AttentionCache):
        return AttentionCache(layer.keys[slot, :, :length], layer.values[slot, :, :length])
    return MambaState(layer.conv[slot], layer.ssm[slot])


def slots_that_fit(config: PreTrainedConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many slots the free memory holds, less a share that is left for computing; at least 1."""
    room = int(SHARE.get(device.type, 0.8) * free_memory(device))
    return max(1, room // slot_bytes(config, capacity, dtype) - 1)


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
