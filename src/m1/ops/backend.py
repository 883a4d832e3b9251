"""Chooses which implementation runs an op: "cpu" (C++), "triton" (GPU), or "reference" (PyTorch, any device)."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from m1.ops.build import load_cpu_kernels
from m1.ops.calls import made, watched

Backend = Literal["auto", "cpu", "triton", "reference"]


@torch.compiler.assume_constant_result
def available(backend: Backend) -> bool:
    """Whether the backend can run on this machine. The first call with "cpu" compiles the kernels."""
    if backend == "cpu":
        return load_cpu_kernels() is not None
    return backend == "reference" or _triton_installed()


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_backend(device_type: str) -> Backend:
    """The kernel backend for a device type: "triton" for "cuda", else "cpu"."""
    return "triton" if device_type == "cuda" else "cpu"


def choose(op: str, requested: Backend, tensor: Tensor, limits: dict[str, bool]) -> Backend:
    """The backend that runs an op.

    That is the requested one. For "auto" it is the kernel backend of the tensor's device if that can run the op, else
    "reference".

    Args:
        op: name of the op, for the error message.
        limits: what the kernels require, in words, and whether it holds.

    Raises:
        ValueError: the requested backend can't run the op on this machine or with these tensors.
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
    """The module that launches an op's kernels. It is imported on first use, as Triton may not be installed."""
    return importlib.import_module(f"m1.ops.{backend}.{op}")


def schema_of(inputs: type, mutates: tuple[str, ...] = ()) -> str:
    """An operator's arguments in PyTorch's schema notation, from the fields of a NamedTuple of tensors and integers."""
    kinds = {Tensor: "Tensor", int: "int"}
    arguments = []
    for i, (name, hint) in enumerate(get_type_hints(inputs).items()):
        kind = f"Tensor(a{i}!)" if name in mutates else kinds.get(hint, "Tensor?")
        arguments.append(f"{kind} {name}")
    return ", ".join(arguments)


def inference_operator(
    name: str, module: str, inputs: type | str, outputs: Callable[..., Any],
    mutates: tuple[str, ...] = (), returns: str = "Tensor",
) -> Any:  # fmt: skip
    """Registers the operator m1::name(inputs, backend), which has no gradient, and returns it.

    The operator allocates the outputs and calls the backend's function `name` to fill them. This does the same as
    `torch.library.custom_op`, whose overhead would be a third of the time of a decode step's kernel.

    Args:
        name: name of the operator and of the backends' function.
        module: module of ops/cpu and ops/triton that contains the function.
        inputs: a NamedTuple of tensors, which the function takes as one argument, or PyTorch's schema notation of
            separate arguments.
        outputs: allocates the outputs, given the function's arguments; returns None if there are none.
        mutates: names of the NamedTuple's fields that the function writes to.
        returns: what the operator returns, in PyTorch's schema notation.
    """
    schema, bundle = (inputs, None) if isinstance(inputs, str) else (schema_of(inputs, mutates), inputs)

    def run(*arguments: Any) -> Any:
        given = (bundle(*arguments[:-1]),) if bundle else arguments[:-1]
        with watched():
            results = outputs(*given)
            filled = (results,) if isinstance(results, Tensor) else results or ()
            for result in filled:
                made(result)
            getattr(kernels(arguments[-1], module), name)(*given, *filled)
        return results

    def allocate(*arguments: Any) -> Any:
        return outputs(bundle(*arguments[:-1])) if bundle else outputs(*arguments[:-1])

    torch.library.define(f"m1::{name}", f"({schema}, str backend) -> {returns}")
    torch.library.impl(f"m1::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"m1::{name}", allocate)
    return getattr(torch.ops.m1, name).default
