"""Penalties, bias, minimum length and top log-probabilities, beside transformers' processors and a Counter."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from m1.engine import Engine, Request, SamplingParams
from m1.engine.llm import LLM
from m1.engine.logits_processors import LogitsProcessors, TokenCounts
from m1.engine.plan import Copy, Fork
from m1.errors import UserError

VOCAB = 50
STOP = (3, 7, 11)
GREEDY = SamplingParams(max_tokens=24, temperature=0)


def twin(logits, params, prompt, output, stop=STOP):
    """What tokens [V] are drawn from: minimum length, bias, repetition, frequency, presence."""
    ids = torch.tensor([prompt + output])
    logits = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(stop))(ids, logits[None].float())
    for token, bias in params.logit_bias.items():
        logits[0, token] += bias
    logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits)[0]
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    return logits


PARAMS = st.builds(
    SamplingParams,
    min_tokens=st.integers(0, 4),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0, 0, 0.7, -2]),
    frequency_penalty=st.sampled_from([0, 0, 0.4, -0.1]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=3),
)
ROWS = st.lists(
    st.tuples(
        PARAMS,
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
        st.lists(st.integers(0, VOCAB - 1), min_size=5, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, size=st.integers(0, 5), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_processed_logits_are_the_twins(rows, size, dtype):
    logits = 3 * torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(size))
    logits = logits.to(dtype)
    slots = list(reversed(range(len(rows))))
    forks = {
        row: Fork(row, Copy(slot, slot, None), prompt, params, frozenset(STOP), 0)
        for row, (slot, (params, prompt, _)) in enumerate(zip(slots, rows, strict=True))
    }
    seen = TokenCounts(len(rows) + 1, VOCAB, logits.device)
    seen.start(forks.values())
    process = LogitsProcessors(forks, torch.tensor(slots), seen)
    for i in range(size):
        process.count(torch.tensor([output[i] for *_, output in rows]), torch.ones(len(rows), dtype=torch.bool))
    before = logits.clone()
    actual = process(logits, torch.full((len(rows),), size))
    assert torch.equal(logits, before)
    for i, (params, prompt, output) in enumerate(rows):
        torch.testing.assert_close(actual[i], twin(logits[i], params, prompt, output[:size]), rtol=1e-5, atol=1e-5)


MIX = [
    {},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5, "logprobs": 4},
    {"frequency_penalty": 1.2},
    {"min_tokens": 20},
    {"logit_bias": {9: 12.0}, "frequency_penalty": 2.0, "logprobs": 2},
]


def run(engine, requests):
    for _ in engine.run(requests):
        pass
    return [sequence for request in requests for sequence in request.sequences]


@pytest.mark.parametrize("lag", [0, 1])
def test_greedy_tokens_are_the_twins_in_a_mixed_batch(model, lag):
    """At every position of every sequence, from the logits of a full forward."""
    engine = Engine(model, STOP, max_model_len=64)
    engine.lag = lag
    requests = [Request([5, 6, 7 + i, 5], replace(GREEDY, **options), i) for i, options in enumerate(MIX)]
    for sequence in run(engine, requests):
        params, prompt, tokens = sequence.request.params, sequence.request.tokens, sequence.token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        for i, token in enumerate(tokens):
            processed = twin(logits[i], params, prompt, tokens[:i])
            assert processed[token] > processed.max() - 1e-3
        expected = logits.log_softmax(-1)
        actual = torch.tensor(sequence.logprobs)
        torch.testing.assert_close(actual, expected.gather(1, torch.tensor(tokens)[:, None])[:, 0], rtol=0, atol=1e-3)
        assert [len(top) for top in sequence.top_logprobs] == [params.logprobs] * len(tokens) * (params.logprobs > 0)
        if params.logprobs:
            values = torch.tensor([[value for _, value in top] for top in sequence.top_logprobs])
            torch.testing.assert_close(values, expected.topk(params.logprobs).values, rtol=0, atol=1e-3)
        assert len(tokens) >= params.min_tokens


class NoWaiting(TorchDispatchMode):
    """Refuses what needs a value from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), function
        return function(*args, **kwargs or {})


def test_a_step_waits_for_no_value(hybrid, monkeypatch):
    engine = Engine(hybrid, STOP, max_model_len=64)
    draw, draws = engine.executor._draw, []

    def draw_without_waiting(*arguments):
        draws.append(arguments)
        with NoWaiting():
            return draw(*arguments)

    monkeypatch.setattr(engine.executor, "_draw", draw_without_waiting)
    run(engine, [Request([5, 6], replace(GREEDY, **options), i) for i, options in enumerate(MIX)])
    assert len(draws) > 10
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(1).item()


def test_plain_requests_cost_nothing(hybrid, monkeypatch):
    """No memory for counts, and the fused step, before a request needs more and after it has ended."""
    engine = Engine(hybrid, [], max_model_len=64)
    steps = []
    monkeypatch.setattr(
        engine.executor, "step", lambda slots, plain=engine.executor.step: steps.append(0) or plain(slots)
    )
    plain, elaborate = replace(GREEDY, max_tokens=6), replace(GREEDY, max_tokens=6, presence_penalty=1.0)
    engine.generate([[1, 2]], plain)
    assert len(steps) == 5 and not len(engine.executor.seen.counts)
    engine.generate([[1, 2], [3]], replace(plain, logprobs=2))
    assert len(steps) == 5 and not len(engine.executor.seen.counts)
    engine.generate([[1, 2]], elaborate)
    assert len(steps) == 5 and engine.executor.seen.counts.shape == (engine.executor.slots.spare + 1, 261)
    engine.generate([[1, 2]], plain)
    assert len(steps) == 10


