"""Training data: the formats of rows, mixing, the length filter, and the cache."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from commands import m1

from m1.data_options import Data
from m1.errors import UserError
from m1.model.tokenizer import CHAT_TEMPLATE, byte_tokenizer
from m1.recipe import GRPOStage, SFTStage
from m1.train.data import all_conversations, bucketed, conversations, open_source, problems
from m1.train.data_cache import Preparation
from m1.train.data_mask import IGNORED, ChatEncoder
from m1.train.grpo import arguments_of as grpo_arguments
from m1.train.grpo import fitting_problems
from m1.train.sft import arguments_of, new_transformer, training_rows

USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache" / "m1"


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(data, max_length=512, template=None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return Preparation(data, ChatEncoder(tokenizer), max_length).run()


def texts(prepared):
    return [byte_tokenizer().decode(row["input_ids"]) for row in prepared.rows]


def rows_of(*answers):
    return [{"problem": f"{i}", "solution": answer} for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"messages": [USER | {"tool_calls": None}, ASSISTANT], "problem": None}, [USER, ASSISTANT]),
        ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, [USER, ASSISTANT]),
        (
            {"system": "Add.", "conversations": [USER, {"from": "assistant", "value": "2"}]},
            [{"role": "system", "content": "Add."}, USER, ASSISTANT],
        ),
        ({"prompt": "1+1?", "completion": "2"}, [USER, ASSISTANT]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
        ({"problem": "1+1", "solution": "2", "answer": "2"}, [USER, ASSISTANT]),
    ],
)
def test_formats(tmp_path, row, expected):
    data = Data(path=jsonl(tmp_path / "rows.jsonl", row), prompt_template="{problem}?")
    rows, _ = open_source(data, data.path)
    assert [found.messages for found in conversations(data, data.path, rows)] == [expected]


def test_a_prompt_is_not_trained(tmp_path):
    """Not even what the assistant says in it."""
    row = {"prompt": [USER, ASSISTANT, USER], "completion": "two"}
    (row,) = prepare(Data(path=jsonl(tmp_path / "rows.jsonl", row))).rows
    trained = [token for token in row["labels"] if token != IGNORED]
    assert byte_tokenizer().decode(trained) == "two<|end|>"


def test_parquet_and_a_data_sets_folder(tmp_path):
    rows = datasets.Dataset.from_list(rows_of("a", "b"))
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    rows.to_parquet(folder / "train.parquet")
    assert texts(prepare(Data(path=str(folder / "train.parquet")))) == texts(prepare(Data(path=str(folder))))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"can't read .*bad\.parquet"):
        prepare(Data(path=str(tmp_path / "bad.parquet")))


def test_sources_are_mixed_by_weight(tmp_path):
    paths = [jsonl(tmp_path / f"{name}.jsonl", *rows_of(*[name] * 50)) for name in "ab"]
    plain = texts(prepare(Data(path=paths)))
    assert len(plain) == 100 and "a" in "".join(plain[:50]) and "b" in "".join(plain[:50])
    weighted = texts(prepare(Data(path=paths, weights=[3, 1])))
    share = np.mean(["<|assistant|>a" in text for text in weighted])
    assert 0.68 < share < 0.82 and len(set(weighted)) == 100
    assert texts(prepare(Data(path=paths, weights=[3, 1]))) == weighted


def test_a_stream_gives_the_same_rows(tmp_path, caplog):
    path = jsonl(tmp_path / "rows.jsonl", *rows_of("a", "b" * 600, "c"))
    assert sorted(texts(prepare(Data(path=path, streaming=True)))) == texts(prepare(Data(path=path)))
    assert "1 of the rows so far are longer than 512 tokens: 0 cut, 1 dropped" in caplog.text


@pytest.mark.parametrize(("overlong", "rows", "dropped", "cut"), [("drop", 2, 1, 0), ("cut", 3, 0, 1)])
def test_overlong_rows_are_counted(tmp_path, overlong, rows, dropped, cut):
    path = jsonl(tmp_path / "rows.jsonl", *rows_of("a", "b" * 100, "c"))
    prepared = prepare(Data(path=path, overlong=overlong), max_length=50)
    counts = prepared.counts
    assert (counts.rows, counts.dropped, counts.cut, counts.longest) == (rows, dropped, cut, 105)
    assert prepared.lengths.tolist() == [6, 105, 6] and max(map(len, prepared.rows["input_ids"])) <= 50


def test_a_cut_that_leaves_no_answer_drops_the_row(tmp_path):
    rows = [{"problem": "?" * 60, "solution": "a"}, {"problem": "?", "solution": "a"}]
    counts = prepare(Data(path=jsonl(tmp_path / "rows.jsonl", *rows), overlong="cut"), max_length=50).counts
    assert (counts.rows, counts.dropped, counts.cut) == (1, 1, 0)


def test_nothing_left(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", *rows_of("a" * 60, "b" * 70))
    with pytest.raises(UserError, match=r"rows\.jsonl: none of 2 rows is left: .*max_length = 50, up to 75 tokens"):
        prepare(Data(path=path), max_length=50)


def test_the_second_start_reads_the_cache(tmp_path, cache, monkeypatch):
    data = Data(path=jsonl(tmp_path / "rows.jsonl", *rows_of("a", "b")))
    first = texts(prepare(data))
    with monkeypatch.context() as patch:
        patch.setattr(ChatEncoder, "encode", lambda *_: 1 / 0)
        assert texts(prepare(data)) == first
        for other in ({"max_length": 100}, {"template": "{{ messages[-1]['content'] }}"}):
            with pytest.raises(ZeroDivisionError):
                prepare(data, **other)
        jsonl(Path(data.path), *rows_of("a", "c"))
        with pytest.raises(ZeroDivisionError):
            prepare(data)
    assert texts(prepare(data)) != first


def test_ranks_prepare_once(tmp_path, monkeypatch):
    calls, encode = [], ChatEncoder.encode
    monkeypatch.setattr(ChatEncoder, "encode", lambda self, rows: calls.append(rows) or encode(self, rows))
    data = Data(path=jsonl(tmp_path / "rows.jsonl", *rows_of("a", "b")))
    with ThreadPoolExecutor() as ranks:
        found = list(ranks.map(lambda _: texts(prepare(data)), range(4)))
    assert len(calls) == 1 and all(rows == found[0] for rows in found)


def test_a_bad_row_leaves_no_file_behind(tmp_path, cache):
    path = jsonl(tmp_path / "rows.jsonl", *rows_of("a"), {"messages": [USER]})
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: no assistant turn to train on \(roles: user\)"):
        prepare(Data(path=path))
    assert not list(cache.glob("*/rows.arrow"))


def test_a_killed_preparation_is_done_again(tmp_path, cache):
    data = Data(path=jsonl(tmp_path / "rows.jsonl", *rows_of("a", "b")))
    first = texts(prepare(data))
    (counts,) = cache.glob("*/counts.json")
    counts.unlink()
    counts.with_name("rows.arrow").write_bytes(b"half a f")
    assert texts(prepare(data)) == first


def test_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(UserError, match=r"can't write to .*: set HF_DATASETS_CACHE"):
        prepare(Data(path=jsonl(tmp_path / "rows.jsonl", *rows_of("a"))))


def test_bucketed_groups_have_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 1000, 640)
    order = bucketed(lengths, 8, seed=0)
    assert sorted(order) == list(range(640)) and order != sorted(order)
    groups = lengths[order].reshape(-1, 8)
    assert np.ptp(groups, axis=1).mean() < 100 < np.ptp(lengths.reshape(-1, 8), axis=1).mean()


def sft_stage(path, out, trainer=None, chat_template=None, **options):
    init = {"hidden_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    data = Data(path=path, **options)
    return SFTStage(init=init, out=str(out), data=data, trainer=trainer or {}, chat_template=chat_template)


def test_long_answers_keep_their_end(tmp_path, caplog):
    """TRL would cut rows at 1,024 tokens without a word, and the model would never learn to stop."""
    caplog.set_level("INFO")
    stage = sft_stage(jsonl(tmp_path / "rows.jsonl", *rows_of(*["a" * 3000] * 8)), tmp_path / "out")
    arguments = arguments_of(stage)
    model, tokenizer = new_transformer(stage.init)
    for row in training_rows(stage, arguments, tokenizer, model):
        assert len(row["labels"]) > 3000 and row["labels"][-1] == tokenizer.eos_token_id
    assert "8 rows, 24,040 tokens, 99.9% trained; the longest row has 3,005 of at most 4,096 tokens" in caplog.text
    assert "0 rows cut, 0 dropped" in caplog.text
    assert "<|user|>0<|end|><|assistant|>⟦" + "a" * 200 + " [... 2,607 characters ...] " in caplog.text
    assert arguments.max_length is None  # TRL cuts nothing
    assert "doesn't stop generation" not in caplog.text


def test_an_end_token_that_does_not_stop_generation(tmp_path, caplog):
    template = CHAT_TEMPLATE.replace("<|end|>", "<|im_end|>")
    stage = sft_stage(jsonl(tmp_path / "rows.jsonl", *rows_of("a")), tmp_path / "out", chat_template=template)
    model, tokenizer = new_transformer(stage.init)
    training_rows(stage, arguments_of(stage), tokenizer, model)
    assert "answers end with '<|im_end|>', which doesn't stop generation" in caplog.text


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ({"truncation_mode": "keep_end"}, {}, "truncation_mode: M1 prepares the rows itself"),
        ({"max_length": 0}, {}, "max_length = 0 is out of range"),
        ({}, {"streaming": True}, "streaming needs max_steps"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, trainer, options, message):
    with pytest.raises(UserError, match=message):
        arguments_of(sft_stage("rows.jsonl", tmp_path / "out", trainer, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ["a", "b"], "weights": [1]}, "one positive number for each"),
        ({"path": ["a", "b"], "weights": [1, 0]}, "one positive number for each"),
        ({"path": []}, "exactly one of `path`"),
        ({"path": "a", "limit": 0}, "limit=0: need at least 1"),
        ({"path": "a", "skip": -1}, "skip=-1 is out of range: must be 0 to"),
        ({"path": "a", "solution_template": "{answer}"}, "solution_template='{answer}' has no {solution}"),
        ({"path": "a", "streaming": True, "bucket": 8}, "streaming goes neither with"),
    ],
)
def test_data_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        Data(**options)


def test_some_rows_of_each_file_and_their_answers(tmp_path):
    """`skip` and `limit` count from the beginning of each path; the solution's own braces stay as they are."""
    rows = [{"problem": f"p{i}", "solution": f"so {{answer}} {i}", "answer": str(i)} for i in range(4)]
    rows.append({"problem": "p4", "solution": "s", "answer": "{solution}"})
    paths = [jsonl(tmp_path / name, *rows) for name in ("a.jsonl", "b.jsonl")]
    data = Data(path=paths, skip=1, limit=2, solution_template="{solution}\n\\boxed{{answer}}")
    found = [messages[1]["content"] for messages in all_conversations(data)]
    assert found == ["so {answer} 1\n\\boxed{1}", "so {answer} 2\n\\boxed{2}"] * 2
    assert [row["answers"] for row in problems(Data(path=paths[0], skip=3))] == [["3"], ["{solution}"]]
    (messages,) = all_conversations(Data(path=paths[0], skip=4, solution_template="{solution}: {answer}"))
    assert messages[1]["content"] == "s: {solution}"
    with pytest.raises(UserError, match="has no rows after the first 5"):
        all_conversations(Data(path=paths[0], skip=5))
    path = jsonl(tmp_path / "c.jsonl", {"problem": "p", "solution": "s"})
    with pytest.raises(UserError, match=r"a row has no text `answer`: \['problem', 'solution'\]"):
        all_conversations(Data(path=path, solution_template="{solution}{answer}"))


