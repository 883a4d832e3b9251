"""Invariant 10: every shipped recipe parses; mistakes are named."""

import dataclasses
import json
from pathlib import Path

import pytest

from m1.errors import UserError
from m1.model import M1Config
from m1.pipeline import load_pipeline
from m1.recipe import ConvertStage, load_stage

RECIPES = sorted(path.parent for path in Path(__file__).parents[1].glob("recipes/*/pipeline.toml"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_parse_and_chain(folder, monkeypatch):
    """Every model and file of the pipeline's own that a stage reads was written by a stage before it."""
    monkeypatch.setenv("M1_DATA", "data")
    pipeline, stages = load_pipeline(folder)
    written = set()
    for stage in stages.values():
        for path in map(str, stage.sources()):
            assert not path.startswith(pipeline.out) or path in written
        written.add(stage.out)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_the_transformers_twin_differs_in_its_model_alone(name, monkeypatch):
    monkeypatch.setenv("M1_DATA", "data")
    _, stages = load_pipeline(RECIPES[0].parent / "smollm2")
    own, twin = stages[name], stages[f"{name}-transformer"]
    assert twin == dataclasses.replace(own, model=twin.model, out=twin.out)
    assert stages["sft-transformer"].model == stages["convert"].teacher
    assert stages["grpo-transformer"].model == stages["sft-transformer"].out


CONVERT = 'stage = "convert"\nteacher = "a"\nout = "b"\nkeep_attention = [1]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONVERT + "keep_atention = [1]", "unknown key 'keep_atention'; did you mean 'keep_attention'"),
        (CONVERT.replace("[1]", '["1"]'), r"keep_attention = \['1'\] should be list\[int\]"),
        (CONVERT + "attention_ratio = 0.5", "stage.toml: give either"),
        (CONVERT.replace("keep_attention = [1]", ""), "stage.toml: give either"),
        (CONVERT.replace("[1]", '"1;3"'), "stage.toml: keep_attention '1;3'"),
        (CONVERT.replace("keep_attention = [1]", "attention_ratio = 7"), "attention_ratio 7.0"),
        (CONVERT.replace("keep_attention = [1]", "attention_ratio = true"), "attention_ratio = True should be"),
        (CONVERT + 'mixer = "mamba3"', "mixer = 'mamba3' should be 'mamba' or 'mamba2'"),
        (CONVERT + 'head_alignment = "other"', "head_alignment = 'other' should be 'official' or 'attention'"),
        (CONVERT.replace('out = "b"\n', ""), "missing key 'out'"),
        (CONVERT.replace("convert", "konvert"), "stage = 'konvert' must be one of convert, rank-layers, align, sft"),
        ("stage = ", "not valid TOML"),
        ('stage = "sft"\nout = "x"\n[data]\ntask = "chain"', "exactly one of `model`"),
        ('stage = "sft"\nout = "x"\nmodel = "m"\n[data]\nmax_step = 3', r"\[data\]: unknown key 'max_step'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "stage.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_stage(path)


def test_the_folder_of_data_is_the_environments(tmp_path, monkeypatch):
    text = 'stage = "rank-layers"\nteacher = "t"\n[data]\npath = ["$M1_DATA/a.jsonl", "b"]\nexclude = ["$M1_DATA/c"]'
    (tmp_path / "stage.toml").write_text(text + '\nprompt_template = "$M1 {problem} $x$"')
    monkeypatch.delenv("M1_DATA", raising=False)
    with pytest.raises(UserError, match=r"stage.toml reads \$M1_DATA/a.jsonl: set the environment variable M1_DATA to"):
        load_stage(tmp_path / "stage.toml")
    monkeypatch.setenv("M1_DATA", "/data/")
    data = load_stage(tmp_path / "stage.toml").data
    assert (data.path, data.exclude, data.prompt_template) == (["/data/a.jsonl", "b"], ["/data/c"], "$M1 {problem} $x$")


def test_recipe_for_another_command(tmp_path):
    (tmp_path / "stage.toml").write_text(CONVERT)
    with pytest.raises(UserError, match="is a recipe for `m1 convert`, not for `m1 sft`"):
        load_stage(tmp_path / "stage.toml", "sft")


def test_conversion_by_recipe(tmp_path, teacher_dir):
    """All that a conversion can be told reaches it, and a changed ranking makes it another recipe."""
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({"ranking": [2, 0, 3, 1]}))
    options = {"keep_attention": f"@{ranking}:2", "mixer": "mamba2", "head_alignment": "attention", "seed": 5}
    stage = ConvertStage(teacher=str(teacher_dir), out=str(tmp_path / "out"), **options)
    stage.run()
    config = M1Config.from_pretrained(tmp_path / "out")
    assert config.attention_layers == [0, 2] and config.mixer == "mamba2" and config.head_alignment == "attention"
    assert stage.finished()
    ranking.write_text(json.dumps({"ranking": [1, 0, 3, 2]}))
    with pytest.raises(UserError, match=r"made with other settings \(inputs.*not the same"):
        stage.finished()
    ConvertStage(teacher=str(teacher_dir), out=str(tmp_path / "ratio"), attention_ratio=0.25).run()
    assert M1Config.from_pretrained(tmp_path / "ratio").attention_layers == [3]
