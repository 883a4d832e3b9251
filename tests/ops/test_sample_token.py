"""Invariant 2 for the draw of a token: every kernel equals the reference, but where rounding decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import BACKENDS, DTYPES, interpreted, to_backend

from m1.ops import sample_token

ALL = [*BACKENDS, "reference"]
SIZES = [1, 3, 127, 128, 129, 1024, 1025, 5000]
pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")


def make(rows, size, seed=0, dtype=torch.float32):
    """logits, of which many are -inf; uniform; temperature."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, size, generator=g)
    logits[torch.rand(rows, size, generator=g) < 0.3] = -torch.inf
    logits[:, seed % size] = 1.0
    return (
        logits.to(dtype),
        torch.rand(rows, generator=g).double(),
        torch.tensor([1.0, 0.0, 0.6, 1.7])[torch.arange(rows) % 4],
    )


def run(backend, *arguments):
    return [t.cpu() for t in sample_token(*to_backend(backend, *arguments), backend=backend)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_kernel_equals_reference(backend, dtype, size):
    arguments = make(12 if interpreted(backend) else 300, size, seed=size, dtype=dtype)
    tokens, logprobs = run(backend, *arguments)
    expected, _ = run("reference", *arguments)
    assert (tokens != expected).float().mean() < 0.01
    logits, uniform, temperature = arguments
    heat = temperature.masked_fill(temperature == 0, 1.0)[:, None]
    exact = (logits.double() / heat).log_softmax(dim=-1)
    torch.testing.assert_close(logprobs, exact.gather(1, tokens[:, None])[:, 0].float(), rtol=1e-5, atol=1e-5)
    upper = exact.exp().cumsum(dim=-1).gather(1, tokens[:, None])[:, 0]
    lower = upper - exact.exp().gather(1, tokens[:, None])[:, 0]
    drawn = temperature > 0  # the target lies where the token's probability does
    assert ((lower - 1e-5 <= uniform) & (uniform <= upper + 1e-5))[drawn].all()
    assert torch.equal(tokens[~drawn], logits.float().argmax(dim=-1)[~drawn])


@pytest.mark.parametrize("backend", ALL)
@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from(SIZES), uniform=st.sampled_from([0.0, 0.5, 1 - 2.0**-53]), seed=st.integers(0, 99))
def test_tokens_of_probability_0_are_never_drawn(backend, size, uniform, seed):
    if interpreted(backend) and seed % 5:
        return
    logits, _, temperature = make(4, size, seed)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.9] = -torch.inf
    logits[:, seed % size] = -2.0
    tokens, logprobs = run(backend, logits, torch.full((4,), uniform).double(), temperature)
    assert (logits.gather(1, tokens[:, None]) > -torch.inf).all() and (logprobs > -torch.inf).all()


@pytest.mark.parametrize("backend", ALL)
def test_a_sum_that_is_the_target_has_not_passed_it(backend):
    """Of 4,096 equal tokens a draw of k / 4,096 takes number k, also where a kernel's block begins."""
    drawn = torch.tensor([0, 1, 127, 128, 129, 1023, 1024, 2048, 4095])
    logits = torch.full((len(drawn), 4096), -3.0)
    tokens, logprobs = run(backend, logits, drawn / 4096, torch.full((len(drawn),), 0.5))
    assert torch.equal(tokens, drawn)
    torch.testing.assert_close(logprobs, torch.full((len(drawn),), 4096.0).log().neg())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("temperature", [1.2e-38, 1e-37, 1e-30, 3.4e38])
def test_extreme_temperatures(backend, temperature):
    """A logit divided by a low temperature is infinite, but its distance from the highest has a meaning."""
    logits, uniform, _ = make(8, 1500)
    tokens, logprobs = run(backend, 40 + logits, uniform, torch.full((8,), temperature))
    if temperature < 1:
        assert torch.equal(tokens, logits.argmax(dim=-1)) and (logprobs == 0).all()
    else:
        torch.testing.assert_close(logprobs, logits.isfinite().sum(dim=-1).log().neg())


@pytest.mark.parametrize("backend", ALL)
def test_rows_without_a_distribution_give_nan(backend):
    logits = torch.zeros(8, 300)
    logits[1, 7], logits[2, 299], logits[3, :] = torch.nan, torch.inf, -torch.inf
    logits[5, 7], logits[6, 0], logits[7, :] = torch.nan, torch.inf, -torch.inf
    temperature = torch.tensor([1.0] * 4 + [0.0] * 4)
    tokens, logprobs = run(backend, logits, torch.full((8,), 0.5).double(), temperature)
    assert logprobs.isnan().tolist() == [False, True, True, True] * 2
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("backend", ALL)
def test_rows_do_not_depend_on_each_other(backend):
    logits, uniform, temperature = make(9, 1500)
    tokens, logprobs = run(backend, logits, uniform, temperature)
    for row in (0, 1, 5, 8):
        at = slice(row, row + 1)
        token, logprob = run(backend, logits[at], uniform[at], temperature[at])
        assert token == tokens[at] and logprob == logprobs[at]


def test_no_rows_and_shapes_that_do_not_fit():
    for backend in ALL:
        tokens, logprobs = run(backend, torch.zeros(0, 5), torch.zeros(0), torch.zeros(0))
        assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.long
    with pytest.raises(ValueError, match=r"sample_token: uniform has shape \(3,\)"):
        sample_token(torch.zeros(2, 5), torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator(backend):
    torch.library.opcheck(torch.ops.m1.sample_token, (*to_backend(backend, *make(3, 40)), backend))
