"""Invariant 12: every op checks every tensor argument before it does anything, and returns what it promises."""

import inspect
import typing

import pytest
import torch
from kernels import BACKENDS, DTYPES, to_backend
from tolerance import assert_rms_close
from torch import Tensor

from m1 import ops
from m1.ops import PackedLinear


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def multiply(x):
    """A call of a PackedLinear."""
    return PackedLinear(normal(33, 20))(x)


def mamba(*leading):
    activations = {"z": 96, "x": 32, "B": 32, "C": 96, "dt": 96}
    return {name: normal(*leading, width) for name, width in activations.items()} | {
        "A": -normal(96, 16).exp(),
        "D": normal(96),
        "conv_weight": normal(96, 4),
        "conv_bias": normal(96),
    }


# Valid arguments, every optional one included, in sizes of which none is another's, more or less one.
OPS = {
    ops.selective_scan: mamba(3, 7)
    | {"seq_idx": torch.zeros(3, 7).int(), "conv_state": normal(3, 32, 3), "ssm_state": normal(3, 96, 16)},
    ops.state_update: mamba(2)
    | {"conv_state": normal(5, 32, 3), "ssm_state": normal(5, 96, 16), "slots": torch.tensor([4, 1])},
    ops.ssd: {
        "x": normal(3, 7, 2, 11),
        "dt": normal(3, 7, 6).exp(),
        "A": -normal(6).exp(),
        "B": normal(3, 7, 2, 13),
        "C": normal(3, 7, 6, 13),
        "D": normal(6),
        "seq_idx": torch.zeros(3, 7).int(),
        "ssm_state": normal(3, 6, 11, 13),
    },
    ops.ssd_update: {
        "xBC": normal(2, 2 * (16 + 32) + 6 * 32),
        "dt": normal(2, 6),
        "A": -normal(6).exp(),
        "D": normal(6),
        "conv_weight": normal(288, 4),
        "conv_bias": normal(288),
        "conv_state": normal(5, 288, 3),
        "ssm_state": normal(5, 6, 16, 32),
        "slots": torch.tensor([4, 1]),
    },
    ops.prefill_scan: mamba(7)
    | {"conv_state": normal(5, 32, 3), "ssm_state": normal(5, 96, 16)}
    | {"slots": torch.tensor([4, 1]), "cu_seqlens": torch.tensor([0, 2, 7])},
    ops.prefill_ssd: {
        "xBC": normal(7, 288),
        "dt": normal(7, 6),
        "A": -normal(6).exp(),
        "D": normal(6),
        "conv_weight": normal(288, 4),
        "conv_bias": normal(288),
        "conv_state": normal(5, 288, 3),
        "ssm_state": normal(5, 6, 16, 32),
        "slots": torch.tensor([4, 1]),
        "cu_seqlens": torch.tensor([0, 2, 7]),
    },
    ops.causal_conv: {
        "x": normal(3, 7, 12),
        "weight": normal(12, 4),
        "bias": normal(12),
        "seq_idx": torch.zeros(3, 7).int(),
        "conv_state": normal(3, 12, 3),
    },
    ops.decode_attention: {
        "q": normal(2, 6, 16),
        "k_cache": normal(8, 2, 32, 16),
        "v_cache": normal(8, 2, 32, 16),
        "lengths": torch.tensor([3, 60]),
        "page_table": torch.tensor([0, 3, 1, 2, 7, 4]).int().repeat(5, 1)[:, :3],
        "slots": torch.tensor([2, 1]),
    },
    ops.prefill_attention: {
        "q": normal(7, 6, 16),
        "k_cache": normal(8, 2, 32, 16),
        "v_cache": normal(8, 2, 32, 16),
        "starts": torch.tensor([0, 50]),
        "cu_seqlens": torch.tensor([0, 2, 7]),
        "page_table": torch.tensor([0, 3, 1, 2, 7, 4]).int().repeat(5, 1)[:, :3],
        "slots": torch.tensor([2, 1]),
    },
    ops.varlen_attention: {
        "query": normal(7, 6, 16),
        "key": normal(7, 2, 16),
        "value": normal(7, 2, 16),
        "cu_seqlens": torch.tensor([0, 2, 7]),
    },
    ops.rotate_and_cache: {
        "qkv": normal(3, 10, 16),
        "cos": normal(3, 16),
        "sin": normal(3, 16),
        "k_cache": normal(8, 2, 32, 16),
        "v_cache": normal(8, 2, 32, 16),
        "page_table": torch.tensor([0, 3, 1, 2, 7, 4]).int().repeat(5, 1)[:, :3],
        "slots": torch.tensor([2, 1, 2]),
        "positions": torch.tensor([0, 60, 1]),
    },
    ops.embedding: {"tokens": torch.tensor([2, 0, 3]), "table": normal(9, 5)},
    ops.add_rms_norm: {"hidden": normal(3, 32), "update": normal(3, 32), "weight": normal(32)},
    ops.swiglu: {"gate_up": normal(3, 64)},
    ops.sample_token: {"logits": normal(3, 40), "uniform": torch.rand(3), "temperature": torch.ones(3)},
    PackedLinear: {"weight": normal(33, 20), "bias": normal(33)},
    multiply: {"x": normal(3, 20)},
}
NUMBERS = {  # further arguments without a default
    ops.add_rms_norm: {"eps": 1e-6},
    ops.prefill_attention: {"max_length": 6},
    ops.prefill_scan: {"max_length": 6},
    ops.varlen_attention: {"max_length": 6},
    ops.prefill_ssd: {"max_length": 6},
}
ONLY = {  # arguments that must have this very dtype; the others take any of their kind
    (ops.state_update, "ssm_state"): [torch.float32],
    (ops.ssd_update, "ssm_state"): [torch.float32],
    (ops.prefill_scan, "ssm_state"): [torch.float32],
    (ops.prefill_ssd, "ssm_state"): [torch.float32],
    (PackedLinear, "weight"): DTYPES,
    (multiply, "x"): DTYPES,
    **{(ops.rotate_and_cache, name): [torch.float32] for name in ("qkv", "k_cache", "v_cache")},  # one dtype for all
    **{(ops.add_rms_norm, name): [torch.float32] for name in ("hidden", "update", "weight")},  # one dtype for all
}
PAGED = [ops.decode_attention, ops.prefill_attention, ops.rotate_and_cache]
FREE = ["transposed", *(f"dimension {i} {change}" for i in (0, 1) for change in ("longer", "shorter"))]
# Mutations that give other valid arguments: nothing else fixes this size.
VALID = {
    (ops.swiglu, "gate_up", "dimension 0 longer"),
    (ops.swiglu, "gate_up", "dimension 0 shorter"),
    (ops.swiglu, "gate_up", "empty"),
    (ops.swiglu, "gate_up", "meta"),  # the only tensor
    *((op, "page_table", change) for op in PAGED for change in FREE),
    *((ops.embedding, "tokens", change) for change in ("dimension 0 longer", "dimension 0 shorter", "empty")),
    *((ops.embedding, "table", change) for change in FREE),
    (ops.sample_token, "logits", "dimension 1 longer"),
    (ops.sample_token, "logits", "dimension 1 shorter"),
    (PackedLinear, "weight", "dimension 1 longer"),
    (PackedLinear, "weight", "dimension 1 shorter"),
    (multiply, "x", "dimension 0 longer"),
    (multiply, "x", "dimension 0 shorter"),
    (multiply, "x", "empty"),
}


