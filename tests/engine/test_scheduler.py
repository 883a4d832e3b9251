"""The scheduler without a model: plans are executed on slots that only remember tokens.

Every request gets its tokens under any admission, chunking, prefix hits, aborts, exhausted slots, and late updates.
"""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.engine.sampling import SamplingParams, fold_in
from m1.engine.scheduler import Scheduler
from m1.engine.sequence import Request

STOP = 0


def next_token(history):
    """Stands in for the network: any function of a sequence's stream and tokens so far."""
    return hash(tuple(history)) % 7


class Machine:
    """Executes plans on slots that remember the tokens they have seen, and refuses what can't be."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.seen = {}  # slot -> tokens
        self.kept = {}  # prefix-cache entry -> tokens
        self.last = {}  # slot -> the token drawn last
        self.streams = {}  # sequence -> (slot, stream)

    def execute(self, plan):
        """Tokens and log-probabilities; as the executor's, in the order of forks and decodes."""
        taken = [r.slot for r in plan.restore] + [c.slot for c in plan.prefill if c.start == 0]
        assert len(set(taken)) == len(taken), "a slot opened twice in a plan"
        for entry, slot, length in plan.restore:
            assert len(self.kept[entry]) == length
            self.seen[slot] = list(self.kept[entry])
        prefilled = 0
        for chunk in plan.prefill:
            assert prefilled < self.scheduler.prefill_chunk, "a chunk began when the budget was spent"
            prefilled += len(chunk.tokens)
            if chunk.start == 0:
                self.seen[chunk.slot] = []
            assert len(self.seen[chunk.slot]) == chunk.start
            assert 0 < len(chunk.tokens) <= self.scheduler.prefill_chunk
            self.seen[chunk.slot] += chunk.tokens
            if chunk.entry is not None:
                assert 0 <= chunk.entry < self.scheduler.prefix_cache
                self.kept[chunk.entry] = list(self.seen[chunk.slot])
        drawn = []
        for fork in plan.fork:
            assert len(self.seen[fork.source]) == fork.length
            self.seen[fork.target] = list(self.seen[fork.source])
            self.streams[fork.sequence] = fork.target, fork.stream
            drawn.append(self.draw(fork.sequence))
        assert len(set(plan.decode.slots)) == len(plan.decode.slots)
        for sequence, slot, length in zip(*plan.decode, strict=True):
            assert self.streams[sequence][0] == slot and len(self.seen[slot]) == length
            self.seen[slot].append(self.last[slot])
            drawn.append(self.draw(sequence))
        return drawn, [-1.0] * len(drawn)

    def draw(self, sequence):
        slot, stream = self.streams[sequence]
        self.last[slot] = next_token([stream, *self.seen[slot]])
        return self.last[slot]


def expected(request):
    """Each sequence's tokens and reason, without any scheduler."""
    for index in range(request.params.n):
        history = [fold_in(request.params.seed, index), *request.tokens]
        tokens = []
        while len(tokens) < request.params.max_tokens and tokens[-1:] != [STOP]:
            tokens.append(next_token([*history, *tokens]))
        yield tokens, "stop" if tokens[-1] == STOP else "length"


