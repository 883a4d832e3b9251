"""Reading checkpoint folders as Hugging Face writes them: config.json beside one or more weight files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from m1.errors import UserError

# What travels beside the weights when a checkpoint is converted.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a missing or malformed file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the folder of a Hugging Face checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: model.safetensors, its shards by their index, or pytorch_model.bin.

    Raises:
        UserError: no weights, a missing shard, a truncated or malformed file, a tensor named by the index alone.
    """
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        weight_map = read_json(index_path)["weight_map"]
        weights: dict[str, Tensor] = {}
        for shard in sorted(set(weight_map.values())):
            weights |= _load_safetensors(folder / shard)
        if missing := sorted(set(weight_map) - set(weights)):
            raise UserError(
                f"{index_path} names {missing[0]!r}, which is in none of its shards: copy the checkpoint again"
            )
        return weights
    if (folder / "model.safetensors").exists():
        return _load_safetensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").exists():
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    raise UserError(
        f"no weights in {folder}: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint again, with all its shards") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from None
