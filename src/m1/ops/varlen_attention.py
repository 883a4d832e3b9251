"""Causal attention inside each document of packed rows, without a mask of T x T elements."""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops.chunks import bounds, check_chunks
from m1.ops.shapes import Rule, Shapes

try:
    from torch.nn.attention import varlen

    PARAMETERS = set(inspect.signature(varlen.varlen_attn).parameters)  # they differ from torch to torch
except ImportError:  # torch < 2.10
    PARAMETERS = set()

RULES: dict[str, Rule] = {
    "kv_heads must divide heads": lambda heads, kv_heads: kv_heads > 0 and heads % kv_heads == 0,
    "cu_seqlens must have an edge at least": lambda c: c >= 0,
}
CHECK = Shapes(
    "varlen_attention", where=RULES,
    query="T heads head_dim", key="T kv_heads head_dim: as query", value="T kv_heads head_dim: as query",
    cu_seqlens="c+1: int",
)  # fmt: skip


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v over a token's own document up to the token, with grouped query heads. Differentiable.

    On a GPU, in bfloat16 and float16, this is PyTorch's variable-length flash attention. Elsewhere the documents follow
    one another.

    Args:
        query: [T, heads, head_dim].
        key, value: [T, kv_heads, head_dim]; kv_heads divides heads.
        cu_seqlens: [documents + 1] integers from 0 to T, where each document begins, and T.
        max_length: at least the length of the longest document, in tokens.
        scale: factor of the scores; head_dim**-0.5 when None.

    Returns:
        [T, heads, head_dim] in query's dtype.

    Raises:
        ValueError: a tensor that doesn't fit; on a CPU, edges that don't rise from 0 to T in steps of max_length.
    """
    CHECK(query, key, value, cu_seqlens)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    if is_one_kernel(query.device, query.dtype):
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
        if "enable_gqa" in PARAMETERS:
            options["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        edges = cu_seqlens.int()
        return cast(Tensor, varlen.varlen_attn(query, key, value, edges, edges, max_length, max_length, **options))
    return _by_document(query, key, value, cu_seqlens, max_length, scale)


def is_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel attends in all documents. Otherwise they follow one another, each with kernels of its own."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and "window_size" in PARAMETERS


@torch.library.custom_op("m1::varlen_attention", mutates_args=())
def _by_document(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scale: float
) -> Tensor:
    """`varlen_attention`, one document after another."""
    check_chunks("varlen_attention", cu_seqlens, cu_seqlens[:0], 0, max_length, query=query)
    y = torch.empty_like(query)
    for start, end in bounds(cu_seqlens):
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        document = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        y[start:end] = document[0].transpose(0, 1)
    return y


@_by_document.register_fake
def _outputs(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("m1::varlen_attention_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, y: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. The scores of one document at a time are computed again, in float32."""
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    groups = key.shape[1], query.shape[1] // key.shape[1]
    for start, end in bounds(cu_seqlens):
        q, dout, out = (t[start:end].float().unflatten(1, groups).permute(1, 2, 0, 3) for t in (query, dy, y))
        k, v = (t[start:end].float().transpose(0, 1).unsqueeze(1) for t in (key, value))  # [kv_heads, 1, tokens, d]
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
        weights = (scale * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
        dscores = scale * weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
        dquery, dkey, dvalue = dscores @ k, (dscores.mT @ q).sum(1), (weights.mT @ dout).sum(1)
        own = dquery.permute(2, 0, 1, 3).flatten(1, 2), dkey.transpose(0, 1), dvalue.transpose(0, 1)
        for gradient, rows in zip(gradients, own, strict=True):
            gradient[start:end] = rows
    return gradients


@_backward.register_fake
def _gradients(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    *tensors, y = ctx.saved_tensors
    return (*_backward(*tensors, ctx.scale, y, dy), None, None, None)


_by_document.register_autograd(_autograd, setup_context=_setup_context)
