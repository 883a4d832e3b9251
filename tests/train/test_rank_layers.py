"""m1 rank-layers: what it measures, that it goes on where it was cut off, and that `convert` reads it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher

from m1.data_options import Data
from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.convert import convert
from m1.recipe import RankLayersStage
from m1.train import rank_layers as module


def rank_layers(teacher, data, out, **options):
    return RankLayersStage(teacher=str(teacher), data=data, out=str(out), **options).run()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": "7+5*3", "solution": "12, 36"}, {"messages": [{"role": "user", "content": "a"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(path=str(path))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@torch.no_grad()
def test_costs_are_those_of_the_converted_models(tmp_path, teacher_dir, data, mixer):
    """Each cost equals the KL of the checkpoint `convert` would write with that one layer replaced, unpadded."""
    result = rank_layers(teacher_dir, data, tmp_path / "r.json", mixer=mixer)
    teacher, tokenizer = load_model(teacher_dir)
    chats = [[{"role": "user", "content": "7+5*3"}, {"role": "assistant", "content": "12, 36"}]]
    chats.append([{"role": "user", "content": "a"}])
    rows = [torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)]) for chat in chats]
    assert result["tokens"] == sum(row.shape[1] for row in rows)
    for layer in range(4):
        student = convert(teacher_dir, tmp_path / str(layer), sorted({0, 1, 2, 3} - {layer}), mixer=mixer)
        total = 0.0
        for row in rows:
            t, s = (model(row).logits.log_softmax(-1) for model in (teacher, student))
            total += (t.exp() * (t - s)).sum().item()
        assert result["kl"][str(layer)] == pytest.approx(total / result["tokens"], rel=1e-3)
    costs = [result["kl"][str(layer)] for layer in result["ranking"]]
    assert costs == sorted(costs, reverse=True)


def test_a_layer_that_does_nothing_is_the_cheapest(tmp_path, data):
    """Attention and its conversion both write nothing through a zero output projection."""
    teacher = tiny_teacher()
    torch.nn.init.zeros_(teacher.model.layers[2].self_attn.o_proj.weight)
    save_checkpoint(teacher, tmp_path / "teacher")
    result = rank_layers(tmp_path / "teacher", data, tmp_path / "r.json")
    assert result["kl"]["2"] == pytest.approx(0, abs=1e-6) and result["ranking"][-1] == 2
    kept = convert(tmp_path / "teacher", tmp_path / "out", f"@{tmp_path / 'r.json'}:3").config.attention_layers
    assert kept == [0, 1, 3]


def test_goes_on_where_it_was_cut_off(tmp_path, teacher_dir, data, monkeypatch):
    whole = rank_layers(teacher_dir, data, tmp_path / "whole.json")
    measure, calls = module._divergence, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(module, "_divergence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rank_layers(teacher_dir, data, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
    assert rank_layers(teacher_dir, data, tmp_path / "r.json") == whole
    assert len(calls) == 5  # two done, one cut off, two more


def test_other_settings_or_inputs_are_not_mixed(tmp_path, data):
    teacher = save_checkpoint(tiny_teacher(), tmp_path / "teacher")
    rank_layers(teacher, data, tmp_path / "r.json")
    for options in ({"seed": 1}, {"max_length": 4}, {"mixer": "mamba2"}, {"head_alignment": "attention"}):
        with pytest.raises(UserError, match="other settings"):
            rank_layers(teacher, data, tmp_path / "r.json", **options)
    with pytest.raises(UserError, match="other settings"):
        rank_layers(teacher, Data(path=data.path, limit=1), tmp_path / "r.json")
    before = Path(data.path).read_text()
    Path(data.path).write_text(before.replace("36", "37"))
    with pytest.raises(UserError, match="other settings"):
        rank_layers(teacher, data, tmp_path / "r.json")
    Path(data.path).write_text(before)
    save_checkpoint(tiny_teacher(initializer_range=0.2), teacher)
    with pytest.raises(UserError, match="other settings"):
        rank_layers(teacher, data, tmp_path / "r.json")


def test_long_rows_are_cut(tmp_path, teacher_dir, data):
    whole, cut = (rank_layers(teacher_dir, data, tmp_path / f"{n}.json", max_length=n) for n in (1024, 5))
    assert cut["tokens"] < whole["tokens"] and cut["tokens"] <= 10
