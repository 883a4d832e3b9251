"""The loss of fine-tuning from a model's last hidden states, with the numbers that tell how it goes."""

import torch
from torch import Tensor

from m1.train.chunked_loss import chunked_loss


def cross_entropy_from_states(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sums over tokens of three numbers of a head's distribution.

    Products are in the states' dtype or autocast's on a GPU, in float32 on a CPU; logits are float32.

    Args:
        states: [tokens, H].
        head: [V, H].
        labels: [tokens] integers: the token that comes next.

    Returns:
        [3] float32: the cross-entropy in nats, which has gradients to states and head; the entropy in nats; and how
        many tokens are the likeliest ones.
    """
    return chunked_loss(states, head, cross_entropy_and_gradient, lambda chunk: labels[chunk], count=3)


def cross_entropy_and_gradient(
    logits: Tensor, labels: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """[tokens, V] float32 logits, [tokens] labels -> [tokens, 3] numbers, and the first's gradient to the logits.

    The gradient is rounded to `dtype`, and left out if that is None.
    """
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    index = labels.unsqueeze(-1)
    loss = -log_probabilities.gather(-1, index).squeeze(-1)
    entropy = -(probabilities * log_probabilities).sum(-1)
    numbers = torch.stack([loss, entropy, (logits.argmax(-1) == labels).float()], dim=-1)
    if dtype is None:
        return numbers, None
    labelled = torch.arange(logits.shape[-1], device=logits.device) == index
    return numbers, (probabilities - labelled.float()).to(dtype)
