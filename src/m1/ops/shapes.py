"""Checks of an op's tensors, declared as data: shapes, dtypes, and relations between sizes.

Kernels don't check bounds, so every public op checks its arguments first. The check runs in every decode step, and
torch.compile traces it. So a declaration is compiled to straight-line Python, as dataclasses do for their methods.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch
from torch import Tensor

Rule = Callable[..., bool]  # a relation between the sizes that its parameters name

KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read and write; they compute in float32
DTYPES = {  # the most frequent first, as the check searches in order
    "float": (*KERNEL_FLOATS, torch.float64),
    "int": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "int64": (torch.int64,),
    "float32": (torch.float32,),
    "float32, bfloat16 or float16": KERNEL_FLOATS,
}


def declared(inputs: type) -> dict[str, str]:
    """The declarations in the annotations of a NamedTuple of tensors, by field name, as arguments for `Shapes`."""
    hints = get_type_hints(inputs, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hint is not int}


class Argument(NamedTuple):
    """One tensor argument of an op, parsed from its declaration. `Shapes` checks tensors against it.

    Attributes:
        name: name of the argument, for error messages.
        text: its shape in words, such as "[b, K-1]", for error messages.
        sizes: one pair per dimension: the name of a size, or a number, and what is added to it.
        dtype: the allowed dtypes, a key of DTYPES.
        like: name of the argument that must have the same dtype, or "".
        optional: whether the argument may be None.
    """

    name: str
    text: str
    sizes: list[tuple[str, int]]
    dtype: str
    like: str
    optional: bool


class Shapes:
    """A check of an op's tensor arguments: call it with the tensors, and it raises ValueError if one doesn't fit.

        CHECK = Shapes("scale", x="b D", factor="D: float32", slots="b: int or None", where={"D must be even": even})
        CHECK(x, factor, None)  # in the declared order

    A declaration lists the sizes, then the dtype after a colon. A size is a name, a number, or a name and a number that
    is added or subtracted (K-1). A name stands for the same number in all arguments. The dtype is a key of DTYPES or
    `as` and the name of an earlier argument; the default is "float". `or None` makes an argument optional. All tensors
    must be on one device.

    Args:
        op: name of the op in error messages.
        where: further relations between sizes: the text of the error, and a function whose parameters are named sizes.
        arguments: one declaration per tensor argument.
    """

    def __init__(self, op: str, where: dict[str, Rule] | None = None, **arguments: str) -> None:
        self.op = op
        self.arguments = [_parsed(name, text) for name, text in arguments.items()]
        self.rules = [(text, rule, list(inspect.signature(rule).parameters)) for text, rule in (where or {}).items()]
        self._fits = self._compiled()

    def __call__(self, *tensors: Tensor | None, device: torch.device | None = None) -> None:
        """Raises ValueError if a tensor doesn't fit. The message names the op, the argument and the rule it breaks.

        Args:
            tensors: the arguments, in the declared order.
            device: where all tensors must be; the first tensor's device when None.
        """
        try:
            fits = self._fits(device, *tensors)
        except (AttributeError, ValueError):  # a tensor is None, or has the wrong number of dimensions
            fits = False
        if not fits:
            self._refuse(tensors, device)

    def _compiled(self) -> Callable[..., bool]:
        """The check as a compiled function of the device and the tensors; it returns whether they fit."""
        variables: dict[str, str] = {}
        scope: dict[str, Any] = {}
        tensors = {argument.name: f"t{i}" for i, argument in enumerate(self.arguments)}
        lines = [f"def fits(device, {', '.join(tensors.values())}):", " device = device or t0.device"]
        for (_, _, sizes, dtype, like, optional), tensor in zip(self.arguments, tensors.values(), strict=True):
            own = [f"{tensor}_{i}" for i in range(len(sizes))]
            scope[f"{tensor}_dtypes"] = DTYPES[dtype]
            tests = [f"{tensor}.device == device", f"{tensor}.dtype in {tensor}_dtypes"]
            tests += [f"{tensor}.dtype is {tensors[like]}.dtype"] if like else []
            for variable, (size, more) in zip(own, sizes, strict=True):
                known = size if size.isdecimal() else variables.setdefault(size, f"({variable} - {more})")
                tests.append(f"{variable} - {more} == {known}")
            lines.append(f" if {tensor} is not None:" if optional else " if True:")
            lines += [f"  {', '.join(own)}, = {tensor}.shape", f"  if not ({' and '.join(tests)}): return False"]
        for i, (_, rule, names) in enumerate(self.rules):
            scope[f"rule{i}"] = rule
            lines.append(f" if not rule{i}({', '.join(variables[name] for name in names)}): return False")
        exec("\n".join([*lines, " return True"]), scope)
        return scope["fits"]

    def _refuse(self, tensors: tuple[Tensor | None, ...], device: torch.device | None) -> NoReturn:
        """Raises ValueError for the first argument that doesn't fit those before it."""
        sizes: dict[str, int] = {}
        sources: dict[str, str] = {}  # the argument that first gave each size
        given = {a.name: t for a, t in zip(self.arguments, tensors, strict=True) if t is not None}
        for name, text, declared, dtype, like, optional in self.arguments:
            tensor = given.get(name)
            if tensor is None and optional:
                continue
            if tensor is None:
                raise ValueError(f"{self.op}: {name} is None, but must be {text}")
            device = device or tensor.device
            known = [f"{size} from {sources[size]}" for size, _ in declared if size in sources]
            for (size, more), length in zip(declared, tensor.shape, strict=False):
                sizes.setdefault(size, int(size) if size.isdecimal() else length - more)
                sources.setdefault(size, name)
            expected = [sizes[size] + more for size, more in declared if size in sizes]
            dtypes = (given[like].dtype,) if like else DTYPES[dtype]
            fits = tensor.dim() == len(declared) and list(tensor.shape) == expected
            if not fits or tensor.dtype not in dtypes or tensor.device != device:
                actual = f"shape {tuple(tensor.shape)} and dtype {_words(tensor.dtype)} on {tensor.device}"
                shape = text if len(expected) < len(declared) else f"{text} = {tuple(expected)}"
                place = f"on {device}" if tensor.device == device else f"on {device} as {next(iter(given))}"
                rule = ", ".join([shape, f"{_words(dtypes[0])} as {like}" if like else dtype, place, *known])
                raise ValueError(f"{self.op}: {name} has {actual}, but must be {rule}")
        for relation, holds, names in self.rules:
            if not holds(*(sizes[size] for size in names)):
                values = ", ".join(f"{size} is {sizes[size]} from {sources[size]}" for size in names)
                raise ValueError(f"{self.op}: {relation}, but {values}")
        raise AssertionError(f"{self.op}: the arguments fit")


def _parsed(name: str, declaration: str) -> Argument:
    text = declaration.removesuffix(" or None")
    shape, _, dtype = text.partition(": ")
    like = dtype.removeprefix("as ") if dtype.startswith("as ") else ""
    parts = [re.fullmatch(r"(\w+)([+-]\d+)?", size) for size in shape.split()]
    sizes = [(part[1], int(part[2] or 0)) for part in parts if part]
    dtype = "float" if like or not dtype else dtype
    return Argument(name, f"[{', '.join(shape.split())}]", sizes, dtype, like, text != declaration)


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
