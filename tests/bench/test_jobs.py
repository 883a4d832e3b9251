"""`m1 bench jobs` at a size that takes seconds, with a stand-in for vLLM's worker."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from m1.bench import contest, decoders
from m1.bench.jobs import seconds_of
from m1.bench.options import Job, JobsOptions
from m1.bench.roofline import Limits
from m1.cli import app
from m1.engine import Engine
from m1.errors import UserError
from m1.peers import vllm_client

OPTIONS = dict(shape="tiny", jobs="3x20x1x8,1x33x4x5", engines="ours-hybrid", device="cpu", repeats=1)

WORKER = """
import json, sys
settings = {"max_num_seqs": int(sys.argv[-1])}
print(json.dumps({"ready": True, "versions": {"vllm": "0.1"}, "settings": settings}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    print(line, end="", file=open(LOG, "a"))
    computed = work["batch"] * work["prompt"]
    seconds = float(work["new_tokens"])
    print(json.dumps({"seconds": seconds, "tokens": 0, "prompt_tokens": computed, "peak_bytes": None}), flush=True)
"""


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """No row depends on the machine's limits."""
    monkeypatch.setattr(contest, "measure_limits", lambda *_: Limits(copy=1.0, gemm=1.0))


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Replaces vLLM's worker. Returns a function that gives the work it was asked for."""
    log = tmp_path / "work.jsonl"
    (tmp_path / "worker.py").write_text(WORKER.replace("LOG", repr(str(log))))
    monkeypatch.setattr(vllm_client, "WORKER", tmp_path / "worker.py")
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def bench(tmp_path, *arguments):
    command = ["bench", "jobs", "--shape", "tiny", "--device", "cpu", "--vllm-python", sys.executable]
    run = CliRunner().invoke(app, [*command, *arguments, "--out", str(tmp_path / "jobs.json")])
    assert run.exit_code == 0, run.output
    return json.loads((tmp_path / "jobs.json").read_text())


def test_rows_of_every_engine(asked, tmp_path):
    engines = ["ours-hybrid", "ours-transformer", "ours-hybrid-int8", "vllm"]
    result = bench(tmp_path, "--jobs", "3x20x1x8,1x33x4x5", "--engines", ",".join(engines), "--repeats", "2")
    rows = result["rows"]
    assert [(r["job"], r["name"]) for r in rows] == [(j, e) for j in ("3x20x1x8", "1x33x4x5") for e in engines]
    assert result["skipped"] == []
    for row in rows:
        tokens, computed, together = (24, 60, 3) if row["job"] == "3x20x1x8" else (20, 33, 4)  # samples are forks
        assert row["runs"] == 2 and row["sampled_tokens"] == tokens and row["prompt_tokens"] == computed
        assert row["tokens_per_second"] == tokens / row["seconds"] and row["start_seconds"] > 0
        assert row["max_num_seqs"] == together
        if row["name"] == "vllm":
            assert (row["seconds"], row["prefill_seconds"]) == (float(row["job"][-1]), 1.0)
            assert row["versions"] == {"vllm": "0.1"} and row["settings"] == {"max_num_seqs": 4}
        else:
            assert row["together"] == together and row["prefill_seconds"] > 0 and row["seconds"] > 0
            assert row["times_vllm"] == float(row["job"][-1]) / row["seconds"]
            assert row["prefill_times_vllm"] == 1 / row["prefill_seconds"]


def test_lengths_of_a_file(asked, tmp_path):
    (tmp_path / "lengths.jsonl").write_text('{"tokens": 2}\n{"tokens": 3}\n{"tokens": 50}\n')
    lengths = ["--lengths", str(tmp_path / "lengths.jsonl")]
    rows = bench(tmp_path, "--jobs", "40x5x2x6", *lengths, "--engines", "ours-hybrid,vllm", "--repeats", "1")["rows"]
    first, warmup, prefill, whole = asked()
    assert first["new_tokens"] == 1 and warmup["lengths"] == [min(2 + i, 6) for i in range(40)]
    assert set(whole["lengths"]) == {2, 3, 6} and prefill == whole | {"new_tokens": 1}
    assert [row["sampled_tokens"] for row in rows] == [2 * sum(whole["lengths"])] * 2


def test_each_prompt_has_its_length():
    options = JobsOptions(**OPTIONS | {"jobs": "3x20x2x40"})
    engine = Engine(decoders.model_on_device(options, hybrid=True), [], 8, max_model_len=60, prefix_cache=0)
    together = seconds_of(options, engine, Job(3, 20, 2, 40), [5, 9, 40])[1]
    assert together == 6 and engine.stats.decoded == 2 * (5 + 9 + 40)


def test_no_more_together_than_asked_for(tmp_path):
    [row] = bench(tmp_path, "--jobs", "6x9x1x8", "--engines", "ours-hybrid", "--max-num-seqs", "2")["rows"]
    assert row["together"] == row["max_num_seqs"] == 2


def test_vllm_is_left_out_where_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(decoders, "find_python", lambda given, device: None)
    result = bench(tmp_path, "--jobs", "1x9x1x2", "--engines", "ours-hybrid,vllm")
    assert result["skipped"] == ["vllm isn't there: `make peers` installs it"] and len(result["rows"]) == 1


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", "+a +b a1 b1 a1 b1 a2 b2 a2 b2 -b -a"),
        ("cuda", "+a a1 a1 a2 a2 -a +b b1 b1 b2 b2 -b"),
    ],
)
def test_engines_take_turns_but_not_on_a_gpu(monkeypatch, device, expected):
    """Two engines don't fit into a GPU's memory."""
    monkeypatch.setattr(decoders, "free_memory", lambda options: None)
    options, events = SimpleNamespace(device=device, repeats=2, chosen_engines=lambda: ["a", "b"]), []

    @contextmanager
    def start(name, options):
        events.append(f"+{name}")
        yield lambda number: events.append(f"{name}{number}") or SimpleNamespace(seconds=1.0)
        events.append(f"-{name}")

    decoders.measure_engines(options, [(1,), (2,)], start, lambda work, runs: [], {}, decoders.ignore)
    assert " ".join(events) == expected


def test_smollm2_has_its_size():
    with torch.device("meta"):
        model = decoders.make_model("smollm2-135m", torch.bfloat16, False, 64)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008  # the published model's


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"jobs": "3x20x8"}, "--jobs 3x20x8: give PROMPTSxTOKENSxSAMPLESxNEW_TOKENS"),
        ({"jobs": "3x20x1xmany"}, "--jobs 3x20x1xmany: give PROMPTS"),
        ({"jobs": "3x0x1x8"}, "--jobs 3x0x1x8: each number must be at least 1"),
        ({"jobs": "3x20x1x1"}, "--jobs 3x20x1x1: NEW_TOKENS must be at least 2"),
        ({"engines": "transformers"}, "--engines transformers: no engine 'transformers'"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0: must be at least 1"),
        ({"lengths": "none.jsonl"}, "can't read none.jsonl"),
    ],
)
def test_impossible_options_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        JobsOptions(**(OPTIONS | bad))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no rows"), ('{"tokens": 3}\n{"text": "x"}\n', "row 2 has tokens=None"), ('{"tokens": 0}\n', "tokens=0")],
)
def test_files_without_lengths_are_refused(text, message, tmp_path):
    (tmp_path / "lengths.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        JobsOptions(**OPTIONS, lengths=str(tmp_path / "lengths.jsonl"))
