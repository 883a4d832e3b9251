"""Reads and writes JSON and JSON Lines. Reading is strict. Whole files are replaced in one step.

`parse_json` is the one door for JSON of others: files, and the answers of servers.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.options import MAX_SHOWN
from m1.text import encodable

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: it isn't JSON, is nested too deeply, or holds a number that is too long or half a character. The
            message is one line.
    """
    try:
        value = json.loads(text)
        if SURROGATE.search(text) and not encodable(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half a character (a lone surrogate) in its text")
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON ({error.msg} at {where})") from None
    except RecursionError:
        raise ValueError("not JSON that M1 reads (nested too deeply)") from None
    return value


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields one object per line and skips blank lines. Raises UserError naming a line that isn't a JSON object."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            yield from _parsed(path, file)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield row


@contextmanager
def as_written(where: str | Path) -> Iterator[None]:
    """Around the use of files that M1 wrote and others can change: what they lack becomes a UserError.

    Raises:
        UserError: the use of their content failed. The message begins with `where`; the cause is kept.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"[:MAX_SHOWN]
        raise UserError(f"{where} isn't as this version of M1 writes it ({what}): make it again") from error


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows, one per line. A run that resumes calls `drop_torn_line` first.

    Raises:
        UserError: the file can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(to_jsonl(rows))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from None


def to_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """The text of a JSONL file with these rows."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_torn_line(path: Path) -> None:
    """Removes a last line without a newline, left by a process that died while it wrote."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_json(path: str | Path, if_missing: str = "check the path") -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError for a malformed file, or a missing one, with that advice."""
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {if_missing}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Replaces the file in one step: a reader sees the old content or the new, never a part.

    Raises:
        UserError: the file can't be written.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Replaces a text file in one step, as `write_json`. Raises UserError if the file can't be written."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise UserError(f"can't write {path}: {error.strerror or error}") from None
