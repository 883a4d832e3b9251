"""Executes plans on tensors. Owns the slots, the network and the sampler.

A step's inputs stay on the device between steps, and each step makes the inputs of the next. Nothing here waits for a
token's value: a sequence that draws a stop token ends on the device, and later steps leave its slot as it is.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from m1.engine.graphs import Graphs
from m1.engine.runner import DecodeBatch, PrefillBatch, Runner
from m1.engine.sampling import SamplingBatch, SamplingParams, truncates
from m1.engine.scheduler import Chunk, Fork, Plan, Swap
from m1.engine.slots import LayerState, Slots, capacity_for
from m1.ops import sample_token
from m1.ops.inputs import DRAWN, ENDED, MAX_STOPS, MIN_P, STOPS, STREAM, TEMPERATURE, TOP_K, TOP_P
from m1.ops.registers import advance_registers, read_registers


class Drawn(NamedTuple):
    """The tokens that a plan drew, on their way to the host.

    Attributes:
        values: [2, rows] float64 in the host's memory: tokens and their log-probabilities.
        event: the device's mark that they have arrived; None on a CPU.
    """

    values: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[float]]:
        """Waits for the tokens and their log-probabilities, and returns them."""
        if self.event is not None:
            self.event.synchronize()
        tokens, logprobs = self.values
        return tokens.long().tolist(), logprobs.tolist()


class Registers(NamedTuple):
    """What a step knows of each slot's sequence besides its caches. It stays on the device (ops/registers.py).

    Attributes:
        integers: [slots, 6 + MAX_STOPS] int64, with the columns of ops/inputs.py.
        floats: [slots, 3] float32, likewise.
    """

    integers: Tensor
    floats: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "Registers":
        """Registers of slots without sequences, which have all ended."""
        integers = torch.zeros(count, STOPS + MAX_STOPS, dtype=torch.long, device=device)
        integers[:, ENDED] = 1
        return cls(integers, torch.ones(count, 3, device=device))

    def rows(self, slots: Tensor) -> tuple[DecodeBatch, Tensor, Tensor]:
        """The input of the next step of these slots, and the random number and temperature of its draw, [b] each."""
        tokens, active, lengths, uniform, temperature = read_registers(self.integers, self.floats, slots)
        return DecodeBatch(tokens, active, lengths), uniform, temperature

    def sampling(self, slots: Tensor, params: list[SamplingParams]) -> SamplingBatch:
        """The sampling settings of these slots. `params` are those of the sequences that truncate."""
        integers, floats = self.integers[slots], self.floats[slots, :, None]
        stream, top_k = integers[:, STREAM], integers[:, TOP_K, None]
        return SamplingBatch(params, stream, floats[:, TEMPERATURE], top_k, floats[:, TOP_P], floats[:, MIN_P])


class Saved(NamedTuple):
    """A swapped-out sequence: registers, states and pages in the host's memory, and its settings if it truncates."""

    registers: list[Tensor]
    states: list[LayerState]
    params: SamplingParams | None


