"""`m1 check-vllm`: does vLLM compute what a checkpoint computes here?

vLLM decodes prompts greedily. Then the model here reads each prompt with vLLM's tokens in one forward pass. At every
position vLLM's token must be its most likely one, and have the same log-probability. So equal tokens here mean that
greedy decoding would give the same samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.model.checkpoint import load_model, load_tokenizer
from m1.model.tokenizer import encode_chat
from m1.ops.backend import default_device
from m1.peers.vllm_client import find_python, start_vllm_on
from m1.tasks.chain import ChainSizes, chain_problems

Dtype = Literal["float32", "bfloat16", "float16"]
# Largest difference of a log-probability. In half precision two correct programs differ by some roundings of 28 layers.
TOLERANCES: dict[str, float] = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
SIZES = ChainSizes(max_steps=60)  # of the prompts
MAX_NUM_SEQS = 8  # less than the prompts, so that some are prefilled while others decode


class Compared(NamedTuple):
    """One sample of vLLM's, compared with the model.

    Attributes:
        tokens: number of them.
        equal: how many are the model's most likely ones.
        difference: the largest difference of a log-probability.
        missed: the largest log-probability by which the model's most likely token is above vLLM's.
    """

    tokens: int
    equal: int
    difference: float
    missed: float

    def agrees(self, tolerance: float) -> bool:
        """Whether the log-probabilities are equal, and so are the tokens, unless several are equally likely."""
        return self.difference <= tolerance and self.missed <= tolerance


@torch.inference_mode()
def compare(
    model: PreTrainedModel, prompts: Sequence[list[int]], samples: Sequence[Mapping[str, Any]]
) -> Iterator[Compared]:
    """Compares samples, {"token_ids", "logprobs"} each, of prompts with a model, one by one."""
    for prompt, sample in zip(prompts, samples, strict=True):
        tokens = torch.tensor([[*prompt, *sample["token_ids"]]], device=model.device)
        kept, drawn = len(sample["token_ids"]), tokens[0, len(prompt) :, None]
        logprobs = model(tokens, logits_to_keep=kept + 1).logits[0, :-1].float().log_softmax(-1)
        own, best = logprobs.gather(1, drawn)[:, 0], logprobs.amax(-1)
        theirs = torch.tensor(sample["logprobs"], device=own.device)
        yield Compared(kept, int((own == best).sum()), float((own - theirs).abs().max()), float((best - own).max()))


def check_vllm(
    checkpoint: str,
    prompts: int = 20,
    new_tokens: int = 64,
    dtype: Dtype = "float32",
    tensor_parallel_size: int = 1,
    vllm_python: str | None = None,
) -> list[Compared]:
    """Compares vLLM with a checkpoint on prompts of chain problems, which begin alike and have different lengths.

    vLLM comes first and ends before the model is loaded, as on a GPU it needs most of the memory.

    Raises:
        UserError: no vLLM, a checkpoint that it or transformers can't load, or one without a tokenizer.
    """
    if dtype not in TOLERANCES:
        raise UserError(f"--dtype {dtype}: choose {', '.join(TOLERANCES)}")
    device, folder = default_device(), checkpoint_folder(checkpoint)
    if tensor_parallel_size > 1 and device == "cpu":
        raise UserError(f"--tensor-parallel-size {tensor_parallel_size}: this check runs it on GPUs only")
    tokenizer = load_tokenizer(folder)
    problems = chain_problems(prompts, SIZES, "test", seed=0)
    tokens = [encode_chat(tokenizer, problem.problem) for problem in problems]
    length, python = max(map(len, tokens)) + new_tokens, find_python(vllm_python, device)
    where = device, dtype, length, MAX_NUM_SEQS, python, tensor_parallel_size
    with start_vllm_on(Path(folder).resolve(), *where) as ask:
        samples = ask({"prompts": tokens, "new_tokens": new_tokens})["samples"]
    model, _ = load_model(folder, device, dtype=dtype)
    return list(compare(model.eval(), tokens, samples))
