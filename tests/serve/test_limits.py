"""What a server refuses or cuts short, and that every slot is free afterwards."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from m1.serve import connection, gate

KEY = "sk-of-the-tests"
QUESTION = [{"role": "user", "content": "7+5*3 mod 10"}]
LONG = {"model": "small", "messages": QUESTION, "max_tokens": 450, "ignore_eos": True}


def post(server, path="/v1/chat/completions", key=KEY, **options):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx2.post(server.url + path, headers=headers, **options)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"])
def test_everything_but_health_needs_the_key(server, path):
    for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": f"Basic {KEY}"}, {"X-Key": KEY}):
        answer = httpx2.get(server.url + path, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == 401 and KEY not in answer.text
    assert httpx2.get(server.url + "/health").status_code == 200
    known = httpx2.get(server.url + path, headers={"Authorization": f"bearer {KEY}"})
    assert known.status_code == (404 if path == "/nothing" else 200)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "7"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "7"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "7"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "7"}], "max_tokens": 0}',
        b'{"messages": [{"role": "user", "content": "7"}], "logit_bias": {"a": 1}}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        b'{"messages": [{"role": "user", "content": "7"}], "stop": [""]}',
        b'{"messages": [{"role": "user", "content": "7"}], "stop_token_ids": [1e40]}',
        b'{"messages": [{"role": "user", "content": "7"}], "vote": {"n": 0}}',
        b'{"messages": [{"role": "user", "content": "7"}], "vote": {"seconds": 1e9, "n": 100000}}',
    ],
)  # fmt: skip
def test_a_bad_body_is_a_400(server, content):
    answer = post(server, content=content)
    assert answer.status_code in (400, 422) and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and server.idle()


def test_a_body_has_a_limit(serve):
    server = serve(max_body=1000)
    for content in (b"x" * 1001, (b"x" * 100 for _ in range(11))):
        assert post(server, key=None, content=content).status_code == 413
    assert post(server, key=None, json=LONG | {"max_tokens": 1}).status_code == 200


def test_a_slow_sender_is_refused(serve, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    server = serve()
    with server.connect() as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert line.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_slow_sender_of_headers_is_cut_off(serve, monkeypatch, before):
    """Also after a request that was answered, and however often it sends something. Nobody else waits."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    server = serve()
    with server.connect() as line:
        line.sendall(before)
        if before:
            assert line.recv(1000).startswith(b"HTTP/1.1 200")
        line.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for i in range(100):
                line.sendall(f"X-{i}: x\r\n".encode())
                assert httpx2.get(server.url + "/health").status_code == 200
                time.sleep(0.05)


def test_a_client_that_does_not_read_is_cut_off(serve, monkeypatch):
    """Its buffers are full. Its slots are free then, and its connection isn't kept."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    server = serve()
    body = json.dumps(LONG | {"n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with server.connect() as line:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        line.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert line.recv(12) == b"HTTP/1.1 200"
        for _ in range(200):
            if not server.server.server_state.connections:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the connection is kept")
        assert server.idle()


def test_a_client_that_leaves_frees_its_slots(server):
    vote = {"n": 1, "vote": {"n": 64, "rule": "none"}}
    for more in ({"n": 8}, {"n": 8, "stream": True}, vote, vote | {"stream": True}):
        headers = {"Authorization": f"Bearer {KEY}"}
        with server.connect() as line:
            request = httpx2.Request("POST", server.url, headers=headers, json=LONG | more)
            head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            line.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            while not server.loop.engine.running:
                time.sleep(0.01)
        assert server.idle() and server.loop.engine.free_slots == 8
    assert post(server, json=LONG | {"max_tokens": 2}).status_code == 200


def test_a_request_has_limited_time(serve):
    server = serve(timeout=0.05)
    answer = post(server, key=None, json=LONG | {"n": 8})
    assert answer.status_code == 504 and "0.05 seconds" in answer.json()["error"]["message"]
    events = post(server, key=None, json=LONG | {"n": 8, "stream": True}).text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 504 and events[-1] == "data: [DONE]"
    assert server.idle()


def test_overload_is_a_429(serve):
    server = serve(max_waiting=4)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(server, key=None, json=LONG | {"n": 2, "max_tokens": 40}), range(16)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 6
    assert next(a for a in answers if a.status_code == 429).headers["retry-after"] == "1" and server.idle()


def test_a_full_server_reads_no_request(serve, monkeypatch):
    server = serve(max_waiting=1)
    step = server.loop.engine.step
    monkeypatch.setattr(server.loop.engine, "step", lambda: (time.sleep(0.004), step())[1])  # stays full for seconds
    with ThreadPoolExecutor(9) as pool:
        running = [pool.submit(post, server, key=None, json=LONG, timeout=60) for _ in range(9)]
        while server.loop.room:
            time.sleep(0.01)
        assert post(server, key=None, content=b"{").status_code == 429
        assert post(server, "/tokenize", key=None, content=b"{").status_code == 400
        assert {one.result().status_code for one in running} == {200}


def test_a_vote_leaves_room_for_a_chat(server):
    """A vote of many long samples is running, and a chat is answered before it ends."""
    with ThreadPoolExecutor(1) as pool:
        vote = pool.submit(post, server, json=LONG | {"max_tokens": 400, "vote": {"n": 60, "rule": "none"}}, timeout=60)
        while len(server.loop.engine.running) < 6:
            time.sleep(0.01)
        assert len(server.loop.engine.running) == 6  # two of eight slots are kept
        answer = server.client().chat.completions.create(model="small", messages=QUESTION, max_tokens=5)
        assert answer.choices and not vote.done()
        assert vote.result().json()["vote"]["finished"] == 60


def test_a_failed_step_ends_its_requests_only(server, monkeypatch):
    engine, step = server.loop.engine, server.loop.engine.step

    def fail():
        monkeypatch.setattr(engine, "step", step)
        engine.scheduler.reset()
        raise RuntimeError("the device is lost: /a/path")

    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().chat.completions.create(**{k: v for k, v in LONG.items() if k != "ignore_eos"})
    assert "/a/path" not in str(caught.value) and server.idle()
    assert server.client().chat.completions.create(model="small", messages=QUESTION, max_tokens=2).choices


def values(server):
    """The metrics, by name."""
    text = httpx2.get(server.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}


def test_metrics(server):
    before = values(server)
    for more in ({"max_tokens": 5}, {"max_tokens": 300, "stream": True}):
        post(server, "/v1/completions", json={"prompt": "7" * 50, "ignore_eos": True} | more)
    after = values(server)
    grown = {name: value - before[name] for name, value in after.items() if value != before[name]}
    model = '{model_name="small"}'
    assert grown[f"m1:generation_tokens_total{model}"] == 305
    assert grown[f"m1:prefix_cache_queries_total{model}"] == 100
    assert grown[f"m1:prompt_tokens_total{model}"] == grown[f"m1:prefix_cache_hits_total{model}"] == 50
    assert grown["m1:time_to_first_token_seconds_count"] == grown["m1:request_success_total"] == 2
    assert 1 <= grown["m1:inter_token_latency_seconds_count"] < 300
    assert f"m1:num_requests_running{model}" in after and f"m1:num_requests_waiting{model}" in after


def test_tokens_and_back(server):
    answer = post(server, "/tokenize", json={"prompt": "7+5"}).json()
    assert answer["count"] == len(answer["tokens"]) == 3 and answer["max_model_len"] == 512
    assert post(server, "/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "7+5"}
    assert post(server, "/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert post(server, "/tokenize", json={"messages": QUESTION}).json()["count"] > 10
    assert post(server, "/tokenize", json={}).status_code == 400
