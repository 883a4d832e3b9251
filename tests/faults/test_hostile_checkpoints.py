"""Checkpoints that would allocate, loop or fail in ways of their own end in one line."""

import json
import shutil
import time

import pytest
from commands import check

from m1.errors import UserError
from m1.model.configuration import SIZES
from m1.model.tokenizer import byte_tokenizer, render_chat, time_limit


@pytest.fixture
def copies(teacher_dir, hybrid_dir, tmp_path):
    """A copy of a teacher and of a hybrid."""
    return [shutil.copytree(folder, tmp_path / name) for folder, name in ((teacher_dir, "t"), (hybrid_dir, "h"))]


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, value) for name in SIZES for value in (0, 10**18)), *(("vocab_size", v) for v in (-1, 10**30, 1e30))],
)
def test_sizes_have_ceilings(run, copies, name, value):
    for folder in copies:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        started = time.perf_counter()
        check(run("solve", "1+1", "--model", folder), f"{name} (", "must be at least 1 and at most")
        check(run("inspect", folder), name)
        assert time.perf_counter() - started < 5


@pytest.mark.parametrize("kind", [[1], {}, 5, None, "evil"])
def test_model_types(run, copies, tmp_path, kind):
    teacher, _ = copies
    path = teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))
    convert = ("convert", "--teacher", teacher, "--out", tmp_path / "o", "--keep-attention", "1")
    check(run(*convert), f"is a {kind!r} model")


TOKENIZERS = ["[]", "null", "{}", "5", "[" * 100_000, "\x00"]
TOKENIZERS += ['{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}']


@pytest.mark.parametrize("content", TOKENIZERS, ids=lambda text: text[:20])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(run, copies, name, content):
    _, hybrid = copies
    (hybrid / name).write_text(content)
    code, err = run("solve", "1+1", "--model", hybrid, "--n", 1, "--max-new-tokens", 1)
    assert code in (0, 2) and "Traceback" not in err


@pytest.mark.parametrize(
    "key", ["eos_token", "pad_token", "model_max_length", "extra_special_tokens", "tokenizer_class"]
)
@pytest.mark.parametrize("value", [5, {}, 1e400])
def test_tokenizer_settings(run, copies, key, value):
    _, hybrid = copies
    path = hybrid / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, err = run("solve", "1+1", "--model", hybrid, "--n", 1, "--max-new-tokens", 1)
    assert code in (0, 2) and "Traceback" not in err


@pytest.mark.parametrize("value", [2.5, True, "x", [2.5], [[1]], {"a": 1}])
def test_stop_tokens(run, copies, value):
    """transformers takes them as they are."""
    _, hybrid = copies
    (hybrid / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    check(run("solve", "1+1", "--model", hybrid, "--n", 1, "--max-new-tokens", 1))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    ENDLESS: "not done after 0.2 seconds",
    "{{ 10 ** 10 ** 10 }}": "power",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages + 1 }}": "",
    "{{ 'a' * 10 ** 12 }}": "power",
    "{{ 'a' * 1000000000000000000 }}": "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "",
    "{{ messages.x.y }}": "has no attribute",
    "{{ raise_exception('a\n\x1b[2Jb') }}": "a",
    "{% for": "",
    "{{ ''.__class__.__mro__ }}": "",
    "{{ strftime_now(5) }}": "",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_fail_in_one_line_and_end(monkeypatch, template):
    monkeypatch.setattr("m1.model.tokenizer.TEMPLATE_SECONDS", 0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"the chat template of .* fails on ") as error:
        render_chat(tokenizer, "x" * 10_000)
    assert time.perf_counter() - started < 2
    assert TEMPLATES[template] in str(error.value) and len(str(error.value)) < 700


def test_templates_with_stars_in_their_text_are_no_powers():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "**{{ messages[0]['content'] }}** {% generation %}{{ '**' * 2 }}{% endgeneration %}"
    assert render_chat(tokenizer, "x") == "**x** ****"


def test_a_limit_within_a_limit():
    with pytest.raises(TimeoutError, match=r"0\.2 seconds"), time_limit(0.2):
        with pytest.raises(TimeoutError, match=r"0\.05 seconds"), time_limit(0.05):
            time.sleep(5)
        time.sleep(5)
