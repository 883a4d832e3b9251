"""A linear layer for inference with few rows, as in a decode step. Its weights are packed once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m1.ops.backend import Backend, choose, kernels
from m1.ops.elementwise import swiglu
from m1.ops.quantize import quantize
from m1.ops.shapes import KERNEL_FLOATS, Shapes
from m1.options import Quantization

CHECK = Shapes(
    "PackedLinear", where={"weight must not be empty": lambda outputs, inputs: outputs * inputs > 0},
    weight="outputs inputs: float32, bfloat16 or float16", bias="outputs or None",
)  # fmt: skip


class PackedLinear(nn.Module):
    """A linear layer for inference, y = x weight^T + bias, that is fast for the few rows of a decode step.

    Sums are in float32. Not differentiable. The CPU kernel's results are batch-invariant and don't depend on the number
    of threads. torch's own matrix product, without these guarantees, is used where no kernel can run, and for more rows
    than the GPU's kernel is made for.

    Attributes:
        out_features: results per row.
        in_features: inputs per row.
        dtype: dtype of the given weight.
        device: device of the weight, on which the rows must be.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        backend: Backend = "auto",
        quantization: Quantization | None = None,
        gated: bool = False,
    ):
        """Packs the weights in their own dtype. `load` takes new ones.

        Args:
            weight: [out, in] float32, bfloat16 or float16.
            bias: [out], or None.
            backend: "cpu", "triton" or "reference" (torch's matrix product); "auto" picks the device's if it can run.
            quantization: rounds the weights to 8 or 4 bits (ops/quantize.py), so that a product of few rows reads fewer
                bytes. The CPU kernel then rounds the rows, too, if the processor multiplies bytes: to -127..127, with
                one scale per 32 inputs.
            gated: makes it a gated MLP's first layer. Its results are silu(y[:, :out / 2]) * y[:, out / 2:] (Shazeer
                2020, SwiGLU).

        Raises:
            ValueError: a tensor that doesn't fit, an odd number of gated outputs, or a backend that can't run this.
        """
        super().__init__()
        CHECK(weight, bias)
        outputs, self.in_features = weight.shape
        if gated and outputs % 2:
            raise ValueError(f"PackedLinear: gated outputs must be even, but weight has shape {tuple(weight.shape)}")
        self.out_features, self.gated = outputs // 2 if gated else outputs, gated
        self.dtype, self.device, self.quantization = weight.dtype, weight.device, quantization
        limits = {"bfloat16 or float16 weights, not quantized": self.dtype != torch.float32 and not quantization}
        own = self.device.type == "cuda" or backend == "triton"
        self.backend = choose("PackedLinear", backend, weight, limits if own else {})
        self._multiply: Callable[[Tensor], Tensor]
        self._panels: Any = None
        self._used: tuple[Tensor, Tensor | None] | None = None  # the weights that torch multiplies with
        self.load(weight, bias)

    def load(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes other weights of the same shapes and dtype. CUDA graphs and recordings use them from then on."""
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        quantized = quantize(weight, self.quantization) if self.quantization else None
        if self.backend == "cpu":
            panels = kernels("cpu", "linear").Panels(quantized or weight, bias, self.gated)
            if self._panels is None:
                self._multiply = self._panels = panels
            else:
                self._panels.copy_(panels)
            return
        weight = quantized.values().to(self.dtype) if quantized else weight
        if self._used is None:
            self._used = weight, bias
            multiply = _multiply_by_triton if self.backend == "triton" else _multiply_by_torch
            self._multiply = partial(multiply, weight, bias, self.gated)
        else:  # in place: a graph reads these tensors
            for used, new in zip(self._used, (weight, bias), strict=True):
                if used is not None and new is not None and used is not new:
                    used.copy_(new)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: [rows, in] float32, bfloat16 or float16.

        Returns:
            [rows, out] in x's dtype; [rows, out / 2] if gated.

        Raises:
            ValueError: x doesn't fit.
        """
        self._check(x)
        return self._multiply(x) if len(x) else x.new_empty(0, self.out_features)

    __call__ = forward  # skips nn.Module's search for hooks, which takes a third of a small product's time

    def _check(self, x: Tensor) -> None:
        shape = x.shape
        if len(shape) != 2 or shape[1] != self.in_features or x.dtype not in KERNEL_FLOATS or x.device != self.device:
            # writes the error message; the test above takes a third of its time, and a decode step has many calls
            Shapes("PackedLinear", x=f"rows {self.in_features}: float32, bfloat16 or float16")(x, device=self.device)


def _multiply_by_torch(weight: Tensor, bias: Tensor | None, gated: bool, x: Tensor) -> Tensor:
    """F.linear, in float32 if the dtypes of x and weight differ. Returns x's dtype."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    return swiglu(y) if gated else y


def _multiply_by_triton(weight: Tensor, bias: Tensor | None, gated: bool, x: Tensor) -> Tensor:
    """The kernel's product where it has been made for x, else torch's."""
    if not 0 < len(x) <= kernels("triton", "linear").MAX_ROWS or x.dtype != weight.dtype:
        return _multiply_by_torch(weight, bias, gated, x)
    out = x.new_empty(len(x), len(weight) // (1 + gated))
    kernels("triton", "linear").linear(x, weight, bias, out, gated)
    return out
