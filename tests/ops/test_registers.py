"""The registers' kernels equal the reference, and end a sequence where it draws one of its stop tokens."""

import pytest
import torch
from kernels import BACKENDS, to_backend

from m1.ops.inputs import DRAWN, ENDED, LENGTH, MAX_STOPS, STOPS, STREAM, TOKEN
from m1.ops.random_bits import fold_in, signed, uniforms
from m1.ops.registers import advance_registers, read_registers


def registers(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 50, (count, STOPS + MAX_STOPS), generator=g)
    integers[:, ENDED] = torch.randint(0, 2, (count,), generator=g)
    integers[:, STREAM] = torch.tensor([signed(fold_in(seed, i)) for i in range(count)])
    integers[:, STOPS + 2 :] = -1
    return integers, torch.rand(count, 3, generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 3, 70])
def test_kernels_equal_reference(rows, backend):
    integers, floats = registers(75)
    slots = torch.randperm(75)[:rows]
    tokens = torch.randint(0, 50, (rows,))
    expected = integers.clone()
    inputs = read_registers(expected, floats, slots, backend="reference")
    advance_registers(expected, slots, tokens, backend="reference")
    own, floats, slots, tokens = to_backend(backend, integers.clone(), floats, slots, tokens)
    found = read_registers(own, floats, slots, backend=backend)
    advance_registers(own, slots, tokens, backend=backend)
    for actual, value in zip([*found, own], [*inputs, expected], strict=True):
        assert actual.dtype == value.dtype and torch.equal(actual.cpu(), value)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_step(backend):
    integers, floats = registers(3)
    integers[:, ENDED] = torch.tensor([0, 0, 1])
    integers[:, STOPS] = 7
    before, slots = integers.clone(), torch.tensor([2, 0, 1])
    integers, floats, slots = to_backend(backend, integers, floats, slots)
    tokens, active, lengths, keys, uniform, temperature = (
        t.cpu() for t in read_registers(integers, floats, slots, backend=backend)
    )
    order = slots.cpu()
    assert torch.equal(tokens, before[order, TOKEN]) and torch.equal(lengths, before[order, LENGTH])
    assert torch.equal(keys, lengths + 1)
    assert active.tolist() == [-1, 0, 1] and torch.equal(temperature, floats.cpu()[order, 0])
    assert torch.equal(uniform, uniforms(before[order, STREAM], before[order, DRAWN]))
    advance_registers(integers, slots, torch.tensor([5, 7, 8], device=integers.device), backend=backend)
    after = integers.cpu()
    assert after[:, TOKEN].tolist() == [7, 8, 5] and after[:, ENDED].tolist() == [1, 0, 1]
    assert (after[:, LENGTH] - before[:, LENGTH]).tolist() == (after[:, DRAWN] - before[:, DRAWN]).tolist() == [1, 1, 0]


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_that_do_not_exist_are_refused(slot):
    integers, floats = registers(2)
    before, slots = integers.clone(), torch.tensor([0, slot])
    for run in (
        lambda: read_registers(integers, floats, slots, backend="cpu"),
        lambda: advance_registers(integers, slots, slots, backend="cpu"),
    ):
        with pytest.raises(IndexError, match=f"row 1 has slot {slot}, but there are 2 slots"):
            run()
    assert torch.equal(integers, before)


def test_strided_registers_are_refused():
    integers, _ = registers(2)
    with pytest.raises(ValueError, match="contiguous registers"):
        advance_registers(integers.T.contiguous().T, torch.tensor([0]), torch.tensor([0]), backend="triton")


@pytest.mark.parametrize("change", [lambda t: t[None], lambda t: t.int(), lambda t: t.double()])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_what_does_not_fit_is_refused(argument, change):
    arguments = [*registers(3), torch.tensor([0, 2])]
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=r"read_registers: (integers|floats|slots) has shape"):
        read_registers(*arguments)
    if argument != 1:
        with pytest.raises(ValueError, match=r"advance_registers: (integers|slots|tokens) has shape"):
            advance_registers(arguments[0], arguments[2], torch.tensor([0, 2]))
