"""kill -9 of real `m1` processes: a second run completes the work, and a user's files are as before.

Training that is killed twenty times, or stopped by SIGTERM, ends with the weights of an uninterrupted run, bit for bit.
The long version (`make test-long`) kills at random moments between a process's start and its end. The short one kills
as soon as there is something to resume from.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import save_checkpoint, tiny_teacher
from commands import m1
from safetensors.torch import load_file

from m1.jsonl import read_jsonl
from m1.model.convert import convert

KILLS = 4  # per command, in the long version
TRAINING_KILLS = {"sft": 5, "distill": 5, "grpo": 20}
RL = """
    num_generations = 4
    max_completion_length = 8
    steps_per_generation = 2
"""
TRAINING = """
    stage = "{kind}"
    out = "{out}"
    model = "{model}"
    {more}
    [data]
    task = "chain"
    count = 128
    min_steps = 1
    max_steps = 3
    [trainer]
    max_steps = {steps}
    save_steps = 3
    logging_steps = 1
    per_device_train_batch_size = 4
    learning_rate = 1e-3
    {rl}
"""
LONG = 6  # its amount of work: more than starting takes
FOREIGN = {  # beside the output; names that commands use for their own files are among them
    "notes.txt": b"no newline at the end",
    "settings.json": b'{"editor.tabSize": 4}',
    "manifest.json": b"[]",
    "model-backup.safetensors": b"\x00" * 100,
    ".o.txt.part": b"a draft",
    "o.replaced": b"old",
}
PIPELINE = {
    "pipeline": 'name = "tiny"\nout = "{out}"\nstages = ["teacher", "convert", "eval"]\n',
    "teacher": """
        stage = "sft"
        out = "{out}/teacher"
        [init]
        hidden_size = 64
        intermediate_size = 96
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        max_position_embeddings = 512
        [data]
        task = "chain"
        count = 64
        min_steps = 2
        max_steps = 3
        [trainer]
        max_steps = 6
        save_steps = 2
        logging_steps = 1
        per_device_train_batch_size = 4
    """,
    "convert": 'stage = "convert"\nteacher = "{out}/teacher"\nout = "{out}/converted"\nkeep_attention = [1]\n',
    "eval": """
        stage = "eval"
        out = "{out}/eval"
        task = "chain"
        limit = 4
        n = 2
        max_new_tokens = 32
        [models]
        teacher = "{out}/teacher"
        converted = "{out}/converted"
    """,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a teacher, its hybrid and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(tiny_teacher(), folder / "teacher")
    convert(folder / "teacher", folder / "hybrid", [1, 3])
    rows = [{"id": f"p{i}", "problem": f"{i}+1"} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(name, inputs, folder, n=1):
    """Of the command `name`, with its output in `folder`. `n` is the amount of work."""
    chain = ("--task", "chain", "--limit", 4)
    match name:
        case "convert":
            return "convert", "--teacher", inputs / "teacher", "--keep-attention", "1,3", "--out", folder / "o"
        case "generate":
            sampling = ("--n", n, "--max-new-tokens", 200, "--temperature", 1, "--max-num-seqs", 4)
            files = ("--prompts", inputs / "prompts.jsonl", "--out", folder / "o.jsonl")
            return "generate", "--model", inputs / "hybrid", *files, *sampling
        case "eval":
            sampling = ("--n", 2 * n, "--max-new-tokens", 200, "--temperature", 1, "--max-num-seqs", 4)
            return "eval", "--model", inputs / "hybrid", *chain, *sampling, "--out", folder / "o"
        case "budget":
            models = ("--model", f"a={inputs / 'hybrid'}", "--model", f"b={inputs / 'teacher'}")
            sizes = ("--seconds", 0.2, "--seeds", n, "--max-new-tokens", 99)
            return "budget", *models, *chain, *sizes, "--out", folder / "o"
        case "pipeline":
            recipe = folder / "recipe"
            recipe.mkdir(exist_ok=True)
            for stage, text in PIPELINE.items():
                (recipe / f"{stage}.toml").write_text(text.replace("{out}", str(folder / "o")))
            return "pipeline", recipe


def result(name, folder):
    """What must be the same with and without a kill. Checks that the output is complete."""
    out = folder / "o"
    match name:
        case "convert":
            assert json.loads((out / "manifest.json").read_text())["command"] == "convert"
            return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}
        case "generate":
            assert (folder / "o.jsonl.run" / "manifest.json").exists()
            return unique(folder / "o.jsonl", "id", "sample", "text", "tokens")
        case "eval":
            assert (out / "manifest.json").exists()
            accuracy = json.loads((out / "result.json").read_text())["pass@1"]
            return accuracy, unique(out / "samples.jsonl", "problem", "round", "text", "tokens")
        case "budget":
            assert (out / "manifest.json").exists() and (out / "budget.png").exists()
            assert json.loads((out / "budget.json").read_text())["problems"] == 4
            return unique(out / "runs.jsonl", "model", "problem", "seed")
        case "pipeline":
            assert all((out / stage / "manifest.json").exists() for stage in ("teacher", "converted", "eval"))
            assert "</html>" in (out / "report.html").read_text()
            steps = [json.loads(line)["step"] for line in (out / "teacher" / "metrics.jsonl").read_text().splitlines()]
            models = json.loads((out / "report.json").read_text())["models"]
            rows = {model: len(unique(out / "eval" / model / "samples.jsonl", "problem", "round")) for model in models}
            return steps, rows


def unique(path, *keys):
    rows = list(read_jsonl(path))  # not str.splitlines, which cuts at a U+0085 inside a sampled text, too
    values = {tuple(row[key] for key in keys) for row in rows}
    assert len(values) == len(rows)
    return values


def start(*words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "m1", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


def complete(*words):
    process = start(*words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


def kill(process):
    """Returns whether it was still running."""
    running = process.poll() is None
    process.kill()
    process.stderr.close()
    process.wait()
    return running


def resumed(name, inputs, folder, n=1):
    """Completes what was killed, in a folder with a user's files. Returns the result."""
    inside = [path for path in (folder / "o", folder / "o" / "teacher") if name != "convert" and path.is_dir()]
    for path in inside:
        (path / "mine.txt").write_text("mine")
    complete(*arguments(name, inputs, folder, n))
    assert {name: (folder / name).read_bytes() for name in FOREIGN} == FOREIGN
    assert all((path / "mine.txt").read_text() == "mine" for path in inside)
    assert [path for path in folder.rglob("*.part*") if path.name not in FOREIGN] == []
    return result(name, folder)


