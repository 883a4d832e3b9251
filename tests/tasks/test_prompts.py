"""Prompt templates of the tasks, and the user's own."""

import pytest

from m1.errors import UserError
from m1.tasks.benchmarks import TASKS
from m1.tasks.prompts import MATH_PROMPT, load_template


def test_prompt_templates(tmp_path):
    assert load_template("chain") == "{problem}" and load_template("aime24") == MATH_PROMPT
    assert r"\boxed{}" in MATH_PROMPT and "{problem}" in MATH_PROMPT
    (tmp_path / "t.txt").write_text("Q: {problem}\nA:")
    assert load_template("chain", f"@{tmp_path / 't.txt'}") == "Q: {problem}\nA:"
    assert load_template("gsm8k", "{problem}!") == "{problem}!"
    for bad, words in [("no place", "has no {problem}"), (f"@{tmp_path / 'u'}", "can't read the prompt template")]:
        with pytest.raises(UserError, match=words):
            load_template("chain", bad)
    (tmp_path / "latin").write_bytes(b"{problem} \xe9")
    with pytest.raises(UserError, match="can't read the prompt template"):
        load_template("chain", f"@{tmp_path / 'latin'}")
    with pytest.raises(UserError, match="unknown task 'math501'; known: chain, "):
        load_template("math501")
    assert all("{problem}" in load_template(task) for task in TASKS)
