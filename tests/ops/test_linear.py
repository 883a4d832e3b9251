"""PackedLinear equals F.linear in float64, and a row's outputs don't depend on its batch-mates."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DTYPES, to_backend
from tolerance import assert_rms_close

from m1.ops import PackedLinear, reference
from m1.ops.cpu.linear import rounds_rows
from m1.ops.quantize import GROUP, quantize

pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")

ANY = st.sampled_from(DTYPES)
# Around a panel (8, 16, 32 outputs), a tile (4, 6, 12 rows), a block (96 rows), and 128, 256, 512 inputs at a time.
OUTPUTS = st.sampled_from([1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 130])
INPUTS = st.sampled_from([1, 2, 3, 17, 127, 128, 129, 255, 256, 257, 512, 700])
QUANTIZATIONS = st.sampled_from(["int8", "int4"])
ROWS = st.one_of(st.integers(1, 26), st.sampled_from([64, 95, 96, 97, 200]))


def make(rows, inputs, outputs, x_dtype=torch.float32, dtype=torch.float32, seed=0):
    """x, weight, bias."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g).to(x_dtype)
    weight = (torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(dtype)
    return x, weight, torch.randn(outputs, generator=g).to(dtype)


def assert_equals_torch(layer, x, weight, bias):
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    actual = layer(x)
    assert actual.dtype == x.dtype
    # four numbers that nearly cancel have been 1.2e-6 off
    assert_rms_close([actual], [expected], 1.5e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps)


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=200, deadline=None)
@given(ROWS, INPUTS, OUTPUTS, ANY, ANY, st.booleans())
def test_kernel_equals_torch(rows, inputs, outputs, x_dtype, dtype, biased):
    x, weight, bias = make(rows, inputs, outputs, x_dtype, dtype)
    bias = bias if biased else None
    assert_equals_torch(PackedLinear(weight, bias, backend="cpu"), x, weight, bias)


@settings(max_examples=50, deadline=None)
@given(ROWS, INPUTS, OUTPUTS, ANY, ANY, st.data())
def test_rows_do_not_depend_on_their_batch_mates(rows, inputs, outputs, x_dtype, dtype, data):
    x, weight, bias = make(rows, inputs, outputs, x_dtype, dtype)
    layer = PackedLinear(weight, bias, backend="cpu")
    together = layer(x)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=110))
    assert torch.equal(layer(x[chosen]), together[chosen])
    assert torch.equal(layer(x[chosen[:1]]), together[chosen[:1]])


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=150, deadline=None)
@given(ROWS, INPUTS, OUTPUTS, ANY, ANY, st.booleans(), QUANTIZATIONS)
def test_quantized_weights(rows, inputs, outputs, x_dtype, dtype, biased, kind):
    x, weight, bias = make(rows, inputs, outputs, x_dtype, dtype)
    weight[0] = 0  # has no scale of its own
    x[0] = 0
    bias = bias if biased else None
    layer, quantized = PackedLinear(weight, bias, backend="cpu", quantization=kind), quantize(weight, kind)
    expected = reference.quantized_linear(x, quantized, bias, rounds_rows())
    actual = layer(x)
    assert actual.dtype == x.dtype
    assert_rms_close([actual], [expected], 3e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps)
    assert torch.equal(layer(x[:1]), actual[:1]) and torch.equal(layer(x[-1:]), actual[-1:])
    if dtype == torch.float32:
        rounded = PackedLinear(weight, bias, "reference", quantization=kind)
        assert_equals_torch(rounded, x, quantized.values(), bias)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_that_is_not_finite_stays_so(kind):
    x, weight, _ = make(3, 64, 40)
    layer = PackedLinear(weight, quantization=kind)
    plain = layer(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[1, 40] = value
        assert not layer(x)[1].isfinite().any() and torch.equal(layer(x)[::2], plain[::2])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_tiny_numbers_are_finite(kind):
    """127 divided by the largest of them is infinite."""
    layer = PackedLinear(torch.ones(32, 32), quantization=kind)
    for x in (torch.full((1, 32), 1e-37), torch.zeros(1, 32).index_fill_(1, torch.tensor([4]), 1e-40)):
        assert layer(x).abs().max() < 1e-30


@given(st.integers(0, 2**32), QUANTIZATIONS, st.sampled_from([torch.float32, torch.float64]))
def test_quantized_values_keep_their_codes(seed, kind, dtype):
    """GGUF's Q8_0 and Q4_1 blocks come out as they went in."""
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    once = quantize(weight, kind)
    again = quantize(once.values(), kind)
    assert torch.equal(once.codes, again.codes) and torch.equal(once.scales, again.scales)
    step = once.scales.repeat_interleave(GROUP, dim=1)[:, :100]
    assert ((once.values() - weight).abs() <= step * 0.51 + 2e-3).all()


def test_outputs_do_not_depend_on_threads():
    x, weight, bias = make(70, 700, 200)
    layer = PackedLinear(weight, bias, backend="cpu")
    threads, outs = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outs.append(layer(x))
    torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_strided_and_empty_rows(backend, dtype):
    x, weight, bias = make(12, 40, 50, dtype, dtype)
    layer = PackedLinear(weight.T.contiguous().T, bias, backend)
    for view in (x.T.contiguous().T, x.repeat(1, 2)[:, 3:43], x[::3], x[:1].expand(5, -1), x[:0]):
        assert_equals_torch(layer, view, weight, bias)
    assert layer(x[:0]).shape == (0, 50)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_without_a_compiler(monkeypatch, x_dtype, dtype):
    monkeypatch.setattr("m1.ops.backend.load_cpu_kernels", lambda: None)
    x, weight, bias = make(5, 40, 50, x_dtype, dtype)
    assert_equals_torch(PackedLinear(weight, bias), x, weight, bias)


@pytest.mark.parametrize("shapes", [((40,), (40,)), ((0, 40), (0,)), ((50, 40), (40,)), ((50, 40), (50, 1))])
def test_weights_that_do_not_fit_are_refused(shapes):
    weight, bias = map(torch.randn, shapes)
    with pytest.raises(ValueError, match=r"PackedLinear: .*(weight|bias has shape .* float32)"):
        PackedLinear(weight, bias)


def test_weights_of_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"weight has shape \(50, 40\) and dtype float64"):
        PackedLinear(torch.randn(50, 40).double())