def with_foreign_files(folder):
    folder.mkdir()
    for name, content in FOREIGN.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("name", "begun"), [("convert", ".o.part/config.json"), ("generate", "o.jsonl")])
def test_killed_once_begun(inputs, tmp_path, name, begun):
    folder, undisturbed = with_foreign_files(tmp_path / "killed"), tmp_path / "undisturbed"
    process = start(*arguments(name, inputs, folder))
    while not (folder / begun).exists() and process.poll() is None:
        time.sleep(0.01)
    kill(process)
    undisturbed.mkdir()
    assert m1(*arguments(name, inputs, undisturbed)) == 0
    assert resumed(name, inputs, folder) == result(name, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("name", ["convert", "generate", "eval", "budget", "pipeline"])
def test_killed_at_random_moments(inputs, tmp_path, name):
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    began = time.monotonic()
    complete(*arguments(name, inputs, undisturbed, LONG))
    seconds = time.monotonic() - began
    expected, moments = result(name, undisturbed), random.Random(name)
    for i in range(KILLS):
        folder = with_foreign_files(tmp_path / f"killed-{i}")
        process = start(*arguments(name, inputs, folder, LONG))
        delay = (i + moments.random()) / KILLS * seconds
        time.sleep(delay)
        running = kill(process)
        rows = sum(path.read_bytes().count(b"\n") for path in folder.rglob("*.jsonl"))
        assert resumed(name, inputs, folder, LONG) == expected, f"killed after {delay:.2f} s of {seconds:.2f}"
        print(f"{name}: killed after {delay:.2f} of {seconds:.2f} s (running: {running}, rows: {rows}), resumed")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("kind", ["sft", "distill", "grpo"])
def test_training_interrupted_at_random_steps(inputs, tmp_path, kind, number):
    """Of a generation that two of grpo's steps train on, every other checkpoint has half left."""
    recipes, steps = {}, 160 if kind == "grpo" else 300
    (tmp_path / "rewards.py").write_text("def length(completion_ids, **_): return [i[0] % 5 for i in completion_ids]")
    for name in ("whole", "cut"):
        recipes[name] = tmp_path / f"{name}.toml"
        more = f'teacher = "{inputs / "teacher"}"\nforward_kl_steps = 100' if kind == "distill" else ""
        if kind == "grpo":
            more = f'rewards = {{"{tmp_path / "rewards.py"}:length" = 1.0}}'
        values = {"kind": kind, "out": tmp_path / name, "model": inputs / "hybrid", "more": more, "steps": steps}
        values["rl"] = RL if kind == "grpo" else ""
        recipes[name].write_text(TRAINING.format(**values))
    complete(kind, recipes["whole"])
    moments, at = random.Random(f"{kind} {number}"), []
    for _ in range(TRAINING_KILLS[kind]):
        process = start(kind, recipes["cut"], "--resume")
        wanted = lines(tmp_path / "cut") + moments.randint(1, 7)
        while lines(tmp_path / "cut") < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.random() / 10)
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130}[number]
        at.append(lines(tmp_path / "cut"))
    complete(kind, recipes["cut"], "--resume")
    print(f"{kind}, {number.name}: interrupted at steps {at}")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    losses = [[(row["step"], row["loss"]) for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in recipes]
    assert losses[0] == losses[1] and len(losses[0]) == steps


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
