"""The ways to say which layers stay attention."""

import json

import pytest

from m1.errors import UserError
from m1.layer_choice import choose_layers, evenly_spaced


@pytest.mark.parametrize(
    ("layers", "ratio", "kept"),
    [
        (4, 0.5, [1, 3]),
        (8, 0.25, [3, 7]),
        (28, 6 / 28, [3, 8, 13, 17, 22, 27]),
        (4, 1.0, [0, 1, 2, 3]),
        (4, 0.01, [3]),
        (4, 0.4, [1, 3]),
    ],
)
def test_evenly_spaced_layers(layers, ratio, kept):
    assert evenly_spaced(layers, ratio) == kept
    assert choose_layers(layers, None, ratio) == kept


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_impossible_ratio(ratio):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        choose_layers(4, None, ratio)


def test_ranked_layers(tmp_path):
    path = tmp_path / "a:b.json"
    path.write_text(json.dumps({"ranking": [2, 0, 3, 1]}))
    assert choose_layers(4, f"@{path}:2", None) == [0, 2]
    assert choose_layers(4, f"@{path}:1", None) == [2]
    for count, layers, message in (
        (5, 4, "5 layers to keep of 4"),
        (0, 4, "0 layers"),
        (2, 6, "this teacher has 0 to 5"),
    ):
        with pytest.raises(UserError, match=message):
            choose_layers(layers, f"@{path}:{count}", None)
    for ranking, message in (([0, 1, 2, 2], "ranks the layers"), ([0, "a", 1, 2], "no finished ranking")):
        path.write_text(json.dumps({"ranking": ranking}))
        with pytest.raises(UserError, match=message):
            choose_layers(4, f"@{path}:2", None)
    path.write_text(json.dumps({"kl": {"0": 0.5}}))
    with pytest.raises(UserError, match="no finished ranking"):
        choose_layers(4, f"@{path}:2", None)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("1,3", [1, 3]), ("0-2", [0, 1, 2]), (" 5 , 8 - 10,12-12 ", [5, 8, 9, 10, 12]), ("0-1,3-4", [0, 1, 3, 4])],
)
def test_named_layers_and_ranges(text, kept):
    assert choose_layers(16, text, None) == kept


@pytest.mark.parametrize(
    "text", ["1;3", "1 3", ",", "@ranking.json", "@:3", "@ranking.json:x", "one", "None", "1-", "-3", "1-2-3", "2-x"]
)
def test_text_that_is_no_choice(text):
    with pytest.raises(UserError, match="expected"):
        choose_layers(4, text, None)


def test_no_layer_has_to_be_asked_for():
    assert choose_layers(4, "none", None) == []
    for nothing in ("", []):
        with pytest.raises(UserError, match=r"keep at least one .* give none"):
            choose_layers(4, nothing, None)


def test_a_range_that_runs_backwards():
    with pytest.raises(UserError, match="'5-3': a range begins with its lower layer"):
        choose_layers(8, "1,5-3", None)


@pytest.mark.parametrize("both", [(None, None), ("1", 0.5)])
def test_exactly_one_way(both):
    with pytest.raises(UserError, match="either"):
        choose_layers(4, *both)
