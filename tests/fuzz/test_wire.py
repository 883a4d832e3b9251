"""Random bytes to `m1 serve`: each connection is soon answered with a status below 500, or closed."""

import httpx2
import pytest
from hypothesis import strategies as st
from serving import Running

from m1.engine import LLM
from m1.serve import connection, gate, server

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/tokenize",
    "/health",
    "/",
    "/\xe9",
    "*",
    "/" + "a" * 9999,
]
BODIES = [b"", b"{", b"\xff\xfe", b"[" * 9999, b'{"prompt": "7", "max_tokens": 2}', b'{"prompt": [7], "logprobs": 1e9}']
BODIES += [b'{"messages": [{"role": "user", "content": "7"}], "stream": true, "max_tokens": 3}', b"0" * 2**17]
NAMES = [
    "Host",
    "Content-Length",
    "Transfer-Encoding",
    "Content-Type",
    "Expect",
    "Connection",
    "Upgrade",
    "Authorization",
]
VALUES = [
    "x",
    "",
    "0",
    "5",
    "-1",
    "1e9",
    "9" * 30,
    "chunked",
    "gzip, chunked",
    "application/json",
    "100-continue",
    "close",
]
VALUES += ["websocket", "Upgrade", "\x00", "\xe9", "a" * 2**17, "Bearer \x7f", "x\r\n folded"]


def request(draw):
    """A request, mostly well formed, with some part that may not be."""
    method = draw(st.sampled_from(["POST", "POST", "POST", "GET", "HEAD", "OPTIONS", "PRI", "\xe9", "G T"]))
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTCPCP/1.0", ""]))
    headers = draw(
        st.lists(st.tuples(st.sampled_from(NAMES) | st.text(max_size=3), st.sampled_from(VALUES)), max_size=3)
    )
    body = draw(st.sampled_from(BODIES))
    if framing := draw(st.sampled_from(["", "length", "chunks"])):
        headers += [("Host", "x"), ("Content-Type", "application/json")]
    if framing == "length":
        headers.append(("Content-Length", str(len(body) + draw(st.sampled_from([0, 0, -1, 1])))))
    elif framing == "chunks":
        size = draw(st.sampled_from([b"%x" % len(body)] * 3 + [b"zz", b"-1", b"f" * 40, b"5;a=b", b""]))
        body = (
            size
            + b"\r\n"
            + body
            + b"\r\n"
            + draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"0\r\n", b"\r\n"]))
        )
        headers.append(("Transfer-Encoding", "chunked"))
    lines = [
        " ".join([method, draw(st.sampled_from(PATHS)), version]),
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + body


REQUESTS = st.lists(st.composite(request)() | st.binary(max_size=99), min_size=1, max_size=3).map(b"".join)


@pytest.fixture
def small(hybrid_dir, monkeypatch):
    """A server with little patience, so that every connection ends soon."""
    for room, name in ((connection, "HEAD_SECONDS"), (gate, "BODY_SECONDS"), (server, "KEEP_ALIVE_SECONDS")):
        monkeypatch.setattr(room, name, 0.2)
    made = Running(LLM.from_pretrained(hybrid_dir, max_num_seqs=8, max_model_len=512), [])
    yield made
    made.close()


def test_bytes_to_the_server(fuzz, small, monkeypatch):
    def test(sent):
        with small.connect() as line:
            line.settimeout(20)
            answer = b""
            try:
                line.sendall(sent)
                while part := line.recv(2**16):
                    answer += part
            except ConnectionError:  # it may close while more is sent
                pass
        assert answer[:9] in (b"", b"HTTP/1.1 ")
        assert b"HTTP/1.1 5" not in answer and b"Traceback" not in answer, answer

    fuzz(REQUESTS, test)
    monkeypatch.undo()
    assert small.idle() and httpx2.get(small.url + "/health").status_code == 200
