"""Sampling from a server, a real one on a local port: what is asked, what is read, and what happens when it fails."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
from openai_server import completion

from m1.engine import SamplingParams, fold_in
from m1.errors import UserError
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.samplers import SampleRequest

PARAMS = SamplingParams(max_tokens=50, temperature=0.6)


def messages(text):
    return [{"role": "user", "content": text}]


def requests(count, n=1):
    return [SampleRequest(f"p{i}", messages(f"question {i}"), tuple(range(n)), seed=1000 * i) for i in range(count)]


def sample(server, requests, params=PARAMS, **options):
    options = {"wait": 0.01, "timeout": 5.0, "concurrency": 4} | options
    return list(EndpointSampler(server.url + "/", "some-model", **options).generate(requests, params))


def echo(body, number):
    return 200, completion(rf"{body['messages'][0]['content']} \boxed{{{body.get('seed')}}}", logprobs=[-0.5, -0.25])


def seed_of(problem, round_):
    return fold_in(1000 * problem, round_) % 2**31


def test_every_sample_arrives_once(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(echo)
    samples = sample(server, requests(5, n=3))
    assert sorted((s.problem, s.round) for s in samples) == [(f"p{i}", r) for i in range(5) for r in range(3)]
    assert all(s.text == rf"question {s.problem[1]} \boxed{{{seed_of(int(s.problem[1]), s.round)}}}" for s in samples)
    assert {(s.tokens, s.logprob, s.finish_reason) for s in samples} == {(2, -0.75, "stop")}
    assert all(0 < s.seconds < 5 for s in samples)
    assert sorted(body.pop("seed") for body in server.bodies) == sorted(
        seed_of(i, r) for i in range(5) for r in range(3)
    )
    assert {
        "model": "some-model", "messages": messages("question 2"), "max_tokens": 50, "temperature": 0.6, "top_p": 1.0,
        "top_k": 0, "min_p": 0.0, "logprobs": True,
    } in server.bodies  # fmt: skip
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_no_key_no_header(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = serve(echo)
    sample(server, requests(1))
    assert "Authorization" not in server.headers[0]


def test_a_sample_has_the_same_seed_whatever_else_is_asked_for(serve):
    server = serve(echo)
    whole = {s.round: s.text for s in sample(server, requests(1, n=5))}
    alone = sample(server, [SampleRequest("p0", messages("question 0"), (3,), seed=0)])
    assert alone[0].text == whole[3] and len(set(whole.values())) == 5


def test_only_the_first_choice_is_read(serve):
    samples = sample(serve(lambda *_: (200, completion("a", "b"))), requests(1, n=3))
    assert [(s.round, s.text) for s in sorted(samples, key=lambda s: s.round)] == [(r, "a") for r in range(3)]


def test_requests_run_at_the_same_time_but_no_more_than_asked(serve):
    running, most, lock = 0, 0, threading.Lock()

    def slow(body, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return echo(body, number)

    sample(serve(slow), requests(9), concurrency=3)
    assert most == 3


def test_tokens_without_logprobs_are_the_servers_count(serve):
    answer = completion("a") | {"usage": {"completion_tokens": 7}}
    assert [s.tokens for s in sample(serve(lambda *_: (200, answer)), requests(1))] == [7]
    answer = {"choices": completion("a")["choices"]}
    assert [(s.tokens, s.logprob) for s in sample(serve(lambda *_: (200, answer)), requests(1))] == [(None, None)]


def test_text_of_reasoning_models_and_broken_characters(serve):
    answer = completion(None, reasoning_content=r"so \boxed{3}", finish_reason="length")
    (found,) = sample(serve(lambda *_: (200, answer)), requests(1))
    assert found.text == "<think>\nso \\boxed{3}\n</think>\n" and found.finish_reason == "length"
    (found,) = sample(serve(lambda *_: (200, completion("half \ud83d"))), requests(1))
    assert found.text.encode() == b"half ?"


MALFORMED = [b"<html>", b"[]", {}, {"choices": []}, {"choices": [{"text": "x"}]}, {"choices": [{"message": None}]}]


@pytest.mark.parametrize(
    "failure", [(429, {}), (500, {}), (503, b"busy"), *[(200, m) for m in MALFORMED]], ids=lambda f: str(f)
)
def test_what_may_pass_is_tried_again(serve, failure):
    server = serve(lambda body, number: failure if number < 2 else echo(body, number))
    assert [s.problem for s in sample(server, requests(1))] == ["p0"]
    assert len(server.bodies) == 3


def test_waits_grow_and_the_servers_own_is_kept(serve):
    times = []

    def answer(body, number):
        times.append(time.monotonic())
        return echo(body, number) if number == 3 else (429, {}, {"retry-after": "0.5"} if number == 2 else {})

    sample(serve(answer), requests(1), wait=0.05)
    waits = [after - before for before, after in pairwise(times)]
    assert 0.04 <= waits[0] < 0.09 <= 1.5 * waits[1] and waits[2] >= 0.4


def test_a_request_that_hangs_is_given_up_and_made_again(serve):
    release = threading.Event()

    def answer(body, number):
        if number == 0:
            release.wait(10)
        return echo(body, number)

    started = time.monotonic()
    samples = sample(serve(answer), requests(2), timeout=0.3)
    release.set()
    assert sorted(s.problem for s in samples) == ["p0", "p1"] and time.monotonic() - started < 5


def test_a_failure_that_stays_is_named_after_the_samples_that_were_made(serve):
    def answer(body, number):
        return (500, b"out of memory") if body["messages"][0]["content"] == "question 3" else echo(body, number)

    server = serve(answer)
    generator = EndpointSampler(server.url, "m", concurrency=1, tries=3, wait=0.01)
    found = []
    with pytest.raises(UserError, match="gave up after 3 tries, the last: 500 out of memory; finished samples are"):
        for sample in generator.generate(requests(4), PARAMS):
            found.append(sample.problem)
    assert found == ["p0", "p1", "p2"]


def test_a_refusal_ends_it_at_once(serve):
    server = serve(lambda *_: (401, {"error": {"message": "bad key"}}))
    with pytest.raises(UserError, match=r"answers 401 .*bad key"):
        sample(server, requests(1))
    assert len(server.bodies) == 1


@pytest.mark.parametrize("field", ["seed", "logprobs", "top_k", "min_p"])
def test_a_field_the_server_does_not_know_is_left_out(serve, field):
    def answer(body, number):
        return (400, {"error": f"unknown argument {field}"}) if field in body else echo(body, number)

    server = serve(answer)
    assert len(sample(server, requests(3), concurrency=1)) == 3
    assert [field in body for body in server.bodies] == [True, False, False, False]


def test_a_filter_that_is_on_is_never_left_out(serve):
    server = serve(lambda body, number: (400, {"error": "unknown argument top_k"}))
    with pytest.raises(UserError, match=r"answers 400 .*top_k"):
        sample(server, requests(1), SamplingParams(top_k=20))
    assert server.bodies[0]["top_k"] == 20


def test_a_server_that_is_not_there_ends_it_at_once(serve):
    server = serve(echo)
    server.shutdown()
    server.server_close()
    started = time.monotonic()
    with pytest.raises(UserError, match="can't reach http"):
        sample(server, requests(1), wait=60)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://", "http://[::1", "/v1"])
def test_bad_urls(url):
    with pytest.raises(UserError, match="endpoint"):
        EndpointSampler(url, "m")


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}])
def test_bad_numbers(options):
    with pytest.raises(UserError, match="must be positive"):
        EndpointSampler("http://host/v1", "m", **options)


@pytest.mark.long
def test_interrupted_while_the_server_hangs(serve, tmp_path):
    """Ctrl-C doesn't wait for requests under way, and what was finished is there when it goes on."""
    hang, asked = threading.Event(), threading.Event()

    def answer(body, number):
        if number >= 2:
            asked.set()
            hang.wait(120)
        return echo(body, number)

    server = serve(answer)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"problem": "{i}", "answer": 0}}\n' for i in range(3)))
    command = [sys.executable, "-c", "from m1.cli import main; main()", "eval", "--endpoint", server.url]
    command += ["--model", "m", "--task", "math500", "--data", tmp_path / "p.jsonl", "--n", 1, "--concurrency", 1]
    command += ["--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert asked.wait(60)
        samples = tmp_path / "out" / "samples.jsonl"
        while not samples.exists() or len(samples.read_text().splitlines()) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        hang.set()
        process.kill()
    assert process.returncode == 130 and "finished work is saved" in stderr and "Traceback" not in stderr
    assert [json.loads(line)["problem"] for line in samples.open()] == ["math500/1", "math500/2"]


ODD = {
    "a count of 10^30": completion("a") | {"usage": {"completion_tokens": 10**30}},
    "a negative count": completion("a") | {"usage": {"completion_tokens": -1}},
    "a count that isn't whole": completion("a") | {"usage": {"completion_tokens": 1.5}},
    "a count that is a text": completion("a") | {"usage": {"completion_tokens": "7"}},
    "a count that is true": completion("a") | {"usage": {"completion_tokens": True}},
    "logprob NaN": completion("a", logprobs=[float("nan")]),
    "logprob of 400 digits": completion("a", logprobs=[10**400]),
    "a text that is a list": completion(["a"]),
    "deep": b"[" * 200_000,
    "a number of 5000 digits": b'{"choices": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("name", ODD)
def test_impossible_answers_are_tried_again(serve, name):
    server = serve(lambda body, number: (200, ODD[name]) if number < 1 else echo(body, number))
    assert [s.tokens for s in sample(server, requests(1))] == [2]


def test_every_text_can_be_written(serve):
    answer = completion("a", finish_reason="\ud800" * 300)
    (found,) = sample(serve(lambda *_: (200, answer)), requests(1))
    assert found.finish_reason == "?" * 100


@pytest.mark.parametrize("headers", [{"content-type": "text/plain; charset=rot13"}, {"content-encoding": "gzip"}])
def test_hostile_headers(serve, headers):
    with pytest.raises(UserError, match=r"answers 401|gave up after 2 tries"):
        sample(serve(lambda *_: (401, b"no", headers)), requests(1), tries=2)


def raw_server(respond):
    """A server that answers each connection by `respond(send)`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    def serve_one(connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            respond(connection.sendall)

    threading.Thread(target=run, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def drip(send):
    send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    for _ in range(1000):
        send(b" ")
        time.sleep(0.02)


def drip_headers(send):
    send(b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(1000):
        send(b"y")
        time.sleep(0.02)


def continue_for_ever(send):
    while True:
        send(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.001)


def endless(send):
    send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        send(b"10000\r\n" + b" " * 65536 + b"\r\n")


@pytest.mark.parametrize("respond", [drip, drip_headers, continue_for_ever, endless])
def test_an_answer_has_a_total_deadline_and_a_size(respond, monkeypatch):
    monkeypatch.setattr("m1.evaluation.endpoint.LARGEST_ANSWER", 2**20)
    listener, url = raw_server(respond)
    started = time.monotonic()
    with (
        listener,
        pytest.raises(
            UserError, match=r"gave up after 2 tries, the last: (the answer is(n't complete| too)|timed out)"
        ),
    ):
        list(EndpointSampler(url, "m", tries=2, wait=0.01, timeout=0.4).generate(requests(1), PARAMS))
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_timeouts_that_no_socket_takes(timeout):
    with pytest.raises(UserError, match="must be positive, and the timeout at most 604800"):
        EndpointSampler("http://host/v1", "m", timeout=timeout)


@pytest.mark.parametrize(
    ("name", "value"), [("HTTP_PROXY", "http://[::1"), ("HTTP_PROXY", "ftp://x"), ("SSL_CERT_FILE", "/nowhere.pem")]
)
def test_a_broken_environment(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"can't ask http://host.*check.*PROXY"):
        list(EndpointSampler("http://host/v1", "m", tries=1).generate(requests(1), PARAMS))


def test_no_proxy_leads_to_this_machine(serve, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(sample(serve(echo), requests(1), tries=1)) == 1


def test_fields_left_out_and_an_opened_thought(serve):
    server = serve(echo)
    (found,) = sample(server, requests(1), left_out=("seed",), opens_thought=True)
    assert found.text.startswith("<think>") and "seed" not in server.bodies[0] and server.bodies[0]["logprobs"]


def test_requests_are_made_when_a_server_takes_them(serve):
    """A vote within seconds has 100,000, which would take a part of the seconds."""
    made, hang = [], threading.Event()

    class Rounds(tuple):
        def __getitem__(self, key):
            made.append(key)
            return super().__getitem__(key)

    def answer(body, number):
        if number:
            hang.wait(20)
        return echo(body, number)

    request = SampleRequest("p", messages("?"), Rounds(range(1000)), 0)
    samples = EndpointSampler(serve(answer).url, "m", concurrency=2).generate([request], PARAMS)
    next(samples)
    samples.close()
    hang.set()
    assert len(made) <= 3


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "a" * 64 + ".org"])
def test_hosts_that_are_no_names(host):
    with pytest.raises(UserError, match=r"can't (ask|reach)|endpoint"):
        list(EndpointSampler(f"http://{host}/v1", "m", tries=1).generate(requests(1), PARAMS))
