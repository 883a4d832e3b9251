"""Invariant 10: every shipped recipe parses; mistakes are named."""

from pathlib import Path

import pytest

from m1.errors import UserError
from m1.recipe import load_pipeline, load_stage

RECIPES = sorted(path.parent for path in Path(__file__).parents[1].glob("recipes/*/pipeline.toml"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_parse_and_chain(folder):
    """Every model a stage reads was written by a stage before it, or is not the pipeline's own."""
    pipeline, stages = load_pipeline(folder)
    written = set()
    for stage in stages.values():
        models = getattr(stage, "models", {}).values()
        for path in [getattr(stage, "model", None), getattr(stage, "teacher", None), *models]:
            assert path is None or not path.startswith(pipeline.out) or path in written
        written.add(stage.out)


CONVERT = 'stage = "convert"\nteacher = "a"\nout = "b"\nkeep_attention = [1]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONVERT + "keep_atention = [1]", "unknown key 'keep_atention'; did you mean 'keep_attention'"),
        (CONVERT.replace("[1]", '["1"]'), r"keep_attention = \['1'\] should be list\[int\]"),
        (CONVERT + 'head_alignment = "other"', "head_alignment = 'other' should be 'official' or 'attention'"),
        (CONVERT.replace('out = "b"\n', ""), "missing key 'out'"),
        (CONVERT.replace("convert", "konvert"), "stage = 'konvert' must be one of convert, sft"),
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


def test_recipe_for_another_command(tmp_path):
    (tmp_path / "stage.toml").write_text(CONVERT)
    with pytest.raises(UserError, match="is a recipe for `m1 convert`, not for `m1 sft`"):
        load_stage(tmp_path / "stage.toml", "sft")
