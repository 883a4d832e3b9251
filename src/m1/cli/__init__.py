"""The command line `m1`.

Each file holds a group of commands. arguments.py makes options from dataclasses, and render.py prints. Importing this
package loads neither torch nor transformers: a command imports its libraries, and what prints, when it runs.
"""

import importlib
import logging
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

import m1
from m1.cli import data, evaluate, generate, model, serve, train
from m1.errors import M1Warning, UserError
from m1.secrets import redact_logs


class BenchGroup(TyperGroup):
    """The commands of bench.py, which are imported when one of them is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the benchmarks."""
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, None if there is none."""
        return self._loaded().get_command(ctx, cmd_name)

    def _loaded(self) -> Any:
        return get_group(importlib.import_module("m1.cli.bench").app)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes would take a third of the time of `m1 --help`
    help=m1.__doc__,
)
for group in (model.app, train.app, generate.app, serve.app):
    app.add_typer(group)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="eval")
app.command("budget")(evaluate.budget)
app.add_typer(
    typer.Typer(
        cls=BenchGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Measure kernels and decoding against peers and limits.",
    ),
    name="bench",
)

BAD_INPUT, INTERRUPTED = 2, 130  # 130 is the shell's exit code for Ctrl-C
UsageError = typer.BadParameter.__base__  # the parser's own, which typer doesn't export


def main() -> None:
    """Runs `m1`. Bad input ends it with one line on stderr and exit code 2, Ctrl-C with one line and 130."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    redact_logs()
    warnings.showwarning = show_warning
    logger = logging.getLogger("m1")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.handlers = [LogHandler()]
    try:
        status = app(prog_name="m1", standalone_mode=False)
    except Exception as error:
        status = refused(error)
    if status == INTERRUPTED:  # typer's code for a KeyboardInterrupt
        from m1.cli import render

        render.error("interrupted; finished work is saved: run it again to resume (a training stage with --resume)")
    sys.exit(status if isinstance(status, int) else 0)


class LogHandler(logging.Handler):
    """Prints M1's log on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        from m1.cli import render

        render.line(self.format(record), "yellow" if record.levelno > logging.INFO else None, render.errors)


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Prints M1's own warnings as one line on stderr, others as Python does."""
    from m1.cli import render

    if issubclass(category, M1Warning):
        render.warning(message)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def refused(error: Exception) -> int:
    """Prints why a command ended and returns the exit code. A fault of the program itself is a traceback and 1."""
    from m1.cli import render

    if isinstance(error, UserError):
        render.error(error)
    elif isinstance(error, UsageError):  # type: ignore[arg-type]
        render.usage_error(error)
    else:
        import traceback

        render.line("".join(traceback.format_exception(error)), to=render.errors)
        return 1
    return BAD_INPUT