def test_counts_are_of_the_prompt_and_of_what_was_drawn_before_the_end(hybrid):
    """A step that was launched before a stop token was known moves nothing."""
    params = replace(GREEDY, presence_penalty=1.0)
    free = Engine(hybrid, [], max_model_len=64).generate([[5, 5, 6]], params)[0].token_ids
    engine = Engine(hybrid, [free[4]], max_model_len=64)
    engine.lag = 1
    (sequence,) = engine.generate([[5, 5, 6]], params)
    assert sequence.token_ids == free[: free.index(free[4]) + 1] and engine.stats.steps == len(sequence.token_ids)
    expected = torch.zeros(261, dtype=torch.int32)
    expected[[5, 6]] = 1
    for token in sequence.token_ids:
        expected[token] += 2
    assert torch.equal(engine.executor.seen.counts[sequence.slot], expected)


def test_a_prefix_hit_counts_the_whole_prompt(hybrid):
    params = replace(GREEDY, repetition_penalty=3.0, n=2)
    prompts = [[1 + i for i in range(16)] + tail for tail in ([20, 21], [22], [20, 21])]
    engine = Engine(hybrid, [], max_model_len=64, prefill_chunk=8)
    fresh = [Engine(hybrid, [], max_model_len=64, prefill_chunk=8, prefix_cache=0) for _ in prompts]
    for prompt, other in zip(prompts, fresh, strict=True):
        hit, whole = (e.generate([prompt], params) for e in (engine, other))
        assert [s.token_ids for s in hit] == [s.token_ids for s in whole]
    assert engine.stats.prefix_hits == 16 + 18


@pytest.mark.parametrize("many", [False, True], ids=["few", "more than the device knows"])
def test_no_stop_before_min_tokens(hybrid, many):
    free = Engine(hybrid, [], max_model_len=64).generate([[5, 6]], GREEDY)[0].token_ids
    stop = tuple(range(100, 120)) * many + (free[0],)
    early, late = (
        Engine(hybrid, stop, max_model_len=64).generate([[5, 6]], replace(GREEDY, min_tokens=n))[0] for n in (0, 6)
    )
    assert len(early.token_ids) == 1 and len(late.token_ids) >= 6
    assert not {*late.token_ids[:6]} & {*stop}


def test_top_logprobs_are_ranked_and_hold_the_drawn_token(hybrid):
    """Equal logits come in the order of their ids, and fewer of them are the first of more."""
    from m1.engine.sampling import top_ids

    logits = torch.tensor([[1.0, 2, -1, 2, 0, -0.0], [-3, -2, -2, -torch.inf, -2, -1]])
    assert top_ids(logits, 6).tolist() == [[1, 3, 0, 4, 5, 2], [5, 1, 2, 4, 0, 3]]
    params = SamplingParams(max_tokens=9, temperature=0.7)
    engine = Engine(hybrid, [], max_model_len=64)
    few, many = (engine.generate([[5, 6]], replace(params, logprobs=k)) for k in (3, 261))
    assert few[0].token_ids == many[0].token_ids
    for some, every, token, logprob in zip(
        few[0].top_logprobs, many[0].top_logprobs, few[0].token_ids, few[0].logprobs, strict=True
    ):
        assert some == every[:3] and dict(every)[token] == logprob
        assert sorted(every, key=lambda pair: -pair[1]) == every
        torch.testing.assert_close(torch.tensor([value for _, value in every]).exp().sum(), torch.tensor(1.0))


def test_finished_samples_have_what_was_asked_for(hybrid_dir):
    llm = LLM.from_pretrained(hybrid_dir, max_model_len=64)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = [Request([5, 6], replace(params, logprobs=k), k) for k in (0, 2)]
    plain, asked = sorted((s for ended in llm.run(requests) for s in ended), key=lambda sample: sample.prompt)
    assert plain.token_logprobs == plain.top_logprobs == []
    assert len(asked.token_logprobs) == 5 and [len(top) for top in asked.top_logprobs] == [2] * 5
    assert sum(value for _, value in asked.token_logprobs) == asked.logprob == plain.logprob


def test_a_stop_string_within_min_tokens_ends_nothing(hybrid_dir):
    """It may begin among the first min_tokens tokens, and has to end after them."""
    llm = LLM.from_pretrained(hybrid_dir, max_model_len=64)
    a, b = llm.encode("ab")
    params = SamplingParams(max_tokens=24, temperature=5, seed=1, logit_bias={a: 100, b: 100})
    text = llm.generate(["ab"], params)[0].text
    assert {*text} == {*"ab"} and len(text) == 24
    for least in range(25):
        (sample,) = llm.generate(["ab"], replace(params, stop=("ba",), min_tokens=least))
        assert sample.text == text[: (text + "ba").find("ba", max(0, least - 1))]


def test_requests_beyond_the_vocabulary_are_refused(hybrid):
    engine = Engine(hybrid)
    with pytest.raises(UserError, match="prompt 0 has logit_bias of token 261; the vocabulary is 0 to 260"):
        engine.generate([[1]], replace(GREEDY, logit_bias={261: 1.0}))
    with pytest.raises(UserError, match=f"prompt 0 has stop_token_ids of token {2**64}; the vocabulary is 0 to 260"):
        engine.generate([[1]], replace(GREEDY, stop_token_ids=(2**64,)))
    with pytest.raises(UserError, match="prompt 0 has logprobs=262; the vocabulary has 261 tokens"):
        engine.generate([[1]], replace(GREEDY, logprobs=262))


def test_a_limit_below_min_tokens_shortens_both(hybrid):
    with pytest.warns(UserWarning, match="max_tokens is 24"):
        (sequence,) = Engine(hybrid, [], max_model_len=10).generate([[1] * 4], replace(GREEDY, min_tokens=20))
    assert len(sequence.token_ids) == 6
