"""Checkpoints that M1 doesn't read end in one line that says what they are and what to do."""

import json

import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher
from commands import check
from gguf_files import gguf_teacher, write_gguf
from safetensors.torch import load_file, save_file
from torch import nn

from m1.engine import Engine
from m1.errors import UserError

CUT = "is truncated or damaged"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda data: b"nonsense", "isn't a GGUF file"),
        (lambda data: b"", "isn't a GGUF file"),
        (lambda data: data[:8], CUT),
        (lambda data: data[:200], CUT),
        (lambda data: data[: len(data) // 2], CUT),
        (lambda data: data[:-1000], CUT),
    ],
)
def test_damaged_gguf(run, tmp_path, content, words):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_teacher())
    file.write_bytes(content(file.read_bytes()))
    check(run("import-gguf", file, tmp_path / "o"), str(file), words)
    check(run("convert", "--teacher", file, "--out", tmp_path / "o", "--attention-ratio", 0.5), str(file), words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"facts": {"general.architecture": "gemma2"}}, "is a 'gemma2' model; supported here: llama, qwen2, qwen3"),
        ({"facts": {"split.count": 3}}, "one of 3 parts: merge them"),
        ({"pre": "default"}, "splits text by the rule 'default'; known here: smollm, llama-bpe, qwen2"),
        ({"facts": {"tokenizer.ggml.model": "llama"}}, "splits text by the rule 'llama'"),
        ({"facts": {"llama.rope.scaling.type": "yarn"}}, "has rope scaling (yarn)"),
        ({"facts": {"llama.rope.scale_linear": 4.0}}, "has rope scaling (linear)"),
        ({"facts": {"llama.rope.dimension_count": 16}}, "rotates 16 of 32 channels"),
        ({"extra": {"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)}}, "frequencies aren't Llama 3's"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(128, dtype=np.float32)}}, "has 39 tensors, but a llama model has 38"),
        ({"facts": {"llama.feed_forward_length": 95}}, "tiny.gguf"),  # newer transformers notice it themselves
        ({"facts": {"llama.attention.head_count": 0}}, "can't be read as a llama model"),
        ({"facts": {"tokenizer.ggml.tokens": None}}, "can't be read as a llama model: no 'tokens'"),
        ({"facts": {"tokenizer.ggml.eos_token_id": 9999}}, "can't be read as a llama model"),
        ({"facts": {"llama.context_length": None}}, "can't be read as a llama model"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_gguf_of_which_something_would_be_lost(run, tmp_path, options, words):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_teacher(), **options)
    check(run("import-gguf", file, tmp_path / "o"), words)
    check(run("convert", "--teacher", file, "--out", tmp_path / "o", "--attention-ratio", 0.5), words)
    assert not (tmp_path / "o").exists()


def test_gguf_arguments(run, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_teacher())
    check(run("import-gguf", file, tmp_path / "o", "--dtype", "int8"), "'int8': expected float32, bfloat16, float16")
    check(run("import-gguf", tmp_path / "no.gguf", tmp_path / "o"), "can't read", "No such file")
    check(run("import-gguf", tmp_path, tmp_path / "o"), "can't read", "directory")
    check(run("import-gguf", file, file), "exists and isn't `m1 import-gguf` output")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    check(run("inspect", file), f"m1 import-gguf {file} FOLDER")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:5000])
    generate = "generate", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "s", "--model"
    check(run(*generate, broken), f"{broken} is truncated or damaged")
    check(run(*generate, tmp_path / "no.gguf"), "can't read", "No such file")
    assert run("import-gguf", file, tmp_path / "o")[0] == 0


METHODS = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "fp8"},
    {"quant_method": "torchao"},
    {"quant_method": "compressed-tensors"},
    {"load_in_4bit": True},
]


@pytest.fixture
def commands(tmp_path):
    """Commands that read a checkpoint, with a place for it."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1", "solution": "2"}\n')
    out = ("--out", tmp_path / "o")
    return lambda folder: {
        "convert": ("convert", "--teacher", folder, *out, "--attention-ratio", 0.5),
        "rank-layers": ("rank-layers", "--teacher", folder, "--data", tmp_path / "data.jsonl", *out),
        "inspect": ("inspect", folder),
        "import-official": ("import-official", folder, tmp_path / "o"),
        "export-official": ("export-official", folder, tmp_path / "o"),
        "generate": ("generate", "--model", folder, "--prompts", tmp_path / "p.jsonl", *out),
        "solve": ("solve", "1+1", "--model", folder),
        "eval": ("eval", "--model", folder, "--task", "chain", "--limit", 1, *out),
        "budget": ("budget", "--model", f"a={folder}", "--task", "chain", "--limit", 1, "--seconds", 1, *out),
    }


@pytest.mark.parametrize("table", METHODS, ids=str)
def test_quantized_configurations(run, commands, tmp_path, table):
    folder = save_checkpoint(tiny_teacher(), tmp_path / "teacher")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": table}))
    method = table.get("quant_method", "an unnamed method")
    for name, command in commands(folder).items():
        if name != "budget" or table is METHODS[0]:
            check(run(*command), f"is quantized ({method})", "give the unquantized checkpoint", "--quantize int8")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("form", ["one file", "shards", "pickle"])
def test_integers_in_place_of_floats(run, commands, tmp_path, dtype, form):
    folder = save_checkpoint(tiny_teacher(), tmp_path / "t", max_shard_size="100KB" if form == "shards" else "1GB")
    for file in folder.glob("*.safetensors"):
        weights = {name: t.to(dtype) if "mlp" in name else t for name, t in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        if form == "pickle":
            torch.save(weights, folder / "pytorch_model.bin")
            file.unlink()
    name = str(dtype).removeprefix("torch.")
    for command in ("convert", "rank-layers", "generate", "eval"):
        code, err = run(*commands(folder)[command])
        assert code == 2 and "is quantized ('model.layers.0.mlp" in err and "give the unquantized" in err, err
        assert name in err or {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}[name] in err


class Rounded(nn.Linear):
    """A linear layer as bitsandbytes makes them: its weight is integers."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().mul(20).to(torch.int8), requires_grad=False)


def by_module(model):
    model.model.layers[2].mlp.up_proj = Rounded(model.model.layers[2].mlp.up_proj)


def by_torch(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def by_configuration(model):
    model.config.quantization_config = {"quant_method": "torchao"}


@pytest.mark.parametrize("quantize", [by_module, by_torch, by_configuration])
def test_the_engine_refuses_quantized_models(quantize):
    model = tiny_teacher()
    quantize(model)
    with pytest.raises(UserError, match=r"the model is quantized \(.*\)[:,].* give the unquantized checkpoint"):
        Engine(model, max_model_len=64)
