"""Invariant 2 for what stands between the products: every kernel equals the reference, which equals torch's modules."""

import pytest
import torch
import torch.nn.functional as F
from kernels import BACKENDS, DTYPES, to_backend
from tolerance import assert_rms_close

from m1.ops import add_rms_norm, swiglu

SHAPES = [(1, 16), (2, 48), (3, 512), (65, 1040), (0, 32)]
pytestmark = pytest.mark.filterwarnings("error:no C.. compiler", "error:compiling")


def random(*shape, dtype, seed):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def tolerance(dtype):
    return 1e-6 if dtype == torch.float32 else 3e-3


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("updated", [True, False])
def test_add_rms_norm_equals_reference(backend, dtype, shape, updated):
    hidden, update = random(*shape, dtype=dtype, seed=0), random(*shape, dtype=dtype, seed=1) if updated else None
    weight = random(shape[1], dtype=dtype, seed=2)
    expected_hidden = hidden.clone()
    expected = add_rms_norm(expected_hidden, update, weight, 1e-3, backend="reference")
    hidden, update, weight = to_backend(backend, hidden.clone(), update, weight)
    actual = add_rms_norm(hidden, update, weight, 1e-3, backend=backend)
    assert_rms_close([actual.cpu(), hidden.cpu()], [expected, expected_hidden], tolerance(dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (3, 2 * 1040), (40, 96), (0, 32)])
def test_swiglu_equals_reference(backend, dtype, shape):
    gate_up = random(*shape, dtype=dtype, seed=0)
    actual = swiglu(*to_backend(backend, gate_up), backend=backend)
    assert_rms_close([actual.cpu()], [swiglu(gate_up, backend="reference")], tolerance(dtype))


def test_reference_equals_torch():
    hidden, update, weight = (
        random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(3, 7), (3, 7), (7,)])
    )
    total = hidden + update
    actual = add_rms_norm(hidden, update, weight, 1e-3)
    torch.testing.assert_close(actual, F.rms_norm(total, (7,), weight, 1e-3))
    torch.testing.assert_close(hidden, total)
    gate, up = random(3, 5, dtype=torch.float32, seed=3), random(3, 5, dtype=torch.float32, seed=4)
    torch.testing.assert_close(swiglu(torch.cat([gate, up], dim=1)), F.silu(gate) * up)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_each_other(backend):
    hidden, weight = to_backend(backend, random(70, 544, dtype=torch.float32, seed=0), torch.ones(544))
    together, gated = add_rms_norm(hidden, None, weight, 1e-6, backend=backend), swiglu(hidden, backend=backend)
    for row in (0, 41, 69):
        alone = hidden[row : row + 1].clone()
        assert torch.equal(swiglu(alone, backend=backend)[0], gated[row])
        assert torch.equal(add_rms_norm(alone, None, weight, 1e-6, backend=backend)[0], together[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend):
    values = torch.tensor([[1e6, -1e6, 1e-30, torch.nan, 90.0, -90.0, 0.0, -1e-30] * 4])
    (gate_up,) = to_backend(backend, values)
    expected = swiglu(values, backend="reference")
    torch.testing.assert_close(swiglu(gate_up, backend=backend).cpu(), expected, equal_nan=True)


def test_shapes_that_do_not_fit_are_refused():
    hidden = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"add_rms_norm: update has shape \(2, 16\)"):
        add_rms_norm(hidden, torch.zeros(2, 16), torch.ones(32), 1e-6)
    with pytest.raises(ValueError, match="swiglu: width must be even, but width is 33 from gate_up"):
        swiglu(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="multiple of 16"):
        swiglu(torch.zeros(2, 34), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend):
    hidden, update, weight = to_backend(
        backend, *(random(2, 32, dtype=torch.float32, seed=i) for i in (0, 1)), torch.ones(32)
    )
    torch.library.opcheck(torch.ops.m1.add_rms_norm, (hidden, update, weight, 1e-6, backend))
    torch.library.opcheck(torch.ops.m1.swiglu, (hidden, backend))
