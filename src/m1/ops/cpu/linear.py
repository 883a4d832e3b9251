"""Packs a linear layer's weights for linear.cpp. Tensors and dtypes are those of ops/linear.py."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops.calls import call, made
from m1.ops.cpu import ELEMENTS
from m1.ops.quantize import GROUP, Quantized

Q8, Q4 = 3, 4  # kinds of weight beside those in `ELEMENTS`


class Panels:
    """A linear layer whose weights are packed for the kernel in linear.cpp.

    Call it with rows [rows, in] of a dtype in `ELEMENTS`; it returns [rows, out] in the same dtype.

    Args:
        weight: [out, in] of a dtype in `ELEMENTS`, or quantized.
        bias: [out], or None.
        gated: whether a row's result is silu(first half) * second half of its outputs.
    """

    def __init__(self, weight: Tensor | Quantized, bias: Tensor | None, gated: bool) -> None:
        pack = partial(_panels, width=call("m1_linear_width"), gated=gated)
        scales = minima = None
        if isinstance(weight, Quantized):
            codes, scales, minima = weight
            outputs, inputs = codes.shape
            codes = F.pad(codes, (0, -inputs % GROUP))
            kind = Q8 if minima is None else Q4
            words = _bytes_to_words(codes.view(torch.uint8) ^ 128) if minima is None else _halves_to_words(codes)
            scales, minima = (None if t is None else pack(t.half()) for t in (scales, minima))
        else:
            outputs, inputs = weight.shape
            kind = ELEMENTS[weight.dtype]
            words = F.pad(weight, (0, inputs % 2)) if kind else weight  # two inputs of 16 bits in each word
            words = words.contiguous().view(torch.int32)
        bias = torch.zeros(outputs) if bias is None else bias.float()
        self._outputs = outputs // 2 if gated else outputs
        self._fields = inputs, self._outputs, kind, int(gated), pack(words), pack(bias[:, None]), scales, minima

    def copy_(self, other: "Panels") -> None:
        """Takes over the weights of a layer of the same shapes and kind, in place: recorded calls read them there."""
        for own, new in zip(self._fields[4:], other._fields[4:], strict=True):
            if isinstance(own, Tensor) and isinstance(new, Tensor):
                own.copy_(new)

    def __call__(self, x: Tensor) -> Tensor:
        count = x.shape[0]  # takes a third of the time of len(x); calls are frequent
        stride, step = x.stride()
        if step != 1:
            x = x.contiguous()
            stride = x.stride(0)
        out = made(x.new_empty(count, self._outputs))
        call("m1_linear", *self._fields, count, stride, ELEMENTS[x.dtype], x, out)
        return out


def rounds_rows() -> bool:
    """Whether rows are rounded to bytes for quantized weights, as the processor multiplies bytes."""
    return bool(call("m1_linear_rounds_rows"))


def _panels(values: Tensor, width: int, gated: bool) -> Tensor:
    """[out, n] -> [panels, n, width]. The halves of a gated layer's panel are from both halves of the outputs."""
    halves = values.unflatten(0, (2, -1)) if gated else values[None]
    part = width // len(halves)
    padded = F.pad(halves, (0, 0, 0, -halves.shape[1] % part))
    panels = padded.unflatten(1, (-1, part)).transpose(0, 1).flatten(1, 2)
    return panels.transpose(1, 2).contiguous()


def _bytes_to_words(codes: Tensor) -> Tensor:
    """Bytes [out, in] -> int32 [out, in / 4]."""
    return codes.contiguous().view(torch.int32)


def _halves_to_words(codes: Tensor) -> Tensor:
    """Codes [out, in] from 0 to 15 -> int32 [out, in / 8]. A byte has the codes i and i + GROUP / 2 of its group."""
    low, high = codes.view(torch.uint8).unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
    return _bytes_to_words((low + 16 * high).flatten(1))