@pytest.mark.parametrize(
    "options",
    [{"skip": 1}, {"limit": 2}, {"solution_template": "{solution}."}, {"prompt_template": "{problem}?"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_rows_prepare_them_again(tmp_path, options):
    path = jsonl(tmp_path / "rows.jsonl", *({"problem": str(i), "solution": str(i)} for i in range(4)))
    plain = sorted(texts(prepare(Data(path=path))))
    assert sorted(texts(prepare(Data(path=path, **options)))) != plain
    assert sorted(texts(prepare(Data(path=path, seed=1)))) == plain


def test_prompts_too_long_for_rl(tmp_path, hybrid_dir, caplog):
    """They are dropped before the first step, not met in mid-run; a length that leaves no room is refused."""
    caplog.set_level("INFO")
    path = jsonl(tmp_path / "rows.jsonl", *({"problem": "x" * n, "answer": "1"} for n in (5, 300)))

    def fitting(max_completion_length):
        trainer = {"max_completion_length": max_completion_length}
        stage = GRPOStage(model=str(hybrid_dir), out=str(tmp_path / "out"), data=Data(path=path), trainer=trainer)
        return fitting_problems(stage, grpo_arguments(stage), byte_tokenizer(), 512)

    assert [row["prompt"][0]["content"] for row in fitting(256)[0]] == ["xxxxx"]
    assert "1 prompts, the longest of 303 tokens; 1 dropped, longer than the 256" in caplog.text
    with pytest.raises(UserError, match=r"no prompt fits: the shortest of 2 has 8 tokens, and max_completion_length ="):
        fitting(512)


def test_rows_in_an_excluded_benchmark(tmp_path, caplog):
    """They are dropped and counted, whatever their format, for RL too."""
    caplog.set_level("INFO")
    benchmark = jsonl(tmp_path / "test.jsonl", {"problem": "What is 1+1?", "answer": "2"})
    rows = [
        {"problem": "what is 1 + 1?", "solution": "2", "answer": "2"},
        {"problem": "What is 1+2?", "solution": "3", "answer": "3"},
    ]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    chats = jsonl(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "What is 1+1?"}, ASSISTANT]})
    excluding = Data(path=path, exclude=[benchmark])
    prepared = prepare(excluding)
    assert prepared.counts.excluded == 1 and ["1+2" in text for text in texts(prepared)] == [True]
    assert prepare(Data(path=path)).counts.rows == 2  # another entry of the cache
    assert [row["answers"] for row in problems(excluding)] == [["3"]]
    assert f"1 of 2 problems dropped: they are in {benchmark}" in caplog.text
    with pytest.raises(UserError, match=r"no row is left: 1 are in .*test.jsonl, and 0 are longer"):
        prepare(Data(path=chats, exclude=[benchmark]))
    jsonl(tmp_path / "test.jsonl", {"problem": "What is 1+2?", "answer": "3"})
    assert ["1+2" in text for text in texts(prepare(excluding))] == [False]  # the benchmark's content counts


