"""Random inputs of a Mamba-1 layer, which the benchmarks of whole sequences and of decode steps share."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]  # an op's arguments by name
TAPS = 4  # of the convolution


def mamba_inputs(
    generator: torch.Generator, leading: tuple[int, ...], inner: int, kv: int, state: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The arguments of a Mamba-1 op: random, but with the same B and C in all groups.

    Args:
        leading: the dimensions before the channels: (batch, length) for sequences, (slots,) for a decode step.
        inner: channels D of z and dt.
        kv: channels X of x and B.
        state: states N per channel.
        dtype: data type of the activations z, x, B, C and dt. The parameters are float32.
    """
    device = generator.device
    normal = partial(torch.randn, generator=generator, device=device)
    once = (1,) * len(leading)
    return {
        "z": normal(*leading, inner, dtype=dtype),
        "x": normal(*leading, kv, dtype=dtype),
        "B": normal(*leading, state, dtype=dtype).repeat(*once, kv // state),
        "C": normal(*leading, state, dtype=dtype).repeat(*once, inner // state),
        "dt": normal(*leading, inner, dtype=dtype).sub_(3.0),  # steps around 0.05 after softplus
        "A": -torch.arange(1.0, state + 1, device=device).repeat(inner, 1),
        "D": torch.ones(inner, device=device),
        "conv_weight": normal(inner, TAPS),
        "conv_bias": normal(inner),
    }
