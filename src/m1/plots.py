"""Saving figures."""

from pathlib import Path

from matplotlib.figure import Figure

from m1.errors import UserError


def save_figure(figure: Figure, path: Path) -> None:
    """Raises UserError where the file can't be written, or for a format that isn't known."""
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise UserError(f"can't write the plot to {path}: {error}") from None
