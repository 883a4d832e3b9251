"""Rollouts for GRPO from this project's engine, after a check that its log-probabilities equal the trainer's."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from m1.engine import LLM, SamplingParams, Sequence
from m1.errors import UserError
from m1.model.tokenizer import encode_chat
from m1.train.stage_trainer import not_finite

PARITY_THRESHOLD = 0.02  # mean |difference| of log-probabilities, in nats per token; float32 gives about 1e-6
PARITY_SAMPLES = 8


class EngineRollouts:
    """Generates the completions of GRPO with this project's engine: a `rollout_func` for TRL's GRPOTrainer.

    TRL calls it with the prompts of a step, one entry per sample. It returns the prompts' and completions' token ids
    and the completions' log-probabilities. The first call compares these with the trainer's on the same tokens. It
    refuses to train if they differ by more than PARITY_THRESHOLD, because RL would learn from noise without a sign.

    Args:
        max_num_seqs: maximum number of completions decoded in parallel.

    Attributes:
        checked: whether the log-probabilities have been compared.

    Raises:
        UserError: on the first call, as `check_parity`; on any call, if the engine refuses a prompt, or a
            log-probability isn't finite.
    """

    def __init__(self, max_num_seqs: int):
        self.max_num_seqs = max_num_seqs
        self.checked = False
        self.llm: LLM | None = None

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list]:
        args = trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model)
        rendered = [encode_chat(trainer.processing_class, prompt) for prompt in prompts]
        n = trainer.num_generations if model.training else trainer.num_generations_eval
        if any(rendered[i] != rendered[i - i % n] for i in range(len(rendered))) or len(rendered) % n:
            n = 1  # groups are split over processes, so samples can't share a prefill
        params = SamplingParams(
            n=n,
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            seed=(args.seed + trainer.state.global_step) * 1009 + trainer.accelerator.process_index,
        )
        if self.llm is None:
            self.llm = LLM(model, trainer.processing_class, trainer.eos_token_ids, max_num_seqs=self.max_num_seqs)
        self.llm.reload_weights()
        sequences = self.llm.engine_for(rendered, params.max_tokens).generate(rendered[::n], params)
        if not all(s.token_ids and all(map(math.isfinite, s.logprobs)) for s in sequences):
            raise not_finite(trainer.state.global_step + 1, "a sampled token's log-probability isn't finite")
        if not self.checked:
            check_parity(model, rendered, sequences, args.temperature)
            self.checked = True
        return {
            "prompt_ids": rendered,
            "completion_ids": [s.token_ids for s in sequences],
            "logprobs": [s.logprobs for s in sequences],
        }


@torch.no_grad()
def check_parity(
    model: PreTrainedModel, prompts: list[list[int]], sequences: list[Sequence], temperature: float
) -> float:
    """Compares log-probabilities of the engine with those of the training model, on the first PARITY_SAMPLES samples.

    Args:
        model: computes the log-probabilities again, with one full forward pass per sample.
        prompts: token ids, one prompt per sample.
        sequences: the engine's samples.
        temperature: the sampling temperature.

    Returns:
        The mean |difference|, in nats per token.

    Raises:
        UserError: the mean is above PARITY_THRESHOLD.
    """
    differences = []
    for prompt, sequence in list(zip(prompts, sequences, strict=True))[:PARITY_SAMPLES]:
        tokens = torch.tensor([prompt + sequence.token_ids], device=model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        picked = logprobs.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
        differences.append((picked - torch.tensor(sequence.logprobs, device=model.device)).abs())
    drift = torch.cat(differences).mean().item()
    if not drift <= PARITY_THRESHOLD:
        raise UserError(
            f"the engine's log-probabilities differ from the trainer's by {drift:.4f} nats per token on average "
            f"(threshold {PARITY_THRESHOLD}): RL on them would learn from noise. Check the model's dtype and kernels"
        )
    return drift
