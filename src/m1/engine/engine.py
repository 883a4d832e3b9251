"""Continuous batching, tokens in and tokens out: a step admits what has a slot and decodes one token of each sample.

It knows no text and no HTTP; `LLM` (llm.py) does.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine.graphs import GraphRunner
from m1.engine.runner import Runner
from m1.engine.sampling import SamplingBatch, SamplingParams, stream_of
from m1.engine.scheduler import Scheduler, Stats
from m1.engine.sequence import Completion, Request, Running
from m1.engine.state import Slots, slots_that_fit
from m1.errors import UserError

DEFAULT_MAX_LEN = 8192


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """The end-of-sequence tokens of the model and, if given, of its tokenizer."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    own = [eos] if isinstance(eos, int) else list(eos or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        own.append(tokenizer.eos_token_id)
    return sorted(set(own))


def max_len_for(model: PreTrainedModel, prompts: Iterable[Sequence[int]], max_tokens: int) -> int:
    """An engine's max_len for these prompts: no more than the model's context, beyond which `submit` refuses."""
    return min(max(map(len, prompts), default=0) + max_tokens, model.config.max_position_embeddings)


class Engine:
    """Generates from an M1, Llama, Qwen2 or Qwen3 model on its device, with the weights it has now.

    A sample's tokens depend on its prompt, its settings and its seed, not on what else is being decoded.

    Args:
        model: mustn't change as long as the engine lives; some weights are packed, others shared.
        stop_token_ids: a sample ends behind one of these; the model's eos tokens when None.
        max_batch: samples decoded together; fewer if memory has no room for so many.
        max_len: tokens of a prompt and its sample together; the model's context, at most 8192, when None.
        prefill_chunk: prompt tokens that are prefilled between two decode steps.
        snapshots: prompts (and beginnings of prompts) whose states are kept for the next that begins so.
        quantize: "int8" rounds the weights of linear layers, for fewer bytes a step on a CPU; None keeps them.

    Raises:
        UserError: a model the engine can't run, or an impossible setting.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        stop_token_ids: Sequence[int] | None = None,
        max_batch: int = 256,
        max_len: int | None = None,
        prefill_chunk: int = 512,
        snapshots: int = 8,
        quantize: str | None = None,
    ):
        self.context: int = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_LEN
        self.max_len = min(self.context, DEFAULT_MAX_LEN) if max_len is None else max_len
        for name, value in {"max_batch": max_batch, "max_len": self.max_len, "prefill_chunk": prefill_chunk}.items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        if self.max_len > self.context:
            raise UserError(f"max_len={max_len}: the model's context is {self.context} tokens")
        if quantize not in (None, "int8") or (quantize and model.device.type != "cpu"):
            raise UserError(f"quantize={quantize!r} on {model.device.type}: only int8, and only on a CPU")
        self.stop = frozenset(stop_tokens(model) if stop_token_ids is None else stop_token_ids)
        self.vocab_size = model.config.vocab_size
        count = min(max_batch, slots_that_fit(model.config, self.max_len, model.dtype, model.device))
        self.slots = Slots(model.config, count, self.max_len, model.dtype, model.device)
        self.runner = (GraphRunner if model.device.type == "cuda" else Runner)(model, self.slots, quantize == "int8")
        self.scheduler = Scheduler(self.runner, self.slots, prefill_chunk, snapshots)
        self._batch = Batch([], model.device)

    @property
    def stats(self) -> Stats:
        return self.scheduler.stats

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def submit(self, tokens: Sequence[int], params: SamplingParams, n: int = 1, prompt: int = 0) -> Request:
        """Queues n samples of a prompt; `step` fills their completions.

        Raises:
            UserError: an empty prompt, a token that isn't in the vocabulary, or more tokens than `max_len`.
        """
        if not tokens:
            raise UserError(f"prompt {prompt} is empty")
        if n < 1:
            raise UserError(f"n={n}: must be at least 1")
        if not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            raise UserError(
                f"prompt {prompt} has token {max(tokens, key=abs)}; the model knows 0 to {self.vocab_size - 1}"
            )
        if len(tokens) + params.max_tokens > self.max_len:
            limit, fix = f"the model's context of {self.context}", "shorten one of them"
            if self.max_len < self.context:
                limit, fix = f"the engine's max_len of {self.max_len}", f"{fix}, or raise max_len up to {self.context}"
            raise UserError(
                f"prompt {prompt} has {len(tokens)} tokens and max_tokens is {params.max_tokens}, "
                f"together more than {limit}: {fix}"
            )
        stop = (frozenset() if params.ignore_eos else self.stop).union(params.stop_token_ids)
        request = Request(tokens, params, [Completion(prompt) for _ in range(n)], stop)
        self.scheduler.waiting.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admits, decodes one token of each running sample, and returns the completions that ended."""
        ended = []
        fresh = list(self.scheduler.admit())
        if fresh:
            logits = torch.stack([sample.request.logits for sample in fresh if sample.request.logits is not None])
            for sample in fresh:
                if sample.request.started == len(sample.request.completions):
                    sample.request.logits = None
            ended += self._sample(Batch(fresh, logits.device), logits)
        if self.scheduler.running:
            ended += self._decode()
        return ended

    def abort(self, request: Request) -> None:
        """Ends what is unfinished of a request, with reason "abort"; its slots are free at once."""
        self.scheduler.drop(request)
        for completion in request.completions:
            completion.done = True

    def finish(self, completion: Completion, reason: str) -> None:
        """Ends one running sample for a reason that the engine doesn't know, such as a stop string."""
        self.scheduler.leave([sample for sample in self.scheduler.running if sample.completion is completion])
        completion.finish_reason, completion.done = reason, True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        on_finish: Callable[[Completion], None] = lambda completion: None,
    ) -> list[Completion]:
        """n samples a prompt; completion i belongs to prompt i // n, whose seed is made of params' and its number.

        Args:
            should_stop: asked before every step; True ends what is unfinished with reason "abort".
            on_finish: called with each completion as it ends by itself (not with aborted ones).

        Raises:
            UserError: a prompt that `submit` refuses; nothing is generated then.
        """
        requests: list[Request] = []
        try:
            for i, prompt in enumerate(prompts):
                requests.append(self.submit(prompt, replace(params, seed=stream_of(params.seed, i)), n, prompt=i))
            mine = {id(completion) for request in requests for completion in request.completions}
            left = len(mine)
            while left and not should_stop():
                for completion in self.step():
                    if id(completion) in mine:
                        left -= 1
                        on_finish(completion)
        finally:
            for request in requests:
                if not request.done:
                    self.abort(request)
        return [completion for request in requests for completion in request.completions]

    def _decode(self) -> list[Completion]:
        if self._batch.samples != self.scheduler.running:
            self._batch = Batch(self.scheduler.running, self.runner.device)
        self.stats.steps += 1
        return self._sample(self._batch, self.runner.decode(self._batch.rows))

    def _sample(self, batch: "Batch", logits: Tensor) -> list[Completion]:
        """Draws each sample's next token; returns the completions that ended with it, whose slots are free."""
        left = []
        for sample, token, logprob in zip(batch.samples, *batch.draw(logits), strict=True):
            completion, request = sample.completion, sample.request
            if math.isnan(logprob):
                completion.finish_reason = "nan"
            else:
                completion.token_ids.append(token)
                completion.logprobs.append(logprob)
                if token in request.stop:
                    completion.finish_reason = "stop"
                elif len(completion.token_ids) == request.params.max_tokens:
                    completion.finish_reason = "length"
                else:
                    continue
            completion.done = True
            left.append(sample)
        self.stats.decoded += len(batch.samples)
        self.scheduler.leave(left)
        return [sample.completion for sample in left]


class Batch:
    """Samples that are decoded together, and what a step of them reads, which stays on the device between steps."""

    def __init__(self, samples: Sequence[Running], device: torch.device):
        self.samples = list(samples)
        tokens = [sample.completion.token_ids for sample in samples]
        self.settings = SamplingBatch([s.request.params for s in samples], [s.stream for s in samples], device)
        self.drawn = np.array([len(ids) for ids in tokens])
        rows = [[ids[-1] if ids else 0, s.slot, s.length] for ids, s in zip(tokens, samples, strict=True)]
        self.rows = torch.tensor(rows, dtype=torch.long).view(-1, 3).T.contiguous().to(device)  # Runner.decode's

    def draw(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """Each sample's next token and its log-probability."""
        tokens, logprobs = self.settings.sample(logits, self.drawn)
        self.drawn += 1
        self.rows[0] = tokens
        self.rows[2] += 1
        return tokens.tolist(), logprobs.tolist()
