"""Budgets over vLLM's server, with a stand-in for it: what it is told, what becomes of its samples, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import save_checkpoint, tiny_teacher
from fake_vllm import fake_python, processes_left

from m1.engine import LLM, SamplingParams
from m1.errors import UserError
from m1.evaluation import endpoint, vllm_server
from m1.evaluation.solvers import vllm_solver
from m1.grading import Grader
from m1.jsonl import read_jsonl
from m1.model.tokenizer import byte_tokenizer
from m1.peers import vllm_client
from m1.reasoning.budget import Budget
from m1.tasks.prompts import PLAIN, ProblemPrompt

BUDGET = Budget(n=3, rule="none")


@pytest.fixture
def solver(tmp_path, monkeypatch):
    """`solver(...)` starts a stand-in of these arguments."""

    def start(problems=("?",), prompt=PLAIN, params=SamplingParams(max_tokens=9), llm=None, **fake):  # noqa: B008
        monkeypatch.setattr(vllm_client, "PYTHON", fake_python(tmp_path, **fake))
        monkeypatch.setattr(vllm_server, "ENDS_WITHIN", 1.0)
        return vllm_solver(llm or LLM(tiny_teacher(), byte_tokenizer()), problems, prompt, params, 4)

    return start


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def bodies(folder):
    return list(read_jsonl(folder / "bodies.jsonl"))


def test_what_the_server_is_told(solver, grader, tmp_path):
    """A request has no seed and wants no log-probabilities, which would cost vLLM time."""
    params = SamplingParams(max_tokens=9, temperature=0.6, top_p=0.9, min_p=0.1)
    with solver(prompt=ProblemPrompt("Q {problem}", "S"), params=params) as solve:
        assert len(bodies(tmp_path)) == 4  # warm
        solution = solve("?", grader, params, BUDGET, prompt=ProblemPrompt("Q {problem}", "S"))
    assert processes_left(tmp_path) == []
    assert solution.answer == "7" and solution.tokens == 21
    options = json.loads((tmp_path / "options.json").read_text())
    length = len(byte_tokenizer()("<|system|>S<|end|><|user|>Q ?<|end|><|assistant|>").input_ids) + 9
    told = {"--dtype": "float32", "--max-num-seqs": "4", "--max-model-len": str(length), "--host": "127.0.0.1"}
    assert options | told == options and "--enforce-eager" in options and "--enable-prefix-caching" in options
    generation = json.loads((tmp_path / "generation.json").read_text())
    assert generation["eos_token_id"] == [byte_tokenizer().eos_token_id] and "temperature" not in generation
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q ?"}]
    drawn = {"model": "m1", "messages": messages, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.1}
    assert [body["max_tokens"] for body in bodies(tmp_path)] == [2] * 4 + [9] * 3 + [1]
    assert all(body == drawn | {"max_tokens": body["max_tokens"]} for body in bodies(tmp_path))


def test_samples_end_with_the_context(solver, grader, tmp_path):
    """As this project's do: a prompt that leaves too little for max_tokens isn't refused in the middle of a run."""
    params = SamplingParams(max_tokens=600)  # the context is 512 tokens
    with solver(("?", "?" * 100), params=params) as solve, pytest.warns(match="max_tokens is 600"):
        for problem in ("?", "?" * 100):
            solve(problem, grader, params, Budget(n=1), prompt=PLAIN)
    lengths = [body["max_tokens"] for body in bodies(tmp_path)[4:]]
    assert lengths[0] - lengths[2] == 99 and lengths[0] < 512 and lengths[1] == lengths[3] == 1


def test_a_thought_that_the_prompt_opened_has_no_announced_answer(solver, grader):
    tokenizer = byte_tokenizer()
    llm = LLM(tiny_teacher(), tokenizer)

    def answer():
        with solver(llm=llm, text="So the answer is 5. Wait") as solve:
            return solve("?", grader, SamplingParams(max_tokens=9), BUDGET, prompt=PLAIN).answer

    assert answer() == "5"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    assert answer() is None


def test_a_server_that_dies_at_its_start(solver):
    died = r"its server has ended; its last lines:\s+no room\s+for the cache"
    with pytest.raises(UserError, match=died), solver(first="sys.exit('no room\\nfor the cache')"):
        pass


def test_one_that_takes_too_long(solver, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "STARTS_WITHIN", 3.0)
    first = f"open({str(tmp_path / 'processes')!r}, 'w').write(str(os.getpid())); print('loading', flush=True)\n"
    with pytest.raises(UserError, match=r"isn't ready after 3 seconds; its last lines:\s+loading"):
        solver(first=first + "time.sleep(600)").__enter__()
    assert processes_left(tmp_path) == []


def test_one_that_dies_later(solver, grader, tmp_path, monkeypatch):
    """Its missing samples are no result."""
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.01)
    with pytest.raises(UserError, match=r"has ended; its last lines:\s+the engine is lost"), solver(answers=6) as solve:
        solve("?", grader, SamplingParams(max_tokens=9), Budget(seconds=0.5), prompt=PLAIN)
    assert processes_left(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_gone_after_an_error(solver, tmp_path, error):
    with pytest.raises(error), solver(child=True):
        assert len(processes_left(tmp_path)) == 2
        raise error
    assert processes_left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_is_gone_after_a_signal(tmp_path, number):
    """The command line finds the environment of `make peers` below the folder it is started in."""
    save_checkpoint(tiny_teacher(), tmp_path / "model")
    (tmp_path / vllm_client.PYTHON).parent.mkdir(parents=True)
    (tmp_path / vllm_client.PYTHON).symlink_to(fake_python(tmp_path))
    command = [sys.executable, "-m", "m1", "budget", "--model", "a=model", "--vllm", "a", "--seconds", "600"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--out", "o"], cwd=tmp_path, stderr=log, stdout=log, env=environment)
    try:
        wait_for(lambda: (tmp_path / "bodies.jsonl").exists() or process.poll() is not None)
        assert processes_left(tmp_path), (tmp_path / "log").read_text()
    finally:
        process.send_signal(number)
        process.wait()
    wait_for(lambda: not processes_left(tmp_path))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(vllm_client, "PYTHON", Path("/nowhere"))
    with pytest.raises(UserError, match="make peers"):
        vllm_solver(LLM(tiny_teacher(), byte_tokenizer()), ("?",), PLAIN, SamplingParams(), 4).__enter__()
