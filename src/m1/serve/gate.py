"""Who and what gets in: keys, bounds on a request's body, and nobody when all is full. An ASGI middleware.

It refuses before anything is parsed: under overload, most requests are refused, and the engine needs the processor.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

BODY_SECONDS = 60.0  # for a body to arrive
OPEN_PATHS = ("/", "/health")  # the page holds no data; what it asks for needs the key
SAMPLING_PATHS = ("/v1/chat/completions", "/v1/completions")
REFUSAL_SECONDS = 0.25  # before a 429: clients that ask again at once would take the engine's time
CLOSING = (b"connection", b"close")  # when the rest of a body isn't read


def error_body(status: int, text: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": text, "type": kind, "param": param, "code": status}}


class Gate:
    """Lets requests in that have a key, and a body that isn't too large or too slow, while there is room for samples.

    Args:
        app: gets the requests, with bodies that have arrived.
        keys: any of them opens; everyone gets in if there are none.
        max_body: maximum bytes of a body.
        full: whether no request for samples would be taken.
    """

    def __init__(self, app: Any, keys: list[str], max_body: int, full: Callable[[], bool]):
        self.app, self.max_body, self.full = app, max_body, full
        self._hashes = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one connection's request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not self._lets_in(headers.get(b"authorization", b"")):
            text = "a key is needed: send the header 'Authorization: Bearer KEY'"
            return await _refuse(send, 401, text, "AuthenticationError", [(b"www-authenticate", b"Bearer"), CLOSING])
        if _number(headers.get(b"content-length", b"0")) > self.max_body:
            return await self._too_large(send)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    part = await receive()
                    if part["type"] == "http.disconnect":
                        return None
                    body += part.get("body", b"")
                    more = part.get("more_body", False)
                    if len(body) > self.max_body:
                        return await self._too_large(send)
        except TimeoutError:
            text = f"the body took over {BODY_SECONDS:g} seconds"
            return await _refuse(send, 408, text, "RequestTimeoutError", [CLOSING])
        if scope["path"] in SAMPLING_PATHS and self.full():
            await asyncio.sleep(REFUSAL_SECONDS)
            text = "too many samples are running or waiting: try again later"
            return await _refuse(send, 429, text, "RateLimitError", [(b"retry-after", b"1")])
        parts = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def next_part() -> Any:
            return parts.pop() if parts else await receive()

        await self.app(scope, next_part, send)

    def _lets_in(self, header: bytes) -> bool:
        """Compares in a time that doesn't depend on where keys differ."""
        scheme, _, key = header.partition(b" ")
        given = _hash(key.strip())
        found = [hmac.compare_digest(given, known) for known in self._hashes]
        return not found or (scheme.lower() == b"bearer" and any(found))

    async def _too_large(self, send: Any) -> None:
        await _refuse(send, 413, f"the body has more than {self.max_body} bytes", "PayloadTooLargeError", [CLOSING])


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) < 20 else 0


async def _refuse(send: Any, status: int, text: str, kind: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps(error_body(status, text, kind)).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": own + headers})
    await send({"type": "http.response.body", "body": body})
