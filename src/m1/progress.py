"""Progress of long work: types for callbacks. The command line draws bars; calls from Python are silent by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

OnProgress = Callable[[int, int], None]  # called with (done, total)
Progress = Callable[[str, str], AbstractContextManager[OnProgress]]  # made with (what, unit), e.g. ("gsm8k", "samples")


def ignore(done: int, total: int) -> None:
    """An OnProgress that does nothing."""


@contextmanager
def silent(what: str, unit: str) -> Iterator[OnProgress]:
    """A Progress that shows nothing. It yields `ignore`."""
    yield ignore
