"""A loss over the vocabulary from a model's last hidden states, without the logits of all tokens.

Logits exist for a chunk of tokens at a time, in float32. A chunk's gradients are made with its logits, which then go
away. So no logits are computed twice.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
CHUNK_TOKENS = 256  # tokens of a chunk on a CPU; more aren't faster
CHUNK_BYTES = 2**29  # of a model's logits of a chunk on a GPU

# (logits [tokens, V], their target, further arguments, dtype) -> numbers per token, and the first's gradient to the
# logits, rounded to `dtype`; None instead of it if `dtype` is None.
Compare = Callable[..., tuple[Tensor, Tensor | None]]


def chunked_loss(
    states: Tensor, head: Tensor, compare: Compare, target: Callable[[slice], Tensor], *arguments: Any, count: int = 1
) -> Tensor:
    """Sums over tokens what `compare` makes of logits.

    Args:
        states: [tokens, H].
        head: [V, H].
        compare: a function of a module, which is compiled for a GPU.
        target: returns what a chunk of tokens is compared with.
        arguments: further arguments of `compare`.
        count: how many numbers `compare` returns per token: [tokens, count], or [tokens] of one.

    Returns:
        [count] float32. The first number has gradients to states and head, even without tokens.
    """
    if not torch.is_grad_enabled():
        states, head = states.detach(), head.detach()
    nothing, dtype = 0 * states.sum(dtype=torch.float32), product_dtype(states)
    with torch.autocast(states.device.type, enabled=False):
        return nothing + ChunkedLoss.apply(states, head, dtype, compare, target, arguments, count)


def product_dtype(states: Tensor) -> torch.dtype:
    """What logits are multiplied in: the states' dtype or autocast's on a GPU, float32 on a CPU."""
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return dtype if device == "cuda" and dtype in HALF else torch.float32


class ChunkedLoss(torch.autograd.Function):
    """`chunked_loss`. The forward pass makes the gradients, but for the factor that the backward pass has."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, dtype: torch.dtype, compare: Compare,
        target: Callable[[slice], Tensor], arguments: tuple, count: int,
    ) -> Tensor:  # fmt: skip
        """Returns the sums over tokens, from products in `dtype`."""
        of_states, of_head = (
            torch.zeros(t.shape, device=t.device) if needed else None
            for t, needed in zip((states, head), ctx.needs_input_grad, strict=False)
        )
        rounded_head = head.to(dtype)
        totals = torch.zeros(count, device=states.device)
        tokens = CHUNK_TOKENS
        if states.is_cuda:
            compare, tokens = compiled(compare), max(CHUNK_TOKENS, CHUNK_BYTES // (4 * len(head)))
        for start in range(0, len(states), tokens):
            chunk = slice(start, start + tokens)
            own = states[chunk].to(dtype)
            logits = product(own, rounded_head.T)
            numbers, gradient = compare(logits, target(chunk), *arguments, dtype if any(ctx.needs_input_grad) else None)
            totals += numbers.sum(0)
            if gradient is None:
                continue
            if of_states is not None:
                of_states[chunk] = product(gradient, rounded_head)
            if of_head is not None:
                add_product(of_head, gradient.T, own)
        ctx.gradients = [
            None if gradient is None else gradient.to(t.dtype)
            for gradient, t in zip((of_states, of_head), (states, head), strict=True)
        ]
        return totals

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple:
        """Gradients to states and head."""
        gradients, ctx.gradients = ctx.gradients, []  # kept, they would live as long as the graph
        return (*(None if gradient is None else gradient.mul_(factors[0]) for gradient in gradients), *[None] * 5)


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
def compiled(compare: Compare) -> Compare:
    """The function for a GPU, which then reads the logits a few times, not once per operation."""
    return torch.compile(compare, dynamic=True)
