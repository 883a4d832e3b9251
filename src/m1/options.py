"""Options, declared once: a frozen dataclass whose fields carry their help texts.

The command line makes its options from such a class (`cli/arguments.py`). `build` turns a recipe's TOML table into an
instance. An unknown key is refused, and the message names the nearest known one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar

from m1.errors import UserError

T = TypeVar("T")
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
MAX_COUNT = 2**53
Quantization = Literal["int8", "int4"]  # of linear layers' weights (ops/quantize.py)
MAX_SECONDS = 7 * 24 * 3600.0  # of a time limit: what is longer is a mistake, and no socket takes it
MAX_SHOWN = 200  # characters of a value in an error message


def option(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """Declares a dataclass field with a help text. Without a default it is required. Each instance gets its own copy of
    a default that is a dict or list."""
    metadata = {"help": help}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Makes an instance of the dataclass `cls` from a table of its fields.

    Args:
        cls: the dataclass. Fields that are dataclasses take tables.
        table: values by field name. An integer is accepted where a float is expected.
        where: where the table comes from. Error messages begin with it.

    Raises:
        UserError: an unknown or missing key, a value of another type, or one that `cls` refuses.
    """
    hints = typing.get_type_hints(cls)
    check_keys(table, hints, where)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in table]:
        raise UserError(f"{where}: missing key {missing[0]!r}")
    values = {}
    for key, value in table.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = build(typing.cast(type, hints[key]), value, f"{where} [{key}]")
        values[key] = fitted(value, hints[key], f"{where}: {key}")
        if _has_nul(value):
            raise UserError(f"{where}: {key} = {shown(value)} has a NUL character in it: remove it")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def fitted(value: Any, hint: Any, name: str) -> Any:
    """Returns a value that fits the type hint: the value itself, or an integer as the float that is expected.

    Raises:
        UserError: the value fits neither way. The message begins with `name`.
    """
    if type(value) is int and not _matches(value, hint) and _matches(0.0, hint):
        with suppress(OverflowError):
            return float(value)
    if not _matches(value, hint):
        raise UserError(f"{name} = {shown(value)} should be {_describe(hint)}")
    return value


def check_count(value: int, name: str) -> None:
    """Raises UserError for an integer that can't be a count: below 0, or more than a float or a table holds exactly."""
    if not 0 <= value <= MAX_COUNT:
        raise UserError(f"{name} = {shown(value)} should be 0 to {MAX_COUNT}")


def check_at_least_one(options: Any, *names: str) -> None:
    """Raises UserError for an option that isn't None and not 1 to INT32_MAX: larger work would never end."""
    for name in names:
        if (value := getattr(options, name)) is not None and not 1 <= value <= INT32_MAX:
            raise UserError(f"{name}={shown(value)}: need at least 1 and at most {INT32_MAX}")


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raises UserError if a value is out of range."""
    if not least <= value <= most:
        raise UserError(f"{name}={value} is out of range: must be {least:g} to {most:g}")


def shown(value: Any) -> str:
    """The value as an error message shows it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def check_keys(table: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises UserError for an unknown key of `table`. The message names the nearest known one."""
    known = list(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, choice) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_matches(item, arguments[1]) for item in value.values())
    return isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)


def _has_nul(value: Any) -> bool:
    """Whether a text in the value has the one character that no path may have."""
    if isinstance(value, dict | list):
        return any(map(_has_nul, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "\0" in value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
