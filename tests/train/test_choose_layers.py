"""Choosing layers by trained gates: shares, the blend, what is saved, and that it resumes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_checkpoint, scramble, tiny_teacher
from test_stages import CHAIN, TRAINER, metrics

from m1.errors import UserError
from m1.layer_choice import from_ranking
from m1.model.checkpoint import load_model
from m1.model.convert import convert
from m1.recipe import ChooseLayersStage, ConvertStage
from m1.train import trainer as training
from m1.train.choose_layers import ChoiceTrainer, blend, shares


@pytest.fixture
def mixers_dir(teacher_dir, tmp_path):
    """A hybrid without attention, whose mixers no teacher had."""
    model = scramble(convert(teacher_dir, tmp_path / "all", "none"))
    return save_checkpoint(model, tmp_path / "mixers")


def choose_stage(model, teacher, out, **options):
    paths = {"model": str(model), "teacher": str(teacher), "out": str(out)}
    return ChooseLayersStage(**paths, **{"data": CHAIN, "trainer": TRAINER, "keep": 2} | options)


@pytest.mark.parametrize("budget", [0.5, 2, 3.9, 4])
def test_shares_sum_to_the_budget_in_the_gates_order(budget):
    gates = torch.tensor([0.1, -0.2, 0.0, 0.3], requires_grad=True)
    found = shares(gates, budget)
    assert found.sum().item() == pytest.approx(budget, abs=1e-4)
    assert found.argsort().tolist() == gates.argsort().tolist() or budget == 4
    found[0].backward()
    assert gates.grad[0] >= 0 and not gates.grad[1:].any()


@pytest.mark.parametrize(("step", "budget"), [(0, 19), (30, 13), (60, 7), (100, 7), (120, 7)])
def test_the_budget_falls_in_the_first_half(step, budget):
    """Of 31 layers, 7 to keep, in 120 steps."""
    state, model = SimpleNamespace(global_step=step, max_steps=120), SimpleNamespace(gates=range(31))
    assert ChoiceTrainer.budget.fget(SimpleNamespace(state=state, model=model, keep=7)) == budget


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_blend_goes_from_the_mixers_to_the_teacher(family, tmp_path):
    """Share 1 is the teacher, share 0 the model without attention, padded rows included."""
    save_checkpoint(tiny_teacher(family), tmp_path / "teacher")
    save_checkpoint(scramble(convert(tmp_path / "teacher", tmp_path / "all", "none")), tmp_path / "mixers")
    teacher, mixers, blended = (load_model(tmp_path / name)[0].eval() for name in ("teacher", "mixers", "mixers"))
    blend(blended, teacher)
    tokens = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    for share, expected in ((1.0, teacher), (0.0, mixers)):
        for layer in blended.model.layers:
            layer.share = torch.tensor(share)
        logits = [model(tokens, attention_mask=mask, use_cache=False).logits for model in (blended, expected)]
        torch.testing.assert_close(logits[0][mask.bool()], logits[1][mask.bool()])


def test_the_layer_whose_mixer_cannot_do_it_stays(mixers_dir, tmp_path):
    """The attention of all layers but one writes nothing, and their mixers learn that at once."""
    teacher = tiny_teacher()
    for i in (0, 1, 3):
        torch.nn.init.zeros_(teacher.model.layers[i].self_attn.o_proj.weight)
    save_checkpoint(teacher, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "raw", "none")
    trainer = TRAINER | {"max_steps": 30}
    choose_stage(tmp_path / "raw", tmp_path / "teacher", tmp_path / "out", trainer=trainer, keep=1).run()
    choice = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert choice["ranking"][0] == 2 and from_ranking(tmp_path / "out" / "ranking.json", 1, 4) == [2]
    assert sum(choice["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert max(choice["shares"], key=choice["shares"].get) == "2"
    hybrid, _ = load_model(tmp_path / "out")
    assert hybrid.config.attention_layers == [2]
    assert [hasattr(layer, "mamba") for layer in hybrid.model.layers] == [True, True, False, True]
    assert "forward_kl" in metrics(tmp_path / "out")[0]


def test_it_resumes_to_the_same_choice(mixers_dir, teacher_dir, tmp_path, monkeypatch):
    trainer = TRAINER | {"max_steps": 6, "save_steps": 3, "packing": True, "max_length": 128}
    whole = choose_stage(mixers_dir, teacher_dir, tmp_path / "whole", trainer=trainer)
    whole.run()
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"))
    train = ChoiceTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(ChoiceTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert not (tmp_path / "cut" / "ranking.json").exists()
    monkeypatch.setattr(ChoiceTrainer, "training_step", train)
    cut.run(resume=True)
    names = ("ranking.json", "model.safetensors")
    assert all((tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_a_trained_choice_is_saved_on_resume(mixers_dir, teacher_dir, tmp_path, monkeypatch):
    """Killed behind the last step: no step sets the shares any more."""
    stage = choose_stage(mixers_dir, teacher_dir, tmp_path / "out", trainer=TRAINER | {"max_steps": 2, "save_steps": 2})
    save = training._save
    monkeypatch.setattr(training, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    monkeypatch.setattr(training, "_save", save)
    stage.run(resume=True)
    assert len(json.loads((tmp_path / "out" / "ranking.json").read_text())["ranking"]) == 4


def test_gates_are_ranked_before_they_are_rounded(mixers_dir, teacher_dir, tmp_path, monkeypatch):
    """In bfloat16, the dtype of the teacher and so of what is saved, these are equal."""
    save_checkpoint(load_model(teacher_dir)[0].to(torch.bfloat16), tmp_path / "teacher")
    end = ChoiceTrainer._inner_training_loop

    def trained(self, *args, **kwargs):
        result = end(self, *args, **kwargs)
        self.model.gates.data.copy_(torch.tensor([0.1000, 0.1001, 0.1002, 0.1003]))
        return result

    monkeypatch.setattr(ChoiceTrainer, "_inner_training_loop", trained)
    choose_stage(mixers_dir, tmp_path / "teacher", tmp_path / "out", trainer=TRAINER | {"max_steps": 1}).run()
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["ranking"] == [3, 2, 1, 0]


def test_a_pipeline_converts_by_the_choice(mixers_dir, teacher_dir, tmp_path):
    """The ranking is a file inside of an earlier stage's output, which isn't there yet."""
    stage = choose_stage(mixers_dir, teacher_dir, tmp_path / "choice")
    ranking = f"@{tmp_path / 'choice' / 'ranking.json'}:2"
    convert_stage = ConvertStage(teacher=str(teacher_dir), out=str(tmp_path / "hybrid"), keep_attention=ranking)
    convert_stage.check([stage.out])
    with pytest.raises(UserError, match="is missing: check the path"):
        convert_stage.check([])


def test_what_it_cannot_blend_is_refused(mixers_dir, hybrid_dir, teacher_dir, tmp_path, monkeypatch):
    stage = choose_stage(mixers_dir, teacher_dir, tmp_path / "out")
    for changed, message in (
        ({"model": str(hybrid_dir)}, "of which 2 are attention already: .* keep_attention = none"),
        ({"keep": 4}, "keep = 4 of the 4 layers"),
        ({"model": str(teacher_dir)}, "has no Mamba layers: give a hybrid"),
        ({"shard": True}, "runs in one process, without shard = true"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(stage, **changed).run()
    monkeypatch.setattr("m1.train.choose_layers.world_size", lambda: 2)
    with pytest.raises(UserError, match="runs in one process"):
        stage.check()
    with pytest.raises(UserError, match="keep=0: need at least 1"):
        choose_stage(mixers_dir, teacher_dir, tmp_path / "out", keep=0)
