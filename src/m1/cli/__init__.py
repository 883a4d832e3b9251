"""The command line `m1`.

Each file holds a group of commands. arguments.py makes options from dataclasses, and render.py prints. Importing this
package loads neither torch nor transformers: a command imports its libraries, and what prints, when it runs.
"""

import importlib
import io
import logging
import os
import sys
import threading
import warnings
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

import m1
from m1.cli import data, doctor, evaluate, generate, model, serve, train
from m1.errors import M1Warning, UserError, is_panic
from m1.text import clean_logs, encodable


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
for group in (model.app, train.app, generate.app, serve.app, doctor.app):
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
    """Runs `m1`. Bad input and I/O errors end it with one line on stderr and exit code 2, Ctrl-C with one and 130."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    clean_logs()
    warnings.showwarning = show_warning
    threading.excepthook = thread_failed
    logger = logging.getLogger("m1")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.handlers = [LogHandler()]
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_arguments(sys.argv[1:])
        status = app(prog_name="m1", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
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


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Prints an I/O error in a library's thread, such as TensorBoard's, on one line."""
    from m1.cli import render

    if isinstance(failure.exc_value, OSError):
        render.warning(io_error(failure.exc_value))
    else:
        threading.__excepthook__(failure)


def io_error(error: OSError) -> str:
    """What couldn't be read or written, and why."""
    where = error.filename if error.filename is not None else "the output"
    return f"can't read or write {where}: {error.strerror or error}"


def check_arguments(arguments: list[str]) -> None:
    """Raises UserError for an argument that isn't text in the locale's encoding."""
    if bad := [argument for argument in arguments if not encodable(argument)]:
        raise UserError(f"the argument {bad[0]!r} isn't UTF-8 text: type it again, or rename the file")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch raises an OutOfMemoryError on GPUs, and a RuntimeError on CPUs."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error) or "Storage size calculation overflowed" in str(error)


def refused(error: BaseException) -> int:
    """Prints why a command ended and returns the exit code. A fault of the program itself is a traceback and 1."""
    from m1.cli import render

    if isinstance(error, BrokenPipeError):  # whoever reads the output has left, and nothing more can be said
        sys.stdout = None  # type: ignore[assignment]  # Python would flush it, and fail again
        return 1
    if isinstance(error, UserError):
        render.error(error)
    elif isinstance(error, OSError):
        render.error(io_error(error))
    elif is_panic(error):
        render.error(f"a tokenizer fails on this text ({error}): check the checkpoint's tokenizer.json")
    elif is_out_of_memory(error):
        render.error(f"not enough memory ({str(error).partition(chr(10))[0] or 'of the process'}): give smaller sizes")
    elif isinstance(error, UsageError):  # type: ignore[arg-type]
        render.usage_error(error)
    else:
        import traceback

        render.line("".join(traceback.format_exception(error)), to=render.errors)
        return 1
    return BAD_INPUT
