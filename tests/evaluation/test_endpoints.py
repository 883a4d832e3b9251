"""Sampling from several servers: they share the work, and one that dies loses nothing. Shards and their merge."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from commands import check, m1
from openai_server import completion

from m1.engine import SamplingParams
from m1.errors import UserError
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.evaluate import evaluate
from m1.evaluation.merge import merge
from m1.evaluation.samplers import SampleRequest
from m1.evaluation.shards import Shard, read_shard
from m1.recipe import EvalSettings
from m1.tasks.problem import Problem

PARAMS = SamplingParams(max_tokens=50, temperature=0.6)
PROBLEMS = [Problem(f"p{i}", f"{i}+1", (str(i + 1),)) for i in range(7)]
SETTINGS = EvalSettings(n=3, max_new_tokens=6, prompt_template="{problem}")


def requests(count, n):
    chats = ([{"role": "user", "content": f"question {i}"}] for i in range(count))
    return [SampleRequest(f"p{i}", chat, tuple(range(n)), seed=1000 * i) for i, chat in enumerate(chats)]


def answer(body, number):
    """What a model would say: it depends on the prompt, the seed and the number of the choice alone."""
    said = [f"{body['messages'][-1]['content']} {body['seed']} {i}" for i in range(body.get("n", 1))]
    return 200, completion(*said, logprobs=[-0.5])


def sample(servers, asked, **options):
    options = {"wait": 0.01, "timeout": 5.0, "concurrency": 48} | options
    return list(EndpointSampler([server.url for server in servers], "m", **options).generate(asked, PARAMS))


def texts(samples):
    return {(sample.problem, sample.round): sample.text for sample in samples}


@pytest.mark.parametrize(
    ("count", "n", "most"), [(40, 6, 1), (40, 6, 4), pytest.param(1000, 16, 16, marks=pytest.mark.long)]
)
def test_a_server_that_dies_loses_nothing(serve, count, n, most, caplog):
    """Every sample is there, none twice, and all are those of one server."""
    dying, died = None, threading.Event()

    def until_it_dies(body, number):
        if number >= count * n // most // 8 and not died.is_set():
            died.set()
            threading.Thread(target=dying.shutdown).start()
            dying.socket.close()
        if died.is_set():
            raise ConnectionAbortedError  # no answer
        return answer(body, number)

    dying = serve(until_it_dies)
    others = [serve(answer), serve(answer)]
    samples = sample([dying, *others], requests(count, n), samples_per_request=most)
    assert died.is_set() and "the other servers take over" in caplog.text
    assert len(samples) == len(texts(samples)) == count * n and all(server.bodies for server in others)
    assert texts(samples) == texts(sample([serve(answer)], requests(count, n), samples_per_request=most))


def test_one_that_was_never_there_is_left_out(serve):
    gone, here = serve(answer), serve(answer)
    gone.shutdown()
    gone.server_close()
    assert len(sample([gone, here], requests(5, n=2))) == 10
    with pytest.raises(UserError, match="can't reach"):
        sample([gone, gone], requests(1, n=1))


def test_a_busy_server_is_not_left_out(serve, caplog):
    busy = serve(lambda body, number: (429, {}) if number < 4 else answer(body, number))
    assert len(sample([busy, serve(answer)], requests(3, n=2), concurrency=1)) == 6 and not caplog.text


def test_an_early_end_is_no_servers_failure(serve, caplog):
    """A vote that is decided closes open requests. The servers are asked again at the next problem."""
    servers = [serve(answer), serve(answer)]
    sampler = EndpointSampler([server.url for server in servers], "m", concurrency=4, wait=0.01, timeout=5.0)
    for _ in range(2):
        samples = sampler.generate(requests(1, n=400), PARAMS)
        next(samples)
        samples.close()
        time.sleep(0.2)  # the threads notice
    assert all(server.alive for server in sampler.servers) and not caplog.text


def test_a_server_that_failed_is_asked_no_more(serve):
    """Its other threads, which waited for a request, don't try it again."""
    failing = serve(lambda body, number: (500, {}) if number >= 3 else answer(body, number))
    slow = serve(lambda body, number: (time.sleep(0.05), answer(body, number))[1])
    assert len(sample([failing, slow], requests(6, n=2), concurrency=3, tries=2)) == 12
    asked = len(failing.bodies)
    assert asked <= 3 + 2 * 3  # the tries of requests that were open when it failed


def test_several_samples_in_one_request(serve):
    server = serve(answer)
    samples = sample([server], requests(2, n=5), samples_per_request=3)
    assert sorted(body.get("n", 1) for body in server.bodies) == [2, 2, 3, 3]
    assert len(set(texts(samples).values())) == 10 and {sample.tokens for sample in samples} == {1}


def test_a_count_of_several_choices_is_nobodys(serve):
    server = serve(lambda body, number: (200, completion(*"ab"[: body.get("n", 1)])))
    samples = sample([server], requests(1, n=3), samples_per_request=2)
    assert sorted((s.round, s.text, s.tokens) for s in samples) == [(0, "a", None), (1, "b", None), (2, "a", 7)]


@pytest.mark.parametrize("status", [400, 422, 200])
def test_servers_that_give_one_sample_per_request(serve, status):
    refusal = (200, completion("a")) if status == 200 else (status, {"error": "one choice at a time"})
    server = serve(lambda body, number: refusal if "n" in body else answer(body, number))
    samples = sample([server], requests(4, n=3), samples_per_request=3, concurrency=3)
    assert sorted(texts(samples)) == [(f"p{i}", r) for i in range(4) for r in range(3)]
    assert status == 200 or sum("n" in body for body in server.bodies) == 1  # it is remembered


