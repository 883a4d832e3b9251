"""Invariant 7 at this scope: the divergences equal hand-computed numbers; chunks change nothing."""

import math

import pytest
import torch
from tolerance import assert_rms_close
from torch.nn.functional import kl_div

from m1.train import chunked_loss
from m1.train import divergence as module
from m1.train.divergence import divergence, divergence_and_gradient, divergence_from_states


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
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 3)
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


def test_logits_are_float32_under_autocast():
    """bfloat16 logits of a model against itself had a divergence twice as far from 0."""
    g = torch.Generator().manual_seed(2)
    states, head = (torch.randn(9, 16, generator=g).bfloat16(), torch.randn(40, 16, generator=g).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence_from_states(states, head, states + 0.01, head, "forward_kl")
    exact = divergence(states.double() @ head.double().T, (states + 0.01).double() @ head.double().T, "forward_kl")
    torch.testing.assert_close(loss, exact.sum(), rtol=1e-4, atol=1e-6, check_dtype=False)


def test_logits_exist_for_256_tokens_at_a_time(monkeypatch):
    """They are computed once."""
    sizes = []

    def seen(student_logits, *arguments):
        sizes.append(len(student_logits))
        return divergence_and_gradient(student_logits, *arguments)

    monkeypatch.setattr(module, "divergence_and_gradient", seen)
    states, head = torch.randn(600, 8, requires_grad=True), torch.randn(20, 8)
    divergence_from_states(states, head, torch.randn(600, 8), head, "reverse_kl").backward()
    assert sizes == [256, 256, 88]


@pytest.mark.parametrize("trained", ["both", "states", "head", "none"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_are_those_of_whole_logits(kind, trained):
    g = torch.Generator().manual_seed(3)
    states, head, other = (torch.randn(*shape, generator=g) for shape in ((300, 8), (20, 8), (300, 6)))
    other_head, weight = torch.randn(20, 6, generator=g), torch.tensor(0.5)
    states.requires_grad_(trained in ("both", "states"))
    head.requires_grad_(trained in ("both", "head"))
    leaves = [leaf for leaf in (states, head) if leaf.requires_grad]
    losses = [
        divergence_from_states(states, head, other, other_head, kind),
        divergence(states @ head.T, other @ other_head.T, kind).sum(),
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(weight * loss, leaves) if leaves else () for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_an_evaluation_makes_no_gradients(kind):
    logits, states, head = torch.randn(6, 20), torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    assert divergence_and_gradient(logits, logits, kind, None)[1] is None
    with torch.no_grad():
        loss = divergence_from_states(states, head, torch.randn(6, 8), head, kind)
    assert loss.isfinite() and not loss.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU nothing is compiled")
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(monkeypatch, kind, dtype):
    """Chunks of 256 and 44 tokens: the loss and gradients are those of whole float32 logits of the rounded tensors."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 0)
    tensors = [
        torch.randn(*shape, device="cuda").to(dtype).requires_grad_(i < 2)
        for i, shape in enumerate(((300, 64), (500, 64), (300, 48), (500, 48)))
    ]
    loss = divergence_from_states(*tensors, kind)
    s, head, t, other = (tensor.float() for tensor in tensors)
    expected = divergence(s @ head.T, t @ other.T, kind).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    found, wanted = (torch.autograd.grad(value, tensors[:2]) for value in (loss, expected))
    assert_rms_close(found, wanted, 1e-3 if dtype == torch.float32 else 1e-2)


def test_gradients_are_freed_by_the_backward_pass():
    """A head of 128,256 x 3,072 has a gradient of 1.6 GB, which lived on with the loss."""
    states, head = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = divergence_from_states(states, head, torch.randn(6, 8), head.detach(), "reverse_kl")
    function = loss.grad_fn.next_functions[0][0]  # before the squeeze there is the sum of nothing and the loss
    function = next(f for f, _ in function.next_functions if hasattr(f, "gradients"))
    assert len(function.gradients) == 2
    loss.backward(retain_graph=True)
    assert function.gradients == []
