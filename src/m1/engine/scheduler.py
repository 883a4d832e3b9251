"""Decides what the next step does, on integers only. executor.py executes the plan.

Requests are admitted in order. A prompt is prefilled once, in chunks, and forked into its n sequences. Planning needs
no token values: a plan can be made before the previous plan's tokens are known, so `update` may come one plan late.

States live in slots, keys and values in pages (pages.py). When pages run out, the youngest sequence is swapped out and
waits with its state saved. Nothing is computed again.
"""

import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from m1.engine.pages import Pages
from m1.engine.plan import Chunk, Copy, Decode, Fork, Placed, Plan, Stats, Swap
from m1.engine.sequence import Request, Sequence, TopLogprobs
from m1.ops.inputs import MAX_STOPS
from m1.ops.random_bits import fold_in

TOGETHER = 16  # the share of the slots, 1 / TOGETHER, that is free before prompts are taken from a longer queue


@dataclass(eq=False)
class Entry:
    """A state in the prefix cache.

    Attributes:
        tokens: the tokens that the state has seen.
        long: whether they began a long prompt.
        slot: holds the state.
        pages: hold the keys and values.
        ended: whether it is the state at a sequence's end. Such a state has no logits, and it was decoded, which rounds
            otherwise than a prefill.
        made: number of the plan that makes it, and of the chunk in that plan; None at a sequence's end.
    """

    tokens: list[int]
    long: bool
    slot: int
    pages: list[int]
    ended: bool
    made: tuple[int, int] | None


