"""m1 import-gguf: the checkpoint is the model that the file was made of, its text rules and stop tokens included."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import LLAMA3_ROPE
from gguf_files import END, PAD, THINK, TOKENS, gguf_teacher, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.convert import convert
from m1.model.gguf import import_gguf, read_gguf

PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def imported(tmp_path, model, dtype="float32", **options):
    """The model and the tokenizer of a file written from `model`, through a checkpoint folder."""
    import_gguf(write_gguf(tmp_path / "tiny.gguf", model, **options), tmp_path / "out", dtype)
    return load_model(tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", PRE)
@torch.no_grad()
def test_logits_are_the_models(tmp_path, family, tied, tokens):
    teacher = gguf_teacher(family, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    model, _ = imported(tmp_path, teacher, pre=PRE[family])
    assert torch.equal(model(tokens).logits, teacher(tokens).logits)
    ours, theirs = model.config.to_dict(), teacher.config.to_dict()
    assert ours["rms_norm_eps"] == 1e-5 and not {"quantization_config", "unk_token_id"} & set(ours)
    assert "Somebody's" not in (tmp_path / "out/config.json").read_text()
    same = ("head_dim", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "eos_token_id")
    assert {key: ours.get(key) for key in same} == {key: theirs.get(key) for key in same} | (
        {"head_dim": 32} if family == "qwen2" else {}
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_dequantized_values_are_exact(tmp_path, kind):
    teacher = gguf_teacher(hidden_size=64, intermediate_size=96)
    imported(tmp_path, teacher, kind=kind)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "half", "bfloat16")
    full, half = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "half/model.safetensors")
    for name, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        ours = full[f"model.layers.3.{name}.weight"]
        stored = next(t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == f"blk.3.{theirs}.weight")
        assert np.array_equal(ours.numpy(), gguf.dequantize(stored.data, stored.tensor_type))
        assert not torch.equal(ours, teacher.state_dict()[f"model.layers.3.{name}.weight"])
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


LONG = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}


def divisors(scaling):
    """What llama.cpp's converter stores of Llama 3's scaling: by how much each frequency is divided."""
    plain = scaling["rope_theta"] ** -(np.arange(0, 32, 2) / 32)
    wavelengths = 2 * np.pi / plain
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


@torch.no_grad()
def test_llama_3_rope_scaling_is_kept(tmp_path, tokens):
    teacher = gguf_teacher(rope_parameters=LONG)
    assert len(set(divisors(LONG).tolist())) > 1 and divisors(LONG).max() == LONG["factor"]
    model, _ = imported(tmp_path, teacher, extra={"rope_freqs.weight": divisors(LONG)})
    assert model.config.rope_parameters == teacher.config.rope_parameters
    assert torch.equal(model(tokens).logits, teacher(tokens).logits)


def ids(tokenizer, text, **options):
    return tokenizer(text, **options).input_ids


def test_text_is_split_by_the_rule_of_the_file(tmp_path):
    """By GPT-2's rule, which transformers takes for this one, a newline before a digit stands alone."""
    _, tokenizer = imported(tmp_path, gguf_teacher())
    assert ids(tokenizer, "\n\n1") == [TOKENS.index("ĊĊ"), TOKENS.index("1")]
    assert ids(tokenizer, "ab") == [TOKENS.index("a"), TOKENS.index("b")]
    assert ids(tokenizer, "a<think><|end|>") == [TOKENS.index("a"), THINK, END]
    assert tokenizer.decode([END, THINK, TOKENS.index("a")], skip_special_tokens=True) == "<think>a"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "é1"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>é1<|end|><|assistant|>"
    assert tokenizer.decode(ids(tokenizer, chat)) == chat
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD, END, None)
    assert tokenizer.model_max_length == 512 and len(tokenizer) == len(TOKENS)


def test_text_of_llama_3(tmp_path):
    """It looks whole words up before it merges, begins with bos, and takes up to three digits together."""
    _, tokenizer = imported(tmp_path, gguf_teacher(), pre="llama-bpe", facts={"tokenizer.ggml.bos_token_id": PAD})
    assert ids(tokenizer, "ab") == [PAD, TOKENS.index("ab")]
    assert ids(tokenizer, "ab", add_special_tokens=False) == [TOKENS.index("ab")]
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'LL \n\n12345")
    assert [word for word, _ in split] == ["I", "'LL", "ĠĊĊ", "123", "45"]


def test_text_of_qwen(tmp_path):
    imported(tmp_path, gguf_teacher("qwen2"), pre="qwen2")
    theirs = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("Ċ", "Ċ")]).backend_tokenizer
    ours = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))  # transformers replaces its rules by its own
    for text in ("e\u0301 12345\n\n  1", "I'll \u00e9\u4e16\u754c  \r\nab\t,.;"):
        assert ours.normalizer.normalize_str(text) == theirs.normalizer.normalize_str(text)
        assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)
        assert ours.encode(text).ids == theirs.encode(text).ids


@pytest.mark.parametrize(("more", "expected"), [({}, END), ({"tokenizer.ggml.eot_token_id": PAD}, [PAD, END])])
def test_answers_end_after_every_stop_token(tmp_path, more, expected):
    model, _ = imported(tmp_path, gguf_teacher(), facts=more)
    assert model.generation_config.eos_token_id == expected


def test_bos_is_added_where_the_file_says_so(tmp_path):
    facts = {"tokenizer.ggml.bos_token_id": PAD, "tokenizer.ggml.add_bos_token": True}
    _, tokenizer = imported(tmp_path, gguf_teacher(), facts=facts)
    assert ids(tokenizer, "a") == [PAD, TOKENS.index("a")]


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    """Its vocabulary takes seconds, and transformers reads it three times."""
    own, made = gguf.GGUFReader, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: made.append(path) or own(path))
    read_gguf(write_gguf(tmp_path / "tiny.gguf", gguf_teacher()), "float32")
    assert len(made) == 1


def test_convert_takes_the_file_itself(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_teacher(), kind="Q8_0")
    import_gguf(file, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "a", [1])
    convert(file, tmp_path / "b", [1])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert a["model.norm.weight"].dtype == torch.bfloat16
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write_gguf(file, gguf_teacher(initializer_range=0.2), kind="Q8_0")
    with pytest.raises(UserError, match="other settings"):
        convert(file, tmp_path / "b", [1])


def test_the_same_import_is_done_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_gguf(Path("tiny.gguf"), gguf_teacher())
    import_gguf(file, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").stat()
    import_gguf(file, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat() == before
    with pytest.raises(UserError, match="dtype=bfloat16, now float32"):
        import_gguf(file, tmp_path / "out", "float32")
