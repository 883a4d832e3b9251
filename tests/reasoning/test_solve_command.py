"""`m1 solve` through the real command line, with a tiny random model."""

import io
import json
import sys

import pytest
import torch
from checkpoints import save_checkpoint
from rich.console import Console
from test_verifier import tiny_reward_model

from m1 import cli
from m1.cli import render
from m1.engine import LLM, Engine
from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution, VotedSample
from m1.reasoning.voting import Vote
from m1.tasks.prompts import MATH_PROMPT


@pytest.fixture
def run(monkeypatch, capsys, hybrid_dir):
    """Runs `m1 solve 1+1 --model ...`; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        arguments = ["1+1", "--model", hybrid_dir, "--max-new-tokens", 6, *arguments]
        monkeypatch.setattr(sys, "argv", ["m1", "solve", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def answers(monkeypatch):
    """The model's answers: a digit for any text."""
    monkeypatch.setattr("m1.reasoning.solve.extract_answer", lambda text: str(len(text) % 2))


def test_everything_is_written(run, answers, tmp_path):
    save_checkpoint(tiny_reward_model(), tmp_path / "judge")
    path = tmp_path / "new" / "solution.json"
    code, out, _ = run("--n", 5, "--rule", "none", "--weights", tmp_path / "judge", "--json", path)
    assert code == 0 and "5 of 5 samples" in out and "stopped: all" in out
    saved = json.loads(path.read_text())
    assert saved["budget"] == {"n": 5, "seconds": None, "rule": "none"} and saved["problem"] == "1+1"
    assert out.splitlines()[-1] == f"answer: {saved['answer']}" and saved["answer"] == saved["tally"][0]["answer"]
    assert sum(row["votes"] for row in saved["tally"]) == 5 == saved["finished"] == len(saved["samples"])
    weight = sum(sample["weight"] for sample in saved["samples"])
    assert sum(row["weight"] for row in saved["tally"]) == pytest.approx(weight) and 0 < weight < 5
    assert saved["tokens"] == sum(sample["tokens"] for sample in saved["samples"])


def test_the_prompt_asks_for_a_box_unless_told(run, answers, monkeypatch, tmp_path):
    asked, encode = [], LLM.encode
    monkeypatch.setattr(LLM, "encode", lambda llm, prompt: asked.append(prompt[-1]["content"]) or encode(llm, prompt))
    (tmp_path / "template").write_text("Q: {problem}")
    for options in ([], ["--prompt-template", f"@{tmp_path / 'template'}"], ["--prompt-template", "{problem}"]):
        assert run("--n", 1, *options)[0] == 0
    assert asked == [MATH_PROMPT.replace("{problem}", "1+1"), "Q: 1+1", "1+1"]


def test_sampling_prompt_and_versions_are_written(run, answers, tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"problem": "2+2", "answer": 4}')
    options = ["--top-p", 0.9, "--top-k", 20, "--min-p", 0.1, "--system-prompt", "Be brief."]
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    options += [f"--{name.replace('_', '-')}={value}" for name, value in penalties.items()] + ["--min-new-tokens=2"]
    path = tmp_path / "solution.json"
    assert run("--n", 1, *options, "--few-shot", tmp_path / "shots.jsonl", "--json", path)[0] == 0
    saved = json.loads(path.read_text())
    assert [saved["sampling"][name] for name in ("top_p", "top_k", "min_p")] == [0.9, 20, 0.1]
    assert saved["sampling"].items() >= (penalties | {"min_tokens": 2}).items()
    assert saved["system_prompt"] == "Be brief." and len(saved["few_shot"]) == 64
    assert {"m1-reasoning", "math-verify", "torch"} <= set(saved["versions"])


@pytest.mark.parametrize(
    "options", [["--dtype", "float32"], ["--dtype", "bfloat16"], ["--dtype", "auto"], ["--quantize", "int8"]]
)
def test_dtype_and_quantization(run, answers, monkeypatch, tmp_path, options):
    """The checkpoint is in float32."""
    made = []

    class Watched(Engine):
        def __init__(self, model, *arguments, **options):
            super().__init__(model, *arguments, **options)
            made.append((model.dtype, options["quantize"]))

    monkeypatch.setattr("m1.engine.llm.Engine", Watched)
    path = tmp_path / "solution.json"
    assert run("--n", 1, "--json", path, *options)[0] == 0
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    assert made == [(dtype, "int8" if "int8" in options else None)]
    saved = json.loads(path.read_text())
    assert [saved["dtype"], saved["quantize"]] == ([options[1], None] if "--dtype" in options else ["auto", "int8"])


