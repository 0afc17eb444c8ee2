"""Bodies that are too large, too slow, of the wrong type, or not what their headers say."""

import asyncio
from collections.abc import Iterator

import pytest
from starlette.types import ASGIApp, Message

from jaxpaged.serve.server.guards.body_limit import BodyLimit
from tests.serve.guard_server import (
    LOOPS,
    GuardServer,
    ToyApp,
    call,
    check_still_serves,
    error_of,
    exchange,
    get,
    post,
    run,
    serving,
    status_of,
    until,
    wire,
)

MAX_BODY = 100_000
CHUNKED = (
    b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)
JSON = ("content-type", "application/json")


def limited(app: ASGIApp) -> ASGIApp:
    return BodyLimit(app, max_body_bytes=MAX_BODY, body_timeout=60.0, drain_timeout=0.2)


def impatient(app: ASGIApp) -> ASGIApp:
    return BodyLimit(app, max_body_bytes=MAX_BODY, body_timeout=0.3, drain_timeout=0.1)


@pytest.fixture(scope="module", params=LOOPS)
def server(request: pytest.FixtureRequest) -> Iterator[GuardServer]:
    with serving(limited, loop=request.param) as running:
        yield running


@pytest.fixture(scope="module", params=LOOPS)
def hasty(request: pytest.FixtureRequest) -> Iterator[GuardServer]:
    with serving(impatient, loop=request.param) as running:
        yield running


@pytest.mark.parametrize("size", [0, 1, MAX_BODY])
def test_a_body_within_the_limit_arrives_whole(server: GuardServer, size: int) -> None:
    async def test() -> None:
        async with wire(server) as connection:
            await connection.send(post("/echo", b"x" * size))
            assert (await connection.read_response()).endswith(b"\r\n\r\n%d" % size)
            chunks = b"".join(b"1\r\nx\r\n" for _ in range(min(size, 100)))
            await connection.send(CHUNKED + chunks + b"0\r\n\r\n")
            assert (await connection.read_response()).endswith(b"\r\n\r\n%d" % min(size, 100))

    run(test())


@pytest.mark.parametrize(
    "data",
    [
        post("/echo", b"x" * (MAX_BODY + 1)),
        post("/echo", b"x" * 20_000_000),
        post("/echo", b"").replace(b": 0", b": 99999999999999999"),
        CHUNKED + b"10000\r\n" + b"x" * 0x10000 + b"\r\n10000\r\n" + b"x" * 0x10000 + b"\r\n",
        CHUNKED + b"FFFFFFFFFF\r\n" + b"x" * (MAX_BODY + 1),
    ],
    ids=["one-more", "large", "announced", "chunked", "one-chunk"],
)
def test_a_larger_body_is_refused(server: GuardServer, data: bytes) -> None:
    async def test() -> None:
        before = len(server.toy.started)
        answer = await exchange(server, data)
        assert status_of(answer) == 413
        assert error_of(answer)["message"] == "the body is larger than 100000 bytes"
        assert server.toy.started[before:] == []
        await check_still_serves(server)

    run(test())


