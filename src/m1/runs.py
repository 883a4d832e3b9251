"""Protects outputs: a command never overwrites, deletes or appends to what another command made.

`Run` is a resumable output folder. Besides the command's own files it holds:

    settings.json   the command, and everything that its results depend on; written first
    seconds.json    time spent so far, over all sessions, while the run is unfinished
    manifest.json   settings, seconds, versions, git commit, and what the command adds; written last, so a run with a
                    manifest is finished
    .lock           locked by the process that writes to the run

A command that writes one file, such as samples.jsonl, keeps these in a folder next to it, samples.jsonl.run.
`new_folder` is for output that is written as a whole: to a hidden folder next to it, which is then renamed.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from m1.errors import UserError
from m1.jsonl import append_jsonl, drop_torn_line, read_json, read_jsonl, write_json
from m1.options import check_count, fitted
from m1.outputs import MANIFEST, beside, describe, is_empty_folder, refuse_sources, remove_empty_folder, set_aside
from m1.secrets import redact_settings

if TYPE_CHECKING:
    from filelock import FileLock

SETTINGS, SECONDS, LOCK = "settings.json", "seconds.json", ".lock"
BOOKKEEPING = {form for name in (SETTINGS, SECONDS, MANIFEST, LOCK) for form in (name, f".{name}.part")}
PACKAGES = ("m1-reasoning", "math-verify", "torch", "transformers", "trl", "accelerate")
SHOWN = 60  # maximum number of characters of a setting in an error message


class Run:
    """A resumable output folder of a command, locked while it is open.

    If it already holds an unfinished run of the same command with the same settings, that run resumes.

        with Run("eval", out, settings) as run:
            rows = run.read("samples.jsonl", {"problem": str, "round": int})  # rows of earlier sessions
            run.append("samples.jsonl", row)
            run.finish()

    Args:
        command: name of the command that owns the output, e.g. "eval".
        out: the output folder; with `is_file` the output file. The run folder is then OUT.run.
        settings: what the results depend on; must be JSON. Secrets in it are removed.
        resume: False to delete an unfinished run, whatever its command and settings.
        force: move `out` aside, unless it is an unfinished run with these settings, which resumes.
        ranks: torchrun opens the run in several processes.

    Attributes:
        folder: the folder of this run's files.
        writes: whether this process writes. With `ranks`, torchrun's first process (RANK 0) does, and in the others
            entering, reading, appending, clearing and finishing change nothing.
        begun: whether an earlier session left something to resume from.
        finished: whether an earlier session finished the run.

    Raises:
        UserError: on entering, if `out` holds something else, was made with other settings, is in use by another
            process, or can't be written.
    """

    def __init__(
        self,
        command: str,
        out: str | Path,
        settings: Mapping[str, Any],
        *,
        is_file: bool = False,
        resume: bool = True,
        force: bool = False,
        ranks: bool = False,
    ):
        self.command, self.out, self.is_file = command, Path(out), is_file
        self.folder = run_folder(out, is_file)
        self.settings = _plain(settings)
        self.resume, self.force = resume, force
        self.writes = not ranks or os.environ.get("RANK", "0") == "0"

    def __enter__(self) -> "Run":
        if not self.writes:
            self._look()
            return self
        try:
            if conflict := self.conflict():
                if not self.force:
                    raise UserError(f"{conflict}: choose another output, or give --force to move it aside")
                self._set_aside()
            elif self.force and (self.folder / MANIFEST).exists():
                self._set_aside()
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.out, self.folder)
            try:
                self._begin()
            except BaseException:
                try:
                    if not self._contents():
                        self._leave_nothing()
                finally:
                    self._lock.release()
                raise
        except OSError as error:
            raise UserError(f"can't write to {self.out}: {error.strerror or error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if not self.writes:
            return
        try:
            if not self._contents():
                self._leave_nothing()
            elif not (self.folder / MANIFEST).exists():
                with suppress(UserError):  # on a full disk, the error that ended the run is more important
                    write_json(self.folder / SECONDS, {"seconds": self.seconds})
        finally:
            self._lock.release()

    @property
    def seconds(self) -> float:
        """Time spent in this run so far, over all sessions that could store theirs."""
        return self._seconds_before + time.monotonic() - self._opened

    def read(self, name: str, types: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the rows of a JSONL file of this run, none if there is no file. Removes an incomplete last line.

        Args:
            name: the file's name.
            types: keys that every row must have, with the type hint of each value. Integers must be counts
                (`check_count`).

        Raises:
            UserError: a line isn't a JSON object with these keys, or has a value of another type.
        """
        path = self._path(name)
        if not path.exists():
            return []
        if self.writes:
            drop_torn_line(path)
        rows = list(read_jsonl(path))
        for number, row in enumerate(rows, start=1):
            if missing := [key for key in types if key not in row]:
                raise UserError(f"{path}, line {number}: has no {missing[0]!r}; delete the line or the output")
            for key, hint in types.items():
                where = f"{path}, line {number}: {key}"
                if type(fitted(row[key], hint, where)) is int:
                    check_count(row[key], where)
        return rows

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends a row to a JSONL file of this run. It survives if the process dies afterwards."""
        if self.writes:
            append_jsonl(self._path(name), [dict(row)])

    def clear(self, *names: str) -> None:
        """Deletes files and folders that earlier sessions of this run made: those of these names, or all of them."""
        if not self.writes:
            return
        contents = [self.folder / name for name in names] if names else self._contents()
        for path in [self.folder / MANIFEST, *contents]:  # without its manifest, the rest never counts as finished
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    def finish(self, **facts: Any) -> None:
        """Writes the manifest, which marks the run as finished. Write everything else before.

        Args:
            facts: what else the manifest says, by key.
        """
        if not self.writes:
            return
        manifest = {
            "command": self.command,
            "settings": self.settings,
            "seconds": round(self.seconds, 1),
            "versions": versions(),
            "git_commit": _git_commit(),
            **facts,
        }
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / SECONDS).unlink(missing_ok=True)

    def conflict(self) -> str | None:
        """Why this run may not write to `out`; None if it may."""
        contents = self._contents()
        if not contents or self._abandoned():
            return None
        stored = self._stored()
        if stored is None:
            if contents == [self.out]:
                return f"{self.out} exists and isn't `m1 {self.command}` output"
            names = ", ".join(path.name for path in contents[:3]) + (", ..." if len(contents) > 3 else "")
            return f"{self.out} holds files that aren't `m1 {self.command}` output ({names})"
        if not self.resume:
            return None
        if (owner := stored.pop("command")) != self.command:
            return f"{self.out} holds `m1 {owner}` output"
        if difference := _difference(stored, self.settings):
            return f"{self.out} holds `m1 {self.command}` output of other settings ({difference})"
        return None

    def _begin(self) -> None:
        """Starts the session, with the lock held. Checks again, because another process may have written."""
        if conflict := self.conflict():
            raise UserError(f"{conflict}: choose another output")
        if not self.resume or self._abandoned():
            self.clear()
        self._look()
        write_json(self.folder / SETTINGS, {"command": self.command} | self.settings)

    def _look(self) -> None:
        """Notes what earlier sessions did."""
        self.begun = bool(self._contents())
        self.finished = (self.folder / MANIFEST).exists()
        known = [self.folder / name for name in (MANIFEST, SECONDS) if (self.folder / name).exists()]
        self._seconds_before = _seconds(known[0]) if self.begun and known else 0.0
        self._opened = time.monotonic()

    def _stored(self) -> dict[str, Any] | None:
        """The content of settings.json; None if there is none, or if it isn't a run's."""
        with suppress(UserError):
            stored = read_json(self.folder / SETTINGS)
            return stored if isinstance(stored.get("command"), str) else None
        return None

    def _contents(self) -> list[Path]:
        """What would be lost with the output: its files and folders, except this module's own and empty folders."""
        own = BOOKKEEPING if self._stored() else BOOKKEEPING - {SETTINGS, SECONDS, MANIFEST}
        inside = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        contents = [path for path in inside if path.name not in own and not is_empty_folder(path)]
        misfit = self.out.exists() and (self.is_file or not self.out.is_dir())
        return [self.out, *contents] if misfit else contents

    def _abandoned(self) -> bool:
        """Whether the finished output was deleted, so that only this run's own files are left."""
        left = self.out.exists() if self.is_file else self._contents()
        return not left and self._stored() is not None and (self.folder / MANIFEST).exists()

    def _leave_nothing(self) -> None:
        if not self.folder.exists():  # `new_folder` has renamed or deleted it
            return
        own = BOOKKEEPING if self._made else BOOKKEEPING - {LOCK} if self._stored() else set()
        for name in sorted(own, key=SETTINGS.__eq__):  # settings.json last: it says whose the others are
            (self.folder / name).unlink(missing_ok=True)
        if self._made:
            remove_empty_folder(self.folder)

    def _set_aside(self) -> None:
        _refuse_busy(self.out, self.folder)
        for path in {self.out, self.folder}:
            if path.exists():
                set_aside(path)

    def _path(self, name: str) -> Path:
        return self.out if self.is_file and name == self.out.name else self.folder / name


