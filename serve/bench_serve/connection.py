"""One HTTP/1.1 connection that notes when bytes came and leaves reading them for later.

What runs for each piece of a streamed answer is a clock, httptools' parser (llhttp) and two appends: client and
server often share cores, and a client that decodes JSON between two tokens measures itself.
"""

import asyncio
from time import perf_counter
from typing import cast

import httptools

BUFFER_BYTES = 16 * 2**10  # many tokens; a prompt's echo may take several reads


class ConnectionEndedError(Exception):
    """The connection ended before the response did."""


class MalformedResponseError(Exception):
    """What came is not HTTP."""


class Exchange:
    """One request and what came back for it: pieces of the body, and the ``perf_counter`` at which each was read.

    The parser calls the methods ``on_*``.
    """

    __slots__ = (
        "_parser",
        "content_type",
        "ended",
        "has_begun",
        "is_complete",
        "is_reusable",
        "is_sized",
        "now",
        "pieces",
        "sent",
        "server",
        "status",
        "times",
    )

    def __init__(self, sent: float) -> None:
        self.sent = sent
        self.ended = sent
        self.now = sent
        self.status = 0
        self.content_type = ""
        self.server = ""
        self.times: list[float] = []
        self.pieces: list[bytes] = []
        self.has_begun = False
        self.is_complete = False
        self.is_reusable = False
        self.is_sized = False  # by a length or by chunks; otherwise the body lasts until the connection ends
        self._parser = httptools.HttpResponseParser(self)

    @property
    def body(self) -> bytes:
        """All of the body that came."""
        return b"".join(self.pieces)

    def feed(self, data: memoryview) -> None:
        """Takes bytes that were just read.

        Raises:
          MalformedResponseError: they are no HTTP response.
        """
        self.now = perf_counter()
        self.has_begun = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise MalformedResponseError(f"no HTTP response: {error}") from None

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.decode("latin-1").lower()
        elif name == b"server":
            self.server = value.decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self.is_sized = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.is_reusable = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self.times.append(self.now)

    def on_message_complete(self) -> None:
        if self.status < 200:  # 100 Continue and its like: the response is still to come
            self.is_sized = False
            return
        self.ended = self.now
        self.is_complete = True

    def connection_lost(self) -> None:
        """The end of the connection is the end of a body that has neither a length nor chunks."""
        self.is_reusable = False
        if self.status >= 200 and not self.is_sized and not self.is_complete:
            self.ended = perf_counter()
            self.is_complete = True


class Connection(asyncio.BufferedProtocol):
    """A connection that carries one exchange after the other.

    It is read into one buffer: the other kind of protocol gets a new object of 256 KiB from asyncio for every token,
    and to map and unmap that takes the kernel longer than all the rest.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass of it
        self.is_open = True

    async def carry(self, message: bytes, exchange: Exchange) -> None:
        """Sends a request; returns when its response has come to its end.

        Raises:
          ConnectionEndedError: the connection ended first.
          MalformedResponseError: what came is not HTTP.
        """
        assert self._exchange is None, "one exchange at a time"
        if not self.is_open or self._transport is None or self._transport.is_closing():
            raise ConnectionEndedError("the connection was closed")
        self._exchange = exchange
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            await self._done
        finally:
            self._exchange = self._done = None

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        exchange = self._exchange
        if exchange is None or exchange.is_complete:
            self.abort()  # nothing was asked
            return
        try:
            exchange.feed(self._buffer[:nbytes])
        except MalformedResponseError as error:
            self._finish(error)
            self.abort()
            return
        if exchange.is_complete:
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        exchange = self._exchange
        if exchange is None:
            return
        if error is None:
            exchange.connection_lost()
        if exchange.is_complete:
            self._finish(None)
        elif exchange.has_begun:
            self._finish(
                ConnectionEndedError(f"the connection ended in the middle of the response{_why(error)}")
            )
        else:
            self._finish(ConnectionEndedError(f"the connection ended without a response{_why(error)}"))

    def abort(self) -> None:
        """Closes at once, whatever is under way."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether another exchange can follow."""
        return self.is_open and self._transport is not None and self._transport.get_write_buffer_size() == 0

    def _finish(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


def _why(error: Exception | None) -> str:
    return f": {error}" if error is not None and str(error) else ""
