"""What a recipe will take: the formulas against models that exist, the paper's recipe, and what can't fit."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import m1

from m1.data_options import Data
from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.convert import convert
from m1.pipeline import load_pipeline
from m1.recipe import DistillStage, GRPOStage, SFTStage
from m1.train.choose_layers import blend
from m1.train.plan import CARDS, GIB, plan, size_of, with_attention
from m1.train.stage_trainer import weights_in_products

RECIPE = Path(__file__).parents[2] / "recipes" / "llama3.2-3b"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


@pytest.fixture
def recipe(tmp_path):
    """The paper's recipe, with Llama-3.2-3B's configuration in a folder."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA))
    folder = shutil.copytree(RECIPE, tmp_path / "recipe")
    for path in folder.glob("*.toml"):
        path.write_text(path.read_text().replace("meta-llama/Llama-3.2-3B-Instruct", str(tmp_path / "llama")))
    return folder


def test_the_papers_recipe(recipe, capsys):
    planned = list(plan(load_pipeline(recipe)[1], 8, "h100", 0.3))
    assert [stage.name for stage in planned] == ["distill", "math", "reasoning", "grpo"]
    assert {round(stage.parameters / 1e9, 3) for stage in planned} == {3.448}
    assert [stage.rows for stage in planned] == [(1, 8), (1, 8), (1, 4), (1, 64)]
    assert planned[2].tokens == 12_700 * 32 * 24_576
    distill = planned[0].memory
    states = [distill[part] / GIB for part in ("weights", "gradients", "optimizer")]
    assert states == pytest.approx([3.448e9 / 2**30 * size / 8 for size in (4, 4, 8)], rel=1e-3)
    work = 8 * 3.448e9 + 2 * 3.213e9  # recomputed, and the teacher's forward pass; attention scores come on top
    hours = planned[0].tokens * work / (8 * 989e12 * 0.3) / 3600
    assert hours < planned[0].hours < 1.3 * hours
    assert m1("pipeline", recipe, "--dry-run", "--gpus", 8) == 0
    printed = capsys.readouterr().out
    assert "20,300" in printed and "3.448 B" in printed and "computed and not measured" in printed


def test_what_cant_fit_is_refused(recipe):
    with pytest.raises(UserError, match=r"grpo.toml needs 8\d.\d GiB per GPU .*h100 has 79: set shard = true, or"):
        list(plan(load_pipeline(recipe)[1], 1, "h100", 0.3))
    path = recipe / "distill.toml"
    path.write_text(path.read_text().replace("shard = true", "shard = false"))
    with pytest.raises(UserError, match=r"distill.toml needs 8\d.\d GiB per GPU \(above all optimizer 25.7"):
        list(plan(load_pipeline(recipe)[1], 8, "h100", 0.3))
    path.write_text(re.sub("global_batch = 64", "global_batch = 12", path.read_text()))
    with pytest.raises(UserError, match=r"distill.toml: global_batch=12 can't be split over 8 processes"):
        list(plan(load_pipeline(recipe)[1], 8, "h100", 0.3))


def test_a_refusal_says_that_rows_have_no_maximum(recipe):
    path = recipe / "math.toml"
    path.write_text(path.read_text().replace("max_length = 8192\n", ""))
    with pytest.raises(UserError, match=r"math.toml needs .*without max_length in \[trainer\], rows count with the"):
        list(plan(load_pipeline(recipe)[1], 8, "h100", 0.3))


@pytest.mark.parametrize(("gpus", "card", "mfu"), [(0, "h100", 0.3), (1, "h100", 1.5), (1, "tpu", 0.3)])
def test_impossible_machines(gpus, card, mfu):
    with pytest.raises(UserError, match=r"need at least one|choose one of a100, h100"):
        list(plan({}, gpus, card, mfu))


def test_sizes_are_the_models(hybrid_dir, teacher_dir):
    for folder in (hybrid_dir, teacher_dir):
        model, _ = load_model(folder)
        size, layers = size_of(model.config), model.get_decoder().layers
        assert size.parameters == sum(p.numel() for p in model.parameters())
        assert size.products == weights_in_products(model)
        assert size.root + sum(p.numel() for p in layers.parameters()) == size.parameters
        assert size.attention == 128 * sum(hasattr(layer, "self_attn") for layer in layers)


def test_steps_and_the_parts_of_memory(hybrid_dir, teacher_dir):
    """Of generated data; of a file only the data tells. Replicated models have DDP's buckets, sharded ones gather."""
    chains, given = Data(task="chain", count=100), {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    common = {"out": "x", "model": str(hybrid_dir), "data": chains}
    stages = {
        "sft": SFTStage(**common, trainer=given, eval_rows=10),
        "file": SFTStage(**common | {"data": Data(path="rows.jsonl")}),
        "sharded": DistillStage(**common, teacher=str(teacher_dir), trainer=given, shard=True),
        "grpo": GRPOStage(**common, trainer=given | {"num_generations": 8}),
        "vllm": GRPOStage(**common, trainer=given | {"num_generations": 8}, rollout="vllm"),
        "server": GRPOStage(**common, trainer=given | {"num_generations": 8, "vllm_mode": "server"}, rollout="vllm"),
    }
    planned = {stage.name: stage for stage in plan(stages, 2, "h200", 0.3)}
    assert [planned[name].steps for name in stages] == [23, None, 25, 200, 200, 200]
    assert planned["file"].hours is None and planned["grpo"].hours > 0
    assert "buckets" in planned["sft"].memory and "gathered" not in planned["sft"].memory
    assert {"gathered", "teacher"} < planned["sharded"].memory.keys() and "buckets" not in planned["sharded"].memory
    assert "engine" in planned["grpo"].memory
    assert planned["vllm"].memory["vllm"] == 0.3 * CARDS["h200"].memory and "engine" not in planned["vllm"].memory
    assert not {"engine", "vllm"} & planned["server"].memory.keys()
    assert planned["sharded"].memory["optimizer"] == planned["sft"].memory["optimizer"] / 2


def test_a_blend_has_both_kinds_of_mixers(teacher_dir, tmp_path):
    """choose-layers trains the attention of every layer beside its mixer."""
    convert(teacher_dir, tmp_path / "all", "none")
    model, teacher = load_model(tmp_path / "all")[0], load_model(teacher_dir)[0]
    found = with_attention(size_of(model.config))
    blend(model, teacher)
    assert found.parameters == sum(p.numel() for p in model.parameters()) - len(model.gates)
