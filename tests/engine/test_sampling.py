"""Draws follow the distribution that the settings leave, each row by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.engine import SamplingParams
from m1.engine.sampling import SamplingBatch, fold_in, uniforms
from m1.errors import UserError


def draw(logits, params, streams=None, drawn=None):
    streams = [fold_in(0, i) for i in range(len(logits))] if streams is None else streams
    batch = SamplingBatch(params, streams, logits.device)
    return batch.sample(logits, np.zeros(len(logits), int) if drawn is None else drawn)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingParams(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(top_p=0.75), [0.625, 0.375, 0, 0]),
        (SamplingParams(top_p=0.01), [1, 0, 0, 0]),
        (SamplingParams(min_p=0.25), [0.5263, 0.3158, 0.1579, 0]),
        (SamplingParams(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        (SamplingParams(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (SamplingParams(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_shares(params, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    tokens, _ = draw(logits, [params] * 4000)
    share, expected = torch.bincount(tokens, minlength=4) / 4000, torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)
    assert share[expected == 0].sum() == 0


def test_logprobs_are_of_the_whole_distribution():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=t, top_k=k) for t, k in [(1, 0), (0.5, 3), (0, 0), (2, 1), (0.7, 0)]]
    tokens, logprobs = draw(logits, params)
    for row, p in enumerate(params):
        expected = (logits[row] / (p.temperature or 1)).log_softmax(-1)[tokens[row]]
        torch.testing.assert_close(logprobs[row], expected)
    assert tokens[2] == logits[2].argmax() and tokens[3] == logits[3].argmax()


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    top_p=st.sampled_from([1, 0.9, 0.3]),
    min_p=st.sampled_from([0, 0.1, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(SETTINGS, min_size=1, max_size=6),
    size=st.sampled_from([1, 7, 128, 129, 700]),
    seed=st.integers(0, 9),
)
def test_a_row_does_not_depend_on_the_others(params, size, seed):
    logits = 3 * torch.randn(len(params), size, generator=torch.Generator().manual_seed(seed))
    streams, drawn = [fold_in(seed, i) for i in range(len(params))], np.arange(len(params))
    tokens, logprobs = draw(logits, params, streams, drawn)
    for i in range(len(params)):
        token, logprob = draw(logits[i : i + 1], params[i : i + 1], streams[i : i + 1], drawn[i : i + 1])
        assert token.item() == tokens[i] and logprob.item() == logprobs[i]


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([5, 130, 2000]), top_p=st.floats(0.05, 0.999), seed=st.integers(0, 9), flat=st.booleans())
def test_top_p_keeps_what_a_full_sort_keeps(size, top_p, seed, flat):
    logits = (0.01 if flat else 3) * torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    batch = SamplingBatch([SamplingParams(top_p=top_p), SamplingParams()], [0, 1], logits.device)
    kept = batch.truncate(logits.log_softmax(-1)).isfinite()
    ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
    expected = torch.zeros_like(kept).scatter(1, index, ordered.cumsum(-1) - ordered < top_p)
    assert (kept[0] != expected[0]).sum() <= 1  # a sum that lands on top_p may round either way
    assert kept[1].all()


def test_uniforms_are_uniform_and_streams_differ():
    streams = np.array([fold_in(seed, sample) for seed in range(100) for sample in range(100)], dtype=np.uint64)
    assert len(set(streams.tolist())) == 10_000
    for index in (0, 1, 1000):
        values = uniforms(streams, np.full(10_000, index))
        assert (
            values.min() >= 0
            and values.max() < 1
            and abs(values.mean() - 0.5) < 0.01
            and abs(values.std() - 0.2887) < 0.01
        )
    along = uniforms(streams[:1], np.arange(10_000))
    assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 0.03


def test_nan_logits_give_nan_logprobs():
    logits = torch.zeros(3, 200)
    logits[1, 7] = torch.nan
    tokens, logprobs = draw(
        logits, [SamplingParams(), SamplingParams(top_k=5, top_p=0.5), SamplingParams(temperature=0)]
    )
    assert logprobs.isnan().tolist() == [False, True, False] and (tokens < 200).all()


@pytest.mark.parametrize(
    "bad", [{"top_p": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"max_tokens": 0}, {"min_p": 2}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)
