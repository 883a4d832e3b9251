"""Converts a transformer checkpoint to a hybrid: weights are copied, nothing is trained (paper §3.1).

C <- Q   B <- K   x <- V   out_proj <- O        with biases and QK-norm; a mixer's other parameters are new
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.layer_choice import choose_layers
from m1.model.checkpoint import copy_tokenizer, load_config, model_without_weights, one_line, read_weights
from m1.model.configuration import ATTENTION, MAMBA, TEACHERS, M1Config
from m1.model.gguf import teacher_folder
from m1.model.mixer import Mixer
from m1.model.modeling import M1ForCausalLM, new_mixer
from m1.options import build
from m1.progress import Progress, silent
from m1.recipe import ConvertStage
from m1.runs import new_folder

# Fields with the same meaning in the teacher's configuration.
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
    force: bool = False,
    **options: Any,
) -> M1ForCausalLM:
    """Converts a transformer to a hybrid and saves it, with the teacher's tokenizer. Nothing is trained.

    `out` is written as a whole: it doesn't change before the new weights are complete. If it already holds a conversion
    with the same settings, that model is loaded and returned.

    Args:
        teacher: a Llama, Qwen2 or Qwen3 checkpoint: a folder, a Hub id or a GGUF file (`gguf.teacher_folder`).
        out: the folder for the hybrid.
        keep_attention, attention_ratio: which layers stay attention, as in `layer_choice.choose_layers`. Give one.
        force: move existing output aside.
        options: mixer, head_alignment, state_size, aligned and seed, as in `recipe.ConvertStage`.

    Returns:
        The hybrid.

    Raises:
        UserError: an unsupported or damaged checkpoint, layers that it doesn't have, or an `out` that holds anything
            else.
    """
    layers = keep_attention if keep_attention is None or isinstance(keep_attention, str) else list(keep_attention)
    table = {"teacher": str(teacher), "out": str(out), "keep_attention": layers, "attention_ratio": attention_ratio}
    return run(build(ConvertStage, table | options, "convert"), force)


def run(stage: ConvertStage, force: bool = False, progress: Progress = silent) -> M1ForCausalLM:
    """Runs the convert stage of a recipe, and `m1 convert`. See `convert`."""
    if not force and stage.finished():
        return M1ForCausalLM.from_pretrained(stage.out)
    with teacher_folder(stage.teacher) as teacher:
        return _convert(stage, teacher, force)


def _convert(stage: ConvertStage, teacher: Path, force: bool) -> M1ForCausalLM:
    """`run` with the folder of the teacher's checkpoint."""
    teacher_config = load_config(teacher, TEACHERS)
    kept = choose_layers(teacher_config.num_hidden_layers, stage.keep_attention, stage.attention_ratio)
    config = hybrid_config(
        teacher_config, kept, mixer=stage.mixer, head_alignment=stage.head_alignment, state_size=stage.state_size
    )
    weights = read_weights(teacher)
    torch.manual_seed(stage.seed % 2**64)
    for i in set(range(config.num_hidden_layers)) - set(config.attention_layers):
        prefix = f"model.layers.{i}.self_attn."
        attention = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        mamba = mixer_from_attention(attention, config, i).state_dict()
        weights |= {f"model.layers.{i}.mamba.{name}": tensor for name, tensor in mamba.items()}
    if stage.aligned:
        weights = with_mixers_of(stage.aligned, weights, config)
    model = model_from_weights(config, weights, source=teacher)
    with new_folder(stage.kind, stage.out, stage.settings(), stage.sources(), force) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(teacher, folder)
    return model


