"""What a sample's vote weighs: one each, what its model thought of it, or what a verifier thinks of it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from m1.errors import UserError
from m1.model.checkpoint import IMPOSSIBLE, default_device, load_tokenizer, reason
from m1.model.tokenizer import encode_chat

# (problem, texts of samples) -> a score a text, finite and at least 0. An attribute `bound`, if the callable has one,
# promises that no score is larger: the rule "decided" needs it.
Verifier = Callable[[str, Sequence[str]], Sequence[float]]
Weights = Literal["uniform", "logprob"] | Verifier


def vote_weights(name: str) -> Weights:
    """ "uniform", "logprob", or the reward model of a folder or hub id. Raises UserError if it is none of these."""
    match name:
        case "uniform" | "logprob":
            return name
    return RewardModel.from_pretrained(name)


def bound_of(weights: Weights) -> float | None:
    """The most a sample can weigh; None if nobody knows."""
    return getattr(weights, "bound", None) if callable(weights) else 1.0


def weigh(weights: Weights, problem: str, texts: Sequence[str], logprobs: Sequence[float]) -> list[float]:
    """A weight a sample.

    "logprob" is the probability of a sample, normalized by its length (Wang et al. 2023, equation 1), in (0, 1]:

        exp(1/K sum_k log p(t_k | prompt, t_1 ... t_{k-1}))

    Args:
        logprobs: that mean, of each sample. The engine's are of the distribution at the sampling temperature.

    Raises:
        UserError: a verifier's scores are not one a text, finite, and from 0 to its bound.
    """
    if weights == "uniform":
        return [1.0] * len(texts)
    if weights == "logprob":
        return [min(1.0, math.exp(logprob)) for logprob in logprobs]
    assert callable(weights)
    scores = [float(score) for score in weights(problem, texts)]
    if len(scores) != len(texts):
        raise UserError(f"the verifier gave {len(scores)} scores for {len(texts)} texts: it must give one a text")
    bound = bound_of(weights)
    for score in scores:
        if not 0 <= score <= (math.inf if bound is None else bound) or score == math.inf:
            limit = "0 or more" if bound is None else f"from 0 to its bound {bound}"
            raise UserError(f"the verifier gave the score {score}: a weight must be finite and {limit}")
    return scores


class RewardModel:
    """A verifier made of a sequence classifier: the chance it gives to (problem, answer), as a chat, being good.

    That is the sigmoid of its one logit (a Bradley-Terry reward model's chance against a reward of 0), or the softmax's
    second class of two. Votes weighed by a verifier's chance: Li et al. 2023 (arXiv 2206.02336), their voting verifier.

    Raises:
        UserError: the model has another number of outputs, or its tokenizer no chat template.
    """

    bound = 1.0

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if model.config.num_labels not in (1, 2):
            raise UserError(f"{model.name_or_path} has {model.config.num_labels} outputs: a reward model has 1 or 2")
        self.model, self.tokenizer = model.eval(), tokenizer
        self._tokens("", "")  # a missing chat template is found now, not when a sample has ended

    @classmethod
    def from_pretrained(cls, name: str) -> "RewardModel":
        """From a folder or hub id, on the accelerator if there is one. Raises UserError where that fails."""
        load = AutoModelForSequenceClassification.from_pretrained
        try:
            model, loaded = load(name, output_loading_info=True)
        except (OSError, RuntimeError, SafetensorError, *IMPOSSIBLE) as error:
            raise UserError(f"can't load {name} as a reward model: {reason(error)}") from None
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(f"{name} is no reward model: it has no tensor {missing[0]!r}")
        return cls(model.to(default_device()), load_tokenizer(Path(name)))

    @torch.inference_mode()
    def __call__(self, problem: str, texts: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one text at a time: they seldom end together, and padding would cost more than it saves.

        Raises:
            UserError: a chat longer than the model's context.
        """
        return [self._score(self._tokens(problem, text)) for text in texts]

    def _score(self, tokens: list[int]) -> float:
        context = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        if len(tokens) > context:
            raise UserError(f"a sample has {len(tokens)} tokens for the reward model, whose context is {context}")
        logits = self.model(input_ids=torch.tensor([tokens], device=self.model.device)).logits[0].float()
        return (logits.sigmoid() if len(logits) == 1 else logits.softmax(dim=0))[-1].item()

    def _tokens(self, problem: str, text: str) -> list[int]:
        chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": text}]
        return encode_chat(self.tokenizer, chat, add_generation_prompt=False)