def check_slots(scheduler, num_slots):
    """Every slot is free, or a running sequence's, or holds a waiting prompt, and only one of these."""
    running = [sequence.slot for sequence in scheduler.running.values()]
    prompts = [request.slot for request in scheduler.waiting if request.slot is not None]
    assert sorted([*scheduler.free, *running, *prompts]) == list(range(num_slots))
    assert len(scheduler.cached) <= scheduler.prefix_cache
    assert len(set(scheduler.cached.values())) == len(scheduler.cached)


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt tokens
        st.integers(0, 2),  # of which beginning
        st.integers(1, 4),  # n
        st.integers(1, 6),  # max_tokens
        st.integers(0, 9),  # the step at which it comes
        st.sampled_from([None, None, 0, 1, 4]),  # steps after which it is aborted
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=REQUESTS,
    num_slots=st.integers(1, 5),
    chunk=st.sampled_from([1, 3, 8, 64]),
    prefix_cache=st.sampled_from([0, 1, 2, 8]),
    late=st.booleans(),
)
def test_every_request_gets_its_tokens(arrivals, num_slots, chunk, prefix_cache, late):
    scheduler = Scheduler(num_slots, chunk, prefix_cache, [STOP])
    machine, flying, live, step = Machine(scheduler), deque(), [], 0
    arrivals = sorted(enumerate(arrivals), key=lambda arrival: arrival[1][4])
    while arrivals or flying or scheduler.waiting or scheduler.running:
        while arrivals and arrivals[0][1][4] <= step:
            i, (size, start, n, max_tokens, _, life) = arrivals.pop(0)
            request = Request([1 + (start + j) % 5 for j in range(size)], SamplingParams(n, max_tokens, seed=i), i)
            scheduler.add(request)
            live.append((request, None if life is None else step + life))
        plan = scheduler.schedule()
        flying.append(
            (plan, *machine.execute(plan))
        )  # in flight: the next plan may be made before its tokens are known
        check_slots(scheduler, num_slots)
        while len(flying) > late or (flying and not (scheduler.running or scheduler.waiting or arrivals)):
            for sequence in scheduler.update(*flying.popleft()):
                assert sequence.done and sequence.finish_reason in ("stop", "length")
        for request, end in live:
            if end is not None and step >= end and not request.done:
                scheduler.abort(request)
        check_slots(scheduler, num_slots)
        step += 1
        assert step < 1000, "nobody moves"
    assert sorted(scheduler.free) == list(range(num_slots))
    for request, _ in live:
        assert request.done
        for sequence, (tokens, reason) in zip(request.sequences, expected(request), strict=True):
            if sequence.finish_reason == "abort":
                assert sequence.token_ids == tokens[: len(sequence.token_ids)]
            else:
                assert (sequence.token_ids, sequence.finish_reason) == (tokens, reason)
            assert len(sequence.logprobs) == len(sequence.token_ids)


def run(scheduler, *requests, machine=None):
    """All plans until the requests are done."""
    machine, plans = machine or Machine(scheduler), []
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting or scheduler.running:
        plans.append(scheduler.schedule())
        scheduler.update(plans[-1], *machine.execute(plans[-1]))
    return plans


def test_a_prompt_is_prefilled_in_chunks_and_forked():
    scheduler = Scheduler(num_slots=4, prefill_chunk=8, prefix_cache=0)
    first, second, third, *_ = run(scheduler, Request(list(range(1, 21)), SamplingParams(n=3, max_tokens=2)))
    chunks = [chunk for plan in (first, second, third) for chunk in plan.prefill]
    assert [(chunk.start, len(chunk.tokens), chunk.entry) for chunk in chunks] == [
        (0, 8, None),
        (8, 8, None),
        (16, 4, None),
    ]
    assert len({chunk.slot for chunk in chunks}) == 1
    assert not first.fork and not second.fork and not second.decode.slots
    prompt = chunks[0].slot
    assert [fork.source for fork in third.fork] == [prompt] * 3 and third.fork[-1].target == prompt
    assert sorted(third.decode.slots) == sorted(fork.target for fork in third.fork)
    assert third.decode.lengths == [20] * 3  # the prompt; the first token is fed in the same step
    assert scheduler.stats.forks == 2 and scheduler.stats.decoded == 6


def test_many_prompts_share_a_plan():
    plans = run(Scheduler(8, 64, 0), *(Request([1 + i] * 10, SamplingParams(max_tokens=3), i) for i in range(7)))
    assert [len(plan.prefill) for plan in plans[:2]] == [7, 0]  # the seventh begins below the budget of 64
    assert all(len(chunk.tokens) == 10 for chunk in plans[0].prefill)


