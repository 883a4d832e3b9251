"""`m1 bench` through the real command line, at tiny sizes: what it prints and writes, and what it refuses."""

import json
import math
import sys

import pytest
import torch

from m1 import cli, machine
from m1.bench import attention, peers, roofline, scan, state

SCAN = ("scan", "--inner", 64, "--kv", 32, "--batch", 2, "--length", 5)
STATE = ("state", "--slots", 3, "--inner", 64, "--kv", 32, "--head-dim", 16)
ATTENTION = ("attention", "--batch", 2, "--kv-heads", 1, "--group", 2, "--keys", 3, "--head-dim", 16)
FLOAT32, BFLOAT16 = ("--dtype", "float32"), ("--dtype", "bfloat16")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch, tmp_path):
    """Limits measured on little data, few layers, and no `results` folder that isn't the test's own."""
    monkeypatch.setattr(roofline, "LARGEST_BUFFER", 2**16)
    monkeypatch.setattr(machine, "LARGEST_PRODUCT", 512)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs `m1 bench ...` in this process; returns (exit code, stdout's lines, stderr)."""

    def bench(*arguments):
        monkeypatch.setattr(sys, "argv", ["m1", "bench", *map(str, arguments), "--repeats", "3"])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out.splitlines(), captured.err

    return bench


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(SCAN + FLOAT32, marks=pytest.mark.long),
        STATE + BFLOAT16,
        (*STATE, "--mixer", "mamba2", *FLOAT32),
        ATTENTION + BFLOAT16,
    ],
    ids=["scan", "state", "state-mamba2", "attention"],
)
def test_last_line_has_all_figures_of_all_rows(bench, arguments):
    code, lines, err = bench(*arguments, "--device", "cpu")
    assert code == 0, (lines, err)
    result = json.loads(lines[-1])
    assert result["benchmark"] == arguments[0] and result["options"]["repeats"] == 3
    assert result["machine"]["isa"] == torch.backends.cpu.get_cpu_capability()
    peer = "torch" if arguments[0] == "attention" else "transformers"
    passes = {}
    for row in result["rows"]:
        passes.setdefault(row.get("pass"), []).append(row["name"].split()[0])
        figures = [value for value in row.values() if not isinstance(value, str)]
        assert all(math.isfinite(value) for value in [*figures, *result["limits"].values()])
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"] and row["runs"] == 3
        assert row["ratio_to_ours"] > 0 and row["share_of_copy"] > 0 and row["share_of_gemm"] > 0
        if row.get("pass") == "forward+backward":
            assert row["peak_memory_bytes"] >= 0  # so few tokens may fit into memory that is there
    assert list(passes) == (["forward", "forward+backward"] if arguments[0] == "scan" else [None])
    assert all(names == ["cpu", "reference", peer] for names in passes.values())


def test_bytes_and_operations_by_hand(bench):
    def moved_and_done(row):
        per = row["seconds"] * 1e9
        return round(row["gigabytes_per_second"] * per), round(row["gigaflops_per_second"] * per)

    only = ("--backends", "reference", "--device", "cpu", *FLOAT32)
    rows = json.loads(bench(*ATTENTION, *only)[1][-1])["rows"]
    numbers = 2 * (2 * 3 * 16) + 2 * (2 * 2 * 16)  # keys and values; queries and y
    assert moved_and_done(rows[0]) == (4 * numbers + 2 * 12, 4 * 2 * 2 * 16 * 3)  # lengths of 8 bytes, pages of 4

    rows = json.loads(bench(*SCAN, *only)[1][-1])["rows"]
    parameters, tokens = 64 * 16 + 64 + 64 * 4 + 64, 2 * 5
    inputs, y = tokens * (3 * 64 + 2 * 32) + parameters, tokens * 64
    operations = tokens * 64 * (7 * 16 + 8)
    assert moved_and_done(rows[0]) == (4 * (inputs + y), operations)
    backward = next(row for row in rows if row["pass"] == "forward+backward")
    inputs, y, operations = 5 * (3 * 64 + 2 * 32) + parameters, 5 * 64, operations // 2  # one of the two sequences
    assert (backward["tokens"], *moved_and_done(backward)) == (5, 4 * (3 * inputs + 2 * y), 3 * operations)

    rows = json.loads(bench(*STATE, *only)[1][-1])["rows"]
    states = 3 * (64 * 16 + 32 * 3)
    inputs, y = 3 * (3 * 64 + 2 * 32) + parameters, 3 * 64
    assert moved_and_done(rows[0]) == (4 * (inputs + y + 2 * states) + 3 * 8, 3 * 64 * (7 * 16 + 8))

    rows = json.loads(bench(*STATE, "--mixer", "mamba2", *only)[1][-1])["rows"]
    channels, heads = 64 + 2 * 32, 4
    states = 3 * (64 * 16 + channels * 3)
    inputs, parameters, y = 3 * (channels + heads), 2 * heads + 5 * channels, 3 * 64
    expected = 4 * (inputs + parameters + y + 2 * states) + 3 * 8
    assert moved_and_done(rows[0]) == (expected, 3 * (64 * 5 * 16 + channels * 8))


