"""`m1 bench decode` at a size that takes a second."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from m1.bench import decoders
from m1.bench.decode import floor_seconds
from m1.bench.options import Cell, DecodeOptions
from m1.bench.roofline import Limits
from m1.cli import app
from m1.engine import Engine, Request, SamplingParams
from m1.errors import UserError
from m1.peers import vllm_client

OPTIONS = dict(shape="tiny", cells="3x5", prompt=4, engines="ours-hybrid", device="cpu", repeats=1)


def test_rows_of_every_engine_here(tmp_path):
    engines = ["ours-hybrid", "ours-transformer", "ours-hybrid-int8", "transformers"]
    command = ["bench", "decode", "--shape", "tiny", "--cells", "3x5,2x9", "--prompt", "4", "--repeats", "2"]
    command += ["--device", "cpu", "--engines", ",".join(engines), "--out", str(tmp_path / "d.json")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [(r["name"], r["batch"], r["new_tokens"]) for r in rows] == [
        (e, b, n) for b, n in [(3, 5), (2, 9)] for e in engines
    ]
    for row in rows:
        assert row["runs"] == 2 and row["tokens_per_second"] == row["batch"] * row["new_tokens"] / row["seconds"]
        assert ("share_of_floor" in row) == (row["name"] in ("ours-hybrid", "ours-transformer"))


@pytest.mark.long
def test_steps_at_some_contexts(tmp_path):
    command = ["bench", "decode", "--shape", "tiny", "--cells", "3x200,3x400,2x400", "--prompt", "4", "--contexts", "2"]
    command += ["--engines", "ours-hybrid,ours-transformer", "--device", "cpu", "--repeats", "1"]
    run = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png")])
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "d.json").read_text())
    assert [(r["together"], r["batch"]) for r in result["rows"]] == [(3, 3)] * 4 + [(2, 2)] * 2
    for hybrid, transformer in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert hybrid["times_ours-transformer"] == transformer["seconds"] / hybrid["seconds"]
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_plot_never_replaces_a_file(monkeypatch, tmp_path):
    plot, out = tmp_path / "d.png", tmp_path / "d.json"
    plot.write_text("a photo")
    command = ["bench", "decode", "--shape", "tiny", "--cells", "2x5", "--prompt", "4", "--repeats", "1"]
    command += ["--engines", "ours-hybrid", "--device", "cpu", "--out", str(out), "--plot", str(plot)]
    run = CliRunner().invoke(app, command)
    assert str(run.exception) == f"{plot} exists: choose another file, or give --force to move it aside"
    assert not out.exists()
    run = CliRunner().invoke(app, [*command, "--force"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout.splitlines()[-1]) == json.loads(out.read_text())
    assert f"written to {plot}" in run.stderr
    assert plot.read_bytes().startswith(b"\x89PNG") and (tmp_path / "d.png.replaced").read_text() == "a photo"


def test_a_batch_without_room_goes_in_parts():
    """The time of a batch by hand: at context 29 all 6 samples decode together, at 79 only 2."""
    options = DecodeOptions(**OPTIONS | {"cells": "6x100", "contexts": 2})
    steps = {29: (0.5, 6), 79: (0.25, 2)}
    run = decoders.estimate(options, 6, 100, 7.0, steps.__getitem__)
    assert run.together == {29: 6, 79: 2} and run.seconds == 7.0 + 100 * (0.5 + 3 * 0.25) / 2


def test_as_many_samples_as_the_pages_hold():
    options = DecodeOptions(**OPTIONS | {"cells": "6x600"})
    engine = Engine(decoders.model_on_device(options, hybrid=True), [], 6, 604, prefix_cache=0)
    engine.scheduler.pages.take(len(engine.scheduler.pages.free) - 7)  # 7 pages of 256 tokens are left
    assert [decoders.seconds_of_step(options, engine, context)[1] for context in (200, 400, 580)] == [6, 3, 2]


def test_vllm_at_some_contexts(monkeypatch, tmp_path):
    """With a stand-in for its worker."""
    (tmp_path / "worker.py").write_text(
        "import json, sys\n"
        'print(json.dumps({"ready": True, "versions": {"vllm": "0.1"}, "settings": {}}), flush=True)\n'
        "for line in sys.stdin:\n"
        "    work = json.loads(line)\n"
        '    print(json.dumps({"seconds": work.get("context", 30.0) / 10, "together": 2}), flush=True)\n'
    )
    monkeypatch.setattr(vllm_client, "WORKER", tmp_path / "worker.py")
    options = dict(engines="vllm", cells="6x100", contexts=2, vllm_python=sys.executable)
    with decoders.start("vllm", DecodeOptions(**OPTIONS | options)) as decode:
        run = decode(6, 100)
    assert run.together == {29: 2, 79: 2} and run.seconds == pytest.approx(3 + 100 * 3 * (2.9 + 7.9) / 2)


def test_an_interrupted_benchmark_keeps_its_rows(monkeypatch, tmp_path):
    timed = iter([decoders.TimedRun(1.0, {6: 3})])
    monkeypatch.setattr(decoders, "whole_batches", lambda *_: lambda batch, new: next(timed))
    command = ["bench", "decode", "--shape", "tiny", "--cells", "3x5,2x9", "--prompt", "4", "--repeats", "1"]
    command += ["--engines", "ours-hybrid", "--device", "cpu", "--out", str(tmp_path / "d.json")]
    run = CliRunner().invoke(app, command)
    assert isinstance(run.exception, StopIteration | RuntimeError)
    assert [row["seconds"] for row in json.loads((tmp_path / "d.json").read_text())["rows"]] == [1.0]


def test_unshared_pages_hold_the_same_keys():
    model = decoders.make_model("tiny", torch.float32, hybrid=True, max_model_len=200)
    sampled, shared = [], []
    for unshares in (False, True):
        engine = Engine(model, [], 3, 200, prefix_cache=0, page_size=16)
        request = Request(list(range(100)), SamplingParams(n=3, max_tokens=40))
        engine.submit(request)
        while engine.scheduler.waiting:
            engine.step()
        if unshares:
            decoders.unshare_pages(engine)
        held = [page for sequence in engine.running for page in sequence.pages]
        shared.append(len(held) - len(set(held)))
        while engine.busy:
            engine.step()
        sampled.append([sequence.token_ids for sequence in request.sequences])
        assert sorted(engine.scheduler.pages.free) == list(range(len(engine.scheduler.pages.free)))
    assert sampled[0] == sampled[1] and shared == [12, 0]


def test_floor_by_hand():
    """hidden 64, 4 heads and 2 KV heads of 16, ffn 128, 4 layers (2 attention), vocabulary 1000, float32."""
    mlp, attention, mamba = 3 * 64 * 128, 64 * (64 + 2 * 32) + 64 * 64, 64 * (2 * 64 + 2 * 32 + 4) + 4 * 64 + 64 * 64
    layers = 4 * mlp + 2 * attention + 2 * mamba
    weights, context = layers + 64 * 1000, 4 + 10 / 2
    keys, states = 2 * 2 * 32 * 4 * context, 2 * (64 * 16 * 4 + 32 * 3 * 4)
    moved = 3 * (keys + 2 * states + 4 * 1000)
    slow_memory, slow_products = Limits(copy=1.0, gemm=1e30), Limits(copy=1e30, gemm=1.0)
    batch = DecodeOptions(**OPTIONS), "ours-hybrid", Cell(3, 10), {9: 3}
    assert floor_seconds(*batch, slow_memory) == pytest.approx(10 * (4 * weights + moved))
    flops = 10 * 2 * weights * 3 + 2 * layers * 3 * 4
    assert floor_seconds(*batch, slow_products) == pytest.approx(flops)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": "7b"}, "--shape 7b: choose tiny"),
        ({"engines": "ours-hybrid,sglang"}, "--engines ours-hybrid,sglang: no engine 'sglang'"),
        ({"cells": "0x5"}, "--cells 0x5: each number must be at least 1"),
        ({"prompt": 0}, "--prompt 0"),
        ({"device": "tpu"}, "--device tpu"),
        ({"contexts": 3, "engines": "transformers"}, "--contexts can't time steps of transformers"),
    ],
)
def test_impossible_options_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        DecodeOptions(**(OPTIONS | bad))


def test_cells_that_are_no_cells_are_refused():
    run = CliRunner().invoke(app, ["bench", "decode", "--cells", "64-512"])
    assert isinstance(run.exception, UserError) and "BATCHxNEW_TOKENS" in str(run.exception)
