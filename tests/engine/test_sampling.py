"""Draws follow the distribution that the settings leave, each row by itself."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from m1.engine import SamplingParams
from m1.engine.sampling import SamplingBatch
from m1.errors import UserError
from m1.ops.random_bits import fold_in, signed, uniforms


def draw(logits, params, streams=None, drawn=None):
    streams = [fold_in(0, i) for i in range(len(logits))] if streams is None else streams
    batch = SamplingBatch.of(params, streams, logits.device)
    drawn = torch.zeros(len(logits), dtype=torch.long) if drawn is None else torch.tensor(drawn)
    return batch.sample(logits, drawn)[:2]


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


def random_logits(rows, size, seed, tied=False):
    """Normal logits; rounded to quarters if tied, so that many are equal."""
    logits = 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return (4 * logits).round() / 4 if tied else logits


def truncated(logits, *params):
    return SamplingBatch.of(params, [0] * len(params), logits.device).truncate(logits)


def kept(logits, *params):
    """Ids that `truncate` keeps, per row."""
    return [row.isfinite().nonzero().flatten().tolist() for row in truncated(logits, *params)]


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(SETTINGS, min_size=1, max_size=6),
    size=st.sampled_from([1, 7, 128, 129, 700]),
    seed=st.integers(0, 9),
    tied=st.booleans(),
)
def test_a_row_does_not_depend_on_the_others(params, size, seed, tied):
    logits = random_logits(len(params), size, seed, tied)
    streams, drawn = [fold_in(seed, i) for i in range(len(params))], np.arange(len(params))
    tokens, logprobs = draw(logits, params, streams, drawn)
    left = truncated(logits, *params)
    for i in range(len(params)):
        token, logprob = draw(logits[i : i + 1], params[i : i + 1], streams[i : i + 1], drawn[i : i + 1])
        assert token.item() == tokens[i] and logprob.item() == logprobs[i]
        assert torch.equal(truncated(logits[i : i + 1], params[i])[0], left[i])


def nucleus(logits, p):
    """What `truncate` promises, from a full sort in float64. Also, how near a sum of probabilities is to top_p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = ((logits.double() - logits.max()) / (p.temperature or 1)).exp()[order]
    left = min(p.top_k or len(order), len(order))
    mass = weights[:left].cumsum(0) / weights[:left].sum()
    if p.top_p < 1:
        left = 1 + int((mass[:-1] < p.top_p).sum())
    left = min(left, int((weights >= p.min_p).sum()))
    return sorted(order[:left]), (mass[:-1] - p.top_p).abs().min().item() if len(mass) > 1 else 1.0


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from([5, 64, 65, 130, 2000]),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0, 0.5, 1.0, 30.0]),  # hot: nearly all tokens are inside
        top_k=st.sampled_from([0, 1, 2, 60, 63, 64, 300]),
        top_p=st.sampled_from([1, 0.999, 0.9, 0.5, 0.05]),
        min_p=st.sampled_from([0, 0.013]),
    ),
    seed=st.integers(0, 99),
    tied=st.booleans(),
)
def test_truncation_is_that_of_a_full_sort(size, params, seed, tied):
    logits = random_logits(2, size, seed, tied)
    expected, near = nucleus(logits[0], params)
    assume(near > 1e-5 or params.top_p == 1)  # a sum of float32 numbers that lands on top_p may round either way
    actual, whole = kept(logits, params, SamplingParams())
    assert actual == expected and len(whole) == size


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.95, 0.999])
def test_top_p_is_exact_in_a_large_vocabulary(top_p):
    """A float32 sum of 50,000 numbers can be 1e-5 off, which is more than many tokens' probability."""
    logits = 2 * random_logits(20, 50_000, 0)
    probs = logits.double().softmax(-1).sort(dim=-1, descending=True).values
    expected = (probs.cumsum(-1) - probs < top_p).sum(-1)
    actual = truncated(logits, *[SamplingParams(top_p=top_p)] * 20).isfinite().sum(-1)
    assert (actual - expected).abs().max() <= 1 and (actual != expected).sum() <= 1  # 6e-8 may decide


def by_transformers(logits, p):
    for on, warper in (
        (p.top_k > 0, lambda: TopKLogitsWarper(p.top_k)),
        (p.top_p < 1, lambda: TopPLogitsWarper(p.top_p)),
        (p.min_p > 0, lambda: MinPLogitsWarper(p.min_p)),
    ):
        logits = warper()(None, logits) if on else logits
    return logits


