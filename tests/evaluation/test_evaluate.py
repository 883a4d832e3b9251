r"""Whole evaluations: what is written, that a cut-off run goes on as if nothing had happened, and what isn't mixed."""

import hashlib
import json
import re
import sys

import pytest
from openai_server import completion

from m1.engine import fold_in
from m1.errors import UserError
from m1.evaluation import evaluate as module
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.evaluate import evaluate
from m1.evaluation.metrics import metrics_of
from m1.evaluation.samplers import EngineSampler, Sample, TransformersSampler
from m1.model.checkpoint import load_tokenizer
from m1.recipe import EvalSettings
from m1.tasks.problem import Problem

PROBLEMS = [Problem(f"p{i}", f"{i}+1", (str(i + 1), f"0{i + 1}")) for i in range(5)]


def settings_of(**changes):
    return EvalSettings(**{"n": 3, "max_new_tokens": 6, "temperature": 1.0, "prompt_template": "<{problem}>"} | changes)


SETTINGS = settings_of()


def question(request):
    return request.messages[-1]["content"]


class Scripted:
    """Says what `texts(request, round)` gives, a second each."""

    def __init__(self, texts=lambda request, round_: rf"\boxed{{{int(question(request)[1]) + round_ % 2}}}", model="m"):
        self.texts, self.model, self.asked = texts, model, []

    def identity(self):
        return {"sampler": "scripted", "model": self.model}

    def facts(self):
        return {"fact": 1}

    def generate(self, requests, params):
        self.asked += requests
        jobs = [(request, round_) for request in requests for round_ in request.rounds]
        for seconds, (request, round_) in enumerate(jobs, start=1):
            yield Sample(request.problem, round_, self.texts(request, round_), 4, -1.0, "stop", float(seconds))


@pytest.fixture
def samplers(hybrid, hybrid_dir, serve):
    """New samplers of every kind, as another process would make them."""
    tokenizer = load_tokenizer(hybrid_dir)
    server = serve(lambda body, number: (200, completion(rf"\boxed{{{body['seed']}}}")))
    return {
        "engine": lambda: EngineSampler(hybrid, tokenizer, 4),
        "transformers": lambda: TransformersSampler(hybrid, tokenizer, 4),
        "endpoint": lambda: EndpointSampler(server.url, "m", concurrency=2),
    }


