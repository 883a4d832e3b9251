r"""Problems from files and data sets, whatever their columns are called."""

import json
import os

import pytest

from m1.errors import UserError
from m1.tasks.benchmarks import HUB, Columns, load_task
from m1.tasks.chain import ChainSizes
from m1.tasks.problem import Problem
from m1.tasks.rows import HUB_ID


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path, row, task="math500"):
    (problem,) = load_task(task, write(tmp_path / "rows.jsonl", row))
    return problem


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "a", "problem": "1+1?", "answer": "2"}, Problem("a", "1+1?", ("2",))),
        ({"id": 7, "problem": "1+1?", "answer": 2}, Problem("7", "1+1?", ("2",))),
        ({"problem": "?", "answer": r"\frac12", "answers": [r"\frac12", "0.5"]}, (r"\frac12", "0.5")),
        ({"problem": "?", "answer": 0}, ("0",)),
        ({"problem": "?", "answer": 27.0}, ("27",)),
        ({"problem": "?", "answer": 0.5}, ("0.5",)),
        ({"question": "?", "answer": "He has 5 + 13 = 18.\n#### 1,018"}, ("1018",)),
        ({"question": "?", "final_answer": ["2", "-3"], "solution": ["long"]}, ("2, -3",)),
        ({"problem": "?", "solution": r"So \boxed{1}, no: \boxed{\frac{1}{2}}."}, (r"\frac{1}{2}",)),
        ({"problem": "?", "answer": "3", "solution": r"\boxed{4}"}, ("3",)),
        ({"unique_id": "test/1.json", "problem": "?", "answer": "3"}, Problem("test/1.json", "?", ("3",))),
    ],
)
def test_rows(tmp_path, row, expected):
    found = one(tmp_path, row)
    assert (found if isinstance(expected, Problem) else found.answers) == expected
    assert isinstance(expected, Problem) or found.id == "math500/1"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "?"}, r"row 1: needs a text `problem` and `answer` .*has \['problem'\]"),
        ({"answer": "2"}, r"has \['answer'\]"),
        ({"problem": 3, "answer": "2"}, "needs a text `problem`"),
        ({"problem": "?", "answers": []}, "needs a text"),
        ({"problem": "?", "answer": None}, "needs a text"),
        ({"problem": "?", "answer": {"value": 2}}, "needs a text"),
        ({"problem": "?", "solution": "no box"}, "needs a text"),
        ({"problem": "?", "answer": " "}, "an empty problem or answer"),
        ({"problem": "", "answer": "1"}, "an empty problem"),
        ({"problem": "\ud83d", "answer": "1"}, "lone surrogate"),
    ],
)
def test_bad_rows(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        one(tmp_path, row)


def test_a_task_and_columns_of_ones_own(tmp_path):
    rows = [{"nr": 7, "q": "1+1", "gold": "2", "answer": "no"}, {"nr": 8, "q": "2+2", "gold": 4.0, "answer": "no"}]
    data = write(tmp_path / "rows.jsonl", *rows)
    columns = Columns(problem_column="q", answer_column="gold", id_column="nr")
    found = load_task("my.task-1", data, columns=columns)
    assert found == [Problem("7", "1+1", ("2",)), Problem("8", "2+2", ("4",))]
    assert [p.id for p in load_task("my.task-1", data, columns=Columns(problem_column="q"))] == [
        "my.task-1/1",
        "my.task-1/2",
    ]
    for bad in ({"problem_column": "text"}, {"answer_column": "text"}, {"id_column": "text"}):
        with pytest.raises(UserError, match="row 1: has nothing in column 'text'; its columns are "):
            load_task("math500", data, columns=Columns(**{"problem_column": "q"} | bad))


@pytest.mark.parametrize(("task", "data", "words"), [("math501", None, "known: chain, "), ("a/b", "x", "a name has")])
def test_bad_task_names(task, data, words):
    with pytest.raises(UserError, match=f"task '{task}'.*{words}"):
        load_task(task, data)


def test_limit_and_repeated_ids(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"id": i % 3, "problem": str(i), "answer": i} for i in range(5)))
    assert [p.text for p in load_task("gsm8k", path, limit=3)] == ["0", "1", "2"]
    with pytest.raises(UserError, match="the id '0' is used more than once"):
        load_task("gsm8k", path)
    for limit in (0, -1):
        with pytest.raises(UserError, match=f"limit={limit}"):
            load_task("gsm8k", path, limit=limit)


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    """Folders that `datasets.load_dataset` reads."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "org" / "gsm"
    folder.mkdir(parents=True)
    write(folder / "test.jsonl", *({"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(3)))
    write(folder / "train.jsonl", {"question": "t", "answer": "#### 9"})
    return folder


def test_a_folder_that_load_dataset_reads(data_sets):
    expected = [Problem(f"gsm8k/{i + 1}", f"q{i}", (str(i),)) for i in range(3)]
    assert load_task("gsm8k", data_sets) == expected
    assert load_task("gsm8k", f"{data_sets}:test", limit=2) == expected[:2]
    assert load_task("gsm8k", f"{data_sets}:train") == [Problem("gsm8k/1", "t", ("9",))]
    with pytest.raises(UserError, match=r"can't load the data set .*validation"):
        load_task("gsm8k", f"{data_sets}:validation")


@pytest.mark.parametrize(
    ("data", "called"),
    [
        (None, ("openai/gsm8k", "main", "test")),
        ("org/name", ("org/name", None, "test")),
        ("org/name:train", ("org/name", None, "train")),
        ("org/na.me-1/con_fig:train", ("org/na.me-1", "con_fig", "train")),
        ("org/name@v1.0:train", ("org/name", None, "train", "v1.0")),
    ],
)
def test_hub_ids(monkeypatch, data, called):
    import datasets

    calls = []

    def load_dataset(name, config, split, revision=None):
        calls.append((name, config, split, *([revision] if revision else [])))
        return [{"question": "1+1", "answer": "#### 2"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("gsm8k", data) == [Problem("gsm8k/1", "1+1", ("2",))]
    assert calls == [called]


def test_every_benchmark_has_a_place_on_the_hub():
    assert set(HUB) == {"math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva", "gsm8k"}
    for place in HUB.values():
        assert HUB_ID.fullmatch(place)["split"] in ("test", "train")


def test_the_hub_out_of_reach(monkeypatch):
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(UserError, match=r"task 'math500' needs --data FILE.jsonl: can't load .*HuggingFaceH4/MATH-500"):
        load_task("math500", None)
    with pytest.raises(UserError, match=r"^can't load the data set no/where"):
        load_task("math500", "no/where")


@pytest.mark.parametrize("data", ["no/where.jsonl", "where.jsonl", "/no/where", "a/b/c/d"])
def test_missing_files_are_not_looked_for_on_the_hub(data):
    with pytest.raises(UserError, match=f"can't read {data}"):
        load_task("math500", data)


def test_chain_needs_no_data():
    problems = load_task("chain", None, limit=3, sizes=ChainSizes(min_steps=2, max_steps=2), seed=1)
    assert [p.id for p in problems] == ["chain/0", "chain/1", "chain/2"]
    assert problems != load_task("chain", None, limit=3, sizes=ChainSizes(min_steps=2, max_steps=2), seed=2)


@pytest.mark.skipif("M1_DATA" not in os.environ, reason="M1_DATA names no folder of benchmark files")
@pytest.mark.parametrize(
    ("task", "file", "count"),
    [
        ("math500", "math500", 500), ("aime24", "aime24", 30), ("aime25", "aime25", 30), ("amc23", "amc23", 40),
        ("olympiadbench", "olympiadbench", 675), ("minerva", "minerva", 272), ("gsm8k", "gsm8k_test", 1319),
    ],
)  # fmt: skip
def test_real_benchmarks(task, file, count):
    problems = load_task(task, f"{os.environ['M1_DATA']}/{file}.jsonl")
    assert len(problems) == count and len({p.text for p in problems}) == count
