"""What must hold however requests come and go (design: invariants 3 to 6): a sample depends on itself alone, slots come
back, and what was in a slot leaves no trace."""

from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m1.engine import Engine, Request, SamplingParams
from m1.engine.sequence import requests_for
from m1.model.cache_layout import AttentionCache

PATIENT = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def poisoned_slots(monkeypatch):
    """What is left of a sequence, and memory that no sequence wrote, is NaN."""

    @torch.inference_mode()
    def poison(engine, slots, pages):
        for layer in engine.executor.slots.layers:
            for buffer in layer:
                buffer[pages if isinstance(layer, AttentionCache) else slots] = torch.nan
        if len(counts := engine.executor.seen.counts):
            counts[slots] = 7

    def then_poison_what_is_free(plain):
        def method(engine, *args):
            before = set(engine.scheduler.free), set(engine.scheduler.pages.free)
            result = plain(engine, *args)
            free = engine.scheduler.free, engine.scheduler.pages.free
            poison(engine, *([i for i in now if i not in then] for now, then in zip(free, before, strict=True)))
            return result

        return method

    def init(engine, *args, plain=Engine.__init__, **options):
        plain(engine, *args, **options)
        poison(engine, *(slice(None),) * 2)

    for name in ("step", "abort", "finish"):
        monkeypatch.setattr(Engine, name, then_poison_what_is_free(getattr(Engine, name)))
    monkeypatch.setattr(Engine, "__init__", init)


def run(engine, request):
    for _ in engine.run([request]):
        pass
    return [(s.token_ids, s.logprobs, s.top_logprobs) for s in request.sequences]


def alone(model, request, chunk=512):
    engine = Engine(model, [], max_model_len=128, prefill_chunk=chunk, prefix_cache=0, page_size=16)
    return run(engine, Request(request.tokens, request.params))


SETTINGS = [
    {"temperature": 0},
    {},
    {"repetition_penalty": 1.3, "logprobs": 3},
    {"presence_penalty": 0.5, "frequency_penalty": 1.0, "top_k": 20},
    {"min_tokens": 3, "stop_token_ids": tuple(range(40)), "logprobs": 1},
    {"logit_bias": {5: 4.0, 6: -100.0}, "repetition_penalty": 0.7, "temperature": 0},
]
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt tokens
        st.integers(1, 3),  # samples
        st.integers(3, 12),  # new tokens
        st.sampled_from(SETTINGS),
        st.integers(0, 12),  # step at which it comes
        st.sampled_from([None, None, 0, 3, 9]),  # steps after which it is aborted
    ),
    min_size=1,
    max_size=6,
)


@PATIENT
@given(
    requests=REQUESTS,
    slots=st.integers(1, 5),
    chunk=st.sampled_from([7, 512]),
    pages=st.sampled_from([10, 99]),
    lag=st.integers(0, 1),
    seed=st.integers(0, 3),
)
def test_a_sample_depends_on_itself_alone(model, requests, slots, chunk, pages, lag, seed):
    """float32: bit-equal to the request alone in an engine, under any admission, abortion, number of slots and pages,
    and with steps that overlap."""
    options = {"prefill_chunk": chunk, "prefix_cache": 2, "page_size": 16}
    engine = Engine(model, [], max_num_seqs=slots, max_model_len=64, **options)
    del engine.scheduler.pages.free[pages:]
    engine.lag = lag
    submitted, step = [], 0
    pending = sorted(enumerate(requests), key=lambda item: item[1][4])
    while pending or engine.busy:
        while pending and pending[0][1][4] <= step:
            i, (size, n, new, options, _, life) = pending.pop(0)
            tokens = torch.randint(1, 60, (size,), generator=torch.Generator().manual_seed(i % 3 + seed)).tolist()
            request = Request(tokens, SamplingParams(n, new, seed=i, **options))
            engine.submit(request)
            submitted.append((request, None if life is None else step + life))
        engine.step()
        step += 1
        for request, end in submitted:
            if end is not None and step >= end and not request.done:
                engine.abort(request)
    assert sorted(engine.scheduler.free) == list(range(slots))
    for request, _ in submitted:
        expected = alone(model, request, chunk)  # a prompt in chunks rounds otherwise than in one
        for sequence, (tokens, logprobs, top) in zip(request.sequences, expected, strict=True):
            size = len(sequence.token_ids)
            assert sequence.token_ids == tokens[:size] and sequence.logprobs == logprobs[:size]
            assert sequence.top_logprobs == top[:size]
            assert size == len(tokens) or sequence.finish_reason == "abort"


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_a_chunked_prompt_is_a_whole_one(model, chunk):
    prompt = list(range(1, 34))
    params = SamplingParams(max_tokens=8, temperature=0)
    whole, parts = (
        Engine(model, [], max_model_len=64, prefill_chunk=size).generate([prompt], params)[0] for size in (512, chunk)
    )
    assert whole.token_ids == parts.token_ids
    torch.testing.assert_close(torch.tensor(parts.logprobs), torch.tensor(whole.logprobs), rtol=1e-4, atol=1e-4)


