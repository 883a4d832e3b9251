"""Bad input through the real command line: one clear line, exit code 2, no traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoints import save_checkpoint, tiny_teacher

from m1 import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `m1 ...` in this process; returns (exit code, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["m1", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, capsys.readouterr().err

    return run


def check(result, *words):
    code, err = result
    assert code == 2, err
    assert "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("m1: ")]
    assert len(message) == 1, err
    for word in words:
        assert word in message[0], message[0]


@pytest.fixture
def copy_of_teacher(tmp_path):
    return save_checkpoint(tiny_teacher(), tmp_path / "teacher")


def test_missing_weights(run, copy_of_teacher, tmp_path):
    (copy_of_teacher / "model.safetensors").unlink()
    check(
        run("convert", "--teacher", copy_of_teacher, "--out", tmp_path / "o", "--keep-attention", "1"), "no weights in"
    )


def test_missing_folder(run, tmp_path):
    arguments = ("--out", tmp_path / "o", "--keep-attention", "1")
    check(run("convert", "--teacher", tmp_path / "nowhere", *arguments), "nowhere is not a folder")


def test_truncated_weights(run, copy_of_teacher, tmp_path):
    path = copy_of_teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    arguments = ("--out", tmp_path / "o", "--keep-attention", "1")
    check(run("convert", "--teacher", copy_of_teacher, *arguments), "model.safetensors is truncated")
    check(run("eval", "--model", copy_of_teacher, "--task", "chain", "--limit", 1), "truncated or damaged")


def test_missing_shard(run, tmp_path):
    folder = save_checkpoint(tiny_teacher(), tmp_path / "teacher", max_shard_size="200KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    arguments = ("--out", tmp_path / "o", "--keep-attention", "1")
    check(run("convert", "--teacher", folder, *arguments), f"{shard.name} is missing")


def test_missing_tensor(run, copy_of_teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    path = copy_of_teacher / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, path)
    arguments = ("--out", tmp_path / "o", "--keep-attention", "1")
    check(
        run("convert", "--teacher", copy_of_teacher, *arguments), "no tensor 'model.layers.2.self_attn.k_proj.weight'"
    )


def test_head_dim_that_the_state_size_does_not_divide(run, tmp_path):
    folder = save_checkpoint(tiny_teacher(head_dim=24), tmp_path / "teacher")
    arguments = ("--out", tmp_path / "o", "--keep-attention", "1")
    check(run("convert", "--teacher", folder, *arguments), "head_dim (24) must be a multiple of state_size (16)")


def test_same_limits_when_a_hybrid_is_loaded(run, hybrid_dir, tmp_path):
    shutil.copytree(hybrid_dir, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": 24}))
    check(run("solve", "1+1", "--model", tmp_path / "m"), "head_dim (24) must be a multiple of state_size (16)")


def test_a_tensor_that_is_missing_is_not_made_up(run, copy_of_teacher):
    from safetensors.torch import load_file, save_file

    path = copy_of_teacher / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    check(run("solve", "1+1", "--model", copy_of_teacher), "no tensor 'model.layers.2.mlp.up_proj.weight'")


def test_out_that_is_the_source(run, copy_of_teacher):
    before = (copy_of_teacher / "model.safetensors").read_bytes()
    check(
        run("convert", "--teacher", copy_of_teacher, "--out", copy_of_teacher, "--keep-attention", "1"), "source itself"
    )
    assert (copy_of_teacher / "model.safetensors").read_bytes() == before


def test_tokenizer_without_a_chat_template(run, hybrid_dir, tmp_path):
    shutil.copytree(hybrid_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    check(run("solve", "1+1", "--model", tmp_path / "m"), "has no chat template")


def test_other_architectures(run, copy_of_teacher, tmp_path):
    path = copy_of_teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    arguments = ("--out", tmp_path / "o", "--keep-attention", "1")
    check(run("convert", "--teacher", copy_of_teacher, *arguments), "'gpt2'", "supported here: llama")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("99", "kept in layer 99, but the teacher has layers 0 to 3"),
        ("a,b", "'a,b'"),
        ("", "keep at least one"),
        ("@nowhere.json:2", "nowhere.json is missing"),
        ("@ranking.json", "@FILE:COUNT, e.g."),
    ],
)
def test_keep_attention(run, copy_of_teacher, tmp_path, layers, words):
    arguments = ("--out", tmp_path / "o", "--keep-attention", layers)
    check(run("convert", "--teacher", copy_of_teacher, *arguments), words)
    assert not (tmp_path / "o").exists()


def test_ways_to_choose_layers(run, copy_of_teacher, tmp_path):
    base = ("convert", "--teacher", copy_of_teacher, "--out", tmp_path / "o")
    check(run(*base), "give either")
    check(run(*base, "--keep-attention", "1", "--attention-ratio", "0.5"), "give either")
    check(run(*base, "--attention-ratio", "2"), "attention_ratio 2.0")
    check(run(*base, "--attention-ratio", "0.5", "--mixer", "mamba3"), "mixer must be 'mamba' or 'mamba2'")
    check(run(*base, "--attention-ratio", "0.5", "--mixer", "mamba2", "--state-size", 16), "must be head_dim (32)")
    check(run(*base, "--attention-ratio", "0.5", "--head-alignment", "none"), "got 'none'")
    assert not (tmp_path / "o").exists()
    assert run(*base, "--attention-ratio", "0.5")[0] == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["layer_types"][1::2] == ["full_attention"] * 2


def test_ranking_layers(run, copy_of_teacher, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "r.json"
    base = ("rank-layers", "--teacher", copy_of_teacher, "--out", out, "--data", data)
    check(run(*base), "data.jsonl")
    data.write_text('{"problem": "1+1"}\n')
    check(run(*base), "row 1: needs `messages`")
    data.write_text('{"problem": "1+1", "solution": "2"}\n')
    (copy_of_teacher / "chat_template.jinja").rename(tmp_path / "aside")
    check(run(*base), "no chat template")
    assert not out.exists()
    (tmp_path / "aside").rename(copy_of_teacher / "chat_template.jinja")
    assert run(*base)[0] == 0
    check(run(*base, "--seed", 3), "other settings")
    convert = ("convert", "--teacher", copy_of_teacher, "--out", tmp_path / "o", "--keep-attention")
    check(run(*convert, f"@{out}:5"), "5 layers to keep of 4")
    assert run(*convert, f"@{out}:2")[0] == 0


def test_inspect(run, copy_of_teacher, tmp_path):
    assert run("inspect", copy_of_teacher)[0] == 0
    check(run("inspect", tmp_path / "nowhere"), "config.json is missing")
    check(run("inspect", copy_of_teacher, "--context", 0), "context of 0 tokens")
    check(run("inspect", copy_of_teacher, "--plot", tmp_path / "no" / "where.png"), "can't write the plot")
    path = copy_of_teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    check(run("inspect", copy_of_teacher), "'gpt2'")
    path.write_text("{")
    check(run("inspect", copy_of_teacher), "config.json")


def test_misspelt_recipe_key(run, tmp_path):
    (tmp_path / "r.toml").write_text('stage = "sft"\nmodell = "x"\n')
    check(run("sft", tmp_path / "r.toml"), "unknown key 'modell'; did you mean 'model'?")


def test_pipeline_checks_every_stage_before_the_first_runs(run, tmp_path):
    (tmp_path / "pipeline.toml").write_text('name = "x"\nout = "x"\nstages = ["a", "b"]\n')
    (tmp_path / "a.toml").write_text('stage = "convert"\nteacher = "t"\nout = "o"\nkeep_attention = [1]\n')
    (tmp_path / "b.toml").write_text('stage = "eval"\nout = "o"\n[model]\n')
    check(run("pipeline", tmp_path), "b.toml", "did you mean 'models'")
    (tmp_path / "b.toml").write_text('stage = "eval"\nout = "o"\n[models]\nx = "y"\n')
    (tmp_path / "a.toml").write_text(
        'stage = "grpo"\nmodel = "m"\nout = "o"\n[data]\ntask = "chain"\n[trainer]\nlearning_rat = 1\n'
    )
    check(run("pipeline", tmp_path), "a.toml", "did you mean 'learning_rate'")
    check(run("pipeline", tmp_path / "nowhere"), "can't read recipe")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"problem": "1+1", "answer": "2"}\n{"problem": \n', "line 2: not JSON"),
        (b'{"problem": "1+1", "answer": "2"}\n\xff\xfe\n', "line 2: not UTF-8"),
        (b"[1]\n", "line 1: expected a JSON object"),
        (b'{"problem": "1+1"}\n', "row 1: needs a text `problem` and `answer`"),
        (
            b'{"id": 1, "problem": "1", "answer": 1}\n{"id": 1, "problem": "2", "answer": 2}\n',
            "'1' stands more than once",
        ),
        (b"", "has no problems"),
    ],
)
def test_bad_problem_files(run, hybrid_dir, tmp_path, content, words):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    check(run("eval", "--model", hybrid_dir, "--task", "math500", "--data", path), str(path), words)


def test_eval_arguments(run, hybrid_dir, tmp_path):
    base = ("eval", "--model", hybrid_dir, "--out", tmp_path / "o")
    check(run(*base, "--task", "math501"), "unknown task 'math501'")
    check(run(*base, "--task", "math500"), "needs --data")
    check(run(*base, "--task", "chain", "--n", "0"), "n=0")
    check(run(*base, "--task", "chain", "--max-new-tokens", 5000, "--limit", 1), "model's context of 512")
    check(run("eval", "--model", tmp_path, "--task", "chain"), "config.json is missing")


def test_samples_of_other_settings_are_not_mixed(run, hybrid_dir, teacher_dir, tmp_path):
    base = ("eval", "--model", hybrid_dir, "--task", "chain", "--limit", 2, "--n", 1, "--out", tmp_path)
    assert run(*base, "--max-new-tokens", 4)[0] == 0
    check(run(*base, "--max-new-tokens", 5), "max_new_tokens=4", "choose another --out")
    other = ("eval", "--model", teacher_dir, *base[3:], "--max-new-tokens", 4)
    check(run(*other), "other model", "choose another --out")
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_export_of_something_else(run, copy_of_teacher, tmp_path):
    check(run("export-official", copy_of_teacher, tmp_path / "o"), "'llama' model; supported here: m1")
    check(run("import-official", copy_of_teacher, tmp_path / "o"), "mamba_config.json is missing")


def test_usage_errors_exit_with_2():
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", "from m1.cli import main; main()", "convert"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
