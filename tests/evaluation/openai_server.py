"""A server that speaks OpenAI's chat completions, as well or as badly as a test wants."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(*texts, finish_reason="stop", logprobs=None, **message):
    """A chat completion with these choices; `logprobs` of the tokens of each."""
    scores = {"content": [{"logprob": value} for value in logprobs]} if logprobs else None
    choices = [
        {"message": {"role": "assistant", "content": text} | message, "finish_reason": finish_reason}
        | ({"logprobs": scores} if scores else {})
        for text in texts
    ]
    return {"choices": choices, "usage": {"completion_tokens": 7 * len(texts)}}


class Server(ThreadingHTTPServer):
    """`answer(body, number)` gives (status, content[, headers]); `bodies`, `headers` and `paths` are the requests'."""

    daemon_threads = True

    def __init__(self, answer, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.bodies, self.headers, self.paths = answer, [], [], []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that left isn't worth a traceback."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """vLLM's /health."""
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers.items()))
            self.server.paths.append(self.path)
        found = self.path.partition("?")[0] == "/v1/chat/completions"
        status, content, *headers = self.server.answer(body, number) if found else (404, {"error": "no such path"})
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": len(content), **(headers[0] if headers else {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass
