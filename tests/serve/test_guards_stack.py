"""All guards together: their order, what is told about each request, and what a streamed chunk costs."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.guards.access import Access, RequestSummary
from jaxpaged.serve.server.guards.errors import openai_error
from jaxpaged.serve.server.guards.stack import GuardOptions, guard
from tests.serve.guard_server import (
    LOOPS,
    ToyApp,
    call,
    exchange,
    get,
    post,
    run,
    serving,
    status_of,
    until,
    wire,
)

ORIGIN = "https://app.example"
ALL = GuardOptions(
    api_keys=("secret",), allowed_hosts=("box.example",), allowed_origins=(ORIGIN,), max_body_bytes=1000
)
HEADERS = [("host", "localhost"), ("authorization", "Bearer secret"), ("origin", ORIGIN)]
JSON = ("content-type", "application/json")
# Measured: 0.1. What a test may say on a machine that does a lot else.
MAX_MICROSECONDS = 2.0


def api() -> FastAPI:
    app = FastAPI()

    @app.get("/models/{name}")
    async def model(name: str, request: Request) -> dict[str, str]:
        request.state.access["tokens"] = 3
        return {"name": name, "request_id": request.state.request_id}

    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError("of no use to a client")

    @app.get("/lines")
    async def lines() -> StreamingResponse:
        async def forever() -> AsyncIterator[bytes]:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.005)

        return StreamingResponse(forever())

    @app.exception_handler(Exception)
    async def handle(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(openai_error(500, "an internal error"), 500)

    return app


class Told:
    """Collects what is told about requests."""

    def __init__(self) -> None:
        self.summaries: list[RequestSummary] = []

    def __call__(self, summary: RequestSummary) -> None:
        self.summaries.append(summary)


def test_a_request_that_all_let_in_is_told() -> None:
    async def test() -> None:
        told = Told()
        headers = [*HEADERS, ("x-request-id", "mine")]
        status, lines, body = await call(
            guard(api(), ALL, on_end=told), path="/models/a", headers=headers, root_path=""
        )
        assert (status, json.loads(body)) == (200, {"name": "a", "request_id": "mine"})
        assert lines["x-request-id"] == "mine"
        assert lines["access-control-allow-origin"] == ORIGIN
        (summary,) = told.summaries
        assert 0 < summary.seconds < 20
        assert summary == RequestSummary(
            method="GET",
            route="/models/{name}",
            status=200,
            seconds=summary.seconds,
            client="127.0.0.1",
            request_id="mine",
            disconnected=False,
            details={"tokens": 3},
        )

    run(test())


@pytest.mark.parametrize(
    ("method", "headers", "body", "status"),
    [
        ("GET", HEADERS[:1] + HEADERS[2:], b"", 401),
        ("GET", [("host", "evil.example"), *HEADERS[1:]], b"", 403),
        ("POST", HEADERS, b"x", 415),
        ("POST", [*HEADERS, JSON], b"x" * 1001, 413),
        ("POST", [*HEADERS[:1], JSON], b"x" * 1001, 401),  # before anything is read
        ("GET", HEADERS, b"", 404),
        ("OPTIONS", [*HEADERS, ("access-control-request-method", "POST")], b"", 204),
    ],
)
def test_whatever_is_refused_has_an_id_and_is_told(
    method: str, headers: list[tuple[str, str]], body: bytes, status: int
) -> None:
    async def test() -> None:
        told = Told()
        answer = await call(guard(api(), ALL, on_end=told), method, "/none", headers=headers, body=body)
        assert answer[0] == status
        (summary,) = told.summaries
        assert (summary.status, summary.route) == (status, "unmatched")
        assert answer[1]["x-request-id"] == summary.request_id
        # A page can read why it was refused; one that is not of an allowed host is not told to whom it talks.
        readable = ("origin", ORIGIN) in headers and status != 403
        assert (answer[1].get("access-control-allow-origin") == ORIGIN) == readable

    run(test())


def test_an_error_of_the_application_has_an_id_and_is_told() -> None:
    async def test() -> None:
        told = Told()
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(name.encode(), value.encode()) for name, value in HEADERS]
        scope = {"type": "http", "method": "GET", "path": "/fails", "headers": headers, "query_string": b""}
        with pytest.raises(RuntimeError, match="of no use"):  # for the server's log
            await guard(api(), ALL, on_end=told)(scope, None, send)  # type: ignore[arg-type]
        assert sent[0]["status"] == told.summaries[0].status == 500
        assert dict(sent[0]["headers"])[b"x-request-id"].decode() == told.summaries[0].request_id
        assert b"of no use" not in sent[1]["body"]
        assert told.summaries[0].client is None

    run(test())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_leaves_a_stream_is_told(loop: str) -> None:
    told = Told()

    async def test() -> None:
        async with wire(server) as connection:
            await connection.send(get("/lines", "X-Request-Id: one"))
            await connection.reader.readuntil(b"data: x")
        await until(lambda: len(told.summaries) == 1)
        assert (told.summaries[0].status, told.summaries[0].disconnected) == (200, True)
        assert (told.summaries[0].route, told.summaries[0].request_id) == ("/lines", "one")
        assert status_of(await exchange(server, get("/none", "Connection: close"))) == 404
        await until(lambda: len(told.summaries) == 2)
        assert not told.summaries[1].disconnected

    with serving(lambda toy: guard(api(), GuardOptions(), on_end=told), loop=loop) as server:
        run(test())


def test_a_client_that_leaves_before_the_response_is_told() -> None:
    told = Told()

    async def test() -> None:
        async with wire(server) as connection:
            await connection.send(post("/wait", b"{}"))
            await until(lambda: server.toy.started == ["/wait"])
        await until(lambda: len(told.summaries) == 1)
        assert (told.summaries[0].status, told.summaries[0].disconnected) == (499, True)

    with serving(lambda toy: guard(toy, GuardOptions(), on_end=told)) as server:
        run(test())


def test_the_end_of_a_connection_after_the_response_is_no_disconnect() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await ToyApp().answer(receive, send)
        await ToyApp().wait(receive, send)

    async def test() -> None:
        told = Told()
        await call(Access(app, told))
        assert not told.summaries[0].disconnected

    run(test())


def test_a_handler_can_tell_that_the_client_left() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await ToyApp().answer(receive, send)
        scope["state"]["access"]["disconnected"] = True

    async def test() -> None:
        told = Told()
        await call(Access(app, told))
        assert told.summaries[0].disconnected

    run(test())


def test_what_cannot_be_told_does_not_disturb_the_request(caplog: pytest.LogCaptureFixture) -> None:
    def fail(summary: RequestSummary) -> None:
        raise OSError("the disk is full")

    async def test() -> None:
        with caplog.at_level(logging.ERROR):
            assert (await call(Access(ToyApp(), fail)))[0] == 200
        assert [record.getMessage() for record in caplog.records] == [
            "the end of request None could not be told"
        ]

    run(test())


def test_options_do_not_show_their_keys() -> None:
    assert "secret" not in repr(ALL)


def test_without_options_there_are_no_keys_and_no_origins() -> None:
    async def test() -> None:
        app = guard(ToyApp(), GuardOptions())
        assert (await call(app, headers=HEADERS[:1]))[0] == 200
        assert (await call(app, headers=[("host", "evil.example")]))[0] == 403
        everywhere = guard(ToyApp(), GuardOptions(bind_host="0.0.0.0"))
        assert (await call(everywhere, headers=[("host", "any.example")]))[0] == 200

    run(test())


class Pouring:
    """Sends chunks as fast as it can and measures the thread's time for each."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.seconds = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        chunk = {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True}
        start = time.thread_time()
        for _ in range(self.num_chunks):
            await send(chunk)
        self.seconds = (time.thread_time() - start) / self.num_chunks
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def seconds_per_chunk(pouring: Pouring, app: ASGIApp) -> float:
    await call(app, headers=HEADERS)
    return pouring.seconds


def test_a_streamed_chunk_costs_next_to_nothing() -> None:
    async def test() -> None:
        pouring = Pouring(20_000)
        guarded = guard(pouring, ALL, on_end=Told())
        # The least of several is what it costs when nothing else is in the way.
        bare = min([await seconds_per_chunk(pouring, pouring) for _ in range(5)])
        behind = min([await seconds_per_chunk(pouring, guarded) for _ in range(5)])
        print(f"{(behind - bare) * 1e6:.3f} us of {behind * 1e6:.3f} us for each chunk")
        assert (behind - bare) * 1e6 < MAX_MICROSECONDS

    run(test())
