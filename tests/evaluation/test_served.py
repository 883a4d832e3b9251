"""Votes and budgets over samples of servers."""

import json
import threading
import time

import pytest
from commands import check, m1
from openai_server import completion

from m1.engine import SamplingParams
from m1.errors import UserError
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.solvers import solve_served
from m1.grading import Grader
from m1.reasoning.budget import Budget
from m1.tasks.prompts import MATH

PARAMS = SamplingParams(max_tokens=20, seed=5)


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        grader.start()
        yield grader


def says(*answers, logprobs=(-0.5,)):
    """A server's answers in turn."""
    return lambda body, number: (200, completion(rf"\boxed{{{answers[number % len(answers)]}}}", logprobs=logprobs))


def solve(grader, servers, budget, *arguments, concurrency=1):
    sampler = EndpointSampler([server.url for server in servers], "m", concurrency=concurrency, wait=0.01)
    return solve_served("2+2", sampler, grader, PARAMS, budget, *arguments)


def test_a_decided_vote_ends_the_other_samples(serve, grader):
    """5 of 8 agree after five samples; the three that hang are never waited for."""
    left = threading.Event()

    def answer(body, number):
        if number >= 5:
            left.wait(20)
        return 200, completion(r"\boxed{4}", logprobs=[-0.5, -0.1])

    began = time.monotonic()
    solution = solve(grader, [serve(answer)], Budget(n=8), concurrency=8)
    spent = time.monotonic() - began
    left.set()
    assert solution.answer == "4" and solution.reason == "decided" and spent < 10
    assert len(solution.samples) == 5 and solution.aborted == 3 and solution.tokens == 10


def test_all_samples_and_their_prompt(serve, grader):
    server = serve(says(4, 4, 5))
    solution = solve(grader, [server], Budget(n=6, rule="none"))
    assert solution.reason == "all" and solution.vote.counts == {"4": 4, "5": 2} and solution.aborted == 0
    assert server.bodies[0]["messages"] == MATH.messages("2+2")
    assert len({body["seed"] for body in server.bodies}) == 6


def test_seconds_end_it_while_a_server_hangs(serve, grader):
    hang = threading.Event()

    def answer(body, number):
        if number:
            hang.wait(20)
        return says(4)(body, number)

    solution = solve(grader, [serve(answer)], Budget(seconds=3))
    hang.set()
    assert solution.reason == "seconds" and 3 <= solution.seconds < 10 and solution.answer == "4"


def test_weights_are_mean_log_probabilities(serve, grader):
    answer = lambda body, number: says(4, 5, 5, logprobs=[-0.1] if number == 0 else [-3.0])(body, number)  # noqa: E731
    solution = solve(grader, [serve(answer)], Budget(n=3, rule="none"), "logprob")
    assert solution.answer == "4" and solution.vote.counts["5"] == 2
    with pytest.raises(UserError, match="gives no log-probabilities"):
        solve(grader, [serve(says(4, logprobs=None))], Budget(n=1), "logprob")


def test_penalties_are_asked_for_if_they_are_on(serve, grader):
    server = serve(says(4))
    sampler = EndpointSampler(server.url, "m", concurrency=1)
    solve_served("2+2", sampler, grader, SamplingParams(repetition_penalty=1.5), Budget(n=1))
    assert server.bodies[0]["repetition_penalty"] == 1.5 and "min_tokens" not in server.bodies[0]


def test_as_many_samples_as_fit(serve, grader):
    def answer(body, number):
        time.sleep(0.02)
        return says(4)(body, number)

    sampler = EndpointSampler([serve(answer).url, serve(answer).url], "m", concurrency=2)
    solution = solve_served("2+2", sampler, grader, PARAMS, Budget(seconds=2.0, rule="none"))
    assert 2 <= solution.seconds < 6 and len(solution.samples) >= 4 and solution.vote.counts.keys() == {"4"}
    assert all(sample.seconds <= solution.seconds and sample.tokens == 1 for sample in solution.samples)


def test_the_command_line(serve, tmp_path, capsys):
    servers = [serve(says(4)), serve(says(4))]
    endpoints = [part for server in servers for part in ("--endpoint", server.url)]
    assert m1("solve", "2+2", "--model", "m", *endpoints, "--n", 4, "--json", tmp_path / "s.json") == 0
    assert json.loads((tmp_path / "s.json").read_text())["answer"] == "4"
    assert "answer: 4" in capsys.readouterr().out
    (tmp_path / "p.jsonl").write_text('{"problem": "2+2", "answer": 4}\n{"problem": "2+3", "answer": 5}\n')
    budget = ["budget", "--model", "a=m", *endpoints, "--task", "sums", "--data", tmp_path / "p.jsonl"]
    budget += ["--seconds", 2, "--seeds", 1, "--max-num-seqs", 2, "--out", tmp_path / "b"]
    assert m1(*budget) == 0
    points = json.loads((tmp_path / "b" / "budget.json").read_text())["models"]["a"]["points"]
    assert points[-1]["accuracy"] == 0.5
    capsys.readouterr()
    for command in (["solve", "2+2", "--model", "m", *endpoints, "--n", 4], [*budget[:-1], tmp_path / "c"]):
        check((m1(*command, "--quantize", "int8"), capsys.readouterr().err), "leave out")


def test_a_file_of_prompts(serve, tmp_path, capsys):
    """Each sample once, in requests for several; what is done isn't asked for again."""
    server = serve(lambda body, number: (200, completion(*"abc"[: body.get("n", 1)], logprobs=[-0.5])))
    rows = [{"id": "x", "problem": "2+2"}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["generate", "--model", "m", "--endpoint", server.url, "--prompts", tmp_path / "p.jsonl", "--n", 3]
    command += ["--stop", "END", "--out", tmp_path / "o.jsonl"]
    assert m1(*command) == 0
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert sorted((row["id"], row["sample"], row["text"]) for row in found) == [
        (name, i, "abc"[i]) for name in "1x" for i in range(3)
    ]
    assert [body["n"] for body in server.bodies] == [3, 3] and server.bodies[0]["stop"] == ["END"]
    assert m1(*command) == 0 and len(server.bodies) == 2
    (tmp_path / "q.jsonl").write_text('{"prompt": "2+2="}')
    capsys.readouterr()
    plain = [*command[:6], tmp_path / "q.jsonl", "--out", tmp_path / "q"]
    check((m1(*plain), capsys.readouterr().err), "asked for chats")
