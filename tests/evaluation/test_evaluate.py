r"""Whole evaluations: what is written, that a cut-off run goes on as if nothing had happened, and what isn't mixed."""

import hashlib
import json
import sys

import pytest
from openai_server import completion

from m1.errors import UserError
from m1.evaluation import evaluate as module
from m1.evaluation.endpoint import EndpointGenerator
from m1.evaluation.evaluate import Settings, evaluate
from m1.evaluation.generators import EngineGenerator, Sample, TransformersGenerator
from m1.evaluation.metrics import summarize
from m1.evaluation.tasks import Problem
from m1.model.checkpoint import load_tokenizer

PROBLEMS = [Problem(f"p{i}", f"{i}+1", (str(i + 1), f"0{i + 1}")) for i in range(5)]
SETTINGS = Settings("chain", n=3, max_new_tokens=6, temperature=1.0, seed=0, prompt_template="<{problem}>")


class Scripted:
    """Says what `texts(ask, round)` gives, a second each."""

    by_round = True

    def __init__(self, texts=lambda ask, round_: rf"\boxed{{{int(ask.prompt[1]) + round_ % 2}}}", model="m"):
        self.texts, self.model, self.asked = texts, model, []

    def identity(self):
        return {"generator": "scripted", "model": self.model}

    def facts(self):
        return {"fact": 1}

    def generate(self, asks, params):
        self.asked += asks
        jobs = [(ask, round_) for ask in asks for round_ in ask.rounds]
        for seconds, (ask, round_) in enumerate(jobs, start=1):
            yield Sample(ask.problem, round_, self.texts(ask, round_), 4, -1.0, "stop", float(seconds))


@pytest.fixture
def generators(hybrid, hybrid_dir, serve):
    """New generators of every kind, as another process would make them."""
    tokenizer = load_tokenizer(hybrid_dir)
    server = serve(lambda body, number: (200, completion(*[r"\boxed{2}"] * body["n"])))
    return {
        "engine": lambda: EngineGenerator(hybrid, tokenizer, 4),
        "transformers": lambda: TransformersGenerator(hybrid, tokenizer, 4),
        "endpoint": lambda: EndpointGenerator(server.url, "m", concurrency=2),
    }