def by_vllm(logits, p):
    """min-p (sample/logits_processor), then top-k and top-p (sample/ops/topk_topp_sampler.py), as in vLLM 0.11."""
    probs = logits.softmax(-1)
    logits = logits.masked_fill(probs < p.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    ordered, index = logits.sort(dim=-1, descending=False)
    if p.top_k:
        ordered = ordered.masked_fill(ordered < ordered[:, -p.top_k, None], -torch.inf)
    if p.top_p < 1:
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - p.top_p
        outside[:, -1] = False
        ordered = ordered.masked_fill(outside, -torch.inf)
    return torch.empty_like(logits).scatter(1, index, ordered)


@pytest.mark.parametrize(
    ("weights", "params", "ours", "transformers", "vllm"),
    [
        # a sum that is top_p has reached it
        ([4, 2, 1, 1], {"top_p": 0.75}, [0, 1], 2, 2),
        ([4, 2, 1, 1], {"top_p": 0.76}, [0, 1, 2], 3, 3),
        # of equal tokens, those with the lowest ids
        ([2, 1, 1], {"top_p": 0.75}, [0, 1], 2, 2),
        ([1] * 8, {"top_p": 0.5}, [0, 1, 2, 3], 4, 4),
        ([1] * 50, {"top_p": 0.1}, [0, 1, 2, 3, 4], 5, 5),
        # exactly k: differs from both
        ([1, 4, 4, 4], {"top_k": 2}, [1, 2], 3, 3),
        ([1, 4, 4, 1], {"top_k": 1}, [1], 2, 2),
        ([4, 2, 1, 1], {"top_k": 3}, [0, 1, 2], 4, 4),
        ([4, 2, 1, 1], {"top_k": 4}, [0, 1, 2, 3], 4, 4),
        # a token exactly min_p times as likely as the likeliest stays
        ([4, 2, 1, 1], {"min_p": 0.5}, [0, 1], 2, 2),
        ([4, 2, 1, 1], {"min_p": 0.51}, [0], 1, 1),
        ([4, 4, 1, 1], {"min_p": 1.0}, [0, 1], 2, 2),
        # each filter sees what the one before has left; vLLM begins with min-p
        ([8, 4, 2, 2], {"top_k": 2, "top_p": 0.6}, [0], 1, 1),
        ([4, 2, 1, 1], {"top_p": 0.6, "min_p": 0.5}, [0, 1], 2, 1),
    ],
)
def test_boundaries_beside_transformers_and_vllm(weights, params, ours, transformers, vllm):
    """Ids that ours keeps, and how many tokens theirs keep: which of equal ones is up to torch.sort."""
    logits, params = torch.tensor([weights]).float().log(), SamplingParams(**params)
    assert kept(logits, params) == [ours]
    assert [f(logits, params).isfinite().sum() for f in (by_transformers, by_vllm)] == [transformers, vllm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-60}, {"top_k": 1, "temperature": 9.0}])
def test_one_token_is_the_greedy_one(one, dtype):
    """Also among equal ones, for any random number, and if T makes others equal to it."""
    logits = torch.tensor([[1, 5, 5, 2], [5, 5, 5, 5], [-1, 1e-7, 2e-7, 0]]).to(dtype).repeat(200, 1)
    tokens, _ = draw(logits, [SamplingParams(**one)] * 600)
    greedy, _ = draw(logits, [SamplingParams(temperature=0)] * 600)
    assert torch.equal(tokens, greedy)


def test_settings_too_small_for_float32_are_their_limits():
    logits = random_logits(1, 100, 0)
    assert kept(logits, SamplingParams(min_p=1e-60)) == [list(range(100))]
    assert kept(logits, SamplingParams(top_p=1 - 1e-12)) == [list(range(100))]
    assert kept(logits, SamplingParams(top_k=2**63 - 1)) == [list(range(100))]


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-37, 1e-30, 1e30, 3.4e38])
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9}, {"top_k": 50, "min_p": 0.1}])
def test_extreme_temperatures(temperature, truncation):
    logits = 40 + random_logits(300, 20, 1)
    tokens, logprobs = draw(logits, [SamplingParams(temperature=temperature, **truncation)] * 300)
    if temperature < 1:
        assert torch.equal(tokens, logits.argmax(-1)) and (logprobs == 0).all()
    else:
        torch.testing.assert_close(logprobs, torch.full((300,), 1 / 20).log())
        assert len(set(tokens.tolist())) > 15


def test_uniforms_are_uniform_and_streams_differ():
    streams = torch.tensor([signed(fold_in(seed, sample)) for seed in range(100) for sample in range(100)])
    assert len(set(streams.tolist())) == 10_000
    for index in (0, 1, 1000):
        values = uniforms(streams, torch.full((10_000,), index)).numpy()
        assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1  # float32 would round to 1
        assert abs(values.mean() - 0.5) < 0.01 and abs(values.std() - 0.2887) < 0.01
    along = uniforms(streams[:1], torch.arange(10_000)).numpy()
    assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 0.03


def test_nan_logits_give_nan_logprobs():
    logits = torch.zeros(3, 200)
    logits[1, 7] = torch.nan
    tokens, logprobs = draw(
        logits, [SamplingParams(), SamplingParams(top_k=5, top_p=0.5), SamplingParams(temperature=0)]
    )
    assert logprobs.isnan().tolist() == [False, True, False] and (tokens < 200).all()


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": t} for t in (-1, float("nan"), float("inf"), 1e-45, 1e-40, 1e39)),  # in float32 0, or inf
        *({"top_p": p} for p in (0, -0.1, 1.1, float("nan"))),
        *({"min_p": p} for p in (-0.1, 2, float("nan"))),
        *({"top_k": k} for k in (-1, 2**63, 1.5)),
        *({"max_tokens": n} for n in (0, 2.5)),
        *({"n": n} for n in (0, 1.0)),
        {"seed": 0.5},
        *({"min_tokens": n} for n in (-1, 1025, 1.5)),
        *({"logprobs": n} for n in (-1, 0.5)),
        *({"repetition_penalty": p} for p in (0, -1.2, 101, float("nan"))),
        *({name: p} for name in ("presence_penalty", "frequency_penalty") for p in (-2.1, 2.1, float("nan"))),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(UserError, match=rf"^{re.escape(f'{name}={value}')}( is out of range)?: must be "):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({5: 100.5}, "logit_bias of token 5=100.5 is out of range: must be -100 to 100"),
        ({5: float("nan")}, "logit_bias of token 5=nan is out of range: must be -100 to 100"),
        ({"5": 1.0}, "logit_bias has token '5': must be an integer"),
    ],
    ids=str,
)
def test_impossible_biases_are_refused(bias, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed(seed):
    assert fold_in(seed, 1) == fold_in(seed % 2**64, 1) != fold_in(seed + 1, 1)
