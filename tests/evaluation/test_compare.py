"""What is compared, what may be compared, and what is printed. test_intervals.py is about the test itself."""

import json

import pytest

from m1.cli import render
from m1.errors import UserError
from m1.evaluation.compare import compare


def result(folder, accuracies, ks=("1", "2"), golds=None, text="what is {}?", **settings):
    """A result folder; accuracies: problem -> (pass@1, maj)."""
    folder.mkdir()
    per_problem = {i: {"pass@1": p, "maj@k": dict.fromkeys(ks, m)} for i, (p, m) in accuracies.items()}
    content = {"settings": {"seed": 0} | settings, "maj@k": dict.fromkeys(ks), "per_problem": per_problem}
    (folder / "result.json").write_text(json.dumps(content))
    rows = [{"id": i, "text": text.format(i), "answers": (golds or {}).get(i, ["1"])} for i in accuracies]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_compare(tmp_path):
    a = result(tmp_path / "a", {"x": (0.5, 1.0), "y": (0.0, 0.0), "z": (1.0, 1.0)}, temperature=0.7)
    b = result(tmp_path / "b", {"z": (0.0, 0.0), "y": (0.0, 0.0), "x": (0.75, 1.0)}, temperature=1.0)
    for folder, dtype in ((a, "float32"), (b, "bfloat16")):
        path = folder / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype, "sampler": "engine"}))
    found = compare(a, b)
    assert found["problems"] == 3 and found["resamples"] == 10_000
    assert found["measures"]["pass@1"]["difference"] == pytest.approx(-0.25)
    assert found["measures"]["maj@2"]["difference"] == pytest.approx(-1 / 3)
    assert found["most_different"] == [{"problem": "z", "a": 1.0, "b": 0.0}, {"problem": "x", "a": 0.5, "b": 0.75}]
    assert found["settings_that_differ"] == {"temperature": [0.7, 1.0], "dtype": ["float32", "bfloat16"]}


def test_other_numbers_of_samples_meet_at_the_largest_vote_of_both(tmp_path):
    a = result(tmp_path / "a", {"x": (0.5, 1.0)}, ks=("1", "2", "4", "8", "16"))
    b = result(tmp_path / "b", {"x": (0.5, 1.0)}, ks=("1", "2", "4", "8", "12"))
    assert set(compare(a, b)["measures"]) == {"pass@1", "maj@8"}


def test_only_results_of_the_same_problems(tmp_path):
    both = {"x": (0.5, 1.0), "y": (0.0, 0.0)}
    a = result(tmp_path / "a", both)
    fewer = result(tmp_path / "fewer", {"x": (0.5, 1.0)})
    with pytest.raises(UserError, match=r"different problems: 'y' and 0 more are only in .*/a"):
        compare(a, fewer)
    with pytest.raises(UserError, match=r"are only in .*/a"):
        compare(fewer, a)
    with pytest.raises(UserError, match=r"'y' has different golds: \['1'\] in .*/a and \['2'\] in .*/golds"):
        compare(a, result(tmp_path / "golds", both, golds={"y": ["2"]}))
    with pytest.raises(UserError, match="'x' has different texts"):
        compare(a, result(tmp_path / "texts", both, text="which is {}?"))


def test_unfinished_or_foreign_folders(tmp_path):
    a = result(tmp_path / "a", {"x": (0.5, 1.0)})
    with pytest.raises(UserError, match=r"nowhere/result.json is missing"):
        compare(a, tmp_path / "nowhere")
    old = result(tmp_path / "old", {"x": (0.5, 1.0)})
    (old / "result.json").write_text('{"settings": {}, "maj@k": {}}')
    with pytest.raises(UserError, match="no results per problem"):
        compare(old, a)
    shard = result(tmp_path / "shard", {"x": (0.5, 1.0)})
    (shard / "result.json").write_text((shard / "result.json").read_text().replace("{", '{"shard": "1/4", ', 1))
    for sides in ((a, shard), (shard, a)):
        with pytest.raises(UserError, match="shard is shard 1/4 of an evaluation: join all with `m1 eval merge` first"):
            compare(*sides)
    (old / "result.json").write_text('{"settings"')
    with pytest.raises(UserError, match="not valid JSON"):
        compare(old, a)


def test_what_is_printed(tmp_path, capsys):
    a = result(tmp_path / "a", {"x": (0.5, 1.0), "[y]": (0.0, 0.0)}, temperature=0.7)
    b = result(tmp_path / "b", {"x": (1.0, 1.0), "[y]": (0.25, 0.0)}, temperature=1.0)
    found = compare(a, b)
    render.comparison(found)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == found
    assert any("pass@1" in line and "25.0" in line and "62.5" in line and "37.5" in line for line in lines)
    assert "different setting: temperature is 0.7 in A and 1.0 in B" in lines
    assert " 50.0 -> 100.0 %  x" in lines and "  0.0 ->  25.0 %  [y]" in lines
