"""Reading checkpoint folders as Hugging Face writes them: config.json beside one or more weight files."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from m1.errors import UserError
from m1.jsonl import read_json

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


def load_model(path: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint folder (M1 or any transformers causal LM), on the accelerator if there is one, and its tokenizer.

    Args:
        options: for `from_pretrained`, e.g. dtype or attn_implementation.

    Raises:
        UserError: no checkpoint, a damaged one, tensors missing or misshapen, an impossible configuration.
    """
    path = Path(path)
    read_json(path / "config.json")
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except SafetensorError as error:
        raise UserError(f"{path}: its weights are truncated or damaged ({error})") from None
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = str(error.__cause__ if isinstance(error, StrictDataclassError) else error).strip().splitlines()[0]
        raise UserError(f"can't load {path}: {reason}") from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{path} has no tensor {missing[0]!r} ({len(missing)} missing): copy the checkpoint again")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Raises UserError where the folder has none or a damaged one."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load the tokenizer of {path}: {str(error).strip().splitlines()[0]}") from None


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
