"""A transformer checkpoint becomes a hybrid: weights are mapped, nothing is trained (paper §3.1).

C <- Q   B <- K   x <- V   out_proj <- O        biases and QK-norm with them; the rest of a mixer is new
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from m1.errors import UserError
from m1.model.checkpoint import copy_tokenizer, load_config, model_without_weights, prepare_out, read_weights, reason
from m1.model.configuration import ATTENTION, MAMBA, M1Config
from m1.model.layer_choice import choose_layers
from m1.model.mixer import Mixer
from m1.model.modeling import M1ForCausalLM, new_mixer

# Supported teachers and what their architecture implies without saying it in the configuration.
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"qk_norm": True},
}
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
    keep_attention: str | Sequence[int] | None = None,
    attention_ratio: float | None = None,
    mixer: str = "mamba",
    head_alignment: str = "official",
    state_size: int | None = None,
    seed: int = 0,
) -> M1ForCausalLM:
    """Converts the Llama or Qwen checkpoint folder `teacher` and saves the hybrid, with its tokenizer, to `out`.

    Args:
        keep_attention, attention_ratio: which layers stay attention, see `layer_choice.choose_layers`.
        mixer: "mamba" (Mamba-1) or "mamba2".
        head_alignment: "official" or "attention", see `group_permutation`.
        state_size: N of Mamba-1, 16 when None, which the fast kernels want.
        seed: of the new parameters.

    Raises:
        UserError: not a supported checkpoint, a damaged one, or layers it doesn't have.
    """
    teacher, out = Path(teacher), Path(out)
    teacher_config = read_teacher_config(teacher)
    kept = choose_layers(teacher_config.num_hidden_layers, keep_attention, attention_ratio)
    config = hybrid_config(teacher_config, kept, mixer=mixer, head_alignment=head_alignment, state_size=state_size)
    weights = read_weights(teacher)
    torch.manual_seed(seed % 2**64)
    for i in set(range(config.num_hidden_layers)) - set(config.attention_layers):
        prefix = f"model.layers.{i}.self_attn."
        attention = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        mamba = mixer_from_attention(attention, config, i).state_dict()
        weights |= {f"model.layers.{i}.mamba.{name}": tensor for name, tensor in mamba.items()}
    model = model_from_weights(config, weights, source=teacher)
    prepare_out(out, teacher)
    model.save_pretrained(out)
    copy_tokenizer(teacher, out)
    return model


def read_teacher_config(folder: Path) -> PreTrainedConfig:
    """Raises UserError where the folder is no checkpoint, or of an architecture that isn't supported."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a downloaded Hugging Face checkpoint")
    return load_config(folder, TEACHERS)


def hybrid_config(
    teacher: PreTrainedConfig,
    keep_attention: Iterable[int],
    *,
    mixer: str = "mamba",
    head_alignment: str = "official",
    state_size: int | None = None,
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
    options = {"layer_types": kinds, "mixer": mixer, "state_size": state_size, "head_alignment": head_alignment}
    try:
        return M1Config(**(shared | TEACHERS[teacher.model_type] | options))
    except StrictDataclassError as error:
        raise UserError(f"no hybrid can be made of this configuration: {reason(error)}") from None


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


@torch.no_grad()
def mixer_from_attention(attention: dict[str, Tensor], config: M1Config, layer_idx: int) -> Mixer:
    """A mixer with the weights of an attention layer, in their dtype; what attention has no counterpart for is random.

    Args:
        attention: the layer's state dict: {q,k,v,o}_proj.weight, and biases and {q,k}_norm.weight where it has them.

    Raises:
        UserError: a tensor that is missing, unknown or doesn't fit.
    """
    source = f"model.layers.{layer_idx}.self_attn"
    unused = {name for name in attention if not name.endswith("inv_freq")}
    mixer = new_mixer(config, layer_idx)
    mixer.reset_parameters()
    order = torch.arange(config.mamba_size)
    if config.head_alignment == "attention":
        order = group_permutation(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.state_size
        )

    def take(name: str, shape: torch.Size) -> Tensor:
        if name not in attention:
            raise UserError(f"the checkpoint has no tensor '{source}.{name}': it is incomplete")
        tensor = attention[name]
        if tensor.shape != shape:
            raise UserError(f"'{source}.{name}' is {list(tensor.shape)}, its config.json asks for {list(shape)}")
        unused.discard(name)
        return tensor

    for kind in ["weight", "bias"] if config.attention_bias else ["weight"]:
        _, x, B, C, _ = getattr(mixer.in_proj, kind).split(mixer.widths)
        x.copy_(take(f"v_proj.{kind}", x.shape))
        B.copy_(take(f"k_proj.{kind}", B.shape))
        C.copy_(take(f"q_proj.{kind}", C.shape)[order])
    mixer.out_proj.weight.copy_(take("o_proj.weight", mixer.out_proj.weight.shape)[:, order])
    if config.attention_out_bias:
        mixer.out_proj.bias.copy_(take("o_proj.bias", mixer.out_proj.bias.shape))
    if config.qk_norm:
        one_head = torch.Size([config.head_dim])
        B_gain = take("k_norm.weight", one_head).repeat(config.num_key_value_heads)
        C_gain = take("q_norm.weight", one_head).repeat(config.num_attention_heads)[order]
        mixer.B_norm.load_state_dict({"weight": B_gain})
        mixer.C_norm.load_state_dict({"weight": C_gain})
    if unused:
        raise UserError(f"the checkpoint has a tensor '{source}.{min(unused)}' that a Mamba layer has no place for")
    return mixer.to(attention["q_proj.weight"].dtype)


def model_from_weights(config: M1Config, weights: dict[str, Tensor], source: Path) -> M1ForCausalLM:
    """The model with a complete state dict, all in the embedding's dtype, without a second copy of it in memory.

    Raises:
        UserError: naming the first tensor that is missing, unknown or misshapen.
    """
    weights = complete(config, weights, source)
    dtype = weights["model.embed_tokens.weight"].dtype
    return M1ForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def complete(config: M1Config, weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The state dict, with a tied head in its place; UserError as `model_from_weights`."""
    expected = model_without_weights(config, source).state_dict()
    if config.tie_word_embeddings:
        weights = {"lm_head.weight": weights.get("model.embed_tokens.weight", expected["lm_head.weight"]), **weights}
    weights = {name: t for name, t in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if missing := sorted(set(expected) - set(weights)):
        raise UserError(f"{source} has no tensor {missing[0]!r} ({len(missing)} missing)")
    if unknown := sorted(set(weights) - set(expected)):
        raise UserError(f"{source} has a tensor {unknown[0]!r} that this model has no place for ({len(unknown)} such)")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{source}: {name!r} is {list(tensor.shape)}, its config.json asks for {list(expected[name].shape)}"
            )
    return weights
