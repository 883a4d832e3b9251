"""The trainer's checkpoints: sealed when complete, checked before training resumes from one."""

import logging
import re
import zipfile
from pathlib import Path

from safetensors import safe_open
from transformers import TrainerState

from m1.errors import UserError
from m1.jsonl import read_json, write_json
from m1.model.checkpoint import one_line
from m1.options import fitted
from m1.runs import sha256

SEAL = "sha256.json"  # the sha256 of each of a checkpoint's files
STATE = "trainer_state.json"  # the trainer writes it last

logger = logging.getLogger(__name__)


def seal(checkpoint: Path) -> None:
    """Notes the hashes of a complete checkpoint's files."""
    write_json(checkpoint / SEAL, {name: sha256(checkpoint / name) for name in files_of(checkpoint)})


def files_of(checkpoint: Path) -> list[str]:
    """The checkpoint's files, without its seal. Sharded ones are in a folder of their own."""
    paths = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    return sorted(str(path) for path in paths if str(path) != SEAL)


def last_checkpoint(out: Path) -> str | None:
    """The newest intact checkpoint in OUT/checkpoints. None if none was ever completed.

    A damaged checkpoint is passed over, with a warning, for the one before.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    complete = [path.parent for path in out.glob(f"checkpoints/checkpoint-*/{STATE}")]
    complete = [path for path in complete if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    complete.sort(key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in complete:
        if not (problem := damage(path)):
            return str(path)
        logger.warning("%s is damaged (%s): training resumes from the checkpoint before", path, problem)
    if complete:
        raise UserError(f"{out} has no intact checkpoint ({problem}): delete {out} to start again")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is intact. One killed just before its seal must be readable."""
    try:
        with one_line("it can't be read"):
            fitted(TrainerState.load_from_json(str(checkpoint / STATE)).global_step, int, f"{STATE}: global_step")
            if not (checkpoint / SEAL).exists():
                return _unreadable(checkpoint)
            hashes = read_json(checkpoint / SEAL)
            changed = [name for name, digest in hashes.items() if sha256(checkpoint / name) != digest]
            return f"{changed[0]} isn't what was saved" if changed else None
    except UserError as error:
        return str(error)


def _unreadable(checkpoint: Path) -> str | None:
    """The first file of tensors that is damaged."""
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth") and zipfile.ZipFile(path).testzip():
            return f"{path.name} is damaged"
    return None
