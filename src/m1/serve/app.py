"""The routes of `m1 serve`."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response

from m1.engine import Request as Prompt
from m1.engine.sequence import requests_for
from m1.errors import UserError
from m1.grading import Grader, opens_thought
from m1.reasoning.budget import Budget
from m1.serve.errors import UnknownModel, answer_errors
from m1.serve.gate import Gate
from m1.serve.jobs import Ballot, Generation, Job
from m1.serve.loop import EngineLoop
from m1.serve.metrics import Metrics
from m1.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Envelope,
    TokenizeRequest,
    chat_choice,
    completion_logprobs,
    finish_reason,
    usage,
    voted,
)
from m1.serve.settings import ServeOptions
from m1.serve.streams import chat_events, completion_events, streamed, vote_events
from m1.serve.submission import Submission

VERSION = version_of("m1-reasoning")
DEFAULT_VOTE_SAMPLES = 16
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
logger = logging.getLogger(__name__)


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

    def submit(loop: EngineLoop, job: Job, request: Request) -> Submission:
        loop.submit(job)
        return Submission(loop, job, request, options.timeout, metrics)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        name, loop = chosen(body.model)
        messages = body.plain_messages()
        tokens = await asyncio.to_thread(loop.llm.encode, messages)
        envelope = Envelope("chatcmpl", name)
        params = body.params(len(tokens), loop.engine.max_model_len)
        opened = opens_thought(loop.llm.decode(tokens[-16:]))
        if body.vote:
            n, seconds = body.vote.n, body.vote.seconds
            limited(n or 1)
            budget = Budget(DEFAULT_VOTE_SAMPLES if n is None and seconds is None else n, seconds, body.vote.rule)
            loop.engine.check(Prompt(tokens, params))
            ballot = Ballot(
                loop.llm,
                messages[-1]["content"],
                tokens,
                params,
                budget,
                body.vote.weights,
                grader,
                graders,
                loop.wake,
                body.vote.show_samples,
            )
            running = submit(loop, ballot, request)
            if body.stream:
                return streamed(vote_events(running, loop.llm, ballot, body, envelope, opened))
            await running.end()
            return JSONResponse(voted(loop.llm, ballot.solution, len(tokens), envelope))
        limited(params.n)
        job = Generation(loop.llm, [Prompt(tokens, params)], body.stream)
        running = submit(loop, job, request)
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
        requests = requests_for(prompts, body.params(longest, loop.engine.max_model_len))
        for made in requests:
            made.prompt_logprobs = body.echo and body.logprobs is not None
        job = Generation(loop.llm, requests, body.stream)
        running = submit(loop, job, request)
        envelope, echoes = Envelope("cmpl", name), body.echoes(loop.llm)  # of tokens that the engine has checked
        if body.stream:
            return streamed(completion_events(running, loop.llm, job, body, envelope, echoes))
        await running.end()
        choices = []
        for i, (echo, sample) in enumerate(zip(echoes, job.samples, strict=True)):
            sequence = sample.sequence
            choice = {
                "index": i,
                "text": echo + sample.text,
                "finish_reason": finish_reason(sequence),
                "logprobs": None,
            }
            if body.logprobs is not None:
                choice["logprobs"] = completion_logprobs(loop.llm, sequence, 0, len(sequence.token_ids), 0, body.echo)
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
        tokens = await asyncio.to_thread(body.encoded, loop.llm)
        pieces = loop.llm.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        room = loop.engine.max_model_len
        return {"count": len(tokens), "max_model_len": room, "tokens": tokens, "token_strs": pieces}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        _, loop = chosen(body.model)
        if wrong := [token for token in body.tokens if token >= loop.engine.vocab_size]:
            raise UserError(f"tokens has {wrong[0]}; the vocabulary is 0 to {loop.engine.vocab_size - 1}")
        return {"prompt": await asyncio.to_thread(loop.llm.tokenizer.decode, body.tokens)}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def full() -> bool:
        return all(loop.room < 1 for loop in loops.values())

    app.add_middleware(Gate, keys=keys, max_body=options.max_body, full=full)
    if options.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=options.cors_origin, allow_methods=["*"], allow_headers=["*"])
    answer_errors(app)
    return app
