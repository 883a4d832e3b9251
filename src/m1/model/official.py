"""The released checkpoints' layout, both ways (docs/model.md).

    config.json        the teacher's Llama configuration
    mamba_config.json  {d_model, ssm_cfg, rms_norm_eps, vocab_size, d_inner, d_xb, intermediate_size, hidden_act,
                        n_layer, attn_layers}
    model.layers.i.mamba.*         as here, Mamba-1 or (where there is a dt_bias) Mamba-2
    model.layers.i.mha.{in_proj (q|k|v), out_proj}.weight         attention kept by the Mamba-1 code
    model.layers.i.self_attn.{q,k,v,o}_proj.weight                attention kept by the Mamba-2 code

The Mamba-1 code adds `dt_proj.bias` twice, once in the linear map and once as the scan's bias, and its weights were
trained so. Importing doubles our single bias, exporting halves it: exact, since it only moves the exponent. That code's
`mha` also ignores the configuration's rope scaling; `self_attn` is transformers' own attention, which applies it.
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


def import_official(source: str | Path, out: str | Path) -> M1ForCausalLM:
    """Reads a released-layout folder and saves it as an M1 checkpoint; dtypes are kept.

    Raises:
        UserError: missing or malformed files, tensors that don't fit, or settings this model doesn't have.
    """
    source, out = Path(source), Path(out)
    refuse_same_folder(source, out)
    weights = read_weights(source)
    config = _import_config(source, weights)
    model = model_from_weights(config, _import_weights(weights, config), source)
    model.save_pretrained(out)
    copy_tokenizer(source, out)
    return model


def export_official(source: str | Path, out: str | Path) -> None:
    """Writes the M1 checkpoint `source` in the released layout: config.json, mamba_config.json, model.safetensors.

    Raises:
        UserError: not an M1 checkpoint, or one with parts that the released code doesn't have: biases, QK-norm,
            rope scaling in Mamba-1 models.
    """
    source, out = Path(source), Path(out)
    refuse_same_folder(source, out)
    if read_json(source / "config.json").get("model_type") != "m1":
        raise UserError(f"{source} is not an M1 checkpoint (model_type 'm1')")
    config = M1Config.from_pretrained(source)
    if config.attention_bias or config.attention_out_bias or config.mlp_bias:
        raise UserError("the released layout has no projection biases, this model has them: it can't be exported")
    if config.qk_norm:
        raise UserError("the released layout has no QK-norm, this model has it: it can't be exported")
    if config.mixer == "mamba" and config.rope_parameters["rope_type"] != "default":
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
        "ssm_cfg": {
            "expand": 1,
            "ngroups": config.num_attention_heads if config.mixer == "mamba2" else 1,
            "d_state": config.state_size,
        },
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


def _import_config(source: Path, weights: dict[str, Tensor]) -> M1Config:
    if read_json(source / "config.json").get("model_type") != "llama":
        raise UserError(f"{source}/config.json is not a Llama configuration, as the released layout has")
    llama = LlamaConfig.from_pretrained(source)
    mamba = read_json(source / "mamba_config.json")
    mixer = "mamba2" if any(name.endswith(".mamba.dt_bias") for name in weights) else "mamba"
    try:
        ssm = {"d_state": 16 if mixer == "mamba" else 128, **(mamba["ssm_cfg"] or {})}
        config = hybrid_config(llama, mamba["attn_layers"], "official", ssm["d_state"], mixer)
        config.conv_kernel = ssm.get("d_conv", 4)
        expected = {"d_inner": config.mamba_size, "d_xb": config.mamba_kv_size, "n_layer": config.num_hidden_layers}
        wrong = [key for key, value in expected.items() if mamba[key] != value]
    except KeyError as error:
        raise UserError(f"{source}/mamba_config.json has no {error}") from None
    if wrong:
        key = wrong[0]
        raise UserError(f"{source}/mamba_config.json: {key} is {mamba[key]}, but config.json implies {expected[key]}")
    if ssm.get("repeat_kv_before_conv", mixer == "mamba") != (mixer == "mamba"):
        raise UserError(f"{source}/mamba_config.json: repeat_kv_before_conv is unlike all released {mixer} models")
    if any(".mha." in name for name in weights):
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
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.mixer == "mamba2":
            exported[name] = tensor
        elif name.endswith("self_attn.q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            exported[name.replace("self_attn.q_proj", "mha.in_proj")] = torch.cat(parts)
        elif name.endswith(".mamba.dt_proj.bias"):
            exported[name] = tensor / 2
        elif not name.endswith((".k_proj.weight", ".v_proj.weight")):
            exported[name.replace(".self_attn.o_proj.", ".mha.out_proj.")] = tensor
    return exported
