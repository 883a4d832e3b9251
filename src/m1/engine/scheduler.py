"""Decides what the next step does. Only integers are handled here; executor.py carries a plan out.

Requests are admitted in order. A prompt is prefilled once, in chunks, and forked for its n sequences. Planning needs no
token values: a plan may be made before the tokens of the one before it are known, so `update` may come one plan late.
"""

from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from m1.engine.sampling import SamplingParams, fold_in
from m1.engine.sequence import Request, Sequence


class Restore(NamedTuple):
    """Copy an entry of the prefix cache, the state after `length` tokens, into a slot."""

    entry: int
    slot: int
    length: int


class Chunk(NamedTuple):
    """Prefill a prompt's next tokens, with `start` 0 into an empty slot; then keep the state in the prefix cache."""

    slot: int
    start: int
    tokens: list[int]
    entry: int | None  # of the prefix cache


class Fork(NamedTuple):
    """Start a sequence: copy its prompt's slot (or take it over, where source is target) and draw its first token."""

    sequence: int
    source: int
    target: int
    length: int  # tokens of the prompt
    params: SamplingParams
    stream: int  # of random numbers


class Decode(NamedTuple):
    """Decode one token of each of these sequences, whose slots have seen `lengths` tokens."""

    sequences: list[int]
    slots: list[int]
    lengths: list[int]


@dataclass
class Plan:
    """The work of one step, in the order in which it is executed. Restores read what earlier plans have kept."""

    restore: list[Restore] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    fork: list[Fork] = field(default_factory=list)
    decode: Decode = field(default_factory=lambda: Decode([], [], []))


@dataclass
class Stats:
    """What has been planned and drawn so far."""

    steps: int = 0  # decode steps
    decoded: int = 0  # tokens drawn
    prefilled: int = 0  # prompt tokens computed
    prefix_hits: int = 0  # prompt tokens found in the prefix cache
    forks: int = 0


class Scheduler:
    """Waiting and running sequences, free slots, and the prefix cache's index.

    Args:
        num_slots: sequences that run at a time.
        prefill_chunk: maximum number of prompt tokens in a chunk. No chunk begins in a plan that has as many already.
        prefix_cache: entries of the cache: states after whole prompts, and after their beginnings at multiples of
            `prefill_chunk`. They are used only where a prefill would have passed through the same state.
        stop_token_ids: end a sequence, unless its request ignores them.
    """

    def __init__(self, num_slots: int, prefill_chunk: int, prefix_cache: int, stop_token_ids: Collection[int] = ()):
        self.free = list(reversed(range(num_slots)))
        self.prefill_chunk = prefill_chunk
        self.prefix_cache = prefix_cache
        self.cached: OrderedDict[tuple[int, ...], int] = OrderedDict()  # tokens -> entry, least recently used first
        self.stop_token_ids = frozenset(stop_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}
        self.stats = Stats()
        self._admitted = self._plans = self._steady_until = 0  # sequences and plans so far; the last plan of `_rows`
        self._rows: list[Sequence] = []  # decoded by every plan until one joins, leaves, or has drawn its last token
        self._columns: tuple[list[int], list[int]] = [], []  # their ids and slots

    def add(self, request: Request) -> None:
        own = frozenset() if request.params.ignore_eos else self.stop_token_ids
        request.stop = own.union(request.params.stop_token_ids)
        self.waiting.append(request)

    def schedule(self) -> Plan:
        """The next step: admits what has a slot, then decodes every sequence that may draw more tokens."""
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
        """Takes in the tokens that a plan drew, those of its forks first. Returns the sequences that ended with them.

        Tokens of sequences that ended before are dropped: they were planned before that was known.
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
        """Ends a running sequence. Its slot is free at once."""
        del self.running[sequence.id]
        self._steady_until = 0
        self.free.append(sequence.slot)
        sequence.finish_reason, sequence.done = reason, True

    def abort(self, request: Request) -> None:
        """Ends what is unfinished of a request, waiting or running."""
        if request in self.waiting:
            self.waiting.remove(request)
            if request.slot is not None:
                self.free.append(request.slot)
                request.slot = None
        for sequence in request.sequences:
            if sequence.id in self.running:
                self.finish(sequence, "abort")
            sequence.done = True

    def _admit(self, plan: Plan) -> None:
        """Prefills and starts what waits, in order, as far as slots and the chunk budget go."""
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
            elif request.slot is not None:  # the prompt waits in its slot until others leave theirs
                return

    def _open(self, request: Request, plan: Plan) -> bool:
        """Gives the prompt a slot, as far along as the prefix cache goes. False if that has to wait."""
        if not self.free:
            return False
        size, step = len(request.tokens), self.prefill_chunk
        for length in [size, *range((size - 1) // step * step, 0, -step)]:
            entry = self.cached.get(key := tuple(request.tokens[:length]))
            if entry is None:
                continue
            if any(chunk.entry == entry for chunk in plan.prefill):
                return False  # this very plan computes it; the next one can restore it
            self.cached.move_to_end(key)
            request.slot, request.computed = self.free.pop(), length
            plan.restore.append(Restore(entry, request.slot, length))
            self.stats.prefix_hits += length
            return True
        request.slot, request.computed = self.free.pop(), 0
        return True

    def _prefill(self, request: Request, plan: Plan) -> int:
        """Plans a prompt's next chunk, up to a multiple of the chunk size or its end. Returns the number of tokens."""
        assert request.slot is not None
        start = request.computed
        tokens = request.tokens[start : start + self.prefill_chunk]
        request.computed += len(tokens)
        plan.prefill.append(Chunk(request.slot, start, tokens, self._entry(request)))
        self.stats.prefilled += len(tokens)
        return len(tokens)

    def _entry(self, request: Request) -> int | None:
        """An entry of the prefix cache for the prompt as far as computed: a new one, or the least recently used."""
        if not self.prefix_cache:
            return None
        full = len(self.cached) == self.prefix_cache
        entry = self.cached.popitem(last=False)[1] if full else len(self.cached)
        self.cached[tuple(request.tokens[: request.computed])] = entry
        return entry

    def _start(self, request: Request, plan: Plan) -> bool:
        """Gives the request's next sequence a slot: a fork, or the prompt's own for the last one. False if it waits."""
        source = request.slot
        if source is None:
            return False
        last = request.started + 1 == request.params.n
        if not last and self.free:
            target = self.free.pop()
            self.stats.forks += 1
        elif last or not self.running:  # nobody will leave a slot: take the prompt's, the next prefills it again
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
