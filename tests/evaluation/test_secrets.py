"""Secrets aren't printed, logged or stored, whatever a user, a library or a server does with them."""

import contextlib
import json
import logging
import sys

import pytest
from openai_server import completion

from m1 import cli
from m1.cli import render
from m1.errors import UserError
from m1.secrets import api_key, redact, redact_settings
from m1.text import clean_logs

KEY = "sk-Zm9vYmFy0123456789"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\n")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `m1 eval --model x --task chain ...`: exit code, all that was printed, all that was written."""

    def run(*arguments):
        base = ["m1", "eval", "--model", "x", "--task", "chain", "--limit", "2", "--n", "1", "--out", tmp_path / "o"]
        monkeypatch.setattr(sys, "argv", [*map(str, base), *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        written = "".join(p.read_text(errors="replace") for p in sorted(tmp_path.glob("o/*")) if p.suffix != ".parquet")
        return exit_.value.code or 0, "".join(capsys.readouterr()), written

    return run


def header(server):
    return {name.lower(): value for name, value in server.headers[0].items()}["authorization"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/v1", "https://***@host/v1"),
        ("http://token@host:80/a?b=1", "http://***@host:80/a?b=1"),
        ("http://h/v1?api-key=abc&x=1", "http://h/v1?api-key=***&x=1"),
        ("http://h/?x=1&access_token=a.b-c sig", "http://h/?x=1&access_token=*** sig"),
        ("http://h/?sig=a%2Fb#c", "http://h/?sig=***#c"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        (f"Illegal header value b'Bearer {KEY}\\n'", "Illegal header value b'Bearer ***\\n'"),
        (f"key {KEY}!", "key ***!"),
        ("a plain text, 50 tokens/s, me@home.org, http://h/a?page=2", None),
    ],
)
def test_redaction(key, text, expected):
    assert redact(text) == (text if expected is None else expected)
    assert redact(redact(text)) == redact(text)


def test_other_variables_named_like_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("DB_PASSWORD", "hunter22")
    monkeypatch.setenv("KEY_COUNT", "12")
    assert redact("hf_abcdefgh, hunter22 and 12") == "***, *** and 12"


def test_the_key_is_stripped_and_checked_once(monkeypatch):
    for value, expected in ((f" {KEY}\n", KEY), ("", None), (" \n", None)):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        assert api_key() == expected
    for value in ("sk-Sécret", "sk-two words", "sk-\x7f"):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(UserError, match="OPENAI_API_KEY: its character") as error:
            api_key()
        assert value not in str(error.value)


def test_a_key_from_a_file_reaches_the_server(key, run, serve):
    server = serve(lambda body, number: (200, completion(r"\boxed{1}")))
    code, printed, written = run("--endpoint", server.url)
    assert code == 0 and header(server) == f"Bearer {KEY}"
    assert KEY not in printed + written


def test_a_key_that_no_header_can_hold_is_refused_at_once(run, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-Sécret-0123")
    server = serve(lambda body, number: (200, completion("1")))
    code, printed, _ = run("--endpoint", server.url)
    assert code == 2 and "Sécret" not in printed and "character 5" in printed and not server.bodies


@pytest.mark.parametrize("status", [401, 400])
def test_a_server_that_repeats_the_header(key, run, serve, status):
    server = serve(lambda body, number: (status, {"error": f"bad header: Bearer {KEY}; {KEY}"}))
    code, printed, written = run("--endpoint", server.url)
    assert code == 2 and f"answers {status}" in printed and "Bearer ***" in printed
    assert KEY not in printed + written


@pytest.mark.parametrize("dummy", ["x", "1", "EMPTY"])
def test_a_dummy_key_changes_no_text(monkeypatch, run, serve, dummy):
    monkeypatch.setenv("OPENAI_API_KEY", dummy)
    server = serve(lambda body, number: (200, completion(rf"\boxed{{1}} {dummy}")))
    code, printed, written = run("--endpoint", server.url)
    assert code == 0 and header(server) == f"Bearer {dummy}" and f"boxed{{1}} {dummy}" in written
    assert "***" not in printed + written


def test_a_server_that_answers_with_the_key(key, run, serve):
    server = serve(lambda body, number: (200, completion(rf"your key is {KEY}: \boxed{{1}}", finish_reason=KEY)))
    code, printed, written = run("--endpoint", server.url)
    assert code == 0 and KEY not in printed + written and "your key is ***" in written


def test_secrets_in_the_address_are_sent_but_not_shown(run, serve):
    server = serve(lambda body, number: (200, completion(r"\boxed{1}")))
    url = server.url.replace("http://", "http://user:pa55word@") + "/?api-key=S3CRET-query&version=1"
    code, printed, written = run("--endpoint", url)
    assert code == 0 and server.paths[0] == "/v1/chat/completions?api-key=S3CRET-query&version=1"
    assert header(server).startswith("Basic ")
    assert "pa55word" not in printed + written and "S3CRET" not in printed + written
    result = json.loads(written[written.index('{\n  "settings"') : written.rindex("}") + 1].split("\n}\n")[0] + "\n}")
    assert result["endpoint"].endswith("/v1/?api-key=***&version=1")


@pytest.mark.parametrize(
    "url", ["http://user:pa55word@127.0.0.1:9/v1?token=S3CRET", "ftp://user:pa55word@h/?key=S3CRET"]
)
def test_an_address_in_an_error(run, url):
    code, printed, _ = run("--endpoint", url)
    assert code == 2 and "***@" in printed and "pa55word" not in printed and "S3CRET" not in printed


@pytest.fixture
def log_records():
    factory = logging.getLogRecordFactory()
    clean_logs()
    yield
    logging.setLogRecordFactory(factory)


def test_logs(key, log_records, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("some.library").warning("sent %s to %s", f"Bearer {KEY}", "http://a:b@c")
        logging.getLogger("some.library").warning("50 % of it")
        with contextlib.suppress(RuntimeError):
            try:
                raise RuntimeError(KEY)
            except RuntimeError:
                logging.getLogger("some.library").exception("failed")
    assert caplog.messages == ["sent Bearer *** to http://***@c", "50 % of it", "failed"]
    assert "RuntimeError: ***" in caplog.text and KEY not in caplog.text


def test_secrets_of_a_recipe():
    settings = {"trainer": {"hub_token": "hf_a", "pad_token": "<pad>", "wandb_api_key": "w", "n": [1, "http://a:b@c"]}}
    hidden = {"hub_token": "***", "pad_token": "<pad>", "wandb_api_key": "***", "n": [1, "http://***@c"]}
    assert redact_settings(settings) == {"trainer": hidden}


def test_tracebacks(key, monkeypatch, capsys, log_records):
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(RuntimeError(f"no header {KEY}")))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    printed = capsys.readouterr().err
    assert exit_.value.code == 1 and "RuntimeError: no header ***" in printed and KEY not in printed


def test_no_control_characters_reach_the_terminal(capsys):
    render.line("a\x1b]0;title\x07 b\x9b2J\r[red]c[/red]")
    assert capsys.readouterr().out == "a�]0;title� b�2J�[red]c[/red]\n"
