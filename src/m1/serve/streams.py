"""Answers as server-sent events: chats, plain completions and votes as they grow."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from m1.engine import LLM, Sequence
from m1.grading import extract_answer
from m1.serve.errors import ClientGone, answer_of
from m1.serve.jobs import Ballot, Generation
from m1.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Envelope,
    chat_logprobs,
    completion_logprobs,
    event,
    finish_reason,
    message,
    usage,
    vote_of,
    voted,
)
from m1.serve.run import Run
from m1.serve.thoughts import Thoughts

SHOW_SECONDS = 0.1  # between two chunks of a vote that shows its samples


def streamed(events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events. An error after the first byte is an event, too."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except ClientGone:
            return
        except Exception as error:
            yield event(answer_of(error)[1])
        yield "data: [DONE]\n\n"

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


async def chat_events(
    running: Run, llm: LLM, job: Generation, body: ChatRequest, envelope: Envelope, opened: bool
) -> AsyncIterator[str]:
    """The chunks of a chat completion: roles first, then texts as they grow, why each ended, and the usage."""

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return event(envelope("chat.completion.chunk", [choice]))

    for i in range(len(job.samples)):
        yield chunk(i, {"role": "assistant", "content": ""})
    parts = [Thoughts(opened) for _ in job.samples]
    sent = [("", "")] * len(job.samples)
    told = [0] * len(job.samples)  # tokens whose log-probabilities were sent
    closed: set[int] = set()
    async for _ in running.updates():
        complete = set(job.complete)  # before the texts are read
        for i, sample in enumerate(job.samples):
            if i in closed:
                continue
            thought, reply = parts[i].split(sample.text, i in complete)
            new_thought, new_reply = thought[len(sent[i][0]) :], reply[len(sent[i][1]) :]
            if new_thought or new_reply:
                sent[i] = thought, reply
                yield chunk(i, message(new_thought, new_reply), **logprobs_of(llm, sample.sequence, body, told, i))
            if i in complete:
                closed.add(i)
                rest = logprobs_of(llm, sample.sequence, body, told, i)
                yield chunk(i, {}, finish_reason=finish_reason(sample.sequence), **rest)
    if body.stream_options and body.stream_options.include_usage:
        counts = usage(llm, job.requests, [thought for thought, _ in sent])
        yield event(envelope("chat.completion.chunk", [], usage=counts))


def logprobs_of(llm: LLM, sequence: Sequence, body: ChatRequest, told: list[int], i: int) -> dict[str, Any]:
    """The log-probabilities of the tokens that weren't sent yet, if they are asked for."""
    begin, end = told[i], len(sequence.logprobs)
    if not body.logprobs or begin == end:
        return {}
    told[i] = end
    return {"logprobs": chat_logprobs(llm, sequence, begin, end)}


async def completion_events(
    running: Run, llm: LLM, job: Generation, body: CompletionRequest, envelope: Envelope
) -> AsyncIterator[str]:
    """The chunks of plain completions: texts as they grow, why each ended, and the usage."""
    sent = [0] * len(job.samples)
    told = [0] * len(job.samples)
    closed: set[int] = set()
    async for _ in running.updates():
        complete = set(job.complete)
        for i, sample in enumerate(job.samples):
            text, sequence = sample.text, sample.sequence
            if i in closed or (len(text) == sent[i] and i not in complete):
                continue
            choice = {"index": i, "text": text[sent[i] :], "logprobs": None, "finish_reason": None}
            end = len(sequence.logprobs)
            if body.logprobs is not None and end > told[i]:
                choice["logprobs"] = completion_logprobs(llm, sequence, told[i], end, sent[i])
            if i in complete:
                closed.add(i)
                choice["finish_reason"] = finish_reason(sequence)
            sent[i], told[i] = len(text), end
            yield event(envelope("text_completion", [choice]))
    if body.stream_options and body.stream_options.include_usage:
        yield event(envelope("text_completion", [], usage=usage(llm, job.requests)))


async def vote_events(
    running: Run, llm: LLM, ballot: Ballot, body: ChatRequest, envelope: Envelope, opened: bool
) -> AsyncIterator[str]:
    """The chunks of a vote: its tally whenever it changes, then the winner's text, and the usage.

    With `show_samples`, the tally's `samples` have what is new of each sample.
    """
    sent: list[int] = []
    closed: set[int] = set()

    def news() -> dict[str, Any]:
        complete = set(ballot.complete)  # before the texts are read
        sent.extend([0] * (len(ballot.samples) - len(sent)))
        rows = []
        for i, sample in enumerate(ballot.samples):
            if i in closed or (len(sample.text) == sent[i] and i not in complete):
                continue
            row = {"index": i, "text": sample.text[sent[i] :], "done": i in complete}
            sent[i] = len(sample.text)
            if i in complete:
                closed.add(i)
                row["answer"] = extract_answer("<think>" * opened + sample.text)
            rows.append(row)
        return {"samples": rows} if rows else {}

    async for _ in running.updates():
        yield event(envelope("chat.completion.chunk", [], vote=vote_of(ballot.solution) | news()))
        if ballot.samples:
            await asyncio.sleep(SHOW_SECONDS)
    whole = voted(llm, ballot.solution, len(ballot.voting.tokens), envelope)
    (choice,) = whole["choices"]
    delta = {"index": 0, "delta": choice["message"], "logprobs": None, "finish_reason": None}
    yield event(envelope("chat.completion.chunk", [delta], vote=whole["vote"]))
    last = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
    yield event(envelope("chat.completion.chunk", [last]))
    if body.stream_options and body.stream_options.include_usage:
        yield event(envelope("chat.completion.chunk", [], usage=whole["usage"]))
