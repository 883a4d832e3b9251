"""Random hostile inputs of six kinds: none may end in a traceback, a hang or a wrong exit code."""

import json
import shutil
import threading
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import test_arguments as ops_table
import torch
from commands import m1
from hypothesis import strategies as st
from openai_server import Server, completion

from m1.engine import SamplingParams
from m1.errors import UserError
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.samplers import SampleRequest
from m1.jsonl import read_jsonl
from m1.recipe import load_stage
from m1.tasks.benchmarks import load_task

NUMBERS = st.sampled_from([0, -1, 1, 2.5, 10**9, 10**23, 10**400, -(2**63), 1e-40, 1e300, float("inf"), float("nan")])
SCRAPS = [
    "",
    "\0",
    "\x1b[2J",
    "\ud800",
    "[/x]",
    "{x}",
    "{0}",
    "$x^$",
    "../x",
    "%s",
    "a" * 300,
    "\n",
    "|",
    "@x",
    "\u202e",
]
TEXTS = st.sampled_from(SCRAPS) | st.text(st.characters(codec=None), max_size=8)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


def assert_clean(capsys, code):
    """0 with an output, or one line and exit code 2."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("m1: ")]
    refused = code == 2 and (len(lines) == 1 or "Usage: m1" in err)  # without arguments, a group shows its help
    assert "Traceback" not in err and "\x1b" not in err and (code == 0 or refused), err


def test_a_failure_prints_its_seed(fuzz, capsys):
    with pytest.raises(ZeroDivisionError):
        fuzz(st.just(0), lambda example: 1 / example)
    assert capsys.readouterr().out.count("repeat it with M1_FUZZ_SEED=") == 1


# Options, of commands that end quickly whatever they accept.

COMMANDS = {
    "inspect": ["--context", "--plot"],
    "convert": ["--teacher", "--out", "--keep-attention", "--attention-ratio", "--seed", "--state-size", "--mixer"],
    "generate": ["--model", "--prompts", "--out", "--temperature", "--top-k", "--top-p", "--n", "--stop", "--few-shot"],
    "eval": ["--model", "--task", "--data", "--limit", "--n", "--endpoint", "--timeout", "--max-steps", "--id-column"],
    "budget": ["--model", "--seconds", "--seeds", "--limit", "--task", "--out", "--max-num-seqs"],
    "solve": ["--model", "--n", "--seconds", "--rule", "--weights", "--json", "--system-prompt"],
    "rank-layers": ["--teacher", "--data", "--out", "--limit", "--batch-size", "--max-length"],
    "runs": [],
    "pipeline": [],
    "sft": [],
}
WORDS = st.one_of(TEXTS.filter(lambda t: "\0" not in t), NUMBERS.map(str), st.just("missing.jsonl"))


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from([*COMMANDS]))
    options = draw(st.lists(st.tuples(st.sampled_from(COMMANDS[name]), WORDS), max_size=5)) if COMMANDS[name] else []
    words = [word for option in options for word in option]
    return [name, *draw(st.lists(WORDS, max_size=2)), *words]


def test_options(fuzz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def options(words):
        assert_clean(capsys, m1(*words))

    fuzz(command_lines(), options)


# Recipes

ROOT = Path(__file__).parents[2]
RECIPES = [path.read_text() for path in sorted((ROOT / "recipes").rglob("*.toml")) if path.name != "pipeline.toml"]


@st.composite
def recipes(draw):
    table = tomllib.loads(draw(st.sampled_from(RECIPES)))
    where = draw(st.sampled_from([table, *(value for value in table.values() if isinstance(value, dict))]))
    keys = [*where, "n", "limit", "seed", "models", "data", "stage"]
    where[draw(st.sampled_from(keys))] = draw(
        st.one_of(NUMBERS, TEXTS, st.lists(NUMBERS | TEXTS, max_size=3), st.just({}))
    )
    return table


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


def test_toml(fuzz, tmp_path):
    def stages(table):
        path = tmp_path / "x.toml"
        path.write_text("".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in table.items()))
        with suppress(UserError, OSError):  # a name that is too long: the command line names the file
            stage = load_stage(path)
            stage.settings()
            stage.finished()

    fuzz(recipes(), stages)


# Rows

ROWS = st.dictionaries(
    st.sampled_from(["id", "problem", "question", "answer", "answers", "solution", "messages"]), JSON
)
DAMAGE = st.sampled_from(["", "[", "{", "\\", '"', "\x00", "1" * 5000, "[" * 10_000])


def test_jsonl(fuzz, tmp_path):
    path = tmp_path / "x.jsonl"

    def rows(example):
        rows, damage, at = example
        text = "".join(json.dumps(row) + "\n" for row in rows)
        at = min(at, len(text))
        path.write_text(text[:at] + damage + text[at:])
        with suppress(UserError):
            for row in read_jsonl(path):
                json.dumps(row, ensure_ascii=False).encode()
        with suppress(UserError):
            load_task("own", path)

    fuzz(st.tuples(st.lists(ROWS, max_size=3), DAMAGE, st.integers(0, 200)), rows)


# Checkpoints

FILES = ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]


@pytest.fixture
def checkpoint(hybrid_dir, tmp_path):
    return shutil.copytree(hybrid_dir, tmp_path / "m")


def test_checkpoints(fuzz, checkpoint, hybrid_dir, capsys):
    whole = {name: json.loads((hybrid_dir / name).read_text()) for name in FILES if (hybrid_dir / name).exists()}
    changes = st.sampled_from([*whole]).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from([*whole[name], "new"]), JSON)
    )

    prompts, out = checkpoint.with_name("p.jsonl"), checkpoint.with_name("out")
    prompts.write_text('{"problem": "1+1"}\n')
    generate = ("generate", "--model", checkpoint, "--prompts", prompts, "--out", out / "o", "--max-new-tokens", 1)

    def checkpoints(change):
        name, key, value = change
        (checkpoint / name).write_text(json.dumps(whole[name] | {key: value}))
        try:
            assert_clean(capsys, m1(*generate))
            assert_clean(capsys, m1("inspect", checkpoint))
        finally:
            (checkpoint / name).write_text(json.dumps(whole[name]))
            shutil.rmtree(out, ignore_errors=True)

    fuzz(changes, checkpoints)


# Answers of servers


@st.composite
def answers(draw):
    answer = json.loads(json.dumps(completion("a", logprobs=[-1.0])))
    places = [(answer, "choices"), (answer, "usage"), (answer["usage"], "completion_tokens")]
    choice = answer["choices"][0]
    places += [(choice, key) for key in choice] + [(choice["message"], "content"), (choice["message"], "reasoning")]
    places += [(choice["logprobs"], "content"), (choice["logprobs"]["content"][0], "logprob")]
    where, key = draw(st.sampled_from(places))
    where[key] = draw(JSON)
    status = draw(st.sampled_from([200, 200, 200, 204, 302, 400, 401, 418, 429, 500]))
    headers = st.sampled_from(["charset=rot13", "charset=\u00ff", "gzip", "-1", "nan", "x" * 3000])
    names = st.sampled_from(["content-type", "content-encoding", "retry-after", "location"])
    body = draw(st.just(answer) | JSON | st.binary(max_size=30))
    return status, body, draw(st.dictionaries(names, headers, max_size=2))


def test_endpoint_answers(fuzz):
    current = []
    server = Server(lambda body, number: current[0])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    request = SampleRequest("p", [{"role": "user", "content": "x"}], (0,), 0)

    def endpoint(answer):
        current[:] = [answer]
        with suppress(UserError):
            sampler = EndpointSampler(server.url, "m", tries=2, wait=0.0, timeout=2)
            for sample in sampler.generate([request], SamplingParams()):
                json.dumps(vars(sample), allow_nan=False, ensure_ascii=False).encode()
                assert sample.tokens is None or 0 <= sample.tokens <= 2**53

    try:
        fuzz(answers(), endpoint)
    finally:
        server.shutdown()
        server.server_close()


# Arguments of ops: a tensor of any shape and dtype in place of a right one

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def mutated(draw):
    op = draw(st.sampled_from([*ops_table.OPS]))
    right = ops_table.OPS[op]
    names = draw(st.lists(st.sampled_from([*right]), min_size=1, max_size=2))
    shapes = {name: list(right[name].shape) for name in names}
    for shape in shapes.values():
        for _ in range(draw(st.integers(0, 2))):
            change = draw(st.sampled_from(["size", "more", "less"]))
            at = draw(st.integers(0, max(0, len(shape) - 1)))
            if change == "more":
                shape.insert(at, draw(st.integers(0, 2)))
            elif shape:
                shape[at : at + 1] = [] if change == "less" else [draw(st.integers(0, 9))]
    return op, {name: (shape, draw(st.sampled_from(DTYPES))) for name, shape in shapes.items()}, draw(st.booleans())


def test_op_arguments(fuzz):
    """Under `make sanitize`, also no access outside of the tensors."""

    def arguments(example):
        op, changes, strided = example
        given = {name: tensor.clone() for name, tensor in ops_table.OPS[op].items()}
        for name, (shape, dtype) in changes.items():
            tensor = torch.zeros(shape).to(dtype)
            given[name] = torch.stack([tensor, tensor], -1)[..., 0] if strided else tensor
        try:
            ops_table.call(op, given)
        except ValueError:
            pass
        except IndexError as error:  # of an op's own: "row 0 has slot 9, but there are 5"
            assert "but" in str(error), error

    fuzz(mutated(), arguments)
