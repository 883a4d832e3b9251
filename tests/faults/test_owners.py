"""No command overwrites, deletes or appends to what it didn't make: through the real command line."""

import errno
import json
import os
import shutil
import subprocess

import pytest
from checkpoints import save_checkpoint, tiny_teacher
from commands import check, m1
from safetensors import SafetensorError
from safetensors.torch import load_file

from m1.runs import Run

PROBLEMS = '{"problem": "1+1", "solution": "2", "answer": "2"}\n'
FOLDERS = ("convert", "import-official", "export-official")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs, and an output of every kind of command, made by it; a trained model only looks like one."""
    folder = tmp_path_factory.mktemp("made")
    save_checkpoint(tiny_teacher(), folder / "teacher")
    (folder / "data.jsonl").write_text(PROBLEMS)
    for name in ("convert", "export-official", "import-official", "generate", "eval", "budget", "rank-layers"):
        assert m1(*command(name, folder, folder / name)) == 0
    with Run("grpo", folder / "grpo", {}) as run:
        shutil.copytree(folder / "convert", run.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.json"))
        run.finish()
    return folder


@pytest.fixture
def here(made, tmp_path):
    """A copy of `made`, to break."""
    return shutil.copytree(made, tmp_path / "here")


def command(name, inputs, out, **changes):
    """Of the command line `m1 NAME`, from `inputs` to `out`. `changes` are further options and inputs."""
    folder, data = inputs / "convert", changes.pop("data", inputs / "data.jsonl")
    prompts, model = changes.pop("prompts", data), changes.pop("model", folder)
    further = [word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", value)]
    teacher = changes.get("teacher", inputs / "teacher")
    short = ("--max-new-tokens", 3, "--task", "math500", "--data", data)
    words = {
        "convert": ("convert", "--teacher", teacher, "--keep-attention", "1,3", "--out", out),
        "export-official": ("export-official", model, out),
        "import-official": ("import-official", inputs / "export-official", out),
        "generate": ("generate", "--model", model, "--prompts", prompts, "--max-new-tokens", 3, "--out", out),
        "eval": ("eval", "--model", model, *short, "--n", 1, "--out", out),
        "budget": ("budget", "--model", f"a={model}", *short, "--seeds", 1, "--seconds", 0.05, "--out", out),
        "rank-layers": ("rank-layers", "--teacher", teacher, "--data", data, "--out", out),
        "solve": ("solve", "1+1", "--model", model, "--n", 1, "--max-new-tokens", 3, "--json", out),
        "inspect": ("inspect", model, "--plot", out),
        "bench": ("bench", "state", "--backends", "reference", "--slots", 1, "--repeats", 1, "--out", out),
    }  # fmt: skip
    return *words[name], *further


def training(name, recipe, out, **options):
    """The command line of a training stage whose recipe has these keys."""
    values = {"model": "nowhere", "out": out} | ({"teacher": "nowhere"} if name == "distill" else {}) | options
    data = values.pop("data", None)
    lines = [f'stage = "{name}"', *(f'{key} = "{value}"' for key, value in values.items())]
    lines += ["[data]", f'path = "{data}"' if data else 'task = "chain"']
    recipe.write_text("\n".join(lines))
    return name, recipe


def content(folder):
    """Every file's bytes, without locks: what must not change."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# Whole folders: convert, import-official, export-official


@pytest.mark.parametrize("name", FOLDERS)
def test_a_trained_model_is_not_replaced(run, here, name):
    before = content(here)
    check(run(*command(name, here, here / "grpo")), "`m1 grpo` output")
    assert content(here) == before
    assert run(*command(name, here, here / "grpo"), "--force")[0] == 0
    trained = {path.removeprefix("grpo/"): data for path, data in before.items() if path.startswith("grpo/")}
    assert content(here / "grpo.replaced") == trained
    manifest = json.loads((here / "grpo" / "manifest.json").read_text())
    assert manifest["command"] == name  # no old one vouches for the new weights
    expected = load_file(here / name / "model.safetensors")
    written = load_file(here / "grpo" / "model.safetensors")
    assert written.keys() == expected.keys() and all(written[key].equal(expected[key]) for key in expected)


