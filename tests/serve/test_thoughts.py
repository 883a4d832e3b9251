"""Texts are split at their think tags, however they arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.serve.thoughts import CLOSE, OPEN, Thoughts

PIECES = st.lists(st.sampled_from([OPEN, CLOSE, "<", "</think", "<thi", "a", " ", "\n", "nk>"]), max_size=8)


@pytest.mark.parametrize(
    ("opened", "text", "thought", "reply"),
    [
        (False, "4", "", "4"),
        (False, "<think>2+2</think>\n4", "2+2", "\n4"),
        (False, "\n<think>2+2", "2+2", ""),
        (True, "2+2</think>4", "2+2", "4"),
        (True, "2+2", "2+2", ""),
        (False, "4 <think>no</think>", "", "4 <think>no</think>"),
        (True, "a</think>b</think>c", "a", "b</think>c"),
        (False, "<thin", "", "<thin"),
    ],
)
def test_split(opened, text, thought, reply):
    assert Thoughts(opened).split(text, done=True) == (thought, reply)


@given(st.booleans(), PIECES)
def test_parts_only_grow_and_end_as_the_whole(opened, pieces):
    text, growing, before = "".join(pieces), Thoughts(opened), ("", "")
    for end in range(len(text) + 1):
        now = growing.split(text[:end], done=False)
        assert all(new.startswith(old) for new, old in zip(now, before, strict=True))
        before = now
    last = growing.split(text, done=True)
    assert all(new.startswith(old) for new, old in zip(last, before, strict=True))
    assert last == Thoughts(opened).split(text, done=True)
    assert sum(map(len, last)) >= len(text.lstrip()) - len(OPEN) - len(CLOSE)  # nothing but the tags is lost