def test_where_the_result_is_written(bench, tmp_path):
    only = ("--backends", "reference", "--device", "cpu")
    bench(*ATTENTION, *only)
    assert list(tmp_path.iterdir()) == []
    code, lines, _ = bench(*ATTENTION, *only, "--out", tmp_path / "new" / "a.json")
    assert code == 0 and json.loads((tmp_path / "new" / "a.json").read_text()) == json.loads(lines[-1])
    (tmp_path / "results").mkdir()
    _, lines, _ = bench(*ATTENTION, *only)
    assert json.loads((tmp_path / "results" / "bench-attention-cpu.json").read_text()) == json.loads(lines[-1])
    assert str(tmp_path) not in lines[-1]


@pytest.mark.parametrize(
    ("module", "op", "arguments"),
    [
        (scan, "selective_scan", SCAN),
        (state, "state_update", STATE),
        (state, "ssd_update", (*STATE, "--mixer", "mamba2")),
        (attention, "decode_attention", ATTENTION),
    ],
    ids=["scan", "state", "state-mamba2", "attention"],
)
def test_wrong_numbers_are_reported_and_not_timed(bench, monkeypatch, module, op, arguments):
    right = getattr(module, op)

    def wrong(*tensors, backend, **named):
        result = right(*tensors, backend="reference", **named)
        if backend == "reference":
            return result
        return (1.1 * result[0], result[1]) if isinstance(result, tuple) else 1.1 * result

    monkeypatch.setattr(module, op, wrong)
    code, lines, _ = bench(*arguments, "--device", "cpu", "--backends", "cpu")
    assert code == 1
    rows = json.loads(lines[-1])["rows"]
    for row in rows:
        assert ("failure" in row) == (row["name"] == "cpu") == ("seconds" not in row)
    assert "wrong numbers: relative error 1.0e-01" in rows[0]["failure"]
    assert any(line.startswith("cpu: wrong numbers") for line in lines[:-1])


