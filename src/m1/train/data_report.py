"""A report on prepared rows: what a stage will train on, with one row and its trained tokens marked."""

from itertools import groupby, islice
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from m1.train.data_cache import Preparation, Prepared
from m1.train.data_mask import IGNORED

MOST_SHOWN = 400  # characters of a span of trained or other tokens


def report(prepared: Prepared, preparation: Preparation, samples: int = 1) -> str:
    """Counts of a stage's rows, and the first ones as text."""
    lines = [_counts(prepared, preparation.max_length), "trained tokens stand between ⟦ and ⟧:"]
    rows = islice(iter(prepared.rows), samples)
    return "\n".join([*lines, *(marked(preparation.encoder.tokenizer, row) for row in rows)])


def marked(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    """The text of a row with its trained tokens between ⟦ and ⟧. Long spans are shortened."""
    text = ""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for trained, span in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        part = _shortened(tokenizer.decode([token for token, _ in span]))
        text += f"⟦{part}⟧" if trained else part
    return text


def _counts(prepared: Prepared, max_length: int) -> str:
    counts = prepared.counts
    if isinstance(prepared.rows, IterableDataset):
        return f"a stream of rows of at most {max_length:,} tokens; longer ones are reported when they come"
    mixed = len(prepared.rows)
    excluded = f", {counts.excluded:,} excluded, which are in a benchmark" if counts.excluded else ""
    return (
        f"{counts.rows:,} rows{f', {mixed:,} as weighted' if mixed != counts.rows else ''}, {counts.tokens:,} tokens, "
        f"{counts.trained / counts.tokens:.1%} trained; the longest row has {counts.longest:,} of at most "
        f"{max_length:,} tokens; {counts.cut:,} rows cut, {counts.dropped:,} dropped{excluded}"
    )


def _shortened(text: str) -> str:
    half = MOST_SHOWN // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}"
