"""Imports and exports the layout of the released checkpoints (docs/model.md).

    config.json        the teacher's Llama configuration
    mamba_config.json  {d_model, ssm_cfg, rms_norm_eps, vocab_size, d_inner, d_xb, intermediate_size, hidden_act,
                        n_layer, attn_layers}
    model.layers.i.mamba.*         as in M1: Mamba-2 if there is a dt_bias, else Mamba-1
    model.layers.i.mha.{in_proj (q|k|v), out_proj}.weight         attention layers in the Mamba-1 code
    model.layers.i.self_attn.{q,k,v,o}_proj.weight                attention layers in the Mamba-2 code

While it trains Mamba-1, that code saves transformers' own attention, and in_proj's five parts as tensors of their own
(PARTS). A value in mamba_config.json that is null or absent is not said: the code fills it in, and so does M1. What is
said, and what M1 has no use for, is kept in the configuration's `released`, so that an export gives it back.

The Mamba-1 code adds `dt_proj.bias` twice: in the linear map and as the scan's bias. Its weights were trained that way.
M1 adds the bias once, so importing doubles it and exporting halves it. Both are exact: only the exponent changes. The
`mha` of that code ignores rope scaling; `self_attn` is transformers' attention, which applies it.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.jsonl import read_json, write_json
from m1.model.checkpoint import copy_tokenizer, load_config, read_weights, reason
from m1.model.configuration import M1Config
from m1.model.convert import SHARED_FIELDS, complete, hybrid_config, model_from_weights
from m1.model.modeling import M1ForCausalLM
from m1.runs import MANIFEST, finished, new_folder, refuse_foreign, sha256

PARTS = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")  # the rows of in_proj, while the code trains
DEFAULT_STATE_SIZE = {"mamba": 16, "mamba2": 128}  # if ssm_cfg has no d_state


def import_official(source: str | Path, out: str | Path, force: bool = False) -> M1ForCausalLM:
    """Converts a released checkpoint to an M1 checkpoint, with all tensors in the embedding's dtype.

    Args:
        source: the released checkpoint's folder or Hub id (`checkpoint_folder`).
        out: the folder for the M1 checkpoint. If it already holds this import, that model is loaded and returned.
        force: move existing output aside.

    Returns:
        The model.

    Raises:
        UserError: missing or malformed files, tensors that don't fit, settings that M1 doesn't support, or an `out`
            that holds anything else.
    """
    source, out = checkpoint_folder(source), Path(out)
    if not force:
        refuse_foreign("import-official", out)
        if finished("import-official", out, _settings(source)):
            return M1ForCausalLM.from_pretrained(out)
    weights = read_weights(source)
    config = _import_config(source, weights)
    model = model_from_weights(config, _import_weights(weights, config), source)
    with new_folder("import-official", out, _settings(source), [source], force) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(source, folder)
    return model


def export_official(source: str | Path, out: str | Path, force: bool = False) -> None:
    """Converts an M1 checkpoint to the released layout: config.json, mamba_config.json, model.safetensors.

    Args:
        source: the M1 checkpoint's folder or Hub id (`checkpoint_folder`).
        out: the folder for the export. If it already holds this export, nothing is done.
        force: move existing output aside.

    Raises:
        UserError: not an M1 checkpoint, one with parts that the released code doesn't have (biases, QK-norm, rope
            scaling in Mamba-1 models), or an `out` that holds anything else.
    """
    source, out = checkpoint_folder(source), Path(out)
    if not force:
        refuse_foreign("export-official", out)
        if finished("export-official", out, _settings(source)):
            return
    config = load_config(source, ["m1"])
    if config.attention_bias or config.attention_out_bias or config.mlp_bias:
        raise UserError("the released layout has no projection biases, but this model has them: it can't be exported")
    if config.qk_norm:
        raise UserError("the released layout has no QK-norm, but this model has it: it can't be exported")
    if config.mixer == "mamba" and config.rope_parameters["rope_type"] != "default":
        raise UserError(
            f"the released code ignores rope scaling, but this model has {config.rope_parameters['rope_type']!r}: "
            "it can't be exported, because it would compute something else"
        )
    weights = _export_weights(complete(config, read_weights(source), source), config)
    with new_folder("export-official", out, _settings(source), [source], force) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", _export_config(config))
        write_json(folder / "mamba_config.json", _export_mamba_config(config))
        copy_tokenizer(source, folder)


def _settings(source: Path) -> dict[str, Any]:
    files = ("config.json", "mamba_config.json", MANIFEST)
    return {"source": str(source), "inputs": {name: sha256(source / name) for name in files}}


def _export_mamba_config(config: M1Config) -> dict[str, Any]:
    said = _released(config)["mamba_config"]
    ssm = {"expand": 1} | (said.get("ssm_cfg") or {}) | {"d_state": config.state_size, "d_conv": config.conv_kernel}
    ssm |= {"ngroups": config.num_attention_heads} if config.mixer == "mamba2" else {}
    return said | _implied(config) | {"ssm_cfg": ssm, "attn_layers": config.attention_layers}


def _implied(config: M1Config) -> dict[str, Any]:
    """The values of mamba_config.json that a model implies."""
    return {
        "d_model": config.hidden_size,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "d_inner": config.mamba_size,
        "d_xb": config.mamba_kv_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "n_layer": config.num_hidden_layers,
    }


def _export_config(config: M1Config) -> dict[str, Any]:
    """A Llama configuration as the released code reads it, with rope_theta and rope_scaling as separate fields."""
    shared = {field: getattr(config, field) for field in SHARED_FIELDS if field not in ("rope_parameters", "dtype")}
    defaults = LlamaConfig(**shared, architectures=["LlamaForCausalLM"]).to_dict()
    del defaults["rope_parameters"]
    said = _released(config)["config"]
    rope = dict(config.rope_parameters)
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    own = {"rope_theta": rope.pop("rope_theta"), "torch_dtype": dtype, "dtype": dtype}
    if rope["rope_type"] != "default" or config.mixer == "mamba2":
        own["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return defaults | {"rope_scaling": None} | said | shared | own


def _released(config: M1Config) -> dict[str, dict[str, Any]]:
    """The imported config.json and mamba_config.json; empty for a model that wasn't imported."""
    return getattr(config, "released", None) or {"config": {}, "mamba_config": {}}


