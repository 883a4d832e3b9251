"""The loss of fine-tuning equals torch's at awkward sizes, with its gradients, and counts what it says."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_rms_close

from m1.train import chunked_loss
from m1.train.cross_entropy import cross_entropy_from_states

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 3), (1, 1), (7, 33), (300, 500)])
def test_equals_torch(monkeypatch, device, dtype, tokens, vocabulary):
    """Chunks of 4 tokens on a CPU, of 256 on a GPU."""
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 4 if device == "cpu" else 256)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 0)
    g = torch.Generator().manual_seed(tokens)
    states, head = (torch.randn(n, 24, generator=g).to(device, dtype).requires_grad_() for n in (tokens, vocabulary))
    labels = torch.randint(vocabulary, (tokens,), generator=g).to(device)
    found = cross_entropy_from_states(states, head, labels)
    logits = states.float() @ head.float().T
    loss = F.cross_entropy(logits, labels, reduction="sum")
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    wanted = torch.stack([loss, entropy, (logits.argmax(-1) == labels).sum().float()])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(0.5 * value, (states, head)) for value in (found[0], loss)]
    if tokens:
        assert_rms_close(*gradients, 1e-5 if dtype == torch.float32 else 1e-2)
    else:
        assert not any(gradient.any() for gradient in gradients[0])


def test_an_evaluation_makes_no_gradients():
    states, head = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.no_grad():
        found = cross_entropy_from_states(states, head, torch.arange(6))
    assert not found.requires_grad
    torch.testing.assert_close(found, cross_entropy_from_states(states, head, torch.arange(6)).detach())


def test_autocast_chooses_the_dtype_of_products(monkeypatch):
    """On a GPU they were in float32, and training half as fast."""
    seen, plain = [], chunked_loss.product_dtype

    def product_dtype(states):
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(states)

    monkeypatch.setattr(chunked_loss, "product_dtype", product_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy_from_states(torch.randn(6, 8), torch.randn(20, 8), torch.arange(6))
    assert seen == [True]
