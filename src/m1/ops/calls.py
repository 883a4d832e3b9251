"""Calls the C++ kernels, and records the calls of a step to repeat them without Python: a CPU's CUDA graph.

Every kernel takes one struct of 8-byte fields. So a recorded step is a list of kernels with their structs, which
`m1_replay` runs in one loop. Python's lock is free meanwhile, and threads don't fall asleep between kernels.
"""

import ctypes
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m1.ops.build import load_cpu_kernels

ALIGNMENT = 64  # bytes
ALLOCATING = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")

_thread = threading.local()  # its `watch` sees the step that this thread records


def call(name: str, *arguments: Tensor | int | None) -> int:
    """Calls a kernel with one struct of 8-byte fields: data pointers of tensors, null for None, int64 for integers.

    Returns what the kernel returns: -1 if all is well, else the number of a row that has something out of range.
    """
    fields = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    kernel, packed = getattr(load_cpu_kernels(), name), (ctypes.c_int64 * len(fields))(*fields)
    if arguments and (watch := getattr(_thread, "watch", None)):  # without any it only asks for a constant
        watch.calls.append(Call(kernel, packed, {i: a for i, a in enumerate(arguments) if isinstance(a, Tensor)}))
    return kernel(packed)


def float_bits(value: float) -> int:
    """A float64 as the int64 with the same bits, for a struct."""
    return struct.unpack("q", struct.pack("d", value))[0]


def watched() -> AbstractContextManager[Any]:
    """What an op's own code runs under, so that a recording sees it."""
    return getattr(_thread, "watch", None) or nullcontext()


def made(tensor: Tensor) -> Tensor:
    """Notes that an op has allocated this tensor for its results. Returns it."""
    if watch := getattr(_thread, "watch", None):
        watch.made.append((tensor, len(watch.calls)))
    return tensor


class Call(NamedTuple):
    """A kernel's call: its struct, and the tensors among the arguments, by the number of their field."""

    kernel: Any
    fields: Any
    tensors: dict[int, Tensor]


class Watch(TorchDispatchMode):
    """Collects the calls of a step.

    Attributes:
        calls: in order.
        made: the tensors that ops allocated for results, with the number of calls before.
        foreign: an operator that can't be repeated: one that isn't a kernel of ours, and computes or changes something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.made: list[tuple[Tensor, int]] = []
        self.foreign: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not (name.startswith("m1::") or name in ALLOCATING or _only_views(func, results, args)):
            self.foreign = name
        return results


def _only_views(func: Any, results: Any, args: Any) -> bool:
    """Whether the results are views of the arguments, or the arguments themselves."""
    if func._schema.is_mutable:
        return False
    given = {_address(a) for a in args if isinstance(a, Tensor)}
    found = results if isinstance(results, list | tuple) else [results]
    return all(isinstance(t, Tensor) and _address(t) in given for t in found)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Block(NamedTuple):
    """Memory that one intermediate result takes: bytes, and the calls that write it first and read it last."""

    size: int
    first: int
    last: int


class Shape(NamedTuple):
    """A result in a recording's memory: the byte where it begins, its dtype, sizes and strides."""

    begin: int
    dtype: torch.dtype
    sizes: torch.Size
    strides: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The result as a view of the memory."""
        end = self.begin + (len(memory) - self.begin) // self.dtype.itemsize * self.dtype.itemsize
        return memory[self.begin : end].view(self.dtype).as_strided(self.sizes, self.strides)


class Arena:
    """Memory for the intermediate results of recordings. They run one after another and share it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._recordings: list[Recording] = []

    def add(self, recording: "Recording") -> None:
        """Gives a recording memory. All move if there isn't enough."""
        self._recordings.append(recording)
        moved = [recording]
        if recording.size > len(self.memory):
            self.memory, moved = torch.empty(recording.size, dtype=torch.uint8), self._recordings
        for one in moved:
            one.move(self.memory)


