"""`m1 eval` and `m1 eval compare` through the command line; bad input is a line and exit code 2."""

import json
import sys

import pytest
from openai_server import completion

from m1 import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `m1 eval ...`; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["m1", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "problem": f"{i}+1", "answer": i + 1}) + "\n" for i in range(4)))
    return path


def refused(result, *words):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("m1: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


def test_an_endpoint_and_a_comparison(run, serve, problems, tmp_path):
    def answer(body, number):
        first = int(body["messages"][0]["content"][2])
        return 200, completion(rf"\boxed{{{first + (body['model'] == 'good' or first % 2)}}}")

    server = serve(answer)
    base = ("--endpoint", server.url, "--task", "gsm8k", "--data", problems, "--n", 2, "--prompt-template")
    for model, accuracy in (("good", "100.0"), ("bad", "50.0")):
        code, out, _ = run("--model", model, *base, "Q:{problem}", "--out", tmp_path / model)
        assert code == 0 and f"pass@1 {accuracy} % [" in out and f"maj@2 {accuracy} % [" in out
    result = json.loads((tmp_path / "good" / "result.json").read_text())
    assert (result["model"], result["endpoint"], result["sampler"]) == ("good", server.url, "endpoint")
    code, out, _ = run("compare", tmp_path / "bad", tmp_path / "good")
    comparison = json.loads(out.splitlines()[-1])
    assert code == 0 and comparison["measures"]["pass@1"]["difference"] == 0.5
    assert comparison["measures"]["maj@2"]["b"] == 1
    assert [row["problem"] for row in comparison["most_different"]] == ["p0", "p2"]
    refused(run("compare", tmp_path / "bad", tmp_path), "result.json is missing")


def test_a_task_of_ones_own(run, serve, tmp_path):
    """Its own name and columns, a system prompt from a file, examples, and how tokens are drawn."""
    rows = [{"nr": f"n{i}", "q": f"{i}+1", "gold": i + 1, "answer": "no"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "system").write_text("Be brief.")
    (tmp_path / "shots.jsonl").write_text('{"problem": "7+1", "solution": "It is 8."}')
    server = serve(lambda body, number: (200, completion(rf"\boxed{{{int(body['messages'][-1]['content'][0]) + 1}}}")))
    base = ("--endpoint", server.url, "--model", "m", "--task", "sums", "--data", tmp_path / "data.jsonl", "--n", 1)
    columns = ("--problem-column", "q", "--answer-column", "gold", "--id-column", "nr")
    prompt = ("--system-prompt", f"@{tmp_path / 'system'}", "--few-shot", tmp_path / "shots.jsonl")
    drawn = ("--top-p", 0.9, "--top-k", 20, "--min-p", 0.1, "--prompt-template", "{problem}=?")
    code, out, _ = run(*base, *columns, *prompt, *drawn, "--out", tmp_path / "o")
    assert code == 0 and out.startswith("sums: 4 problems") and "pass@1 100.0" in out
    assert [m["content"] for m in server.bodies[0]["messages"]][:3] == ["Be brief.", "7+1=?", "It is 8."]
    assert {(body["top_p"], body["top_k"], body["min_p"]) for body in server.bodies} == {(0.9, 20, 0.1)}
    settings = json.loads((tmp_path / "o" / "result.json").read_text())["settings"]
    assert (settings["task"], settings["top_p"], settings["system_prompt"]) == ("sums", 0.9, "Be brief.")
    refused(run(*base, *columns[2:], "--out", tmp_path / "p"), "needs a text `problem`")
    refused(run(*base, "--problem-column", "Q", "--out", tmp_path / "p"), "nothing in column 'Q'", "'q'")
    refused(run(*base, *columns, "--top-p", 0, "--out", tmp_path / "p"), "top_p=0.0 is out of range")
    refused(run(*base, *columns, "--system-prompt", "@no", "--out", tmp_path / "p"), "can't read the system prompt no")
    refused(run(*base, *columns, "--few-shot", "no.jsonl", "--out", tmp_path / "p"), "can't read no.jsonl")


@pytest.mark.parametrize("generator", ["engine", "transformers"])
def test_a_checkpoint(run, hybrid_dir, problems, tmp_path, generator):
    base = ("--model", hybrid_dir, "--task", "gsm8k", "--data", problems, "--n", 1, "--max-new-tokens", 4)
    code, out, _ = run(*base, "--sampler", generator, "--out", tmp_path / "o")
    assert code == 0 and "4 problems, 1 samples each" in out
    assert json.loads((tmp_path / "o" / "result.json").read_text())["sampler"] == generator
    assert run("run", *base, "--sampler", generator, "--out", tmp_path / "o")[0] == 0
    other = {"engine": "transformers", "transformers": "engine"}[generator]
    refused(run(*base, "--sampler", other, "--out", tmp_path / "o"), f"sampler={generator}", "another output")


def test_rounded_weights_are_another_generator(run, hybrid_dir, problems, tmp_path):
    base = ("--model", hybrid_dir, "--task", "gsm8k", "--data", problems, "--n", 1, "--max-new-tokens", 4)
    out = ("--out", tmp_path / "o")
    assert run(*base, *out, "--quantize", "int8")[0] == 0
    assert json.loads((tmp_path / "o" / "result.json").read_text())["sampler"] == "engine, int8"
    refused(run(*base, *out), "sampler=engine, int8", "another output")
    refused(run(*base, *out, "--quantize", "int8", "--sampler", "transformers"), "quantize int8: only")


def test_bad_arguments(run, problems, tmp_path):
    base = ("--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--out", tmp_path / "o")
    task = (*base, "--task", "math500")
    refused(run(*base, "--task", "math501"), "unknown task 'math501'")
    refused(run(*task), "needs --data FILE.jsonl", "HuggingFaceH4/MATH-500")
    refused(run(*task, "--data", tmp_path / "no.jsonl"), "can't read", "no.jsonl")
    refused(run(*task, "--data", "no/where"), "can't load the data set no/where")
    refused(run(*task, "--data", problems, "--n", 0), "n=0")
    refused(run(*task, "--data", problems, "--limit", 0), "limit=0")
    refused(run(*task, "--data", problems, "--prompt-template", "x"), "has no {problem}")
    refused(
        run(*task, "--data", problems, "--sampler", "vllm"), "sampler = 'vllm' should be 'engine' or 'transformers'"
    )
    refused(run(*task, "--data", problems, "--sampler", "transformers"), "leave out --sampler")
    refused(
        run(*task, "--data", problems, "--devices", "all"), "leave out --sampler, --dtype, --quantize and --devices"
    )
    refused(run(*task, "--data", problems, "--concurrency", 0), "concurrency=0")
    refused(run(*task, "--data", problems, "--temperature", -1), "temperature=-1")
    refused(run(*task[:2], "--endpoint", "localhost", *task[4:], "--data", problems), "endpoint 'localhost'")
    refused(run(*task, "--data", problems), "can't reach http://127.0.0.1:9/v1/chat/completions")
    empty, latin, torn = (tmp_path / name for name in ("empty.jsonl", "latin.jsonl", "torn.jsonl"))
    empty.write_bytes(b"\n")
    latin.write_bytes(b'{"problem": "\xe9", "answer": 1}\n')
    torn.write_bytes(problems.read_bytes()[:-5])
    refused(run(*task, "--data", empty), "has no problems")
    refused(run(*task, "--data", latin), "line 1: not UTF-8")
    refused(run(*task, "--data", torn), "line 4: not JSON")
    refused(run("compare", tmp_path / "a", tmp_path / "b"), "result.json is missing")


def test_usage(run):
    assert run("--task", "chain")[0] == 2 and run("nothing")[0] == 2
    code, out, _ = run("--help")
    assert code == 0 and "compare" in out and "run" in out
    assert "--endpoint" in run("run", "--help")[1]
