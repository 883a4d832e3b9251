"""Which implementation runs an op: "cpu" (C++), "triton" (GPU), or "reference" (plain PyTorch, anywhere)."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_type_hints

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


def schema_of(inputs: type, mutates: tuple[str, ...] = ()) -> str:
    """The fields of a NamedTuple of tensors as an operator's arguments, in PyTorch's notation."""
    arguments = []
    for i, (name, hint) in enumerate(get_type_hints(inputs).items()):
        kind = f"Tensor(a{i}!)" if name in mutates else "Tensor" if hint is Tensor else "Tensor?"
        arguments.append(f"{kind} {name}")
    return ", ".join(arguments)


def decode_operator(
    name: str, module: str, inputs: type | str, outputs: Callable[..., Any],
    mutates: tuple[str, ...] = (), returns: str = "Tensor",
) -> Any:  # fmt: skip
    """Registers the operator m1::name(inputs, backend), without gradients, and returns it.

    It allocates the outputs and has the backend's function of that name fill them. Same as `torch.library.custom_op`,
    which costs a decode step's kernel a third of its time.

    Args:
        module: where the backends, ops/cpu and ops/triton, have the function.
        inputs: a NamedTuple of tensors, which the function takes whole, or arguments in PyTorch's notation.
        outputs: allocates the outputs, given what the function takes.
        mutates: the inputs that are written to, of a NamedTuple.
    """
    schema, bundle = (inputs, None) if isinstance(inputs, str) else (schema_of(inputs, mutates), inputs)

    def run(*arguments: Any) -> Any:
        given = (bundle(*arguments[:-1]),) if bundle else arguments[:-1]
        results = outputs(*given)
        filled = (results,) if isinstance(results, Tensor) else results
        getattr(kernels(arguments[-1], module), name)(*given, *filled)
        return results

    def allocate(*arguments: Any) -> Any:
        return outputs(bundle(*arguments[:-1])) if bundle else outputs(*arguments[:-1])

    torch.library.define(f"m1::{name}", f"({schema}, str backend) -> {returns}")
    torch.library.impl(f"m1::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"m1::{name}", allocate)
    return getattr(torch.ops.m1, name).default
