"""Executes plans on tensors. Owns the slots, the network and the sampler.

A step's inputs stay on the device between steps, and each step makes the inputs of the next. Nothing here waits for a
token's value: a sequence that draws a stop token ends on the device, and later steps leave its slot as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from m1.engine.graphs import Graphs, Step
from m1.engine.logits_processors import LogitsProcessors, TokenCounts
from m1.engine.plan import Chunk, Fork, Plan, Swap
from m1.engine.recordings import Recordings
from m1.engine.runner import DecodeBatch, PrefillBatch, Runner
from m1.engine.sampling import SamplingBatch, SamplingParams, scores_of
from m1.engine.sequence import TopLogprobs
from m1.engine.slots import LayerState, Slots, capacity_for
from m1.ops import sample_token
from m1.ops.inputs import DRAWN, ENDED, MAX_STOPS, MIN_P, STOPS, STREAM, TEMPERATURE, TOP_K, TOP_P
from m1.ops.registers import advance_registers, read_registers
from m1.options import Quantization

SCORED_ROWS = 128  # of which logits are computed together


class Drawn(NamedTuple):
    """The tokens that a plan drew, on their way to the host.

    Attributes:
        values: [2 + 2k, rows] float64 in the host's memory: tokens and their log-probabilities, then the k likeliest
            tokens, each with its own. k is the most that a row asks for.
        scores: of each chunk that scores, in the plan's order, [2 + 2k, rows] likewise.
        event: the device's mark that they have arrived; None on a CPU.
    """

    values: Tensor
    scores: list[Tensor]
    event: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[float], TopLogprobs | None, list[tuple[list[float], TopLogprobs]]]:
        """Waits for all, and returns what `Scheduler.update` takes in."""
        if self.event is not None:
            self.event.synchronize()
        tokens, logprobs, *top = self.values
        scores = [(logprobs.tolist(), _pairs(top)) for _, logprobs, *top in self.scores]
        return tokens.long().tolist(), logprobs.tolist(), _pairs(top) or None, scores


def _pairs(top: list[Tensor]) -> TopLogprobs:
    """The likeliest tokens with their log-probabilities, of the rows of both."""
    ids, values = (torch.stack(top[i::2], dim=1).tolist() if top else () for i in (0, 1))
    return [[(int(i), value) for i, value in zip(*row, strict=True)] for row in zip(ids, values, strict=True)]


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
        *batch, uniform, temperature = read_registers(self.integers, self.floats, slots)
        return DecodeBatch(*batch), uniform, temperature

    def sampling(self, slots: Tensor, params: dict[int, SamplingParams]) -> SamplingBatch:
        """The sampling settings of these slots. `params`, by row, are those that aren't plain."""
        integers, floats = self.integers[slots], self.floats[slots, :, None]
        stream, top_k = integers[:, STREAM], integers[:, TOP_K, None]
        return SamplingBatch(params, stream, floats[:, TEMPERATURE], top_k, floats[:, TOP_P], floats[:, MIN_P])


class Saved(NamedTuple):
    """A swapped-out sequence: registers; in the host's memory states, pages and counts of tokens; how it started."""

    registers: list[Tensor]
    states: list[LayerState]
    counts: Tensor | None
    fork: Fork | None


