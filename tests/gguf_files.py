"""Tiny GGUF files, written as llama.cpp's converter writes them."""

import gguf
import numpy as np
from checkpoints import tiny_teacher
from gguf.quants import quantize
from tokenizers import pre_tokenizers

from m1.model.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*ALPHABET, "ĊĊ", "ab", *SPECIAL_TOKENS, "<think>"]
MERGES = ["Ċ Ċ"]  # "ab" has none: only a tokenizer that looks whole words up finds it
PAD, END, THINK = TOKENS.index("<|pad|>"), TOKENS.index("<|end|>"), TOKENS.index("<think>")
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


def gguf_teacher(family="llama", **changes):
    """A tiny teacher with the vocabulary of the files."""
    return tiny_teacher(family, **({"vocab_size": len(TOKENS), "eos_token_id": END, "pad_token_id": PAD} | changes))


def write_gguf(path, model, pre="smollm", kind="F32", facts=None, extra=None):
    """Writes a model, its matrices as `kind`. `facts` overrides metadata (None drops it), `extra` adds tensors."""
    config, writer = model.config, gguf.GGUFWriter(path, model.config.model_type)
    own = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
    }  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "llama":
        own |= {"rope.dimension_count": head_dim, "vocab_size": config.vocab_size}
    if config.model_type != "qwen2":
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    kinds = [gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t in TOKENS]
    kinds[THINK] = gguf.TokenType.USER_DEFINED
    text = {
        "model": "gpt2", "pre": pre, "tokens": TOKENS, "token_type": [int(k) for k in kinds], "merges": MERGES,
        "eos_token_id": END, "padding_token_id": PAD,
    }  # fmt: skip
    known = {f"{config.model_type}.{name}": value for name, value in own.items()}
    known |= {"general.name": "Somebody's model", "tokenizer.ggml.unknown_token_id": PAD}
    known |= {f"tokenizer.ggml.{name}": value for name, value in text.items()}
    for name, value in (known | {"tokenizer.chat_template": CHAT_TEMPLATE} | (facts or {})).items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(name, value)
    tensors = {name: t.detach().float().numpy() for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, array in tensors.items():
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = interleaved(array, head_dim)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        add_tensor(writer, name, array, kind if array.ndim == 2 else "F32")
    for name, array in (extra or {}).items():
        add_tensor(writer, name, array, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer, name, array, kind):
    type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(np.ascontiguousarray(array), type_), raw_dtype=type_)


def interleaved(array, head_dim):
    """Rows of each head in llama.cpp's order of rotated pairs: 0, half, 1, half + 1, ..."""
    heads = array.reshape(-1, 2, head_dim // 2, array.shape[1])
    return heads.swapaxes(1, 2).reshape(array.shape)
