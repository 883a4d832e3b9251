"""Which layers stay attention: named, evenly spaced, or the most costly to replace in a measured ranking."""

from collections.abc import Sequence
from pathlib import Path

from m1.errors import UserError
from m1.jsonl import read_json


def choose_layers(layers: int, keep_attention: str | Sequence[int] | None, attention_ratio: float | None) -> list[int]:
    """The layers that stay attention in a model of `layers` layers.

    Args:
        keep_attention: layer numbers, as a list or as "1,3"; or "@FILE:COUNT", the first COUNT of a ranking that
            `m1 rank-layers` wrote.
        attention_ratio: instead of it, the share of evenly spaced layers.

    Raises:
        UserError: both or neither given, text that is neither form, a ranking that doesn't fit.
    """
    if (keep_attention is None) == (attention_ratio is None):
        raise UserError("give either keep-attention (which layers) or attention-ratio (how many of them)")
    if attention_ratio is not None:
        return evenly_spaced(layers, attention_ratio)
    if not isinstance(keep_attention, str):
        return list(keep_attention or [])
    if keep_attention.startswith("@"):
        file, _, count = keep_attention[1:].rpartition(":")
        if not file or not count.isdecimal():
            raise UserError(f"keep-attention {keep_attention!r}: expected @FILE:COUNT, e.g. @ranking.json:6")
        return from_ranking(Path(file), int(count), layers)
    try:
        return [int(part) for part in keep_attention.split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"keep-attention {keep_attention!r}: expected layer numbers separated by commas, e.g. 1,3, or "
            "@FILE:COUNT, e.g. @ranking.json:6"
        ) from None


def evenly_spaced(layers: int, ratio: float) -> list[int]:
    """`ratio` of the layers, at least one: the last of each of as many equal stretches. UserError outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise UserError(f"an attention ratio of {ratio}: expected a share of the layers, above 0 and at most 1")
    count = max(1, round(ratio * layers))
    return [(i + 1) * layers // count - 1 for i in range(count)]


def from_ranking(path: Path, count: int, layers: int) -> list[int]:
    """The `count` layers that cost most to replace. Raises UserError where the file doesn't say that."""
    ranking = read_json(path).get("ranking")
    if ranking is None:
        raise UserError(f"{path} has no finished ranking: run `m1 rank-layers` on it to its end")
    if sorted(ranking) != list(range(layers)):
        raise UserError(
            f"{path} ranks {len(ranking)} layers, this teacher has {layers}: it was measured on another one"
        )
    if not 1 <= count <= layers:
        raise UserError(f"{path}: {count} layers to keep of {layers}")
    return sorted(ranking[:count])
