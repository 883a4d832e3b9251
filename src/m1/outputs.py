"""Room for outputs: what is there already is refused or moved aside, never overwritten."""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from m1.errors import UserError
from m1.jsonl import read_json

MANIFEST = "manifest.json"  # what a finished run leaves, see runs.py

logger = logging.getLogger(__name__)


def refuse_sources(out: Path, sources: Iterable[str | Path]) -> None:
    """Raises UserError if `out` is one of the files and folders that are read, or contains one."""
    for source in map(Path, sources):
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{out} is the source itself, or holds it ({source}): choose another output")


def set_aside(path: Path) -> Path:
    """Renames a file or folder to PATH.replaced, or PATH.replaced-2 and so on. Logs a warning; returns the new path."""
    number, aside = 1, beside(path, "{}.replaced")
    while os.path.lexists(aside):
        number += 1
        aside = beside(path, f"{{}}.replaced-{number}")
    path.rename(aside)
    logger.warning("%s held %s; it is now %s", path, describe(aside), aside)
    return aside


def make_room(path: Path, command: str, mark: tuple[str, str] | None = None, force: bool = False) -> None:
    """Makes room for a result in one file. Commands call it before they work, so that a refusal costs no time.

    Args:
        path: the file. Its folder is created.
        command: name of the command that will write it, for error messages.
        mark: key and value that identify a JSON file as an earlier result of this command, which may be replaced.
            None for files without such a mark, such as plots.
        force: move any other file aside.

    Raises:
        UserError: the path is another file or a folder, or can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} isn't a regular file: choose another one")
    if path.is_file() and not (mark and _is_marked(path, *mark)):
        if not force:
            owner = f" and isn't a result of `m1 {command}`" if mark else ""
            raise UserError(f"{path} exists{owner}: choose another file, or give --force to move it aside")
        set_aside(path)


def describe(path: Path) -> str:
    """Describes what a path holds, for a message."""
    if not path.is_dir():
        return "a file"
    with suppress(UserError):
        if command := read_json(path / MANIFEST).get("command"):
            return f"finished `m1 {command}` output"
    names = sorted(child.name for child in path.iterdir())
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_empty_folder(path: Path) -> bool:
    """Whether it is a folder with nothing in it but empty folders."""
    return path.is_dir() and all(not child.is_symlink() and is_empty_folder(child) for child in path.iterdir())


def remove_empty_folder(path: Path) -> None:
    """Removes a folder with nothing in it but empty folders."""
    for child in path.iterdir():
        remove_empty_folder(child)
    path.rmdir()


def beside(path: Path, name: str) -> Path:
    """The sibling of this name, in which `{}` stands for the path's own name."""
    if path.name in ("", ".."):  # as in `.` and `..`
        path = path.resolve()
    if not path.name:
        raise UserError(f"{path} can't be an output: choose another one")
    return path.with_name(name.format(path.name))


def _is_marked(path: Path, key: str, value: str) -> bool:
    with suppress(UserError):
        return read_json(path).get(key) == value
    return False