def _seconds(path: Path) -> float:
    """The time that a manifest or seconds.json holds."""
    return fitted(read_json(path).get("seconds", 0.0), float, f"{path}: seconds")


def run_folder(out: str | Path, is_file: bool) -> Path:
    """The folder of a run's own files: the output itself, or OUT.run next to an output file."""
    return beside(Path(out), "{}.run") if is_file else Path(out)


def finished(command: str, out: str | Path, settings: Mapping[str, Any], is_file: bool = False) -> bool:
    """Whether `out` holds a finished run with these settings. `settings` may be a part of the run's settings.

    Raises:
        UserError: `out` was finished by another command, or with other settings.
    """
    folder = run_folder(out, is_file)
    if not Path(out).exists() or not (folder / MANIFEST).exists():
        return False
    manifest = read_json(folder / MANIFEST)
    if manifest.get("command") != command:
        raise UserError(f"{out} holds finished `m1 {manifest.get('command')}` output: choose another output")
    stored = fitted(manifest.get("settings", {}), dict[str, Any], f"{folder / MANIFEST}: settings")
    if difference := _difference(stored, _plain(settings)):
        raise UserError(
            f"{out} was made with other settings ({difference}): to make it again, delete it and what was made from it"
        )
    return True


@contextmanager
def new_folder(
    command: str, out: str | Path, settings: Mapping[str, Any], sources: Iterable[str | Path] = (), force: bool = False
) -> Iterator[Path]:
    """Yields a new folder to write to. When the context ends without an error, it gets a manifest and becomes `out`.

    Until then `out` doesn't change. After an error the new folder is deleted.

    Args:
        command: name of the command that owns the output.
        out: the output folder.
        settings: what the output depends on; must be JSON.
        sources: files and folders that are read. `out` must not be one of them or contain one.
        force: move existing output aside.

    Raises:
        UserError: `out` holds something, is or contains a source, is being written by another process, or can't be
            written.
    """
    out = Path(out)
    refuse_sources(out, sources)
    if is_empty_folder(out):
        out = out.resolve()  # a link to an empty folder stays one
    occupied = os.path.lexists(out) and not is_empty_folder(out)
    if occupied and not force:
        raise UserError(f"{out} holds {describe(out)}: choose another output, or give --force to move it aside")
    part = beside(out, ".{}.part")
    try:
        with Run(command, part, settings, resume=False) as run:
            try:
                yield part
                run.finish()
                if occupied:
                    _refuse_busy(out, out)
                    set_aside(out)
                elif out.exists():
                    remove_empty_folder(out)
                part.rename(out)  # with the lock, so that no other process can begin to write into it
                (out / LOCK).unlink()
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write to {out}: {getattr(error, 'strerror', None) or error}") from None


