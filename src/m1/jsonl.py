"""JSON Lines, read strictly and written a line at a time; whole JSON files, replaced in one step."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from m1.errors import UserError


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """One object a line, blank lines skipped. Raises UserError naming the line that isn't one."""
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield row


def problem_and_golds(row: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """A row's `problem` and its `answers` (or its one `answer`) as strings. Raises UserError naming `where`."""
    golds = row.get("answers") or row.get("answer")
    golds = golds if isinstance(golds, list) else [golds]
    if not isinstance(row.get("problem"), str) or not all(isinstance(gold, str | int | float) for gold in golds):
        raise UserError(f"{where}: needs a text `problem` and `answer` (or a list `answers`); has {sorted(row)}")
    return row["problem"], [str(gold) for gold in golds]


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows, each on its own line. A run that goes on calls `drop_torn_line` once, first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_torn_line(path: Path) -> None:
    """Cuts a last line without its newline: the process died while writing it."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a missing or malformed one."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the folder of a Hugging Face checkpoint") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, it holds a {type(content).__name__}")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Writes beside the file and renames: a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
