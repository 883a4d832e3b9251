"""Reads rows of data: a JSONL or Parquet file, a data set's folder, or a data set on the Hugging Face Hub."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from m1.errors import UserError
from m1.jsonl import read_jsonl

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")
FILE_ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".parquet")  # a name with such an ending means a file

PARQUET_ROWS = 256  # read at a time: bounds memory
T = TypeVar("T")


def read_rows(source: str, split: str, advice: str = "", streaming: bool = False) -> Iterable[dict[str, Any]]:
    """Reads a source's rows. Files are read as they are iterated, row by row.

    Args:
        source: a JSONL or Parquet file, or a data set for `datasets.load_dataset`: FOLDER[:split], or
            org/name[/config][@revision][:split] on the Hub.
        split: the default split of a data set.
        advice: begins the error message of a data set that can't be loaded.
        streaming: whether a data set is read from where it is, instead of through the cache of `datasets`.

    Raises:
        UserError: a source that can't be read; for a file, once it is iterated.
    """
    streamed = {"streaming": True} if streaming else {}
    folder, _, named = source.partition(":")
    if Path(folder).is_dir():
        return _dataset(folder, None, named or split, advice, **streamed)
    if not is_file(source) and (match := HUB_ID.fullmatch(source)):
        pinned = {"revision": match["revision"]} if match["revision"] else {}
        return _dataset(match["id"], match["config"], match["split"] or split, advice, **streamed, **pinned)
    if Path(source).is_file() and source.endswith(".parquet"):
        return _parquet(source)
    return read_jsonl(source)


def some_rows(source: str, rows: Iterable[T], skip: int, limit: int | None) -> Iterator[T]:
    """Yields the first `limit` rows after `skip` ones; all of them if None.

    Raises:
        UserError: there are none.
    """
    row = None
    for row in islice(rows, skip, None if limit is None else skip + limit):
        yield row
    if row is None:
        raise UserError(f"{source} has no rows" + (f" after the first {skip}" if skip else ""))


def is_file(source: str) -> bool:
    """Whether a source names a file, and not a data set."""
    return Path(source).is_file() or source.endswith(FILE_ENDINGS)


def _parquet(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"can't read {path}: {' '.join(str(error).split())}") from None


def _dataset(name: str, config: str | None, split: str, advice: str, **options: Any) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset  # takes a second, and JSONL files don't need it
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, config, split=split, **options)
    except (OSError, ValueError, DatasetsError) as error:  # no network, no such data set, config, split or format
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{advice}can't load the data set {name} ({text})") from None
