"""Reads checkpoint folders in Hugging Face's layout: config.json and one or more weight files."""

import hashlib
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from m1.errors import UserError
from m1.jsonl import read_json
from m1.model.configuration import check_sizes, layer_kinds
from m1.ops.backend import default_device

INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
CHECKPOINT = "give the folder of a Hugging Face checkpoint"
MORE_THAN_TENSORS = "its pickle is damaged, or holds more than tensors, which M1 never reads: copy or convert it again"
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")  # no folders, no ".."
# Raised by transformers for a configuration with missing or impossible values, when it is read or a model is built.
IMPOSSIBLE = (
    StrictDataclassError, ValueError, KeyError, AttributeError, TypeError, AssertionError, ZeroDivisionError,
)  # fmt: skip
# Files that are copied when a checkpoint is converted.
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
    """Loads a model, on the GPU if there is one, and its tokenizer.

    Args:
        path: a checkpoint folder of M1 or of any causal LM that transformers knows.
        options: arguments of `from_pretrained`, e.g. dtype or attn_implementation.

    Raises:
        UserError: no checkpoint, a damaged one, missing or misshapen tensors, or an impossible configuration.
    """
    path = Path(path)
    config = read_json(path / "config.json", CHECKPOINT)
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key, "")):  # transformers would fetch that kernel from the Hub and run it
            raise UserError(f"{path}/config.json: {key} names code on the Hub, which M1 doesn't run: remove the key")
    check_shard_names(path)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False, **options
        )
    except SafetensorError as error:
        raise UserError(f"{path}: its weights are truncated or damaged ({error})") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: {MORE_THAN_TENSORS}") from None
    except (OSError, RuntimeError, *IMPOSSIBLE) as error:
        raise UserError(f"can't load {path}: {reason(error)}") from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{path} has no tensor {missing[0]!r} ({len(missing)} missing): copy the checkpoint again")
    return model.to(default_device()), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Loads a checkpoint folder's tokenizer. Raises UserError if the folder has none or a damaged one."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load the tokenizer of {path}: {reason(error)}") from None


def load_config(folder: Path, kinds: Iterable[str]) -> PreTrainedConfig:
    """Reads FOLDER/config.json.

    Args:
        folder: a checkpoint folder.
        kinds: the model types that are accepted.

    Raises:
        UserError: no such file, another model type, an impossible configuration, or attention in sliding windows.
    """
    kind = read_json(folder / "config.json", CHECKPOINT).get("model_type")
    if kind not in kinds:
        raise UserError(f"{folder} is a {kind!r} model; supported here: {', '.join(kinds)}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_sizes(config)
    except IMPOSSIBLE as error:
        raise UserError(f"{folder}/config.json is impossible: {reason(error)}") from None
    if "sliding_attention" in layer_kinds(config):
        raise UserError(f"{folder} has sliding-window attention, which M1 doesn't support: use another model")
    return config


def model_without_weights(config: PreTrainedConfig, source: Path) -> PreTrainedModel:
    """Builds a model on the meta device, for its names and shapes. Raises UserError for an impossible configuration."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except IMPOSSIBLE as error:
        raise UserError(f"{source}/config.json is impossible: {reason(error)}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint, from model.safetensors, its shards, or pytorch_model.bin.

    Raises:
        UserError: no weights, a missing shard, a truncated or malformed file, or a tensor that only the index has.
    """
    index_path, weight_map = folder / INDEX, check_shard_names(folder)
    if (folder / "model.safetensors").exists():
        return _load_safetensors(folder / "model.safetensors")
    if index_path.exists():
        weights: dict[str, Tensor] = {}
        for shard in sorted(set(weight_map.values())):
            weights |= _load_safetensors(folder / shard)
        if missing := sorted(set(weight_map) - set(weights)):
            raise UserError(
                f"{index_path} names {missing[0]!r}, which is in none of its shards: copy the checkpoint again"
            )
        return weights
    if (folder / "pytorch_model.bin").exists():
        return _load_pickle(folder / "pytorch_model.bin")
    raise UserError(f"no weights in {folder}: expected model.safetensors, {INDEX} or pytorch_model.bin")


def saved_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of a checkpoint: that of its config.json, or else of its first floating-point tensor."""
    config = read_json(Path(folder) / "config.json", CHECKPOINT)
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    return next((t.dtype for t in read_weights(Path(folder)).values() if t.is_floating_point()), torch.float32)


def check_shard_names(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor of a sharded checkpoint, from its index. Empty without an index.

    An index must not make a loader read other folders, so files outside of FOLDER are refused.

    Raises:
        UserError: an index without a map of tensors to files, or with a file in another folder.
    """
    weight_map: dict[str, str] = {}
    for index in (folder / INDEX, folder / PICKLE_INDEX):
        if not index.exists():
            continue
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
            raise UserError(f"{index} has no weight_map of tensors to files: copy the checkpoint again")
        if outside := [shard for shard in found.values() if not PLAIN_NAME.fullmatch(shard)]:
            raise UserError(f"{index} names the file {outside[0]!r}: shards must be plain files in its own folder")
        weight_map = weight_map or found
    return weight_map


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies a checkpoint's tokenizer, chat template and generation configuration to another folder."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def weights_hash(model: PreTrainedModel) -> str:
    """The sha256 of all parameters' bytes."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """The first line of an exception's message. For a StrictDataclassError, that of the exception that caused it."""
    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"no {text}" if isinstance(error, KeyError) else text


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: {MORE_THAN_TENSORS}") from None
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint ({reason(error)}): copy it again") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} doesn't hold named tensors: copy the checkpoint again")
    return weights


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint again, with all its shards") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from None
