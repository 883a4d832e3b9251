"""Executes plans on tensors. Owns the slots, the network and the sampler.

A step's inputs stay on the device between steps. Nothing here waits for a token's value.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from m1.engine.graphs import GraphRunner
from m1.engine.runner import DecodeBatch, Runner
from m1.engine.sampling import SamplingBatch
from m1.engine.scheduler import Chunk, Decode, Fork, Plan
from m1.engine.slots import Slots, Snapshot

Drawn = tuple[Tensor, Tensor]  # tokens [rows] int64, their log-probabilities [rows] float32


class Executor:
    """Executes a scheduler's plans: fills slots, runs the network, and draws tokens.

    `execute` takes a `Plan` and returns the drawn tokens as device tensors, without waiting for their values.

    Args:
        model: the network, on the device that executes.
        num_slots: the same number as the `Scheduler` has.
        max_model_len: maximum number of tokens in a slot.
        int8: rounds the weights of all linear layers (`PackedLinear`).

    Raises:
        UserError: a model that `Runner` can't run.
    """

    def __init__(self, model: PreTrainedModel, num_slots: int, max_model_len: int, int8: bool):
        self.device = model.device
        self.slots = Slots(model.config, num_slots, max_model_len, model.dtype, model.device)
        self.runner = (GraphRunner if model.device.type == "cuda" else Runner)(model, self.slots, int8)
        self.prefix_cache: dict[int, tuple[Snapshot, Tensor]] = {}  # by entry: a state and the logits after it
        self.prompt_logits: dict[int, Tensor] = {}  # by slot: [V] after its prompt, until a sequence takes it over
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.long, device=self.device)  # by slot
        self.sequences: dict[int, Fork] = {}  # by slot: how its sequence started
        self.batch = Batch(Decode([], [], []), self.sequences, self.last_tokens)

    def execute(self, plan: Plan) -> Drawn:
        """Executes a plan. Returns the tokens drawn by its forks, then by its decodes, on the device."""
        for entry, slot, length in plan.restore:
            snapshot, self.prompt_logits[slot] = self.prefix_cache[entry]
            self.slots.restore(slot, length, snapshot)
        for chunk in plan.prefill:
            self._prefill(chunk)
        if not plan.fork and plan.decode.slots == self.batch.slots:  # the same sequences as in the last step
            return self._decode()
        self.last_tokens[self.batch.rows.slots] = self.batch.rows.tokens
        drawn = [self._fork(plan.fork)] if plan.fork else []
        self.batch = Batch(plan.decode, self.sequences, self.last_tokens)
        tokens, logprobs = zip(*drawn, self._decode(), strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _prefill(self, chunk: Chunk) -> None:
        if chunk.start == 0:
            self.slots.clear(chunk.slot)
        tokens = torch.tensor(chunk.tokens, device=self.device)
        logits = self.prompt_logits[chunk.slot] = self.runner.prefill(tokens, chunk.slot, chunk.start, chunk.total)
        if chunk.entry is not None:
            snapshot = self.slots.snapshot(chunk.slot, chunk.start + len(chunk.tokens))
            self.prefix_cache[chunk.entry] = snapshot, logits

    def _fork(self, forks: list[Fork]) -> Drawn:
        """Copies the prompts' slots to the new sequences and draws their first tokens."""
        logits = torch.stack([self.prompt_logits[fork.source] for fork in forks])
        for fork in forks:
            self.sequences[fork.target] = fork
            if fork.target == fork.source:
                del self.prompt_logits[fork.source]
            else:
                self.slots.copy(fork.source, fork.target, fork.length)
        tokens, logprobs = _sampling(forks, self.device).sample(logits, np.zeros(len(forks), dtype=np.int64))
        self.last_tokens[[fork.target for fork in forks]] = tokens
        return tokens, logprobs

    def _decode(self) -> Drawn:
        batch = self.batch
        if not batch.slots:
            return self.last_tokens.new_empty(0), torch.empty(0, device=self.device)
        drawn = batch.sampling.sample(self.runner.decode(batch.rows), batch.drawn)
        batch.advance(drawn[0])
        return drawn


class Batch:
    """Sequences that are decoded together, and the inputs of their next step.

    It is made anew when a sequence joins or leaves; otherwise `advance` updates it in place.

    Args:
        decode: the sequences, their slots and their lengths.
        sequences: by slot, the fork that started the sequence there.
        last_tokens: [slots] int64, the last token drawn in each slot.

    Attributes:
        rows: `DecodeBatch` on the device, what the network reads.
        sampling: `SamplingBatch`, the rows' sampling settings.
        drawn: [b] int64 on the host, the number of tokens that each sequence has drawn.
    """

    def __init__(self, decode: Decode, sequences: dict[int, Fork], last_tokens: Tensor):
        self.slots = decode.slots
        forks = [sequences[slot] for slot in decode.slots]
        self.sampling = _sampling(forks, last_tokens.device)
        lengths = np.array(decode.lengths, dtype=np.int64)
        self.drawn = lengths - np.array([fork.length for fork in forks], dtype=np.int64) + 1
        slots, lengths_ = (torch.tensor(t, dtype=torch.long).to(last_tokens.device) for t in (decode.slots, lengths))
        self.rows = DecodeBatch(last_tokens[slots], slots, lengths_)

    def advance(self, tokens: Tensor) -> None:
        """Makes the drawn tokens [b] the inputs of the next step."""
        self.drawn += 1
        self.rows.tokens.copy_(tokens)
        self.rows.lengths.add_(1)


def _sampling(forks: list[Fork], device: torch.device) -> SamplingBatch:
    return SamplingBatch([fork.params for fork in forks], [fork.stream for fork in forks], device)
