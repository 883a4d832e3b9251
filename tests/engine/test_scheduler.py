"""The scheduler without a model: plans are executed on slots that only remember tokens.

Every request gets its tokens under any admission, chunking, prefix hits, aborts, exhausted slots, and late updates.
"""

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.engine.pages import Pages
from m1.engine.sampling import SamplingParams
from m1.engine.scheduler import Scheduler
from m1.engine.sequence import Request
from m1.ops.random_bits import fold_in

STOP = 0


def next_token(history):
    """Stands in for the network: any function of a sequence's stream and tokens so far."""
    return hash(tuple(history)) % 7


class Machine:
    """Executes plans on slots that remember the tokens they have seen, and on pages of them. Refuses what can't be."""

    def __init__(self, scheduler):
        self.scheduler, self.size = scheduler, scheduler.pages.size
        self.seen = {}  # slot -> tokens
        self.keys = {}  # page -> its tokens by place
        self.table = {}  # slot, index -> page
        self.last = {}  # slot -> the token drawn last
        self.ended = set()  # slots whose sequence has drawn a stop token
        self.streams = {}  # sequence -> (slot, stream)
        self.stops = {}  # sequence -> its stop tokens
        self.saved = {}  # swapped-out sequence -> what it takes along

    def execute(self, plan):
        """Tokens and log-probabilities; as the executor's, in the order of forks and decodes."""
        for id_ in plan.drop:
            del self.saved[id_]
        for id_, slot, pages in plan.swap_out:
            kept = [dict(self.keys.get(page, {})) for page in pages]
            self.saved[id_] = self.seen.pop(slot), kept, self.last[slot], slot in self.ended, self.streams[id_][1]
        for slot, index, page in plan.place:
            self.table[slot, index] = page
        for id_, slot, pages in plan.swap_in:
            self.seen[slot], kept, self.last[slot], ended, stream = self.saved.pop(id_)
            self.keys |= dict(zip(pages, kept, strict=True))
            self.streams[id_] = slot, stream
            (self.ended.add if ended else self.ended.discard)(slot)
        taken = [copy.target for copy in plan.restore] + [c.slot for c in plan.prefill if c.start == 0]
        assert len(set(taken)) == len(taken), "a slot opened twice in a plan"
        for copy in plan.restore:
            self.copy(copy)
            self.check(copy.target)
        prefilled = 0
        for chunk in plan.prefill:
            assert prefilled < self.scheduler.prefill_budget, "a chunk began when the budget was spent"
            prefilled += len(chunk.tokens)
            if chunk.start == 0:
                self.seen[chunk.slot] = []
            assert len(self.seen[chunk.slot]) == chunk.start
            assert (
                chunk.start // self.scheduler.prefill_chunk
                == (chunk.start + len(chunk.tokens) - 1) // self.scheduler.prefill_chunk
            )
            assert chunk.tokens
            self.run(chunk.slot, chunk.tokens)
            if chunk.keep:
                self.copy(chunk.keep)
        drawn = []
        for fork in plan.fork:
            source, target, _ = fork.copy
            assert len(self.seen[source]) == len(fork.prompt)
            if source != target:
                self.copy(fork.copy)
            self.check(target)
            self.ended.discard(target)
            self.streams[fork.sequence], self.stops[fork.sequence] = (target, fork.stream), fork.stop
            drawn.append(self.draw(fork.sequence))
        assert len(set(plan.decode.slots)) == len(plan.decode.slots)
        for sequence, slot in zip(*plan.decode, strict=True):
            assert self.streams[sequence][0] == slot
            if slot not in self.ended:
                self.run(slot, [self.last[slot]])
            drawn.append(self.draw(sequence))
        return drawn, [-1.0] * len(drawn)

    def run(self, slot, tokens):
        for token in tokens:
            page, place = self.table[slot, len(self.seen[slot]) // self.size], len(self.seen[slot]) % self.size
            self.keys.setdefault(page, {})[place] = token
            self.seen[slot].append(token)
        self.check(slot)

    def copy(self, copy):
        self.seen[copy.target] = list(self.seen[copy.source])
        if copy.pages:
            self.keys[copy.pages[1]] = dict(self.keys[copy.pages[0]])

    def check(self, slot):
        """The slot's pages hold the keys of the tokens it has seen."""
        places = [divmod(i, self.size) for i in range(len(self.seen[slot]))]
        assert [self.keys[self.table[slot, index]][place] for index, place in places] == self.seen[slot]

    def draw(self, sequence):
        slot, stream = self.streams[sequence]
        self.last[slot] = next_token([stream, *self.seen[slot]])
        if self.last[slot] in self.stops[sequence]:
            self.ended.add(slot)
        return self.last[slot]


def expected(request):
    """Each sequence's tokens and reason, without any scheduler."""
    stop = None if request.params.ignore_eos else STOP
    for index in range(request.params.n):
        history = [fold_in(request.params.seed, index), *request.tokens]
        tokens = []
        while len(tokens) < request.params.max_tokens and tokens[-1:] != [stop]:
            tokens.append(next_token([*history, *tokens]))
        yield tokens, "stop" if tokens[-1] == stop else "length"


def check_slots(scheduler, num_slots):
    """Every slot is free, or a sequence's, or holds a waiting prompt or an entry, and only one of these."""
    running = [sequence.slot for sequence in scheduler.running.values()]
    prompts = [request for request in scheduler.waiting if request.slot is not None]
    entries = [entry.slot for entry in scheduler.cached]
    slots = [*scheduler.free, *running, *(request.slot for request in prompts), *entries, *scheduler.unused]
    assert sorted(slots) == list(range(len(slots))) and len(entries) + len(scheduler.unused) == len(slots) - num_slots
    held = [sequence.pages for sequence in scheduler.running.values()] + [request.pages for request in prompts]
    held = Counter(page for pages in [*held, *(entry.pages for entry in scheduler.cached)] for page in pages)
    pages = scheduler.pages
    assert {page: count for page, count in enumerate(pages._holders) if count} == held
    assert sorted([*pages.free, *held]) == list(range(len(pages._holders)))


def arrivals(sizes, lengths, ignore_eos):
    """Strategy for requests: of these sizes of prompts and maximum numbers of tokens."""
    return st.lists(
        st.tuples(
            sizes,
            st.integers(0, 2),  # of which beginning
            st.integers(1, 4),  # n
            lengths,
            st.integers(0, 9),  # the step at which it comes
            st.sampled_from([None, None, 0, 1, 4]),  # steps after which it is aborted
            st.booleans(),  # resumable
            ignore_eos,
        ),
        min_size=1,
        max_size=8,
    )


def serve(scheduler, arrivals, late):
    """Serves the requests and checks that each gets its tokens, and that slots and pages come back."""
    num_slots = len(scheduler.free)
    machine, flying, live, step = Machine(scheduler), deque(), [], 0
    arrivals = sorted(enumerate(arrivals), key=lambda arrival: arrival[1][4])
    while arrivals or flying or scheduler.busy:
        while arrivals and arrivals[0][1][4] <= step:
            i, (size, start, n, max_tokens, _, life, resumable, ignore_eos) = arrivals.pop(0)
            params = SamplingParams(n, max_tokens, seed=i, ignore_eos=ignore_eos)
            request = Request([1 + (start + j) % 5 for j in range(size)], params, i, resumable=resumable)
            scheduler.add(request)
            live.append((request, None if life is None else step + life))
        plan = scheduler.schedule()
        flying.append(
            (plan, *machine.execute(plan))
        )  # in flight: the next plan may be made before its tokens are known
        check_slots(scheduler, num_slots)
        while len(flying) > late or (flying and not (scheduler.busy or arrivals)):
            for sequence in scheduler.update(*flying.popleft()):
                assert sequence.done and sequence.finish_reason in ("stop", "length")
        for request, end in live:
            if end is not None and step >= end and not request.done:
                scheduler.abort(request)
        check_slots(scheduler, num_slots)
        step += 1
        assert step < 1000, "nobody moves"
    assert len(scheduler.free) == num_slots and machine.saved.keys() == set(scheduler._dropped)
    for request, _ in live:
        assert request.done
        for sequence, (tokens, reason) in zip(request.sequences, expected(request), strict=True):
            if sequence.finish_reason == "abort":
                assert sequence.token_ids == tokens[: len(sequence.token_ids)]
            else:
                assert (sequence.token_ids, sequence.finish_reason) == (tokens, reason)
            assert len(sequence.logprobs) == len(sequence.token_ids)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=arrivals(st.integers(1, 20), st.integers(1, 6), st.booleans()),
    num_slots=st.integers(1, 5) | st.just(40),  # of many, some are free before prompts are taken
    chunk=st.sampled_from([1, 3, 8, 64]),
    budget=st.sampled_from([1, 8, 64]),
    prefix_cache=st.sampled_from([0, 1, 2, 8]),
    page_size=st.sampled_from([1, 2, 4, 32]),
    late=st.booleans(),
)
def test_every_request_gets_its_tokens(arrivals, num_slots, chunk, budget, prefix_cache, page_size, late):
    serve(Scheduler(num_slots, Pages(100, page_size), chunk, budget, prefix_cache, [STOP]), arrivals, late)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals(st.integers(10, 20), st.integers(15, 20), st.sampled_from([True, True, False])),
    num_slots=st.integers(2, 9),
    prefix_cache=st.sampled_from([0, 2]),
    page_size=st.sampled_from([1, 2, 4]),
    late=st.booleans(),
)
def test_sequences_take_turns_when_pages_are_few(arrivals, num_slots, prefix_cache, page_size, late):
    pages = Pages(2 * -(-40 // page_size) + 2, page_size)
    serve(Scheduler(num_slots, pages, 8, 64, prefix_cache, [STOP]), arrivals, late)


def scheduler_of(num_slots, chunk=64, prefix_cache=0, stop=(), pages=1000, page_size=4):
    return Scheduler(num_slots, Pages(pages, page_size), chunk, chunk, prefix_cache, stop)


def run(scheduler, *requests, machine=None):
    """All plans until the requests are done."""
    machine, plans = machine or Machine(scheduler), []
    for request in requests:
        scheduler.add(request)
    while scheduler.busy:
        plans.append(scheduler.schedule())
        scheduler.update(plans[-1], *machine.execute(plans[-1]))
    return plans


def test_a_prompt_is_prefilled_in_chunks_and_forked():
    scheduler = scheduler_of(4, 8)
    first, second, third, *_ = run(scheduler, Request(list(range(1, 21)), SamplingParams(n=3, max_tokens=2)))
    chunks = [chunk for plan in (first, second, third) for chunk in plan.prefill]
    assert [(chunk.start, len(chunk.tokens), chunk.keep) for chunk in chunks] == [
        (0, 8, None),
        (8, 8, None),
        (16, 4, None),
    ]
    assert len({chunk.slot for chunk in chunks}) == 1
    assert not first.fork and not second.fork and not second.decode.slots
    prompt = chunks[0].slot
    assert [fork.copy.source for fork in third.fork] == [prompt] * 3 and third.fork[-1].copy.target == prompt
    assert sorted(third.decode.slots) == sorted(fork.copy.target for fork in third.fork)
    assert scheduler.stats.forks == 2 and scheduler.stats.decoded == 6


def test_many_prompts_share_a_plan():
    plans = run(scheduler_of(8), *(Request([1 + i] * 10, SamplingParams(max_tokens=3), i) for i in range(7)))
    assert [len(plan.prefill) for plan in plans[:2]] == [7, 0]  # the seventh begins below the budget of 64
    assert all(len(chunk.tokens) == 10 for chunk in plans[0].prefill)


def test_prompts_of_a_long_queue_are_taken_together():
    """One sequence ends in each plan. With 32 slots the next prompts wait until two are free, the last ones don't."""
    requests = [Request([1 + i] * 2, SamplingParams(max_tokens=2 + i), i) for i in range(32)]
    requests += [Request([50 + i], SamplingParams(max_tokens=60), i) for i in range(5)]
    taken = [len(plan.prefill) for plan in run(scheduler_of(32), *requests)]
    assert taken[:6] == [32, 0, 2, 0, 2, 1]


def test_a_prompt_being_computed_is_waited_for_and_not_computed_again():
    scheduler = scheduler_of(8, 64, 4)
    plans = run(scheduler, *(Request([1, 2, 3], SamplingParams(max_tokens=9, seed=i), i) for i in range(3)))
    assert [(len(plan.prefill), len(plan.restore)) for plan in plans[:3]] == [(1, 0), (0, 2), (0, 0)]
    assert (scheduler.stats.prefilled, scheduler.stats.prefix_hits) == (3, 6)


def test_the_longest_beginning_is_restored_at_multiples_of_the_chunk():
    scheduler = scheduler_of(1, 4, 8)
    machine, long = Machine(scheduler), list(range(1, 12))
    run(scheduler, Request(long, SamplingParams(max_tokens=1)), machine=machine)
    plan = run(scheduler, Request([*long[:10], 50], SamplingParams(max_tokens=1)), machine=machine)[0]
    assert len(plan.restore) == 1
    assert [(chunk.start, chunk.tokens) for chunk in plan.prefill] == [(8, [9, 10, 50])]
    assert scheduler.stats.prefix_hits == 8


def test_the_least_recently_used_entry_goes():
    scheduler = scheduler_of(1, 4, 2)
    machine = Machine(scheduler)
    for prompt in ([1], [2], [1], [3]):  # [1] is used again, so [3] takes the entry of [2]
        run(scheduler, Request(prompt, SamplingParams(max_tokens=1)), machine=machine)
    assert [entry.tokens for entry in scheduler.cached] == [[1], [3]]
    assert scheduler.stats.prefix_hits == 1


def test_a_single_slot_serves_n_sequences_one_after_another():
    scheduler = scheduler_of(1, 64, 1)
    request = Request([1, 2], SamplingParams(n=3, max_tokens=2))
    plans = run(scheduler, request)
    assert all(fork.copy.source == fork.copy.target == 0 for plan in plans for fork in plan.fork)
    assert [sequence.finish_reason for sequence in request.sequences] == ["length"] * 3
    assert (scheduler.stats.forks, scheduler.stats.prefilled, scheduler.stats.prefix_hits) == (0, 2, 4)


def test_max_tokens_1_is_never_decoded():
    plans = run(scheduler_of(2), Request([1], SamplingParams(n=2, max_tokens=1)))
    assert [len(plan.fork) for plan in plans] == [2] and not plans[0].decode.slots


def test_nan_ends_a_sequence_without_a_token():
    scheduler, request = scheduler_of(2), Request([1], SamplingParams(max_tokens=5))
    scheduler.add(request)
    plan = scheduler.schedule()
    (ended,) = scheduler.update(plan, [3, 4], [-1.0, float("nan")])
    assert ended is request.sequences[0] and (ended.finish_reason, ended.token_ids) == ("nan", [3])
    assert sorted(scheduler.free) == [0, 1]


@pytest.mark.parametrize("late", [False, True])
def test_tokens_drawn_after_the_end_are_dropped(late):
    """A sequence that ended with its plan's first token, or with the plan before, was decoded once more in vain."""
    scheduler, request = scheduler_of(1, stop=[STOP]), Request([1], SamplingParams(max_tokens=9))
    scheduler.add(request)
    first = scheduler.schedule()
    second = scheduler.schedule() if late else None
    assert [s.token_ids for s in scheduler.update(first, [STOP, 5], [-1.0, -1.0])] == [[STOP]]
    if second:
        assert second.decode.slots == [0] and scheduler.update(second, [6], [-1.0]) == []
    assert request.sequences[0].token_ids == [STOP] and request.sequences[0].finish_reason == "stop"


def test_stop_tokens_of_the_request_and_ignore_eos():
    scheduler = scheduler_of(4, stop=[STOP])
    for params, stops in [
        (SamplingParams(), {STOP}),
        (SamplingParams(stop_token_ids=(4,)), {STOP, 4}),
        (SamplingParams(ignore_eos=True), set()),
        (SamplingParams(ignore_eos=True, stop_token_ids=(4,)), {4}),
    ]:
        request = Request([1], params)
        scheduler.add(request)
        assert request.stop == stops


def test_chunks_of_many_prompts_and_of_one_share_a_plan():
    scheduler = Scheduler(8, Pages(100, 4), 8, 30, 0)
    plans = run(scheduler, *(Request([1 + i] * 20, SamplingParams(max_tokens=1), i) for i in range(2)))
    starts = [[(chunk.slot, chunk.start) for chunk in plan.prefill] for plan in plans]
    assert starts == [[(0, 0), (0, 8), (0, 16), (1, 0), (1, 8)], [(1, 16)]]


def test_the_youngest_waits_when_pages_run_out_and_nothing_is_computed_again():
    """Three sequences of up to 4 pages, on 10 pages."""
    scheduler = scheduler_of(3, pages=10, page_size=4)
    requests = [Request([1 + i] * 3, SamplingParams(max_tokens=13, ignore_eos=True), i) for i in range(3)]
    plans = run(scheduler, *requests)
    assert [swap.sequence for plan in plans for swap in plan.swap_out] == [2] and scheduler.stats.swaps == 1
    assert [swap.sequence for plan in plans for swap in plan.swap_in] == [2]
    assert (scheduler.stats.prefilled, scheduler.stats.decoded) == (9, 39)
    for request in requests:
        assert [(s.token_ids, s.finish_reason) for s in request.sequences] == [*expected(request)]


def test_a_swapped_out_sequence_that_is_aborted_is_dropped():
    scheduler = scheduler_of(3, pages=10, page_size=4)
    machine, requests = Machine(scheduler), [Request([1] * 3, SamplingParams(max_tokens=13), i) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    while not scheduler.swapped:
        plan = scheduler.schedule()
        scheduler.update(plan, *machine.execute(plan))
    scheduler.abort(requests[2])
    plan = scheduler.schedule()
    machine.execute(plan)
    assert plan.drop == [2] and not machine.saved and scheduler.running.keys() == {0, 1}


def test_samples_share_the_full_pages_of_their_prompt():
    scheduler = scheduler_of(8, page_size=4)
    scheduler.add(Request([1] * 10, SamplingParams(n=8, max_tokens=9)))
    plan = scheduler.schedule()
    Machine(scheduler).execute(plan)
    tables = [sequence.pages for sequence in scheduler.running.values()]
    assert len({tuple(pages[:2]) for pages in tables}) == 1 and len({pages[2] for pages in tables}) == 8
    assert 1000 - len(scheduler.pages.free) == 2 + 8


def test_a_chats_next_turn_computes_only_what_is_new():
    """Only a resumable request keeps the state at a sequence's end and continues it. The last token was never run."""
    scheduler = scheduler_of(2, 64, 4, [STOP])
    machine = Machine(scheduler)
    for first, second, reused in [(True, True, True), (True, False, False), (False, True, False)]:
        scheduler.reset()
        request = Request([5, 4, 3], SamplingParams(max_tokens=9, seed=1), resumable=first)
        run(scheduler, request, machine=machine)
        (answer,) = request.sequences
        assert len(answer.token_ids) > 1
        prompt = [5, 4, 3, *answer.token_ids, 6, 6]
        before = scheduler.stats.prefilled
        turn = Request(prompt, SamplingParams(max_tokens=9, seed=2), resumable=second)
        run(scheduler, turn, machine=machine)
        assert scheduler.stats.prefilled - before == (3 if reused else len(prompt))
        assert [(s.token_ids, s.finish_reason) for s in turn.sequences] == [*expected(turn)]
