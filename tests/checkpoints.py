"""Tiny checkpoints, made by transformers itself in the layouts it publishes."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from m1.model.tokenizer import byte_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_teacher(family="llama", **changes):
    """4 layers, 4 heads of 32 sharing 2 KV heads: head_dim is twice the state size, so head alignment matters.

    heads * head_dim is twice the hidden size, and biases and norms are random: none can be lost unnoticed.
    """
    tokenizer = byte_tokenizer()
    config_class, model_class = FAMILIES[family]
    config = config_class(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 128 if family == "qwen2" else 64,  # Qwen2 has no head_dim of its own
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        | ({} if family == "qwen2" else {"head_dim": 32})
        | changes
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def save_checkpoint(model, folder, **options):
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def scramble(model):
    """Makes what conversion leaves at its initialisation random: a wrong conv or time step can't hide behind it."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        match name.split(".mamba.")[-1]:
            case "conv1d.weight" | "conv1d.bias" | "D":
                parameter.normal_(std=0.5)
            case "A_log":
                parameter.uniform_(-1, 1)
            case "dt_proj.bias" | "dt_bias":
                parameter.uniform_(-3, 0)
            case "norm.weight":
                parameter.uniform_(0.5, 1.5)
    return model
