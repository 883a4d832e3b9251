"""`m1 chat`: several turns over one input, streamed; and the conversation behind it."""

from contextlib import closing
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from m1.cli import app
from m1.engine import LLM, SamplingParams
from m1.engine.chat import Chat
from m1.errors import UserError
from m1.ops.random_bits import fold_in

PARAMS = SamplingParams(max_tokens=12, temperature=0.7)
QUESTIONS = ("2+2?", "and 3+3?")


@pytest.fixture
def llm(hybrid_dir):
    return LLM.from_pretrained(hybrid_dir, max_num_seqs=1)


def conversation(llm, *start):
    """What it should be: each question asked of the model anew, with the earlier turns in the prompt."""
    messages = list(start)
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        params = replace(PARAMS, seed=fold_in(0, len(messages)))
        messages.append({"role": "assistant", "content": llm.generate([messages], params)[0].text})
    return messages


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turns_follow_each_other(llm, system):
    chat = Chat(llm, PARAMS, system)
    engine = llm.engine
    pieces = [list(chat.ask(question)) for question in QUESTIONS]
    assert llm.engine is engine  # which packs the weights once
    expected = conversation(llm, *([] if system is None else [{"role": "system", "content": system}]))
    assert chat.messages == expected
    assert ["".join(turn) for turn in pieces] == [m["content"] for m in expected if m["role"] == "assistant"]
    assert all(len(turn) > 1 for turn in pieces)
    chat.restart()
    list(chat.ask(QUESTIONS[0]))
    assert chat.messages == expected[: len(chat.messages)] and len(chat.messages) == 2 + (system is not None)


def test_an_answer_that_is_cut_off_is_kept_as_far_as_it_was_shown(llm):
    chat = Chat(llm, PARAMS)
    with closing(chat.ask("2+2?")) as pieces:
        shown = next(pieces)
    assert [m["content"] for m in chat.messages] == ["2+2?", shown] and not llm.engine.busy


def test_a_question_that_does_not_fit_is_forgotten(llm):
    chat = Chat(llm, PARAMS)
    with pytest.raises(UserError, match="no room in the model's context of 512"):
        list(chat.ask("x" * 600))
    assert chat.messages == []


def test_a_conversation_that_grows_keeps_its_engine(llm, monkeypatch):
    monkeypatch.setattr("m1.engine.chat.DEFAULT_MAX_MODEL_LEN", 40)
    chat, engines = Chat(llm, PARAMS), set()
    for _ in range(6):
        list(chat.ask("2+2?"))
        engines.add(llm.engine.max_model_len)
    assert llm.engine.max_model_len <= 512 and 1 < len(engines) < 4


def test_without_a_template_there_is_no_chat(llm):
    llm.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Chat(llm, PARAMS)


def test_command(llm, hybrid_dir, tmp_path):
    def chat(text, *options):
        options = ["chat", str(hybrid_dir), "--max-new-tokens", "12", *options]
        return CliRunner().invoke(app, options, input=text)

    lines = "".join(f"{question}\n" for question in (QUESTIONS[0], "", QUESTIONS[1], "/exit", "never asked"))
    out = chat(lines)
    assert out.exit_code == 0, out.output
    first, second = (m["content"] for m in conversation(llm) if m["role"] == "assistant")
    assert out.stdout.split() == "\n".join([first, second]).translate(CONTROLS).split()
    again = chat(f"{QUESTIONS[0]}\n/new\n{QUESTIONS[0]}\n")  # ends with the input
    assert again.exit_code == 0 and again.stdout.split() == f"{first}\n{first}".translate(CONTROLS).split()
    assert isinstance(chat("x" * 600).exception, UserError)
    assert chat(b"a\xff\n").exit_code == 0
    (tmp_path / "system").write_text("Be brief.")
    first = conversation(llm, {"role": "system", "content": "Be brief."})[2]["content"]
    brief = chat(QUESTIONS[0], "--system-prompt", f"@{tmp_path / 'system'}")
    assert brief.stdout.split() == first.translate(CONTROLS).split()
    greedy = [chat(QUESTIONS[0], *how).stdout for how in (("--top-k", "1"), ("--temperature", "0"))]
    assert greedy[0] == greedy[1] != out.stdout


# what the console shows in place of control characters
CONTROLS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}
