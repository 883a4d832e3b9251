"""A linear layer for inference, its weights packed once: for the few rows of a decode step."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, kernels, require_shapes

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear:
    """x weight^T + bias, summed in float32. Not differentiable.

    With the CPU kernel a row's outputs are the same bits whatever its batch-mates and however many threads there are.
    torch's own products, which promise no such thing, take its place where it can't run, and for bfloat16 rows and
    weights on a processor that multiplies bfloat16, which the kernel doesn't.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, backend: Backend = "auto", int8: bool = False
    ) -> None:
        """Packs the weights in their own dtype; they mustn't change afterwards.

        Args:
            weight: [out, in] float32 or bfloat16.
            bias: [out].
            int8: rounds each output's weights to 255 steps, -127 to 127 times a scale of its own. A product of few rows
                then reads a quarter of what it reads in float32; activations stay as they are.

        Raises:
            ValueError: shapes or dtypes that don't fit, or a backend that can't run this.
        """
        fits = [weight.dim() == 2 and weight.numel() > 0, weight.dtype in DTYPES]
        fits += [bias is None or (bias.shape == weight.shape[:1] and bias.device == weight.device)]
        require_shapes("PackedLinear", fits, dict(weight=weight, bias=bias))
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        limits = {"CPU tensors, as there is no Triton kernel": self.device.type == "cpu" and backend != "triton"}
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        scale = None
        if int8:
            weight, scale = reference.quantize_outputs(weight)
        self._multiply: Callable[[Tensor], Tensor]
        if choose("PackedLinear", backend, weight, limits) == "reference":
            self._multiply = _Torch(weight if scale is None else (weight * scale[:, None]).to(self.dtype), bias)
        else:
            self._multiply = kernels("cpu", "linear").pack(weight, bias, scale)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out] in x's dtype, for x [rows, in] float32 or bfloat16. Raises ValueError for any other."""
        shape = x.shape
        if len(shape) != 2 or shape[1] != self.in_features or x.dtype not in DTYPES or x.device != self.device:
            of = f"PackedLinear of {self.in_features} inputs on {self.device}"
            require_shapes(of, [False], dict(x=x), f"rows on {x.device} don't fit")
        return self._multiply(x) if shape[0] else x.new_empty(0, self.out_features)


class _Torch:
    """F.linear, in float32 where dtypes differ."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self._weight.dtype)
        bias = None if self._bias is None else self._bias.to(dtype)
        return F.linear(x.to(dtype), self._weight.to(dtype), bias).to(x.dtype)
