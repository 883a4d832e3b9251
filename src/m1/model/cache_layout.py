"""What a layer caches of a sequence: shapes and dtypes of its buffers, declared once. Their bytes follow.

Attention caches the keys and values of every token. A Mamba layer caches the last K-1 inputs of its convolution and a
float32 state, whose sizes don't grow.
"""

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from transformers import PreTrainedConfig

from m1.model.configuration import ATTENTION, layer_kinds

T = TypeVar("T")  # a tensor, or the `Buffer` that declares it


class AttentionCache(NamedTuple, Generic[T]):
    """What an attention layer caches: tensors, or the `Buffer`s that declare them.

    Attributes:
        keys: [..., kv_heads, tokens, head_dim]. The first dimension is the slot; one sequence has none.
        values: the same shape.
    """

    keys: T
    values: T


class MambaState(NamedTuple, Generic[T]):
    """What a Mamba layer caches: tensors, or the `Buffer`s that declare them.

    Attributes:
        conv: [..., channels, K-1], the last inputs of the convolution, oldest first. The first dimension is the slot or
            the batch; one sequence has none.
        ssm: [..., D, N], or [..., heads, P, N] in Mamba-2: the recurrent state, float32.
    """

    conv: T
    ssm: T


class Buffer(NamedTuple):
    """Shape and dtype of a tensor that is still to be allocated; `nbytes` is its size in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def layer_layout(
    config: PreTrainedConfig, kind: str, tokens: int, dtype: torch.dtype
) -> AttentionCache[Buffer] | MambaState[Buffer]:
    """The buffers of one sequence in one layer.

    Args:
        config: of an M1 model or a transformer.
        kind: the layer's kind, one of `layer_kinds(config)`.
        tokens: maximum number of tokens in an attention layer's buffers.
        dtype: of the buffers, except for the float32 state.
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
    """Bytes that one sequence of `tokens` tokens takes in one layer."""
    return sum(buffer.nbytes for buffer in layer_layout(config, kind, tokens, dtype))


def slot_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one sequence of `tokens` tokens takes in all layers of an M1 model or a transformer."""
    return sum(layer_bytes(config, kind, tokens, dtype) for kind in layer_kinds(config))