@pytest.mark.parametrize("name", FOLDERS)
def test_files_that_look_like_weights_are_not_deleted(run, here, name):
    names = ["model-backup.safetensors", "model_notes.safetensors", "pytorch_model_old.bin", "notes.txt"]
    for mine in names:
        (here / mine / "o").mkdir(parents=True)
        (here / mine / "o" / mine).write_text("mine")
        before = content(here)
        check(run(*command(name, here, here / mine / "o")), mine)
        assert content(here) == before
    assert run(*command(name, here, here / mine / "o"), "--force")[0] == 0
    assert content(here / mine / "o.replaced") == {mine: b"mine"} and not (here / mine / "o" / mine).exists()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_the_old_model(run, here, monkeypatch, name, error):
    def half(*_, **__):
        next(here.glob(".grpo.part")).joinpath("model.safetensors").write_bytes(b"half")
        raise error

    where = "m1.model.official.save_file" if name == "export-official" else "m1.model.M1ForCausalLM.save_pretrained"
    monkeypatch.setattr(where, half)
    before = content(here)
    check(run(*command(name, here, here / "grpo"), "--force"), "can't write to", "No space left")
    assert content(here) == before and not (here / ".grpo.part").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a full disk")
def test_a_disk_that_is_really_full(run, here):
    disk = here / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk], capture_output=True).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        (disk / "o").mkdir()
        (disk / "o" / "model.safetensors").write_bytes(b"old" * 50_000)
        before = content(disk)
        for name in FOLDERS:
            check(run(*command(name, here, disk / "o"), "--force"), "can't write", "No space left")
            assert content(disk) == before and not (disk / ".o.part").exists()
        (disk / "filler").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        before = content(disk)
        for name in ("generate", "eval", "budget", "rank-layers", "solve", "inspect", "bench"):
            check(run(*command(name, here, disk / "new.png")), "can't write")
            assert content(disk) == before and not list(disk.glob("new*"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_finished_folder_again(run, made, name):
    def times():
        return {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.name != ".lock"}

    before = times()
    assert run(*command(name, made, made / name))[0] == 0
    assert times() == before


def test_a_conversion_with_other_options_is_refused(run, made):
    before = content(made)
    check(run(*command("convert", made, made / "convert", seed=1)), "seed=0, now 1")
    check(run(*command("convert", made, made / "convert", mixer="mamba2")), "mixer=mamba, now mamba2")
    assert content(made) == before


# Single files


@pytest.mark.parametrize("text", ["one line", "two\nlines", "ends with one\n", '{"id": 1}\n{"id": 2}', ""])
@pytest.mark.parametrize("name", ["generate", "rank-layers", "solve", "inspect", "bench"])
def test_notes_are_not_output(run, here, name, text):
    notes = here / "notes.txt"
    notes.write_text(text)
    before = content(here)
    check(run(*command(name, here, notes)), "notes.txt exists")
    assert content(here) == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_outputs_that_are_inputs(run, here, force):
    data, model, teacher, ranking = (here / name for name in ("data.jsonl", "convert", "teacher", "ranking.json"))
    (here / "template").write_text("{problem}")
    ranking.write_text("{}")
    commands = [
        *(command(name, here, data) for name in ("generate", "eval", "budget", "rank-layers")),
        *(command(name, here, model) for name in ("generate", "eval", "budget", "solve", "inspect", "export-official")),
        *(command(name, here, teacher) for name in ("convert", "rank-layers")),
        *(command(name, here, here) for name in ("convert", "generate", "eval", "budget", "import-official", "bench")),
        *(
            command(name, here, here / "template", **{option: f"{mark}{here / 'template'}"})
            for name in ("generate", "eval", "budget")
            for option, mark in (("prompt_template", "@"), ("system_prompt", "@"), ("few_shot", ""))
        ),
        ("convert", "--teacher", teacher, "--keep-attention", f"@{ranking}:2", "--out", ranking),
        *(training(name, here / f"{name}.toml", model, model=model) for name in ("sft", "distill", "grpo")),
        *(training(name, here / f"{name}2.toml", data, data=data) for name in ("sft", "distill", "grpo")),
        training("distill", here / "distill3.toml", teacher, teacher=teacher),
    ]  # fmt: skip
    before = content(here)
    for words in commands:
        check(run(*words, *force))
        assert content(here) == before, words
    (here / "link").symlink_to(data)
    check(run(*command("generate", here, here / "link"), *force), "source itself")
    assert content(here) == before | {"link": data.read_bytes()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.5}, "temperature=0.7, now 0.5"),
        ({"seed": 1}, "seed=0, now 1"),
        ({"max_new_tokens": 4}, "4"),
        ({"n": 2}, "n=1, now 2"),
        ({"stop": "a"}, "stop"),
        ({"quantize": "int8"}, "quantize=None, now int8"),
        ({"model": "teacher"}, "model"),
        ({"model": "other weights"}, "weights: not the same"),
        ({"prompts": "other.jsonl"}, "prompts"),
        ({"prompts": "changed"}, "data.jsonl: not the same"),
    ],
    ids=str,
)
def test_samples_of_other_settings(run, here, changes, words):
    shutil.rmtree(here / "generate.run")
    (here / "generate").unlink()
    assert run(*command("generate", here, here / "generate"))[0] == 0
    (here / "other.jsonl").write_text(PROBLEMS * 2)
    if changes == {"model": "other weights"}:
        changes = {}
        path = here / "convert" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif changes == {"prompts": "changed"}:
        changes = {}
        (here / "data.jsonl").write_text(PROBLEMS + PROBLEMS)
    changes = {key: here / value if key in ("model", "prompts") else value for key, value in changes.items()}
    before = content(here)
    check(run(*command("generate", here, here / "generate", **changes)), "output of other settings", words)
    assert content(here) == before