class Executor:
    """Executes a scheduler's plans: fills slots, runs the network, and draws tokens.

    `execute` takes a `Plan` and returns the drawn tokens, without waiting for their values.

    Args:
        model: the network, on the device that executes.
        sizing: what `capacity_for` takes: max_num_seqs, prefix_cache, max_model_len, page_size.
        quantization: rounds the weights of all linear layers (`PackedLinear`).

    Attributes:
        capacity: the slots and pages, which the `Scheduler` hands out.

    Raises:
        UserError: a model that `Runner` can't run.
    """

    def __init__(self, model: PreTrainedModel, sizing: tuple[int, int, int, int], quantization: Quantization | None):
        self.device = model.device
        self.runner = Runner(model, quantization)
        self.capacity = capacity_for(model.config, *sizing, model.dtype, model.device)
        self.slots = Slots(model.config, self.capacity, model.dtype, model.device)
        self.runner.attach(self.slots)
        self.registers = Registers.empty(self.slots.spare + 1, self.device)
        self.logits: dict[int, tuple[Tensor, int]] = {}  # by slot of a prompt or an entry: logits [c, V] and its row
        self.special: dict[int, Fork] = {}  # by slot, for sequences whose sampling isn't plain: how they started
        self.seen = TokenCounts(self.slots.spare + 1, model.config.vocab_size, self.device)
        self.swapped: dict[int, Saved] = {}  # by sequence
        # what was decoded last: the slots, the same on the device, and how they are sampled if not all are plain
        self._batch: tuple[list[int], Tensor, tuple[SamplingBatch, LogitsProcessors | None] | None]
        self._batch = [], self._tensor([]), None
        on_gpu = self.device.type == "cuda"
        self.use(lambda step: Graphs(step, self.slots.spare, self.device) if on_gpu else Recordings(step))

    def use(self, repeated: Callable[[Step], Step]) -> None:
        """How decode steps are repeated: `Graphs`, `Recordings`, or as they are."""
        self.step = repeated(self._step)
        self.network = repeated(lambda slots: (self.runner.decode(self.registers.rows(slots)[0]),))

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
        scores: dict[tuple[int, int], Tensor] = {}  # by a chunk's slot and start
        for chunks in rounds(plan.prefill):
            self._prefill(chunks, scores)
        drawn = [self._fork(plan.fork)] if plan.fork else []
        if plan.decode.slots:
            drawn.append(self._decode(plan.decode.slots))
        return self._to_host(drawn, [scores[chunk.slot, chunk.start] for chunk in plan.prefill if chunk.scored])

    def _prefill(self, chunks: list[Chunk], scores: dict[tuple[int, int], Tensor]) -> None:
        fresh = [chunk.slot for chunk in chunks if chunk.start == 0]
        if fresh:
            self.slots.clear(torch.tensor(fresh, device=self.device))
        batch = prefill_batch(chunks, self.device)
        hidden = self.runner.prefill(batch)
        for chunk, own in zip(chunks, hidden.split([len(chunk.tokens) for chunk in chunks]), strict=True):
            if chunk.scored:
                scores[chunk.slot, chunk.start] = self._score(own[: len(chunk.scored)], chunk)
        logits = self.runner.head(hidden[batch.cu_seqlens[1:] - 1])
        self.logits |= {chunk.slot: (logits, row) for row, chunk in enumerate(chunks)}
        kept = [chunk.keep for chunk in chunks if chunk.keep]
        if kept:
            self.slots.copy(kept)
            for copy in kept:
                logits, row = self.logits[copy.source]
                self.logits[copy.target] = logits[row : row + 1].clone(), 0

    def _score(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        """What `Drawn.scores` holds for hidden states [rows, H] of a chunk. Few rows at a time: logits are large."""
        parts = zip(hidden.split(SCORED_ROWS), self._tensor(list(chunk.scored)).split(SCORED_ROWS), strict=True)
        return torch.cat([scores_of(self.runner.head(rows), tokens, chunk.likeliest) for rows, tokens in parts], dim=1)

    def _fork(self, forks: list[Fork]) -> Tensor:
        """Copies the prompts' slots to the new sequences, draws their first tokens, and fills their registers."""
        self.slots.copy([fork.copy for fork in forks])
        logits = self._logits([fork.copy.source for fork in forks])
        batch = SamplingBatch.of([fork.params for fork in forks], [fork.stream for fork in forks], self.device)
        self.seen.start(forks)
        for fork in forks:
            self._set_special(fork.copy.target, fork)
            if fork.copy.source == fork.copy.target:
                del self.logits[fork.copy.source]
        slots = self._tensor([fork.copy.target for fork in forks])
        counts = self._tensor([(0, len(fork.prompt) - 1, 0, 0) for fork in forks])
        stops = self._tensor([padded_stops(fork.stop) for fork in forks])
        self.registers.integers[slots] = torch.cat([counts, batch.streams[:, None], batch.top_k, stops], dim=1)
        self.registers.floats[slots] = torch.cat([batch.temperature, batch.top_p, batch.min_p], dim=1)
        return self._draw(slots, logits, batch, self._processors(slots, dict(enumerate(forks))))

    def _logits(self, slots: list[int]) -> Tensor:
        """The logits [b, V] after the prompts in these slots. Prompts that ran together have theirs in one tensor."""
        parts = {id(self.logits[slot][0]): self.logits[slot][0] for slot in slots}
        lengths = [0, *(len(part) for part in parts.values())]
        offset = dict(zip(parts, np.cumsum(lengths).tolist(), strict=False))
        rows = self._tensor([offset[id(part)] + row for part, row in (self.logits[slot] for slot in slots)])
        return torch.cat(list(parts.values()))[rows]

    def _decode(self, slots: list[int]) -> Tensor:
        if self._batch[0] is not slots:
            batch, special = self._tensor(slots), self.special
            forks = {row: special[slot] for row, slot in enumerate(slots) if slot in special} if special else {}
            params = {row: fork.params for row, fork in forks.items()}
            drawing = (self.registers.sampling(batch, params), self._processors(batch, forks)) if forks else None
            self._batch = slots, batch, drawing
        _, batch, drawing = self._batch
        if drawing is None:
            return torch.stack([values.double() for values in self.step(batch)])
        (logits,) = self.network(batch)
        return self._draw(batch, logits, *drawing)

    def _step(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """A decode step of sequences that sample from all tokens: nothing in it depends on the host."""
        batch, uniform, temperature = self.registers.rows(slots)
        tokens, logprobs = sample_token(self.runner.decode(batch), uniform, temperature)
        advance_registers(self.registers.integers, slots, tokens)
        return tokens, logprobs

    def _processors(self, slots: Tensor, forks: dict[int, Fork]) -> LogitsProcessors | None:
        """What changes the logits of these slots. `forks`: by row, those of sequences that aren't plain, at least."""
        processed = {row: fork for row, fork in forks.items() if fork.params.processes}
        return LogitsProcessors(processed, slots, self.seen) if processed else None

    def _draw(self, slots: Tensor, logits: Tensor, batch: SamplingBatch, processors: LogitsProcessors | None) -> Tensor:
        """Draws a token for each slot and makes it the input of the slot's next step. Returns what `Drawn` holds."""
        registers = self.registers.integers[slots]
        processed = processors(logits, registers[:, DRAWN]) if processors else None
        tokens, logprobs, top = batch.sample(logits, registers[:, DRAWN], processed)
        if processors:
            processors.count(tokens, registers[:, ENDED] == 0)
        advance_registers(self.registers.integers, slots, tokens)
        return torch.cat([tokens.double()[None], logprobs.double()[None], top.flatten(1).T])

    def _to_host(self, drawn: list[Tensor], scores: list[Tensor]) -> Drawn:
        height = max(map(len, drawn), default=2)
        rows = [F.pad(values, (0, 0, 0, height - len(values))) if len(values) < height else values for values in drawn]
        values = torch.cat(rows, dim=1) if rows else torch.empty(2, 0, dtype=torch.double)
        if self.device.type != "cuda":
            return Drawn(values, scores, None)
        host, *hosts = (torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (values, *scores))
        for target, source in zip((host, *hosts), (values, *scores), strict=True):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Drawn(host, hosts, event)

    def _swap_out(self, swap: Swap) -> None:
        registers, fork = [register[swap.slot].clone() for register in self.registers], self.special.get(swap.slot)
        counts = self.seen.save(swap.slot) if fork and fork.params.penalizes else None
        self.swapped[swap.sequence] = Saved(registers, self.slots.save(swap), counts, fork)

    def _swap_in(self, swap: Swap) -> None:
        registers, states, counts, fork = self.swapped.pop(swap.sequence)
        self.slots.load(swap, states)
        for register, row in zip(self.registers, registers, strict=True):
            register[swap.slot] = row
        if counts is not None:
            self.seen.load(swap.slot, counts)
        self._set_special(swap.slot, fork)

    def _set_special(self, slot: int, fork: Fork | None) -> None:
        self.special.pop(slot, None)
        if fork and not fork.params.plain:
            self.special[slot] = fork

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