def test_a_prompt_is_prefilled_once_for_its_samples(model):
    engine = Engine(model, [], max_model_len=64)
    engine.generate([list(range(1, 31))], SamplingParams(n=16, max_tokens=4))
    assert (engine.stats.prefilled, engine.stats.forks, engine.stats.decoded) == (30, 15, 64)


def test_the_prefix_cache_spares_work_and_changes_nothing(model):
    params = SamplingParams(max_tokens=6, seed=5)
    system, question, other = list(range(1, 17)), [7, 8, 9], [9, 9, 3, 2]
    engine = Engine(model, [], max_model_len=64, prefill_chunk=8)
    plain = Engine(model, [], max_model_len=64, prefill_chunk=8, prefix_cache=0)
    fresh = [plain.generate([system + tail], params)[0].token_ids for tail in (question, other)]
    prompts = [system + question, system + other, system + question]
    assert [engine.generate([p], params)[0].token_ids for p in prompts] == [fresh[0], fresh[1], fresh[0]]
    assert engine.stats.prefix_hits == 16 + 19 and engine.stats.prefilled == 19 + 4


def test_many_requests_with_aborts_end_with_every_slot_free(hybrid):
    engine = Engine(hybrid, [3, 5], max_num_seqs=6, max_model_len=48, prefill_chunk=16)
    g = torch.Generator().manual_seed(0)
    number = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    kept = []
    for i in range(1000):
        tokens = torch.randint(1, 60, (number(1, 20),), generator=g).tolist()
        new, n = number(1, 8), number(1, 3)
        kept.append(Request(tokens, SamplingParams(n, new, seed=i)))
        engine.submit(kept[-1])
        if number(0, 2) == 0:
            engine.step()
        if number(0, 3) == 0:
            engine.abort(kept[number(max(0, i - 20), i)])
    while engine.busy:
        engine.step()
    assert sorted(engine.scheduler.free) == list(range(6)) and all(request.done for request in kept)
    reasons = {s.finish_reason for request in kept for s in request.sequences}
    assert reasons == {"stop", "length", "abort"} and len(engine.scheduler.cached) <= 8


def test_no_request_starves(hybrid):
    """Requests are admitted in order: each within the steps that those in front of it can take."""
    engine = Engine(hybrid, [], max_num_seqs=3, max_model_len=64)
    requests = [Request([1 + i], SamplingParams(n=1 + i % 5, max_tokens=10)) for i in range(12)]
    for request in requests:
        engine.submit(request)
    first_step, step = {}, 0
    while engine.busy:
        engine.step()
        step += 1
        for i, request in enumerate(requests):
            if request.started:
                first_step.setdefault(i, step)
    samples_before = [sum(1 + j % 5 for j in range(i)) for i in range(12)]
    assert all(first_step[i] <= 10 * (samples_before[i] + 1) for i in range(12))
    assert sorted(first_step, key=first_step.__getitem__) == list(range(12))


def test_nan_logits_end_a_sequence_and_the_others_go_on(hybrid, monkeypatch):
    engine = Engine(hybrid, [], max_model_len=64)
    engine.executor.use(lambda step: step)
    params = SamplingParams(max_tokens=8, temperature=0)
    expected = engine.generate([[1, 2], [5]], params)
    plain = engine.executor.runner.decode

    def decode(rows):
        logits = plain(rows)
        logits[rows.lengths == 2 + 3] = torch.nan
        return logits

    monkeypatch.setattr(engine.executor.runner, "decode", decode)
    broken, whole = engine.generate([[1, 2], [5, 6, 7, 8, 9, 10, 11]], params)
    assert broken.finish_reason == "nan" and broken.token_ids == expected[0].token_ids[:4]
    assert whole.finish_reason == "length" and engine.free_slots == engine.num_slots