def tensor_arguments(op):
    """Names of the parameters that take tensors."""
    function = op.__init__ if inspect.isclass(op) else op
    if op is multiply:
        return ["x"]
    hints = typing.get_type_hints(function)
    return [name for name in inspect.signature(function).parameters if name != "self" and takes_tensor(hints[name])]


def takes_tensor(hint):
    return hint is Tensor or Tensor in typing.get_args(hint)


def mutations(op, name, tensor):
    """What each mutation makes of the argument."""
    for dim in range(tensor.dim()):
        yield f"dimension {dim} longer", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        yield f"dimension {dim} shorter", tensor.narrow(dim, 0, tensor.shape[dim] - 1)
    yield "a dimension more", tensor[None]
    yield "scalar", tensor.flatten()[0]
    yield "empty", tensor[:0]
    if tensor.dim() > 1:
        yield "transposed", tensor.mT.contiguous()
    yield "other kind", tensor.int() if tensor.is_floating_point() else tensor.float()
    yield "bool", tensor.bool()
    allowed = ONLY.get((op, name))
    if allowed:
        for dtype in [d for d in (*DTYPES, torch.float64) if d not in allowed]:
            yield str(dtype), tensor.to(dtype)
    yield "meta", tensor.to("meta")


CASES = [
    pytest.param(op, name, mutation, value, id=f"{op.__name__}-{name}-{mutation}")
    for op, arguments in OPS.items()
    for name, tensor in arguments.items()
    for mutation, value in mutations(op, name, tensor)
    if (op, name, mutation) not in VALID
]


def call(op, arguments):
    return op(**arguments, **NUMBERS.get(op, {}))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_tensor_argument_is_mutated(op):
    """A new argument needs a rule, and a place in OPS."""
    assert tensor_arguments(op) == list(OPS[op])


def test_every_public_op_is_here():
    assert {getattr(ops, name) for name in ops.__all__} == set(OPS) - {multiply}