def test_a_peer_that_fails_leaves_the_other_rows(bench, monkeypatch):
    def step():
        raise RuntimeError("no such kernel\nand many lines about it")

    monkeypatch.setattr(peers, "sdpa_step", lambda layer: step)
    code, lines, _ = bench(*ATTENTION, "--device", "cpu", "--backends", "reference")
    reference, peer = json.loads(lines[-1])["rows"]
    assert code == 1 and reference["seconds"] > 0 and peer["failure"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*SCAN, "--batch", 0), "--batch 0: must be at least 1"),
        ((*STATE, "--slots", -1), "--slots -1: must be at least 1"),
        ((*ATTENTION, "--kv-heads", 0), "--kv-heads 0: must be at least 1"),
        ((*SCAN, "--kv", 48), "--kv 48: must divide --inner 64"),
        ((*STATE, "--kv", 48), "--kv 48: must divide --inner 64"),
        ((*STATE, "--kv", 8), "--kv 8: must be a multiple of 16"),
        ((*SCAN, "--state", 5), "--state 5: must divide --kv 32"),
        ((*SCAN, "--state", 8), "--state 8: must be 16 for the cpu kernel; or use --backends reference"),
        ((*STATE, "--mixer", "mamba3"), "--mixer mamba3: choose mamba or mamba2"),
        ((*STATE, "--mixer", "mamba2", "--head-dim", 24), "--head-dim 24: must divide --kv 32"),
        ((*STATE, "--mixer", "mamba2", "--head-dim", 8), "--head-dim 8: must be a multiple of 16 for the cpu kernel"),
        ((*ATTENTION, "--head-dim", 40), "--head-dim 40: must be a multiple of 16 for the cpu kernel"),
        ((*SCAN, "--dtype", "float64"), "--dtype float64: choose float32 or bfloat16"),
        ((*SCAN, "--backends", "cpu,fast"), "--backends cpu,fast: no backend 'fast'; choose from cpu"),
        ((*SCAN, "--backends", "auto"), "--backends auto: no backend 'auto'"),
        ((*SCAN, "--backends", "triton"), "--backends triton: triton can't run on cpu here; choose from cpu"),
        ((*SCAN, "--device", "tpu"), "--device tpu: choose cpu or cuda"),
        ((*SCAN, "--device", "cuda"), "--device cuda: torch finds no GPU here; use --device cpu"),
        ((*SCAN, "--out", "."), "m1: . isn't a regular file"),
        ((*SCAN, "--out", "/dev/null"), "m1: /dev/null isn't a regular file"),
        (("decode", "--shape", "tiny", "--plot", "."), "m1: . isn't a regular file"),
        (
            ("decode", "--shape", "tiny", "--plot", "/dev/null/a/b.png"),
            "m1: can't write /dev/null/a/b.png",
        ),
        ((*SCAN, "--out", "/dev/null/a/b.json"), "m1: can't write /dev/null/a/b.json"),
    ],
)
def test_bad_options_are_one_line(bench, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, lines, err = bench(*arguments)
    assert code == 2 and not lines
    message = [line for line in err.splitlines() if line.startswith("m1: ")]
    assert len(message) == 1 and words in message[0], err


def test_states_of_another_size_run_without_kernels(bench):
    code, lines, _ = bench(*SCAN, "--state", 8, "--backends", "reference", "--device", "cpu")
    assert code == 0 and len(json.loads(lines[-1])["rows"]) == 4


FOREIGN = {
    "another-benchmark": '{"benchmark": "state"}',
    "another-object": '{"seed": 0}',
    "not-an-object": '["scan"]',
    "not-json": "a diary",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_out_never_replaces_another_file(bench, monkeypatch, tmp_path, content):
    out = tmp_path / "a.json"
    out.write_text(content)
    measured = []
    monkeypatch.setattr(scan, "run", measured.append)
    code, lines, err = bench(*SCAN, "--out", out)
    refusal = (
        f"m1: {out} exists and isn't a result of `m1 bench scan`: choose another file, or give --force to move it aside"
    )
    assert code == 2 and not lines and not measured and err.splitlines() == [refusal]
    assert out.read_text() == content and list(tmp_path.iterdir()) == [out]


def test_the_default_file_is_not_replaced_either(bench, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bench-scan-cpu.json").write_text("a diary")
    code, _, err = bench(*SCAN, "--device", "cpu")
    assert code == 2 and "results/bench-scan-cpu.json exists and isn't a result of `m1 bench scan`" in err


ATTENTION_ONCE = (*ATTENTION, "--backends", "reference", "--device", "cpu")


def test_force_sets_the_old_file_aside(bench, tmp_path):
    out = tmp_path / "a.json"
    out.write_text("first")
    for _ in range(2):  # the second time it is the benchmark's own, and replaced
        code, lines, _ = bench(*ATTENTION_ONCE, "--out", out, "--force")
        assert code == 0 and json.loads(out.read_text()) == json.loads(lines[-1])
    assert (tmp_path / "a.json.replaced").read_text() == "first" and len(list(tmp_path.iterdir())) == 2


def test_an_older_result_of_the_benchmark_is_replaced(bench, tmp_path):
    out = tmp_path / "a.json"
    out.write_text('{"benchmark": "attention", "rows": []}')
    code, lines, _ = bench(*ATTENTION_ONCE, "--out", out)
    assert code == 0 and json.loads(out.read_text()) == json.loads(lines[-1])
    assert lines[-2] == f"written to {out}" and list(tmp_path.iterdir()) == [out]
