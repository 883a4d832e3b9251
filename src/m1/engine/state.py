"""Slots: where sequences keep what their layers remember. A slot is the same row of every layer's buffers.

Attention keeps [slots, kv_heads, capacity, head_dim] keys and values, of which a sequence's length is in use; a Mamba
layer the last inputs of its convolution and a float32 state, of fixed size. On a CPU unwritten memory costs nothing.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from m1.model.cache_layout import slot_bytes
from m1.model.configuration import ATTENTION, layer_kinds

SHARE = {"cuda": 0.9}  # of the free memory, for slots; 0.8 elsewhere


@dataclass
class LayerState:
    """Buffers of one layer, indexed by slot.

    Attention: first = keys, second = values. Mamba: first = convolution inputs [slots, channels, K-1], second = states.
    """

    kind: str
    first: Tensor
    second: Tensor

    def used(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of what a sequence of `length` tokens has in the slot."""
        if self.kind == ATTENTION:
            return self.first[slot, :, :length], self.second[slot, :, :length]
        return self.first[slot], self.second[slot]


Snapshot = list[tuple[Tensor, Tensor]]


class Slots:
    """`count` slots of `capacity` tokens for a model, and which of them are free. One more, `spare`, is nobody's."""

    def __init__(self, config: PreTrainedConfig, count: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.count, self.capacity, self.spare = count, capacity, count
        self.layers = []
        for kind in layer_kinds(config):
            shapes = layer_shapes(config, kind, capacity)
            dtypes = [dtype, dtype if kind == ATTENTION else torch.float32]
            buffers = [
                torch.empty(count + 1, *shape, dtype=d, device=device) for shape, d in zip(shapes, dtypes, strict=True)
            ]
            self.layers.append(LayerState(kind, *buffers))
        self.free = list(reversed(range(count)))

    def take(self) -> int:
        """An empty slot: Mamba states are zero, what is left of keys is never looked at."""
        slot = self.free.pop()
        for layer in self.layers:
            if layer.kind != ATTENTION:
                layer.first[slot].zero_()
                layer.second[slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        self.free.append(slot)

    def fork(self, slot: int, length: int) -> int:
        """Another slot with a copy of what a sequence of `length` tokens has in this one."""
        target = self.free.pop()
        self.restore(target, length, [layer.used(slot, length) for layer in self.layers])
        return target

    def snapshot(self, slot: int, length: int) -> Snapshot:
        used = (layer.used(slot, length) for layer in self.layers)
        return [(first.clone(), second.clone()) for first, second in used]

    def restore(self, slot: int, length: int, snapshot: Snapshot) -> None:
        for layer, saved in zip(self.layers, snapshot, strict=True):
            for buffer, copy in zip(layer.used(slot, length), saved, strict=True):
                buffer.copy_(copy)


def layer_shapes(config: PreTrainedConfig, kind: str, capacity: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one slot of a layer's two buffers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == ATTENTION:
        return ((config.num_key_value_heads, capacity, head_dim),) * 2
    window = (config.conv_cache_size, config.conv_kernel - 1)
    if config.mixer == "mamba2":
        return window, (config.num_attention_heads, head_dim, config.state_size)
    return window, (config.mamba_size, config.state_size)


def slots_that_fit(config: PreTrainedConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many slots the memory that is free holds, but for a share that is left for computing; at least 1."""
    return max(1, int(SHARE.get(device.type, 0.8) * free_memory(device)) // slot_bytes(config, capacity, dtype) - 1)


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
