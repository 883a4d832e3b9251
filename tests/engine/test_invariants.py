"""What must hold however requests come and go (design: invariants 3 to 6): a sample depends on itself alone, slots come
back, and what was in a slot leaves no trace."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m1.engine import Engine, SamplingParams
from m1.engine.state import Slots

PATIENT = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def poisoned_slots(monkeypatch):
    """What is left of a sequence, and memory that no sequence wrote, is NaN."""

    @torch.inference_mode()
    def poison(slots, slot):
        for layer in slots.layers:
            layer.first[slot].fill_(torch.nan)
            layer.second[slot].fill_(torch.nan)

    def give_back(slots, slot, plain=Slots.give_back):
        poison(slots, slot)
        plain(slots, slot)

    def init(slots, *args, plain=Slots.__init__):
        plain(slots, *args)
        for slot in range(slots.count + 1):
            poison(slots, slot)

    monkeypatch.setattr(Slots, "give_back", give_back)
    monkeypatch.setattr(Slots, "__init__", init)


def alone(model, tokens, params, n):
    engine = Engine(model, [], max_len=128, snapshots=0)
    request = engine.submit(tokens, params, n)
    while engine.busy:
        engine.step()
    return [(c.token_ids, c.logprobs) for c in request.completions]


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt tokens
        st.integers(1, 3),  # samples
        st.integers(1, 12),  # new tokens
        st.sampled_from([0, 1.0]),  # temperature
        st.integers(0, 12),  # step at which it comes
        st.sampled_from([None, None, 0, 3, 9]),  # steps after which it is aborted
    ),
    min_size=1,
    max_size=6,
)


@PATIENT
@given(requests=REQUESTS, slots=st.integers(1, 5), chunk=st.sampled_from([7, 512]), seed=st.integers(0, 3))
def test_a_sample_depends_on_itself_alone(model, requests, slots, chunk, seed):
    """float32: bit-equal to the request alone in an engine, under any admission, abortion, number of slots."""
    engine = Engine(model, [], max_batch=slots, max_len=64, prefill_chunk=chunk, snapshots=2)
    submitted, step = [], 0
    pending = sorted(enumerate(requests), key=lambda item: item[1][4])
    while pending or engine.busy:
        while pending and pending[0][1][4] <= step:
            i, (size, n, new, temperature, _, life) = pending.pop(0)
            tokens = torch.randint(1, 60, (size,), generator=torch.Generator().manual_seed(i % 3 + seed)).tolist()
            params = SamplingParams(max_tokens=new, temperature=temperature, seed=i)
            submitted.append((engine.submit(tokens, params, n), None if life is None else step + life))
        engine.step()
        step += 1
        for request, end in submitted:
            if end is not None and step >= end and not request.done:
                engine.abort(request)
    assert sorted(engine.slots.free) == list(range(slots))
    for request, _ in submitted:
        if chunk == 512:  # a prompt in chunks rounds otherwise than in one
            expected = alone(model, request.tokens, request.params, len(request.completions))
        else:
            expected = chunked(model, request, chunk)
        for completion, (tokens, logprobs) in zip(request.completions, expected, strict=True):
            size = len(completion.token_ids)
            assert completion.token_ids == tokens[:size] and completion.logprobs == logprobs[:size]
            assert size == request.params.max_tokens or completion.finish_reason == "abort"


def chunked(model, request, chunk):
    engine = Engine(model, [], max_len=64, prefill_chunk=chunk, snapshots=0)
    again = engine.submit(request.tokens, request.params, len(request.completions))
    while engine.busy:
        engine.step()
    return [(c.token_ids, c.logprobs) for c in again.completions]


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_a_chunked_prompt_is_a_whole_one(model, chunk):
    prompt = list(range(1, 34))
    params = SamplingParams(max_tokens=8, temperature=0)
    whole, parts = (
        Engine(model, [], max_len=64, prefill_chunk=size).generate([prompt], params)[0] for size in (512, chunk)
    )
    assert whole.token_ids == parts.token_ids
    torch.testing.assert_close(torch.tensor(parts.logprobs), torch.tensor(whole.logprobs), rtol=1e-4, atol=1e-4)


def test_a_prompt_is_prefilled_once_for_its_samples(model):
    engine = Engine(model, [], max_len=64)
    engine.generate([list(range(1, 31))], SamplingParams(max_tokens=4), n=16)
    assert (engine.stats.prefilled, engine.stats.forks, engine.stats.decoded) == (30, 15, 64)


def test_snapshots_spare_work_and_change_nothing(model):
    params = SamplingParams(max_tokens=6, seed=5)
    system, question, other = list(range(1, 17)), [7, 8, 9], [9, 9, 3, 2]
    engine = Engine(model, [], max_len=64, prefill_chunk=8)
    fresh = [
        Engine(model, [], max_len=64, prefill_chunk=8, snapshots=0).generate([system + tail], params)[0].token_ids
        for tail in (question, other)
    ]
    prompts = [system + question, system + other, system + question]
    assert [engine.generate([p], params)[0].token_ids for p in prompts] == [fresh[0], fresh[1], fresh[0]]
    assert engine.stats.restored == 16 + 19 and engine.stats.prefilled == 19 + 4


def test_many_requests_with_aborts_end_with_every_slot_free(hybrid):
    engine = Engine(hybrid, [3, 5], max_batch=6, max_len=48, prefill_chunk=16)
    g = torch.Generator().manual_seed(0)
    number = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    kept = []
    for i in range(1000):
        tokens = torch.randint(1, 60, (number(1, 20),), generator=g).tolist()
        kept.append(engine.submit(tokens, SamplingParams(max_tokens=number(1, 8), seed=i), n=number(1, 3)))
        if number(0, 2) == 0:
            engine.step()
        if number(0, 3) == 0:
            engine.abort(kept[number(max(0, i - 20), i)])
    while engine.busy:
        engine.step()
    assert sorted(engine.slots.free) == list(range(6)) and all(request.done for request in kept)
    reasons = {c.finish_reason for request in kept for c in request.completions}
    assert reasons == {"stop", "length", "abort"} and len(engine.scheduler.kept) <= 8


def test_no_request_starves(hybrid):
    """Requests are admitted in order: each within the steps that those in front of it can take."""
    engine = Engine(hybrid, [], max_batch=3, max_len=64)
    requests = [engine.submit([1 + i], SamplingParams(max_tokens=10), n=1 + i % 5) for i in range(12)]
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


def test_nan_logits_end_a_sample_and_the_others_go_on(hybrid, monkeypatch):
    engine = Engine(hybrid, [], max_len=64)
    params = SamplingParams(max_tokens=8, temperature=0)
    expected = engine.generate([[1, 2], [5]], params)
    plain = engine.runner.decode

    def decode(rows):
        logits = plain(rows)
        logits[rows[2] == 2 + 3] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "decode", decode)
    broken, whole = (engine.submit(t, params) for t in ([1, 2], [5, 6, 7, 8, 9, 10, 11]))
    while engine.busy:
        engine.step()
    assert broken.completions[0].finish_reason == "nan"
    assert broken.completions[0].token_ids == expected[0].token_ids[:4]
    assert whole.completions[0].finish_reason == "length" and len(engine.slots.free) == engine.slots.count


def test_slots_take_no_more_than_memory(hybrid, monkeypatch):
    from m1.engine import state
    from m1.model.cache_layout import slot_bytes

    one = slot_bytes(hybrid.config, 64, torch.float32)
    monkeypatch.setattr(state, "free_memory", lambda device: 10 * one)
    assert Engine(hybrid, [], max_batch=100, max_len=64).slots.count == 7  # 80 %, less the spare one
    assert Engine(hybrid, [], max_batch=3, max_len=64).slots.count == 3
