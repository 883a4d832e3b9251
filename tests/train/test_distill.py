"""Invariant 7 at this scope: the divergences equal hand-computed numbers; chunks and masks change nothing."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from m1.train import distill
from m1.train.distill import divergence, divergence_from_states


def test_by_hand():
    s, t = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    jsd = (
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3) + 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    ) / 2
    for kind, expected in (("reverse_kl", reverse), ("forward_kl", forward), ("jsd", jsd)):
        assert divergence(s.log(), t.log(), kind).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_chunked_equals_dense_with_gradients(monkeypatch, kind):
    monkeypatch.setattr(distill, "CHUNK_TOKENS", 3)
    g = torch.Generator().manual_seed(0)
    states, head = torch.randn(10, 8, generator=g), torch.randn(20, 8, generator=g)
    teacher_states, teacher_head = torch.randn(10, 6, generator=g), torch.randn(20, 6, generator=g)
    results = []
    for chunked in (True, False):
        s, w = states.clone().requires_grad_(), head.clone().requires_grad_()
        if chunked:
            loss = divergence_from_states(s, w, teacher_states, teacher_head, kind)
        else:
            loss = divergence(s @ w.T, teacher_states @ teacher_head.T, kind).sum()
        results.append([loss, *torch.autograd.grad(loss, [s, w])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_kl_directions_against_torch():
    g = torch.Generator().manual_seed(1)
    s, t = torch.randn(5, 9, generator=g), torch.randn(5, 9, generator=g)
    expected = kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(s, t, "forward_kl"), expected)
    torch.testing.assert_close(divergence(t, s, "reverse_kl"), expected)
