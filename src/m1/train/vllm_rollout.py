"""Rollouts for GRPO from vLLM, by TRL's own code: in this process on the trainer's GPU (colocated), or on a server.

TRL asks vLLM for samples and brings it the weights as they change. What is added here: the trainer's precision and stop
tokens, seeds, and weights that `m1.model.parallelize` has sharded. M1 models run in vLLM by `m1.plugins.vllm`.
"""

import math
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from m1.errors import UserError
from m1.machine import free_port
from m1.model.checkpoint import one_line
from m1.model.parallelize import is_sharded, whole_weights
from m1.model.tokenizer import encode_chat
from m1.ops.random_bits import fold_in
from m1.train.rollout import Sample, rollout_dtype

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # the variables of torchrun


@dataclass
class VLLMSample:
    """A completion: its tokens, with the one that ended it, and their log-probabilities, NaN where vLLM has none."""

    token_ids: list[int]
    logprobs: list[float]


class VLLMRollouts(VLLMGeneration):
    """Samples GRPO's completions with vLLM, where TRL's `vllm_...` arguments say. It has `EngineRollouts`' methods.

    Args:
        model: the model that is trained, from a checkpoint's folder.
        tokenizer: the model's tokenizer, with a chat template.
        arguments: the trainer's.
        max_num_seqs: maximum number of completions decoded in parallel, if colocated.
        max_model_len: maximum number of tokens of a prompt and its completion together, if colocated.
        accelerator: the trainer's.

    Raises:
        UserError: a server that doesn't answer, or can't take weights. The other methods raise it, too.
        ValueError: arguments that vLLM refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arguments: GRPOConfig,
        max_num_seqs: int,
        max_model_len: int,
        accelerator: Accelerator,
    ):
        self.dtype = rollout_dtype(model, arguments)
        ranks = arguments.vllm_tensor_parallel_size
        together = ranks * arguments.per_device_train_batch_size * arguments.steps_per_generation
        self.address = arguments.vllm_server_base_url or f"{arguments.vllm_server_host}:{arguments.vllm_server_port}"
        super().__init__(
            model,
            accelerator,
            tokenizer,
            mode=arguments.vllm_mode,
            server_base_url=arguments.vllm_server_base_url,
            server_host=arguments.vllm_server_host,
            server_port=arguments.vllm_server_port,
            server_timeout=arguments.vllm_server_timeout,
            group_port=arguments.vllm_group_port,
            tensor_parallel_size=ranks,
            gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
            max_model_length=arguments.vllm_max_model_length or max_model_len,
            max_num_seqs=min(max_num_seqs, together),
            enable_sleep_mode=arguments.vllm_enable_sleep_mode,
            model_impl=arguments.vllm_model_impl,
            temperature=arguments.temperature,
            max_completion_length=arguments.max_completion_length,
        )

    def sync_weights(self) -> None:
        """Makes vLLM use the model's weights as they are now."""
        with self._answered():
            super().sync_weights()

    def sample(self, prompts: list[Any], n: int, first: int, seed: int, stop: Iterable[int]) -> list[Sample]:
        """Samples one completion of each prompt, as `EngineRollouts.sample`.

        Colocated, all samples of a call follow from the seed, the first place and the prompts. A server has a seed of
        its own.
        """
        tokens = [encode_chat(self.processing_class, prompt) for prompt in prompts]
        self.generation_kwargs = {"stop_token_ids": sorted(stop), "ignore_eos": True}
        # The processes that share one vLLM must all draw the same.
        together = first - self.accelerator.process_index % self.tensor_parallel_size * len(prompts)
        with self._answered(), seeded(fold_in(seed, together), self.accelerator.device):
            _, completions, logprobs, _ = self.generate(tokens, None, n)
        return [
            VLLMSample(list(ids), [math.nan if value is None else value for value, *_ in values])
            for ids, values in zip(completions, logprobs, strict=True)
        ]

    def _init_vllm(self) -> None:
        if self.mode == "server":
            with self._answered():
                super()._init_vllm()
                if self.accelerator.is_main_process:
                    self._refuse_raw_logprobs()
            return
        from vllm import LLM

        options: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.accelerator.device.type == "cpu":
            options["enforce_eager"] = True  # compiling makes it no faster there, and takes 20 s
            use_weights_as_they_are()
        before = {name: os.environ.get(name) for name in LAUNCHERS}
        os.environ.setdefault("MASTER_PORT", str(free_port()))  # TRL's may be another's that starts at this moment
        vllm_generation.LLM = partial(LLM, **options)  # TRL has no arguments for these
        try:
            with seeded(0, self.accelerator.device):  # vLLM seeds the process's generators
                super()._init_vllm()
        finally:
            vllm_generation.LLM = LLM
            for name, value in before.items():  # TRL sets them; a later stage in this process isn't torchrun's
                if value is None:
                    os.environ.pop(name, None)

    def _refuse_raw_logprobs(self) -> None:
        """TRL only warns, and not here."""
        found = self.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if found != "processed_logprobs":
            raise UserError(
                f'rollout = "vllm": the server at {self.address} has --logprobs-mode {found}, whose numbers aren\'t '
                "those that it samples with: start it with --logprobs-mode processed_logprobs"
            )

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        return whole_weights(self.model) if is_sharded(self.model) else super()._iter_named_params()

    def _answered(self) -> AbstractContextManager[None]:
        if self.mode == "colocate":
            return nullcontext()
        return one_line(f'rollout = "vllm": vLLM\'s server at {self.address} failed')


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the process's generators, from which a colocated vLLM draws. Afterwards they are as they were."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            set_seed(seed % 2**32)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def use_weights_as_they_are() -> None:
    """Keeps vLLM from packing copies of a new model's weights on a CPU, which the trainer's weights wouldn't reach."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", F.linear)
