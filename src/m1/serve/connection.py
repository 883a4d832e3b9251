"""One connection of a client, who has bounded time to send a request's head and to read what it gets."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # from a request's first byte, or the connection's begin, to the end of its headers
STALL_SECONDS = 60.0  # for a client to read what is more than a full buffer


class Connection(H11Protocol):
    """uvicorn's protocol over h11, which by itself waits for ever for headers, and for readers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request's time begins."""
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._begin("head", HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """A request's time begins with its first byte, and goes on with every further one."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._begin("head", HEAD_SECONDS)
        else:
            self._end("head")

    def pause_writing(self) -> None:
        """The client's time to read begins."""
        super().pause_writing()
        self._begin("read", STALL_SECONDS)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._end("read")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        self._end("head")
        self._end("read")

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection. What its client hasn't read by now is dropped."""
        self.transport.abort()

    def _begin(self, what: str, seconds: float) -> None:
        """Closes the connection unless this ends in time. Nothing changes if it has begun."""
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _end(self, what: str) -> None:
        if timer := self._timers.pop(what, None):
            timer.cancel()
