"""Makes checkpoint folders of GGUF files: weights are dequantized, the tokenizer and its chat template are kept.

transformers reads the weights and the configuration. What it reads wrongly or drops is mended here, or refused:

    rope_freqs.weight       Llama 3's rope scaling, which it drops
    attention.key_length    Qwen3's head size, for which it takes a default
    rms_norm_eps            a float32 printed as a float64, 9.999999747378752e-06
    tokenizer.ggml.pre      the rule that splits text; an unknown one becomes GPT-2's, and "\\n\\n1" other tokens
    eot_token_id            another token that ends an answer
    biases and the like     tensors that its model has no place for
"""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.model.checkpoint import model_without_weights, reason
from m1.model.configuration import TEACHERS
from m1.options import Quantization
from m1.runs import finished, new_folder, refuse_foreign, sha256

Dtype = Literal["float32", "bfloat16", "float16"]
ROPE_FREQS = "rope_freqs.weight"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in tokenizer.ggml.token_type
DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RuntimeError)

# How text is split before byte-level BPE, by tokenizer.ggml.pre.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
SPLITS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{
        kind: [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for kind, words in (("llama-bpe", LLAMA3_WORDS), ("qwen2", QWEN2_WORDS))
    },
}


def import_gguf(file: str | Path, out: str | Path, dtype: Dtype = "bfloat16", force: bool = False) -> None:
    """Converts a GGUF file to a checkpoint folder.

    Args:
        file: a Llama, Qwen2 or Qwen3 model in one GGUF file.
        out: the folder for the checkpoint. If it already holds this import, nothing is done.
        dtype: of the weights. "float32" keeps the dequantized values exactly.
        force: move existing output aside.

    Raises:
        UserError: no GGUF file, a damaged one, one of several, another architecture, a tokenizer or rope scaling that
            isn't known, tensors without a place, or an `out` that holds anything else.
    """
    file = Path(file)
    settings = {"source": str(file), "sha256": sha256(file), "dtype": dtype}
    if not force:
        refuse_foreign("import-gguf", out)
        if finished("import-gguf", out, settings):
            return
    model, tokenizer = read_gguf(file, dtype)
    with new_folder("import-gguf", out, settings, [file], force) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def teacher_folder(name: str) -> Iterator[Path]:
    """The folder of a teacher's checkpoint. A GGUF file becomes a folder in bfloat16 until the context ends.

    Args:
        name: a folder or Hub id (`checkpoint_folder`), or a GGUF file.

    Raises:
        UserError: as `checkpoint_folder` and `import_gguf`.
    """
    if not is_gguf(name):
        yield checkpoint_folder(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in read_gguf(Path(name), "bfloat16"):
            part.save_pretrained(folder)
        yield Path(folder)


def is_gguf(name: str | Path) -> bool:
    """Whether this names a GGUF file."""
    return Path(name).suffix == ".gguf" and not Path(name).is_dir()


def stored_quantization(file: Path) -> Quantization | None:
    """How coarsely M1 can round the layers' weights without losing more than the file has: none if not at all."""
    from gguf import GGUFReader

    layers = [
        tensor for tensor in GGUFReader(file).tensors if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    ]
    kinds = {tensor.tensor_type.name for tensor in layers}
    return "int4" if kinds == {"Q4_1"} else "int8" if kinds and kinds <= {"Q4_1", "Q8_0"} else None


def read_gguf(file: Path, dtype: Dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Reads a GGUF file's model and tokenizer. Raises UserError as `import_gguf`."""
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype {dtype!r}: expected {', '.join(get_args(Dtype))}")
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{file} isn't a GGUF file")
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}") from None
    with _parsed_once():
        return _read_gguf(file, dtype)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Lets all readers of a file share one parser: parsing a vocabulary takes seconds, and transformers makes three."""
    import gguf

    own = gguf.GGUFReader
    parsed = functools.cache(own)
    gguf.GGUFReader = lambda path: parsed(Path(path).resolve())  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = own  # type: ignore[misc]


def _read_gguf(file: Path, dtype: Dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    try:
        facts, tensors = _read(file)
    except DAMAGED as error:
        raise UserError(f"{file} is truncated or damaged ({reason(error)}): download it again") from None
    architecture = facts.get("general.architecture")
    if architecture not in TEACHERS:
        raise UserError(f"{file} is a {architecture!r} model; supported here: {', '.join(TEACHERS)}")
    if facts.get("split.count", 1) > 1:
        raise UserError(f"{file} is one of {facts['split.count']} parts: merge them with `llama-gguf-split --merge`")
    try:
        tokenizer = _tokenizer(facts, file)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        _mend(config, facts, tensors, file)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} can't be read as a {architecture} model: {reason(error)}") from None
    _check(model, file, len(tensors) - (ROPE_FREQS in tensors), loaded["missing_keys"])
    ends = {facts.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")} - {None}
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else model.config.eos_token_id
    model.generation_config._from_model_config = False  # or transformers would make it anew of the model's
    return model, tokenizer


def _check(model: PreTrainedModel, file: Path, tensors: int, missing: set[str]) -> None:
    """Raises UserError unless the file's tensors are the model's parameters, in number and shape."""
    expected = dict(model_without_weights(model.config, file).named_parameters())
    if missing or tensors != len(expected):
        raise UserError(
            f"{file} has {tensors} tensors, but a {model.config.model_type} model has {len(expected)}: biases or other "
            "parts would be lost"
        )
    for name, parameter in expected.items():
        if (shape := model.get_parameter(name).shape) != parameter.shape:
            raise UserError(f"{file}: {name!r} is {list(shape)}, but its metadata implies {list(parameter.shape)}")


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All metadata, and the tensors as they are stored, by name."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    return facts, {tensor.name: tensor.data for tensor in reader.tensors}


def _mend(config: PreTrainedConfig, facts: dict[str, Any], tensors: dict[str, np.ndarray], file: Path) -> None:
    """Corrects the configuration that transformers makes of the metadata. Raises UserError where it can't."""
    own = {name.removeprefix(f"{config.model_type}."): value for name, value in facts.items()}
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    config.head_dim = own.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    for key in ("_model_name_or_path", "unk_token_id"):
        config.__dict__.pop(key, None)
    if own.get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise UserError(f"{file} rotates {own['rope.dimension_count']} of {config.head_dim} channels, which M1 doesn't")
    scaling = own.get("rope.scaling.type", "none" if own.get("rope.scale_linear", 1.0) == 1.0 else "linear")
    if scaling != "none":
        raise UserError(
            f"{file} has rope scaling ({scaling}), which transformers doesn't read from a GGUF file: give the "
            "checkpoint it was made of"
        )
    if ROPE_FREQS in tensors:
        original = own.get("rope.scaling.original_context_length", 8192)
        config.rope_parameters = _llama3_scaling(config, torch.tensor(tensors[ROPE_FREQS]), original, file)


def _llama3_scaling(config: PreTrainedConfig, divisors: Tensor, original: int, file: Path) -> dict[str, Any]:
    """Llama 3's rope parameters under which frequencies are divided by `divisors` [head_dim / 2]. UserError if none."""
    theta = config.rope_parameters["rope_theta"]
    scaled = LLAMA3 | {
        "rope_theta": theta, "factor": divisors.max().item(), "original_max_position_embeddings": original
    }  # fmt: skip
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    if len(divisors) != len(plain) or not torch.allclose(frequencies * divisors, plain, rtol=1e-4):
        raise UserError(f"{file}: its rope frequencies aren't Llama 3's: give the checkpoint it was made of")
    return scaled


def _tokenizer(facts: dict[str, Any], file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the metadata: byte-level BPE, with the split rule that the file names."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in facts.items()}
    rule = own.get("pre") if own.get("model") == "gpt2" else own.get("model")
    if rule not in SPLITS:
        raise UserError(f"{file} splits text by the rule {rule!r}; known here: {', '.join(SPLITS)}")
    tokens = own["tokens"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in own["merges"]],
            ignore_merges=rule == "llama-bpe",
        )
    )
    tokenizer.normalizer = normalizers.NFC() if rule == "qwen2" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[rule])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, own["token_type"], strict=True)
    added = [(token, kind) for token, kind in kinds if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    special = {
        f"{name}_token": tokens[own[f"{key}_token_id"]] for name, key in named.items() if f"{key}_token_id" in own
    }
    if own.get("add_bos_token", rule == "llama-bpe"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, own["bos_token_id"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=facts.get("tokenizer.chat_template"),
        model_max_length=facts[f"{facts['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
