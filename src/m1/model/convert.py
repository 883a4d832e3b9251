"""A transformer checkpoint becomes a hybrid: weights are mapped, nothing is trained (paper §3.1).

C <- Q   B <- K   x <- V   out_proj <- O        z, dt, conv, A, D are new
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from m1.errors import UserError
from m1.jsonl import read_json
from m1.model.checkpoint import TOKENIZER_FILES, read_weights
from m1.model.configuration import ATTENTION, MAMBA, M1Config
from m1.model.modeling import M1ForCausalLM

SUPPORTED_TEACHERS = ("llama",)
# Fields that mean the same in the teacher's configuration.
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias",
    "attention_dropout", "mlp_bias", "dtype",
)  # fmt: skip


def convert(
    teacher: str | Path,
    out: str | Path,
    keep_attention: Iterable[int],
    head_alignment: str = "attention",
    state_size: int = 16,
    seed: int = 0,
) -> M1ForCausalLM:
    """Converts the Llama-family checkpoint folder `teacher` and saves the hybrid, with its tokenizer, to `out`.

    Args:
        keep_attention: indices of the layers that stay attention.
        head_alignment: "attention" or "official", see `group_permutation`.
        state_size: N. The fast kernels want 16.
        seed: of the new parameters (z, dt).

    Raises:
        UserError: not a supported checkpoint, a damaged one, or layers it doesn't have.
    """
    teacher, out = Path(teacher), Path(out)
    refuse_same_folder(teacher, out)
    teacher_config = read_teacher_config(teacher)
    config = hybrid_config(teacher_config, keep_attention, head_alignment, state_size)
    weights = read_weights(teacher)
    torch.manual_seed(seed)
    model = M1ForCausalLM(config).to(config.dtype or torch.float32)
    load_weights(model, hybrid_weights(weights, config, model), source=teacher)
    model.save_pretrained(out)
    copy_tokenizer(teacher, out)
    return model


def read_teacher_config(folder: Path) -> PreTrainedConfig:
    """Raises UserError where the folder is no checkpoint, or of an architecture that isn't supported."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a downloaded Hugging Face checkpoint")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in SUPPORTED_TEACHERS:
        raise UserError(f"{folder} is a {kind!r} model; supported teachers: {', '.join(SUPPORTED_TEACHERS)}")
    return AutoConfig.from_pretrained(folder)


def hybrid_config(
    teacher: PreTrainedConfig, keep_attention: Iterable[int], head_alignment: str = "attention", state_size: int = 16
) -> M1Config:
    """The hybrid's configuration. Raises UserError for layers the teacher lacks or sizes that don't fit."""
    kept = sorted(set(keep_attention))
    if not kept:
        raise UserError("keep at least one attention layer: transformers' caches count positions there")
    if outside := [layer for layer in kept if not 0 <= layer < teacher.num_hidden_layers]:
        raise UserError(
            f"attention is to be kept in layer {outside[0]}, "
            f"but the teacher has layers 0 to {teacher.num_hidden_layers - 1}"
        )
    kinds = [ATTENTION if i in kept else MAMBA for i in range(teacher.num_hidden_layers)]
    shared = {field: getattr(teacher, field) for field in SHARED_FIELDS if hasattr(teacher, field)}
    try:
        return M1Config(**shared, layer_types=kinds, state_size=state_size, head_alignment=head_alignment)
    except StrictDataclassError as error:
        raise UserError(f"this teacher can't be converted: {error.__cause__ or error}") from None


def group_permutation(heads: int, kv_heads: int, head_dim: int, state_size: int) -> Tensor:
    """[D] indices: position p of the mixer's C and out_proj takes the query channel permutation[p].

    The mixer pairs group g of N channels with group g // rep of x and B. Left alone ("official"), group j of a query
    head meets another part of its KV head whenever head_dim > N. Putting group (h, j) at rep * ((h // rep) * J
    + j) + h % rep, with J = head_dim / N and rep = heads / kv_heads, makes every pairing the teacher's.
    """
    rep, parts = heads // kv_heads, head_dim // state_size
    permutation = torch.empty(heads * parts, dtype=torch.long)
    for h in range(heads):
        for j in range(parts):
            permutation[rep * ((h // rep) * parts + j) + h % rep] = h * parts + j
    channels = torch.arange(heads * head_dim).view(-1, state_size)
    return channels[permutation].flatten()


def hybrid_weights(weights: dict[str, Tensor], config: M1Config, model: M1ForCausalLM) -> dict[str, Tensor]:
    """The hybrid's state dict: the teacher's tensors renamed, and `model`'s own fresh ones where it has none."""
    order = torch.arange(config.mamba_size)
    if config.head_alignment == "attention":
        order = group_permutation(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.state_size
        )
    fresh = model.state_dict()
    for i in range(config.num_hidden_layers):
        if i in config.attention_layers:
            continue
        attention, mamba = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mamba."
        for name in ["weight", "bias"] if config.attention_bias else ["weight"]:
            q, k, v = (_take(weights, f"{attention}{part}_proj.{name}") for part in "qkv")
            z, _, _, _, dt = fresh[f"{mamba}in_proj.{name}"].split(config.mamba_widths)
            weights[f"{mamba}in_proj.{name}"] = torch.cat([z, v, k, q[order], dt])
        weights[f"{mamba}out_proj.weight"] = _take(weights, f"{attention}o_proj.weight")[:, order]
        if config.attention_bias:
            weights[f"{mamba}out_proj.bias"] = _take(weights, f"{attention}o_proj.bias")
        for name in ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D"):
            weights[mamba + name] = fresh[mamba + name]
    return weights


def load_weights(model: M1ForCausalLM, weights: dict[str, Tensor], source: Path) -> None:
    """Loads a complete state dict. Raises UserError naming the first tensor that is missing, unknown or misshapen."""
    own = model.state_dict()
    if model.config.tie_word_embeddings:
        weights = {"lm_head.weight": weights.get("model.embed_tokens.weight", own["lm_head.weight"]), **weights}
    weights = {name: t for name, t in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if missing := sorted(set(own) - set(weights)):
        raise UserError(f"{source} has no tensor {missing[0]!r} ({len(missing)} missing)")
    if unknown := sorted(set(weights) - set(own)):
        raise UserError(f"{source} has a tensor {unknown[0]!r} that this model has no place for ({len(unknown)} such)")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{source}: {name!r} is {list(tensor.shape)}, its config.json asks for {list(own[name].shape)}"
            )
    model.load_state_dict(weights)


def refuse_same_folder(source: Path, out: Path) -> None:
    if source.resolve() == out.resolve():
        raise UserError(f"{out} is the source itself: choose another folder, its weights would be overwritten")


def copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def _take(weights: dict[str, Tensor], name: str) -> Tensor:
    try:
        return weights.pop(name)
    except KeyError:
        raise UserError(f"the checkpoint has no tensor {name!r}: it is incomplete or of another architecture") from None
