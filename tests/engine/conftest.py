"""The models an engine runs, tiny."""

import pytest
from checkpoints import scramble
from transformers import LlamaForCausalLM

from m1.model.convert import convert


@pytest.fixture(params=["hybrid", "hybrid-mamba2", "transformer"])
def model(request, hybrid, teacher_dir, tmp_path):
    match request.param:
        case "hybrid":
            return hybrid
        case "hybrid-mamba2":
            return scramble(convert(teacher_dir, tmp_path, [1, 3], mixer="mamba2"))
        case _:
            return LlamaForCausalLM.from_pretrained(teacher_dir).eval()
