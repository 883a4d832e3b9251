"""The routes of `m1 serve`."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version as version_of
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from m1.engine import LLM
from m1.engine import Request as Prompt
from m1.engine.sequence import requests_for
from m1.errors import UserError
from m1.grading import Grader, opens_thought
from m1.grading.spelling import normalize
from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution
from m1.serve.gate import Gate, error_body
from m1.serve.jobs import Ballot, Generation, Job
from m1.serve.loop import EngineLoop, Overloaded
from m1.serve.metrics import Metrics
from m1.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Envelope,
    TokenizeRequest,
    chat_choice,
    chat_logprobs,
    completion_logprobs,
    event,
    finish_reason,
    message,
    usage,
    usage_of,
    vote_of,
)
from m1.serve.settings import ServeOptions
from m1.serve.thoughts import Thoughts

VERSION = version_of("m1-reasoning")
DEFAULT_VOTE_SAMPLES = 16
logger = logging.getLogger(__name__)


class TimedOut(Exception):
    """A request has taken longer than the server allows."""


class ClientGone(Exception):
    """The client has closed the connection."""


class UnknownModel(UserError):
    """The server has no model of this name."""


def make_app(loops: dict[str, EngineLoop], options: ServeOptions, keys: list[str], grader: Grader) -> FastAPI:
    """The application.

    Args:
        loops: by model name. The first one is the default.
        options: limits.
        keys: any of them opens; everyone gets in if there are none.
        grader: compares the answers of votes.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for loop in loops.values():
            loop.begin()
        yield
        for loop in loops.values():
            await loop.stop()

    app = FastAPI(title="M1", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    graders = ThreadPoolExecutor(4, thread_name_prefix="votes")
    metrics = Metrics(loops)
    started = int(time.time())

    def chosen(name: str | None) -> tuple[str, EngineLoop]:
        name = next(iter(loops)) if name is None else name
        if name not in loops:
            raise UnknownModel(f"the model {name!r} does not exist; there are: {', '.join(loops)}")
        return name, loops[name]

    def limited(samples: int) -> None:
        if samples > options.max_n:
            raise UserError(f"n={samples}: this server draws at most {options.max_n} samples per request")

    def run(loop: EngineLoop, job: Job, request: Request) -> "Run":
        loop.submit(job)
        return Run(loop, job, request, options.timeout, metrics)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        name, loop = chosen(body.model)
        tokens = await asyncio.to_thread(loop.llm.encode, body.plain_messages())
        envelope = Envelope("chatcmpl", name)
        params = body.params(loop.engine.max_model_len - len(tokens))
        opened = opens_thought(loop.llm.decode(tokens[-16:]))
        if body.vote:
            n, seconds = body.vote.n, body.vote.seconds
            limited(n or 1)
            budget = Budget(DEFAULT_VOTE_SAMPLES if n is None and seconds is None else n, seconds, body.vote.rule)
            problem = body.plain_messages()[-1]["content"]
            loop.engine.check(Prompt(tokens, params))
            ballot = Ballot(loop.llm, problem, tokens, params, budget, body.vote.weights, grader, graders, loop.wake)
            running = run(loop, ballot, request)
            if body.stream:
                return streamed(vote_events(running, loop.llm, ballot, body, envelope))
            await running.end()
            return JSONResponse(voted(loop.llm, ballot.solution, len(tokens), envelope))
        limited(params.n)
        job = Generation(loop.llm, [Prompt(tokens, params)], body.stream)
        running = run(loop, job, request)
        if body.stream:
            return streamed(chat_events(running, loop.llm, job, body, envelope, opened))
        await running.end()
        made = [chat_choice(loop.llm, i, sample, opened, body.logprobs) for i, sample in enumerate(job.samples)]
        thoughts = [thought for _, thought in made]
        counts = usage(loop.llm, job.requests, thoughts)
        return JSONResponse(envelope("chat.completion", [choice for choice, _ in made], usage=counts))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        name, loop = chosen(body.model)
        prompts = await asyncio.to_thread(body.prompts, loop.llm)
        limited(body.n * len(prompts))
        longest = max(map(len, prompts), default=0)
        requests = requests_for(prompts, body.params(loop.engine.max_model_len - longest))
        job = Generation(loop.llm, requests, body.stream)
        envelope = Envelope("cmpl", name)
        running = run(loop, job, request)
        if body.stream:
            return streamed(completion_events(running, loop.llm, job, body, envelope))
        await running.end()
        choices = []
        for i, sample in enumerate(job.samples):
            sequence = sample.sequence
            choice = {"index": i, "text": sample.text, "finish_reason": finish_reason(sequence), "logprobs": None}
            if body.logprobs is not None:
                choice["logprobs"] = completion_logprobs(loop.llm, sequence, 0, len(sequence.token_ids), 0)
            choices.append(choice)
        return JSONResponse(envelope("text_completion", choices, usage=usage(loop.llm, job.requests)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        rows = [
            {"id": name, "object": "model", "created": started, "owned_by": "m1"}
            | {"max_model_len": loop.engine.max_model_len}
            for name, loop in loops.items()
        ]
        return {"object": "list", "data": rows}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _, loop = chosen(body.model)
        prompt = [part.plain() for part in body.messages] if body.messages else body.prompt or ""
        tokens = await asyncio.to_thread(loop.llm.encode, prompt)
        pieces = loop.llm.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        room = loop.engine.max_model_len
        return {"count": len(tokens), "max_model_len": room, "tokens": tokens, "token_strs": pieces}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        _, loop = chosen(body.model)
        if wrong := [token for token in body.tokens if token >= loop.engine.vocab_size]:
            raise UserError(f"tokens has {wrong[0]}; the vocabulary is 0 to {loop.engine.vocab_size - 1}")
        return {"prompt": await asyncio.to_thread(loop.llm.tokenizer.decode, body.tokens)}

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_middleware(Gate, keys=keys, max_body=options.max_body)
    if options.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=options.cors_origin, allow_methods=["*"], allow_headers=["*"])
    answer_errors(app)
    return app


class Run:
    """A submitted job, which ends when its client goes away or its time is over."""

    def __init__(self, loop: EngineLoop, job: Job, request: Request, timeout: float, metrics: Metrics):
        self.loop, self.job, self.metrics = loop, job, metrics
        self._watch = asyncio.create_task(self._end_early(request, timeout))
        self._submitted = time.monotonic()

    async def _end_early(self, request: Request, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
            self.loop.abort(self.job, ClientGone())
        except TimeoutError:
            self.loop.abort(self.job, TimedOut(f"the request took over {timeout:g} seconds"))

    async def updates(self) -> AsyncIterator[None]:
        """Yields whenever the job has something new to read, at last at its end. Raises what went wrong."""
        begun = False
        try:
            while not self.job.done:
                await self.job.changed.wait()
                self.job.changed.clear()
                if not begun:
                    self.metrics.first(self._submitted)
                begun = True
                yield
        finally:
            self._watch.cancel()
            if not self.job.done:
                self.loop.abort(self.job, ClientGone())
            self.metrics.end(self.job, self._submitted)
        if self.job.error:
            raise self.job.error

    async def end(self) -> None:
        """Waits for the job's end. Raises what went wrong."""
        async for _ in self.updates():
            pass


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


def logprobs_of(llm: LLM, sequence: Any, body: ChatRequest, told: list[int], i: int) -> dict[str, Any]:
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
    running: Run, llm: LLM, ballot: Ballot, body: ChatRequest, envelope: Envelope
) -> AsyncIterator[str]:
    """The chunks of a vote: its tally whenever it changes, then the winner's text, and the usage."""
    async for _ in running.updates():
        if not ballot.done:
            yield event(envelope("chat.completion.chunk", [], vote=vote_of(ballot.solution)))
    whole = voted(llm, ballot.solution, len(ballot.voting.tokens), envelope)
    (choice,) = whole["choices"]
    delta = {"index": 0, "delta": choice["message"], "logprobs": None, "finish_reason": None}
    yield event(envelope("chat.completion.chunk", [delta], vote=whole["vote"]))
    last = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
    yield event(envelope("chat.completion.chunk", [last]))
    if body.stream_options and body.stream_options.include_usage:
        yield event(envelope("chat.completion.chunk", [], usage=whole["usage"]))


def voted(llm: LLM, solution: Solution, prompt: int, envelope: Envelope) -> dict[str, Any]:
    """A vote as a chat completion. Its text is that of the first sample with the winning answer.

    If no sample has an answer, it is the first sample's; if none has finished, it is empty.
    """
    winners = (s for s in solution.samples if s.answer is not None and normalize(s.answer) == solution.answer)
    winner = next(winners, next(iter(solution.samples), None))
    text, reason = (winner.text, winner.finish_reason) if winner else ("", "length")
    thought, reply = Thoughts(False).split(text, done=True)  # a sample's text has the <think> that its prompt opened
    made = {"role": "assistant", **message(thought, reply), "refusal": None}
    choice = {"index": 0, "message": made, "finish_reason": reason, "logprobs": None}
    counts = usage_of(llm, prompt, solution.tokens, 0, [thought])
    return envelope("chat.completion", [choice], usage=counts, vote=vote_of(solution))


# Errors


def answer_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error's answer."""
    match error:
        case Overloaded():
            return 429, error_body(429, str(error), "RateLimitError")
        case UnknownModel():
            return 404, error_body(404, str(error), "NotFoundError", "model")
        case UserError():
            name = str(error).partition("=")[0]
            param = name if name.isidentifier() else None
            return 400, error_body(400, str(error), "BadRequestError", param)
        case RequestValidationError():
            first = error.errors()[0]
            where = [str(part) for part in first["loc"][1:]]
            text = ".".join(where) + ": " * bool(where) + first["msg"].removeprefix("Value error, ")
            param = where[0] if where else None
            if param is None and text.endswith("leave it out"):
                param = text.split()[0]
            return 400, error_body(400, text, "BadRequestError", param)
        case TimedOut():
            return 504, error_body(504, str(error), "TimeoutError")
        case HTTPException():
            kind = {404: "NotFoundError", 405: "MethodNotAllowedError"}.get(error.status_code, "BadRequestError")
            return error.status_code, error_body(error.status_code, str(error.detail), kind)
        case ClientGone():
            return 499, error_body(499, "the client has gone", "ClientClosedRequest")
    return 500, error_body(500, "the server failed on this request", "InternalServerError")


def answer_errors(app: FastAPI) -> None:
    """Makes every error an object as OpenAI's clients expect it."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        status, body = answer_of(error)
        if status == 500:
            logger.error("a request failed", exc_info=error)
        return JSONResponse(body, status, {"retry-after": "1"} if status == 429 else None)

    kinds: list[type[Exception]] = [UserError, RequestValidationError, HTTPException, TimedOut, ClientGone, Exception]
    for kind in kinds:
        app.add_exception_handler(kind, handle)