class Scheduler:
    """Decides which sequences get a slot and what each step computes, without a model or tensors.

    `add` queues a request, `schedule` plans the next step, and `update` takes in the tokens that a plan drew. It holds
    the waiting requests, the running sequences, the free slots and pages, and the index of the prefix cache.

    Args:
        num_slots: maximum number of sequences that run at the same time. As many more slots as `prefix_cache` says hold
            the prefix cache.
        pages: the memory for keys and values. It must hold two sequences of the maximum length and two pages more.
        prefill_chunk: maximum number of prompt tokens in a chunk. Chunks end at its multiples.
        prefill_budget: a plan that has as many prompt tokens takes no further chunk.
        prefix_cache: number of entries in the prefix cache. An entry is the state after a whole prompt, or after the
            beginning of one at a multiple of `prefill_chunk`. It is used only where a prefill would pass through it.
            `resumable` requests also leave the states at the ends of their sequences, and use them.
        stop_token_ids: tokens that end a sequence, unless its request has `ignore_eos`.
        long_prompt: prompts with more tokens share no prefix with shorter ones: they are rotated otherwise (`Rotary`).
    """

    def __init__(
        self,
        num_slots: int,
        pages: Pages,
        prefill_chunk: int,
        prefill_budget: int,
        prefix_cache: int,
        stop_token_ids: Collection[int] = (),
        long_prompt: float = math.inf,
    ):
        self.free = list(reversed(range(num_slots)))
        self.pages = pages
        self.prefill_chunk, self.prefill_budget = prefill_chunk, prefill_budget
        self.long_prompt, self.together = long_prompt, num_slots // TOGETHER
        self.unused = list(range(num_slots, num_slots + prefix_cache))  # slots for further entries
        self.cached: list[Entry] = []  # least recently used first
        self.stop_token_ids = frozenset(stop_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}
        self.swapped: dict[int, Sequence] = {}
        self.stats = Stats()
        self._plan = Plan()  # the latest
        self._admitted = self._plans = self._steady_until = 0  # sequences and plans so far; last plan of `_rows`
        self._rows: list[Sequence] = []  # decoded by each plan until one joins, leaves, or draws its last token
        self._columns: tuple[list[int], list[int]] = [], []  # their ids and slots
        self._growing: defaultdict[int, list[int]] = defaultdict(list)  # by plan: sequences that then need a page
        self._dropped: list[int] = []
        self._scoring: deque[Request] = deque()  # of the chunks that score, in order, until their scores are known

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting, running or swapped out."""
        return bool(self.waiting or self.running or self.swapped)

    def add(self, request: Request) -> None:
        """Queues a request after those that wait."""
        own = frozenset() if request.params.ignore_eos else self.stop_token_ids
        request.stop = own.union(request.params.stop_token_ids)
        self.waiting.append(request)

    def schedule(self) -> Plan:
        """Plans the next step: swaps, admits waiting requests, then decodes each sequence that may draw more tokens."""
        self._plans = now = self._plans + 1
        self._plan = plan = Plan(drop=self._dropped)
        self._dropped = []
        self._grow()
        self._swap_in()
        if not self.swapped:
            self._admit()
        if now > self._steady_until:
            self._rows = [sequence for sequence in self.running.values() if sequence.last_plan >= now]
            self._steady_until = min((row.last_plan for row in self._rows), default=0)
            self._columns = [row.id for row in self._rows], [row.slot for row in self._rows]
        plan.decode = Decode(*self._columns)
        self.stats.steps += bool(self._rows)
        return plan

    def update(
        self,
        plan: Plan,
        tokens: list[int],
        logprobs: list[float],
        top: TopLogprobs | None = None,
        scores: Iterable[tuple[list[float], TopLogprobs]] = (),
    ) -> list[Sequence]:
        """Appends the tokens that a plan drew to their sequences. Returns the sequences that ended with them.

        Tokens of sequences that have ended are dropped: they were planned before the end was known.

        Args:
            plan: the plan that was executed.
            tokens: one per fork, then one per decoded sequence.
            logprobs: their log-probabilities; NaN ends the sequence with reason "nan".
            top: the likeliest tokens where each was drawn, if a sequence asks for them.
            scores: of each chunk that scores: the log-probabilities of its `scored`, and the likeliest tokens there.
        """
        for of_scored, likeliest in scores:
            scoring = self._scoring.popleft()
            scoring.logprobs += of_scored
            scoring.top_logprobs += likeliest
        ended, drawn = [], 0
        ids = [fork.sequence for fork in plan.fork] + plan.decode.sequences
        for row, (id_, token, logprob) in enumerate(zip(ids, tokens, logprobs, strict=True)):
            sequence = self.running.get(id_) or self.swapped.get(id_)
            if sequence is None:
                continue
            drawn += 1
            reason = "nan"
            if logprob == logprob:
                sequence.token_ids.append(token)
                sequence.logprobs.append(logprob)
                request = sequence.request
                if top and request.params.logprobs:
                    sequence.top_logprobs.append(top[row][: request.params.logprobs])
                full = len(sequence.token_ids) == request.params.max_tokens
                reason = "stop" if token in request.stop else "length" if full else ""
            if reason:
                if reason != "nan" and sequence.request.resumable:
                    self._keep_end(sequence)
                self.finish(sequence, reason)
                ended.append(sequence)
        self.stats.decoded += drawn
        return ended

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence. Its slot is free at once. One that has ended already only gets another reason."""
        if not sequence.done:
            if sequence.id in self.running:
                del self.running[sequence.id]
                self._steady_until = 0
                self.free.append(sequence.slot)
                self.pages.release(sequence.pages)
            else:
                del self.swapped[sequence.id]
                self._dropped.append(sequence.id)
            sequence.pages = []
        sequence.finish_reason, sequence.done = reason, True

    def abort(self, request: Request) -> None:
        """Ends the request's unfinished sequences, waiting, running or swapped out."""
        if request in self.waiting:
            self.waiting.remove(request)
            if request.slot is not None:
                self.free.append(request.slot)
                self.pages.release(request.pages)
                request.slot, request.pages = None, []
        for sequence in request.sequences:
            if sequence.id in self.running or sequence.id in self.swapped:
                self.finish(sequence, "abort")
            sequence.done = True

    def reset(self) -> None:
        """Aborts all requests and forgets the prefix cache, since a plan wasn't executed to its end."""
        sequences = (*self.running.values(), *self.swapped.values())
        for request in {*self.waiting, *(sequence.request for sequence in sequences)}:
            self.abort(request)
        while self.cached:
            self._evict(self.cached[0])
        self._scoring.clear()

    # Pages

    def _grow(self) -> None:
        """Gives the sequences that fill a page the next one, the oldest first. The youngest make room for them."""
        for id_ in sorted(self._growing.pop(self._plans, ())):
            sequence = self.running.get(id_)
            if sequence is None or sequence.last_plan < self._plans:
                continue
            if sequence.base + self._plans != len(sequence.pages) * self.pages.size:
                continue  # noted before it was swapped out
            while not self._room(1):
                youngest = self.running[max(self.running)]
                self._swap_out(youngest)
                if youngest is sequence:
                    break
            else:
                self._place(sequence.slot, sequence.pages, self.pages.take(1))
                self._growing[self._plans + self.pages.size].append(id_)

    def _will_grow(self, sequence: Sequence) -> None:
        """Notes when a running sequence next needs a page: when its pages have no place for the token it then runs."""
        self._growing[len(sequence.pages) * self.pages.size - sequence.base].append(sequence.id)

    def _room(self, count: int, spared: Entry | None = None) -> bool:
        """Whether `count` pages are free, after evicting entries of the prefix cache except `spared` if need be."""
        while len(self.pages.free) < count:
            entry = next((entry for entry in self.cached if entry is not spared), None)
            if entry is None:
                return False
            self._evict(entry)
        return True

    def _place(self, slot: int, held: list[int], pages: list[int]) -> None:
        """Adds pages to those that a slot holds."""
        self._plan.place += [Placed(slot, len(held) + i, page) for i, page in enumerate(pages)]
        held += pages

    def _copied(self, source: int, target: int, held: list[int], length: int) -> tuple[Copy, list[int]]:
        """A copy of a state of `length` tokens, and its pages. A page that isn't full needs room for its copy."""
        full = length // self.pages.size
        pages = [*self.pages.share(held[:full])]
        if length % self.pages.size == 0:
            return Copy(source, target, None), pages
        pages += self.pages.take(1)
        return Copy(source, target, (held[full], pages[full])), pages

    def _swap_out(self, sequence: Sequence) -> None:
        length = sequence.base + self._plans
        used = self.pages.for_tokens(length)
        self._plan.swap_out.append(Swap(sequence.id, sequence.slot, sequence.pages[:used]))
        del self.running[sequence.id]
        self.swapped[sequence.id] = sequence
        self.free.append(sequence.slot)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.base, sequence.last_plan = [], length, sequence.last_plan - self._plans
        self._steady_until = 0
        self.stats.swaps += 1

    def _swap_in(self) -> None:
        """Brings swapped-out sequences back, the oldest first, while there is room for what they have and a page."""
        for id_ in sorted(self.swapped):
            sequence = self.swapped[id_]
            used, needed = (self.pages.for_tokens(sequence.base + more) for more in (0, 1))
            if self._plan.swap_out or not self.free or not self._room(needed):
                return
            del self.swapped[id_]
            self.running[id_] = sequence
            sequence.slot = self.free.pop()
            self._place(sequence.slot, sequence.pages, self.pages.take(needed))
            self._plan.swap_in.append(Swap(id_, sequence.slot, sequence.pages[:used]))
            sequence.base, sequence.last_plan = sequence.base - self._plans, sequence.last_plan + self._plans
            self._will_grow(sequence)
            self._steady_until = 0

    # The prefix cache

    def _evict(self, entry: Entry) -> None:
        """Removes an entry. Copies into it that this plan has yet to make are cancelled."""
        self.cached.remove(entry)
        self.unused.append(entry.slot)
        self.pages.release(entry.pages)
        if entry.made and entry.made[0] == self._plans:
            chunk = entry.made[1]
            self._plan.prefill[chunk] = self._plan.prefill[chunk]._replace(keep=None)

    def _find(self, request: Request) -> Entry | None:
        """The longest state with which the prompt begins and from which it may continue."""
        size, found = len(request.tokens), None
        for entry in sorted(self.cached, key=lambda entry: len(entry.tokens)):
            length = len(entry.tokens)
            passed = length == size or length % self.prefill_chunk == 0
            if entry.ended:
                passed = request.resumable and length < size
            if passed and entry.long == self._long(request) and entry.tokens == request.tokens[:length]:
                found = entry
        return found

    def _keep(self, request: Request) -> Copy | None:
        """Takes an entry, new or least recently used, for the part of the prompt computed so far."""
        tokens = request.tokens[: request.computed]
        if not self._unused_slot() or len(self.pages.free) < (len(tokens) % self.pages.size > 0):
            return None
        assert request.slot is not None
        copy, pages = self._copied(request.slot, self.unused.pop(), request.pages, len(tokens))
        made = self._plans, len(self._plan.prefill)
        self.cached.append(Entry(tokens, self._long(request), copy.target, pages, False, made))
        return copy

    def _keep_end(self, sequence: Sequence) -> None:
        """Makes the slot of an ending sequence an entry. An unused slot becomes free in its place."""
        request = sequence.request
        if sequence.id in self.swapped or len(request.stop) > MAX_STOPS:
            return
        if self._unused_slot():
            tokens = request.tokens + sequence.token_ids[:-1]
            pages = self.pages.share(sequence.pages[: self.pages.for_tokens(len(tokens))])
            self.cached.append(Entry(tokens, self._long(request), sequence.slot, pages, True, None))
            sequence.slot = self.unused.pop()

    def _unused_slot(self) -> bool:
        """Whether a slot is left for a new entry, after evicting the least recently used one if need be."""
        if not self.unused and self.cached:
            self._evict(self.cached[0])
        return bool(self.unused)

    def _long(self, request: Request) -> bool:
        return len(request.tokens) > self.long_prompt

    # Admission

    def _admit(self) -> None:
        """Prefills and starts the waiting requests, in order, while there are slots, pages and budget.

        A step that prefills takes longer, for one prompt about as much as for many. So while more requests wait than
        slots are free, they wait until a share of the slots is free.
        """
        budget, few = self.prefill_budget, len(self.free) < min(self.together, len(self.waiting))
        while self.waiting:
            request = self.waiting[0]
            if request.slot is None and (few or not self._open(request)):
                return
            while request.computed < len(request.tokens):
                if budget <= 0:
                    return
                budget -= self._prefill(request)
            while request.started < request.params.n and self._start(request):
                pass
            if request.started == request.params.n:
                self.waiting.popleft()
            elif request.slot is not None:  # the prompt waits in its slot until another slot is free
                return

    def _open(self, request: Request) -> bool:
        """Gives the prompt a slot, pages, and its longest cached beginning. Returns False if it has to wait."""
        needed = self.pages.for_tokens(len(request.tokens) + 1)
        entry = None if request.prompt_logprobs else self._find(request)
        if entry and entry.made and entry.made[0] == self._plans:
            return False  # this plan computes it; the next one can restore it
        if not self.free or not self._room(needed, spared=entry):
            return False
        request.slot, request.pages, request.computed = self.free.pop(), [], 0
        self.stats.prefix_queries += 0 if request.prompt_logprobs else len(request.tokens)
        if entry:
            self.cached.remove(entry)
            self.cached.append(entry)
            request.computed = request.cached = len(entry.tokens)
            copy, pages = self._copied(entry.slot, request.slot, entry.pages, request.computed)
            self._plan.restore.append(copy)
            self._place(request.slot, request.pages, pages)
            self.stats.prefix_hits += request.computed
        self._place(request.slot, request.pages, self.pages.take(needed - len(request.pages)))
        return True

    def _prefill(self, request: Request) -> int:
        """Plans a prompt's next chunk, up to a multiple of `prefill_chunk`. Returns the number of tokens."""
        assert request.slot is not None
        start = request.computed
        tokens = request.tokens[start : (start // self.prefill_chunk + 1) * self.prefill_chunk]
        request.computed += len(tokens)
        scored: tuple[int, ...] = ()
        if request.prompt_logprobs and request.computed > request.scored:  # not when it is prefilled again
            scored = tuple(request.tokens[start + 1 : request.computed + 1])
            request.scored = request.computed
        if scored:
            self._scoring.append(request)
        chunk = Chunk(request.slot, start, tokens, len(request.tokens), self._keep(request))
        self._plan.prefill.append(chunk._replace(scored=scored, likeliest=request.params.logprobs))
        self.stats.prefilled += len(tokens)
        return len(tokens)

    def _start(self, request: Request) -> bool:
        """Starts the request's next sequence in a free slot or in the prompt's. Returns False if it has to wait."""
        source, size = request.slot, len(request.tokens)
        if source is None:
            return False
        last = request.started + 1 == request.params.n
        needed = self.pages.for_tokens(size + 1)
        if not last and self.free and self._room(needed - size // self.pages.size):
            copy, pages = self._copied(source, self.free.pop(), request.pages, size)
            held: list[int] = []
            self._place(copy.target, held, pages + self.pages.take(needed - len(pages)))
            self.stats.forks += 1
        elif last or not self.running:  # no other slot will be free: take the prompt's; the next prefills again
            copy, held = Copy(source, source, None), request.pages
            request.slot, request.pages, request.computed = None, [], request.computed if last else 0
        else:
            return False
        sequence = request.sequences[request.started]
        request.started += 1
        params = request.params
        sequence.id, sequence.slot, sequence.pages = self._admitted, copy.target, held
        sequence.base, sequence.last_plan = size - self._plans, self._plans + params.max_tokens - 2
        self._admitted += 1
        self.running[sequence.id] = sequence
        self._will_grow(sequence)
        self._steady_until = 0
        self._plan.fork.append(
            Fork(sequence.id, copy, request.tokens, params, request.stop, fold_in(params.seed, sequence.index))
        )
        return True
