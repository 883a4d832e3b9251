"""Every test of the network runs on a hybrid of each teacher family and each mixer."""

import pytest
from checkpoints import save_checkpoint, scramble, tiny_teacher

from m1.model import M1ForCausalLM
from m1.model.convert import convert

VARIANTS = [
    "llama-mamba",
    "qwen2-mamba",
    "qwen3-mamba",
    "qwen3-mamba-attention",
    "llama-mamba2",
    "qwen2-mamba2",
    "qwen3-mamba2",
]


@pytest.fixture(scope="session", params=VARIANTS)
def variant_dir(request, tmp_path_factory):
    family, mixer, *aligned = request.param.split("-")
    teacher = save_checkpoint(tiny_teacher(family), tmp_path_factory.mktemp("teacher"))
    out = tmp_path_factory.mktemp("hybrid")
    convert(teacher, out, [1, 3], mixer=mixer, head_alignment="attention" if aligned else "official")
    return out


@pytest.fixture
def hybrid(variant_dir):
    return scramble(M1ForCausalLM.from_pretrained(variant_dir).eval())
