"""Weights of votes: equal ones, the model's own probability of a sample, or a verifier's score."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.jsonl import read_json
from m1.model.checkpoint import (
    check_shard_names,
    load_tokenizer,
    one_line,
)
from m1.model.configuration import check_sizes
from m1.model.tokenizer import encode_chat
from m1.ops.backend import default_device

# (problem, texts of samples) -> one score per text, finite and at least 0. If the callable has an attribute `bound`,
# no score may be larger. The rule "decided" needs it.
Verifier = Callable[[str, Sequence[str]], Sequence[float]]
Weights = Literal["uniform", "logprob"] | Verifier


def vote_weights(name: str) -> Weights:
    """Weights by name: "uniform", "logprob", or a reward model's folder or hub id. Raises UserError for other names."""
    match name:
        case "uniform" | "logprob":
            return name
    return RewardModel.from_pretrained(name)


def bound_of(weights: Weights) -> float | None:
    """The maximum weight of a sample; None if it is unknown."""
    return getattr(weights, "bound", None) if callable(weights) else 1.0


def weigh(weights: Weights, problem: str, texts: Sequence[str], logprobs: Sequence[float]) -> list[float]:
    """Computes one weight per sample.

    The weight "logprob" is the length-normalized probability of a sample (Wang et al. 2023, equation 1), in (0, 1]:

        exp(1/K sum_k log p(t_k | prompt, t_1 ... t_{k-1}))

    Args:
        problem: for a verifier.
        texts: one per sample.
        logprobs: mean log-probability of the tokens, one per sample. The engine's are at the sampling temperature.

    Raises:
        UserError: a verifier gives another number of scores, or one that isn't finite and from 0 to its bound.
    """
    if weights == "uniform":
        return [1.0] * len(texts)
    if weights == "logprob":
        return [min(1.0, math.exp(logprob)) for logprob in logprobs]
    assert callable(weights)
    scores = [float(score) for score in weights(problem, texts)]
    if len(scores) != len(texts):
        raise UserError(f"the verifier gave {len(scores)} scores for {len(texts)} texts: it must give one per text")
    bound = bound_of(weights)
    for score in scores:
        if not 0 <= score <= (math.inf if bound is None else bound) or score == math.inf:
            limit = "0 or more" if bound is None else f"from 0 to its bound {bound}"
            raise UserError(f"the verifier gave the score {score}: a weight must be finite and {limit}")
    return scores


class RewardModel:
    """A verifier that scores samples by a sequence classifier: its probability that an answer is good, in [0, 1].

    The classifier reads problem and sample as a chat. With one output, the score is the sigmoid of the logit: a
    Bradley-Terry reward model's probability against a reward of 0. With two, it is the softmax of the second class. Li
    et al. 2023 (arXiv 2206.02336) weigh votes by such probabilities (voting verifier).

    Args:
        model: a sequence classifier with one or two outputs.
        tokenizer: the model's; it needs a chat template.

    Attributes:
        bound: maximum score.

    Raises:
        UserError: the model has another number of outputs, or the tokenizer has no chat template.
    """

    bound = 1.0

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if model.config.num_labels not in (1, 2):
            raise UserError(f"{model.name_or_path} has {model.config.num_labels} outputs: a reward model has 1 or 2")
        self.model, self.tokenizer = model.eval(), tokenizer
        self._tokens("", "")  # raises now, and not after sampling, if there is no chat template

    @classmethod
    def from_pretrained(cls, name: str) -> "RewardModel":
        """Loads a reward model from a folder or Hub id, onto the accelerator if there is one. Raises UserError."""
        folder = checkpoint_folder(name)
        check_shard_names(folder)
        load = AutoModelForSequenceClassification.from_pretrained
        with one_line(f"can't load {name} as a reward model"):
            check_sizes(read_json(folder / "config.json"))
            model, loaded = load(folder, output_loading_info=True, trust_remote_code=False)
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(f"{name} is not a reward model: it has no tensor {missing[0]!r}")
        return cls(model.to(default_device()), load_tokenizer(folder))

    @torch.inference_mode()
    def __call__(self, problem: str, texts: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one per text.

        Texts aren't batched: samples rarely finish together, and padding would cost more than it saves.

        Raises:
            UserError: a chat is longer than the model's context.
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
