"""Tiny checkpoints every test can share; they are made by transformers itself, in the layouts it publishes."""

import os

# The kernels' and torch's threads share the cores with pytest's: don't spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import m1.model
from m1.model.convert import convert
from m1.model.tokenizer import byte_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_llama(**changes):
    """4 layers, 4 heads of 32 sharing 2 KV heads: head_dim is twice the state size, so head alignment matters."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        | changes
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def save_checkpoint(model, folder, **options):
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    return save_checkpoint(tiny_llama(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def hybrid_dir(tmp_path_factory, teacher_dir):
    out = tmp_path_factory.mktemp("hybrid")
    convert(teacher_dir, out, [1, 3])
    return out


@pytest.fixture
def hybrid(hybrid_dir):
    """A hybrid whose new parameters are all random, so that a wrong conv or time step can't hide behind its init."""
    model = m1.model.M1ForCausalLM.from_pretrained(hybrid_dir).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer, "mamba"):
                for parameter in (layer.mamba.conv1d.weight, layer.mamba.conv1d.bias, layer.mamba.D):
                    parameter.normal_(std=0.5)
                layer.mamba.A_log.uniform_(-1, 1)
                layer.mamba.dt_proj.bias.uniform_(-3, 0)
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(2))
