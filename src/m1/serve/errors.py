"""What can go wrong with a request, and how it is told: OpenAI's error objects."""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from m1.errors import UserError
from m1.serve.gate import REFUSAL_SECONDS, error_body
from m1.serve.loop import Overloaded

logger = logging.getLogger(__name__)


class TimedOut(Exception):
    """A request has taken longer than the server allows."""


class ClientGone(Exception):
    """The client has closed the connection."""


class UnknownModel(UserError):
    """The server has no model of this name."""


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
            param = where[0] if where else first.get("ctx", {}).get("field")
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
        if status == 429:
            await asyncio.sleep(REFUSAL_SECONDS)
        return JSONResponse(body, status, {"retry-after": "1"} if status == 429 else None)

    kinds: list[type[Exception]] = [UserError, RequestValidationError, HTTPException, TimedOut, ClientGone, Exception]
    for kind in kinds:
        app.add_exception_handler(kind, handle)