class Recording:
    """The kernel calls of a step, to be run again on the step's own inputs, whose values may be others.

    Args:
        watch: has seen the step.
        results: what the step returned.

    Attributes:
        size: bytes of intermediate results.
        results: what the step and every replay returns. The next replay overwrites it.
    """

    def __init__(self, watch: Watch, results: tuple[Tensor, ...]):
        kernels: Any = load_cpu_kernels()
        self._replay, count = kernels.m1_replay, len(watch.calls)
        first = {_address(tensor): (tensor.untyped_storage().nbytes(), call) for tensor, call in watch.made}
        last = {address: call for address, (_, call) in first.items()}
        uses = [(i, one.fields, field, t) for i, one in enumerate(watch.calls) for field, t in one.tensors.items()]
        last |= {_address(t): i for i, _, _, t in uses if _address(t) in first}
        last |= {_address(t): count for t in results if _address(t) in first}
        self._places, self.size = _plan({a: Block(*block, last[a]) for a, block in first.items()})
        # fields that are addresses of intermediate results: which one, and how far in
        self._moving = [(f, n, _address(t), t.data_ptr() - _address(t)) for _, f, n, t in uses if _address(t) in first]
        self._kept = [t.untyped_storage() for _, _, _, t in uses if _address(t) not in first]
        self._fields = [one.fields for one in watch.calls]
        pairs = [(ctypes.cast(one.kernel, ctypes.c_void_p).value, ctypes.addressof(one.fields)) for one in watch.calls]
        self._calls = (ctypes.c_int64 * (2 * count))(*(value for pair in pairs for value in pair if value is not None))
        self._struct = (ctypes.c_int64 * 2)(count, ctypes.addressof(self._calls))
        self._shown = [self._shape(t) if _address(t) in first else t for t in results]
        self.results = results

    def _shape(self, result: Tensor) -> "Shape":
        place = self._places[_address(result)] + result.data_ptr() - _address(result)
        return Shape(place, result.dtype, result.shape, result.stride())

    def move(self, memory: Tensor) -> None:
        """Puts the intermediate results into this memory."""
        base = memory.data_ptr()
        for fields, field, address, offset in self._moving:
            fields[field] = base + self._places[address] + offset
        self.results = tuple(shown.of(memory) if isinstance(shown, Shape) else shown for shown in self._shown)

    def replay(self) -> tuple[Tensor, ...]:
        """Runs the calls. Returns `results`. Raises IndexError for a slot, a token or a page that doesn't exist."""
        row = self._replay(self._struct)
        if row >= 0:
            raise IndexError(f"row {row} of a decode step has a slot, a token or a page that doesn't exist")
        return self.results


def _plan(blocks: dict[int, Block]) -> tuple[dict[int, int], int]:
    """Offsets of blocks in one piece of memory, in which blocks of different times may overlap, and its size."""
    placed: list[tuple[int, Block]] = []
    offsets = {}
    for address, block in sorted(blocks.items(), key=lambda item: -item[1].size):
        offset = 0
        alive = [place for place in placed if place[1].first <= block.last and block.first <= place[1].last]
        for begin, other in sorted(alive, key=lambda place: place[0]):
            if offset + block.size <= begin:
                break
            offset = max(offset, -(-(begin + other.size) // ALIGNMENT) * ALIGNMENT)
        offsets[address] = offset
        placed.append((offset, block))
    return offsets, max((offset + block.size for offset, block in placed), default=0)


def record(step: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[tuple[Tensor, ...], Recording | str]:
    """Runs a step. Returns its results, and its recording, or the name of an operator that can't be recorded.

    What the step reads and writes besides its intermediate results must stay where it is in memory.
    """
    watch = Watch()
    _thread.watch = watch
    try:
        with watch:
            results = step(*inputs)
    finally:
        _thread.watch = None
    return results, watch.foreign or Recording(watch, results)