def test_decided_is_the_default_and_16_the_number(run, monkeypatch, tmp_path):
    monkeypatch.setattr("m1.reasoning.solve.extract_answer", lambda text: "7")
    path = tmp_path / "solution.json"
    code, out, _ = run("--json", path, "--max-num-seqs", 1)
    saved = json.loads(path.read_text())
    assert code == 0 and saved["budget"] == {"n": 16, "seconds": None, "rule": "decided"}
    assert "9 of 16 samples finished" in out and "stopped: decided" in out and saved["aborted"] == 7
    assert "stopped: confident" in run("--rule", "confident", "--weights", "logprob", "--max-num-seqs", 1)[1]


def test_seconds_alone_are_enough(run, answers, tmp_path):
    path = tmp_path / "solution.json"
    code, out, _ = run("--seconds", 0.3, "--max-num-seqs", 2, "--json", path)
    saved = json.loads(path.read_text())
    assert code == 0 and "stopped: seconds" in out
    assert saved["budget"]["n"] is None and saved["seconds"] >= 0.3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--n", 0], "n=0: need at least one sample"),
        (["--seconds", -1], "seconds=-1.0"),
        (["--seconds", "nan"], "seconds=nan"),
        (["--rule", "often"], "rule 'often' is unknown: choose none, decided, confident"),
        (["--weights", "./nowhere"], "./nowhere is not a folder"),
        (["--max-num-seqs", 0], "max_num_seqs=0"),
        (["--dtype", "float64"], "dtype = 'float64' should be "),
        (["--quantize", "int3"], "quantize = 'int3' should be "),
        (["--prompt-template", "no place"], "has no {problem} in it"),
        (["--temperature", -1], "temperature=-1.0"),
        (["--top-p", 2], "top_p=2.0"),
        (["--few-shot", "nowhere.jsonl"], "can't read nowhere.jsonl"),
        (["--n", 1, "--json", "/dev/null/solution.json"], "can't write /dev/null/solution.json"),
    ],
)
def test_bad_values_are_one_line(run, arguments, words):
    code, _, err = run(*arguments)
    message = [line for line in err.splitlines() if line.startswith("m1: ")]
    assert code == 2 and "Traceback" not in err
    assert len(message) == 1 and words in message[0]


VOTE = Vote({"[b]7": 3, "8": 1}, {"[b]7": 2.25, "8": 1.0}, abstained=1)
SAMPLES = [VotedSample("", answer, 5, 0.0, "stop", 1.0) for answer in ["[b]7", "[b]7", "8", None, "[b]7"]]


def test_live_view_on_a_terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(render, "console", console)
    budget = Budget(n=8, seconds=10.0)
    with render.watch_vote(budget) as on_step:
        for seconds in (1.0, 1.05, 2.0):
            on_step(Solution(VOTE, SAMPLES, [], seconds))
    drawn = console.file.getvalue()
    # 1.05 comes too soon behind 1.0 to be drawn
    assert "9.0 s left" in drawn and "8.0 s left" in drawn and "8.9 s left" not in drawn and "9.0 s left" in drawn
    assert "5 of 8 samples" in drawn and "tokens/s" in drawn and "[b]7" in drawn
    monkeypatch.setattr(render, "console", Console(file=io.StringIO(), force_terminal=False))
    with render.watch_vote(budget) as on_step:
        on_step(Solution(VOTE, SAMPLES, [], 1.0))


def test_a_terminal_sees_the_vote_and_then_the_final_lines(run, answers, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(render, "console", console)
    assert run("--n", 3, "--rule", "none")[0] == 0
    shown = console.file.getvalue()
    assert "3 samples, " in shown and "tokens/s" in shown  # of the live view
    assert shown.index("tokens/s") < shown.index("3 of 3 samples finished") < shown.index("answer: ")


def test_bars_are_as_long_as_the_weights():
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render.vote_picture(Solution(VOTE, SAMPLES, [], 1.0), Budget(seconds=3.0)))
    status, first, second = console.file.getvalue().splitlines()
    assert status.strip() == "5 samples, 0 tokens, 0 tokens/s, 2.0 s left"
    assert (first.count("━"), second.count("━")) == (27, 12)  # 2.25 and 1 of 3.25, of 40, rounded down


def test_final_lines(capsys):
    render.solution(Solution(VOTE, SAMPLES, [], 1.5, "seconds"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["   3     2.250  [b]7", "   1  8", "   1  (no answer)"]
    assert lines[3].endswith("1.50 s, stopped: seconds") and lines[4] == "answer: [b]7"
