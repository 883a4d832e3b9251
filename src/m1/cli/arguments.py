"""Makes command-line options from the dataclasses that declare them."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from m1.errors import UserError

Command = Callable[..., Any]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Rename existing output to *.replaced. An unfinished run with these settings is kept."
    ),
]

Endpoints = Annotated[
    list[str],
    typer.Option(
        "--endpoint",
        help="Sample from an OpenAI-compatible server: its base URL. Repeatable: several share the work, and take over "
        "from one that fails. The key is $OPENAI_API_KEY.",
    ),
]


def refuse_local(options: Any) -> None:
    """Raises UserError for options of a model in this process, which a server's doesn't have."""
    set_ = {name: getattr(options, name, None) for name in ("dtype", "quantize", "devices")}
    if set_["dtype"] not in (None, "auto") or set_["quantize"] or set_["devices"]:
        raise UserError("--endpoint samples on a server: leave out --dtype, --quantize and --devices")


def options_of(cls: type) -> Callable[[Command], Command]:
    """A decorator that gives a command one option for each field of the dataclass `cls`, with the field's help text.

    The command receives them as keyword arguments. Parameters that the command declares itself take precedence. Fields
    that a command line can't hold, such as tables, are left out.

        @app.command()
        @options_of(ConvertStage)
        def convert(force: Force = False, **options: Any) -> None: ...
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [f for f in dataclasses.fields(cls) if f.name not in {p.name for p in own}]
        hints = typing.get_type_hints(cls)
        made = [_parameter(field, type_) for field in fields if (type_ := option_type(hints[field.name]))]
        # Those that are required come first, then the dataclass's; the command's own switches are last.
        parameters = [p for p in [*own, *made] if p.default is p.empty]
        parameters += [p for p in [*made, *own] if p.default is not p.empty]
        parameters = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in parameters]

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            return command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # typer would read the command's own annotations
        return run

    return decorate


def option_type(hint: Any) -> Any:
    """The command-line type of an option with this annotation; None if it can't be a command-line option.

    A choice of texts becomes a plain text. Building the dataclass refuses the wrong ones.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        type_ = str if str in inner else option_type(inner[0])
        return type_ | None if type_ and type(None) in arguments else type_
    if origin is Literal:
        return str
    if origin is list:
        return hint
    return hint if hint in (bool, int, float, str) else None


def _parameter(field: dataclasses.Field, type_: Any) -> inspect.Parameter:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return inspect.Parameter(
        field.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[type_, typer.Option(help=field.metadata.get("help"))],
    )
