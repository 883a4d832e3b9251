"""Samplers draw an evaluation's samples, with this project's engine or with transformers' `generate`.

The sampler for servers is in endpoint.py. A sampler yields each sample as it finishes. While the caller grades and
stores the sample, a local sampler pauses, and so does its clock.
"""

import collections.abc
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

from m1.engine import LLM, Request, SamplingParams, fold_in, stop_tokens
from m1.engine.data_parallel import DataParallel
from m1.engine.sequence import shortened
from m1.errors import UserError
from m1.grading import with_thought
from m1.model.cache_layout import slot_bytes
from m1.model.checkpoint import weights_hash
from m1.model.tokenizer import decode_text, encode_chat
from m1.options import Quantization
from m1.tasks.prompts import Messages

CONTEXT_FOR_CACHE = 4096


@dataclass(frozen=True)
class SampleRequest:
    """A request to a sampler for some samples of a problem.

    Attributes:
        problem: the problem's id.
        messages: the chat that asks for its solution.
        rounds: numbers of the wanted samples among the problem's, from 0.
        seed: the problem's. That of a sample is `fold_in(seed, round)`, whatever else is asked for.
    """

    problem: str
    messages: Messages
    rounds: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sample:
    """A finished sample of an evaluation, not yet graded.

    Attributes:
        problem: the problem's id.
        round: number of the sample among the problem's, from 0.
        text: the generated text, with the <think> that the prompt ended with.
        tokens: number of generated tokens; None if a server doesn't report it.
        logprob: sum of the tokens' log-probabilities; None if a server doesn't report them.
        finish_reason: "stop", "length", or what a server reports.
        seconds: from the call of `generate` to the end of this sample, without a local sampler's pauses.
    """

    problem: str
    round: int
    text: str
    tokens: int | None
    logprob: float | None
    finish_reason: str
    seconds: float


Samples = collections.abc.Generator[Sample, None, None]


class Sampler(Protocol):
    """The interface through which `evaluate` draws samples of a model."""

    def identity(self) -> dict[str, str]:
        """The sampler's kind and the model. A run holds samples of one identity only."""

    def facts(self) -> dict[str, Any]:
        """Further facts about the model, which the result lists."""

    def generate(self, requests: Sequence[SampleRequest], params: SamplingParams) -> Samples:
        """Yields samples in the order in which they finish. Closing the iterator ends the unfinished ones."""


class LocalSampler:
    """A sampler of a model in this process.

    Args:
        model: the network.
        tokenizer: its tokenizer, with a chat template.
        max_num_seqs: maximum number of samples decoded in parallel.
        quantize: "int8" or "int4" to round the weights of linear layers, where the sampler can.
    """

    kind: str  # in results

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_num_seqs: int = 256,
        quantize: Quantization | None = None,
    ):
        self.model, self.tokenizer, self.max_num_seqs, self.quantize = model, tokenizer, max_num_seqs, quantize

    def identity(self) -> dict[str, str]:
        """The sampler's kind, with the quantization if any, and a hash of the weights."""
        name = f"{self.kind}, {self.quantize}" if self.quantize else self.kind
        return {"sampler": name, "model": weights_hash(self.model)}

    def facts(self) -> dict[str, Any]:
        """The model's size and cache."""
        return model_facts(self.model)


class EngineSampler(LocalSampler):
    """Draws an evaluation's samples with this project's engine, or with one per device.

    In float32 on a CPU, a sample depends only on its prompt, settings and seed (see `Engine`).

    Args:
        llm: runs the requests, with these settings; when None, an `LLM` of the model.
    """

    kind = "engine"

    def __init__(self, *model: Any, llm: LLM | DataParallel | None = None, **options: Any):
        super().__init__(*model, **options)
        self.llm = llm or LLM(self.model, self.tokenizer, max_num_seqs=self.max_num_seqs, quantize=self.quantize)

    def generate(self, requests: Sequence[SampleRequest], params: SamplingParams) -> Samples:
        """Yields samples in the order in which they finish. A prompt is prefilled once for all its samples.

        Raises:
            UserError: a prompt the engine refuses.
        """
        submitted = [
            Request(self.llm.encode(request.messages), replace(params, seed=request.seed), i, request.rounds)
            for i, request in enumerate(requests)
        ]
        with closing(self.llm.run(submitted)) as steps:
            for ended in chain.from_iterable(steps):
                problem, prompt = requests[ended.prompt].problem, self.llm.decode(submitted[ended.prompt].tokens)
                text, cost = with_thought(prompt, ended.text), (ended.tokens, ended.logprob)
                yield Sample(problem, ended.index, text, *cost, ended.finish_reason, ended.seconds)


