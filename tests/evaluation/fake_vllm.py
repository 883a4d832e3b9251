"""Stands in for a Python with vLLM: an executable file that takes the server's command line and serves samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

from openai_server import Server, completion

FILE = """#!{python}
import os, sys, time
sys.path.insert(0, {tests!r})
import fake_vllm
{first}
fake_vllm.serve({folder!r}, {text!r}, {answers}, {child})
"""


def fake_python(folder, text=r"\boxed{7}", first="", answers=10**9, child=False):
    """Writes the file, which notes in its folder what it is told.

    Args:
        text: of each sample.
        first: code to run before the server starts.
        answers: how many requests the server answers before it ends.
        child: whether it has a child, which ignores SIGTERM.
    """
    path, tests = folder / "python", str(Path(__file__).parent)
    given = {"folder": str(folder), "text": text, "answers": answers, "child": child}
    path.write_text(FILE.format(python=sys.executable, tests=tests, first=first, **given))
    path.chmod(0o755)
    return path


def serve(folder, text, answers, child):
    """Serves with `fake_python`'s arguments."""
    folder, options = Path(folder), dict(zip(sys.argv, [*sys.argv[1:], ""], strict=True))
    stubborn = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    pids = [os.getpid(), *([subprocess.Popen(stubborn).pid] if child else [])]

    def answer(body, number):
        with (folder / "bodies.jsonl").open("a") as file:
            print(json.dumps(body), file=file)
        if number >= answers:
            print("the engine is lost", file=sys.stderr, flush=True)
            os._exit(1)
        return 200, completion(text)

    server = Server(answer, int(options["--port"]))
    (folder / "options.json").write_text(json.dumps(options))
    (folder / "generation.json").write_text(Path(options["--model"], "generation_config.json").read_text())
    (folder / "processes").write_text(" ".join(map(str, pids)))
    server.serve_forever()


def alive(pids):
    """Those of the processes that still run. One that nobody has waited for doesn't."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    texts = {pid: state.read_text() for pid, state in states.items() if state.exists()}
    return [pid for pid, text in texts.items() if text.rpartition(")")[2].split()[0] != "Z"]


def processes_left(folder):
    """The processes of the server that still run."""
    return alive((folder / "processes").read_text().split())
