"""Bounds an HTTP client's answers in time and size. httpx2's own timeouts only bound the silence between two bytes."""

import threading
import time
from typing import Any

import httpcore2
import httpx2


class Allowance(threading.local):
    """How long and how large an answer may still be. Each thread, which waits for one answer, has its own."""

    ends, left = 0.0, 0  # on time.monotonic()'s clock; bytes

    def begin(self, seconds: float, size: int) -> None:
        """Starts the clock of the next answer, with at most `size` bytes."""
        self.ends, self.left = time.monotonic() + seconds, size

    def seconds(self, most: float | None) -> float:
        """How long to wait for the next bytes, at most `most` seconds. Raises ReadTimeout after the end."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the answer isn't complete within the time limit")
        return left if most is None else min(left, most)

    def count(self, data: bytes) -> bytes:
        """Returns the bytes that came. Raises ReadError if they are too many."""
        self.left -= len(data)
        if self.left < 0:
            raise httpcore2.ReadError("the answer is too large")
        return data


class BoundedStream(httpcore2.NetworkStream):
    """A connection that gives what its thread's allowance permits."""

    def __init__(self, stream: httpcore2.NetworkStream, allowance: Allowance):
        self._stream, self._allowance = stream, allowance
        self.close, self.get_extra_info = stream.close, stream.get_extra_info  # type: ignore[method-assign]

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Reads up to `max_bytes`."""
        return self._allowance.count(self._stream.read(max_bytes, self._allowance.seconds(timeout)))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Writes all of `buffer`."""
        self._stream.write(buffer, self._allowance.seconds(timeout))

    def start_tls(self, *arguments: Any, **options: Any) -> httpcore2.NetworkStream:
        """The same connection, encrypted."""
        return BoundedStream(self._stream.start_tls(*arguments, **options), self._allowance)


class BoundedBackend(httpcore2.SyncBackend):
    """Opens bounded connections."""

    def __init__(self, allowance: Allowance):
        self._allowance = allowance

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore2.NetworkStream:
        """Opens a connection to a host."""
        return BoundedStream(super().connect_tcp(*arguments, **options), self._allowance)


def bounded_client(**options: Any) -> tuple[httpx2.Client, Allowance]:
    """An `httpx2.Client(**options)`, also through proxies, and the allowance to `begin` before each of its requests."""
    client, allowance = httpx2.Client(**options), Allowance()
    # httpx2 doesn't hand its pools' public argument through.
    for transport in (client._transport, *filter(None, client._mounts.values())):
        transport._pool._network_backend = BoundedBackend(allowance)  # type: ignore[attr-defined]
    return client, allowance
