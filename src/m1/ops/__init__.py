"""Kernels. Each op has one public function that dispatches; `reference` is its readable specification."""

from m1.ops.causal_conv import causal_conv
from m1.ops.selective_scan import selective_scan
from m1.ops.ssd import ssd

__all__ = ["causal_conv", "selective_scan", "ssd"]
