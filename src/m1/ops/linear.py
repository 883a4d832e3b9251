"""A linear layer for inference, its weights packed once: for the few rows of a decode step."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m1.ops import reference
from m1.ops.backend import Backend, choose, kernels
from m1.ops.shapes import DTYPES, Shapes

CHECK = Shapes(
    "PackedLinear", where={"weight must not be empty": lambda outputs, inputs: outputs * inputs > 0},
    weight="outputs inputs: float32 or bfloat16", bias="outputs or None",
)  # fmt: skip
ROWS = DTYPES["float32 or bfloat16"]


class PackedLinear(nn.Module):
    """x weight^T + bias, summed in float32. Not differentiable.

    With the CPU kernel a row's outputs are the same bits whatever its batch-mates and however many threads there are.
    torch's own products, which promise no such thing, take its place where it can't run, and for bfloat16 rows and
    weights on a processor that multiplies bfloat16, which the kernel doesn't.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, backend: Backend = "auto", int8: bool = False):
        """Packs the weights in their own dtype; they mustn't change afterwards.

        Args:
            weight: [out, in] float32 or bfloat16.
            bias: [out].
            int8: rounds each output's weights to 255 steps, -127 to 127 times a scale of its own. A product of few rows
                then reads a quarter of what it reads in float32; activations stay as they are.

        Raises:
            ValueError: a tensor that doesn't fit, or a backend that can't run this.
        """
        super().__init__()
        CHECK(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        limits = {"CPU tensors, as there is no Triton kernel": self.device.type == "cpu" and backend != "triton"}
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        scale = None
        if int8:
            weight, scale = reference.quantize_outputs(weight)
        self._multiply: Callable[[Tensor], Tensor]
        if choose("PackedLinear", backend, weight, limits) == "reference":
            weight = weight if scale is None else (weight * scale[:, None]).to(self.dtype)
            self._multiply = partial(_multiply_by_torch, weight, bias)
        else:
            self._multiply = kernels("cpu", "linear").pack(weight, bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, out] in x's dtype, for x [rows, in] float32 or bfloat16. Raises ValueError for any other."""
        shape = x.shape
        if len(shape) != 2 or shape[1] != self.in_features or x.dtype not in ROWS or x.device != self.device:
            # says what is wrong; the line above is a third of its time, and a decode step has many calls
            Shapes("PackedLinear", x=f"rows {self.in_features}: float32 or bfloat16")(x, device=self.device)
        return self._multiply(x) if shape[0] else x.new_empty(0, self.out_features)

    __call__ = forward  # hooks have no use here, and looking for them takes a third of a small product's time


def _multiply_by_torch(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """In float32 where dtypes differ."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
