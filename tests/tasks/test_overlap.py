"""Training problems that are in a benchmark are found, whatever the spelling."""

import json
import os
from pathlib import Path

import pytest

from m1.jsonl import read_jsonl
from m1.tasks.overlap import NGRAM, Overlap

DATA = Path(os.environ.get("M1_DATA", "no-such-folder"))
WORDS = [f"word{'abcdefghijklmn'[i]}" for i in range(NGRAM + 1)]


def test_words_in_a_row():
    overlaps = Overlap(["Find $x$: " + " ".join(WORDS)])
    assert overlaps("Consider " + ",\n".join(WORDS[:NGRAM]).upper() + "!")
    assert not overlaps(" ".join(WORDS[: NGRAM - 1]))
    assert not overlaps(" ".join([*WORDS[:6], "and", *WORDS[6:]]))


def test_short_texts_overlap_if_they_are_equal():
    overlaps = Overlap(["What is $1+1$?"])
    assert overlaps("what is 1 + 1") and not overlaps("What is 1+1+1?") and not overlaps("What is 1?")


def test_nothing_overlaps_with_no_problems():
    assert not Overlap([])("") and not Overlap([])("What is 1+1?")


@pytest.mark.skipif(not DATA.exists(), reason="no benchmark files: set M1_DATA to their folder")
def test_known_overlaps_of_real_data():
    """Pairs found by another method: all training rows that are still there, and few others of GSM8K."""
    pairs = [row for row in read_jsonl(DATA / "train_bench_overlap.jsonl") if row["kept"]]
    text_of = {row["id"]: row["problem"] for row in read_jsonl(DATA / "math_train.jsonl")}
    overlaps = Overlap.of([str(DATA / "olympiadbench.jsonl"), str(DATA / "math500.jsonl")])
    assert len(pairs) == 7 and all(overlaps(text_of[pair["train_id"]]) for pair in pairs)
    gsm8k = Overlap.of([str(DATA / "gsm8k_test.jsonl")])
    assert sum(gsm8k(row["problem"]) for row in read_jsonl(DATA / "gsm8k_train.jsonl")) == 4


def test_benchmarks_from_files(tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "What is 7 times 6?", "answer": "42"}) + "\n")
    assert Overlap.of([str(tmp_path / "own.jsonl")])("what is 7 times 6")
