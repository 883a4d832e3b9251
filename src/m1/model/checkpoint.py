"""Reading checkpoint folders as Hugging Face writes them: config.json beside one or more weight files."""

import pickle
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

INDEX = "model.safetensors.index.json"
# What transformers raises, reading a configuration or building a model, where its values are missing or impossible.
IMPOSSIBLE = (
    StrictDataclassError, ValueError, KeyError, AttributeError, TypeError, AssertionError, ZeroDivisionError,
)  # fmt: skip
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
    except (OSError, RuntimeError, *IMPOSSIBLE) as error:
        raise UserError(f"can't load {path}: {reason(error)}") from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{path} has no tensor {missing[0]!r} ({len(missing)} missing): copy the checkpoint again")
    return model.to(default_device()), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Raises UserError where the folder has none or a damaged one."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load the tokenizer of {path}: {reason(error)}") from None


def load_config(folder: Path, kinds: Iterable[str]) -> PreTrainedConfig:
    """FOLDER/config.json, of one of the model types `kinds`.

    Raises:
        UserError: no such file, another model type, an impossible configuration, attention in sliding windows.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise UserError(f"{folder} is a {kind!r} model; supported here: {', '.join(kinds)}")
    try:
        config = AutoConfig.from_pretrained(folder)
        check_sizes(config)
    except IMPOSSIBLE as error:
        raise UserError(f"{folder}/config.json is impossible: {reason(error)}") from None
    if "sliding_attention" in layer_kinds(config):
        raise UserError(f"{folder} attends in sliding windows in some layers, which M1 doesn't: use another model")
    return config


def model_without_weights(config: PreTrainedConfig, source: Path) -> PreTrainedModel:
    """On the meta device: names and shapes only. Raises UserError for a configuration no model can be made of."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except IMPOSSIBLE as error:
        raise UserError(f"{source}/config.json is impossible: {reason(error)}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: model.safetensors, its shards by their index, or pytorch_model.bin.

    Raises:
        UserError: no weights, a missing shard, a truncated or malformed file, a tensor named by the index alone.
    """
    index_path = folder / INDEX
    if (folder / "model.safetensors").exists():
        return _load_safetensors(folder / "model.safetensors")
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index_path} has no weight_map of tensors to files: copy the checkpoint again")
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


def prepare_out(out: Path, source: Path) -> None:
    """Makes the folder a checkpoint is to be written to.

    Weights another checkpoint left there would be read in place of the new ones: they are removed.

    Raises:
        UserError: it is the source itself, or can't be written.
    """
    if source.resolve() == out.resolve():
        raise UserError(f"{out} is the source itself: choose another folder, its weights would be overwritten")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in (out / INDEX, *out.glob("model*.safetensors"), *out.glob("pytorch_model*.bin")):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from None


def copy_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer, chat template and generation configuration."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def reason(error: BaseException) -> str:
    """An exception's first line; of transformers' strict configurations, that of the rule that was broken."""
    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"no {text}" if isinstance(error, KeyError) else text


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint ({reason(error)}): copy it again") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} holds something else than named tensors: copy the checkpoint again")
    return weights


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint again, with all its shards") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from None