def test_a_prompt_being_computed_is_waited_for_and_not_computed_again():
    scheduler = Scheduler(8, 64, 4)
    plans = run(scheduler, *(Request([1, 2, 3], SamplingParams(max_tokens=9, seed=i), i) for i in range(3)))
    assert [(len(plan.prefill), len(plan.restore)) for plan in plans[:3]] == [(1, 0), (0, 2), (0, 0)]
    assert (scheduler.stats.prefilled, scheduler.stats.prefix_hits) == (3, 6)


def test_the_longest_beginning_is_restored_at_multiples_of_the_chunk():
    scheduler = Scheduler(1, 4, 8)
    machine, long = Machine(scheduler), list(range(1, 12))
    run(scheduler, Request(long, SamplingParams(max_tokens=1)), machine=machine)
    plan = run(scheduler, Request([*long[:10], 50], SamplingParams(max_tokens=1)), machine=machine)[0]
    assert [restore.length for restore in plan.restore] == [8]
    assert [(chunk.start, chunk.tokens) for chunk in plan.prefill] == [(8, [9, 10, 50])]
    assert scheduler.stats.prefix_hits == 8


def test_the_least_recently_used_entry_goes():
    scheduler = Scheduler(1, 4, 2)
    machine = Machine(scheduler)
    for prompt in ([1], [2], [1], [3]):  # [1] is used again, so [3] takes the entry of [2]
        run(scheduler, Request(prompt, SamplingParams(max_tokens=1)), machine=machine)
    assert list(scheduler.cached) == [(False, (1,)), (False, (3,))]
    assert scheduler.stats.prefix_hits == 1


def test_a_single_slot_serves_n_sequences_one_after_another():
    scheduler = Scheduler(1, 64, 1)
    request = Request([1, 2], SamplingParams(n=3, max_tokens=2))
    plans = run(scheduler, request)
    assert all(fork.source == fork.target == 0 for plan in plans for fork in plan.fork)
    assert [sequence.finish_reason for sequence in request.sequences] == ["length"] * 3
    assert (scheduler.stats.forks, scheduler.stats.prefilled, scheduler.stats.prefix_hits) == (0, 2, 4)


def test_max_tokens_1_is_never_decoded():
    plans = run(Scheduler(2, 64, 0), Request([1], SamplingParams(n=2, max_tokens=1)))
    assert [len(plan.fork) for plan in plans] == [2] and not plans[0].decode.slots


def test_nan_ends_a_sequence_without_a_token():
    scheduler, request = Scheduler(2, 64, 0), Request([1], SamplingParams(max_tokens=5))
    scheduler.add(request)
    plan = scheduler.schedule()
    (ended,) = scheduler.update(plan, [3, 4], [-1.0, float("nan")])
    assert ended is request.sequences[0] and (ended.finish_reason, ended.token_ids) == ("nan", [3])
    assert sorted(scheduler.free) == [0, 1]


@pytest.mark.parametrize("late", [False, True])
def test_tokens_drawn_after_the_end_are_dropped(late):
    """A sequence that ended with its plan's first token, or with the plan before, was decoded once more in vain."""
    scheduler, request = Scheduler(1, 64, 0, [STOP]), Request([1], SamplingParams(max_tokens=9))
    scheduler.add(request)
    first = scheduler.schedule()
    second = scheduler.schedule() if late else None
    assert [s.token_ids for s in scheduler.update(first, [STOP, 5], [-1.0, -1.0])] == [[STOP]]
    if second:
        assert second.decode.lengths == [2] and scheduler.update(second, [6], [-1.0]) == []
    assert request.sequences[0].token_ids == [STOP] and request.sequences[0].finish_reason == "stop"


def test_stop_tokens_of_the_request_and_ignore_eos():
    scheduler = Scheduler(4, 64, 0, [STOP])
    for params, stops in [
        (SamplingParams(), {STOP}),
        (SamplingParams(stop_token_ids=(4,)), {STOP, 4}),
        (SamplingParams(ignore_eos=True), set()),
        (SamplingParams(ignore_eos=True, stop_token_ids=(4,)), {4}),
    ]:
        request = Request([1], params)
        scheduler.add(request)
        assert request.stop == stops
