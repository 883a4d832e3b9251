"""Answers as server-sent events: chats, plain completions and votes as they grow."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse

from m1.engine import LLM, Sequence
from m1.engine.llm import TextSequence
from m1.grading import extract_answer
from m1.serve.errors import ClientGone, answer_of
from m1.serve.jobs import Ballot, Generation, Job
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
from m1.serve.submission import Submission
from m1.serve.thoughts import OPEN, Thoughts

SHOW_SECONDS = 0.1  # between two chunks of a vote that shows its samples


class Growth(NamedTuple):
    """What is new of a sample: its text from `begin` on, and whether it is complete."""

    place: int
    sample: TextSequence
    text: str
    begin: int
    complete: bool


class Growths:
    """Reads a job's samples again and again, each until it is complete."""

    def __init__(self, job: Job):
        self._job = job
        self._sent: dict[int, int] = {}  # characters
        self._closed: set[int] = set()

    def __iter__(self) -> Iterator[Growth]:
        """The samples that have grown or become complete since the last time."""
        complete = set(self._job.complete)  # before the texts are read
        for place, sample in enumerate(self._job.samples):
            text, begin = sample.text, self._sent.get(place, 0)
            if place in self._closed or (len(text) == begin and place not in complete):
                continue
            self._sent[place] = len(text)
            if place in complete:
                self._closed.add(place)
            yield Growth(place, sample, text, begin, place in complete)


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
    running: Submission, llm: LLM, job: Generation, body: ChatRequest, envelope: Envelope, opened: bool
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
    growths = Growths(job)
    async for _ in running.updates():
        for i, sample, text, _, complete in growths:
            before, sent[i] = sent[i], parts[i].split(text, complete)
            new_thought, new_reply = (new[len(old) :] for new, old in zip(sent[i], before, strict=True))
            if new_thought or new_reply:
                yield chunk(i, message(new_thought, new_reply), **logprobs_of(llm, sample.sequence, body, told, i))
            if complete:
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
    running: Submission, llm: LLM, job: Generation, body: CompletionRequest, envelope: Envelope, echoes: list[str]
) -> AsyncIterator[str]:
    """The chunks of plain completions: texts as they grow, why each ended, and the usage.

    The first chunk of each sample has its echo, too, with the log-probabilities of those tokens.
    """
    told = [0] * len(job.samples)  # tokens whose log-probabilities were sent
    ends = [0] * len(job.samples)  # of their texts
    growths = Growths(job)
    async for _ in running.updates():
        for i, sample, text, begin, complete in growths:
            choice = {"index": i, "text": echoes[i] + text[begin:], "logprobs": None, "finish_reason": None}
            end = len(sample.sequence.logprobs)
            if body.logprobs is not None and end > told[i]:
                own = completion_logprobs(llm, sample.sequence, told[i], end, ends[i], bool(echoes[i]))
                choice["logprobs"], ends[i] = own, own["text_offset"][-1] + len(own["tokens"][-1])
            echoes[i] = ""
            if complete:
                choice["finish_reason"] = finish_reason(sample.sequence)
            told[i] = end
            yield event(envelope("text_completion", [choice]))
    if body.stream_options and body.stream_options.include_usage:
        yield event(envelope("text_completion", [], usage=usage(llm, job.requests)))


async def vote_events(
    running: Submission, llm: LLM, ballot: Ballot, body: ChatRequest, envelope: Envelope, opened: bool
) -> AsyncIterator[str]:
    """The chunks of a vote: its tally whenever it changes, then the winner's text, and the usage.

    With `show_samples`, the tally's `samples` have what is new of each sample.
    """
    growths = Growths(ballot)

    def news() -> dict[str, Any]:
        rows = []
        for i, _, text, begin, complete in growths:
            row = {"index": i, "text": text[begin:], "done": complete}
            rows.append(row | ({"answer": extract_answer(OPEN * opened + text)} if complete else {}))
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
