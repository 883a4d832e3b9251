"""How the next token is sampled. Each row is sampled independently of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m1.errors import UserError
from m1.ops import sample_token


@dataclass(frozen=True)
class SamplingParams:
    """How a request's sequences are sampled: how many, how long, from which distribution, and where they stop.

    Args:
        n: number of sequences sampled from the prompt.
        max_tokens: maximum number of new tokens per sequence.
        temperature: divides the logits; 0 is greedy.
        top_k: samples from the k likeliest tokens only; 0 for all.
        top_p: samples from the smallest set of likeliest tokens that has this probability; 1 for all.
        min_p: samples from tokens at least `min_p` times as likely as the likeliest; 0 for all.
        seed: seed of the random draws. The draws of sequence j depend only on seed and j.
        stop: strings that end a sequence, whose text is cut before them. They may begin inside a token. Only `LLM` sees
            text, so the engine alone ignores them.
        stop_token_ids: generation stops after any of these tokens, too.
        ignore_eos: ignores the engine's own stop tokens, such as end-of-sequence tokens.

    Raises:
        UserError: a value out of range, or an empty stop string.
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
        checks = {
            "n": self.n >= 1,
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
        }
        for name, fits in checks.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)} is out of range")
        if not all(self.stop):
            raise UserError("stop: an empty string would end every sequence at once")


class SamplingBatch:
    """Samples one token per row of a batch, each row with its own settings and random stream.

    The settings are made into tensors once, since a batch lasts for many steps.

    Args:
        params: the settings of each row.
        streams: the random stream of each row, a seed from `fold_in`.
        device: of the logits.
    """

    def __init__(self, params: Sequence[SamplingParams], streams: Sequence[int], device: torch.device):
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)[:, None]

        self.streams = np.array(streams, dtype=np.uint64)
        self.temperature = column("temperature")
        self.top_k, self.max_k = column("top_k", torch.long), max((p.top_k for p in params), default=0)
        self.top_p, self.any_top_p = column("top_p"), any(p.top_p < 1 for p in params)
        self.min_p, self.any_min_p = column("min_p"), any(p.min_p > 0 for p in params)
        truncated = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params]
        self.truncated, self.any_truncated = torch.tensor(truncated, device=device), any(truncated)

    def sample(self, logits: Tensor, drawn: np.ndarray) -> tuple[Tensor, Tensor]:
        """Draws one token per row.

        Args:
            logits: [b, V], float32 or bfloat16.
            drawn: [b] integers, the number of tokens that each row has drawn before.

        Returns:
            tokens: [b] int64.
            logprobs: [b] float32, under softmax(logits / temperature) before truncation, or under softmax(logits) at
                temperature 0. NaN where a row's logits have a NaN.
        """
        uniform = torch.from_numpy(uniforms(self.streams, drawn)).to(logits.device, non_blocking=True)
        tokens, logprobs = sample_token(logits, uniform, self.temperature[:, 0])
        if self.any_truncated:
            greedy = self.temperature == 0
            scaled = (logits.float() / self.temperature.masked_fill(greedy, 1.0)).log_softmax(dim=-1)
            likely, _ = sample_token(self.truncate(scaled), uniform, (~greedy[:, 0]).float())
            tokens = torch.where(self.truncated, likely, tokens)
            logprobs = torch.where(self.truncated, scaled.gather(1, likely[:, None])[:, 0], logprobs)
        return tokens, logprobs

    def truncate(self, logprobs: Tensor) -> Tensor:
        """Sets logprobs [b, V] to -inf where top-k, top-p or min-p exclude a token. The likeliest always stays.

        The filters apply in this order. Each sees the distribution that the previous one left, as in transformers.
        """
        size = logprobs.shape[-1]
        if self.max_k:
            likeliest = logprobs.topk(min(self.max_k, size)).values
            kth = likeliest.gather(1, (self.top_k.clamp(1, size) - 1))
            logprobs = logprobs.masked_fill((logprobs < kth) & (self.top_k > 0), -torch.inf)
            if self.any_top_p or self.any_min_p:
                logprobs = logprobs.log_softmax(dim=-1)
        if self.any_top_p:
            logprobs = logprobs.masked_fill(logprobs < self._nucleus_threshold(logprobs), -torch.inf)
        if self.any_min_p:
            floor = logprobs.amax(dim=-1, keepdim=True) + self.min_p.log()
            logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf)
        return logprobs

    def _nucleus_threshold(self, logprobs: Tensor) -> Tensor:
        """[b, 1] log-probability of the last token inside top-p.

        Looks at the 64 likeliest tokens first, then at four times as many until they suffice. A full sort is rare.
        """
        size, count = logprobs.shape[-1], 64
        while True:
            likeliest = logprobs.topk(min(count, size)).values
            mass = likeliest.exp().cumsum(dim=-1)
            inside = mass - likeliest.exp() < self.top_p  # the likelier tokens have less than top_p
            if count >= size or not (inside[:, -1:] & (self.top_p < 1)).any():
                last = inside.sum(dim=-1, keepdim=True).clamp(min=1) - 1
                threshold = likeliest.gather(1, last)
                return threshold.masked_fill(self.top_p >= 1, -torch.inf)
            count *= 4


def fold_in(seed: int, i: int) -> int:
    """Derives the i-th child seed of a seed, e.g. that of a request's i-th sequence."""
    with np.errstate(over="ignore"):
        return int(_mix(_mix(np.uint64(seed % 2**64)) + np.uint64(i)))


def uniforms(streams: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Element `index` [b] of each stream: [b] float64 in [0, 1). Counter-based (SplitMix64), so it has no state."""
    with np.errstate(over="ignore"):
        bits = _mix(streams + index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
