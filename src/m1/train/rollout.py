"""Rollouts for GRPO: from this project's engine, in the precision that the trainer computes in, and their drift."""

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig

from m1.engine import LLM, Request, SamplingParams
from m1.errors import UserError
from m1.model.parallelize import is_sharded, whole_weights
from m1.model.tokenizer import encode_chat
from m1.ops.random_bits import fold_in

MAX_DRIFT = 0.015  # of the engine from the trainer, in nats per token; float32 gives 1e-8, bfloat16 about 1e-3


class Sample(Protocol):
    """What training needs of a completion.

    Attributes:
        token_ids: with the token that ended it, if one did.
        logprobs: their log-probabilities under the sampler.
    """

    token_ids: list[int]
    logprobs: list[float]


class EngineRollouts:
    """Samples GRPO's completions with this project's engine, which stays and takes over the weights as they change.

    Under mixed precision the trainer's weights are float32, and its products are rounded to bfloat16 or float16. The
    engine then has a copy of the weights in that dtype. Sharded weights, too, are copied: each is gathered, rounded and
    freed before the next, so that no process ever holds two whole models.

    Args:
        model: the model that is trained.
        tokenizer: the model's tokenizer, with a chat template.
        arguments: the trainer's.
        max_num_seqs: maximum number of completions decoded in parallel.
        max_model_len: maximum number of tokens of a prompt and its completion together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arguments: GRPOConfig,
        max_num_seqs: int,
        max_model_len: int,
    ):
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.options = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
        self.llm: LLM | None = None

    def sync_weights(self) -> None:
        """Makes the engine use the model's weights as they are now."""
        if self.llm is not None:
            self.llm.reload_weights(self.model)

    def sample(self, prompts: list[Any], n: int, first: int, seed: int, stop: Iterable[int]) -> list[Sample]:
        """Samples one completion of each prompt, in the order of the prompts.

        The prompts are a part of a batch, in which n equal ones follow each other, and share a prefill where they are
        together. A sample depends on its place in the batch, not on the part.

        Args:
            prompts: lists of messages.
            n: samples per problem.
            first: place of the first prompt in the batch.
            seed: of the batch; the problems' numbers are folded into it.
            stop: tokens that end a completion.

        Raises:
            UserError: the engine refuses a prompt.
        """
        args = self.arguments
        if self.llm is None:
            model = engine_model(self.model, rollout_dtype(self.model, args))
            self.llm = LLM(model, self.tokenizer, stop, **self.options)
        params = SamplingParams(
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            min_p=args.min_p or 0.0,
        )
        requests = []
        for problem, group in groupby(range(first, first + len(prompts)), key=lambda place: place // n):
            places = list(group)
            tokens = encode_chat(self.tokenizer, prompts[places[0] - first])
            of_problem = replace(params, seed=fold_in(seed, problem))
            requests.append(Request(tokens, of_problem, problem, tuple(place % n for place in places)))
        for _ in self.llm.engine_for([r.tokens for r in requests], params.max_tokens).run(requests):
            pass
        return [sequence for request in requests for sequence in request.sequences]


def rollout_dtype(model: PreTrainedModel, arguments: GRPOConfig) -> torch.dtype:
    """What the trainer computes products in, and the sampler therefore everything."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else model.dtype


def engine_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model, or a copy with whole parameters in this dtype if they are sharded or of another. Buffers keep theirs.

    All processes must call this if the model is sharded.
    """
    if is_sharded(model):
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
        weights = {name: weight.to(dtype) for name, weight in whole_weights(model)}
        empty.load_state_dict(weights, strict=False, assign=True)  # a tied head has no name of its own here
        empty.tie_weights()
        return empty.to(model.device).eval().requires_grad_(False)
    if model.dtype == dtype:
        return model
    cast = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast)


def seed_of(seed: int, generation: int, attempt: int = 0) -> int:
    """The seed of a generation. No two of a training are the same.

    Args:
        seed: of the training.
        generation: number of the generation from 0; -1 for an evaluation.
        attempt: number of the draw within the generation.
    """
    for number in (generation, attempt):
        seed = fold_in(seed, number)
    return seed


class Drift(NamedTuple):
    """How far the engine's probabilities are from the trainer's, over sampled tokens.

    Attributes:
        total: [] sum of r - 1 - ln r, where r is the trainer's probability of a token over the engine's: an estimate of
            the KL divergence that is never negative (k3, http://joschu.net/blog/kl-approx.html).
        tokens: [] number of tokens.
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """In nats per token; 0 without tokens."""
        return (self.total / self.tokens.clamp(min=1)).item()


def drift_of(trainer: Tensor, engine: Tensor, mask: Tensor) -> Drift:
    """Compares log-probabilities [b, T] of sampled tokens. `mask` [b, T] is 0 where there is none."""
    log_ratio = (trainer - engine)[mask.bool()].double()
    return Drift((log_ratio.exp() - 1 - log_ratio).sum(), mask.sum().double())


def check_drift(drift: float, step: int) -> None:
    """Raises UserError if the drift is above MAX_DRIFT, or no number: RL would learn from noise without a sign."""
    if not drift <= MAX_DRIFT:
        raise UserError(
            f"step {step}: the engine's probabilities differ from the trainer's by {drift:.4g} nats per token "
            f"(k3; at most {MAX_DRIFT}): RL on them would learn from noise. Training has stopped and the last "
            "checkpoint is kept. Check the model's dtype and kernels, or train in float32 (bf16 = false)"
        )


def check_samples(sequences: list[Sample]) -> bool:
    """Whether all samples have tokens, with log-probabilities that are finite."""
    return all(s.token_ids and all(map(math.isfinite, s.logprobs)) for s in sequences)
