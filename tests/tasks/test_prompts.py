"""Chat messages of a problem: templates of the tasks, and the user's own template, system prompt and examples."""

import json

import pytest

from m1.errors import UserError
from m1.recipe import EvalSettings
from m1.tasks.benchmarks import TASKS
from m1.tasks.prompts import MATH_PROMPT, ProblemPrompt, read_template, task_template


def test_prompt_templates(tmp_path):
    assert task_template("chain") == "{problem}" and task_template("aime24") == task_template("my-own") == MATH_PROMPT
    assert r"\boxed{}" in MATH_PROMPT and all("{problem}" in task_template(task) for task in TASKS)
    (tmp_path / "t.txt").write_text("Q: {problem}\nA:")
    assert read_template(f"@{tmp_path / 't.txt'}") == "Q: {problem}\nA:"
    assert read_template("{problem}!") == "{problem}!"
    for bad, words in [("no place", "has no {problem}"), (f"@{tmp_path / 'u'}", "can't read the prompt template")]:
        with pytest.raises(UserError, match=words):
            read_template(bad)
    (tmp_path / "latin").write_bytes(b"{problem} \xe9")
    with pytest.raises(UserError, match="can't read the prompt template"):
        read_template(f"@{tmp_path / 'latin'}")


def test_a_system_prompt_and_examples_come_first(tmp_path):
    rows = [{"problem": "1+1", "solution": "It is 2.", "answer": "2"}, {"question": "2+2", "answer": 4}]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "system").write_text("Be brief.")
    settings = EvalSettings(
        prompt_template="Q: {problem}", system_prompt=f"@{tmp_path / 'system'}", few_shot=str(tmp_path / "shots.jsonl")
    )
    prompt = settings.task_prompt()
    assert [(m["role"], m["content"]) for m in prompt.messages("3+3")] == [
        ("system", "Be brief."),
        ("user", "Q: 1+1"), ("assistant", "It is 2."),
        ("user", "Q: 2+2"), ("assistant", "4"),
        ("user", "Q: 3+3"),
    ]  # fmt: skip
    assert ProblemPrompt("{problem}").messages("x") == [{"role": "user", "content": "x"}]
    other = ProblemPrompt(prompt.template, prompt.system, (*prompt.examples[:1], ("2+2", "5")))
    assert prompt.settings()["few_shot"] != other.settings()["few_shot"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"problem": "1+1"}\n', "row 1: needs `problem` and `solution` or `answer`"),
        ('{"problem": "1+1", "answer": "2"}\n{"answer": "2"}\n', "row 2: needs"),
        ('{"problem": "1+1", "answer": ["2"]}\n', "row 1: needs"),
        ("\n", "has no examples in it"),
    ],
)
def test_bad_examples(tmp_path, text, words):
    (tmp_path / "shots.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        EvalSettings(few_shot=str(tmp_path / "shots.jsonl")).task_prompt()