def test_a_client_that_waits_for_100_is_refused_before_it_sends(server: GuardServer) -> None:
    async def test() -> None:
        async with wire(server) as connection:
            await connection.send(post("/echo", b"12", "Expect: 100-continue")[:-2])
            assert (await connection.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
            await connection.send(b"12")
            assert (await connection.read_response()).endswith(b"2")
        refused = post("/echo", b"", "Expect: 100-continue").replace(b": 0", b": 200000")
        assert status_of(await exchange(server, refused)) == 413

    run(test())


@pytest.mark.parametrize(
    "data",
    [
        post("/echo", b"x" * 1000)[:-1],
        post("/echo", b"x" * 1000)[:-1000],
        CHUNKED + b"5\r\nab",
        CHUNKED + b"5\r\nabcde\r\n",
    ],
    ids=["one-less", "nothing", "within-chunk", "between-chunks"],
)
def test_a_body_that_does_not_come_is_not_waited_for(hasty: GuardServer, data: bytes) -> None:
    async def test() -> None:
        answer = await exchange(hasty, data)
        assert status_of(answer) == 408
        assert error_of(answer)["type"] == "timeout_error"
        await check_still_serves(hasty)

    run(test())


def test_a_body_in_single_bytes_is_not_waited_for(hasty: GuardServer) -> None:
    async def test() -> None:
        async with wire(hasty) as connection:
            await connection.send(post("/echo", b"x" * 10_000)[:-10_000])
            reading = asyncio.ensure_future(connection.read_to_end())
            for _ in range(10_000):
                if reading.done():
                    break
                await connection.send(b"x")
                await asyncio.sleep(0.01)
            assert status_of(await reading) == 408

    run(test())


def test_a_client_that_leaves_within_its_body_starts_nothing(server: GuardServer) -> None:
    async def test() -> None:
        before = len(server.toy.started)
        async with wire(server) as connection:
            await connection.send(post("/echo", b"x" * 1000)[:-1])
            await until(lambda: server.num_open == 1)
        await check_still_serves(server)
        assert server.toy.started[before:] == ["/fast"]

    run(test())


def test_after_the_body_a_disconnect_is_seen(server: GuardServer) -> None:
    async def test() -> None:
        before, started = len(server.toy.ended), len(server.toy.started)
        async with wire(server) as connection:
            await connection.send(post("/wait", b"x" * 1000))
            await until(lambda: len(server.toy.started) > started)
            assert server.toy.ended[before:] == []
        await until(lambda: server.toy.ended[before:] == ["/wait disconnected"])

    run(test())


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"; x=y'],
)
def test_json_is_accepted(content_type: str) -> None:
    async def test() -> None:
        headers = [("content-type", content_type), ("content-encoding", "identity")]
        answer = await call(limited(ToyApp()), "POST", "/echo", headers=headers, body=b"{}")
        assert (answer[0], answer[2]) == (200, b"2")

    run(test())


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize("body", [b"{}", b""])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", "")],
        [("content-type", "text/plain")],
        [("content-type", "text/plain; a=application/json")],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "multipart/form-data; boundary=x")],
        [("content-type", "application/jsonp")],
        [("content-type", "application/json, text/plain")],
        [("content-type", "application/json; charset=utf-16")],
        [("content-type", b"\xff\xfe")],
        [JSON, ("content-encoding", "gzip")],
        [JSON, ("content-encoding", "br, identity")],
    ],
    ids=range(12),
)
def test_other_types_and_encodings_are_refused(
    headers: list[tuple[str, str]], method: str, body: bytes
) -> None:
    async def test() -> None:
        toy = ToyApp()
        status, lines, _ = await call(limited(toy), method, "/echo", headers=headers, body=body)
        assert status == 415
        assert lines["connection"] == "close"
        assert toy.started == []

    run(test())


def test_what_reads_needs_no_content_type() -> None:
    async def test() -> None:
        for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
            assert (await call(limited(ToyApp()), method, "/fast"))[0] == 200
        assert (await call(limited(ToyApp()), "GET", "/echo", body=b"abc"))[2] == b"3"

    run(test())


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (("transfer-encoding", "gzip, chunked"), 501),
        (("content-length", "12x"), 400),
        (("content-length", "²"), 400),
        (("content-length", "9" * 5000), 400),
        (("content-length", "-5"), 400),
    ],
)
def test_lengths_that_another_server_let_through_are_refused(line: tuple[str, str], status: int) -> None:
    async def test() -> None:
        assert (await call(limited(ToyApp()), "POST", "/echo", headers=[JSON, line]))[0] == status

    run(test())


def test_all_bodies_together_are_bounded() -> None:
    """Each may be as large as it likes; what counts is what waits for its end at the same time."""
    guard = BodyLimit(ToyApp(), max_body_bytes=1000, max_total_body_bytes=1500, body_timeout=60.0)
    going_on = asyncio.Event()

    async def half(size: int) -> int:
        messages: list[Message] = [
            {"type": "http.request", "body": b"", "more_body": False},
            {"type": "http.request", "body": b"x" * size, "more_body": True},
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            if len(messages) == 1:
                await going_on.wait()
            return messages.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
        await guard({"type": "http", "method": "POST", "path": "/echo", "headers": headers}, receive, send)
        return int(sent[0]["status"])

    async def test() -> None:
        first = asyncio.ensure_future(half(900))
        await until(lambda: guard.num_buffered_bytes == 900)
        second = asyncio.ensure_future(half(900))
        await until(lambda: guard.num_buffered_bytes == 900)
        going_on.set()
        assert sorted([await first, await second]) == [200, 503]
        assert guard.num_buffered_bytes == 0
        assert await half(900) == 200

    run(test())


def test_other_scopes_pass() -> None:
    seen = []

    async def app(scope: object, receive: object, send: object) -> None:
        seen.append(scope)

    async def test() -> None:
        await limited(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
        assert seen == [{"type": "lifespan"}]

    run(test())


def test_get_with_the_server_needs_nothing(server: GuardServer) -> None:
    async def test() -> None:
        assert (await exchange(server, get("/fast", "Connection: close"))).endswith(b"fine")

    run(test())
