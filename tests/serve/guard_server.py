"""A toy application behind the guards, served by uvicorn in a thread, and raw connections to it."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.guards.connection import LimitedHttpToolsProtocol, limited_protocol
from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits

DEADLINE = 20.0  # for what should take much less, on a machine that does a lot else
LOOPS = ("asyncio", "uvloop")


class ToyApp:
    """GET /health, /fast, /wait (silent), /stream (endless, as fast as it goes), /drip; POST /echo.

    ``ended`` has ``"PATH disconnected"`` or ``"PATH complete"`` of every request, in the order of their ends.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.scopes: list[Scope] = []
        self.num_sent = 0  # chunks of /stream that were accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.scopes.append(scope)
        self.started.append(path)
        handler = {"/wait": self.wait, "/stream": self.stream, "/drip": self.drip, "/echo": self.echo}
        end = await handler.get(path, self.answer)(receive, send)
        self.ended.append(f"{path} {end}")

    async def answer(self, receive: Receive, send: Send) -> str:
        await reply(send, b"fine")
        return "complete"

    async def wait(self, receive: Receive, send: Send) -> str:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return "disconnected"

    async def echo(self, receive: Receive, send: Send) -> str:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return "disconnected"
            size += len(message["body"])
            more = message["more_body"]
        await reply(send, b"%d" % size)
        return "complete"

    async def stream(self, receive: Receive, send: Send) -> str:
        return await self._pour(receive, send, b"x" * 16384, 0.0)

    async def drip(self, receive: Receive, send: Send) -> str:
        return await self._pour(receive, send, b"data: x\n\n", 0.005)

    async def _pour(self, receive: Receive, send: Send, chunk: bytes, pause: float) -> str:
        gone = asyncio.ensure_future(self.wait(receive, send))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self.num_sent += 1
            await asyncio.sleep(pause)
        return gone.result()


async def reply(send: Send, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Complaints(logging.Handler):
    """Collects what is logged at warning or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class NoWebSocket(asyncio.Protocol):
    """What uvicorn would hand a connection to if it were upgraded."""

    def __init__(self, **arguments: object) -> None:
        raise AssertionError("a connection was upgraded")


class GuardServer:
    """A running server. What clients do is no error of its own: at its end nothing may have been logged as one."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, loop: str) -> None:
        self.toy = ToyApp()
        self.protocol: type[LimitedHttpToolsProtocol] = limited_protocol(limits)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=self.protocol,
            ws=NoWebSocket,
            loop=loop,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        self._complaints = Complaints()
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],), daemon=True)

    def __enter__(self) -> "GuardServer":
        logging.getLogger().addHandler(self._complaints)
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self._thread.join(DEADLINE)
        self._listener.close()
        logging.getLogger().removeHandler(self._complaints)
        assert not self._thread.is_alive()
        assert self._complaints.messages == []
        self.protocol.open_connections.check_invariants()

    @property
    def num_open(self) -> int:
        return len(self.protocol.open_connections)


@contextlib.contextmanager
def serving(
    guard_app: Callable[[ASGIApp], ASGIApp] | None = None,
    limits: ConnectionLimits | None = None,
    loop: str = "asyncio",
) -> Iterator[GuardServer]:
    """Serves a ToyApp, behind ``guard_app`` if it is given."""
    toy = ToyApp()
    server = GuardServer(guard_app(toy) if guard_app else toy, limits or ConnectionLimits(), loop)
    server.toy = toy
    with server:
        yield server


class Wire:
    """A raw connection. Nothing waits longer than DEADLINE."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Writes all of it, or as much as the server takes before it closes."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await asyncio.wait_for(self.writer.drain(), DEADLINE)

    async def read_to_end(self) -> bytes:
        """What comes until the server closes."""
        return await asyncio.wait_for(self._read_to_end(), DEADLINE)

    async def _read_to_end(self) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := await self.reader.read(65536):
                data += part
        return data

    async def read_response(self) -> bytes:
        """One response with a Content-Length: head and body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), DEADLINE)
        lines = head.lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
        return head + await asyncio.wait_for(self.reader.readexactly(length), DEADLINE)

    def reset(self) -> None:
        """Closes with an RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def wire(server: GuardServer, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
    """A connection to ``server``; with ``receive_buffer``, nothing is read beyond it until somebody reads."""
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        connecting = asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        await asyncio.wait_for(connecting, DEADLINE)
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 65536)
    except OSError:  # the server may have cut it off by now
        sock.close()
        raise
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(writer.wait_closed(), DEADLINE)


async def exchange(server: GuardServer, data: bytes) -> bytes:
    """Sends ``data`` on a new connection and returns all that comes until the server closes it."""
    with contextlib.suppress(ConnectionError):
        async with wire(server) as connection:
            sending = asyncio.ensure_future(connection.send(data))
            answer = await connection.read_to_end()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
            return answer
    return b""


def get(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1")


def post(path: str, body: bytes, *lines: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    head += ["Content-Type: application/json", *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


def status_of(answer: bytes) -> int:
    """The status of the first response; 0 if there is none."""
    return int(answer.split(b" ", 2)[1]) if answer else 0


def error_of(answer: bytes) -> dict[str, str]:
    """The OpenAI error object of a response that ends the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    return json.loads(body)["error"]


async def check_still_serves(server: GuardServer) -> None:
    assert (await exchange(server, get("/fast", "Connection: close"))).endswith(b"fine")
    await until(lambda: server.num_open == 0)
    server.protocol.open_connections.check_invariants()


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine with a deadline for all of it."""
    asyncio.run(asyncio.wait_for(test, 3 * DEADLINE))


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for another thread; fails when DEADLINE has passed."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)


async def until(condition: Callable[[], bool]) -> None:
    """``wait_until`` in a coroutine."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def call(
    app: ASGIApp, method: str = "GET", path: str = "/", **scope: Any
) -> tuple[int, dict[str, str], bytes]:
    """Calls an application without a network: status, headers by lower-case name, body."""
    headers = [(name.lower().encode(), _octets(value)) for name, value in scope.pop("headers", [])]
    body = scope.pop("body", b"")
    if body and not any(name == b"content-length" for name, _ in headers):
        headers.append((b"content-length", b"%d" % len(body)))
    sent: list[Message] = []
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    full = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 5),
        **scope,
    }
    await asyncio.wait_for(app(full, receive, send), DEADLINE)
    lines = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return sent[0]["status"], lines, b"".join(message.get("body", b"") for message in sent[1:])


def _octets(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1")
