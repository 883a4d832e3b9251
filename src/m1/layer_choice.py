"""Chooses which layers stay attention: named ones, evenly spaced ones, or the first of a measured ranking."""

import re
from collections.abc import Sequence
from pathlib import Path

from m1.errors import UserError
from m1.jsonl import read_json

RANKED = re.compile(r"@(?P<file>.+):(?P<count>\d+)")
NONE = "none"
NAMED = re.compile(r"(\s*\d+\s*(-\s*\d+\s*)?,)*(\s*\d+\s*(-\s*\d+\s*)?)?")


def choose_layers(layers: int, keep_attention: str | Sequence[int] | None, attention_ratio: float | None) -> list[int]:
    """Returns the layers that stay attention in a model of `layers` layers. Give one of the other two arguments.

    Args:
        keep_attention: layer numbers from 0, as a list or as "1,3,8-11", where a range includes its end; "none"; or
            "@FILE:COUNT", the first COUNT layers of a ranking written by `m1 rank-layers`.
        attention_ratio: share of the layers that stay attention, evenly spaced.

    Raises:
        UserError: as `check_choice`, and for a ranking that doesn't fit.
    """
    check_choice(keep_attention, attention_ratio)
    if attention_ratio is not None:
        return evenly_spaced(layers, attention_ratio)
    if not isinstance(keep_attention, str):
        return list(keep_attention)  # type: ignore[arg-type]  # not None: one of the two was given
    if keep_attention == NONE:
        return []
    if ranked := RANKED.fullmatch(keep_attention):
        return from_ranking(Path(ranked["file"]), int(ranked["count"]), layers)
    return [layer for part in keep_attention.split(",") if part.strip() for layer in _range(part)]


def check_choice(keep_attention: str | Sequence[int] | None, attention_ratio: float | None) -> None:
    """Checks the arguments of `choose_layers` that don't depend on the teacher.

    Raises:
        UserError: both or neither given, an empty list, text in the wrong form, a ratio outside (0, 1].
    """
    if (keep_attention is None) == (attention_ratio is None):
        raise UserError("give either keep_attention (which layers) or attention_ratio (their share)")
    if attention_ratio is not None and not 0 < attention_ratio <= 1:
        raise UserError(f"attention_ratio {attention_ratio}: expected a share of the layers, above 0 and at most 1")
    if keep_attention is not None and not keep_attention:
        raise UserError(
            "keep at least one attention layer, because transformers' caches count positions in attention layers; to "
            f"align a mixer in every layer, give {NONE}"
        )
    forms = (RANKED.fullmatch, NAMED.fullmatch, NONE.__eq__)
    if isinstance(keep_attention, str) and not any(matches(keep_attention) for matches in forms):
        raise UserError(
            f"keep_attention {keep_attention!r}: expected layer numbers or ranges separated by commas, e.g. 1,3,8-11, "
            f"@FILE:COUNT, e.g. @ranking.json:6, or {NONE}"
        )


def _range(part: str) -> range:
    """The layers of "3", or of "8-11", which includes 11. Raises UserError for a range that runs backwards."""
    first, _, last = part.partition("-")
    layers = range(int(first), int(last or first) + 1)
    if not layers:
        raise UserError(f"keep_attention {part.strip()!r}: a range begins with its lower layer, e.g. 8-11")
    return layers


def ranking_file(keep_attention: str | Sequence[int] | None) -> Path | None:
    """The FILE of a choice "@FILE:COUNT"; None for other choices."""
    ranked = RANKED.fullmatch(keep_attention) if isinstance(keep_attention, str) else None
    return Path(ranked["file"]) if ranked else None


def evenly_spaced(layers: int, ratio: float) -> list[int]:
    """Evenly spaced layers, a share `ratio` of all but at least one: the last layers of stretches of equal length."""
    count = max(1, round(ratio * layers))
    return [(i + 1) * layers // count - 1 for i in range(count)]


def from_ranking(path: Path, count: int, layers: int) -> list[int]:
    """The `count` most costly layers of a ranking. Raises UserError if it is unfinished or of another teacher."""
    ranking = read_json(path).get("ranking")
    if not isinstance(ranking, list) or not all(type(layer) is int for layer in ranking):
        raise UserError(f"{path} has no finished ranking: run `m1 rank-layers` to its end")
    if len(ranking) != layers or set(ranking) != set(range(layers)):
        raise UserError(
            f"{path} ranks the layers {ranking}, but this teacher has 0 to {layers - 1}: use a ranking of this teacher"
        )
    if not 1 <= count <= layers:
        raise UserError(f"{path}: {count} layers to keep of {layers}")
    return sorted(ranking[:count])
