"""Packs a linear layer's weights for linear.cpp or oneDNN. Tensors and dtypes are those of ops/linear.py."""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops.build import load_cpu_kernels
from m1.ops.cpu import ELEMENTS

Layer, Rows = ctypes.c_int64 * 6, ctypes.c_int64 * 5  # the C++ structs of these names
KINDS = ELEMENTS | {torch.int8: 3}


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 products and oneDNN can use them."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Panels:
    """A linear layer whose weights are packed for the kernel in linear.cpp.

    Call it with rows [rows, in] of a dtype in `ELEMENTS`; it returns [rows, out] in the same dtype.

    Args:
        weight: [out, in] of a dtype in `ELEMENTS`, or int8.
        bias: [out], or None.
        scale: [out] float32, for int8 weights, which stand for weight * scale[:, None].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        kernels: Any = load_cpu_kernels()
        outputs, inputs = weight.shape
        width = kernels.m1_linear_width()
        missing = -outputs % width
        padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight
        side_by_side = 2 if weight.dtype == torch.bfloat16 else 1  # pairs of outputs i and width / 2 + i
        panels = padded.reshape(-1, side_by_side, width // side_by_side, inputs).permute(0, 3, 2, 1).contiguous()
        bias = weight.new_zeros(outputs, dtype=torch.float32) if bias is None else bias.float()
        scale = torch.ones(outputs) if scale is None else scale
        # the kernel starts its sums with the bias and scales them at the end
        bias, scale = (F.pad(t, (0, missing)).contiguous() for t in (bias / scale, scale))
        self._outputs = outputs
        self._kernel = kernels.m1_linear
        self._tensors = panels, bias, scale  # keeps alive what the struct points to
        self._layer = Layer(inputs, outputs, KINDS[weight.dtype], *(t.data_ptr() for t in self._tensors))

    def __call__(self, x: Tensor) -> Tensor:
        count = x.shape[0]  # takes a third of the time of len(x); calls are frequent
        stride, step = x.stride()
        if step != 1:
            x = x.contiguous()
            stride = x.stride(0)
        out = x.new_empty(count, self._outputs)
        self._kernel(self._layer, Rows(count, stride, ELEMENTS[x.dtype], x.data_ptr(), out.data_ptr()))
        return out


class OneDNN:
    """A linear layer whose bfloat16 weights are packed for oneDNN's bfloat16 product.

    Call it with rows [rows, in] of a dtype in `ELEMENTS`; it returns [rows, out] in the same dtype. Rows of another
    dtype than bfloat16 use `Panels`, packed on the first such call.

    Args:
        weight: [out, in] bfloat16.
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._packed_bias = None if bias is None else bias.to(torch.bfloat16)

    @functools.cached_property
    def _panels(self) -> Panels:
        return Panels(self._weight, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return self._panels(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._packed_bias, "none", [], "")


def pack(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Panels | OneDNN:
    """Packs the weights for the faster of the two on this processor. Arguments as for `Panels`."""
    if scale is not None:
        return Panels(weight, bias, scale)
    native = weight.dtype == torch.bfloat16 and multiplies_bfloat16()
    return OneDNN(weight, bias) if native else Panels(weight, bias)
