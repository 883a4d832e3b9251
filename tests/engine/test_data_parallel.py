"""Several engines share a file of prompts or an evaluation: the samples are one engine's, and no process is left."""

import json
import os
import signal
from dataclasses import replace

import pytest
from commands import check, m1

from m1.engine import LLM, Request, SamplingParams
from m1.engine.data_parallel import DataParallel, Worker, devices_of
from m1.engine.generate import generate_file
from m1.errors import M1Warning, UserError
from m1.evaluation.evaluate import evaluate
from m1.evaluation.samplers import EngineSampler
from m1.jsonl import read_jsonl
from m1.recipe import EvalSettings, EvalStage, GenerateStage
from m1.tasks.problem import Problem

PARAMS = SamplingParams(n=3, max_tokens=24, temperature=1.0, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def parallel(hybrid_dir):
    """Two engines on the CPU."""
    parallel = DataParallel(hybrid_dir, ["cpu", "cpu"], max_num_seqs=2)
    yield parallel
    parallel.close()


@pytest.fixture
def llm(hybrid_dir):
    return LLM.from_pretrained(hybrid_dir, max_num_seqs=2)


def interrupt_after(count):
    def on_progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.long
def test_a_file_begun_on_one_device_is_completed_on_two(llm, parallel, tmp_path):
    prompts, out, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": "ab" * i}) + "\n" for i in range(1, 7)))
    params = replace(PARAMS, stop=("e", "<|user|>"))
    generate_file(llm, prompts, whole, params)
    with pytest.raises(KeyboardInterrupt):
        generate_file(llm, prompts, out, params, on_progress=interrupt_after(3))
    generated = generate_file(parallel, prompts, out, params)
    rows, expected = ({(r["id"], r["sample"]): r for r in read_jsonl(path)} for path in (out, whole))
    assert rows == expected and len(rows) == 18 and generated.seconds > 0
    assert generated.tokens == sum(row["tokens"] for row in list(read_jsonl(out))[3:])


@pytest.mark.long
def test_an_evaluation_begun_on_one_device_is_completed_on_two(llm, parallel, tmp_path):
    problems = [Problem(f"p{i}", f"{i}+1", (str(i + 1),)) for i in range(5)]
    settings = EvalSettings(n=3, max_new_tokens=6, temperature=1.0)
    one, two = (EngineSampler(each.model, each.tokenizer, 2, llm=each) for each in (llm, parallel))
    evaluate(one, problems, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(one, problems, settings, tmp_path / "parts", interrupt_after(4))
    result = evaluate(two, problems, settings, tmp_path / "parts")
    rows = [
        {(row["problem"], row["round"]): (row["text"], row["logprob"]) for row in read_jsonl(path / "samples.jsonl")}
        for path in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 15 and result["model"] == one.identity()["model"]


def test_both_engines_work_and_a_prompt_stays_on_one(parallel, monkeypatch):
    """The context is 512 tokens, which the user is told; a job of two prompts is shared, though one engine has room."""
    homes, receive = {}, Worker.receive  # prompt -> processes

    def noted(worker):
        for sample in (samples := receive(worker)) or []:
            homes.setdefault(sample.prompt, set()).add(worker.process.pid)
        return samples

    monkeypatch.setattr(Worker, "receive", noted)
    requests = [Request([5] * 500, replace(PARAMS, n=2, max_tokens=40), i) for i in range(2)]
    with pytest.warns(M1Warning, match="max_tokens is 40, more than the model's context"):
        steps = list(parallel.run(requests))
    assert sorted((s.prompt, s.index, s.tokens) for step in steps for s in step) == [
        (i, j, 12) for i in range(2) for j in range(2)
    ]
    assert sorted(map(sorted, homes.values())) == sorted([worker.process.pid] for worker in parallel._workers)


def test_a_killed_worker_is_named_and_the_others_end(parallel):
    requests = [Request([5, 6], replace(PARAMS, max_tokens=400), i) for i in range(50)]
    steps = parallel.run(requests)
    assert next(steps)
    processes = [worker.process for worker in parallel._workers]
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="the engine on cpu was killed by SIGKILL"):
        list(steps)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.long
def test_a_refused_prompt_ends_the_workers(hybrid_dir):
    parallel = DataParallel(hybrid_dir, ["cpu"])
    with pytest.raises(UserError, match="cpu: prompt 1 is empty"):
        list(parallel.run([Request([5], PARAMS, 0), Request([], PARAMS, 1)]))
    assert parallel._workers == []


@pytest.mark.parametrize("devices", ["cuda:99", "tpu", "cpu,cuda:99", ""])
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_an_absent_device_is_refused_before_a_model_is_loaded(command, devices, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    own = {"generate": ["--prompts", tmp_path / "in.jsonl"], "eval": ["--task", "chain", "--limit", 1]}[command]
    code = m1(command, "--model", "no/where", *own, "--out", tmp_path / "o", "--devices", devices)
    check((code, capsys.readouterr().err), f"devices {devices}: no device '{devices.split(',')[-1]}' here")


def test_all_is_every_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of("all") == devices_of("cuda:0, cuda:1") == ["cuda:0", "cuda:1"] and devices_of("cpu") == ["cpu"]
    with pytest.raises(UserError, match="cuda:1 is named twice"):
        devices_of("cuda:1,cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices_of("all") == devices_of("auto") == devices_of(None)


def test_devices_are_no_setting(tmp_path):
    for cls, own in ((GenerateStage, {"model": "m", "prompts": "p"}), (EvalStage, {"models": {"m": "m"}})):
        assert "devices" not in cls(**own, out=str(tmp_path), devices="all").settings()