def refuse_foreign(command: str, out: str | Path, is_file: bool = False) -> None:
    """Raises UserError if `out` holds anything but this command's output, of any settings."""
    if conflict := Run(command, out, {}, is_file=is_file).conflict():
        raise UserError(f"{conflict}: choose another output, or move it aside, as --force does")


def versions() -> dict[str, str]:
    """The versions of M1 and of the packages that results depend on."""
    import importlib.metadata  # half of what `m1 --help` would import

    return {name: importlib.metadata.version(name) for name in PACKAGES}


def sha256(path: str | Path) -> str | None:
    """The sha256 of a file's content; None if there is no such file. Its reader reports the missing file."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON stores them, without secrets."""
    return redact_settings(json.loads(json.dumps(settings, default=str)))


def _difference(stored: Mapping[str, Any], current: Mapping[str, Any], where: str = "") -> str | None:
    """Describes the first setting that differs; None if all agree. Settings that only `stored` has don't count."""
    for key, now in current.items():
        then = stored.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            absent = dict.fromkeys(then.keys() - now.keys())
            if found := _difference(then, now | absent, f"{where}{key}."):
                return found
        elif then != now:
            if key.endswith("sha256") or max(len(str(then)), len(str(now))) > SHOWN:
                return f"{where}{key.removesuffix('_sha256')}: not the same"
            return f"{where}{key}={then}, now {now}"
    return None


def _lock(out: Path, folder: Path) -> "FileLock":
    from filelock import FileLock, Timeout  # imports asyncio, which would double the time of `m1 --help`

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{out} is in use by another process: wait until it ends") from None
    return lock


def is_busy(folder: Path) -> bool:
    """Whether another process writes to this run folder."""
    try:
        _refuse_busy(folder, folder)
    except UserError:
        return True
    return False


def _refuse_busy(out: Path, folder: Path) -> None:
    """Raises UserError while another process writes to this folder."""
    if (folder / LOCK).is_file():
        _lock(out, folder).release()


def _git_commit() -> str | None:
    import subprocess

    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