def _import_config(source: Path, weights: dict[str, Tensor]) -> M1Config:
    """The M1 configuration of a released folder. Raises UserError for settings that don't fit."""
    llama, llama_json = load_config(source, ["llama"]), read_json(source / "config.json")
    mamba_json = read_json(source / "mamba_config.json", "give the folder of a released M1 checkpoint")
    said = {key: value for key, value in mamba_json.items() if value is not None}
    mixer = "mamba2" if any(name.endswith(".mamba.dt_bias") for name in weights) else "mamba"
    where = f"{source}/mamba_config.json"
    mixers = {name.split(".")[2] for name in weights if ".mamba." in name}
    kept = said.get("attn_layers", [i for i in range(llama.num_hidden_layers) if str(i) not in mixers])
    ssm = said.get("ssm_cfg", {})
    if not isinstance(ssm, dict) or not isinstance(kept, list) or not all(type(layer) is int for layer in kept):
        raise UserError(f"{where}: ssm_cfg should be an object and attn_layers a list of layer numbers")
    state_size = ssm.get("d_state", DEFAULT_STATE_SIZE[mixer])
    try:
        config = hybrid_config(llama, kept, mixer=mixer, head_alignment="official", state_size=state_size)
        config.conv_kernel = ssm.get("d_conv", 4)
    except StrictDataclassError as error:
        raise UserError(f"{where}: {reason(error)}") from None
    for key, value in _implied(config).items():
        if said.get(key, value) != value:
            raise UserError(f"{where}: {key} is {said[key]!r}, but config.json implies {value!r}")
    _check_ssm(ssm, config, where)
    if any(".mha." in name for name in weights):
        config.rope_parameters = {"rope_type": "default", "rope_theta": llama.rope_parameters["rope_theta"]}
    config.released = {"config": llama_json, "mamba_config": said}
    return config


def _check_ssm(ssm: dict[str, Any], config: M1Config, where: str) -> None:
    """Raises UserError for settings under which the released mixers compute something else than M1's."""
    known: dict[str, Any] = {"expand": None, "d_state": None, "d_conv": None, "chunk_size": None, "conv_bias": True}
    if config.mixer == "mamba2":
        known |= {
            "ngroups": config.num_attention_heads, "repeat_kv_before_conv": False, "norm_before_gate": False,
            "rmsnorm": True, "D_has_hdim": False, "bias": False,
        }  # fmt: skip
    else:
        known |= {"ngroups": None, "repeat_kv_before_conv": True, "dt_rank": "auto"}
    for key, value in ssm.items():
        if key not in known or known[key] not in (None, value):
            raise UserError(f"{where}: ssm_cfg has {key} = {value!r}, which M1's {config.mixer} layer doesn't support")


def _import_weights(weights: dict[str, Tensor], config: M1Config) -> dict[str, Tensor]:
    """Released tensors under M1's names: q|k|v split, parts of in_proj joined, time-step biases doubled."""
    rows = [config.mamba_size, config.mamba_kv_size, config.mamba_kv_size]
    imported = {}
    for name, tensor in weights.items():
        if name.endswith(".mha.in_proj.weight"):
            if tensor.shape[0] != sum(rows):
                raise UserError(f"{name!r} has {tensor.shape[0]} rows, but config.json implies {sum(rows)} for q|k|v")
            for part, piece in zip("qkv", tensor.split(rows), strict=True):
                imported[name.replace("mha.in_proj", f"self_attn.{part}_proj")] = piece
        elif name.endswith(f".mamba.{PARTS[0]}.weight"):
            parts = [name.replace(PARTS[0], part) for part in PARTS]
            if missing := [part for part in parts if part not in weights]:
                raise UserError(f"the checkpoint has a tensor {name!r} but no {missing[0]!r}: it is incomplete")
            imported[name.replace(PARTS[0], "in_proj")] = torch.cat([weights[part] for part in parts])
        elif name.endswith(".mamba.dt_proj.bias"):
            imported[name] = tensor * 2
        elif name.endswith(tuple(f".mamba.{part}.weight" for part in PARTS)):
            continue  # joined with the first part
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            imported[name.replace(".mha.out_proj.", ".self_attn.o_proj.")] = tensor
    return imported


def _export_weights(weights: dict[str, Tensor], config: M1Config) -> dict[str, Tensor]:
    """M1's tensors under the released names: q|k|v joined, time-step biases halved (both in Mamba-1 models only)."""
    exported = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.mixer == "mamba2":
            exported[name] = tensor
        elif name.endswith("self_attn.q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            exported[name.replace("self_attn.q_proj", "mha.in_proj")] = torch.cat(parts)
        elif name.endswith(".mamba.dt_proj.bias"):
            exported[name] = tensor / 2
        elif not name.endswith((".self_attn.k_proj.weight", ".self_attn.v_proj.weight")):
            exported[name.replace(".self_attn.o_proj.", ".mha.out_proj.")] = tensor
    return exported
