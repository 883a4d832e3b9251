"""Decides what the next step does, on integers only. executor.py executes the plan.

Requests are admitted in order. A prompt is prefilled once, in chunks, and forked into its n sequences. Planning needs
no token values: a plan can be made before the previous plan's tokens are known, so `update` may come one plan late.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from m1.engine.sampling import SamplingParams, fold_in
from m1.engine.sequence import Request, Sequence

Prefix = tuple[bool, tuple[int, ...]]  # whether the prompt is long, and its first tokens


class Restore(NamedTuple):
    """Part of a `Plan`: copy a state from the prefix cache into a slot.

    Attributes:
        entry: which entry of the prefix cache.
        slot: the slot to fill.
        length: number of tokens that the state has seen.
    """

    entry: int
    slot: int
    length: int


class Chunk(NamedTuple):
    """Part of a `Plan`: prefill a prompt's next tokens, then keep the state in the prefix cache.

    Attributes:
        slot: the prompt's slot.
        start: number of prompt tokens that the slot has seen. The slot is cleared first when 0.
        tokens: the token ids to prefill.
        total: number of tokens in the prompt.
        entry: the entry of the prefix cache that takes the state; None to keep nothing.
    """

    slot: int
    start: int
    tokens: list[int]
    total: int
    entry: int | None


class Fork(NamedTuple):
    """Part of a `Plan`: start a sequence from its prompt's state and draw its first token.

    Attributes:
        sequence: id of the sequence.
        source: the prompt's slot.
        target: the sequence's slot, a copy of `source`. If they are equal, the sequence takes the prompt's slot over.
        length: number of tokens in the prompt.
        params: how to sample.
        stream: the sequence's random stream, a seed from `fold_in`.
    """

    sequence: int
    source: int
    target: int
    length: int
    params: SamplingParams
    stream: int


class Decode(NamedTuple):
    """Part of a `Plan`: decode one token of each of b sequences.

    Attributes:
        sequences: ids of the sequences.
        slots: their slots.
        lengths: number of tokens that each slot has seen.
    """

    sequences: list[int]
    slots: list[int]
    lengths: list[int]


@dataclass
class Plan:
    """The work of one step, decided by the `Scheduler` and executed by the `Executor` in the order of the fields.

    Attributes:
        restore: states to copy from the prefix cache, which earlier plans have written.
        prefill: chunks of prompts to run.
        fork: sequences to start. Each draws its first token.
        decode: sequences to decode. Each draws its next token.
    """

    restore: list[Restore] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    fork: list[Fork] = field(default_factory=list)
    decode: Decode = field(default_factory=lambda: Decode([], [], []))


@dataclass
class Stats:
    """Counters of an engine's work since it was made.

    Attributes:
        steps: decode steps.
        decoded: tokens drawn.
        prefilled: prompt tokens computed.
        prefix_hits: prompt tokens found in the prefix cache.
        forks: sequences that started with a copy of their prompt's slot.
    """

    steps: int = 0
    decoded: int = 0
    prefilled: int = 0
    prefix_hits: int = 0
    forks: int = 0


class Scheduler:
    """Decides which sequences get a slot and what each step computes, without a model or tensors.

    `add` queues a request, `schedule` plans the next step, and `update` takes in the tokens that a plan drew. It holds
    the waiting requests, the running sequences, the free slots, and the index of the prefix cache.

    Args:
        num_slots: maximum number of sequences that run at the same time.
        prefill_chunk: maximum number of prompt tokens in a chunk. A plan that has as many takes no further chunk.
        prefix_cache: number of entries in the prefix cache. An entry is the state after a whole prompt, or after the
            beginning of one at a multiple of `prefill_chunk`. It is used only where a prefill would pass through it.
        stop_token_ids: tokens that end a sequence, unless its request has `ignore_eos`.
        long_prompt: prompts with more tokens share no prefix with shorter ones: they are rotated otherwise (`Rotary`).
    """

    def __init__(
        self,
        num_slots: int,
        prefill_chunk: int,
        prefix_cache: int,
        stop_token_ids: Collection[int] = (),
        long_prompt: float = math.inf,
    ):
        self.free = list(reversed(range(num_slots)))
        self.prefill_chunk = prefill_chunk
        self.prefix_cache = prefix_cache
        self.long_prompt = long_prompt
        self.cached: OrderedDict[Prefix, int] = OrderedDict()  # by prefix: its entry, least recently used first
        self.stop_token_ids = frozenset(stop_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}
        self.stats = Stats()
        self._admitted = self._plans = self._steady_until = 0  # sequences and plans so far; last plan of `_rows`
        self._rows: list[Sequence] = []  # decoded by each plan until one joins, leaves, or draws its last token
        self._columns: tuple[list[int], list[int]] = [], []  # their ids and slots

    def add(self, request: Request) -> None:
        """Queues a request after those that wait."""
        own = frozenset() if request.params.ignore_eos else self.stop_token_ids
        request.stop = own.union(request.params.stop_token_ids)
        self.waiting.append(request)

    def schedule(self) -> Plan:
        """Plans the next step: admits waiting requests, then decodes each sequence that may draw more tokens."""
        plan = Plan()
        self._plans = now = self._plans + 1
        self._admit(plan)
        if now > self._steady_until:
            self._rows = [sequence for sequence in self.running.values() if sequence.last_plan >= now]
            self._steady_until = min((row.last_plan for row in self._rows), default=0)
            self._columns = [row.id for row in self._rows], [row.slot for row in self._rows]
        plan.decode = Decode(*self._columns, [row.base + now for row in self._rows])
        self.stats.steps += bool(self._rows)
        return plan

    def update(self, plan: Plan, tokens: list[int], logprobs: list[float]) -> list[Sequence]:
        """Appends the tokens that a plan drew to their sequences. Returns the sequences that ended with them.

        Tokens of sequences that have ended are dropped: they were planned before the end was known.

        Args:
            plan: the plan that was executed.
            tokens: one per fork, then one per decoded sequence.
            logprobs: their log-probabilities; NaN ends the sequence with reason "nan".
        """
        ended, drawn = [], 0
        ids = [fork.sequence for fork in plan.fork] + plan.decode.sequences
        for id_, token, logprob in zip(ids, tokens, logprobs, strict=True):
            sequence = self.running.get(id_)
            if sequence is None:
                continue
            drawn += 1
            reason = "nan"
            if logprob == logprob:
                sequence.token_ids.append(token)
                sequence.logprobs.append(logprob)
                request = sequence.request
                full = len(sequence.token_ids) == request.params.max_tokens
                reason = "stop" if token in request.stop else "length" if full else ""
            if reason:
                self.finish(sequence, reason)
                ended.append(sequence)
        self.stats.decoded += drawn
        return ended

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence. Its slot is free at once. One that has ended already only gets another reason."""
        if not sequence.done:
            del self.running[sequence.id]
            self._steady_until = 0
            self.free.append(sequence.slot)
        sequence.finish_reason, sequence.done = reason, True

    def abort(self, request: Request) -> None:
        """Ends the request's unfinished sequences, waiting or running."""
        if request in self.waiting:
            self.waiting.remove(request)
            if request.slot is not None:
                self.free.append(request.slot)
                request.slot = None
        for sequence in request.sequences:
            if sequence.id in self.running:
                self.finish(sequence, "abort")
            sequence.done = True

    def reset(self) -> None:
        """Aborts all requests and forgets the prefix cache, since a plan wasn't executed to its end."""
        for request in {*self.waiting, *(sequence.request for sequence in self.running.values())}:
            self.abort(request)
        self.cached.clear()

    def _admit(self, plan: Plan) -> None:
        """Prefills and starts the waiting requests, in order, while there are slots and chunk budget."""
        budget = self.prefill_chunk
        while self.waiting:
            request = self.waiting[0]
            if request.slot is None and not self._open(request, plan):
                return
            while request.computed < len(request.tokens):
                if budget <= 0:
                    return
                budget -= self._prefill(request, plan)
            while request.started < request.params.n and self._start(request, plan):
                pass
            if request.started == request.params.n:
                self.waiting.popleft()
            elif request.slot is not None:  # the prompt waits in its slot until another slot is free
                return

    def _open(self, request: Request, plan: Plan) -> bool:
        """Gives the prompt a slot with its longest cached beginning. Returns False if it has to wait."""
        if not self.free:
            return False
        size, step = len(request.tokens), self.prefill_chunk
        for length in [size, *range((size - 1) // step * step, 0, -step)]:
            entry = self.cached.get(key := self._prefix(request, length))
            if entry is None:
                continue
            if any(chunk.entry == entry for chunk in plan.prefill):
                return False  # this plan computes it; the next one can restore it
            self.cached.move_to_end(key)
            request.slot, request.computed = self.free.pop(), length
            plan.restore.append(Restore(entry, request.slot, length))
            self.stats.prefix_hits += length
            return True
        request.slot, request.computed = self.free.pop(), 0
        return True

    def _prefill(self, request: Request, plan: Plan) -> int:
        """Plans a prompt's next chunk: `prefill_chunk` tokens, or those that are left. Returns the number of tokens."""
        assert request.slot is not None
        start = request.computed
        tokens = request.tokens[start : start + self.prefill_chunk]
        request.computed += len(tokens)
        plan.prefill.append(Chunk(request.slot, start, tokens, len(request.tokens), self._entry(request)))
        self.stats.prefilled += len(tokens)
        return len(tokens)

    def _entry(self, request: Request) -> int | None:
        """Takes a prefix-cache entry, new or least recently used, for the part of the prompt computed so far."""
        if not self.prefix_cache:
            return None
        full = len(self.cached) == self.prefix_cache
        entry = self.cached.popitem(last=False)[1] if full else len(self.cached)
        self.cached[self._prefix(request, request.computed)] = entry
        return entry

    def _prefix(self, request: Request, length: int) -> Prefix:
        return len(request.tokens) > self.long_prompt, tuple(request.tokens[:length])

    def _start(self, request: Request, plan: Plan) -> bool:
        """Starts the request's next sequence in a free slot or in the prompt's. Returns False if it has to wait."""
        source = request.slot
        if source is None:
            return False
        last = request.started + 1 == request.params.n
        if not last and self.free:
            target = self.free.pop()
            self.stats.forks += 1
        elif last or not self.running:  # no other slot will be free: take the prompt's; the next prefills again
            target = source
            request.slot, request.computed = None, request.computed if last else 0
        else:
            return False
        sequence = request.sequences[request.started]
        request.started += 1
        size, params = len(request.tokens), request.params
        sequence.id, sequence.slot = self._admitted, target
        sequence.base, sequence.last_plan = size - self._plans, self._plans + params.max_tokens - 2
        self._admitted += 1
        self.running[sequence.id] = sequence
        self._steady_until = 0
        stream = fold_in(params.seed, sequence.index)
        plan.fork.append(Fork(sequence.id, source, target, size, params, stream))
        return True