@pytest.mark.parametrize("missing", [{"path": "no-such.jsonl"}, {"exclude": ["no-such.jsonl"]}])
def test_missing_files_are_found_before_models_are_loaded(tmp_path, missing):
    data = Data(**{"path": jsonl(tmp_path / "rows.jsonl", *rows_of("a"))} | missing)
    with pytest.raises(UserError, match=r"can't read no-such\.jsonl"):
        SFTStage(model="no-such-folder/at-all", out=str(tmp_path / "out"), data=data).run()


def test_m1_data_show(tmp_path, capsys):
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    jsonl(tmp_path / "rows.jsonl", *rows_of("yes", "no", "a" * 90))
    (tmp_path / "sft.toml").write_text(
        f'stage = "sft"\nout = "{tmp_path}/out"\nchat_template = "@{tmp_path}/template.jinja"\n'
        f'[init]\nhidden_size = 64\n[data]\npath = "{tmp_path}/rows.jsonl"\n[trainer]\nmax_length = 64\n'
    )
    assert m1("data", "show", tmp_path / "sft.toml", "--samples", 2) == 0
    out = capsys.readouterr().out
    assert "2 rows, 49 tokens, 10.2% trained" in out and "has 112 of at most 64 tokens; 0 rows cut, 1 dropped" in out
    assert "[user] 0\n[assistant] ⟦yes⟧" in out and "[user] 1\n[assistant] ⟦no⟧" in out
    assert "2 rows  ████" in out and "1 rows  ██" in out
    assert m1("data", "show", tmp_path / "sft.toml", "--samples", 2**64) == 2
    assert not (tmp_path / "out").exists()
