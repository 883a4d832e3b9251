"""Which implementation runs an op: "cpu" (C++), "triton" (GPU), or "reference" (plain PyTorch, anywhere)."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from m1.ops.build import load_cpu_kernels

Backend = Literal["auto", "cpu", "triton", "reference"]


@torch.compiler.assume_constant_result
def available(backend: Backend) -> bool:
    """Whether the backend can run here; the first question about "cpu" compiles it."""
    if backend == "cpu":
        return load_cpu_kernels() is not None
    return backend == "reference" or _triton_installed()


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def own_backend(device_type: str) -> Backend:
    """This package's kernels for a kind of device."""
    return "triton" if device_type == "cuda" else "cpu"


def require_shapes(
    op: str, fits: list[bool], tensors: Mapping[str, Tensor | None], problem: str = "shapes don't fit"
) -> None:
    """Raises ValueError with the tensors' shapes and dtypes unless all `fits` hold: kernels read without looking."""
    if not all(fits):
        shapes = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"{op}: {problem}: {shapes}")


def choose(op: str, requested: Backend, tensor: Tensor, limits: dict[str, bool]) -> Backend:
    """The requested backend; for "auto" that of the tensor's device, or "reference" where it can't run the op.

    Args:
        limits: what the kernels demand of the shapes, by name; whether it holds.

    Raises:
        ValueError: a kernel was asked for that can't run this.
    """
    if requested == "reference":
        return requested
    broken = [name for name, holds in limits.items() if not holds]
    backend = own_backend(tensor.device.type) if requested == "auto" else requested
    if backend == "cpu" and tensor.device.type != "cpu":
        broken.append("CPU tensors")
    if not broken and not available(backend):
        broken.append("a C++ compiler" if backend == "cpu" else "the package triton")
    if not broken:
        return backend
    if requested == "auto":
        return "reference"
    raise ValueError(f"{op}: backend {requested!r} needs {' and '.join(broken)}")


@functools.cache
def kernels(backend: str, op: str) -> ModuleType:
    """The module that launches an op's kernels, imported when it first runs: Triton may not be installed."""
    return importlib.import_module(f"m1.ops.{backend}.{op}")


def decode_operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a typed function as the operator m1::name, without gradients; `mutates` names what it writes to.

    Same as `torch.library.custom_op`, which costs a decode step's kernel a third of its time.
    """

    def register(function: Callable[..., Any]) -> Any:
        torch.library.define(f"m1::{name}", torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(f"m1::{name}", ("cpu", "cuda"), function)
        return getattr(torch.ops.m1, name).default

    return register
