"""Reads checkpoint folders in Hugging Face's layout: config.json and one or more weight files."""

import hashlib
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from m1.errors import UserError, is_panic
from m1.hub import checkpoint_folder
from m1.jsonl import read_json
from m1.model.configuration import check_sizes, layer_kinds
from m1.ops.backend import default_device

INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
CHECKPOINT = "give the folder of a Hugging Face checkpoint"
MORE_THAN_TENSORS = "its pickle is damaged, or holds more than tensors, which M1 never reads: copy or convert it again"
NOT_QUANTIZED = "give the unquantized checkpoint, or dequantize it; `--quantize int8` is M1's own rounding"
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")  # safetensors' names, then torch's
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")  # no folders, no ".."
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


def load_model(
    path: str | Path, device: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer.

    Args:
        path: folder or Hub id (`checkpoint_folder`) of an M1 model or of any causal LM that transformers knows.
        device: where to put the model; None for the GPU if there is one.
        options: arguments of `from_pretrained`, e.g. dtype or attn_implementation.

    Raises:
        UserError: no checkpoint, a damaged or quantized one, missing or misshapen tensors, or an impossible
            configuration.
    """
    path = checkpoint_folder(path)
    config = read_json(path / "config.json", CHECKPOINT)
    refuse_quantized(config, path)
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key, "")):  # transformers would fetch that kernel from the Hub and run it
            raise UserError(f"{path}/config.json: {key} names code on the Hub, which M1 doesn't run: remove the key")
    with one_line(f"can't load {path}"):
        check_sizes(config)
        for file in weight_files(path):
            _refuse_integers(_dtypes(file), file)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False, **options
        )
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{path} has no tensor {missing[0]!r} ({len(missing)} missing): copy the checkpoint again")
    return model.to(device or default_device()), load_tokenizer(path)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Around a loader of others' files: turns whatever it raises into a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{what}: {MORE_THAN_TENSORS}") from None
    except SafetensorError as error:
        raise UserError(f"{what}: its weights are truncated or damaged ({reason(error)}): copy it again") from None
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(f"{what}: {reason(error)}") from None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Loads a checkpoint folder's tokenizer. Raises UserError if the folder has none or a damaged one."""
    with one_line(f"can't load the tokenizer of {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer("1").input_ids)  # some settings fail only in use
        return tokenizer


def load_config(folder: Path, kinds: Iterable[str]) -> PreTrainedConfig:
    """Reads FOLDER/config.json.

    Args:
        folder: a checkpoint folder.
        kinds: the model types that are accepted.

    Raises:
        UserError: no such file, another model type, a quantized model, an impossible configuration, or attention in
            sliding windows.
    """
    content = read_json(folder / "config.json", CHECKPOINT)
    refuse_quantized(content, folder)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{folder} is a {kind!r} model; supported here: {', '.join(kinds)}")
    with one_line(f"{folder}/config.json is impossible"):
        check_sizes(content)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_sizes(config)
    if "sliding_attention" in layer_kinds(config):
        raise UserError(f"{folder} has sliding-window attention, which M1 doesn't support: use another model")
    return config


def model_without_weights(config: PreTrainedConfig, source: Path) -> PreTrainedModel:
    """Builds a model on the meta device, for its names and shapes. Raises UserError for an impossible configuration."""
    with one_line(f"{source}/config.json is impossible"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def refuse_quantized(config: Mapping[str, Any], where: str | Path) -> None:
    """Raises UserError if a config.json is that of a quantized model. The message names the method."""
    if table := config.get("quantization_config") or config.get("compression_config"):
        method = (table.get("quant_method") if isinstance(table, Mapping) else None) or "an unnamed method"
        raise UserError(f"{where} is quantized ({method}), which M1 doesn't read: {NOT_QUANTIZED}")


def refuse_quantized_model(model: PreTrainedModel) -> None:
    """Raises UserError for a model whose weights aren't plain floats, such as bitsandbytes' or torchao's."""
    table = getattr(model.config, "quantization_config", None)
    if table is not None and not isinstance(table, Mapping):
        table = {"quant_method": getattr(table.quant_method, "value", table.quant_method)}
    refuse_quantized({"quantization_config": table}, "the model")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        plain = weight is None or (isinstance(weight, Tensor) and _name(weight) in FLOATS)
        wrapped = is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith("torch.")
        if not plain or wrapped:
            raise UserError(f"the model is quantized ({type(module).__name__} {name!r}): {NOT_QUANTIZED}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint, from model.safetensors, its shards, or pytorch_model.bin.

    Raises:
        UserError: no weights, a missing shard, a truncated or malformed file, integers in place of floats, or a tensor
            that only the index has.
    """
    files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    if not files:
        raise UserError(f"no weights in {folder}: expected model.safetensors, {INDEX} or pytorch_model.bin")
    for file in files:
        weights |= _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickle(file)
    if len(files) > 1 and (missing := sorted(set(check_shard_names(folder)) - set(weights))):
        raise UserError(
            f"{folder}'s index names {missing[0]!r}, which is in none of its shards: copy the checkpoint again"
        )
    _refuse_integers({name: _name(tensor) for name, tensor in weights.items()}, folder)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in transformers' order of preference. Raises as check_shard_names."""
    shards = sorted(set(check_shard_names(folder).values()))
    for names in (["model.safetensors"], shards, ["pytorch_model.bin"]):
        if names and (names is shards or (folder / names[0]).exists()):
            return [folder / name for name in names]
    return []


def saved_dtype(name: str | Path) -> torch.dtype:
    """The dtype of a checkpoint: that of its config.json, or else of its first floating-point tensor.

    Args:
        name: a folder or Hub id (`checkpoint_folder`).
    """
    folder = checkpoint_folder(name)
    config = read_json(folder / "config.json", CHECKPOINT)
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    return next((t.dtype for t in read_weights(folder).values() if t.is_floating_point()), torch.float32)


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


def _refuse_integers(dtypes: Mapping[str, str], where: Path) -> None:
    for name, dtype in dtypes.items():
        if name.endswith("weight") and dtype not in FLOATS:
            raise UserError(f"{where} is quantized ({name!r} is {dtype}): {NOT_QUANTIZED}")


def _dtypes(file: Path) -> dict[str, str]:
    """The name of each tensor's dtype in a file of weights. Their values aren't read."""
    if file.suffix != ".safetensors":
        return {name: _name(tensor) for name, tensor in _load_pickle(file, "meta").items()}
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # no dict


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _load_pickle(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    with one_line(f"can't read {path}, which may be truncated: copy it again"):
        weights = torch.load(path, map_location=device, weights_only=True)
    named = isinstance(weights, dict) and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in weights.items())
    if not named:
        raise UserError(f"{path} doesn't hold named tensors: copy the checkpoint again")
    return weights


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise UserError(f"{path} is missing: copy the checkpoint again, with all its shards")
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({reason(error)}): copy it again") from None
