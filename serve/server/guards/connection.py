"""uvicorn's HTTP connection with bounds: no client can hold one, or the memory behind it, for nothing."""

import asyncio
import logging
import socket
import struct
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits
from jaxpaged.serve.server.guards.errors import Header, error_response
from jaxpaged.serve.server.guards.open_connections import OpenConnections
from jaxpaged.serve.server.guards.socket_options import set_socket_options

logger = logging.getLogger(__name__)

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, no seconds


class _Unacceptable(Exception):
    """Raised in a callback of the parser, which ends the parsing; says what to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class LimitedHttpToolsProtocol(HttpToolsProtocol):
    """One connection of a server that is configured with ``Config(http=limited_protocol(limits))``.

    It answers by itself, with an OpenAI error object, and then ends the connection: 400 what is no HTTP/1.1, 408
    headers that do not come, 414 and 431 too long ones, 503 a connection too many. It cuts off a client that takes
    nothing of its response, so that the request's task sees a disconnect. A request to upgrade is served as one of
    HTTP/1.1. Nothing of this costs a streamed chunk anything.

    Invariants: ``_running`` is the request whose task was started last, and only it writes; ``_head_deadline`` is
    set while a request's headers, or the rest of a body that nobody waits for, are outstanding.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    open_connections: ClassVar[OpenConnections]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._running: RequestResponseCycle | None = None
        self._head_deadline: float | None = None
        self._in_head = False
        self._head_bytes = self._head_lines = 0
        # Given to the parser since it last called us: what it keeps to itself, or could go on skipping for ever.
        self._silent_bytes = 0
        self._refused = False
        self._discarded_bytes = 0
        self._linger_until: float | None = None
        self._stalled_bytes = 0
        self._stalled_since: float | None = None

    # The transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins; a connection too many is refused or, if there are far too many, cut off."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            set_socket_options(sock, self.limits)
        transport.set_write_buffer_limits(high=self.limits.write_buffer_bytes)
        self._head_deadline = self.loop.time() + self.limits.header_timeout
        excess = self.open_connections.add(self, self.client[0] if self.client else None, self.loop)
        if self.open_connections.is_flooded:
            self._refused = True
            self._cut_off()
        elif excess is not None:
            self._refuse(503, excess, [(b"retry-after", b"1")])

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends; the request that is running sees a disconnect, those that wait behind it are dropped."""
        self.open_connections.remove(self)
        self._end_running()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Parses; what cannot be parsed is answered with an error, and what follows it is thrown away."""
        if self._refused:
            self._discard(data)
            return
        self._unset_keepalive_if_required()
        if self._head_deadline is None and self._is_idle():
            self._head_deadline = self.loop.time() + self.limits.header_timeout
        self._silent_bytes += len(data)
        try:
            self._parse(data)
        except _Unacceptable as error:
            self._refuse(error.status, error.message)
        else:
            if self._silent_bytes > self.limits.max_header_bytes:
                self._refuse(431, f"the headers are larger than {self.limits.max_header_bytes} bytes")

    def resume_writing(self) -> None:
        """The client has taken most of what waited for it."""
        self._stalled_since = None
        super().resume_writing()

    # The parser's calls

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = True
        self._silent_bytes = self._head_bytes = self._head_lines = 0
        if self._head_deadline is None:
            self._head_deadline = self.loop.time() + self.limits.header_timeout

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        super().on_url(url)
        self._silent_bytes = 0
        if len(self.url) > self.limits.max_url_bytes:
            raise _Unacceptable(414, f"the URL is longer than {self.limits.max_url_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the headers, or of the trailers, which count but are not kept."""
        self._silent_bytes = 0
        self._head_bytes += len(name) + len(value) + 4
        self._head_lines += 1
        if self._head_bytes > self.limits.max_header_bytes:
            raise _Unacceptable(431, f"the headers are larger than {self.limits.max_header_bytes} bytes")
        if self._head_lines > self.limits.max_header_lines:
            raise _Unacceptable(431, f"there are more than {self.limits.max_header_lines} header lines")
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the request, or lets it wait for those before it."""
        self._in_head = False
        self._head_deadline = None
        self._silent_bytes = 0
        if len(self.pipeline) >= self.limits.max_pipelined:
            raise _Unacceptable(
                400, f"more than {self.limits.max_pipelined} requests wait on this connection"
            )
        super().on_headers_complete()
        if 0 < len(self.pipeline) < self.limits.max_pipelined:
            # uvicorn stops reading when the first request has to wait; then nothing would tell that the client left.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request; if it was answered before, the connection is idle from now on."""
        self._silent_bytes = 0
        super().on_message_complete()
        if self._is_idle():
            self._head_deadline = None
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # The watch's call

    def check(self, now: float) -> None:
        """Ends the connection if its client is late with headers, takes nothing, or has had its answer."""
        if self._linger_until is not None and now >= self._linger_until:
            self._cut_off()
            return
        self._check_reader(now)
        if self._head_deadline is None:
            return
        if self.flow.read_paused:  # what is late may have come, and not been read
            self._head_deadline = now + self.limits.header_timeout
        elif now >= self._head_deadline:
            self.open_connections.num_timed_out += 1
            self._head_deadline = None
            if self._in_head:
                text = f"the headers did not arrive within {self.limits.header_timeout:g} seconds"
                self._refuse(408, text)
            else:
                self.transport.close()

    def _check_reader(self, now: float) -> None:
        # While neither is so, something can be added to the buffer, and its size says nothing about the reader.
        if not (self.flow.write_paused or self.transport.is_closing()):
            self._stalled_since = None
            return
        size = self.transport.get_write_buffer_size()
        if self._stalled_since is None or size < self._stalled_bytes:
            self._stalled_since, self._stalled_bytes = now, size
        elif now - self._stalled_since >= self.limits.send_timeout:
            self.open_connections.num_stalled += 1
            logger.debug("%s took nothing for %g s: cut off", self.client, self.limits.send_timeout)
            self._cut_off()

    # What uvicorn's class asks its subclasses, so to speak

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _should_upgrade_to_ws(self) -> bool:
        return False

    # Our own

    def _is_idle(self) -> bool:
        return self._running is None or bool(self._running.response_complete)

    def _parse(self, data: bytes) -> None:
        """Feeds the parser; raises _Unacceptable."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # Nothing here speaks another protocol, so what follows the request is HTTP/1.1 again.
                data = data[max(1, upgrade.args[0]) :]
            except httptools.HttpParserError as error:
                self._raise_unacceptable(error)

    def _raise_unacceptable(self, error: httptools.HttpParserError) -> NoReturn:
        if isinstance(error.__context__, _Unacceptable):
            raise error.__context__ from None
        logger.debug("%s sent what is no HTTP/1.1 request", self.client, exc_info=error)
        raise _Unacceptable(400, "this is no HTTP/1.1 request") from None

    def _refuse(self, status: int, message: str, headers: Sequence[Header] = ()) -> None:
        """Answers, unless an answer is under way, and ends the connection; what still comes is thrown away."""
        self._refused = True
        self.open_connections.num_refused += 1
        logger.debug("%s refused: %d %s", self.client, status, message)
        self._head_deadline = None
        self._unset_keepalive_if_required()
        is_answering = not self._is_idle() and self._running is not None and self._running.response_started
        self._end_running()
        if is_answering:
            self.transport.close()
            return
        self.transport.write(error_response(status, message, [*self.server_state.default_headers, *headers]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_until = self.loop.time() + self.limits.linger_timeout
        self.flow.resume_reading()

    def _discard(self, data: bytes) -> None:
        self._discarded_bytes += len(data)
        if self._discarded_bytes > self.limits.linger_bytes:
            self._cut_off()

    def _end_running(self) -> None:
        """Lets the running request see that its client is gone; uvicorn tells only the one that came last."""
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
            self.flow.resume_writing()

    def _cut_off(self) -> None:
        """Ends the connection now; the kernel does not keep what is not sent."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            except OSError:
                logger.debug("%s was gone already", self.client)
        self.transport.abort()


def limited_protocol(limits: ConnectionLimits) -> type[LimitedHttpToolsProtocol]:
    """A class for the ``http`` argument of ``uvicorn.Config``: one server, one event loop.

    Its ``open_connections`` counts what there is, was refused, late or stalled.
    """

    class Limited(LimitedHttpToolsProtocol):
        """A connection within ``limits``."""

    Limited.limits = limits
    Limited.open_connections = OpenConnections(limits)
    return Limited
