"""The tensors an op takes, declared as data: shapes, dtypes, and relations between sizes.

Kernels read memory without looking, so every public op checks its arguments first. A declaration is compiled into
straight-line Python, as a dataclass's methods are: it runs in every decode step, and torch.compile traces it.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch
from torch import Tensor

Rule = Callable[..., bool]  # a relation between sizes, which its parameters name

DTYPES = {  # the most frequent first
    "float": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "int": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "float32": (torch.float32,),
    "float32 or bfloat16": (torch.float32, torch.bfloat16),
}


def declared(inputs: type) -> dict[str, str]:
    """The annotations of a NamedTuple of tensors."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(inputs, include_extras=True).items()}


class Argument(NamedTuple):
    """A declared tensor."""

    name: str
    text: str
    sizes: list[tuple[str, int]]  # a name, or a number, and what is subtracted from it
    dtype: str  # a key of DTYPES
    like: str  # the argument that has the same dtype, or nothing
    optional: bool


class Shapes:
    """The check of an op's tensors.

        CHECK = Shapes("scale", x="b D", factor="D: float32", slots="b: int or None", where={"D must be even": even})
        CHECK(x, factor, None)  # in the declared order

    A declaration gives the sizes by name, then the dtype after a colon: a key of DTYPES, "float" when left out, or
    `as` an earlier argument. A name stands for one number everywhere; a size may be a name less a number (K-1), or a
    number. All tensors must be on one device.

    Args:
        op: the name in error messages.
        where: further relations: what the error says, and a function of the sizes.
    """

    def __init__(self, op: str, where: dict[str, Rule] | None = None, **arguments: str) -> None:
        self.op = op
        self.arguments = [_parsed(name, text) for name, text in arguments.items()]
        self.rules = [(text, rule, list(inspect.signature(rule).parameters)) for text, rule in (where or {}).items()]
        self._fits = self._compiled()

    def __call__(self, *tensors: Tensor | None, device: torch.device | None = None) -> None:
        """Raises ValueError that names the op, an argument and what it breaks, unless all tensors fit.

        Args:
            device: where all tensors must be; the first one's when None.
        """
        try:
            fits = self._fits(device, *tensors)
        except (AttributeError, ValueError):  # None, or another number of dimensions
            fits = False
        if not fits:
            self._refuse(tensors, device)

    def _compiled(self) -> Callable[..., bool]:
        """A function of the device and the tensors."""
        variables: dict[str, str] = {}
        scope: dict[str, Any] = {}
        tensors = {argument.name: f"t{i}" for i, argument in enumerate(self.arguments)}
        lines = [f"def fits(device, {', '.join(tensors.values())}):", " device = device or t0.device"]
        for (_, _, sizes, dtype, like, optional), tensor in zip(self.arguments, tensors.values(), strict=True):
            own = [f"{tensor}_{i}" for i in range(len(sizes))]
            scope[f"{tensor}_dtypes"] = DTYPES[dtype]
            tests = [f"{tensor}.device == device", f"{tensor}.dtype in {tensor}_dtypes"]
            tests += [f"{tensor}.dtype is {tensors[like]}.dtype"] if like else []
            for variable, (size, less) in zip(own, sizes, strict=True):
                known = size if size.isdecimal() else variables.setdefault(size, f"({variable} + {less})")
                tests.append(f"{variable} + {less} == {known}")
            lines.append(f" if {tensor} is not None:" if optional else " if True:")
            lines += [f"  {', '.join(own)}, = {tensor}.shape", f"  if not ({' and '.join(tests)}): return False"]
        for i, (_, rule, names) in enumerate(self.rules):
            scope[f"rule{i}"] = rule
            lines.append(f" if not rule{i}({', '.join(variables[name] for name in names)}): return False")
        exec("\n".join([*lines, " return True"]), scope)
        return scope["fits"]

    def _refuse(self, tensors: tuple[Tensor | None, ...], device: torch.device | None) -> NoReturn:
        """Names the first argument that contradicts those before it."""
        sizes: dict[str, int] = {}
        sources: dict[str, str] = {}  # the argument that a size was first read from
        given = {a.name: t for a, t in zip(self.arguments, tensors, strict=True) if t is not None}
        for name, text, declared, dtype, like, optional in self.arguments:
            tensor = given.get(name)
            if tensor is None and optional:
                continue
            if tensor is None:
                raise ValueError(f"{self.op}: {name} is None, but must be {text}")
            device = device or tensor.device
            known = [f"{size} from {sources[size]}" for size, _ in declared if size in sources]
            for (size, less), length in zip(declared, tensor.shape, strict=False):
                sizes.setdefault(size, int(size) if size.isdecimal() else length + less)
                sources.setdefault(size, name)
            expected = [sizes[size] - less for size, less in declared if size in sizes]
            dtypes = (given[like].dtype,) if like else DTYPES[dtype]
            fits = tensor.dim() == len(declared) and list(tensor.shape) == expected
            if not fits or tensor.dtype not in dtypes or tensor.device != device:
                actual = f"shape {tuple(tensor.shape)} and dtype {_words(tensor.dtype)} on {tensor.device}"
                shape = text if len(expected) < len(declared) else f"{text} = {tuple(expected)}"
                rule = ", ".join([shape, f"{_words(dtypes[0])} as {like}" if like else dtype, f"on {device}", *known])
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
    parts = [size.partition("-") for size in shape.split()]
    sizes = [(size, int(less or 0)) for size, _, less in parts]
    dtype = "float" if like or not dtype else dtype
    return Argument(name, f"[{', '.join(shape.split())}]", sizes, dtype, like, text != declaration)


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
