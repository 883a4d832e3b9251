"""Saving figures."""

from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure

from m1.errors import UserError


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure to a file, which is replaced in one step. The file's ending determines the format.

    Raises:
        UserError: the file can't be written, or the format is unknown.
    """
    draft = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        figure.savefig(draft)
        draft.replace(path)
    except (ValueError, OSError) as error:
        with suppress(OSError):
            draft.unlink()
        raise UserError(f"can't write the plot to {path}: {error}") from None
