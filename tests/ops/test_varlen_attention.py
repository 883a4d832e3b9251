"""Attention over the documents of packed rows equals attention under a mask, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_rms_close

from m1.ops import varlen_attention
from m1.ops.varlen_attention import _by_document

DOCUMENTS = {"one": [7], "several": [1, 17, 2, 30, 1], "short": [1, 1, 2]}


def inputs(lengths, heads, kv_heads, dtype=torch.float32):
    g = torch.Generator().manual_seed(len(lengths))
    shapes = [(sum(lengths), n, 16) for n in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def masked(query, key, value, cu_seqlens, max_length, scale=None):
    document = torch.searchsorted(cu_seqlens, torch.arange(len(query)), right=True)
    mask = (document[:, None] == document).tril()
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_masked_attention(lengths, heads, kv_heads, scale):
    tensors, cu_seqlens = inputs(lengths, heads, kv_heads)
    results = []
    for function in (varlen_attention, masked):
        y = function(*tensors, cu_seqlens, max(lengths), scale)
        results.append([y, *torch.autograd.grad(y.cos().sum(), tensors)])
    assert_rms_close(*results, 1e-5, ["y", "dquery", "dkey", "dvalue"])


def test_bfloat16():
    tensors, cu_seqlens = inputs([40, 9], 4, 2, torch.bfloat16)
    results = []
    for given in (tensors, [t.detach().float().requires_grad_() for t in tensors]):
        y = varlen_attention(*given, cu_seqlens, 40)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
    assert {t.dtype for t in results[0]} == {torch.bfloat16}
    assert_rms_close(*results, 0.02)


def test_registered_as_an_operator():
    """Schema, fake tensors, autograd registration and tracing with sizes unknown, as torch.compile relies on them."""
    tensors, cu_seqlens = inputs([5, 6], 4, 2)
    torch.library.opcheck(_by_document, (*tensors, cu_seqlens, 6, 0.25))


def test_refuses_heads_that_cannot_be_grouped():
    tensors, cu_seqlens = inputs([5], 3, 2)
    with pytest.raises(
        ValueError, match="kv_heads must divide heads, but heads is 3 from query, kv_heads is 2 from key"
    ):
        varlen_attention(*tensors, cu_seqlens, 5)


@pytest.mark.parametrize("edges", [[0, 4], [1, 5], [0, 6, 5], [0, 4, 2, 5]])
def test_refuses_edges_that_do_not_rise_to_the_end(edges):
    tensors, _ = inputs([5], 4, 2)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T"):
        varlen_attention(*tensors, torch.tensor(edges), 6)
