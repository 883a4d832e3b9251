"""A result folder holds the samples of one setting: others would be mixed into its metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1.errors import UserError
from m1.jsonl import read_json

SETTINGS = "settings.json"


def refuse_other_settings(
    out: Path, current: Mapping[str, Any], holds: str, too_long_to_show: Mapping[str, str]
) -> None:
    """Compares `current` with OUT/settings.json, if there is one.

    Args:
        holds: what OUT has in it, such as "samples".
        too_long_to_show: of settings that a message can't quote, what it says instead.

    Raises:
        UserError: they differ.
    """
    path = out / SETTINGS
    if not path.exists():
        return
    stored = read_json(path)
    for key, value in current.items():
        if stored.get(key) != value:
            what = too_long_to_show.get(key, f"{key}={stored.get(key)}")
            raise UserError(f"{out} holds {holds} made with {what}: choose another --out or delete it")
