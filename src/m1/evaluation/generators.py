"""Where samples come from: this project's engine, or transformers' `generate`. A server is in endpoint.py.

A generator is asked for samples of prompts and yields each as it finishes. While the caller holds one (to grade it, to
write it down), a local generator stands still, and so does its clock.
"""

import collections.abc
import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from m1.engine import LLM, Request, SamplingParams, stop_tokens
from m1.errors import UserError
from m1.model.cache_layout import slot_bytes
from m1.model.tokenizer import encode_chat

CONTEXT_FOR_CACHE = 4096


@dataclass(frozen=True)
class Ask:
    """One sample for each of `rounds`, of a user's message. `seed` belongs to the first of them."""

    problem: str
    prompt: str
    rounds: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sample:
    """`seconds` of generation since the generator was asked; None what a server doesn't say.

    `logprob` is the sum over the tokens.
    """

    problem: str
    round: int
    text: str
    tokens: int | None
    logprob: float | None
    finish_reason: str
    seconds: float


Samples = collections.abc.Generator[Sample, None, None]


class Generator(Protocol):
    """
    Attributes:
        by_round: wants to be asked for one sample of every problem, then for the next, so that 1, 2, ... n samples have
            a measured number of seconds each. Otherwise it is asked for everything at once.
    """

    by_round: bool

    def identity(self) -> dict[str, str]:
        """What samples must have in common to be counted together."""

    def facts(self) -> dict[str, Any]:
        """What else the result should say about it."""

    def generate(self, asks: Sequence[Ask], params: SamplingParams) -> Samples:
        """Samples in the order in which they finish. Closing the iterator ends what is unfinished."""


class EngineGenerator:
    """This project's engine. A sample depends on its prompt and seed alone.

    Args:
        max_num_seqs, quantize: as in `Engine`.
    """

    by_round = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_num_seqs: int = 256,
        quantize: str | None = None,
    ):
        self.llm, self.quantize = LLM(model, tokenizer, max_num_seqs=max_num_seqs, quantize=quantize), quantize

    def identity(self) -> dict[str, str]:
        name = f"engine, {self.quantize}" if self.quantize else "engine"
        return {"generator": name, "model": weights_hash(self.llm.model)}

    def facts(self) -> dict[str, Any]:
        return model_facts(self.llm.model)

    def generate(self, asks: Sequence[Ask], params: SamplingParams) -> Samples:
        prompts = [encode_chat(self.llm.tokenizer, ask.prompt) for ask in asks]
        engine = self.llm.engine_for(prompts, params.max_tokens)
        requests = [
            Request(prompt, replace(params, seed=ask.seed, n=len(ask.rounds)), i)
            for i, (ask, prompt) in enumerate(zip(asks, prompts, strict=True))
        ]
        started = time.monotonic()
        with closing(engine.run(requests)) as steps:
            for sequence in chain.from_iterable(steps):
                now, ask = time.monotonic(), asks[sequence.request.id]
                tokens, logprob, reason = sequence.token_ids, sum(sequence.logprobs), sequence.finish_reason
                text, round_ = self.llm.decode(tokens), ask.rounds[sequence.index]
                yield Sample(ask.problem, round_, text, len(tokens), logprob, reason, now - started)
                started += time.monotonic() - now


class TransformersGenerator:
    """transformers' `generate`, in left-padded batches. A sample also depends on its batch.

    Nothing of the checkpoint's generation_config.json is used, so that both local generators sample alike.

    Args:
        max_num_seqs: sequences of a batch.
    """

    by_round = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_num_seqs: int = 256):
        if max_num_seqs < 1:
            raise UserError(f"max_num_seqs={max_num_seqs}: must be at least 1")
        self.model, self.tokenizer, self.max_num_seqs = model.eval(), tokenizer, max_num_seqs

    def identity(self) -> dict[str, str]:
        return {"generator": "transformers", "model": weights_hash(self.model)}

    def facts(self) -> dict[str, Any]:
        return model_facts(self.model)

    def generate(self, asks: Sequence[Ask], params: SamplingParams) -> Samples:
        stop = stop_tokens(self.model, self.tokenizer)
        config = GenerationConfig(
            max_new_tokens=params.max_tokens,
            do_sample=params.temperature > 0,
            temperature=params.temperature or None,
            top_k=0,
            eos_token_id=stop or None,
            pad_token_id=next((token for token in (self.tokenizer.pad_token_id, *stop) if token is not None), 0),
        )
        jobs = [(ask, round_) for ask in asks for round_ in ask.rounds]
        prompts = {ask.problem: encode_chat(self.tokenizer, ask.prompt) for ask in asks}
        context = self.model.config.max_position_embeddings
        if (longest := max(map(len, prompts.values()), default=0)) + params.max_tokens > context:
            raise UserError(
                f"a prompt has {longest} tokens and max_tokens is {params.max_tokens}, together more than the model's "
                f"context of {context}: shorten one of them"
            )
        started = time.monotonic()
        for first in range(0, len(jobs), self.max_num_seqs):
            batch = jobs[first : first + self.max_num_seqs]
            outputs = self._sample([prompts[ask.problem] for ask, _ in batch], config, batch[0][0].seed + first)
            now = time.monotonic()
            for (ask, round_), tokens, logprobs in zip(batch, *outputs, strict=True):
                end = next((i for i, token in enumerate(tokens, start=1) if token in stop), None)
                text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
                reason, logprob = "stop" if end else "length", sum(logprobs[:end])
                yield Sample(ask.problem, round_, text, end or len(tokens), logprob, reason, now - started)
            started += time.monotonic() - now

    @torch.inference_mode()
    def _sample(
        self, prompts: list[list[int]], config: GenerationConfig, seed: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens of each prompt, padded at their ends, and their log-probabilities."""
        longest = max(map(len, prompts))
        pad = config.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        torch.manual_seed(seed % 2**63)
        own, self.model.generation_config = self.model.generation_config, config
        scores = _Logprobs(config.temperature or 1.0)
        try:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([scores]),
            )
        finally:
            self.model.generation_config = own
        scores.see(output)
        return output[:, longest:].tolist(), torch.cat(scores.columns, dim=1).tolist()


class _Logprobs(LogitsProcessor):
    """Leaves the logits as they are and keeps the log-probabilities, at the sampling temperature, of what is drawn."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.columns: list[Tensor] = []  # [b, 1] for each new token
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[b, tokens so far], [b, V]: the next token's logits, before transformers divides them by the temperature."""
        self.see(input_ids)
        self._scores = (scores.float() / self.temperature).log_softmax(dim=-1)
        return scores

    def see(self, input_ids: Tensor) -> None:
        if self._scores is not None:
            self.columns.append(self._scores.gather(1, input_ids[:, -1:]))


LOCAL: dict[str, type[EngineGenerator] | type[TransformersGenerator]] = {
    "engine": EngineGenerator,
    "transformers": TransformersGenerator,
}


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cache_bytes_per_sequence_at_4k": slot_bytes(model.config, CONTEXT_FOR_CACHE, next(model.parameters()).dtype),
    }


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 of all parameters' bytes."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
