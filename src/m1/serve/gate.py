"""Who and what gets in: keys, and bounds on a request's body. An ASGI middleware, before anything is parsed."""

import asyncio
import hashlib
import hmac
import json
from typing import Any

BODY_SECONDS = 60.0  # for a body to arrive
OPEN_PATHS = ("/", "/health")  # the page holds no data; what it asks for needs the key


def error_body(status: int, text: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": text, "type": kind, "param": param, "code": status}}


class Gate:
    """Lets requests in that have a key, and a body that isn't too large or too slow.

    Args:
        app: gets the requests, with bodies that have arrived.
        keys: any of them opens; everyone gets in if there are none.
        max_body: maximum bytes of a body.
    """

    def __init__(self, app: Any, keys: list[str], max_body: int):
        self.app, self.max_body = app, max_body
        self._hashes = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one connection's request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not self._lets_in(headers.get(b"authorization", b"")):
            text = "a key is needed: send the header 'Authorization: Bearer KEY'"
            return await _refuse(send, 401, text, "AuthenticationError")
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
            return await _refuse(send, 408, f"the body took over {BODY_SECONDS:g} seconds", "RequestTimeoutError")
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
        await _refuse(send, 413, f"the body has more than {self.max_body} bytes", "PayloadTooLargeError")


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) < 20 else 0


async def _refuse(send: Any, status: int, text: str, kind: str) -> None:
    body = json.dumps(error_body(status, text, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]  # the rest of the body isn't read
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
