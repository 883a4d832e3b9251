"""Lists the runs that a folder holds: what each is, how far it got, and when."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from m1.errors import UserError
from m1.jsonl import parse_json, read_json
from m1.options import MAX_COUNT
from m1.outputs import MANIFEST
from m1.runs import SETTINGS, is_busy

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class PastRun:
    """A run found in a folder.

    Attributes:
        path: the run's output.
        stage: name of its command.
        state: finished, running (another process is writing to it) or interrupted.
        step: last logged step of training; None for other commands.
        max_steps: number of steps of the whole training, if its settings say so.
        loss: last logged loss.
        when: time of the last change.
    """

    path: Path
    stage: str
    state: Literal["finished", "running", "interrupted"]
    step: int | None
    max_steps: int | None
    loss: float | None
    when: datetime


def list_runs(folder: str | Path) -> list[PastRun]:
    """The runs in a folder and below it, the latest first. Raises UserError if there is no such folder."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} isn't a folder: give one that holds runs")
    return sorted(_found(Path(folder)), key=lambda run: run.when, reverse=True)


def _found(folder: Path) -> Iterator[PastRun]:
    for name, folders, files in os.walk(folder):
        folders[:] = [inner for inner in folders if inner != "checkpoints" and not inner.startswith(".")]
        if SETTINGS in files:
            with suppress(UserError, OSError):  # another program's settings, or a run that is being moved
                settings = read_json(Path(name) / SETTINGS)
                if isinstance(settings.get("command"), str):
                    yield _run(Path(name), settings)


def _run(path: Path, settings: dict[str, Any]) -> PastRun:
    steps = list(_steps(path / METRICS))
    known = [path / name for name in (SETTINGS, METRICS, MANIFEST)]
    finished = (path / MANIFEST).exists()
    trainer = settings.get("trainer")
    most = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return PastRun(
        path=path.with_suffix("") if path.suffix == ".run" else path,
        stage=settings["command"],
        state="finished" if finished else "running" if is_busy(path) else "interrupted",
        step=steps[-1]["step"] if steps else None,
        max_steps=most if type(most) is int else None,
        loss=next((row["loss"] for row in reversed(steps) if "loss" in row), None),
        when=datetime.fromtimestamp(max(file.stat().st_mtime for file in known if file.exists())),
    )


def _steps(metrics: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file. A line that is just being written is left out."""
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict) and type(row.get("step")) is int and abs(row["step"]) <= MAX_COUNT:
                    loss = row.get("loss")
                    yield {"step": row["step"]} | ({"loss": loss} if isinstance(loss, float) else {})