class TransformersSampler(LocalSampler):
    """Draws an evaluation's samples with transformers' `generate`, in left-padded batches.

    A batch has the seed of its first sample, so a sample also depends on its batch. The checkpoint's
    generation_config.json is ignored, so that both local samplers use the same settings.

    Raises:
        UserError: `max_num_seqs` below 1, or `quantize` given: only the engine rounds weights.
    """

    kind = "transformers"

    def __init__(self, *model: Any, **options: Any):
        super().__init__(*model, **options)
        if self.max_num_seqs < 1:
            raise UserError(f"max_num_seqs={self.max_num_seqs}: must be at least 1")
        if self.quantize:
            raise UserError(f"quantize {self.quantize}: only this project's engine rounds weights")
        self.model.eval()

    def generate(self, requests: Sequence[SampleRequest], params: SamplingParams) -> Samples:
        """Yields samples batch by batch. Raises UserError for a prompt that is too long for the model."""
        stop = stop_tokens(self.model, self.tokenizer)
        prompts = {request.problem: encode_chat(self.tokenizer, request.messages) for request in requests}
        longest, context = max(map(len, prompts.values()), default=0), self.model.config.max_position_embeddings
        if longest >= context:
            raise UserError(f"a prompt has {longest} tokens, and the model's context is {context}: shorten it")
        limit = f"the model's context of {context} tokens"
        lengths = {name: shortened(params, context - len(p), limit).max_tokens for name, p in prompts.items()}
        # rows of a batch end together, so they have the same length
        jobs = [(request, round_) for request in requests for round_ in request.rounds]
        jobs.sort(key=lambda job: -lengths[job[0].problem])
        drawn = dict(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p or None)
        config = GenerationConfig(
            do_sample=params.temperature > 0,
            **drawn if params.temperature > 0 else {"top_k": 0},
            eos_token_id=stop or None,
            pad_token_id=next((token for token in (self.tokenizer.pad_token_id, *stop) if token is not None), 0),
        )
        started = time.monotonic()
        first = 0
        while first < len(jobs):
            config.max_new_tokens = lengths[jobs[first][0].problem]
            batch = [
                job
                for job in jobs[first : first + self.max_num_seqs]
                if lengths[job[0].problem] == config.max_new_tokens
            ]
            (leader, round_), *_ = batch
            seed = fold_in(leader.seed, round_)
            outputs = self._sample([prompts[request.problem] for request, _ in batch], config, seed)
            now = time.monotonic()
            for (request, round_), tokens, logprobs in zip(batch, *outputs, strict=True):
                end = next((i for i, token in enumerate(tokens, start=1) if token in stop), None)
                text = decode_text(self.tokenizer, tokens[:end], stop)
                text = with_thought(decode_text(self.tokenizer, prompts[request.problem]), text)
                reason, logprob = "stop" if end else "length", sum(logprobs[:end])
                yield Sample(request.problem, round_, text, end or len(tokens), logprob, reason, now - started)
            started += time.monotonic() - now
            first += len(batch)

    @torch.inference_mode()
    def _sample(
        self, prompts: list[list[int]], config: GenerationConfig, seed: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens per prompt, padded at their ends, and their log-probabilities."""
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
    """Records the drawn tokens' log-probabilities at the sampling temperature. It doesn't change the logits."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.columns: list[Tensor] = []  # [b, 1] for each new token
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Gets [b, tokens so far] and the next logits [b, V], not yet divided by the temperature. Returns these."""
        self.see(input_ids)
        self._scores = (scores.float() / self.temperature).log_softmax(dim=-1)
        return scores

    def see(self, input_ids: Tensor) -> None:
        """Records the log-probabilities of the last tokens of `input_ids`."""
        if self._scores is not None:
            self.columns.append(self._scores.gather(1, input_ids[:, -1:]))


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """The dtype, the number of parameters, and the cache bytes of a sequence of CONTEXT_FOR_CACHE tokens."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cache_bytes_per_sequence_at_4k": slot_bytes(model.config, CONTEXT_FOR_CACHE, next(model.parameters()).dtype),
    }
