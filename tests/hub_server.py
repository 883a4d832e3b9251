"""As much of the Hugging Face Hub as its clients need to find one public data set or model."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

REVISION = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves `files`, bytes by path, as the data set or model `name` at `commit`.

    `locked` is the error code with which files ("GatedRepo") or everything ("RepoNotFound") is refused. `asked` has the
    paths of all requests.
    """

    daemon_threads = True

    def __init__(self, name, files, kind="datasets"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.files, self.kind = name, files, kind
        self.commit, self.locked, self.asked = REVISION, None, []

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
        api = f"/api/{hub.kind}/{hub.name}"
        resolve = f"/{hub.name}/resolve/" if hub.kind == "models" else f"/{hub.kind}/{hub.name}/resolve/"
        hub.asked.append(path)
        if hub.locked and (hub.locked == "RepoNotFound" or path.startswith(resolve)):
            self.refuse(hub.locked, 403 if hub.locked == "GatedRepo" else 401)
        elif path.startswith(f"{api}/tree/"):
            folder, every = path.removeprefix(f"{api}/tree/").partition("/")[2], "recursive=true" in self.path.lower()
            found = [entry(n, data) for n, data in hub.files.items() if every or n.rpartition("/")[0] == folder]
            self.reply(found) if found else self.refuse()
        elif path == api or path in (f"{api}/revision/main", f"{api}/revision/{hub.commit}"):
            siblings = [{"rfilename": name} for name in hub.files]
            facts = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.reply({"id": hub.name, "sha": hub.commit, "siblings": siblings, **facts})
        elif path.startswith(resolve) and (data := hub.files.get(path.removeprefix(resolve).partition("/")[2])):
            self.reply(data, {"etag": f'"{blob(data)}"', "x-repo-commit": hub.commit})
        elif path.startswith(f"{api}/revision/"):
            self.refuse("RevisionNotFound")
        else:
            self.refuse("RepoNotFound" if path.startswith("/api/") else "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
        self.reply([entry(name, self.server.files[name]) for name in wanted if name in self.server.files])

    def refuse(self, code="EntryNotFound", status=404):
        self.reply({"error": code}, {"x-error-code": code}, status)

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
