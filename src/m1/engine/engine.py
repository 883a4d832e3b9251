"""Batched generation, tokens in and tokens out: prefill each prompt once, fork its state, decode, drop what is done.

Runs M1 models and any transformers causal LM on its own cache classes. It knows no text and no HTTP.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from m1.engine.sampling import SamplingParams, sample
from m1.errors import UserError

COMPACT_BELOW = 0.8  # share of unfinished rows under which the finished ones are cut out of the cache


@dataclass
class Completion:
    """One sample: new token ids (with the stop token, if it was reached), their log-probabilities, why it ended."""

    prompt: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "abort"  # "stop", "length", or "abort" until it has ended by itself


class Engine:
    """Generates from a model on its device.

    Args:
        model: any causal LM of transformers whose cache is a DynamicCache.
        stop_token_ids: a sequence ends behind one of these; the model's eos tokens when None.
        max_batch: sequences decoded together.
    """

    def __init__(self, model: PreTrainedModel, stop_token_ids: Sequence[int] | None = None, max_batch: int = 256):
        self.model = model
        if max_batch < 1:
            raise UserError(f"max_batch={max_batch}: need room for at least one sequence")
        eos = model.generation_config.eos_token_id if stop_token_ids is None else list(stop_token_ids)
        self.stop = torch.tensor([eos] if isinstance(eos, int) else eos or [], dtype=torch.long, device=model.device)
        self.max_batch = max_batch

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        on_finish: Callable[[Completion], None] = lambda completion: None,
    ) -> list[Completion]:
        """n samples a prompt; completion i belongs to prompt i // n.

        Args:
            should_stop: asked before every step; True ends what is unfinished with reason "abort".
            on_finish: called with each completion as it ends by itself (not with aborted ones).

        Raises:
            UserError: an empty prompt, or one that leaves no room for max_tokens in the model's context.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty")
            if limit and len(prompt) + params.max_tokens > limit:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens and max_tokens is {params.max_tokens}, "
                    f"together more than the model's context of {limit}: shorten one of them"
                )
        completions = [Completion(prompt=i // n) for i in range(len(prompts) * n)]
        generator = torch.Generator(self.model.device).manual_seed(params.seed)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches(prompts, completions, n):
                self._run([prompts[i] for i in batch.prompts], batch, params, generator, should_stop, on_finish)
        finally:
            self.model.train(was_training)
        return completions

    def _batches(self, prompts: Sequence[Sequence[int]], completions: list[Completion], n: int) -> Iterator["_Batch"]:
        """Prompts of similar length together, so that there is little padding; a prompt's samples stay together."""
        per_batch = max(1, self.max_batch // n)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            for first in range(0, n, self.max_batch):  # more samples than a batch holds
                width = range(first, min(n, first + self.max_batch))
                yield _Batch(chosen, [completions[i * n + j] for i in chosen for j in width], len(width))

    def _run(
        self,
        prompts: list[Sequence[int]],
        batch: "_Batch",
        params: SamplingParams,
        generator: torch.Generator,
        should_stop: Callable[[], bool],
        on_finish: Callable[[Completion], None],
    ) -> None:
        if should_stop():
            return
        cache = DynamicCache(config=self.model.config)
        tokens, mask = _left_pad(prompts, self.model.device)
        logits = self._forward(tokens, mask, cache)
        fork = torch.arange(len(prompts), device=mask.device).repeat_interleave(batch.n)
        cache.reorder_cache(fork)
        logits, mask = logits[fork], mask[fork]
        live = batch.completions
        finished = torch.zeros(len(live), dtype=torch.bool, device=mask.device)
        for step in range(params.max_tokens):
            tokens, logprobs = sample(logits, params, generator)
            for row, (token, logprob, done) in enumerate(
                zip(tokens.tolist(), logprobs.tolist(), finished.tolist(), strict=True)
            ):
                if not done:
                    live[row].token_ids.append(token)
                    live[row].logprobs.append(logprob)
            stopped = torch.isin(tokens, self.stop)
            ended = ~finished if step + 1 == params.max_tokens else stopped & ~finished
            for row in ended.nonzero().flatten().tolist():
                live[row].finish_reason = "stop" if stopped[row] else "length"
                on_finish(live[row])
            finished |= ended
            unfinished = (~finished).nonzero().flatten()
            if not len(unfinished):
                return
            if should_stop():
                return
            if len(unfinished) < COMPACT_BELOW * len(live):
                cache.reorder_cache(unfinished)
                live = [live[row] for row in unfinished.tolist()]
                tokens, mask, finished = tokens[unfinished], mask[unfinished], finished[unfinished]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)

    def _forward(self, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [b, V] of the last position."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        outputs = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]


@dataclass
class _Batch:
    prompts: list[int]
    completions: list[Completion]
    n: int


def _left_pad(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens and mask [b, T]; the padding's token is never looked at."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)