class Executor:
    """Executes a scheduler's plans: fills slots, runs the network, and draws tokens.

    `execute` takes a `Plan` and returns the drawn tokens, without waiting for their values.

    Args:
        model: the network, on the device that executes.
        sizing: what `capacity_for` takes: max_num_seqs, prefix_cache, max_model_len, page_size.
        int8: rounds the weights of all linear layers (`PackedLinear`).

    Attributes:
        capacity: the slots and pages, which the `Scheduler` hands out.

    Raises:
        UserError: a model that `Runner` can't run.
    """

    def __init__(self, model: PreTrainedModel, sizing: tuple[int, int, int, int], int8: bool):
        self.device = model.device
        self.runner = Runner(model, int8)
        self.capacity = capacity_for(model.config, *sizing, model.dtype, model.device)
        self.slots = Slots(model.config, self.capacity, model.dtype, model.device)
        self.runner.attach(self.slots)
        self.registers = Registers.empty(self.slots.spare + 1, self.device)
        self.logits: dict[int, tuple[Tensor, int]] = {}  # by slot of a prompt or an entry: logits [c, V] and its row
        self.truncating: dict[int, SamplingParams] = {}  # by slot, for sequences that sample from some tokens only
        self.swapped: dict[int, Saved] = {}  # by sequence
        self._batch: tuple[list[int], Tensor] = [], torch.empty(0, dtype=torch.long, device=self.device)
        self.use_graphs(self.device.type == "cuda")

    def use_graphs(self, graphs: bool) -> None:
        """Whether decode steps run under CUDA graphs. On a CPU the same code pads the batches."""
        steps = self._step, lambda slots: (self.runner.decode(self.registers.rows(slots)[0]),)
        self.step, self.network = (Graphs(s, self.slots.spare, self.device) if graphs else s for s in steps)

    def execute(self, plan: Plan) -> Drawn:
        """Executes a plan. Returns the tokens drawn by its forks, then by its decodes."""
        for id_ in plan.drop:
            self.swapped.pop(id_, None)  # missing if the step that should have saved it was interrupted
        for swap in plan.swap_out:
            self._swap_out(swap)
        self.slots.place(plan.place)
        for swap in plan.swap_in:
            self._swap_in(swap)
        if plan.restore:
            self.slots.copy(plan.restore)
            for copy in plan.restore:
                if copy.source in self.logits:
                    self.logits[copy.target] = self.logits[copy.source]
        for chunks in rounds(plan.prefill):
            self._prefill(chunks)
        drawn = [self._fork(plan.fork)] if plan.fork else []
        if plan.decode.slots:
            drawn.append(self._decode(plan.decode.slots))
        return self._to_host(drawn)

    def _prefill(self, chunks: list[Chunk]) -> None:
        fresh = [chunk.slot for chunk in chunks if chunk.start == 0]
        if fresh:
            self.slots.clear(torch.tensor(fresh, device=self.device))
        logits = self.runner.prefill(prefill_batch(chunks, self.device))
        self.logits |= {chunk.slot: (logits, row) for row, chunk in enumerate(chunks)}
        kept = [chunk.keep for chunk in chunks if chunk.keep]
        if kept:
            self.slots.copy(kept)
            for copy in kept:
                logits, row = self.logits[copy.source]
                self.logits[copy.target] = logits[row : row + 1].clone(), 0

    def _fork(self, forks: list[Fork]) -> tuple[Tensor, Tensor]:
        """Copies the prompts' slots to the new sequences, draws their first tokens, and fills their registers."""
        self.slots.copy([fork.copy for fork in forks])
        logits = self._logits([fork.copy.source for fork in forks])
        batch = SamplingBatch.of([fork.params for fork in forks], [fork.stream for fork in forks], self.device)
        for fork in forks:
            self._set_truncating(fork.copy.target, fork.params)
            if fork.copy.source == fork.copy.target:
                del self.logits[fork.copy.source]
        slots = self._tensor([fork.copy.target for fork in forks])
        counts = self._tensor([(0, fork.length - 1, 0, 0) for fork in forks])
        stops = self._tensor([padded_stops(fork.stop) for fork in forks])
        self.registers.integers[slots] = torch.cat([counts, batch.streams[:, None], batch.top_k, stops], dim=1)
        self.registers.floats[slots] = torch.cat([batch.temperature, batch.top_p, batch.min_p], dim=1)
        return self._draw(slots, logits, batch)

    def _logits(self, slots: list[int]) -> Tensor:
        """The logits [b, V] after the prompts in these slots. Prompts that ran together have theirs in one tensor."""
        parts = {id(self.logits[slot][0]): self.logits[slot][0] for slot in slots}
        lengths = [0, *(len(part) for part in parts.values())]
        offset = dict(zip(parts, np.cumsum(lengths).tolist(), strict=False))
        rows = self._tensor([offset[id(part)] + row for part, row in (self.logits[slot] for slot in slots)])
        return torch.cat(list(parts.values()))[rows]

    def _decode(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        if self._batch[0] is not slots:
            self._batch = slots, self._tensor(slots)
        batch = self._batch[1]
        params = [self.truncating[slot] for slot in slots if slot in self.truncating] if self.truncating else []
        if not params:
            tokens, logprobs = self.step(batch)
            return tokens, logprobs
        (logits,) = self.network(batch)
        return self._draw(batch, logits, self.registers.sampling(batch, params))

    def _step(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """A decode step of sequences that sample from all tokens: nothing in it depends on the host."""
        batch, uniform, temperature = self.registers.rows(slots)
        tokens, logprobs = sample_token(self.runner.decode(batch), uniform, temperature)
        advance_registers(self.registers.integers, slots, tokens)
        return tokens, logprobs

    def _draw(self, slots: Tensor, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        """Draws a token for each slot and makes it the input of the slot's next step."""
        tokens, logprobs = batch.sample(logits, self.registers.integers[slots, DRAWN])
        advance_registers(self.registers.integers, slots, tokens)
        return tokens, logprobs

    def _to_host(self, drawn: list[tuple[Tensor, Tensor]]) -> Drawn:
        rows = [torch.stack([tokens.double(), logprobs.double()]) for tokens, logprobs in drawn]
        values = torch.cat(rows, dim=1) if rows else torch.empty(2, 0, dtype=torch.double)
        if values.device.type != "cuda":
            return Drawn(values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Drawn(host, event)

    def _swap_out(self, swap: Swap) -> None:
        registers = [register[swap.slot].clone() for register in self.registers]
        self.swapped[swap.sequence] = Saved(registers, self.slots.save(swap), self.truncating.get(swap.slot))

    def _swap_in(self, swap: Swap) -> None:
        registers, states, params = self.swapped.pop(swap.sequence)
        self.slots.load(swap, states)
        for register, row in zip(self.registers, registers, strict=True):
            register[swap.slot] = row
        self._set_truncating(swap.slot, params)

    def _set_truncating(self, slot: int, params: SamplingParams | None) -> None:
        self.truncating.pop(slot, None)
        if params and truncates(params):
            self.truncating[slot] = params

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)


def rounds(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Groups chunks into prefills. Chunks of one prompt, which are in order, come one after another."""
    grouped: list[list[Chunk]] = []
    seen: dict[int, int] = {}
    for chunk in chunks:
        number = seen[chunk.slot] = seen.get(chunk.slot, -1) + 1
        if number == len(grouped):
            grouped.append([])
        grouped[number].append(chunk)
    return grouped


def prefill_batch(chunks: list[Chunk], device: torch.device) -> PrefillBatch:
    """The tensors of chunks, in one copy to the device."""
    lengths = np.array([len(chunk.tokens) for chunk in chunks])
    slots, starts, totals = np.array([(chunk.slot, chunk.start, chunk.total) for chunk in chunks]).T
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
    of_tokens = [
        np.concatenate([chunk.tokens for chunk in chunks]),
        positions,
        *(np.repeat(x, lengths) for x in (totals, slots)),
    ]
    parts = [*of_tokens, slots, starts, np.concatenate([[0], ends])]
    packed = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    tokens, positions_, totals_, owners, slots_, starts_, cu_seqlens = packed.split([len(part) for part in parts])
    return PrefillBatch(tokens, positions_, totals_, slots_, starts_, cu_seqlens, owners, max_length=int(lengths.max()))


def padded_stops(stop: frozenset[int]) -> list[int]:
    """The first MAX_STOPS stop tokens, filled up with -1."""
    return [*sorted(stop), *([-1] * MAX_STOPS)][:MAX_STOPS]
