"""GRPO's trainer: TRL's, with rollouts from the engine, a correction for what they differ in, and an exact resume.

TRL corrects for a sampler whose probabilities aren't the trainer's (truncated importance sampling) if the sampler is
vLLM. For TRL this trainer therefore has a vLLM: `use_vllm` is true, and `vllm_generation` is the engine, or really vLLM
if the stage says so. TRL's own code then renews its weights, and multiplies a token's loss with the ratio of
probabilities as `vllm_importance_sampling_*` say.
"""

import logging
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer

from m1.engine import fold_in
from m1.history import SAMPLES
from m1.model.tokenizer import encode_chat
from m1.recipe import GRPOStage
from m1.train.packed_scores import can_pack, packed_scores
from m1.train.rollout import EngineRollouts, Sample, check_drift, check_samples, drift_of, rollout_dtype, seed_of
from m1.train.stage_trainer import StageTrainer, not_finite
from m1.train.vllm_rollout import VLLMRollouts

Group = tuple[dict[str, Any], list[Sample]]  # a problem and its samples
RESAMPLINGS = 8  # maximum number of draws that replace groups of equal rewards
DRAWN = 2  # maximum number of problems of such a draw, as a multiple of a generation's

logger = logging.getLogger(__name__)


class Trainer(StageTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with what all stages have in common, and rollouts of this project's engine or of vLLM.

    Args:
        stage: the stage, whose keys say what samples, what becomes of groups of equal rewards, and how often the drift
            is checked.
        max_model_len: maximum number of tokens of a prompt and its completion together.
        options: the arguments of TRL's trainer.

    Raises:
        UserError: as `VLLMRollouts`; in training, as `check_drift`, or a log-probability isn't finite.
    """

    files = (SAMPLES,)

    def __init__(self, stage: GRPOStage, max_model_len: int, **options: Any):
        options |= {"mixer_lr_scale": stage.mixer_lr_scale, "shard": stage.shard}
        super().__init__(rollout_func=self.rollout, **options)
        self.stage = stage
        made = (options["model"], self.processing_class, self.args, stage.max_num_seqs, max_model_len)
        self.rollouts = VLLMRollouts(*made, self.accelerator) if stage.rollout == "vllm" else EngineRollouts(*made)
        self.use_vllm, self.vllm_generation, self._last_loaded_step = True, self.rollouts, -1
        self.vllm_importance_sampling_correction = True  # TRL then asks the trainer for its log-probabilities
        self.checked_at: int | None = None  # the last step whose drift was checked
        self.seconds: dict[str, float] = defaultdict(float)  # since the last log, by what they were spent on
        self.logged_at = time.monotonic()
        self._drawn: list[Sample] = []  # the next generation, if it has been sampled already
        self._eval_batches = 0

    @property
    def networks(self) -> list[PreTrainedModel]:
        """The model, and the reference model of a KL term."""
        reference = [] if self.ref_model is None else [self.accelerator.unwrap_model(self.ref_model)]
        return super().networks + reference

    @property
    def flops_per_token(self) -> float:
        """Operations per trained token, with the forward passes that sampled and compared it."""
        return super().flops_per_token * 5 / 3

    @property
    def window(self) -> int:
        """Number of backward passes that train on one generation."""
        return self.args.steps_per_generation * self.num_iterations

    # Rollouts

    def rollout(self, prompts: list[Any], _: Any = None) -> dict[str, list]:
        """TRL's `rollout_func`: samples one completion per prompt. Equal ones that follow each other are a group."""
        batch = 0
        if not self.model.training:
            batch, self._eval_batches = self._eval_batches, self._eval_batches + 1
        place = (batch * self.accelerator.num_processes + self.accelerator.process_index) * len(prompts)
        sequences = self._drawn or self._sample(prompts, place)
        self._drawn = []
        return {
            "prompt_ids": [encode_chat(self.processing_class, prompt) for prompt in prompts],
            "completion_ids": [s.token_ids for s in sequences],
            "logprobs": [s.logprobs for s in sequences],
        }

    def _sample(self, prompts: list[Any], first: int, attempt: int = 0) -> list[Sample]:
        generation = self._step // self.window if self.model.training else -1
        n = self._group_size("train" if self.model.training else "eval")
        seed = seed_of(self.args.seed, generation, attempt)
        with self._timed("rollout"):
            if self._last_loaded_step != self.state.global_step:  # TRL's own number, which it compares later
                self.rollouts.sync_weights()
                self._last_loaded_step = self.state.global_step
            sequences = self.rollouts.sample(prompts, n, first, seed, self.eos_token_ids)
        if not check_samples(sequences):
            raise not_finite(self.state.global_step + 1, "a sampled token's log-probability isn't finite")
        return sequences

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        if mode == "train" and self.stage.zero_variance == "resample":
            inputs = self.resampled(inputs)
        batch = super()._generate_and_score_completions(inputs)
        self._note_drift(batch, mode)
        if not self.args.vllm_importance_sampling_correction:
            batch["importance_sampling_ratio"] = torch.ones_like(batch["importance_sampling_ratio"])
        equal = self.equal_groups(mode)
        self._metrics[mode]["zero_variance_groups"].append(int(equal.sum()) / self._group_size(mode))
        if mode == "train" and self.stage.zero_variance == "filter":
            self._leave_out(batch, equal)
        self._write_samples(mode)
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's scores of completions, without its padding where the model takes packed rows."""
        own = self.accelerator.unwrap_model(model)
        if can_pack(own, rollout_dtype(own, self.args)):
            model = partial(packed_scores, model)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    # The engine's drift from the trainer

    def _note_drift(self, batch: dict[str, Any], mode: str) -> None:
        drift = drift_of(batch["old_per_token_logps"], batch["sampling_per_token_logps"], batch["completion_mask"])
        total, tokens = self.accelerator.reduce(torch.stack(drift), reduction="sum")
        mean = drift._replace(total=total, tokens=tokens).mean
        self._metrics[mode]["sampling/k3"].append(mean)
        step = self.state.global_step + 1
        is_due = self.checked_at is None or step >= self.checked_at + self.stage.gate_steps
        if mode == "train" and tokens and (is_due or not math.isfinite(mean)):
            check_drift(mean, step)
            self.checked_at = step

    # Groups whose samples all have the same reward

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with self._timed("grading"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}
        cut = torch.tensor([ids[-1] not in ends for ids in completion_ids_list], device=rewards.device)
        self._cut = self.accelerator.gather(cut)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["completions/truncated"].append(int(self._cut.sum()))
        if self._cut.all() and self._rewards.max() <= 0:
            logger.warning(
                "step %d: all %d completions were cut at max_completion_length = %d, and none has a reward: raise it",
                self.state.global_step + 1, len(self._cut), self.max_completion_length,
            )  # fmt: skip
        return rewards

    def _group_size(self, mode: str) -> int:
        return self.num_generations if mode == "train" else self.num_generations_eval

    def equal_groups(self, mode: str) -> Tensor:
        """[samples of all processes] bool: whether all samples of a sample's group have the same reward."""
        groups = self._rewards.view(-1, self._group_size(mode))
        equal = groups.amax(dim=1) == groups.amin(dim=1)
        return equal.repeat_interleave(groups.shape[1])

    def _leave_out(self, batch: dict[str, Any], equal: Tensor) -> None:
        """Leaves these samples out of the loss and the entropy bonus, which would still act on them."""
        mask = batch["completion_mask"]
        start = self.accelerator.process_index * len(mask)
        kept = ~equal[start : start + len(mask), None]
        batch["tool_mask"] = kept.to(mask.dtype).expand_as(mask).contiguous()  # unlike completion_mask, not attention's
        batch["num_items_in_batch"] = self.accelerator.gather((mask * batch["tool_mask"]).sum()).sum()

    def resampled(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replaces groups of equal rewards by other problems of the data (dynamic sampling, arXiv 2503.14476).

        A draw has as many problems as give the missing groups if its share of equal ones is that of the draws before,
        and at most DRAWN times as many as a generation. Groups that are equal after RESAMPLINGS draws stay.
        """
        n = self.num_generations
        wanted = len(inputs) // n
        rows = inputs[::n]
        varied: list[Group] = []
        left: list[Group] = []
        for attempt in range(1 + RESAMPLINGS):
            prompts = [row["prompt"] for row in rows for _ in range(n)]
            most = len(inputs) * (DRAWN if attempt else 1)
            sequences = self._sample(prompts, self.accelerator.process_index * most, attempt)
            groups = [(row, sequences[i * n : (i + 1) * n]) for i, row in enumerate(rows)]
            for group, equal in zip(groups, self._are_equal(groups), strict=True):
                (left if equal else varied).append(group)
            missing = wanted - len(varied)
            if missing <= 0:
                break
            drawn = len(varied) + len(left)
            likely = math.ceil(missing * drawn / max(len(varied), 1))
            seed = fold_in(seed_of(self.args.seed, self._step // self.window, attempt), self.accelerator.process_index)
            rows = [self._any_problem(seed, i) for i in range(min(likely, DRAWN * wanted))]
        chosen = (varied + left)[:wanted]
        self._metrics["train"]["resampled_groups"].append(len(varied) + len(left) - len(chosen))
        self._drawn = [sequence for _, group in chosen for sequence in group]
        return [row for row, _ in chosen for _ in range(n)]

    def _any_problem(self, seed: int, i: int) -> dict[str, Any]:
        rows: Dataset = self.train_dataset
        return rows[random.Random(f"{seed} {i}").randrange(len(rows))]

    def _are_equal(self, groups: list[Group]) -> list[bool]:
        samples = [(row, sequence) for row, group in groups for sequence in group]
        texts = self.processing_class.batch_decode([s.token_ids for _, s in samples], skip_special_tokens=True)
        columns = {key: [row[key] for row, _ in samples] for key in samples[0][0] if key != "prompt"}
        columns |= {
            "prompts": [row["prompt"] for row, _ in samples],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [s.token_ids for _, s in samples],
        }
        with self._timed("grading"):
            values = [[float("nan") if v is None else v for v in f(**columns)] for f in self.reward_funcs]
        rewards = (torch.tensor(values).T * self.reward_weights.cpu()).nansum(dim=1).view(len(groups), -1)
        return (rewards.amax(dim=1) == rewards.amin(dim=1)).tolist()

    # Logs

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if self.model.training:
            self.seconds[what] += time.monotonic() - began

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the seconds since the last log, split into rollout, grading and update, which is the rest."""
        if self.model.training and "loss" in logs:
            total, self.logged_at = time.monotonic() - self.logged_at, time.monotonic()
            spent = {name: self.seconds.pop(name, 0.0) for name in ("rollout", "grading")}
            spent["update"] = total - sum(spent.values())
            logs |= {f"time/{name}": round(seconds, 3) for name, seconds in spent.items()}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates with the same seeds each time. Its seconds aren't training's."""
        self._eval_batches, began = 0, time.monotonic()
        metrics = super().evaluate(*args, **kwargs)
        self.logged_at += time.monotonic() - began
        return metrics

    def _write_samples(self, mode: str) -> None:
        """Appends a generation's first samples to samples.jsonl, with their rewards."""
        logs, count = self._logs, len(self._rewards)
        columns = {name: list(logs[name])[-count:] for name in ("prompt", "completion", "advantages")}
        rewards = {name: list(values)[-count:] for name, values in logs["rewards"].items()}
        for i in range(min(count, self.stage.logged_samples)):
            self.write_row(
                SAMPLES,
                {
                    "step": self.state.global_step + (mode == "train"),
                    "mode": mode,
                    "prompt": columns["prompt"][i][-1]["content"],
                    "completion": columns["completion"][i][-1]["content"],
                    "rewards": {name: values[i] for name, values in rewards.items()},
                    "advantage": columns["advantages"][i],
                    "truncated": bool(self._cut[i]),
                },
            )

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves the generation that is being trained on, too, and the adaptive entropy bonus."""
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "step": self._step,
            "passes": self.args.gradient_accumulation_steps,
            "processes": self.accelerator.num_processes,
            "inputs": self._buffered_inputs if self._step % self.window else None,
            "entropy": (self.entropy_coef, self._last_world_entropy),
        }
        torch.save(state, self._generation_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path, device = self._generation_file(checkpoint), self.accelerator.device
        path = path if os.path.exists(path) else os.path.join(checkpoint, "generation_0.pt")  # of fewer processes
        state = torch.load(path, device, weights_only=True)
        self._step, self._buffered_inputs = state["step"], state["inputs"]
        self.entropy_coef, self._last_world_entropy = state["entropy"]
        if state["processes"] != self.accelerator.num_processes:
            self._step = self._step * self.args.gradient_accumulation_steps // state["passes"]
            if self._buffered_inputs is not None:
                logger.warning("the number of processes has changed: the generation in training is sampled again")
                self._buffered_inputs = None

    def _generation_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"generation_{self.accelerator.process_index}.pt")
