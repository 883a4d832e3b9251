"""How far a student's next-token distributions are from a teacher's (paper §3.2), from both models' hidden states.

    reverse KL   sum_v s(v) (log s(v) - log t(v))          the paper's
    forward KL   sum_v t(v) (log t(v) - log s(v))
    JSD          half of each against the mean of s and t

Logits exist for a chunk of tokens at a time, in float32. A chunk's gradients are made with its logits, which then go
away. So no logits are computed twice.
"""

import math
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
HALF = (torch.bfloat16, torch.float16)
CHUNK_TOKENS = 256  # tokens of a chunk on a CPU; more aren't faster
CHUNK_BYTES = 2**30  # of both models' logits of a chunk on a GPU


def divergence_from_states(
    student_states: Tensor, student_head: Tensor, teacher_states: Tensor, teacher_head: Tensor, kind: Divergence
) -> Tensor:
    """Sum over tokens of the divergence between two heads' distributions over the tokens that both have.

    Products are in the student's dtype or autocast's on a GPU, in float32 on a CPU; logits are float32.

    Args:
        student_states, teacher_states: [tokens, H] of each model's own H.
        student_head, teacher_head: [V, H]. Rows that only one of them has are padding, and left out.

    Returns:
        A float32 scalar with gradients to the student's states and head.
    """
    vocabulary = min(len(student_head), len(teacher_head))
    student_head, teacher_head = student_head[:vocabulary], teacher_head[:vocabulary]
    if not torch.is_grad_enabled():
        student_states, student_head = student_states.detach(), student_head.detach()
    nothing = 0 * student_states.sum(dtype=torch.float32)  # a gradient even without tokens
    device = student_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_states.dtype
    if device != "cuda" or dtype not in HALF:
        dtype = torch.float32
    with torch.autocast(device, enabled=False):
        return nothing + ChunkedDivergence.apply(
            student_states, student_head, teacher_states, teacher_head, kind, dtype
        )


class ChunkedDivergence(torch.autograd.Function):
    """`divergence_from_states`. The forward pass makes the gradients, but for the factor that the backward pass has."""

    @staticmethod
    def forward(
        ctx: Any, student_states: Tensor, student_head: Tensor, teacher_states: Tensor, teacher_head: Tensor,
        kind: Divergence, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Returns the sum over tokens, from products in `dtype`."""
        of_states, of_head = (
            torch.zeros(t.shape, device=t.device) if needed else None
            for t, needed in zip((student_states, student_head), ctx.needs_input_grad, strict=False)
        )
        own_head, wanted_head = student_head.to(dtype), teacher_head.to(dtype)
        total = torch.zeros((), device=student_states.device)
        compare, chunk = divergence_and_gradient, CHUNK_TOKENS
        if student_states.is_cuda:
            compare, chunk = compiled(), max(CHUNK_TOKENS, CHUNK_BYTES // (2 * 4 * len(own_head)))
        for start in range(0, len(student_states), chunk):
            own, wanted = (t[start : start + chunk].to(dtype) for t in (student_states, teacher_states))
            logits = product(own, own_head.T), product(wanted, wanted_head.T)
            loss, gradient = compare(*logits, kind, dtype if any(ctx.needs_input_grad) else None)
            total += loss.sum()
            if gradient is None:
                continue
            if of_states is not None:
                of_states[start : start + chunk] = product(gradient, own_head)
            if of_head is not None:
                add_product(of_head, gradient.T, own)
        ctx.gradients = [
            None if gradient is None else gradient.to(t.dtype)
            for gradient, t in zip((of_states, of_head), (student_states, student_head), strict=True)
        ]
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple:
        """Gradients to the student's states and head."""
        gradients, ctx.gradients = ctx.gradients, []  # kept, they would live as long as the graph
        return (*(None if gradient is None else gradient.mul_(factor) for gradient in gradients), *[None] * 4)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, also of half-precision factors, which only a GPU can do without rounding."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, as `product`; in float32 without a copy of the product, which a head's gradient would cost."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += product(a, b)


@cache
def compiled() -> Any:
    """`divergence_and_gradient` for a GPU, which then reads the logits three times, not once per operation."""
    return torch.compile(divergence_and_gradient, dynamic=True)


def divergence_and_gradient(
    student_logits: Tensor, teacher_logits: Tensor, kind: Divergence, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """[tokens, V] float32 logits of both -> [tokens] divergence in nats, and its gradient to the student's logits.

    The gradient is rounded to `dtype`, and left out if that is None.
    """
    s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if kind == "forward_kl":
        probabilities = t.exp()
        total = (probabilities * (t - s)).sum(-1)
        return total, None if dtype is None else (s.exp() - probabilities).to(dtype)
    other = t if kind == "reverse_kl" else torch.logaddexp(s, t) - math.log(2)
    probabilities, log_ratio = s.exp(), s - other
    own = total = (probabilities * log_ratio).sum(-1)
    if kind == "jsd":
        probabilities, total = probabilities / 2, (own + (t.exp() * (t - other)).sum(-1)) / 2
    return total, None if dtype is None else (probabilities * (log_ratio - own.unsqueeze(-1))).to(dtype)


def divergence(student_logits: Tensor, teacher_logits: Tensor, kind: Divergence) -> Tensor:
    """[tokens, V] logits of both -> [tokens] divergence in nats, float32."""
    return divergence_and_gradient(student_logits.float(), teacher_logits.float(), kind, None)[0]