def rows_of(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def interrupt_after(count):
    def on_progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return on_progress


def test_what_is_written(tmp_path):
    found = evaluate(Scripted(), PROBLEMS, settings_of(by_round=True), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["pass@1"] == pytest.approx(1 / 3) and found["maj@k"]["3"]["value"] == 0
    assert found["seconds"] == 15 and [p["seconds"] for p in found["accuracy_against_seconds"]] == [5, 10, 15]
    assert found["settings"]["prompt_template"] == "<{problem}>"
    assert found["prompt_template_sha256"] == hashlib.sha256(b"<{problem}>").hexdigest()
    assert (found["sampler"], found["model"], found["fact"]) == ("scripted", "m", 1)
    assert {"m1-reasoning", "math-verify", "torch", "transformers"} <= set(found["versions"])
    assert set(found["grading"]) >= {"graded", "timeout", "crash"}
    first = rows_of(tmp_path)[0]
    grading = first.pop("grading")
    assert first == {
        "problem": "p0", "round": 0, "text": r"\boxed{0}", "tokens": 4, "logprob": -1.0, "finish_reason": "stop",
        "seconds": 1.0, "answer": "0", "correct": False,
    }  # fmt: skip
    assert set(grading) == set(found["grading"])
    problems = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert problems[0] == {"id": "p0", "text": "0+1", "answers": ["1", "01"]} and len(problems) == 5


def test_samples_as_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["no answer", r"\boxed{1}"]
    evaluate(Scripted(lambda request, round_: texts[round_ % 2]), PROBLEMS, SETTINGS, tmp_path / "a")
    table = parquet.read_table(tmp_path / "a" / "samples.parquet").to_pylist()
    assert table == rows_of(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "b")
    assert (tmp_path / "b" / "result.json").exists() and not (tmp_path / "b" / "samples.parquet").exists()


@pytest.mark.parametrize("by_round", [False, True])
@pytest.mark.parametrize("kind", ["engine", "transformers", "endpoint"])
def test_a_run_that_was_interrupted_goes_on(samplers, kind, by_round, tmp_path):
    whole, parts, settings = tmp_path / "whole", tmp_path / "parts", settings_of(by_round=by_round)
    evaluate(samplers[kind](), PROBLEMS, SETTINGS, whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(samplers[kind](), PROBLEMS, settings, parts, interrupt_after(7))
    before = (parts / "samples.jsonl").read_text()
    assert len(before.splitlines()) == 7 and not (parts / "result.json").exists()
    with (parts / "samples.jsonl").open("a") as file:
        file.write('{"problem": "p4", "rou')  # killed while writing the eighth
    seen = []
    result = evaluate(samplers[kind](), PROBLEMS, settings, parts, lambda done, total: seen.append((done, total)))
    assert (parts / "samples.jsonl").read_text().startswith(before)
    assert seen == [(done, 15) for done in range(7, 16)]
    keys = [(row["problem"], row["round"]) for row in rows_of(parts)]
    assert sorted(keys) == [(f"p{i}", r) for i in range(5) for r in range(3)]
    assert result["tokens"] == sum(row["tokens"] for row in rows_of(parts))
    if kind != "transformers":  # a sample depends on its seed alone: they are those of a run in one piece
        texts = [{(row["problem"], row["round"]): row["text"] for row in rows_of(out)} for out in (whole, parts)]
        assert texts[0] == texts[1] and len(set(texts[0].values())) > 5
    again = evaluate(samplers[kind](), PROBLEMS, settings, parts)
    del again["grading"], result["grading"]  # a new session requests the worker for the votes' pairs again
    assert len(rows_of(parts)) == 15 and again == result


def test_seconds_go_on_where_they_stopped(tmp_path):
    settings = settings_of(by_round=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(), PROBLEMS, settings, tmp_path, interrupt_after(7))
    sampler = Scripted()
    found = evaluate(sampler, PROBLEMS, settings, tmp_path)
    assert found["seconds"] == 15
    assert [row["seconds"] for row in rows_of(tmp_path)] == list(range(1, 16))
    assert [(request.problem, request.rounds) for request in sampler.asked][:4] == [
        ("p2", (1,)), ("p3", (1,)), ("p4", (1,)), ("p0", (2,)),
    ]  # fmt: skip


def seeds_of(settings, out, resumed_after=None):
    """(problem, round) -> the seed that the engine draws it with."""
    sampler = Scripted()
    if resumed_after is not None:
        with pytest.raises(KeyboardInterrupt):
            evaluate(Scripted(), PROBLEMS, settings, out, interrupt_after(resumed_after))
    evaluate(sampler, PROBLEMS, settings, out)
    return {(request.problem, r): fold_in(request.seed, r) for request in sampler.asked for r in request.rounds}


@pytest.mark.parametrize("by_round", [False, True])
def test_a_sample_has_a_seed_of_its_own(tmp_path, by_round):
    """It depends on seed, problem and round, not on what is asked for together or was there before."""
    seeds = seeds_of(SETTINGS, tmp_path / "whole")
    assert len(seeds) == len(set(seeds.values())) == 15
    assert seeds["p3", 2] == fold_in(fold_in(0, 3), 2)
    resumed = seeds_of(settings_of(by_round=by_round), tmp_path / "resumed", resumed_after=7)
    assert len(resumed) == 8 and resumed.items() <= seeds.items()
    assert not set(seeds_of(settings_of(seed=1), tmp_path / "other").values()) & set(seeds.values())


def test_all_samples_are_asked_for_at_once_unless_by_round(tmp_path):
    sampler = Scripted()
    found = evaluate(sampler, PROBLEMS, SETTINGS, tmp_path / "at once")
    assert [request.rounds for request in sampler.asked] == [(0, 1, 2)] * 5
    assert [point["samples"] for point in found["accuracy_against_seconds"]] == [3]
    by_round = Scripted()
    evaluate(by_round, PROBLEMS, settings_of(by_round=True), tmp_path / "by round")
    assert [request.rounds for request in by_round.asked] == [(r,) for r in range(3) for _ in range(5)]


def test_the_prompt_of_a_request(tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"problem": "9+9", "answer": 18}')
    sampler, settings = Scripted(), settings_of(system_prompt="Be brief.", few_shot=str(tmp_path / "shots.jsonl"))
    found = evaluate(sampler, PROBLEMS, settings, tmp_path / "out")
    assert [m["content"] for m in sampler.asked[1].messages] == ["Be brief.", "<9+9>", "18", "<1+1>"]
    assert found["settings"]["system_prompt"] == "Be brief." and len(found["settings"]["few_shot"]) == 64


class Doubting(module.Grader):
    """A grader that gives up on all answers that need a worker. It asks again in another session."""

    def _ask_worker(self, answer, within):
        self.counts["graded"] += 1
        self.counts["timeout"] += 1
        return None


def test_grading_counts_add_up_over_sessions(tmp_path, monkeypatch):
    """Ten samples of ten spellings, none of them the gold's."""
    monkeypatch.setattr(module, "Grader", Doubting)
    settings = settings_of(n=2)
    problems = [Problem(f"p{i}", str(i), (f"{i}",)) for i in range(5)]

    def scripted():
        return Scripted(lambda request, round_: rf"\boxed{{x_{request.problem}_{round_}}}")

    whole = evaluate(scripted(), problems, settings, tmp_path / "whole")["grading"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(scripted(), problems, settings, tmp_path / "parts", interrupt_after(6))
    assert evaluate(scripted(), problems, settings, tmp_path / "parts")["grading"] == whole
    rows = rows_of(tmp_path / "parts")
    assert sum(row["grading"]["timeout"] for row in rows) == 10
    votes = Doubting()
    metrics_of(rows, [p.id for p in problems], 2, votes, by_round=False)
    assert whole["timeout"] == 10 + votes.counts["timeout"] > 10


@pytest.mark.parametrize(
    ("sampler", "problems", "settings", "words"),
    [
        (Scripted(model="other"), PROBLEMS, SETTINGS, "model=m, now other"),
        (Scripted(), PROBLEMS[:4], SETTINGS, "problems: not the same"),
        (Scripted(), [Problem("p0", "0+1", ("2",)), *PROBLEMS[1:]], SETTINGS, "problems: not the same"),
        (Scripted(), PROBLEMS, settings_of(n=4), "n=3, now 4"),
        (Scripted(), PROBLEMS, settings_of(temperature=0.5), "temperature=1.0, now 0.5"),
        (Scripted(), PROBLEMS, settings_of(prompt_template="[{problem}]"), "prompt_template=<{problem}>"),
        (Scripted(), PROBLEMS, settings_of(system_prompt="Be brief."), "system_prompt=None, now Be brief."),
        (Scripted(), PROBLEMS, settings_of(top_p=0.9), "top_p=1.0, now 0.9"),
        (Scripted(), PROBLEMS, settings_of(by_round=True), "by_round=False, now True"),
    ],
)
def test_what_is_not_mixed(tmp_path, sampler, problems, settings, words):
    evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path)
    before = (tmp_path / "samples.jsonl").read_text()
    with pytest.raises(UserError, match=f"{re.escape(words)}.*choose another output"):
        evaluate(sampler, problems, settings, tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == before


def test_a_run_that_made_nothing_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path, interrupt_after(0))
    evaluate(Scripted(), PROBLEMS[:2], settings_of(n=1, max_new_tokens=9), tmp_path)
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == len(rows_of(tmp_path)) == 2


def test_an_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and isn't `m1 eval` output"):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "file")
    with pytest.raises(UserError, match="can't write to"):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "n=0"), ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"), ({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
    ],
)  # fmt: skip
def test_settings_out_of_range(changes, words):
    with pytest.raises(UserError, match=words):
        settings_of(**changes)


def test_a_second_grader_doubts_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Grader, "grade", lambda self, answer, golds: True)
    result = evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path)
    assert result["audit"]["agreed"] + len(result["audit"]["disagreements"]) == 15
    wrong = [(row["problem"], row["round"]) for row in rows_of(tmp_path) if row["answer"] not in golds_of(row)]
    assert [(row["problem"], row["round"]) for row in result["audit"]["disagreements"]] == wrong and wrong


def golds_of(row):
    return next(problem.answers for problem in PROBLEMS if problem.id == row["problem"])