def test_the_same_again_samples_nothing(run, here, monkeypatch):
    commands = [command(name, here, here / name) for name in ("generate", "eval", "budget", "rank-layers")]
    # The paths are part of the settings: first make them here.
    for words, name in zip(commands, ("generate", "eval", "budget", "rank-layers"), strict=True):
        shutil.rmtree(here / name, ignore_errors=True)
        (here / name).unlink(missing_ok=True)
        assert run(*words)[0] == 0
    rows = ("generate", "eval/samples.jsonl", "budget/runs.jsonl", "rank-layers")
    before = {name: (here / name).read_bytes() for name in rows}

    def sampled(*_, **__):
        raise AssertionError("it samples again")

    monkeypatch.setattr("m1.engine.Engine.step", sampled)
    monkeypatch.setattr("m1.train.rank_layers._divergence", sampled)
    for words in commands:
        assert run(*words)[0] == 0
    assert {name: (here / name).read_bytes() for name in rows} == before


# One command's output under another's name


@pytest.mark.parametrize("name", [*FOLDERS, "generate", "eval", "budget", "rank-layers", "solve", "inspect", "bench"])
def test_output_of_another_command(run, here, name):
    before = content(here)
    for other in (*FOLDERS, "grpo", "generate", "eval", "budget", "rank-layers"):
        if other != name:
            check(run(*command(name, here, here / other)), str(here / other))
            assert content(here) == before, other


@pytest.mark.parametrize("name", ["sft", "distill", "grpo"])
def test_training_into_another_commands_output(run, here, name):
    for other in (*FOLDERS, "generate", "eval", "budget", "rank-layers"):
        words = training(name, here / "recipe.toml", here / other)
        before = content(here)
        check(run(*words), str(here / other))
        assert content(here) == before, other
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    check(run(*training(name, here / "recipe.toml", here / "mine")), "notes.txt")
    assert (here / "mine" / "notes.txt").read_text() == "mine"


# Pipelines


@pytest.fixture
def recipe(here):
    """A recipe of two stages whose first would convert."""
    folder, out = here / "recipe", here / "runs"
    folder.mkdir()
    (folder / "pipeline.toml").write_text(f'name = "x"\nout = "{out}"\nstages = ["convert", "eval"]\n')
    convert = f'stage = "convert"\nteacher = "{here}/teacher"\nout = "{out}/model"\nkeep_attention = [1]\n'
    (folder / "convert.toml").write_text(convert)
    measure = f'stage = "eval"\nout = "{out}/eval"\ntask = "chain"\nlimit = 1\nn = 1\nmax_new_tokens = 3\n'
    (folder / "eval.toml").write_text(measure + f'[models]\nx = "{out}/model"\n')
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("report.json", "{}"),
        ("report.json", '{"seconds": 1}'),
        ("report.json", "my notes"),
        ("report.html", "<html>mine</html>"),
        ("eval/notes.txt", "mine"),
        ("eval", "a file"),
        ("model/notes.txt", "mine"),
    ],
)
def test_a_pipeline_looks_before_anything_runs(run, here, recipe, name, text):
    path = here / "runs" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    check(run("pipeline", recipe), name.split("/")[0])
    assert content(here / "runs") == {name: text.encode()}


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", "/x", "", ".hidden", "a\\nb"])
def test_models_are_not_paths(run, here, recipe, name):
    path = recipe / "eval.toml"
    path.write_text(path.read_text().replace("\nx = ", f'\n"{name}" = '))
    before = content(here)
    check(run("pipeline", recipe), "[models]")
    assert content(here) == before


def test_a_pipeline_replaces_its_own_report(run, here, recipe):
    for _ in range(2):
        assert run("pipeline", recipe)[0] == 0
        assert "</html>" in (here / "runs" / "report.html").read_text()
    assert not list(here.rglob("*.replaced")) and not list(here.rglob("*.part"))
