"""Every answer has the form that OpenAI publishes: types made from that, those of its client, read it strictly."""

import json

import httpx2
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel
from serving import KEY

QUESTION = [{"role": "user", "content": "7+5*3 mod 10"}]
OWN = {"vote", "reasoning", "reasoning_content", "max_model_len"}  # what the answers have besides
CASES = [
    {},
    {"n": 2},
    {"n": 2, "logprobs": True, "top_logprobs": 3},
    {"vote": {"n": 5}},
    {"stop": "7", "temperature": 0},
]


def ask(server, path, body):
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx2.post(server.url + path, headers=headers, json={"max_tokens": 9} | body, timeout=60)


def events(answer):
    *data, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in data]


def check(kind, body):
    """Reads the body strictly: nothing is converted, nothing is missing, and what is more is our own."""

    def extras(value):
        if isinstance(value, BaseModel):
            for name, field in value:
                yield from [name] if name in (value.model_extra or {}) else extras(field)
        elif isinstance(value, list):
            for item in value:
                yield from extras(item)

    read = kind.model_validate(body, strict=True)
    assert set(extras(read)) <= OWN
    return read


@pytest.mark.parametrize("case", CASES)
def test_chats(server, case):
    answer = check(ChatCompletion, ask(server, "/v1/chat/completions", {"messages": QUESTION} | case).json())
    assert len(answer.choices) == case.get("n", 1) and answer.usage.completion_tokens_details
    assert all(bool(choice.logprobs) == ("logprobs" in case) for choice in answer.choices)


@pytest.mark.parametrize("case", CASES)
def test_streamed_chats(server, case):
    body = {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}} | case
    chunks = [check(ChatCompletionChunk, chunk) for chunk in events(ask(server, "/v1/chat/completions", body))]
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(reasons) == case.get("n", 1) and set(reasons) <= {"stop", "length"}
    assert chunks[-1].usage.total_tokens and not any(chunk.usage for chunk in chunks[:-1])


@pytest.mark.parametrize("case", [{}, {"n": 2, "logprobs": 3}, {"prompt": ["7", "5"], "logprobs": 0}])
def test_completions(server, case):
    body = {"prompt": "7+5"} | case
    whole = check(Completion, ask(server, "/v1/completions", body).json())
    assert len(whole.choices) == (2 if case else 1)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(server, "/v1/completions", body | streamed))
    for chunk in chunks:
        for choice in chunk["choices"]:  # the type of chunks is that of whole answers; OpenAI's own have null
            choice["finish_reason"] = choice["finish_reason"] or "length"
        check(Completion, chunk)
    assert 0 < chunks[-1]["usage"]["completion_tokens"] <= 9 * len(whole.choices)


def test_models_and_errors(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    rows = httpx2.get(server.url + "/v1/models", headers=headers).json()
    assert rows["object"] == "list" and [check(Model, row).id for row in rows["data"]] == ["small"]
    bad = [("/v1/completions", {}), ("/v1/completions", {"prompt": "7", "model": "x"}), ("/v1/x", {})]
    for path, body in [*bad, ("/v1/chat/completions", {"messages": QUESTION, "tools": [{}]})]:
        error = ask(server, path, body).json()["error"]
        assert isinstance(error["code"], int)  # as vLLM's; OpenAI's are strings
        check(ErrorObject, error | {"code": str(error["code"])})
