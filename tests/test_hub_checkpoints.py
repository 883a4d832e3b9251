"""Checkpoints by their names on the Hub: which files are fetched, by the real client, and what is refused."""

import json
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher
from commands import check, m1
from hub_server import Hub
from safetensors.torch import load_file

from m1 import hub as names
from m1.errors import UserError
from m1.hub import checkpoint_folder, hub_commit
from m1.jsonl import read_json
from m1.model.checkpoint import load_model, read_weights
from m1.recipe import load_stage

NAME = "somebody/tiny"
OTHERS = ("modeling_tiny.py", "onnx/model.safetensors", "onnx/config.json", "README.md", "consolidated.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one model, a cache of our own, and a working folder without it."""
    folder = save_checkpoint(tiny_teacher(), tmp_path / "published")
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {name: b"no" for name in OTHERS}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names._fetch.cache_clear()
    with Hub(NAME, files, "models") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub
    names._fetch.cache_clear()


def fetched(hub):
    return {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}


def test_a_models_files_are_fetched_without_code(hub):
    folder = checkpoint_folder(NAME)
    assert folder.name == hub_commit(NAME) == hub.commit
    assert {path.name for path in folder.iterdir()} == set(hub.files) - set(OTHERS)
    assert torch.equal(load_model(NAME)[0].lm_head.weight, tiny_teacher().lm_head.weight)
    asked = len(hub.asked)
    assert checkpoint_folder(f"{NAME}@main") == folder and len(hub.asked) > asked
    assert checkpoint_folder(f"{NAME}@{hub.commit}") == folder


def test_pickles_are_fetched_where_there_is_nothing_else(hub, tmp_path):
    torch.save(load_file(tmp_path / "published/model.safetensors"), tmp_path / "w.bin")
    hub.files["pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
    checkpoint_folder(NAME)
    assert "pytorch_model.bin" not in fetched(hub)
    del hub.files["model.safetensors"]
    hub.commit = "b" * 40
    names._fetch.cache_clear()
    assert len(read_weights(checkpoint_folder(NAME))) == 38 and "pytorch_model.bin" in fetched(hub)


def test_inspect_fetches_the_configuration_alone(hub):
    assert m1("inspect", NAME) == 0
    assert fetched(hub) == {"config.json"}


def test_an_existing_folder_wins(hub, teacher_dir, tmp_path):
    (tmp_path / "here/somebody").mkdir()
    (tmp_path / "here/somebody/tiny").symlink_to(teacher_dir)
    assert checkpoint_folder(NAME) == Path(NAME)
    assert hub_commit(NAME) is None and not hub.asked


def test_results_beside_a_name_do_not_hide_it(hub, tmp_path):
    """`m1 eval --model ORG/NAME` writes to ORG/NAME/eval."""
    (tmp_path / "here" / NAME / "eval").mkdir(parents=True)
    assert hub_commit(NAME) == hub.commit


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("somebody/typo", "somebody/typo is neither a checkpoint folder here nor a model on the Hub"),
        ("runs/pocket", "runs/pocket is neither a checkpoint folder here nor a model on the Hub"),
        (f"{NAME}@nowhere", "somebody/tiny has no revision 'nowhere' on the Hub"),
        ("runs/pocket/sft", "runs/pocket/sft is not a folder: check the path"),
        ("./tiny", "./tiny is not a folder"),
        ("tiny", "tiny is not a folder"),
        ("runs/lr--1", "runs/lr--1 is not a folder"),  # not a name that the Hub could have
        ("runs/hybrid-", "runs/hybrid- is not a folder"),
        ("models/llama.git", "models/llama.git is not a folder"),
    ],
)
def test_names_of_nothing(hub, capsys, name, words):
    out = ("--out", "o", "--attention-ratio", 0.5)
    for command in (("inspect", name), ("convert", "--teacher", name, *out), ("export-official", name, "o")):
        capsys.readouterr()
        check((m1(*command), capsys.readouterr().err), words)
    assert len(hub.asked) <= 9  # no retries


@pytest.mark.parametrize(
    ("code", "words"), [("GatedRepo", "gated: ask for access"), ("RepoNotFound", "neither .* if it is private")]
)
def test_locked_models(hub, monkeypatch, code, words):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    hub.locked = code
    with pytest.raises(UserError, match=rf"{NAME} is {words}.*`hf auth login`, or set HF_TOKEN") as caught:
        checkpoint_folder(NAME)
    assert "hf_secret" not in str(caught.value)


def test_a_repository_without_a_transformers_model(hub):
    del hub.files["config.json"]
    with pytest.raises(UserError, match=rf"{NAME} on the Hub has no config\.json"):
        checkpoint_folder(NAME)


def test_without_a_network(hub, monkeypatch):
    checkpoint_folder(NAME)
    names._fetch.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert checkpoint_folder(NAME).name == hub.commit  # what was fetched last
    with pytest.raises(
        UserError, match=r"somebody/else is no checkpoint folder here, and the Hub can't be asked .*refused"
    ):
        checkpoint_folder("somebody/else")


def test_the_commit_is_a_setting(hub, capsys, tmp_path):
    """A finished or interrupted run isn't continued with another commit of the same name."""
    convert = ("convert", "--teacher", NAME, "--out", "hybrid", "--keep-attention", "1")
    assert m1(*convert) == 0
    assert read_json("hybrid/manifest.json")["settings"]["inputs"] == {NAME: hub.commit}
    names._fetch.cache_clear()
    assert m1(*convert) == 0
    hub.commit = "b" * 40
    names._fetch.cache_clear()
    capsys.readouterr()
    check((m1(*convert), capsys.readouterr().err), "other settings", NAME)
    (tmp_path / "here/d.toml").write_text(
        f'stage = "distill"\nmodel = "hybrid"\nteacher = "{NAME}"\nout = "o"\n[data]\ntask = "chain"\n'
    )
    assert load_stage("d.toml").settings()["inputs"][NAME] == "b" * 40


def test_an_output_over_the_name_is_refused(hub, capsys):
    check((m1("convert", "--teacher", NAME, "--out", NAME, "--keep-attention", "1"), capsys.readouterr().err), "source")


def test_a_tokenizer_of_the_hub_is_copied(hub):
    assert m1("convert", "--teacher", NAME, "--out", "hybrid", "--keep-attention", "1") == 0
    with open("hybrid/tokenizer.json", "rb") as file:
        assert json.loads(file.read()) == json.loads(hub.files["tokenizer.json"])
