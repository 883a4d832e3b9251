"""Bad input through the real command line: one clear line, exit code 2, no traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoints import save_checkpoint, tiny_teacher
from commands import check


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
    check(run(*base, "--attention-ratio", "0.5", "--mixer", "mamba3"), "mixer = 'mamba3' should be 'mamba' or 'mamba2'")
    check(run(*base, "--attention-ratio", "0.5", "--mixer", "mamba2", "--state-size", 16), "must be head_dim (32)")
    check(run(*base, "--attention-ratio", "0.5", "--head-alignment", "none"), "head_alignment = 'none' should be")
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


IMPOSSIBLE = [
    {"num_attention_heads": 5},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"hidden_size": "abc"},
    {"hidden_size": 0},
    {"head_dim": 0},
    {"rms_norm_eps": "x"},
    {"hidden_act": "nonsense"},
    {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    {"dtype": "float33"},
    {"pad_token_id": 10_000},
    {"num_hidden_layers": 0},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
@pytest.mark.parametrize("command", ["convert", "inspect", "inspect-hybrid", "rank-layers", "export-official"])
def test_impossible_configurations(run, copy_of_teacher, hybrid_dir, tmp_path, command, changes):
    hybrid = shutil.copytree(hybrid_dir, tmp_path / "hybrid")
    for folder in (copy_of_teacher, hybrid):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1", "solution": "2"}\n')
    arguments = {
        "convert": ("convert", "--teacher", copy_of_teacher, "--out", tmp_path / "o", "--keep-attention", "0"),
        "inspect": ("inspect", copy_of_teacher),
        "inspect-hybrid": ("inspect", hybrid),
        "rank-layers": (
            "rank-layers", "--teacher", copy_of_teacher, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "r"
        ),
        "export-official": ("export-official", hybrid, tmp_path / "o"),
    }[command]  # fmt: skip
    check(run(*arguments))
    assert not (tmp_path / "o").exists() and not (tmp_path / "r").exists()


def test_sliding_windows(run, tmp_path):
    teacher = tiny_teacher("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    folder = save_checkpoint(teacher, tmp_path / "teacher")
    check(run("inspect", folder), "sliding-window")
    check(run("convert", "--teacher", folder, "--out", tmp_path / "o", "--keep-attention", "0"), "sliding-window")


@pytest.mark.parametrize("content", [b"nonsense", b"", [1], {1: 2}], ids=["damaged", "empty", "a-list", "numbers"])
def test_damaged_pickles(run, copy_of_teacher, tmp_path, content):
    import torch

    (copy_of_teacher / "model.safetensors").unlink()
    path = copy_of_teacher / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    arguments = ("--out", tmp_path / "o", "--keep-attention", "0")
    check(run("convert", "--teacher", copy_of_teacher, *arguments), "pytorch_model.bin", "copy")


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}], ids=str)
def test_damaged_index(run, copy_of_teacher, tmp_path, index):
    (copy_of_teacher / "model.safetensors").unlink()
    (copy_of_teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    arguments = ("--out", tmp_path / "o", "--keep-attention", "0")
    check(run("convert", "--teacher", copy_of_teacher, *arguments), "weight_map")


def test_out_that_cannot_be_written(run, copy_of_teacher, hybrid_dir, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1", "solution": "2"}\n')
    for out, words in ((tmp_path / "file", "file"), (tmp_path / "file" / "inside", "can't write to")):
        convert = ("convert", "--teacher", copy_of_teacher, "--keep-attention", "0", "--out", out)
        check(run(*convert), words)
        check(run("export-official", hybrid_dir, out), words)
    rank = ("rank-layers", "--teacher", copy_of_teacher, "--data", tmp_path / "data.jsonl", "--out")
    check(run(*rank, tmp_path / "file" / "r.json"), "can't")


@pytest.mark.parametrize(
    "row",
    [
        {"problem": 5, "solution": "a"},
        {"problem": "a", "solution": 5},
        {"messages": "text"},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
    ],
    ids=str,
)
def test_bad_conversations(run, copy_of_teacher, tmp_path, row):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    base = ("rank-layers", "--teacher", copy_of_teacher, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "r")
    check(run(*base), "row 1: needs `messages`")


def test_broken_templates_and_impossible_options(run, copy_of_teacher, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1", "solution": "2"}\n')
    base = ("rank-layers", "--teacher", copy_of_teacher, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "r")
    for option in ("--batch-size", "--max-length", "--limit"):
        assert run(*base, option, 0)[0] == 2
    (copy_of_teacher / "chat_template.jinja").write_text("{% for message in %}")
    check(run(*base), "chat template", "fails")
    assert not (tmp_path / "r").exists()


def test_options_reach_the_conversion(run, copy_of_teacher, tmp_path):
    from safetensors.torch import load_file

    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2**70)):
        base = ("convert", "--teacher", copy_of_teacher, "--keep-attention", "0", "--out", tmp_path / name)
        assert run(*base, "--seed", seed, "--head-alignment", "attention", "--state-size", 8)[0] == 0
        weights.append(load_file(tmp_path / name / "model.safetensors")["model.layers.1.mamba.in_proj.weight"])
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["head_alignment"], config["state_size"]) == ("attention", 8)
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1", "solution": "2"}\n')
    rank = ("rank-layers", "--teacher", copy_of_teacher, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "r")
    assert run(*rank, "--mixer", "mamba2", "--head-alignment", "attention", "--seed", 3, "--max-length", 7)[0] == 0
    settings = json.loads((tmp_path / "r").read_text())["settings"]
    assert [settings[k] for k in ("mixer", "head_alignment", "seed", "max_length")] == ["mamba2", "attention", 3, 7]


def test_inspect(run, copy_of_teacher, tmp_path):
    assert run("inspect", copy_of_teacher)[0] == 0
    check(run("inspect", tmp_path / "nowhere"), "nowhere is not a folder")
    check(run("inspect", tmp_path), "config.json is missing")
    check(run("inspect", copy_of_teacher, "--context", 0), "context of 0 tokens")
    check(run("inspect", copy_of_teacher, "--plot", "/dev/null/where.png"), "can't write")
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
            "'1' is used more than once",
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
    check(run(*base, "--task", "chain", "--max-new-tokens", 0, "--limit", 1), "max_new_tokens=0")
    check(run("eval", "--model", tmp_path, "--task", "chain"), "config.json is missing")


def test_samples_of_other_settings_are_not_mixed(run, hybrid_dir, teacher_dir, tmp_path):
    base = ("eval", "--model", hybrid_dir, "--task", "chain", "--limit", 2, "--n", 1, "--out", tmp_path)
    assert run(*base, "--max-new-tokens", 4)[0] == 0
    check(run(*base, "--max-new-tokens", 5), "max_new_tokens=4", "choose another output")
    other = ("eval", "--model", teacher_dir, *base[3:], "--max-new-tokens", 4)
    check(run(*other), "(model: not the same)", "choose another output")
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
