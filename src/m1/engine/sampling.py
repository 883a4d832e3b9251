"""How the next token is sampled. Each row is sampled independently of the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.errors import UserError
from m1.ops import sample_token
from m1.ops.random_bits import signed, uniforms
from m1.options import INT32_MAX, INT64_MAX, check_range
from m1.sampling_options import PenaltyOptions, SamplingOptions, check_distribution, check_penalties


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
        min_tokens: number of tokens before which stop tokens are never drawn and stop strings don't end a sequence.
        repetition_penalty: divides positive logits of tokens in the prompt or the sequence, and multiplies negative
            ones, 0.01 to 100; 1 for none. Keskar et al. 2019, arXiv 1909.05858.
        presence_penalty: subtracted from the logits of tokens in the sequence, -2 to 2.
        frequency_penalty: subtracted from the logit of a token once per occurrence in the sequence, -2 to 2.
        logit_bias: by token id, added to the logit, -100 to 100.
        logprobs: at each position, also keeps the log-probabilities of as many of the likeliest tokens
            (`Sequence.top_logprobs`).

    Log-probabilities are the model's at this temperature: of no bias, penalty, minimum length or truncation. vLLM's are
    by default those of temperature 1.

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
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name}={getattr(self, name)}: must be an integer")
        for name, least in {"n": 1, "max_tokens": 1, "logprobs": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is out of range: must be at least {least}")
        check_distribution(self)
        check_penalties(self)
        check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral):
                raise UserError(f"logit_bias has token {token!r}: must be an integer")
            check_range(f"logit_bias of token {token}", bias, -100, 100)
        if not all(self.stop):
            raise UserError("stop: an empty string would end every sequence at once")

    @classmethod
    def of(cls, options: SamplingOptions, **others: Any) -> "SamplingParams":
        """The parameters with a command's options. `others` are those that not every command has: n, seed, stop."""
        names = ["temperature", "top_k", "top_p", "min_p"]
        if isinstance(options, PenaltyOptions):
            names += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
            others["min_tokens"] = options.min_new_tokens
        return cls(max_tokens=options.max_new_tokens, **{name: getattr(options, name) for name in names}, **others)

    @property
    def truncates(self) -> bool:
        """Whether a sequence samples from a part of the tokens only."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def processes(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        return self.penalizes or self.min_tokens > 0 or bool(self.logit_bias)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from all by the model's logits, and nothing else is wanted."""
        return not (self.truncates or self.processes or self.logprobs)


class Draw(NamedTuple):
    """What `SamplingBatch.sample` returns, for b rows.

    Attributes:
        tokens: [b] int64.
        logprobs: [b] float32.
        top: [b, k, 2] float64, the k likeliest tokens and their log-probabilities; k is the most that a row asks for.
            Zeros for rows that ask for none.
    """

    tokens: Tensor
    logprobs: Tensor
    top: Tensor


class SamplingBatch:
    """Samples one token per row of a batch, each row with its own settings and random stream.

    Attributes:
        streams: [b] int64, the random stream of each row (see `random_bits`).
        temperature, top_p, min_p: [b, 1] float32.
        top_k: [b, 1] int64.
        max_k: the largest top_k.
        any_top_p, any_min_p: whether any row has one.
        asking: [a] int64, the rows that ask for log-probabilities of the likeliest tokens.
        max_logprobs: the most that one asks for.
    """

    def __init__(
        self, params: Mapping[int, SamplingParams], streams: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
        min_p: Tensor,
    ):  # fmt: skip
        """Takes the rows' settings as tensors on the device. `params`: by row, those that aren't plain, at least."""
        self.streams, self.temperature, self.top_k, self.top_p, self.min_p = streams, temperature, top_k, top_p, min_p
        self.heat = temperature.masked_fill(temperature == 0, 1.0)
        self.max_k = max((p.top_k for p in params.values()), default=0)
        self.any_top_p = any(p.top_p < 1 for p in params.values())
        self.any_min_p = any(p.min_p > 0 for p in params.values())
        self.ranked = (top_k > 0) | (top_p < 1)
        asking = [row for row, p in params.items() if p.logprobs]
        self.asking = torch.tensor(asking, dtype=torch.long).to(streams.device, non_blocking=True)
        self.max_logprobs = max((p.logprobs for p in params.values()), default=0)

    @classmethod
    def of(cls, params: Sequence[SamplingParams], streams: Sequence[int], device: torch.device) -> "SamplingBatch":
        """Makes a batch of each row's settings and its stream, a seed from `fold_in`."""
        floats = torch.tensor([(p.temperature, p.top_p, p.min_p) for p in params], dtype=torch.float32).to(device)[
            :, :, None
        ]
        integers = [(signed(stream), p.top_k) for stream, p in zip(streams, params, strict=True)]
        stream, top_k = torch.tensor(integers, dtype=torch.long).to(device).unbind(1)
        return cls(dict(enumerate(params)), stream, floats[:, 0], top_k[:, None], floats[:, 1], floats[:, 2])

    def sample(self, logits: Tensor, drawn: Tensor, processed: Tensor | None = None) -> Draw:
        """Draws one token per row.

        Log-probabilities are under softmax(logits / temperature), before processing and truncation, or under
        softmax(logits) at temperature 0. NaN where a row's logits have a NaN.

        Args:
            logits: [b, V] float32, bfloat16 or float16.
            drawn: [b] int64, the number of tokens that each row has drawn before.
            processed: [b, V], what tokens are drawn from if not from `logits`.
        """
        uniform, heat = uniforms(self.streams, drawn), self.heat
        tokens, logprobs = whole = sample_token(logits, uniform, self.temperature[:, 0])
        truncates = bool(self.max_k or self.any_top_p or self.any_min_p)
        if truncates or processed is not None:
            left = logits if processed is None else processed
            tokens, _ = sample_token(self.truncate(left) if truncates else left, uniform, self.temperature[:, 0])
            logprobs = logprobs_of(tokens[:, None], logits, heat, *whole)[:, 0]
        top = heat.new_zeros(len(logits), self.max_logprobs, 2, dtype=torch.float64)
        if self.max_logprobs:
            asking = [t[self.asking] for t in (logits, heat, *whole)]
            likeliest = top_ids(asking[0], self.max_logprobs)
            top[self.asking] = torch.stack([likeliest.double(), logprobs_of(likeliest, *asking).double()], dim=-1)
        return Draw(tokens, logprobs, top)

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


def logprobs_of(tokens: Tensor, logits: Tensor, heat: Tensor, drawn: Tensor, logprobs: Tensor) -> Tensor:
    """Log-probabilities of tokens [b, k] under softmax(logits / heat), from those of the tokens [b] drawn from it."""
    step = logits.gather(1, tokens).float() - logits.gather(1, drawn[:, None]).float()
    return logprobs[:, None] + step / heat


def scores_of(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Scores tokens [b] under softmax(logits), logits [b, V].

    Returns [2 + 2k, b] float64: the tokens, their log-probabilities, then the k likeliest tokens, each with its own.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.cat([tokens[:, None], top_ids(logits, k)], dim=1)
    return torch.stack([ids.double(), logprobs.gather(1, ids).double()], dim=-1).flatten(1).T


def top_ids(logits: Tensor, k: int) -> Tensor:
    """Ids [b, k] of the k highest of logits [b, V], in order; of equal ones, the lowest ids come first.

    `topk` leaves the order of equal ones open. So it gets integers: the logit's bits, then the id's.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ INT32_MAX, bits).long()
    ids = torch.arange(logits.shape[1], device=logits.device)
    return (ascending * 2**32 - ids).topk(k).indices
