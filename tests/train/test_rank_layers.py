"""m1 rank-layers: what it measures, that it goes on where it was cut off, and that `convert` reads it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint, scramble, tiny_teacher

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


@torch.no_grad()
def divergence(student, teacher_dir):
    """KL of the fixture's rows in nats a token, each row alone, and the number of tokens."""
    teacher, tokenizer = load_model(teacher_dir)
    chats = [[{"role": "user", "content": "7+5*3"}, {"role": "assistant", "content": "12, 36"}]]
    chats.append([{"role": "user", "content": "a"}])
    rows = [torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)]) for chat in chats]
    total, tokens = 0.0, sum(row.shape[1] for row in rows)
    for row in rows:
        t, s = (model(row).logits.log_softmax(-1) for model in (teacher, student))
        total += (t.exp() * (t - s)).sum().item()
    return total / tokens, tokens


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_costs_are_those_of_the_converted_models(tmp_path, teacher_dir, data, mixer):
    """Each cost equals the KL of the checkpoint `convert` would write with that one layer replaced, unpadded."""
    result = rank_layers(teacher_dir, data, tmp_path / "r.json", mixer=mixer)
    for layer in range(4):
        student = convert(teacher_dir, tmp_path / str(layer), sorted({0, 1, 2, 3} - {layer}), mixer=mixer)
        expected, tokens = divergence(student, teacher_dir)
        assert result["kl"][str(layer)] == pytest.approx(expected, rel=1e-3) and result["tokens"] == tokens
    costs = [result["kl"][str(layer)] for layer in result["ranking"]]
    assert costs == sorted(costs, reverse=True)


@pytest.fixture
def aligned(tmp_path, teacher_dir):
    """A hybrid without attention, whose mixers no conversion makes: as trained ones."""
    model = scramble(convert(teacher_dir, tmp_path / "all", "none", mixer="mamba2"))
    return save_checkpoint(model, tmp_path / "aligned")


def test_the_cheapest_aligned_mixer_comes_next(tmp_path, teacher_dir, aligned, data):
    """At each step, the model `convert` would write with one more of the aligned mixers, of all such the nearest."""
    options = {"aligned": str(aligned), "mixer": "mamba2"}
    result = rank_layers(teacher_dir, data, tmp_path / "r.json", **options)
    kept = [0, 1, 2, 3]
    for layer in reversed(result["ranking"]):
        costs = {}
        for i in kept:
            rest = [j for j in kept if j != i] or "none"
            student = convert(teacher_dir, tmp_path / f"{len(kept)}-{i}", rest, **options)
            costs[i], _ = divergence(student, teacher_dir)
        assert min(costs, key=costs.get) == layer
        assert result["kl"][str(layer)] == pytest.approx(costs[layer], rel=1e-3)
        kept.remove(layer)
    assert not kept


def test_a_layer_that_does_nothing_is_the_cheapest(tmp_path, data):
    """Attention and its conversion both write nothing through a zero output projection."""
    teacher = tiny_teacher()
    torch.nn.init.zeros_(teacher.model.layers[2].self_attn.o_proj.weight)
    save_checkpoint(teacher, tmp_path / "teacher")
    result = rank_layers(tmp_path / "teacher", data, tmp_path / "r.json")
    assert result["kl"]["2"] == pytest.approx(0, abs=1e-6) and result["ranking"][-1] == 2
    kept = convert(tmp_path / "teacher", tmp_path / "out", f"@{tmp_path / 'r.json'}:3").config.attention_layers
    assert kept == [0, 1, 3]


@pytest.mark.parametrize(("is_aligned", "models"), [(False, 4), (True, 10)])
def test_goes_on_where_it_was_cut_off(tmp_path, teacher_dir, aligned, data, monkeypatch, is_aligned, models):
    options = {"aligned": str(aligned), "mixer": "mamba2"} if is_aligned else {}
    whole = rank_layers(teacher_dir, data, tmp_path / "whole.json", **options)
    measure, calls = module._divergence, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(module, "_divergence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rank_layers(teacher_dir, data, tmp_path / "r.json", **options)
    assert not (tmp_path / "r.json").exists()
    assert rank_layers(teacher_dir, data, tmp_path / "r.json", **options) == whole
    assert len(calls) == models + 1  # one was cut off


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
    aligned = str(save_checkpoint(convert(teacher, tmp_path / "all", "none"), tmp_path / "aligned"))
    with pytest.raises(UserError, match="other settings"):
        rank_layers(teacher, data, tmp_path / "r.json", aligned=aligned)
    save_checkpoint(tiny_teacher(initializer_range=0.2), teacher)
    with pytest.raises(UserError, match="other settings"):
        rank_layers(teacher, data, tmp_path / "r.json")


def test_long_rows_are_cut(tmp_path, teacher_dir, data):
    whole, cut = (rank_layers(teacher_dir, data, tmp_path / f"{n}.json", max_length=n) for n in (1024, 5))
    assert cut["tokens"] < whole["tokens"] and cut["tokens"] <= 10
