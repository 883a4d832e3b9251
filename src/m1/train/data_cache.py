"""Prepared training rows: tokenized, masked, filtered by length, and kept on disk for other ranks and later starts.

The folder m1/KEY of the cache of `datasets` ($HF_DATASETS_CACHE) holds the rows of one source:

    rows.arrow     input_ids and labels, int32, mapped into memory when they are read
    lengths.npy    int32, the tokens of all rows that aren't excluded, before any was dropped or cut
    counts.json    written last: a folder with it is complete

KEY is a hash of all that the rows depend on: content, template, tokenizer, options, and the code that prepares them.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from datasets.utils import tqdm
from filelock import FileLock

from m1.data_options import Data
from m1.errors import UserError
from m1.jsonl import read_json, write_json
from m1.model import tokenizer as model_tokenizer
from m1.runs import sha256
from m1.tasks import overlap
from m1.tasks.overlap import Overlap
from m1.tasks.rows import is_file
from m1.train import data as data_module
from m1.train import data_mask
from m1.train.data import bucketed, conversations, json_hash, open_source
from m1.train.data_mask import IGNORED, ChatEncoder, Conversation, Example

logger = logging.getLogger(__name__)

COUNTS, LENGTHS, ROWS = "counts.json", "lengths.npy", "rows.arrow"
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
# Options that choose and order sources. All others may change a source's rows, and with them the folder.
OF_SOURCES = (
    "path", "weights", "task", "count", "slip_rate", "seed", "min_steps", "max_steps", "period", "streaming", "bucket",
)  # fmt: skip
BATCH_ROWS = 128  # tokenized together, by all cores; bounds memory
SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled together


@dataclass
class Counts:
    """What became of a source's rows.

    Attributes:
        rows: rows to train on.
        excluded: rows that are in an excluded benchmark.
        dropped, cut: rows longer than the maximum.
        longest: tokens of the longest row, before any was dropped or cut.
        tokens: tokens of the rows to train on.
        trained: those of them that count in the loss.
    """

    rows: int = 0
    excluded: int = 0
    dropped: int = 0
    cut: int = 0
    longest: int = 0
    tokens: int = 0
    trained: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Counts(**sums | {"longest": max(self.longest, other.longest)})


@dataclass(frozen=True)
class Prepared:
    """The rows that a stage trains on.

    Attributes:
        rows: `input_ids` and `labels`.
        counts: of all sources; zeros for a stream.
        lengths: int32, the tokens of all rows before any was dropped or cut; none for a stream.
    """

    rows: Dataset | IterableDataset
    counts: Counts
    lengths: np.ndarray


@dataclass(frozen=True)
class Preparation:
    """Turns the rows of sources into training rows.

    Args:
        data: where they come from.
        encoder: tokenizes them.
        max_length: maximum number of tokens per row.
    """

    data: Data
    encoder: ChatEncoder
    max_length: int

    def run(self) -> Prepared:
        """Prepares all sources and mixes them.

        Raises:
            UserError: as `conversations` and `ChatEncoder.encode`, or a source of which no row is left, or a cache
                that can't be written.
        """
        if self.data.streaming:
            streams = [IterableDataset.from_generator(self._stream, FEATURES, {"source": s}) for s in self.data.sources]
            shuffled = self._mixed(streams).shuffle(seed=self.data.seed, buffer_size=SHUFFLE_BUFFER)
            return Prepared(shuffled, Counts(), np.empty(0, np.int32))
        parts = [self._cached(source) for source in self.data.sources]
        rows = self._mixed([part.rows for part in parts])
        if self.data.bucket:
            rows = rows.select(bucketed(_lengths(rows), self.data.bucket, self.data.seed))
        counts = sum((part.counts for part in parts), Counts())
        return Prepared(rows, counts, np.concatenate([part.lengths for part in parts]))

    @cached_property
    def _overlaps(self) -> Overlap:
        return Overlap.of(self.data.exclude)

    def _mixed(self, parts: list[Any]) -> Any:
        if len(parts) == 1:
            return parts[0]
        if not self.data.weights and not self.data.streaming:
            return concatenate_datasets(parts).shuffle(seed=self.data.seed)
        weights = self.data.weights or [1] * len(parts)
        shares = [weight / sum(weights) for weight in weights]
        until = "all_exhausted" if self.data.weights else "all_exhausted_without_replacement"
        return interleave_datasets(parts, shares, seed=self.data.seed, stopping_strategy=until)

    def _cached(self, source: str) -> Prepared:
        """The rows of a source, from the cache or prepared into it."""
        raw, content = open_source(self.data, source)
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "m1" / self._key(content)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # the first rank prepares, the others wait
                if not (folder / COUNTS).exists():
                    try:
                        self._write(folder, source, raw)
                    except BaseException:
                        (folder / ROWS).unlink(missing_ok=True)  # it may be large, and nobody would ask for it again
                        raise
        except OSError as error:
            raise UserError(f"can't write to {folder} ({error.strerror or error}): set HF_DATASETS_CACHE") from None
        counts = Counts(**read_json(folder / COUNTS))
        if not counts.rows:
            if counts.excluded:
                raise UserError(
                    f"{source}: no row is left: {counts.excluded} are in {', '.join(self.data.exclude)}, and "
                    f"{counts.dropped} are longer than max_length = {self.max_length}"
                )
            raise UserError(
                f"{source}: none of {counts.dropped} rows is left: all are longer than max_length = {self.max_length}, "
                f"up to {counts.longest} tokens; raise max_length in [trainer], or set overlong = 'cut' in [data]"
            )
        return Prepared(Dataset.from_file(str(folder / ROWS)), counts, np.load(folder / LENGTHS, mmap_mode="r"))

    def _write(self, folder: Path, source: str, raw: Iterator[dict[str, Any]]) -> None:
        counts, lengths = Counts(), list[np.ndarray]()
        schema = FEATURES.arrow_schema
        with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            shown = tqdm(raw, desc=f"Preparing {source}", unit=" rows", disable=None)
            for batch in self._batches(source, shown, counts):
                kept = [fitted for example in batch if (fitted := self._fitted(example, counts))]
                columns = {f.name: pa.array([getattr(e, f.name) for e in kept], f.type) for f in schema}
                writer.write_table(pa.table(columns, schema))
                lengths.append(np.array([len(example.input_ids) for example in batch], np.int32))
        np.save(folder / LENGTHS, np.concatenate([*lengths, np.empty(0, np.int32)]))
        write_json(folder / COUNTS, vars(counts))

    def _stream(self, source: str) -> Iterator[dict[str, np.ndarray]]:
        counts, reported = Counts(), 0
        for batch in self._batches(source, open_source(self.data, source)[0], counts):
            yield from (vars(fitted) for example in batch if (fitted := self._fitted(example, counts)))
            if counts.dropped + counts.cut >= 2 * reported + 1:  # a line for 1, 3, 7, ...
                reported = counts.dropped + counts.cut
                logger.warning(
                    "%s: %d of the rows so far are longer than %d tokens: %d cut, %d dropped",
                    source, reported, self.max_length, counts.cut, counts.dropped,
                )  # fmt: skip

    def _batches(self, source: str, raw: Iterator[dict[str, Any]], counts: Counts) -> Iterator[list[Example]]:
        def is_kept(row: Conversation) -> bool:
            excluded = any(self._overlaps(message["content"]) for message in row.messages if message["role"] == "user")
            counts.excluded += excluded
            return not excluded

        rows = filter(is_kept, conversations(self.data, source, raw))
        while batch := list(islice(rows, BATCH_ROWS)):
            yield self.encoder.encode(batch)

    def _fitted(self, example: Example, counts: Counts) -> Example | None:
        """The example, counted, and cut if it has to be; None if it is dropped."""
        length = len(example.input_ids)
        counts.longest = max(counts.longest, length)
        if length > self.max_length:
            example = Example(example.input_ids[: self.max_length], example.labels[: self.max_length])
            if self.data.overlong == "drop" or (example.labels == IGNORED).all():
                counts.dropped += 1
                return None
            counts.cut += 1
        counts.rows += 1
        counts.tokens += len(example.input_ids)
        counts.trained += int((example.labels != IGNORED).sum())
        return example

    def _key(self, content: str | None) -> str:
        tokenizer = self.encoder.tokenizer
        code = [module.__file__ for module in (data_module, data_mask, overlap, model_tokenizer)] + [__file__]
        return json_hash(
            {
                "content": content,
                "data": {name: value for name, value in asdict(self.data).items() if name not in OF_SOURCES},
                "exclude": [sha256(path) if is_file(path) else path for path in self.data.exclude],
                "max_length": self.max_length,
                "assistant_only": self.encoder.assistant_only,
                "chat_template": tokenizer.chat_template,
                "special_tokens": tokenizer.special_tokens_map,
                "tokenizer": json_hash(tokenizer.backend_tokenizer.to_str()),
                "code": [sha256(str(path)) for path in code],
                "versions": [transformers.__version__, tokenizers.__version__],
            }
        )[:32]


def _lengths(rows: Dataset) -> np.ndarray:
    """The tokens of each row."""
    batches = rows.with_format("arrow").iter(batch_size=1000)
    return np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches])
