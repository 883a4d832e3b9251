"""Slots: the memory of running sequences. A slot is the same row in the buffers of every layer.

model/cache_layout.py declares the buffers. On a CPU, memory is used only once it is written.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from m1.model.cache_layout import AttentionCache, MambaState, layer_layout, slot_bytes
from m1.model.configuration import layer_kinds

SHARE = {"cuda": 0.9}  # share of the free memory used for slots; 0.8 on other devices

LayerState = AttentionCache[Tensor] | MambaState[Tensor]
Snapshot = list[LayerState]  # of one sequence: one state per layer


class Slots:
    """Caches of all running sequences: keys and values of attention layers, states of Mamba layers.

    One sequence lives in one slot. One extra slot, `spare`, pads CUDA-graph batches.

    Args:
        config: of an M1 model or a transformer.
        count: number of slots, without the spare one.
        capacity: maximum number of tokens in a slot.
        dtype: of the buffers, except for recurrent states, which are float32.

    Attributes:
        layers: per layer, an `AttentionCache` or `MambaState` of buffers [count + 1, ...].
        spare: index of the extra slot.
    """

    def __init__(self, config: PreTrainedConfig, count: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.spare = count
        self.layers: list[LayerState] = []
        for kind in layer_kinds(config):
            layout: Any = layer_layout(config, kind, capacity, dtype)
            buffers = (torch.empty(count + 1, *buffer.shape, dtype=buffer.dtype, device=device) for buffer in layout)
            self.layers.append(type(layout)(*buffers))

    def clear(self, slot: int) -> None:
        """Empties a slot: zeroes its Mamba states. Stale keys stay, since they are never read."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.conv[slot].zero_()
                layer.ssm[slot].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the state of a sequence of `length` tokens from one slot to another."""
        self.restore(target, length, [used(layer, source, length) for layer in self.layers])

    def snapshot(self, slot: int, length: int) -> Snapshot:
        """Returns a copy of the slot's state after `length` tokens."""
        return [type(layer)(*(t.clone() for t in used(layer, slot, length))) for layer in self.layers]

    def restore(self, slot: int, length: int, snapshot: Snapshot) -> None:
        """Writes a snapshot, taken after `length` tokens, into a slot."""
        for layer, saved in zip(self.layers, snapshot, strict=True):
            for buffer, copy in zip(used(layer, slot, length), saved, strict=True):
                buffer.copy_(copy)


def used(layer: LayerState, slot: int, length: int) -> LayerState:
    """Views of the part of a layer's slot that a sequence of `length` tokens uses."""
    if isinstance(layer, AttentionCache):
        return AttentionCache(layer.keys[slot, :, :length], layer.values[slot, :, :length])
    return MambaState(layer.conv[slot], layer.ssm[slot])


def slots_that_fit(config: PreTrainedConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many slots fit into `SHARE` of the free memory, besides the spare one; at least 1."""
    room = int(SHARE.get(device.type, 0.8) * free_memory(device))
    return max(1, room // slot_bytes(config, capacity, dtype) - 1)


def free_memory(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
