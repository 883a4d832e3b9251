"""What changes the logits before a draw: minimum length, bias, and penalties for tokens seen, in vLLM's order.

All tensors are made when the sequences of a batch come together. A step then waits for no token's value.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from m1.engine.plan import Fork


class TokenCounts:
    """Which tokens each slot's sequence has seen, for penalties. Memory is taken when the first one needs it.

    Args:
        slots: number of slots.
        vocab_size: V.

    Attributes:
        counts: [slots, V] int32: twice the number of times that the sequence has drawn the token, plus 1 if its prompt
            has it. Empty before it is needed.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.shape, self.device = (slots, vocab_size), device
        self.counts = torch.empty(0, dtype=torch.int32, device=device)

    def start(self, forks: Iterable[Fork]) -> None:
        """Fills the slots of new sequences with a penalty from their prompts."""
        forks = [fork for fork in forks if fork.params.penalizes]
        if not forks:
            return
        if not len(self.counts):
            self.counts = torch.zeros(self.shape, dtype=torch.int32, device=self.device)
        self.counts[_index([fork.copy.target for fork in forks], self.device)] = 0
        pairs = [(fork.copy.target, token) for fork in forks for token in set(fork.prompt)]
        slots, tokens = _index(pairs, self.device).unbind(1)
        self.counts[slots, tokens] = 1

    def save(self, slot: int) -> Tensor:
        """A copy of a slot's counts in the host's memory."""
        return self.counts[slot].to("cpu", copy=True)

    def load(self, slot: int, saved: Tensor) -> None:
        """Writes what `save` returned into a slot."""
        self.counts[slot] = saved.to(self.device)


class LogitsProcessors:
    """Changes the logits of a batch's rows, each by its own settings and tokens.

    Args:
        forks: the rows whose sequences have such settings, by row: how each started.
        slots: [b] int64, the slots of all rows.
        seen: the tokens of the slots.
    """

    def __init__(self, forks: Mapping[int, Fork], slots: Tensor, seen: TokenCounts):
        device, of_rows = slots.device, [(row, fork.params, fork.stop) for row, fork in forks.items()]
        early = [(row, token, p.min_tokens) for row, p, stop in of_rows if p.min_tokens for token in stop]
        bias = [(row, token) for row, p, _ in of_rows for token in p.logit_bias]
        values = [value for _, p, _ in of_rows for value in p.logit_bias.values()]
        penalties = {
            row: (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for row, p, _ in of_rows if p.penalizes
        }
        self.seen = seen
        self.early = _index(early, device).unbind(1) if early else None
        self.bias = (*_index(bias, device).unbind(1), _floats(values, device)) if bias else None
        self.penalized = _index([*penalties], device) if penalties else None
        if penalties:
            self.slots = slots[self.penalized]
            of_penalized = _floats([*penalties.values()], device)[:, :, None]
            self.repetition, self.frequency, self.presence = of_penalized.unbind(1)

    def __call__(self, logits: Tensor, drawn: Tensor) -> Tensor:
        """The changed logits [b, V], in float32. `drawn` [b] is the number of tokens that each row has drawn before."""
        logits = logits.to(torch.float32, copy=True)
        if self.early is not None:
            rows, tokens, least = self.early
            logits[rows, tokens] = logits[rows, tokens].masked_fill(drawn[rows] < least, -torch.inf)
        if self.bias is not None:
            rows, tokens, values = self.bias
            logits[rows, tokens] += values
        if self.penalized is not None:
            own, counts = logits[self.penalized], self.seen.counts[self.slots]
            repeated = torch.where(own > 0, own / self.repetition, own * self.repetition)
            own = torch.where(counts > 0, repeated, own)
            own -= self.frequency * (counts >> 1)
            own -= self.presence * (counts > 1)
            logits[self.penalized] = own
        return logits

    def count(self, tokens: Tensor, running: Tensor) -> None:
        """Counts the drawn tokens [b] of the rows that are `running` [b] (bool)."""
        if self.penalized is not None:
            self.seen.counts[self.slots, tokens[self.penalized]] += 2 * running[self.penalized].int()


def _index(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def _floats(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
