"""As much of the Hugging Face Hub as `datasets.load_dataset` needs to find one public data set."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

REVISION = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves `files`, bytes by path, as the data set `name`."""

    daemon_threads = True

    def __init__(self, name, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.files = name, files

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, hub = unquote(urlparse(self.path).path), self.server
        api, resolve = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            found = [entry(name, data) for name, data in hub.files.items() if name.rpartition("/")[0] == folder]
            self.reply(found) if found else self.missing()
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            facts = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.reply({"id": hub.name, "sha": REVISION, "siblings": siblings, **facts})
        elif path.startswith(resolve) and (data := hub.files.get(path.removeprefix(resolve).partition("/")[2])):
            self.reply(data, {"etag": f'"{blob(data)}"', "x-repo-commit": REVISION})
        else:
            self.missing()

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
        self.reply([entry(name, self.server.files[name]) for name in wanted if name in self.server.files])

    def missing(self):
        self.reply({"error": "Entry not found"}, {"x-error-code": "EntryNotFound"}, status=404)

    def reply(self, content, headers=None, status=200):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def entry(name, data):
    return {"type": "file", "path": name, "size": len(data), "oid": blob(data)}


def blob(data):
    """Git's name for it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
