"""How the next token is sampled. Each row is sampled independently of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.errors import UserError
from m1.ops import sample_token
from m1.ops.random_bits import signed, uniforms
from m1.recipe import INT64_MAX, SamplingOptions, check_distribution


@dataclass(frozen=True)
class SamplingParams:
    """How a request's sequences are sampled: how many, how long, from which distribution, and where they stop.

    Args:
        n: number of sequences sampled from the prompt.
        max_tokens: maximum number of new tokens per sequence.
        temperature: divides the logits; 0 is greedy.
        top_k: samples from the k likeliest tokens only, of equal ones those with the lowest ids; 0 for all.
        top_p: samples from the smallest set of likeliest tokens that has this probability; 1 for all.
        min_p: samples from tokens at least `min_p` times as likely as the likeliest; 0 for all.
        seed: seed of the random draws. The draws of sequence j depend only on seed and j.
        stop: strings that end a sequence, whose text is cut before them. They may begin inside a token. Only `LLM` sees
            text, so the engine alone ignores them.
        stop_token_ids: generation stops after any of these tokens, too.
        ignore_eos: ignores the engine's own stop tokens, such as end-of-sequence tokens.

    Raises:
        UserError: a value out of range or of the wrong type, or an empty stop string.
    """

    n: int = 1
    max_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens", "top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name}={getattr(self, name)}: must be an integer")
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range: must be at least 1")
        check_distribution(self)
        if not all(self.stop):
            raise UserError("stop: an empty string would end every sequence at once")

    @classmethod
    def of(cls, options: SamplingOptions, **others: Any) -> "SamplingParams":
        """The parameters with a command's options. `others` are those that not every command has: n, seed, stop."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return cls(max_tokens=options.max_new_tokens, **{name: getattr(options, name) for name in names}, **others)


class SamplingBatch:
    """Samples one token per row of a batch, each row with its own settings and random stream.

    Attributes:
        streams: [b] int64, the random stream of each row (see `random_bits`).
        temperature, top_p, min_p: [b, 1] float32.
        top_k: [b, 1] int64.
        max_k: the largest top_k.
        any_top_p, any_min_p: whether any row has one.
    """

    def __init__(
        self, params: Sequence[SamplingParams], streams: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
        min_p: Tensor,
    ):  # fmt: skip
        """Takes the rows' settings as tensors on the device. `params` are those of the rows that truncate, at least."""
        self.streams, self.temperature, self.top_k, self.top_p, self.min_p = streams, temperature, top_k, top_p, min_p
        self.heat = temperature.masked_fill(temperature == 0, 1.0)
        self.max_k = max((p.top_k for p in params), default=0)
        self.any_top_p, self.any_min_p = any(p.top_p < 1 for p in params), any(p.min_p > 0 for p in params)
        self.ranked = (top_k > 0) | (top_p < 1)

    @classmethod
    def of(cls, params: Sequence[SamplingParams], streams: Sequence[int], device: torch.device) -> "SamplingBatch":
        """Makes a batch of each row's settings and its stream, a seed from `fold_in`."""
        floats = torch.tensor([(p.temperature, p.top_p, p.min_p) for p in params], dtype=torch.float32).to(device)[
            :, :, None
        ]
        integers = [(signed(stream), p.top_k) for stream, p in zip(streams, params, strict=True)]
        stream, top_k = torch.tensor(integers, dtype=torch.long).to(device).unbind(1)
        return cls(params, stream, floats[:, 0], top_k[:, None], floats[:, 1], floats[:, 2])

    def sample(self, logits: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Draws one token per row.

        Args:
            logits: [b, V] float32, bfloat16 or float16.
            drawn: [b] int64, the number of tokens that each row has drawn before.

        Returns:
            tokens: [b] int64.
            logprobs: [b] float32, under softmax(logits / temperature) before truncation, or under softmax(logits) at
                temperature 0. NaN where a row's logits have a NaN.
        """
        uniform = uniforms(self.streams, drawn)
        tokens, logprobs = sample_token(logits, uniform, self.temperature[:, 0])
        if self.max_k or self.any_top_p or self.any_min_p:
            whole = tokens
            tokens, _ = sample_token(self.truncate(logits), uniform, self.temperature[:, 0])
            # under the whole distribution: from the log-probability of a token drawn from it
            step = logits.gather(1, tokens[:, None]).float() - logits.gather(1, whole[:, None]).float()
            logprobs = logprobs + (step / self.heat)[:, 0]
        return tokens, logprobs

    def truncate(self, logits: Tensor) -> Tensor:
        """Sets logits [b, V] to -inf where top-k, top-p or min-p exclude a token. The likeliest always stays.

        The filters apply in this order, as in transformers. Each sees the distribution that the previous one left. A
        row's tokens are ordered by their logits, and equal ones by their ids, as at temperature 0:

        - top-k keeps the first k. transformers and vLLM also keep every token equal to the k-th.
        - top-p keeps the fewest of the first whose probability reaches top_p. transformers and vLLM keep as many, but
          which of several equal ones is up to torch.sort.
        - min-p keeps a token that is exactly `min_p` times as likely as the likeliest, as in transformers and vLLM. In
          vLLM it comes first.
        """
        logits = logits.float()
        kept = torch.ones_like(logits, dtype=torch.bool)
        if self.max_k or self.any_top_p:
            last, count = self._last(logits)
            equal = logits == last
            if (equal.sum(dim=-1, keepdim=True) > count).any():  # rare in float32
                equal &= equal.cumsum(dim=-1, dtype=torch.int32) <= count
            kept = (logits > last) | equal | ~self.ranked
        if self.any_min_p:
            kept &= self._weights(logits, logits.amax(dim=-1, keepdim=True)) >= self.min_p
        return logits.masked_fill(~kept, -torch.inf)

    def _last(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The last logit [b, 1] that top-k and top-p keep in each row, and how many tokens with this logit they keep.

        It looks at the 64 likeliest first, then at four times as many until they suffice. A full sort is rare.
        """
        size, count = logits.shape[-1], max(64, self.max_k + 1)
        whole = None
        if self.any_top_p:
            likeliest = logits.amax(dim=-1, keepdim=True)
            # sum() would split a single row among threads, and softmax() is 1e-5 off for 50,000 tokens
            whole = self._weights(logits, likeliest).cumsum(dim=-1)[:, -1:]
        while True:
            values = logits.topk(min(count, size)).values
            inside = self._inside(values, whole)
            if count >= size or not (inside[:, -1:] & self.ranked).any():
                last = values.gather(1, inside.sum(dim=-1, keepdim=True) - 1)
                return last, (inside & (values == last)).sum(dim=-1, keepdim=True)
            count *= 4

    def _inside(self, likeliest: Tensor, whole: Tensor | None) -> Tensor:
        """Which of the likeliest logits [b, c], in order, top-k and top-p keep (bool).

        `whole` [b, 1] is the sum of all `_weights`, needed if any top_p is below 1.
        """
        c = likeliest.shape[-1]
        inside = torch.arange(c, device=likeliest.device) < self.top_k.masked_fill(self.top_k == 0, INT64_MAX)
        if whole is not None:
            mass = F.pad(self._weights(likeliest, likeliest).cumsum(dim=-1), (1, 0))
            whole = torch.where(self.top_k > 0, mass.gather(1, self.top_k.clamp(max=c)), whole)
            inside &= (mass[:, :-1] < self.top_p * whole) | (self.top_p >= 1)
        inside[:, 0] = True
        return inside

    def _weights(self, logits: Tensor, likeliest: Tensor) -> Tensor:
        """Probabilities of logits [b, c] as multiples of the likeliest token's, whose logit is likeliest[:, 0]."""
        return ((logits - likeliest[:, :1]) / self.heat).exp()


def truncates(params: SamplingParams) -> bool:
    """Whether these parameters sample from a part of the tokens only."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0
