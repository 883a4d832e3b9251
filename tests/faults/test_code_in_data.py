"""Checkpoints bring data, not code: nothing that comes with one is run, and nothing outside its folder is read."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher

from m1 import cli
from m1.errors import UserError
from m1.model.checkpoint import load_model, read_weights
from m1.reasoning.verifier import RewardModel

EVIL = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


@pytest.fixture
def evil(tmp_path):
    """A checkpoint whose configuration, tokenizer and model point to a file of its own; and what that would leave."""
    folder, ran = save_checkpoint(tiny_teacher(), tmp_path / "evil"), tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(str(ran)) + "class Evil: pass\n")
    change(folder / "config.json", auto_map={f"Auto{kind}": "evil.Evil" for kind in MODELS})
    return folder, ran


MODELS = ("Config", "ModelForCausalLM", "ModelForSequenceClassification")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Terminal:
    """A stdin on which somebody answers every question with yes."""

    def isatty(self):
        return True

    def readline(self, *_):
        return "y\n"

    def read(self, *_):
        return "y\n"


@pytest.mark.parametrize("model_type", ["evil", "llama"])
@pytest.mark.parametrize("command", ["solve", "weights", "eval", "convert", "inspect", "generate"])
def test_code_is_not_run_even_if_a_terminal_says_yes(
    evil, hybrid_dir, tmp_path, monkeypatch, capsys, command, model_type
):
    folder, ran = evil
    change(folder / "config.json", model_type=model_type)
    change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    arguments = {
        "solve": ["solve", "1+1", "--model", folder, "--n", 1, "--max-new-tokens", 1],
        "weights": ["solve", "1+1", "--model", hybrid_dir, "--weights", folder, "--n", 1, "--max-new-tokens", 1],
        "eval": ["eval", "--model", folder, "--task", "chain", "--limit", 1, "--n", 1, "--max-new-tokens", 1],
        "convert": ["convert", "--teacher", folder, "--out", tmp_path / "o", "--keep-attention", 1],
        "inspect": ["inspect", folder],
        "generate": ["generate", "--model", folder, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "s"],
    }[command]
    monkeypatch.setattr(sys, "argv", ["m1", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    printed = "".join(capsys.readouterr())
    assert not ran.exists() and "[y/N]" not in printed and "Traceback" not in printed
    if model_type == "evil":
        assert exit_.value.code == 2


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, index, shard):
    folder = save_checkpoint(tiny_teacher(), tmp_path / "model")
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / index).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": shard}}))
    for load in (load_model, read_weights, RewardModel.from_pretrained):
        with pytest.raises(UserError, match="must be plain files in its own folder"):
            load(folder)


def test_a_kernel_from_the_hub_is_refused(tmp_path):
    folder = save_checkpoint(tiny_teacher(), tmp_path / "model")
    change(folder / "config.json", attn_implementation="org/kernel")
    with pytest.raises(UserError, match="attn_implementation names code on the Hub"):
        load_model(folder)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (EVIL.format(str(self.path)),)


@pytest.mark.parametrize("raw", [True, False])
def test_a_pickle_is_read_as_tensors_alone(tmp_path, raw):
    folder, ran = save_checkpoint(tiny_teacher(), tmp_path / "model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": Payload(ran)})) if raw else torch.save({"a": Payload(ran)}, path)
    for load in (load_model, read_weights):
        with pytest.raises(UserError, match="its pickle is damaged"):
            load(folder)
    assert not ran.exists()


def test_training_arguments_of_a_checkpoint_are_never_read(tmp_path):
    folder, ran = save_checkpoint(tiny_teacher(), tmp_path / "model"), tmp_path / "ran"
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload(ran)))
    load_model(folder)
    read_weights(folder)
    assert not ran.exists()


@pytest.mark.parametrize("trainer", ["trust_remote_code = true", "model_init_kwargs = {trust_remote_code = true}"])
def test_a_recipe_cannot_trust_code_either(tmp_path, monkeypatch, capsys, trainer):
    recipe = 'stage = "sft"\nmodel = "m"\nout = "o"\n[data]\ntask = "chain"\n[trainer]\n' + trainer
    (tmp_path / "r.toml").write_text(recipe)
    monkeypatch.setattr(sys, "argv", ["m1", "sft", str(tmp_path / "r.toml")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2 and "never runs code that comes with a checkpoint" in capsys.readouterr().err