@pytest.mark.parametrize("x", [torch.randn(3, 41), torch.randn(40), torch.randn(1, 3, 40), torch.randn(3, 40).double()])
def test_rows_that_do_not_fit_are_refused(x):
    layer = PackedLinear(torch.randn(50, 40))
    with pytest.raises(ValueError, match=r"PackedLinear: x has shape \(.*must be \[rows, 40\]"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 16, 2),
        (3, 64, 34),
        (16, 129, 100),
        (64, 256, 66),
        (65, 40, 50),
        pytest.param(17, 700, 4104, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_triton_equals_torch(rows, inputs, outputs, dtype, biased):
    x, weight, bias = to_backend("triton", *make(rows, inputs, outputs, dtype, dtype))
    layer = PackedLinear(weight, bias if biased else None, backend="triton")
    assert_equals_torch(layer, x, weight, bias if biased else None)
    gate, up = F.linear(x.double(), weight.double(), bias.double() if biased else None).chunk(2, dim=1)
    # beyond the kernel's rows, the product is rounded before the gate
    mlp = PackedLinear(weight, bias if biased else None, backend="triton", gated=True)
    assert_rms_close([mlp(x)], [F.silu(gate) * up], torch.finfo(dtype).eps * (1 if rows <= 64 else 2))


def test_triton_takes_strided_rows_and_new_weights():
    x, weight, bias = to_backend("triton", *make(12, 48, 50, torch.bfloat16, torch.bfloat16))
    layer = PackedLinear(weight, bias, backend="triton")
    for _ in range(2):
        for view in (x.T.contiguous().T, x.repeat(1, 2)[:, 3:51], x[::3], x[:1].expand(5, -1), x[:0], x.float()):
            assert_equals_torch(layer, view, weight, bias)
        weight, bias = weight.flip(0).contiguous(), bias.flip(0).contiguous()
        layer.load(weight, bias)


def test_triton_takes_no_float32():
    weight = torch.randn(50, 40)
    with pytest.raises(
        ValueError, match="PackedLinear: backend 'triton' needs bfloat16 or float16 weights, not quantized"
    ):
        PackedLinear(weight, backend="triton")


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=100, deadline=None)
@given(ROWS, INPUTS, OUTPUTS, ANY, st.booleans(), st.sampled_from([None, "int8", "int4"]))
def test_gated_outputs(rows, inputs, outputs, dtype, biased, quantization):
    x, weight, bias = make(rows, inputs, 2 * outputs, torch.float32, dtype)
    bias = bias if biased else None
    plain = PackedLinear(weight, bias, "cpu", quantization)
    gate, up = plain(x).chunk(2, dim=1)
    gated = PackedLinear(weight, bias, "cpu", quantization, gated=True)
    assert_rms_close([gated(x)], [F.silu(gate) * up], 1e-6)
    assert torch.equal(gated(x[:1]), gated(x)[:1])
    by_torch = PackedLinear(weight, bias, "reference", gated=True)
    if not quantization:
        assert_rms_close([gated(x)], [by_torch(x)], 3e-6)


def test_an_odd_number_of_gated_outputs_is_refused():
    with pytest.raises(ValueError, match=r"gated outputs must be even, but weight has shape \(7, 5\)"):
        PackedLinear(torch.randn(7, 5), gated=True)