def hybrid_config(
    teacher: PreTrainedConfig,
    keep_attention: Iterable[int],
    *,
    mixer: str = "mamba",
    head_alignment: str = "official",
    state_size: int | None = None,
) -> M1Config:
    """The configuration of the hybrid that `convert` makes of a teacher.

    Args:
        teacher: the teacher's configuration.
        keep_attention: numbers of the layers that stay attention, from 0.
        mixer, head_alignment, state_size: as in `M1Config`.

    Raises:
        UserError: a layer that the teacher doesn't have, or sizes that don't fit.
    """
    kept = sorted(set(keep_attention))
    if outside := [layer for layer in kept if not 0 <= layer < teacher.num_hidden_layers]:
        raise UserError(
            f"attention should be kept in layer {outside[0]}, "
            f"but the teacher has layers 0 to {teacher.num_hidden_layers - 1}"
        )
    kinds = [ATTENTION if i in kept else MAMBA for i in range(teacher.num_hidden_layers)]
    shared = {field: getattr(teacher, field) for field in SHARED_FIELDS if hasattr(teacher, field)}
    options = {"layer_types": kinds, "mixer": mixer, "state_size": state_size, "head_alignment": head_alignment}
    with one_line("this configuration can't be made a hybrid"):
        return M1Config(**(shared | TEACHERS[teacher.model_type] | options))


def group_permutation(heads: int, kv_heads: int, head_dim: int, state_size: int) -> Tensor:
    """The order of query channels in which a mixer pairs queries with keys and values as the teacher does.

    The mixer pairs group g of N channels with group g // rep of x and B, where rep = heads / kv_heads. Let J =
    head_dim / N. In the teacher's own order ("official"), groups of a query head meet other parts of its KV head if J
    and rep are above 1. Moving group j of head h to rep * ((h // rep) * J + j) + h % rep restores the pairing.

    Returns:
        [D] indices: position p of the mixer's C and out_proj takes the query channel permutation[p].
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
    """Makes a mixer with an attention layer's weights, in their dtype. Its other parameters are initialised anew.

    Args:
        attention: the attention layer's state dict: {q,k,v,o}_proj.weight, and its biases and {q,k}_norm.weight if any.
        config: the hybrid's configuration.
        layer_idx: number of the layer.

    Raises:
        UserError: a tensor that is missing, unknown or misshapen.
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
            raise UserError(f"'{source}.{name}' has shape {list(tensor.shape)}, but config.json implies {list(shape)}")
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


def with_mixers_of(aligned: str, weights: dict[str, Tensor], config: M1Config) -> dict[str, Tensor]:
    """Returns a state dict with the mixers of another model, which `m1 align` trained.

    Args:
        aligned: the other model's folder or Hub id. Of its layers, those that are Mamba in `weights` must be, too.
        weights: the state dict. Its other tensors stay.
        config: its configuration.

    Raises:
        UserError: other options of conversion, or a mixer that is missing or misshapen.
    """
    folder = checkpoint_folder(aligned)
    trained, found = load_config(folder, ("m1",)), read_weights(folder)
    for name in ("mixer", "head_alignment", "state_size"):
        if (own := getattr(trained, name)) != (asked := getattr(config, name)):
            raise UserError(f"{aligned} has {name} = {own!r}, and this conversion {asked!r}: give both the same")
    mixers = {}
    for name, tensor in weights.items():
        if ".mamba." in name:
            if name not in found or found[name].shape != tensor.shape:
                raise UserError(
                    f"{aligned} has no tensor {name!r} of shape {list(tensor.shape)}: give a model that was made from "
                    "this teacher, with a mixer in that layer"
                )
            mixers[name] = found[name].to(tensor)
    return weights | mixers


def model_from_weights(config: M1Config, weights: dict[str, Tensor], source: Path) -> M1ForCausalLM:
    """Makes a model of a complete state dict, in the embedding's dtype. Memory holds the weights only once.

    Args:
        source: the folder that error messages name.

    Raises:
        UserError: a tensor that is missing, unknown or misshapen. The message names the first.
    """
    weights = complete(config, weights, source)
    dtype = weights["model.embed_tokens.weight"].dtype
    return M1ForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def complete(config: M1Config, weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Checks a state dict and adds a tied head to it. Raises UserError as `model_from_weights`."""
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
                f"{source}: {name!r} has shape {list(tensor.shape)}, "
                f"but config.json implies {list(expected[name].shape)}"
            )
    return weights
