"""What a layer keeps of a sequence, declared once: shapes and dtypes of a slot's buffers. Its bytes follow.

Attention keeps the keys and values of every token; a Mamba layer the last K-1 inputs of its convolution and a float32
state, whose sizes don't grow.
"""

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from transformers import PreTrainedConfig

from m1.model.configuration import ATTENTION, layer_kinds

T = TypeVar("T")  # a tensor, or the `Buffer` that declares one


class AttentionCache(NamedTuple, Generic[T]):
    """Keys and values, [..., kv_heads, tokens, head_dim] each. `...` is a slot, or nothing for one sequence."""

    keys: T
    values: T


class MambaState(NamedTuple, Generic[T]):
    """conv [..., channels, K-1], the convolution's last inputs, oldest first; ssm [..., D, N], or in Mamba-2
    [..., heads, P, N], float32."""

    conv: T
    ssm: T


class Buffer(NamedTuple):
    """A tensor to be."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layer_layout(
    config: PreTrainedConfig, kind: str, tokens: int, dtype: torch.dtype
) -> AttentionCache[Buffer] | MambaState[Buffer]:
    """One sequence's buffers in a layer.

    Args:
        kind: one of `layer_kinds(config)`.
        tokens: that an attention layer has room for.
        dtype: the model's, of all but the float32 state.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == ATTENTION:
        keys = Buffer((config.num_key_value_heads, tokens, head_dim), dtype)
        return AttentionCache(keys, keys)
    conv = Buffer((config.conv_cache_size, config.conv_kernel - 1), dtype)
    if config.mixer == "mamba2":
        return MambaState(conv, Buffer((config.num_attention_heads, head_dim, config.state_size), torch.float32))
    return MambaState(conv, Buffer((config.mamba_size, config.state_size), torch.float32))


def layer_bytes(config: PreTrainedConfig, kind: str, tokens: int, dtype: torch.dtype) -> int:
    """Of one sequence after `tokens` tokens."""
    return sum(buffer.nbytes for buffer in layer_layout(config, kind, tokens, dtype))


def slot_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Of one sequence in all layers, for an M1 model or a transformer."""
    return sum(layer_bytes(config, kind, tokens, dtype) for kind in layer_kinds(config))