@pytest.mark.parametrize(("op", "name", "mutation", "value"), CASES)
def test_a_mutated_argument_is_refused_before_anything_changes(op, name, mutation, value):
    arguments = {other: t.clone() for other, t in OPS[op].items()} | {name: value}
    before = {other: t.clone() for other, t in arguments.items()}
    public = "PackedLinear" if op is multiply else op.__name__
    with pytest.raises(ValueError, match=rf"^{public}: ({name} (has shape|must rise)|.* (from|as) {name}(,|$))"):
        call(op, arguments)
    for other, t in arguments.items():
        assert t.device.type == "meta" or torch.equal(t, before[other]), f"{other} was changed"


@pytest.mark.parametrize(
    ("op", "name", "mutation"),
    sorted(VALID, key=lambda case: (case[0].__name__, *case[1:])),
    ids=lambda v: getattr(v, "__name__", v),
)
def test_the_table_of_valid_mutations_holds(op, name, mutation):
    value = dict(mutations(op, name, OPS[op][name]))[mutation]
    result = call(op, {other: t.clone() for other, t in OPS[op].items()} | {name: value})
    outputs = result.out_features if op is PackedLinear else len(result[0] if isinstance(result, tuple) else result)
    assert outputs == len(next(iter(OPS[op].values())) if name in ("page_table", "table") else value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "op", [op for op, given in OPS.items() if not all(t.is_floating_point() for t in given.values())]
)
def test_integers_of_any_kind_mean_the_same(op, backend, dtype):
    """PyTorch reads bytes in an index as a mask, and takes no int8 in others."""
    choice = {"backend": backend} if "backend" in inspect.signature(op).parameters else {}
    results = []
    for kind in (torch.int64, dtype):
        result = call(op, {k: t.clone() if t.is_floating_point() else t.to(kind) for k, t in OPS[op].items()} | choice)
        results.append(result if isinstance(result, tuple) else (result,))
    assert all(map(torch.equal, *results))


# Shapes of the results; float32 and int64 where said, else in the first argument's dtype.
RESULTS = {
    ops.selective_scan: [(3, 7, 96), ((3, 96, 16), torch.float32)],
    ops.state_update: [(2, 96)],
    ops.ssd: [(3, 7, 6, 11), ((3, 6, 11, 13), torch.float32)],
    ops.ssd_update: [(2, 6, 16)],
    ops.prefill_scan: [(7, 96)],
    ops.prefill_ssd: [((7, 6, 16), torch.float32)],
    ops.causal_conv: [(3, 7, 12)],
    ops.decode_attention: [(2, 6, 16)],
    ops.prefill_attention: [(7, 6, 16)],
    ops.add_rms_norm: [(3, 32)],
    ops.swiglu: [(3, 32)],
    ops.sample_token: [((3,), torch.int64), ((3,), torch.float32)],
    multiply: [(3, 33)],
}


def backends(op):
    """The names that the op's `backend` takes; None if it has no such parameter."""
    return [*BACKENDS, "reference"] if "backend" in inspect.signature(op).parameters else [None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["alike", "float32"])
@pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, b, id=f"{op.__name__}-{b}") for op in RESULTS for b in backends(op)]
)
def test_valid_calls_keep_their_promise(op, backend, dtype, parameters):
    """The first argument in the dtype, the others, where they may differ, in the same or in float32.

    The results have the promised dtypes, and the values of a float32 call with the same numbers.
    """
    arguments = {name: t.clone() for name, t in OPS[op].items()}
    same = ("weight", "update") if op is ops.add_rms_norm else ()
    for i, (name, t) in enumerate(arguments.items()):
        exact = ONLY.get((op, name)) == [torch.float32] and op is not ops.add_rms_norm
        if t.is_floating_point() and not exact and (i == 0 or name in same or parameters == "alike"):
            arguments[name] = t.to(dtype)
    exact = {name: t.clone().float() if t.is_floating_point() else t for name, t in arguments.items()}
    choice, reference = ({"backend": b} if backend else {} for b in (backend, "reference"))
    moved = dict(zip(arguments, to_backend(backend, *arguments.values()), strict=True))
    results, expected = call(op, moved | choice), call(op, exact | reference)
    as_tuple = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    for result, exact, promise in zip(as_tuple(results), as_tuple(expected), RESULTS[op], strict=True):
        shape, promised = promise if isinstance(promise[0], tuple) else (promise, dtype)
        assert result.shape == shape and result.dtype == promised
        assert_rms_close([result.cpu()], [exact], 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", [op for op in OPS if "slots" in OPS[op]], ids=lambda op: op.__name__)
def test_a_slot_that_does_not_exist_is_named(op, backend):
    """Where no kernel runs, too: torch itself names neither the row nor the op's slots."""
    slots = OPS[op]["slots"].clone()
    slots[-1] = 9
    arguments = {name: t.clone() for name, t in OPS[op].items()} | {"slots": slots} | NUMBERS.get(op, {})
    if "backend" in inspect.signature(op).parameters:
        arguments["backend"] = backend
    with pytest.raises(IndexError, match=r"(row|chunk) \d+ has slot 9.* there are \d+"):
        op(**arguments)