def rows_of(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def interrupt_after(count):
    def on_progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return on_progress


def test_what_is_written(tmp_path):
    found = evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["pass@1"] == pytest.approx(1 / 3) and found["maj@k"]["3"]["value"] == 0
    assert found["seconds"] == 15 and [p["seconds"] for p in found["accuracy_against_seconds"]] == [5, 10, 15]
    assert found["settings"]["prompt_template"] == "<{problem}>"
    assert found["prompt_template_sha256"] == hashlib.sha256(b"<{problem}>").hexdigest()
    assert (found["generator"], found["model"], found["fact"]) == ("scripted", "m", 1)
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
    evaluate(Scripted(lambda ask, round_: texts[round_ % 2]), PROBLEMS, SETTINGS, tmp_path / "a")
    table = parquet.read_table(tmp_path / "a" / "samples.parquet").to_pylist()
    assert table == rows_of(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "b")
    assert (tmp_path / "b" / "result.json").exists() and not (tmp_path / "b" / "samples.parquet").exists()


@pytest.mark.parametrize("kind", ["engine", "transformers", "endpoint"])
def test_a_run_that_was_interrupted_goes_on(generators, kind, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(generators[kind](), PROBLEMS, SETTINGS, whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(generators[kind](), PROBLEMS, SETTINGS, parts, interrupt_after(7))
    before = (parts / "samples.jsonl").read_text()
    assert len(before.splitlines()) == 7 and not (parts / "result.json").exists()
    with (parts / "samples.jsonl").open("a") as file:
        file.write('{"problem": "p4", "rou')  # killed while writing the eighth
    seen = []
    result = evaluate(generators[kind](), PROBLEMS, SETTINGS, parts, lambda done, total: seen.append((done, total)))
    assert (parts / "samples.jsonl").read_text().startswith(before)
    assert seen == [(done, 15) for done in range(7, 16)]
    keys = [(row["problem"], row["round"]) for row in rows_of(parts)]
    assert sorted(keys) == [(f"p{i}", r) for i in range(5) for r in range(3)]
    assert result["tokens"] == sum(row["tokens"] for row in rows_of(parts))
    if kind == "engine":  # its samples depend on nothing else: they are those of a run in one piece
        texts = [{(row["problem"], row["round"]): row["text"] for row in rows_of(out)} for out in (whole, parts)]
        assert texts[0] == texts[1] and len(set(texts[0].values())) > 5
    again = evaluate(generators[kind](), PROBLEMS, SETTINGS, parts)
    del again["grading"], result["grading"]  # a new session asks the worker for the votes' pairs again
    assert len(rows_of(parts)) == 15 and again == result


def test_seconds_go_on_where_they_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path, interrupt_after(7))
    generator = Scripted()
    found = evaluate(generator, PROBLEMS, SETTINGS, tmp_path)
    assert found["seconds"] == 15
    assert [row["seconds"] for row in rows_of(tmp_path)] == list(range(1, 16))
    assert [(ask.problem, ask.rounds) for ask in generator.asked][:4] == [
        ("p2", (1,)), ("p3", (1,)), ("p4", (1,)), ("p0", (2,)),
    ]  # fmt: skip


def test_asks_have_seeds_of_their_own_and_prompts_of_the_template(tmp_path):
    generator = Scripted()
    evaluate(generator, PROBLEMS, SETTINGS, tmp_path / "a")
    assert len({ask.seed for ask in generator.asked}) == 15
    assert [ask.prompt for ask in generator.asked[:2]] == ["<0+1>", "<1+1>"]
    other = Scripted()
    evaluate(other, PROBLEMS, Settings("chain", 3, 6, 1.0, seed=1, prompt_template="<{problem}>"), tmp_path / "b")
    assert not {ask.seed for ask in generator.asked} & {ask.seed for ask in other.asked}


def test_a_generator_without_rounds_is_asked_once(tmp_path):
    generator = Scripted()
    generator.by_round = False
    found = evaluate(generator, PROBLEMS, SETTINGS, tmp_path)
    assert [ask.rounds for ask in generator.asked] == [(0, 1, 2)] * 5
    assert [point["samples"] for point in found["accuracy_against_seconds"]] == [3]


class Doubting(module.Grader):
    """A grader that gives up on all that isn't spelt the same."""

    def equal(self, gold, answer):
        self.counts["graded"] += gold != answer
        self.counts["timeout"] += gold != answer
        return gold == answer


def test_grading_counts_add_up_over_sessions(tmp_path, monkeypatch):
    """Ten samples of ten spellings, none of them the gold's."""
    monkeypatch.setattr(module, "Grader", Doubting)
    settings = Settings("chain", 2, 6, 1.0, 0, "<{problem}>")
    problems = [Problem(f"p{i}", str(i), (f"y_{i}",)) for i in range(5)]

    def scripted():
        return Scripted(lambda ask, round_: rf"\boxed{{x_{ask.problem}_{round_}}}")

    whole = evaluate(scripted(), problems, settings, tmp_path / "whole")["grading"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(scripted(), problems, settings, tmp_path / "parts", interrupt_after(6))
    assert evaluate(scripted(), problems, settings, tmp_path / "parts")["grading"] == whole
    rows = rows_of(tmp_path / "parts")
    assert sum(row["grading"]["timeout"] for row in rows) == 10
    votes = Doubting()
    summarize(rows, {p.id: p.answers for p in problems}, 2, votes)
    assert whole["timeout"] == 10 + votes.counts["timeout"] > 10


@pytest.mark.parametrize(
    ("generator", "problems", "settings", "words"),
    [
        (Scripted(model="other"), PROBLEMS, SETTINGS, "another model"),
        (Scripted(), PROBLEMS[:4], SETTINGS, "other problems"),
        (Scripted(), [Problem("p0", "0+1", ("2",)), *PROBLEMS[1:]], SETTINGS, "other problems"),
        (Scripted(), PROBLEMS, Settings("chain", 4, 6, 1.0, 0, "<{problem}>"), "n=3"),
        (Scripted(), PROBLEMS, Settings("chain", 3, 6, 0.5, 0, "<{problem}>"), "temperature=1.0"),
        (Scripted(), PROBLEMS, Settings("chain", 3, 6, 1.0, 0, "[{problem}]"), "another prompt template"),
    ],
)
def test_what_is_not_mixed(tmp_path, generator, problems, settings, words):
    evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path)
    before = (tmp_path / "samples.jsonl").read_text()
    with pytest.raises(UserError, match=f"{words}: choose another --out"):
        evaluate(generator, problems, settings, tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == before


def test_a_run_that_made_nothing_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path, interrupt_after(0))
    evaluate(Scripted(), PROBLEMS[:2], Settings("chain", 1, 9, 1.0, 0, "<{problem}>"), tmp_path)
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == len(rows_of(tmp_path)) == 2


def test_an_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to"):
        evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n": 0}, "n=0"), ({"max_new_tokens": 0}, "max_tokens=0"), ({"temperature": -1.0}, "temperature=-1.0")],
)
def test_settings_out_of_range(changes, words):
    values = {"task": "chain", "n": 1, "max_new_tokens": 1, "temperature": 1.0, "seed": 0} | changes
    with pytest.raises(UserError, match=words):
        Settings(**values)


def test_a_second_grader_doubts_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Grader, "grade", lambda self, answer, golds: True)
    result = evaluate(Scripted(), PROBLEMS, SETTINGS, tmp_path)
    assert result["audit"]["agreed"] + len(result["audit"]["disagreements"]) == 15
    wrong = [(row["problem"], row["round"]) for row in rows_of(tmp_path) if row["answer"] not in golds_of(row)]
    assert [(row["problem"], row["round"]) for row in result["audit"]["disagreements"]] == wrong and wrong


def golds_of(row):
    return next(problem.answers for problem in PROBLEMS if problem.id == row["problem"])
