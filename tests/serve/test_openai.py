"""OpenAI's own client against the server."""

import asyncio
from contextlib import suppress

import httpx2
import openai
import pytest
from commands import m1
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from serving import KEY

from m1.engine import SamplingParams
from m1.jsonl import read_jsonl

QUESTION = [{"role": "user", "content": "7+5*3 mod 10"}]


def direct(llm, messages, **options):
    """What the engine itself gives."""
    return llm.generate([messages], SamplingParams(**options))


def test_chat_equals_the_engine(server, apart):
    answer = server.client().chat.completions.create(
        model="small", messages=QUESTION, n=3, seed=5, max_tokens=20, logprobs=True, top_logprobs=2
    )
    expected = apart.encode(QUESTION)
    assert answer.usage.prompt_tokens == len(expected) and answer.object == "chat.completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.finish_reason in ("length", "stop") and choice.message.role == "assistant"
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)
    again = server.client().chat.completions.create(model="small", messages=QUESTION, n=3, seed=5, max_tokens=20)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    assert len({choice.message.content for choice in again.choices}) > 1


def test_a_stream_is_the_answer(server):
    options = dict(model="small", messages=QUESTION, n=2, seed=5, max_tokens=20, logprobs=True)
    whole = server.client().chat.completions.create(**options)
    chunks = list(
        server.client().chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for i, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == i]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]
        sent = [token.logprob for part in mine if part.logprobs for token in part.logprobs.content]
        assert sent == [token.logprob for token in choice.logprobs.content]


def test_plain_completions(server, apart):
    tokens = apart.encode("7+5")
    answer = server.client().completions.create(
        model="small", prompt=["7+5", "1+1"], n=2, temperature=0, max_tokens=8, logprobs=1
    )
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == direct(apart, "7+5", temperature=0, max_tokens=8)[0].text
    assert len(texts) == 4 and answer.usage.prompt_tokens == 2 * len(tokens)
    by_tokens = server.client().completions.create(model="small", prompt=tokens, temperature=0, max_tokens=8)
    assert by_tokens.choices[0].text == texts[0]
    stream = server.client().completions.create(model="small", prompt=tokens, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts[0]


def test_the_context_is_the_default_length(server, apart):
    """A chat may fill it. A plain completion has 16 tokens, or what is left."""
    options = dict(model="small", extra_body={"ignore_eos": True})
    chat = server.client().chat.completions.create(messages=QUESTION, **options)
    assert chat.usage.total_tokens == 512 and chat.choices[0].finish_reason == "length"
    for prompt, tokens in (("7" * 100, 16), ("7" * 505, 7)):
        assert server.client().completions.create(prompt=prompt, **options).usage.completion_tokens == tokens


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["", [], [[]], ["7", ""], [10**9], [-1], [10**11], [[7], [10**20]], "7" * 512])
def test_a_bad_prompt_is_refused(server, prompt, echo):
    with pytest.raises(openai.BadRequestError, match=r"prompt|vocabulary"):
        server.client().completions.create(model="small", prompt=prompt, echo=echo)
    assert server.idle()


@pytest.mark.parametrize("value", [2**31, 2**64, -(2**64)])
@pytest.mark.parametrize("field", ["top_k", "stop_token_ids", "min_tokens", "seed", "logprobs", "logit_bias"])
def test_a_huge_number_is_served_or_refused(server, field, value):
    fields = {"stop_token_ids": {field: [value], "min_tokens": 1}, "logit_bias": {field: {value: 1}}}
    with suppress(openai.BadRequestError):
        body = fields.get(field, {field: value})
        server.client().completions.create(model="small", prompt="7+5", max_tokens=2, extra_body=body)
    assert server.idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_tokens", [False, True])
def test_an_echo(server, apart, stream, by_tokens):
    """The prompt comes first, with its tokens' log-probabilities; in a stream, in each sample's first chunk."""
    prompts = ["7+5", "1+1"]
    options = dict(prompt=[apart.encode(p) for p in prompts] if by_tokens else prompts, n=2, max_tokens=8, seed=3)
    options |= {"model": "small", "logprobs": 2, "stream": stream}
    plain, echoed = (answer_of(server.client().completions.create(**options, echo=echo)) for echo in (False, True))
    for i, prompt in enumerate(["7+5", "7+5", "1+1", "1+1"]):
        (text, tokens, logprobs, top, offsets), (whole, *others) = plain[i], echoed[i]
        assert whole == prompt + text
        assert others[0] == [*prompt, *tokens] and others[1][0] is others[2][0] is None
        assert others[1][3:] == logprobs and others[2][3:] == top
        assert all(value <= 0 for value in others[1][1:3]) and all(1 <= len(row) <= 3 for row in others[2][1:])
        assert others[3] == [0, 1, 2, *(3 + offset for offset in offsets)]
    bare = server.client().completions.create(model="small", prompt="7+5", max_tokens=2, echo=True)
    assert bare.choices[0].text.startswith("7+5") and bare.choices[0].logprobs is None


def answer_of(answer):
    """By sample: the text, and the four lists of its log-probabilities. Chunks are joined."""
    joined = {}
    for part in [answer] if isinstance(answer, Completion) else answer:
        for choice in part.choices:
            own, logs = joined.setdefault(choice.index, ["", [], [], [], []]), choice.logprobs
            own[0] += choice.text
            if logs:
                for i, more in enumerate([logs.tokens, logs.token_logprobs, logs.top_logprobs, logs.text_offset], 1):
                    own[i] += more
    return joined


