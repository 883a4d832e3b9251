"""The released checkpoints' layout, both ways (docs/model.md).

    config.json        the teacher's Llama configuration; its rope scaling is ignored by the code it belongs to
    mamba_config.json  {d_model, ssm_cfg, rms_norm_eps, vocab_size, d_inner, d_xb, intermediate_size, hidden_act,
                        n_layer, attn_layers}
    model.layers.i.mamba.*                        as here
    model.layers.i.mha.{in_proj (q|k|v), out_proj}.weight   kept attention layers

That code adds `dt_proj.bias` twice, once in the linear map and once as the scan's bias, and the released weights were
trained so. Importing doubles our single bias, exporting halves it: exact, since it only moves the exponent.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from m1.errors import UserError
from m1.jsonl import read_json
from m1.model.checkpoint import read_weights
from m1.model.configuration import M1Config
from m1.model.convert import SHARED_FIELDS, copy_tokenizer, hybrid_config, model_from_weights, refuse_same_folder
from m1.model.modeling import M1ForCausalLM

SSM_DEFAULTS = {"expand": 1, "ngroups": 1, "d_state": 16}


def import_official(source: str | Path, out: str | Path) -> M1ForCausalLM:
    """Reads a released-layout folder and saves it as an M1 checkpoint; dtypes are kept.

    Raises:
        UserError: missing or malformed files, tensors that don't fit, or settings this model doesn't have.
    """
    source, out = Path(source), Path(out)
    refuse_same_folder(source, out)
    config = _import_config(source)
    weights = _import_weights(read_weights(source), config)
    model = model_from_weights(config, weights, source)
    model.save_pretrained(out)
    copy_tokenizer(source, out)
    return model


def export_official(source: str | Path, out: str | Path) -> None:
    """Writes the M1 checkpoint `source` in the released layout: config.json, mamba_config.json, model.safetensors.

    Raises:
        UserError: not an M1 checkpoint, or one with biases or rope scaling, which the released code doesn't have.
    """
    source, out = Path(source), Path(out)
    refuse_same_folder(source, out)
    if read_json(source / "config.json").get("model_type") != "m1":
        raise UserError(f"{source} is not an M1 checkpoint (model_type 'm1')")
    config = M1Config.from_pretrained(source)
    if config.attention_bias or config.mlp_bias:
        raise UserError("the released layout has no projection biases, this model has them: it can't be exported")
    if config.rope_parameters["rope_type"] != "default":
        raise UserError(
            f"the released code ignores rope scaling, this model has {config.rope_parameters['rope_type']!r}: "
            "exported, it would compute something else"
        )
    weights = _export_weights(read_weights(source), config)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})
    shared = {field: getattr(config, field) for field in SHARED_FIELDS}
    LlamaConfig(**shared, architectures=["LlamaForCausalLM"]).save_pretrained(out)
    mamba_config = {
        "d_model": config.hidden_size,
        "ssm_cfg": {**SSM_DEFAULTS, "d_state": config.state_size},
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "d_inner": config.mamba_size,
        "d_xb": config.mamba_kv_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "n_layer": config.num_hidden_layers,
        "attn_layers": config.attention_layers,
    }
    (out / "mamba_config.json").write_text(json.dumps(mamba_config, indent=4) + "\n")
    copy_tokenizer(source, out)


def _import_config(source: Path) -> M1Config:
    if read_json(source / "config.json").get("model_type") != "llama":
        raise UserError(f"{source}/config.json is not a Llama configuration, as the released layout has")
    llama = LlamaConfig.from_pretrained(source)
    mamba = read_json(source / "mamba_config.json")
    try:
        ssm = SSM_DEFAULTS | (mamba["ssm_cfg"] or {})
        config = hybrid_config(llama, mamba["attn_layers"], "official", ssm["d_state"])
        config.conv_kernel = ssm.get("d_conv", 4)
        expected = {"d_inner": config.mamba_size, "d_xb": config.mamba_kv_size, "n_layer": config.num_hidden_layers}
        wrong = [key for key, value in expected.items() if mamba[key] != value]
    except KeyError as error:
        raise UserError(f"{source}/mamba_config.json has no {error}") from None
    if wrong:
        key = wrong[0]
        raise UserError(f"{source}/mamba_config.json: {key} is {mamba[key]}, but config.json implies {expected[key]}")
    config.rope_parameters = {"rope_type": "default", "rope_theta": llama.rope_parameters["rope_theta"]}
    return config


def _import_weights(weights: dict[str, Tensor], config: M1Config) -> dict[str, Tensor]:
    rows = [config.mamba_size, config.mamba_kv_size, config.mamba_kv_size]
    imported = {}
    for name, tensor in weights.items():
        if name.endswith(".mha.in_proj.weight"):
            if tensor.shape[0] != sum(rows):
                raise UserError(f"{name!r} has {tensor.shape[0]} rows, q|k|v of this configuration are {sum(rows)}")
            for part, piece in zip("qkv", tensor.split(rows), strict=True):
                imported[name.replace("mha.in_proj", f"self_attn.{part}_proj")] = piece
        elif name.endswith(".mamba.dt_proj.bias"):
            imported[name] = tensor * 2
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            imported[name.replace(".mha.out_proj.", ".self_attn.o_proj.")] = tensor
    return imported


def _export_weights(weights: dict[str, Tensor], config: M1Config) -> dict[str, Tensor]:
    exported = {}
    for name, tensor in weights.items():
        if name.endswith("self_attn.q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            exported[name.replace("self_attn.q_proj", "mha.in_proj")] = torch.cat(parts)
        elif name.endswith((".k_proj.weight", ".v_proj.weight")):
            continue
        elif name.endswith(".mamba.dt_proj.bias"):
            exported[name] = tensor / 2
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            exported[name.replace(".self_attn.o_proj.", ".mha.out_proj.")] = tensor
    return exported