def test_a_plan_needs_no_token_values(model):
    """Two plans are made and executed before the first one's tokens are known: the tokens are the same."""
    prompts = [[1, 2, 3], [4], [5] * 9]
    params = SamplingParams(n=2, max_tokens=7, seed=3)
    expected = Engine(model, [7, 9], max_num_seqs=3, max_model_len=64).generate(prompts, params)
    engine = Engine(model, [7, 9], max_num_seqs=3, max_model_len=64)
    requests = requests_for(prompts, params)
    for request in requests:
        engine.submit(request)
    flying = deque()
    with torch.inference_mode():
        while engine.busy:
            plan = engine.scheduler.schedule()
            flying.append((plan, engine.executor.execute(plan)))
            if len(flying) == 2:
                plan, drawn = flying.popleft()
                engine.scheduler.update(plan, *drawn.wait())
    sequences = [s for request in requests for s in request.sequences]
    assert [(s.token_ids, s.logprobs) for s in sequences] == [(s.token_ids, s.logprobs) for s in expected]


@pytest.mark.parametrize("prefix_cache", [0, 8])
@pytest.mark.parametrize("page_size", [16, 256])
def test_slots_and_pages_take_no_more_than_memory(model, monkeypatch, page_size, prefix_cache):
    from m1.engine import slots

    found = []
    for megabytes in (8, 16, 64, 256):
        monkeypatch.setattr(slots, "free_memory", lambda device, bytes=megabytes * 2**20: bytes)
        options = {"max_num_seqs": 40, "max_model_len": 512, "page_size": page_size, "prefix_cache": prefix_cache}
        engine = Engine(model, [], **options)
        taken = sum(buffer.nbytes for layer in engine.executor.slots.layers for buffer in layer)
        assert taken <= 0.8 * megabytes * 2**20
        found.append((engine.num_slots, len(engine.scheduler.pages.free)))
        assert engine.num_slots == 40 or taken > 0.6 * megabytes * 2**20
    assert found == sorted(found) and found[-1] == (40, (40 + prefix_cache) * 512 // page_size)


def test_swapped_out_sequences_are_as_they_were(model):
    """Six sequences of up to 4 pages on 10 pages, with settings and streams of their own."""
    params = [SamplingParams(max_tokens=40, temperature=t, top_k=k, seed=3) for t, k in ((0, 0), (1, 0), (1, 5))]
    params += [SamplingParams(max_tokens=40, seed=3, **options) for options in SETTINGS[2:4] + SETTINGS[5:]]
    requests = [Request([1 + i] * 9, own, i) for i, own in enumerate(params)]
    engine = Engine(model, [], max_model_len=64, prefix_cache=0, page_size=16)
    del engine.scheduler.pages.free[10:]
    for _ in engine.run(requests):
        pass
    assert engine.stats.swaps > 2 and engine.stats.prefilled == 6 * 9
    for request in requests:
        (sequence,) = request.sequences
        assert [(sequence.token_ids, sequence.logprobs, sequence.top_logprobs)] == alone(model, request)


def test_an_interrupted_swap_leaves_nothing_behind(model, monkeypatch):
    requests = [Request([1 + i] * 9, SamplingParams(max_tokens=40, seed=3), i) for i in range(6)]
    engine = Engine(model, [], max_model_len=64, prefix_cache=0, page_size=16)
    del engine.scheduler.pages.free[10:]

    def interrupt(swap):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.executor.slots, "save", interrupt)
        for _ in engine.run(requests):
            pass
    again = Request([2] * 9, SamplingParams(max_tokens=40, seed=3))
    assert run(engine, again) == alone(model, again) and engine.free_slots == engine.num_slots


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("page_size", [16, 256])
def test_a_chats_next_turn_continues_the_state_at_the_end(model, page_size, lag):
    """The sequence stops by a token, after which a step with `lag` has already been launched."""
    greedy = SamplingParams(max_tokens=30, temperature=0)
    first = Engine(model, [], max_model_len=128).generate([[5, 6, 7]], greedy)[0].token_ids
    stop = next(token for token in first[8:] if token not in first[:8])
    engine = Engine(model, [stop], max_model_len=128, page_size=page_size, prefix_cache=2)
    engine.lag = lag
    opening = Request([5, 6, 7], greedy, resumable=True)
    run(engine, opening)
    answer = opening.sequences[0].token_ids
    assert opening.sequences[0].finish_reason == "stop" and answer == first[: first.index(stop) + 1]
    turn = Request([5, 6, 7, *answer, 9, 9, 3], greedy, resumable=True)
    ((tokens, logprobs, _),) = run(engine, turn)
    assert engine.stats.prefilled == 3 + 4  # the stop token was drawn, not run
    ((expected, expected_logprobs, _),) = run(Engine(model, [stop], max_model_len=128), Request(turn.tokens, greedy))
    assert tokens == expected
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), rtol=1e-4, atol=1e-4)
