"""Rows of a table are torch's."""

import pytest
import torch
import torch.nn.functional as F

from m1.ops import embedding


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_the_kernel_equals_torch(rows, dtype):
    table, tokens = torch.randn(7, 5).to(dtype), torch.randint(7, (rows,))
    assert torch.equal(embedding(tokens, table, backend="cpu"), F.embedding(tokens, table))
    assert torch.equal(embedding(tokens, table.T.contiguous().T), F.embedding(tokens, table))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("token", [-1, 7])
def test_tokens_that_do_not_exist_are_refused(token, backend):
    with pytest.raises(IndexError, match=f"row 1 has token {token}, but there are 7"):
        embedding(torch.tensor([0, token]), torch.randn(7, 5), backend=backend)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="embedding: tokens has shape"):
        embedding(torch.tensor([0.0]), torch.randn(7, 5))
    with pytest.raises(ValueError, match="backend 'triton' needs a Triton kernel, and there is none"):
        embedding(torch.tensor([0]), torch.randn(7, 5), backend="triton")
