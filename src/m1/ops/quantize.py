"""Weights rounded to few bits, in groups of inputs with a scale of their own, as GGUF's Q8_0 and Q4_1 have them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.options import Quantization

GROUP = 32  # inputs that share a scale
ROWS = 4096  # outputs that are rounded at a time: intermediate results take several times their memory


class Quantized(NamedTuple):
    """A weight [out, in] as codes * scales + minima, with `groups` of GROUP inputs. The last group may be shorter.

    Attributes:
        codes: [out, in] int8: -127..127 for int8; 0..15 for int4.
        scales: [out, groups] float32, exact in float16.
        minima: likewise, for int4; None for int8.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None

    def values(self) -> Tensor:
        """The weight that this stands for, [out, in] float32."""
        values = self.codes * self._of_inputs(self.scales)
        return values if self.minima is None else values + self._of_inputs(self.minima)

    def _of_inputs(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(GROUP, dim=1)[:, : self.codes.shape[1]]


def quantize(weight: Tensor, kind: Quantization) -> Quantized:
    """Rounds a weight [out, in]. One whose values came from Q8_0 or Q4_1 keeps them exactly in the same kind."""
    codes, scales, minima = zip(*(_quantize(rows, kind) for rows in weight.split(ROWS)), strict=True)
    return Quantized(torch.cat(codes), torch.cat(scales), None if minima[0] is None else torch.cat(minima))


def _quantize(weight: Tensor, kind: Quantization) -> Quantized:
    inputs = weight.shape[1]
    groups = F.pad(weight.float()[None], (0, -inputs % GROUP), mode="replicate")[0].unflatten(1, (-1, GROUP))
    if kind == "int8":
        minima, most, spread = None, 127, groups.abs().amax(2)
    else:
        minima, most, spread = groups.amin(2).half().float(), 15, groups.amax(2) - groups.amin(2)
        groups = groups - minima[..., None]
    scales = (spread / most).half().float()
    codes = (groups / torch.where(scales > 0, scales, 1)[..., None]).round()
    codes = codes.clamp(-most if minima is None else 0, most)
    return Quantized(codes.to(torch.int8).flatten(1)[:, :inputs], scales, minima)
