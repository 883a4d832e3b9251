"""Kernels. Each op has one public function or class, which picks a backend. `reference` specifies the results."""

from m1.ops.causal_conv import causal_conv
from m1.ops.decode_attention import decode_attention
from m1.ops.elementwise import add_rms_norm, swiglu
from m1.ops.embedding import embedding
from m1.ops.linear import PackedLinear
from m1.ops.prefill_attention import prefill_attention
from m1.ops.prefill_scan import prefill_scan, prefill_ssd
from m1.ops.rotary import rotate_and_cache
from m1.ops.sample_token import sample_token
from m1.ops.selective_scan import selective_scan
from m1.ops.ssd import ssd
from m1.ops.state_update import ssd_update, state_update
from m1.ops.varlen_attention import varlen_attention

__all__ = [
    "PackedLinear",
    "add_rms_norm",
    "causal_conv",
    "decode_attention",
    "embedding",
    "prefill_attention",
    "prefill_scan",
    "prefill_ssd",
    "rotate_and_cache",
    "sample_token",
    "selective_scan",
    "ssd",
    "ssd_update",
    "state_update",
    "swiglu",
    "varlen_attention",
]
