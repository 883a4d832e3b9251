"""`m1 serve` as a process: it announces its address, answers, keeps its key secret, and drains after SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from commands import check, m1

from m1.engine import SamplingParams
from m1.grading import Grader
from m1.reasoning.budget import Budget
from m1.reasoning.solve import solve
from m1.tasks.prompts import MATH

SECRET = "sk-a-long-secret-of-the-tests"
HEADERS = {"Authorization": f"Bearer {SECRET}"}
MAIN = "from m1.cli import main; main()"


@pytest.fixture
def process(hybrid_dir):
    """The server, its address, and all that it has printed."""
    command = [sys.executable, "-c", MAIN, "serve", str(hybrid_dir), "--port", "0", "--served-model-name", "small"]
    command += ["--max-num-seqs", "8"]
    made = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"M1_API_KEY": SECRET}
    )
    printed = []
    for line in made.stderr:
        printed.append(line)
        if found := re.search(r"http://[\d.:]+", line):
            break
    reader = threading.Thread(target=lambda: printed.extend(made.stderr))
    reader.start()
    yield made, found[0], printed
    made.kill()
    reader.join()


def ask(url, **body):
    body = {"model": "small", "messages": [{"role": "user", "content": "7+5"}]} | body
    for _ in range(100):
        try:
            return httpx2.post(f"{url}/v1/chat/completions", headers=HEADERS, json=body, timeout=60)
        except httpx2.ConnectError:
            time.sleep(0.05)
    raise AssertionError("the server doesn't answer")


@pytest.mark.long
def test_a_server_drains_after_sigterm(process):
    server, url, printed = process
    assert ask(url, max_tokens=2).status_code == 200
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(url, max_tokens=450, ignore_eos=True)))
    asking.start()
    while 'running{model_name="small"} 1' not in httpx2.get(f"{url}/metrics", headers=HEADERS).text:
        time.sleep(0.02)
    server.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 450
    assert server.wait(30) in (0, -signal.SIGTERM)
    assert SECRET not in "".join(printed) and "Traceback" not in "".join(printed)


def test_a_vote_equals_solve(apart, server):
    """The same seeds give the same samples, whichever slots they get."""
    params = SamplingParams(max_tokens=30, seed=4, temperature=1.0)
    with Grader() as grader:
        expected = solve("7+5", apart, grader, params, Budget(12, rule="none"))
    body = {"messages": MATH.messages("7+5"), "max_tokens": 30, "seed": 4, "vote": {"n": 12, "rule": "none"}}
    headers = {"Authorization": "Bearer sk-of-the-tests"}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", headers=headers, json=body, timeout=60).json()
    known = expected.as_json()
    assert {name: answer["vote"][name] for name in ("answer", "tally", "abstained", "tokens", "finished")} == {
        name: known[name] for name in ("answer", "tally", "abstained", "tokens", "finished")
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "give --api-key"),
        (["--port", "70000"], "0 to 65535"),
        (["--timeout", "nan"], "timeout=nan"),
        (["--max-num-seqs", "0"], "at least 1"),
        (["--served-model-name", "a", "--served-model-name", "b"], "give each a different name"),
        (["--host", "no.such.host.invalid", "--no-key"], "can't listen"),
    ],
)
def test_bad_options_are_refused(hybrid_dir, options, words, capsys):
    check((m1("serve", hybrid_dir, *options), capsys.readouterr().err), words)


def test_the_specification_is_json(server):
    headers = {"Authorization": "Bearer sk-of-the-tests"}
    paths = json.loads(httpx2.get(f"{server.url}/openapi.json", headers=headers).text)["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health"} <= paths.keys()