def test_many_at_once(server):
    """The asynchronous client gets the samples that the other gets one after another."""
    options = [dict(model="small", messages=QUESTION, seed=seed, max_tokens=20) for seed in range(12)]

    async def ask():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(client.chat.completions.create(**one) for one in options))

    texts = [answer.choices[0].message.content for answer in asyncio.run(ask())]
    expected = [server.client().chat.completions.create(**one).choices[0].message.content for one in options]
    assert texts == expected and len(set(texts)) > 1


def test_a_stop_string_ends_a_sample(server, apart):
    text = direct(apart, "7+5", temperature=0, max_tokens=30)[0].text
    stop = text[5:7]
    answer = server.client().completions.create(model="small", prompt="7+5", temperature=0, max_tokens=30, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_a_special_token_ends_a_sample(server, apart):
    """A stop string that no text has, since it is a special token."""
    token = apart.tokenizer.convert_tokens_to_ids("<|user|>")
    answer = server.client().completions.create(
        model="small", prompt="7+5", max_tokens=30, stop="<|user|>", logit_bias={str(token): 100}
    )
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 1


def test_a_vote(server):
    vote = {"n": 12, "rule": "none"}
    options = dict(model="small", messages=QUESTION, seed=3, max_tokens=12)
    answer = server.client().chat.completions.create(**options, extra_body={"vote": vote})
    assert answer.vote["finished"] == 12 and answer.vote["reason"] == "all"
    assert sum(row["votes"] for row in answer.vote["tally"]) + answer.vote["abstained"] == 12
    chunks = list(server.client().chat.completions.create(**options, extra_body={"vote": vote}, stream=True))
    assert chunks[-2].vote["tally"] == answer.vote["tally"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
    assert server.idle()


def test_a_vote_ends_with_its_seconds(server):
    vote = {"seconds": 0.5}
    answer = server.client().chat.completions.create(
        model="small", messages=QUESTION, max_tokens=400, extra_body={"vote": vote}
    )
    assert answer.vote["reason"] == "seconds" and answer.vote["seconds"] >= 0.5 and server.idle()


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"n": 1000}, "n", "at most 256"),
        ({"messages": [{"role": "user", "content": "7" * 600}]}, None, "leaves no room"),
        ({"max_tokens": 500}, "max_tokens", "in the context of 512"),
        ({"max_completion_tokens": 10**9}, "max_tokens", "in the context of 512"),
        ({"max_tokens": 5, "extra_body": {"min_tokens": 6}}, "min_tokens", "0 to 5"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "messages", "system"),
        ({"messages": []}, "messages", "at least 1"),
        ({"top_logprobs": 3}, None, "logprobs = true"),
        ({"logit_bias": {"100000": 1}}, None, "logit_bias of token 100000"),
        ({"extra_body": {"vote": {"samples": 3}}}, "vote", "samples"),
    ],
)
def test_what_cannot_be_done_is_refused(server, options, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        server.client().chat.completions.create(**{"model": "small", "messages": QUESTION} | options)
    assert caught.value.body["param"] == param and caught.value.body["code"] == 400
    assert server.idle()


def test_an_unknown_model_and_a_wrong_key(server):
    with pytest.raises(openai.NotFoundError, match="there are: small"):
        server.client().chat.completions.create(model="large", messages=QUESTION)
    with pytest.raises(openai.AuthenticationError):
        server.client("sk-wrong").models.list()
    assert [model.id for model in server.client().models.list()] == ["small"]


def test_unknown_fields_are_ignored(server):
    body = {"store": False, "metadata": {"a": "b"}, "whatever": 1}
    client: OpenAI = server.client()
    assert client.chat.completions.create(model="small", messages=QUESTION, max_tokens=2, extra_body=body).choices


def test_a_vote_shows_its_samples(server):
    """Their texts arrive piece by piece, and together are those that voted."""
    vote = {"n": 6, "rule": "none", "show_samples": True}
    options = dict(model="small", messages=QUESTION, seed=3, max_tokens=30, extra_body={"vote": vote})
    texts, answers = {}, {}
    for chunk in server.client().chat.completions.create(**options, stream=True):
        for sample in (getattr(chunk, "vote", None) or {}).get("samples", ()):
            assert sample["index"] not in answers
            texts[sample["index"]] = texts.get(sample["index"], "") + sample["text"]
            if sample["done"]:
                answers[sample["index"]] = sample["answer"]
    assert sorted(answers) == sorted(texts) == list(range(6))
    assert len(set(texts.values())) > 1 and server.idle()


def test_the_page_is_there_without_a_key(server):
    page = httpx2.get(server.url + "/")
    assert page.status_code == 200 and "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text  # nothing is loaded from elsewhere


def test_m1_eval_as_the_client(server, tmp_path, monkeypatch):
    """`m1 eval --endpoint` gets from the server what it needs: texts, tokens and log-probabilities."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests")
    command = ["eval", "--endpoint", f"{server.url}/v1", "--model", "small", "--task", "chain", "--limit", 3, "--n", 2]
    assert m1(*command, "--max-new-tokens", 12, "--out", tmp_path / "out") == 0
    rows = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    assert len(rows) == 6 and all(1 <= row["tokens"] <= 12 and row["logprob"] < 0 for row in rows)
