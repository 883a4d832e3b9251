"""How far a student's next-token distributions are from a teacher's (paper §3.2), from both models' hidden states.

    reverse KL   sum_v s(v) (log s(v) - log t(v))          the paper's
    forward KL   sum_v t(v) (log t(v) - log s(v))
    JSD          half of each against the mean of s and t

Logits exist for a chunk of tokens at a time (chunked_loss.py).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from m1.train.chunked_loss import chunked_loss, product, product_dtype

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]


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
    vocabulary, dtype = min(len(student_head), len(teacher_head)), product_dtype(student_states)
    wanted_head = teacher_head[:vocabulary].detach().to(dtype)

    def teacher_logits(chunk: slice) -> Tensor:
        return product(teacher_states[chunk].detach().to(dtype), wanted_head.T)

    head = student_head[:vocabulary]
    return chunked_loss(student_states, head, divergence_and_gradient, teacher_logits, kind).squeeze(0)


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