class Scripted:
    """A sampler whose samples depend on the request's seed."""

    def __init__(self, model="m"):
        self.model = model

    def identity(self):
        return {"sampler": "scripted", "model": self.model}

    def facts(self):
        return {"fact": 1}

    def generate(self, asked, params):
        from m1.evaluation.samplers import Sample

        for request in asked:
            for round_ in request.rounds:
                text = rf"\boxed{{{(request.seed + round_) % 3 + int(request.problem[1])}}}"
                yield Sample(request.problem, round_, text, 4, -1.0, "stop", 1.0)


def shards(tmp_path, count, **changes):
    folders = []
    for index in range(1, count + 1):
        folders.append(tmp_path / f"{index}-of-{count}")
        evaluate(Scripted(**changes), PROBLEMS, SETTINGS, folders[-1], shard=Shard(index, count))
    return folders


def test_merged_shards_are_the_whole(tmp_path):
    whole = evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "whole")
    folders = shards(tmp_path, 3)
    results = [merge(order, tmp_path / f"merged{i}") for i, order in enumerate((folders, folders[::-1]))]
    timed = {"grading", "seconds", "tokens_per_second", "versions"}
    for result in results:
        assert result.pop("shards") == 3
        assert {k: v for k, v in result.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    files = [(tmp_path / f"merged{i}" / "samples.jsonl").read_text() for i in range(2)]
    assert files[0] == files[1] and len(files[0].splitlines()) == 21


def test_shards_that_do_not_fit_are_refused(tmp_path):
    first, second, third = shards(tmp_path, 3)
    (other,) = shards(tmp_path / "other", 1, model="another")[:1]
    halves = shards(tmp_path, 2)

    def refused(folders, message):
        with pytest.raises(UserError, match=message):
            merge(folders, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    refused([first, third], "shard 2/3 is missing")
    refused([first, first], "given twice")
    refused([first, second, halves[0]], "is shard 1/2, but others are one of 3")
    refused([first, other], "isn't one shard but a whole|isn't a shard of the same")
    stranger = shards(tmp_path / "stranger", 3, model="another")[2]
    refused([first, second, stranger], "isn't a shard of the same evaluation .* another model")
    lines = (third / "samples.jsonl").read_text().splitlines(keepends=True)
    (third / "samples.jsonl").write_text("".join(lines[1:]))
    refused([first, second, third], "sample 0 of p2 is missing")
    (third / "samples.jsonl").write_text("".join([*lines, lines[0]]))
    refused([first, second, third], "sample 0 of p2 is there twice")
    (third / "manifest.json").unlink()
    refused([first, second, third], "no finished result")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_impossible_shards(text):
    with pytest.raises(UserError, match="from 1/4 to 4/4"):
        read_shard(text)


def test_more_shards_than_problems(tmp_path):
    with pytest.raises(UserError, match="there are only 7 problems"):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "out", shard=Shard(8, 8))


def test_shards_and_endpoints_on_the_command_line(serve, tmp_path, capsys):
    rows = [json.dumps({"id": f"p{i}", "problem": f"{i}+1", "answer": i + 1}) for i in range(5)]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows))
    servers = [serve(lambda body, number: (200, completion(r"\boxed{1}"))) for _ in range(2)]
    base = ["eval", "--model", "m", "--task", "sums", "--data", tmp_path / "problems.jsonl", "--n", 2]
    base += [part for server in servers for part in ("--endpoint", server.url)]
    for shard in ("1/2", "2/2"):
        assert m1(*base, "--shard", shard, "--out", tmp_path / shard[0]) == 0
    assert m1("eval", "merge", tmp_path / "2", tmp_path / "1", "--out", tmp_path / "all") == 0
    result = json.loads((tmp_path / "all" / "result.json").read_text())
    assert result["n_problems"] == 5 and result["pass@1"] == 0.2
    assert result["endpoint"] == ", ".join(server.url for server in servers)
    capsys.readouterr()
    check((m1(*base, "--shard", "2"), capsys.readouterr().err), "shard '2'")


@contextmanager
def m1_server(folder):
    """`m1 serve` as a process of its own, and its address."""
    command = [sys.executable, "-c", "from m1.cli import main; main()", "serve", folder, "--port", "0"]
    command += ["--served-model-name", "small", "--max-num-seqs", "16"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield process, f"{address}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_three_servers_of_a_model_one_of_them_killed(hybrid_dir, monkeypatch):
    """The samples are those of one server, bit for bit."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    params, asked = SamplingParams(max_tokens=12), requests(100, n=8)
    with ExitStack() as stack:
        processes, urls = zip(*(stack.enter_context(m1_server(hybrid_dir)) for _ in range(3)), strict=True)
        options = {"concurrency": 32, "samples_per_request": 4, "wait": 0.1}
        samples = []
        for sample in EndpointSampler(urls, "small", **options).generate(asked, params):
            samples.append(sample)
            if len(samples) == 400:
                processes[0].send_signal(signal.SIGKILL)
        assert processes[0].poll() == -signal.SIGKILL
        alone = list(EndpointSampler(urls[1], "small", **options).generate(asked, params))
    assert len(samples) == len(texts(samples)) == 800 and texts(samples) == texts(alone)
